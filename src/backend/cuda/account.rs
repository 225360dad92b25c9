//! What a stage takes of its GPU's memory, told before it is taken: the KV cache gets the rest.

use super::{attention, batch, blas, driver::Context, pad_rows, patches, sample, segments, tune};
use crate::{
    backend::{DType, Limits, vision::PatchShape},
    error::Result,
};

/// The driver hands out whole pages to allocations that are not small.
const PAGE: usize = 2 << 20;
/// Smaller ones share pages.
const SMALL: usize = 1 << 20;

/// What a stage takes beside weights, pages of keys and values and the decoder's buffers depends on this.
#[derive(Debug, Clone, Copy)]
pub struct StageNeeds {
    /// The largest micro-batch.
    pub limits: Limits,
    /// Numbers of a row of the residual stream.
    pub dim: usize,
    /// Numbers of a head.
    pub head_dim: usize,
    /// Numbers of a row of logits; `None` without the head.
    pub vocab: Option<usize>,
}

/// Bytes of a GPU's memory that are free now.
pub fn free_bytes(ordinal: usize) -> Result<usize> {
    Context::of(ordinal)?.free_bytes()
}

/// Bytes that an allocation of so many costs.
pub fn allocated(bytes: usize) -> usize {
    bytes.next_multiple_of(if bytes < SMALL { 512 } else { PAGE })
}

/// Bytes of so many layers' pages of keys and values that are lost to the driver's own pages, at most.
pub fn kv_waste(layers: usize) -> usize {
    2 * layers * PAGE
}

/// Rows that buffers have room for, when micro-batches have so many at most.
pub fn rows_room(rows: usize) -> usize {
    pad_rows(rows)
}

/// Bytes that a stage takes beside weights, pages of keys and values and the decoder's buffers, at most.
pub fn stage_bytes(needs: &StageNeeds) -> usize {
    let StageNeeds { limits, dim, head_dim, vocab } = *needs;
    let [packed, rotations] = batch::device_bytes(limits, head_dim / 2);
    // While ways are tried, for what products are added to and for what empties the cache: this or less.
    let sums = pad_rows(limits.rows_max) * dim * DType::F32.size();
    let sampling = vocab.map_or(0, |vocab| sample::device_bytes(limits.seqs_max, vocab));
    [packed, rotations, sums].into_iter().map(allocated).sum::<usize>() + sampling + view_bytes()
}

/// Bytes that a view of a GPU takes by itself.
pub fn view_bytes() -> usize {
    [blas::SCRATCH_BYTES, attention::SCRATCH_BYTES_MAX].into_iter().map(allocated).sum()
}

/// Bytes that a stage of a vision tower takes beside weights and the tower's buffers, for passes of so many patches.
pub fn tower_bytes(patches: usize, dim: usize, head_dim: usize) -> usize {
    // As of a stage.
    let sums = pad_rows(patches.min(tune::TIMED_ROWS_MAX)) * dim * DType::F32.size();
    let own = segments::device_bytes(patches, head_dim);
    own.into_iter().chain([sums]).map(allocated).sum::<usize>() + view_bytes()
}

/// Bytes that the pixels of passes of so many patches take.
pub fn cutter_bytes(patches: usize, shape: PatchShape) -> usize {
    allocated(patches::bytes_max(patches, shape))
}

/// How long rows of `len` numbers between two products are made.
pub fn row_width(len: usize, dtype: DType) -> usize {
    // Rows that do not begin at whole vectors of 16 bytes are out of the tensor memory's reach, and copied in small
    // pieces everywhere.
    len.next_multiple_of(16 / dtype.size())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_allocations_are_of_whole_pages() {
        let cases = [
            (0, 0),
            (1, 512),
            (512, 512),
            (SMALL - 1, SMALL),
            (SMALL, PAGE),
            (PAGE, PAGE),
            (PAGE + 1, 2 * PAGE),
        ];
        for (bytes, want) in cases {
            assert_eq!(allocated(bytes), want, "{bytes}");
        }
    }
}

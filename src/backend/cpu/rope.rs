//! Norms and rotation of queries and keys, and the writing of keys and values to their pages.
#![allow(unsafe_code)]

use super::{
    Cpu, GRAIN,
    batch::{Batch, Tile},
    kv::{Kv, store_key, store_value},
    memory::{Shared, prefix, prefix_mut},
    norm::norm_in_place,
    simd::{Kernel, Vector},
};
use crate::{
    backend::{DType, HeadShape, QkNorm},
    batch::KV_BLOCK,
    error::Result,
};

pub(super) fn rope_kv(
    cpu: &Cpu,
    qkv: &mut [f32],
    kv: &mut Kv,
    batch: &Batch,
    heads: HeadShape,
    norm: Option<QkNorm<'_, Cpu>>,
) -> Result<()> {
    kv.check(batch, heads)?;
    let (dim, tiles) = (heads.qkv_dim(), batch.tiles.len());
    let job = Job {
        heads,
        batch,
        norms: norm.map(|n| (prefix(n.q, heads.head_dim), prefix(n.k, heads.head_dim), n.eps)),
        dtype: kv.shape.dtype,
        head_bytes: kv.head_bytes(),
        keys: Shared::new(&mut kv.keys),
        values: Shared::new(&mut kv.values),
    };
    let qkv = Shared::new(prefix_mut(qkv, batch.rows() * dim));
    let run = (GRAIN * tiles / (batch.rows() * dim).max(1)).max(1);
    cpu.pool.run(tiles.div_ceil(run), &|i| {
        for tile in &batch.tiles[i * run..tiles.min((i + 1) * run)] {
            // SAFETY: tiles do not overlap.
            let qkv = unsafe { qkv.part(tile.rows.start * dim, tile.rows.len() * dim) };
            cpu.simd.run(RopeTile { job: &job, tile, qkv });
        }
    });
    Ok(())
}

struct Job<'a> {
    heads: HeadShape,
    batch: &'a Batch,
    /// Weights for queries and keys, and what is added to the mean square.
    norms: Option<(&'a [f32], &'a [f32], f32)>,
    dtype: DType,
    /// Of one head's part of a block.
    head_bytes: usize,
    keys: Shared<'a, u8>,
    values: Shared<'a, u8>,
}

struct RopeTile<'a> {
    job: &'a Job<'a>,
    tile: &'a Tile,
    qkv: &'a mut [f32], // [rows of the tile, qkv_dim]
}

impl Kernel for RopeTile<'_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector>(self) {
        let rows = self.qkv.chunks_exact_mut(self.job.heads.qkv_dim());
        for (row, qkv) in self.tile.rows.clone().zip(rows) {
            row_of_heads::<V>(self.job, self.tile.seq, row, qkv);
        }
    }
}

#[inline(always)]
fn row_of_heads<V: Vector>(job: &Job, seq: usize, row: usize, qkv: &mut [f32]) {
    let HeadShape { heads, kv_heads, head_dim } = job.heads;
    let (cos, sin) = job.batch.rotation(row);
    let (rotated, values) = qkv.split_at_mut((heads + kv_heads) * head_dim);
    for (i, head) in rotated.chunks_exact_mut(head_dim).enumerate() {
        if let Some((q, k, eps)) = job.norms {
            norm_in_place::<V>(head, if i < heads { q } else { k }, eps);
        }
        rotate(head, cos, sin);
    }
    let position = job.batch.positions[row];
    let block = job.batch.blocks[seq].at(position / KV_BLOCK) as usize;
    let slot = position % KV_BLOCK;
    let keys = rotated[heads * head_dim..].chunks_exact(head_dim);
    for (i, (key, value)) in keys.zip(values.chunks_exact(head_dim)).enumerate() {
        let start = (block * kv_heads + i) * job.head_bytes;
        // SAFETY: one head's part of a block; no other row of a micro-batch has this block and slot, see
        // `Batch::set`.
        unsafe {
            store_key::<V>(job.dtype, key, job.keys.at(start, job.head_bytes), slot);
            store_value::<V>(job.dtype, value, job.values.at(start, job.head_bytes), slot);
        }
    }
}

/// Each pair of numbers, half a head apart, turns.
#[inline(always)]
pub(super) fn rotate(head: &mut [f32], cos: &[f32], sin: &[f32]) {
    let (low, high) = head.split_at_mut(cos.len());
    for (((a, b), cos), sin) in low.iter_mut().zip(high).zip(cos).zip(sin) {
        (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
    }
}

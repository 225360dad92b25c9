//! Keys and values in pages of `KV_BLOCK` tokens.
//!
//! A block holds, head by head, the keys with the tokens innermost and the values with the head's numbers
//! innermost: scores of 16 tokens, and sums over tokens, then take no shuffles.
#![allow(unsafe_code)]

use std::ops::Range;

use super::{
    batch::Batch,
    device_error,
    memory::Memory,
    simd::{LANES, Vector, narrow},
};
use crate::{
    backend::{DType, HeadShape, KvShape},
    batch::KV_BLOCK,
    error::Result,
};

/// One layer's KV pages. Their memory is taken when it is first written.
pub struct Kv {
    pub(super) shape: KvShape,
    pub(super) keys: Memory<u8>, // [blocks, kv_heads, head_dim, KV_BLOCK]
    /// Followed by room for a vector, which may be read beyond the last head.
    pub(super) values: Memory<u8>, // [blocks, kv_heads, KV_BLOCK, head_dim]
}

impl Kv {
    pub(super) fn new(shape: KvShape) -> Result<Self> {
        let KvShape { blocks, kv_heads, head_dim, dtype } = shape;
        let sizes = [KV_BLOCK, kv_heads, head_dim, dtype.size()];
        let bytes = sizes.iter().try_fold(blocks, |n, &size| n.checked_mul(size));
        let bytes = bytes.filter(|&n| n < usize::MAX / 2);
        let bytes = bytes.ok_or_else(|| device_error(format!("{shape:?} is too much")))?;
        Ok(Kv { shape, keys: Memory::new(bytes)?, values: Memory::new(bytes + LANES * dtype.size())? })
    }

    /// Whether the micro-batch's rows have their place here.
    pub(super) fn check(&self, batch: &Batch, heads: HeadShape) -> Result<()> {
        let HeadShape { heads: queries, kv_heads, head_dim } = heads;
        let fits = (kv_heads, head_dim) == (self.shape.kv_heads, self.shape.head_dim);
        if !fits || kv_heads == 0 || queries % kv_heads != 0 || head_dim != 2 * batch.half {
            let why = format!("{heads:?} with pages of {:?} and {} rotations", self.shape, batch.half);
            return Err(device_error(why));
        }
        if batch.blocks_end > self.shape.blocks {
            let why = format!("KV block {} of {}", batch.blocks_end - 1, self.shape.blocks);
            return Err(device_error(why));
        }
        Ok(())
    }

    /// A run of blocks, as every device has them on the host: keys as they are here have the tokens innermost.
    pub(super) fn read(&self, blocks: Range<usize>) -> Result<Vec<u8>> {
        let at = self.bytes_of(blocks)?;
        let mut bytes = Vec::with_capacity(2 * at.len());
        bytes.resize(at.len(), 0);
        let (rows, columns, size) = (self.shape.head_dim, KV_BLOCK, self.shape.dtype.size());
        let heads = bytes.chunks_exact_mut(self.head_bytes());
        for (to, from) in heads.zip(self.keys[at.clone()].chunks_exact(self.head_bytes())) {
            transpose(to, from, (rows, columns), size);
        }
        bytes.extend_from_slice(&self.values[at]);
        Ok(bytes)
    }

    /// Writes what has been read so.
    pub(super) fn write(&mut self, blocks: Range<usize>, bytes: &[u8]) -> Result<()> {
        let at = self.bytes_of(blocks)?;
        if bytes.len() != 2 * at.len() {
            return Err(device_error(format!("{} bytes for pages of {}", bytes.len(), 2 * at.len())));
        }
        let (keys, values) = bytes.split_at(at.len());
        let (head, size) = (self.head_bytes(), self.shape.dtype.size());
        let (rows, columns) = (KV_BLOCK, self.shape.head_dim);
        for (to, from) in self.keys[at.clone()].chunks_exact_mut(head).zip(keys.chunks_exact(head)) {
            transpose(to, from, (rows, columns), size);
        }
        self.values[at].copy_from_slice(values);
        Ok(())
    }

    /// Where a run of blocks is, in keys and in values.
    fn bytes_of(&self, blocks: Range<usize>) -> Result<Range<usize>> {
        if blocks.end > self.shape.blocks || blocks.start > blocks.end {
            return Err(device_error(format!("KV blocks {blocks:?} of {}", self.shape.blocks)));
        }
        let block = self.shape.kv_heads * self.head_bytes();
        Ok(blocks.start * block..blocks.end * block)
    }

    /// Where one head's part of a block begins, in keys and in values.
    pub(super) fn start(&self, block: u32, kv_head: usize) -> usize {
        (block as usize * self.shape.kv_heads + kv_head) * self.head_bytes()
    }

    /// Bytes of one head's keys, or values, in one block.
    pub(super) fn head_bytes(&self) -> usize {
        KV_BLOCK * self.shape.head_dim * self.shape.dtype.size()
    }
}

/// A matrix of numbers of `size` bytes, of so many rows and columns, turned over.
fn transpose(to: &mut [u8], from: &[u8], (rows, columns): (usize, usize), size: usize) {
    for (row, numbers) in from.chunks_exact(columns * size).enumerate() {
        for (column, number) in numbers.chunks_exact(size).enumerate() {
            to[(column * rows + row) * size..][..size].copy_from_slice(number);
        }
    }
}

/// Writes a head's key, rounded, as the `slot`th of a block.
///
/// SAFETY: `head` is that head's part of a block of this type, and nobody else has this slot.
#[inline(always)]
pub(super) unsafe fn store_key<V: Vector>(dtype: DType, key: &[f32], head: *mut u8, slot: usize) {
    let (wide, half) = (head.cast::<f32>(), head.cast::<u16>());
    let mut rounded = [0u16; LANES];
    for (i, key) in key.chunks(LANES).enumerate() {
        let first = i * LANES * KV_BLOCK + slot;
        // SAFETY: the caller's; a chunk is no longer than `rounded`.
        unsafe {
            if dtype == DType::F32 {
                for (d, &number) in key.iter().enumerate() {
                    *wide.add(first + d * KV_BLOCK) = number;
                }
            } else {
                narrow::<V>(dtype, key, rounded.as_mut_ptr());
                for (d, &number) in rounded[..key.len()].iter().enumerate() {
                    *half.add(first + d * KV_BLOCK) = number;
                }
            }
        }
    }
}

/// Writes a head's value, rounded, as the `slot`th of a block.
///
/// SAFETY: as for `store_key`.
#[inline(always)]
pub(super) unsafe fn store_value<V: Vector>(dtype: DType, value: &[f32], head: *mut u8, slot: usize) {
    // SAFETY: the caller's.
    unsafe {
        let to = head.add(slot * value.len() * dtype.size());
        if dtype == DType::F32 {
            std::ptr::copy_nonoverlapping(value.as_ptr(), to.cast(), value.len());
        } else {
            narrow::<V>(dtype, value, to.cast());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::DType;

    #[test]
    fn pages_on_the_host_have_tokens_outside_and_come_back_as_they_were() {
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            let shape = KvShape { blocks: 5, kv_heads: 3, head_dim: 10, dtype };
            let mut pages = Kv::new(shape).unwrap();
            let half = shape.bytes() / 2;
            let all: Vec<u8> = (0..2 * half).map(|i| (i * 7 % 251) as u8).collect();
            pages.write(0..5, &all).unwrap();
            assert_eq!(pages.read(0..5).unwrap(), all);
            // Block 2, head 1, token 3, number 4 of a key: tokens are innermost in memory, and numbers on the host.
            let (size, head) = (dtype.size(), pages.head_bytes());
            let (here, there) = ((4 * KV_BLOCK + 3) * size, (3 * shape.head_dim + 4) * size);
            let start = pages.start(2, 1);
            assert_eq!(pages.keys[start + here..][..size], all[(2 * 3 + 1) * head + there..][..size]);
            assert_eq!(pages.values[..half], all[half..]);
            // A part of them.
            let part = pages.read(1..3).unwrap();
            let mut other = Kv::new(shape).unwrap();
            other.write(1..3, &part).unwrap();
            assert_eq!(other.read(1..3).unwrap(), part);
            assert!(other.read(0..1).unwrap().iter().chain(&other.read(3..5).unwrap()).all(|b| *b == 0));
            assert!(other.write(1..3, &part[1..]).is_err() && other.read(4..6).is_err());
        }
    }
}

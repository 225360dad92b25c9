//! Rotary positions: the pass's table, and the rotation of queries and keys on their way to the pages.
#![allow(unsafe_code)]

use super::{Batch, Buf, Cuda, DevicePtr, Grid, Kernel, Kv, Loading, launch::args};
use crate::{
    backend::{DType, HeadShape, QkNorm},
    error::Result,
};

const THREADS: u32 = 128;

/// The kernels of rope.cu.
pub(super) struct Kernels {
    rotations: Kernel,
    rope_kv: Kernel,
}

impl Kernels {
    pub(super) fn load(load: &Loading) -> Result<Kernels> {
        let defines = [("DTYPE", load.dtype()), ("HEAD_DIM", load.of.head_dim as u32)];
        let module = load.module("rope.cu", &defines)?;
        Ok(Kernels { rotations: module.kernel("rotations")?, rope_kv: module.kernel("rope_kv")? })
    }
}

/// Fills the table of cosines and sines of the micro-batch's rows.
pub(super) fn rotations(cuda: &Cuda, batch: &Batch) -> Result<()> {
    let (inv_freq, half, scale) = batch.frequencies();
    let (table, view, half) = (batch.rotations(), batch.view(), half as u32);
    let [down, across] = batch.bounds().map(|n| n as u32);
    let grid = Grid::row((batch.shape().rows_padded as u32 * half).div_ceil(THREADS), THREADS);
    // SAFETY: (ptr, Batch, ptr, u32, u32, u32, f32) matches rope.cu; the table has room for the padded rows, and lives with
    // the batch.
    unsafe {
        cuda.launch(
            &cuda.kernels.rope.rotations,
            grid,
            &mut args![table, view, inv_freq, half, down, across, scale],
        )
    }
}

pub(super) fn rope_kv(
    cuda: &Cuda,
    qkv: &mut Buf,
    kv: &mut Kv,
    batch: &Batch,
    heads: HeadShape,
    norm: Option<QkNorm<'_, Cuda>>,
) -> Result<()> {
    let rows = batch.shape().rows_padded;
    let qkv = qkv.expect(cuda.dtype, rows * heads.qkv_dim());
    kv.expect(heads, batch);
    let (q_norm, k_norm, eps) = match norm {
        Some(QkNorm { q, k, eps }) => {
            (q.expect(DType::F32, heads.head_dim), k.expect(DType::F32, heads.head_dim), eps)
        }
        None => (DevicePtr::NULL, DevicePtr::NULL, 0.0),
    };
    let (q_heads, kv_heads) = (heads.heads as u32, heads.kv_heads as u32);
    let groups = (q_heads + 2 * kv_heads).div_ceil(THREADS / lanes(heads.head_dim / 2));
    let grid = Grid { blocks: [rows as u32, groups, 1], threads: THREADS, shared: 0, cluster: 1 };
    let (keys, values, view) = (kv.keys(), kv.values(), batch.view());
    // SAFETY: (ptr × 5, Batch, u32, u32, f32) matches rope.cu; the sizes have been checked, and a sequence's blocks are
    // among the layer's: `expect` has checked them, or `set` has, where the pass is repeated.
    unsafe {
        cuda.launch(
            &cuda.kernels.rope.rope_kv,
            grid,
            &mut args![qkv, keys, values, q_norm, k_norm, view, q_heads, kv_heads, eps],
        )
    }
}

/// `LANES` in rope.cu: lanes that share a head, half of which has so many numbers.
fn lanes(half: usize) -> u32 {
    let together = [4, 2, 1].into_iter().find(|n| half.is_multiple_of(*n)).unwrap_or(1);
    (half / together).next_power_of_two().clamp(4, 32) as u32
}

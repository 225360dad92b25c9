//! The gate of the feed-forward part, and GELU: kernels/act.cu.
#![allow(unsafe_code)]

use super::{Buf, Cuda, DevicePtr, Grid, Kernel, Loading, launch::args};
use crate::error::Result;

const THREADS: u32 = 256;

pub(super) struct Kernels {
    silu_mul: Kernel,
    gelu: Kernel,
}

impl Kernels {
    pub(super) fn load(load: &Loading) -> Result<Kernels> {
        let module = load.module("act.cu", &[("DTYPE", load.dtype())])?;
        Ok(Kernels { silu_mul: module.kernel("silu_mul")?, gelu: module.kernel("gelu")? })
    }
}

/// `out[i] = silu(gate) * up`; a row of `gate_up` is `dim` gates, then `dim` ups. Both have as many rows.
pub(super) fn silu_mul(cuda: &Cuda, to: DevicePtr, from: DevicePtr, rows: usize, dim: usize) -> Result<()> {
    // `SPAN` in act.cu: two vectors of 16 bytes a thread.
    let span = THREADS as usize * 2 * 16 / cuda.dtype.size();
    let grid =
        Grid { blocks: [rows as u32, dim.div_ceil(span) as u32, 1], threads: THREADS, shared: 0, cluster: 1 };
    // SAFETY: (T*, const T*, u32) as in act.cu; the caller has checked both buffers, which belong to the decoder.
    unsafe { cuda.launch(&cuda.kernels.act.silu_mul, grid, &mut args![to, from, dim as u32]) }
}

/// `x = x * Φ(x)`, for the first `len` numbers.
pub(super) fn gelu(cuda: &Cuda, x: &mut Buf, len: usize) -> Result<()> {
    gelu_at(cuda, x.expect(cuda.dtype, len), len)
}

/// The same, where the caller has checked the buffer.
pub(super) fn gelu_at(cuda: &Cuda, at: DevicePtr, len: usize) -> Result<()> {
    let span = THREADS as usize * 16 / cuda.dtype.size();
    let grid = Grid::row(len.div_ceil(span) as u32, THREADS);
    // SAFETY: (T*, u64) as in act.cu; the buffer has as many numbers, and lives until it has been done.
    unsafe { cuda.launch(&cuda.kernels.act.gelu, grid, &mut args![at, len as u64]) }
}

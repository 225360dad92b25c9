//! The gate of the feed-forward part, and GELU: kernels/act.cu.
#![allow(unsafe_code)]

use super::{Buf, Cuda, Grid, Kernel, Loading, launch::args};
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

/// `out[i] = silu(gate) * up`; a row of `gate_up` is `dim` gates, then `dim` ups.
pub(super) fn silu_mul(cuda: &Cuda, out: &mut Buf, gate_up: &Buf, rows: usize, dim: usize) -> Result<()> {
    let (to, from) = (out.expect(cuda.dtype, rows * dim), gate_up.expect(cuda.dtype, rows * 2 * dim));
    // `SPAN` in act.cu: two vectors of 16 bytes a thread.
    let span = THREADS as usize * 2 * 16 / cuda.dtype.size();
    let grid = Grid { blocks: [rows as u32, dim.div_ceil(span) as u32, 1], threads: THREADS, shared: 0 };
    // SAFETY: (T*, const T*, u32) as in act.cu; both buffers have been checked and belong to the decoder.
    unsafe { cuda.launch(&cuda.kernels.act.silu_mul, grid, &mut args![to, from, dim as u32]) }
}

/// `x = x * Φ(x)`, for the first `len` numbers.
pub(super) fn gelu(cuda: &Cuda, x: &mut Buf, len: usize) -> Result<()> {
    let at = x.expect(cuda.dtype, len);
    let span = THREADS as usize * 16 / cuda.dtype.size();
    let grid = Grid::row(len.div_ceil(span) as u32, THREADS);
    // SAFETY: (T*, u64) as in act.cu; the buffer has been checked and belongs to the tower.
    unsafe { cuda.launch(&cuda.kernels.act.gelu, grid, &mut args![at, len as u64]) }
}

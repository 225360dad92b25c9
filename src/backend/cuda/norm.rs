//! RMS norms: kernels/norm.cu.
#![allow(unsafe_code)]

use super::{Buf, Cuda, Grid, Kernel, Loading, launch::args};
use crate::{
    backend::{DType, Norm},
    error::Result,
};

pub(super) struct Kernels {
    rms_norm: Kernel,
}

impl Kernels {
    pub(super) fn load(load: &Loading) -> Result<Kernels> {
        let module = load.module("norm.cu", &[("DTYPE", load.dtype())])?;
        Ok(Kernels { rms_norm: module.kernel("rms_norm")? })
    }
}

/// `out = x / sqrt(mean(x²) + eps) * w`, row by row.
pub(super) fn rms_norm(cuda: &Cuda, out: &mut Buf, x: &Buf, norm: Norm<'_, Cuda>) -> Result<()> {
    let (rows, dim, eps) = (norm.shape.rows, norm.shape.dim, norm.shape.eps);
    let to = out.expect(cuda.dtype, rows * dim);
    let from = x.expect(DType::F32, rows * dim);
    let w = norm.w.expect(DType::F32, dim);
    let grid = Grid::row(rows as u32, threads(dim));
    // SAFETY: (T*, const float*, const float*, u32, float) as in norm.cu; all buffers have been checked and belong
    // to the decoder.
    unsafe { cuda.launch(&cuda.kernels.norm.rms_norm, grid, &mut args![to, from, w, dim as u32, eps]) }
}

/// 16 numbers a thread, which stay in registers. It follows from the row's length alone, and with it the order of the
/// sum: a row has the same bits whatever the number of rows.
fn threads(dim: usize) -> u32 {
    (dim.div_ceil(16 * 32) * 32).min(1024) as u32
}

//! Matrix products with what is around them: own kernels for few rows, cublasLt for more.
#![allow(unsafe_code)]

use super::{
    Buf, Cuda, DevicePtr, FEW_ROWS, act,
    blas::{Operands, Shape},
    gemv, norm,
};
use crate::{
    backend::{DType, Norm},
    error::Result,
};

pub(super) fn norm_linear(
    cuda: &Cuda,
    out: &mut Buf,
    normed: &mut Buf,
    x: &Buf,
    norm: Norm<'_, Cuda>,
    w: &super::Matrix,
) -> Result<()> {
    let rows = norm.shape.rows;
    if rows <= FEW_ROWS {
        return gemv::norm_linear(cuda, out, x, norm, w);
    }
    norm::rms_norm(cuda, normed, x, norm)?;
    linear(cuda, out, normed, w, rows)
}

pub(super) fn norm_gate_up(
    cuda: &Cuda,
    out: &mut Buf,
    (normed, gate_up): (&mut Buf, &mut Buf),
    x: &Buf,
    norm: Norm<'_, Cuda>,
    w: &super::Matrix,
) -> Result<()> {
    let rows = norm.shape.rows;
    if rows <= FEW_ROWS {
        return gemv::norm_gate_up(cuda, out, x, norm, w);
    }
    norm_linear(cuda, gate_up, normed, x, norm, w)?;
    act::silu_mul(cuda, out, gate_up, rows, w.n / 2)
}

/// `out = x · wᵀ + bias`, for any number of rows.
pub(super) fn linear(cuda: &Cuda, out: &mut Buf, x: &Buf, w: &super::Matrix, rows: usize) -> Result<()> {
    let (to, dtype) = (out.expect(out.dtype, rows * w.n), out.dtype);
    multiply(cuda, (to, dtype, false), x, w, rows)
}

pub(super) fn linear_add(cuda: &Cuda, x: &mut Buf, y: &Buf, w: &super::Matrix, rows: usize) -> Result<()> {
    if rows <= FEW_ROWS {
        return gemv::linear_add(cuda, x, y, w, rows);
    }
    let to = x.expect(DType::F32, rows * w.n);
    multiply(cuda, (to, DType::F32, true), y, w, rows)
}

/// `out`: where to, in which type, and whether it is added to.
fn multiply(
    cuda: &Cuda,
    (out, dtype, add): (DevicePtr, DType, bool),
    x: &Buf,
    w: &super::Matrix,
    rows: usize,
) -> Result<()> {
    if rows == 0 {
        return Ok(());
    }
    let bias = w.bias(dtype);
    let shape = Shape { rows, n: w.n, k: w.k, dtype: w.dtype, out: dtype, bias: bias.is_some(), add };
    let x = x.expect(cuda.dtype, rows * w.k);
    let operands = Operands { out, x, w: w.weights(), bias: bias.unwrap_or(DevicePtr::NULL) };
    cuda.after_kernel.store(false, std::sync::atomic::Ordering::Relaxed);
    // SAFETY: the buffers have been checked; they belong to the decoder, which outlives its stream's work.
    unsafe { cuda.blas.multiply(&cuda.stream, shape, operands) }
}

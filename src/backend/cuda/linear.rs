//! Matrix products with what is around them: own kernels for few rows, for more the faster of those and cublasLt, where
//! there are any.
#![allow(unsafe_code)]

use super::{
    Buf, Cuda, DevicePtr, FEW_ROWS, act,
    blas::{Operands, Shape},
    gemm::{Op, Product},
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
    norm::rms_norm(cuda, normed, x, norm)?;
    let to = out.expect(cuda.dtype, rows * w.n / 2);
    let (from, between) = (normed.expect(cuda.dtype, rows * w.k), gate_up.expect(cuda.dtype, rows * w.n));
    let product = Product { op: Op::Silu, out: to, x: from, w, rows };
    let plain = Product { op: Op::Plain, out: between, ..product };
    product.run(cuda, &|out| {
        plain.run(cuda, &|out| multiply(cuda, &plain, out))?;
        act::silu_mul(cuda, out, between, rows, w.n / 2)
    })
}

/// `out = x · wᵀ + bias`, for any number of rows.
pub(super) fn linear(cuda: &Cuda, out: &mut Buf, x: &Buf, w: &super::Matrix, rows: usize) -> Result<()> {
    let op = if out.dtype == DType::F32 && cuda.dtype != DType::F32 { Op::PlainF32 } else { Op::Plain };
    let (out, x) = (out.expect(out.dtype, rows * w.n), x.expect(cuda.dtype, rows * w.k));
    let product = Product { op, out, x, w, rows };
    product.run(cuda, &|out| multiply(cuda, &product, out))
}

pub(super) fn linear_add(cuda: &Cuda, x: &mut Buf, y: &Buf, w: &super::Matrix, rows: usize) -> Result<()> {
    if rows <= FEW_ROWS {
        return gemv::linear_add(cuda, x, y, w, rows);
    }
    let (out, x) = (x.expect(DType::F32, rows * w.n), y.expect(cuda.dtype, rows * w.k));
    let product = Product { op: Op::Add, out, x, w, rows };
    product.run(cuda, &|out| multiply(cuda, &product, out))
}

/// By cublasLt, which has no gates.
fn multiply(cuda: &Cuda, product: &Product<'_>, out: DevicePtr) -> Result<()> {
    let Product { op, x, w, rows, .. } = *product;
    if rows == 0 {
        return Ok(());
    }
    let dtype = if op == Op::Plain { w.dtype } else { DType::F32 };
    let bias = w.bias(dtype);
    let shape = Shape {
        rows,
        n: w.n,
        width: w.n,
        k: w.k,
        dtype: w.dtype,
        out: dtype,
        bias: bias.is_some(),
        add: op == Op::Add,
    };
    let operands = Operands { out, x, w: w.weights(), bias: bias.unwrap_or(DevicePtr::NULL) };
    cuda.after_kernel.store(false, std::sync::atomic::Ordering::Relaxed);
    // SAFETY: the buffers have been checked; they belong to the decoder, which outlives its stream's work.
    unsafe { cuda.blas.multiply(&cuda.stream, shape, operands) }
}

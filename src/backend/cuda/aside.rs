//! Parts of the head on GPUs beside the last stage's: rows are read from its memory, and logits written there.
//!
//! A view for them has a stream of its own, whose kernels go before those of the GPU's stages: these have work for a pass, and
//! the last stage waits.
#![allow(unsafe_code)]

use std::{ops::Range, sync::atomic::Ordering::Relaxed};

use super::{
    Buf, Cuda, DevicePtr, Grid, Ring,
    blas::{Operands, Shape},
    launch::args,
    linear,
    memory::DeviceBuf,
    norm, pages,
};
use crate::{
    backend::{Columns, DType, Norm},
    error::Result,
};

/// An error if kernels here cannot read and write memory of `of`, or what they write does not arrive.
pub(super) fn find_way_back(cuda: &Cuda, of: &Cuda) -> Result<()> {
    let why = match cuda.reaches(of)? {
        true => {
            let room = Ring::Device(DeviceBuf::new(of.context, Cuda::TEST_BYTES)?);
            cuda.self_test(of, &room)?.or(pages::read_test(cuda, of)?)
        }
        false => Some("no peer access".into()),
    };
    match why {
        None => Ok(()),
        Some(why) => {
            let what = format!("it cannot make a part of the logits in cuda:{}'s memory", of.context.ordinal);
            Err(cuda.error(format!("{what}: {why}; the head has to be whole")))
        }
    }
}

/// Whatever comes later in the stream waits for all that is in the other one.
pub(super) fn await_all(cuda: &Cuda, other: &Cuda) -> Result<()> {
    other.record_event(&other.asked)?;
    cuda.wait(&other.asked)
}

/// Up to so many rows own kernels, each of whose blocks reads all of them, are faster than a norm and a product where rows come
/// from another GPU: with 8, they cost 7b's head what its parts save.
const FEW_ROWS: usize = 4;

/// `norm_linear` into some columns. By cublasLt alone where rows are wider: own kernels write whole rows.
pub(super) fn norm_linear_columns(
    cuda: &Cuda,
    (out, columns): (&mut Buf, Columns),
    normed: &mut Buf,
    x: &Buf,
    norm: Norm<'_, Cuda>,
    w: &super::Matrix,
) -> Result<()> {
    let (rows, Columns { first, width }) = (norm.shape.rows, columns);
    if w.n == 0 {
        return Ok(());
    }
    if width == w.n && rows <= FEW_ROWS {
        return linear::norm_linear(cuda, out, normed, x, norm, w);
    }
    norm::rms_norm(cuda, normed, x, norm)?;
    if width == w.n {
        return linear::linear(cuda, out, normed, w, rows);
    }
    assert!(first + w.n <= width && w.bias(DType::F32).is_none(), "columns of another matrix; this is a bug");
    let shape =
        Shape { rows, n: w.n, width, k: w.k, dtype: w.dtype, out: DType::F32, bias: false, add: false };
    let operands = Operands {
        out: out.expect(DType::F32, rows * width).add(DType::F32.size() * first),
        x: normed.expect(cuda.dtype, rows * w.k),
        w: w.weights(),
        bias: DevicePtr::NULL,
    };
    cuda.after_kernel.store(false, Relaxed);
    // SAFETY: the buffers have been checked; they belong to the decoder, which outlives its streams' work.
    unsafe { cuda.blas.multiply(&cuda.stream, shape, operands) }
}

/// The largest of each row's logits, of these tokens, to a place in `found`, which may be another GPU's.
pub(super) fn find_largest(
    cuda: &Cuda,
    (found, at): (&mut Buf, usize),
    logits: &Buf,
    tokens: &Range<usize>,
    rows: usize,
) -> Result<()> {
    let to = found.expect(DType::F32, 2 * (at + rows)).add(8 * at);
    let from = logits.expect(DType::F32, rows * tokens.len());
    let (n, first) = (tokens.len() as u32, tokens.start as u32);
    // SAFETY: (u64*, const float*, u32, u32) as in argmax.cu; the buffers have been checked.
    unsafe {
        cuda.launch(
            &cuda.kernels.sample.largest,
            Grid::row(rows as u32, 1024),
            &mut args![to, from, n, first],
        )
    }
}

//! Rows of a table by token, and rows that are wanted: kernels/embed.cu.
#![allow(unsafe_code)]

use super::{Batch, Buf, Cuda, DevicePtr, Grid, Kernel, Loading, Matrix, launch::args};
use crate::{backend::DType, error::Result};

/// Numbers that a block writes: `SPAN` in embed.cu.
const SPAN: usize = 1024;

pub(super) struct Kernels {
    embed: Kernel,
    gather_outputs: Kernel,
}

impl Kernels {
    pub(super) fn load(load: &Loading) -> Result<Kernels> {
        let module = load.module("embed.cu", &[("DTYPE", load.dtype())])?;
        Ok(Kernels { embed: module.kernel("embed")?, gather_outputs: module.kernel("gather_outputs")? })
    }
}

fn grid(rows: usize, dim: usize) -> Grid {
    Grid { blocks: [rows as u32, dim.div_ceil(SPAN) as u32, 1], threads: 128, shared: 0, cluster: 1 }
}

/// `out[row] = table[id of row]`, or the row of `images` that the id stands for; padding becomes zeros.
pub(super) fn embed(
    cuda: &Cuda,
    out: &mut Buf,
    table: &Matrix,
    images: Option<&Buf>,
    batch: &Batch,
) -> Result<()> {
    let (rows, dim) = (batch.shape().rows_padded, table.k);
    let to = out.expect(DType::F32, rows * dim);
    let (view, last) = (batch.view(), cuda.tokens.table());
    let (images, image_rows) = match images {
        Some(images) => (images.f32s(images.len), (images.len / dim) as u32),
        None => (DevicePtr::NULL, 0),
    };
    // SAFETY: (float*, const T*, const float*, u32, const u32*, Batch, u32, u32) as in embed.cu; `out` has been checked, an
    // id beyond the table or the images is not looked up, and all belong to the stage, or live as long.
    unsafe {
        cuda.launch(
            &cuda.kernels.embed.embed,
            grid(rows, dim),
            &mut args![to, table.weights(), images, image_rows, last, view, dim as u32, table.n as u32],
        )
    }
}

/// Copies the output rows together; padding becomes zeros.
pub(super) fn gather_outputs(cuda: &Cuda, out: &mut Buf, x: &Buf, batch: &Batch, dim: usize) -> Result<()> {
    let shape = batch.shape();
    let to = out.expect(DType::F32, shape.outputs_padded * dim);
    let from = x.expect(DType::F32, shape.rows * dim);
    // SAFETY: (float*, const float*, Batch, u32) as in embed.cu; output rows are rows, and all belong to the stage.
    unsafe {
        cuda.launch(
            &cuda.kernels.embed.gather_outputs,
            grid(shape.outputs_padded, dim),
            &mut args![to, from, batch.view(), dim as u32],
        )
    }
}

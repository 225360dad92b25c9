//! Rows of a table by token, and rows that are wanted.
#![allow(unsafe_code)]

use super::{
    Cpu, GRAIN,
    batch::Batch,
    device_error,
    matrix::Matrix,
    memory::{prefix, prefix_mut},
    simd::{Kernel, Vector, widen},
};
use crate::{backend::DType, batch::image_row, error::Result};

pub(super) fn embed(
    cpu: &Cpu,
    out: &mut [f32],
    table: &Matrix,
    images: Option<&[f32]>,
    batch: &Batch,
) -> Result<()> {
    let (dim, images) = (table.k, images.unwrap_or_default());
    for &id in &batch.ids {
        match image_row(id) {
            Some(row) if row >= images.len() / dim => {
                let rows = images.len() / dim;
                return Err(device_error(format!("row {row} is not among the {rows} of images")));
            }
            None if id as usize >= table.n => {
                return Err(device_error(format!("token {id} is not among the embedding's {}", table.n)));
            }
            _ => (),
        }
    }
    cpu.pool.rows(prefix_mut(out, batch.rows() * dim), dim, GRAIN, |row, out| {
        for (to, &id) in out.chunks_exact_mut(dim).zip(&batch.ids[row..]) {
            if let Some(row) = image_row(id) {
                to.copy_from_slice(&images[row * dim..][..dim]);
                continue;
            }
            let (tensor, from) = table.row(id as usize);
            cpu.simd.run(Widen { dtype: tensor.dtype, from, to });
        }
    });
    Ok(())
}

pub(super) fn gather_outputs(cpu: &Cpu, out: &mut [f32], x: &[f32], batch: &Batch, dim: usize) {
    let x = prefix(x, batch.rows() * dim);
    cpu.pool.rows(prefix_mut(out, batch.outputs.len() * dim), dim, GRAIN, |row, out| {
        for (to, &from) in out.chunks_exact_mut(dim).zip(&batch.outputs[row..]) {
            to.copy_from_slice(&x[from * dim..][..dim]);
        }
    });
}

struct Widen<'a> {
    dtype: DType,
    from: &'a [u8],
    to: &'a mut [f32],
}

impl Kernel for Widen<'_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector>(self) {
        assert_eq!(self.from.len(), self.to.len() * self.dtype.size(), "a row's length; this is a bug");
        // SAFETY: as many.
        unsafe { widen::<V>(self.dtype, self.from.as_ptr(), self.to) }
    }
}

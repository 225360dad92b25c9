//! RMS norms.
#![allow(unsafe_code)]

use super::{
    Cpu, GRAIN,
    memory::{prefix, prefix_mut},
    simd::{Kernel, LANES, Vector, load_part, store_part},
};
use crate::backend::NormShape;

pub(super) fn rms_norm(cpu: &Cpu, out: &mut [f32], x: &[f32], w: &[f32], shape: NormShape) {
    let NormShape { rows, dim, eps } = shape;
    let (x, w) = (prefix(x, rows * dim), prefix(w, dim));
    cpu.pool.rows(prefix_mut(out, rows * dim), dim, GRAIN, |row, out| {
        let x = &x[row * dim..][..out.len()];
        cpu.simd.run(Rms { out, x, w, eps });
    });
}

/// Whole rows as long as `w`.
struct Rms<'a> {
    out: &'a mut [f32],
    x: &'a [f32],
    w: &'a [f32],
    eps: f32,
}

impl Kernel for Rms<'_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector>(self) {
        for (out, x) in self.out.chunks_exact_mut(self.w.len()).zip(self.x.chunks_exact(self.w.len())) {
            norm_row::<V>(out, x, self.w, self.eps);
        }
    }
}

/// One row. `out` may be what `x` is copied from: see [`norm_in_place`].
#[inline(always)]
fn norm_row<V: Vector>(out: &mut [f32], x: &[f32], w: &[f32], eps: f32) {
    assert!(out.len() == x.len() && x.len() == w.len(), "rows of different lengths; this is a bug");
    // SAFETY: all three are as long.
    unsafe { norm_numbers::<V>(out.as_mut_ptr(), x.as_ptr(), w.as_ptr(), x.len(), eps) }
}

/// One row, or one head, where it is.
#[inline(always)]
pub(super) fn norm_in_place<V: Vector>(x: &mut [f32], w: &[f32], eps: f32) {
    assert_eq!(x.len(), w.len(), "rows of different lengths; this is a bug");
    let at = x.as_mut_ptr();
    // SAFETY: both are as long; each number is read before it is written.
    unsafe { norm_numbers::<V>(at, at, w.as_ptr(), x.len(), eps) }
}

/// SAFETY: `len` numbers can be read from x and w and written to out, which is x or does not overlap it.
#[inline(always)]
unsafe fn norm_numbers<V: Vector>(out: *mut f32, x: *const f32, w: *const f32, len: usize, eps: f32) {
    let whole = len / LANES * LANES;
    let rest = len - whole;
    // SAFETY: the caller's.
    unsafe {
        let mut squares = V::splat(0.0);
        for i in (0..whole).step_by(LANES) {
            let x = V::load(x.add(i));
            squares = x.fma(x, squares);
        }
        if rest > 0 {
            let x = load_part::<V>(x.add(whole), rest);
            squares = x.fma(x, squares);
        }
        let scale = V::splat(1.0 / (squares.sum() / len as f32 + eps).sqrt());
        for i in (0..whole).step_by(LANES) {
            V::load(x.add(i)).mul(scale).mul(V::load(w.add(i))).store(out.add(i));
        }
        if rest > 0 {
            let v = load_part::<V>(x.add(whole), rest).mul(scale);
            store_part(v.mul(load_part(w.add(whole), rest)), out.add(whole), rest);
        }
    }
}

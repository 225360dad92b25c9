//! Tiles of dot products.
#![allow(unsafe_code)]

use super::super::simd::{LANES, Vector};

/// How numbers are kept and multiplied.
pub(super) trait Format {
    /// Inputs.
    type X: Copy + Default;
    /// Weights.
    type W: Copy + Default;
    /// Either, in registers.
    type Reg<V: Vector>: Copy;
    /// Numbers a step.
    const STEP: usize;
    /// See `Kernel::BF16`.
    #[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
    const BF16: bool;

    fn pick_x<'a>(x: &'a [f32], rounded: &'a [u16]) -> &'a [Self::X];
    /// SAFETY: `STEP` numbers can be read.
    unsafe fn x<V: Vector>(from: *const Self::X) -> Self::Reg<V>;
    /// SAFETY: `STEP` numbers can be read.
    unsafe fn w<V: Vector>(from: *const Self::W) -> Self::Reg<V>;
    fn fma<V: Vector>(sum: V, x: Self::Reg<V>, w: Self::Reg<V>) -> V;
}

pub(super) struct F32;
pub(super) struct F16;
pub(super) struct BF16;

impl Format for F32 {
    type X = f32;
    type W = f32;
    type Reg<V: Vector> = V;
    const STEP: usize = LANES;
    const BF16: bool = false;

    #[inline(always)]
    fn pick_x<'a>(x: &'a [f32], _: &'a [u16]) -> &'a [f32] {
        x
    }
    #[inline(always)]
    unsafe fn x<V: Vector>(from: *const f32) -> V {
        // SAFETY: the caller's.
        unsafe { V::load(from) }
    }
    #[inline(always)]
    unsafe fn w<V: Vector>(from: *const f32) -> V {
        // SAFETY: the caller's.
        unsafe { V::load(from) }
    }
    #[inline(always)]
    fn fma<V: Vector>(sum: V, x: V, w: V) -> V {
        x.fma(w, sum)
    }
}

impl Format for F16 {
    type X = f32;
    type W = u16;
    type Reg<V: Vector> = V;
    const STEP: usize = LANES;
    const BF16: bool = false;

    #[inline(always)]
    fn pick_x<'a>(x: &'a [f32], _: &'a [u16]) -> &'a [f32] {
        x
    }
    #[inline(always)]
    unsafe fn x<V: Vector>(from: *const f32) -> V {
        // SAFETY: the caller's.
        unsafe { V::load(from) }
    }
    #[inline(always)]
    unsafe fn w<V: Vector>(from: *const u16) -> V {
        // SAFETY: the caller's.
        unsafe { V::load_f16(from) }
    }
    #[inline(always)]
    fn fma<V: Vector>(sum: V, x: V, w: V) -> V {
        x.fma(w, sum)
    }
}

impl Format for BF16 {
    type X = u16;
    type W = u16;
    type Reg<V: Vector> = V::Pairs;
    const STEP: usize = 2 * LANES;
    const BF16: bool = true;

    #[inline(always)]
    fn pick_x<'a>(_: &'a [f32], rounded: &'a [u16]) -> &'a [u16] {
        rounded
    }
    #[inline(always)]
    unsafe fn x<V: Vector>(from: *const u16) -> V::Pairs {
        // SAFETY: the caller's.
        unsafe { V::load_pairs(from) }
    }
    #[inline(always)]
    unsafe fn w<V: Vector>(from: *const u16) -> V::Pairs {
        // SAFETY: the caller's.
        unsafe { V::load_pairs(from) }
    }
    #[inline(always)]
    fn fma<V: Vector>(sum: V, x: V::Pairs, w: V::Pairs) -> V {
        sum.add_products(x, w)
    }
}

/// What is multiplied: rows of x with columns of w, which may lie at any address.
pub(super) struct Product<F: Format> {
    pub(super) x: *const F::X, // [rows, k]
    pub(super) w: *const F::W, // [columns, stride]
    pub(super) k: usize,
    pub(super) stride: usize,
}

impl<F: Format> Product<F> {
    /// `R` rows with `C` columns.
    ///
    /// SAFETY: x has these rows, w these columns, all `k` long.
    #[inline(always)]
    pub(super) unsafe fn tile<V: Vector, const R: usize, const C: usize>(
        &self,
        row: usize,
        column: usize,
    ) -> [[f32; C]; R] {
        let mut sums = [[V::splat(0.0); C]; R];
        let mut i = 0;
        // SAFETY: the caller's.
        unsafe {
            let (x, w) = (self.x.add(row * self.k), self.w.add(column * self.stride));
            while i + F::STEP <= self.k {
                step::<V, F, R, C>(&mut sums, (x.add(i), self.k), (w.add(i), self.stride));
                i += F::STEP;
            }
            if i < self.k {
                let rest = self.k - i;
                last_step::<V, F, R, C>(&mut sums, (x.add(i), self.k), (w.add(i), self.stride), rest);
            }
        }
        totals(&sums)
    }
}

/// Adds the products of `STEP` numbers. Both x and w are a place and a stride.
///
/// SAFETY: they can be read, for all rows and columns.
#[inline(always)]
unsafe fn step<V: Vector, F: Format, const R: usize, const C: usize>(
    sums: &mut [[V; C]; R],
    (x, x_stride): (*const F::X, usize),
    (w, w_stride): (*const F::W, usize),
) {
    // SAFETY: the caller's.
    unsafe {
        let mut columns = [F::w::<V>(w); C];
        for (c, column) in columns.iter_mut().enumerate().skip(1) {
            *column = F::w::<V>(w.add(c * w_stride));
        }
        for (r, sums) in sums.iter_mut().enumerate() {
            let x = F::x::<V>(x.add(r * x_stride));
            for (sum, column) in sums.iter_mut().zip(columns) {
                *sum = F::fma(*sum, x, column);
            }
        }
    }
}

/// The same for fewer than `STEP` numbers.
///
/// SAFETY: `len < STEP` numbers can be read, for all rows and columns.
#[inline(always)]
unsafe fn last_step<V: Vector, F: Format, const R: usize, const C: usize>(
    sums: &mut [[V; C]; R],
    (x, x_stride): (*const F::X, usize),
    (w, w_stride): (*const F::W, usize),
    len: usize,
) {
    const ROOM: usize = 2 * LANES;
    let (mut xs, mut ws) = ([[F::X::default(); ROOM]; R], [[F::W::default(); ROOM]; C]);
    // SAFETY: the caller's; len < STEP <= ROOM.
    unsafe {
        for (r, to) in xs.iter_mut().enumerate() {
            std::ptr::copy_nonoverlapping(x.add(r * x_stride), to.as_mut_ptr(), len);
        }
        for (c, to) in ws.iter_mut().enumerate() {
            // Weights may lie at any address: they are copied as bytes.
            let (from, to) = (w.add(c * w_stride).cast::<u8>(), to.as_mut_ptr().cast::<u8>());
            std::ptr::copy_nonoverlapping(from, to, len * size_of::<F::W>());
        }
        step::<V, F, R, C>(sums, (xs.as_ptr().cast(), ROOM), (ws.as_ptr().cast(), ROOM));
    }
}

/// The sum of each vector's lanes, four vectors at a time.
#[inline(always)]
fn totals<V: Vector, const R: usize, const C: usize>(sums: &[[V; C]; R]) -> [[f32; C]; R] {
    let mut totals = [[0.0; C]; R];
    let whole = R * C / 4 * 4;
    for i in (0..whole).step_by(4) {
        let at = |i: usize| (i / C, i % C);
        let [a, b, c, d] = [at(i), at(i + 1), at(i + 2), at(i + 3)];
        let four = V::sum4([sums[a.0][a.1], sums[b.0][b.1], sums[c.0][c.1], sums[d.0][d.1]]);
        totals[a.0][a.1] = four[0];
        totals[b.0][b.1] = four[1];
        totals[c.0][c.1] = four[2];
        totals[d.0][d.1] = four[3];
    }
    for i in whole..R * C {
        totals[i / C][i % C] = sums[i / C][i % C].sum();
    }
    totals
}

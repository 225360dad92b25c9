//! `out = x · wᵀ + bias`.
//!
//! Every number is one dot product with one order of summation, whatever the number of rows, the tile it is
//! computed in and the thread: 16 lanes go along `k` in steps of 16, the last step filled with zeros, and
//! [`Vector::sum`] adds the lanes. With bf16 weights the input is rounded to bf16, a step is 32 numbers, and
//! a lane takes the odd one of its two first. The bias comes last.
#![allow(unsafe_code)]

use std::ops::Range;

use super::{
    Cpu, GRAIN,
    matrix::{Matrix, Part},
    memory::{Scratch, Shared, prefix, prefix_mut, with_scratch},
    simd::{Kernel, LANES, Simd, Vector, narrow, widen},
};
use crate::{backend::DType, error::Result};

thread_local! {
    /// The input, rounded to bf16, of the thread that calls.
    static ROUNDED: Scratch<u16> = const { Scratch::new(None) };
    /// Weights of a few columns, widened, of each thread.
    static PANEL: Scratch<f32> = const { Scratch::new(None) };
}

/// From this many rows on it pays to widen weights to memory (a panel) before use.
const PANEL_ROWS: usize = 8;
/// Panels stay well within a core's second cache.
const PANEL_BYTES: usize = 192 << 10;
/// Weights that one task reads at least: below, taking a task costs more than it evens out.
const TASK_BYTES: usize = 32 << 10;
/// Columns of a tile.
const COLUMNS: usize = 4;

pub(super) fn linear(cpu: &Cpu, out: &mut [f32], x: &[f32], w: &Matrix, rows: usize) -> Result<()> {
    let (x, out) = (prefix(x, rows * w.k), prefix_mut(out, rows * w.n));
    let bf16 = w.parts.iter().any(|p| p.weights.dtype == DType::BF16);
    with_scratch(&ROUNDED, if bf16 { x.len() } else { 0 }, |rounded| {
        if bf16 {
            round(cpu, x, rounded, w.k);
        }
        let job = Job { x, rounded, w, rows, out: Shared::new(out) };
        let columns = columns_per_task(w, rows, cpu.pool.threads());
        cpu.pool.run(w.n.div_ceil(columns), &|i| {
            job.columns(cpu.simd, i * columns..w.n.min((i + 1) * columns));
        });
    })
}

/// A multiple of a tile's columns that keeps all threads busy and a panel small.
fn columns_per_task(w: &Matrix, rows: usize, threads: usize) -> usize {
    let column_bytes = (4 * w.k).max(1);
    let columns = if rows < PANEL_ROWS {
        (w.n / (threads * 3)).max(TASK_BYTES / column_bytes)
    } else {
        (w.n / (threads * 6)).min(PANEL_BYTES / column_bytes)
    };
    columns.next_multiple_of(COLUMNS).max(COLUMNS)
}

/// Rounds the input to bf16.
fn round(cpu: &Cpu, x: &[f32], rounded: &mut [u16], k: usize) {
    let run = GRAIN.div_ceil(k.max(1)) * k;
    let rounded = Shared::new(rounded);
    cpu.pool.run(x.len().div_ceil(run.max(1)), &|i| {
        let x = &x[i * run..x.len().min((i + 1) * run)];
        // SAFETY: the runs of different tasks do not overlap.
        let to = unsafe { rounded.part(i * run, x.len()) };
        cpu.simd.run(Round { x, to });
    });
}

struct Round<'a> {
    x: &'a [f32],
    to: &'a mut [u16],
}

impl Kernel for Round<'_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector>(self) {
        assert_eq!(self.x.len(), self.to.len(), "rounding to another length; this is a bug");
        // SAFETY: as many.
        unsafe { narrow::<V>(DType::BF16, self.x, self.to.as_mut_ptr()) }
    }
}

/// A linear layer for all rows.
struct Job<'a> {
    x: &'a [f32],       // [rows, k]
    rounded: &'a [u16], // [rows, k] if there are bf16 weights
    w: &'a Matrix,      // [n, k]
    rows: usize,
    out: Shared<'a, f32>, // [rows, n]
}

impl Job<'_> {
    /// The columns in `range`, which may lie in several parts.
    fn columns(&self, simd: Simd, range: Range<usize>) {
        for part in &self.w.parts {
            let start = range.start.clamp(part.start, part.start + part.n);
            let end = range.end.clamp(part.start, part.start + part.n);
            if start == end {
                continue;
            }
            let columns = PartColumns { job: self, part, start, len: end - start };
            if self.rows >= PANEL_ROWS {
                let room = (end - start) * self.w.k.next_multiple_of(2 * LANES);
                with_scratch(&PANEL, room, |panel| simd.run(InPanel { columns, panel }))
                    .expect("no memory for a few columns of weights");
            } else {
                simd.run(columns);
            }
        }
    }
}

/// Columns of one part: rows of its weights.
struct PartColumns<'a> {
    job: &'a Job<'a>,
    part: &'a Part,
    /// The first one's place in the matrix.
    start: usize,
    len: usize,
}

impl PartColumns<'_> {
    /// The first column's weights.
    #[inline(always)]
    fn weights(&self) -> *const u8 {
        let bytes = self.job.w.k * self.part.weights.dtype.size();
        self.part.weights.bytes()[(self.start - self.part.start) * bytes..][..self.len * bytes].as_ptr()
    }
}

/// Weights from where they are, each read once for all rows.
impl Kernel for PartColumns<'_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector>(self) {
        let w = self.weights();
        let k = self.job.w.k;
        // SAFETY: `weights` has checked the columns, `linear` has cut x to rows * k numbers.
        unsafe {
            match self.part.weights.dtype {
                DType::F32 => {
                    Product::<F32> { x: self.job.x.as_ptr(), w: w.cast(), stride: k }.run::<V>(&self)
                }
                DType::F16 => {
                    Product::<F16> { x: self.job.x.as_ptr(), w: w.cast(), stride: k }.run::<V>(&self)
                }
                DType::BF16 => {
                    Product::<BF16> { x: self.job.rounded.as_ptr(), w: w.cast(), stride: k }.run::<V>(&self)
                }
            }
        }
    }
}

/// Weights widened once (or copied: to be in the cache, and aligned) for many rows.
struct InPanel<'a> {
    columns: PartColumns<'a>,
    panel: &'a mut [f32], // [len, stride]
}

impl Kernel for InPanel<'_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector>(self) {
        let InPanel { columns, panel } = self;
        let k = columns.job.w.k;
        let stride = k.next_multiple_of(2 * LANES);
        let dtype = columns.part.weights.dtype;
        let from = columns.weights();
        let column = |c: usize| from.wrapping_add(c * k * dtype.size());
        let (x, rounded) = (columns.job.x.as_ptr(), columns.job.rounded.as_ptr());
        // SAFETY: `weights` has checked the columns, the panel has room for them, `linear` has cut x to
        // rows * k numbers.
        unsafe {
            if dtype == DType::BF16 {
                let panel = panel.as_mut_ptr().cast::<u16>();
                for c in 0..columns.len {
                    let to = panel.add(c * stride).cast::<u8>();
                    std::ptr::copy_nonoverlapping(column(c), to, k * dtype.size());
                }
                return Product::<BF16> { x: rounded, w: panel, stride }.run::<V>(&columns);
            }
            for (c, to) in panel.chunks_exact_mut(stride.max(1)).take(columns.len).enumerate() {
                widen::<V>(dtype, column(c), &mut to[..k]);
            }
            Product::<F32> { x, w: panel.as_ptr(), stride }.run::<V>(&columns)
        }
    }
}

/// How numbers are kept and multiplied.
trait Format {
    /// Inputs.
    type X: Copy;
    /// Weights.
    type W: Copy;
    /// Either, in registers.
    type Reg<V: Vector>: Copy;
    /// Numbers a step.
    const STEP: usize;
    const ZERO: (Self::X, Self::W);

    /// SAFETY: `STEP` numbers can be read.
    unsafe fn x<V: Vector>(from: *const Self::X) -> Self::Reg<V>;
    /// SAFETY: `STEP` numbers can be read.
    unsafe fn w<V: Vector>(from: *const Self::W) -> Self::Reg<V>;
    fn fma<V: Vector>(sum: V, x: Self::Reg<V>, w: Self::Reg<V>) -> V;
}

struct F32;
struct F16;
struct BF16;

impl Format for F32 {
    type X = f32;
    type W = f32;
    type Reg<V: Vector> = V;
    const STEP: usize = LANES;
    const ZERO: (f32, f32) = (0.0, 0.0);

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
    const ZERO: (f32, u16) = (0.0, 0);

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
    const ZERO: (u16, u16) = (0, 0);

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

/// The numbers of a product: rows of x, `k` long, with columns of weights, `stride` apart.
struct Product<F: Format> {
    x: *const F::X,
    w: *const F::W,
    stride: usize,
}

impl<F: Format> Product<F> {
    /// Few rows: the columns one by one, so that weights are read once and from one end to the other, which
    /// is what memory is fastest at. Many rows: their runs outside; the columns are few and in the cache.
    ///
    /// SAFETY: x has all rows, w has all columns of `at`.
    #[inline(always)]
    unsafe fn run<V: Vector>(&self, at: &PartColumns) {
        const RUN: usize = 6;
        let all = at.job.rows;
        // SAFETY: the caller's.
        unsafe {
            if all < PANEL_ROWS {
                for c in 0..at.len {
                    self.rows::<V, 1>(at, 0..all, c);
                }
                return;
            }
            for row in (0..all).step_by(RUN) {
                let rows = row..all.min(row + RUN);
                let whole = at.len / COLUMNS * COLUMNS;
                for c in (0..whole).step_by(COLUMNS) {
                    self.rows::<V, COLUMNS>(at, rows.clone(), c);
                }
                for c in whole..at.len {
                    self.rows::<V, 1>(at, rows.clone(), c);
                }
            }
        }
    }

    /// Rows with `C` columns from `c` on, in tiles that fit the registers.
    ///
    /// SAFETY: as for `run`.
    #[inline(always)]
    unsafe fn rows<V: Vector, const C: usize>(&self, at: &PartColumns, rows: Range<usize>, c: usize) {
        let Range { start: mut row, end } = rows;
        // SAFETY: the caller's.
        unsafe {
            while V::WIDE && row + 6 <= end {
                self.tile::<V, 6, C>(at, row, c);
                row += 6;
            }
            while V::WIDE && row + 4 <= end {
                self.tile::<V, 4, C>(at, row, c);
                row += 4;
            }
            while row + 2 <= end {
                self.tile::<V, 2, C>(at, row, c);
                row += 2;
            }
            if row < end {
                self.tile::<V, 1, C>(at, row, c);
            }
        }
    }

    /// `R` rows with `C` columns.
    ///
    /// SAFETY: as for `run`.
    #[inline(always)]
    unsafe fn tile<V: Vector, const R: usize, const C: usize>(&self, at: &PartColumns, row: usize, c: usize) {
        let (k, n) = (at.job.w.k, at.job.w.n);
        let mut sums = [[V::splat(0.0); C]; R];
        // SAFETY: the caller's.
        unsafe {
            let (x, w) = (self.x.add(row * k), self.w.add(c * self.stride));
            let mut i = 0;
            while i + F::STEP <= k {
                step::<V, F, R, C>(&mut sums, x.add(i), k, w.add(i), self.stride);
                i += F::STEP;
            }
            if i < k {
                last_step::<V, F, R, C>(&mut sums, x.add(i), k, w.add(i), self.stride, k - i);
            }
        }
        let column = at.start + c;
        let bias = at.job.w.bias.get(column..column + C);
        for (r, sums) in totals(&sums).iter().enumerate() {
            // SAFETY: a task's columns are its own.
            let out = unsafe { at.job.out.part((row + r) * n + column, C) };
            out.copy_from_slice(sums);
            for (out, bias) in out.iter_mut().zip(bias.unwrap_or(&[])) {
                *out += bias;
            }
        }
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
        let four = [sums[a.0][a.1], sums[b.0][b.1], sums[c.0][c.1], sums[d.0][d.1]];
        let four = V::sum4(four);
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

/// Adds the products of `STEP` numbers.
///
/// SAFETY: they can be read, for all rows and columns.
#[inline(always)]
unsafe fn step<V: Vector, F: Format, const R: usize, const C: usize>(
    sums: &mut [[V; C]; R],
    x: *const F::X,
    x_stride: usize,
    w: *const F::W,
    w_stride: usize,
) {
    // SAFETY: the caller's.
    unsafe {
        let mut columns = [F::w::<V>(w); C];
        for c in 1..C {
            columns[c] = F::w::<V>(w.add(c * w_stride));
        }
        for r in 0..R {
            let x = F::x::<V>(x.add(r * x_stride));
            for c in 0..C {
                sums[r][c] = F::fma(sums[r][c], x, columns[c]);
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
    x: *const F::X,
    x_stride: usize,
    w: *const F::W,
    w_stride: usize,
    len: usize,
) {
    const ROOM: usize = 2 * LANES;
    let (mut xs, mut ws) = ([[F::ZERO.0; ROOM]; R], [[F::ZERO.1; ROOM]; C]);
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
        step::<V, F, R, C>(sums, xs.as_ptr().cast(), ROOM, ws.as_ptr().cast(), ROOM);
    }
}

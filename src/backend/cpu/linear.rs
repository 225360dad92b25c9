//! `out = x · wᵀ + bias`, or `out += x · wᵀ + bias`.
//!
//! Every number is one dot product with one order of summation, whatever the number of rows, the tile it is
//! computed in and the thread: 16 lanes go along `k` in steps of 16, the last step filled with zeros, and
//! `Vector::sum` adds the lanes. With bf16 weights the input is rounded to bf16, a step is 32 numbers, and
//! a lane takes the odd one of its two first. The bias comes last.
#![allow(unsafe_code)]

mod tile;

use std::{marker::PhantomData, ops::Range};

use self::tile::{BF16, F16, F32, Format, Product};
use super::{
    Cpu, GRAIN,
    matrix::{Matrix, Part},
    memory::{Scratch, Shared, prefix, prefix_mut, with_scratch},
    simd::{Kernel, LANES, Simd, Vector, narrow, widen},
};
use crate::{
    backend::{self, DType},
    error::Result,
};

thread_local! {
    /// The input, rounded to bf16, of the thread that calls.
    static ROUNDED: Scratch<u16> = const { Scratch::new(None) };
    /// Weights of a few columns, widened, of each thread.
    static PANEL: Scratch<f32> = const { Scratch::new(None) };
}

/// From this many rows on it pays to widen weights to memory (a panel) before use.
const PANEL_ROWS: usize = 5;
/// Panels stay well within a core's second cache.
const PANEL_BYTES: usize = 192 << 10;
/// Weights that one task reads at least: below, taking a task costs more than it evens out.
const TASK_BYTES: usize = 32 << 10;
/// Columns of a task are a multiple of these, as far as there are enough: those of the largest tile.
const COLUMNS: usize = 4;

/// Where results go.
pub(super) enum Out<'a> {
    Set(&'a mut [f32]),
    Add(&'a mut [f32]),
}

pub(super) fn linear(cpu: &Cpu, out: Out, x: &[f32], w: &Matrix, rows: usize) -> Result<()> {
    linear_columns(cpu, out, backend::Columns::all(w.n), (x, w, rows))
}

/// The same into some columns of a matrix.
pub(super) fn linear_columns(
    cpu: &Cpu,
    out: Out,
    backend::Columns { first, width }: backend::Columns,
    (x, w, rows): (&[f32], &Matrix, usize),
) -> Result<()> {
    let (out, add) = match out {
        Out::Set(out) => (out, false),
        Out::Add(out) => (out, true),
    };
    assert!(first + w.n <= width, "columns of another matrix; this is a bug");
    let (x, out) = (prefix(x, rows * w.k), prefix_mut(out, rows * width));
    let bf16 = w.parts.iter().any(|p| p.weights.dtype == DType::BF16);
    with_scratch(&ROUNDED, if bf16 { x.len() } else { 0 }, |rounded| {
        if bf16 {
            round(cpu, x, rounded, w.k);
        }
        let job = Job { x, rounded, w, rows, out: Shared::new(out), first, width, add };
        let columns = columns_per_task(w, rows, cpu.pool.threads());
        cpu.pool.run(w.n.div_ceil(columns), &|i| {
            job.columns(cpu.simd, i * columns..w.n.min((i + 1) * columns));
        });
    })
}

/// Columns that keep all threads busy. With few rows they are many: memory is fastest at long runs. With
/// many rows they are few: a panel of them stays in the cache.
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
    let run = (GRAIN.div_ceil(k.max(1)) * k).max(1);
    let rounded = Shared::new(rounded);
    cpu.pool.run(x.len().div_ceil(run), &|i| {
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
    out: Shared<'a, f32>, // [rows, width]
    /// Where the weights' columns begin there.
    first: usize,
    width: usize,
    add: bool,
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
            let columns = Columns { job: self, part, start, len: end - start };
            if self.rows < PANEL_ROWS {
                match part.weights.dtype {
                    DType::F32 => simd.run(FewRows::<F32>(columns, PhantomData)),
                    DType::F16 => simd.run(FewRows::<F16>(columns, PhantomData)),
                    DType::BF16 => simd.run(FewRows::<BF16>(columns, PhantomData)),
                }
                continue;
            }
            let room = columns.len * self.w.k.next_multiple_of(2 * LANES);
            with_scratch(&PANEL, room, |panel| match part.weights.dtype {
                DType::F32 | DType::F16 => simd.run(ManyRows { columns, panel }),
                DType::BF16 => simd.run(ManyBf16Rows { columns, panel }),
            })
            .expect("no memory for a few columns of weights");
        }
    }
}

/// Columns of one part: rows of its weights.
struct Columns<'a> {
    job: &'a Job<'a>,
    part: &'a Part,
    /// The first one's place in the matrix.
    start: usize,
    len: usize,
}

impl Columns<'_> {
    /// The first column's weights.
    #[inline(always)]
    fn weights(&self) -> *const u8 {
        let bytes = self.job.w.k * self.part.weights.dtype.size();
        self.part.weights.bytes()[(self.start - self.part.start) * bytes..][..self.len * bytes].as_ptr()
    }

    /// The inputs as a format has them.
    #[inline(always)]
    fn x<F: Format>(&self) -> *const F::X {
        F::pick_x(self.job.x, self.job.rounded).as_ptr()
    }

    /// Writes the results of a tile.
    #[inline(always)]
    fn write<const R: usize, const C: usize>(&self, row: usize, c: usize, totals: [[f32; C]; R]) {
        let column = self.start + c;
        let bias = self.job.w.bias.get(column..column + C);
        for (r, mut totals) in totals.into_iter().enumerate() {
            for (total, bias) in totals.iter_mut().zip(bias.unwrap_or(&[])) {
                *total += bias;
            }
            let Job { out, first, width, .. } = self.job;
            // SAFETY: a task's columns are its own.
            let out = unsafe { out.part((row + r) * width + first + column, C) };
            match self.job.add {
                true => out.iter_mut().zip(totals).for_each(|(out, total)| *out += total),
                false => out.copy_from_slice(&totals),
            }
        }
    }
}

/// Weights straight from where they are, column by column: they are read once and from one end to the
/// other. On an EPYC with Zen 4 cores this reads as fast as memory gives, and tiles of 4 columns half as fast.
struct FewRows<'a, F>(Columns<'a>, PhantomData<F>);

impl<F: Format> Kernel for FewRows<'_, F> {
    type Output = ();
    const BF16: bool = F::BF16;

    #[inline(always)]
    fn run<V: Vector>(self) {
        let columns = self.0;
        let (k, rows) = (columns.job.w.k, columns.job.rows);
        let product = Product::<F> { x: columns.x::<F>(), w: columns.weights().cast(), k, stride: k };
        for c in 0..columns.len {
            let mut row = 0;
            // SAFETY: `weights` has checked the columns, `linear` has cut x to rows * k numbers.
            unsafe {
                while V::WIDE && row + 4 <= rows {
                    columns.write(row, c, product.tile::<V, 4, 1>(row, c));
                    row += 4;
                }
                while row + 2 <= rows {
                    columns.write(row, c, product.tile::<V, 2, 1>(row, c));
                    row += 2;
                }
                if row < rows {
                    columns.write(row, c, product.tile::<V, 1, 1>(row, c));
                }
            }
        }
    }
}

/// Weights widened once (or copied: to be in the cache, and aligned).
struct ManyRows<'a> {
    columns: Columns<'a>,
    panel: &'a mut [f32], // [len, stride]
}

impl Kernel for ManyRows<'_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector>(self) {
        let ManyRows { columns, panel } = self;
        let (k, dtype) = (columns.job.w.k, columns.part.weights.dtype);
        let stride = k.next_multiple_of(2 * LANES);
        let from = columns.weights();
        for c in 0..columns.len {
            let to = &mut panel[c * stride..][..k];
            // SAFETY: `weights` has checked the columns.
            unsafe { widen::<V>(dtype, from.add(c * k * dtype.size()), to) };
        }
        let product = Product::<F32> { x: columns.x::<F32>(), w: panel.as_ptr(), k, stride };
        // SAFETY: the panel has all columns, `linear` has cut x to rows * k numbers.
        unsafe { run_by_rows::<V, F32>(&columns, &product) }
    }
}

/// Weights copied: to be in the cache, and aligned.
struct ManyBf16Rows<'a> {
    columns: Columns<'a>,
    panel: &'a mut [f32], // room for [len, stride] of u16
}

impl Kernel for ManyBf16Rows<'_> {
    type Output = ();
    const BF16: bool = true;

    #[inline(always)]
    fn run<V: Vector>(self) {
        let ManyBf16Rows { columns, panel } = self;
        let k = columns.job.w.k;
        let stride = k.next_multiple_of(2 * LANES);
        assert!(columns.len * stride <= panel.len(), "a panel without room; this is a bug");
        let (from, panel) = (columns.weights(), panel.as_mut_ptr().cast::<u16>());
        for c in 0..columns.len {
            // SAFETY: `weights` has checked the columns, the panel has room for twice as many.
            unsafe {
                std::ptr::copy_nonoverlapping(from.add(c * k * 2), panel.add(c * stride).cast(), k * 2)
            };
        }
        let product = Product::<BF16> { x: columns.x::<BF16>(), w: panel, k, stride };
        // SAFETY: the panel has all columns, `linear` has cut x to rows * k numbers.
        unsafe { run_by_rows::<V, BF16>(&columns, &product) }
    }
}

/// Runs of rows with all columns, which are few enough to stay in the cache.
///
/// SAFETY: the product has the columns, and all rows.
#[inline(always)]
unsafe fn run_by_rows<V: Vector, F: Format>(columns: &Columns, product: &Product<F>) {
    let rows = columns.job.rows;
    let mut row = 0;
    // SAFETY: the caller's.
    unsafe {
        // Eight rows are better cut in two fours than in six and two.
        while V::WIDE && row + 6 <= rows && row + 8 != rows {
            row += rows_by_columns::<V, F, 6, 4>(columns, product, row);
        }
        while V::WIDE && row + 4 <= rows {
            row += rows_by_columns::<V, F, 4, 4>(columns, product, row);
        }
        while !V::WIDE && row + 3 <= rows {
            row += rows_by_columns::<V, F, 3, 2>(columns, product, row);
        }
        while row + 2 <= rows {
            row += rows_by_columns::<V, F, 2, 2>(columns, product, row);
        }
        if row < rows {
            rows_by_columns::<V, F, 1, 4>(columns, product, row);
        }
        for c in columns.len / COLUMNS * COLUMNS..columns.len {
            for row in 0..rows {
                columns.write(row, c, product.tile::<V, 1, 1>(row, c));
            }
        }
    }
}

/// `R` rows with all columns but those that are no multiple of `COLUMNS`.
///
/// SAFETY: the product has the columns, and these rows.
#[inline(always)]
unsafe fn rows_by_columns<V: Vector, F: Format, const R: usize, const C: usize>(
    columns: &Columns,
    product: &Product<F>,
    row: usize,
) -> usize {
    for c in (0..columns.len / COLUMNS * COLUMNS).step_by(C) {
        // SAFETY: the caller's.
        columns.write(row, c, unsafe { product.tile::<V, R, C>(row, c) });
    }
    R
}

//! Matrix products for up to eight rows, with what is around them: kernels/gemv.cu, and kernels/gemv_any.cu for what
//! that one cannot take.
//!
//! Variants are compiled when one of their kind is first used: a model needs few of them. That is never while a pass is recorded,
//! since a pass is recorded only after it has run.
#![allow(unsafe_code)]

use std::sync::Arc;

use super::{
    Buf, Cuda, DeviceFacts, DevicePtr, Grid, Kernel, Loading, Matrix, launch::args, variants::Variants,
};
use crate::{
    backend::{DType, Norm},
    error::Result,
};

/// Warps that multiply, warps that copy, and stages of the ring at most, as in gemv.cu.
const WARPS: u32 = 8;
const COPIERS: u32 = 4;
const STAGES_MAX: u32 = 32;
/// With fewer, no weights would be under way while others are multiplied.
const STAGES_MIN: u32 = 2;

/// Pieces of weights, the best first: large ones are copied fastest (on an H200 a pass of 7b with one row takes 3.43 ms
/// with the first, 3.80 ms with the second). The others are for what leaves little shared memory to the ring. Results
/// are the same bits.
const PIECES: [Piece; 3] =
    [Piece { tiles: 2, cols: 512 }, Piece { tiles: 2, cols: 256 }, Piece { tiles: 1, cols: 256 }];

pub(super) struct Kernels {
    load: Loading,
    compiled: Variants<Variant, Compiled>,
}

/// `out = norm(x) · wᵀ + bias`, with `out` in f32 or the model's type.
pub(super) fn norm_linear(
    cuda: &Cuda,
    out: &mut Buf,
    x: &Buf,
    norm: Norm<'_, Cuda>,
    w: &Matrix,
) -> Result<()> {
    let (op, dtype) = match out.dtype {
        DType::F32 => (Op::NormF32, DType::F32),
        _ => (Op::Norm, cuda.dtype),
    };
    let to = out.expect(dtype, norm.shape.rows * w.n);
    let out = Rows { at: to, bytes: w.n * dtype.size() };
    normed(cuda, op, out, x, norm, w)
}

/// `out = silu(gate) * up`, where `w` holds the gates' rows, then the ups'.
pub(super) fn norm_gate_up(
    cuda: &Cuda,
    out: &mut Buf,
    x: &Buf,
    norm: Norm<'_, Cuda>,
    w: &Matrix,
) -> Result<()> {
    let n = w.n / 2;
    let to = out.expect(cuda.dtype, norm.shape.rows * n);
    let out = Rows { at: to, bytes: n * cuda.dtype.size() };
    normed(cuda, Op::NormSilu, out, x, norm, w)
}

/// `x += y · wᵀ + bias`.
pub(super) fn linear_add(cuda: &Cuda, x: &mut Buf, y: &Buf, w: &Matrix, rows: usize) -> Result<()> {
    let out = Rows { at: x.expect(DType::F32, rows * w.n), bytes: w.n * DType::F32.size() };
    let x = Rows { at: y.expect(cuda.dtype, rows * w.k), bytes: w.k * cuda.dtype.size() };
    Product { op: Op::Add, out, x, norm: None, w, rows }.run(cuda)
}

fn normed(cuda: &Cuda, op: Op, out: Rows, x: &Buf, norm: Norm<'_, Cuda>, w: &Matrix) -> Result<()> {
    let (rows, dim, eps) = (norm.shape.rows, norm.shape.dim, norm.shape.eps);
    assert_eq!(dim, w.k, "normed rows of another length than the matrix's; this is a bug");
    let x = Rows { at: x.expect(DType::F32, rows * dim), bytes: dim * DType::F32.size() };
    let norm = Some((norm.w.expect(DType::F32, dim), eps));
    Product { op, out, x, norm, w, rows }.run(cuda)
}

/// What is done around the product.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Op {
    Norm,
    NormF32,
    NormSilu,
    Add,
}

/// Rows one after another, of so many bytes each.
#[derive(Clone, Copy)]
struct Rows {
    at: DevicePtr,
    bytes: usize,
}

impl Rows {
    fn from(self, row: usize) -> DevicePtr {
        self.at.add(row * self.bytes)
    }
}

struct Product<'a> {
    op: Op,
    out: Rows, // [rows, n]
    x: Rows,   // [rows, k]
    /// The norm's weights `[k]` and what is added to the mean square.
    norm: Option<(DevicePtr, f32)>,
    w: &'a Matrix,
    rows: usize,
}

/// `Normed` in gemv.cuh.
#[repr(C)]
#[derive(Clone, Copy)]
struct Normed {
    x: DevicePtr,
    weights: DevicePtr,
    eps: f32,
}

/// `Shape` in gemv.cuh.
#[repr(C)]
#[derive(Clone, Copy)]
struct Shape {
    rows: u32,
    n: u32,
    k: u32,
    stages: u32,
}

impl Product<'_> {
    fn run(&self, cuda: &Cuda) -> Result<()> {
        let Product { op, out, x, norm, w, rows } = *self;
        if rows == 0 {
            return Ok(());
        }
        let plan = Plan::of(cuda.facts, w.dtype, op, rows, w.k);
        let of = |rows| Plan::of(cuda.facts, w.dtype, op, rows, w.k).variant;
        let compiled = cuda.kernels.gemv.compiled(plan.variant, of)?;
        let kernel = compiled.kernel(op);
        let n = if op == Op::NormSilu { w.n / 2 } else { w.n };
        let weights = w.weights();
        let bias = w.bias(DType::F32).unwrap_or(DevicePtr::NULL);
        for first in (0..rows).step_by(plan.rows) {
            let now = plan.rows.min(rows - first);
            let shape = Shape { rows: now as u32, n: n as u32, k: w.k as u32, stages: plan.stages };
            let (out, x) = (out.from(first), x.from(first));
            match norm {
                Some((norm, eps)) => {
                    let x = Normed { x, weights: norm, eps };
                    // SAFETY: (out, Normed, const T*, const float*, Shape) as in gemv.cu and gemv_any.cu; the buffers
                    // have been checked against these rows, n and k, and belong to the decoder; so does the matrix.
                    unsafe { cuda.launch(kernel, plan.grid, &mut args![out, x, weights, bias, shape])? }
                }
                // SAFETY: (float*, const T*, const T*, const float*, Shape); as above.
                None => unsafe { cuda.launch(kernel, plan.grid, &mut args![out, x, weights, bias, shape])? },
            }
        }
        Ok(())
    }
}

/// Weights that are copied at a time: so many times 16 rows, of so many columns.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Piece {
    tiles: u32,
    cols: u32,
}

/// What a kernel file is compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Variant {
    rows: u32,
    /// `None`: gemv_any.cu.
    piece: Option<Piece>,
}

/// How a product is launched.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Plan {
    variant: Variant,
    /// Rows of a launch: fewer than all if they do not fit into shared memory.
    rows: usize,
    grid: Grid,
    stages: u32,
}

impl Plan {
    /// A block has a multiprocessor to itself, with all its shared memory: so the most weights are under way.
    fn of(facts: &DeviceFacts, dtype: DType, op: Op, rows: usize, k: usize) -> Plan {
        // Pieces of rows begin at, and consist of, multiples of 16 bytes.
        let copied_whole = dtype != DType::F32 && k.is_multiple_of(8);
        let mut together = rows.next_power_of_two();
        while copied_whole && together > 0 {
            for piece in PIECES {
                let variant = Variant { rows: together as u32, piece: Some(piece) };
                let (fixed, stage) = shared(piece, op, together, k);
                let stages = (facts.shared_per_block_max as usize).saturating_sub(fixed) / stage;
                let stages = (stages as u32).min(STAGES_MAX);
                if stages >= STAGES_MIN {
                    let mut grid = Grid::row(facts.multiprocessors, (WARPS + COPIERS) * 32);
                    grid.shared = (fixed + stages as usize * stage) as u32;
                    return Plan { variant, rows: together, grid, stages };
                }
            }
            together /= 2;
        }
        let variant = Variant { rows: if rows == 1 { 1 } else { 8 }, piece: None };
        Plan { variant, rows, grid: Grid::row(4 * facts.multiprocessors, 256), stages: 0 }
    }
}

/// Bytes of shared memory as `Room` in gemv.cu divides them: what there is once, and a stage of the ring.
fn shared(Piece { tiles, cols }: Piece, op: Op, rows: usize, k: usize) -> (usize, usize) {
    let (tile, stride) = (16 * tiles as usize, 2 * cols as usize + 64);
    let barriers = 2 * 8 * STAGES_MAX as usize;
    let parts = WARPS as usize * rows * (tile + 4) * 4;
    match op {
        Op::Add => (barriers + parts, (tile + rows) * stride),
        _ => (barriers + parts + rows * ((2 * k).next_multiple_of(128) + 64), tile * stride),
    }
}

/// The kernels of one variant.
struct Compiled {
    norm: Kernel,
    norm_f32: Kernel,
    norm_silu: Kernel,
    add: Kernel,
}

impl Compiled {
    fn kernel(&self, op: Op) -> &Kernel {
        match op {
            Op::Norm => &self.norm,
            Op::NormF32 => &self.norm_f32,
            Op::NormSilu => &self.norm_silu,
            Op::Add => &self.add,
        }
    }
}

impl Kernels {
    pub(super) fn load(load: &Loading) -> Kernels {
        Kernels { load: load.clone(), compiled: Variants::default() }
    }

    /// The variant for so many rows. Passes of other numbers of rows will soon need others.
    fn compiled(&self, wanted: Variant, of: impl Fn(usize) -> Variant) -> Result<Arc<Compiled>> {
        self.compiled.get(wanted, [1, 2, 4, 8].map(of), |variant| self.compile(variant))
    }

    fn compile(&self, Variant { rows, piece }: Variant) -> Result<Compiled> {
        let mut defines = vec![("DTYPE", self.load.dtype()), ("ROWS", rows)];
        let mut shared = 0;
        let file = match piece {
            Some(Piece { tiles, cols }) => {
                defines.extend([("TILES", tiles), ("COLS", cols)]);
                shared = self.load.facts.shared_per_block_max;
                "gemv.cu"
            }
            None => "gemv_any.cu",
        };
        let module = self.load.module(file, &defines)?;
        let kernel = |name| {
            let kernel = module.kernel(name)?;
            if shared > 0 {
                kernel.allow_shared(shared)?;
            }
            Ok(kernel)
        };
        Ok(Compiled {
            norm: kernel("gemv_norm")?,
            norm_f32: kernel("gemv_norm_f32")?,
            norm_silu: kernel("gemv_norm_silu")?,
            add: kernel("gemv_add")?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gpu(shared_per_block_max: u32) -> DeviceFacts {
        DeviceFacts { shared_per_block_max, ..DeviceFacts::h200() }
    }

    #[test]
    fn large_pieces_where_they_fit() {
        let h200 = gpu(227 << 10);
        for (rows, k, stages) in [(1, 3584, 6), (8, 3584, 4), (1, 8192, 6), (8, 8192, 2)] {
            let plan = Plan::of(&h200, DType::BF16, Op::Norm, rows, k);
            let variant = Variant { rows: rows as u32, piece: Some(PIECES[0]) };
            assert_eq!(
                (plan.variant, plan.rows, plan.stages),
                (variant, rows, stages),
                "{rows} rows, k = {k}"
            );
        }
        let add = Plan::of(&h200, DType::F16, Op::Add, 8, 29568);
        assert_eq!((add.variant.piece, add.stages), (Some(PIECES[0]), 5), "only pieces of x are kept");
    }

    #[test]
    fn everything_fits() {
        for memory in [99 << 10, 163 << 10, 227 << 10] {
            for (rows, k) in
                [(1, 8), (2, 3584), (4, 5120), (8, 8192), (8, 16384), (3, 64), (1, 32768), (8, 1 << 20)]
            {
                for op in [Op::Norm, Op::Add] {
                    let plan = Plan::of(&gpu(memory), DType::BF16, op, rows, k);
                    assert!(plan.grid.shared <= memory, "{plan:?} of {memory}");
                    assert!(
                        (1..=8).contains(&plan.rows) && plan.variant.rows as usize >= plan.rows.min(rows),
                        "{plan:?}"
                    );
                    assert!(plan.variant.piece.is_some() || k == 1 << 20, "{plan:?} of {memory}");
                }
            }
        }
    }

    #[test]
    fn odd_lengths_and_f32_go_the_slow_way() {
        for (dtype, k) in [(DType::F32, 64), (DType::BF16, 33), (DType::F16, 4)] {
            for rows in [1, 2, 8] {
                let plan = Plan::of(&gpu(227 << 10), dtype, Op::Norm, rows, k);
                assert_eq!((plan.variant.piece, plan.rows, plan.grid.shared), (None, rows, 0));
                assert!(plan.variant.rows as usize >= rows);
            }
        }
    }
}

//! Matrix products for more rows than `gemv` takes: for not many kernels/gemm.cu, and for more, if they are gates and ups, `gate_up`,
//! where those are faster than cublasLt.
//!
//! That is measured for each shape when it first comes, which is never while a pass is recorded, since a pass is recorded only
//! after it has run. As with cublasLt's algorithms all stages make the same choice.
#![allow(unsafe_code)]

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU8, AtomicUsize, Ordering::Relaxed},
    },
};

use cudarc::driver::sys;

use super::{
    Cuda, DeviceFacts, DevicePtr, FEW_ROWS, Grid, Kernel, Loading, Matrix,
    blas::{Algo, WORKSPACE_BYTES},
    choices::{self, Found},
    compile::kernels_key,
    gate_up,
    launch::args,
    memory::DeviceBuf,
    tensor_map::{self, COLUMNS},
    tune::{self, Clock},
    variants::Variants,
};
use crate::{backend::DType, error::Result};

/// Of gemm.cu. With more, products are bound by arithmetic, and cublasLt is the faster one but for gates and ups.
const ROWS_MAX: usize = 128;
/// What blocks tell each other: a number for each, or for each group of one, zeros between launches.
pub(super) const LEFT_BYTES: usize = 4 * BLOCKS_MAX as usize;

/// As in gemm.cu: threads of a block, rows of weights of a tile, and stages of the ring at most. A step is a tile's columns.
const THREADS: u32 = 256;
const FEATURES: usize = 128;
const STAGES_MAX: usize = 16;
/// Shared memory that is not the ring's: barriers, and what aligns stages.
const FIXED_BYTES: usize = 2 * 8 * STAGES_MAX + 1024;
/// With fewer, too few weights would be under way.
const STAGES_MIN: usize = 4;
/// Blocks that may share a tile, and that there may be.
const SPLIT_MAX: usize = 8;
const BLOCKS_MAX: u32 = 512;
const _: () =
    assert!(BLOCKS_MAX as usize * FEATURES * ROWS_MAX * 4 <= WORKSPACE_BYTES, "room for a part of each");

/// Who multiplies where both could.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Products {
    /// The faster one, as measured.
    Measured,
    /// The kernels of this crate.
    Own,
    /// cublasLt.
    Library,
}

/// What comes of a product.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Op {
    /// Rows of the model's type.
    Plain,
    PlainF32,
    /// `silu(gate) * up`, where weights are the gates' rows, then the ups'.
    Silu,
    /// It is added to rows of f32.
    Add,
}

/// `out = x · wᵀ`, with a bias if there is one, for so many rows.
#[derive(Clone, Copy)]
pub(super) struct Product<'a> {
    pub(super) op: Op,
    pub(super) out: DevicePtr,
    pub(super) x: DevicePtr,
    pub(super) w: &'a Matrix,
    pub(super) rows: usize,
}

pub(super) struct Kernels {
    load: Loading,
    compiled: Variants<u32, Compiled>,
    /// What has been measured: whether the own kernel is the faster one.
    faster: Mutex<HashMap<Measured, bool>>,
    products: AtomicU8,
    launched: AtomicUsize,
}

/// A kernel of this crate.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Own {
    /// gemm.cu
    FewRows,
    /// gate_up.cu
    GateUp,
}

/// What a choice is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Measured {
    op: Op,
    rows: usize,
    n: usize,
    k: usize,
    dtype: DType,
    bias: bool,
}

/// The kernels for up to so many rows.
struct Compiled {
    plain: Kernel,
    plain_f32: Kernel,
    silu: Kernel,
    add: Kernel,
}

/// `Target` in gemm.cu.
#[repr(C)]
#[derive(Clone, Copy)]
struct Target {
    out: DevicePtr,
    bias: DevicePtr,
}

/// `Meeting` in ring.cuh.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct Meeting {
    parts: DevicePtr,
    left: DevicePtr,
}

impl Meeting {
    /// In the scratch of products, which follow each other.
    pub(super) fn of(cuda: &Cuda) -> Meeting {
        Meeting { parts: cuda.blas.workspace(), left: cuda.blas.left() }
    }
}

/// `Shape` in gemm.cu.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq)]
struct Shape {
    rows: u32,
    n: u32,
    tiles: u32,
    steps: u32,
    stages: u32,
    split: u32,
}

impl Kernels {
    pub(super) fn load(load: &Loading) -> Kernels {
        Kernels {
            load: load.clone(),
            compiled: Variants::default(),
            faster: Mutex::default(),
            products: AtomicU8::new(Products::Measured as u8),
            launched: AtomicUsize::new(0),
        }
    }

    pub(super) fn set_products(&self, products: Products) {
        self.products.store(products as u8, Relaxed);
    }

    /// Launches so far.
    pub(super) fn launched(&self) -> usize {
        self.launched.load(Relaxed)
    }

    /// The kernels for so many rows.
    fn compiled(&self, wanted: u32) -> Result<Arc<Compiled>> {
        self.compiled.get(wanted, variants(), |rows| self.compile(rows))
    }

    fn compile(&self, rows: u32) -> Result<Compiled> {
        let module = self.load.module("gemm.cu", &[("DTYPE", self.load.dtype()), ("ROWS", rows)])?;
        let shared = self.load.facts.shared_per_block_max - 2 * 8 * STAGES_MAX as u32;
        let kernel = |name| {
            let kernel = module.kernel(name)?;
            kernel.allow_shared(shared)?;
            Ok(kernel)
        };
        Ok(Compiled {
            plain: kernel("gemm")?,
            plain_f32: kernel("gemm_f32")?,
            silu: kernel("gemm_silu")?,
            add: kernel("gemm_add")?,
        })
    }
}

/// Numbers of rows that kernels are compiled for: each takes up to so many.
fn variants() -> impl Iterator<Item = u32> {
    [16, 32, 64, ROWS_MAX as u32].into_iter()
}

fn variant(rows: usize) -> u32 {
    variants().find(|&most| rows <= most as usize).expect("few rows; this is a bug")
}

impl Product<'_> {
    /// The kernel that can do it, if there is one.
    fn own(&self, facts: &DeviceFacts) -> Option<Own> {
        let Product { op, w, rows, .. } = *self;
        let n = self.n();
        // Rows begin at, and consist of, whole pieces of 16 bytes; so do gates and ups, by eights.
        let fits = w.dtype != DType::F32
            && n.is_multiple_of(8)
            && w.k.is_multiple_of(8)
            && (op != Op::Silu || w.bias(DType::F32).is_none())
            && facts.arch() == "sm_90a"
            && facts.multiprocessors <= BLOCKS_MAX;
        match rows {
            _ if !fits || rows <= FEW_ROWS => None,
            ..=ROWS_MAX => (stages(facts, variant(rows)) >= STAGES_MIN).then_some(Own::FewRows),
            _ => (op == Op::Silu && gate_up::fits(facts)).then_some(Own::GateUp),
        }
    }

    /// Numbers of a row of what comes out.
    fn n(&self) -> usize {
        if self.op == Op::Silu { self.w.n / 2 } else { self.w.n }
    }

    fn measured(&self) -> Measured {
        let Product { op, w, rows, .. } = *self;
        Measured { op, rows, n: w.n, k: w.k, dtype: w.dtype, bias: w.bias(DType::F32).is_some() }
    }

    /// Enqueues it: by the kernel if that can do it and is faster than `library`, which does the same to what it is given.
    pub(super) fn run(&self, cuda: &Cuda, library: &dyn Fn(DevicePtr) -> Result<()>) -> Result<()> {
        match self.own(cuda.facts) {
            Some(own) if self.own_is_wanted(cuda, own, library)? => self.launch(cuda, own),
            _ => library(self.out),
        }
    }

    fn own_is_wanted(
        &self,
        cuda: &Cuda,
        own: Own,
        library: &dyn Fn(DevicePtr) -> Result<()>,
    ) -> Result<bool> {
        let kernels = &cuda.kernels.gemm;
        let products = kernels.products.load(Relaxed);
        if products != Products::Measured as u8 {
            return Ok(products == Products::Own as u8);
        }
        let measured = self.measured();
        let known = lock(&kernels.faster).get(&measured).copied();
        let faster = known.map_or_else(|| self.choose(cuda, own, library), Ok)?;
        lock(&kernels.faster).insert(measured, faster);
        Ok(faster)
    }

    /// Takes the choice from the table, or measures.
    fn choose(&self, cuda: &Cuda, own: Own, library: &dyn Fn(DevicePtr) -> Result<()>) -> Result<bool> {
        const OWN: Algo = [1; 8];
        const LIBRARY: Algo = [0; 8];
        let device = cuda.facts.ordinal;
        let key = cuda.blas.table_key(&format!("{:?} {}", self.measured(), kernels_key()));
        let find = || choices::find(key, device, |algo| [OWN, LIBRARY].contains(algo));
        if let Found::Known(algo) = find() {
            return Ok(algo == OWN);
        }
        // What has just been given, the right to choose, has gone back: the library chooses among its own algorithms first, and code
        // is made, which is not to count as choosing.
        let sums = if self.op == Op::Add { 4 * self.rows * self.n() } else { 0 };
        let sums = DeviceBuf::new(cuda.context, sums).ok();
        let out = match &sums {
            Some(sums) if self.op == Op::Add => sums.ptr(),
            _ => self.out,
        };
        let clock = Clock::new(cuda.context, cuda.facts)?;
        let mut ready = sums.is_some() && clock.is_cold();
        if ready {
            library(out)?;
            // A driver or a compiler that does not know what it takes costs speed, no more.
            ready = self
                .prepare(cuda, own)
                .inspect_err(|error| tracing::warn!(%error, "cublasLt multiplies"))
                .is_ok();
        }
        let measuring = match find() {
            Found::Known(algo) => return Ok(algo == OWN),
            Found::Unknown(measuring) => measuring,
        };
        let timed = ready && tune::is_worth_it(self.rows, measuring.spent());
        let mut own_faster = false;
        if timed {
            let product = Product { out, ..*self };
            let [own, library] =
                clock.compare(cuda, self.rows, [&|| product.launch(cuda, own), &|| library(out)])?;
            own_faster = own < library;
            tracing::debug!(device, shape = ?self.measured(), own, library, "chosen");
        }
        measuring.keep(if own_faster { OWN } else { LIBRARY }, timed);
        Ok(own_faster)
    }

    /// Makes what it takes to launch it, as far as that can be said before.
    fn prepare(&self, cuda: &Cuda, own: Own) -> Result<()> {
        match own {
            Own::FewRows => {
                cuda.kernels.gemm.compiled(variant(self.rows))?;
                self.weights_map(cuda).map(drop)
            }
            Own::GateUp => gate_up::prepare(cuda, self.w),
        }
    }

    fn weights_map(&self, cuda: &Cuda) -> Result<sys::CUtensorMap> {
        let Product { op, w, .. } = *self;
        let (k, n) = (w.k as u64, self.n() as u64);
        match op {
            // Gates and ups in turn, eight rows each.
            Op::Silu => tensor_map::new(
                cuda,
                (w.weights(), w.dtype),
                [k, 8, 2, n / 8],
                [k, k * n, 8 * k],
                [COLUMNS as u32, 8, 2, FEATURES as u32 / 16],
            ),
            _ => tensor_map::of_rows(cuda, (w.weights(), w.dtype), (w.n, w.k), FEATURES as u32),
        }
    }

    fn launch(&self, cuda: &Cuda, own: Own) -> Result<()> {
        let Product { op, out, x, w, rows } = *self;
        cuda.kernels.gemm.launched.fetch_add(1, Relaxed);
        if own == Own::GateUp {
            return gate_up::launch(cuda, out, x, w, rows);
        }
        let variant = variant(rows);
        let (grid, shape) = plan(cuda.facts, w.n, self.n(), w.k, rows);
        let bias = match op {
            Op::Plain => w.bias(w.dtype),
            _ => w.bias(DType::F32),
        };
        let to = Target { out, bias: bias.unwrap_or(DevicePtr::NULL) };
        let weights = self.weights_map(cuda)?;
        let x = tensor_map::of_rows(cuda, (x, w.dtype), (rows, w.k), variant)?;
        let meeting = Meeting::of(cuda);
        let compiled = cuda.kernels.gemm.compiled(variant)?;
        let kernel = match op {
            Op::Plain => &compiled.plain,
            Op::PlainF32 => &compiled.plain_f32,
            Op::Silu => &compiled.silu,
            Op::Add => &compiled.add,
        };
        // SAFETY: (Target, Map, Map, Meeting, Shape) as in gemm.cu; the caller has checked the buffers against rows, n and k,
        // and they belong to the decoder, as the matrix does, or to `choose`, which waits for it; the workspace has a part for each
        // block, and `left` a number.
        unsafe { cuda.launch(kernel, grid, &mut args![to, weights, x, meeting, shape]) }
    }
}

/// Stages that the ring has room for.
fn stages(facts: &DeviceFacts, variant: u32) -> usize {
    let room = (facts.shared_per_block_max as usize).saturating_sub(FIXED_BYTES);
    (room / stage_bytes(variant)).min(STAGES_MAX)
}

fn stage_bytes(variant: u32) -> usize {
    (FEATURES + variant as usize) * 2 * COLUMNS
}

/// How a product of `rows` rows is divided, with so many rows of weights, numbers of a row of what comes out, and columns.
fn plan(facts: &DeviceFacts, weights: usize, n: usize, k: usize, rows: usize) -> (Grid, Shape) {
    let variant = variant(rows);
    let (tiles, steps) = (weights.div_ceil(FEATURES), k.div_ceil(COLUMNS));
    let all = facts.multiprocessors as usize;
    // Few tiles are shared, each by as many blocks; more are dealt out to all.
    let split = (all / tiles).clamp(1, SPLIT_MAX.min(steps));
    let blocks = if split > 1 { tiles * split } else { all.min(tiles * steps) };
    let stages = stages(facts, variant);
    let shared = stages * stage_bytes(variant) + 1024;
    let grid = Grid {
        blocks: [blocks as u32, 1, 1],
        threads: THREADS,
        shared: shared as u32,
        cluster: split as u32,
    };
    let [rows, n, tiles, steps, stages, split] = [rows, n, tiles, steps, stages, split].map(|v| v as u32);
    (grid, Shape { rows, n, tiles, steps, stages, split })
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_tiles_are_shared_and_many_dealt_out() {
        let of = |weights, k, rows| {
            let (grid, shape) = plan(&DeviceFacts::h200(), weights, weights, k, rows);
            (grid.blocks[0], shape.tiles, shape.split)
        };
        // 7b: queries, keys and values; what attention gives; gates and ups; down; the head.
        assert_eq!(of(4608, 3584, 64), (108, 36, 3));
        assert_eq!(of(3584, 3584, 64), (112, 28, 4));
        assert_eq!(of(37888, 3584, 64), (132, 296, 1));
        assert_eq!(of(3584, 18944, 64), (112, 28, 4));
        assert_eq!(of(152064, 3584, 64), (132, 1188, 1));
        // 72b's queries, keys and values: too many to be shared alike.
        assert_eq!(of(10240, 8192, 64), (132, 80, 1));
        // Nothing is shared that has one step, and no tile has more blocks than a cluster.
        assert_eq!(of(8, 64, 16), (1, 1, 1));
        assert_eq!(of(128, 8192, 16), (8, 1, 8));
    }

    /// What gemm.cu relies on.
    #[test]
    fn every_block_has_units() {
        for weights in (8..20_000).step_by(88).chain([37_888, 59_136, 152_064]) {
            for k in [8, 64, 72, 640, 3584, 29_568] {
                for rows in [9, 16, 17, 64, 65, 128] {
                    let (grid, shape) = plan(&DeviceFacts::h200(), weights, weights, k, rows);
                    let (blocks, steps) = (grid.blocks[0], shape.steps);
                    let what = format!("{weights}x{k}, {rows} rows: {grid:?} {shape:?}");
                    assert!(shape.split <= steps && grid.cluster == shape.split, "{what}");
                    match shape.split {
                        1 => assert!(shape.tiles * steps >= blocks && blocks <= 132, "{what}"),
                        split => assert!(blocks == shape.tiles * split && blocks <= 132, "{what}"),
                    }
                    assert!(grid.shared as usize + 2 * 8 * STAGES_MAX <= 227 << 10, "{what}");
                    assert!(shape.stages as usize >= STAGES_MIN, "{what}");
                }
            }
        }
    }
}

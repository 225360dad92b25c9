//! NVIDIA GPUs, through the driver, NVRTC and cublasLt, all opened at run time.
//!
//! A [`Cuda`] is one stage's view of its GPU: a stream of its own, and kernels compiled for the GPU and the model's
//! type. Ops only put work into the stream. The residual stream and logits are f32; what matrix products read and
//! keys and values are of the model's type.
#![allow(unsafe_code)]

mod account;
mod act;
mod aside;
mod attention;
mod batch;
mod blas;
mod choices;
mod compile;
mod copy;
mod driver;
mod dummy;
mod embed;
mod energy;
mod gate_up;
mod gemm;
mod gemv;
mod graph;
mod kv;
mod launch;
mod linear;
mod load;
mod lost;
mod matrix;
mod memory;
mod norm;
mod ops;
mod pages;
mod patches;
mod peer;
mod probe;
mod relay;
mod rope;
mod sample;
mod segments;
mod tensor_map;
mod tokens;
mod tune;
mod variants;
mod warm_up;

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed},
    },
    thread::{Scope, ScopedJoinHandle},
};

pub use account::{
    StageNeeds, allocated, cutter_bytes, free_bytes, kv_waste, row_width, rows_room, stage_bytes,
    tower_bytes, view_bytes,
};
pub use attention::PREFILL_ROWS;
pub use batch::Batch;
pub use compile::{cache_folder, kernels_key, write_aside};
pub use driver::{DeviceFacts, devices, driver_present};
pub use energy::Energy;
pub use gemm::Products;
pub use kv::Kv;
pub use lost::any as any_lost;
pub use matrix::Matrix;
pub use memory::Event;
pub use patches::Cutter;
pub use peer::all_could_reach;
pub use probe::{Gpu, Link, LinkKind, Probe, probe};
pub use sample::{Pending, Sampler};
pub use segments::Images;

pub(crate) use memory::{DevicePtr, Stream};
pub(crate) use peer::Ring;

use self::{
    blas::Blas,
    driver::Context,
    graph::Graph,
    launch::{Arg, Grid, Kernel, Module},
    load::Uploader,
    memory::DeviceBuf,
    tokens::Tokens,
};
use crate::{
    backend::{Backend, Bytes, DType},
    error::{Error, Result},
};

/// Up to this many rows matrices are multiplied by own kernels, which fuse what is around the product.
const FEW_ROWS: usize = 8;

/// A stage's view of its GPU.
pub struct Cuda {
    context: Context,
    facts: &'static DeviceFacts,
    dtype: DType,
    stream: Arc<Stream>,
    /// The last thing in the stream is a kernel: the next one may start before it has ended.
    after_kernel: AtomicBool,
    blas: Blas,
    uploader: Uploader,
    kernels: Kernels,
    tokens: Arc<Tokens>,
    /// Bytes taken on the GPU through this view.
    taken: AtomicUsize,
    /// Bytes that were free before anything was.
    free_before: AtomicUsize,
    /// How pages come from other GPUs.
    ways: pages::Ways,
    /// Is recorded where others are to wait for all that this has been asked for until then.
    asked: Event,
}

/// One file an op.
struct Kernels {
    act: act::Kernels,
    attention: attention::Kernels,
    copy: copy::Kernels,
    dummy: dummy::Kernels,
    embed: embed::Kernels,
    gate_up: gate_up::Kernels,
    gemm: gemm::Kernels,
    gemv: gemv::Kernels,
    norm: norm::Kernels,
    rope: rope::Kernels,
    sample: sample::Kernels,
}

impl Kernels {
    /// Side by side, where it takes long: NVRTC needs a second for some files, if they have not been compiled before.
    fn load(load: &Loading) -> Result<Kernels> {
        std::thread::scope(|scope| {
            let attention = beside(scope, || attention::Kernels::load(load))?;
            let sample = beside(scope, || sample::Kernels::load(load))?;
            Ok(Kernels {
                act: act::Kernels::load(load)?,
                copy: copy::Kernels::load(load)?,
                dummy: dummy::Kernels::load(load)?,
                embed: embed::Kernels::load(load)?,
                gate_up: gate_up::Kernels::load(load),
                gemm: gemm::Kernels::load(load),
                gemv: gemv::Kernels::load(load),
                norm: norm::Kernels::load(load)?,
                rope: rope::Kernels::load(load)?,
                attention: joined(attention)?,
                sample: joined(sample)?,
            })
        })
    }
}

/// Does something on a thread of its own.
fn beside<'scope, T: Send + 'scope>(
    scope: &'scope Scope<'scope, '_>,
    what: impl FnOnce() -> T + Send + 'scope,
) -> Result<ScopedJoinHandle<'scope, T>> {
    let thread = std::thread::Builder::new().name("kernels".into()).spawn_scoped(scope, what);
    thread.map_err(|e| Error::Engine(format!("no thread: {e}")))
}

/// What a thread has come to.
fn joined<T>(thread: ScopedJoinHandle<'_, T>) -> T {
    thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

/// What the backends of a pipeline have in common.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PipelineFacts {
    /// The type of weights, keys and values.
    pub dtype: DType,
    /// Numbers of a head, for the kernels that are compiled for it.
    pub head_dim: usize,
    /// Sequences that run at once, at most.
    pub seats: usize,
    /// Steps in flight at most.
    pub in_flight: usize,
}

/// The same, with what is made of it once.
struct Shared {
    of: PipelineFacts,
    tokens: Arc<Tokens>,
    /// How many load side by side.
    stages: usize,
}

impl Cuda {
    /// A backend for each stage, on these GPUs in order.
    pub fn pipeline(ordinals: &[usize], facts: PipelineFacts) -> Result<Vec<Arc<Cuda>>> {
        Cuda::pipeline_with(ordinals, &[], facts)
    }

    /// The same, and behind those of the stages one for each of `asides`: what these are asked for goes before what others are.
    pub fn pipeline_with(
        ordinals: &[usize],
        asides: &[usize],
        facts: PipelineFacts,
    ) -> Result<Vec<Arc<Cuda>>> {
        let Some(&last) = ordinals.last() else { return Ok(Vec::new()) };
        lost::work_together(ordinals);
        let all = || ordinals.iter().chain(asides);
        // Before the first stage takes something: stages may share a GPU.
        let free: Vec<usize> = all().map(|&i| free_bytes(i)).collect::<Result<_>>()?;
        let tokens = Arc::new(Tokens::new(Context::of(last)?, facts.seats, facts.in_flight)?);
        let shared = Shared { of: facts, tokens, stages: ordinals.len() };
        let urgent = (0..).map(|i| i >= ordinals.len());
        let each = all().zip(free).zip(urgent);
        each.map(|((&i, free), urgent)| Cuda::open(i, (free, urgent), &shared).map(Arc::new)).collect()
    }

    /// A backend that stands alone.
    pub fn new(ordinal: usize, facts: PipelineFacts) -> Result<Cuda> {
        let free = free_bytes(ordinal)?;
        let tokens = Arc::new(Tokens::new(Context::of(ordinal)?, facts.seats, facts.in_flight)?);
        Cuda::open(ordinal, (free, false), &Shared { of: facts, tokens, stages: 1 })
    }

    fn open(ordinal: usize, (free_before, urgent): (usize, bool), shared: &Shared) -> Result<Cuda> {
        let of = shared.of;
        let context = Context::of(ordinal)?;
        let facts = &devices()?[ordinal];
        let kernels = Kernels::load(&Loading { context, facts, of })?;
        let blas = Blas::new(context, facts)?;
        let taken = kernels.attention.scratch_bytes() + blas.workspace_bytes();
        let stream = Arc::new(if urgent { Stream::urgent(context)? } else { Stream::new(context)? });
        shared.tokens.depend_on(&stream);
        Ok(Cuda {
            context,
            facts,
            dtype: of.dtype,
            stream,
            after_kernel: AtomicBool::new(false),
            blas,
            uploader: Uploader::new(context, shared.stages),
            kernels,
            tokens: shared.tokens.clone(),
            taken: AtomicUsize::new(taken),
            free_before: AtomicUsize::new(free_before),
            ways: pages::Ways::default(),
            asked: Event::new(context)?,
        })
    }

    /// What the GPU is.
    pub fn facts(&self) -> &'static DeviceFacts {
        self.facts
    }

    /// Who multiplies from now on, where more than one can. What has been recorded stays as it is.
    pub fn set_products(&self, products: Products) {
        self.kernels.gemm.set_products(products);
    }

    /// How often kernels of this crate have multiplied where cublasLt could have.
    pub fn own_products(&self) -> usize {
        self.kernels.gemm.launched()
    }

    /// Waits until everything in the stream has ended, or a stage of the pipeline has failed: the stream may wait for it.
    pub fn synchronize(&self) -> Result<()> {
        self.after_kernel.store(false, Relaxed);
        self.end_of(&self.stream)
    }

    /// The same of another stream, which is among those that are looked after.
    fn end_of(&self, stream: &Stream) -> Result<()> {
        let recorded = Event::new(stream.context).and_then(|end| end.record(stream).map(|()| end));
        match recorded {
            Ok(end) => self.wait_on_host(&end),
            // Memory that it uses may go when this returns.
            Err(error) => stream.synchronize().and(Err(error)),
        }
    }

    fn error(&self, why: String) -> Error {
        Error::Device { device: self.name(), why }
    }

    /// Memory that is counted.
    fn take(&self, bytes: usize) -> Result<DeviceBuf> {
        let buf = DeviceBuf::new(self.context, bytes)?;
        self.taken.fetch_add(bytes, Relaxed);
        Ok(buf)
    }

    /// Puts a kernel into the stream, on the heels of the one before it.
    ///
    /// SAFETY: the arguments are as many and of the types that the kernel takes; what they point to is as large as the
    /// kernel uses it, and lives until it has run.
    unsafe fn launch(&self, kernel: &Kernel, grid: Grid, args: &mut [Arg<'_>]) -> Result<()> {
        let early = self.after_kernel.swap(true, Relaxed) && self.facts.overlaps_launches();
        // SAFETY: the caller's.
        unsafe { kernel.launch(&self.stream, grid, early, args) }
    }

    /// Copies between any two addresses, in the stream.
    ///
    /// SAFETY: both have `bytes` bytes and live until the copy has been done.
    unsafe fn copy(&self, to: DevicePtr, from: DevicePtr, bytes: usize) -> Result<()> {
        self.after_kernel.store(false, Relaxed);
        // SAFETY: the caller's.
        unsafe { self.stream.copy(to, from, bytes) }
    }

    /// Makes the stream wait. The event must have been recorded.
    pub(crate) fn wait(&self, event: &Event) -> Result<()> {
        self.after_kernel.store(false, Relaxed);
        self.stream.wait(event)
    }

    /// Records an event at the end of the stream.
    pub(crate) fn record_event(&self, event: &Event) -> Result<()> {
        self.after_kernel.store(false, Relaxed);
        event.record(&self.stream)
    }

    fn record(&self, ops: &mut dyn FnMut() -> Result<()>) -> Result<Graph> {
        self.after_kernel.store(false, Relaxed);
        Graph::record(&self.stream, ops)
    }

    fn repeat(&self, graph: &mut Graph) -> Result<()> {
        self.after_kernel.store(false, Relaxed);
        graph.launch(&self.stream)
    }

    /// Bytes on their way to memory of their own: `Backend::loaded` waits for them.
    fn upload(&self, bytes: &Bytes) -> Result<Arc<DeviceBuf>> {
        let buf = Arc::new(self.take(bytes.len())?);
        self.uploader.upload(&buf, 0, bytes)?;
        Ok(buf)
    }

    fn upload_f32(&self, values: &[f32]) -> Result<Arc<DeviceBuf>> {
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        let len = bytes.len();
        self.upload(&Bytes::new(Arc::new(bytes), 0..len))
    }

    fn zeroed(&self, bytes: usize) -> Result<DeviceBuf> {
        let buf = self.take(bytes)?;
        // SAFETY: as many bytes.
        unsafe { self.stream.fill(buf.ptr(), 0, bytes)? };
        // It may be used from other streams.
        self.stream.synchronize()?;
        Ok(buf)
    }
}

/// What kernels are loaded for.
#[derive(Clone)]
struct Loading {
    context: Context,
    facts: &'static DeviceFacts,
    of: PipelineFacts,
}

impl Loading {
    /// A kernel file, compiled for the GPU with these definitions, or taken from the cache.
    fn module(&self, file: &'static str, defines: &[(&'static str, u32)]) -> Result<Module> {
        Module::find_or_load(self.context, file, defines, || {
            compile::cubin(file, defines, &self.facts.arch())
        })
    }

    /// `DTYPE` in common.cuh.
    fn dtype(&self) -> u32 {
        match self.of.dtype {
            DType::F32 => 0,
            DType::F16 => 1,
            DType::BF16 => 2,
        }
    }
}

/// Rows that ops go over for so many: few different numbers, since algorithms are chosen and passes recorded for each.
pub fn pad_rows(rows: usize) -> usize {
    let step = match rows {
        0..=2 => 1,
        3..=8 => 4,
        9..=64 => 8,
        65..=128 => 16,
        129..=512 => 32,
        513..=2048 => 64,
        2049..=8192 => 128,
        _ => 256,
    };
    rows.next_multiple_of(step)
}

/// Numbers on the GPU.
pub struct Buf {
    memory: Arc<DeviceBuf>,
    dtype: DType,
    len: usize,
}

impl Buf {
    /// Where its first `len` numbers are, which must be f32.
    pub(crate) fn f32s(&self, len: usize) -> DevicePtr {
        self.expect(DType::F32, len)
    }

    /// Panics if it has fewer numbers, or of another type.
    fn expect(&self, dtype: DType, len: usize) -> DevicePtr {
        assert!(
            self.dtype == dtype && self.len >= len,
            "a buffer of {} {} where {len} {} are wanted; this is a bug",
            self.len,
            self.dtype.name(),
            dtype.name()
        );
        self.memory.ptr()
    }
}

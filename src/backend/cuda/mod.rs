//! NVIDIA GPUs, through the driver, NVRTC and cublasLt, all opened at run time.
//!
//! A [`Cuda`] is one stage's view of its GPU: a stream of its own, and kernels compiled for the GPU and the model's
//! type. Ops only put work into the stream. The residual stream and logits are f32; what matrix products read and
//! keys and values are of the model's type.
#![allow(unsafe_code)]

mod act;
mod attention;
mod batch;
mod blas;
mod compile;
mod copy;
mod driver;
mod dummy;
mod embed;
mod gemv;
mod graph;
mod kv;
mod launch;
mod linear;
mod load;
mod matrix;
mod memory;
mod norm;
mod rope;
mod sample;

use std::{
    ffi::c_void,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

pub use batch::Batch;
pub use driver::{DeviceFacts, devices};
pub use kv::Kv;
pub use matrix::Matrix;
pub use memory::Event;
pub use sample::{Pending, Sampler};

pub(crate) use memory::{DevicePtr, Pinned, Stream};

use self::{
    blas::Blas,
    driver::Context,
    graph::Graph,
    launch::{Grid, Kernel, Module},
    load::Uploader,
    memory::DeviceBuf,
};
use crate::{
    backend::{AttentionShape, Backend, DType, HeadShape, KvShape, Limits, Norm, QkNorm, Tensor},
    batch::{MicroBatch, Sampled},
    error::{Error, Result},
};

/// Up to this many rows matrices are multiplied by own kernels, which fuse what is around the product.
const FEW_ROWS: usize = 8;

/// A stage's view of its GPU.
pub struct Cuda {
    context: Context,
    facts: &'static DeviceFacts,
    dtype: DType,
    stream: Stream,
    /// The last thing in the stream is a kernel: the next one may start before it has ended.
    after_kernel: AtomicBool,
    blas: Blas,
    uploader: Uploader,
    kernels: Kernels,
    tokens: Arc<Tokens>,
    /// Bytes taken on the GPU through this view.
    taken: AtomicUsize,
}

/// One file an op.
struct Kernels {
    act: act::Kernels,
    attention: attention::Kernels,
    copy: copy::Kernels,
    dummy: dummy::Kernels,
    embed: embed::Kernels,
    gemv: gemv::Kernels,
    norm: norm::Kernels,
    rope: rope::Kernels,
    sample: sample::Kernels,
}

/// The last token of every seat: what the head's stage chooses and the embedding's stage reads.
///
/// It lies in pinned memory of the host, which every GPU reaches, whether or not they reach each other.
pub(crate) struct Tokens {
    table: Pinned, // [seats] of u32
    /// By step, that its tokens are there.
    chosen: Vec<Event>,
}

/// Steps in flight at most.
const STEPS: usize = 2048;

/// What the backends of a pipeline have in common.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PipelineFacts {
    /// The type of weights, keys and values.
    pub dtype: DType,
    /// Numbers of a head, for the kernels that are compiled for it.
    pub head_dim: usize,
    /// Sequences that run at once, at most.
    pub seats: usize,
}

impl Cuda {
    /// A backend for each stage, on these GPUs in order.
    pub fn pipeline(ordinals: &[usize], facts: PipelineFacts) -> Result<Vec<Arc<Cuda>>> {
        let Some(&last) = ordinals.last() else { return Ok(Vec::new()) };
        let tokens = Arc::new(Tokens::new(Context::of(last)?, facts.seats)?);
        let each = |&i| Cuda::open(i, facts, tokens.clone(), ordinals.len()).map(Arc::new);
        ordinals.iter().map(each).collect()
    }

    /// A backend that stands alone.
    pub fn new(ordinal: usize, facts: PipelineFacts) -> Result<Cuda> {
        let tokens = Arc::new(Tokens::new(Context::of(ordinal)?, facts.seats)?);
        Cuda::open(ordinal, facts, tokens, 1)
    }

    fn open(ordinal: usize, of: PipelineFacts, tokens: Arc<Tokens>, stages: usize) -> Result<Cuda> {
        let context = Context::of(ordinal)?;
        let facts = &devices()?[ordinal];
        let load = Loading { context, facts, of };
        let kernels = Kernels {
            act: act::Kernels::load(&load)?,
            attention: attention::Kernels::load(&load)?,
            copy: copy::Kernels::load(&load)?,
            dummy: dummy::Kernels::load(&load)?,
            embed: embed::Kernels::load(&load)?,
            gemv: gemv::Kernels::load(&load)?,
            norm: norm::Kernels::load(&load)?,
            rope: rope::Kernels::load(&load)?,
            sample: sample::Kernels::load(&load)?,
        };
        Ok(Cuda {
            context,
            facts,
            dtype: of.dtype,
            stream: Stream::new(context)?,
            after_kernel: AtomicBool::new(false),
            blas: Blas::new(context, facts)?,
            uploader: Uploader::new(context, stages)?,
            kernels,
            tokens,
            taken: AtomicUsize::new(0),
        })
    }

    /// What the GPU is.
    pub fn facts(&self) -> &'static DeviceFacts {
        self.facts
    }

    /// Bytes that this stage has taken on the GPU for weights, pages and buffers, and for scratch of matrix products.
    pub fn bytes_taken(&self) -> (usize, usize) {
        (self.taken.load(Relaxed), self.blas.workspace_bytes())
    }

    /// Waits until everything in the stream has ended.
    pub fn synchronize(&self) -> Result<()> {
        self.stream.synchronize()
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
    unsafe fn launch(&self, kernel: &Kernel, grid: Grid, args: &mut [*mut c_void]) -> Result<()> {
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
    fn wait(&self, event: &Event) -> Result<()> {
        self.after_kernel.store(false, Relaxed);
        self.stream.wait(event)
    }

    /// Records an event at the end of the stream.
    fn record_event(&self, event: &Event) -> Result<()> {
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

    /// A few numbers, brought to the GPU before this returns.
    fn upload_f32(&self, values: &[f32]) -> Result<DeviceBuf> {
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        self.upload(&bytes)
    }

    fn upload(&self, bytes: &[u8]) -> Result<DeviceBuf> {
        let buf = self.take(bytes.len())?;
        // SAFETY: as many bytes, of nobody else.
        unsafe { self.uploader.upload(buf.ptr(), bytes)? };
        self.uploader.finish()?;
        Ok(buf)
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
struct Loading {
    context: Context,
    facts: &'static DeviceFacts,
    of: PipelineFacts,
}

impl Loading {
    /// A kernel file, compiled for the GPU with these definitions, or taken from the cache.
    fn module(&self, file: &'static str, defines: &[(&str, u32)]) -> Result<Module> {
        let cubin = compile::cubin(file, defines, &self.facts.arch())?;
        Module::load(self.context, file, &cubin)
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

impl Tokens {
    fn new(context: Context, seats: usize) -> Result<Tokens> {
        let chosen = (0..STEPS).map(|_| Event::new(context)).collect::<Result<_>>()?;
        Ok(Tokens { table: Pinned::new(context, 4 * seats.max(1))?, chosen })
    }

    fn table(&self) -> DevicePtr {
        self.table.ptr()
    }

    /// Is recorded when the step's tokens have been chosen.
    fn chosen(&self, step: u64) -> &Event {
        &self.chosen[step as usize % STEPS]
    }
}

/// Rows that ops go over for so many: few different numbers, since algorithms are chosen and passes recorded for each.
fn pad_rows(rows: usize) -> usize {
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
    memory: DeviceBuf,
    dtype: DType,
    len: usize,
}

impl Buf {
    fn ptr(&self) -> DevicePtr {
        self.memory.ptr()
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

impl Backend for Cuda {
    type Buf = Buf;
    type Matrix = Matrix;
    type Kv = Kv;
    type Batch = Batch;
    type Sampler = Sampler;
    type Pending = Pending;

    type Mark = Event;

    const ASYNC: bool = true;

    fn name(&self) -> String {
        format!("cuda:{}", self.context.ordinal)
    }

    fn rows_room(&self, rows: usize) -> usize {
        pad_rows(rows)
    }

    fn buf(&self, len: usize) -> Result<Buf> {
        Ok(Buf { memory: self.zeroed(4 * len)?, dtype: DType::F32, len })
    }

    fn working_buf(&self, len: usize) -> Result<Buf> {
        Ok(Buf { memory: self.zeroed(len * self.dtype.size())?, dtype: self.dtype, len })
    }

    fn vector(&self, tensor: &Tensor) -> Result<Buf> {
        let values = tensor.to_f32();
        Ok(Buf { memory: self.upload_f32(&values)?, dtype: DType::F32, len: values.len() })
    }

    fn matrix(&self, parts: &[Tensor], biases: &[Tensor]) -> Result<Matrix> {
        Matrix::new(self, parts, biases)
    }

    fn loaded(&self) -> Result<()> {
        self.uploader.finish()?;
        self.synchronize()
    }

    fn kv(&self, shape: KvShape) -> Result<Kv> {
        Kv::new(self, shape)
    }

    fn batch(&self, limits: Limits, inv_freq: &[f32], rotation_scale: f32) -> Result<Batch> {
        let batch = Batch::new(self, limits, inv_freq, rotation_scale)?;
        self.taken.fetch_add(batch.bytes(), Relaxed);
        Ok(batch)
    }

    fn sampler(&self, vocab: usize) -> Result<Sampler> {
        Sampler::new(self, vocab)
    }

    fn set_batch(&self, batch: &mut Batch, from: &MicroBatch) -> Result<()> {
        batch.set(self, from)
    }

    fn await_tokens(&self, after: u64) -> Result<()> {
        self.wait(self.tokens.chosen(after))
    }

    fn rows(&self, batch: &Batch) -> usize {
        batch.shape().rows_padded
    }

    fn outputs(&self, batch: &Batch) -> usize {
        batch.shape().outputs_padded
    }

    fn pass(&self, batch: &Batch, ops: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        batch.pass(self, &mut || {
            rope::rotations(self, batch)?;
            ops()
        })
    }

    fn mark(&self) -> Result<Event> {
        let event = Event::timed(self.context)?;
        self.record_event(&event)?;
        Ok(event)
    }

    fn between(&self, from: &Event, to: &Event) -> Result<Option<Duration>> {
        if !from.reached()? || !to.reached()? {
            return Ok(None);
        }
        Ok(Some(Duration::from_secs_f32(to.ms_since(from)?.max(0.0) / 1000.0)))
    }

    fn read(&self, out: &mut [f32], from: &Buf) -> Result<()> {
        copy::read(self, out, from)
    }

    fn write(&self, to: &mut Buf, from: &[f32]) -> Result<()> {
        copy::write(self, to, from)
    }

    fn embed(&self, out: &mut Buf, table: &Matrix, batch: &Batch) -> Result<()> {
        embed::embed(self, out, table, batch)
    }

    fn norm_linear(
        &self,
        out: &mut Buf,
        normed: &mut Buf,
        x: &Buf,
        norm: Norm<'_, Self>,
        w: &Matrix,
    ) -> Result<()> {
        linear::norm_linear(self, out, normed, x, norm, w)
    }

    fn norm_gate_up(
        &self,
        out: &mut Buf,
        scratch: (&mut Buf, &mut Buf),
        x: &Buf,
        norm: Norm<'_, Self>,
        w: &Matrix,
    ) -> Result<()> {
        linear::norm_gate_up(self, out, scratch, x, norm, w)
    }

    fn linear_add(&self, x: &mut Buf, y: &Buf, w: &Matrix, rows: usize) -> Result<()> {
        linear::linear_add(self, x, y, w, rows)
    }

    fn rope_kv(
        &self,
        qkv: &mut Buf,
        kv: &mut Kv,
        batch: &Batch,
        heads: HeadShape,
        norm: Option<QkNorm<'_, Self>>,
    ) -> Result<()> {
        rope::rope_kv(self, qkv, kv, batch, heads, norm)
    }

    fn attention(
        &self,
        out: &mut Buf,
        qkv: &Buf,
        kv: &Kv,
        batch: &Batch,
        shape: AttentionShape,
    ) -> Result<()> {
        attention::attention(self, out, qkv, kv, batch, shape)
    }

    fn gather_outputs(&self, out: &mut Buf, x: &Buf, batch: &Batch, dim: usize) -> Result<()> {
        embed::gather_outputs(self, out, x, batch, dim)
    }

    fn sample(&self, logits: &Buf, sampler: &mut Sampler, batch: &MicroBatch) -> Result<Pending> {
        sample::sample(self, logits, sampler, batch)
    }

    fn collect(&self, pending: Pending, batch: &MicroBatch) -> Result<Vec<Sampled>> {
        pending.collect(batch)
    }
}

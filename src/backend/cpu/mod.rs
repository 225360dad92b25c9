//! The CPU.
//!
//! A row's results have the same bits whatever else is in the micro-batch, and whatever the number of
//! threads: see `linear` and `attention` for the orders of summation. They are the same for all instruction
//! sets too, see [`Simd`].

mod act;
mod attention;
mod batch;
mod embed;
mod facts;
mod kv;
mod linear;
mod matrix;
mod memory;
mod norm;
mod patches;
mod pool;
mod probe;
pub mod reference;
mod rope;
pub mod sample;
mod segments;
mod simd;

use std::{
    ops::Range,
    sync::Arc,
    time::{Duration, Instant},
};

pub use facts::{CpuFacts, facts, free_bytes, memory_bytes};
pub use probe::{CpuSpeed, speed};
pub use sample::Sampler;
pub use simd::Simd;

use self::{
    batch::Batch,
    kv::Kv,
    matrix::Matrix,
    memory::{Memory, prefix, prefix_mut},
    pool::Pool,
};
use crate::{
    backend::{
        AttentionShape, Backend, Columns, DeviceMemory, HeadShape, KvShape, Limits, Norm, NormShape, QkNorm,
        Rotation, Tensor, WarmUp,
    },
    batch::{MicroBatch, Sampled, Step},
    error::{Error, Result},
};

#[cfg(target_endian = "big")]
compile_error!("weights are little-endian in files and used where they are");

/// Numbers of a simple op that are worth a task.
const GRAIN: usize = 1 << 14;

/// The processors, with threads that all clones share.
#[derive(Clone)]
pub struct Cpu {
    pool: Arc<Pool>,
    simd: Simd,
}

impl Cpu {
    /// With this many threads, by default one for each available core, and the best instruction set.
    pub fn new(threads: Option<usize>) -> Cpu {
        let available = || std::thread::available_parallelism().map_or(1, |n| n.get());
        let threads = threads.unwrap_or_else(available).max(1);
        Cpu { pool: Arc::new(Pool::new(threads)), simd: Simd::best() }
    }

    /// With an instruction set that is not the best one. The bits of all results stay the same.
    pub fn with_simd(threads: Option<usize>, simd: Simd) -> Result<Cpu> {
        if !simd.available() {
            return Err(device_error(format!("it has no {}", simd.name())));
        }
        Ok(Cpu { simd, ..Cpu::new(threads) })
    }

    /// The instruction set in use.
    pub fn simd(&self) -> Simd {
        self.simd
    }

    /// Threads, the caller of an op among them.
    pub fn threads(&self) -> usize {
        self.pool.threads()
    }

    /// `out = x / sqrt(mean(x²) + eps) * w`, row by row.
    pub fn rms_norm(&self, out: &mut Memory<f32>, x: &Memory<f32>, w: &Memory<f32>, shape: NormShape) {
        norm::rms_norm(self, out, x, w, shape);
    }

    /// `out = x · wᵀ + bias`, for `rows` rows.
    pub fn linear(&self, out: &mut Memory<f32>, x: &Memory<f32>, w: &Matrix, rows: usize) -> Result<()> {
        linear::linear(self, linear::Out::Set(out), x, w, rows)
    }

    /// `out[i] = silu(gate) * up`; a row of `gate_up` is `dim` gates, then `dim` ups.
    pub fn silu_mul(&self, out: &mut Memory<f32>, gate_up: &Memory<f32>, rows: usize, dim: usize) {
        act::silu_mul(self, out, gate_up, rows, dim);
    }
}

/// What this device cannot do.
fn device_error(why: String) -> Error {
    Error::Device { device: "cpu".into(), why }
}

impl Backend for Cpu {
    type Buf = Memory<f32>;
    type Matrix = Matrix;
    type Kv = Kv;
    type Batch = Batch;
    type Sampler = Sampler;
    type Pending = Vec<Sampled>;

    type Mark = Instant;

    const ASYNC: bool = false;

    fn name(&self) -> String {
        "cpu".into()
    }

    fn memory(&self) -> Option<DeviceMemory> {
        None
    }

    fn is_idle(&self) -> Option<bool> {
        None
    }

    fn rows_room(&self, rows: usize) -> usize {
        rows
    }

    fn buf(&self, len: usize) -> Result<Self::Buf> {
        Memory::new(len)
    }

    fn working_buf(&self, len: usize) -> Result<Self::Buf> {
        Memory::new(len)
    }

    fn vector(&self, tensor: &Tensor) -> Result<Self::Buf> {
        let mut buf = Memory::new(tensor.len())?;
        buf.copy_from_slice(&tensor.to_f32());
        Ok(buf)
    }

    fn matrix(&self, parts: &[Tensor], biases: &[Tensor]) -> Result<Self::Matrix> {
        Matrix::new(parts, biases)
    }

    fn loaded(&self) -> Result<()> {
        Ok(())
    }

    fn kv(&self, shape: KvShape) -> Result<Self::Kv> {
        Kv::new(shape)
    }

    fn succeed(&self, _: &Self, _: usize) {
        // Nobody counts.
    }

    fn find_way_back(&self, _: &Self) -> Result<()> {
        // One memory.
        Ok(())
    }

    fn await_all(&self, _: &Self) -> Result<()> {
        // What has been asked for is done.
        Ok(())
    }

    fn find_way(&self, _: &Self) -> Result<()> {
        Ok(())
    }

    fn fetch_pages(&self, to: &mut Kv, (_, from): (&Self, &Kv), runs: &[Range<usize>]) -> Result<()> {
        runs.iter().try_for_each(|run| to.write(run.clone(), &from.read(run.clone())?))
    }

    fn read_pages(&self, from: &Kv, blocks: Range<usize>) -> Result<Vec<u8>> {
        from.read(blocks)
    }

    fn write_pages(&self, to: &mut Kv, blocks: Range<usize>, bytes: &[u8]) -> Result<()> {
        to.write(blocks, bytes)
    }

    fn batch(&self, limits: Limits, rotation: Rotation<'_>) -> Result<Self::Batch> {
        Batch::new(limits, rotation)
    }

    fn sampler(&self, vocab: usize) -> Result<Self::Sampler> {
        Ok(Sampler::new(vocab))
    }

    fn warm_ups(&self, _: Limits) -> Vec<WarmUp> {
        // Every pass is like the first.
        Vec::new()
    }

    fn set_batch(&self, batch: &mut Self::Batch, from: &MicroBatch) -> Result<()> {
        batch.set(&self.pool, from)
    }

    fn await_tokens(&self, _: u64) -> Result<()> {
        Ok(())
    }

    fn rows(&self, batch: &Self::Batch) -> usize {
        batch.rows()
    }

    fn outputs(&self, batch: &Self::Batch) -> usize {
        batch.outputs()
    }

    fn pass(&self, _: &Self::Batch, ops: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        ops()
    }

    fn record(&self, _: &Self::Batch, _: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        // Nothing is repeated.
        Ok(())
    }

    fn mark(&self) -> Result<Instant> {
        Ok(Instant::now())
    }

    fn between(&self, from: &Instant, to: &Instant) -> Result<Option<Duration>> {
        Ok(Some(*to - *from))
    }

    fn read(&self, out: &mut [f32], from: &Self::Buf) -> Result<()> {
        out.copy_from_slice(prefix(from, out.len()));
        Ok(())
    }

    fn write(&self, to: &mut Self::Buf, from: &[f32]) -> Result<()> {
        prefix_mut(to, from.len()).copy_from_slice(from);
        Ok(())
    }

    fn embed(
        &self,
        out: &mut Self::Buf,
        table: &Self::Matrix,
        images: Option<&Self::Buf>,
        batch: &Self::Batch,
    ) -> Result<()> {
        embed::embed(self, out, table, images.map(|images| &**images), batch)
    }

    fn norm_linear(
        &self,
        out: &mut Self::Buf,
        normed: &mut Self::Buf,
        x: &Self::Buf,
        norm: Norm<'_, Self>,
        w: &Self::Matrix,
    ) -> Result<()> {
        self.norm_linear_columns((out, Columns::all(w.n)), normed, x, norm, w)
    }

    fn norm_linear_columns(
        &self,
        (out, columns): (&mut Self::Buf, Columns),
        normed: &mut Self::Buf,
        x: &Self::Buf,
        norm: Norm<'_, Self>,
        w: &Self::Matrix,
    ) -> Result<()> {
        self.rms_norm(normed, x, norm.w, norm.shape);
        linear::linear_columns(self, linear::Out::Set(out), columns, (normed, w, norm.shape.rows))
    }

    fn norm_gate_up(
        &self,
        out: &mut Self::Buf,
        (normed, gate_up): (&mut Self::Buf, &mut Self::Buf),
        x: &Self::Buf,
        norm: Norm<'_, Self>,
        w: &Self::Matrix,
    ) -> Result<()> {
        let rows = norm.shape.rows;
        self.norm_linear(gate_up, normed, x, norm, w)?;
        self.silu_mul(out, gate_up, rows, w.n / 2);
        Ok(())
    }

    fn linear_add(&self, x: &mut Self::Buf, y: &Self::Buf, w: &Self::Matrix, rows: usize) -> Result<()> {
        linear::linear(self, linear::Out::Add(x), y, w, rows)
    }

    fn rope_kv(
        &self,
        qkv: &mut Self::Buf,
        kv: &mut Self::Kv,
        batch: &Self::Batch,
        heads: HeadShape,
        norm: Option<QkNorm<'_, Self>>,
    ) -> Result<()> {
        rope::rope_kv(self, qkv, kv, batch, heads, norm)
    }

    fn attention(
        &self,
        out: &mut Self::Buf,
        qkv: &Self::Buf,
        kv: &Self::Kv,
        batch: &Self::Batch,
        shape: AttentionShape,
    ) -> Result<()> {
        attention::attention(self, out, qkv, kv, batch, shape)
    }

    fn gather_outputs(
        &self,
        out: &mut Self::Buf,
        x: &Self::Buf,
        batch: &Self::Batch,
        dim: usize,
    ) -> Result<()> {
        embed::gather_outputs(self, out, x, batch, dim);
        Ok(())
    }

    fn sample(&self, logits: &Self::Buf, sampler: &mut Self::Sampler, step: &Step) -> Result<Self::Pending> {
        Ok(sampler.sample(logits, &step.batch))
    }

    fn find_largest(
        &self,
        (found, at): (&mut Self::Buf, usize),
        logits: &Self::Buf,
        tokens: &Range<usize>,
        rows: usize,
    ) -> Result<()> {
        sample::find_largest(&mut found[2 * at..], logits, tokens, rows);
        Ok(())
    }

    fn choose_found(
        &self,
        (found, parts, pitch): (&Self::Buf, usize, usize),
        sampler: &mut Self::Sampler,
        step: &Step,
    ) -> Result<Self::Pending> {
        Ok(sampler.choose_found(found, (parts, pitch), &step.batch))
    }

    fn collect(&self, pending: Self::Pending, _: &MicroBatch) -> Result<Vec<Sampled>> {
        Ok(pending)
    }
}

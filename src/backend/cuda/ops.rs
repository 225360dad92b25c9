//! The ops of [`Backend`], each in the file of its name.

use std::{
    ops::Range,
    sync::atomic::{AtomicUsize, Ordering::Relaxed},
    time::Duration,
};

use super::{
    Batch, Buf, Cuda, Event, Kv, Matrix, Pending, Sampler, aside, attention, blas::Blas, copy, embed, linear,
    pad_rows, pages, rope, sample, warm_up,
};
use crate::{
    backend::{
        AttentionShape, Backend, Columns, DType, DeviceMemory, HeadShape, KvShape, Limits, Norm, QkNorm,
        Rotation, Tensor, WarmUp,
    },
    batch::{MicroBatch, Sampled, Step},
    error::Result,
};

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

    fn memory(&self) -> Option<DeviceMemory> {
        let device = self.free_before.load(Relaxed).saturating_sub(self.context.free_bytes().ok()?);
        Some(DeviceMemory { taken: self.taken.load(Relaxed), device })
    }

    fn is_idle(&self) -> Option<bool> {
        self.stream.is_idle().ok()
    }

    fn rows_room(&self, rows: usize) -> usize {
        pad_rows(rows)
    }

    fn buf(&self, len: usize) -> Result<Buf> {
        Ok(Buf { memory: self.zeroed(4 * len)?.into(), dtype: DType::F32, len })
    }

    fn working_buf(&self, len: usize) -> Result<Buf> {
        Ok(Buf { memory: self.zeroed(len * self.dtype.size())?.into(), dtype: self.dtype, len })
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
        self.synchronize()?;
        // What has been tried until now.
        Blas::keep_choices();
        Ok(())
    }

    fn kv(&self, shape: KvShape) -> Result<Kv> {
        Kv::new(self, shape)
    }

    fn succeed(&self, before: &Cuda, bytes: usize) {
        self.taken.fetch_add(bytes, Relaxed);
        self.free_before.store(before.free_before.load(Relaxed), Relaxed);
    }

    fn find_way(&self, from: &Cuda) -> Result<()> {
        pages::find_way(self, from)
    }

    fn find_way_back(&self, of: &Cuda) -> Result<()> {
        aside::find_way_back(self, of)
    }

    fn await_all(&self, other: &Cuda) -> Result<()> {
        aside::await_all(self, other)
    }

    fn fetch_pages(&self, to: &mut Kv, from: (&Cuda, &Kv), runs: &[Range<usize>]) -> Result<()> {
        pages::fetch(self, to, from, runs)
    }

    fn read_pages(&self, from: &Kv, blocks: Range<usize>) -> Result<Vec<u8>> {
        pages::read(self, from, blocks)
    }

    fn write_pages(&self, to: &mut Kv, blocks: Range<usize>, bytes: &[u8]) -> Result<()> {
        pages::write(self, to, blocks, bytes)
    }

    fn batch(&self, limits: Limits, rotation: Rotation<'_>) -> Result<Batch> {
        Batch::new(self, limits, rotation)
    }

    fn sampler(&self, vocab: usize) -> Result<Sampler> {
        Sampler::new(self, vocab)
    }

    fn warm_ups(&self, limits: Limits) -> Vec<WarmUp> {
        static BEGUN: AtomicUsize = AtomicUsize::new(0);
        warm_up::all(limits, BEGUN.fetch_add(1, Relaxed))
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

    fn record(&self, batch: &Batch, ops: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        batch.record(self, &mut || {
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

    fn embed(&self, out: &mut Buf, table: &Matrix, images: Option<&Buf>, batch: &Batch) -> Result<()> {
        embed::embed(self, out, table, images, batch)
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

    fn norm_linear_columns(
        &self,
        out: (&mut Buf, Columns),
        normed: &mut Buf,
        x: &Buf,
        norm: Norm<'_, Self>,
        w: &Matrix,
    ) -> Result<()> {
        aside::norm_linear_columns(self, out, normed, x, norm, w)
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

    fn sample(&self, logits: &Buf, sampler: &mut Sampler, step: &Step) -> Result<Pending> {
        sample::sample(self, sample::From::Logits(logits), sampler, step)
    }

    fn find_largest(
        &self,
        found: (&mut Buf, usize),
        logits: &Buf,
        tokens: &Range<usize>,
        rows: usize,
    ) -> Result<()> {
        aside::find_largest(self, found, logits, tokens, rows)
    }

    fn choose_found(
        &self,
        found: (&Buf, usize, usize),
        sampler: &mut Sampler,
        step: &Step,
    ) -> Result<Pending> {
        sample::sample(self, sample::From::Found(found.0, found.1, found.2), sampler, step)
    }

    fn collect(&self, pending: Pending, batch: &MicroBatch) -> Result<Vec<Sampled>> {
        pending.collect(batch)
    }
}

//! The processor as a device that fails when it is told to, and that can pose as one whose ops return before they are
//! done: its tokens are known to the device alone until they are collected.

mod vision;

use std::{
    collections::HashMap,
    ops::Range,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use crate::{
    backend::{
        AttentionShape, Backend, Columns, DeviceMemory, HeadShape, KvShape, Limits, Norm, QkNorm, Rotation,
        Tensor, WarmUp, cpu::Cpu,
    },
    batch::{MicroBatch, ON_DEVICE, Sampled, Step},
    error::Result,
    pipeline::{Plan, Point},
};

/// One stage's.
pub(in crate::engine) struct Faulty<const ASYNC: bool> {
    cpu: Cpu,
    stage: usize,
    plan: Arc<Plan>,
    /// The last token of each seat.
    tokens: Arc<Mutex<HashMap<u32, u32>>>,
}

impl<const ASYNC: bool> Faulty<ASYNC> {
    /// For each of so many stages.
    pub(in crate::engine) fn pipeline(stages: usize, plan: &Arc<Plan>) -> Vec<Arc<Self>> {
        let (cpu, tokens) = (Cpu::new(Some(1)), Arc::<Mutex<HashMap<u32, u32>>>::default());
        let of = |stage| Faulty { cpu: cpu.clone(), stage, plan: plan.clone(), tokens: tokens.clone() };
        (0..stages).map(|stage| Arc::new(of(stage))).collect()
    }

    fn at(&self, point: Point) -> Result<()> {
        self.plan.at(point, self.stage)
    }

    /// To whoever embeds them.
    fn hand_on(&self, step: &Step, chosen: &[Sampled]) {
        let seats = step.batch.outputs.iter().map(|output| output.seat);
        self.tokens.lock().unwrap().extend(seats.zip(chosen.iter().map(|token| token.id)));
    }
}

fn norm<'a, const ASYNC: bool>(norm: &Norm<'a, Faulty<ASYNC>>) -> Norm<'a, Cpu> {
    Norm { w: norm.w, shape: norm.shape }
}

impl<const ASYNC: bool> Backend for Faulty<ASYNC> {
    type Buf = <Cpu as Backend>::Buf;
    type Matrix = <Cpu as Backend>::Matrix;
    type Kv = <Cpu as Backend>::Kv;
    type Batch = <Cpu as Backend>::Batch;
    type Sampler = <Cpu as Backend>::Sampler;
    type Pending = Vec<Sampled>;
    type Mark = Instant;

    const ASYNC: bool = ASYNC;

    fn name(&self) -> String {
        format!("test:{}", self.stage)
    }

    fn memory(&self) -> Option<DeviceMemory> {
        Some(DeviceMemory { taken: 1, device: 1 })
    }

    fn is_idle(&self) -> Option<bool> {
        Some(false)
    }

    fn rows_room(&self, rows: usize) -> usize {
        self.cpu.rows_room(rows)
    }

    fn buf(&self, len: usize) -> Result<Self::Buf> {
        self.cpu.buf(len)
    }

    fn working_buf(&self, len: usize) -> Result<Self::Buf> {
        self.cpu.working_buf(len)
    }

    fn vector(&self, tensor: &Tensor) -> Result<Self::Buf> {
        self.cpu.vector(tensor)
    }

    fn matrix(&self, parts: &[Tensor], biases: &[Tensor]) -> Result<Self::Matrix> {
        self.cpu.matrix(parts, biases)
    }

    fn loaded(&self) -> Result<()> {
        self.cpu.loaded()
    }

    fn kv(&self, shape: KvShape) -> Result<Self::Kv> {
        self.cpu.kv(shape)
    }

    fn succeed(&self, before: &Self, bytes: usize) {
        self.cpu.succeed(&before.cpu, bytes);
    }

    fn find_way_back(&self, of: &Self) -> Result<()> {
        self.cpu.find_way_back(&of.cpu)
    }

    fn await_all(&self, other: &Self) -> Result<()> {
        self.cpu.await_all(&other.cpu)
    }

    fn find_way(&self, from: &Self) -> Result<()> {
        self.at(Point::FindWay)?;
        self.cpu.find_way(&from.cpu)
    }

    fn fetch_pages(
        &self,
        to: &mut Self::Kv,
        (of, from): (&Self, &Self::Kv),
        runs: &[Range<usize>],
    ) -> Result<()> {
        self.at(Point::Fetch)?;
        self.cpu.fetch_pages(to, (&of.cpu, from), runs)
    }

    fn read_pages(&self, from: &Self::Kv, blocks: Range<usize>) -> Result<Vec<u8>> {
        self.at(Point::Fetch)?;
        self.cpu.read_pages(from, blocks)
    }

    fn write_pages(&self, to: &mut Self::Kv, blocks: Range<usize>, bytes: &[u8]) -> Result<()> {
        self.cpu.write_pages(to, blocks, bytes)
    }

    fn record(&self, batch: &Self::Batch, ops: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        self.cpu.record(batch, ops)
    }

    /// Called once, on the stage's thread.
    fn batch(&self, limits: Limits, rotation: Rotation<'_>) -> Result<Self::Batch> {
        self.plan.install();
        self.at(Point::Load)?;
        self.cpu.batch(limits, rotation)
    }

    fn sampler(&self, vocab: usize) -> Result<Self::Sampler> {
        self.cpu.sampler(vocab)
    }

    fn warm_ups(&self, limits: Limits) -> Vec<WarmUp> {
        self.cpu.warm_ups(limits)
    }

    fn set_batch(&self, batch: &mut Self::Batch, from: &MicroBatch) -> Result<()> {
        self.at(Point::SetBatch)?;
        let mut known = from.clone();
        let tokens = self.tokens.lock().unwrap();
        for part in &from.seqs {
            for id in known.ids[part.row..part.row + part.len].iter_mut().filter(|id| **id == ON_DEVICE) {
                // The other stages do not look at it.
                *id = tokens.get(&part.seat).copied().unwrap_or(0);
            }
        }
        drop(tokens);
        self.cpu.set_batch(batch, &known)
    }

    fn await_tokens(&self, after: u64) -> Result<()> {
        self.cpu.await_tokens(after)
    }

    fn rows(&self, batch: &Self::Batch) -> usize {
        self.cpu.rows(batch)
    }

    fn outputs(&self, batch: &Self::Batch) -> usize {
        self.cpu.outputs(batch)
    }

    fn pass(&self, batch: &Self::Batch, ops: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        self.cpu.pass(batch, ops)
    }

    fn mark(&self) -> Result<Instant> {
        self.cpu.mark()
    }

    fn between(&self, from: &Instant, to: &Instant) -> Result<Option<Duration>> {
        self.cpu.between(from, to)
    }

    fn read(&self, out: &mut [f32], from: &Self::Buf) -> Result<()> {
        self.at(Point::Send)?;
        self.cpu.read(out, from)
    }

    fn write(&self, to: &mut Self::Buf, from: &[f32]) -> Result<()> {
        self.at(Point::Take)?;
        self.cpu.write(to, from)
    }

    fn embed(
        &self,
        out: &mut Self::Buf,
        table: &Self::Matrix,
        images: Option<&Self::Buf>,
        batch: &Self::Batch,
    ) -> Result<()> {
        self.at(Point::Embed)?;
        self.cpu.embed(out, table, images, batch)
    }

    fn norm_linear(
        &self,
        out: &mut Self::Buf,
        normed: &mut Self::Buf,
        x: &Self::Buf,
        of: Norm<'_, Self>,
        w: &Self::Matrix,
    ) -> Result<()> {
        self.cpu.norm_linear(out, normed, x, norm(&of), w)
    }

    fn norm_linear_columns(
        &self,
        out: (&mut Self::Buf, Columns),
        normed: &mut Self::Buf,
        x: &Self::Buf,
        of: Norm<'_, Self>,
        w: &Self::Matrix,
    ) -> Result<()> {
        self.at(Point::Head)?;
        self.cpu.norm_linear_columns(out, normed, x, norm(&of), w)
    }

    fn norm_gate_up(
        &self,
        out: &mut Self::Buf,
        scratch: (&mut Self::Buf, &mut Self::Buf),
        x: &Self::Buf,
        of: Norm<'_, Self>,
        w: &Self::Matrix,
    ) -> Result<()> {
        self.cpu.norm_gate_up(out, scratch, x, norm(&of), w)
    }

    fn linear_add(&self, x: &mut Self::Buf, y: &Self::Buf, w: &Self::Matrix, rows: usize) -> Result<()> {
        self.cpu.linear_add(x, y, w, rows)
    }

    fn rope_kv(
        &self,
        qkv: &mut Self::Buf,
        kv: &mut Self::Kv,
        batch: &Self::Batch,
        heads: HeadShape,
        norm: Option<QkNorm<'_, Self>>,
    ) -> Result<()> {
        let norm = norm.map(|norm| QkNorm { q: norm.q, k: norm.k, eps: norm.eps });
        self.cpu.rope_kv(qkv, kv, batch, heads, norm)
    }

    fn attention(
        &self,
        out: &mut Self::Buf,
        qkv: &Self::Buf,
        kv: &Self::Kv,
        batch: &Self::Batch,
        shape: AttentionShape,
    ) -> Result<()> {
        self.at(Point::Layer)?;
        self.cpu.attention(out, qkv, kv, batch, shape)
    }

    fn gather_outputs(
        &self,
        out: &mut Self::Buf,
        x: &Self::Buf,
        batch: &Self::Batch,
        dim: usize,
    ) -> Result<()> {
        self.at(Point::Head)?;
        self.cpu.gather_outputs(out, x, batch, dim)
    }

    fn sample(&self, logits: &Self::Buf, sampler: &mut Self::Sampler, step: &Step) -> Result<Self::Pending> {
        self.at(Point::Sample)?;
        let chosen = self.cpu.sample(logits, sampler, step)?;
        self.hand_on(step, &chosen);
        Ok(chosen)
    }

    fn find_largest(
        &self,
        found: (&mut Self::Buf, usize),
        logits: &Self::Buf,
        tokens: &Range<usize>,
        rows: usize,
    ) -> Result<()> {
        self.at(Point::Head)?;
        self.cpu.find_largest(found, logits, tokens, rows)
    }

    fn choose_found(
        &self,
        found: (&Self::Buf, usize, usize),
        sampler: &mut Self::Sampler,
        step: &Step,
    ) -> Result<Self::Pending> {
        self.at(Point::Sample)?;
        let chosen = self.cpu.choose_found(found, sampler, step)?;
        self.hand_on(step, &chosen);
        Ok(chosen)
    }

    fn collect(&self, pending: Self::Pending, batch: &MicroBatch) -> Result<Vec<Sampled>> {
        self.at(Point::Collect)?;
        self.cpu.collect(pending, batch)
    }
}

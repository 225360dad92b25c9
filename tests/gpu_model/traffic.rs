//! Random micro-batches, and decoders that take them.

use std::{path::Path, sync::Arc};

use pipeline_infer::{
    backend::{Backend, DType, Limits},
    batch::{KV_BLOCK, MicroBatch, OutputRow, SeqId, SeqRows},
    model::{
        decoder::{Decoder, DecoderConfig},
        open_model,
    },
};

use crate::common::Random;

pub(crate) const SEQUENCES: usize = 24;
/// Tokens of a sequence; after these it begins anew, in the same blocks.
pub(crate) const CONTEXT: usize = 400;
pub(crate) const LIMITS: Limits =
    Limits { rows_max: 320, seqs_max: SEQUENCES, outputs_max: 320, context_max: CONTEXT };
const BLOCKS_EACH: usize = CONTEXT.div_ceil(KV_BLOCK);

/// Prompts in chunks, single steps and mixtures of them, of sequences whose blocks lie scattered.
pub(crate) struct Traffic {
    random: Random,
    vocab: usize,
    cached: [usize; SEQUENCES],
}

impl Traffic {
    pub(crate) fn new(seed: u64, vocab: usize) -> Self {
        Traffic { random: Random::new(seed), vocab, cached: [0; SEQUENCES] }
    }

    /// The next micro-batch. At least one row's logits are wanted; of single steps all are, so that most of those
    /// passes are recorded ones.
    pub(crate) fn next(&mut self) -> MicroBatch {
        let decode = self.random.below(5) < 2;
        let seqs = 1 + self.random.below(if decode { SEQUENCES } else { 8 });
        let first = self.random.below(SEQUENCES);
        let mut batch = MicroBatch::default();
        for i in 0..seqs {
            let long = [2, 7, 16, 40, 130][self.random.below(5)];
            let len = match decode || self.random.below(3) == 0 {
                true => 1,
                false => 1 + self.random.below(long),
            };
            // 5 and 24 have no common factor: each sequence comes once.
            self.add(&mut batch, (first + 5 * i) % SEQUENCES, len);
        }
        let every = decode || self.random.below(5) == 0;
        for part in &batch.seqs {
            let rows = if every {
                part.row..part.row + part.len
            } else {
                part.row + part.len - 1..part.row + part.len
            };
            batch.outputs.extend(rows.map(|row| OutputRow { row, seq: part.seq, seat: part.seat }));
        }
        batch
    }

    fn add(&mut self, batch: &mut MicroBatch, seq: usize, len: usize) {
        let row = batch.rows();
        let len = len.min(LIMITS.rows_max - row);
        if len == 0 {
            return;
        }
        if self.cached[seq] + len > CONTEXT {
            self.cached[seq] = 0;
        }
        let cached = self.cached[seq];
        self.cached[seq] += len;
        let blocks = (0..BLOCKS_EACH).rev().map(|i| (SEQUENCES * i + seq) as u32).collect();
        batch.seqs.push(SeqRows { seq: SeqId(seq as u64), seat: seq as u32, row, len, cached, blocks });
        batch.ids.extend((0..len).map(|_| self.random.below(self.vocab) as u32));
        batch.positions.extend((cached..cached + len).map(|p| p as u32));
    }
}

/// Decoders of all layers in so many stages, one a backend.
pub(crate) struct Chain<'a, B: Backend> {
    stages: Vec<(&'a B, Decoder<B>)>,
    vocab: usize,
    dim: usize,
}

impl<'a, B: Backend> Chain<'a, B> {
    pub(crate) fn load(dir: &Path, dummy: bool, dtype: DType, backends: &[&'a B]) -> Self {
        let model = open_model(dir, dummy).unwrap();
        let spec = Arc::new(model.spec.clone());
        let (layers, count) = (spec.layers.len(), backends.len());
        let weights = Arc::new(model.weights);
        let stage = |(i, &backend): (usize, &&'a B)| {
            let config = DecoderConfig {
                split_head: false,
                spec: spec.clone(),
                arch: model.arch,
                weights: weights.clone(),
                layers: layers * i / count..layers * (i + 1) / count,
                dtype,
                limits: LIMITS,
                kv_blocks: SEQUENCES * BLOCKS_EACH,
            };
            (backend, Decoder::load(backend, &config).unwrap())
        };
        let stages = backends.iter().enumerate().map(stage).collect();
        Chain { stages, vocab: spec.vocab, dim: spec.dim }
    }

    /// The logits of a micro-batch's output rows.
    pub(crate) fn logits(&mut self, batch: &MicroBatch) -> Vec<f32> {
        let mut hidden = Vec::new();
        for (i, (backend, decoder)) in self.stages.iter_mut().enumerate() {
            if i > 0 {
                backend.write(decoder.hidden_mut(), &hidden).unwrap();
            }
            decoder.prepare(*backend, batch).unwrap();
            decoder.forward(*backend).unwrap();
            hidden.resize(batch.rows() * self.dim, 0.0);
            backend.read(&mut hidden, decoder.hidden(batch.rows()).0).unwrap();
        }
        let (backend, last) = self.stages.last().expect("a chain of no stages");
        let mut logits = vec![f32::NAN; batch.outputs.len() * self.vocab];
        backend.read(&mut logits, last.logits()).unwrap();
        logits
    }
}

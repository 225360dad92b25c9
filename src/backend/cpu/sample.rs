//! Choosing tokens: the most likely one.

use crate::batch::{MicroBatch, Sampled};

/// The state of sampling.
pub struct Sampler {
    vocab: usize,
}

impl Sampler {
    /// For rows of `vocab` logits.
    pub fn new(vocab: usize) -> Self {
        Sampler { vocab }
    }

    /// The token of the largest logit, the lowest of equals, for each output row.
    pub fn sample(&mut self, logits: &[f32], batch: &MicroBatch) -> Vec<Sampled> {
        let best = |row: &[f32]| {
            let later = |best: usize, i: usize| if row[i] > row[best] { i } else { best };
            (0..row.len()).reduce(later).unwrap_or(0) as u32
        };
        let rows = logits.chunks_exact(self.vocab.max(1)).zip(&batch.outputs);
        rows.map(|(row, o)| Sampled { seq: o.seq, id: best(row), logprobs: None }).collect()
    }
}

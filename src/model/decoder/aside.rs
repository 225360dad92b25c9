//! A head in parts, each of which makes the logits of some tokens on a device of its own.
//!
//! What the parts are asked for goes beside what their devices' stages do: also on the last stage's device, which goes on with
//! the next micro-batch while the tokens of this one are chosen. Where all rows want their most likely token alone, each part
//! tells its best one; else logits come together where tokens are chosen.

use std::{collections::HashSet, ops::Range, sync::Arc};

use super::{DecoderConfig, HeadWeights, Held, Loader};
use crate::{
    backend::{self, Backend, Columns, Limits, NormShape},
    batch::{MicroBatch, SeqId, Step},
    error::Result,
    model::{
        spec::{ModelSpec, Norm},
        units::Unit,
    },
    request::SamplingParams,
};

/// A part of the head, with a view of its device that nothing else uses.
pub struct Aside<B: Backend> {
    backend: Arc<B>,
    weights: HeadWeights<B>,
    tokens: Range<usize>,
    normed: B::Buf, // [outputs, dim]
    logits: B::Buf, // [outputs, tokens]
}

/// All of them. They are dropped in this order, and before what they read and write on the last stage's device: whatever
/// still runs on another one is waited for when its part's buffers go.
pub(super) struct Parts<B: Backend> {
    /// In their order. The last one, on the last stage's device, chooses tokens.
    all: Vec<Aside<B>>,
    found: B::Buf, // [parts, outputs] of two numbers
    /// Output rows that there is room for.
    outputs: usize,
    /// Sequences that want more than their most likely token.
    particular: HashSet<SeqId>,
}

impl<B: Backend> Aside<B> {
    /// Loads a part onto its device, but for what is there already; `tell` is called with the bytes that have come. `of` is
    /// the last stage's device, which must be in reach.
    pub fn load(
        (backend, of): (&Arc<B>, &B),
        config: &DecoderConfig,
        unit: Unit,
        there: &Held<B>,
        tell: &dyn Fn(usize),
    ) -> Result<Self> {
        backend.find_way_back(of)?;
        let mut loader = Loader { backend: &**backend, config, there, tell, bytes: 0, told: 0 };
        let weights = loader.head_weights(unit, None)?;
        loader.end()?;
        let (rows, tokens) = (rows_room(&**backend, config.limits), unit.tokens(config.spec.vocab));
        let normed = backend.working_buf(rows * config.spec.dim)?;
        let logits = backend.buf(rows * tokens.len())?;
        Ok(Aside { backend: backend.clone(), weights, tokens, normed, logits })
    }

    /// Its unit.
    pub fn held(&self) -> Held<B> {
        Held { head: Some(self.weights.clone()), ..Held::default() }
    }
}

/// The rows that the head's norm goes over.
pub(super) fn outputs_shape<B: Backend>(backend: &B, spec: &ModelSpec, batch: &B::Batch) -> NormShape {
    let Norm::Rms { eps } = spec.norm;
    NormShape { rows: backend.outputs(batch), dim: spec.dim, eps }
}

/// Output rows that buffers have room for.
fn rows_room<B: Backend>(backend: &B, limits: Limits) -> usize {
    backend.rows_room(limits.outputs_max)
}

impl<B: Backend> Parts<B> {
    /// On the last stage's device.
    pub(super) fn new(backend: &B, limits: Limits, all: Vec<Aside<B>>) -> Result<Self> {
        let outputs = rows_room(backend, limits);
        let found = backend.buf(2 * all.len() * outputs)?;
        Ok(Parts { all, found, outputs, particular: HashSet::new() })
    }

    /// Asks for the tokens of a pass's output rows, which end up in `rows` for all parts; if these are `plain`, by best tokens alone. Whoever
    /// chooses waits for the pass in any case: its step is over when tokens have been chosen.
    pub(super) fn sample(
        &mut self,
        plain: bool,
        backend: &B,
        spec: &ModelSpec,
        (batch, hidden): (&B::Batch, &B::Buf),
        (rows, logits, sampler): (&mut B::Buf, &mut B::Buf, &mut B::Sampler),
        step: &Step,
    ) -> Result<B::Pending> {
        let shape = outputs_shape(backend, spec, batch);
        let (chooser, others) = self.all.split_last_mut().expect("a head in no parts; this is a bug");
        if shape.rows == 0 {
            chooser.backend.await_all(backend)?;
            return chooser.backend.sample(logits, sampler, step);
        }
        // The rows of the micro-batch before must have been read.
        backend.await_all(&chooser.backend)?;
        backend.gather_outputs(rows, hidden, batch, spec.dim)?;
        if plain {
            self.find(backend, rows, shape)?;
        } else {
            for part in others.iter_mut().chain([chooser]) {
                part.backend.await_all(backend)?;
                part.columns(rows, shape, (logits, spec.vocab))?;
            }
        }
        let Parts { all, found, outputs: pitch, .. } = self;
        let (chooser, others) = all.split_last_mut().expect("a head in no parts; this is a bug");
        others.iter().try_for_each(|other| chooser.backend.await_all(&other.backend))?;
        match plain {
            true => chooser.backend.choose_found((found, others.len() + 1, *pitch), sampler, step),
            false => chooser.backend.sample(logits, sampler, step),
        }
    }

    /// The best token that each part has for each row.
    fn find(&mut self, backend: &B, rows: &B::Buf, shape: NormShape) -> Result<()> {
        let Parts { all, found, outputs: pitch, .. } = self;
        for (i, part) in all.iter_mut().enumerate() {
            part.backend.await_all(backend)?;
            part.find(rows, shape, (&mut *found, i * *pitch))?;
        }
        Ok(())
    }

    /// Whether all output rows of the next step want their most likely token alone.
    pub(super) fn is_plain(&mut self, batch: &MicroBatch) -> bool {
        for seq in &batch.ends {
            self.particular.remove(seq);
        }
        for start in &batch.starts {
            match is_particular(&start.sampling) {
                true => self.particular.insert(start.seq),
                false => self.particular.remove(&start.seq),
            };
        }
        let particular = |seq: &SeqId| self.particular.contains(seq);
        self.particular.is_empty() || !batch.outputs.iter().any(|output| particular(&output.seq))
    }
}

fn is_particular(p: &SamplingParams) -> bool {
    p.temperature != 0.0 || p.penalizes() || !p.logit_bias.is_empty() || p.logprobs.is_some()
}

impl<B: Backend> Aside<B> {
    /// The best of its tokens for each row, to a place in `found`.
    fn find(&mut self, rows: &B::Buf, shape: NormShape, found: (&mut B::Buf, usize)) -> Result<()> {
        let empty = self.tokens.is_empty();
        let Aside { backend, weights: HeadWeights { norm, matrix, .. }, tokens, normed, logits } = self;
        if !empty {
            let all = Columns::all(tokens.len());
            let norm = backend::Norm { w: &**norm, shape };
            backend.norm_linear_columns((&mut *logits, all), normed, rows, norm, matrix)?;
        }
        backend.find_largest(found, logits, tokens, shape.rows)
    }

    /// The logits of its tokens, in rows of all.
    fn columns(&mut self, rows: &B::Buf, shape: NormShape, (to, width): (&mut B::Buf, usize)) -> Result<()> {
        if self.tokens.is_empty() {
            return Ok(());
        }
        let Aside { backend, weights: HeadWeights { norm, matrix, .. }, tokens, normed, .. } = self;
        let columns = Columns { first: tokens.start, width };
        backend.norm_linear_columns((to, columns), normed, rows, backend::Norm { w: &**norm, shape }, matrix)
    }
}

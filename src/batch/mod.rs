//! A micro-batch: what the scheduler decides and the stages carry out. Plain data.

pub(crate) mod blocks;

use std::{sync::Arc, time::Duration};

use serde::{Deserialize, Serialize};

pub use self::blocks::Blocks;
use crate::request::{Logprobs, SamplingParams};

/// Tokens in one block of the KV cache.
pub const KV_BLOCK: usize = 16;

/// In place of a row's token that the host does not know yet: what the sequence's last output row brought, at its
/// seat in the device's table of last tokens.
pub const ON_DEVICE: u32 = u32::MAX;

/// The bit of an id that is no token but a row of the image store: the rest of it is the row's number. [`ON_DEVICE`]
/// has it too, and is none.
pub const IMAGE_ROW: u32 = 1 << 31;

/// The row of the image store that an id stands for, if it is one.
pub fn image_row(id: u32) -> Option<usize> {
    (id & IMAGE_ROW != 0 && id != ON_DEVICE).then_some((id & !IMAGE_ROW) as usize)
}

/// A sequence: one sample of one request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SeqId(pub u64);

/// Rows of several sequences that go through the stages together: prompt chunks and single steps.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct MicroBatch {
    /// The tokens, all sequences' rows one after another; [`ON_DEVICE`] for one that only the device knows,
    /// [`IMAGE_ROW`] for a part of an image.
    pub ids: Vec<u32>, // [rows]
    /// Each token's place in its sequence.
    pub positions: Vec<u32>, // [rows]
    /// What each row is rotated by: time, down and across. Empty where each row's is its place, thrice: without images.
    pub turns: Vec<[u32; 3]>, // [rows], or none
    /// Which rows belong to which sequence, in the order of the rows, without gaps.
    pub seqs: Vec<SeqRows>,
    /// The rows whose next token is wanted, in the order of the rows.
    pub outputs: Vec<OutputRow>,
    /// Sequences that have their first rows here, or begin again.
    pub starts: Vec<SeqStart>,
    /// Sequences that have ended: what a stage keeps of them can go, before `starts`, which may have their seats.
    pub ends: Vec<SeqId>,
}

impl MicroBatch {
    /// How many rows (tokens) there are.
    pub fn rows(&self) -> usize {
        self.ids.len()
    }

    /// What is wrong with `turns` for a model whose rotation has sections, or has none.
    pub(crate) fn check_turns(&self, sections: bool) -> Result<(), String> {
        match self.turns.len() {
            0 => Ok(()),
            _ if !sections => Err("turns of a model that turns by places alone".into()),
            turns if turns != self.rows() => Err(format!("{turns} turns for {} rows", self.rows())),
            _ => Ok(()),
        }
    }
}

/// A step: one micro-batch on its way through all stages.
#[derive(Debug, Clone)]
pub struct Step {
    /// Counts up from 0.
    pub step: u64,
    /// The latest step that brings a token which rows of this one have [`ON_DEVICE`].
    pub after: Option<u64>,
    /// Its rows.
    pub batch: Arc<MicroBatch>,
}

/// Consecutive rows of one sequence.
#[derive(Debug, Clone, PartialEq)]
pub struct SeqRows {
    /// Whose.
    pub seq: SeqId,
    /// Its seat.
    pub seat: u32,
    /// The first row.
    pub row: usize,
    /// How many rows.
    pub len: usize,
    /// Tokens of this sequence already in the KV cache: the position of the first row.
    pub cached: usize,
    /// The sequence's KV blocks: token `p` lives in `blocks.at(p / KV_BLOCK)`, on every stage. Those of the cached tokens
    /// may be other sequences' too; an earlier step has written them.
    pub blocks: Blocks,
}

/// A row whose logits are wanted.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct OutputRow {
    /// The row.
    pub row: usize,
    /// Its sequence.
    pub seq: SeqId,
    /// Its sequence's seat.
    pub seat: u32,
}

/// What the sampler has to know about a sequence from its first rows on.
#[derive(Debug, Clone, PartialEq)]
pub struct SeqStart {
    /// Which.
    pub seq: SeqId,
    /// Its place in tables of what is kept of running sequences: its own until its last step has come back.
    pub seat: u32,
    /// How to choose its tokens.
    pub sampling: Arc<SamplingParams>,
    /// The seed, drawn if the request named none.
    pub seed: u64,
    /// The whole prompt, for the repetition penalty. Parts of images are their placeholders' tokens.
    pub prompt: Arc<[u32]>,
    /// Tokens of the answer that have been chosen already, if it begins again: its penalties count them, and the next random
    /// number is the one after theirs.
    pub generated: Arc<[u32]>,
}

/// A token chosen for a sequence.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampled {
    /// The sequence.
    pub seq: SeqId,
    /// The token.
    pub id: u32,
    /// If the request asked for them.
    pub logprobs: Option<Logprobs>,
}

/// How long a stage took for a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Observation {
    /// The stage's place in the pipeline.
    pub stage: usize,
    /// The step.
    pub step: u64,
    /// Without what it waited for.
    pub busy: Duration,
}

/// What a micro-batch's time depends on.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct PassShape {
    /// Rows (tokens).
    pub rows: usize,
    /// Rows whose logits are wanted.
    pub outputs: usize,
    /// The tokens that each row attends to, itself among them; all rows together.
    pub attended: usize,
    /// Those of them that single rows attend to: nobody shares the reading of their keys and values.
    pub read: usize,
}

impl PassShape {
    /// A micro-batch's.
    pub fn of(batch: &MicroBatch) -> Self {
        let mut shape = PassShape { outputs: batch.outputs.len(), ..PassShape::default() };
        for part in &batch.seqs {
            shape = shape.with_rows(part.cached, part.len);
        }
        shape
    }

    /// With rows of one more sequence, behind `cached` tokens.
    #[must_use]
    pub fn with_rows(mut self, cached: usize, len: usize) -> Self {
        let attended = len * cached + len * (len + 1) / 2;
        self.rows += len;
        self.attended += attended;
        self.read += if len == 1 { attended } else { 0 };
        self
    }
}

//! Queues of sequences. `plan` takes the next micro-batch from them; `apply` records what came of it.

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
};

use super::{BlockPool, Lease};
use crate::{
    batch::{MicroBatch, OutputRow, Sampled, SeqId, SeqRows, SeqStart, Step},
    request::SamplingParams,
};

/// How much runs at once.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SchedulerConfig {
    /// Micro-batches in flight at most.
    pub slots: usize,
    /// Prompt tokens in a micro-batch at most.
    pub chunk: usize,
    /// Sequences that hold KV blocks at most.
    pub running_max: usize,
}

/// A sequence to be run.
#[derive(Debug, Clone)]
pub struct NewSequence {
    /// Its id, never used before.
    pub seq: SeqId,
    /// Its prompt; not empty.
    pub prompt: Arc<[u32]>,
    /// Prompt and answer together, at most.
    pub tokens_max: usize,
    /// For the sampler.
    pub sampling: Arc<SamplingParams>,
    /// For the sampler.
    pub seed: u64,
}

/// A sequence between `add` and its end.
#[derive(Debug)]
struct Sequence {
    new: NewSequence,
    /// Tokens that steps have been planned for.
    planned: usize,
    /// The token to be fed next, once the step before has brought it.
    next: Option<u32>,
    /// Steps planned and not applied.
    in_flight: usize,
    /// KV blocks for all its tokens, from admission to the last step's end.
    lease: Option<Lease>,
    /// Nothing more is to be planned.
    ended: bool,
}

/// Decides what the stages do next.
///
/// A running sequence holds blocks for its longest possible answer from the start, so an admitted one always
/// ends; waiting ones are admitted in the order they came.
#[derive(Debug)]
pub struct Scheduler {
    config: SchedulerConfig,
    blocks: BlockPool,
    sequences: HashMap<SeqId, Sequence>,
    waiting: VecDeque<SeqId>,
    /// Admitted, with prompt tokens left to plan, in order of arrival.
    prefill: VecDeque<SeqId>,
    /// Past the prompt with the next token known, longest waiting first.
    ready: VecDeque<SeqId>,
    /// Admitted and not ended, with the whole prompt planned: in `ready` or in flight.
    decoding: usize,
    /// Admitted sequences whose blocks are still held.
    running: usize,
    steps: HashMap<u64, Arc<MicroBatch>>,
    next_step: u64,
    ends: Vec<SeqId>,
}

impl Scheduler {
    /// A scheduler with nothing to do.
    pub fn new(config: SchedulerConfig, blocks: BlockPool) -> Self {
        assert!(
            config.slots > 0 && config.chunk > 0 && config.running_max > 0,
            "a scheduler that can plan nothing; this is a bug"
        );
        Scheduler {
            config,
            blocks,
            sequences: HashMap::new(),
            waiting: VecDeque::new(),
            prefill: VecDeque::new(),
            ready: VecDeque::new(),
            decoding: 0,
            running: 0,
            steps: HashMap::new(),
            next_step: 0,
            ends: Vec::new(),
        }
    }

    /// Rows of a micro-batch at most.
    pub fn rows_max(config: SchedulerConfig) -> usize {
        config.chunk + config.running_max
    }

    /// Queues a sequence.
    pub fn add(&mut self, new: NewSequence) {
        assert!(!new.prompt.is_empty(), "a sequence without a prompt; this is a bug");
        assert!(
            BlockPool::blocks_for(new.tokens_max) <= self.blocks.total(),
            "a sequence that can never be admitted; this is a bug"
        );
        let seq = new.seq;
        let state = Sequence { new, planned: 0, next: None, in_flight: 0, lease: None, ended: false };
        let before = self.sequences.insert(seq, state);
        assert!(before.is_none(), "a sequence id used twice; this is a bug");
        self.waiting.push_back(seq);
    }

    /// Decides the next step; `None` if nothing can start now.
    pub fn plan(&mut self) -> Option<Step> {
        if self.steps.len() >= self.config.slots {
            return None;
        }
        self.admit();
        let mut batch = MicroBatch::default();
        // Never all of them in one step, or the other slots would travel empty.
        let share = self.decoding.div_ceil(self.config.slots);
        for seq in self.ready.drain(..share.min(self.ready.len())) {
            let sequence = self.sequences.get_mut(&seq).expect("a ready sequence is gone; this is a bug");
            let token = sequence.next.take().expect("a ready sequence has no token; this is a bug");
            sequence.push_rows(&mut batch, &[token]);
            batch.outputs.push(OutputRow { row: batch.rows() - 1, seq });
        }
        self.plan_prompts(&mut batch);
        if batch.rows() == 0 {
            return None;
        }
        batch.ends = std::mem::take(&mut self.ends);
        let plan = Step { step: self.next_step, batch: Arc::new(batch) };
        self.next_step += 1;
        self.steps.insert(plan.step, plan.batch.clone());
        Some(plan)
    }

    /// Records what came of a step. Returns the tokens of sequences that had not ended; the caller says with
    /// [`Scheduler::end`] which of them end here, before it plans again.
    pub fn apply(&mut self, step: u64, sampled: Vec<Sampled>) -> Vec<Sampled> {
        let batch = self.steps.remove(&step).expect("a step that was not planned; this is a bug");
        for rows in &batch.seqs {
            let sequence =
                self.sequences.get_mut(&rows.seq).expect("a step without its sequence; this is a bug");
            sequence.in_flight -= 1;
        }
        let mut wanted = Vec::with_capacity(sampled.len());
        for token in sampled {
            let sequence = self.sequences.get_mut(&token.seq).expect("a token of no sequence; this is a bug");
            if !sequence.ended {
                sequence.next = Some(token.id);
                self.ready.push_back(token.seq);
                wanted.push(token);
            }
        }
        for rows in &batch.seqs {
            self.release(rows.seq);
        }
        wanted
    }

    /// Ends a sequence, wherever it is. Its blocks come back when its last step in flight has been applied.
    /// A sequence that has ended before is left alone.
    pub fn end(&mut self, seq: SeqId) {
        let Some(sequence) = self.sequences.get_mut(&seq).filter(|s| !s.ended) else { return };
        sequence.ended = true;
        if sequence.lease.is_none() {
            self.waiting.retain(|&s| s != seq);
        } else if sequence.planned < sequence.new.prompt.len() {
            self.prefill.retain(|&s| s != seq);
        } else {
            self.ready.retain(|&s| s != seq);
            self.decoding -= 1;
        }
        self.release(seq);
    }

    /// Sequences that wait for blocks.
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Sequences that hold blocks.
    pub fn running(&self) -> usize {
        self.running
    }

    fn admit(&mut self) {
        while self.running < self.config.running_max
            && let Some(&seq) = self.waiting.front()
        {
            let sequence = self.sequences.get_mut(&seq).expect("a waiting sequence is gone; this is a bug");
            let Some(lease) = self.blocks.lease(sequence.new.tokens_max) else { return };
            sequence.lease = Some(lease);
            self.waiting.pop_front();
            self.prefill.push_back(seq);
            self.running += 1;
        }
    }

    /// Fills a micro-batch with prompt chunks. A chunk needs no result of the chunk before it, so a long
    /// prompt fills the pipeline by itself.
    fn plan_prompts(&mut self, batch: &mut MicroBatch) {
        let mut room = self.config.chunk;
        while room > 0
            && let Some(&seq) = self.prefill.front()
        {
            let sequence = self.sequences.get_mut(&seq).expect("a prompt's sequence is gone; this is a bug");
            let prompt = sequence.new.prompt.clone();
            let start = sequence.planned;
            let len = room.min(prompt.len() - start);
            if start == 0 {
                batch.starts.push(sequence.start());
            }
            sequence.push_rows(batch, &prompt[start..start + len]);
            room -= len;
            if start + len == prompt.len() {
                batch.outputs.push(OutputRow { row: batch.rows() - 1, seq });
                self.prefill.pop_front();
                self.decoding += 1;
            }
        }
    }

    /// Takes an ended sequence's blocks back once no step touches them.
    fn release(&mut self, seq: SeqId) {
        let Some(sequence) = self.sequences.get(&seq) else { return };
        if !sequence.ended || sequence.in_flight > 0 {
            return;
        }
        if sequence.planned > 0 {
            self.ends.push(seq);
        }
        self.running -= usize::from(sequence.lease.is_some());
        self.sequences.remove(&seq);
    }
}

impl Sequence {
    fn start(&self) -> SeqStart {
        SeqStart {
            seq: self.new.seq,
            sampling: self.new.sampling.clone(),
            seed: self.new.seed,
            prompt: self.new.prompt.clone(),
        }
    }

    fn push_rows(&mut self, batch: &mut MicroBatch, tokens: &[u32]) {
        let lease = self.lease.as_ref().expect("a planned sequence holds no blocks; this is a bug");
        batch.seqs.push(SeqRows {
            seq: self.new.seq,
            row: batch.rows(),
            len: tokens.len(),
            cached: self.planned,
            blocks: lease.ids().clone(),
        });
        batch.ids.extend_from_slice(tokens);
        batch.positions.extend((self.planned..self.planned + tokens.len()).map(|p| p as u32));
        self.planned += tokens.len();
        assert!(self.planned <= self.new.tokens_max, "a sequence past its blocks; this is a bug");
        self.in_flight += 1;
    }
}

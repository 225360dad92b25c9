//! Queues of sequences. `plan` takes the next micro-batch from them; `apply` records what came of it.

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
};

use super::{BlockPool, Lease, SchedulerStats};
use crate::{
    batch::{MicroBatch, ON_DEVICE, OutputRow, Sampled, SeqId, SeqRows, SeqStart, Step},
    request::SamplingParams,
};

/// How much runs at once.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SchedulerConfig {
    /// Micro-batches in flight at most; twice as many if `ahead`.
    pub slots: usize,
    /// Prompt tokens in a micro-batch at most.
    pub chunk: usize,
    /// Sequences that hold KV blocks at most.
    pub running_max: usize,
    /// For devices that hand tokens on by themselves: a sequence's next step is planned before the host has read
    /// the token that it begins with.
    pub ahead: bool,
}

impl SchedulerConfig {
    /// Micro-batches in flight at most.
    pub fn in_flight_max(&self) -> usize {
        self.slots * (1 + usize::from(self.ahead))
    }
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
    /// The latest step that holds rows of it.
    last: u64,
    /// The token to be fed next, if the host knows it.
    next: Option<u32>,
    /// Steps planned and not applied.
    in_flight: usize,
    /// Those of them that bring a token.
    unknown: usize,
    /// From admission to the last step's end.
    place: Option<Place>,
    /// Nothing more is to be planned.
    ended: bool,
}

/// What a running sequence holds.
#[derive(Debug)]
struct Place {
    /// KV blocks for all its tokens.
    lease: Lease,
    /// Its line in the devices' tables.
    seat: u32,
}

/// Decides what the stages do next.
///
/// A running sequence holds blocks for its longest possible answer from the start, so an admitted one always
/// ends; waiting ones are admitted in the order they came.
///
/// One step ahead, a sequence is in two steps at a time: one whose token the host has not read, and the one after
/// it, whose row the device fills in. The later one is for nothing if the token is the last; `apply` drops it.
#[derive(Debug)]
pub struct Scheduler {
    config: SchedulerConfig,
    blocks: BlockPool,
    sequences: HashMap<SeqId, Sequence>,
    waiting: VecDeque<SeqId>,
    /// Admitted, with prompt tokens left to plan, in order of arrival.
    prefill: VecDeque<SeqId>,
    /// Past the prompt, and may be planned: those whose latest step is the oldest first.
    ready: VecDeque<SeqId>,
    /// Admitted and not ended, with the whole prompt planned: in `ready` or in flight.
    decoding: usize,
    /// Seats that nobody has.
    seats: Vec<u32>,
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
            seats: (0..config.running_max as u32).rev().collect(),
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
        let before = self.sequences.insert(seq, Sequence::new(new));
        assert!(before.is_none(), "a sequence id used twice; this is a bug");
        self.waiting.push_back(seq);
    }

    /// Decides the next step; `None` if nothing can start now.
    pub fn plan(&mut self) -> Option<Step> {
        if self.steps.len() >= self.config.in_flight_max() {
            return None;
        }
        self.admit();
        let mut batch = MicroBatch::default();
        let after = self.plan_decode(&mut batch);
        self.plan_prompts(&mut batch);
        if batch.rows() == 0 {
            return None;
        }
        batch.ends = std::mem::take(&mut self.ends);
        let plan = Step { step: self.next_step, after, batch: Arc::new(batch) };
        self.next_step += 1;
        self.steps.insert(plan.step, plan.batch.clone());
        Some(plan)
    }

    /// Records what came of a step. Returns the tokens of sequences that had not ended; the caller says with
    /// [`Scheduler::end`] which of them end here, before it plans again. Steps are applied in their order.
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
            if sequence.ended {
                continue;
            }
            let before = sequence.may_be_planned(self.config.ahead);
            sequence.unknown -= 1;
            // A step in flight that brings another token has this one from the device.
            sequence.next = (sequence.unknown == 0).then_some(token.id);
            if !before && sequence.may_be_planned(self.config.ahead) {
                self.make_ready(token.seq);
            }
            wanted.push(token);
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
        if sequence.place.is_none() {
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
        self.config.running_max - self.seats.len()
    }

    /// Queues and blocks now.
    pub fn stats(&self) -> SchedulerStats {
        SchedulerStats {
            waiting: self.waiting(),
            running: self.running(),
            kv_blocks_total: self.blocks.total(),
            kv_blocks_free: self.blocks.free(),
            in_flight: self.steps.len(),
            ..SchedulerStats::default()
        }
    }

    fn admit(&mut self) {
        while let Some(&seat) = self.seats.last()
            && let Some(&seq) = self.waiting.front()
        {
            let sequence = self.sequences.get_mut(&seq).expect("a waiting sequence is gone; this is a bug");
            let Some(lease) = self.blocks.lease(sequence.new.tokens_max) else { return };
            sequence.place = Some(Place { lease, seat });
            self.seats.pop();
            self.waiting.pop_front();
            self.prefill.push_back(seq);
        }
    }

    /// Fills a micro-batch with single steps. Returns the latest step that brings one of their tokens.
    fn plan_decode(&mut self, batch: &mut MicroBatch) -> Option<u64> {
        // Never all of them in one step, or the other slots would travel empty.
        let share = self.decoding.div_ceil(self.config.slots);
        let distance = self.distance();
        let due = self.ready.iter().take(share).take_while(|seq| self.is_due(seq, distance)).count();
        let mut after = None;
        for seq in self.ready.drain(..due).collect::<Vec<_>>() {
            let sequence = self.sequences.get_mut(&seq).expect("a ready sequence is gone; this is a bug");
            let token = sequence.next.take().unwrap_or_else(|| {
                assert!(sequence.unknown == 1, "a ready sequence has no token; this is a bug");
                after = after.max(Some(sequence.last));
                ON_DEVICE
            });
            sequence.push_rows(self.next_step, batch, &[token]);
            self.want_token(seq, batch);
        }
        after
    }

    /// How many steps a sequence's next one should be behind its latest: as many as travel at the same time. A nearer
    /// one would hold up those behind it while it waits for its token.
    fn distance(&self) -> u64 {
        // Prompts need no token, so they fill every slot.
        if !self.prefill.is_empty() {
            return self.config.slots as u64;
        }
        let latest = |step: u64, output: &OutputRow| {
            let sequence = self.sequences.get(&output.seq);
            sequence.is_some_and(|s| s.last == step && !s.ended && s.planned < s.new.tokens_max)
        };
        let groups =
            self.steps.iter().filter(|(step, batch)| batch.outputs.iter().any(|o| latest(**step, o))).count();
        groups.min(self.config.slots) as u64
    }

    /// Whether a ready sequence's next step may be planned now.
    fn is_due(&self, seq: &SeqId, distance: u64) -> bool {
        let sequence = &self.sequences[seq];
        sequence.next.is_some() || self.next_step - sequence.last >= distance
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
            sequence.push_rows(self.next_step, batch, &prompt[start..start + len]);
            room -= len;
            if start + len == prompt.len() {
                self.prefill.pop_front();
                self.decoding += 1;
                self.want_token(seq, batch);
            }
        }
    }

    /// Asks for a token from the micro-batch's last row.
    fn want_token(&mut self, seq: SeqId, batch: &mut MicroBatch) {
        let sequence = self.sequences.get_mut(&seq).expect("a planned sequence is gone; this is a bug");
        batch.outputs.push(OutputRow { row: batch.rows() - 1, seq, seat: sequence.place().seat });
        sequence.unknown += 1;
        if sequence.may_be_planned(self.config.ahead) {
            self.make_ready(seq);
        }
    }

    fn make_ready(&mut self, seq: SeqId) {
        let last = self.sequences[&seq].last;
        let before = self.ready.iter().rposition(|other| self.sequences[other].last <= last);
        self.ready.insert(before.map_or(0, |i| i + 1), seq);
    }

    /// Takes an ended sequence's blocks and seat back once no step touches them.
    fn release(&mut self, seq: SeqId) {
        let Some(sequence) = self.sequences.get(&seq) else { return };
        if !sequence.ended || sequence.in_flight > 0 {
            return;
        }
        if sequence.planned > 0 {
            self.ends.push(seq);
        }
        self.seats.extend(sequence.place.as_ref().map(|place| place.seat));
        self.sequences.remove(&seq);
    }
}

impl Sequence {
    fn new(new: NewSequence) -> Self {
        Sequence { new, planned: 0, last: 0, next: None, in_flight: 0, unknown: 0, place: None, ended: false }
    }

    fn place(&self) -> &Place {
        self.place.as_ref().expect("a planned sequence holds no blocks; this is a bug")
    }

    /// Past the prompt: whether a single step may be planned, now or when it is due.
    fn may_be_planned(&self, ahead: bool) -> bool {
        self.unknown == 0 || (ahead && self.unknown == 1 && self.planned < self.new.tokens_max)
    }

    fn start(&self) -> SeqStart {
        SeqStart {
            seq: self.new.seq,
            seat: self.place().seat,
            sampling: self.new.sampling.clone(),
            seed: self.new.seed,
            prompt: self.new.prompt.clone(),
        }
    }

    fn push_rows(&mut self, step: u64, batch: &mut MicroBatch, tokens: &[u32]) {
        let place = self.place();
        batch.seqs.push(SeqRows {
            seq: self.new.seq,
            seat: place.seat,
            row: batch.rows(),
            len: tokens.len(),
            cached: self.planned,
            blocks: place.lease.ids().clone(),
        });
        batch.ids.extend_from_slice(tokens);
        batch.positions.extend((self.planned..self.planned + tokens.len()).map(|p| p as u32));
        self.planned += tokens.len();
        self.last = step;
        assert!(self.planned <= self.new.tokens_max, "a sequence past its blocks; this is a bug");
        self.in_flight += 1;
    }
}

//! Queues of sequences. `plan` takes the next micro-batch from them; `apply` records what came of it.

mod change;
mod images;
mod memory;
mod prompts;

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::Arc,
};

use serde::Serialize;

use self::memory::Growth;
use super::{
    BlockPool, CostModel, ImageStats, NewSequence, PassShape,
    images::Images,
    prefix::{Keys, PromptKeys},
    queue::{Rank, Waiting},
    sequence::{Sequences, State},
};
use crate::batch::{KV_BLOCK, MicroBatch, ON_DEVICE, Observation, OutputRow, Sampled, SeqId, SeqRows, Step};

/// Shapes of steps that are kept after their end, for observations that come late.
const SHAPES: usize = 1024;

/// How much runs at once.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SchedulerConfig {
    /// Micro-batches in flight at most; twice as many if `ahead`.
    pub slots: usize,
    /// Prompt tokens in a micro-batch at most.
    pub chunk: usize,
    /// Prompt tokens in a micro-batch at least, if as many wait. As many as `chunk` always makes chunks of that size.
    pub chunk_min: usize,
    /// Sequences that hold KV blocks at most.
    pub running_max: usize,
    /// For devices that hand tokens on by themselves: a sequence's next step is planned before the host has read
    /// the token that it begins with.
    pub ahead: bool,
    /// Whether a sequence may read KV blocks that others have computed for the same tokens.
    pub prefix_reuse: bool,
}

impl Default for SchedulerConfig {
    fn default() -> Self {
        let chunk = 256;
        SchedulerConfig {
            slots: 1,
            chunk,
            chunk_min: chunk,
            running_max: 64,
            ahead: false,
            prefix_reuse: true,
        }
    }
}

impl SchedulerConfig {
    /// Micro-batches in flight at most.
    pub fn in_flight_max(&self) -> usize {
        self.slots * (1 + usize::from(self.ahead))
    }
}

/// What a scheduler has and has done.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct SchedulerStats {
    /// Sequences without blocks and without a seat.
    pub waiting: usize,
    /// Sequences with a seat.
    pub running: usize,
    /// All KV blocks.
    pub kv_blocks_total: usize,
    /// Those that nobody holds and that hold nothing of use.
    pub kv_blocks_free: usize,
    /// Those that nobody holds and that can be found by their tokens.
    pub kv_blocks_cached: usize,
    /// Tokens of admitted sequences.
    pub prefix_lookup_tokens: u64,
    /// Those of them whose blocks were found.
    pub prefix_hit_tokens: u64,
    /// Sequences that have lost their blocks to others.
    pub preemptions: u64,
    /// Steps planned and not applied.
    pub in_flight: usize,
    /// Of a model that reads images.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub images: Option<ImageStats>,
}

/// Decides what the stages do next.
///
/// Stages carry steps out in the order in which they were planned. So what a planned step writes can be read by every later
/// one, and a block that is given back can be written by every later one, whatever is in flight.
///
/// One step ahead, a sequence is in two steps at a time: one whose token the host has not read, and the one after
/// it, whose row the device fills in. The later one is for nothing if the token is the last; `apply` drops it.
#[derive(Debug)]
pub struct Scheduler {
    config: SchedulerConfig,
    pool: BlockPool,
    keys: Keys,
    cost: CostModel,
    sequences: Sequences,
    waiting: Waiting,
    /// The one that has blocks and tokens of the prompt left to plan. Others begin when it is done.
    prompt: Option<u32>,
    /// Others that have blocks and tokens left, but wait for an image, by their beginning.
    held: BTreeMap<u64, u32>,
    begun_next: u64,
    /// Of a model that reads images.
    images: Option<Images>,
    /// Those that hold blocks.
    running: BTreeMap<Rank, u32>,
    /// How many of them may need more.
    growing: usize,
    /// Those that have lost theirs and will wait again: nobody after them begins meanwhile.
    returning: BTreeSet<Rank>,
    /// Those of them with the whole prompt planned: ready or in flight.
    decoding: usize,
    /// Seats that nobody has.
    seats: Vec<u32>,
    steps: VecDeque<InFlight>,
    next_step: u64,
    /// Of the latest steps, the last one's last.
    shapes: VecDeque<PassShape>,
    /// Of the latest micro-batch that had prompts and single steps or single steps alone, these.
    singles: PassShape,
    /// Of waiting sequences and of the prompt in hand.
    prompt_tokens: usize,
    /// Prompt tokens of a micro-batch, as many wait.
    cut: usize,
    arrivals: u64,
    ends: Vec<SeqId>,
    /// The samplers are new: they have to be told of everyone.
    samplers_new: bool,
    /// Counts alone.
    stats: SchedulerStats,
}

/// A step that has been planned and not applied.
#[derive(Debug)]
struct InFlight {
    step: u64,
    /// Whose rows, and whose outputs.
    parts: Vec<u32>,
    outputs: Vec<u32>,
    /// Those of its outputs' sequences that go on and have no later step.
    live: usize,
}

/// A micro-batch that is being planned.
struct Draft {
    batch: MicroBatch,
    this: InFlight,
    after: Option<u64>,
}

impl Scheduler {
    /// A scheduler with nothing to do.
    pub fn new(config: SchedulerConfig, pool: BlockPool) -> Self {
        assert!(
            config.slots > 0 && config.chunk > 0 && config.chunk_min > 0 && config.running_max > 0,
            "a scheduler that can plan nothing; this is a bug"
        );
        Scheduler {
            config,
            pool,
            keys: Keys::default(),
            cost: CostModel::default(),
            sequences: Sequences::new(),
            waiting: Waiting::default(),
            prompt: None,
            held: BTreeMap::new(),
            begun_next: 0,
            images: None,
            running: BTreeMap::new(),
            growing: 0,
            returning: BTreeSet::new(),
            decoding: 0,
            seats: (0..config.running_max as u32).rev().collect(),
            steps: VecDeque::new(),
            next_step: 0,
            shapes: VecDeque::new(),
            singles: PassShape::default(),
            prompt_tokens: 0,
            cut: config.chunk,
            arrivals: 0,
            ends: Vec::new(),
            samplers_new: false,
            stats: SchedulerStats::default(),
        }
    }

    /// Rows of a micro-batch at most.
    pub fn rows_max(config: SchedulerConfig) -> usize {
        config.chunk + config.running_max
    }

    /// Finds blocks by these keys, before anything is added.
    #[must_use]
    pub fn with_keys(self, keys: Keys) -> Self {
        Scheduler { keys, ..self }
    }

    /// Queues a sequence.
    pub fn add(&mut self, new: NewSequence) {
        let keys = match self.config.prefix_reuse {
            true => self.keys.of_prompt(&new.prompt, new.images.as_deref()),
            false => PromptKeys::default(),
        };
        self.add_hashed(new, &keys);
    }

    /// The same, with its prompt's keys, by which the samples of a request are all found.
    pub fn add_hashed(&mut self, new: NewSequence, keys: &PromptKeys) {
        assert!(!new.prompt.is_empty(), "a sequence without a prompt; this is a bug");
        assert!(
            BlockPool::blocks_for(new.tokens_max) <= self.pool.total(),
            "a sequence that can never be admitted; this is a bug"
        );
        self.check_images(&new);
        let rank = Rank::new(new.priority, self.arrivals);
        self.arrivals += 1;
        let slot = self.sequences.insert(new, rank);
        self.sequences[slot].keys = keys.0.to_vec();
        self.wait(slot);
    }

    /// Decides the next step; `None` if nothing can start now.
    pub fn plan(&mut self) -> Option<Step> {
        if self.steps.len() >= self.config.in_flight_max() {
            return None;
        }
        let this = InFlight { step: self.next_step, parts: Vec::new(), outputs: Vec::new(), live: 0 };
        let mut draft = Draft { batch: MicroBatch::default(), this, after: None };
        self.begin_prompt();
        self.plan_decode(&mut draft);
        self.plan_prompts(&mut draft);
        let Draft { mut batch, this, after } = draft;
        if batch.rows() == 0 {
            return None;
        }
        batch.ends = std::mem::take(&mut self.ends);
        if std::mem::take(&mut self.samplers_new) {
            self.start_again(&mut batch);
        }
        if self.shapes.len() == SHAPES {
            self.shapes.pop_front();
        }
        let shape = PassShape::of(&batch);
        if shape.rows == shape.outputs {
            self.singles = shape;
        }
        self.shapes.push_back(shape);
        let step = Step { step: self.next_step, after, batch: Arc::new(batch) };
        self.next_step += 1;
        self.steps.push_back(this);
        Some(step)
    }

    /// Records what came of a step. Returns the tokens of sequences that had not ended; the caller says with
    /// [`Scheduler::end`] which of them end here, before it plans again. Steps are applied in their order.
    pub fn apply(&mut self, step: u64, sampled: Vec<Sampled>) -> Vec<Sampled> {
        let done = self.steps.pop_front().filter(|done| done.step == step);
        let done = done.expect("a step that was not planned, or not the next one; this is a bug");
        assert!(sampled.len() == done.outputs.len(), "tokens without outputs; this is a bug");
        for &slot in &done.parts {
            self.sequences[slot].in_flight -= 1;
        }
        let mut wanted = sampled;
        let (mut slots, mut full) = (done.outputs.iter(), Vec::new());
        wanted.retain(|token| {
            let &slot = slots.next().expect("as many as outputs; this is a bug");
            assert!(self.sequences[slot].new.seq == token.seq, "a token of no sequence; this is a bug");
            self.note_token(slot, token.id, &mut full)
        });
        self.publish_full(&full);
        for &slot in &done.parts {
            self.settle(slot);
        }
        wanted
    }

    /// Ends a sequence, wherever it is. Its blocks come back at once, its seat when its last step in flight has been
    /// applied. A sequence that has ended before is left alone.
    pub fn end(&mut self, seq: SeqId) {
        let Some(slot) = self.sequences.find(seq) else { return };
        match self.sequences[slot].state {
            State::Ended => return,
            State::Waiting => {
                self.waiting.remove(self.sequences[slot].rank);
                self.prompt_tokens -= self.sequences[slot].known();
            }
            State::Prompt | State::Decoding => self.stop(slot),
            State::Returning => _ = self.returning.remove(&self.sequences[slot].rank),
        }
        self.sequences[slot].state = State::Ended;
        self.settle(slot);
    }

    /// Learns how long a stage took for a step. It may come late or never.
    pub fn observe(&mut self, seen: Observation) {
        let first = self.next_step - self.shapes.len() as u64;
        let shape = seen.step.checked_sub(first).and_then(|i| self.shapes.get(i as usize));
        if let Some(shape) = shape {
            self.cost.fit(seen.stage, shape, seen.busy);
        }
    }

    /// What stages' times are predicted by.
    pub fn cost_model(&self) -> &CostModel {
        &self.cost
    }

    /// Begins with what is known from before.
    pub fn set_cost_model(&mut self, cost: CostModel) {
        self.cost = cost;
    }

    /// Sequences that wait for blocks.
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Sequences with a seat: those that hold blocks, and others as long as steps of theirs are in flight.
    pub fn running(&self) -> usize {
        self.config.running_max - self.seats.len()
    }

    /// Steps, and passes of images, that have been planned and not applied.
    pub fn in_flight(&self) -> usize {
        self.steps.len() + self.images.as_ref().map_or(0, Images::in_flight)
    }

    /// What it has and has done.
    pub fn stats(&self) -> SchedulerStats {
        SchedulerStats {
            waiting: self.waiting(),
            running: self.running(),
            kv_blocks_total: self.pool.total(),
            kv_blocks_free: self.pool.free(),
            kv_blocks_cached: self.pool.cached(),
            in_flight: self.steps.len(),
            images: self.images.as_ref().map(Images::stats),
            ..self.stats
        }
    }

    /// Fills a micro-batch with single steps.
    fn plan_decode(&mut self, draft: &mut Draft) {
        // Never all of them in one step, or the other slots would travel empty.
        let share = self.decoding.div_ceil(self.config.slots);
        draft.reserve(share);
        let distance = self.distance();
        while draft.batch.rows() < share
            && let Some(slot) = self.sequences.first_ready()
            && self.is_due(slot, distance)
        {
            match self.grow(slot) {
                Growth::There => (),
                Growth::Preempted => continue,
                Growth::Later => break,
            }
            self.sequences.unready(slot);
            let sequence = &self.sequences[slot];
            let token = sequence.token(sequence.planned).unwrap_or_else(|| {
                assert!(sequence.unknown == 1, "a ready sequence has no token; this is a bug");
                draft.after = draft.after.max(Some(sequence.last));
                ON_DEVICE
            });
            draft.batch.ids.push(token);
            self.push_rows(slot, 1, draft);
            self.want_token(slot, draft);
        }
    }

    /// How many steps a sequence's next one should be behind its latest: as many as travel at the same time. A nearer
    /// one would hold up those behind it while it waits for its token.
    fn distance(&self) -> u64 {
        // Prompts need no token, so they fill every slot.
        if self.prompt.is_some() {
            return self.config.slots as u64;
        }
        self.steps.iter().filter(|step| step.live > 0).count().min(self.config.slots) as u64
    }

    /// Whether a ready sequence's next step may be planned now.
    fn is_due(&self, slot: u32, distance: u64) -> bool {
        let sequence = &self.sequences[slot];
        let known = sequence.planned < sequence.known();
        !sequence.is_in(self.next_step) && (known || self.next_step - sequence.last >= distance)
    }

    /// Makes the draft's last ids the next rows of a sequence.
    fn push_rows(&mut self, slot: u32, len: usize, draft: &mut Draft) {
        self.forget_live(slot);
        self.push_turns(slot, len, &mut draft.batch);
        let sequence = &mut self.sequences[slot];
        let Draft { batch, this, .. } = draft;
        let (cached, row) = (sequence.planned, batch.positions.len());
        batch.seqs.push(SeqRows {
            seq: sequence.new.seq,
            seat: sequence.seat(),
            row,
            len,
            cached,
            blocks: sequence.blocks.clone(),
        });
        batch.positions.extend((cached..cached + len).map(|place| place as u32));
        this.parts.push(slot);
        sequence.planned += len;
        sequence.last = this.step;
        sequence.in_flight += 1;
        assert!(sequence.planned <= sequence.new.tokens_max, "a sequence past its end; this is a bug");
    }

    /// Asks for a token from the micro-batch's last row.
    fn want_token(&mut self, slot: u32, draft: &mut Draft) {
        let sequence = &mut self.sequences[slot];
        let (row, seq, seat) = (draft.batch.rows() - 1, sequence.new.seq, sequence.seat());
        draft.batch.outputs.push(OutputRow { row, seq, seat });
        draft.this.outputs.push(slot);
        sequence.unknown += 1;
        sequence.live = sequence.planned < sequence.new.tokens_max;
        draft.this.live += usize::from(sequence.live);
        if sequence.may_be_planned(self.config.ahead) {
            self.sequences.make_ready(slot);
        }
    }

    /// Its latest step is not live for it any more.
    fn forget_live(&mut self, slot: u32) {
        let sequence = &mut self.sequences[slot];
        if !std::mem::take(&mut sequence.live) {
            return;
        }
        let first = self.steps.front().map_or(self.next_step, |step| step.step);
        // A step that has been applied counts no more.
        if let Some(place) = sequence.last.checked_sub(first) {
            self.steps[place as usize].live -= 1;
        }
    }

    /// Takes note of a token, and in `full` of a sequence that is to publish blocks; whether anybody wants the token.
    fn note_token(&mut self, slot: u32, id: u32, full: &mut Vec<u32>) -> bool {
        let ahead = self.config.ahead;
        let sequence = &mut self.sequences[slot];
        if sequence.state == State::Ended {
            return false;
        }
        let before = sequence.may_be_planned(ahead);
        sequence.unknown -= 1;
        sequence.answer.push(id);
        let now = sequence.may_be_planned(ahead);
        if sequence.state == State::Decoding {
            if sequence.known() % KV_BLOCK == sequence.turn() {
                full.push(slot);
            }
            if now && !before {
                self.sequences.make_ready(slot);
            }
        }
        true
    }

    /// Takes a seat back once no step touches it.
    fn settle(&mut self, slot: u32) {
        let sequence = &mut self.sequences[slot];
        let leaves = matches!(sequence.state, State::Ended | State::Returning);
        if !leaves || sequence.in_flight > 0 {
            return;
        }
        self.seats.extend(sequence.seat.take());
        if std::mem::take(&mut sequence.started) {
            self.ends.push(sequence.new.seq);
        }
        match sequence.state {
            State::Ended => self.sequences.remove(slot),
            _ => {
                self.returning.remove(&sequence.rank);
                self.wait(slot);
            }
        }
    }
}

impl Draft {
    fn reserve(&mut self, rows: usize) {
        let MicroBatch { ids, positions, seqs, outputs, .. } = &mut self.batch;
        for numbers in [ids, positions, &mut self.this.parts, &mut self.this.outputs] {
            numbers.reserve(rows);
        }
        seqs.reserve(rows);
        outputs.reserve(rows);
    }
}

//! Sequences from their arrival to their end, in a table whose places are used again.

use std::{
    collections::HashMap,
    ops::{Index, IndexMut},
    sync::Arc,
};

use super::{
    BlockPool, PromptImages,
    prefix::{BlockKey, Keys},
    queue::Rank,
};
use crate::{
    batch::{KV_BLOCK, SeqId, SeqStart, blocks::BlockList},
    request::SamplingParams,
};

const NONE: u32 = u32::MAX;

/// A sequence to be run.
#[derive(Debug, Clone)]
pub struct NewSequence {
    /// Its id, never used before.
    pub seq: SeqId,
    /// Its prompt; not empty.
    pub prompt: Arc<[u32]>,
    /// Its images.
    pub images: Option<Arc<PromptImages>>,
    /// Prompt and answer together, at most, without the answer's last token, which is never fed.
    pub tokens_max: usize,
    /// For the sampler.
    pub sampling: Arc<SamplingParams>,
    /// For the sampler.
    pub seed: u64,
    /// Higher ones come first; within one the order of arrival holds.
    pub priority: i32,
}

/// Where a sequence is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    /// Without blocks.
    Waiting,
    /// With blocks, and with tokens left to plan before the next one can be chosen.
    Prompt,
    /// With blocks; each step brings a token.
    Decoding,
    /// Without blocks again, until its steps in flight have brought their tokens.
    Returning,
    /// Nothing more is to be planned; there may be steps in flight.
    Ended,
}

/// A sequence between `add` and its end.
#[derive(Debug)]
pub(super) struct Sequence {
    pub(super) new: NewSequence,
    pub(super) rank: Rank,
    pub(super) state: State,
    /// Tokens that have been applied.
    pub(super) answer: Vec<u32>,
    /// While its state is `Prompt`: how many tokens are to be planned.
    pub(super) goal: usize,
    /// Tokens that are in the KV cache once all steps in flight are done.
    pub(super) planned: usize,
    /// Counts up with each prompt that begins.
    pub(super) begun: u64,
    /// The latest step that holds rows of it.
    pub(super) last: u64,
    /// Steps planned and not applied.
    pub(super) in_flight: usize,
    /// Those of them that bring a token.
    pub(super) unknown: usize,
    /// Whether it is one of those that its latest step is live for.
    pub(super) live: bool,
    /// Its line in the devices' tables, from admission to its last step's end.
    pub(super) seat: Option<u32>,
    /// Whether the samplers know it.
    pub(super) started: bool,
    /// KV blocks that it holds, in the order of their tokens.
    pub(super) blocks: BlockList,
    /// Keys of the blocks that were full when it began to wait.
    pub(super) keys: Vec<BlockKey>,
    /// How many of its blocks have been published, or found.
    pub(super) published: usize,
    /// The last one's key.
    pub(super) last_key: Option<BlockKey>,
    /// Blocks that could be found when it was looked at last.
    pub(super) findable: usize,
    /// How many sequences were decoding when it began to wait.
    pub(super) decoding_before: usize,
    /// How often it has lost its blocks to a higher priority.
    pub(super) yielded: u32,
    /// Neighbours among the ready ones; `None` if it is not one of them.
    ready: Option<(u32, u32)>,
}

impl Sequence {
    /// Prompt and answer as far as the host knows it.
    pub(super) fn known(&self) -> usize {
        self.new.prompt.len() + self.answer.len()
    }

    /// The token at a place, if the host knows it.
    pub(super) fn token(&self, place: usize) -> Option<u32> {
        let prompt = &self.new.prompt;
        prompt.get(place).or_else(|| self.answer.get(place - prompt.len())).copied()
    }

    /// Known tokens of some places.
    pub(super) fn tokens(&self, from: usize, len: usize) -> impl Iterator<Item = u32> {
        let (prompt, answer) = (&self.new.prompt[..], &self.answer[..]);
        let split = |place: usize| (place.min(prompt.len()), place.saturating_sub(prompt.len()));
        let ((p0, a0), (p1, a1)) = (split(from), split(from + len));
        prompt[p0..p1].iter().chain(&answer[a0..a1]).copied()
    }

    /// What a full block of known tokens is found by, after the one before it.
    pub(super) fn block_key(&self, keys: &Keys, before: Option<BlockKey>, block: usize) -> BlockKey {
        let mut tokens = [0; KV_BLOCK];
        for (to, token) in tokens.iter_mut().zip(self.tokens(block * KV_BLOCK, KV_BLOCK)) {
            *to = token;
        }
        let images = self.new.images.as_ref().map_or_else(Vec::new, |images| images.block_bytes(block));
        keys.after(before, &tokens, &images)
    }

    /// Past the prompt: whether a single step may be planned, now or when it is due.
    pub(super) fn may_be_planned(&self, ahead: bool) -> bool {
        self.unknown == 0 || (ahead && self.unknown == 1 && self.planned < self.new.tokens_max)
    }

    /// Whether its answer may need more blocks than it holds.
    pub(super) fn may_grow(&self) -> bool {
        self.blocks.len() < BlockPool::blocks_for(self.new.tokens_max)
    }

    /// Whether a step has rows of it.
    pub(super) fn is_in(&self, step: u64) -> bool {
        self.in_flight > 0 && self.last == step
    }

    /// When it does what each sequence does once for each block: others do it at other steps, so that none takes long.
    pub(super) fn turn(&self) -> usize {
        self.seat() as usize % KV_BLOCK
    }

    pub(super) fn seat(&self) -> u32 {
        self.seat.expect("a planned sequence has no seat; this is a bug")
    }

    /// What the samplers have to know.
    pub(super) fn start(&self) -> SeqStart {
        SeqStart {
            seq: self.new.seq,
            seat: self.seat(),
            sampling: self.new.sampling.clone(),
            seed: self.new.seed,
            prompt: self.new.prompt.clone(),
            generated: self.answer.as_slice().into(),
        }
    }
}

/// All sequences. Those that may be planned next are in a list, the longest waiting first.
#[derive(Debug)]
pub(super) struct Sequences {
    table: Vec<Option<Sequence>>,
    free: Vec<u32>,
    by_id: HashMap<SeqId, u32>,
    first: u32,
    last: u32,
}

impl Sequences {
    pub(super) fn new() -> Self {
        Sequences { table: Vec::new(), free: Vec::new(), by_id: HashMap::new(), first: NONE, last: NONE }
    }

    /// Takes a sequence in, and says where it is.
    pub(super) fn insert(&mut self, new: NewSequence, rank: Rank) -> u32 {
        let slot = self.free.pop().unwrap_or_else(|| {
            self.table.push(None);
            (self.table.len() - 1) as u32
        });
        let before = self.by_id.insert(new.seq, slot);
        assert!(before.is_none(), "a sequence id used twice; this is a bug");
        self.table[slot as usize] = Some(Sequence {
            new,
            rank,
            state: State::Waiting,
            answer: Vec::new(),
            goal: 0,
            planned: 0,
            begun: 0,
            last: 0,
            in_flight: 0,
            unknown: 0,
            live: false,
            seat: None,
            started: false,
            blocks: BlockList::default(),
            keys: Vec::new(),
            published: 0,
            last_key: None,
            findable: 0,
            decoding_before: 0,
            yielded: 0,
            ready: None,
        });
        slot
    }

    /// In no order of meaning.
    pub(super) fn iter(&self) -> impl Iterator<Item = &Sequence> {
        self.table.iter().flatten()
    }

    pub(super) fn find(&self, seq: SeqId) -> Option<u32> {
        self.by_id.get(&seq).copied()
    }

    pub(super) fn remove(&mut self, slot: u32) {
        let gone = self.table[slot as usize].take().expect("a sequence removed twice; this is a bug");
        assert!(gone.ready.is_none(), "a sequence that is gone is to be planned; this is a bug");
        self.by_id.remove(&gone.new.seq);
        self.free.push(slot);
    }

    /// Of those that may be planned, the one whose latest step is the oldest.
    pub(super) fn first_ready(&self) -> Option<u32> {
        (self.first != NONE).then_some(self.first)
    }

    /// Puts it behind those whose latest step is as old or older. As a rule it is the last.
    pub(super) fn make_ready(&mut self, slot: u32) {
        let mut before = self.last;
        while before != NONE && self[before].last > self[slot].last {
            before = self.links(before).0;
        }
        let after = if before == NONE { self.first } else { self.links(before).1 };
        let was = self[slot].ready.replace((before, after));
        assert!(was.is_none(), "a sequence ready twice; this is a bug");
        self.join(before, slot);
        self.join(slot, after);
    }

    /// Takes it off the list, if it is there.
    pub(super) fn unready(&mut self, slot: u32) {
        if let Some((before, after)) = self[slot].ready.take() {
            self.join(before, after);
        }
    }

    fn links(&self, slot: u32) -> (u32, u32) {
        self[slot].ready.expect("a sequence that is not ready has neighbours; this is a bug")
    }

    fn join(&mut self, before: u32, after: u32) {
        match before {
            NONE => self.first = after,
            before => self[before].ready.iter_mut().for_each(|links| links.1 = after),
        }
        match after {
            NONE => self.last = before,
            after => self[after].ready.iter_mut().for_each(|links| links.0 = before),
        }
    }
}

impl Index<u32> for Sequences {
    type Output = Sequence;

    fn index(&self, slot: u32) -> &Sequence {
        self.table[slot as usize].as_ref().expect("a sequence is gone; this is a bug")
    }
}

impl IndexMut<u32> for Sequences {
    fn index_mut(&mut self, slot: u32) -> &mut Sequence {
        self.table[slot as usize].as_mut().expect("a sequence is gone; this is a bug")
    }
}

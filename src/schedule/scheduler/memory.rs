//! Who gets KV blocks, keeps them, and loses them.

use super::Scheduler;
use crate::{
    batch::{KV_BLOCK, blocks::BlockList},
    schedule::{BlockPool, queue::Rank, sequence::State},
};

/// A sequence that has lost its blocks to higher priorities so often comes before them.
const YIELDED_MAX: u32 = 4;

/// Whether there is a block for a sequence's next token.
pub(super) enum Growth {
    There,
    /// Not in this step: those that would have to give theirs are in it.
    Later,
    /// The sequence itself was the last in order, and has given its blocks back.
    Preempted,
}

/// Blocks that a prompt can begin with.
pub(super) enum Prefix {
    /// So many; the pool watches over them.
    Found(usize),
    /// The next one is being written in this very step, so a later step can read it.
    Coming,
}

impl Scheduler {
    /// Sees to it that a decoding sequence has a block for its next token. Those that are last in the order give theirs.
    pub(super) fn grow(&mut self, slot: u32) -> Growth {
        let sequence = &self.sequences[slot];
        let held = sequence.blocks.len() * KV_BLOCK;
        if sequence.planned < held {
            // Early, each seat at its own time: sequences in step would all need one in the same step.
            let early = held - sequence.planned == 1 + sequence.turn();
            let plenty = self.pool.available() > self.running.len() + 1;
            if early && plenty && held < sequence.new.tokens_max {
                self.take_one(slot);
            }
            return Growth::There;
        }
        let rank = sequence.rank;
        loop {
            if self.take_one(slot) {
                return Growth::There;
            }
            let victim = self.last_running().expect("blocks that nobody holds are gone; this is a bug");
            if victim != slot {
                self.preempt(victim, rank);
            } else if self.running.last_key_value().is_some_and(|(&last, _)| last > rank) {
                return Growth::Later;
            } else {
                self.preempt(slot, rank);
                return Growth::Preempted;
            }
        }
    }

    /// A block more for a sequence whose answer may need it, if there is any.
    fn take_one(&mut self, slot: u32) -> bool {
        let Some(block) = self.pool.take() else { return false };
        let sequence = &mut self.sequences[slot];
        sequence.blocks.push(block);
        self.growing -= usize::from(!sequence.may_grow());
        true
    }

    /// The last in the order of those that hold blocks and are not in this step, whose rows need them.
    fn last_running(&self) -> Option<u32> {
        let mut slots = self.running.values().rev().copied();
        slots.find(|&slot| !self.sequences[slot].is_in(self.next_step))
    }

    /// Takes a sequence's blocks. It waits again, and is computed again, once its steps in flight have brought their tokens.
    fn preempt(&mut self, slot: u32, by: Rank) {
        self.stop(slot);
        self.stats.preemptions += 1;
        let sequence = &mut self.sequences[slot];
        sequence.state = State::Returning;
        if by.outranks(sequence.rank) {
            sequence.yielded += 1;
            if sequence.yielded >= YIELDED_MAX {
                sequence.rank = sequence.rank.raised();
            }
        }
        self.returning.insert(sequence.rank);
        self.settle(slot);
    }

    /// Nothing more is planned for a running sequence; its blocks are anybody's.
    pub(super) fn stop(&mut self, slot: u32) {
        self.forget_live(slot);
        self.sequences.unready(slot);
        self.publish_full(&[slot]);
        let sequence = &mut self.sequences[slot];
        match sequence.state {
            State::Prompt => {
                self.prompt.take_if(|prompt| *prompt == slot);
                self.held.remove(&sequence.begun);
                self.prompt_tokens -= sequence.goal - sequence.planned;
            }
            State::Decoding => self.decoding -= 1,
            _ => unreachable!("a sequence that does not run is stopped; this is a bug"),
        }
        self.running.remove(&sequence.rank);
        self.growing -= usize::from(sequence.may_grow());
        // The tail first: a chain of cached blocks is of use as far as it is whole from its beginning.
        let blocks = std::mem::take(&mut sequence.blocks);
        blocks.iter().rev().for_each(|block| self.pool.give_back(block));
    }

    /// Queues a sequence without blocks.
    pub(super) fn wait(&mut self, slot: u32) {
        let sequence = &mut self.sequences[slot];
        assert!(sequence.unknown == 0, "a sequence waits whose tokens are not known; this is a bug");
        let known = sequence.known();
        if self.config.prefix_reuse {
            for block in sequence.keys.len()..known / KV_BLOCK {
                let key = sequence.block_key(&self.keys, sequence.keys.last().copied(), block);
                sequence.keys.push(key);
            }
        }
        sequence.state = State::Waiting;
        (sequence.planned, sequence.published, sequence.findable) = (0, 0, 0);
        sequence.decoding_before = self.decoding;
        self.waiting.insert(sequence.rank, slot);
        self.prompt_tokens += known;
        self.cut_anew();
    }

    /// The blocks that a waiting sequence can begin with. Its last token is computed in any case, for its logits.
    pub(super) fn find_prefix(&mut self, slot: u32) -> Prefix {
        let step = self.next_step;
        let sequence = &mut self.sequences[slot];
        let most = ((sequence.known() - 1) / KV_BLOCK).min(sequence.keys.len());
        let keys = &sequence.keys[..most];
        // From where it ended last time: a prompt may wait for many steps while another one computes its prefix.
        for (i, &key) in keys.iter().enumerate().skip(sequence.findable) {
            match self.pool.find(key) {
                Some(found) if found.written == step => {
                    sequence.findable = i;
                    return Prefix::Coming;
                }
                Some(_) => (),
                None => break,
            }
        }
        // Those that were there at an earlier step are not looked for again.
        self.pool.watch(sequence.new.seq);
        let next = |pool: &BlockPool| pool.find(*keys.get(pool.watched().0)?);
        while let Some(found) = next(&self.pool).filter(|found| found.written < step) {
            self.pool.watch_more(found.id);
        }
        sequence.findable = self.pool.watched().0;
        Prefix::Found(sequence.findable)
    }

    /// Gives a waiting sequence blocks for all its known tokens and the next one, those that it can begin with among them; false if
    /// there are too few. Those of lower priority give theirs. Others that may need more keep a block each to grow into.
    pub(super) fn take_blocks(&mut self, slot: u32) -> bool {
        let sequence = &self.sequences[slot];
        let rank = sequence.rank;
        let all = BlockPool::blocks_for((sequence.known() + 1).min(sequence.new.tokens_max));
        loop {
            let (found, woken) = self.pool.watched();
            if all - found + woken + self.growing <= self.pool.available() {
                break;
            }
            let victim = self.last_running().filter(|&victim| rank.outranks(self.sequences[victim].rank));
            let Some(victim) = victim else { return false };
            self.preempt(victim, rank);
        }
        let prefix = self.pool.unwatch();
        prefix.iter().for_each(|&block| self.pool.share(block));
        let new = all - prefix.len();
        let mut take = || self.pool.take().expect("blocks were counted; this is a bug");
        let blocks = prefix.iter().copied().chain((0..new).map(|_| take()));
        let sequence = &mut self.sequences[slot];
        sequence.blocks = BlockList::new(blocks, BlockPool::blocks_for(sequence.new.tokens_max));
        sequence.published = prefix.len();
        sequence.last_key = prefix.len().checked_sub(1).map(|last| sequence.keys[last]);
        sequence.planned = prefix.len() * KV_BLOCK;
        self.growing += usize::from(sequence.may_grow());
        self.running.insert(rank, slot);
        true
    }

    /// Lets blocks of sequences be found that are full of known tokens, by steps behind the latest one that has rows of theirs.
    ///
    /// All keys are made before the first is put into the pool's chains. What these touch lies far apart in memory, and a core waits for
    /// several such places at once if it has little else to do between them.
    pub(super) fn publish_full(&mut self, slots: &[u32]) {
        if !self.config.prefix_reuse {
            return;
        }
        let mut found = Vec::with_capacity(slots.len());
        for &slot in slots {
            let sequence = &mut self.sequences[slot];
            let full = sequence.planned.min(sequence.known()) / KV_BLOCK;
            for block in sequence.published..full {
                let known = sequence.keys.get(block).copied();
                let key = known.unwrap_or_else(|| sequence.block_key(&self.keys, sequence.last_key, block));
                sequence.last_key = Some(key);
                found.push((sequence.blocks.at(block), key, sequence.last));
            }
            sequence.published = sequence.published.max(full);
        }
        for (id, key, written) in found {
            self.pool.publish(id, key, written);
        }
    }
}

//! Who holds which KV block: ids, holders, and what can be found again; no memory.

use std::ops::Range;

use super::prefix::BlockKey;
use crate::batch::{KV_BLOCK, SeqId};

const NONE: u32 = u32::MAX;

/// All KV blocks of the pipeline. An id means the same block on every stage.
///
/// A block that nobody holds is free, or it is cached: it has been published under a key and can be found by it until
/// its room is needed. Of the cached ones those go first that were given back first, so a chain goes from its tail.
#[derive(Debug)]
pub struct BlockPool {
    blocks: Vec<Block>,
    free: Vec<u32>,
    /// What is found by keys: the first block of each chain. There are as many chains as blocks, and a block's is what its key says.
    ///
    /// A hash map would not do: one that things are always taken from and put into is made anew at times, which takes milliseconds
    /// while everybody waits. Here nothing is ever allocated.
    chains: Vec<u32>,
    links: Vec<Link>,
    /// Ends of the list of cached blocks, by when they were given back.
    oldest: u32,
    newest: u32,
    cached: usize,
    watch: Watch,
}

/// Blocks that a sequence without blocks can begin with, in their order. What happens to them meanwhile is taken note of: to look for
/// them at each step, while it waits for room, would take as long as its prompt is.
#[derive(Debug, Default)]
struct Watch {
    seq: Option<SeqId>,
    blocks: Vec<u32>,
    /// Those of them that nobody holds.
    cached: usize,
}

#[derive(Debug, Clone)]
struct Block {
    holders: u32,
    key: Option<BlockKey>,
    /// If it has a key: no step after this one writes to it.
    written: u64,
    /// Its place among those that are watched.
    watched: u32,
    /// Neighbours in the list of cached blocks.
    older: u32,
    newer: u32,
}

/// What leads on from a published block: small, so that those of a chain are looked at quickly.
#[derive(Debug, Clone, Copy)]
struct Link {
    /// The next one of its chain.
    next: u32,
    /// A part of its key.
    tag: u32,
}

/// A published block.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Found {
    pub(super) id: u32,
    /// Steps after this one can read it.
    pub(super) written: u64,
}

impl BlockPool {
    /// A pool of `blocks` free blocks.
    pub fn new(blocks: usize) -> Self {
        let count = u32::try_from(blocks).ok().filter(|&count| count < NONE);
        let count = count.expect("more KV blocks than ids; this is a bug");
        let block = Block { holders: 0, key: None, written: 0, watched: NONE, older: NONE, newer: NONE };
        BlockPool {
            blocks: vec![block; blocks],
            free: (0..count).rev().collect(),
            chains: vec![NONE; blocks],
            links: vec![Link { next: NONE, tag: 0 }; blocks],
            oldest: NONE,
            newest: NONE,
            cached: 0,
            watch: Watch::default(),
        }
    }

    /// How many blocks hold this many tokens.
    pub fn blocks_for(tokens: usize) -> usize {
        tokens.div_ceil(KV_BLOCK)
    }

    /// Blocks that nobody holds and nobody can find.
    pub fn free(&self) -> usize {
        self.free.len()
    }

    /// Blocks that nobody holds and that can be found by their tokens.
    pub fn cached(&self) -> usize {
        self.cached
    }

    /// All blocks.
    pub fn total(&self) -> usize {
        self.blocks.len()
    }

    /// Runs of blocks that somebody holds or can find, and of those between them where these are fewer than `gap`.
    pub(super) fn in_use(&self, gap: usize) -> Vec<Range<usize>> {
        let mut runs: Vec<Range<usize>> = Vec::new();
        let used = |block: &Block| block.holders > 0 || block.key.is_some();
        for id in (0..self.blocks.len()).filter(|&id| used(&self.blocks[id])) {
            match runs.last_mut() {
                Some(run) if id - run.end < gap.max(1) => run.end = id + 1,
                _ => runs.push(id..id + 1),
            }
        }
        runs
    }

    /// Blocks that can be taken.
    pub(super) fn available(&self) -> usize {
        self.free.len() + self.cached
    }

    /// A block for one holder, who writes to it.
    pub(super) fn take(&mut self) -> Option<u32> {
        let id = match self.free.pop() {
            Some(id) => id,
            None if self.oldest == NONE => return None,
            None => {
                let id = self.oldest;
                self.watch_less(self.blocks[id as usize].watched);
                self.uncache(id);
                self.unpublish(id);
                id
            }
        };
        let block = &mut self.blocks[id as usize];
        assert!(block.holders == 0 && block.key.is_none(), "block {id} taken twice; this is a bug");
        block.holders = 1;
        Some(id)
    }

    /// One more holder of a published block, who reads it.
    pub(super) fn share(&mut self, id: u32) {
        if self.blocks[id as usize].holders == 0 {
            self.uncache(id);
        }
        let block = &mut self.blocks[id as usize];
        assert!(block.key.is_some(), "block {id} shared before it is full; this is a bug");
        block.holders += 1;
    }

    /// One holder less.
    pub(super) fn give_back(&mut self, id: u32) {
        let newest = self.newest;
        let block = &mut self.blocks[id as usize];
        block.holders = block.holders.checked_sub(1).expect("a block given back twice; this is a bug");
        if block.holders > 0 {
            return;
        }
        if block.key.is_none() {
            return self.free.push(id);
        }
        (block.older, block.newer) = (newest, NONE);
        self.watch.cached += usize::from(block.watched != NONE);
        match newest {
            NONE => self.oldest = id,
            newest => self.blocks[newest as usize].newer = id,
        }
        self.newest = id;
        self.cached += 1;
    }

    /// Lets a full block be found. Where its tokens can be found already, they stay where they are.
    pub(super) fn publish(&mut self, id: u32, key: BlockKey, written: u64) {
        let block = &mut self.blocks[id as usize];
        assert!(block.holders > 0 && block.key.is_none(), "block {id} published twice; this is a bug");
        if self.find(key).is_some() {
            return;
        }
        let chain = self.chain_of(key);
        let first = &mut self.chains[chain];
        self.links[id as usize] = Link { next: *first, tag: key.tag() };
        *first = id;
        let block = &mut self.blocks[id as usize];
        (block.key, block.written) = (Some(key), written);
    }

    fn chain_of(&self, key: BlockKey) -> usize {
        key.of(self.chains.len())
    }

    /// Nobody finds it any more.
    fn unpublish(&mut self, id: u32) {
        let key = self.blocks[id as usize].key.take().expect("a cached block without a key; this is a bug");
        let next = self.links[id as usize].next;
        let chain = self.chain_of(key);
        let first = &mut self.chains[chain];
        if *first == id {
            *first = next;
            return;
        }
        let mut before = *first;
        while self.links[before as usize].next != id {
            before = self.links[before as usize].next;
        }
        self.links[before as usize].next = next;
    }

    /// The block with these tokens after those.
    pub(super) fn find(&self, key: BlockKey) -> Option<Found> {
        let mut id = *self.chains.get(self.chain_of(key))?;
        while id != NONE {
            let Link { next, tag } = self.links[id as usize];
            if tag == key.tag() && self.blocks[id as usize].key == Some(key) {
                return Some(Found { id, written: self.blocks[id as usize].written });
            }
            id = next;
        }
        None
    }

    /// Watches over what a sequence can begin with, where it does not yet: over nothing at first.
    pub(super) fn watch(&mut self, seq: SeqId) {
        if self.watch.seq != Some(seq) {
            self.unwatch();
            self.watch.seq = Some(seq);
        }
    }

    /// The next one that it can begin with: a published block.
    pub(super) fn watch_more(&mut self, id: u32) {
        let block = &mut self.blocks[id as usize];
        assert!(block.key.is_some() && block.watched == NONE, "block {id} watched twice; this is a bug");
        block.watched = self.watch.blocks.len() as u32;
        self.watch.cached += usize::from(block.holders == 0);
        self.watch.blocks.push(id);
    }

    /// How many are watched, and how many of them nobody holds.
    pub(super) fn watched(&self) -> (usize, usize) {
        (self.watch.blocks.len(), self.watch.cached)
    }

    /// Those that were watched. None is any more.
    pub(super) fn unwatch(&mut self) -> Vec<u32> {
        self.watch.blocks.iter().for_each(|&id| self.blocks[id as usize].watched = NONE);
        std::mem::take(&mut self.watch).blocks
    }

    /// One of them cannot be found any more, and what comes after it is of no use.
    fn watch_less(&mut self, place: u32) {
        if place == NONE {
            return;
        }
        for id in self.watch.blocks.drain(place as usize..) {
            let block = &mut self.blocks[id as usize];
            block.watched = NONE;
            self.watch.cached -= usize::from(block.holders == 0);
        }
    }

    /// Takes a block out of the list of cached ones.
    fn uncache(&mut self, id: u32) {
        let Block { older, newer, watched, .. } = self.blocks[id as usize];
        self.watch.cached -= usize::from(watched != NONE);
        match older {
            NONE => self.oldest = newer,
            older => self.blocks[older as usize].newer = newer,
        }
        match newer {
            NONE => self.newest = older,
            newer => self.blocks[newer as usize].older = older,
        }
        self.cached -= 1;
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::{super::prefix::Keys, *};

    fn mix(x: u64) -> u64 {
        let x = (x ^ x >> 31).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        (x ^ x >> 29).wrapping_mul(0xbf58_476d_1ce4_e5b9) >> 20
    }

    #[test]
    fn blocks_are_distinct_and_come_back() {
        let mut pool = BlockPool::new(5);
        let mut taken: Vec<u32> = std::iter::from_fn(|| pool.take()).collect();
        assert_eq!((pool.free(), pool.available(), pool.take()), (0, 0, None));
        taken.iter().for_each(|&id| pool.give_back(id));
        assert_eq!((pool.free(), pool.cached()), (5, 0));
        taken.sort_unstable();
        assert_eq!(taken, [0, 1, 2, 3, 4]);
    }

    #[test]
    fn a_published_block_is_found_until_its_room_is_needed_and_tails_go_first() {
        let (mut pool, keys) = (BlockPool::new(3), Keys::default());
        let first = keys.after(None, &[1; KV_BLOCK], &[]);
        let second = keys.after(Some(first), &[2; KV_BLOCK], &[]);
        let chain = [pool.take().unwrap(), pool.take().unwrap()];
        pool.publish(chain[0], first, 7);
        pool.publish(chain[1], second, 8);
        pool.share(chain[0]);
        chain.iter().rev().for_each(|&id| pool.give_back(id));
        assert_eq!((pool.free(), pool.cached()), (1, 1), "one of them has another holder");
        assert_eq!(pool.find(first), Some(Found { id: chain[0], written: 7 }));
        pool.give_back(chain[0]);
        assert_eq!(pool.find(second), Some(Found { id: chain[1], written: 8 }));
        let other = pool.take().unwrap();
        assert!(!chain.contains(&other), "free ones first");
        assert_eq!(pool.take(), Some(chain[1]));
        assert_eq!((pool.find(first).is_some(), pool.find(second)), (true, None));
        // The same tokens in another block are not published again.
        pool.publish(other, first, 9);
        pool.give_back(other);
        assert_eq!((pool.free(), pool.cached()), (1, 1));
        pool.share(chain[0]);
        assert_eq!((pool.free(), pool.cached()), (1, 0));
    }

    /// However often blocks go from one key to another, each is found by its own key alone.
    #[test]
    fn what_is_found_is_what_was_published_and_has_not_gone() {
        let keys = Keys::default();
        let all = keys.of_prompt(&(0..400 * KV_BLOCK as u32).collect::<Vec<u32>>(), None).0;
        let mut pool = BlockPool::new(37);
        let (mut holding, mut published) = (Vec::new(), HashMap::new());
        let mut hits = 0;
        for step in 0..20_000u64 {
            let draw = mix(step);
            match draw % 3 {
                0 if !holding.is_empty() => {
                    pool.give_back(holding.swap_remove((draw >> 8) as usize % holding.len()));
                }
                _ => {
                    let Some(id) = pool.take() else { continue };
                    published.retain(|_, &mut (has, _)| has != id);
                    holding.push(id);
                    let key = all[(draw >> 32) as usize % all.len()];
                    pool.publish(id, key, step);
                    published.entry(key).or_insert((id, step));
                }
            }
            if step % 50 == 0 {
                for key in all.iter() {
                    let want = published.get(key).map(|&(id, written)| Found { id, written });
                    assert_eq!(pool.find(*key), want, "step {step}");
                }
                hits += published.len();
            }
        }
        assert!(hits > 400 * 20, "{hits}");
        assert_eq!((pool.chains.len(), pool.links.len()), (37, 37));
    }

    #[test]
    fn blocks_in_use_are_runs_with_what_lies_between_near_ones() {
        let mut pool = BlockPool::new(20);
        let all: Vec<u32> = std::iter::from_fn(|| pool.take()).collect();
        assert_eq!(all, (0..20).collect::<Vec<u32>>());
        let key = Keys::default().after(None, &[7; KV_BLOCK], &[]);
        pool.publish(17, key, 0);
        // One of the published ones is found, though nobody holds it.
        (0..20).filter(|id| ![2, 3, 5, 12].contains(id)).for_each(|id| pool.give_back(id));
        assert_eq!(pool.in_use(0), [2..4, 5..6, 12..13, 17..18]);
        assert_eq!(pool.in_use(2), [2..6, 12..13, 17..18]);
        assert_eq!(pool.in_use(5), [2..6, 12..18]);
        assert!(BlockPool::new(3).in_use(9).is_empty());
    }

    /// Whatever is taken, shared, given back and published, what is watched is what could be found anew.
    #[test]
    fn what_is_watched_is_what_can_be_found() {
        let keys = Keys::default();
        let chain = keys.of_prompt(&(0..12 * KV_BLOCK as u32).collect::<Vec<u32>>(), None).0;
        let mut seen = [0; 13];
        for seed in 0..300u64 {
            let mut draws = (0..).map(|i| mix(seed << 32 | i));
            let mut below = |n: usize| (draws.next().expect("endless") % n as u64) as usize;
            let mut pool = BlockPool::new(16);
            // Holders, each with blocks that stand for a beginning of the chain, and of which as many are published.
            let mut holders: Vec<(Vec<u32>, usize)> = Vec::new();
            for _ in 0..60 {
                match below(3) {
                    0 => {
                        let find = |key: &BlockKey| pool.find(*key).map(|found| found.id);
                        let mut blocks: Vec<u32> = chain.iter().map_while(find).take(below(13)).collect();
                        blocks.iter().for_each(|&id| pool.share(id));
                        let published = blocks.len();
                        let more = below(13 - published);
                        blocks.extend(std::iter::from_fn(|| pool.take()).take(more));
                        holders.push((blocks, published));
                    }
                    1 if !holders.is_empty() => {
                        let (blocks, _) = holders.swap_remove(below(holders.len()));
                        blocks.iter().rev().for_each(|&id| pool.give_back(id));
                    }
                    _ => {
                        for (blocks, published) in &mut holders {
                            let until = *published + below(blocks.len() - *published + 1);
                            (*published..until).for_each(|i| pool.publish(blocks[i], chain[i], 0));
                            *published = until;
                        }
                    }
                }
                let want: Vec<u32> = chain.iter().map_while(|&key| pool.find(key)).map(|f| f.id).collect();
                pool.watch(SeqId(7));
                while let Some(found) = chain.get(pool.watched().0).and_then(|&key| pool.find(key)) {
                    pool.watch_more(found.id);
                }
                let cached = want.iter().filter(|&&id| pool.blocks[id as usize].holders == 0).count();
                assert_eq!((&pool.watch.blocks, pool.watched()), (&want, (want.len(), cached)), "{seed}");
                seen[want.len()] += 1;
            }
            pool.watch(SeqId(8));
            assert!(pool.watched() == (0, 0) && pool.blocks.iter().all(|block| block.watched == NONE));
        }
        assert!(seen.iter().filter(|&&times| times > 100).count() > 8, "{seen:?}");
    }
}

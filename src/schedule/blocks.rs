//! Who holds which KV block: ids and leases, no memory.

use std::sync::{Arc, Mutex, MutexGuard};

use crate::batch::KV_BLOCK;

/// All KV blocks of the pipeline. An id means the same block on every stage.
#[derive(Debug, Clone)]
pub struct BlockPool {
    shared: Arc<Mutex<Pool>>,
}

#[derive(Debug)]
struct Pool {
    free: Vec<u32>,
    leased: Vec<bool>, // [blocks]
}

/// Blocks that one sequence holds. Dropping it gives them back.
#[derive(Debug)]
pub struct Lease {
    ids: Arc<[u32]>,
    pool: BlockPool,
}

impl BlockPool {
    /// A pool of `blocks` free blocks.
    pub fn new(blocks: usize) -> Self {
        let count = u32::try_from(blocks).expect("more KV blocks than ids; this is a bug");
        let pool = Pool { free: (0..count).rev().collect(), leased: vec![false; blocks] };
        BlockPool { shared: Arc::new(Mutex::new(pool)) }
    }

    /// How many blocks hold this many tokens.
    pub fn blocks_for(tokens: usize) -> usize {
        tokens.div_ceil(KV_BLOCK)
    }

    /// Leases blocks for this many tokens; `None` if too few are free.
    pub fn lease(&self, tokens: usize) -> Option<Lease> {
        let count = Self::blocks_for(tokens);
        let mut pool = self.pool();
        let rest = pool.free.len().checked_sub(count)?;
        let ids: Arc<[u32]> = pool.free.drain(rest..).rev().collect();
        for &id in ids.iter() {
            let taken = std::mem::replace(&mut pool.leased[id as usize], true);
            assert!(!taken, "block {id} leased twice; this is a bug");
        }
        Some(Lease { ids, pool: self.clone() })
    }

    /// Blocks that nobody holds.
    pub fn free(&self) -> usize {
        self.pool().free.len()
    }

    /// All blocks.
    pub fn total(&self) -> usize {
        self.pool().leased.len()
    }

    fn pool(&self) -> MutexGuard<'_, Pool> {
        // Every change under the lock is complete before anything in it can panic.
        self.shared.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

impl Lease {
    /// The blocks, in the order of the tokens they hold.
    pub fn ids(&self) -> &Arc<[u32]> {
        &self.ids
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let mut pool = self.pool.pool();
        for &id in self.ids.iter().rev() {
            let taken = std::mem::replace(&mut pool.leased[id as usize], false);
            debug_assert!(taken, "block {id} given back twice; this is a bug");
            pool.free.push(id);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lease_holds_distinct_blocks_until_it_is_dropped() {
        let pool = BlockPool::new(5);
        let a = pool.lease(KV_BLOCK + 1).unwrap();
        let b = pool.lease(3 * KV_BLOCK).unwrap();
        assert_eq!(a.ids().len(), 2);
        assert_eq!(pool.free(), 0);
        let mut all: Vec<u32> = a.ids().iter().chain(b.ids().iter()).copied().collect();
        all.sort_unstable();
        assert_eq!(all, [0, 1, 2, 3, 4]);
        assert!(pool.lease(1).is_none());
        drop(b);
        assert_eq!(pool.free(), 3);
        assert!(pool.lease(4 * KV_BLOCK).is_none(), "a lease is whole or not at all");
        assert_eq!(pool.free(), 3);
        drop(a);
        assert_eq!(pool.free(), pool.total());
    }
}

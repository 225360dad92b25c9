//! Who comes first: higher priorities, and within one the order of arrival.

use std::{
    cmp::Reverse,
    collections::BTreeMap,
    ops::Bound::{Excluded, Unbounded},
};

/// The priority of those that others have passed for long enough.
const TOP: i32 = i32::MAX;
/// After so many admissions of later ones the oldest waiting sequence comes first, whatever its priority.
const PASSED_MAX: u32 = 64;

/// A sequence's place in the order: lower ranks come first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Rank {
    priority: Reverse<i32>,
    arrival: u64,
}

impl Rank {
    pub(super) fn new(priority: i32, arrival: u64) -> Self {
        Rank { priority: Reverse(priority), arrival }
    }

    /// Whether its priority is higher, whoever came first.
    pub(super) fn outranks(self, other: Rank) -> bool {
        self.priority.0 > other.priority.0
    }

    /// The same arrival, before all priorities.
    pub(super) fn raised(self) -> Self {
        Rank { priority: Reverse(TOP), ..self }
    }
}

/// Sequences without blocks, by rank.
#[derive(Debug, Default)]
pub(super) struct Waiting {
    by_rank: BTreeMap<Rank, u32>,
    by_arrival: BTreeMap<u64, (Rank, u32)>,
    /// Admissions since the oldest was one of them.
    passed: u32,
}

impl Waiting {
    pub(super) fn len(&self) -> usize {
        self.by_rank.len()
    }

    pub(super) fn insert(&mut self, rank: Rank, slot: u32) {
        self.by_rank.insert(rank, slot);
        self.by_arrival.insert(rank.arrival, (rank, slot));
    }

    pub(super) fn remove(&mut self, rank: Rank) {
        self.by_rank.remove(&rank);
        self.by_arrival.remove(&rank.arrival);
    }

    /// The first one, or the first after another.
    pub(super) fn next(&self, after: Option<Rank>) -> Option<(Rank, u32)> {
        let from = after.map_or(Unbounded, Excluded);
        self.by_rank.range((from, Unbounded)).next().map(|(&rank, &slot)| (rank, slot))
    }

    /// Takes one out that gets its blocks. If an older one has been passed often enough, that one comes first from now on:
    /// it is returned with its new rank.
    pub(super) fn admit(&mut self, rank: Rank) -> Option<(Rank, u32)> {
        self.remove(rank);
        let (&oldest, &(old, slot)) = self.by_arrival.first_key_value()?;
        self.passed = if oldest < rank.arrival { self.passed + 1 } else { 0 };
        if self.passed < PASSED_MAX {
            return None;
        }
        self.passed = 0;
        self.remove(old);
        self.insert(old.raised(), slot);
        Some((old.raised(), slot))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn priorities_first_then_arrival_and_the_oldest_is_not_passed_for_ever() {
        let mut waiting = Waiting::default();
        for (slot, priority) in [(0, 0), (1, 5), (2, 0), (3, 5), (4, -1)] {
            waiting.insert(Rank::new(priority, u64::from(slot)), slot);
        }
        let mut order = Vec::new();
        while let Some((rank, slot)) = waiting.next(None) {
            waiting.admit(rank);
            order.push(slot);
        }
        assert_eq!(order, [1, 3, 0, 2, 4]);
        waiting.insert(Rank::new(0, 5), 5);
        let mut passed = 0;
        for arrival in 6.. {
            waiting.insert(Rank::new(1, arrival), 6);
            let (rank, slot) = waiting.next(None).unwrap();
            if slot == 5 {
                break;
            }
            waiting.admit(rank);
            passed += 1;
        }
        assert_eq!(passed, PASSED_MAX);
    }
}

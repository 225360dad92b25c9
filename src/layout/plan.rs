//! Where to cut: exact, over all contiguous cuts. Pure: numbers in, cuts out.
//!
//! A cut is the better the less its slowest slot costs; of equal ones that whose second-slowest costs less, and so on.
//! That order of lists, sorted from the largest down, does not change when both get one entry more, so the best cut of the
//! first layers over the first slots is part of a best cut of all: dynamic programming is exact. Costs are whole numbers,
//! so that equal sums are equal.

use std::ops::Range;

/// A model to be cut over slots.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Problem {
    /// Bytes that units take.
    pub sizes: Sizes,
    /// Where stages can be, in the order of the data. Each gets at least one layer.
    pub slots: Vec<Slot>,
}

/// Bytes of units, on whatever device.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Sizes {
    /// Weights, keys and values of each layer.
    pub layers: Vec<u64>,
    /// The embedding's.
    pub embed: u64,
    /// The head's.
    pub head: u64,
    /// The head's beside an embedding whose matrix it shares; `None` if it has its own.
    pub head_tied: Option<u64>,
}

/// A device's turn in the pipeline, and what units cost there.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Slot {
    /// Each layer.
    pub layers: Vec<u64>,
    /// The embedding, if it is the first.
    pub embed: u64,
    /// The head, if it is the last.
    pub head: u64,
    /// Every pass.
    pub pass: u64,
    /// Giving rows to the next slot, unless it is the last.
    pub boundary: u64,
    /// Bytes for units.
    pub room: u64,
    /// The fewest layers that it may get; 0 counts as 1.
    pub layers_min: usize,
}

/// The best cut: each slot's layers. `None` if no cut fits.
///
/// ```
/// use pipeline_infer::layout::plan::{Problem, Sizes, Slot, solve};
///
/// // Ten layers alike, on a device that is twice as fast as the other one, with a head of two layers there.
/// let fast = Slot { layers: vec![10; 10], room: 100, ..Slot::default() };
/// let slow = Slot { layers: vec![20; 10], head: 40, room: 100, ..Slot::default() };
/// let sizes = Sizes { layers: vec![10; 10], ..Sizes::default() };
/// assert_eq!(solve(&Problem { sizes, slots: vec![fast, slow] }), Some(vec![0..8, 8..10]));
/// ```
pub fn solve(problem: &Problem) -> Option<Vec<Range<usize>>> {
    let (layers, slots) = (problem.sizes.layers.len(), problem.slots.len());
    if slots == 0 || layers < slots {
        return None;
    }
    let sums = Sums::new(problem);
    // What the best cut of the first `end` layers over the slots so far costs, slot by slot, the largest first.
    let mut best: Vec<Option<Vec<u64>>> = vec![None; layers + 1];
    best[0] = Some(Vec::new());
    let mut starts: Vec<Vec<usize>> = Vec::with_capacity(slots);
    for slot in 0..slots {
        let (mut next, mut from) = (vec![None; layers + 1], vec![0; layers + 1]);
        let ends = if slot + 1 == slots { layers..layers + 1 } else { slot + 1..layers };
        for end in ends {
            let mut found: Option<Vec<u64>> = None;
            // Layer by layer more, until it is more than fits or more than the best costs.
            let Some(most) = end.checked_sub(problem.slots[slot].layers_min.max(1)) else { continue };
            for start in (0..=most).rev() {
                let Some(before) = &best[start] else { continue };
                let cost = sums.cost(slot, &(start..end));
                let worse = found.as_ref().is_some_and(|found| cost > found[0]);
                if worse || sums.bytes(&(start..end)) > problem.slots[slot].room {
                    break;
                }
                if found.as_ref().is_some_and(|found| before.first().is_some_and(|&first| first > found[0])) {
                    continue;
                }
                let at = before.partition_point(|&other| other > cost);
                let mut costs = before.clone();
                costs.insert(at, cost);
                if found.as_ref().is_none_or(|found| costs < *found) {
                    (found, from[end]) = (Some(costs), start);
                }
            }
            next[end] = found;
        }
        best = next;
        starts.push(from);
    }
    best[layers].as_ref()?;
    let mut cut = vec![0..0; slots];
    let mut end = layers;
    for slot in (0..slots).rev() {
        let start = starts[slot][end];
        cut[slot] = start..end;
        end = start;
    }
    Some(cut)
}

/// What each slot of a cut costs.
pub fn costs(problem: &Problem, cut: &[Range<usize>]) -> Vec<u64> {
    let sums = Sums::new(problem);
    cut.iter().enumerate().map(|(slot, layers)| sums.cost(slot, layers)).collect()
}

/// Sums over the first layers.
pub(super) struct Sums<'a> {
    problem: &'a Problem,
    costs: Vec<Vec<u128>>, // [slots][layers + 1]
    bytes: Vec<u128>,      // [layers + 1]
}

impl Sums<'_> {
    pub(super) fn new(problem: &Problem) -> Sums<'_> {
        let sums = |of: &[u64]| {
            let mut sum = 0;
            let add = |&n: &u64| {
                sum += u128::from(n);
                sum
            };
            std::iter::once(0).chain(of.iter().map(add)).collect::<Vec<u128>>()
        };
        let costs = problem.slots.iter().map(|slot| sums(&slot.layers)).collect();
        Sums { problem, costs, bytes: sums(&problem.sizes.layers) }
    }

    fn last(&self) -> usize {
        self.problem.sizes.layers.len()
    }

    pub(super) fn cost(&self, slot: usize, layers: &Range<usize>) -> u64 {
        let Slot { embed, head, pass, boundary, .. } = self.problem.slots[slot];
        let sums = &self.costs[slot];
        let first = if layers.start == 0 { embed } else { 0 };
        let end = if layers.end == self.last() { head } else { boundary };
        bounded(sums[layers.end] - sums[layers.start])
            .saturating_add(first)
            .saturating_add(end)
            .saturating_add(pass)
    }

    pub(super) fn bytes(&self, layers: &Range<usize>) -> u64 {
        let Sizes { embed, head, head_tied, .. } = self.problem.sizes;
        let (first, last) = (layers.start == 0, layers.end == self.last());
        let ends = match (first, last) {
            (true, true) => embed.saturating_add(head_tied.unwrap_or(head)),
            (true, false) => embed,
            (false, true) => head,
            (false, false) => 0,
        };
        bounded(self.bytes[layers.end] - self.bytes[layers.start]).saturating_add(ends)
    }
}

/// What nothing has room for stays too much.
pub(super) fn bounded(sum: u128) -> u64 {
    u64::try_from(sum).unwrap_or(u64::MAX)
}

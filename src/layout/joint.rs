//! Where to cut layers and the blocks of a vision tower that share devices: exact, over all pairs of contiguous cuts. Pure, as
//! `plan` is.
//!
//! As there, a pair is the better the less its slowest slot costs, then its second-slowest, and so on. There are many pairs,
//! so it is looked for among those whose slots all keep to a bound: the best of these, if there is one, is the best of all.
//! The first bound is just above what slots cost on average, and the next ones rise.

use std::ops::Range;

use super::plan::{Problem, Sizes, Slot, Sums, bounded};

/// A tower beside a [`Problem`]'s layers.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Tower {
    /// Bytes of each block's weights.
    pub blocks: Vec<u64>,
    /// One for each of the problem's. The tower goes through them in their order, and may leave some out.
    pub slots: Vec<TowerSlot>,
}

/// What the tower costs in a slot.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct TowerSlot {
    /// Each block; the first and the last with what is before and behind.
    pub blocks: Vec<u64>,
    /// Every pass, if it has blocks.
    pub pass: u64,
    /// Giving rows to the next slot that has blocks.
    pub boundary: u64,
    /// Bytes beside the blocks, if it has some.
    pub buffers: u64,
}

/// Each slot's layers, and its blocks, of which it may have none.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cuts {
    /// As `plan::solve` gives them.
    pub layers: Vec<Range<usize>>,
    /// As many.
    pub blocks: Vec<Range<usize>>,
}

/// The best pair of cuts; `None` if none fits.
///
/// ```
/// use pipeline_infer::layout::{
///     joint::{Tower, TowerSlot, solve},
///     plan::{Problem, Sizes, Slot},
/// };
///
/// // Four layers on two devices, and three blocks as long as a layer: the second has a head of one more.
/// let slot = Slot { layers: vec![10; 4], head: 10, room: 100, ..Slot::default() };
/// let problem = Problem { sizes: Sizes { layers: vec![10; 4], ..Sizes::default() }, slots: vec![slot; 2] };
/// let beside = TowerSlot { blocks: vec![10; 3], ..TowerSlot::default() };
/// let tower = Tower { blocks: vec![1; 3], slots: vec![beside; 2] };
/// let cuts = solve(&problem, &tower).unwrap();
/// assert!((0..2).all(|i| cuts.layers[i].len() + cuts.blocks[i].len() + i == 4), "{cuts:?}");
/// ```
pub fn solve(problem: &Problem, tower: &Tower) -> Option<Cuts> {
    if !fits(problem, tower) {
        return None;
    }
    let search = Search::new(problem, tower);
    let (mut bound, mut step) = (search.mean(), 1 << 5);
    loop {
        if let Some(cuts) = search.within(bound) {
            return Some(cuts);
        }
        assert!(bound < u64::MAX, "what fits keeps to no bound; this is a bug");
        bound = bound.saturating_add((bound / step).max(1));
        step = (step / 2).max(1);
    }
}

/// The best cut of the tower's blocks beside these layers; `None` if none fits.
pub fn beside(problem: &Problem, layers: &[Range<usize>], tower: &Tower) -> Option<Cuts> {
    let sums = Sums::new(problem);
    // What each slot has counts as one layer, of which each gets one.
    let slot = |(i, slot): (usize, &Slot)| Slot {
        layers: vec![sums.cost(i, &layers[i]); layers.len()],
        room: slot.room,
        ..Slot::default()
    };
    let sizes = Sizes { layers: layers.iter().map(|run| sums.bytes(run)).collect(), ..Sizes::default() };
    let given = Problem { sizes, slots: problem.slots.iter().enumerate().map(slot).collect() };
    let Cuts { blocks, .. } = solve(&given, tower)?;
    Some(Cuts { layers: layers.to_vec(), blocks })
}

/// Whether any pair of cuts fits.
///
/// Of cuts of the same layers the one with the most blocks so far is as good as any other: what is left of the tower is the
/// end of what the others leave.
pub fn fits(problem: &Problem, tower: &Tower) -> bool {
    let (layers, slots) = (problem.sizes.layers.len(), problem.slots.len());
    if slots == 0 || layers < slots {
        return false;
    }
    let (sums, blocks) = (Sums::new(problem), sums(&tower.blocks));
    // The most blocks that the slots so far have room for beside the first layers.
    let mut most: Vec<Option<usize>> = vec![None; layers + 1];
    most[0] = Some(0);
    for (i, slot) in problem.slots.iter().enumerate() {
        let mut next = vec![None; layers + 1];
        for (start, done) in most.iter().enumerate().filter_map(|(l, done)| Some((l, (*done)?))) {
            for end in ends(i, slots, layers, start + slot.layers_min.max(1)) {
                let Some(left) = slot.room.checked_sub(sums.bytes(&(start..end))) else { continue };
                let within =
                    |left: u64| blocks.partition_point(|&sum| sum <= blocks[done] + u128::from(left)) - 1;
                let reach = left.checked_sub(tower.slots[i].buffers).map_or(done, within);
                next[end] = next[end].max(Some(reach));
            }
        }
        most = next;
    }
    most[layers] == Some(tower.blocks.len())
}

/// What each slot of the cuts costs.
pub fn costs(problem: &Problem, tower: &Tower, cuts: &Cuts) -> Vec<u64> {
    let search = Search::new(problem, tower);
    let of = |i: usize| {
        search.layers.cost(i, &cuts.layers[i]).saturating_add(search.blocks_cost(i, &cuts.blocks[i]))
    };
    (0..problem.slots.len()).map(of).collect()
}

/// Where a slot may end: the last one with the last layer, others with a layer left for each of those behind.
fn ends(slot: usize, slots: usize, layers: usize, from: usize) -> Range<usize> {
    let behind = slots - 1 - slot;
    let last = layers.saturating_sub(behind);
    if behind == 0 { from.max(layers).min(layers + 1)..layers + 1 } else { from..last + 1 }
}

/// Sums of the first ones.
fn sums(of: &[u64]) -> Vec<u128> {
    let mut sum = 0;
    let add = |&n: &u64| {
        sum += u128::from(n);
        sum
    };
    std::iter::once(0).chain(of.iter().map(add)).collect()
}

struct Search<'a> {
    problem: &'a Problem,
    tower: &'a Tower,
    layers: Sums<'a>,
    costs: Vec<Vec<u128>>, // [slots][blocks + 1]
    bytes: Vec<u128>,      // [blocks + 1]
    /// What layers from one on, and blocks, cost at least.
    layers_left: Vec<u128>, // [layers + 1]
    blocks_left: Vec<u128>, // [blocks + 1]
}

/// The best cuts of the first layers and blocks.
#[derive(Clone)]
struct Best {
    /// What slots cost, the largest first.
    costs: Vec<u64>,
    /// Layers and blocks before the latest slot.
    from: (usize, usize),
}

impl<'a> Search<'a> {
    fn new(problem: &'a Problem, tower: &'a Tower) -> Search<'a> {
        let least = |costs: Vec<&[u64]>, count: usize| {
            let each = |i: usize| costs.iter().map(|of| of[i]).min().unwrap_or(0);
            let mut left: Vec<u128> = sums(&(0..count).rev().map(each).collect::<Vec<_>>());
            left.reverse();
            left
        };
        let layers = problem.slots.iter().map(|slot| &slot.layers[..]).collect();
        let blocks = tower.slots.iter().map(|slot| &slot.blocks[..]).collect();
        Search {
            problem,
            tower,
            layers: Sums::new(problem),
            costs: tower.slots.iter().map(|slot| sums(&slot.blocks)).collect(),
            bytes: sums(&tower.blocks),
            layers_left: least(layers, problem.sizes.layers.len()),
            blocks_left: least(blocks, tower.blocks.len()),
        }
    }

    /// What slots cost at least, on average.
    fn mean(&self) -> u64 {
        bounded((self.layers_left[0] + self.blocks_left[0]) / self.problem.slots.len() as u128)
    }

    fn blocks_cost(&self, slot: usize, blocks: &Range<usize>) -> u64 {
        if blocks.is_empty() {
            return 0;
        }
        let TowerSlot { pass, boundary, .. } = self.tower.slots[slot];
        let leaving = if blocks.end == self.tower.blocks.len() { 0 } else { boundary };
        let sum = self.costs[slot][blocks.end] - self.costs[slot][blocks.start];
        bounded(sum).saturating_add(pass).saturating_add(leaving)
    }

    fn blocks_bytes(&self, slot: usize, blocks: &Range<usize>) -> u64 {
        if blocks.is_empty() {
            return 0;
        }
        bounded(self.bytes[blocks.end] - self.bytes[blocks.start])
            .saturating_add(self.tower.slots[slot].buffers)
    }

    /// The best cuts whose slots cost no more than that.
    fn within(&self, bound: u64) -> Option<Cuts> {
        let (layers, blocks) = (self.problem.sizes.layers.len(), self.tower.blocks.len());
        let mut all: Vec<Vec<Option<Best>>> = Vec::new(); // [slots + 1][(layers + 1) * (blocks + 1)]
        let mut begun = vec![None; (layers + 1) * (blocks + 1)];
        begun[0] = Some(Best { costs: Vec::new(), from: (0, 0) });
        all.push(begun);
        for slot in 0..self.problem.slots.len() {
            let mut next = vec![None; (layers + 1) * (blocks + 1)];
            for (at, before) in
                all[slot].iter().enumerate().filter_map(|(at, best)| Some((at, best.as_ref()?)))
            {
                self.go_on(slot, (at / (blocks + 1), at % (blocks + 1)), bound, before, &mut next);
            }
            all.push(next);
        }
        all.last()?.last()?.as_ref()?;
        let mut cuts = Cuts { layers: Vec::new(), blocks: Vec::new() };
        let mut end = (layers, blocks);
        for of in all[1..].iter().rev() {
            let from = of[end.0 * (blocks + 1) + end.1]
                .as_ref()
                .expect("cuts that nothing led to; this is a bug")
                .from;
            cuts.layers.insert(0, from.0..end.0);
            cuts.blocks.insert(0, from.1..end.1);
            end = from;
        }
        Some(cuts)
    }

    /// All that a slot can have behind the first layers and blocks.
    fn go_on(
        &self,
        slot: usize,
        (layer, block): (usize, usize),
        bound: u64,
        before: &Best,
        next: &mut [Option<Best>],
    ) {
        let (slots, layers, blocks) =
            (self.problem.slots.len(), self.problem.sizes.layers.len(), self.tower.blocks.len());
        let of = &self.problem.slots[slot];
        let allowed = u128::from(bound) * (slots - 1 - slot) as u128;
        for layer_end in ends(slot, slots, layers, layer + of.layers_min.max(1)) {
            let (cost, bytes) =
                (self.layers.cost(slot, &(layer..layer_end)), self.layers.bytes(&(layer..layer_end)));
            if cost > bound || bytes > of.room {
                continue;
            }
            let first = if slot + 1 == slots { blocks } else { block };
            for block_end in first..=blocks {
                let run = block..block_end;
                let cost = cost.saturating_add(self.blocks_cost(slot, &run));
                if bytes.saturating_add(self.blocks_bytes(slot, &run)) > of.room {
                    break;
                }
                if cost > bound || self.layers_left[layer_end] + self.blocks_left[block_end] > allowed {
                    continue;
                }
                let found = &mut next[layer_end * (blocks + 1) + block_end];
                let most = before.costs.first().map_or(cost, |&most| most.max(cost));
                if found.as_ref().is_some_and(|found| most > found.costs[0]) {
                    continue;
                }
                let mut costs = before.costs.clone();
                costs.insert(costs.partition_point(|&other| other > cost), cost);
                if found.as_ref().is_none_or(|found| costs < found.costs) {
                    *found = Some(Best { costs, from: (layer, block) });
                }
            }
        }
    }
}

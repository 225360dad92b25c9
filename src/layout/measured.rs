//! How long stages took in a run, gathered by kinds of passes.

use std::collections::{BTreeMap, VecDeque};

use crate::{
    batch::PassShape,
    model::{units::Pass, vision::VisionPass},
};

/// Of passes of a kind and a stage, the latest that are kept.
const KEPT: usize = 128;
/// Passes whose rows differ by less than this share of a power of 2 are of a kind.
const SIZES_A_DOUBLING: usize = 4;

/// How long a stage took for passes of a kind.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StageTime {
    /// Which stage.
    pub stage: usize,
    /// The passes' shape: their mean.
    pub pass: Pass,
    /// How long one took: the mean of the middle half.
    pub seconds: f64,
    /// How many there were.
    pub passes: u64,
}

/// How long a stage of the vision tower took for passes of about as many patches.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct VisionTime {
    /// Which stage.
    pub stage: usize,
    /// The passes' mean.
    pub pass: VisionPass,
    /// How long one took: the mean of the middle half.
    pub seconds: f64,
    /// How many there were.
    pub passes: u64,
}

/// What the stages of a run took for passes, by their kind: answers alone or with prompts, and how many rows.
///
/// ```
/// use pipeline_infer::{batch::PassShape, layout::Measured};
///
/// let mut measured = Measured::default();
/// for i in 0..100 {
///     // Single steps of 8 sequences of 500 tokens, on the second stage.
///     let shape = PassShape { rows: 8, outputs: 8, attended: 8 * 500, read: 8 * 500 };
///     let hiccup = if i % 20 == 0 { 10.0 } else { 1.0 };
///     measured.add(1, shape, 2e-3 * hiccup);
/// }
/// let times = measured.times();
/// assert_eq!((times.len(), times[0].stage, times[0].passes), (1, 1, 100));
/// assert!((times[0].seconds - 2e-3).abs() < 1e-9);
/// ```
#[derive(Debug, Clone, Default)]
pub struct Measured {
    groups: BTreeMap<(bool, usize), Vec<Taken<PassShape>>>, // [stages]
    vision: BTreeMap<usize, Vec<Taken<VisionPass>>>,        // [stages]
}

/// What passes of a kind took a stage.
#[derive(Debug, Clone)]
struct Taken<S> {
    count: u64,
    seconds: f64,
    latest: VecDeque<(f64, S)>,
}

impl Measured {
    /// A stage took so long for a pass, without what it waited for.
    pub fn add(&mut self, stage: usize, shape: PassShape, seconds: f64) {
        if shape.rows == 0 || !seconds.is_finite() || seconds <= 0.0 {
            return;
        }
        let stages = self.groups.entry((Pass::of(shape).decodes(), size(shape.rows))).or_default();
        add_to(stages, stage, seconds, shape);
    }

    /// The same for a stage of the vision tower.
    pub fn add_vision(&mut self, stage: usize, pass: VisionPass, seconds: f64) {
        if pass.rows > 0 && seconds.is_finite() && seconds > 0.0 {
            add_to(self.vision.entry(size(pass.rows)).or_default(), stage, seconds, pass);
        }
    }

    /// Each stage's time for each kind of passes, those first that took the stages longest in all. Passes of a kind have the
    /// same shape at all stages.
    pub fn times(&self) -> Vec<StageTime> {
        longest_first(&self.groups).into_iter().flat_map(|stages| of_kind(stages)).collect()
    }

    /// The same of the vision tower's.
    pub fn vision_times(&self) -> Vec<VisionTime> {
        longest_first(&self.vision).into_iter().flat_map(|stages| of_images(stages)).collect()
    }
}

fn add_to<S>(stages: &mut Vec<Taken<S>>, stage: usize, seconds: f64, shape: S) {
    if stages.len() <= stage {
        let none = || Taken { count: 0, seconds: 0.0, latest: VecDeque::new() };
        stages.resize_with(stage + 1, none);
    }
    let taken = &mut stages[stage];
    taken.count += 1;
    taken.seconds += seconds;
    if taken.latest.len() == KEPT {
        taken.latest.pop_front();
    }
    taken.latest.push_back((seconds, shape));
}

/// Kinds of passes, those first that took the stages longest in all.
fn longest_first<K, S>(groups: &BTreeMap<K, Vec<Taken<S>>>) -> Vec<&Vec<Taken<S>>> {
    let spent = |stages: &[Taken<S>]| stages.iter().map(|taken| taken.seconds).sum::<f64>();
    let mut groups: Vec<_> = groups.values().collect();
    groups.sort_by(|a, b| spent(b).total_cmp(&spent(a)));
    groups
}

/// Of passes of the vision tower of about a size, the stages' times.
fn of_images(stages: &[Taken<VisionPass>]) -> Vec<VisionTime> {
    let time = |(stage, taken): (usize, &Taken<VisionPass>)| {
        let middle = taken.middle();
        let n = middle.len() as f64;
        let mean = |of: &dyn Fn(&(f64, VisionPass)) -> f64| middle.iter().map(of).sum::<f64>() / n;
        let pass = VisionPass {
            rows: mean(&|(_, pass)| pass.rows as f64).round() as usize,
            window_pairs: mean(&|(_, pass)| pass.window_pairs),
            frame_pairs: mean(&|(_, pass)| pass.frame_pairs),
        };
        let seconds = mean(&|(seconds, _)| *seconds);
        (!middle.is_empty()).then_some(VisionTime { stage, pass, seconds, passes: taken.count })
    };
    stages.iter().enumerate().filter_map(time).collect()
}

/// Of passes of a kind, the stages' times.
fn of_kind(stages: &[Taken<PassShape>]) -> Vec<StageTime> {
    let middles: Vec<Vec<(f64, PassShape)>> = stages.iter().map(Taken::middle).collect();
    let shapes: Vec<PassShape> = middles.iter().flatten().map(|&(_, shape)| shape).collect();
    let pass = Pass::of(mean(&shapes));
    let time = |(stage, middle): (usize, &Vec<(f64, PassShape)>)| {
        let seconds = middle.iter().map(|(seconds, _)| seconds).sum::<f64>() / middle.len() as f64;
        (!middle.is_empty()).then(|| StageTime { stage, pass, seconds, passes: stages[stage].count })
    };
    middles.iter().enumerate().filter_map(time).collect()
}

impl<S: Copy> Taken<S> {
    /// Without the quarters that took longest and shortest.
    fn middle(&self) -> Vec<(f64, S)> {
        let mut sorted: Vec<_> = self.latest.iter().copied().collect();
        sorted.sort_by(|a, b| a.0.total_cmp(&b.0));
        let quarter = sorted.len() / 4;
        sorted[quarter..sorted.len() - quarter].to_vec()
    }
}

/// The mean of shapes. There is one at least.
fn mean(shapes: &[PassShape]) -> PassShape {
    let sum = |of: fn(&PassShape) -> usize| shapes.iter().map(|shape| of(shape) as u128).sum::<u128>();
    let n = shapes.len().max(1) as u128;
    let mean = |of| ((sum(of) + n / 2) / n) as usize;
    // Answers alone stay answers alone.
    let decodes = shapes.iter().all(|&shape| Pass::of(shape).decodes());
    let (rows, attended) = (mean(|s| s.rows), mean(|s| s.attended));
    let outputs = if decodes { rows } else { mean(|s| s.outputs) };
    PassShape { rows, outputs, attended, read: if decodes { attended } else { mean(|s| s.read) } }
}

/// Rows of about this many.
pub(super) fn size(rows: usize) -> usize {
    let doubling = rows.ilog2() as usize;
    let within = ((rows - (1 << doubling)) * SIZES_A_DOUBLING) >> doubling;
    doubling * SIZES_A_DOUBLING + within
}

#[cfg(test)]
mod tests {
    use super::*;

    fn singles(rows: usize, context: usize) -> PassShape {
        (0..rows)
            .fold(PassShape { outputs: rows, ..PassShape::default() }, |s, _| s.with_rows(context - 1, 1))
    }

    #[test]
    fn kinds_of_passes_are_kept_apart_and_those_that_took_longest_come_first() {
        let mut measured = Measured::default();
        for i in 0..40 {
            for stage in 0..2 {
                let slower = (stage + 1) as f64;
                measured.add(stage, singles(64, 500 + i), 1e-3 * slower);
                // The same rows, beside a prompt.
                measured.add(stage, singles(40, 500).with_rows(0, 24), 2e-3 * slower);
            }
        }
        measured.add(0, singles(3, 10), 1e-4);
        measured.add(0, PassShape::default(), 1.0);
        measured.add(0, singles(3, 10), f64::NAN);
        let times = measured.times();
        let seen: Vec<_> = times.iter().map(|t| (t.pass.rows(), t.stage, t.passes)).collect();
        assert_eq!(seen, [(64, 0, 40), (64, 1, 40), (64, 0, 40), (64, 1, 40), (3, 0, 1)]);
        assert!(!times[0].pass.decodes() && times[0].pass == times[1].pass);
        let Pass::Decode { context, .. } = times[2].pass else { panic!("{:?}", times[2]) };
        assert!((518..=521).contains(&context), "{context}");
        assert!((times[3].seconds - 2e-3).abs() < 1e-12);
    }

    #[test]
    fn passes_of_the_tower_are_told_by_their_size() {
        let mut measured = Measured::default();
        let pass =
            |rows: usize| VisionPass { rows, window_pairs: rows as f64, frame_pairs: 2.0 * rows as f64 };
        for i in 0..8 {
            measured.add_vision(1, pass(5476), if i == 0 { 9.0 } else { 4e-3 });
            measured.add_vision(0, pass(64), 1e-3);
        }
        measured.add_vision(0, pass(0), 1.0);
        let times = measured.vision_times();
        assert_eq!((times[0].stage, times[0].pass, times[0].passes), (1, pass(5476), 8));
        assert!((times[0].seconds - 4e-3).abs() < 1e-12 && times[1].stage == 0 && times.len() == 2);
    }

    #[test]
    fn sizes_grow_with_rows_and_memory_does_not() {
        let sizes: Vec<usize> = (1..10_000).map(size).collect();
        assert!(sizes.is_sorted() && sizes.last() < Some(&60));
        assert!(size(64) == size(79) && size(64) != size(80) && size(1) != size(2));
        let mut measured = Measured::default();
        (0..100_000).for_each(|_| measured.add(0, singles(2, 9), 1e-3));
        assert_eq!(measured.groups.values().map(|g| g[0].latest.len()).sum::<usize>(), KEPT);
        assert_eq!(measured.times()[0].passes, 100_000);
    }
}

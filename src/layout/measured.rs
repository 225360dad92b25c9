//! How long stages took in a run, gathered by kinds of passes.

use std::collections::{BTreeMap, VecDeque};

use crate::{batch::PassShape, model::units::Pass};

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
    groups: BTreeMap<(bool, usize), Vec<Taken>>, // [stages]
}

/// What passes of a kind took a stage.
#[derive(Debug, Clone, Default)]
struct Taken {
    count: u64,
    seconds: f64,
    latest: VecDeque<(f64, PassShape)>,
}

impl Measured {
    /// A stage took so long for a pass, without what it waited for.
    pub fn add(&mut self, stage: usize, shape: PassShape, seconds: f64) {
        if shape.rows == 0 || !seconds.is_finite() || seconds <= 0.0 {
            return;
        }
        let stages = self.groups.entry((Pass::of(shape).decodes(), size(shape.rows))).or_default();
        if stages.len() <= stage {
            stages.resize_with(stage + 1, Taken::default);
        }
        let taken = &mut stages[stage];
        taken.count += 1;
        taken.seconds += seconds;
        if taken.latest.len() == KEPT {
            taken.latest.pop_front();
        }
        taken.latest.push_back((seconds, shape));
    }

    /// Each stage's time for each kind of passes, those first that took the stages longest in all. Passes of a kind have the
    /// same shape at all stages.
    pub fn times(&self) -> Vec<StageTime> {
        let spent = |stages: &[Taken]| stages.iter().map(|taken| taken.seconds).sum::<f64>();
        let mut groups: Vec<&Vec<Taken>> = self.groups.values().collect();
        groups.sort_by(|a, b| spent(b).total_cmp(&spent(a)));
        groups.into_iter().flat_map(|stages| of_kind(stages)).collect()
    }
}

/// Of passes of a kind, the stages' times.
fn of_kind(stages: &[Taken]) -> Vec<StageTime> {
    let middles: Vec<Vec<(f64, PassShape)>> = stages.iter().map(Taken::middle).collect();
    let shapes: Vec<PassShape> = middles.iter().flatten().map(|&(_, shape)| shape).collect();
    let pass = Pass::of(mean(&shapes));
    let time = |(stage, middle): (usize, &Vec<(f64, PassShape)>)| {
        let seconds = middle.iter().map(|(seconds, _)| seconds).sum::<f64>() / middle.len() as f64;
        (!middle.is_empty()).then(|| StageTime { stage, pass, seconds, passes: stages[stage].count })
    };
    middles.iter().enumerate().filter_map(time).collect()
}

impl Taken {
    /// Without the quarters that took longest and shortest.
    fn middle(&self) -> Vec<(f64, PassShape)> {
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

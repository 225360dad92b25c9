//! How long stages take for a micro-batch, learnt from how long they took for others.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::batch::PassShape;

const TERMS: usize = 5;
/// What a later observation of passes of about as many rows leaves of an earlier one.
const KEPT: f64 = 0.95;
/// Observations of a stage before its costs are believed, and after which they are solved for again; and of how many
/// different sizes (powers of 2 in rows) there must be some.
const OBSERVED_MIN: usize = 8;
const SIZES_MIN: usize = 2;
/// Added to each term's own sum, which is scaled to 1: where observations cannot tell terms apart, they share.
const RIDGE: f64 = 1e-6;

/// What a stage's time is made of, in seconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct StageCost {
    /// A pass, whatever is in it.
    pub base: f64,
    /// A row.
    pub row: f64,
    /// A token that a row attends to.
    pub attended: f64,
    /// The same for a single row's, on top.
    pub read: f64,
    /// A row whose logits are wanted.
    pub output: f64,
}

impl StageCost {
    /// Seconds for a pass.
    pub fn seconds(&self, shape: &PassShape) -> f64 {
        dot(&[self.base, self.row, self.attended, self.read, self.output], &terms(shape))
    }
}

/// Each stage's costs: given, or fitted by least squares of relative errors. Observations of passes of about as many rows
/// displace each other: a long time of single steps does not make it forget what prompts cost.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct CostModel {
    stages: Vec<Stage>,
}

#[derive(Debug, Clone, Default, Serialize, Deserialize)]
struct Stage {
    /// `None` until enough has been observed.
    cost: Option<StageCost>,
    #[serde(skip)]
    observed: usize,
    /// By the power of 2 in the rows.
    #[serde(skip)]
    sums: Vec<Sums>,
}

/// Sums over passes, each divided by its time: products of terms with each other, and the terms.
#[derive(Debug, Clone, Copy, Default)]
struct Sums {
    products: [[f64; TERMS]; TERMS],
    terms: [f64; TERMS],
}

impl CostModel {
    /// Of stages whose costs are known. Observations replace them.
    pub fn new(stages: Vec<StageCost>) -> Self {
        let stage = |cost| Stage { cost: Some(cost), ..Stage::default() };
        CostModel { stages: stages.into_iter().map(stage).collect() }
    }

    /// How long a stage takes; nothing if too little is known about it.
    pub fn predict(&self, stage: usize, shape: &PassShape) -> Duration {
        let cost = self.stages.get(stage).and_then(|stage| stage.cost).unwrap_or_default();
        Duration::from_secs_f64(cost.seconds(shape))
    }

    /// What each stage's time is made of; `None` unless enough is known about all of them.
    pub fn costs(&self) -> Option<Vec<StageCost>> {
        self.stages
            .iter()
            .map(|stage| stage.cost)
            .collect::<Option<Vec<_>>>()
            .filter(|costs| !costs.is_empty())
    }

    /// Whether something is known about every stage that has been heard of.
    pub fn is_known(&self) -> bool {
        !self.stages.is_empty() && self.stages.iter().all(|stage| stage.cost.is_some())
    }

    /// Seconds of the stage that takes longest.
    pub fn slowest(&self, shape: &PassShape) -> f64 {
        let costs = self.stages.iter().filter_map(|stage| stage.cost);
        costs.map(|cost| cost.seconds(shape)).fold(0.0, f64::max)
    }

    /// How many rows of one more sequence, behind `cached` tokens, a micro-batch has room for if no stage is to take
    /// longer than so many seconds; `most` at most.
    pub fn rows_within(&self, seconds: f64, shape: PassShape, cached: usize, most: usize) -> usize {
        let (mut fits, mut over) = (0, most + 1);
        while fits + 1 < over {
            let len = fits.midpoint(over);
            match self.slowest(&shape.with_rows(cached, len)) <= seconds {
                true => fits = len,
                false => over = len,
            }
        }
        fits
    }

    /// What is known of stages with so many layers each says of others that are made of the same layers: `parts[i]` are the
    /// old stages that stage `i` has layers of, with their share of these. The last stages choose the tokens.
    #[must_use]
    pub fn of_parts(&self, parts: &[Vec<(usize, f64)>]) -> Self {
        let Some(old) = self.costs() else { return CostModel::default() };
        let last = old.len() - 1;
        let mut stages = vec![StageCost::default(); parts.len()];
        for (stage, parts) in stages.iter_mut().zip(parts) {
            for (cost, share) in parts.iter().filter_map(|&(i, share)| Some((old.get(i)?, share))) {
                stage.base += share * cost.base;
                stage.row += share * cost.row;
                stage.attended += share * cost.attended;
                stage.read += share * cost.read;
            }
        }
        stages.last_mut().into_iter().for_each(|stage| stage.output = old[last].output);
        CostModel::new(stages)
    }

    /// Learns how long a stage took.
    pub fn fit(&mut self, stage: usize, shape: &PassShape, busy: Duration) {
        let seconds = busy.as_secs_f64();
        if shape.rows == 0 || seconds <= 0.0 {
            return;
        }
        if self.stages.len() <= stage {
            self.stages.resize_with(stage + 1, Stage::default);
        }
        self.stages[stage].learn(shape, seconds);
    }
}

impl Stage {
    fn learn(&mut self, shape: &PassShape, seconds: f64) {
        let size = shape.rows.ilog2() as usize;
        if self.sums.len() <= size {
            self.sums.resize(size + 1, Sums::default());
        }
        self.sums[size].add(&terms(shape).map(|term| term / seconds));
        self.observed += 1;
        let seen = self.sums.iter().filter(|sums| sums.terms[0] > 0.0);
        if self.observed.is_multiple_of(OBSERVED_MIN) && seen.count() >= SIZES_MIN {
            let [base, row, attended, read, output] = self.total().least_squares();
            self.cost = Some(StageCost { base, row, attended, read, output });
        }
    }

    fn total(&self) -> Sums {
        let mut total = Sums::default();
        for sums in &self.sums {
            for i in 0..TERMS {
                total.terms[i] += sums.terms[i];
                (0..TERMS).for_each(|j| total.products[i][j] += sums.products[i][j]);
            }
        }
        total
    }
}

impl Sums {
    fn add(&mut self, terms: &[f64; TERMS]) {
        for i in 0..TERMS {
            self.terms[i] = KEPT * self.terms[i] + terms[i];
            for j in 0..TERMS {
                self.products[i][j] = KEPT * self.products[i][j] + terms[i] * terms[j];
            }
        }
    }

    /// The costs of which none is negative and whose relative errors are smallest: of all subsets of terms that the best
    /// solution has no negative number in, the best.
    fn least_squares(&self) -> [f64; TERMS] {
        let scale: [f64; TERMS] = std::array::from_fn(|i| self.products[i][i].sqrt().recip());
        let (mut best, mut gain) = ([0.0; TERMS], 0.0);
        for subset in 1..1usize << TERMS {
            let members: Vec<usize> =
                (0..TERMS).filter(|&i| subset >> i & 1 == 1 && scale[i].is_finite()).collect();
            let Some(solution) = self.solve(&members, &scale) else { continue };
            // What the sum of squares is smaller by than with no cost at all.
            let less = dot(&solution, &self.terms);
            if solution.iter().all(|&cost| cost >= 0.0) && less > gain {
                (best, gain) = (solution, less);
            }
        }
        best
    }

    /// Least squares of some terms, by Cholesky's factors of the scaled products.
    fn solve(&self, members: &[usize], scale: &[f64; TERMS]) -> Option<[f64; TERMS]> {
        let mut factor = [[0.0; TERMS]; TERMS];
        let mut solution = [0.0; TERMS];
        for (i, &row) in members.iter().enumerate() {
            for (j, &column) in members[..=i].iter().enumerate() {
                let product = self.products[row][column] * scale[row] * scale[column];
                let rest = product - dot(&factor[i][..j], &factor[j][..j]);
                factor[i][j] = if i == j { (rest + RIDGE).sqrt() } else { rest / factor[j][j] };
            }
            let known = dot(&factor[i][..i], &solution[..i]);
            solution[i] = (self.terms[row] * scale[row] - known) / factor[i][i];
        }
        for i in (0..members.len()).rev() {
            let known: f64 = (i + 1..members.len()).map(|j| factor[j][i] * solution[j]).sum();
            solution[i] = (solution[i] - known) / factor[i][i];
        }
        let mut costs = [0.0; TERMS];
        members.iter().zip(solution).for_each(|(&i, cost)| costs[i] = cost * scale[i]);
        costs.iter().all(|cost| cost.is_finite()).then_some(costs)
    }
}

fn terms(shape: &PassShape) -> [f64; TERMS] {
    [1, shape.rows, shape.attended, shape.read, shape.outputs].map(|n| n as f64)
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    const COST: StageCost = StageCost { base: 6e-4, row: 5e-6, attended: 2e-10, read: 3e-9, output: 3e-6 };

    /// Single steps of so many sequences, and a prompt's chunk.
    fn shape(singles: usize, context: usize, chunk: usize, cached: usize) -> PassShape {
        let mut shape = (0..singles).fold(PassShape::default(), |shape, _| shape.with_rows(context, 1));
        shape.outputs = singles;
        if chunk > 0 { shape.with_rows(cached, chunk) } else { shape }
    }

    /// A pass of some kind, the same for the same number.
    fn some(i: usize) -> PassShape {
        match i % 4 {
            0 => shape(64, 300 + i, 0, 0),
            1 => shape(0, 0, 2048, 512 * (i % 16)),
            2 => shape(20 + i % 30, 700, 100 + i % 300, i % 4000),
            _ => shape(1 + i % 16, i % 2000, 0, 0),
        }
    }

    fn off(model: &CostModel, shape: &PassShape) -> f64 {
        model.predict(0, shape).as_secs_f64() / COST.seconds(shape) - 1.0
    }

    #[test]
    fn costs_are_found_and_none_is_negative() {
        let mut model = CostModel::default();
        assert!(!model.is_known());
        for i in 0..400 {
            // One in a while takes ten times as long, others a few percent more or less.
            let noise = if i % 50 == 49 { 10.0 } else { 1.0 + 0.02 * ((i * 7 % 5) as f64 - 2.0) };
            let shape = some(i);
            model.fit(0, &shape, Duration::from_secs_f64(COST.seconds(&shape) * noise));
        }
        assert!(model.is_known());
        for i in 0..100 {
            assert!(off(&model, &some(i)).abs() < 0.1, "{:?}: {:+.3}", some(i), off(&model, &some(i)));
        }
        // Ten thousand single steps later it still knows what a prompt costs.
        for i in 0..10_000 {
            let shape = shape(60 + i % 5, 500 + i % 100, 0, 0);
            model.fit(0, &shape, Duration::from_secs_f64(COST.seconds(&shape)));
        }
        assert!(off(&model, &some(1)).abs() < 0.1, "{:+.3}", off(&model, &some(1)));
        let StageCost { base, row, attended, read, output } = model.stages[0].cost.unwrap();
        assert!([base, row, attended, read, output].iter().all(|&cost| cost >= 0.0));
    }

    #[test]
    fn what_is_known_of_stages_goes_on_with_their_layers() {
        let other = StageCost { row: 1e-5, output: 9e-6, ..COST };
        let model = CostModel::new(vec![COST, other]);
        // A third of the first one's layers go to the second one.
        let cut = model.of_parts(&[vec![(0, 2.0 / 3.0)], vec![(0, 1.0 / 3.0), (1, 1.0)]]);
        let costs = cut.costs().unwrap();
        let near = |a: f64, b: f64| assert!((a / b - 1.0).abs() < 1e-9, "{a} {b}");
        near(costs[0].row, COST.row * 2.0 / 3.0);
        near(costs[1].row, COST.row / 3.0 + other.row);
        assert_eq!((costs[0].output, costs[1].output), (0.0, other.output));
        assert!(!CostModel::default().of_parts(&[vec![(0, 1.0)]]).is_known());
    }

    #[test]
    fn rows_are_as_many_as_the_slowest_stage_has_time_for() {
        let model = CostModel::new(vec![COST, StageCost { row: 1e-5, ..COST }]);
        let decode = shape(32, 500, 0, 0);
        let seconds = 1.5 * model.slowest(&decode);
        let rows = model.rows_within(seconds, decode, 4000, 1 << 20);
        assert!(model.slowest(&decode.with_rows(4000, rows)) <= seconds);
        assert!(model.slowest(&decode.with_rows(4000, rows + 1)) > seconds);
        assert_eq!(model.rows_within(seconds, decode, 4000, 7), 7);
        assert_eq!(model.rows_within(0.0, decode, 4000, 7), 0);
        let text = serde_json::to_string(&model).unwrap();
        let same: CostModel = serde_json::from_str(&text).unwrap();
        assert_eq!(same.predict(1, &decode), model.predict(1, &decode));
    }
}

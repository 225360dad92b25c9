//! Many values as a few.

use serde::Serialize;

use crate::cli::table::seconds;

/// Values, most of them often.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(super) struct Spread {
    pub(super) mean: f64,
    pub(super) median: f64,
    pub(super) p90: f64,
    pub(super) p99: f64,
    pub(super) max: f64,
}

impl Spread {
    /// `None` without a value.
    pub(super) fn of(values: impl IntoIterator<Item = f64>) -> Option<Spread> {
        Spread::counted(values.into_iter().map(|value| (value, 1)).collect())
    }

    /// Of values that each come so often.
    pub(super) fn counted(mut values: Vec<(f64, u64)>) -> Option<Spread> {
        values.retain(|&(_, count)| count > 0);
        values.sort_by(|a, b| a.0.total_cmp(&b.0));
        let n: u64 = values.iter().map(|&(_, count)| count).sum();
        let max = values.last()?.0;
        // The value at this place in the order, from 0.
        let at = |place: u64| {
            let mut passed = 0;
            let found = values.iter().find(|&&(_, count)| {
                passed += count;
                passed > place
            });
            found.map_or(max, |&(value, _)| value)
        };
        // The least value that this share of all does not exceed.
        let rank = |share: f64| at(((share * n as f64).ceil() as u64).max(1) - 1);
        Some(Spread {
            mean: values.iter().map(|&(value, count)| value * count as f64).sum::<f64>() / n as f64,
            median: (at((n - 1) / 2) + at(n / 2)) / 2.0,
            p90: rank(0.9),
            p99: rank(0.99),
            max,
        })
    }

    /// As a table's row, of milliseconds.
    pub(super) fn row(&self, name: &str) -> Vec<String> {
        let times = [self.mean, self.median, self.p90, self.p99, self.max].map(|ms| seconds(ms / 1e3));
        std::iter::once(name.into()).chain(times).collect()
    }
}

/// The middle of some values, of which there is one at least.
pub(super) fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let n = sorted.len();
    (sorted[(n - 1) / 2] + sorted[n / 2]) / 2.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spreads_are_by_rank() {
        let spread = Spread::of((1..=200).rev().map(f64::from)).unwrap();
        assert_eq!(spread, Spread { mean: 100.5, median: 100.5, p90: 180.0, p99: 198.0, max: 200.0 });
        let one = Spread::of([3.0]).unwrap();
        assert_eq!(one, Spread { mean: 3.0, median: 3.0, p90: 3.0, p99: 3.0, max: 3.0 });
        assert_eq!(Spread::of([]), None);
        assert_eq!((median(&[3.0, 1.0, 2.0]), median(&[1.0, 4.0])), (2.0, 2.5));
        let values = [(1.0, 89), (2.0, 10), (0.5, 0), (50.0, 1)];
        let each = values.iter().flat_map(|&(value, count)| std::iter::repeat_n(value, count as usize));
        assert_eq!(Spread::counted(values.to_vec()), Spread::of(each));
    }
}

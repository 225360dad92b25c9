//! What a long prompt does to those who are decoding when it comes.

use std::time::Duration;

use serde::Serialize;

use super::{
    record::{Gap, Record},
    spread::Spread,
};
use crate::cli::table::seconds;

/// The late prompt of each run.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(super) struct LatePrompt {
    input_len: u32,
    /// Until its first token, the mean over the runs.
    ttft_ms: f64,
    /// Between two tokens of the others while it was worked on.
    gap_max_ms: Option<f64>,
    /// The same at other times, when all decoded.
    gap_median_ms: Option<f64>,
    /// The run's that this is largest in.
    gap_max_over_median: Option<f64>,
}

impl LatePrompt {
    /// As a table's rows.
    pub(super) fn rows(&self) -> Vec<Vec<String>> {
        let time = |ms: Option<f64>| ms.map_or("-".into(), |ms| seconds(ms / 1e3));
        let times = self.gap_max_over_median.map_or("-".into(), |ratio| format!("{ratio:.2}"));
        vec![
            vec![format!("a prompt of {} later", self.input_len), String::new()],
            vec!["time to its token".into(), time(Some(self.ttft_ms))],
            vec!["between others' tokens meanwhile, max".into(), time(self.gap_max_ms)],
            vec!["at other times, median".into(), time(self.gap_median_ms)],
            vec!["max over median".into(), times],
        ]
    }

    /// Of runs that each had one, as their last sequence; `first_tokens` says after how many seconds its token came.
    pub(super) fn of(input_len: u32, first_tokens: &[f64], records: &[&Record]) -> LatePrompt {
        let parts: Vec<(Vec<Gap>, Vec<Gap>)> = records.iter().filter_map(|record| parts(record)).collect();
        let gaps = |of: &[Gap]| Spread::counted(of.iter().map(Gap::ms).collect());
        let max = |values: &mut dyn Iterator<Item = f64>| values.max_by(f64::total_cmp);
        let ratio = |(during, apart): &(Vec<Gap>, Vec<Gap>)| Some(gaps(during)?.max / gaps(apart)?.median);
        let apart: Vec<Gap> = parts.iter().flat_map(|(_, apart)| apart.iter().copied()).collect();
        LatePrompt {
            input_len,
            ttft_ms: 1e3 * first_tokens.iter().sum::<f64>() / first_tokens.len() as f64,
            gap_max_ms: max(&mut parts.iter().filter_map(|(during, _)| Some(gaps(during)?.max))),
            gap_median_ms: gaps(&apart).map(|spread| spread.median),
            gap_max_over_median: max(&mut parts.iter().filter_map(ratio)),
        }
    }
}

/// Gaps of the others while the last sequence's prompt was worked on, and at other times after their own first tokens.
fn parts(record: &Record) -> Option<(Vec<Gap>, Vec<Gap>)> {
    let late = record.planned.keys().max()?;
    let (from, to) = (*record.planned.get(late)?, *record.first_tokens.get(late)?);
    let others = record.first_tokens.iter().filter(|(seq, _)| *seq != late);
    let settled = others.map(|(_, &at)| at).max().unwrap_or(Duration::ZERO);
    let (during, apart): (Vec<Gap>, Vec<Gap>) =
        record.gaps.iter().partition(|gap| gap.from < to && from < gap.to);
    Some((during, apart.into_iter().filter(|gap| gap.from >= settled).collect()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::batch::SeqId;

    #[test]
    fn gaps_while_the_late_prompt_is_worked_on_are_held_against_the_others() {
        let ms = Duration::from_millis;
        let gap = |(from, to)| Gap { from: ms(from), to: ms(to), sequences: 2 };
        let record = Record {
            // The first one is from when prompts of others were worked on.
            gaps: [(0, 90), (100, 110), (110, 120), (120, 145), (145, 159), (159, 169)].map(gap).to_vec(),
            planned: [(SeqId(4), ms(0)), (SeqId(5), ms(121))].into(),
            first_tokens: [(SeqId(4), ms(95)), (SeqId(5), ms(150))].into(),
            ..Record::default()
        };
        let late = LatePrompt::of(8192, &[0.03, 0.05], &[&record, &record]);
        assert_eq!(late.input_len, 8192);
        assert!((late.ttft_ms - 40.0).abs() < 1e-9);
        assert_eq!((late.gap_max_ms, late.gap_median_ms), (Some(25.0), Some(10.0)));
        assert_eq!(late.gap_max_over_median, Some(2.5));
        let alone = LatePrompt::of(8, &[0.1], &[&Record::default()]);
        assert_eq!((alone.gap_max_ms, alone.gap_max_over_median), (None, None));
    }
}

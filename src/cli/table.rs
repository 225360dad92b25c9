//! Plain tables, and what a run took as one.

use std::{fmt::Write, time::Duration};

use serde::Serialize;

use super::answer::Answer;
use crate::{
    engine::{EngineStats, StageStats},
    pipeline::StageTimes,
};

/// How much was asked and answered.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Totals {
    prompts: usize,
    samples: usize,
    /// Samples with a token: the others have no times.
    begun: usize,
    prompt_tokens: u64,
    new_tokens: u64,
    first_token_s: f64,
    prefill_s: f64,
    decode_s: f64,
}

impl Totals {
    /// How many prompts were answered.
    pub(super) fn prompts(&self) -> usize {
        self.prompts
    }

    /// Adds an answer's samples that have ended.
    pub(super) fn add(&mut self, answer: &Answer) {
        self.prompts += 1;
        self.prompt_tokens += answer.prompt_ids.len() as u64;
        for usage in answer.samples.iter().filter_map(|s| s.end.map(|(_, usage)| usage)) {
            self.samples += 1;
            self.new_tokens += u64::from(usage.completion_tokens);
            if usage.completion_tokens == 0 {
                continue;
            }
            self.begun += 1;
            self.first_token_s += usage.first_token_s;
            self.prefill_s += usage.first_token_s - usage.queued_s;
            self.decode_s += usage.total_s - usage.first_token_s;
        }
    }
}

/// Tokens a second; `None` where no time has passed.
pub(super) fn rate(tokens: u64, seconds: f64) -> Option<f64> {
    (seconds > 0.0).then(|| tokens as f64 / seconds)
}

/// What a run took, as a whole and stage by stage. Rates are of the one sample, or, of several that share
/// the pipeline, of all together.
pub(super) fn report(totals: &Totals, wall: Duration, before: &EngineStats, after: &EngineStats) -> String {
    let number = |rate: Option<f64>| rate.map_or("-".into(), |r| format!("{r:.1}"));
    let mut rows = vec![
        vec!["prompt tokens".into(), totals.prompt_tokens.to_string()],
        vec!["new tokens".into(), totals.new_tokens.to_string()],
    ];
    let first = totals.first_token_s / totals.begun.max(1) as f64;
    if totals.samples > 1 {
        rows.insert(0, vec!["prompts".into(), totals.prompts.to_string()]);
        rows.insert(1, vec!["answers".into(), totals.samples.to_string()]);
        rows.push(vec!["time to first token, mean".into(), seconds(first)]);
        rows.push(vec!["time".into(), seconds(wall.as_secs_f64())]);
        rows.push(vec!["new tokens/s, together".into(), number(rate(totals.new_tokens, wall.as_secs_f64()))]);
    } else {
        let decoded = totals.new_tokens.saturating_sub(1);
        rows.push(vec!["time to first token".into(), seconds(first)]);
        rows.push(vec!["prompt tokens/s".into(), number(rate(totals.prompt_tokens, totals.prefill_s))]);
        rows.push(vec!["decode tokens/s".into(), number(rate(decoded, totals.decode_s))]);
    }
    let mut of_stages = stages(&before.stages, &after.stages);
    // Those of the tower, without a heading of their own.
    for mut row in stages(&before.vision, &after.vision).into_iter().skip(1) {
        row[0].insert(0, 'v');
        of_stages.push(row);
    }
    format!("{}\n{}", columns(&rows), columns(&of_stages))
}

/// A time in its unit.
pub(super) fn seconds(s: f64) -> String {
    match s {
        s if s < 1e-4 => format!("{:.3} ms", 1e3 * s),
        s if s < 1.0 => format!("{:.1} ms", 1e3 * s),
        _ => format!("{s:.2} s"),
    }
}

/// How a stage spent its time, each as a share of all of it.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize)]
pub(super) struct Shares {
    busy: f64,
    copying: f64,
    waiting_for_input: f64,
    waiting_for_room: f64,
    waiting_for_device: f64,
}

impl Shares {
    /// Between two moments; `None` if no time has passed.
    pub(super) fn between(was: &StageTimes, now: &StageTimes) -> Option<Shares> {
        let times = [
            now.busy - was.busy,
            now.copy - was.copy,
            now.wait_input - was.wait_input,
            now.wait_output - was.wait_output,
            now.wait_device - was.wait_device,
        ]
        .map(|time| time.as_secs_f64());
        let all: f64 = times.iter().sum();
        let [busy, copying, waiting_for_input, waiting_for_room, waiting_for_device] = times.map(|t| t / all);
        let shares = Shares { busy, copying, waiting_for_input, waiting_for_room, waiting_for_device };
        (all > 0.0).then_some(shares)
    }

    fn cells(shares: Option<Shares>) -> Vec<String> {
        let Some(s) = shares else { return vec!["-".into(); 5] };
        let shares = [s.busy, s.copying, s.waiting_for_input, s.waiting_for_room, s.waiting_for_device];
        shares.map(|share| format!("{:.0}%", 100.0 * share)).to_vec()
    }
}

/// A row a stage: what it did between the two moments.
pub(super) fn stages(before: &[StageStats], after: &[StageStats]) -> Vec<Vec<String>> {
    let head = [
        "stage",
        "device",
        "layers",
        "weights MB",
        "busy",
        "copying",
        "waits: in",
        "out",
        "device",
        "batches",
    ];
    let mut rows = vec![head.map(String::from).to_vec()];
    for (i, (was, is)) in before.iter().zip(after).enumerate() {
        let megabytes = format!("{:.1}", is.weight_bytes as f64 / 1e6);
        let mut row = vec![i.to_string(), is.device.clone(), is.layers.clone(), megabytes];
        row.extend(Shares::cells(Shares::between(&was.times, &is.times)));
        row.push((is.times.batches - was.times.batches).to_string());
        rows.push(row);
    }
    rows
}

/// Rows as aligned columns: the first column to the left, the others to the right.
pub(super) fn columns(rows: &[Vec<String>]) -> String {
    let count = rows.iter().map(Vec::len).max().unwrap_or(0);
    let widths: Vec<usize> = (0..count)
        .map(|c| rows.iter().filter_map(|r| r.get(c)).map(|s| s.chars().count()).max().unwrap_or(0))
        .collect();
    let mut text = String::new();
    for row in rows {
        for (c, (cell, &width)) in row.iter().zip(&widths).enumerate() {
            let _ = match c {
                0 => write!(text, "{cell:<width$}"),
                _ => write!(text, "  {cell:>width$}"),
            };
        }
        text.truncate(text.trim_end().len());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::request::{FinishReason, Usage};

    #[test]
    fn columns_are_aligned() {
        let row = |cells: &[&str]| cells.iter().map(|c| (*c).to_owned()).collect::<Vec<_>>();
        let text = columns(&[row(&["a", "layers"]), row(&["long", "1"]), row(&["é", "22"])]);
        assert_eq!(text, "a     layers\nlong       1\né         22\n");
    }

    fn stage(busy: u64, wait_input: u64) -> StageStats {
        let times = StageTimes {
            busy: Duration::from_secs(busy),
            wait_input: Duration::from_secs(wait_input),
            ..StageTimes::default()
        };
        StageStats {
            device: "cpu".into(),
            layers: "0-1".into(),
            weight_bytes: 1_500_000,
            kv_bytes: 0,
            memory: None,
            times,
        }
    }

    fn stats(stages: Vec<StageStats>, vision: Vec<StageStats>) -> EngineStats {
        EngineStats {
            stages,
            vision,
            scheduler: crate::schedule::Scheduler::new(
                Default::default(),
                crate::schedule::BlockPool::new(1),
            )
            .stats(),
            dropped: 0,
            requests_waiting: 0,
            rebuilds: 0,
            relayouts: 0,
        }
    }

    #[test]
    fn a_sample_without_tokens_has_no_times() {
        let usage =
            Usage { prompt_tokens: 4, completion_tokens: 0, queued_s: 0.5, first_token_s: 0.0, total_s: 0.7 };
        let mut answer = Answer::new(vec![1, 2, 3, 4], 1);
        answer.samples[0].end = Some((FinishReason::Cancelled, usage));
        let mut totals = Totals::default();
        totals.add(&answer);
        assert_eq!((totals.samples, totals.begun), (1, 0));
        assert_eq!((totals.first_token_s, totals.prefill_s, totals.decode_s), (0.0, 0.0, 0.0));
    }

    #[test]
    fn the_report_counts_the_run_alone() {
        let usage = Usage {
            prompt_tokens: 4,
            completion_tokens: 11,
            queued_s: 0.1,
            first_token_s: 0.3,
            total_s: 1.3,
        };
        let mut answer = Answer::new(vec![1, 2, 3, 4], 1);
        answer.samples[0].end = Some((FinishReason::Stop, usage));
        let mut totals = Totals::default();
        totals.add(&answer);
        let wall = Duration::from_secs(2);
        let tower = || StageStats { layers: "v0-31".into(), ..stage(3, 6) };
        let none = stats(Vec::new(), Vec::new());
        let text = report(
            &totals,
            wall,
            &stats(vec![stage(1, 5)], vec![stage(1, 4)]),
            &stats(vec![stage(4, 6)], vec![tower()]),
        );
        assert!(text.contains("v0-31         1.5   50%"), "{text}");
        let words: Vec<Vec<&str>> = text.lines().map(|l| l.split_whitespace().collect()).collect();
        for row in
            ["prompt tokens 4", "new tokens 11", "time to first token 300.0 ms", "prompt tokens/s 20.0"]
        {
            assert!(words.contains(&row.split(' ').collect()), "{row}\n{text}");
        }
        assert!(words.contains(&vec!["decode", "tokens/s", "10.0"]), "{text}");
        assert!(
            words.contains(&vec!["0", "cpu", "0-1", "1.5", "75%", "0%", "25%", "0%", "0%", "0"]),
            "{text}"
        );
        totals.add(&answer);
        let text = report(&totals, wall, &none, &none);
        assert!(text.contains("answers") && text.contains(" 11.0"), "{text}");
    }
}

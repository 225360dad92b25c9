//! How full the pipeline was: the bubble and the imbalance, in the steady phase and over whole runs.

use std::ops::RangeInclusive;

use serde::Serialize;

use super::record::Record;
use crate::pipeline::StageSpan;

/// What the stages did in a phase, all runs together.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct Phase {
    /// Which it is: `decode`, `prompts` or `whole run`.
    name: &'static str,
    /// Steps of it.
    steps: u64,
    /// Those that the slowest stage was measured for.
    measured: usize,
    /// Idle share of the slowest stage.
    bubble: f64,
    /// 1 - mean / slowest of the times that stages need.
    imbalance: f64,
    /// The stage that needs most time.
    slowest: usize,
    /// As shares of the phase's time.
    stages: Vec<StageShares>,
}

#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
struct StageShares {
    busy: f64,
    copying: f64,
    waiting_for_room: f64,
    /// The rest: for a device that it shares, too.
    waiting_for_input: f64,
}

/// A stage's sums, in seconds.
#[derive(Debug, Clone, Copy, Default)]
struct Sums {
    steps: u64,
    measured: usize,
    time: f64,
    busy: f64,
    copy: f64,
    room: f64,
}

impl Phase {
    /// All requests run and none has ended: from the first step after the last prompt's to the first one that a sequence
    /// ended with. Where each request has one token alone: from when all stages have begun until the first one has
    /// nothing more to do. `None` if there was no such time, or nothing was measured in it. Runs are given with their
    /// seconds.
    pub(super) fn steady(runs: &[(&Record, f64)], stages: usize, decodes: bool) -> Option<Phase> {
        let mut sums = vec![Sums::default(); stages];
        for &(record, _) in runs {
            for (stage, sums) in sums.iter_mut().enumerate() {
                let spans = of_stage(record, stage);
                let within: Vec<&StageSpan> = match decodes {
                    true => {
                        let Some(steps) = decode(record) else { continue };
                        spans.filter(|span| steps.contains(&span.step)).collect()
                    }
                    false => {
                        let (from, to) = full(record, stages)?;
                        spans
                            .filter(|span| from <= span.began.as_secs_f64() && span.ended.as_secs_f64() <= to)
                            .collect()
                    }
                };
                sums.add_cycles(&within);
            }
        }
        Phase::of(if decodes { "decode" } else { "prompts" }, &sums)
    }

    /// From submitting the first request to the end of the last.
    pub(super) fn whole(runs: &[(&Record, f64)], stages: usize) -> Option<Phase> {
        let mut sums = vec![Sums::default(); stages];
        for &(record, time) in runs {
            let Some((first, last)) = record.steps else { continue };
            for (stage, sums) in sums.iter_mut().enumerate() {
                let spans: Vec<&StageSpan> = of_stage(record, stage).collect();
                sums.add(&spans, last - first + 1, time);
            }
        }
        Phase::of("whole run", &sums)
    }

    /// As a table's row.
    pub(super) fn row(&self) -> Vec<String> {
        let percent = |share: f64| format!("{:.1}%", 100.0 * share);
        let (steps, measured) = (self.steps.to_string(), self.measured.to_string());
        let slowest = format!("stage {}", self.slowest);
        vec![self.name.into(), percent(self.bubble), percent(self.imbalance), slowest, steps, measured]
    }

    fn of(name: &'static str, sums: &[Sums]) -> Option<Phase> {
        // Per step: stages may have been measured over a step more or less.
        let taken = |s: &Sums| (s.busy + s.copy) / s.steps as f64;
        if sums.iter().any(|s| s.steps == 0 || s.time <= 0.0) {
            return None;
        }
        let mean = sums.iter().map(taken).sum::<f64>() / sums.len() as f64;
        let (slowest, most) = sums.iter().enumerate().max_by(|a, b| taken(a.1).total_cmp(&taken(b.1)))?;
        let shares = |s: &Sums| {
            let [busy, copying, waiting_for_room] = [s.busy, s.copy, s.room].map(|time| time / s.time);
            let waiting_for_input = (1.0 - busy - copying - waiting_for_room).max(0.0);
            StageShares { busy, copying, waiting_for_room, waiting_for_input }
        };
        Some(Phase {
            name,
            steps: most.steps,
            measured: most.measured,
            bubble: 1.0 - (most.busy + most.copy) / most.time,
            imbalance: 1.0 - mean / taken(most),
            slowest,
            stages: sums.iter().map(shares).collect(),
        })
    }
}

impl Sums {
    /// Adds as many cycles as lie between the first and the last of a stage's spans: a step, and the time up to the next.
    fn add_cycles(&mut self, spans: &[&StageSpan]) {
        let [first, .., last] = spans else { return };
        let time = (last.began - first.began).as_secs_f64();
        self.add(&spans[..spans.len() - 1], last.step - first.step, time);
    }

    /// Adds so many steps in that time, of which these were measured.
    fn add(&mut self, spans: &[&StageSpan], steps: u64, time: f64) {
        let weight: f64 = spans.iter().map(|span| span.weight).sum();
        if weight == 0.0 {
            return;
        }
        let total = |of: fn(&StageSpan) -> std::time::Duration| {
            let sum: f64 = spans.iter().map(|span| span.weight * of(span).as_secs_f64()).sum();
            sum / weight * steps as f64
        };
        self.busy += total(StageSpan::busy);
        self.copy += total(|span| span.copy);
        self.room += total(|span| span.wait_output);
        self.time += time;
        self.steps += steps;
        self.measured += spans.len();
    }
}

fn of_stage(record: &Record, stage: usize) -> impl Iterator<Item = &StageSpan> {
    record.spans.iter().filter(move |span| span.stage == stage)
}

fn decode(record: &Record) -> Option<RangeInclusive<u64>> {
    Some(record.last_prompt? + 1..=record.first_end?)
}

/// From when all stages have begun to the end of the first stage's last step, in seconds.
fn full(record: &Record, stages: usize) -> Option<(f64, f64)> {
    let begins = (0..stages).map(|stage| of_stage(record, stage).next().map(|span| span.began));
    let from = begins.collect::<Option<Vec<_>>>()?.into_iter().max()?;
    let to = of_stage(record, 0).map(|span| span.ended).max()?;
    Some((from.as_secs_f64(), to.as_secs_f64()))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::pipeline::Work;

    /// A step every 10 ms; stage 1 begins when stage 0 has ended, and needs 8 ms of them, 1 to copy.
    fn record(measured: impl Fn(u64) -> Option<f64>) -> Record {
        let ms = Duration::from_millis;
        let mut record = Record { steps: Some((100, 199)), ..Record::default() };
        for step in 100..200 {
            let Some(weight) = measured(step) else { continue };
            for (stage, (begins, takes, copy)) in [(0, (0, 4, 0)), (1, (4, 8, 1))] {
                let began = ms(10 * step + begins);
                let span = StageSpan {
                    stage,
                    step,
                    began,
                    computed: began + ms(takes),
                    ended: began + ms(takes),
                    copy: ms(copy),
                    wait_output: Duration::ZERO,
                    wait_input: None,
                    weight,
                    work: Work::default(),
                };
                record.spans.push(span);
            }
        }
        record
    }

    fn near(is: f64, want: f64) {
        assert!((is - want).abs() < 1e-9, "{is}, not {want}");
    }

    #[test]
    fn the_bubble_is_what_the_slowest_stage_has_nothing_to_do() {
        for measured in [|_| Some(1.0), |step| (step % 17 < 2).then_some(8.5)] {
            let mut record = record(measured);
            assert_eq!(Phase::steady(&[(&record, 1.0)], 2, true), None);
            (record.last_prompt, record.first_end) = (Some(110), Some(180));
            let phase = Phase::steady(&[(&record, 1.0)], 2, true).unwrap();
            assert_eq!((phase.name, phase.slowest), ("decode", 1));
            near(phase.bubble, 0.2);
            near(phase.imbalance, 0.25);
            near(phase.stages[1].busy, 0.7);
            near(phase.stages[1].copying, 0.1);
            near(phase.stages[0].waiting_for_input, 0.6);
        }
    }

    #[test]
    fn prompts_are_steady_when_all_stages_have_begun() {
        let phase = Phase::steady(&[(&record(|_| Some(1.0)), 1.0)], 2, false).unwrap();
        near(phase.bubble, 0.2);
        assert!(phase.steps >= 97);
    }

    #[test]
    fn a_whole_run_has_its_ends_too() {
        let record = record(|_| Some(1.0));
        let phase = Phase::whole(&[(&record, 1.6), (&record, 1.6)], 2).unwrap();
        assert_eq!((phase.steps, phase.measured), (200, 200));
        near(phase.bubble, 0.5);
        near(phase.imbalance, 0.25);
    }
}

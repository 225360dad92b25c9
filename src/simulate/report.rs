//! What a run comes to.

use serde::Serialize;

use super::{Nanos, Trace};

/// Figures of a run.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    /// From the first request's submission to the last one's end.
    pub seconds: f64,
    /// Over that time.
    pub output_tokens_per_s: f64,
    /// Over that time.
    pub prompt_tokens_per_s: f64,
    /// Of all steps.
    pub steps: usize,
    /// Of all steps.
    pub rows: usize,
    /// The idle share of the device with most busy time, at [steady state](Report::steady_s).
    pub bubble: f64,
    /// From when to when the pipeline is at steady state, in seconds after the first request's submission: it begins when
    /// the last stage begins its first step, and ends when the first stage ends its last one or when fewer requests are
    /// left than slots, none of them still to come. All of the run, if that is no time.
    pub steady_s: (f64, f64),
    /// At steady state, 1 − the devices' mean busy time ÷ the most.
    pub imbalance: f64,
    /// The same while all decode; none if there is no such time.
    pub decode: Option<DecodeReport>,
    /// From submission to the first token.
    pub ttft_ms: Option<Percentiles>,
    /// From a token to the same request's next one.
    pub itl_ms: Option<Percentiles>,
    /// The longest time between tokens ÷ the median.
    pub longest_gap: Option<f64>,
    /// Each stage.
    pub stages: Vec<StageReport>,
}

/// While every request decodes: from when the last one has its first token to when the first one has ended. It is the phase that
/// `bench throughput` measures in.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct DecodeReport {
    /// The idle share of the device with most busy time.
    pub bubble: f64,
    /// 1 − the devices' mean busy time ÷ the most.
    pub imbalance: f64,
}

/// A stage's part.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct StageReport {
    /// In all.
    pub busy_s: f64,
    /// The share of the whole run.
    pub busy: f64,
    /// The share of steady state that it is not busy; another stage of its device may be.
    pub bubble: f64,
}

/// Of many times.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Percentiles {
    /// Their mean.
    pub mean: f64,
    /// Half are no longer.
    pub median: f64,
    /// Nine of ten are no longer.
    pub p90: f64,
    /// All but one in a hundred are no longer.
    pub p99: f64,
    /// The longest.
    pub max: f64,
}

impl Report {
    /// The figures of a run in which every request has ended.
    pub fn of(trace: &Trace) -> Report {
        let came = trace.answers.iter().map(|a| a.came).min().unwrap_or(0);
        let ended = trace.answers.iter().filter_map(|a| Some(a.end?.0)).max().unwrap_or(came);
        let took = seconds(ended - came);
        let (from, until) = steady(trace).unwrap_or((came, ended));
        let stages = trace.devices.len();
        let of_run = of_stages(trace, 0, Nanos::MAX);
        let at_steady = of_stages(trace, from, until);
        let (most, mean) = of_devices(trace, &at_steady);
        let first = |a: &super::Answer| Some(millis(a.tokens.first()? - a.came));
        let gaps = trace.answers.iter().flat_map(|a| a.tokens.windows(2)).map(|w| millis(w[1] - w[0]));
        let itl_ms = Percentiles::of(gaps.collect());
        let tokens: usize = trace.answers.iter().map(|a| a.tokens.len()).sum();
        let stage = |stage: usize| StageReport {
            busy_s: of_run[stage],
            busy: share(of_run[stage], took),
            bubble: 1.0 - share(at_steady[stage], seconds(until - from)),
        };
        Report {
            seconds: took,
            output_tokens_per_s: share(tokens as f64, took),
            prompt_tokens_per_s: share(trace.answers.iter().map(|a| a.prompt as f64).sum(), took),
            steps: trace.steps.len(),
            rows: trace.steps.iter().map(|s| s.rows).sum(),
            bubble: 1.0 - share(most, seconds(until - from)),
            steady_s: (seconds(from - came), seconds(until - came)),
            imbalance: 1.0 - share(mean, most),
            decode: DecodeReport::of(trace),
            ttft_ms: Percentiles::of(trace.answers.iter().filter_map(first).collect()),
            itl_ms,
            longest_gap: itl_ms.filter(|gaps| gaps.median > 0.0).map(|gaps| gaps.max / gaps.median),
            stages: (0..stages).map(stage).collect(),
        }
    }
}

impl DecodeReport {
    fn of(trace: &Trace) -> Option<DecodeReport> {
        let first = trace.answers.iter().map(|a| a.tokens.first().copied());
        let from = first.collect::<Option<Vec<_>>>()?.into_iter().max()?;
        let until = trace.answers.iter().filter_map(|a| Some(a.end?.0)).min()?;
        // Whole cycles of a stage, from a pass to a later one, or what a window cuts off would count.
        let cycles = |stage: usize| {
            let begins = trace.steps.iter().filter_map(|step| Some(step.passes.get(stage)?.0));
            let within: Vec<Nanos> = begins.filter(|begin| (from..=until).contains(begin)).collect();
            let (&from, &until) = (within.first()?, within.last()?);
            (from < until).then_some((from, until))
        };
        let shares = (0..trace.devices.len()).map(|stage| {
            let (from, until) = cycles(stage)?;
            Some(share(seconds(busy(trace, stage, from, until)), seconds(until - from)))
        });
        let (most, mean) = of_devices(trace, &shares.collect::<Option<Vec<_>>>()?);
        Some(DecodeReport { bubble: 1.0 - most, imbalance: 1.0 - share(mean, most) })
    }
}

impl Percentiles {
    /// By nearest rank; `None` of none.
    pub fn of(mut times: Vec<f64>) -> Option<Percentiles> {
        times.sort_by(f64::total_cmp);
        let rank = |share: f64| times[((share * times.len() as f64).ceil() as usize).max(1) - 1];
        Some(Percentiles {
            max: *times.last()?,
            mean: times.iter().sum::<f64>() / times.len() as f64,
            median: rank(0.5),
            p90: rank(0.9),
            p99: rank(0.99),
        })
    }
}

/// From when to when the pipeline is at steady state; `None` if it never is.
fn steady(trace: &Trace) -> Option<(Nanos, Nanos)> {
    let full = trace.steps.iter().find_map(|step| step.passes.get(trace.devices.len() - 1))?.0;
    let last_begun = trace.steps.iter().rev().find_map(|step| step.passes.first())?.1;
    let mut ends: Vec<Nanos> = trace.answers.iter().filter_map(|a| Some(a.end?.0)).collect();
    ends.sort_unstable();
    // With this end, fewer are left than slots. All had come before, as those left ended later.
    let fewer = ends.len().checked_sub(trace.slots).map(|left| ends[left])?;
    let last_came = trace.answers.iter().map(|a| a.came).max()?;
    let until = last_begun.min(fewer.max(last_came));
    (full < until).then_some((full, until))
}

/// How long each stage is busy between two moments, in seconds.
fn of_stages(trace: &Trace, from: Nanos, until: Nanos) -> Vec<f64> {
    (0..trace.devices.len()).map(|stage| seconds(busy(trace, stage, from, until))).collect()
}

/// The most and the mean of what the devices' stages come to together.
fn of_devices(trace: &Trace, stages: &[f64]) -> (f64, f64) {
    let mut devices = vec![None; 1 + trace.devices.iter().max().copied().unwrap_or(0)];
    for (&device, busy) in trace.devices.iter().zip(stages) {
        *devices[device].get_or_insert(0.0) += busy;
    }
    let devices: Vec<f64> = devices.into_iter().flatten().collect();
    (devices.iter().copied().fold(0.0, f64::max), devices.iter().sum::<f64>() / devices.len() as f64)
}

/// How long a stage is busy between two moments.
fn busy(trace: &Trace, stage: usize, from: Nanos, until: Nanos) -> Nanos {
    let passes = trace.steps.iter().filter_map(|step| step.passes.get(stage));
    passes.map(|&(begin, end)| end.min(until).saturating_sub(begin.max(from))).sum()
}

fn seconds(time: Nanos) -> f64 {
    time as f64 / 1e9
}

fn millis(time: Nanos) -> f64 {
    time as f64 / 1e6
}

/// Of nothing, no part.
fn share(part: f64, whole: f64) -> f64 {
    if whole > 0.0 { part / whole } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simulate::{Answer, End, StepTrace};

    fn step(passes: &[(Nanos, Nanos)]) -> StepTrace {
        StepTrace { sent: 0, rows: 1, passes: passes.to_vec() }
    }

    fn answer(tokens: &[Nanos]) -> Answer {
        let end = tokens.last().map(|&at| (at, End::Done));
        Answer { came: 0, prompt: 3, tokens: tokens.to_vec(), end }
    }

    /// The first stage needs 2, the second 3: of every 3, the first idles 1.
    #[test]
    fn the_bubble_is_the_busiest_stages_between_filling_and_draining() {
        let steps = (0..10).map(|i| step(&[(3 * i, 3 * i + 2), (3 * i + 3, 3 * i + 6)])).collect();
        let answers = vec![answer(&[6, 12, 18, 24, 30]), answer(&[9, 15, 21, 27, 33])];
        let trace = Trace { steps, answers, devices: vec![0, 1], slots: 2 };
        let report = Report::of(&trace);
        // From the second stage's begin to the first one's end, when two requests are left.
        assert_eq!(report.steady_s, (3e-9, 29e-9));
        assert_eq!(report.bubble, 0.0);
        assert!((report.stages[0].bubble - (1.0 - 18.0 / 26.0)).abs() < 1e-9, "{report:?}");
        assert!((report.imbalance - (1.0 - 22.0 / 26.0)).abs() < 1e-9, "{report:?}");
        assert!((report.stages[1].busy - 30.0 / 33.0).abs() < 1e-9, "{report:?}");
        assert_eq!((report.steps, report.longest_gap), (10, Some(1.0)));
        assert!((report.output_tokens_per_s - 10.0 / 33e-9).abs() < 1.0);
        // On one device, there is no bubble and no imbalance but for what both leave.
        let shared = Report::of(&Trace { devices: vec![0, 0], ..trace.clone() });
        assert_eq!(shared.imbalance, 0.0);
        // With more slots than requests it never is at steady state.
        let never = Report::of(&Trace { slots: 3, ..trace });
        assert_eq!(never.steady_s, (0.0, 33e-9));
        assert!((never.bubble - 3.0 / 33.0).abs() < 1e-9, "{never:?}");
    }

    /// The first stage takes longer for prompts, which decoding knows nothing of.
    #[test]
    fn what_all_decode_in_is_a_phase_of_its_own() {
        let pass = |i: Nanos| if i < 4 { (10 * i, 10 * i + 9) } else { (40 + 4 * i, 40 + 4 * i + 3) };
        let steps: Vec<StepTrace> = (0..20).map(|i| step(&[pass(i), (pass(i).1, pass(i).1 + 1)])).collect();
        let answers = vec![answer(&[12, 60, 80, 100]), answer(&[52, 70, 90, 110])];
        let trace = Trace { steps, answers, devices: vec![0, 1], slots: 2 };
        let decode = Report::of(&trace).decode.unwrap();
        assert!((decode.bubble - 0.25).abs() < 1e-9, "{decode:?}");
        assert!((decode.imbalance - (1.0 - 0.5 / 0.75)).abs() < 1e-9, "{decode:?}");
        let one_token = Trace { answers: vec![answer(&[12]), answer(&[52])], ..trace };
        assert_eq!(Report::of(&one_token).decode, None);
    }

    #[test]
    fn percentiles_are_by_rank() {
        let of = Percentiles::of((1..=200).rev().map(f64::from).collect()).unwrap();
        assert_eq!(of, Percentiles { mean: 100.5, median: 100.0, p90: 180.0, p99: 198.0, max: 200.0 });
        assert_eq!(Percentiles::of(Vec::new()), None);
    }
}

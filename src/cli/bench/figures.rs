//! What came of the runs, as JSON or as tables.

use serde::Serialize;

use super::{
    late::LatePrompt,
    phases::Phase,
    record::{Gap, Queues, Record},
    spread::Spread,
    throughput::Workload,
};
use crate::{
    backend::{cpu, cuda},
    cli::{
        loading::{Loaded, Speed},
        table::{Shares, columns, seconds, stages},
    },
    engine::{Engine, EngineStats, StageStats},
    layout::Device,
    request::Usage,
    schedule::StageCost,
};

/// One run over the workload.
pub(super) struct Run {
    /// From submitting the first request to the end of the last.
    pub(super) seconds: f64,
    /// What each request took.
    pub(super) usages: Vec<Usage>,
    /// And the one that came later.
    pub(super) late: Option<Usage>,
    /// What the engine told.
    pub(super) record: Record,
}

/// All figures, in the order of the JSON object.
#[derive(Debug, Serialize)]
pub(super) struct Figures {
    workload: Workload,
    layout: String,
    devices: Vec<Named>,
    dtype: &'static str,
    /// Of each run.
    seconds: Vec<f64>,
    output_tokens_per_s: Rate,
    prompt_tokens_per_s: Rate,
    total_tokens_per_s: Rate,
    requests_per_s: Rate,
    /// From a request's submission to its first token.
    ttft_ms: Spread,
    /// Between a request's tokens after the first, its mean; none if there is one token alone.
    tpot_ms: Option<Spread>,
    /// Between two tokens of a request, each by itself.
    itl_ms: Option<Spread>,
    /// The longest of them over the median.
    gap_max_over_median: Option<f64>,
    /// With `--then-input-len`.
    late_prompt: Option<LatePrompt>,
    pipeline: Pipeline,
    scheduler: SchedulerFigures,
    /// What each stage's time is made of, in seconds; none where the runs did not tell.
    costs: Option<Vec<StageCost>>,
    /// If there are any, the figures that follow from measurements have gaps.
    dropped_measurements: u64,
    load_seconds: f64,
    /// Of the weights alone; none where they are used as the file has them.
    load_gb_per_s: Option<f64>,
    weight_bytes: usize,
    kv_tokens: usize,
    stages: Vec<StageFigures>,
}

#[derive(Debug, PartialEq, Serialize)]
struct Named {
    device: String,
    name: String,
}

/// Of the median run and the best one.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
struct Rate {
    median: f64,
    best: f64,
}

/// How full the stages were.
#[derive(Debug, Serialize)]
struct Pipeline {
    steady: Option<Phase>,
    whole: Option<Phase>,
}

/// Over all runs.
#[derive(Debug, Serialize)]
struct SchedulerFigures {
    in_flight_mean: f64,
    #[serde(flatten)]
    queues: Queues,
    prefix_lookup_tokens: u64,
    prefix_hit_tokens: u64,
    preemptions: u64,
}

/// A stage, over all runs.
#[derive(Debug, Serialize)]
struct StageFigures {
    device: String,
    layers: String,
    weight_bytes: usize,
    kv_bytes: usize,
    /// All else that was taken of its GPU's memory.
    buffer_bytes: Option<usize>,
    /// What the whole GPU has in use at the end, less what it had before the engine was built (its context included).
    device_bytes_peak: Option<usize>,
    #[serde(flatten)]
    shares: Shares,
    batches: u64,
    rows: u64,
}

impl Figures {
    /// The figures of an engine's runs; `before` is from the moment when the first began.
    pub(super) fn new(
        workload: Workload,
        engine: &Engine,
        loaded: Loaded,
        runs: &[Run],
        before: &EngineStats,
    ) -> Figures {
        let after = engine.stats();
        let stats = &after.stages;
        let on_gpu = engine.layout().stages().iter().any(|stage| stage.device != Device::Cpu);
        let requests = f64::from(workload.requests);
        let (late, late_input) = (workload.then_input_len.map_or(0.0, |_| 1.0), workload.then_input_len);
        let input = requests * f64::from(workload.input_len) + late_input.map_or(0.0, f64::from);
        let output = requests * f64::from(workload.output_len) + late;
        let spread = |ms: fn(&Usage) -> f64| Spread::of(runs.iter().flat_map(|r| &r.usages).map(ms));
        let itl_ms = Spread::counted(runs.iter().flat_map(|r| &r.record.gaps).map(Gap::ms).collect());
        Figures {
            workload,
            layout: engine.layout().to_string(),
            devices: devices(engine),
            dtype: engine.dtype().name(),
            seconds: runs.iter().map(|r| r.seconds).collect(),
            output_tokens_per_s: Rate::of(output, runs),
            prompt_tokens_per_s: Rate::of(input, runs),
            total_tokens_per_s: Rate::of(input + output, runs),
            requests_per_s: Rate::of(requests + late, runs),
            ttft_ms: spread(|usage| 1e3 * usage.first_token_s)
                .expect("a run without requests; this is a bug"),
            tpot_ms: if workload.output_len > 1 { spread(per_token_ms) } else { None },
            itl_ms,
            gap_max_over_median: itl_ms.map(|spread| spread.max / spread.median),
            late_prompt: late_input.map(|input_len| late_prompt(input_len, runs)),
            pipeline: Pipeline::of(runs, stats.len(), workload.output_len > 1),
            scheduler: SchedulerFigures::of(runs, before, &after),
            costs: runs.last().and_then(|run| run.record.costs.costs()),
            dropped_measurements: after.dropped - before.dropped,
            load_seconds: loaded.took.as_secs_f64(),
            load_gb_per_s: loaded.weights.filter(|_| on_gpu).and_then(Speed::gb_per_s),
            weight_bytes: stats.iter().map(|s| s.weight_bytes).sum(),
            kv_tokens: engine.kv_tokens(),
            stages: before.stages.iter().zip(stats).map(|(was, is)| StageFigures::new(was, is)).collect(),
        }
    }

    /// One object on one line.
    pub(super) fn json(&self) -> String {
        let text = serde_json::to_string(self).expect("plain data becomes JSON; this is a bug");
        text + "\n"
    }

    /// For people. `before` and `after` are from when the first run began and the last one ended.
    pub(super) fn table(&self, before: &[StageStats], after: &[StageStats]) -> String {
        let Workload { requests, input_len, output_len, .. } = self.workload;
        let mut what: Vec<Vec<String>> =
            self.devices.iter().map(|d| vec![d.device.clone(), d.name.clone()]).collect();
        what.extend([
            vec!["requests at once".into(), requests.to_string()],
            vec!["prompt tokens, each".into(), input_len.to_string()],
            vec!["new tokens, each".into(), output_len.to_string()],
            vec!["type".into(), self.dtype.into()],
            vec!["weights MB".into(), format!("{:.1}", self.weight_bytes as f64 / 1e6)],
            vec!["KV cache, tokens".into(), self.kv_tokens.to_string()],
            vec!["loading".into(), seconds(self.load_seconds)],
        ]);
        what.extend(self.load_gb_per_s.map(|rate| vec!["weights, GB/s".into(), format!("{rate:.1}")]));
        let time = Rate { median: median(&self.seconds), best: least(&self.seconds) };
        let head = |name: String, columns: &[&str]| {
            std::iter::once(name).chain(columns.iter().map(|c| (*c).to_owned())).collect::<Vec<_>>()
        };
        let runs = match self.seconds.len() {
            1 => "1 run".into(),
            n => format!("{n} runs"),
        };
        let rates = [
            head(runs, &["median", "best"]),
            vec!["time".into(), seconds(time.median), seconds(time.best)],
            self.output_tokens_per_s.row("new tokens/s"),
            self.prompt_tokens_per_s.row("prompt tokens/s"),
            self.total_tokens_per_s.row("both, tokens/s"),
            self.requests_per_s.row("requests/s"),
        ];
        let mut latencies = vec![
            head("a request".into(), &["mean", "median", "p90", "p99", "max"]),
            self.ttft_ms.row("time to first token"),
        ];
        latencies.extend(self.tpot_ms.map(|spread| spread.row("time per token after it")));
        latencies.extend(self.itl_ms.map(|spread| spread.row("between two tokens")));
        let mut tables = vec![what, rates.to_vec(), latencies];
        tables.extend(self.late_prompt.map(|late| late.rows()));
        tables.extend(self.pipeline.rows());
        if self.stages.iter().any(|stage| stage.device_bytes_peak.is_some()) {
            tables.push(self.memory());
        }
        tables.push(stages(before, after));
        tables.iter().map(|rows| columns(rows)).collect::<Vec<_>>().join("\n")
    }

    /// What each stage takes of its GPU's memory.
    fn memory(&self) -> Vec<Vec<String>> {
        let megabytes = |bytes: Option<usize>| bytes.map_or("-".into(), |b| format!("{:.1}", b as f64 / 1e6));
        let head = ["memory, MB", "device", "weights", "KV cache", "buffers", "device in use"];
        let mut rows = vec![head.map(String::from).to_vec()];
        for (i, s) in self.stages.iter().enumerate() {
            let taken = [Some(s.weight_bytes), Some(s.kv_bytes), s.buffer_bytes, s.device_bytes_peak];
            let mut row = vec![format!("stage {i}"), s.device.clone()];
            row.extend(taken.map(megabytes));
            rows.push(row);
        }
        rows
    }
}

/// The mean time between tokens. There are at least two.
fn per_token_ms(usage: &Usage) -> f64 {
    1e3 * (usage.total_s - usage.first_token_s) / f64::from(usage.completion_tokens - 1)
}

/// Each device once, with what it is.
fn devices(engine: &Engine) -> Vec<Named> {
    let mut found: Vec<Named> = Vec::new();
    for stage in engine.layout().stages() {
        let name = match stage.device {
            Device::Cpu => cpu::facts().name,
            Device::Cuda(i) => {
                let gpus = cuda::devices().expect("a stage runs on a GPU that is not there; this is a bug");
                gpus[i].name.clone()
            }
        };
        let named = Named { device: stage.device.to_string(), name };
        if !found.contains(&named) {
            found.push(named);
        }
    }
    found
}

impl StageFigures {
    fn new(was: &StageStats, is: &StageStats) -> StageFigures {
        StageFigures {
            device: is.device.clone(),
            layers: is.layers.clone(),
            weight_bytes: is.weight_bytes,
            kv_bytes: is.kv_bytes,
            buffer_bytes: is.buffer_bytes(),
            device_bytes_peak: is.memory.map(|memory| memory.device),
            shares: Shares::between(&was.times, &is.times).unwrap_or_default(),
            batches: is.times.batches - was.times.batches,
            rows: is.times.rows - was.times.rows,
        }
    }
}

impl Rate {
    /// Of runs that each did so much.
    fn of(work: f64, runs: &[Run]) -> Rate {
        let seconds: Vec<f64> = runs.iter().map(|r| r.seconds).collect();
        Rate { median: work / median(&seconds), best: work / least(&seconds) }
    }

    fn row(&self, name: &str) -> Vec<String> {
        vec![name.into(), format!("{:.1}", self.median), format!("{:.1}", self.best)]
    }
}

impl Pipeline {
    fn of(runs: &[Run], stages: usize, decodes: bool) -> Pipeline {
        let records: Vec<(&Record, f64)> = runs.iter().map(|run| (&run.record, run.seconds)).collect();
        Pipeline { steady: Phase::steady(&records, stages, decodes), whole: Phase::whole(&records, stages) }
    }

    fn rows(&self) -> Option<Vec<Vec<String>>> {
        let head = ["pipeline", "bubble", "imbalance", "slowest", "steps", "measured"];
        let phases: Vec<&Phase> = self.steady.iter().chain(&self.whole).collect();
        let rows = || std::iter::once(head.map(String::from).to_vec()).chain(phases.iter().map(|p| p.row()));
        (!phases.is_empty()).then(|| rows().collect())
    }
}

impl SchedulerFigures {
    fn of(runs: &[Run], before: &EngineStats, after: &EngineStats) -> SchedulerFigures {
        let queues = Queues::together(runs.iter().map(|run| run.record.queues));
        let (was, is) = (&before.scheduler, &after.scheduler);
        SchedulerFigures {
            in_flight_mean: queues.in_flight_mean(),
            queues,
            prefix_lookup_tokens: is.prefix_lookup_tokens - was.prefix_lookup_tokens,
            prefix_hit_tokens: is.prefix_hit_tokens - was.prefix_hit_tokens,
            preemptions: is.preemptions - was.preemptions,
        }
    }
}

fn late_prompt(input_len: u32, runs: &[Run]) -> LatePrompt {
    let first_tokens: Vec<f64> = runs.iter().flat_map(|run| run.late).map(|u| u.first_token_s).collect();
    let records: Vec<&Record> = runs.iter().map(|run| &run.record).collect();
    LatePrompt::of(input_len, &first_tokens, &records)
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let n = sorted.len();
    (sorted[(n - 1) / 2] + sorted[n / 2]) / 2.0
}

fn least(values: &[f64]) -> f64 {
    values.iter().copied().fold(f64::INFINITY, f64::min)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_of_the_median_and_of_the_best_run() {
        let runs = [4.0, 1.0, 2.0].map(|seconds| Run {
            seconds,
            usages: Vec::new(),
            late: None,
            record: Record::default(),
        });
        assert_eq!(Rate::of(8.0, &runs), Rate { median: 4.0, best: 8.0 });
        assert_eq!(Rate::of(8.0, &runs[..2]), Rate { median: 3.2, best: 8.0 });
    }

    #[test]
    fn the_time_per_token_leaves_the_first_out() {
        let usage = Usage { completion_tokens: 5, first_token_s: 1.0, total_s: 3.0, ..Usage::default() };
        assert_eq!(per_token_ms(&usage), 500.0);
    }
}

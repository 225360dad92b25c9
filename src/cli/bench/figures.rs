//! What came of the runs: all figures, in the order of the JSON object.

use serde::Serialize;

use super::{
    goodput::{Goodput, Limit, per_token_ms},
    late::LatePrompt,
    limits::{self, AllDone},
    phases::Phase,
    record::{Gap, Queues, Record},
    results::Point,
    session::{Measured, Run, Session},
    spread::{Spread, median},
    tower::{ImageFigures, rate_of_run},
    uses::{Energy, HostCpu, KvUse, Totals},
    workload::Workload,
};
use crate::{
    backend::{cpu, cuda},
    cli::{loading::Speed, setup::Setup, table::Shares},
    engine::{Comparison, Engine, EngineStats, StageStats},
    layout::{Device, Layout},
    schedule::StageCost,
};

/// What was measured, as far as the runs do not tell.
pub(super) struct Subject<'a> {
    /// The measurement's name.
    pub(super) bench: &'static str,
    pub(super) setup: &'a Setup,
    pub(super) workload: &'a Workload,
    /// Within which requests are served well.
    pub(super) good: &'a [Limit],
}

/// All figures, in the order of the JSON object.
#[derive(Debug, Serialize)]
pub(super) struct Figures {
    bench: &'static str,
    /// The same work on as many stages has the same one: `7b/256x512x256/s4`.
    pub(super) id: String,
    pub(super) workload: Workload,
    settings: Settings,
    layout: String,
    pub(super) devices: Vec<Named>,
    pub(super) dtype: &'static str,
    /// Of each run.
    pub(super) seconds: Vec<f64>,
    /// Of each run, for how far they are apart.
    runs: Vec<RunFigures>,
    pub(super) output_tokens_per_s: Rate,
    pub(super) prompt_tokens_per_s: Rate,
    pub(super) total_tokens_per_s: Rate,
    pub(super) requests_per_s: Rate,
    /// With `--images`.
    pub(super) images: Option<ImageFigures>,
    pub(super) goodput: Option<Goodput>,
    /// From a request's submission to its first token.
    pub(super) ttft_ms: Spread,
    /// Between a request's tokens after the first, its mean; none if there is one token alone.
    pub(super) tpot_ms: Option<Spread>,
    /// Between two tokens of a request, each by itself.
    pub(super) itl_ms: Option<Spread>,
    /// From a request's submission to its end.
    pub(super) e2el_ms: Spread,
    /// Of the whole batch, run by run.
    pub(super) batch_ms: Spread,
    /// The longest time between two tokens over the median.
    gap_max_over_median: Option<f64>,
    /// With `--then-input-len`.
    pub(super) late_prompt: Option<LatePrompt>,
    pub(super) pipeline: Pipeline,
    /// The time that the devices' limits allow for these passes, over the time that they took.
    pub(super) limit_share: Option<f64>,
    pub(super) kv_use: KvUse,
    pub(super) energy: Option<Energy>,
    pub(super) host_cpu: HostCpu,
    pub(super) host_bytes_peak: Option<usize>,
    pub(super) scheduler: SchedulerFigures,
    /// What each stage's time is made of, in seconds; none where the runs did not tell.
    costs: Option<Vec<StageCost>>,
    /// What stages took for kinds of passes, beside what plans say.
    pub(super) compared: Comparison,
    /// If there are any, the figures that follow from measurements have gaps.
    dropped_measurements: u64,
    pub(super) load_seconds: f64,
    /// Of the weights alone; none where they are used as the file has them.
    pub(super) load_gb_per_s: Option<f64>,
    pub(super) weight_bytes: usize,
    pub(super) kv_tokens: usize,
    pub(super) stages: Vec<StageFigures>,
}

/// What was asked of the engine; none is its default.
#[derive(Debug, Serialize)]
struct Settings {
    split: Option<&'static str>,
    slots: Option<usize>,
    chunk: Option<usize>,
    running: Option<usize>,
}

#[derive(Debug, PartialEq, Serialize)]
pub(super) struct Named {
    pub(super) device: String,
    pub(super) name: String,
}

/// Of the median run and the best one.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(super) struct Rate {
    pub(super) median: f64,
    pub(super) best: f64,
}

/// A run: medians over its requests.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
struct RunFigures {
    output_tokens_per_s: f64,
    total_tokens_per_s: f64,
    requests_per_s: f64,
    images_per_s: Option<f64>,
    ttft_ms: f64,
    tpot_ms: Option<f64>,
    itl_ms: Option<f64>,
    e2el_ms: f64,
}

/// How full the stages were.
#[derive(Debug, Serialize)]
pub(super) struct Pipeline {
    steady: Option<Phase>,
    whole: Option<Phase>,
}

/// Over all runs.
#[derive(Debug, Serialize)]
pub(super) struct SchedulerFigures {
    pub(super) in_flight_mean: f64,
    #[serde(flatten)]
    pub(super) queues: Queues,
    prefix_lookup_tokens: u64,
    prefix_hit_tokens: u64,
    pub(super) preemptions: u64,
}

/// A stage, over all runs.
#[derive(Debug, Serialize)]
pub(super) struct StageFigures {
    pub(super) device: String,
    layers: String,
    pub(super) weight_bytes: usize,
    pub(super) kv_bytes: usize,
    /// All else that was taken of its GPU's memory.
    pub(super) buffer_bytes: Option<usize>,
    /// What the whole GPU has in use at the end, less what it had before the engine was built (its context included).
    pub(super) device_bytes_peak: Option<usize>,
    #[serde(flatten)]
    shares: Shares,
    batches: u64,
    rows: u64,
    /// Of what its device allows, over the runs' time; none where its device is not known.
    pub(super) of_limits: Option<limits::Shares>,
    /// Processor seconds a second of its thread, if it has one of its own.
    pub(super) host_cores: Option<f64>,
}

impl Figures {
    /// The figures of a session's runs.
    pub(super) fn new(subject: &Subject<'_>, session: &Session, measured: &Measured) -> Figures {
        let Measured { runs, before, after, host_bytes_peak, compared } = measured;
        let engine = &session.engine;
        let on_gpu = engine.layout().stages().iter().any(|stage| stage.device != Device::Cpu);
        let totals = Totals::of(runs);
        let usages = || runs.iter().flat_map(|run| &run.usages);
        let decodes = usages().any(|usage| usage.completion_tokens > 1);
        let itl_ms = itl(runs);
        let workload = subject.workload.clone();
        let requests = workload.requests as usize;
        let done = done(runs);
        let images = workload.images.map_or(0, |images| images.per_request as usize);
        let least_s = session.demands.least_s(&done, (requests, images));
        let limits = |i| session.demands.vision_shares(i, &done, totals.seconds);
        Figures {
            bench: subject.bench,
            id: id(subject, &engine.layout()),
            settings: Settings::of(subject.setup),
            layout: engine.layout().to_string(),
            devices: devices(engine),
            dtype: engine.dtype().name(),
            seconds: runs.iter().map(|r| r.seconds).collect(),
            runs: runs.iter().map(|run| RunFigures::of(run, &workload)).collect(),
            output_tokens_per_s: Rate::of(totals.output, runs),
            prompt_tokens_per_s: Rate::of(totals.input, runs),
            total_tokens_per_s: Rate::of(totals.input + totals.output, runs),
            requests_per_s: Rate::of(totals.requests, runs),
            images: workload.images.map(|of| ImageFigures::of(&of, workload.requests, (measured, &limits))),
            goodput: Goodput::of(subject.good, usages(), totals.seconds),
            ttft_ms: some(usages().map(|usage| 1e3 * usage.first_token_s)),
            tpot_ms: Spread::of(usages().filter_map(per_token_ms)),
            itl_ms,
            e2el_ms: some(usages().map(|usage| 1e3 * usage.total_s)),
            batch_ms: some(runs.iter().map(|run| 1e3 * run.seconds)),
            gap_max_over_median: itl_ms.map(|spread| spread.max / spread.median),
            late_prompt: workload.then_input_len.map(|input_len| late_prompt(input_len, runs)),
            pipeline: Pipeline::of(runs, after.stages.len(), decodes),
            limit_share: least_s.map(|least| least / totals.seconds),
            kv_use: KvUse::of(runs),
            energy: Energy::of(runs, &totals),
            host_cpu: HostCpu::of(runs, totals.seconds),
            host_bytes_peak: *host_bytes_peak,
            scheduler: SchedulerFigures::of(runs, before, after),
            costs: runs.last().and_then(|run| run.record.costs.costs()),
            compared: compared.clone(),
            dropped_measurements: after.dropped - before.dropped,
            load_seconds: session.loaded.took.as_secs_f64(),
            load_gb_per_s: session.loaded.weights.filter(|_| on_gpu).and_then(Speed::gb_per_s),
            weight_bytes: after.stages.iter().map(|s| s.weight_bytes).sum(),
            kv_tokens: engine.kv_tokens(),
            stages: stages(session, measured, &done, totals.seconds),
            workload,
        }
    }

    /// As JSON.
    pub(super) fn point(&self) -> Point {
        Point(serde_json::to_value(self).expect("plain data becomes JSON; this is a bug"))
    }
}

/// `MODEL/WORKLOAD/STAGES`, with what else was asked of the engine.
fn id(subject: &Subject<'_>, layout: &Layout) -> String {
    let setup = subject.setup;
    let mut id = format!("{}/{}/s{}", setup.model_name(), subject.workload.id(), layout.stages().len());
    if setup.layout.is_some() {
        let cuts: Vec<String> = layout.stages().iter().map(ToString::to_string).collect();
        id += &format!(".{}", cuts.join("+"));
    }
    id += &setup.split.map_or(String::new(), |split| format!(".{}", split.name()));
    id += &setup.slots.map_or(String::new(), |slots| format!(".slots{slots}"));
    id + &setup.chunk.map_or(String::new(), |chunk| format!(".chunk{chunk}"))
}

fn some(values: impl IntoIterator<Item = f64>) -> Spread {
    Spread::of(values).expect("runs without requests; this is a bug")
}

fn itl(runs: &[Run]) -> Option<Spread> {
    Spread::counted(runs.iter().flat_map(|r| &r.record.gaps).map(Gap::ms).collect())
}

/// Each device once, with what it is.
fn devices(engine: &Engine) -> Vec<Named> {
    let mut found: Vec<Named> = Vec::new();
    let layout = engine.layout();
    let tower = layout.vision().iter().map(|stage| stage.device);
    for device in layout.stages().iter().map(|stage| stage.device).chain(tower) {
        let name = match device {
            Device::Cpu => cpu::facts().name,
            Device::Cuda(i) => {
                let gpus = cuda::devices().expect("a stage runs on a GPU that is not there; this is a bug");
                gpus[i].name.clone()
            }
        };
        let named = Named { device: device.to_string(), name };
        if !found.contains(&named) {
            found.push(named);
        }
    }
    found
}

/// What each stage had to do in all runs.
fn done(runs: &[Run]) -> AllDone {
    let mut sums = AllDone::default();
    runs.iter().for_each(|run| sums += &run.record.done);
    sums
}

fn stages(session: &Session, measured: &Measured, done: &AllDone, seconds: f64) -> Vec<StageFigures> {
    let cores = HostCpu::of(&measured.runs, seconds).threads;
    let stage = |(i, (was, is)): (usize, (&StageStats, &StageStats))| StageFigures {
        device: is.device.clone(),
        layers: is.layers.clone(),
        weight_bytes: is.weight_bytes,
        kv_bytes: is.kv_bytes,
        buffer_bytes: is.buffer_bytes(),
        device_bytes_peak: is.memory.map(|memory| memory.device),
        shares: Shares::between(&was.times, &is.times).unwrap_or_default(),
        batches: is.times.batches - was.times.batches,
        rows: is.times.rows - was.times.rows,
        of_limits: session.demands.shares(i, done, seconds),
        host_cores: cores.get(&format!("stage {i}")).copied(),
    };
    measured.before.stages.iter().zip(&measured.after.stages).enumerate().map(stage).collect()
}

impl Settings {
    fn of(setup: &Setup) -> Settings {
        Settings {
            split: setup.split.map(|split| split.name()),
            slots: setup.slots,
            chunk: setup.chunk,
            running: setup.running,
        }
    }
}

impl RunFigures {
    fn of(run: &Run, workload: &Workload) -> RunFigures {
        let one = Totals::of(std::slice::from_ref(run));
        let middle = |spread: Option<Spread>| spread.map(|spread| spread.median);
        RunFigures {
            output_tokens_per_s: one.output / run.seconds,
            total_tokens_per_s: (one.input + one.output) / run.seconds,
            requests_per_s: one.requests / run.seconds,
            images_per_s: rate_of_run(workload.images.as_ref(), workload.requests, run),
            ttft_ms: some(run.usages.iter().map(|usage| 1e3 * usage.first_token_s)).median,
            tpot_ms: middle(Spread::of(run.usages.iter().filter_map(per_token_ms))),
            itl_ms: middle(itl(std::slice::from_ref(run))),
            e2el_ms: some(run.usages.iter().map(|usage| 1e3 * usage.total_s)).median,
        }
    }
}

impl Rate {
    /// Of runs that each did so much.
    pub(super) fn of(work: f64, runs: &[Run]) -> Rate {
        let seconds: Vec<f64> = runs.iter().map(|r| r.seconds).collect();
        let least = seconds.iter().copied().fold(f64::INFINITY, f64::min);
        Rate { median: work / median(&seconds), best: work / least }
    }
}

impl Pipeline {
    /// In the order of a table.
    pub(super) fn phases(&self) -> impl Iterator<Item = &Phase> {
        self.steady.iter().chain(&self.whole)
    }

    fn of(runs: &[Run], stages: usize, decodes: bool) -> Pipeline {
        let records: Vec<(&Record, f64)> = runs.iter().map(|run| (&run.record, run.seconds)).collect();
        Pipeline { steady: Phase::steady(&records, stages, decodes), whole: Phase::whole(&records, stages) }
    }
}

impl SchedulerFigures {
    /// The share of prompt tokens that were found in the KV cache, if any were looked for.
    pub(super) fn prefix_hits(&self) -> Option<f64> {
        (self.prefix_lookup_tokens > 0)
            .then(|| self.prefix_hit_tokens as f64 / self.prefix_lookup_tokens as f64)
    }

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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::bench::{uses::tests::run, workload::tests::LENGTHS};

    #[test]
    fn rates_are_of_the_median_and_of_the_best_run() {
        let runs = [4.0, 1.0, 2.0].map(|seconds| run(seconds, None));
        assert_eq!(Rate::of(8.0, &runs), Rate { median: 4.0, best: 8.0 });
        assert_eq!(Rate::of(8.0, &runs[..2]), Rate { median: 3.2, best: 8.0 });
    }

    #[test]
    fn a_run_has_medians_over_its_requests() {
        let one = RunFigures::of(&run(2.0, None), &Workload::random(3, LENGTHS));
        assert_eq!((one.output_tokens_per_s, one.requests_per_s), (4.5, 1.5));
        // A request of 2.5 s, of which 2 s are for 4 tokens; one of 1.5 s, 1 s of it for 2.
        assert_eq!((one.tpot_ms, one.e2el_ms, one.ttft_ms), (Some(500.0), 2000.0, 500.0));
    }
}

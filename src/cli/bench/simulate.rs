//! `pipeline-infer bench simulate`: the scheduler under a virtual clock, for pipelines that are not there.

use std::{
    fs::File,
    io::Read,
    path::{Path, PathBuf},
};

use clap::{ArgMatches, Args, Command, FromArgMatches, ValueEnum, value_parser};
use serde::Serialize;

use super::random::Random;
use crate::{
    batch::KV_BLOCK,
    cli::{
        Subcommand,
        table::{columns, seconds},
    },
    error::{Error, Result},
    layout::{Device, Given, Layout, Stage},
    schedule::{SchedulerConfig, StageCost},
    simulate::{Blank, Machine, Nanos, Percentiles, Report, Simulation, Workload, nanos, read_costs},
};

pub(super) const SUBCOMMAND: Subcommand =
    Subcommand { name: "simulate", about: "Predicts what a pipeline would do, without a model", flags, run };

/// Tokens of all requests, times stages, at most: what the trace has room for.
const TRACE_MAX: u64 = 1 << 30;
const STAGES_MAX: i64 = 64;
/// Microseconds that a quarter of 7b's head takes four H200s at 64 rows, beside what their stages do.
const GATHERING_US: f64 = 120.0;
/// Bytes of a file with costs, at most.
const COSTS_BYTES_MAX: u64 = 4 << 20;

#[derive(Debug, Clone, Args)]
struct SimulateArgs {
    #[command(flatten)]
    pipeline: Pipeline,
    #[command(flatten)]
    scheduling: Scheduling,
    #[command(flatten)]
    work: Work,
    /// table is for people; json is one object
    #[arg(long, value_name = "FORMAT", default_value = "table", help_heading = "Output")]
    format: Format,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    Table,
    Json,
}

/// What passes take. The defaults for layers and head come from matrix products of a 7b Qwen2 on an H200, bf16, at
/// 64 rows and in prompts.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Pipeline")]
struct Pipeline {
    /// Cuts the layers into N stages of near-equal length [default: 4, or as --costs says]
    #[arg(long, value_name = "N", value_parser = value_parser!(u32).range(1..=STAGES_MAX), conflicts_with = "layout")]
    stages: Option<u32>,
    /// Which layers make each stage: 0-9,10-27; with ,head@all behind them all have a part of the head
    #[arg(long, value_name = "STAGES")]
    layout: Option<String>,
    /// What each stage's passes take: a JSON list of objects with base, row, attended, read and output in
    /// seconds, or an object with that list as "costs", as bench throughput prints
    #[arg(long, value_name = "FILE", conflicts_with_all = ["layout", "layers", "layer_us", "row_us", "attended_us", "read_us", "head_us", "output_us"])]
    costs: Option<PathBuf>,
    /// Layers in all [default: 28, or as --layout says]
    #[arg(long, value_name = "N", value_parser = value_parser!(u32).range(1..=10_000), conflicts_with = "layout")]
    layers: Option<u32>,
    /// A layer's time for any pass
    #[arg(long, value_name = "US", default_value_t = 92.0, value_parser = time)]
    layer_us: f64,
    /// A layer's time for a row
    #[arg(long, value_name = "US", default_value_t = 0.717, value_parser = time)]
    row_us: f64,
    /// A layer's time for a token that a row attends to
    #[arg(long, value_name = "US", default_value_t = 0.00003, value_parser = time)]
    attended_us: f64,
    /// The same on top if its sequence has one row alone, as in decoding
    #[arg(long, value_name = "US", default_value_t = 0.0005, value_parser = time)]
    read_us: f64,
    /// The head's time for any pass, on the last stage
    #[arg(long, value_name = "US", default_value_t = 250.0, value_parser = time)]
    head_us: f64,
    /// The head's and the sampler's time for a row whose next token is wanted
    #[arg(long, value_name = "US", default_value_t = 0.5, value_parser = time)]
    output_us: f64,
    /// Devices; neighbouring stages share one, in turns [default: one a stage]
    #[arg(long, value_name = "N", value_parser = value_parser!(u32).range(1..=STAGES_MAX))]
    devices: Option<u32>,
    /// From one device to the next
    #[arg(long, value_name = "US", default_value_t = 14.0, value_parser = time)]
    boundary_us: f64,
    /// From the last stage's end until tokens are chosen, where the head is split [default: 120 if --layout splits it, or 0]
    #[arg(long, value_name = "US", value_parser = time)]
    gathering_us: Option<f64>,
    /// The host's time to plan a step and send it
    #[arg(long, value_name = "US", default_value_t = 20.0, value_parser = time)]
    planning_us: f64,
    /// From when tokens are chosen until the host has them
    #[arg(long, value_name = "US", default_value_t = 20.0, value_parser = time)]
    results_us: f64,
}

/// How it is scheduled.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Scheduling")]
struct Scheduling {
    /// Micro-batches in flight at most [default: the number of devices]
    #[arg(long, value_name = "N", value_parser = value_parser!(u32).range(1..=1024))]
    slots: Option<u32>,
    /// Prompt tokens in a micro-batch at most
    #[arg(long, value_name = "TOKENS", default_value_t = 2048, value_parser = value_parser!(u32).range(1..=65_536))]
    chunk: u32,
    /// Prompt tokens in a micro-batch at least, if as many wait
    #[arg(long, value_name = "TOKENS", default_value_t = 128, value_parser = value_parser!(u32).range(1..=65_536))]
    chunk_min: u32,
    /// Sequences that run at once at most; others wait [default: all requests]
    #[arg(long, value_name = "N", value_parser = value_parser!(u32).range(1..=65_536))]
    running: Option<u32>,
    /// Tokens that the KV cache holds [default: as many as the running requests can have]
    #[arg(long, value_name = "TOKENS", value_parser = value_parser!(u32).range(1..))]
    kv_tokens: Option<u32>,
    /// Plans a sequence's next step only when the host has read its last token, as on the CPU
    #[arg(long)]
    no_ahead: bool,
    /// Lets every prompt be computed, whatever others have in the KV cache
    #[arg(long)]
    no_prefix_cache: bool,
}

/// What is asked.
#[derive(Debug, Clone, Copy, Args, Serialize)]
#[command(next_help_heading = "Workload")]
struct Work {
    /// Requests
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = value_parser!(u32).range(1..=1_000_000))]
    requests: u32,
    /// Prompt tokens of each
    #[arg(long, value_name = "TOKENS", default_value_t = 512, value_parser = value_parser!(u32).range(1..=100_000_000))]
    input_len: u32,
    /// New tokens of each
    #[arg(long, value_name = "TOKENS", default_value_t = 128, value_parser = value_parser!(u32).range(1..=100_000_000))]
    output_len: u32,
    /// Requests a second, at random moments [default: all at once]
    #[arg(long, value_name = "RATE", value_parser = positive)]
    arrivals: Option<f64>,
    /// Tokens at the beginning that are the same in all prompts
    #[arg(long, value_name = "TOKENS", default_value_t = 0, value_parser = value_parser!(u32).range(..=100_000_000))]
    shared_prefix: u32,
    /// Draws prompts and arrivals
    #[arg(long, value_name = "SEED", default_value_t = 0)]
    seed: u64,
}

/// All figures, in the order of the JSON object.
#[derive(Debug, Serialize)]
struct Figures {
    workload: Work,
    slots: usize,
    chunk: usize,
    running: usize,
    kv_tokens: usize,
    costs: Vec<StageCost>,
    #[serde(flatten)]
    report: Report,
}

fn flags(command: Command) -> Command {
    SimulateArgs::augment_args(command)
}

fn run(matches: &ArgMatches) -> Result<u8> {
    let args = SimulateArgs::from_arg_matches(matches).expect("clap has parsed these flags; this is a bug");
    let machine = args.pipeline.machine()?;
    args.work.check(machine.stages.len())?;
    let simulation = args.scheduling.simulation(machine, &args.work)?;
    let mut random = Random::new(args.work.seed);
    let work = args.work.workload().arrivals(|| random.next());
    let trace = simulation.run(&work, &mut Blank);
    assert!(trace.answers.iter().all(|a| a.end.is_some()), "a request never ends; this is a bug");
    if trace.answers.iter().any(|a| a.end.is_some_and(|(at, _)| at == Nanos::MAX)) {
        return Err(Error::usage(
            "bench simulate",
            "it would take more than 584 years, where the clock ends",
        ));
    }
    let figures = Figures::new(&args, &simulation, Report::of(&trace));
    let text = match args.format {
        Format::Table => figures.table(),
        Format::Json => figures.json(),
    };
    crate::cli::print(text.as_bytes())
}

/// A number of microseconds.
fn time(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(us) if (0.0..=1e9).contains(&us) => Ok(us),
        _ => Err("it is not a time from 0 to 1e9".into()),
    }
}

/// A file with costs. One that has no end is refused.
fn read_text(path: &Path) -> Result<String> {
    let failed = |e| Error::io(path, &e);
    let mut text = String::new();
    let file = File::open(path).map_err(failed)?;
    file.take(COSTS_BYTES_MAX + 1).read_to_string(&mut text).map_err(failed)?;
    match text.len() as u64 > COSTS_BYTES_MAX {
        true => Err(Error::data(path, format!("it is larger than {COSTS_BYTES_MAX} bytes"))),
        false => Ok(text),
    }
}

fn positive(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(rate) if (1e-6..=1e9).contains(&rate) => Ok(rate),
        _ => Err("it is not a rate from 1e-6 to 1e9".into()),
    }
}

/// A layout whose stages have a device each, unless it says which.
fn layout(text: &str) -> Result<Layout> {
    let Given { layout, placed } = text.parse()?;
    if placed {
        return Ok(layout);
    }
    let on = |(i, stage): (usize, &Stage)| Stage { device: Device::Cuda(i), ..stage.clone() };
    let stages = layout.stages().iter().enumerate().map(on).collect();
    Ok(Layout::new(stages)?.with_split_head(layout.splits_head()))
}

impl Pipeline {
    fn machine(&self) -> Result<Machine> {
        let costs = self.costs()?;
        let stages = costs.len();
        if stages > STAGES_MAX as usize {
            return Err(Error::usage(self.origin(), format!("{stages} stages are more than {STAGES_MAX}")));
        }
        let mut machine = Machine::new(costs);
        if let Some(devices) = self.devices.map(|n| n as usize) {
            if devices > stages {
                return Err(Error::usage("--devices", format!("{devices} for {stages} stages")));
            }
            for (i, stage) in machine.stages.iter_mut().enumerate() {
                stage.device = i * devices / stages;
            }
        }
        machine.boundary = nanos(self.boundary_us / 1e6);
        let gathering = match &self.layout {
            Some(text) if !layout(text)?.part_stages().is_empty() => GATHERING_US,
            _ => 0.0,
        };
        machine.gathering = nanos(self.gathering_us.unwrap_or(gathering) / 1e6);
        machine.planning = nanos(self.planning_us / 1e6);
        machine.results = nanos(self.results_us / 1e6);
        Ok(machine)
    }

    fn origin(&self) -> &'static str {
        if self.costs.is_some() { "--costs" } else { "--layout" }
    }

    fn costs(&self) -> Result<Vec<StageCost>> {
        if let Some(path) = &self.costs {
            let costs =
                read_costs(&read_text(path)?).map_err(|why| Error::Data { path: path.clone(), why })?;
            return match self.stages.filter(|&n| n as usize != costs.len()) {
                Some(n) => {
                    Err(Error::usage("--stages", format!("{n}, and {} has {}", path.display(), costs.len())))
                }
                None => Ok(costs),
            };
        }
        let layout = match &self.layout {
            Some(text) => layout(text)?,
            None => {
                let (stages, layers) =
                    (self.stages.unwrap_or(4) as usize, self.layers.unwrap_or(28) as usize);
                Layout::even(stages, layers, Device::Cpu)?
            }
        };
        let cost = |layers: usize| StageCost {
            base: layers as f64 * self.layer_us / 1e6,
            row: layers as f64 * self.row_us / 1e6,
            attended: layers as f64 * self.attended_us / 1e6,
            read: layers as f64 * self.read_us / 1e6,
            output: 0.0,
        };
        let mut costs: Vec<StageCost> = layout.stages().iter().map(|s| cost(s.layers.len())).collect();
        for (stage, cost) in costs.iter_mut().enumerate() {
            cost.base += layout.head_share(stage) * self.head_us / 1e6;
            cost.output = layout.head_share(stage) * self.output_us / 1e6;
        }
        if costs.iter().any(|c| *c == StageCost::default()) {
            return Err(Error::usage(
                "--layer-us 0 --row-us 0 --attended-us 0 --read-us 0",
                "a stage would take no time",
            ));
        }
        Ok(costs)
    }
}

impl Scheduling {
    fn simulation(&self, machine: Machine, work: &Work) -> Result<Simulation> {
        let devices = 1 + machine.stages.iter().map(|s| s.device).max().expect("stages; this is a bug");
        let running = self.running.unwrap_or(work.requests.min(65_536)) as usize;
        let config = SchedulerConfig {
            slots: self.slots.map_or(devices, |n| n as usize),
            chunk: self.chunk as usize,
            chunk_min: self.chunk_min.min(self.chunk) as usize,
            running_max: running,
            ahead: !self.no_ahead,
            prefix_reuse: !self.no_prefix_cache,
        };
        // The last token is never fed.
        let each = (work.context() - 1).div_ceil(KV_BLOCK);
        let blocks = match self.kv_tokens {
            Some(tokens) => tokens as usize / KV_BLOCK,
            None => each * running.min(work.requests as usize),
        };
        if blocks < each {
            let why = format!("a request needs {} tokens, in blocks of {KV_BLOCK}", each * KV_BLOCK);
            return Err(Error::usage("--kv-tokens", why));
        }
        Ok(Simulation::new(machine, config, blocks))
    }
}

impl Work {
    /// Prompt and answer together.
    fn context(&self) -> usize {
        self.input_len as usize + self.output_len as usize
    }

    fn check(&self, stages: usize) -> Result<()> {
        if self.shared_prefix > self.input_len {
            let why = format!("{} tokens are more than --input-len {}", self.shared_prefix, self.input_len);
            return Err(Error::usage("--shared-prefix", why));
        }
        let tokens = u64::from(self.requests) * self.context() as u64;
        match tokens.saturating_mul(stages as u64) > TRACE_MAX {
            true => {
                let why = format!("{tokens} tokens on {stages} stages are more than {TRACE_MAX} together");
                Err(Error::usage("--requests", why))
            }
            false => Ok(()),
        }
    }

    fn workload(&self) -> Workload {
        Workload {
            requests: self.requests as usize,
            input_len: self.input_len as usize,
            output_len: self.output_len as usize,
            arrivals: self.arrivals,
            shared_prefix: self.shared_prefix as usize,
        }
    }
}

impl Figures {
    fn new(args: &SimulateArgs, simulation: &Simulation, report: Report) -> Figures {
        Figures {
            workload: args.work,
            slots: simulation.config.slots,
            chunk: simulation.config.chunk,
            running: simulation.config.running_max,
            kv_tokens: simulation.blocks * KV_BLOCK,
            costs: simulation.machine.stages.iter().map(|s| s.cost).collect(),
            report,
        }
    }

    /// One object on one line.
    fn json(&self) -> String {
        let text = serde_json::to_string(self).expect("plain data becomes JSON; this is a bug");
        text + "\n"
    }

    /// For people.
    fn table(&self) -> String {
        let Report { steady_s: (from, until), .. } = self.report;
        let percent = |share: f64| format!("{:.1}%", 100.0 * share);
        let row = |name: &str, value: String| vec![name.to_owned(), value];
        let mut what = vec![
            row("time", seconds(self.report.seconds)),
            row("new tokens/s", format!("{:.1}", self.report.output_tokens_per_s)),
            row("prompt tokens/s", format!("{:.1}", self.report.prompt_tokens_per_s)),
            row("steps", self.report.steps.to_string()),
            row("rows", self.report.rows.to_string()),
            row("steady from", seconds(from)),
            row("steady until", seconds(until)),
            row("bubble", percent(self.report.bubble)),
            row("imbalance", percent(self.report.imbalance)),
        ];
        let longest = self.report.longest_gap.map(|gap| row("longest gap, medians", format!("{gap:.2}")));
        what.extend(longest);
        let head = ["a request", "mean", "median", "p90", "p99", "max"].map(String::from).to_vec();
        let mut latencies = vec![head];
        latencies.extend(self.report.ttft_ms.map(|times| spread("time to first token", times)));
        latencies.extend(self.report.itl_ms.map(|times| spread("time between tokens", times)));
        let mut stages = vec![["stage", "busy", "busy share", "bubble"].map(String::from).to_vec()];
        for (i, stage) in self.report.stages.iter().enumerate() {
            stages.push(vec![
                i.to_string(),
                seconds(stage.busy_s),
                percent(stage.busy),
                percent(stage.bubble),
            ]);
        }
        [what, latencies, stages].iter().map(|rows| columns(rows)).collect::<Vec<_>>().join("\n")
    }
}

fn spread(name: &str, ms: Percentiles) -> Vec<String> {
    let times = [ms.mean, ms.median, ms.p90, ms.p99, ms.max].map(|ms| seconds(ms / 1e3));
    std::iter::once(name.into()).chain(times).collect()
}

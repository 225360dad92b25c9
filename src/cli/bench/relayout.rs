//! `pipeline-infer bench relayout`: how long requests wait when the layout changes while they run.

use std::time::{Duration, Instant};

use clap::{ArgMatches, Args, Command, FromArgMatches, ValueEnum, value_parser};
use serde::Serialize;

use super::{
    drive::next,
    random::Vocab,
    record::{Gap, Record, Recorder},
    session::{Runs, Session},
    spread::Spread,
    workload::{Lengths, Workload},
};
use crate::{
    cli::{
        Subcommand,
        interrupt::Interrupt,
        setup::Setup,
        table::{columns, seconds},
    },
    engine::Relayout,
    error::{Error, Result},
    layout::{Device, Given, Layout},
    request::Event,
};

pub(super) const SUBCOMMAND: Subcommand =
    Subcommand { name: "relayout", about: "How long requests wait when the layout changes", flags, run };

#[derive(Debug, Clone, Args)]
struct RelayoutArgs {
    #[command(flatten)]
    setup: Setup,
    /// Requests, all submitted at once
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = value_parser!(u32).range(1..=1_000_000), help_heading = "Workload")]
    requests: u32,
    #[command(flatten)]
    lengths: Lengths,
    #[command(flatten)]
    change: Change,
    /// table is for people; json is one object
    #[arg(long, value_name = "FORMAT", default_value = "table", help_heading = "Output")]
    format: Format,
}

/// How figures look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    Table,
    Json,
}

/// What changes, and when.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Workload")]
struct Change {
    /// The layout that it goes to, and back from, in the middle of a run: 0-6@cuda:0,7-27@cuda:1, or a file
    #[arg(long, value_name = "STAGES")]
    to: String,
    /// When each request has so many new tokens [default: half of them]
    #[arg(long, value_name = "TOKENS", value_parser = value_parser!(u32).range(1..))]
    after: Option<u32>,
    /// Runs with a change
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = value_parser!(u32).range(1..=1000))]
    repeat: u32,
}

/// All figures, in the order of the JSON object.
#[derive(Debug, Serialize)]
struct Figures {
    workload: Workload,
    dtype: &'static str,
    kv_tokens: usize,
    /// Two without a change, and then those with one. All have the same prompts.
    runs: Vec<Run>,
}

#[derive(Debug, Serialize)]
struct Run {
    seconds: f64,
    relayout: Option<Relayout>,
    /// Between two tokens of a request when all decode.
    gap_median_ms: Option<f64>,
    gap_max_ms: Option<f64>,
    /// Requests whose tokens are not those of the first run.
    requests_different: usize,
    #[serde(skip)]
    tokens: Vec<Vec<u32>>,
}

fn flags(command: Command) -> Command {
    super::throughput::own_defaults(RelayoutArgs::augment_args(command))
}

fn run(matches: &ArgMatches) -> Result<u8> {
    let args = RelayoutArgs::from_arg_matches(matches).expect("clap has parsed these flags; this is a bug");
    let RelayoutArgs { setup, requests, lengths, change, format } = args;
    let workload = Workload::random(requests, lengths);
    workload.check(setup.max_context)?;
    workload.check_waiting(&setup, false)?;
    let Given { layout: to, placed } = Given::from_arg(&change.to)?;
    let output_len = lengths.output_len;
    let after = change.after.unwrap_or(output_len / 2).max(1);
    if after >= output_len {
        let why = format!("each request has {output_len} new tokens: --output-len");
        return Err(Error::usage("--after", why));
    }
    // Nobody listens for signals: one ends the process.
    Interrupt::install()?;
    // All runs have the same prompts: what one leaves must be of no use to the next.
    let runs = Runs { warmup: 0, repeat: Some(1), exact: false, limits: None };
    let session = Session::start(&setup.moving(), &runs, &workload.need(), format == Format::Table)?;
    let engine = &session.engine;
    to.check(engine.spec().layers.len())?;
    let from = engine.layout();
    if !placed && from.stages().iter().any(|stage| stage.device != Device::Cpu) {
        return Err(Error::usage("--to", "it names no devices, and stages run on GPUs"));
    }
    let plain = || one(&session, &workload, None);
    // The first one warms up.
    plain()?;
    let mut runs = vec![plain()?, plain()?];
    for i in 0..change.repeat {
        let to = if i.is_multiple_of(2) { &to } else { &from };
        runs.push(one(&session, &workload, Some((to, after)))?);
    }
    let first = runs[0].tokens.clone();
    for run in &mut runs {
        run.requests_different = run.tokens.iter().zip(&first).filter(|(a, b)| a != b).count();
    }
    let figures = Figures { workload, dtype: engine.dtype().name(), kv_tokens: engine.kv_tokens(), runs };
    let text = match format {
        Format::Json => {
            serde_json::to_string(&figures).expect("plain data becomes JSON; this is a bug") + "\n"
        }
        Format::Table => table(&figures, &from),
    };
    let code = crate::cli::print(text.as_bytes())?;
    session.engine.end()?;
    Ok(code)
}

/// One run, in the middle of which the layout changes, if it is to.
fn one(session: &Session, workload: &Workload, change: Option<(&Layout, u32)>) -> Result<Run> {
    let engine = &session.engine;
    let mut recorder = Recorder::new(engine, session.demands.clone());
    let requests = workload.work(0, false, Vocab::of(engine.spec())).requests;
    recorder.begin(requests.len());
    let started = Instant::now();
    // All together: which of them share a pass, on which last bits may depend, is the same in each run.
    let mut open = engine.submit_all(requests.into_iter().map(|timed| timed.request).collect())?;
    let mut tokens = vec![Vec::new(); open.len()];
    let (seconds, relayout) = std::thread::scope(|scope| {
        let (mut changing, mut failed, mut turns) = (None, None, 0);
        let mut reader = Some(&mut recorder);
        while failed.is_none()
            && open.iter().zip(&tokens).any(|(_, t)| t.len() < workload.lengths.output_len as usize)
        {
            // Each turn brings each a token.
            for (events, tokens) in open.iter_mut().zip(&mut tokens) {
                match next(events, &mut reader) {
                    Some(Event::Token { id, .. }) => tokens.push(id),
                    Some(Event::Error(error)) => failed = failed.or(Some(error)),
                    Some(Event::Finished { .. }) | None => (),
                }
            }
            turns += 1;
            if let Some((to, _)) = change.filter(|(_, after)| *after == turns) {
                changing = Some(scope.spawn(|| engine.relayout(to.clone())));
            }
        }
        let seconds = started.elapsed().as_secs_f64();
        let relayout = changing.map(|thread| thread.join().expect("asking does not panic; this is a bug"));
        match failed {
            Some(error) => Err(error),
            None => Ok((seconds, relayout.transpose()?)),
        }
    })?;
    let record = recorder.end();
    let gaps = decoding(&record);
    let spread = Spread::counted(gaps.iter().map(Gap::ms).collect());
    Ok(Run {
        seconds,
        relayout,
        gap_median_ms: spread.map(|spread| spread.median),
        gap_max_ms: spread.map(|spread| spread.max),
        requests_different: 0,
        tokens,
    })
}

/// Gaps from when every request has its first token.
fn decoding(record: &Record) -> Vec<Gap> {
    let settled = record.first_tokens.values().max().copied().unwrap_or(Duration::ZERO);
    record.gaps.iter().copied().filter(|gap| gap.from >= settled).collect()
}

fn table(figures: &Figures, from: &Layout) -> String {
    let (requests, lengths) = (figures.workload.requests, figures.workload.lengths);
    let Lengths { input_len, output_len, .. } = lengths;
    let head = [
        "layout",
        "units moved",
        "weights MB",
        "KV MB",
        "ready in",
        "stall",
        "gap median",
        "max",
        "different",
    ];
    let mut rows = vec![head.map(str::to_owned).to_vec()];
    let ms = |ms: Option<f64>| ms.map_or("-".into(), |ms| seconds(ms / 1e3));
    for run in &figures.runs {
        let mut row = match &run.relayout {
            Some(report) => {
                let mb = |bytes: usize| format!("{:.1}", bytes as f64 / 1e6);
                vec![
                    report.to.to_string(),
                    report.moved.len().to_string(),
                    mb(report.weight_bytes),
                    mb(report.kv_bytes),
                    seconds(report.ready.as_secs_f64()),
                    seconds(report.stall.as_secs_f64()),
                ]
            }
            None => std::iter::once(from.to_string()).chain(vec!["-".to_owned(); 5]).collect(),
        };
        row.extend([ms(run.gap_median_ms), ms(run.gap_max_ms), run.requests_different.to_string()]);
        rows.push(row);
    }
    format!("{requests} requests of {input_len} prompt and {output_len} new tokens\n\n{}", columns(&rows))
}

//! `pipeline-infer bench sweep`: stages, splits, slots, chunks and batches, each with each, ranked.

use clap::{ArgAction, ArgMatches, Args, Command, FromArgMatches, ValueEnum, value_parser};
use serde_json::json;

use super::{
    figures::{Figures, Subject},
    output::{Format, Output},
    plot,
    random::Vocab,
    results::Point,
    session::{Runs, Session},
    summary,
    throughput::own_defaults,
    workload::{Lengths, Workload},
};
use crate::{
    cli::{
        Subcommand,
        interrupt::Interrupt,
        setup::{Cut, Setup, Stages},
        table::columns,
    },
    error::{Error, Result},
};

pub(super) const SUBCOMMAND: Subcommand =
    Subcommand { name: "sweep", about: "Compares stages, splits, slots, chunks and batches", flags, run };

const ENGINES_MAX: usize = 1000;

#[derive(Debug, Clone, Args)]
struct SweepArgs {
    #[command(flatten)]
    setup: Setup,
    #[command(flatten)]
    work: WorkArgs,
    #[command(flatten)]
    lengths: Lengths,
    #[command(flatten)]
    runs: Runs,
    #[command(flatten)]
    output: Output,
}

#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Workload")]
struct WorkArgs {
    /// Requests, all submitted at once; several numbers are measured one after another: 1,16,256
    #[arg(long, value_name = "N,…", default_value = "1,16", value_delimiter = ',', value_parser = value_parser!(u32).range(1..=1_000_000))]
    requests: Vec<u32>,
    /// What comes first
    #[arg(long, value_name = "FIGURE", default_value = "throughput", help_heading = "Output")]
    rank_by: RankBy,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum RankBy {
    /// Most tokens a second, prompts included
    Throughput,
    /// Shortest time to the first token, the median
    Ttft,
    /// Shortest time per token after it, the median
    Tpot,
    /// Shortest time of a request, the median
    E2el,
}

/// What could not be measured.
struct Failure {
    asked: String,
    error: Error,
}

fn flags(command: Command) -> Command {
    let mut command = own_defaults(SweepArgs::augment_args(command));
    for (flag, more) in [
        ("stages", "Numbers of stages: 1,2,4 (auto: as many as are worth it) [default: 1]"),
        ("split", "How they are cut, one or several of even and planned [default: the engine's]"),
        ("slots", "Micro-batches in flight at most: 1,2,4 [default: the number of devices]"),
        ("chunk", "Prompt tokens in each micro-batch: 128,512 [default: the engine's]"),
    ] {
        command = command
            .mut_arg(flag, |arg| arg.help(more).value_delimiter(',').num_args(1).action(ArgAction::Append));
    }
    command.mut_arg("layout", |arg| {
        arg.help("Layouts, instead of --stages; again for each: --layout 0-9,10-29 --layout 0-14,15-29")
            .action(ArgAction::Append)
    })
}

fn run(matches: &ArgMatches) -> Result<u8> {
    let args = SweepArgs::from_arg_matches(matches).expect("clap has parsed these flags; this is a bug");
    let setups = setups(&args.setup, matches)?;
    let mut batches = args.work.requests.clone();
    batches.sort_unstable();
    batches.dedup();
    let workloads: Vec<Workload> = batches.iter().map(|&n| Workload::random(n, args.lengths)).collect();
    workloads.iter().try_for_each(|workload| {
        workload.check(args.setup.max_context)?;
        workload.check_waiting(&args.setup, true)
    })?;
    args.runs.described()?;
    args.output.check()?;
    Interrupt::install()?;
    let (mut points, mut failures): (Vec<Point>, Vec<Failure>) = Default::default();
    for setup in &setups {
        if let Err(error) = measure(setup, &workloads, &args, &mut points) {
            tracing::info!(asked = asked(setup), %error, "left out");
            failures.push(Failure { asked: asked(setup), error });
        }
    }
    if points.is_empty() {
        return Err(failures.remove(0).error);
    }
    rank(&mut points, args.work.rank_by);
    let picture = args.output.plot.is_some().then(|| plot::latencies("layouts and batches", &points));
    let table = (args.output.format == Format::Table).then(|| table(&points, &failures));
    let left_out = |failure: &Failure| {
        Point(json!({"bench": "sweep", "asked": failure.asked, "error": failure.error.to_string()}))
    };
    if args.output.format == Format::Json {
        points.extend(failures.iter().map(left_out));
    }
    args.output.write(&points, table, picture)
}

/// An engine with room for the largest batch, and all batches through it.
fn measure(setup: &Setup, workloads: &[Workload], args: &SweepArgs, points: &mut Vec<Point>) -> Result<()> {
    let largest = workloads.last().expect("clap requires a batch; this is a bug");
    let mut session = Session::start(setup, &args.runs, &largest.need(), args.output.shows())?;
    let vocab = Vocab::of(session.engine.spec());
    for workload in workloads {
        let measured = session.measure(&|run, warms_up| workload.work(run, warms_up, vocab))?;
        let subject = Subject { bench: "sweep", setup, workload, good: &[] };
        points.push(Figures::new(&subject, &session, &measured).point());
    }
    session.engine.end()
}

/// Each with each of what is asked.
fn setups(base: &Setup, matches: &ArgMatches) -> Result<Vec<Setup>> {
    let mut setups = vec![base.clone()];
    each(&mut setups, many::<Stages>(matches, "stages"), |setup, stages| setup.stages = Some(stages))?;
    each(&mut setups, many::<String>(matches, "layout"), |setup, layout| setup.layout = Some(layout))?;
    each(&mut setups, many::<Cut>(matches, "split"), |setup, split| setup.split = Some(split))?;
    each(&mut setups, many::<usize>(matches, "slots"), |setup, slots| setup.slots = Some(slots))?;
    each(&mut setups, many::<usize>(matches, "chunk"), |setup, chunk| setup.chunk = Some(chunk))?;
    setups.iter().try_for_each(|setup| setup.builder().map(drop))?;
    Ok(setups)
}

/// Each of them once with every value; as they are where none is given.
fn each<T: Clone>(setups: &mut Vec<Setup>, values: Vec<T>, set: fn(&mut Setup, T)) -> Result<()> {
    let engines = setups.len().saturating_mul(values.len().max(1));
    if engines > ENGINES_MAX {
        let why = format!("{engines} engines are more than {ENGINES_MAX}");
        return Err(Error::usage("--stages --layout --split --slots --chunk", why));
    }
    if !values.is_empty() {
        let with = |setup: &Setup, value: &T| {
            let mut setup = setup.clone();
            set(&mut setup, value.clone());
            setup
        };
        *setups =
            setups.iter().flat_map(|setup| values.iter().map(move |value| with(setup, value))).collect();
    }
    Ok(())
}

fn many<T: Clone + Send + Sync + 'static>(matches: &ArgMatches, flag: &str) -> Vec<T> {
    matches.get_many::<T>(flag).into_iter().flatten().cloned().collect()
}

/// As flags.
fn asked(setup: &Setup) -> String {
    let stages = setup.stages.map(|stages| match stages {
        Stages::Of(n) => n.to_string(),
        Stages::Auto => "auto".into(),
    });
    let flags = [
        ("--stages", stages),
        ("--layout", setup.layout.clone()),
        ("--split", setup.split.map(|split| split.name().to_owned())),
        ("--slots", setup.slots.map(|n| n.to_string())),
        ("--chunk", setup.chunk.map(|n| n.to_string())),
    ];
    let told = flags.into_iter().filter_map(|(flag, value)| Some(format!("{flag} {}", value?)));
    let told: Vec<String> = told.collect();
    if told.is_empty() { "the defaults".into() } else { told.join(" ") }
}

/// Puts the best first, and says which each is.
fn rank(points: &mut [Point], by: RankBy) {
    let (path, sign) = match by {
        RankBy::Throughput => ("total_tokens_per_s.median", -1.0),
        RankBy::Ttft => ("ttft_ms.median", 1.0),
        RankBy::Tpot => ("tpot_ms.median", 1.0),
        RankBy::E2el => ("e2el_ms.median", 1.0),
    };
    // What has no such figure comes last.
    let key = |point: &Point| point.number(path).map_or(f64::INFINITY, |number| sign * number);
    points.sort_by(|a, b| key(a).total_cmp(&key(b)));
    for (i, point) in points.iter_mut().enumerate() {
        point.0["rank"] = json!(i + 1);
    }
}

fn table(points: &[Point], failures: &[Failure]) -> String {
    let mut text = summary::text(points, Format::Table);
    if !failures.is_empty() {
        let row = |failure: &Failure| vec![failure.asked.clone(), failure.error.to_string()];
        let head = vec!["left out".to_owned(), "why".to_owned()];
        let rows: Vec<Vec<String>> = std::iter::once(head).chain(failures.iter().map(row)).collect();
        text += &format!("\n{}", columns(&rows));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_comes_first() {
        let point = |id: &str, rate: f64, tpot: Option<f64>| {
            Point(json!({"id": id, "total_tokens_per_s": {"median": rate}, "tpot_ms": {"median": tpot}}))
        };
        let mut points = [point("a", 5.0, Some(2.0)), point("b", 9.0, None), point("c", 7.0, Some(1.0))];
        let mut ranked = |by| {
            rank(&mut points, by);
            points.iter().map(|p| (p.id(), p.number("rank").unwrap() as u32)).collect::<Vec<_>>()
        };
        assert_eq!(ranked(RankBy::Throughput), [("b".into(), 1), ("c".into(), 2), ("a".into(), 3)]);
        assert_eq!(ranked(RankBy::Tpot), [("c".into(), 1), ("a".into(), 2), ("b".into(), 3)]);
    }
}

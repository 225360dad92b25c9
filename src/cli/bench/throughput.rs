//! `pipeline-infer bench throughput`: many requests at once, from the first one's submission to the last one's end.

use clap::{ArgMatches, Args, Command, FromArgMatches, value_parser};

use super::{
    figures::{Figures, Subject},
    output::Output,
    pictures, plot,
    random::Vocab,
    session::{Runs, Session},
    workload::{FromFile, Lengths, Workload},
};
use crate::{
    cli::{Subcommand, interrupt::Interrupt, setup::Setup},
    error::Result,
};

pub(super) const SUBCOMMAND: Subcommand =
    Subcommand { name: "throughput", about: "Tokens a second of many requests at once", flags, run };

const REQUESTS: u32 = 16;

#[derive(Debug, Clone, Args)]
struct ThroughputArgs {
    #[command(flatten)]
    setup: Setup,
    #[command(flatten)]
    work: WorkArgs,
    #[command(flatten)]
    lengths: Lengths,
    #[command(flatten)]
    images: pictures::Asked,
    #[command(flatten)]
    from: FromFile,
    #[command(flatten)]
    runs: Runs,
    #[command(flatten)]
    output: Output,
}

#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Workload")]
struct WorkArgs {
    /// Requests, all submitted at once [default: 16, or all of --prompt-file]
    #[arg(long, value_name = "N", value_parser = value_parser!(u32).range(1..=1_000_000))]
    requests: Option<u32>,
    /// One more request with a prompt of so many tokens, and one new token, once each of the others has a quarter of
    /// its tokens, or 64
    #[arg(long, value_name = "TOKENS", conflicts_with = "prompt_file", value_parser = value_parser!(u32).range(1..=100_000_000))]
    then_input_len: Option<u32>,
}

fn flags(command: Command) -> Command {
    own_defaults(ThroughputArgs::augment_args(command))
}

/// Flags of the engine that have defaults of their own where a workload is known.
pub(super) fn own_defaults(command: Command) -> Command {
    command
        .mut_arg("max_context", |arg| {
            arg.help("The longest sequence, prompt and answer together [default: as long as they are]")
        })
        .mut_arg("running", |arg| {
            arg.help("Sequences that run at once at most; others wait [default: all requests]")
        })
        .mut_arg("waiting_tokens", |arg| {
            arg.help("Tokens of the prompts of all requests that wait, together, at most [default: all]")
        })
        .mut_arg("waiting", |arg| {
            arg.help(
                "Requests that wait for their first step at most; more are refused [default: all requests]",
            )
        })
}

fn run(matches: &ArgMatches) -> Result<u8> {
    let args = ThroughputArgs::from_arg_matches(matches).expect("clap has parsed these flags; this is a bug");
    let WorkArgs { requests, then_input_len } = args.work;
    let workload = Workload::new(requests, REQUESTS, args.lengths, &args.from)?.then(then_input_len);
    let workload = workload.with_images(args.images.of(&args.setup)?);
    measure("throughput", &args.setup, workload, &args.runs, &args.output)
}

/// Measures one workload, all requests at once, and tells of it.
pub(super) fn measure(
    bench: &'static str,
    setup: &Setup,
    mut workload: Workload,
    runs: &Runs,
    output: &Output,
) -> Result<u8> {
    workload.check(setup.max_context)?;
    workload.check_waiting(setup, runs.warmup > 0)?;
    output.check()?;
    // Nobody listens for signals: one ends the process.
    Interrupt::install()?;
    // Bars of single passes are drawn: all of them are wanted.
    let runs = Runs { exact: runs.exact || output.plot.is_some(), ..runs.clone() };
    let mut session = Session::start(setup, &runs, &workload.need(), output.shows())?;
    workload.prepare(&session.engine)?;
    let vocab = Vocab::of(session.engine.spec());
    let measured = session.measure(&|run, warms_up| workload.work(run, warms_up, vocab))?;
    let subject = Subject { bench, setup, workload: &workload, good: &[] };
    let figures = Figures::new(&subject, &session, &measured);
    let picture = output.plot.is_some().then(|| plot::timeline(&figures.id, &measured));
    let code = output.write(&[figures.point()], Some(figures.table(&measured)), picture)?;
    session.engine.end()?;
    Ok(code)
}

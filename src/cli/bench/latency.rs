//! `pipeline-infer bench latency`: how long one batch takes, again and again.

use clap::{ArgMatches, Args, Command, FromArgMatches, value_parser};

use super::{
    output::Output,
    session::Runs,
    throughput::{measure, own_defaults},
    workload::{Lengths, Workload},
};
use crate::{
    cli::{Subcommand, setup::Setup},
    error::Result,
};

pub(super) const SUBCOMMAND: Subcommand =
    Subcommand { name: "latency", about: "Times of one batch, again and again", flags, run };

/// Runs of which percentiles mean something.
const REPEAT: u32 = 10;

#[derive(Debug, Clone, Args)]
struct LatencyArgs {
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
    /// Requests of the batch, all submitted at once
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = value_parser!(u32).range(1..=1_000_000))]
    requests: u32,
}

fn flags(command: Command) -> Command {
    own_defaults(LatencyArgs::augment_args(command))
        .mut_arg("repeat", |arg| arg.help(format!("Runs that are measured [default: {REPEAT}]")))
}

fn run(matches: &ArgMatches) -> Result<u8> {
    let args = LatencyArgs::from_arg_matches(matches).expect("clap has parsed these flags; this is a bug");
    let runs = Runs { repeat: args.runs.repeat.or(Some(REPEAT)), ..args.runs };
    let workload = Workload::random(args.work.requests, args.lengths);
    measure("latency", &args.setup, workload, &runs, &args.output)
}

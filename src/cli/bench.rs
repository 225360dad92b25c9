//! `pipeline-infer bench`: measurements with made-up work, one file each, in [`MEASUREMENTS`].

mod arrivals;
mod compare;
mod drive;
mod figures;
mod goodput;
mod host;
mod late;
mod latency;
mod limits;
mod output;
mod phases;
mod pictures;
mod plot;
mod random;
mod record;
mod relayout;
mod report;
mod results;
mod serve;
mod session;
mod simulate;
mod spread;
mod summary;
mod sweep;
mod tables;
mod throughput;
mod tower;
mod uses;
mod workload;

use clap::{ArgMatches, Command};

use super::Subcommand;
use crate::error::Result;

pub(super) const SUBCOMMAND: Subcommand =
    Subcommand { name: "bench", about: "Measures a model with made-up requests", flags, run };

/// All measurements, and what can be done with their results.
const MEASUREMENTS: &[Subcommand] = &[
    throughput::SUBCOMMAND,
    latency::SUBCOMMAND,
    serve::SUBCOMMAND,
    sweep::SUBCOMMAND,
    relayout::SUBCOMMAND,
    compare::SUBCOMMAND,
    report::SUBCOMMAND,
    simulate::SUBCOMMAND,
];

fn flags(command: Command) -> Command {
    command.subcommand_required(true).subcommands(MEASUREMENTS.iter().map(Subcommand::command))
}

fn run(matches: &ArgMatches) -> Result<u8> {
    let (name, flags) = matches.subcommand().expect("clap requires a measurement; this is a bug");
    let measurement = MEASUREMENTS.iter().find(|m| m.name == name);
    (measurement.expect("clap knows only the registered measurements; this is a bug").run)(flags)
}

//! `pipeline-infer bench`: measurements with made-up work, one file each, in [`MEASUREMENTS`].

mod figures;
mod late;
mod phases;
mod record;
mod relayout;
mod simulate;
mod spread;
mod throughput;

use clap::{ArgMatches, Command};

use super::Subcommand;
use crate::error::Result;

pub(super) const SUBCOMMAND: Subcommand =
    Subcommand { name: "bench", about: "Measures a model with made-up requests", flags, run };

/// All measurements.
const MEASUREMENTS: &[Subcommand] = &[throughput::SUBCOMMAND, relayout::SUBCOMMAND, simulate::SUBCOMMAND];

fn flags(command: Command) -> Command {
    command.subcommand_required(true).subcommands(MEASUREMENTS.iter().map(Subcommand::command))
}

fn run(matches: &ArgMatches) -> Result<u8> {
    let (name, flags) = matches.subcommand().expect("clap requires a measurement; this is a bug");
    let measurement = MEASUREMENTS.iter().find(|m| m.name == name);
    (measurement.expect("clap knows only the registered measurements; this is a bug").run)(flags)
}

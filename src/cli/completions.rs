//! `pipeline-infer completions SHELL`: a completion script on stdout.

use clap::{Arg, ArgMatches, Command, builder::EnumValueParser};
use clap_complete::Shell;

use super::Subcommand;
use crate::error::Result;

pub(super) const SUBCOMMAND: Subcommand =
    Subcommand { name: "completions", about: "Prints a completion script for a shell", flags, run };

fn flags(command: Command) -> Command {
    let shell = Arg::new("shell").value_name("SHELL").required(true).help("The shell");
    command.arg(shell.value_parser(EnumValueParser::<Shell>::new()))
}

fn run(matches: &ArgMatches) -> Result<u8> {
    let shell: Shell = *matches.get_one("shell").expect("clap requires the shell; this is a bug");
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut super::command(), "pipeline-infer", &mut script);
    super::print(&script)
}

//! `pipeline-infer man`: the manual page on stdout.

use clap::ArgMatches;

use super::Subcommand;
use crate::error::{Error, Result};

pub(super) const SUBCOMMAND: Subcommand =
    Subcommand { name: "man", about: "Prints the manual page (roff)", flags: |command| command, run };

fn run(_: &ArgMatches) -> Result<u8> {
    let mut page = Vec::new();
    clap_mangen::Man::new(super::command()).render(&mut page).map_err(|e| Error::io("manual page", e))?;
    super::print(&page)
}

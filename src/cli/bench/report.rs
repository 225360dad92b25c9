//! `pipeline-infer bench report`: results of files as one table, and drawn.

use std::path::PathBuf;

use clap::{ArgMatches, Args, Command, FromArgMatches};

use super::{
    output::Output,
    plot::{self, X, Y},
    results::{self, Point},
};
use crate::{
    cli::Subcommand,
    error::{Error, Result},
};

pub(super) const SUBCOMMAND: Subcommand =
    Subcommand { name: "report", about: "Tables and plots of results that were kept as JSON", flags, run };

#[derive(Debug, Clone, Args)]
struct ReportArgs {
    /// Files of what bench has printed with --format json
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
    /// Keeps workloads whose id contains this; repeatable
    #[arg(long, value_name = "TEXT")]
    only: Vec<String>,
    #[command(flatten)]
    output: Output,
    /// What --plot has to the right [default: output tokens/s, with times to the first token and per token upwards]
    #[arg(long, value_name = "FIGURE", requires = "plot", requires = "plot_y", help_heading = "Output")]
    plot_x: Option<X>,
    /// What --plot has upwards
    #[arg(long, value_name = "FIGURE", requires = "plot_x", help_heading = "Output")]
    plot_y: Option<Y>,
    /// What stands above --plot
    #[arg(long, value_name = "TEXT", requires = "plot", default_value = "results", help_heading = "Output")]
    plot_title: String,
}

fn flags(command: Command) -> Command {
    ReportArgs::augment_args(command)
}

fn run(matches: &ArgMatches) -> Result<u8> {
    let args = ReportArgs::from_arg_matches(matches).expect("clap has parsed these flags; this is a bug");
    args.output.check()?;
    let mut points: Vec<Point> = Vec::new();
    for path in &args.files {
        points.extend(results::read(path)?);
    }
    points.retain(|point| args.only.is_empty() || args.only.iter().any(|text| point.id().contains(text)));
    if points.is_empty() {
        return Err(Error::usage("--only", "no workload has such an id"));
    }
    let picture = args.output.plot.is_some().then(|| match (args.plot_x, args.plot_y) {
        (Some(x), Some(y)) => plot::growth(&args.plot_title, &points, x, y),
        _ => plot::latencies(&args.plot_title, &points),
    });
    args.output.write(&points, None, picture)
}

//! `pipeline-infer bench serve`: requests that come at a rate, as clients send them.

use clap::{ArgMatches, Args, Command, FromArgMatches, value_parser};

use super::{
    arrivals::{Arrivals, Kind, rate},
    figures::{Figures, Subject},
    goodput::Limit,
    output::Output,
    plot,
    random::Vocab,
    results::Point,
    session::{Runs, Session},
    throughput::own_defaults,
    workload::{FromFile, Lengths, Workload},
};
use crate::{
    cli::{Subcommand, interrupt::Interrupt, setup::Setup},
    error::{Error, Result},
};

pub(super) const SUBCOMMAND: Subcommand =
    Subcommand { name: "serve", about: "Latencies of requests that come at a rate, and goodput", flags, run };

const REQUESTS: u32 = 100;
const RATES_MAX: usize = 100;

#[derive(Debug, Clone, Args)]
struct ServeArgs {
    #[command(flatten)]
    setup: Setup,
    #[command(flatten)]
    work: WorkArgs,
    #[command(flatten)]
    lengths: Lengths,
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
    /// Requests of a run [default: 100, or all of --prompt-file]
    #[arg(long, value_name = "N", value_parser = value_parser!(u32).range(1..=1_000_000))]
    requests: Option<u32>,
    /// Requests a second, whatever has become of the earlier ones; inf is all at once. Several are measured one after
    /// another: 1,2,4,8
    #[arg(long, value_name = "RATE", default_value = "inf", value_delimiter = ',', value_parser = rate)]
    request_rate: Vec<f64>,
    /// How they are spread
    #[arg(long, value_name = "KIND", default_value = "poisson")]
    arrival: Kind,
    /// Requests of a burst, with --arrival burst
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = value_parser!(u32).range(1..=1_000_000))]
    burst_size: u32,
    /// Counts requests that keep all these limits, in milliseconds: ttft:500 tpot:50 (e2el, too)
    #[arg(long, value_name = "KEY:MS", num_args = 1.., value_delimiter = ',')]
    goodput: Vec<Limit>,
}

fn flags(command: Command) -> Command {
    own_defaults(ServeArgs::augment_args(command))
        .mut_arg("repeat", |arg| arg.help("Runs that are measured at each rate [default: 1]"))
        .mut_arg("warmup", |arg| {
            arg.help("Runs that are not measured, before the others: all requests at once")
        })
}

fn run(matches: &ArgMatches) -> Result<u8> {
    let args = ServeArgs::from_arg_matches(matches).expect("clap has parsed these flags; this is a bug");
    let ServeArgs { setup, work, lengths, from, runs, output } = args;
    if work.request_rate.len() > RATES_MAX {
        return Err(Error::usage("--request-rate", format!("more than {RATES_MAX} rates")));
    }
    let workload = Workload::new(work.requests, REQUESTS, lengths, &from)?;
    let mut workloads: Vec<Workload> =
        work.request_rate.iter().map(|&rate| workload.clone().arriving(work.arrivals(rate))).collect();
    workloads.iter().try_for_each(|workload| {
        workload.check(setup.max_context)?;
        workload.check_waiting(&setup, runs.warmup > 0)
    })?;
    output.check()?;
    Interrupt::install()?;
    let runs = Runs { repeat: runs.repeat.or(Some(1)), ..runs };
    let mut session = Session::start(&setup, &runs, &workload.need(), output.shows())?;
    let vocab = Vocab::of(session.engine.spec());
    let (mut points, mut tables): (Vec<Point>, Vec<String>) = Default::default();
    for workload in &mut workloads {
        workload.prepare(&session.engine)?;
        let measured = session.measure(&|run, warms_up| workload.work(run, warms_up, vocab))?;
        let subject = Subject { bench: "serve", setup: &setup, workload, good: &work.goodput };
        let figures = Figures::new(&subject, &session, &measured);
        points.push(figures.point());
        tables.push(figures.table(&measured));
    }
    // Of one rate all there is to tell; of several a row each.
    let table = (tables.len() == 1).then(|| tables.remove(0));
    let picture = output.plot.is_some().then(|| plot::latencies("requests at rates", &points));
    let code = output.write(&points, table, picture)?;
    session.engine.end()?;
    Ok(code)
}

impl WorkArgs {
    fn arrivals(&self, rate: f64) -> Arrivals {
        let request_rate = Some(rate).filter(|rate| rate.is_finite());
        match self.arrival {
            _ if request_rate.is_none() => Arrivals::at_once(),
            Kind::Burst => Arrivals { request_rate, arrival: Kind::Burst, burst_size: self.burst_size },
            arrival => Arrivals { request_rate, arrival, burst_size: 1 },
        }
    }
}

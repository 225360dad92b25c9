//! `pipeline-infer bench throughput`: many requests at once, from the first one's submission to the last one's end.

use std::time::Instant;

use clap::{ArgMatches, Args, Command, FromArgMatches, ValueEnum, value_parser};
use serde::Serialize;

use super::figures::{Figures, Run};
use crate::{
    backend::mix,
    batch::KV_BLOCK,
    cli::{Subcommand, interrupt::Interrupt, loading::Loaded, setup::Setup},
    engine::{Engine, RUNNING_MAX},
    error::{Error, Result},
    request::{Event, Prompt, Request, Usage},
};

pub(super) const SUBCOMMAND: Subcommand =
    Subcommand { name: "throughput", about: "Tokens a second of many requests at once", flags, run };

/// Tokens of all requests at most: their prompts are made before the clock starts.
const TOKENS_MAX: u64 = 1 << 30;

#[derive(Debug, Clone, Args)]
struct ThroughputArgs {
    #[command(flatten)]
    setup: Setup,
    #[command(flatten)]
    workload: Workload,
    #[command(flatten)]
    runs: Runs,
    /// table is for people; json is one object
    #[arg(long, value_name = "FORMAT", default_value = "table", help_heading = "Output")]
    format: Format,
}

/// What is asked: requests at once, greedy, past end-of-sequence tokens.
#[derive(Debug, Clone, Copy, PartialEq, Args, Serialize)]
#[command(next_help_heading = "Workload")]
pub(super) struct Workload {
    /// Requests, all submitted at once
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = value_parser!(u32).range(1..=1_000_000))]
    pub(super) requests: u32,
    /// Prompt tokens of each, drawn from the vocabulary
    #[arg(long, value_name = "TOKENS", default_value_t = 512, value_parser = value_parser!(u32).range(1..=100_000_000))]
    pub(super) input_len: u32,
    /// New tokens of each
    #[arg(long, value_name = "TOKENS", default_value_t = 128, value_parser = value_parser!(u32).range(1..=100_000_000))]
    pub(super) output_len: u32,
    /// Draws the prompts: the same seed, the same prompts
    #[arg(long, value_name = "SEED", default_value_t = 0)]
    pub(super) seed: u64,
}

/// How often.
#[derive(Debug, Clone, Copy, Args)]
#[command(next_help_heading = "Workload")]
struct Runs {
    /// Runs that are not measured, before the others
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = value_parser!(u32).range(0..=1000))]
    warmup: u32,
    /// Runs that are measured
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = value_parser!(u32).range(1..=1000))]
    repeat: u32,
}

/// How figures look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Format {
    Table,
    Json,
}

fn flags(command: Command) -> Command {
    // These two have defaults of their own here.
    ThroughputArgs::augment_args(command)
        .mut_arg("max_context", |arg| {
            arg.help("The longest sequence, prompt and answer together [default: as long as they are]")
        })
        .mut_arg("running", |arg| {
            arg.help("Sequences that run at once at most; others wait [default: all requests]")
        })
}

fn run(matches: &ArgMatches) -> Result<u8> {
    let args = ThroughputArgs::from_arg_matches(matches).expect("clap has parsed these flags; this is a bug");
    args.workload.check(args.setup.max_context)?;
    // Nobody listens for signals: one ends the process.
    Interrupt::install()?;
    let (engine, loading) = args.start()?;
    for warmup in 0..args.runs.warmup {
        let run = args.workload.run(&engine, u64::from(warmup))?;
        tracing::info!(seconds = run.seconds, "warm-up");
    }
    let before = engine.stats();
    let mut runs = Vec::new();
    for repeat in 0..args.runs.repeat {
        let run = args.workload.run(&engine, u64::from(args.runs.warmup + repeat))?;
        tracing::info!(seconds = run.seconds, "run");
        runs.push(run);
    }
    let figures = Figures::new(args.workload, &engine, loading, &runs, &before);
    let text = match args.format {
        Format::Table => figures.table(&before, &engine.stats()),
        Format::Json => figures.json(),
    };
    crate::cli::print(text.as_bytes())
}

impl ThroughputArgs {
    /// An engine with room for the workload, and the time that it took to load.
    fn start(&self) -> Result<(Engine, Loaded)> {
        let Workload { requests, input_len, output_len, .. } = self.workload;
        let mut builder = self.setup.builder()?;
        if self.setup.max_context.is_none() {
            builder = builder.max_context(self.workload.context());
        }
        if self.setup.running.is_none() {
            builder = builder.running((requests as usize).min(RUNNING_MAX));
        }
        let asked = || format!("--input-len {input_len} --output-len {output_len}");
        let (engine, loading) =
            self.setup.start_timed(builder, self.format == Format::Table).map_err(|error| match error {
                Error::Usage { what, why } if what == "--max-context" && self.setup.max_context.is_none() => {
                    Error::usage(asked(), why)
                }
                error => error,
            })?;
        if engine.context_max() < self.workload.context() {
            let room = engine.context_max();
            return Err(Error::usage(asked(), format!("a sequence has room for {room} tokens: --kv-memory")));
        }
        let wanted = requests as usize * (self.workload.context() - 1).next_multiple_of(KV_BLOCK);
        if engine.kv_tokens() < wanted && self.setup.running.is_none() {
            tracing::warn!(
                tokens = engine.kv_tokens(),
                wanted,
                "the KV cache does not hold all requests at once"
            );
        }
        Ok((engine, loading))
    }
}

impl Workload {
    /// Prompt and answer together.
    fn context(&self) -> usize {
        self.input_len as usize + self.output_len as usize
    }

    fn check(&self, max_context: Option<usize>) -> Result<()> {
        let Workload { requests, input_len, output_len, .. } = *self;
        if let Some(max) = max_context.filter(|&max| max < self.context()) {
            let why = format!(
                "{max} tokens have no room for --input-len {input_len} and --output-len {output_len}"
            );
            return Err(Error::usage("--max-context", why));
        }
        let tokens = u64::from(requests) * self.context() as u64;
        if tokens > TOKENS_MAX {
            let why = format!("{requests} requests have {tokens} tokens in all, more than {TOKENS_MAX}");
            return Err(Error::usage("--requests", why));
        }
        Ok(())
    }

    /// The requests of one run.
    fn requests(&self, run: u64, vocab: usize) -> Vec<Request> {
        let request = |i: u32| {
            let mut random = Random::new(mix(mix(self.seed) ^ run) ^ u64::from(i));
            let ids = (0..self.input_len).map(|_| random.below(vocab)).collect();
            let mut request = Request::new(Prompt::Ids(ids));
            request.stop.max_tokens = Some(self.output_len);
            request.stop.ignore_eos = true;
            request
        };
        (0..self.requests).map(request).collect()
    }

    /// Runs it once, with prompts that no other run has: nothing can be had from a cache.
    fn run(&self, engine: &Engine, run: u64) -> Result<Run> {
        let requests = self.requests(run, engine.spec().vocab);
        let started = Instant::now();
        let mut open = requests.into_iter().map(|r| engine.submit(r)).collect::<Result<Vec<_>>>()?;
        let mut usages: Vec<Usage> = Vec::with_capacity(open.len());
        let mut failed = None;
        // In turns: when the last request ends, no heap of other ones' events is left to be read.
        while !open.is_empty() && failed.is_none() {
            open.retain_mut(|events| match events.next() {
                Some(Event::Token { .. }) => true,
                Some(Event::Finished { usage, .. }) => {
                    usages.push(usage);
                    false
                }
                Some(Event::Error(error)) => {
                    failed.get_or_insert(error);
                    false
                }
                None => false,
            });
        }
        let seconds = started.elapsed().as_secs_f64();
        if let Some(error) = failed {
            return Err(error);
        }
        let whole = |usage: &Usage| usage.completion_tokens == self.output_len;
        assert!(usages.iter().all(whole), "a request ended before its last token; this is a bug");
        Ok(Run { seconds, usages })
    }
}

/// SplitMix64.
pub(super) struct Random(u64);

impl Random {
    pub(super) fn new(seed: u64) -> Random {
        Random(mix(seed))
    }

    /// 64 random bits.
    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    fn below(&mut self, n: usize) -> u32 {
        // The upper half of a product with 64 random bits: a vocabulary has far fewer than 2^32 tokens.
        ((u128::from(self.next()) * n as u128) >> 64) as u32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prompts(workload: Workload, run: u64) -> Vec<Prompt> {
        workload.requests(run, 50).into_iter().map(|r| r.prompt).collect()
    }

    #[test]
    fn every_request_of_every_run_has_a_prompt_of_its_own() {
        let workload = Workload { requests: 3, input_len: 40, output_len: 2, seed: 0 };
        let mut all: Vec<Prompt> = (0..3).flat_map(|run| prompts(workload, run)).collect();
        assert_eq!(prompts(workload, 1), all[3..6]);
        all.extend(prompts(Workload { seed: 1, ..workload }, 0));
        for (i, prompt) in all.iter().enumerate() {
            let Prompt::Ids(ids) = prompt else { panic!("{prompt:?}") };
            assert!(
                ids.len() == 40 && ids.iter().all(|&id| id < 50) && !all[..i].contains(prompt),
                "{ids:?}"
            );
        }
    }

    #[test]
    fn what_has_no_room_is_refused() {
        let workload = Workload { requests: 2, input_len: 60, output_len: 5, seed: 0 };
        workload.check(None).unwrap();
        workload.check(Some(65)).unwrap();
        let told = workload.check(Some(64)).unwrap_err().to_string();
        assert_eq!(told, "--max-context: 64 tokens have no room for --input-len 60 and --output-len 5");
        let many = Workload { requests: 1_000_000, input_len: 100_000_000, ..workload };
        assert!(many.check(None).unwrap_err().to_string().starts_with("--requests: "));
    }
}

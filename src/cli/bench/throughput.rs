//! `pipeline-infer bench throughput`: many requests at once, from the first one's submission to the last one's end.

use std::time::{Duration, Instant};

use clap::{ArgMatches, Args, Command, FromArgMatches, ValueEnum, value_parser};
use serde::Serialize;

use super::{
    figures::{Figures, Run},
    record::Recorder,
};
use crate::{
    backend::mix,
    batch::KV_BLOCK,
    cli::{Subcommand, interrupt::Interrupt, loading::Loaded, setup::Setup},
    engine::{Engine, Events, RUNNING_MAX},
    error::{Error, Result},
    request::{Event, Prompt, Request, Usage},
};

pub(super) const SUBCOMMAND: Subcommand =
    Subcommand { name: "throughput", about: "Tokens a second of many requests at once", flags, run };

/// Tokens of each request before one more comes, at most: what it disturbs has settled by then.
const SETTLED_TURNS: u32 = 64;
/// Tokens of all requests at most: their prompts are made before the clock starts.
const TOKENS_MAX: u64 = 1 << 30;
/// How often what the engine tells is read while nothing comes.
const PATIENCE: Duration = Duration::from_millis(50);

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
    /// So many tokens of each prompt, from its first on, are the same in all requests of a run
    #[arg(long, value_name = "TOKENS", default_value_t = 0)]
    pub(super) shared_prefix: u32,
    /// One more request with a prompt of so many tokens, and one new token, once each of the others has a quarter of
    /// its tokens, or 64
    #[arg(long, value_name = "TOKENS", value_parser = value_parser!(u32).range(1..=100_000_000))]
    pub(super) then_input_len: Option<u32>,
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
    /// Measures every pass of a GPU, not one in eight: spans become exact, and each pass takes some microseconds more
    #[arg(long)]
    exact: bool,
}

/// How figures look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Format {
    Table,
    Json,
}

fn flags(command: Command) -> Command {
    // These have defaults of their own here.
    ThroughputArgs::augment_args(command)
        .mut_arg("max_context", |arg| {
            arg.help("The longest sequence, prompt and answer together [default: as long as they are]")
        })
        .mut_arg("running", |arg| {
            arg.help("Sequences that run at once at most; others wait [default: all requests]")
        })
        .mut_arg("waiting", |arg| {
            arg.help(
                "Requests that wait for their first step at most; more are refused [default: all requests]",
            )
        })
}

fn run(matches: &ArgMatches) -> Result<u8> {
    let args = ThroughputArgs::from_arg_matches(matches).expect("clap has parsed these flags; this is a bug");
    args.workload.check(args.setup.max_context)?;
    // Nobody listens for signals: one ends the process.
    Interrupt::install()?;
    let (engine, loading) = args.start()?;
    for warmup in 0..args.runs.warmup {
        let run = args.workload.run(&engine, u64::from(warmup), None)?;
        tracing::info!(seconds = run.seconds, "warm-up");
    }
    let before = engine.stats();
    let mut recorder = Recorder::new(&engine);
    let mut runs = Vec::new();
    for repeat in 0..args.runs.repeat {
        let run = args.workload.run(&engine, u64::from(args.runs.warmup + repeat), Some(&mut recorder))?;
        tracing::info!(seconds = run.seconds, "run");
        runs.push(run);
    }
    let figures = Figures::new(args.workload, &engine, loading, &runs, &before);
    let text = match args.format {
        Format::Table => figures.table(&before.stages, &engine.stats().stages),
        Format::Json => figures.json(),
    };
    crate::cli::print(text.as_bytes())
}

impl ThroughputArgs {
    /// An engine with room for the workload, and the time that it took to load.
    fn start(&self) -> Result<(Engine, Loaded)> {
        let Workload { requests, input_len, output_len, then_input_len, .. } = self.workload;
        let mut builder = self.setup.builder()?;
        builder = builder.expect(input_len as usize, output_len as usize);
        if self.runs.exact {
            builder = builder.measure_all();
        }
        if self.setup.max_context.is_none() {
            builder = builder.max_context(self.workload.context());
        }
        let all = requests as usize + usize::from(then_input_len.is_some());
        if self.setup.running.is_none() {
            builder = builder.running(all.min(RUNNING_MAX));
        }
        if self.setup.waiting.is_none() {
            builder = builder.waiting(all);
        }
        let asked = || match then_input_len {
            Some(late) => {
                format!("--input-len {input_len} --output-len {output_len} --then-input-len {late}")
            }
            None => format!("--input-len {input_len} --output-len {output_len}"),
        };
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
        let wanted = self.workload.kv_tokens();
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
    /// Prompt and answer together, of the longest.
    fn context(&self) -> usize {
        let late = self.then_input_len.map_or(0, |input_len| input_len as usize + 1);
        (self.input_len as usize + self.output_len as usize).max(late)
    }

    /// Tokens of the KV cache that all requests hold at once. Nobody's last token is fed.
    fn kv_tokens(&self) -> usize {
        let each = (self.input_len + self.output_len - 1) as usize;
        let late = self.then_input_len.map_or(0, |input_len| input_len as usize);
        self.requests as usize * each.next_multiple_of(KV_BLOCK) + late.next_multiple_of(KV_BLOCK)
    }

    fn check(&self, max_context: Option<usize>) -> Result<()> {
        let Workload { requests, input_len, output_len, shared_prefix, then_input_len, .. } = *self;
        if let Some(max) = max_context.filter(|&max| max < self.context()) {
            let late = then_input_len.map_or(String::new(), |len| format!(" and --then-input-len {len}"));
            let why = format!(
                "{max} tokens have no room for --input-len {input_len} and --output-len {output_len}{late}"
            );
            return Err(Error::usage("--max-context", why));
        }
        if shared_prefix > input_len {
            let why = format!("{shared_prefix} tokens are more than --input-len {input_len}");
            return Err(Error::usage("--shared-prefix", why));
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
        let shared = self.random(run, None).ids(self.shared_prefix, vocab);
        let request = |i: u32| {
            let own = self.random(run, Some(i)).ids(self.input_len - self.shared_prefix, vocab);
            request([&shared[..], &own].concat(), self.output_len)
        };
        (0..self.requests).map(request).collect()
    }

    /// The one that comes later.
    fn late_request(&self, run: u64, vocab: usize) -> Option<Request> {
        let input_len = self.then_input_len?;
        Some(request(self.random(run, Some(self.requests)).ids(input_len, vocab), 1))
    }

    /// Numbers for one request of a run, or for what all have in common.
    fn random(&self, run: u64, request: Option<u32>) -> Random {
        Random(mix(mix(mix(self.seed) ^ run) ^ request.map_or(u64::MAX, u64::from)))
    }

    /// Runs it once, with prompts that no other run has: nothing can be had from an earlier one.
    fn run(&self, engine: &Engine, run: u64, mut recorder: Option<&mut Recorder>) -> Result<Run> {
        let vocab = engine.spec().vocab;
        let (requests, mut then) = (self.requests(run, vocab), self.late_request(run, vocab));
        recorder.iter_mut().for_each(|recorder| recorder.begin(self.requests as usize));
        let started = Instant::now();
        let mut open = requests.into_iter().map(|r| engine.submit(r)).collect::<Result<Vec<_>>>()?;
        let mut usages: Vec<Usage> = Vec::with_capacity(open.len());
        let (mut failed, mut late) = (None, None);
        let (mut turns, settled) = (0, (self.output_len / 4).clamp(1, SETTLED_TURNS));
        // In turns: when the last request ends, no heap of other ones' events is left to be read.
        while !open.is_empty() && failed.is_none() {
            open.retain_mut(|events| match next(events, &mut recorder) {
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
            // Each turn brings each a token.
            turns += 1;
            if turns == settled
                && let Some(request) = then.take()
            {
                late = Some(engine.submit(request)?);
            }
        }
        let mut late_usage = None;
        while let Some(event) = late.as_mut().and_then(|events| next(events, &mut recorder)) {
            match event {
                Event::Finished { usage, .. } => late_usage = Some(usage),
                Event::Error(error) => failed = failed.or(Some(error)),
                Event::Token { .. } => (),
            }
        }
        let seconds = started.elapsed().as_secs_f64();
        if let Some(error) = failed {
            return Err(error);
        }
        let whole = |usage: &Usage| usage.completion_tokens == self.output_len;
        assert!(usages.iter().all(whole), "a request ended before its last token; this is a bug");
        let record = recorder.map(Recorder::end).unwrap_or_default();
        Ok(Run { seconds, usages, late: late_usage, record })
    }
}

/// Greedy, and past end-of-sequence tokens.
fn request(ids: Vec<u32>, output_len: u32) -> Request {
    let mut request = Request::new(Prompt::Ids(ids));
    request.stop.max_tokens = Some(output_len);
    request.stop.ignore_eos = true;
    request
}

/// A request's next event. What the engine tells meanwhile is read.
fn next(events: &mut Events, recorder: &mut Option<&mut Recorder>) -> Option<Event> {
    loop {
        if let Some(recorder) = recorder {
            recorder.read();
        }
        if let Ok(event) = events.next_timeout(PATIENCE) {
            return event;
        }
    }
}

/// SplitMix64.
pub(super) struct Random(u64);

impl Random {
    fn ids(mut self, n: u32, vocab: usize) -> Vec<u32> {
        (0..n).map(|_| self.below(vocab)).collect()
    }

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

    const WORKLOAD: Workload = Workload {
        requests: 3,
        input_len: 40,
        output_len: 2,
        seed: 0,
        shared_prefix: 0,
        then_input_len: None,
    };

    #[test]
    fn every_request_of_every_run_has_a_prompt_of_its_own() {
        let mut all: Vec<Prompt> = (0..3).flat_map(|run| prompts(WORKLOAD, run)).collect();
        assert_eq!(prompts(WORKLOAD, 1), all[3..6]);
        all.extend(prompts(Workload { seed: 1, ..WORKLOAD }, 0));
        let late = Workload { then_input_len: Some(40), ..WORKLOAD }.late_request(0, 50).unwrap();
        assert_eq!(late.stop.max_tokens, Some(1));
        all.push(late.prompt);
        for (i, prompt) in all.iter().enumerate() {
            let Prompt::Ids(ids) = prompt else { panic!("{prompt:?}") };
            assert!(
                ids.len() == 40 && ids.iter().all(|&id| id < 50) && !all[..i].contains(prompt),
                "{ids:?}"
            );
        }
    }

    #[test]
    fn a_shared_prefix_is_a_runs_own() {
        let workload = Workload { shared_prefix: 30, ..WORKLOAD };
        let ids = |run| {
            prompts(workload, run).into_iter().map(|prompt| match prompt {
                Prompt::Ids(ids) => ids,
                other => panic!("{other:?}"),
            })
        };
        let first: Vec<Vec<u32>> = ids(0).collect();
        assert!(first.iter().all(|ids| ids.len() == 40 && ids[..30] == first[0][..30]));
        assert!(first[0][30..] != first[1][30..] && first[1][30..] != first[2][30..]);
        assert!(ids(1).all(|ids| ids[..16] != first[0][..16]));
    }

    #[test]
    fn what_has_no_room_is_refused() {
        let workload = Workload { requests: 2, input_len: 60, output_len: 5, ..WORKLOAD };
        workload.check(None).unwrap();
        workload.check(Some(65)).unwrap();
        let told = workload.check(Some(64)).unwrap_err().to_string();
        assert_eq!(told, "--max-context: 64 tokens have no room for --input-len 60 and --output-len 5");
        let many = Workload { requests: 1_000_000, input_len: 100_000_000, ..workload };
        assert!(many.check(None).unwrap_err().to_string().starts_with("--requests: "));
        let late = Workload { then_input_len: Some(65), ..workload };
        assert!(late.check(Some(65)).unwrap_err().to_string().ends_with("and --then-input-len 65"));
        late.check(Some(66)).unwrap();
        assert_eq!((workload.kv_tokens(), late.kv_tokens()), (128, 208));
        let shared = Workload { shared_prefix: 61, ..workload };
        assert!(shared.check(None).unwrap_err().to_string().starts_with("--shared-prefix: 61 tokens"));
    }
}

//! What planning costs the host: a step of 1,024 running sequences is planned, and an earlier one's tokens are recorded.
//!
//! With one slot a step holds all of them, with four a quarter. Contexts differ by 64 times, and the time should not; nor should
//! it where a prompt waits whose keys and values are there but for its end, which has no room.

use std::{
    collections::VecDeque,
    hint::black_box,
    sync::Arc,
    time::{Duration, Instant},
};

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use pipeline_infer::{
    SamplingParams,
    batch::{KV_BLOCK, Sampled, SeqId, Step},
    schedule::{BlockPool, NewSequence, Scheduler, SchedulerConfig},
};

const RUNNING: usize = 1024;
/// Tokens that each has.
const CONTEXTS: [usize; 2] = [128, 8192];
/// Room for the longest: devices have as much memory whatever it is used for.
const BLOCKS: usize = RUNNING * (with_answer(CONTEXTS[1]) / KV_BLOCK);
/// Steps of each sequence before it begins anew.
const STEPS: usize = 256;

/// Tokens of a sequence at most whose prompt has so many.
const fn with_answer(context: usize) -> usize {
    context + STEPS + 64
}

struct Running {
    scheduler: Scheduler,
    in_flight: VecDeque<Step>,
}

impl Running {
    /// Past their prompts, with as many steps in flight as may be. Others have had all blocks before, and their keys and values can
    /// still be found: blocks are taken from those.
    fn new(slots: usize, context: usize) -> Self {
        // All prompts in a few steps.
        let chunk = RUNNING * context / 4;
        let config = SchedulerConfig {
            slots,
            chunk,
            chunk_min: chunk,
            running_max: RUNNING,
            ahead: true,
            prefix_reuse: true,
        };
        let scheduler = Scheduler::new(config, BlockPool::new(BLOCKS));
        let mut running = Running { scheduler, in_flight: VecDeque::new() };
        running.add(RUNNING as u32, CONTEXTS[1]);
        while running.scheduler.waiting() > 0 {
            running.step();
        }
        while !running.in_flight.is_empty() {
            running.apply();
        }
        // One from here, one from there.
        (0..RUNNING).for_each(|i| running.scheduler.end(SeqId((RUNNING + i * 389 % RUNNING) as u64)));
        running.add(0, context);
        // Those with prompts have been applied.
        let decodes = |step: &Step| step.batch.rows() == RUNNING / slots;
        while !(running.in_flight.len() == config.in_flight_max() && running.in_flight.iter().all(decodes)) {
            running.step();
        }
        running
    }

    /// As many sequences with prompts of so many tokens, none of which begins like another one.
    fn add(&mut self, first: u32, context: usize) {
        let sampling = Arc::new(SamplingParams::default());
        for id in first..first + RUNNING as u32 {
            let prompt = (0..context as u32).map(|place| id << 16 | place).collect();
            self.scheduler.add(sequence(id, prompt, with_answer(context), &sampling));
        }
    }

    /// Plans a step, and applies the oldest one once no more fit.
    fn step(&mut self) {
        match self.scheduler.plan() {
            Some(step) => self.in_flight.push_back(step),
            None => self.apply(),
        }
    }

    fn apply(&mut self) {
        let step = self.in_flight.pop_front().expect("a step in flight");
        let token = |seq: SeqId| Sampled { seq, id: 5, logprobs: None };
        let sampled = step.batch.outputs.iter().map(|output| token(output.seq)).collect();
        black_box(self.scheduler.apply(step.step, sampled));
    }
}

fn sequence(id: u32, prompt: Arc<[u32]>, tokens_max: usize, sampling: &Arc<SamplingParams>) -> NewSequence {
    let (seq, sampling) = (SeqId(u64::from(id)), sampling.clone());
    NewSequence { seq, prompt, images: None, tokens_max, sampling, seed: 0, priority: 0 }
}

fn plan_and_apply(c: &mut Criterion) {
    let mut group = c.benchmark_group("plan and apply 1024");
    group.sample_size(10).measurement_time(Duration::from_secs(2));
    for slots in [1, 4] {
        for context in CONTEXTS {
            let mut running = Running::new(slots, context);
            let mut left = STEPS * slots / 2;
            let mut all = Vec::new();
            group.bench_function(BenchmarkId::new(format!("{slots} slots"), context), |b| {
                b.iter_custom(|times| {
                    let before = all.len();
                    for _ in 0..times {
                        if left == 0 {
                            running = Running::new(slots, context);
                            left = STEPS * slots / 2;
                        }
                        left -= 1;
                        let began = Instant::now();
                        running.apply();
                        let step = running.scheduler.plan().expect("there is room for a step");
                        all.push(began.elapsed());
                        assert_eq!(step.batch.rows(), RUNNING / slots);
                        running.in_flight.push_back(step);
                    }
                    all[before..].iter().sum()
                })
            });
            // Neighbours on the machine disturb a mean.
            all.sort_unstable();
            let at = |share: f64| {
                all.get((all.len() as f64 * share) as usize).map_or(0.0, |t| t.as_secs_f64() * 1e6)
            };
            let (median, most) = (at(0.5), at(0.9));
            println!("{slots} slots, context {context}: median {median:.1} µs, 9 of 10 at most {most:.1} µs");
        }
    }
    group.finish();
}

/// A sequence that decodes, and a prompt that waits for its end.
fn waited_for(context: usize) -> Running {
    let blocks = context / KV_BLOCK;
    let config =
        SchedulerConfig { ahead: true, chunk: 1 << 20, chunk_min: 1 << 20, ..SchedulerConfig::default() };
    let scheduler = Scheduler::new(config, BlockPool::new(blocks + 192));
    let mut running = Running { scheduler, in_flight: VecDeque::new() };
    let sampling = Arc::new(SamplingParams::default());
    let add = |running: &mut Running, seq, first: u32, len: usize, answer| {
        let prompt = (first..first + len as u32).collect();
        running.scheduler.add(sequence(seq, prompt, len + answer - 1, &sampling));
    };
    add(&mut running, 0, 0, context, 1);
    running.step();
    running.apply();
    running.scheduler.end(SeqId(0));
    add(&mut running, 1, 1 << 20, 96 * KV_BLOCK, 2 * STEPS);
    add(&mut running, 2, 0, context + 128 * KV_BLOCK, 1);
    (0..4).for_each(|_| running.step());
    assert_eq!((running.scheduler.running(), running.scheduler.waiting()), (1, 1));
    running
}

fn plan_while_a_prompt_waits(c: &mut Criterion) {
    let mut group = c.benchmark_group("plan and apply 1 while a prompt waits");
    group.sample_size(10).measurement_time(Duration::from_secs(1));
    for context in [2048, 131_072] {
        let (mut running, mut left) = (waited_for(context), STEPS);
        group.bench_function(BenchmarkId::new("begun", context), |b| {
            b.iter_custom(|times| {
                let mut took = Duration::ZERO;
                for _ in 0..times {
                    if left == 0 {
                        (running, left) = (waited_for(context), STEPS);
                    }
                    left -= 1;
                    let began = Instant::now();
                    running.apply();
                    let step = running.scheduler.plan().expect("there is room for a step");
                    took += began.elapsed();
                    running.in_flight.push_back(step);
                }
                took
            })
        });
    }
    group.finish();
}

criterion_group!(benches, plan_and_apply, plan_while_a_prompt_waits);
criterion_main!(benches);

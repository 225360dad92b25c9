//! The scheduler under a virtual clock, over 100,000 random schedules a run: any number of stages, slots and blocks, requests
//! that come, stop and are cancelled at any moment. No block is leaked or leased twice, every request ends exactly once,
//! none starves, and each gets the tokens that it would get alone.
//!
//! A schedule that fails prints its number; `PIPELINE_INFER_SCHEDULE=NUMBER` runs that one alone, and
//! `PIPELINE_INFER_SCHEDULES=COUNT` says how many there are.

#[path = "simulate/checks.rs"]
mod checks;
#[path = "simulate/model.rs"]
mod model;
#[path = "simulate/policy.rs"]
mod policy;
#[path = "simulate/schedules.rs"]
mod schedules;

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use checks::{Checks, Seen};
use pipeline_infer::{
    batch::{KV_BLOCK, MicroBatch, SeqRows, SeqStart, Step},
    schedule::{SchedulerConfig, StageCost},
    simulate::{Machine, Simulation, Workload},
};
use schedules::Schedule;

const SCHEDULES: u64 = 100_000;
/// After so many failures a thread has seen enough.
const FAILURES_MAX: usize = 10;

fn number(variable: &str) -> Option<u64> {
    let text = std::env::var(variable).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{variable}={text}: not a number")))
}

/// How much a schedule is to read for a person.
fn size(seed: u64) -> usize {
    let Schedule { simulation, work } = Schedule::random(seed);
    let tokens: usize = work.iter().map(|a| a.prompt.len() + a.answer_max).sum();
    tokens + 20 * simulation.machine.stages.len()
}

#[test]
fn every_schedule_keeps_every_promise() {
    if let Some(seed) = number("PIPELINE_INFER_SCHEDULE") {
        let schedule = Schedule::random(seed);
        println!("{schedule:#?}");
        println!("{:?}", schedule.run());
        return;
    }
    let (count, next) = (number("PIPELINE_INFER_SCHEDULES").unwrap_or(SCHEDULES), AtomicU64::new(0));
    let run = || {
        let (mut failed, mut seen) = (Vec::new(), Seen::default());
        while failed.len() < FAILURES_MAX {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= count {
                break;
            }
            match catch_unwind(|| Schedule::random(seed).run()) {
                Ok(more) => seen += more,
                Err(_) => failed.push((size(seed), seed)),
            }
        }
        (failed, seen)
    };
    let (mut failed, mut seen) = (Vec::new(), Seen::default());
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..2).map(|_| scope.spawn(run)).collect();
        for thread in threads {
            let (more, also) = thread.join().expect("failures are caught");
            failed.extend(more);
            seen += also;
        }
    });
    println!("{seen:?}");
    failed.sort_unstable();
    let seeds: Vec<u64> = failed.iter().map(|&(_, seed)| seed).collect();
    assert!(
        seeds.is_empty(),
        "these fail, the smallest first; PIPELINE_INFER_SCHEDULE={}: {seeds:?}",
        seeds[0]
    );
    let Seen { steps, tokens, cancelled, on_device, preemptions, again, shared } = seen;
    let of_each = [steps / 50, tokens / 20, cancelled, on_device / 10, preemptions * 10, again * 10, shared];
    assert!(of_each.into_iter().all(|n| n >= count), "not all that can happen has: {seen:?}");
}

/// A step as the stages get it, made wrong if it can be.
type Tamper = fn(&mut Step) -> bool;

fn batch(step: &mut Step) -> &mut MicroBatch {
    Arc::make_mut(&mut step.batch)
}

/// The first two sequences that have earlier tokens, if their rows are there.
fn two(step: &mut Step) -> Option<(&mut SeqRows, &mut SeqRows)> {
    let mut later = batch(step).seqs.iter_mut().filter(|part| part.cached >= KV_BLOCK);
    later.next().zip(later.next())
}

const TAMPERS: &[(&str, Tamper)] = &[
    ("a block of another's", |step| {
        two(step)
            .map(|(a, b)| a.blocks = b.blocks.iter().take(1).chain(a.blocks.iter().skip(1)).collect())
            .is_some()
    }),
    ("two blocks in the wrong order", |step| {
        let part = batch(step).seqs.iter_mut().find(|part| part.cached >= 2 * KV_BLOCK);
        part.map(|part| {
            let mut blocks: Vec<u32> = part.blocks.iter().collect();
            blocks.swap(0, 1);
            part.blocks = blocks.into();
        })
        .is_some()
    }),
    ("a token of another sequence", |step| {
        let rows = step.batch.seqs.iter().find(|part| part.cached == 0 && part.len > 4).map(|part| part.row);
        rows.map(|row| batch(step).ids[row + 2] ^= 1).is_some()
    }),
    ("a last token at another's seat", |step| {
        let mut decode = batch(step).seqs.iter_mut().filter(|part| part.len == 1 && part.cached > 0);
        decode.next().zip(decode.next()).map(|(a, b)| std::mem::swap(&mut a.seat, &mut b.seat)).is_some()
    }),
    ("rows whose numbers are not kept", |step| {
        let part = batch(step).seqs.iter_mut().find(|part| part.cached > 0 && part.cached % KV_BLOCK == 3);
        // Into a block that nobody has.
        part.map(|part| {
            let mut blocks: Vec<u32> = part.blocks.iter().collect();
            blocks[part.cached / KV_BLOCK] = 299;
            part.blocks = blocks.into();
        })
        .is_some()
    }),
    ("a sampler that begins anew", |step| {
        let running = step.batch.seqs.iter().find(|part| part.cached > KV_BLOCK).cloned();
        running
            .map(|part| {
                let (sampling, prompt) = (Arc::default(), [1, 2, 3].into());
                let generated = [].into();
                let start = SeqStart { seq: part.seq, seat: part.seat, sampling, seed: 0, prompt, generated };
                batch(step).ends.push(part.seq);
                batch(step).starts.push(start);
            })
            .is_some()
    }),
];

#[test]
fn a_step_that_goes_wrong_once_is_noticed() {
    let config =
        SchedulerConfig { slots: 3, chunk: 40, running_max: 12, ahead: true, ..SchedulerConfig::default() };
    let cost = StageCost { base: 1e-6, row: 1e-8, ..StageCost::default() };
    let simulation = Simulation::new(Machine::new(vec![cost; 3]), config, 300);
    let mut draws = (0..u64::MAX).map(|i| i.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    let work = Workload { requests: 12, input_len: 50, output_len: 40, ..Workload::default() }
        .arrivals(|| draws.next().expect("endless"));
    for (what, tamper) in TAMPERS {
        let mut checks = Checks::new(config, 300, &work);
        checks.tamper = Some(*tamper);
        let run = catch_unwind(AssertUnwindSafe(|| simulation.run(&work, &mut checks)));
        assert!(checks.tampered, "{what}: never done");
        assert!(run.is_err(), "{what}: unnoticed");
    }
    simulation.run(&work, &mut Checks::new(config, 300, &work));
}

//! Thousands of interleavings of the pipeline's threads: nothing is read before it is there, nothing is written that is
//! still read, nobody waits for ever, and a failure is told as what it is. The same check finds bugs that are put in.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::Instant,
};

use pipeline_infer_protocol::{Setup, Way, Wire, drive::drive, seeded::SEEDED, wiring::wire};
use shuttle::{
    Config, FailurePersistence, Runner,
    scheduler::{PctScheduler, RandomScheduler, Scheduler},
};

/// Schedules of each setup and scheduler; `PIPELINE_INFER_SCHEDULES` sets another number.
const SCHEDULES: usize = 1000;
/// The schedules are the same in every run.
const SEED: u64 = 17;
/// Changes of priority in a schedule: so many orderings have to be met for a bug to show.
const PCT_DEPTH: usize = 3;

fn schedules() -> usize {
    let wanted = std::env::var("PIPELINE_INFER_SCHEDULES").ok();
    wanted.map_or(SCHEDULES, |n| n.parse().expect("PIPELINE_INFER_SCHEDULES is a number"))
}

/// Runs a setup so often under both schedulers; gives how often it ran, and what was wrong in the last run.
fn explore(wire: Wire, setup: Setup, schedules: usize, print: bool) -> (usize, Option<String>) {
    let runs = Arc::new(AtomicUsize::new(0));
    let run = |scheduler: Box<dyn Scheduler + Send>| {
        let mut config = Config::new();
        config.failure_persistence = if print { FailurePersistence::Print } else { FailurePersistence::None };
        config.silence_warnings = true;
        let runs = runs.clone();
        let runner = Runner::new(scheduler, config);
        let drive = move || {
            runs.fetch_add(1, Relaxed);
            drive(wire, &setup);
        };
        catch_unwind(AssertUnwindSafe(|| runner.run(drive))).map(drop)
    };
    let random = || run(Box::new(RandomScheduler::new_from_seed(SEED, schedules)));
    let pct = |()| run(Box::new(PctScheduler::new_from_seed(SEED, PCT_DEPTH, schedules)));
    let wrong = random().and_then(pct).err().map(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        text.or(panic.downcast_ref::<&str>().copied()).unwrap_or("a panic").to_string()
    });
    (runs.load(Relaxed), wrong)
}

fn holds(setup: Setup) {
    let since = Instant::now();
    let (runs, wrong) = explore(wire, setup, schedules(), true);
    assert_eq!(wrong, None, "{setup:?}, in schedule {runs}");
    println!("{setup:?}: {runs} schedules in {:.1?}", since.elapsed());
}

#[test]
fn peer_boundaries() {
    holds(Setup::new(3, 2, Way::Peer));
}

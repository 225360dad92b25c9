//! Many schedules of a pipeline, by two ways of choosing them.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
};

use shuttle::{
    Config, FailurePersistence, Runner,
    scheduler::{PctScheduler, RandomScheduler, Scheduler},
};

use crate::{Setup, Wire, drive::drive};

/// Schedules of each setup and scheduler; `PIPELINE_INFER_SCHEDULES` sets another number.
const SCHEDULES: usize = 4000;
/// The schedules are the same in every run.
const SEED: u64 = 17;
/// Changes of priority in a schedule: so many orderings have to be met for a bug to show.
const PCT_DEPTH: usize = 3;

/// Runs a setup so often under both schedulers; gives how often it ran, and what was wrong in the last run, whose
/// schedule is printed if `print` is.
pub fn explore(wire: Wire, setup: Setup, print: bool) -> (usize, Option<String>) {
    let wanted = std::env::var("PIPELINE_INFER_SCHEDULES").ok();
    let schedules = wanted.map_or(SCHEDULES, |n| n.parse().expect("PIPELINE_INFER_SCHEDULES is a number"));
    let runs = Arc::new(AtomicUsize::new(0));
    let run = |scheduler: Box<dyn Scheduler + Send>| {
        let mut config = Config::new();
        config.silence_warnings = true;
        config.failure_persistence = if print { FailurePersistence::Print } else { FailurePersistence::None };
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

//! Thousands of interleavings of the pipeline's threads: nothing is read before it is there, nothing is written that is
//! still read, nobody waits for ever, and a failure is told as what it is.

use std::time::Instant;

use pipeline_infer_protocol::{Setup, Way, explore::explore, wiring::wire};

fn holds(setup: Setup) {
    let since = Instant::now();
    let (runs, wrong) = explore(wire, setup, true);
    assert_eq!(wrong, None, "{setup:?}, in schedule {runs}");
    println!("{setup:?}: {runs} schedules in {:.1?}", since.elapsed());
}

#[test]
fn boundaries_between_gpus() {
    holds(Setup::new(3, 2, Way::Peer));
    holds(Setup::new(2, 1, Way::Peer));
}

#[test]
fn boundaries_through_pinned_memory() {
    holds(Setup::new(2, 2, Way::Staged));
}

#[test]
fn boundaries_through_the_host() {
    holds(Setup::new(3, 2, Way::Host));
}

#[test]
fn a_stage_alone() {
    holds(Setup::new(1, 2, Way::Peer));
}

#[test]
fn the_processor() {
    holds(Setup::new(3, 3, Way::Processor { one_thread: true }));
    holds(Setup::new(3, 3, Way::Processor { one_thread: false }));
}

/// Every order of the processor and GPUs over three stages.
#[test]
fn the_processor_beside_gpus() {
    for gpus in 1..7 {
        holds(Setup::new(3, 2, Way::Mixed { gpus }));
    }
}

/// Boundaries with less room than steps in flight make stages wait, and no more than that.
#[test]
fn one_entry_is_enough() {
    holds(Setup { ring: 1, ..Setup::new(3, 2, Way::Peer) });
    holds(Setup { ring: 1, ..Setup::new(3, 3, Way::Processor { one_thread: false }) });
    holds(Setup { ring: 1, ..Setup::new(3, 2, Way::Mixed { gpus: 0b010 }) });
    holds(Setup { ring: 1, ..Setup::new(3, 2, Way::Mixed { gpus: 0b101 }) });
}

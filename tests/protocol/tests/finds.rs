//! The check finds bugs that are put in, within the schedules that it tries where it should find none.

use pipeline_infer_protocol::{Setup, Way, explore::explore, seeded::SEEDED, wiring::wire};

/// What is wanted here is failures. Shuttle sets its hook once, and this one takes its place.
fn quiet() {
    shuttle::check_random(|| (), 1);
    std::panic::set_hook(Box::new(|_| ()));
}

/// The worker plans as many steps as may be in flight, and must never wait for room for one: nobody would take results.
#[test]
fn a_steps_channel_with_one_place_too_few_is_noticed() {
    quiet();
    let setup = Setup::new(3, 2, Way::Peer);
    let (runs, wrong) = explore(wire, Setup { steps_room: setup.steps_room - 1, ..setup }, false);
    assert_eq!(wrong.as_deref(), Some("the worker waits for room for a step"), "{runs} schedules");
}

#[test]
fn seeded_bugs_are_found() {
    quiet();
    let setups = [
        Setup { ring: 1, ..Setup::new(3, 2, Way::Peer) },
        Setup::new(2, 2, Way::Staged),
        Setup::new(3, 2, Way::Host),
        Setup::new(3, 3, Way::Processor { one_thread: false }),
        Setup { ring: 1, ..Setup::new(3, 2, Way::Mixed { gpus: 0b010 }) },
    ];
    let mut missed = Vec::new();
    for (name, wire) in SEEDED {
        let mut total = 0;
        let found = setups.iter().find_map(|&setup| {
            let (runs, wrong) = explore(*wire, setup, false);
            total += runs;
            wrong.map(|wrong| format!("{wrong} ({:?}, ring of {})", setup.way, setup.ring))
        });
        match found {
            Some(wrong) => println!("{name}: schedule {total}: {}", wrong.lines().next().unwrap_or_default()),
            None => missed.push(format!("{name}: not found in {total} schedules")),
        }
    }
    assert!(missed.is_empty(), "{missed:#?}");
}

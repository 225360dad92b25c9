//! One step ahead: a device that hands tokens on by itself, simulated with a clock. The host is hidden, and the pipeline
//! stays full.

mod common;

use std::collections::BTreeMap;

use common::world::{Wanted, World};
use pipeline_infer::{
    batch::{ON_DEVICE, Step},
    schedule::SchedulerConfig,
};
use proptest::prelude::*;

fn config(slots: usize, chunk: usize, running_max: usize, ahead: bool) -> SchedulerConfig {
    SchedulerConfig { slots, chunk, chunk_min: chunk, running_max, ahead, ..SchedulerConfig::default() }
}

/// When things happen, in units of one stage's time for a step. There are as many stages as slots.
struct Clock {
    world: World,
    /// From the end of the last stage until the host has read the tokens and planned.
    host: u64,
    now: u64,
    /// When each step in flight leaves the last stage.
    ends: BTreeMap<u64, u64>,
    /// Times that the first stage had nothing to begin.
    idle: u64,
    /// Read by the host.
    tokens: usize,
    /// Carried out by the device.
    rows: usize,
}

impl Clock {
    fn new(config: SchedulerConfig, host: u64) -> Self {
        let world = World::new(config, 4096);
        Clock { world, host, now: 0, ends: BTreeMap::new(), idle: 0, tokens: 0, rows: 0 }
    }

    /// One stage's time.
    fn tick(&mut self) {
        while self.world.done.front().is_some_and(|(step, _)| self.ends[&step.step] + self.host <= self.now) {
            self.tokens += self.world.read();
            self.world.plan();
        }
        self.world.plan();
        let come = |after: u64| self.ends.get(&after).is_some_and(|&end| end <= self.now);
        match self.world.queued.front() {
            Some(step) if step.after.is_none_or(come) => {
                self.ends.insert(step.step, self.now + self.world.config.slots as u64);
                self.rows += step.batch.rows();
                self.world.run();
            }
            _ => self.idle += 1,
        }
        self.now += 1;
    }
}

/// How long some work takes: each piece comes at its time. And the rows that the device has carried out.
fn time(config: SchedulerConfig, host: u64, work: &[(u64, Wanted)]) -> (u64, usize) {
    let mut clock = Clock::new(config, host);
    let mut coming = work.iter().enumerate().peekable();
    while coming.peek().is_some() || !clock.world.clients.is_empty() {
        while let Some((id, (_, wanted))) = coming.next_if(|(_, (at, _))| *at <= clock.now) {
            clock.world.add(id as u64, wanted);
        }
        clock.tick();
    }
    (clock.now, clock.rows)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    /// Whatever comes when: a host that needs a stage's time to answer costs next to nothing, against one that
    /// needs none and waits for every token. And no row is for nothing where only counts end answers.
    #[test]
    fn the_host_is_hidden(
        slots in 1usize..7,
        chunk in 8usize..200,
        work in prop::collection::vec((0u64..15, 1usize..200, 1usize..100), 1..40),
    ) {
        let work: Vec<(u64, Wanted)> = work
            .iter()
            .enumerate()
            .scan(0, |now, (id, &(pause, prompt, answer))| {
                *now += pause;
                Some((*now, Wanted::new(id as u64, prompt, answer, 0)))
            })
            .collect();
        let config = config(slots, chunk, 64, false);
        let (waiting, rows) = time(config, 0, &work);
        let needed: usize = work.iter().map(|(_, w)| w.prompt.len() + w.answer_max - 1).sum();
        prop_assert_eq!(rows, needed);
        let (ahead, rows) = time(SchedulerConfig { ahead: true, ..config }, 1, &work);
        prop_assert_eq!(rows, needed);
        prop_assert!(ahead <= waiting + waiting / 20 + 2 * slots as u64, "{} against {}", ahead, waiting);
    }
}

/// The sequences of each step in flight that has not begun, and whether the device fills in all its rows.
fn queued(world: &World) -> Vec<(Vec<u64>, bool)> {
    let on_device = |step: &Step| step.batch.ids.iter().all(|&id| id == ON_DEVICE);
    world.queued.iter().map(|s| (s.batch.seqs.iter().map(|p| p.seq.0).collect(), on_device(s))).collect()
}

#[test]
fn as_many_groups_as_slots_take_turns_each_a_step_ahead() {
    // Prompts that come in one step, in many, and one after another: the groups are the same size in the end.
    for (prompt, chunk, pause) in [(1, 256, 0), (40, 100, 0), (3, 16, 5)] {
        let config = config(4, chunk, 64, true);
        let mut clock = Clock::new(config, 1);
        for id in 0..64 {
            clock.world.add(id, &Wanted::new(id, prompt, 400, 0));
            (0..pause).for_each(|_| clock.tick());
        }
        (0..400).for_each(|_| clock.tick());
        let (idle, tokens) = (clock.idle, clock.tokens);
        for _ in 0..40 {
            let before = queued(&clock.world);
            clock.tick();
            let after = queued(&clock.world);
            assert!(before.iter().all(|(group, on_device)| group.len() == 16 && *on_device), "{before:?}");
            assert_eq!(after[..after.len() - 1], before[1..], "in turn");
            assert_eq!(clock.world.in_flight().count(), 8);
        }
        assert_eq!((clock.idle - idle, clock.tokens - tokens), (0, 40 * 16));
        let groups = |clock: &Clock| clock.world.in_flight().map(|s| s.batch.seqs.len()).collect::<Vec<_>>();
        assert_eq!(groups(&clock), [16; 8]);
    }
}

#[test]
fn a_single_sequence_always_has_a_step_behind_the_running_one() {
    let config = config(4, 64, 4, true);
    let mut world = World::new(config, 64);
    world.add(0, &Wanted::new(0, 100, 30, 0));
    world.plan();
    let after: Vec<_> = world.queued.iter().map(|step| step.after).collect();
    assert_eq!(after, [None, None, Some(1)], "two chunks, and the first token is fed where it is chosen");
    world.run();
    world.read();
    world.plan();
    for left in (0..30usize).rev() {
        assert_eq!(world.queued.len(), (left + 1).min(2), "none past the last token");
        assert!(queued(&world)[1..].iter().all(|(_, on_device)| *on_device));
        world.run();
        world.read();
        world.plan();
    }
    assert!(world.clients.is_empty() && world.queued.is_empty());
}

#[test]
fn a_prompt_is_not_held_up_by_a_step_that_waits_for_its_token() {
    let config = config(4, 10, 4, true);
    let mut world = World::new(config, 64);
    world.add(0, &Wanted::new(0, 10, 30, 0));
    world.add(1, &Wanted::new(1, 100, 30, 0));
    world.plan();
    let first: Vec<_> = world.queued.iter().map(|step| step.batch.seqs[0].seq.0).collect();
    assert_eq!(first, [0, 1, 1, 1, 0, 1, 1, 1], "a row of the first among every {}", config.slots);
}

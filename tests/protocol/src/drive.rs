//! The worker's part, with every choice that it may make left to chance: when it plans and for which group, when the
//! engine is dropped, and which stage fails.

use std::{collections::VecDeque, sync::Arc};

use shuttle::rand::{Rng, thread_rng};

use crate::{
    Error, Result, Setup, Wire, Wired,
    batch::{MicroBatch, ON_DEVICE, OutputRow, SeqId, SeqRows, Step},
    sync::channel::{self, TrySendError},
    world::{Fault, World, made_to_fail},
};

/// Steps of one run: every entry of a boundary is used again.
const STEPS: u64 = 8;
/// Calls to its device that a stage makes for a step, about.
const CALLS: usize = 9;

/// Runs a pipeline once and panics if anything was wrong.
pub fn drive(wire: Wire, setup: &Setup) {
    let mut rng = thread_rng();
    let faults = [Fault::Error, Fault::Panic, Fault::Lost];
    let fault = rng.gen_bool(0.5).then(|| {
        let call = rng.gen_range(0..CALLS * STEPS as usize);
        (rng.gen_range(0..setup.stages), call, faults[rng.gen_range(0..faults.len())])
    });
    let dropped_after = rng.gen_bool(0.3).then(|| rng.gen_range(0..STEPS));
    let world = World::new(setup.stages, setup.in_flight(), setup.slots, fault);
    let Wired { steps, results, threads } = wire(setup, &world);
    let mut worker = Worker::new(setup, steps, results);
    let loaded = threads.iter().flat_map(|(len, loaded, _)| std::iter::repeat_n(loaded, *len));
    let error = loaded
        .map(|loaded| loaded.recv().expect("a stage says whether it could be loaded").err())
        .find_map(|failed| failed)
        .or_else(|| worker.run(dropped_after.unwrap_or(STEPS)));
    worker.steps = None;
    // A worker that failed keeps its end until the engine is dropped.
    let results = error.is_some().then_some(worker.results);
    for (_, _, thread) in threads {
        thread.join().expect("a stage's thread catches what panics in it");
    }
    let mut state = world.lock();
    if let Some(error) = &error {
        let panicked = matches!(error, Error::Engine(why) if why.ends_with(" panicked: made to fail"));
        if !(state.has_failed() && (panicked || *error == made_to_fail())) {
            state.violated(format!("the first error is not the cause: {error}"));
        }
    }
    if let Some(wrong) = worker.wrong.or(state.violation().map(str::to_string)) {
        panic!("{wrong}");
    }
    drop((state, results));
}

struct Worker {
    setup: Setup,
    steps: Option<channel::Sender<Step>>,
    results: channel::Receiver<(u64, Result<Vec<crate::batch::Sampled>>)>,
    planned: u64,
    /// Steps and their groups.
    in_flight: VecDeque<(u64, usize)>,
    wrong: Option<String>,
}

impl Worker {
    fn new(
        setup: &Setup,
        steps: channel::Sender<Step>,
        results: channel::Receiver<(u64, Result<Vec<crate::batch::Sampled>>)>,
    ) -> Self {
        Worker {
            setup: *setup,
            steps: Some(steps),
            results,
            planned: 0,
            in_flight: VecDeque::new(),
            wrong: None,
        }
    }

    /// Until so many steps have come back, or one has failed.
    fn run(&mut self, steps: u64) -> Option<Error> {
        for wanted in 0..steps {
            self.plan();
            let Ok((step, outcome)) = self.results.recv() else {
                self.wrong = Some("all stages have ended and none has said why".into());
                return None;
            };
            let sampled = match outcome {
                Ok(sampled) => sampled,
                Err(error) => return Some(error),
            };
            if step != wanted || sampled[0].id as u64 != step {
                self.wrong = Some(format!("step {step} comes back in place of step {wanted}"));
                return None;
            }
            self.in_flight.pop_front();
        }
        None
    }

    /// Plans some of the steps that may be in flight, one at least.
    fn plan(&mut self) {
        while self.planned < STEPS && (self.in_flight.is_empty() || thread_rng().gen_bool(0.8)) {
            let of = |group: usize| self.in_flight.iter().filter(move |step| step.1 == group);
            let free = |group: &usize| of(*group).count() < self.setup.group_max();
            let free: Vec<usize> = (0..self.setup.slots).filter(free).collect();
            if free.is_empty() {
                return;
            }
            let group = free[thread_rng().gen_range(0..free.len())];
            let step = step(self.planned, group, of(group).next_back().map(|step| step.0));
            let steps = self.steps.as_ref().expect("steps are planned before the end");
            match steps.try_send(step) {
                Ok(()) => (),
                Err(TrySendError::Full(_)) => {
                    return self.wrong = Some("the worker waits for room for a step".into());
                }
                // The first stage tells why through the results.
                Err(TrySendError::Disconnected(_)) => return,
            }
            self.in_flight.push_back((self.planned, group));
            self.planned += 1;
        }
    }
}

/// One row of a group, fed with the token of the group's step before if that is still in flight.
fn step(step: u64, group: usize, after: Option<u64>) -> Step {
    let (seq, seat) = (SeqId(group as u64), group as u32);
    let cached = after.unwrap_or(0) as usize;
    let batch = MicroBatch {
        ids: vec![if after.is_some() { ON_DEVICE } else { 0 }],
        positions: vec![step as u32],
        seqs: vec![SeqRows { seq, seat, row: 0, len: 1, cached, blocks: [].into() }],
        outputs: vec![OutputRow { row: 0, seq, seat }],
        ..MicroBatch::default()
    };
    Step { step, after, batch: Arc::new(batch) }
}

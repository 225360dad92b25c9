//! The worker between stages and clients that the tests play.

use std::{
    collections::{HashMap, VecDeque},
    thread::JoinHandle,
};

use super::*;
use crate::{
    batch::ON_DEVICE,
    engine::{counts::WaitingLimits, text},
    request::{FinishReason, Prompt},
    schedule::{Keys, SchedulerConfig},
};

const EOS: u32 = 3;

/// So many run at once, others wait.
fn config(running_max: usize) -> SchedulerConfig {
    SchedulerConfig { slots: 1, chunk: 8, running_max, ahead: false, ..SchedulerConfig::default() }
}

/// A worker that runs, and the ends of its channels.
struct Ends {
    commands: channel::Sender<Command>,
    steps: channel::Receiver<Step>,
    results: channel::Sender<Outcome>,
    counts: Arc<Counts>,
    meter: Arc<Meter>,
    /// The ends of stages that have been built anew.
    built: channel::Receiver<(channel::Receiver<Step>, channel::Sender<Outcome>)>,
    threads: Vec<JoinHandle<()>>,
}

/// Channels to stages that a test plays.
fn stages(in_flight: usize) -> (Wired, channel::Receiver<Step>, channel::Sender<Outcome>) {
    let (steps_in, steps) = channel::bounded(in_flight);
    let (results, results_out) = channel::unbounded();
    let patience = Duration::from_secs(5);
    let wired = Wired {
        vision: None,
        stages: Vec::new(),
        collectors: Vec::new(),
        steps: Some(steps_in),
        results: results_out,
        stock: Arc::default(),
        patience,
        lost: || false,
    };
    (wired, steps, results)
}

/// `rebuilds`: how often the stages can be built anew.
fn start(config: SchedulerConfig, blocks: usize, rebuilds: usize) -> Ends {
    let (commands, commands_out) = channel::unbounded();
    let (wired, steps, results) = stages(config.in_flight_max());
    let (again, built) = channel::unbounded();
    let left = Mutex::new(rebuilds);
    let start = move |_, _| {
        let mut left = left.lock().unwrap();
        *left = left.checked_sub(1).ok_or_else(|| Error::data("weights", "they are gone"))?;
        let (wired, steps, results) = stages(config.in_flight_max());
        again.send((steps, results)).unwrap();
        Ok(wired)
    };
    let layout: Layout = "0".parse().unwrap();
    let recipe = Recipe {
        start: Arc::new(start),
        redraw: Arc::new(|_| Err(Error::usage("--layout", "made to be refused"))),
        layout: layout.clone(),
        scheduling: config,
        images: None,
        keys: Keys::default(),
        blocks,
        patience: Duration::from_secs(5),
        stall: None,
        weigh: Arc::new(|_| (1, 1)),
    };
    let (text, text_thread) = text::spawn(commands.clone()).unwrap();
    let limits = WaitingLimits { requests: 100, tokens: 1000 };
    let (counts, meter) = (Arc::new(Counts::new(limits)), Meter::new(false));
    let worker = Worker {
        scheduler: recipe.scheduler(),
        recipe,
        commands: commands_out,
        text,
        stages: Stages::Up(wired),
        facts: Arc::default(),
        counts: counts.clone(),
        meter: meter.clone(),
        open: Open::default(),
        faults: Faults::default(),
        loading: Duration::ZERO,
        change: None,
        balancer: None,
        stall: Stall::new(),
        layout: Arc::new(Mutex::new(layout)),
    };
    let threads = vec![std::thread::spawn(|| worker.run()), text_thread];
    Ends { commands, steps, results, counts, meter, built, threads }
}

fn made_to_fail() -> Error {
    Error::Device { device: "cpu".into(), why: "made to fail".into() }
}

impl Ends {
    fn submit(&self, request: u64, n: u32) -> channel::Receiver<Event> {
        let (events, received) = channel::unbounded();
        let mut params = Request::new(Prompt::Ids(vec![1, 2]));
        params.n = n;
        let ending = Ending { eos: [EOS].into(), tokens_max: 10 };
        let answer = |sample| Answer::new(sample, &params, None, ending.clone(), 2).unwrap();
        let answers = (0..n).map(answer).collect();
        let place = self.counts.wait(2).unwrap();
        let prompt = [1, 2].into();
        let submission = Submission {
            request,
            prompt,
            keys: Default::default(),
            images: None,
            media: [].into(),
            params,
            ending,
            answers,
            events,
            place,
        };
        self.commands.send(Command::Submit(vec![submission])).unwrap();
        received
    }

    /// The step that is in the stages fails.
    fn fail(&self) {
        let step = self.steps.recv().unwrap();
        self.results.send((step.step, Err(made_to_fail()))).unwrap();
    }

    fn end(self) {
        self.commands.send(Command::End).unwrap();
        self.threads.into_iter().for_each(|thread| thread.join().unwrap());
    }
}

fn all(events: &channel::Receiver<Event>) -> Vec<Event> {
    events.iter().collect()
}

#[test]
fn a_fault_ends_what_had_started_and_what_waits_goes_on_with_new_stages() {
    let ends = start(config(1), 2, 1);
    let open: Vec<_> = (0..3).map(|i| ends.submit(i, 1)).collect();
    ends.fail();
    assert_eq!(all(&open[0]), [Event::Error(made_to_fail())]);
    // One goes while the stages are away.
    ends.commands.send(Command::Cancel(1)).unwrap();
    assert!(ends.steps.recv().is_err(), "the old stages are let go");
    let (steps, results) = ends.built.recv().unwrap();
    let stages = std::thread::spawn(move || {
        let mut last = HashMap::new();
        for step in steps {
            // It may come after the worker's end.
            let _ = results.send((step.step, Ok(tokens(&step, &mut last))));
        }
    });
    let ended = |events: &[Event], reason| match events.last() {
        Some(Event::Finished { reason: told, .. }) => *told == reason,
        _ => false,
    };
    let (cancelled, answered) = (all(&open[1]), all(&open[2]));
    assert!(ended(&cancelled, FinishReason::Cancelled), "{cancelled:?}");
    assert!(ended(&answered, FinishReason::Length) || ended(&answered, FinishReason::Stop), "{answered:?}");
    assert_eq!((ends.counts.rebuilds(), ends.counts.waiting()), (1, 0));
    ends.end();
    stages.join().unwrap();
}

/// Open requests get both reasons, later ones get them at once, and the threads end when told to.
#[test]
fn stages_that_cannot_be_built_anew_end_what_waits_and_refuse_what_comes() {
    let ends = start(config(1), 2, 0);
    let open: Vec<_> = (0..2).map(|i| ends.submit(i, 1)).collect();
    ends.fail();
    assert_eq!(all(&open[0]), [Event::Error(made_to_fail())]);
    let both = "device cpu: made to fail; the stages could not be built anew: weights: they are gone";
    for events in [&open[1], &ends.submit(2, 1)] {
        let events = all(events);
        assert!(matches!(&events[..], [Event::Error(error)] if error.to_string() == both), "{events:?}");
    }
    assert_eq!((ends.counts.rebuilds(), ends.counts.waiting()), (0, 0));
    ends.end();
}

#[test]
fn faults_that_repeat_end_it() {
    let mut ends = start(config(1), 2, 9);
    for fault in 1..=3 {
        let events = ends.submit(fault, 1);
        ends.fail();
        assert_eq!(all(&events), [Event::Error(made_to_fail())]);
        if fault < 3 {
            (ends.steps, ends.results) = ends.built.recv().unwrap();
        }
    }
    let later = all(&ends.submit(9, 1));
    let [Event::Error(error)] = &later[..] else { panic!("{later:?}") };
    let why = "device cpu: made to fail; the stages are not built anew: it was fault 3 within 60 seconds";
    assert_eq!(error.to_string(), why);
    assert!(ends.steps.recv().is_err(), "the stages are let go");
    ends.end();
}

#[test]
fn an_engine_can_end_while_its_stages_are_built_anew() {
    let ends = start(config(1), 2, 1);
    let open: Vec<_> = (0..2).map(|i| ends.submit(i, 1)).collect();
    ends.fail();
    ends.end();
    for events in open {
        assert!(matches!(all(&events)[..], [Event::Error(_)]));
    }
}

#[test]
fn a_client_that_goes_ends_all_its_samples_and_nobody_elses() {
    let ends = start(config(4), 8, 0);
    drop(ends.submit(0, 2));
    let step = ends.steps.recv().unwrap();
    assert_eq!(step.batch.outputs.len(), 2);
    let events = ends.submit(1, 1);
    ends.results.send((step.step, Ok(tokens(&step, &mut HashMap::new())))).unwrap();
    let Ends { commands, steps, results, threads, .. } = ends;
    let stages = std::thread::spawn(move || {
        let mut last = HashMap::new();
        for (i, step) in steps.into_iter().enumerate() {
            let sampled = tokens(&step, &mut last);
            let nobodys = sampled.iter().any(|token| token.seq != SeqId(2));
            assert!(!nobodys || i < 2, "samples of nobody run");
            if nobodys {
                // The one that sends events has to notice first.
                std::thread::sleep(Duration::from_millis(200));
            }
            results.send((step.step, Ok(sampled))).unwrap();
        }
    });
    assert!(events.iter().any(|event| matches!(event, Event::Finished { .. })));
    commands.send(Command::End).unwrap();
    threads.into_iter().for_each(|thread| thread.join().unwrap());
    stages.join().unwrap();
}

/// Whatever it is at: a cancelled request has nothing left once the steps that it is in have come back.
#[test]
fn what_is_cancelled_is_given_back_within_a_step() {
    for ahead in [false, true] {
        // Steps that have come back before: none, the first chunk of the prompt, the whole of it, some tokens.
        for back in [0, 1, 2, 4] {
            let config = SchedulerConfig { chunk: 1, ahead, ..config(1) };
            let ends = start(config, 2, 0);
            let (events, waiting) = (ends.submit(0, 1), ends.submit(1, 1));
            let mut last = HashMap::new();
            for _ in 0..back {
                let step = ends.steps.recv().unwrap();
                ends.results.send((step.step, Ok(tokens(&step, &mut last)))).unwrap();
            }
            let mut in_flight: VecDeque<Step> = (0..config.in_flight_max())
                .filter_map(|_| ends.steps.recv_timeout(Duration::from_millis(100)).ok())
                .collect();
            assert!(!in_flight.is_empty());
            // The one that waits holds nothing, and goes at once.
            for (request, events) in [(1, &waiting), (0, &events)] {
                ends.commands.send(Command::Cancel(request)).unwrap();
                assert!(matches!(all(events).last(), Some(Event::Finished { .. })));
            }
            assert_eq!(ends.counts.waiting(), 0);
            while let Some(step) = in_flight.pop_front() {
                ends.results.send((step.step, Ok(tokens(&step, &mut last)))).unwrap();
            }
            let deadline = Instant::now() + Duration::from_secs(20);
            while ends.meter.queues().kv_blocks_free < 2 {
                assert!(Instant::now() < deadline, "{:?}", ends.meter.queues());
                assert!(ends.steps.try_recv().is_err(), "nobody needs another step");
            }
            ends.end();
        }
    }
}

/// What stages would choose: a token follows from the one before, its position and its sequence.
fn tokens(step: &Step, last: &mut HashMap<u32, u32>) -> Vec<Sampled> {
    let sample = |output: &crate::batch::OutputRow| {
        let id = match step.batch.ids[output.row] {
            ON_DEVICE => last[&output.seat],
            id => id,
        };
        let id = (id * 31 + step.batch.positions[output.row] * 7 + output.seq.0 as u32) % 23;
        last.insert(output.seat, id);
        Sampled { seq: output.seq, id, logprobs: None }
    };
    step.batch.outputs.iter().map(sample).collect()
}

/// Stages that are `slow`: a result comes when so many later steps have come, or no more do.
fn answers(ahead: bool, slow: usize) -> Vec<(Vec<u32>, FinishReason)> {
    let ends = start(SchedulerConfig { slots: 2, ahead, ..config(4) }, 8, 0);
    let events: Vec<_> = (0..6).map(|i| ends.submit(i, 1)).collect();
    let Ends { commands, steps, results, threads, .. } = ends;
    let stages = std::thread::spawn(move || {
        let (mut last, mut held) = (HashMap::new(), VecDeque::new());
        loop {
            // A step past the last stop may come back after the worker's end.
            match steps.recv_timeout(Duration::from_millis(2)) {
                Ok(step) => held.push_back((step.step, Ok(tokens(&step, &mut last)))),
                Err(channel::RecvTimeoutError::Timeout) => held.drain(..).for_each(|r| _ = results.send(r)),
                Err(channel::RecvTimeoutError::Disconnected) => return,
            }
            if held.len() > slow {
                held.pop_front().map(|r| results.send(r));
            }
        }
    });
    let answer = |events: channel::Receiver<Event>| {
        let mut ids = Vec::new();
        for event in events {
            match event {
                Event::Token { id, .. } => ids.push(id),
                Event::Finished { reason, .. } => return (ids, reason),
                other => panic!("{other:?}"),
            }
        }
        panic!("no end")
    };
    let answers = events.into_iter().map(answer).collect();
    commands.send(Command::End).unwrap();
    threads.into_iter().for_each(|thread| thread.join().unwrap());
    stages.join().unwrap();
    answers
}

#[test]
fn a_step_ahead_gives_the_same_answers() {
    let waiting = answers(false, 0);
    let stopped = waiting.iter().filter(|(_, reason)| *reason == FinishReason::Stop).count();
    assert!(0 < stopped && stopped < waiting.len(), "{waiting:?}");
    assert_eq!(answers(true, 0), waiting);
    assert_eq!(answers(true, 3), waiting);
}

//! Whatever fails in a stage, at whatever point of a step: each request ends once, nothing hangs, and the engine goes on.

pub(super) mod faulty;
mod gpu;
mod images;

use std::{
    path::PathBuf,
    sync::{Arc, atomic::Ordering::SeqCst},
    time::{Duration, Instant},
};

use crossbeam_channel::{RecvTimeoutError, bounded};

use self::faulty::Faulty;
use super::{
    Engine, EngineBuilder, Events,
    builder::Wire,
    wire::{Either, On, Shared, Ways, wire_on},
};
use crate::{
    backend::mix,
    error::{Error, Result},
    layout::{Device, Layout},
    pipeline::{Fault, Kind, Plan, Point},
    request::{Event, FinishReason, Prompt, Request},
    transport::Host,
};

/// What takes longer hangs.
const PATIENCE: Duration = Duration::from_secs(60);
const SLOW: Duration = Duration::from_millis(15);
const ANSWER: u32 = 12;

/// How the three stages run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    /// On one thread.
    Together,
    /// On a thread each.
    Apart,
    /// On a thread each, ops return before they are done, and the host is a step ahead.
    Ahead,
    /// On devices of two kinds. Ops return before they are done on those that are called GPUs here.
    Mixed(&'static str),
}

const MIXED: [Mode; 6] = [
    Mode::Mixed("0@cpu,1@cuda:0,2-3@cpu"),
    Mode::Mixed("0@cuda:0,1@cpu,2-3@cuda:1"),
    Mode::Mixed("0@cpu,1@cuda:0,2-3@cuda:1"),
    Mode::Mixed("0@cuda:0,1@cuda:0,2-3@cpu"),
    Mode::Mixed("0@cpu,1@cpu,2-3@cuda:0"),
    Mode::Mixed("0@cuda:0,1@cpu,2-3@cpu"),
];
const MODES: [Mode; 9] =
    [Mode::Together, Mode::Apart, Mode::Ahead, MIXED[0], MIXED[1], MIXED[2], MIXED[3], MIXED[4], MIXED[5]];

impl Mode {
    fn layout(self) -> Layout {
        let layout = match self {
            Mode::Together => "0,1,2-3",
            // Stages on GPUs have a thread each.
            Mode::Apart | Mode::Ahead => "0@cuda:0,1@cuda:1,2-3@cuda:2",
            Mode::Mixed(layout) => layout,
        };
        layout.parse().unwrap()
    }

    /// Whether the device of a stage poses as one whose ops return early.
    fn early(self, stage: usize) -> bool {
        self != Mode::Apart && self.layout().stages()[stage].device != Device::Cpu
    }

    /// Tokens that the host does not know must be known where they are embedded.
    fn ahead(self) -> bool {
        self.early(0) && self.early(2)
    }
}

/// Stages that fail as planned. `patience`: how long they may take to end.
fn wire(mode: Mode, plan: Arc<Plan>, patience: Duration) -> Arc<Wire> {
    Arc::new(move |_, config, shared, progress| {
        let (meter, metrics) = (shared.meter.clone(), shared.metrics.clone());
        let Shared { in_flight, threads, .. } = *shared;
        let (vision, before) = (shared.vision.clone(), shared.before.clone());
        let shared = Shared { in_flight, threads, meter, metrics, patience, vision, before };
        let kinds = Faulty::<false>::pipeline(3, &plan).into_iter().zip(Faulty::<true>::pipeline(3, &plan));
        let backend = |(stage, (one, two))| match mode.early(stage) {
            false => Either::One(one),
            true => Either::Two(two),
        };
        let backends = kinds.enumerate().map(backend).collect();
        let ways = Ways { ones: &Host, twos: &Host, one_to_two: &Host, two_to_one: &Host };
        let on = On { backends, ways, lost: || false, vision: None, asides: Vec::new() };
        wire_on(on, &mode.layout(), config, &shared, progress)
    })
}

fn builder() -> EngineBuilder {
    let dir = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/data/chat-llama");
    Engine::builder().model(dir).device(Device::Cpu).stages(3).slots(3).running(2).max_context(128).threads(1)
}

/// An engine in which two requests run at a time.
fn engine(mode: Mode, plan: &Arc<Plan>) -> Result<Engine> {
    builder().build_on(Some(mode.ahead()), wire(mode, plan.clone(), PATIENCE / 2))
}

fn plan(faults: Vec<Fault>) -> Arc<Plan> {
    Arc::new(Plan(faults))
}

fn request(i: u32, answer: u32) -> Request {
    let ids = (0..3 + 4 * (i % 4)).map(|t| (t * 13 + i * 7) % 200).collect();
    let mut request = Request::new(Prompt::Ids(ids));
    request.stop.max_tokens = Some(answer);
    request.stop.ignore_eos = true;
    request
}

/// How a request ended: its tokens, and the error if it failed. All that comes is read, until nothing more can come.
fn ended(events: Events) -> (Vec<u32>, Result<FinishReason>) {
    let (mut ids, mut end) = (Vec::new(), None);
    loop {
        match events.events.recv_timeout(PATIENCE) {
            Ok(event) => {
                assert!(end.is_none(), "{event:?} after the end");
                match event {
                    Event::Token { id, .. } => ids.push(id),
                    Event::Finished { reason, .. } => end = Some(Ok(reason)),
                    Event::Error(error) => end = Some(Err(error)),
                }
            }
            Err(RecvTimeoutError::Disconnected) => return (ids, end.expect("no end was told")),
            Err(RecvTimeoutError::Timeout) => panic!("a request hangs"),
        }
    }
}

/// The tokens that each request leads to.
fn expected() -> &'static [Vec<u32>] {
    static EXPECTED: std::sync::OnceLock<Vec<Vec<u32>>> = std::sync::OnceLock::new();
    EXPECTED.get_or_init(|| {
        let engine = builder().build().unwrap();
        (0..5).map(|i| ended(engine.submit(request(i, ANSWER)).unwrap()).0).collect()
    })
}

/// Nothing is running, and nothing is held.
pub(super) fn rests(engine: &Engine) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let stats = engine.stats();
        let scheduler = stats.scheduler;
        let unheld = scheduler.kv_blocks_free + scheduler.kv_blocks_cached;
        let all_free = unheld == scheduler.kv_blocks_total && unheld > 0;
        if all_free && (scheduler.running, scheduler.waiting, stats.requests_waiting) == (0, 0, 0) {
            return;
        }
        assert!(Instant::now() < deadline, "it does not come to rest: {stats:?}");
        std::thread::sleep(Duration::from_micros(200));
    }
}

/// Runs it on a thread of its own; a hang is a failure that says where.
fn watched<T: Send + 'static>(what: String, run: impl FnOnce() -> T + Send + 'static) -> T {
    let (done, result) = bounded(1);
    let thread = std::thread::spawn(move || done.send(run()));
    match result.recv_timeout(3 * PATIENCE) {
        Ok(result) => result,
        Err(RecvTimeoutError::Timeout) => panic!("{what}: it hangs"),
        Err(RecvTimeoutError::Disconnected) => {
            let panic = thread.join().unwrap_err();
            let why = panic.downcast_ref::<String>().map(String::as_str);
            panic!("{what}: {}", why.or(panic.downcast_ref::<&str>().copied()).unwrap_or("it panicked"))
        }
    }
}

/// Each point with the stages that it is in.
const POINTS: [(Point, &[usize]); 11] = [
    (Point::BeforeReceive, &[0, 1, 2]),
    (Point::AfterReceive, &[0, 1, 2]),
    (Point::SetBatch, &[0, 1, 2]),
    (Point::Take, &[1, 2]),
    (Point::Embed, &[0]),
    (Point::Layer, &[0, 1, 2]),
    (Point::Head, &[2]),
    (Point::Sample, &[2]),
    (Point::Enqueue, &[2]),
    (Point::Collect, &[2]),
    (Point::Send, &[0, 1]),
];
const KINDS: [Kind; 4] = [Kind::DeviceError, Kind::OutOfMemory, Kind::Panic, Kind::Slow(SLOW)];
/// The first step, and one in the midst of others.
const VISITS: [u64; 2] = [0, 7];

/// Four requests, of which two run at a time, meet a fault; a fifth comes when it is over.
fn meets(mode: Mode, fault: Fault) {
    let (slow, early) = (matches!(fault.kind, Kind::Slow(_)), fault.point == Point::BeforeReceive);
    let plan = plan(vec![fault]);
    let engine = engine(mode, &plan).unwrap();
    let open: Vec<Events> = (0..4).map(|i| engine.submit(request(i, ANSWER)).unwrap()).collect();
    let mut failed = 0;
    for (events, expected) in open.into_iter().zip(expected()) {
        let (ids, end) = ended(events);
        match end {
            Ok(FinishReason::Length) => assert_eq!(&ids, expected),
            Ok(other) => panic!("it ended with {other:?}"),
            Err(error) => {
                failed += 1;
                assert!(expected.starts_with(&ids), "{ids:?} is not how {expected:?} begins");
                assert!(
                    error.to_string().contains("made to") || error.to_string().contains("out of"),
                    "{error}"
                );
            }
        }
    }
    // Whatever waits for its first step may come before any request does.
    let least = usize::from(!slow && !early);
    assert!((least..=if slow { 0 } else { 2 }).contains(&failed), "{failed} requests failed");
    let (ids, end) = ended(engine.submit(request(4, ANSWER)).unwrap());
    assert_eq!((&ids, end), (&expected()[4], Ok(FinishReason::Length)), "after the fault");
    rests(&engine);
    assert_eq!(engine.stats().rebuilds, u64::from(!slow));
    assert!(engine.stats().stages.iter().all(|stage| stage.weight_bytes > 0 && stage.memory.is_some()));
    let fault = &plan.0[0];
    assert!(fault.seen.load(SeqCst) >= fault.visits.end, "the point has not been reached");
}

fn every_fault(mode: Mode) {
    for (point, stages) in POINTS {
        for &stage in stages {
            for kind in KINDS {
                for visit in VISITS {
                    let what = format!("{mode:?}, {point:?} of stage {stage}, {kind:?}, visit {visit}");
                    watched(what, move || meets(mode, Fault::new(stage, point, kind, visit..visit + 1)));
                }
            }
        }
    }
}

#[test]
fn every_fault_at_every_point_of_stages_on_one_thread() {
    every_fault(Mode::Together);
}

#[test]
fn every_fault_at_every_point_of_stages_on_threads() {
    every_fault(Mode::Apart);
}

#[test]
fn every_fault_at_every_point_of_stages_that_run_ahead() {
    every_fault(Mode::Ahead);
}

#[test]
fn every_fault_at_every_point_of_stages_on_devices_of_two_kinds() {
    for mode in MIXED {
        every_fault(mode);
    }
}

#[test]
fn a_fault_while_loading_is_told() {
    for mode in MODES {
        for (stage, kind) in (0..3).flat_map(|stage| KINDS.map(|kind| (stage, kind))) {
            let what = format!("{mode:?}, loading of stage {stage}, {kind:?}");
            watched(what, move || {
                match engine(mode, &plan(vec![Fault::new(stage, Point::Load, kind, 0..1)])) {
                    Ok(engine) => {
                        assert!(matches!(kind, Kind::Slow(_)));
                        assert_eq!(ended(engine.submit(request(0, ANSWER)).unwrap()).0, expected()[0]);
                    }
                    Err(error) => assert!(error.to_string().contains(&stage.to_string()), "{error}"),
                }
            });
        }
    }
}

#[test]
fn a_fault_while_loading_again_ends_everything_with_both_reasons() {
    for mode in MODES {
        for (stage, kind) in (0..3).flat_map(|stage| KINDS.map(|kind| (stage, kind))) {
            if matches!(kind, Kind::Slow(_)) {
                continue;
            }
            let what = format!("{mode:?}, loading of stage {stage} again, {kind:?}");
            let faults = vec![
                Fault::new(1, Point::Layer, Kind::Panic, 5..6),
                Fault::new(stage, Point::Load, kind, 1..2),
            ];
            watched(what, move || {
                let engine = engine(mode, &plan(faults)).unwrap();
                let open: Vec<Events> = (0..4).map(|i| engine.submit(request(i, ANSWER)).unwrap()).collect();
                let first = "engine: stage 1 panicked: made to panic";
                for (i, (_, end)) in open.into_iter().map(ended).enumerate() {
                    let told = end.unwrap_err().to_string();
                    assert!(told.starts_with(first) && !told.contains('\n'), "{told}");
                    assert_eq!(told.contains("; the stages could not be built anew: "), i >= 2, "{told}");
                }
                let (_, end) = ended(engine.submit(request(0, ANSWER)).unwrap());
                let told = end.unwrap_err().to_string();
                assert!(told.starts_with(first) && told.len() > first.len() + 40, "{told}");
                rests(&engine);
            });
        }
    }
}

#[test]
fn faults_that_repeat_fail_fast() {
    for mode in MODES {
        watched(format!("{mode:?}"), move || {
            let fault = Fault::new(1, Point::SetBatch, Kind::DeviceError, 0..u64::MAX);
            let engine = engine(mode, &plan(vec![fault])).unwrap();
            let open: Vec<Events> = (0..12).map(|i| engine.submit(request(i, ANSWER)).unwrap()).collect();
            let told: Vec<String> =
                open.into_iter().map(|events| ended(events).1.unwrap_err().to_string()).collect();
            let last = told.last().unwrap();
            assert!(last.contains("made to fail; the stages are not built anew: it was fault 3"), "{last}");
            assert_eq!(engine.stats().rebuilds, 2);
            rests(&engine);
        });
    }
}

#[test]
fn a_thread_that_hangs_is_left_behind() {
    // Of stages that have a thread each.
    for mode in [Mode::Apart, Mode::Ahead, MIXED[0], MIXED[1], MIXED[2], MIXED[3]] {
        watched(format!("{mode:?}"), move || {
            let faults = vec![
                // What comes after the fault is a step, or the end.
                Fault::new(0, Point::AfterReceive, Kind::Slow(Duration::from_secs(8)), 6..7),
                Fault::new(2, Point::Sample, Kind::DeviceError, 5..6),
            ];
            let wire = wire(mode, plan(faults), Duration::from_millis(100));
            let engine = builder().build_on(Some(mode.ahead()), wire).unwrap();
            let begun = Instant::now();
            let open: Vec<Events> = (0..4).map(|i| engine.submit(request(i, ANSWER)).unwrap()).collect();
            let told: Vec<Error> = open.into_iter().map(|events| ended(events).1.unwrap_err()).collect();
            let last = told[3].to_string();
            assert!(last.contains("made to fail; the stages could not be built anew: "), "{last}");
            // The next one waits for the one that hangs.
            assert!(last.ends_with("engine: stage 0 and stage 1 did not end in time"), "{last}");
            drop(engine);
            assert!(begun.elapsed() < Duration::from_secs(6), "nobody waits for it");
        });
    }
}

/// A stage that ends no step is a fault like others: who was on it is told what all stages do.
#[test]
fn stages_that_end_nothing_for_too_long_have_failed() {
    for mode in [Mode::Together, Mode::Apart, Mode::Ahead, MIXED[0]] {
        watched(format!("{mode:?}"), move || {
            let slow = Kind::Slow(Duration::from_millis(1500));
            let plan = plan(vec![Fault::new(1, Point::AfterReceive, slow, 4..5)]);
            let wire = wire(mode, plan, PATIENCE / 2);
            let builder = builder().stall(Duration::from_millis(300));
            let engine = builder.build_on(Some(mode.ahead()), wire).unwrap();
            let error = ended(engine.submit(request(0, ANSWER)).unwrap()).1.unwrap_err().to_string();
            assert!(error.contains("no step has ended for ") && error.contains(" s: 0 on c"), "{error}");
            assert!(error.contains("; 1 on c") && error.contains(" waits for a micro-batch"), "{error}");
            // They are built anew once that one has ended, and an engine at rest is none that hangs.
            for _ in 0..2 {
                assert_eq!(ended(engine.submit(request(0, ANSWER)).unwrap()).0, expected()[0]);
                std::thread::sleep(Duration::from_millis(400));
            }
            assert_eq!(engine.stats().rebuilds, 1);
        });
    }
}

/// Faults while stages end, and an engine that is dropped with all hands full.
#[test]
fn an_engine_can_be_dropped_whatever_happens() {
    for mode in MODES {
        for stage in 0..3 {
            for kind in KINDS {
                watched(format!("{mode:?}, stage {stage}, {kind:?}"), move || {
                    let fault = Fault::new(stage, Point::AfterReceive, kind, 1000..u64::MAX);
                    let plan = plan(vec![fault]);
                    let engine = engine(mode, &plan).unwrap();
                    assert_eq!(ended(engine.submit(request(0, ANSWER)).unwrap()).0, expected()[0]);
                    let open: Vec<Events> = (0..4).map(|i| engine.submit(request(i, 100)).unwrap()).collect();
                    plan.0[0].seen.store(1000, SeqCst);
                    drop(engine);
                    for events in open {
                        assert!(ended(events).1.is_err());
                    }
                });
            }
        }
    }
}

/// A stage that takes its time for every step.
fn slow(time: Duration) -> Arc<Plan> {
    plan(vec![Fault::new(1, Point::SetBatch, Kind::Slow(time), 0..u64::MAX)])
}

#[test]
fn what_finds_no_room_to_wait_is_refused_at_once() {
    watched("limits".into(), || {
        let wire = wire(Mode::Together, slow(Duration::from_millis(20)), PATIENCE);
        let engine = builder().running(1).waiting(2).build_on(None, wire).unwrap();
        let mut running = engine.submit(request(0, 100)).unwrap();
        running.next().unwrap();
        let waiting = [1, 2].map(|i| engine.submit(request(i, ANSWER)).unwrap());
        let refused = engine.submit(request(3, ANSWER)).err();
        assert_eq!(refused, Some(Error::Busy { max: 2 }));
        assert_eq!(engine.stats().requests_waiting, 2);
        waiting[0].cancel();
        let [cancelled, answered] = waiting;
        assert_eq!(ended(cancelled), (vec![], Ok(FinishReason::Cancelled)));
        // It has room now, and another one has not.
        let later = engine.submit(request(3, ANSWER)).unwrap();
        assert_eq!(engine.submit(request(4, ANSWER)).err(), Some(Error::Busy { max: 2 }));
        running.cancel();
        assert_eq!(ended(answered).0, expected()[2]);
        assert_eq!(ended(later).0, expected()[3]);
        drop(running);
        rests(&engine);
    });
}

/// Clients come and go at any moment, while stages fail and are built anew: each request ends once, and nothing is held.
#[test]
fn clients_that_go_at_any_moment_leave_nothing_behind() {
    for mode in MODES {
        for seed in 0..12u64 {
            watched(format!("{mode:?}, seed {seed}"), move || {
                let random = |i: u64, end: u64| mix(mix(seed) ^ i) % end;
                let kinds = [Kind::Panic, Kind::DeviceError, Kind::Slow(SLOW)];
                let kind = kinds[random(0, 3) as usize];
                let visit = random(1, 30);
                let plan =
                    plan(vec![Fault::new(random(2, 3) as usize, Point::SetBatch, kind, visit..visit + 1)]);
                let engine = engine(mode, &plan).unwrap();
                let mut open = Vec::new();
                for i in 0..24u32 {
                    let mut asked = request(i, 1 + random(100 + u64::from(i), 60) as u32);
                    asked.n = 1 + i % 3;
                    open.push(engine.submit(asked).unwrap());
                    std::thread::sleep(Duration::from_micros(random(200 + u64::from(i), 800)));
                    let which = random(300 + u64::from(i), open.len() as u64) as usize;
                    match i % 3 {
                        0 => open[which].cancel(),
                        1 => drop(open.remove(which)),
                        _ => (),
                    }
                }
                open.into_iter().for_each(ends_once);
                rests(&engine);
                assert_eq!(ended(engine.submit(request(0, ANSWER)).unwrap()).0, expected()[0]);
            });
        }
    }
}

/// Each sample ends once, or the whole request with an error.
fn ends_once(events: Events) {
    let (mut left, mut failed) = (events.samples_left, false);
    loop {
        match events.events.recv_timeout(PATIENCE) {
            Ok(event) => {
                assert!(left > 0 && !failed, "{event:?} after the end");
                match event {
                    Event::Token { .. } => (),
                    Event::Finished { .. } => left -= 1,
                    Event::Error(_) => failed = true,
                }
            }
            Err(RecvTimeoutError::Disconnected) => break assert!(failed || left == 0, "{left} ends missing"),
            Err(RecvTimeoutError::Timeout) => panic!("a request hangs"),
        }
    }
}

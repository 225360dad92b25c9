//! Layouts that change while requests run, on several devices that the processor poses as.

use std::{
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use super::{
    Engine, EngineBuilder, Events,
    balance::Pace,
    builder::Wire,
    fault_tests::{faulty::Faulty, rests},
    wire::{Either, On, VisionOn, Ways, wire_on},
};
use crate::{
    backend::mix,
    error::{Error, Result},
    layout::{Device, Layout},
    model::units::Unit,
    pipeline::{Fault, Kind, Plan, Point},
    request::{Event, Media, Prompt, Request},
    transport::Host,
};

const PATIENCE: Duration = Duration::from_secs(60);
/// All four layers on the processor, one device each, and others.
const LAYOUTS: [&str; 9] = [
    "0-3",
    "0,1-2,3",
    "0@cuda:0,1@cuda:1,2-3@cuda:2",
    "0-1@cuda:0,2@cuda:1,3@cuda:2",
    "0-2@cuda:1,3@cuda:0",
    "0@cuda:0,1@cuda:0,2@cuda:1,3@cuda:1",
    "0-3@cuda:3",
    "0@cuda:0,1@cuda:1,2-3@cuda:2,head@all",
    "0-1@cuda:1,2@cuda:0,3@cuda:1,head@all",
];

/// The same with stages of two kinds beside each other: each has its neighbours, and the ends, of either kind.
const MIXED: [&str; 9] = [
    "0-3@cpu",
    "0@cpu,1-3@cuda:0",
    "0-1@cuda:0,2-3@cpu",
    "0@cpu,1-2@cuda:1,3@cpu",
    "0@cuda:0,1-2@cpu,3@cuda:1",
    "0@cpu,1@cpu,2@cuda:0,3@cuda:0",
    "0-2@cuda:1,3@cuda:0",
    "0@cuda:1,1@cpu,2@cuda:0,3@cpu",
    "0@cuda:1,1@cpu,2@cuda:0,3@cuda:1,head@all",
];
/// Of a model that reads images: three layers, and a tower of three blocks.
const TOWERS: [&str; 6] = [
    "0-2@cpu",
    "v0@cpu,v1-2@cuda:0,0@cpu,1-2@cuda:1",
    "v0-1@cuda:1,v2@cpu,0-1@cuda:0,2@cpu",
    "vision@cuda:2,0-2@cpu",
    "vision@cpu,0@cuda:0,1-2@cuda:1",
    "v0@cuda:0,v1@cuda:1,v2@cuda:2,0-2@cuda:0",
];

/// Stages on devices of the numbers that the layout says, of which each stage fails as planned.
fn wire(ahead: bool, plan: Arc<Plan>) -> Arc<Wire> {
    Arc::new(move |layout, config, shared, progress| {
        // Behind the stages come the parts of a split head.
        let stages = layout.stages().len();
        let all = stages + layout.part_stages().len();
        let ones = Faulty::<false>::pipeline(all, &plan).into_iter().map(Either::One);
        let twos = Faulty::<true>::pipeline(all, &plan).into_iter().map(Either::Two);
        let mut backends: Vec<_> = if ahead { twos.collect() } else { ones.collect() };
        let asides = backends.split_off(stages);
        let ways = Ways { ones: &Host, twos: &Host, one_to_two: &Host, two_to_one: &Host };
        let on = On { backends, ways, lost: || false, vision: None, asides };
        wire_on(on, layout, config, shared, progress)
    })
}

/// Ops of stages on what is called a GPU return before they are done, and those on the processor do not. First come the
/// decoder's stages, then the tower's, then whoever brings images to the store.
fn mixed(plan: Arc<Plan>) -> Arc<Wire> {
    Arc::new(move |layout, config, shared, progress| {
        let tower = shared.vision.iter().flat_map(|vision| &vision.stages).map(|(device, _)| *device);
        let mut devices: Vec<Device> = layout.stages().iter().map(|stage| stage.device).collect();
        devices.extend(tower.chain([layout.stages()[0].device]));
        let beside = layout.part_stages();
        devices.extend(beside.iter().map(|&stage| layout.stages()[stage].device));
        let ones = Faulty::<false>::pipeline(devices.len(), &plan);
        let kinds = ones.into_iter().zip(Faulty::<true>::pipeline(devices.len(), &plan));
        let kind = |(device, (one, two))| match device {
            Device::Cpu => Either::One(one),
            Device::Cuda(_) => Either::Two(two),
        };
        let mut backends: Vec<_> = devices.into_iter().zip(kinds).map(kind).collect();
        let asides = backends.split_off(backends.len() - beside.len());
        let keeper = backends.pop().expect("one was added");
        let towers = backends.split_off(layout.stages().len());
        let vision = shared.vision.is_some().then_some(VisionOn { backends: towers, keeper });
        let ways = Ways { ones: &Host, twos: &Host, one_to_two: &Host, two_to_one: &Host };
        let on = On { backends, ways, lost: || false, vision, asides };
        wire_on(on, layout, config, shared, progress)
    })
}

fn data(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name)
}

fn builder() -> EngineBuilder {
    builder_of("chat-llama")
}

fn builder_of(model: &str) -> EngineBuilder {
    let free = |gpu| match gpu {
        9 => Err(Error::Device { device: "cuda:9".into(), why: "there is no such GPU: 9 found".into() }),
        8 => Ok(1 << 20),
        _ => Ok(usize::MAX),
    };
    let builder = Engine::builder().model(data(model)).device(Device::Cpu).max_context(128).threads(1);
    builder.running(6).chunk(16).free_when_moving(free)
}

fn engine(ahead: bool, faults: Vec<Fault>) -> Engine {
    builder().build_on(Some(ahead), wire(ahead, Arc::new(Plan(faults)))).unwrap()
}

fn layout(text: &str) -> Layout {
    text.parse().unwrap()
}

/// With penalties, drawn and greedy, of one or more samples.
fn request(i: u32) -> Request {
    let ids = (0..3 + 9 * (i % 4)).map(|t| (t * 13 + i * 7) % 200).collect();
    let mut request = Request::new(Prompt::Ids(ids));
    request.stop.max_tokens = Some(20 + i % 30);
    request.stop.ignore_eos = true;
    request.n = 1 + i % 2;
    let sampling = &mut request.sampling;
    (sampling.seed, sampling.temperature) = (Some(u64::from(i)), [0.0, 0.9][i as usize % 2]);
    if i.is_multiple_of(3) {
        (sampling.repetition_penalty, sampling.frequency_penalty) = (1.2, 0.3);
    }
    request
}

/// Each sample's tokens.
fn ended(events: Events) -> Result<Vec<Vec<u32>>> {
    let mut ids = vec![Vec::new(); 2];
    let mut events = events;
    loop {
        match events.next_timeout(PATIENCE).expect("a request hangs") {
            Some(Event::Token { sample, id, .. }) => ids[sample as usize].push(id),
            Some(Event::Finished { .. }) => (),
            Some(Event::Error(error)) => return Err(error),
            None => return Ok(ids),
        }
    }
}

const REQUESTS: u32 = 10;

fn expected() -> &'static [Vec<Vec<u32>>] {
    static EXPECTED: std::sync::OnceLock<Vec<Vec<Vec<u32>>>> = std::sync::OnceLock::new();
    EXPECTED.get_or_init(|| {
        let engine = builder().build().unwrap();
        (0..REQUESTS).map(|i| ended(engine.submit(request(i)).unwrap()).unwrap()).collect()
    })
}

#[test]
fn keys_and_values_follow_layers_to_other_devices_and_back() {
    for ahead in [false, true] {
        follow(&engine(ahead, Vec::new()), &LAYOUTS);
    }
}

#[test]
fn keys_and_values_follow_layers_to_devices_of_another_kind() {
    follow(&builder().build_on(None, mixed(Arc::new(Plan(Vec::new())))).unwrap(), &MIXED);
}

/// Goes from layout to layout while requests run.
fn follow(engine: &Engine, layouts: &[&str]) {
    let open: Vec<Events> = (0..REQUESTS).map(|i| engine.submit(request(i)).unwrap()).collect();
    let mut copied = 0;
    for i in 0..30 {
        let to = layout(layouts[mix(i) as usize % layouts.len()]);
        let before = engine.layout();
        let report = engine.relayout(to.clone()).unwrap();
        assert_eq!((&report.from, &report.to, &engine.layout()), (&before, &to, &to));
        let device = |layout: &Layout, layer: usize| {
            layout.stages().iter().find(|stage| stage.layers.contains(&layer)).unwrap().device
        };
        let layers = (0..4).filter(|&layer| device(&before, layer) != device(&to, layer)).count();
        let moved = report.moved.iter().filter(|moved| matches!(moved.unit, Unit::Layer(_)));
        assert_eq!(moved.count(), layers, "{report:?}");
        assert_eq!(report.weight_bytes > 0, !report.moved.is_empty());
        assert!(report.kv_bytes == 0 || layers > 0);
        copied += report.kv_bytes;
        let stages: Vec<String> = engine.stats().stages.iter().map(|stage| stage.device.clone()).collect();
        assert_eq!(stages, to.stages().iter().map(|s| s.device.to_string()).collect::<Vec<_>>());
    }
    assert!(copied > 0);
    for (events, want) in open.into_iter().zip(expected()) {
        assert_eq!(&ended(events).unwrap(), want);
    }
    rests(engine);
    assert_eq!(engine.stats().rebuilds, 0);
}

/// Images that prompts wait for are encoded where the tower is then; what has been encoded and is still needed, once more.
#[test]
fn images_are_encoded_wherever_the_tower_goes() {
    // Slow enough that layouts change while prompts still need their images.
    let slow = |(stage, point)| Fault::new(stage, point, Kind::Slow(Duration::from_millis(1)), 0..u64::MAX);
    let points = (0..7).flat_map(|stage| [(stage, Point::Tower), (stage, Point::SetBatch)]);
    let plan = Arc::new(Plan(points.map(slow).collect()));
    let builder = || builder_of("qwen2_5_vl").max_context(256);
    let ask = |engine: &Engine, image: &Media, i: u32| {
        let mut ids = vec![40 + i; 3];
        (0..2).for_each(|_| ids.extend([320, 322, 321, 7 + i]));
        let mut request = Request::new(Prompt::Ids(ids));
        request.media.extend([image.clone(), image.clone()]);
        request.stop.max_tokens = Some(8 + i);
        request.stop.ignore_eos = true;
        engine.submit(request).unwrap()
    };
    let plain = builder().build().unwrap();
    let picture = |engine: &Engine| engine.image_file(&data("vision/odd.png")).unwrap();
    let image = picture(&plain);
    let want: Vec<_> = (0..8).map(|i| ended(ask(&plain, &image, i)).unwrap()).collect();
    let engine = builder().build_on(None, mixed(plan)).unwrap();
    let image = picture(&engine);
    for round in 0..8 {
        let open: Vec<Events> = (0..8).map(|i| ask(&engine, &image, i)).collect();
        for i in 0..3 {
            engine.relayout(layout(TOWERS[mix(8 * round + i) as usize % TOWERS.len()])).unwrap();
        }
        for (events, want) in open.into_iter().zip(&want) {
            assert_eq!(&ended(events).unwrap(), want, "round {round}, {}", engine.layout());
        }
    }
    rests(&engine);
    let stats = engine.stats();
    let images = stats.scheduler.images.unwrap();
    assert!(images.encoded > 8 && images.in_flight == 0 && stats.relayouts > 12, "{stats:?}");
}

#[test]
fn what_is_not_possible_is_refused_and_the_engine_goes_on() {
    let engine = engine(false, Vec::new());
    let events = engine.submit(request(1)).unwrap();
    let refused = |to: &str| engine.relayout(layout(to)).unwrap_err().to_string();
    assert!(refused("0-2").contains("layer 3 is in no stage"));
    assert!(refused("0-4").contains("layer 4 does not exist"));
    assert!(refused("0-1@cuda:0,2-3@cuda:9").contains("there is no such GPU"));
    let full = refused("0-1@cuda:0,2-3@cuda:8");
    assert!(full.contains("cuda:8: bringing 3 units there needs") && !full.contains('\n'), "{full}");
    assert_eq!(&ended(events).unwrap(), &expected()[1]);
    assert_eq!((engine.stats().relayouts, engine.layout()), (0, layout("0-3")));
    let same = engine.relayout(layout("0-3@cpu")).unwrap();
    assert_eq!((same.moved.len(), engine.stats().relayouts), (0, 0));
}

#[test]
fn one_at_a_time() {
    let slow = Fault::new(0, Point::FindWay, Kind::Slow(Duration::from_millis(300)), 0..1);
    let engine = engine(false, vec![slow]);
    std::thread::scope(|scope| {
        let first = scope.spawn(|| engine.relayout(layout("0-3@cuda:0")));
        std::thread::sleep(Duration::from_millis(100));
        let second = engine.relayout(layout("0-3@cuda:1")).unwrap_err().to_string();
        assert!(second.contains("the layout is being changed already"), "{second}");
        first.join().unwrap().unwrap();
    });
    assert_eq!(engine.layout(), layout("0-3@cuda:0"));
}

/// Whatever fails, and however: before the stages change places nobody notices, and after it is a fault.
#[test]
fn what_fails_in_a_relayout_ends_no_more_than_it_must() {
    let kinds = [Kind::DeviceError, Kind::OutOfMemory, Kind::Panic];
    for (kind, ahead) in kinds.into_iter().flat_map(|kind| [(kind, false), (kind, true)]) {
        // The first stage loads when the engine starts, and again in the relayout.
        for (point, visits) in [(Point::Load, 1..2), (Point::FindWay, 0..1)] {
            let engine = engine(ahead, vec![Fault::new(0, point, kind, visits)]);
            let open: Vec<Events> = (0..4).map(|i| engine.submit(request(i)).unwrap()).collect();
            engine.relayout(layout(LAYOUTS[2])).unwrap_err();
            for (i, events) in open.into_iter().enumerate() {
                assert_eq!(ended(events).unwrap(), expected()[i], "{point:?}, {kind:?}");
            }
            engine.relayout(layout(LAYOUTS[2])).unwrap();
            assert_eq!((engine.stats().rebuilds, engine.stats().relayouts), (0, 1));
        }
        let engine = engine(ahead, vec![Fault::new(1, Point::Fetch, kind, 0..1)]);
        let open: Vec<Events> = (0..8).map(|i| engine.submit(request(i)).unwrap()).collect();
        engine.relayout(layout(LAYOUTS[2])).unwrap_err();
        let outcomes: Vec<Result<Vec<Vec<u32>>>> = open.into_iter().map(ended).collect();
        assert!(outcomes.iter().any(Result::is_err), "{kind:?}");
        for (outcome, want) in outcomes.iter().zip(expected()) {
            // Those that waited, or had ended already.
            assert!(outcome.as_ref().map_or(true, |ids| ids == want), "{kind:?}");
        }
        assert_eq!(engine.layout(), layout("0-3"));
        assert_eq!(&ended(engine.submit(request(5)).unwrap()).unwrap(), &expected()[5]);
        assert_eq!((engine.stats().rebuilds, engine.stats().relayouts), (1, 0));
        engine.relayout(layout(LAYOUTS[2])).unwrap();
    }
}

/// A stage fails while others are made ready, or are about to take over: what is built then is of the layout of before.
#[test]
fn a_fault_during_a_relayout_is_answered_as_ever() {
    for visit in 1..14 {
        let slow = Fault::new(0, Point::FindWay, Kind::Slow(Duration::from_millis(2)), 0..9);
        let engine =
            engine(false, vec![slow, Fault::new(0, Point::Head, Kind::DeviceError, visit..visit + 1)]);
        let open: Vec<Events> = (0..4).map(|i| engine.submit(request(i)).unwrap()).collect();
        let outcome = engine.relayout(layout("0-1@cuda:0,2-3@cuda:1"));
        open.into_iter().for_each(|events| _ = ended(events));
        assert_eq!(&ended(engine.submit(request(5)).unwrap()).unwrap(), &expected()[5]);
        let want = if outcome.is_ok() { "0-1@cuda:0,2-3@cuda:1" } else { "0-3" };
        assert_eq!(engine.layout(), layout(want), "{outcome:?}");
        // And in the layout that it has, whatever fails next.
        assert_eq!(engine.relayout(layout("0-3@cuda:5")).unwrap().from, layout(want));
    }
}

#[test]
fn stages_are_built_anew_in_the_layout_that_there_is() {
    let engine = engine(false, vec![Fault::new(1, Point::Head, Kind::DeviceError, 3..4)]);
    engine.relayout(layout("0-1@cuda:0,2-3@cuda:1")).unwrap();
    assert!(ended(engine.submit(request(0)).unwrap()).is_err());
    assert_eq!(&ended(engine.submit(request(5)).unwrap()).unwrap(), &expected()[5]);
    let stats = engine.stats();
    assert_eq!((stats.rebuilds, stats.stages.len()), (1, 2));
    assert_eq!(stats.stages[1].device, "cuda:1");
}

const SPLIT: &str = "0@cuda:0,1@cuda:1,2-3@cuda:2,head@all";

/// Requests that want their most likely tokens alone, of which parts tell no more than the best; and others beside them.
#[test]
fn parts_of_the_head_choose_the_tokens_of_the_whole() {
    for (ahead, all) in [(false, &[2, 4, 8][..]), (true, &[2, 4, 8]), (true, &[2, 4, 1, 8, 0, 3])] {
        let engine = engine(ahead, Vec::new());
        engine.relayout(layout(SPLIT)).unwrap();
        let open: Vec<Events> = all.iter().map(|&i| engine.submit(request(i)).unwrap()).collect();
        for (&i, events) in all.iter().zip(open) {
            assert_eq!(ended(events).unwrap(), expected()[i as usize], "request {i} of {all:?}, {ahead}");
        }
    }
}

#[test]
fn a_part_of_the_head_that_fails_is_a_fault_of_the_last_stage() {
    for (ahead, part) in [false, true].into_iter().flat_map(|ahead| (3..6).map(move |part| (ahead, part))) {
        for kind in [Kind::DeviceError, Kind::OutOfMemory, Kind::Panic] {
            let engine = engine(ahead, vec![Fault::new(part, Point::Head, kind, 5..6)]);
            engine.relayout(layout(SPLIT)).unwrap();
            assert!(ended(engine.submit(request(0)).unwrap()).is_err(), "{kind:?} of part {part}");
            assert_eq!(&ended(engine.submit(request(5)).unwrap()).unwrap(), &expected()[5]);
            assert_eq!((engine.stats().rebuilds, engine.layout()), (1, layout(SPLIT)));
        }
    }
}

#[test]
fn an_engine_can_be_dropped_at_any_moment_of_a_relayout() {
    for i in 0..8 {
        let slow = |point| Fault::new(0, point, Kind::Slow(Duration::from_millis(5)), 0..9);
        let engine = engine(false, vec![slow(Point::FindWay), slow(Point::Fetch)]);
        let events = engine.submit(request(1)).unwrap();
        let (reply, outcome) = crossbeam_channel::bounded(1);
        engine.commands.send(super::Command::Relayout(layout(LAYOUTS[2]), reply)).unwrap();
        std::thread::sleep(Duration::from_millis(3 * i));
        drop(engine);
        let _ = ended(events);
        assert!(outcome.try_recv().is_ok_and(|o| o.is_ok()) || outcome.recv().is_err() || i > 0);
    }
}

/// A stage that is slowed gives a layer away, once, and no request notices.
#[test]
fn the_balancer_moves_a_layer_off_a_slow_device() {
    let pace = Pace { window: Duration::from_millis(100), steps_min: 8, patience: 3 };
    let slow = Fault::new(1, Point::Layer, Kind::Slow(Duration::from_millis(2)), 0..u64::MAX);
    let wire = wire(false, Arc::new(Plan(vec![slow])));
    let engine = builder().balance_at(pace).build_on(Some(false), wire).unwrap();
    engine.relayout(layout("0@cuda:0,1-3@cuda:1")).unwrap();
    let deadline = Instant::now() + PATIENCE;
    let mut i = 0;
    while engine.layout() != layout("0-2@cuda:0,3@cuda:1") {
        assert!(Instant::now() < deadline, "{}", engine.layout());
        assert_eq!(&ended(engine.submit(request(i)).unwrap()).unwrap(), &expected()[i as usize]);
        i = (i + 1) % REQUESTS;
    }
    // Two layers have left it, one at a time.
    assert_eq!(engine.stats().relayouts, 3);
}

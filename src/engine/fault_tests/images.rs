//! The same for stages of a vision tower, and what goes on beside it.

use super::*;
use crate::{
    engine::{vision::VisionOn, wire::Either},
    request::Media,
};

/// Two decoder stages, then two of the tower, then the store.
const STAGES: usize = 5;
/// A tower whose stage has the first block, and one that has the others.
const LAYOUT: &str = "v0,v1-2,0,1-2";
/// What prompts begin with: another token each.
const TEXT: u32 = 40;

fn folder() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/data")
}

fn wire(plan: Arc<Plan>) -> Arc<Wire> {
    Arc::new(move |layout, config, shared, progress| {
        let all = Faulty::<false>::pipeline(STAGES, &plan);
        let mut all = all.into_iter().map(Either::<_, Arc<Faulty<true>>>::One);
        let mut take = |n: usize| all.by_ref().take(n).collect::<Vec<_>>();
        let (backends, tower) = (take(2), take(2));
        let keeper = take(1).pop().unwrap();
        let vision = Some(VisionOn { backends: tower, keeper });
        let ways = Ways { ones: &Host, twos: &Host, one_to_two: &Host, two_to_one: &Host };
        let on = On { backends, ways, lost: || false, vision, asides: Vec::new() };
        wire_on(on, layout, config, shared, progress)
    })
}

fn engine(faults: Vec<Fault>) -> Result<Engine> {
    let builder = Engine::builder().model(folder().join("qwen2_5_vl")).layout(LAYOUT.parse()?);
    builder.slots(2).running(2).threads(1).build_on(Some(false), wire(plan(faults)))
}

fn picture(engine: &Engine) -> Media {
    engine.image_file(&folder().join("vision/odd.png")).unwrap()
}

/// One of a kind, with an image in its midst or without one.
fn request(i: u32, image: Option<Media>) -> Request {
    let mut ids = vec![TEXT + i; 5];
    if image.is_some() {
        ids.extend([320, 322, 321, 7]);
    }
    let mut request = Request::new(Prompt::Ids(ids));
    request.media.extend(image);
    request.stop.max_tokens = Some(ANSWER);
    request.stop.ignore_eos = true;
    request
}

fn all(engine: &Engine) -> Vec<(Vec<u32>, Result<FinishReason>)> {
    let image = picture(engine);
    let media = |i: u32| (i != 1).then(|| image.clone());
    let open: Vec<Events> = (0..4).map(|i| engine.submit(request(i, media(i))).unwrap()).collect();
    open.into_iter().map(ended).collect()
}

#[test]
fn a_fault_of_the_tower_ends_no_request_that_waits_for_its_image() {
    let expected: Vec<Vec<u32>> =
        all(&engine(vec![]).unwrap()).into_iter().map(|(ids, end)| end.map(|_| ids).unwrap()).collect();
    for (stage, point) in [(2, Point::Tower), (3, Point::Tower), (3, Point::Take), (4, Point::Keep)] {
        for kind in KINDS {
            let expected = expected.clone();
            watched(format!("{point:?} of {stage}, {kind:?}"), move || {
                let engine = engine(vec![Fault::new(stage, point, kind, 0..1)]).unwrap();
                for (i, (ids, end)) in all(&engine).into_iter().enumerate() {
                    match end {
                        Ok(_) => assert_eq!(ids, expected[i], "request {i}"),
                        // It goes on beside the tower, and has begun.
                        Err(error) => assert!(i == 1, "request {i}: {error}"),
                    }
                }
                assert_eq!(all(&engine)[0].0, expected[0], "after the fault");
                rests(&engine);
                assert_eq!(engine.stats().rebuilds, u64::from(!matches!(kind, Kind::Slow(_))));
            });
        }
    }
}

#[test]
fn a_tower_that_cannot_be_loaded_is_told() {
    for stage in [2, 3] {
        let said =
            engine(vec![Fault::new(stage, Point::Load, Kind::DeviceError, 0..1)]).map(drop).unwrap_err();
        assert_eq!(said.to_string(), format!("device test:{stage}: made to fail"));
    }
}

#[test]
fn faults_of_the_tower_that_repeat_fail_fast() {
    watched("repeated".into(), || {
        let engine = engine(vec![Fault::new(3, Point::Tower, Kind::Panic, 0..u64::MAX)]).unwrap();
        let told = all(&engine).into_iter().map(|(_, end)| end);
        let told: Vec<String> = told.filter_map(|end| end.err().map(|e| e.to_string())).collect();
        let first = "engine: vision stage 1 panicked: made to panic";
        assert!(told.len() >= 3 && told.iter().all(|t| t.starts_with(first)), "{told:?}");
        assert!(told.iter().any(|told| told.contains("it was fault 3")), "{told:?}");
    });
}

#[test]
fn text_is_answered_while_an_image_is_encoded() {
    watched("slow".into(), || {
        let slow = Kind::Slow(Duration::from_secs(4));
        let engine = engine(vec![Fault::new(2, Point::Tower, slow, 0..1)]).unwrap();
        let mut image = engine.submit(request(0, Some(picture(&engine)))).unwrap();
        let begun = Instant::now();
        for i in 1..4 {
            assert_eq!(ended(engine.submit(request(i, None)).unwrap()).0.len(), ANSWER as usize);
        }
        assert!(image.next_timeout(Duration::ZERO).is_err(), "the tower is slow: {:?}", begun.elapsed());
        assert!(matches!(image.next(), Some(Event::Token { .. })));
        assert_eq!(ended(image).0.len(), ANSWER as usize - 1);
    });
}

#[test]
fn an_engine_is_dropped_while_images_are_encoded() {
    for (stage, point) in [(2, Point::Tower), (3, Point::Tower), (4, Point::Keep)] {
        watched(format!("{point:?} of {stage}"), move || {
            let engine = engine(vec![Fault::new(stage, point, Kind::Slow(10 * SLOW), 0..1)]).unwrap();
            let image = picture(&engine);
            let open: Vec<Events> =
                (0..3).map(|i| engine.submit(request(i, Some(image.clone()))).unwrap()).collect();
            std::thread::sleep(SLOW);
            drop(engine);
            for events in open {
                assert_eq!(ended(events).1.unwrap_err().to_string(), "engine: it has ended");
            }
        });
    }
}

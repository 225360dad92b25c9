//! Many sequences over many steps, each planned before the host has read the one before: the processor's tokens.

use std::path::Path;

use pipeline_infer::{Engine, Event, Events, backend::DType, engine::WeightSource};

use crate::{
    Shape,
    common::{collect, golden::checkpoints, request},
    device::{gpus, quick},
    on_gpus,
};

/// Two largest logits of these models that are nearer than this (in f32) may change places.
const TIE: f32 = 1e-3;

/// A token, and the two most likely ones with their log-probabilities.
type Step = (u32, Vec<(u32, f32)>);

/// Prompts of many lengths. Every third answer is short: sequences come and go.
fn submit(engine: &Engine, count: u32, answer: u32) -> Vec<Events> {
    let vocab = engine.spec().vocab as u32;
    // Pads are places of images.
    let pads = engine.spec().pads.map_or([vocab; 2], |pads| [pads.image, pads.video]);
    let word = |id: u32| if pads.contains(&id) { 0 } else { id };
    let of = |i: u32| {
        let ids: Vec<u32> = (0..1 + i * 7 % 60).map(|t| word((t * 31 + i * 17 + 3) % vocab)).collect();
        let mut request = request(&ids, if i.is_multiple_of(3) { 1 + i } else { answer });
        request.sampling.logprobs = Some(2);
        engine.submit(request).unwrap()
    };
    (0..count).map(of).collect()
}

fn answers(engine: &Engine, count: u32, answer: u32) -> Vec<Vec<Step>> {
    let steps = |events: Events| {
        let tokens = collect(events).into_iter().filter_map(|event| match event {
            Event::Token { id, logprobs, .. } => Some((id, logprobs.unwrap().top)),
            _ => None,
        });
        tokens.collect()
    };
    submit(engine, count, answer).into_iter().map(steps).collect()
}

/// The same tokens, up to the first place where the processor's two best are a tie. Those must be few.
fn assert_same(what: &str, ours: &[Vec<Step>], theirs: &[Vec<Step>]) {
    let mut ties = 0;
    for (i, (ours, theirs)) in ours.iter().zip(theirs).enumerate() {
        assert_eq!(ours.len(), theirs.len(), "{what}, request {i}");
        let ids = |steps: &[Step]| steps.iter().map(|s| s.0).collect::<Vec<_>>();
        if let Some(at) = (0..ours.len()).find(|&at| ours[at].0 != theirs[at].0) {
            let (got, best) = (ours[at].0, &theirs[at].1);
            let tie = best[0].1 - best[1].1 <= TIE && best[1].0 == got;
            assert!(
                tie,
                "{what}, request {i}: token {at} is {got}, and the most likely are {best:?};\n ours {:?}\n theirs {:?}",
                ids(ours),
                ids(theirs)
            );
            ties += 1;
        }
    }
    assert!(ties * 10 <= ours.len(), "{what}: {ties} ties in {} answers", ours.len());
}

fn check(dir: &Path, weights: WeightSource, stages: &[usize]) {
    let (count, answer) = if quick() { (8, 20) } else { (90, 160) };
    let cpu = Engine::builder()
        .model(dir)
        .weights(weights)
        .dtype(DType::F32)
        .max_context(256)
        .threads(4)
        .build()
        .unwrap();
    let theirs = answers(&cpu, count, answer);
    for &stages in stages {
        for (slots, chunk) in [(1, 256), (stages + 1, 16)] {
            let gpu = on_gpus(dir, stages, DType::F32, |b| {
                b.weights(weights).max_context(256).slots(slots).chunk(chunk)
            });
            let what = format!("{}, {stages} stages, {slots} slots, chunks of {chunk}", dir.display());
            assert_same(&what, &answers(&gpu, count, answer), &theirs);
        }
    }
}

#[test]
fn many_long_answers_are_the_processors_for_every_architecture() {
    if gpus() == 0 {
        return;
    }
    for dir in checkpoints() {
        check(&dir, WeightSource::Real, &[1, 2]);
    }
}

#[test]
fn many_long_answers_are_the_processors_with_heads_of_64() {
    if gpus() == 0 {
        return;
    }
    let dir = Shape { layers: 4, ..Shape::SMALL }.write(DType::F32);
    check(dir.path(), WeightSource::Dummy, &[1, 3, 4]);
}

/// Sequences wait for blocks and seats of others, are cancelled, and come again; those that stay get their tokens.
#[test]
fn cancelling_some_leaves_the_others_their_tokens() {
    if gpus() == 0 {
        return;
    }
    let dir = Shape { layers: 4, ..Shape::SMALL }.write(DType::F32);
    let cpu = Engine::builder()
        .model(dir.path())
        .weights(WeightSource::Dummy)
        .max_context(256)
        .threads(4)
        .build()
        .unwrap();
    let theirs = answers(&cpu, 40, 60);
    let token = 2 * 2 * 64 * 4 * 4;
    let gpu = on_gpus(dir.path(), 2, DType::F32, |b| {
        b.weights(WeightSource::Dummy).max_context(256).kv_memory(token * 640).slots(3).chunk(32)
    });
    for round in 0..3 {
        let mut open: Vec<Option<Events>> = submit(&gpu, 40, 60).into_iter().map(Some).collect();
        for i in (round..40).step_by(4) {
            // At once, or after some tokens.
            let mut events = open[i].take().unwrap();
            if i % 8 == 0 {
                let _ = events.by_ref().take(3).count();
            }
        }
        let (mut got, mut want) = (Vec::new(), Vec::new());
        for (i, events) in open.into_iter().enumerate().filter_map(|(i, e)| Some((i, e?))) {
            got.push(collect(events).into_iter().filter_map(step).collect::<Vec<Step>>());
            want.push(theirs[i].clone());
        }
        assert_same(&format!("round {round}"), &got, &want);
    }
}

fn step(event: Event) -> Option<Step> {
    match event {
        Event::Token { id, logprobs, .. } => Some((id, logprobs?.top)),
        _ => None,
    }
}

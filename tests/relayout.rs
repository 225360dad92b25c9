//! Another layout while requests run: nobody notices. All on the processor, where cuts are all that can change; other devices
//! are in `engine/relayout_tests.rs` and in `gpu_model/relayout.rs`.

mod common;

use std::{
    collections::HashMap,
    path::Path,
    sync::atomic::{AtomicBool, Ordering::SeqCst},
};

use common::{Random, chat_llama, collect, data, golden::checkpoints, logprob_bits, request};
use pipeline_infer::{
    Engine, Event, Request,
    engine::EngineBuilder,
    layout::{Device, Layout, Stage},
    model::open_model,
};

fn builder(dir: &Path) -> EngineBuilder {
    Engine::builder().model(dir).device(Device::Cpu).threads(2).max_context(128).chunk(12)
}

/// A cut of so many layers.
fn random_layout(random: &mut Random, layers: usize) -> Layout {
    let mut starts = vec![0];
    starts.extend((1..layers).filter(|_| random.below(2) == 0));
    let ends = starts.iter().skip(1).copied().chain([layers]);
    let stages =
        starts.iter().zip(ends).map(|(&start, end)| Stage { device: Device::Cpu, layers: start..end });
    Layout::new(stages.collect()).unwrap()
}

/// Requests that begin alike in groups, some greedy, some drawn, with penalties and biases, of several samples.
fn requests(vocab: u32) -> Vec<Request> {
    let of = |i: u32| {
        let shared = (0..40).map(|t| (t * 13 + i % 3 * 7) % vocab);
        let ids: Vec<u32> = shared.take(8 + 9 * (i as usize % 5)).chain([i, i + 3]).collect();
        let mut request = request(&ids, 8 + i * 5 % 50);
        let sampling = &mut request.sampling;
        sampling.logprobs = Some(3);
        sampling.seed = Some(u64::from(i));
        if i % 2 == 1 {
            (sampling.temperature, sampling.top_p) = (0.9, 0.95);
            request.n = 1 + i % 3;
        }
        if i.is_multiple_of(3) {
            (sampling.repetition_penalty, sampling.presence_penalty) = (1.2, 0.4);
            sampling.logit_bias = vec![(i, 1.5)];
        }
        request.priority = (i % 4) as i32 / 3;
        request
    };
    (0..24).map(of).collect()
}

/// By sample: its tokens, and the bits of its log-probabilities.
type Answer = HashMap<u32, (Vec<u32>, Vec<u32>)>;

fn answers(events: Vec<Event>) -> Answer {
    let mut samples = HashMap::<u32, Vec<Event>>::new();
    for event in events {
        if let Event::Token { sample, .. } = event {
            samples.entry(sample).or_default().push(event);
        }
    }
    samples.into_iter().map(|(sample, events)| (sample, logprob_bits(&events))).collect()
}

/// Answers of all requests at once while the layout changes again and again.
fn disturbed(engine: &Engine, seed: u64, cancelled: impl Fn(usize) -> bool + Sync) -> Vec<Option<Answer>> {
    let (done, layers) = (AtomicBool::new(false), engine.spec().layers.len());
    let open: Vec<_> =
        requests(engine.spec().vocab as u32).into_iter().map(|r| engine.submit(r).unwrap()).collect();
    std::thread::scope(|scope| {
        let changes = scope.spawn(|| {
            let (mut random, mut count) = (Random::new(seed), 0);
            while !done.load(SeqCst) || count == 0 {
                let to = random_layout(&mut random, layers);
                let report = engine.relayout(to.clone()).unwrap();
                assert_eq!((report.to, report.kv_bytes, report.moved.len()), (to, 0, 0));
                count += 1;
            }
            count
        });
        let of = |(i, mut events): (usize, pipeline_infer::Events)| match cancelled(i) {
            true => {
                let _ = events.by_ref().take(i % 5).count();
                None
            }
            false => Some(answers(collect(events))),
        };
        let answers = open.into_iter().enumerate().map(of).collect();
        done.store(true, SeqCst);
        assert!(changes.join().unwrap() > 0);
        answers
    })
}

fn alone(engine: &Engine) -> Vec<Answer> {
    let all = requests(engine.spec().vocab as u32).into_iter();
    all.map(|request| answers(collect(engine.submit(request).unwrap()))).collect()
}

#[test]
fn no_bit_changes_for_any_architecture() {
    for dir in checkpoints() {
        let want = alone(&builder(&dir).build().unwrap());
        let engine = builder(&dir).stages(2).build().unwrap();
        let got = disturbed(&engine, 1, |_| false);
        assert!(got.into_iter().map(Option::unwrap).eq(want), "{}", dir.display());
    }
}

/// Few KV blocks, so that sequences lose theirs to others; some are cancelled; prefixes are found again.
#[test]
fn no_bit_changes_where_blocks_are_few_and_clients_go() {
    let dir = chat_llama();
    let want = alone(&builder(&dir).build().unwrap());
    let spec = open_model(&dir, true).unwrap().spec;
    let token = 2 * spec.heads.kv_heads * spec.heads.head_dim * spec.layers.len() * 2;
    let engine = builder(&dir).kv_memory(token * 16 * 14).running(9).build().unwrap();
    for seed in 0..4 {
        let got = disturbed(&engine, seed, |i| i % 4 == seed as usize % 4);
        for (i, (got, want)) in got.into_iter().zip(&want).enumerate() {
            assert!(got.as_ref().is_none_or(|got| got == want), "round {seed}, request {i}");
        }
    }
    let stats = engine.stats();
    assert!(stats.scheduler.preemptions > 0 && stats.scheduler.prefix_hit_tokens > 0, "{stats:?}");
    assert!(stats.relayouts >= 4 && stats.rebuilds == 0);
    assert_eq!(stats.stages.len(), engine.layout().stages().len());
}

/// Stop strings and end-of-sequence tokens end requests while stages change.
#[test]
fn stops_are_where_they_were() {
    let dir = chat_llama();
    let text = |engine: &Engine, i: u32| {
        let mut request = request(&[5 + i, 9, 11], 60);
        request.stop.strings = vec!["e".into(), "\n\n".into()];
        request.stop.ignore_eos = false;
        request.sampling.seed = Some(u64::from(i));
        request.sampling.temperature = 0.8;
        engine.submit(request).unwrap()
    };
    let plain = builder(&dir).build().unwrap();
    let want: Vec<Vec<Event>> = (0..20).map(|i| collect(text(&plain, i))).collect();
    let engine = builder(&dir).build().unwrap();
    let mut random = Random::new(3);
    let open: Vec<_> = (0..20).map(|i| text(&engine, i)).collect();
    for _ in 0..10 {
        engine.relayout(random_layout(&mut random, engine.spec().layers.len())).unwrap();
    }
    for (events, want) in open.into_iter().zip(want) {
        assert_eq!(logprob_bits(&collect(events)), logprob_bits(&want));
    }
}

#[test]
fn an_engine_at_rest_changes_too_and_counts_on() {
    let engine = builder(&chat_llama()).stages(3).balance(true).build().unwrap();
    let first = alone(&engine);
    let before = engine.stats();
    let report = engine.relayout("0,1-3".parse().unwrap()).unwrap();
    assert_eq!((report.from.stages().len(), report.to.stages().len()), (3, 2));
    assert!(serde_json::to_string(&report).unwrap().contains("0@cpu,1-3@cpu"));
    assert_eq!(alone(&engine), first);
    let after = engine.stats();
    assert_eq!((after.stages.len(), after.relayouts), (2, 1));
    assert!(after.stages[0].times.batches > before.stages[0].times.batches);
    let refused = engine.relayout("0-2".parse().unwrap()).unwrap_err();
    assert!(refused.to_string().contains("layer 3 is in no stage"), "{refused}");
}

/// Images that prompts still need are encoded again for the new stages; those whose tokens are cached are not.
#[test]
fn images_are_seen_wherever_stages_are() {
    let dir = data("qwen2_5_vl");
    let build = |stages: usize| builder(&dir).max_context(400).stages(stages).build().unwrap();
    let ask = |engine: &Engine, i: u32| {
        let image = engine.image_file(&data("vision/odd.png")).unwrap();
        let mut request = request(&[40 + i, 41, 320, 322, 321, 7, 8 + i, 320, 322, 321, 9], 12);
        request.media.extend([image.clone(), image]);
        engine.submit(request).unwrap()
    };
    let plain = build(1);
    let want: Vec<_> = (0..8).map(|i| logprob_bits(&collect(ask(&plain, i)))).collect();
    let engine = build(2);
    let mut random = Random::new(5);
    for _ in 0..6 {
        let open: Vec<_> = (0..8).map(|i| ask(&engine, i)).collect();
        for _ in 0..4 {
            engine.relayout(random_layout(&mut random, engine.spec().layers.len())).unwrap();
        }
        for (events, want) in open.into_iter().zip(&want) {
            assert_eq!(&logprob_bits(&collect(events)), want);
        }
    }
    let images = engine.stats().scheduler.images.unwrap();
    assert!(images.encoded > 1 && images.in_flight == 0, "{images:?}");
}

//! Any split, chunk, number of slots or company gives the same bits; cancelling leaves nothing behind.

mod common;

use std::sync::Arc;

use common::{chat_llama, collect, crossing, logprob_bits, request};
use pipeline_infer::{
    Engine, Error, Event, FinishReason, Layout, Prompt, Request,
    backend::cpu::Cpu,
    engine::{EngineBuilder, Measurement},
    layout::Device,
    model::open_model,
    transport::transports,
};

/// On the CPU, where batching changes no bit, on machines with GPUs too.
fn build(with: impl FnOnce(EngineBuilder) -> EngineBuilder) -> Engine {
    with(Engine::builder().model(chat_llama()).device(Device::Cpu)).build().unwrap()
}

/// Ids and the bits of their log-probabilities for eight requests of different lengths at once.
fn eight(engine: &Engine) -> Vec<(Vec<u32>, Vec<u32>)> {
    let events: Vec<_> = (0..8u32)
        .map(|i| {
            let mut request =
                request(&(0..3 + 5 * i).map(|t| (t * 13 + i * 7) % 200).collect::<Vec<_>>(), 12);
            request.sampling.logprobs = Some(4);
            if i % 2 == 1 {
                request.sampling.temperature = 0.9;
                request.sampling.seed = Some(u64::from(i));
            }
            engine.submit(request).unwrap()
        })
        .collect();
    events.into_iter().map(|events| logprob_bits(&collect(events))).collect()
}

#[test]
fn any_split_chunk_and_number_of_slots_gives_the_same_bits() {
    let one = eight(&build(|b| b.stages(1).slots(1).threads(1)));
    let layers = build(|b| b).spec().layers.len();
    assert!(layers >= 4, "the checkpoint is too small to be cut");
    for stages in 2..=layers {
        for (slots, chunk) in [(1, 256), (3, 7), (stages, 1)] {
            let many = eight(&build(|b| b.stages(stages).slots(slots).chunk(chunk).threads(2)));
            assert_eq!(many, one, "{stages} stages, {slots} slots, chunks of {chunk}");
        }
    }
    let uneven: Layout = format!("0,1-{}", layers - 1).parse().unwrap();
    assert_eq!(eight(&build(|b| b.layout(uneven).slots(2))), one);
}

#[test]
fn a_request_alone_gives_what_it_gives_in_company() {
    let engine = build(|b| b.stages(2).slots(2).chunk(5));
    let together = eight(&engine);
    for (i, expected) in together.iter().enumerate() {
        let i = i as u32;
        let mut request = request(&(0..3 + 5 * i).map(|t| (t * 13 + i * 7) % 200).collect::<Vec<_>>(), 12);
        request.sampling.logprobs = Some(4);
        if i % 2 == 1 {
            request.sampling.temperature = 0.9;
            request.sampling.seed = Some(u64::from(i));
        }
        assert_eq!(&logprob_bits(&collect(engine.submit(request).unwrap())), expected, "request {i}");
    }
}

#[test]
fn more_requests_than_blocks_wait_their_turn_and_all_end() {
    let model = open_model(&chat_llama(), false).unwrap();
    let token = model.spec.kv_bytes_per_token(model.dtype) * model.spec.layers.len();
    let small = build(|b| b.stages(2).max_context(64).kv_memory(token * 64));
    assert_eq!(small.kv_tokens(), 64);
    let events: Vec<_> = (0..20).map(|i| small.submit(request(&[i, i + 1, i + 2], 40)).unwrap()).collect();
    for events in events {
        assert_eq!(collect(events).iter().filter(|e| matches!(e, Event::Token { .. })).count(), 40);
    }
}

#[test]
fn dropping_the_events_cancels_and_gives_the_blocks_back() {
    // Room for one sequence: the second request runs only if the first one's blocks come back.
    let engine = build(|b| b.stages(2).kv_memory(1 << 15));
    let room = engine.context_max() as u32 - 3;
    for _ in 0..5 {
        let mut events = engine.submit(request(&[1, 2, 3], room)).unwrap();
        assert!(matches!(events.next(), Some(Event::Token { .. })));
    }
    let mut events = engine.submit(request(&[1, 2, 3], room)).unwrap();
    events.next().unwrap();
    events.cancel();
    let last = events.last().unwrap();
    assert!(matches!(last, Event::Finished { reason: FinishReason::Cancelled, .. }), "{last:?}");
}

#[test]
fn samples_of_one_request_are_the_seeds_in_a_row() {
    let engine = build(|b| b);
    let mut many = request(&[5, 6, 7], 10);
    many.n = 3;
    many.sampling.temperature = 1.0;
    many.sampling.seed = Some(40);
    let events = collect(engine.submit(many.clone()).unwrap());
    for sample in 0..3u32 {
        let got: Vec<u32> = events
            .iter()
            .filter_map(|e| match e {
                Event::Token { sample: s, id, .. } if *s == sample => Some(*id),
                _ => None,
            })
            .collect();
        let mut single = many.clone();
        single.n = 1;
        single.sampling.seed = Some(40 + u64::from(sample));
        let alone = logprob_bits(&collect(engine.submit(single).unwrap())).0;
        assert_eq!(got, alone, "sample {sample}");
    }
}

#[test]
fn requests_that_cannot_be_served_are_refused_at_once() {
    let engine = build(|b| b.max_context(32));
    let vocab = engine.spec().vocab as u32;
    let refused = |ids: &[u32]| match engine.submit(request(ids, 4)) {
        Err(Error::Request(why)) => why,
        other => panic!("{:?}", other.err()),
    };
    assert!(refused(&[]).contains("empty"));
    assert!(refused(&[1, vocab]).contains(&format!("token 1 of the prompt is {vocab}")));
    let long = engine.submit(request(&[1; 32], 4)).err().unwrap();
    assert_eq!(long, Error::TooLong { tokens: 32, images: 0, max: 32 });
    assert_eq!(
        long.to_string(),
        "request: the prompt has 32 tokens; prompt and answer together have room for 32"
    );
    let mut asked = request(&[1; 29], 4);
    assert_eq!(
        engine.submit(asked.clone()).err().unwrap().to_string(),
        "request: the prompt has 29 tokens and max_tokens is 4; prompt and answer together have room for 32"
    );
    asked.stop.shorten = true;
    assert_eq!(collect(engine.submit(asked.clone()).unwrap()).len(), 4, "three tokens, then the end");
    (asked.stop.max_tokens, asked.stop.shorten) = (None, false);
    assert_eq!(collect(engine.submit(asked).unwrap()).len(), 4);
    let engine = build(|b| b.max_context(32).waiting_tokens(20));
    assert!(engine.submit(request(&[1; 21], 4)).err().unwrap().to_string().contains("21 tokens"));
    assert_eq!(collect(engine.submit(request(&[1; 20], 4)).unwrap()).len(), 5);
}

#[test]
fn requests_submitted_together_are_all_known_before_one_begins() {
    let engine = build(|b| b.chunk(64).running(20));
    let measurements = engine.measurements(1000);
    let all = || (0..20).map(|i| request(&[1 + i, 2, 3], 2)).collect();
    for events in engine.submit_all(all()).unwrap() {
        assert_eq!(collect(events).len(), 3);
    }
    let first = measurements.try_iter().find_map(|measurement| match measurement {
        Measurement::Planned { step, .. } => Some(step.batch.starts.len()),
        _ => None,
    });
    assert_eq!(first, Some(20));
    // All or none: what is wrong with one is said, and the others leave nothing behind.
    let mut some: Vec<Request> = all();
    some[13].prompt = Prompt::Ids(vec![]);
    assert!(engine.submit_all(some).err().unwrap().to_string().contains("empty"));
    assert_eq!((engine.stats().requests_waiting, engine.stats().scheduler.running), (0, 0));
    assert!(engine.submit_all(vec![]).unwrap().is_empty());
    let engine = build(|b| b.waiting(19));
    assert_eq!(engine.submit_all(all()).err(), Some(Error::Busy { max: 19 }));
    assert_eq!(collect(engine.submit(request(&[1], 2)).unwrap()).len(), 3);
}

#[test]
fn builders_values_are_checked() {
    let said = |with: fn(EngineBuilder) -> EngineBuilder| {
        let error = with(Engine::builder().model(chat_llama())).build().err().expect("refused");
        assert_eq!(error.exit_code(), if matches!(error, Error::Device { .. }) { 1 } else { 2 }, "{error}");
        assert!(!error.to_string().contains('\n'));
        error.to_string()
    };
    assert!(said(|b| b.stages(99)).contains("--stages"));
    assert!(said(|b| b.stages(0)).contains("--stages"));
    assert!(said(|b| b.layout("0-1".parse().unwrap())).contains("in no stage"));
    assert!(said(|b| b.slots(0)).contains("--slots"));
    assert!(said(|b| b.chunk(0)).contains("--chunk"));
    assert!(said(|b| b.threads(0)).contains("--threads"));
    assert!(said(|b| b.running(0)).contains("--running"));
    assert!(said(|b| b.running(1 << 20)).contains("--running"));
    assert!(said(|b| b.waiting(0)).contains("--waiting"));
    assert!(said(|b| b.waiting_tokens(0)).contains("--waiting-tokens"));
    assert!(said(|b| b.max_context(1)).contains("--max-context"));
    assert!(said(|b| b.max_context(1 << 40)).contains("--max-context"));
    assert!(said(|b| b.kv_memory(3)).contains("--kv-memory"));
    // More memory than there is: no more is taken than can ever be used.
    assert!(build(|b| b.kv_memory(usize::MAX)).kv_tokens() <= 64 * 256);
    assert_eq!(build(|b| b.kv_memory(usize::MAX).running(100)).kv_tokens(), 100 * 256);
    // As many as run at once have room, where there is memory for them.
    assert_eq!(build(|b| b.max_context(32)).kv_tokens(), 8 * 32);
    assert_eq!(build(|b| b.max_context(32).running(100)).kv_tokens(), 100 * 32);
    assert!(said(|b| b.device(Device::Cuda(99))).contains("cuda"));
}

#[test]
fn dropping_the_engine_ends_open_requests_with_an_error() {
    let engine = build(|b| b.stages(2));
    let room = engine.context_max() as u32;
    let mut events = engine.submit(request(&[1, 2, 3], room - 3)).unwrap();
    events.next().unwrap();
    drop(engine);
    assert!(matches!(events.last(), Some(Event::Error(Error::Engine(_)))));
}

#[test]
fn every_transport_brings_what_was_sent_in_order_and_waits_for_room() {
    let cpu = Arc::new(Cpu::new(Some(1)));
    for transport in transports::<Cpu, Cpu>() {
        crossing::brings_what_was_sent_in_order(transport, &cpu, &cpu);
        crossing::tells_a_sender_without_a_receiver(transport, &cpu, &cpu);
    }
}

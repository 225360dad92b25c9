//! KV blocks through the engine, on the CPU: whether prompts share them, and whether they run out in the middle of answers,
//! changes no token and no bit of a log-probability.

mod common;

use common::{chat_llama, collect, logprob_bits, request};
use pipeline_infer::{Engine, Request, engine::EngineBuilder, layout::Device, model::open_model};

fn build(with: impl FnOnce(EngineBuilder) -> EngineBuilder) -> Engine {
    with(Engine::builder().model(chat_llama()).device(Device::Cpu).max_context(160)).build().unwrap()
}

/// Bytes for so many tokens.
fn kv_bytes(tokens: usize) -> usize {
    let model = open_model(&chat_llama(), false).unwrap();
    tokens * model.spec.kv_bytes_per_token(model.dtype) * model.spec.layers.len()
}

/// Requests that begin the same, drawn with every penalty, and some greedy ones.
fn requests() -> Vec<Request> {
    let some = |i: u32| {
        let ids: Vec<u32> = (0..40).chain(0..3 + 4 * i).map(|t| (t * 13 + t / 40 * i) % 200).collect();
        let mut request = request(&ids, 60);
        request.sampling.logprobs = Some(3);
        request.sampling.repetition_penalty = 1.2;
        if !i.is_multiple_of(3) {
            request.sampling.temperature = 0.9;
            request.sampling.seed = Some(u64::from(i));
            request.sampling.presence_penalty = 0.3;
            request.sampling.frequency_penalty = 0.2;
        }
        request.n = 1 + i % 2;
        request
    };
    (0..8).map(some).collect()
}

fn answers(engine: &Engine) -> Vec<Vec<(Vec<u32>, Vec<u32>)>> {
    let events: Vec<_> = requests().into_iter().map(|request| engine.submit(request).unwrap()).collect();
    let by_sample = |events: Vec<pipeline_infer::Event>| {
        let of = |n: u32| {
            let own = |event: &&pipeline_infer::Event| matches!(event, pipeline_infer::Event::Token { sample, .. } if *sample == n);
            logprob_bits(&events.iter().filter(own).cloned().collect::<Vec<_>>())
        };
        (0..2).map(of).collect()
    };
    events.into_iter().map(|events| by_sample(collect(events))).collect()
}

#[test]
fn answers_are_the_same_whether_blocks_run_out_or_are_shared() {
    let want = answers(&build(|b| b.prefix_cache(false)));
    assert!(want.iter().all(|samples| samples[0].0.len() == 60));
    for prefix_cache in [false, true] {
        // Room for one of the longest, and for two and a half: up to twelve begin together.
        for tokens in [160, 400] {
            let engine =
                build(|b| b.stages(2).slots(2).prefix_cache(prefix_cache).kv_memory(kv_bytes(tokens)));
            assert_eq!(engine.kv_tokens(), tokens);
            assert!(answers(&engine) == want, "{tokens} tokens of KV cache, prefix cache: {prefix_cache}");
            // Again, from what the cache has kept.
            assert!(answers(&engine) == want, "again: {tokens} tokens, prefix cache: {prefix_cache}");
        }
    }
    let roomy = build(|b| b.chunk(24).slots(3));
    assert!(answers(&roomy) == want && answers(&roomy) == want, "shared prefixes");
}

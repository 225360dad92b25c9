//! A real model: SmolLM2-135M-Instruct against transformers' greedy tokens, in one stage and in several.
//!
//! PIPELINE_INFER_SMOLLM2 names its folder (`make model` makes it); without it these tests print SKIPPED.

mod common;

use std::{path::PathBuf, sync::Mutex};

use common::{collect, data, logprob_bits};
use pipeline_infer::{Engine, Message, Prompt, Request, backend::DType};

#[derive(serde::Deserialize)]
struct Golden {
    prompts: Vec<GoldenPrompt>,
}

#[derive(serde::Deserialize)]
struct GoldenPrompt {
    messages: Vec<Message>,
    ids: Vec<u32>,
    greedy: Vec<u32>,
}

/// Each test uses every core; two at a time would wait for each other's threads at every op.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

fn model() -> Option<PathBuf> {
    let dir = std::env::var_os("PIPELINE_INFER_SMOLLM2").map(PathBuf::from);
    let dir = dir.filter(|dir| dir.join("model.safetensors").exists());
    if dir.is_none() {
        eprintln!(
            "SKIPPED: PIPELINE_INFER_SMOLLM2 does not name a folder with SmolLM2 (`make model` makes one)"
        );
    }
    dir
}

fn golden() -> Golden {
    serde_json::from_slice(&std::fs::read(data("smollm2.json")).unwrap()).unwrap()
}

/// All chats at once; tokens in the order of the prompts.
fn answers(engine: &Engine, golden: &Golden) -> Vec<(Vec<u32>, Vec<u32>)> {
    let events: Vec<_> = golden
        .prompts
        .iter()
        .map(|prompt| {
            let mut request = Request::new(Prompt::Chat(prompt.messages.clone()));
            request.stop.max_tokens = Some(32);
            request.stop.ignore_eos = true;
            request.sampling.logprobs = Some(2);
            let events = engine.submit(request).unwrap();
            assert_eq!(events.prompt_ids(), prompt.ids, "template and tokenizer");
            events
        })
        .collect();
    events.into_iter().map(|events| logprob_bits(&collect(events))).collect()
}

#[test]
fn greedy_tokens_in_f32_are_transformers_own_in_one_stage_and_in_several() {
    let _alone = ONE_AT_A_TIME.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let Some(dir) = model() else { return };
    let golden = golden();
    let mut first = None;
    for stages in [1, 2, 4, 7] {
        let engine =
            Engine::builder().model(&dir).dtype(DType::F32).stages(stages).slots(stages).build().unwrap();
        let got = answers(&engine, &golden);
        for (prompt, (ids, _)) in golden.prompts.iter().zip(&got) {
            assert_eq!(ids, &prompt.greedy, "{stages} stages, {:?}", prompt.messages.last());
        }
        assert!(first.get_or_insert_with(|| got.clone()) == &got, "{stages} stages change a bit");
    }
}

#[test]
fn in_16_bits_any_split_gives_the_same_bits() {
    let _alone = ONE_AT_A_TIME.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let Some(dir) = model() else { return };
    let golden = golden();
    for dtype in [DType::F16, DType::BF16] {
        let run = |stages| {
            let engine =
                Engine::builder().model(&dir).dtype(dtype).stages(stages).slots(stages).build().unwrap();
            answers(&engine, &golden)
        };
        assert!(run(1) == run(3), "{}", dtype.name());
    }
}

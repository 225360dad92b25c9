//! Every architecture against transformers: logits of every prompt position and greedy tokens, from the small
//! checkpoints in tests/data (see the README there).

mod common;

use std::{fs, path::PathBuf, sync::Arc};

use common::{data, request};
use pipeline_infer::{
    Engine, Event,
    backend::{Backend, DType, Limits, cpu::Cpu},
    batch::{KV_BLOCK, MicroBatch, OutputRow, SeqId, SeqRows},
    model::{
        arch::ARCHS,
        decoder::{Decoder, DecoderConfig},
        open_model,
    },
};

/// Of the largest logit of a row, for weights that both sides widen to f32.
const F32_BOUND: f32 = 1e-4;

#[derive(serde::Deserialize)]
struct Golden {
    prompts: Vec<GoldenPrompt>,
    logits: String,
    logits_native: Option<String>,
    native_difference_max: Option<f32>,
}

#[derive(serde::Deserialize)]
struct GoldenPrompt {
    ids: Vec<u32>,
    greedy: Vec<u32>,
    logits_first_row: usize,
    greedy_text: Option<String>,
}

/// Folders of tests/data that hold a checkpoint with its golden.
fn checkpoints() -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = fs::read_dir(data(""))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|dir| dir.join("config.json").exists() && dir.join("golden.json").exists())
        .collect();
    found.sort();
    found
}

fn golden(dir: &std::path::Path) -> Golden {
    serde_json::from_slice(&fs::read(dir.join("golden.json")).unwrap()).unwrap()
}

fn floats(path: PathBuf) -> Vec<f32> {
    let bytes = fs::read(path).unwrap();
    bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
}

/// Logits of every position of a prompt, in chunks of `chunk` rows.
fn logits(dir: &std::path::Path, dtype: DType, ids: &[u32], chunk: usize) -> Vec<f32> {
    let model = open_model(dir, false).unwrap();
    let spec = Arc::new(model.spec.clone());
    let blocks: Arc<[u32]> = (0..ids.len().div_ceil(KV_BLOCK) as u32).rev().collect();
    let limits = Limits { rows_max: chunk, seqs_max: 1, outputs_max: chunk, context_max: ids.len() };
    let config = DecoderConfig {
        spec: spec.clone(),
        arch: model.arch,
        weights: Arc::new(model.weights),
        layers: 0..spec.layers.len(),
        dtype,
        limits,
        kv_blocks: blocks.len(),
    };
    let cpu = Cpu::new(Some(2));
    let mut decoder = Decoder::load(&cpu, &config).unwrap();
    let mut all = Vec::new();
    for (i, part) in ids.chunks(chunk).enumerate() {
        let (seq, cached) = (SeqId(0), i * chunk);
        let rows = SeqRows { seq, seat: 0, row: 0, len: part.len(), cached, blocks: blocks.clone() };
        let batch = MicroBatch {
            ids: part.to_vec(),
            positions: (cached..cached + part.len()).map(|p| p as u32).collect(),
            seqs: vec![rows],
            outputs: (0..part.len()).map(|row| OutputRow { row, seq, seat: 0 }).collect(),
            ..MicroBatch::default()
        };
        decoder.forward(&cpu, &batch).unwrap();
        let mut chunk_logits = vec![f32::NAN; part.len() * spec.vocab];
        cpu.read(&mut chunk_logits, decoder.logits()).unwrap();
        all.extend(chunk_logits);
    }
    all
}

/// The largest difference in a row, as a share of the row's largest logit; over all rows.
fn difference(ours: &[f32], theirs: &[f32], vocab: usize) -> f32 {
    assert_eq!(ours.len(), theirs.len());
    let rows = ours.chunks(vocab).zip(theirs.chunks(vocab));
    rows.map(|(a, b)| {
        let scale = b.iter().fold(0f32, |m, x| m.max(x.abs()));
        a.iter().zip(b).fold(0f32, |m, (x, y)| if x.is_nan() { f32::INFINITY } else { m.max((x - y).abs()) })
            / scale
    })
    .fold(0.0, f32::max)
}

#[test]
fn every_architecture_has_a_golden() {
    let named: Vec<&str> =
        checkpoints().iter().map(|dir| open_model(dir, false).unwrap().arch.name()).collect();
    for arch in ARCHS {
        assert!(named.contains(&arch.name()), "no checkpoint of tests/data is a {}", arch.name());
    }
}

#[test]
fn logits_in_f32_agree_with_transformers_at_every_position() {
    for dir in checkpoints() {
        let golden = golden(&dir);
        let vocab = open_model(&dir, false).unwrap().spec.vocab;
        let theirs = floats(dir.join(&golden.logits));
        for (i, prompt) in golden.prompts.iter().enumerate() {
            let expected = &theirs[prompt.logits_first_row * vocab..][..prompt.ids.len() * vocab];
            for chunk in [prompt.ids.len(), 5] {
                let off = difference(&logits(&dir, DType::F32, &prompt.ids, chunk), expected, vocab);
                assert!(off <= F32_BOUND, "{}, prompt {i}, chunks of {chunk}: {off:e}", dir.display());
            }
        }
    }
}

/// Kept in 16 bits, logits are no further from f32 ones than transformers' own 16-bit run is.
#[test]
fn logits_in_bf16_and_f16_stay_within_the_native_rounding_of_transformers() {
    let mut seen = 0;
    for dir in checkpoints() {
        let golden = golden(&dir);
        let (Some(native), Some(theirs_off)) = (&golden.logits_native, golden.native_difference_max) else {
            continue;
        };
        let model = open_model(&dir, false).unwrap();
        let vocab = model.spec.vocab;
        let wide = floats(dir.join(&golden.logits));
        assert_eq!(floats(dir.join(native)).len(), wide.len());
        for (i, prompt) in golden.prompts.iter().enumerate() {
            let expected = &wide[prompt.logits_first_row * vocab..][..prompt.ids.len() * vocab];
            let ours = logits(&dir, model.dtype, &prompt.ids, prompt.ids.len());
            let off = ours.iter().zip(expected).fold(0f32, |m, (a, b)| m.max((a - b).abs()));
            assert!(off <= theirs_off, "{}, prompt {i}: {off} against {theirs_off}", dir.display());
        }
        seen += 1;
    }
    assert!(seen >= 3, "bf16 and f16 checkpoints");
}

#[test]
fn a_prompt_in_chunks_gives_the_same_bits_in_every_type() {
    for dir in checkpoints() {
        let golden = golden(&dir);
        let ids = &golden.prompts.iter().max_by_key(|p| p.ids.len()).unwrap().ids;
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            let whole: Vec<u32> = logits(&dir, dtype, ids, ids.len()).into_iter().map(f32::to_bits).collect();
            for chunk in [1, 7, 16] {
                let cut: Vec<u32> = logits(&dir, dtype, ids, chunk).into_iter().map(f32::to_bits).collect();
                assert!(cut == whole, "{}, {}, chunks of {chunk}", dir.display(), dtype.name());
            }
        }
    }
}

#[test]
fn greedy_tokens_agree_with_transformers_in_every_number_of_stages() {
    for dir in checkpoints() {
        let golden = golden(&dir);
        let layers = open_model(&dir, false).unwrap().spec.layers.len();
        for stages in 1..=layers {
            let engine =
                Engine::builder().model(&dir).dtype(DType::F32).stages(stages).slots(2).build().unwrap();
            let events: Vec<_> =
                golden.prompts.iter().map(|p| engine.submit(request(&p.ids, 16)).unwrap()).collect();
            for (i, (events, prompt)) in events.into_iter().zip(&golden.prompts).enumerate() {
                let (mut ids, mut text) = (Vec::new(), String::new());
                for event in events {
                    match event {
                        Event::Token { id, text: part, .. } => {
                            ids.push(id);
                            text += &part;
                        }
                        Event::Finished { text: rest, .. } => text += &rest,
                        other => panic!("{}: {other:?}", dir.display()),
                    }
                }
                assert_eq!(ids, prompt.greedy, "{}, prompt {i}, {stages} stages", dir.display());
                if let Some(expected) = &prompt.greedy_text {
                    assert_eq!(&text, expected, "{}, prompt {i}", dir.display());
                }
            }
        }
    }
}

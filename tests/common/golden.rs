//! The small checkpoints of tests/data and what transformers makes of them.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use pipeline_infer::{
    Engine, Event,
    backend::{Backend, DType, Limits},
    batch::{Blocks, KV_BLOCK, MicroBatch, OutputRow, SeqId, SeqRows},
    model::{
        decoder::{Decoder, DecoderConfig},
        open_model,
    },
};

use super::{data, request};

/// Of the largest logit of a row, for weights that both sides widen to f32.
pub(crate) const F32_BOUND: f32 = 1e-4;

#[derive(serde::Deserialize)]
pub(crate) struct Golden {
    pub(crate) prompts: Vec<GoldenPrompt>,
    pub(crate) logits: String,
    pub(crate) logits_native: Option<String>,
    pub(crate) native_difference_max: Option<f32>,
}

#[derive(serde::Deserialize)]
pub(crate) struct GoldenPrompt {
    pub(crate) ids: Vec<u32>,
    pub(crate) greedy: Vec<u32>,
    pub(crate) logits_first_row: usize,
    pub(crate) greedy_text: Option<String>,
}

/// Folders of tests/data that hold a checkpoint with its golden.
pub(crate) fn checkpoints() -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = fs::read_dir(data(""))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|dir| dir.join("config.json").exists() && dir.join("golden.json").exists())
        .collect();
    found.sort();
    found
}

pub(crate) fn golden(dir: &Path) -> Golden {
    serde_json::from_slice(&fs::read(dir.join("golden.json")).unwrap()).unwrap()
}

/// A file of logits.
pub(crate) fn floats(path: PathBuf) -> Vec<f32> {
    let bytes = fs::read(path).unwrap();
    bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
}

/// Logits of every position of a prompt, in chunks of `chunk` rows.
pub(crate) fn logits<B: Backend>(
    backend: &B,
    dir: &Path,
    dtype: DType,
    ids: &[u32],
    chunk: usize,
) -> Vec<f32> {
    let model = open_model(dir, false).unwrap();
    let spec = Arc::new(model.spec.clone());
    let blocks: Blocks = (0..ids.len().div_ceil(KV_BLOCK) as u32).rev().collect();
    let limits = Limits { rows_max: chunk, seqs_max: 1, outputs_max: chunk, context_max: ids.len() };
    let config = DecoderConfig {
        split_head: false,
        spec: spec.clone(),
        arch: model.arch,
        weights: Arc::new(model.weights),
        layers: 0..spec.layers.len(),
        dtype,
        limits,
        kv_blocks: blocks.len(),
    };
    let mut decoder = Decoder::load(backend, &config).unwrap();
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
        decoder.prepare(backend, &batch).unwrap();
        decoder.forward(backend).unwrap();
        let mut chunk_logits = vec![f32::NAN; part.len() * spec.vocab];
        backend.read(&mut chunk_logits, decoder.logits()).unwrap();
        all.extend(chunk_logits);
    }
    all
}

/// The largest difference in a row, as a share of the row's largest logit; over all rows.
pub(crate) fn difference(ours: &[f32], theirs: &[f32], vocab: usize) -> f32 {
    assert_eq!(ours.len(), theirs.len());
    let rows = ours.chunks(vocab).zip(theirs.chunks(vocab));
    rows.map(|(a, b)| {
        let scale = b.iter().fold(0f32, |m, x| m.max(x.abs()));
        a.iter().zip(b).fold(0f32, |m, (x, y)| if x.is_nan() { f32::INFINITY } else { m.max((x - y).abs()) })
            / scale
    })
    .fold(0.0, f32::max)
}

/// An engine gives transformers' tokens, and text, to all prompts at once.
pub(crate) fn greedy_tokens_agree(engine: &Engine, golden: &Golden, what: &str) {
    let events: Vec<_> = golden.prompts.iter().map(|p| engine.submit(request(&p.ids, 16)).unwrap()).collect();
    for (i, (events, prompt)) in events.into_iter().zip(&golden.prompts).enumerate() {
        let (mut ids, mut text) = (Vec::new(), String::new());
        for event in events {
            match event {
                Event::Token { id, text: part, .. } => {
                    ids.push(id);
                    text += &part;
                }
                Event::Finished { text: rest, .. } => text += &rest,
                other => panic!("{what}: {other:?}"),
            }
        }
        assert_eq!(ids, prompt.greedy, "{what}, prompt {i}");
        if let Some(expected) = &prompt.greedy_text {
            assert_eq!(&text, expected, "{what}, prompt {i}");
        }
    }
}

//! A tower and decoders together: prompts with images and videos against transformers, whatever the chunks, the stages, the
//! company and the place in the store.

mod common;

use std::{fs, ops::Range};

use common::{
    data,
    golden::{F32_BOUND, difference, floats},
    seen::{FOLDER, Seen, SeenGolden, Stages, encode, respelled, seen, seen_golden},
};
use pipeline_infer::{
    backend::{Backend, DType, Limits, cpu::Cpu},
    batch::{IMAGE_ROW, ON_DEVICE, image_row},
    model::{Model, open_model},
};
use serde_json::Value;

const STORE_ROWS: usize = 160;
/// Of three blocks, and of three layers.
const ALL: Range<usize> = 0..3;
const WHOLE: &[Range<usize>] = &[ALL];

fn cpu() -> Cpu {
    Cpu::new(Some(2))
}

fn model() -> Model {
    open_model(&data(FOLDER), false).unwrap()
}

/// The golden's prompts, each with its own rows of the store, not from the first on.
fn prompts(model: &Model, golden: &SeenGolden) -> Vec<Seen> {
    let mut next = 5;
    let all = golden.seen.iter().map(|prompt| {
        let seen = seen(model, prompt, next);
        next = seen.store.end + 3;
        seen
    });
    all.collect()
}

/// The logits of all rows of a prompt that comes alone.
fn alone(model: &Model, dtype: DType, prompt: &Seen, chunk: usize) -> Vec<f32> {
    let cpu = cpu();
    let store = encode(&cpu, model, dtype, (WHOLE, STORE_ROWS), &[prompt]);
    Stages::new(&cpu, model, dtype, (WHOLE, chunk, 1), &store).prompt(0, prompt, chunk)
}

fn bits(numbers: &[f32]) -> Vec<u32> {
    numbers.iter().map(|n| n.to_bits()).collect()
}

#[test]
fn tokens_and_positions_are_those_of_transformers() {
    let (model, golden) = (model(), seen_golden());
    assert_eq!(golden.seen.len(), 4);
    for (prompt, expected) in prompts(&model, &golden).iter().zip(&golden.seen) {
        assert_eq!(prompt.pads, expected.ids);
        assert_eq!((&prompt.positions.rows, prompt.positions.delta), (&expected.rows, expected.delta));
        assert_ne!(prompt.positions.delta, 0);
    }
}

#[test]
fn logits_and_greedy_tokens_are_those_of_transformers() {
    let (cpu, model, golden) = (cpu(), model(), seen_golden());
    let (vocab, theirs) = (model.spec.vocab, floats(data(FOLDER).join(&golden.seen_logits)));
    for (prompt, expected) in prompts(&model, &golden).iter().zip(&golden.seen) {
        let rows = prompt.ids.len();
        let wanted = &theirs[expected.logits_first_row * vocab..][..rows * vocab];
        let store = encode(&cpu, &model, DType::F32, (WHOLE, STORE_ROWS), &[prompt]);
        for chunk in [rows, 7] {
            let mut stages = Stages::new(&cpu, &model, DType::F32, (WHOLE, chunk, 1), &store);
            let logits = stages.prompt(0, prompt, chunk);
            let off = difference(&logits, wanted, vocab);
            assert!(off <= F32_BOUND, "{}, chunks of {chunk}: {off:e}", expected.text);
            let last = &logits[(rows - 1) * vocab..];
            assert_eq!(stages.greedy(0, prompt, last, expected.greedy.len()), expected.greedy);
        }
    }
}

/// Kept in 16 bits, logits are no further from f32 ones than transformers' own 16-bit run is.
#[test]
fn logits_in_f16_stay_within_the_native_rounding_of_transformers() {
    let (model, golden) = (model(), seen_golden());
    let (vocab, theirs) = (model.spec.vocab, floats(data(FOLDER).join(&golden.seen_logits)));
    for (prompt, expected) in prompts(&model, &golden).iter().zip(&golden.seen) {
        let wanted = &theirs[expected.logits_first_row * vocab..];
        let ours = alone(&model, DType::F16, prompt, prompt.ids.len());
        let off = ours.iter().zip(wanted).fold(0f32, |m, (a, b)| m.max((a - b).abs()));
        assert!(off <= golden.seen_native_difference_max, "{}: {off}", expected.text);
    }
}

#[test]
fn chunks_stages_company_and_parts_of_the_tower_change_no_bit() {
    let (cpu, model, golden) = (cpu(), model(), seen_golden());
    let prompts = prompts(&model, &golden);
    for dtype in [DType::F32, DType::F16] {
        let expected: Vec<Vec<u32>> =
            prompts.iter().map(|p| bits(&alone(&model, dtype, p, p.ids.len()))).collect();
        for chunk in [1, 16, 50] {
            assert!(bits(&alone(&model, dtype, &prompts[1], chunk)) == expected[1], "chunks of {chunk}");
        }
        let all: Vec<&Seen> = prompts.iter().collect();
        for (tower, layers) in [
            (&[0..1, 1..3][..], &[0..1, 1..3][..]),
            (&[0..2, 2..3], &[0..2, 2..3]),
            (&[0..1, 1..2, 2..3], &[0..1, 1..2, 2..3]),
        ] {
            let store = encode(&cpu, &model, dtype, (tower, STORE_ROWS), &all);
            let rows = prompts.iter().map(|p| p.ids.len()).sum();
            let mut stages = Stages::new(&cpu, &model, dtype, (layers, rows, all.len()), &store);
            let parts: Vec<_> =
                prompts.iter().enumerate().map(|(i, p)| (i, &*p.ids, &*p.positions.rows)).collect();
            assert!(bits(&stages.pass(&parts)) == expected.concat(), "{layers:?}");
        }
    }
}

#[test]
fn newer_spellings_of_tensors_and_config_are_read() {
    let (old, golden) = (model(), seen_golden());
    let mut config: Value =
        serde_json::from_slice(&fs::read(data(FOLDER).join("config.json")).unwrap()).unwrap();
    let top = config.as_object_mut().unwrap();
    let outside = ["architectures", "model_type", "vision_config", "tie_word_embeddings"];
    let nested: serde_json::Map<String, Value> = top
        .iter()
        .filter(|(key, _)| {
            !outside.contains(&key.as_str()) && !key.ends_with("_token_id") || *key == "eos_token_id"
        })
        .map(|(key, value)| (key.clone(), value.clone()))
        .collect();
    for key in nested.keys() {
        top.remove(key);
    }
    top.insert("text_config".into(), nested.into());
    let spell = |header: String| {
        let header = header.replace("\"visual.", "\"model.visual.");
        header
            .replace("\"model.layers.", "\"model.language_model.layers.")
            .replace("\"model.embed", "\"model.language_model.embed")
            .replace("\"model.norm", "\"model.language_model.norm")
    };
    let folder = respelled(&data(FOLDER), spell, Some(&config.to_string()));
    fs::remove_file(folder.path().join("generation_config.json")).unwrap();
    let new = open_model(folder.path(), false).unwrap();
    assert_eq!((&new.spec, new.dtype), (&old.spec, old.dtype));
    assert_eq!(new.generation.eos, [2]);
    let prompt = seen(&old, &golden.seen[0], 0);
    assert!(alone(&new, DType::F32, &prompt, 30) == alone(&old, DType::F32, &prompt, 30));
}

#[test]
fn rows_that_the_store_has_not_are_refused() {
    let (cpu, model, golden) = (cpu(), model(), seen_golden());
    let prompt = seen(&model, &golden.seen[0], 0);
    let rows = prompt.store.end - 1;
    let table = model.tensor(pipeline_infer::model::spec::Role::Embed).unwrap();
    let dim = model.spec.dim;
    let matrix = cpu.matrix(&[table], &[]).unwrap();
    let limits = Limits { rows_max: 100, seqs_max: 1, outputs_max: 1, context_max: 100 };
    let rotation = |sections| pipeline_infer::backend::Rotation { inv_freq: &[1.0; 6], scale: 1.0, sections };
    let mut batch = cpu.batch(limits, rotation(model.spec.sections)).unwrap();
    let mut micro = common::seen::only(&prompt);
    cpu.set_batch(&mut batch, &micro).unwrap();
    let (mut out, store) = (cpu.buf(100 * dim).unwrap(), cpu.buf(rows * dim).unwrap());
    for (images, held) in [(Some(&store), rows), (None, 0)] {
        let error = cpu.embed(&mut out, &matrix, images, &batch).unwrap_err().to_string();
        assert!(error.contains(&format!("is not among the {held} of images")), "{error}");
    }
    // Three-row positions are for models that have them.
    let mut plain = cpu.batch(limits, rotation(None)).unwrap();
    assert!(cpu.set_batch(&mut plain, &micro).unwrap_err().to_string().contains("turns"));
    micro.turns.pop();
    assert!(cpu.set_batch(&mut batch, &micro).unwrap_err().to_string().contains("turns for"));
}

#[test]
fn an_id_is_a_token_or_a_row_of_the_store() {
    assert_eq!(image_row(IMAGE_ROW | 7), Some(7));
    assert_eq!([image_row(7), image_row(ON_DEVICE)], [None; 2]);
}

//! Prompts with images and videos, through a tower and decoders on a GPU: as tests/vision_language.rs has it.

use std::ops::Range;

use pipeline_infer::{
    backend::DType,
    model::{Model, open_model},
};

use crate::{
    common::{
        data,
        golden::{F32_BOUND, difference, floats},
        seen::{FOLDER, Seen, SeenGolden, Stages, encode, seen, seen_golden},
    },
    device::{Cuda, gpu},
};

const STORE_ROWS: usize = 160;
/// Of three blocks, and of three layers.
const ALL: Range<usize> = 0..3;
const WHOLE: &[Range<usize>] = &[ALL];
/// In 16 bits logits are at most this many times as far from f32 ones as transformers' own 16-bit run is: see `goldens`.
const NATIVE_TIMES: f32 = 2.0;

fn prompts(golden: &SeenGolden, model: &Model) -> Vec<Seen> {
    let mut next = 5;
    let all = golden.seen.iter().map(|prompt| {
        let seen = seen(model, prompt, next);
        next = seen.store.end + 3;
        seen
    });
    all.collect()
}

fn model() -> Model {
    open_model(&data(FOLDER), false).unwrap()
}

fn device(dtype: DType, model: &Model) -> Option<Cuda> {
    gpu(dtype, model.spec.heads.head_dim)
}

#[test]
fn logits_and_greedy_tokens_with_images_are_those_of_transformers() {
    let (model, golden) = (model(), seen_golden());
    let (vocab, theirs) = (model.spec.vocab, floats(data(FOLDER).join(&golden.seen_logits)));
    for (dtype, chunks) in [(DType::F32, [100, 7, 1]), (DType::F16, [100, 17, 1])] {
        let Some(gpu) = device(dtype, &model) else { return };
        for (prompt, expected) in prompts(&golden, &model).iter().zip(&golden.seen) {
            let rows = prompt.ids.len();
            let wanted = &theirs[expected.logits_first_row * vocab..][..rows * vocab];
            let store = encode(&gpu, &model, dtype, (WHOLE, STORE_ROWS), &[prompt]);
            for chunk in chunks {
                let mut stages = Stages::new(&gpu, &model, dtype, (WHOLE, chunk, 1), &store);
                let logits = stages.prompt(0, prompt, chunk);
                let what = format!("{}, {}, chunks of {chunk}", expected.text, dtype.name());
                let far = logits
                    .iter()
                    .zip(wanted)
                    .fold(0f32, |m, (a, b)| if a.is_nan() { f32::INFINITY } else { m.max((a - b).abs()) });
                println!("{what}: off by {far:e}");
                match dtype {
                    DType::F32 => {
                        let off = difference(&logits, wanted, vocab);
                        assert!(off <= F32_BOUND, "{what}: {off:e}");
                    }
                    _ => assert!(far <= NATIVE_TIMES * golden.seen_native_difference_max, "{what}: {far}"),
                }
                // Single steps, which are recorded and repeated.
                let last = &logits[(rows - 1) * vocab..];
                assert_eq!(stages.greedy(0, prompt, last, expected.greedy.len()), expected.greedy, "{what}");
            }
        }
    }
}

#[test]
fn stages_and_parts_of_the_tower_have_the_bits_of_the_whole() {
    let (model, golden) = (model(), seen_golden());
    let prompts = prompts(&golden, &model);
    let all: Vec<&Seen> = prompts.iter().collect();
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        let Some(gpu) = device(dtype, &model) else { return };
        let rows = prompts.iter().map(|p| p.ids.len()).sum();
        let run = |tower: &[Range<usize>], layers: &[Range<usize>]| -> Vec<u32> {
            let store = encode(&gpu, &model, dtype, (tower, STORE_ROWS), &all);
            let mut stages = Stages::new(&gpu, &model, dtype, (layers, rows, all.len()), &store);
            let parts: Vec<_> =
                prompts.iter().enumerate().map(|(i, p)| (i, &*p.ids, &*p.positions.rows)).collect();
            stages.pass(&parts).into_iter().map(f32::to_bits).collect()
        };
        let whole = run(WHOLE, WHOLE);
        for parts in [&[0..1, 1..3][..], &[0..2, 2..3], &[0..1, 1..2, 2..3]] {
            assert!(run(parts, parts) == whole, "{parts:?} in {}", dtype.name());
        }
    }
}

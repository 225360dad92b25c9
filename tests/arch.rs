//! Every architecture against transformers: logits of every prompt position and greedy tokens, from the small
//! checkpoints in tests/data (see the README there).

mod common;

use common::golden::{F32_BOUND, checkpoints, difference, floats, golden, greedy_tokens_agree, logits};
use pipeline_infer::{
    Engine,
    backend::{DType, cpu::Cpu},
    model::{arch::ARCHS, open_model},
};

fn cpu() -> Cpu {
    Cpu::new(Some(2))
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
                let off = difference(&logits(&cpu(), &dir, DType::F32, &prompt.ids, chunk), expected, vocab);
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
            let ours = logits(&cpu(), &dir, model.dtype, &prompt.ids, prompt.ids.len());
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
            let whole: Vec<u32> =
                logits(&cpu(), &dir, dtype, ids, ids.len()).into_iter().map(f32::to_bits).collect();
            for chunk in [1, 7, 16] {
                let cut: Vec<u32> =
                    logits(&cpu(), &dir, dtype, ids, chunk).into_iter().map(f32::to_bits).collect();
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
            greedy_tokens_agree(&engine, &golden, &format!("{}, {stages} stages", dir.display()));
        }
    }
}

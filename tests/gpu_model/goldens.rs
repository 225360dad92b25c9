//! Every architecture against transformers, as tests/arch.rs has it for the processor.

use pipeline_infer::{backend::DType, model::open_model};

use crate::{
    common::golden::{F32_BOUND, checkpoints, difference, floats, golden, greedy_tokens_agree, logits},
    device::{gpu, gpus, layout},
    on_gpus,
};

/// The GPU multiplies f32 exactly, as the processor does: the same bound.
#[test]
fn logits_in_f32_agree_with_transformers_at_every_position() {
    for dir in checkpoints() {
        let (golden, spec) = (golden(&dir), open_model(&dir, false).unwrap().spec);
        let Some(gpu) = gpu(DType::F32, spec.heads.head_dim) else { return };
        let theirs = floats(dir.join(&golden.logits));
        for (i, prompt) in golden.prompts.iter().enumerate() {
            let rows = prompt.ids.len();
            let expected = &theirs[prompt.logits_first_row * spec.vocab..][..rows * spec.vocab];
            for chunk in [rows, 17, 5, 1] {
                let ours = logits(&gpu, &dir, DType::F32, &prompt.ids, chunk);
                let off = difference(&ours, expected, spec.vocab);
                assert!(off <= F32_BOUND, "{}, prompt {i}, chunks of {chunk}: {off:e}", dir.display());
            }
        }
    }
}

/// In 16 bits logits are at most this many times as far from f32 ones as transformers' own 16-bit run is. Both round
/// what lies between products about as often, but at other places: two samples of the same error, of which the
/// largest of a few thousand is taken.
const NATIVE_TIMES: f32 = 2.0;

#[test]
fn logits_in_bf16_and_f16_stay_within_the_native_rounding_of_transformers() {
    for dir in checkpoints() {
        let (golden, model) = (golden(&dir), open_model(&dir, false).unwrap());
        let Some(native) = golden.native_difference_max else { continue };
        let bound = NATIVE_TIMES * native;
        let Some(gpu) = gpu(model.dtype, model.spec.heads.head_dim) else { return };
        let (vocab, wide) = (model.spec.vocab, floats(dir.join(&golden.logits)));
        for (i, prompt) in golden.prompts.iter().enumerate() {
            let expected = &wide[prompt.logits_first_row * vocab..][..prompt.ids.len() * vocab];
            for chunk in [prompt.ids.len(), 7, 1] {
                let ours = logits(&gpu, &dir, model.dtype, &prompt.ids, chunk);
                let worse = |m: f32, (a, b): (&f32, &f32)| {
                    if a.is_nan() { f32::INFINITY } else { m.max((a - b).abs()) }
                };
                let off = ours.iter().zip(expected).fold(0f32, worse);
                let what = format!("{}, prompt {i}, chunks of {chunk}", dir.display());
                assert!(off <= bound, "{what}: {off} against {bound}");
            }
        }
    }
}

#[test]
fn greedy_tokens_agree_with_transformers_in_every_number_of_stages() {
    if gpus() == 0 {
        return;
    }
    for dir in checkpoints() {
        let golden = golden(&dir);
        let layers = open_model(&dir, false).unwrap().spec.layers.len();
        for stages in 1..=layers {
            let engine = on_gpus(&dir, stages, DType::F32, |b| b.slots(stages));
            greedy_tokens_agree(&engine, &golden, &format!("{}, {stages} stages", dir.display()));
            if stages == 1 || gpus() == 1 {
                continue;
            }
            let split = layout(stages, layers).with_split_head(true);
            let engine = on_gpus(&dir, stages, DType::F32, |b| b.slots(stages).layout(split.clone()));
            assert!(engine.layout().splits_head());
            greedy_tokens_agree(&engine, &golden, &format!("{}, {split}", dir.display()));
        }
    }
}

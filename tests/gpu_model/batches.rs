//! Random micro-batches against the processor's decoder, and sequences in company against alone.

use pipeline_infer::{
    backend::{DType, cpu::Cpu},
    batch::MicroBatch,
    model::open_model,
};

use crate::{
    Shape,
    common::golden::{checkpoints, difference},
    device::{gpu, gpus, quick},
    traffic::{Chain, Traffic},
};

/// Of the largest logit of a row. In f32, two orders of summation through a few layers. In 16 bits the GPU rounds what is
/// between the ops, which the processor keeps in f32. The rounding of weights and pages, of as many numbers, is worth
/// 1.1e-3 (f16) and 1.1e-2 (bf16) in the worst of some million logits of these models: three times that.
fn bound(dtype: DType) -> f32 {
    match dtype {
        DType::F32 => 1e-4,
        DType::F16 => 3.5e-3,
        DType::BF16 => 3.5e-2,
    }
}

fn check(dtype: DType, shape: Shape, batches: usize) {
    let Some(gpu) = gpu(dtype, shape.head_dim) else { return };
    let (dir, cpu) = (shape.write(dtype), Cpu::new(Some(4)));
    let mut ours = Chain::load(dir.path(), true, dtype, &[&gpu]);
    let mut theirs = Chain::load(dir.path(), true, dtype, &[&cpu]);
    let mut traffic = Traffic::new(shape.head_dim as u64, Shape::VOCAB);
    let mut worst = 0f32;
    for i in 0..if quick() { batches / 20 } else { batches } {
        let batch = traffic.next();
        let off = difference(&ours.logits(&batch), &theirs.logits(&batch), Shape::VOCAB);
        let parts: Vec<_> = batch.seqs.iter().map(|s| (s.seq.0, s.cached, s.len)).collect();
        let what = format!("{} batch {i} of (sequence, cached, rows) {parts:?}", dtype.name());
        assert!(off <= bound(dtype), "{what}: {off:e}");
        worst = worst.max(off);
    }
    println!("{} over {batches} batches: {worst:e} of a row's largest logit at most", dtype.name());
}

#[test]
fn a_thousand_random_batches_in_f32() {
    check(DType::F32, Shape::SMALL, 1000);
}

#[test]
fn a_thousand_random_batches_in_f16() {
    check(DType::F16, Shape::SMALL, 1000);
}

#[test]
fn a_thousand_random_batches_in_bf16_with_heads_of_128() {
    check(DType::BF16, Shape { heads: 7, kv_heads: 1, head_dim: 128, ..Shape::SMALL }, 1000);
}

/// The checkpoints' odd sizes, biases, windows and norms of heads.
#[test]
fn random_batches_through_every_architecture() {
    for dir in checkpoints() {
        let model = open_model(&dir, false).unwrap();
        for dtype in [DType::F32, model.dtype] {
            let Some(gpu) = gpu(dtype, model.spec.heads.head_dim) else { return };
            let cpu = Cpu::new(Some(2));
            let mut ours = Chain::load(&dir, false, dtype, &[&gpu]);
            let mut theirs = Chain::load(&dir, false, dtype, &[&cpu]);
            let mut exact = Chain::load(&dir, false, DType::F32, &[&cpu]);
            let mut traffic = Traffic::new(1, model.spec.vocab);
            let (mut off, mut rounding) = (0f32, 0f32);
            for i in 0..60 {
                let batch = traffic.next();
                let (ours, theirs) = (ours.logits(&batch), theirs.logits(&batch));
                if dtype == DType::F32 {
                    let off = difference(&ours, &theirs, model.spec.vocab);
                    assert!(off <= bound(dtype), "{}, f32 batch {i}: {off:e}", dir.display());
                } else {
                    off = off.max(farthest(&ours, &theirs));
                    rounding = rounding.max(farthest(&exact.logits(&batch), &theirs));
                }
            }
            // These models are wilder than trained ones: the bound is what the processor's own rounding is worth.
            let what = format!("{}, {}", dir.display(), dtype.name());
            assert!(off <= 2.0 * rounding, "{what}: {off:e}, and rounding alone {rounding:e}");
        }
    }
}

/// The largest distance of two numbers; endless where one is no number.
fn farthest(ours: &[f32], theirs: &[f32]) -> f32 {
    let off =
        |(a, b): (&f32, &f32)| if a.is_finite() && b.is_finite() { (a - b).abs() } else { f32::INFINITY };
    ours.iter().zip(theirs).map(off).fold(0.0, f32::max)
}

/// Eight sequences together, each of them alone, and both in other chunks.
#[test]
fn company_changes_logits_within_the_bound() {
    if gpus() == 0 {
        return;
    }
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        let Some(gpu) = gpu(dtype, 64) else { return };
        let dir = Shape::SMALL.write(dtype);
        let mut together = Chain::load(dir.path(), true, dtype, &[&gpu]);
        let mut alone = Chain::load(dir.path(), true, dtype, &[&gpu]);
        let mut traffic = Traffic::new(9, Shape::VOCAB);
        for i in 0..if quick() { 4 } else { 100 } {
            let batch = traffic.next();
            let all = together.logits(&batch);
            let mut from = 0;
            for part in 0..batch.seqs.len() {
                let own = only(&batch, part);
                let logits = alone.logits(&own);
                let off = difference(&all[from..from + logits.len()], &logits, Shape::VOCAB);
                assert!(off <= bound(dtype), "{} batch {i}, sequence {part}: {off:e}", dtype.name());
                from += logits.len();
            }
        }
    }
}

/// One sequence's part of a micro-batch.
fn only(batch: &MicroBatch, part: usize) -> MicroBatch {
    let mut seq = batch.seqs[part].clone();
    let rows = seq.row..seq.row + seq.len;
    let mut outputs: Vec<_> = batch.outputs.iter().filter(|o| rows.contains(&o.row)).copied().collect();
    outputs.iter_mut().for_each(|o| o.row -= rows.start);
    seq.row = 0;
    MicroBatch {
        ids: batch.ids[rows.clone()].to_vec(),
        positions: batch.positions[rows].to_vec(),
        seqs: vec![seq],
        outputs,
        ..MicroBatch::default()
    }
}

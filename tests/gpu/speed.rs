//! How fast ops are by themselves: measurements, which `tools/gpu_check.py` runs and judges.

use pipeline_infer::backend::{
    AttentionShape, Backend, DType, HeadShape, KvShape, Limits, Rotation,
    cuda::{self, Cuda},
};

use crate::{Parts, Room, Sequences, ask, device::gpu, poisoned};

const SEQUENCES: usize = 64;
const CONTEXT: usize = 4096;
/// Layers in turn: what a cache has of one is gone when it comes again.
const LAYERS: usize = 4;
/// Times that all layers are in a recorded pass, so that what is around the kernels counts little.
const TURNS: usize = 4;
const PASSES: u32 = 10;

/// Microseconds of attention of `rows` more tokens of each sequence, after `cached`.
fn attention_us(gpu: &Cuda, heads: HeadShape, sequences: usize, cached: usize, rows: usize) -> f64 {
    let (all, context) = (sequences * rows, cached + rows);
    let limits = Limits { rows_max: all, seqs_max: sequences, outputs_max: all, context_max: context };
    let mut of = Sequences::new(sequences, context);
    let HeadShape { kv_heads, head_dim, .. } = heads;
    let shape = KvShape { blocks: of.blocks(), kv_heads, head_dim, dtype: DType::BF16 };
    let layers: Vec<_> = (0..LAYERS).map(|_| gpu.kv(shape).unwrap()).collect();
    of.cached.fill(cached);
    let parts: Vec<(usize, usize)> = (0..sequences).map(|seq| (seq, rows)).collect();
    let mut micro = of.step(&parts as &Parts);
    if rows == 1 {
        ask(&mut micro, 0..sequences);
    }
    let mut batch = gpu.batch(limits, Rotation::plain(&vec![1.0; head_dim / 2], 1.0)).unwrap();
    gpu.set_batch(&mut batch, &micro).unwrap();
    let room = gpu.rows_room(all);
    let mut qkv = gpu.working_buf(room * heads.qkv_dim()).unwrap();
    gpu.write(&mut qkv, &crate::numbers(1, all * heads.qkv_dim())).unwrap();
    let mut out = poisoned(gpu, Room::Working, room * heads.q_dim());
    let shape = AttentionShape { heads, scale: 0.1, window: None };
    let mut pass = || {
        gpu.pass(&batch, &mut || {
            let turns = (0..TURNS).flat_map(|_| &layers);
            turns.into_iter().try_for_each(|kv| gpu.attention(&mut out, &qkv, kv, &batch, shape))
        })
        .unwrap();
    };
    // The second one is recorded.
    (0..3).for_each(|_| pass());
    let start = gpu.mark().unwrap();
    (0..PASSES).for_each(|_| pass());
    let end = gpu.mark().unwrap();
    gpu.synchronize().unwrap();
    let time = gpu.between(&start, &end).unwrap().expect("both have come");
    time.as_secs_f64() * 1e6 / (f64::from(PASSES) * (LAYERS * TURNS) as f64)
}

#[test]
#[ignore = "a measurement"]
fn decode_attention_reads_pages_nearly_as_fast_as_a_copy() {
    let Some(gpu) = gpu(DType::BF16, 128) else { return };
    let copy = cuda::probe(true).unwrap().gpus[0].copy_gb_per_s.expect("measured");
    for (heads, kv_heads) in [(28, 4), (64, 8)] {
        let heads_of = HeadShape { heads, kv_heads, head_dim: 128 };
        let us = attention_us(&gpu, heads_of, SEQUENCES, CONTEXT - 1, 1);
        let bytes = 2 * SEQUENCES * CONTEXT * kv_heads * 128 * DType::BF16.size();
        let rate = bytes as f64 / us / 1e3;
        println!(
            "decode attention {heads}/{kv_heads}: {us:.1} us, {rate:.0} GB/s, {:.3} of a copy's {copy:.0} GB/s",
            rate / copy
        );
    }
}

#[test]
#[ignore = "a measurement"]
fn prompt_attention_keeps_tensor_cores_busy() {
    for (head_dim, heads, kv_heads) in [(128, 28, 4), (128, 64, 8), (64, 32, 8), (80, 16, 16)] {
        let Some(gpu) = gpu(DType::BF16, head_dim) else { return };
        for (sequences, cached, rows) in
            [(1, 0, 2048), (1, 2048, 2048), (1, 6144, 2048), (4, 0, 512), (8, 0, 256)]
        {
            let us = attention_us(&gpu, HeadShape { heads, kv_heads, head_dim }, sequences, cached, rows);
            let pairs = sequences as f64 * rows as f64 * (cached as f64 + (rows + 1) as f64 / 2.0);
            let rate = 4.0 * pairs * (heads * head_dim) as f64 / us / 1e6;
            println!(
                "prompt attention {heads}/{kv_heads} of {head_dim}, {sequences} x {rows} after {cached}: {us:.1} us, {rate:.0} TFLOP/s"
            );
        }
    }
}

//! How fast ops are by themselves: measurements, which `tools/gpu_check.py` runs and judges.

use std::time::{Duration, Instant};

use pipeline_infer::backend::{
    AttentionShape, Backend, DType, HeadShape, KvShape, Limits, Norm, NormShape, Random, Rotation, Tensor,
    cuda::{self, Cuda, PipelineFacts, Products},
};

use crate::{
    Parts, Room, Sequences, ask,
    device::{gpu, gpus},
    poisoned,
};

const SEQUENCES: usize = 64;
const CONTEXT: usize = 4096;
/// Layers in turn: what a cache has of one is gone when it comes again.
const LAYERS: usize = 4;
/// Times that all layers are in a recorded pass, so that what is around the kernels counts little.
const TURNS: usize = 4;
const PASSES: u32 = 10;
/// After so long a GPU has the clock that its power allows.
const WARM: Duration = Duration::from_millis(400);

/// Microseconds of a pass through all layers in all turns, for each: after a pause, or once the GPU has been at work for a time.
fn us_a_layer(gpu: &Cuda, at_work: bool, mut pass: impl FnMut()) -> f64 {
    // The second one is recorded.
    (0..3).for_each(|_| pass());
    gpu.synchronize().unwrap();
    let began = Instant::now();
    while at_work && began.elapsed() < WARM {
        (0..PASSES).for_each(|_| pass());
        gpu.synchronize().unwrap();
    }
    let start = gpu.mark().unwrap();
    (0..PASSES).for_each(|_| pass());
    let end = gpu.mark().unwrap();
    gpu.synchronize().unwrap();
    let time = gpu.between(&start, &end).unwrap().expect("both have come");
    time.as_secs_f64() * 1e6 / (f64::from(PASSES) * (LAYERS * TURNS) as f64)
}

/// Keys and values that are numbers of some hundredths: zeros take less power.
fn pages(gpu: &Cuda, shape: KvShape) -> <Cuda as Backend>::Kv {
    const RUN: usize = 1024;
    let mut kv = gpu.kv(shape).unwrap();
    let run = KvShape { blocks: RUN.min(shape.blocks), ..shape };
    let noise = |i: usize| (i as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 56;
    let bytes: Vec<u8> = (0..run.bytes())
        .map(|i| if i % 2 == 0 { noise(i) as u8 } else { 0x3C | (noise(i) as u8 & 0x81) })
        .collect();
    let block = run.bytes() / run.blocks;
    for first in (0..shape.blocks).step_by(RUN) {
        let blocks = first..shape.blocks.min(first + RUN);
        gpu.write_pages(&mut kv, blocks.clone(), &bytes[..blocks.len() * block]).unwrap();
    }
    kv
}

/// Microseconds of attention of `rows` more tokens of each sequence, after `cached`.
fn attention_us(gpu: &Cuda, heads: HeadShape, sequences: usize, cached: usize, rows: usize) -> f64 {
    let (all, context) = (sequences * rows, cached + rows);
    let limits = Limits { rows_max: all, seqs_max: sequences, outputs_max: all, context_max: context };
    let mut of = Sequences::new(sequences, context);
    let HeadShape { kv_heads, head_dim, .. } = heads;
    let shape = KvShape { blocks: of.blocks(), kv_heads, head_dim, dtype: DType::BF16 };
    let layers: Vec<_> = (0..LAYERS).map(|_| pages(gpu, shape)).collect();
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
    let pass = || {
        gpu.pass(&batch, &mut || {
            let turns = (0..TURNS).flat_map(|_| &layers);
            turns.into_iter().try_for_each(|kv| gpu.attention(&mut out, &qkv, kv, &batch, shape))
        })
        .unwrap();
    };
    us_a_layer(gpu, false, pass)
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

/// The shape of a decoder's layers.
struct Shape {
    name: &'static str,
    dim: usize,
    heads: HeadShape,
    ffn: usize,
}

const SHAPES: [Shape; 2] = [
    Shape { name: "7b", dim: 3584, heads: HeadShape { heads: 28, kv_heads: 4, head_dim: 128 }, ffn: 18944 },
    Shape { name: "72b", dim: 8192, heads: HeadShape { heads: 64, kv_heads: 8, head_dim: 128 }, ffn: 29568 },
];
const OPS: [&str; 6] = ["queries, keys, values", "rotation", "attention", "out", "gate and up", "down"];

/// So many sequences, each with so many tokens and `rows` more in a pass.
#[derive(Clone, Copy)]
struct Load {
    sequences: usize,
    cached: usize,
    rows: usize,
    at_work: bool,
}

/// Microseconds of a layer in a pass, by whether it has each of `OPS`. Passes of one more token each are recorded.
fn layer_us(gpu: &Cuda, shape: &Shape, load: Load, with: [bool; 6]) -> f64 {
    let Shape { dim, heads, ffn, .. } = *shape;
    let Load { sequences, cached, rows: each, .. } = load;
    let (rows, context_max) = (sequences * each, cached + each);
    let limits = Limits { rows_max: rows, seqs_max: sequences, outputs_max: sequences, context_max };
    let mut of = Sequences::new(sequences, context_max);
    of.cached.fill(cached);
    let parts: Vec<(usize, usize)> = (0..sequences).map(|seq| (seq, each)).collect();
    let mut micro = of.step(&parts as &Parts);
    if each == 1 {
        ask(&mut micro, 0..sequences);
    }
    let mut batch = gpu.batch(limits, Rotation::plain(&vec![1.0; heads.head_dim / 2], 1.0)).unwrap();
    gpu.set_batch(&mut batch, &micro).unwrap();
    let HeadShape { kv_heads, head_dim, .. } = heads;
    let kv = KvShape { blocks: of.blocks(), kv_heads, head_dim, dtype: DType::BF16 };
    let random = |key, n, k| {
        let numbers = Random { key, centre: 0.0 };
        gpu.matrix(&[Tensor::random("w", vec![n, k], DType::BF16, numbers).unwrap()], &[]).unwrap()
    };
    let mut layers: Vec<_> = (0..LAYERS as u64)
        .map(|i| {
            let products = [
                random(4 * i, heads.qkv_dim(), dim),
                random(4 * i + 1, dim, heads.q_dim()),
                random(4 * i + 2, 2 * ffn, dim),
                random(4 * i + 3, dim, ffn),
            ];
            (products, pages(gpu, kv))
        })
        .collect();
    gpu.loaded().unwrap();
    let room = gpu.rows_room(rows);
    let working = |len: usize| gpu.working_buf(room * len).unwrap();
    let (mut qkv, mut attn, mut normed) = (working(heads.qkv_dim()), working(heads.q_dim()), working(dim));
    let (mut gate_up, mut act) = (working(2 * ffn), working(ffn));
    let mut hidden = gpu.buf(room * dim).unwrap();
    gpu.write(&mut hidden, &crate::numbers(1, rows * dim)).unwrap();
    let weights = gpu.vector(&crate::tensor(&[dim], DType::F32, &vec![1.0; dim])).unwrap();
    gpu.loaded().unwrap();
    let norm = || Norm { w: &weights, shape: NormShape { rows: room, dim, eps: 1e-6 } };
    let attention = AttentionShape { heads, scale: 0.1, window: None };
    let mut pass = |with: [bool; 6]| {
        gpu.pass(&batch, &mut || {
            for _ in 0..TURNS {
                for ([qkv_w, out_w, gate_up_w, down_w], kv) in &mut layers {
                    if with[0] {
                        gpu.norm_linear(&mut qkv, &mut normed, &hidden, norm(), qkv_w)?;
                    }
                    if with[1] {
                        gpu.rope_kv(&mut qkv, kv, &batch, heads, None)?;
                    }
                    if with[2] {
                        gpu.attention(&mut attn, &qkv, kv, &batch, attention)?;
                    }
                    if with[3] {
                        gpu.linear_add(&mut hidden, &attn, out_w, room)?;
                    }
                    if with[4] {
                        let scratch = (&mut normed, &mut gate_up);
                        gpu.norm_gate_up(&mut act, scratch, &hidden, norm(), gate_up_w)?;
                    }
                    if with[5] {
                        gpu.linear_add(&mut hidden, &act, down_w, room)?;
                    }
                }
            }
            Ok(())
        })
        .unwrap();
    };
    // What an op reads that another one would have made is to be numbers too: zeros take less power.
    pass([true; 6]);
    us_a_layer(gpu, load.at_work, || pass(with))
}

/// With seats for as many sequences as are measured.
fn roomy_gpu() -> Option<Cuda> {
    let facts = PipelineFacts { dtype: DType::BF16, head_dim: 128, seats: 256, in_flight: 4 };
    (gpus() > 0).then(|| Cuda::new(0, facts).unwrap())
}

/// What a layer takes, and how much less without each of its ops.
#[test]
#[ignore = "a measurement"]
fn where_the_time_of_decoding_goes() {
    let Some(gpu) = roomy_gpu() else { return };
    for shape in &SHAPES {
        for rows in [1, 4, 8, 16, 64, 128, 256] {
            let all = [Products::Measured, Products::Own, Products::Library];
            for (products, at_work) in all.into_iter().flat_map(|by| [(by, false), (by, true)]) {
                gpu.set_products(products);
                let load = Load { sequences: rows, cached: 640, rows: 1, at_work };
                let whole = layer_us(&gpu, shape, load, [true; 6]);
                let parts = OPS.iter().enumerate().map(|(i, op)| {
                    let us = whole - layer_us(&gpu, shape, load, std::array::from_fn(|at| at != i));
                    format!("{op} {us:.1}")
                });
                let parts: Vec<String> = parts.collect();
                let name = shape.name;
                let when = if at_work { "at work" } else { "after a pause" };
                println!(
                    "a layer of {name}, {rows} rows, {products:?}, {when}: {whole:.1} us: {}",
                    parts.join(", ")
                );
                // Of more, or fewer, there is one way.
                if at_work && !(9..=128).contains(&rows) {
                    break;
                }
            }
        }
    }
}

/// What a layer takes of prompts, again and again, and what each of its ops does alone: each for some tenths of a second, in which
/// the GPU comes to its power's limit, if it does.
#[test]
#[ignore = "a measurement"]
fn where_the_time_of_prompts_goes() {
    let Some(gpu) = roomy_gpu() else { return };
    let [small, large] = &SHAPES;
    for (shape, sequences, cached, rows) in [
        (large, 3, 0, 512),
        (large, 1, 1536, 1536),
        (small, 16, 0, 512),
        (small, 2, 0, 4096),
        (small, 1, 512, 3072),
    ] {
        let Shape { name, dim, heads, ffn } = *shape;
        let load = Load { sequences, cached, rows, at_work: true };
        let whole = layer_us(&gpu, shape, load, [true; 6]);
        let all = (sequences * rows) as f64;
        let pairs = all * (cached as f64 + (rows + 1) as f64 / 2.0);
        let product = |numbers: usize| 2.0 * all * numbers as f64;
        let operations = [
            product(heads.qkv_dim() * dim),
            0.0,
            4.0 * pairs * heads.q_dim() as f64,
            product(heads.q_dim() * dim),
            product(2 * ffn * dim),
            product(ffn * dim),
        ];
        let rate = |operations: f64, us: f64| operations / us / 1e6;
        let mut sum = 0.0;
        let parts = OPS.iter().enumerate().map(|(i, op)| {
            let us = layer_us(&gpu, shape, load, std::array::from_fn(|at| at == i));
            sum += us;
            format!("{op} {us:.1} ({:.0})", rate(operations[i], us))
        });
        let parts: Vec<String> = parts.collect();
        let (parts, rate) = (parts.join(", "), rate(operations.iter().sum(), whole));
        println!(
            "a layer of {name}, {sequences} x {rows} rows after {cached}: {whole:.1} us ({rate:.0} TFLOP/s); alone: {parts}; {sum:.1} in all"
        );
    }
}

//! How fast ops are by themselves: measurements, which `tools/gpu_check.py` runs and judges.

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

/// Microseconds of a pass through all layers in all turns, for each.
fn us_a_layer(gpu: &Cuda, mut pass: impl FnMut()) -> f64 {
    // The second one is recorded.
    (0..3).for_each(|_| pass());
    let start = gpu.mark().unwrap();
    (0..PASSES).for_each(|_| pass());
    let end = gpu.mark().unwrap();
    gpu.synchronize().unwrap();
    let time = gpu.between(&start, &end).unwrap().expect("both have come");
    time.as_secs_f64() * 1e6 / (f64::from(PASSES) * (LAYERS * TURNS) as f64)
}

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
    let pass = || {
        gpu.pass(&batch, &mut || {
            let turns = (0..TURNS).flat_map(|_| &layers);
            turns.into_iter().try_for_each(|kv| gpu.attention(&mut out, &qkv, kv, &batch, shape))
        })
        .unwrap();
    };
    us_a_layer(gpu, pass)
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

/// Microseconds of a layer in a recorded pass of one more token each of so many sequences, by whether it has each of `OPS`.
fn layer_us(gpu: &Cuda, shape: &Shape, sequences: usize, cached: usize, with: [bool; 6]) -> f64 {
    let Shape { dim, heads, ffn, .. } = *shape;
    let limits =
        Limits { rows_max: sequences, seqs_max: sequences, outputs_max: sequences, context_max: cached + 1 };
    let mut of = Sequences::new(sequences, cached + 1);
    of.cached.fill(cached);
    let parts: Vec<(usize, usize)> = (0..sequences).map(|seq| (seq, 1)).collect();
    let mut micro = of.step(&parts as &Parts);
    ask(&mut micro, 0..sequences);
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
            (products, gpu.kv(kv).unwrap())
        })
        .collect();
    gpu.loaded().unwrap();
    let room = gpu.rows_room(sequences);
    let working = |len: usize| gpu.working_buf(room * len).unwrap();
    let (mut qkv, mut attn, mut normed) = (working(heads.qkv_dim()), working(heads.q_dim()), working(dim));
    let (mut gate_up, mut act) = (working(2 * ffn), working(ffn));
    let mut hidden = gpu.buf(room * dim).unwrap();
    gpu.write(&mut hidden, &crate::numbers(1, sequences * dim)).unwrap();
    let weights = gpu.vector(&crate::tensor(&[dim], DType::F32, &vec![1.0; dim])).unwrap();
    gpu.loaded().unwrap();
    let norm = || Norm { w: &weights, shape: NormShape { rows: room, dim, eps: 1e-6 } };
    let attention = AttentionShape { heads, scale: 0.1, window: None };
    let pass = || {
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
    us_a_layer(gpu, pass)
}

/// What a layer takes, and how much less without each of its ops.
#[test]
#[ignore = "a measurement"]
fn where_the_time_of_decoding_goes() {
    if gpus() == 0 {
        return;
    }
    let gpu =
        Cuda::new(0, PipelineFacts { dtype: DType::BF16, head_dim: 128, seats: 256, in_flight: 4 }).unwrap();
    for shape in &SHAPES {
        for rows in [1, 4, 8, 16, 64, 128, 256] {
            for products in [Products::Measured, Products::Own, Products::Library] {
                gpu.set_products(products);
                let whole = layer_us(&gpu, shape, rows, 640, [true; 6]);
                let parts = OPS.iter().enumerate().map(|(i, op)| {
                    let us = whole - layer_us(&gpu, shape, rows, 640, std::array::from_fn(|at| at != i));
                    format!("{op} {us:.1}")
                });
                let parts: Vec<String> = parts.collect();
                let name = shape.name;
                println!("a layer of {name}, {rows} rows, {products:?}: {whole:.1} us: {}", parts.join(", "));
                // Of more, or fewer, there is one way.
                if !(9..=128).contains(&rows) {
                    break;
                }
            }
        }
    }
}

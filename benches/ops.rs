//! The CPU's ops at the shapes of SmolLM2-135M: `cargo bench --bench ops -- --quick`.
//!
//! The weights of a linear layer are as many as a model has, one copy after another, so that they come from
//! memory as they do in a step. `PIPELINE_INFER_BENCH_THREADS` sets the number of threads.

use std::{hint::black_box, time::Duration};

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use pipeline_infer::{
    backend::{
        AttentionShape, Backend, DType, HeadShape, KvShape, Limits, NormShape, Rotation, Tensor, cpu::Cpu,
    },
    batch::{KV_BLOCK, MicroBatch, SeqId, SeqRows},
};

const DIM: usize = 576;
const FFN: usize = 1536;
const HEADS: HeadShape = HeadShape { heads: 9, kv_heads: 3, head_dim: 64 };
/// More than the last cache holds.
const COLD_BYTES: usize = 96 << 20;

criterion_group! {
    name = ops;
    config = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_millis(800));
    targets = linear, attention, small
}
criterion_main!(ops);

fn cpu() -> Cpu {
    let threads = std::env::var("PIPELINE_INFER_BENCH_THREADS").ok();
    Cpu::new(threads.map(|n| n.parse().expect("PIPELINE_INFER_BENCH_THREADS is a number")))
}

fn numbers(len: usize) -> Vec<f32> {
    (0..len).map(|i| (i * 7919 % 1009) as f32 / 1009.0 - 0.5).collect()
}

fn buf(cpu: &Cpu, len: usize) -> <Cpu as Backend>::Buf {
    let mut buf = cpu.buf(len).unwrap();
    cpu.write(&mut buf, &numbers(len)).unwrap();
    buf
}

fn linear(c: &mut Criterion) {
    let cpu = cpu();
    let qkv = HEADS.qkv_dim();
    let shapes = [("qkv", qkv, DIM), ("out", DIM, DIM), ("gate_up", 2 * FFN, DIM), ("down", DIM, FFN)];
    let shapes = [&shapes[..], &[("head", 49152, DIM)]].concat();
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        let mut group = c.benchmark_group(format!("linear_{}", dtype.name()));
        for &(name, n, k) in &shapes {
            let bytes = n * k * dtype.size();
            let copies: Vec<_> = (0..COLD_BYTES.div_ceil(bytes))
                .map(|_| {
                    let tensor = Tensor::from_f32(name, vec![n, k], dtype, &numbers(n * k)).unwrap();
                    cpu.matrix(&[tensor], &[]).unwrap()
                })
                .collect();
            for rows in [1, 16, 181] {
                if name == "head" && rows > 1 {
                    continue;
                }
                let (x, mut out) = (buf(&cpu, rows * k), buf(&cpu, rows * n));
                // One row is bound by memory, many by multiplications.
                group.throughput(match rows {
                    1 => Throughput::Bytes(bytes as u64),
                    _ => Throughput::Elements((rows * n * k) as u64),
                });
                let mut copy = copies.iter().cycle();
                group.bench_function(BenchmarkId::new(name, rows), |b| {
                    b.iter(|| cpu.linear(&mut out, &x, copy.next().unwrap(), rows).unwrap());
                });
                black_box(&out);
            }
        }
    }
}

/// One sequence of `len` rows after `cached` ones.
fn micro_batch(cached: usize, len: usize) -> MicroBatch {
    let blocks = (0..(cached + len).div_ceil(KV_BLOCK) as u32).collect::<Vec<_>>().into();
    MicroBatch {
        ids: vec![0; len],
        positions: (cached..cached + len).map(|p| p as u32).collect(),
        seqs: vec![SeqRows { seq: SeqId(0), seat: 0, row: 0, len, cached, blocks }],
        ..MicroBatch::default()
    }
}

fn attention(c: &mut Criterion) {
    let cpu = cpu();
    let limits = Limits { rows_max: 512, seqs_max: 1, outputs_max: 1, context_max: 4096 };
    let mut batch = cpu.batch(limits, Rotation::plain(&[0.1; 32], 1.0)).unwrap();
    let shape = AttentionShape { heads: HEADS, scale: 0.125, window: None };
    let mut group = c.benchmark_group("attention");
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        let HeadShape { kv_heads, head_dim, .. } = HEADS;
        let mut kv = cpu.kv(KvShape { blocks: 256, kv_heads, head_dim, dtype }).unwrap();
        for (name, cached, rows) in
            [("decode", 200, 1), ("decode", 2000, 1), ("prefill", 0, 181), ("prefill", 1536, 512)]
        {
            cpu.set_batch(&mut batch, &micro_batch(cached, rows)).unwrap();
            let mut qkv = buf(&cpu, rows * HEADS.qkv_dim());
            cpu.rope_kv(&mut qkv, &mut kv, &batch, HEADS, None).unwrap();
            let mut out = buf(&cpu, rows * HEADS.q_dim());
            // Numbers of keys and values that queries meet.
            let met: usize = (cached + 1..=cached + rows).map(|seen| seen * 2 * HEADS.q_dim()).sum();
            group.throughput(Throughput::Elements(met as u64));
            group.bench_function(BenchmarkId::new(format!("{name}_{}", dtype.name()), cached + rows), |b| {
                b.iter(|| cpu.attention(&mut out, &qkv, &kv, &batch, shape).unwrap());
            });
        }
    }
}

fn small(c: &mut Criterion) {
    let cpu = cpu();
    let mut group = c.benchmark_group("small");
    for rows in [1, 181] {
        let shape = NormShape { rows, dim: DIM, eps: 1e-5 };
        let (x, w) = (buf(&cpu, rows * DIM), buf(&cpu, DIM));
        let (mut out, gate_up) = (buf(&cpu, rows * FFN), buf(&cpu, rows * 2 * FFN));
        group.throughput(Throughput::Elements((rows * DIM) as u64));
        group.bench_function(BenchmarkId::new("rms_norm", rows), |b| {
            b.iter(|| cpu.rms_norm(&mut out, &x, &w, shape));
        });
        group.throughput(Throughput::Elements((rows * FFN) as u64));
        group.bench_function(BenchmarkId::new("silu_mul", rows), |b| {
            b.iter(|| cpu.silu_mul(&mut out, &gate_up, rows, FFN));
        });
        let limits = Limits { rows_max: rows, seqs_max: 1, outputs_max: 1, context_max: 4096 };
        let mut batch = cpu.batch(limits, Rotation::plain(&[0.1; 32], 1.0)).unwrap();
        let micro = micro_batch(0, rows);
        group.throughput(Throughput::Elements(rows as u64));
        group.bench_function(BenchmarkId::new("set_batch", rows), |b| {
            b.iter(|| cpu.set_batch(&mut batch, &micro).unwrap());
        });
        let HeadShape { kv_heads, head_dim, .. } = HEADS;
        let mut kv = cpu.kv(KvShape { blocks: 16, kv_heads, head_dim, dtype: DType::F16 }).unwrap();
        let mut qkv = buf(&cpu, rows * HEADS.qkv_dim());
        group.throughput(Throughput::Elements((rows * HEADS.qkv_dim()) as u64));
        group.bench_function(BenchmarkId::new("rope_kv", rows), |b| {
            b.iter(|| cpu.rope_kv(&mut qkv, &mut kv, &batch, HEADS, None).unwrap());
        });
    }
}

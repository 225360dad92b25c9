//! The CPU's ops: against the plain loops of `reference`, and bit by bit against themselves.

#[path = "ops/attention.rs"]
mod attention;
mod common;
#[path = "ops/linear.rs"]
mod linear;
#[path = "ops/refused.rs"]
mod refused;
#[path = "ops/rows.rs"]
mod rows;
#[path = "ops/turns.rs"]
mod turns;

use std::ops::Range;

use common::numbers;
use pipeline_infer::{
    backend::{
        Backend, DType, HeadShape, Limits, Tensor,
        cpu::{Cpu, Simd},
    },
    batch::{MicroBatch, SeqId, SeqRows},
};

const DTYPES: [DType; 3] = [DType::F32, DType::F16, DType::BF16];
const LIMITS: Limits = Limits { rows_max: 512, seqs_max: 16, outputs_max: 512, context_max: 256 };
const HEADS: HeadShape = HeadShape { heads: 4, kv_heads: 2, head_dim: 10 };
const BLOCKS: usize = 64;

type Buf = <Cpu as Backend>::Buf;

/// A device for each instruction set that this machine has.
fn devices(threads: usize) -> Vec<Cpu> {
    let all = Simd::ALL.into_iter().filter(|s| s.available());
    all.map(|simd| Cpu::with_simd(Some(threads), simd).unwrap()).collect()
}

fn tensor(shape: &[usize], dtype: DType, values: &[f32]) -> Tensor {
    Tensor::from_f32("t", shape.to_vec(), dtype, values).unwrap()
}

/// A buffer with these numbers.
fn buf(cpu: &Cpu, values: &[f32]) -> Buf {
    let mut buf = cpu.buf(values.len()).unwrap();
    cpu.write(&mut buf, values).unwrap();
    buf
}

/// A buffer of NaNs: what an op leaves out shows.
fn poisoned(cpu: &Cpu, len: usize) -> Buf {
    buf(cpu, &vec![f32::NAN; len])
}

fn read(cpu: &Cpu, from: &Buf, len: usize) -> Vec<f32> {
    let mut out = vec![0.0; len];
    cpu.read(&mut out, from).unwrap();
    out
}

/// Fails with the op, the index, both values and the tolerance, part of which is relative to `size`.
fn assert_near(what: &str, got: &[f32], want: &[f32], size: f32) {
    assert_eq!(got.len(), want.len(), "{what}");
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        let tolerance = size * 1e-6 + w.abs() * 4e-6;
        assert!((g - w).abs() <= tolerance, "{what}: [{i}] is {g:e}, not {w:e} within {tolerance:e}");
    }
}

fn assert_bits(what: &str, got: &[f32], want: &[f32]) {
    assert_eq!(got.len(), want.len(), "{what}");
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        assert_eq!(g.to_bits(), w.to_bits(), "{what}: [{i}] is {g:e}, not {w:e}");
    }
}

/// Four sequences whose KV blocks lie scattered, and how far each has come.
struct Sequences {
    heads: HeadShape,
    cached: [usize; 4],
}

impl Sequences {
    fn new(heads: HeadShape) -> Self {
        Sequences { heads, cached: [0; 4] }
    }

    /// The next `len` tokens of each of some sequences.
    fn step(&mut self, parts: &[(usize, usize)]) -> MicroBatch {
        let mut batch = MicroBatch::default();
        for &(seq, len) in parts {
            let cached = self.cached[seq];
            let row = batch.rows();
            batch.seqs.push(SeqRows {
                seq: SeqId(seq as u64),
                seat: seq as u32,
                row,
                len,
                cached,
                blocks: blocks(seq).into(),
            });
            batch.ids.extend((0..len).map(|_| 0));
            batch.positions.extend((cached..cached + len).map(|p| p as u32));
            self.cached[seq] += len;
        }
        batch
    }

    /// A sequence's rows before rotation.
    fn qkv(&self, seq: usize, range: Range<usize>) -> Vec<f32> {
        let dim = self.heads.qkv_dim();
        numbers(100 + seq as u64, range.end * dim)[range.start * dim..].to_vec()
    }
}

/// Sequence s has blocks s, s + 4, s + 8, …, in descending order.
fn blocks(seq: usize) -> Vec<u32> {
    (0..BLOCKS / 4).rev().map(|i| (4 * i + seq) as u32).collect()
}

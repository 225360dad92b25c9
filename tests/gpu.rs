//! The ops on a GPU against the CPU's, over odd shapes. What an op is to write is full of NaNs before; what pads its
//! input to the rows that a device goes over is NaN as well, so a row that took from it shows.
//!
//! Inputs are numbers that the GPU's type has, so that what differs is the op's doing.

#[path = "gpu/attention.rs"]
mod attention;
mod common;
#[path = "gpu/device.rs"]
mod device;
#[path = "gpu/linear.rs"]
mod linear;
#[path = "gpu/load.rs"]
mod load;
#[path = "gpu/pages.rs"]
mod pages;
#[path = "gpu/parts.rs"]
mod parts;
#[path = "gpu/pixels.rs"]
mod pixels;
#[path = "gpu/rows.rs"]
mod rows;
#[path = "gpu/sample.rs"]
mod sample;
#[path = "gpu/segments.rs"]
mod segments;
#[path = "gpu/speed.rs"]
mod speed;
#[path = "gpu/tokens.rs"]
mod tokens;
#[path = "gpu/tower.rs"]
mod tower;
#[path = "gpu/tower_time.rs"]
mod tower_time;
#[path = "gpu/transport.rs"]
mod transport;
#[path = "gpu/turns.rs"]
mod turns;

use common::numbers;
use pipeline_infer::{
    backend::{Backend, DType, Tensor, cpu::Cpu, cpu::reference},
    batch::{KV_BLOCK, MicroBatch, OutputRow, SeqId, SeqRows},
};

const DTYPES: [DType; 3] = [DType::F32, DType::F16, DType::BF16];

/// The processor that the GPU is compared with. Tests run side by side, so each takes a part of it.
fn cpu() -> Cpu {
    Cpu::new(Some(2))
}

/// Half the distance of neighbouring numbers at 1: what rounding to the type changes at most, as a share.
fn unit(dtype: DType) -> f32 {
    match dtype {
        DType::F32 => 2f32.powi(-24),
        DType::F16 => 2f32.powi(-11),
        DType::BF16 => 2f32.powi(-8),
    }
}

fn rounded(dtype: DType, values: Vec<f32>) -> Vec<f32> {
    values.into_iter().map(|v| reference::rounded(dtype, v)).collect()
}

fn tensor(shape: &[usize], dtype: DType, values: &[f32]) -> Tensor {
    Tensor::from_f32("t", shape.to_vec(), dtype, values).unwrap()
}

/// Whether a buffer is f32 on every device, or of the type that matrix products read.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Room {
    Wide,
    Working,
}

/// A buffer that begins with these numbers and goes on with NaNs.
fn filled<B: Backend>(b: &B, room: Room, len: usize, values: &[f32]) -> B::Buf {
    let mut buf = match room {
        Room::Wide => b.buf(len),
        Room::Working => b.working_buf(len),
    }
    .unwrap();
    fill(b, &mut buf, len, values);
    buf
}

fn fill<B: Backend>(b: &B, buf: &mut B::Buf, len: usize, values: &[f32]) {
    let mut all = vec![f32::NAN; len];
    all[..values.len()].copy_from_slice(values);
    b.write(buf, &all).unwrap();
}

fn poisoned<B: Backend>(b: &B, room: Room, len: usize) -> B::Buf {
    filled(b, room, len, &[])
}

fn read<B: Backend>(b: &B, from: &B::Buf, len: usize) -> Vec<f32> {
    let mut out = vec![0.0; len];
    b.read(&mut out, from).unwrap();
    out
}

/// Fails with the op, the place of the worst number, both numbers and the tolerance there.
fn assert_near(what: &str, row: usize, got: &[f32], want: &[f32], tolerance: impl Fn(usize) -> f32) {
    assert_eq!(got.len(), want.len(), "{what}");
    let off = |i: usize| match (got[i], want[i]) {
        (g, w) if g.is_nan() && w.is_nan() => 0.0,
        (g, w) if g.is_nan() || w.is_nan() => f32::INFINITY,
        (g, w) => (g - w).abs() / tolerance(i),
    };
    let bad = (0..got.len()).filter(|&i| off(i) > 1.0).count();
    let Some(worst) = (0..got.len()).max_by(|&a, &b| off(a).total_cmp(&off(b))).filter(|_| bad > 0) else {
        return;
    };
    let (at, g, w, t) = ([worst / row, worst % row], got[worst], want[worst], tolerance(worst));
    panic!("{what}: {bad} of {} are off; {at:?} is {g:e}, not {w:e} within {t:e}", got.len());
}

fn assert_bits(what: &str, row: usize, got: &[f32], want: &[f32]) {
    assert_eq!(got.len(), want.len(), "{what}");
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        let at = [i / row, i % row];
        assert!(g.to_bits() == w.to_bits() || g.is_nan() && w.is_nan(), "{what}: {at:?} is {g:e}, not {w:e}");
    }
}

/// Sequences whose KV blocks lie scattered, and how far each has come.
struct Sequences {
    cached: Vec<usize>,
    blocks_each: usize,
}

/// Which sequences' next tokens a micro-batch holds, and how many.
type Parts = [(usize, usize)];

impl Sequences {
    fn new(count: usize, tokens_each: usize) -> Self {
        Sequences { cached: vec![0; count], blocks_each: tokens_each.div_ceil(KV_BLOCK) }
    }

    fn blocks(&self) -> usize {
        self.cached.len() * self.blocks_each
    }

    /// The next tokens of some sequences. Nothing is asked of them.
    fn step(&mut self, parts: &Parts) -> MicroBatch {
        let count = self.cached.len();
        let mut batch = MicroBatch::default();
        for &(seq, len) in parts {
            let (cached, row) = (self.cached[seq], batch.rows());
            // Sequence s has blocks s, s + count, s + 2 count, …, in descending order.
            let blocks = (0..self.blocks_each).rev().map(|i| (count * i + seq) as u32).collect();
            batch.seqs.push(SeqRows { seq: SeqId(seq as u64), seat: seq as u32, row, len, cached, blocks });
            batch.ids.extend((0..len).map(|_| 0));
            batch.positions.extend((cached..cached + len).map(|p| p as u32));
            self.cached[seq] += len;
        }
        batch
    }
}

/// Asks for the next token after these rows.
fn ask(batch: &mut MicroBatch, rows: impl IntoIterator<Item = usize>) {
    let of = |row: usize| {
        let part =
            batch.seqs.iter().find(|s| (s.row..s.row + s.len).contains(&row)).expect("a row of nobody");
        OutputRow { row, seq: part.seq, seat: part.seat }
    };
    batch.outputs = rows.into_iter().map(of).collect();
}

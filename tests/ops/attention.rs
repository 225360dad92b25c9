//! Rotation, KV pages and attention.

use pipeline_infer::backend::{
    AttentionShape, Backend, DType, HeadShape, KvShape, QkNorm, Rotation,
    cpu::{Cpu, Simd, reference},
};

use crate::{
    BLOCKS, DTYPES, HEADS, LIMITS, Sequences, assert_bits, assert_near, buf, devices, numbers, poisoned, read,
};

/// Which sequences' next tokens a micro-batch holds, and how many.
type Step = &'static [(usize, usize)];

/// A chunk, single steps of several sequences, chunks after cached tokens.
const MIXED: &[Step] =
    &[&[(0, 37)], &[(0, 1), (1, 17), (2, 1)], &[(1, 15), (0, 1)], &[(1, 1), (0, 31)], &[(3, 16)]];
/// The same tokens, cut in other ways.
const WHOLE: &[Step] = &[&[(0, 70)], &[(1, 33)], &[(2, 1), (3, 16)]];
const TOGETHER: &[Step] = &[&[(3, 16), (1, 33), (0, 70), (2, 1)]];
const LONG_FIRST: &[Step] = &[&[(0, 64), (1, 3)], &[(0, 6), (1, 30)], &[(2, 1), (3, 16)]];
/// The tokens of each sequence.
const LENS: [usize; 4] = [70, 33, 1, 16];
const SINGLE: [Step; 4] = [&[(0, 1)], &[(1, 1)], &[(2, 1)], &[(3, 1)]];

/// What attention is run with.
#[derive(Clone, Copy, Debug)]
struct Case {
    heads: HeadShape,
    dtype: DType,
    window: Option<usize>,
    norm: bool,
}

/// Of each sequence: rows of rotated qkv, and of attention.
type Results = [[Vec<f32>; 2]; 4];

impl Case {
    fn shape(&self) -> AttentionShape {
        AttentionShape { heads: self.heads, scale: 0.9, window: self.window }
    }

    fn kv(&self) -> KvShape {
        let HeadShape { kv_heads, head_dim, .. } = self.heads;
        KvShape { blocks: BLOCKS, kv_heads, head_dim, dtype: self.dtype }
    }

    fn inv_freq(&self) -> Vec<f32> {
        (0..self.heads.head_dim / 2).map(|i| 10f32.powf(-(i as f32) / 4.0)).collect()
    }

    fn run(&self, cpu: &Cpu, steps: &[Step]) -> Results {
        let mut sequences = Sequences::new(self.heads);
        let mut kv = cpu.kv(self.kv()).unwrap();
        let mut batch = cpu.batch(LIMITS, Rotation::plain(&self.inv_freq(), 1.1)).unwrap();
        let norms = [7, 8].map(|seed| buf(cpu, &numbers(seed, self.heads.head_dim)));
        let dims = [self.heads.qkv_dim(), self.heads.q_dim()];
        let mut results = Results::default();
        for parts in steps {
            let micro = sequences.step(parts);
            cpu.set_batch(&mut batch, &micro).unwrap();
            let rows = micro.seqs.iter().map(|s| sequences.qkv(s.seq.0 as usize, s.cached..s.cached + s.len));
            let mut qkv = buf(cpu, &rows.flatten().collect::<Vec<_>>());
            let norm = self.norm.then_some(QkNorm { q: &norms[0], k: &norms[1], eps: 1e-6 });
            cpu.rope_kv(&mut qkv, &mut kv, &batch, self.heads, norm).unwrap();
            let mut out = poisoned(cpu, micro.rows() * self.heads.q_dim());
            cpu.attention(&mut out, &qkv, &kv, &batch, self.shape()).unwrap();
            for (i, (from, dim)) in [&qkv, &out].into_iter().zip(dims).enumerate() {
                let from = read(cpu, from, micro.rows() * dim);
                for s in &micro.seqs {
                    results[s.seq.0 as usize][i].extend(&from[s.row * dim..(s.row + s.len) * dim]);
                }
            }
        }
        results
    }

    /// The same from the reference, which keeps all of a sequence at hand.
    fn reference(&self, seq: usize, len: usize) -> [Vec<f32>; 2] {
        let head_dim = self.heads.head_dim;
        let (q, k, inv_freq) = (numbers(7, head_dim), numbers(8, head_dim), self.inv_freq());
        let heads = reference::Heads {
            shape: self.heads,
            inv_freq: &inv_freq,
            rotation_scale: 1.1,
            norm: self.norm.then_some((&q, &k, 1e-6)),
        };
        let dim = self.heads.qkv_dim();
        let mut qkv = Sequences::new(self.heads).qkv(seq, 0..len);
        for (position, row) in qkv.chunks_exact_mut(dim).enumerate() {
            heads.rope(row, position);
        }
        let attend = |p: usize| {
            let query = &qkv[p * dim..][..self.heads.q_dim()];
            reference::attention(query, &qkv, p, self.shape(), self.dtype)
        };
        let out = (0..len).flat_map(attend).collect();
        [qkv, out]
    }
}

fn cases() -> Vec<Case> {
    let shapes = [(1, 1, 4), (4, 2, 6), (4, 4, 10), (9, 3, 64), (10, 1, 80), (4, 2, 128)];
    let mut cases = Vec::new();
    for (i, (heads, kv_heads, head_dim)) in shapes.into_iter().enumerate() {
        for (j, dtype) in DTYPES.into_iter().enumerate() {
            let window = [None, Some(1), Some(5), Some(16), Some(40)][(i + 2 * j) % 5];
            let heads = HeadShape { heads, kv_heads, head_dim };
            cases.push(Case { heads, dtype, window, norm: (i + j) % 2 == 0 });
        }
    }
    cases
}

#[test]
fn is_near_the_reference() {
    for case in cases() {
        let want = [0, 1, 2, 3].map(|seq| case.reference(seq, LENS[seq]));
        for cpu in devices(2) {
            let got = case.run(&cpu, MIXED);
            for (seq, (got, want)) in got.iter().zip(&want).enumerate() {
                let what = format!("{case:?} sequence {seq} {}", cpu.simd().name());
                assert_near(&format!("rope {what}"), &got[0], &want[0], 2.0);
                // A key that rounds to another side than in f64 is off by one unit of its type.
                let size = match case.dtype {
                    DType::F32 => 4.0,
                    DType::F16 => 400.0,
                    DType::BF16 => 4000.0,
                };
                assert_near(&format!("attention {what}"), &got[1], &want[1], size);
            }
        }
    }
}

#[test]
fn has_the_same_bits_in_any_chunks_batches_threads_and_instructions() {
    for case in cases() {
        let alone = Cpu::with_simd(Some(1), Simd::Portable).unwrap();
        let single = |seq: usize| std::iter::repeat_n(SINGLE[seq], LENS[seq]);
        let want = case.run(&alone, &(0..4).flat_map(single).collect::<Vec<_>>());
        for cpu in devices(1).into_iter().chain(devices(3)) {
            for steps in [MIXED, WHOLE, TOGETHER, LONG_FIRST] {
                let got = case.run(&cpu, steps);
                for (seq, (got, want)) in got.iter().zip(&want).enumerate() {
                    let what = format!("{case:?} {steps:?} sequence {seq} {}", cpu.simd().name());
                    assert_bits(&format!("rope {what}"), &got[0], &want[0]);
                    assert_bits(&format!("attention {what}"), &got[1], &want[1]);
                }
            }
        }
    }
}

#[test]
fn does_not_see_what_others_left_in_a_block() {
    for dtype in DTYPES {
        let case = Case { heads: HEADS, dtype, window: Some(20), norm: false };
        for cpu in devices(2) {
            let run = |dirt: f32| {
                let mut kv = cpu.kv(case.kv()).unwrap();
                let mut batch = cpu.batch(LIMITS, Rotation::plain(&case.inv_freq(), 1.0)).unwrap();
                let mut attend = |len: usize, fill: Option<f32>| {
                    let mut sequences = Sequences::new(HEADS);
                    cpu.set_batch(&mut batch, &sequences.step(&[(0, len)])).unwrap();
                    let rows = sequences.qkv(0, 0..len);
                    let mut qkv = buf(&cpu, &rows.iter().map(|&v| fill.unwrap_or(v)).collect::<Vec<_>>());
                    cpu.rope_kv(&mut qkv, &mut kv, &batch, HEADS, None).unwrap();
                    let mut out = poisoned(&cpu, len * HEADS.q_dim());
                    cpu.attention(&mut out, &qkv, &kv, &batch, case.shape()).unwrap();
                    read(&cpu, &out, len * HEADS.q_dim())
                };
                attend(48, Some(dirt));
                attend(37, None)
            };
            assert_bits("attention after NaN", &run(f32::NAN), &run(0.0));
            assert_bits("attention after infinity", &run(f32::INFINITY), &run(0.0));
        }
    }
}

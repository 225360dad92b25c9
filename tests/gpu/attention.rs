//! Rotation, KV pages and attention.
//!
//! First the rotated rows are compared. Then the CPU's attention gets the GPU's rotated rows, so that both attend to
//! the same numbers; the GPU's own come from its pages, so what is wrong there shows.

use pipeline_infer::{
    backend::{AttentionShape, Backend, DType, HeadShape, KvShape, Limits, QkNorm, Rotation, cpu::Cpu},
    batch::MicroBatch,
};

use crate::{
    DTYPES, Parts, Room, Sequences, ask, assert_bits, assert_near, cpu,
    device::{Cuda, gpu, quick},
    fill, numbers, poisoned, read, rounded, tensor, unit,
};

const SEQUENCES: usize = 9;
const CONTEXT: usize = 1280;
/// Of sequences whose tokens are shared out among blocks.
const LONG: usize = 4608;
const LIMITS: Limits = Limits { rows_max: 640, seqs_max: 16, outputs_max: 640, context_max: LONG };
const ROTATION_SCALE: f32 = 1.1;

/// Prompts, chunks after cached tokens, single steps, and mixtures. The last steps of all sequences are recorded and
/// repeated passes.
const STEPS: &[&Parts] = &[
    &[(0, 300)],
    &[(0, 1), (1, 17), (2, 1), (3, 129)],
    &[(1, 63), (0, 1), (4, 2)],
    &[(1, 1), (0, 65), (5, 9)],
    &[(3, 16)],
    &[(8, 600)],
    &[(8, 600), (2, 3)],
    &[(5, 8), (6, 5), (7, 3), (2, 64)],
    &[(7, 1)],
    &[(7, 1)],
    &[(7, 1)],
    &[(7, 1), (8, 1)],
    &[(0, 1), (1, 1), (2, 1), (3, 1), (4, 1)],
    &[(5, 1), (1, 1), (8, 1), (6, 1), (2, 1), (7, 1)],
    &[(0, 1), (1, 1), (8, 1), (3, 1), (4, 1), (5, 1), (6, 1), (7, 1)],
    &[(0, 1), (1, 1), (2, 1), (3, 1), (4, 1), (5, 1), (6, 1), (7, 1), (8, 1)],
    &[(0, 2), (3, 65), (8, 1)],
    &[(0, 1), (1, 1), (2, 1), (3, 1), (4, 1)],
];
const QUICK_STEPS: &[&Parts] = &[
    &[(0, 70)],
    &[(0, 1), (1, 17), (2, 1)],
    &[(1, 15), (8, 33)],
    &[(0, 1), (1, 1), (8, 1)],
    &[(0, 1), (1, 1), (8, 1)],
    &[(0, 1), (1, 1), (2, 1), (8, 1)],
];

/// What attention is run with.
#[derive(Clone, Copy, Debug)]
struct Case {
    heads: HeadShape,
    dtype: DType,
    window: Option<usize>,
    norm: bool,
}

impl Case {
    /// Scores of numbers between -1 and 1 have a standard deviation of 2: some tokens count much more than others.
    fn shape(&self) -> AttentionShape {
        let scale = 6.0 / (self.heads.head_dim as f32).sqrt();
        AttentionShape { heads: self.heads, scale, window: self.window }
    }

    fn kv(&self, blocks: usize) -> KvShape {
        let HeadShape { kv_heads, head_dim, .. } = self.heads;
        KvShape { blocks, kv_heads, head_dim, dtype: self.dtype }
    }

    fn inv_freq(&self) -> Vec<f32> {
        let half = self.heads.head_dim / 2;
        (0..half).map(|i| 10_000f32.powf(-(i as f32) / half as f32)).collect()
    }

    /// The micro-batch's rows before rotation: a token's numbers depend on its sequence and position alone.
    fn qkv(&self, micro: &MicroBatch) -> Vec<f32> {
        let dim = self.heads.qkv_dim();
        let row = |s: &pipeline_infer::batch::SeqRows, i: usize| {
            numbers(s.seq.0 * 10_007 + (s.cached + i) as u64, dim)
        };
        let all = micro.seqs.iter().flat_map(|s| (0..s.len).flat_map(move |i| row(s, i))).collect();
        rounded(self.dtype, all)
    }
}

/// A layer's pages and buffers on a device. The same ones for all steps: a recorded pass keeps their addresses.
struct Layer<'a, B: Backend> {
    backend: &'a B,
    case: Case,
    batch: B::Batch,
    kv: B::Kv,
    norms: [B::Buf; 2],
    qkv: B::Buf,
    out: B::Buf,
    room: usize,
}

impl<'a, B: Backend> Layer<'a, B> {
    fn new(backend: &'a B, case: Case, inv_freq: &[f32], scale: f32, blocks: usize) -> Self {
        let room = backend.rows_room(LIMITS.rows_max);
        let head = |seed: u64| {
            let around_1: Vec<f32> =
                numbers(seed, case.heads.head_dim).iter().map(|v| 1.0 + 0.5 * v).collect();
            backend.vector(&tensor(&[case.heads.head_dim], DType::F32, &around_1)).unwrap()
        };
        let layer = Layer {
            batch: backend.batch(LIMITS, Rotation::plain(inv_freq, scale)).unwrap(),
            kv: backend.kv(case.kv(blocks)).unwrap(),
            norms: [head(7), head(8)],
            qkv: poisoned(backend, Room::Working, room * case.heads.qkv_dim()),
            out: poisoned(backend, Room::Working, room * case.heads.q_dim()),
            backend,
            case,
            room,
        };
        backend.loaded().unwrap();
        layer
    }

    /// Rotated rows, and what attention makes of them.
    fn step(&mut self, micro: &MicroBatch, rows: &[f32]) -> [Vec<f32>; 2] {
        let Layer { backend: b, case, batch, kv, norms: [q, k], qkv, out, room } = self;
        let (qkv_dim, q_dim) = (case.heads.qkv_dim(), case.heads.q_dim());
        fill(*b, qkv, *room * qkv_dim, rows);
        fill(*b, out, *room * q_dim, &[]);
        b.set_batch(batch, micro).unwrap();
        let batch = &*batch;
        b.pass(batch, &mut || {
            let norm = case.norm.then_some(QkNorm { q, k, eps: 1e-6 });
            b.rope_kv(qkv, kv, batch, case.heads, norm)?;
            b.attention(out, qkv, kv, batch, case.shape())
        })
        .unwrap();
        [read(*b, qkv, micro.rows() * qkv_dim), read(*b, out, micro.rows() * q_dim)]
    }
}

/// The GPU and the two halves of the reference.
struct Trial<'a> {
    case: Case,
    gpu: Layer<'a, Cuda>,
    rotating: Layer<'a, Cpu>,
    attending: Layer<'a, Cpu>,
}

impl<'a> Trial<'a> {
    fn new(case: Case, gpu: &'a Cuda, cpu: &'a Cpu, blocks: usize) -> Self {
        let inv_freq = case.inv_freq();
        let at_rest = vec![0.0; inv_freq.len()];
        Trial {
            case,
            gpu: Layer::new(gpu, case, &inv_freq, ROTATION_SCALE, blocks),
            rotating: Layer::new(cpu, case, &inv_freq, ROTATION_SCALE, blocks),
            attending: Layer::new(cpu, Case { norm: false, ..case }, &at_rest, 1.0, blocks),
        }
    }

    fn step(&mut self, what: &str, micro: &MicroBatch) {
        let case = self.case;
        let rows = case.qkv(micro);
        let [rotated, out] = self.gpu.step(micro, &rows);
        let [want, _] = self.rotating.step(micro, &rows);
        // One rounding to the type; before it, last bits of sines and of the norm, of numbers of at most 4.
        let tolerance = |i: usize| 1.01 * unit(case.dtype) * want[i].abs() + 64.0 * 2f32.powi(-24);
        assert_near(&format!("rope_kv {case:?} {what}"), case.heads.qkv_dim(), &rotated, &want, tolerance);
        let [_, want] = self.attending.step(micro, &rotated);
        // The weights of values, all at most 1 together, may be rounded to the type, and so is the result. Scores of
        // up to 20 have an error of some 2^-20, which weights take over as a share.
        let largest = rotated.iter().fold(1f32, |m, v| m.max(v.abs()));
        let tolerance =
            |i: usize| unit(case.dtype) * (largest + want[i].abs()) + 256.0 * 2f32.powi(-24) * largest;
        assert_near(&format!("attention {case:?} {what}"), case.heads.q_dim(), &out, &want, tolerance);
    }
}

/// Single steps are recorded if a token is asked of every row; half of them are.
fn next(sequences: &mut Sequences, i: usize, parts: &Parts) -> MicroBatch {
    let mut micro = sequences.step(parts);
    let rows = micro.rows();
    if i % 4 != 3 {
        ask(&mut micro, 0..rows);
    }
    micro
}

fn check(head_dim: usize, groups: &[(usize, usize)]) {
    let windows = [None, Some(1), Some(40), None, Some(16), Some(5), Some(333)];
    for (j, dtype) in DTYPES.into_iter().enumerate() {
        let Some(gpu) = gpu(dtype, head_dim) else { return };
        let cpu = cpu();
        for (i, &(heads, kv_heads)) in groups.iter().enumerate() {
            let heads = HeadShape { heads, kv_heads, head_dim };
            let window = windows[(2 * i + j) % windows.len()];
            let case = Case { heads, dtype, window, norm: (i + j) % 2 == 0 };
            let mut sequences = Sequences::new(SEQUENCES, CONTEXT);
            let mut trial = Trial::new(case, &gpu, &cpu, sequences.blocks());
            for (i, parts) in if quick() { QUICK_STEPS } else { STEPS }.iter().enumerate() {
                let micro = next(&mut sequences, i, parts);
                trial.step(&format!("step {i} {parts:?}"), &micro);
            }
        }
    }
}

#[test]
fn heads_of_10() {
    check(10, &[(2, 2), (4, 2)]);
}

#[test]
fn heads_of_12() {
    check(12, &[(4, 2), (5, 1)]);
}

#[test]
fn heads_of_16() {
    check(16, &[(4, 2), (7, 1)]);
}

#[test]
fn heads_of_64() {
    check(64, &[(9, 3), (14, 2), (8, 1), (2, 2)]);
}

#[test]
fn heads_of_80() {
    check(80, &[(4, 4), (8, 1)]);
}

#[test]
fn heads_of_96() {
    check(96, &[(4, 2), (7, 1)]);
}

#[test]
fn heads_of_128() {
    check(128, &[(28, 4), (16, 2), (4, 2), (3, 3), (16, 1)]);
}

#[test]
fn heads_of_256() {
    check(256, &[(8, 1), (4, 4)]);
}

/// The same sequences, by other cuts: bits may differ between kernels, but each result is as near.
#[test]
fn a_long_context_in_single_steps() {
    let steps: &[&Parts] = if quick() { &[&[(0, 100)]] } else { &[&[(0, 640)], &[(0, 500)], &[(1, 200)]] };
    for dtype in DTYPES {
        let Some(gpu) = gpu(dtype, 128) else { return };
        let heads = HeadShape { heads: 7, kv_heads: 1, head_dim: 128 };
        let (case, cpu) = (Case { heads, dtype, window: None, norm: false }, cpu());
        let mut sequences = Sequences::new(SEQUENCES, CONTEXT);
        let mut trial = Trial::new(case, &gpu, &cpu, sequences.blocks());
        for parts in steps {
            let micro = sequences.step(parts);
            trial.step("prefill", &micro);
        }
        for i in 0..40 {
            let micro = next(&mut sequences, i, &[(1, 1), (0, 1)]);
            trial.step(&format!("single step {i}"), &micro);
        }
    }
}

/// There are too few tiles of rows for all multiprocessors: blocks share a tile's tokens.
#[test]
fn few_rows_after_many_tokens() {
    let rest: &[&Parts] =
        &[&[(0, 5)], &[(0, 130), (1, 40)], &[(0, 33), (1, 1)], &[(1, 2)], &[(0, 1), (1, 64)]];
    for (head_dim, window) in [(64, None), (80, Some(3000)), (96, Some(100)), (128, None), (256, Some(1500))]
    {
        for dtype in [DType::BF16, DType::F16] {
            let Some(gpu) = gpu(dtype, head_dim) else { return };
            let heads = HeadShape { heads: 3, kv_heads: 1, head_dim };
            let (case, cpu) = (Case { heads, dtype, window, norm: false }, cpu());
            let mut sequences = Sequences::new(2, LONG);
            let mut trial = Trial::new(case, &gpu, &cpu, sequences.blocks());
            let begin = if quick() { 2 } else { 7 };
            let steps = (0..begin).map(|_| -> &Parts { &[(0, 600)] }).chain(rest.iter().copied());
            for (i, parts) in steps.enumerate() {
                let micro = sequences.step(parts);
                trial.step(&format!("step {i} {parts:?}"), &micro);
            }
        }
    }
}

/// There is work for all multiprocessors: tiles of rows see several tiles of tokens, all or some of them.
#[test]
fn many_rows_after_many_tokens() {
    let steps: &[&Parts] = &[
        &[(0, 600)],
        &[(0, 600)],
        &[(1, 640)],
        &[(0, 320), (1, 320)],
        &[(0, 129), (1, 255), (2, 200), (3, 2)],
        &[(0, 1), (1, 400), (3, 127), (2, 64), (4, 1)],
    ];
    for (head_dim, window) in [(64, Some(500)), (64, None), (128, None), (128, Some(130))] {
        for dtype in [DType::BF16, DType::F16] {
            let Some(gpu) = gpu(dtype, head_dim) else { return };
            let heads = HeadShape { heads: 56, kv_heads: 4, head_dim };
            let (case, cpu) = (Case { heads, dtype, window, norm: false }, cpu());
            let mut sequences = Sequences::new(5, 2048);
            let mut trial = Trial::new(case, &gpu, &cpu, sequences.blocks());
            for (i, parts) in steps.iter().take(if quick() { 1 } else { steps.len() }).enumerate() {
                let micro = sequences.step(parts);
                trial.step(&format!("step {i} {parts:?}"), &micro);
            }
        }
    }
}

/// Tiles of which only half of a block's warps have rows, many times: none may lose count of what comes and goes.
#[test]
fn short_chunks_after_many_tokens_again_and_again() {
    let (times, before) = if quick() { (3, 250) } else { (2000, 1500) };
    for (head_dim, rows) in [(128, 40), (128, 64), (64, 1 + 8)] {
        let Some(gpu) = gpu(DType::BF16, head_dim) else { return };
        let heads = HeadShape { heads: if quick() { 16 } else { 64 }, kv_heads: 8, head_dim };
        let case = Case { heads, dtype: DType::BF16, window: None, norm: false };
        let mut sequences = Sequences::new(8, 2048);
        sequences.cached.fill(before);
        let mut layer = Layer::new(&gpu, case, &case.inv_freq(), 1.0, sequences.blocks());
        let parts: Vec<(usize, usize)> = (0..8).map(|seq| (seq, rows)).collect();
        let micro = sequences.step(&parts);
        let [_, first] = layer.step(&micro, &case.qkv(&micro));
        let Layer { batch, kv, qkv, out, .. } = &mut layer;
        let mut again = || (0..times).try_for_each(|_| gpu.attention(out, qkv, kv, batch, case.shape()));
        gpu.pass(batch, &mut again).unwrap();
        let last = read(&gpu, out, first.len());
        assert_bits(&format!("chunks of {rows} after {before} tokens"), heads.q_dim(), &last, &first);
    }
}

/// A block comes to a sequence with what an earlier one left in it: that must not show, whatever it is.
#[test]
fn does_not_see_what_others_left_in_a_block() {
    for dtype in DTYPES {
        for head_dim in [16, 64, 128] {
            let Some(gpu) = gpu(dtype, head_dim) else { return };
            let heads = HeadShape { heads: 4, kv_heads: 2, head_dim };
            let case = Case { heads, dtype, window: Some(20), norm: false };
            let run = |dirt: f32| {
                let mut layer = Layer::new(&gpu, case, &case.inv_freq(), 1.0, 8);
                let mut before = Sequences::new(1, 128).step(&[(0, 100)]);
                let rows = vec![dirt; case.qkv(&before).len()];
                ask(&mut before, [99]);
                layer.step(&before, &rows);
                let mut sequences = Sequences::new(1, 128);
                let mut results = Vec::<f32>::new();
                for parts in [[(0, 37)], [(0, 1)], [(0, 5)], [(0, 1)]] {
                    let mut micro = sequences.step(&parts);
                    ask(&mut micro, [0]);
                    let rows = case.qkv(&micro);
                    results.extend(layer.step(&micro, &rows)[1].iter());
                }
                results
            };
            let want = run(0.0);
            assert!(want.iter().all(|v| v.is_finite()));
            for dirt in [f32::INFINITY, f32::NAN] {
                let what = format!("attention of {} heads of {head_dim} after {dirt}", dtype.name());
                assert_bits(&what, heads.q_dim(), &run(dirt), &want);
            }
        }
    }
}

/// The same inputs twice, and in other company: the same bits for a sequence whose rows are cut alike.
#[test]
fn has_the_same_bits_again_and_among_others() {
    for dtype in DTYPES {
        let Some(gpu) = gpu(dtype, 64) else { return };
        let heads = HeadShape { heads: 14, kv_heads: 2, head_dim: 64 };
        let case = Case { heads, dtype, window: None, norm: true };
        let run = |steps: &[&Parts]| {
            let mut sequences = Sequences::new(SEQUENCES, CONTEXT);
            let mut layer = Layer::new(&gpu, case, &case.inv_freq(), 1.0, sequences.blocks());
            let mut results = Vec::new();
            for parts in steps {
                let micro = sequences.step(parts);
                let rows = case.qkv(&micro);
                results.push(layer.step(&micro, &rows)[1].clone());
            }
            results
        };
        let steps: &[&Parts] = &[&[(0, 70), (1, 30)], &[(0, 1), (1, 1), (2, 1)], &[(0, 17), (1, 1)]];
        let first = run(steps);
        for (i, (got, want)) in run(steps).iter().zip(&first).enumerate() {
            assert_bits(&format!("attention in {}, step {i} again", dtype.name()), heads.q_dim(), got, want);
        }
        let other: &[&Parts] = &[&[(0, 70), (1, 500)]];
        let part = 70 * heads.q_dim();
        let what = format!("attention in {}, among others", dtype.name());
        assert_bits(&what, heads.q_dim(), &run(other)[0][..part], &first[0][..part]);
    }
}

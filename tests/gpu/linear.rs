//! Linear layers with what is around them.

use pipeline_infer::backend::{
    Backend, DType, Norm, NormShape, Tensor,
    cuda::{Cuda, Products},
    vision::VisionOps,
};

use crate::{
    DTYPES, Room, assert_bits, assert_near, cpu,
    device::{gpu, quick},
    filled, numbers, poisoned, read, rounded, tensor, unit,
};

const EPS: f32 = 1e-5;

/// A linear layer of several parts. What goes in has size 1, and so has what comes out.
#[derive(Debug, Clone)]
struct Linear {
    dtype: DType,
    parts: Vec<usize>,
    k: usize,
    bias: bool,
}

/// A layer's weights on a device, with those of the norm before it.
struct Loaded<B: Backend> {
    w: B::Matrix,
    norm: B::Buf,
}

impl Linear {
    fn n(&self) -> usize {
        self.parts.iter().sum()
    }

    fn tensors(&self) -> (Vec<Tensor>, Vec<Tensor>) {
        let part = |(i, &n): (usize, &usize)| {
            let seed = (i + 31 * self.k) as u64;
            let size = (3.0 / self.k as f32).sqrt();
            let weights: Vec<f32> = numbers(seed, n * self.k).iter().map(|v| v * size).collect();
            let biases = tensor(&[n], self.dtype, &numbers(seed + 7, n));
            (tensor(&[n, self.k], self.dtype, &weights), biases)
        };
        let (weights, biases): (Vec<_>, Vec<_>) = self.parts.iter().enumerate().map(part).unzip();
        (weights, if self.bias { biases } else { Vec::new() })
    }

    fn load<B: Backend>(&self, b: &B) -> Loaded<B> {
        let (weights, biases) = self.tensors();
        let w = b.matrix(&weights, &biases).unwrap();
        let around_1: Vec<f32> = numbers(5, self.k).iter().map(|v| 1.0 + 0.5 * v).collect();
        let norm = b.vector(&tensor(&[self.k], DType::F32, &around_1)).unwrap();
        b.loaded().unwrap();
        Loaded { w, norm }
    }

    fn shape(&self, rows: usize) -> NormShape {
        NormShape { rows, dim: self.k, eps: EPS }
    }

    fn x(&self, rows: usize) -> Vec<f32> {
        numbers(rows as u64 + 40, rows * self.k).iter().map(|v| 3.0 * v).collect()
    }

    /// Sums of `k` products about as large as 1 together: an error of a random walk, and what tensor cores cut off
    /// instead of rounding it. Exact f32 has nothing else; TF32 would be off by some 2^-12.
    fn sums(&self) -> f32 {
        let k = self.k as f32;
        2f32.powi(-24) * (8.0 + 2.0 * k.sqrt() + k / 8.0)
    }

    /// The GPU rounds each of the `k` left factors, which the CPU may not: that adds up to 0.4 units, as a standard
    /// deviation. And it may round what comes out.
    fn tolerance(&self, want: f32) -> f32 {
        unit(self.dtype) * (3.0 + want.abs()) + self.sums() * want.abs().max(1.0)
    }

    fn what(&self, op: &str, rows: usize) -> String {
        let bias = if self.bias { " with bias" } else { "" };
        format!("{op} {} {:?}x{}{bias}, {rows} rows", self.dtype.name(), self.parts, self.k)
    }
}

fn norm_linear<B: Backend>(b: &B, l: &Linear, on: &Loaded<B>, x: &[f32], to: Room) -> Vec<f32> {
    let rows = x.len() / l.k;
    let room = b.rows_room(rows);
    let x = filled(b, Room::Wide, room * l.k, x);
    let mut out = poisoned(b, to, room * l.n());
    let mut normed = poisoned(b, Room::Working, room * l.k);
    let norm = Norm { w: &on.norm, shape: l.shape(room) };
    b.norm_linear(&mut out, &mut normed, &x, norm, &on.w).unwrap();
    read(b, &out, rows * l.n())
}

fn norm_gate_up<B: Backend>(b: &B, l: &Linear, on: &Loaded<B>, x: &[f32]) -> Vec<f32> {
    let rows = x.len() / l.k;
    let (room, ffn) = (b.rows_room(rows), l.n() / 2);
    let x = filled(b, Room::Wide, room * l.k, x);
    let mut out = poisoned(b, Room::Working, room * ffn);
    let mut normed = poisoned(b, Room::Working, room * l.k);
    let mut gate_up = poisoned(b, Room::Working, room * l.n());
    let norm = Norm { w: &on.norm, shape: l.shape(room) };
    b.norm_gate_up(&mut out, (&mut normed, &mut gate_up), &x, norm, &on.w).unwrap();
    read(b, &out, rows * ffn)
}

fn linear_add<B: Backend>(b: &B, l: &Linear, on: &Loaded<B>, x: &[f32], y: &[f32]) -> Vec<f32> {
    let rows = y.len() / l.k;
    let room = b.rows_room(rows);
    let mut out = filled(b, Room::Wide, room * l.n(), x);
    let y = filled(b, Room::Working, room * l.k, y);
    b.linear_add(&mut out, &y, &on.w, room).unwrap();
    read(b, &out, rows * l.n())
}

fn linear<B: VisionOps>(b: &B, l: &Linear, on: &Loaded<B>, x: &[f32], to: Room) -> Vec<f32> {
    let rows = x.len() / l.k;
    let x = filled(b, Room::Working, rows * l.k, x);
    let mut out = poisoned(b, to, rows * l.n());
    b.linear(&mut out, &x, &on.w, rows).unwrap();
    read(b, &out, rows * l.n())
}

/// On a GPU, with all who may multiply there.
fn each_way(dtype: DType, check: impl Fn(&Cuda, &str)) {
    let Some(gpu) = gpu(dtype, 64) else { return };
    for products in [Products::Own, Products::Library] {
        gpu.set_products(products);
        check(&gpu, &format!("({products:?})"));
    }
}

/// Whether kernels of this crate multiply if they are asked to.
fn fits(gpu: &Cuda, l: &Linear, gated: bool, rows: usize) -> bool {
    let n = if gated { l.n() / 2 } else { l.n() };
    let even = n.is_multiple_of(8) && l.k.is_multiple_of(8) && !(gated && l.bias);
    let rows_fit = (9..=128).contains(&rows) || gated && rows > 128;
    gpu.facts().arch() == "sm_90a" && l.dtype != DType::F32 && even && rows_fit
}

/// What an op gives, and that it has been done by whom it should have been.
fn by<R>(gpu: &Cuda, way: &str, fits: bool, op: impl FnOnce() -> R) -> R {
    let before = gpu.own_products();
    let result = op();
    assert_eq!(gpu.own_products() > before, fits && way == "(Own)", "{way}: who has multiplied");
    result
}

fn rows() -> Vec<usize> {
    match quick() {
        true => vec![1, 3, 8, 9],
        false => vec![1, 2, 3, 5, 8, 9, 17, 33, 63, 64, 65, 128, 129, 300],
    }
}

/// Parts, and what goes in. Kernels for few rows take 8 and 16 at a time; odd sizes need another way.
fn shapes() -> Vec<(Vec<usize>, usize)> {
    let small: [(&[usize], usize); 9] = [
        (&[1], 16),
        (&[3, 1, 2], 5),
        (&[7, 7], 31),
        (&[5, 9], 33),
        (&[64, 16, 16], 64),
        (&[130], 100),
        (&[24, 24], 40),
        (&[131, 1], 52),
        (&[33, 31], 1031),
    ];
    // Of the last three an H200 has fewer tiles than multiprocessors, but no two for each; then more, with sums of one step and of several.
    let large: [(&[usize], usize); 7] = [
        (&[768, 256, 256], 896),
        (&[2048, 2048], 1536),
        (&[1008], 4864),
        (&[3584, 512, 512], 3584),
        (&[10_000, 240], 640),
        (&[40_000, 32], 64),
        (&[19_000, 40], 328),
    ];
    let large = if quick() { &large[..1] } else { &large[..] };
    small.iter().chain(large).map(|(parts, k)| (parts.to_vec(), *k)).collect()
}

fn linears(dtype: DType) -> impl Iterator<Item = Linear> {
    shapes().into_iter().enumerate().map(move |(i, (parts, k))| Linear { dtype, parts, k, bias: i % 2 == 0 })
}

/// Large layers take the CPU long: fewer rows.
fn rows_for(l: &Linear) -> Vec<usize> {
    let few = l.n() * l.k > 1 << 20;
    rows().into_iter().filter(|&r| !few || [1, 3, 8, 9, 17, 33, 65, 128].contains(&r)).collect()
}

fn check_norm_linear(dtype: DType) {
    each_way(dtype, |gpu, way| {
        let cpu = cpu();
        for l in linears(dtype) {
            let (there, here) = (l.load(gpu), l.load(&cpu));
            for rows in rows_for(&l) {
                let x = l.x(rows);
                let want = norm_linear(&cpu, &l, &here, &x, Room::Wide);
                for to in [Room::Wide, Room::Working] {
                    let what = l.what(&format!("norm_linear to {to:?} {way}"), rows);
                    let own = fits(gpu, &l, false, rows);
                    let got = by(gpu, way, own, || norm_linear(gpu, &l, &there, &x, to));
                    assert_near(&what, l.n(), &got, &want, |i| l.tolerance(want[i]));
                    assert_bits(
                        &format!("{what}, again"),
                        l.n(),
                        &norm_linear(gpu, &l, &there, &x, to),
                        &got,
                    );
                }
            }
        }
    });
}

#[test]
fn norm_linear_in_f32() {
    check_norm_linear(DType::F32);
}

#[test]
fn norm_linear_in_f16() {
    check_norm_linear(DType::F16);
}

#[test]
fn norm_linear_in_bf16() {
    check_norm_linear(DType::BF16);
}

fn check_norm_gate_up(dtype: DType) {
    each_way(dtype, |gpu, way| {
        let cpu = cpu();
        for mut l in linears(dtype) {
            // Two halves.
            l.parts = vec![l.n().div_ceil(2); 2];
            // Large ones as models have them.
            l.bias &= l.n() < 500;
            let (there, here, ffn) = (l.load(gpu), l.load(&cpu), l.parts[0]);
            // Tiles in parts, whole ones beside such, and whole ones alone, the last with few rows; tiles in two bands.
            let many = match fits(gpu, &l, true, 129) {
                true if quick() => vec![150],
                true if l.n() * l.k < 1 << 21 => vec![150, 300, 1100, 3300],
                true => vec![150, 300, 1100],
                false => vec![],
            };
            for rows in rows_for(&l).into_iter().chain(many) {
                let (what, x) = (l.what(&format!("norm_gate_up {way}"), rows), l.x(rows));
                let between = norm_linear(&cpu, &l, &here, &x, Room::Wide);
                let want = norm_gate_up(&cpu, &l, &here, &x);
                let own = fits(gpu, &l, true, rows) || fits(gpu, &l, false, rows);
                let got = by(gpu, way, own, || norm_gate_up(gpu, &l, &there, &x));
                // The product's errors go through `silu(gate) * up`, whose slopes are |up| * 1.1 and |silu(gate)|.
                let tolerance = |i: usize| {
                    let row = &between[i / ffn * 2 * ffn..];
                    let (gate, up) = (row[i % ffn], row[ffn + i % ffn]);
                    let silu = (gate / (1.0 + (-gate).exp())).abs();
                    let through = l.tolerance(gate) * 1.1 * up.abs() + l.tolerance(up) * silu;
                    // Kernels for 16 bits take a quick exponential, with some last bits wrong.
                    through + (unit(l.dtype) + 2f32.powi(-20)) * want[i].abs() + 2f32.powi(-24)
                };
                assert_near(&what, ffn, &got, &want, tolerance);
                assert_bits(&format!("{what}, again"), ffn, &norm_gate_up(gpu, &l, &there, &x), &got);
            }
        }
    });
}

#[test]
fn norm_gate_up_in_f32() {
    check_norm_gate_up(DType::F32);
}

#[test]
fn norm_gate_up_in_f16() {
    check_norm_gate_up(DType::F16);
}

#[test]
fn norm_gate_up_in_bf16() {
    check_norm_gate_up(DType::BF16);
}

#[test]
fn linear_add_adds_exact_products() {
    for dtype in DTYPES {
        each_way(dtype, |gpu, way| {
            let cpu = cpu();
            for l in linears(dtype) {
                let (there, here) = (l.load(gpu), l.load(&cpu));
                for rows in rows_for(&l) {
                    let what = l.what(&format!("linear_add {way}"), rows);
                    let (x, y) = (numbers(77, rows * l.n()), rounded(dtype, l.x(rows)));
                    let want = linear_add(&cpu, &l, &here, &x, &y);
                    let own = fits(gpu, &l, false, rows);
                    let got = by(gpu, way, own, || linear_add(gpu, &l, &there, &x, &y));
                    // Both have the same factors, and the sum is f32: the type leaves no trace. Factors are three times
                    // as large as above.
                    assert_near(&what, l.n(), &got, &want, |i| {
                        3.0 * l.sums() + 2f32.powi(-23) * want[i].abs()
                    });
                    assert_bits(&format!("{what}, again"), l.n(), &linear_add(gpu, &l, &there, &x, &y), &got);
                }
            }
        });
    }
}

/// Rows are not padded here, and may be any number.
#[test]
fn linear_multiplies_any_rows_exactly() {
    for dtype in DTYPES {
        each_way(dtype, |gpu, way| {
            let cpu = cpu();
            for l in linears(dtype) {
                let (there, here) = (l.load(gpu), l.load(&cpu));
                for rows in rows_for(&l) {
                    let x = rounded(dtype, l.x(rows));
                    let want = linear(&cpu, &l, &here, &x, Room::Wide);
                    for (to, kept) in [(Room::Wide, DType::F32), (Room::Working, dtype)] {
                        let what = l.what(&format!("linear to {to:?} {way}"), rows);
                        let own = fits(gpu, &l, false, rows);
                        let got = by(gpu, way, own, || linear(gpu, &l, &there, &x, to));
                        // Where no epilogue takes the size, a product is rounded before its bias, of at most 1, is added.
                        let tolerance = |i: usize| 3.0 * l.sums() + unit(kept) * (1.0 + 2.0 * want[i].abs());
                        assert_near(&what, l.n(), &got, &want, tolerance);
                    }
                }
            }
        });
    }
}

/// The other rows may be anything.
#[test]
fn a_row_does_not_see_its_neighbours() {
    for dtype in DTYPES {
        each_way(dtype, |gpu, way| {
            for (parts, k, bias) in [
                (vec![66, 66], 128, true),
                (vec![7, 7], 31, true),
                (vec![64, 64], 128, false),
                (vec![768, 768], 896, false),
            ] {
                let l = Linear { dtype, parts, k, bias };
                let on = l.load(gpu);
                for rows in rows().into_iter().filter(|&r| r > 1) {
                    let own = rows / 2;
                    let x = rounded(dtype, l.x(rows));
                    let run = |others: f32| {
                        let mut x = x.clone();
                        for (i, row) in x.chunks_exact_mut(k).enumerate().filter(|&(i, _)| i != own) {
                            row.iter_mut()
                                .for_each(|v| *v = if others == 0.0 { *v } else { others * i as f32 });
                        }
                        let sum = vec![0.5; rows * l.n()];
                        let results = [
                            norm_linear(gpu, &l, &on, &x, Room::Working),
                            norm_linear(gpu, &l, &on, &x, Room::Wide),
                            norm_gate_up(gpu, &l, &on, &x),
                            linear_add(gpu, &l, &on, &sum, &x),
                        ];
                        results.map(|r| r[own * (r.len() / rows)..][..r.len() / rows].to_vec())
                    };
                    let want = run(0.0);
                    for others in [7.0, f32::INFINITY, f32::NAN] {
                        for (op, (got, want)) in run(others).iter().zip(&want).enumerate() {
                            let what = l.what(&format!("op {op} {way} among rows of {others}"), rows);
                            assert_bits(&what, want.len(), got, want);
                        }
                    }
                }
            }
        });
    }
}

/// Launches follow each other without a pause: each starts while the one before it ends, and finds what that writes, and what blocks
/// leave for each other as it was in the beginning.
#[test]
fn products_follow_each_other() {
    let (dtype, dim) = (DType::BF16, 4096);
    let Some(gpu) = gpu(dtype, 64) else { return };
    gpu.set_products(Products::Own);
    for (rows, gated) in [(16, false), (32, false), (64, false), (128, false), (64, true), (300, true)] {
        // Tiles shared by clusters, dealt out in parts, and many.
        let linear = |n, k, parts| Linear { dtype, parts: vec![n; parts], k, bias: !gated };
        let pairs: Vec<_> = [640, 10_240, 19_000]
            .map(|n| [linear(n, dim, if gated { 2 } else { 1 }), linear(dim, n, 1)])
            .into();
        let on: Vec<_> = pairs.iter().map(|pair| [pair[0].load(&gpu), pair[1].load(&gpu)]).collect();
        let start: Vec<f32> = numbers(3, rows * dim);
        let run = |times: usize, pause: bool| -> Vec<f32> {
            let mut x = filled(&gpu, Room::Wide, rows * dim, &start);
            let mut normed = poisoned(&gpu, Room::Working, rows * dim);
            let room = |n| poisoned(&gpu, Room::Working, rows * n);
            let mut between: Vec<_> = pairs.iter().map(|pair| [room(pair[1].k), room(pair[0].n())]).collect();
            let pause = || {
                if pause {
                    gpu.synchronize().unwrap()
                }
            };
            for _ in 0..times {
                for ((pair, on), [between, both]) in pairs.iter().zip(&on).zip(&mut between) {
                    let norm = Norm { w: &on[0].norm, shape: pair[0].shape(rows) };
                    match gated {
                        true => gpu.norm_gate_up(between, (&mut normed, both), &x, norm, &on[0].w).unwrap(),
                        false => gpu.norm_linear(between, &mut normed, &x, norm, &on[0].w).unwrap(),
                    }
                    pause();
                    // Not all rows of many: by a kernel that starts early.
                    gpu.linear_add(&mut x, between, &on[1].w, rows.min(128)).unwrap();
                    pause();
                }
            }
            read(&gpu, &x, rows * dim)
        };
        let times = if quick() { 2 } else { 30 };
        let (got, want) = (run(times, false), run(times, true));
        assert!(want.iter().all(|v| v.is_finite()));
        assert_bits(&format!("{rows} rows one after another, gated: {gated}"), dim, &got, &want);
    }
}

/// The head of a model with a large vocabulary: more than 2^27 weights, tall and narrow.
#[test]
fn a_large_head_is_as_near_as_a_small_one() {
    let dtype = DType::BF16;
    let Some(gpu) = gpu(dtype, 64).filter(|_| !quick()) else { return };
    let (l, cpu) = (Linear { dtype, parts: vec![152_064], k: 896, bias: false }, cpu());
    let (there, here) = (l.load(&gpu), l.load(&cpu));
    for rows in [1, 8, 64] {
        let x = l.x(rows);
        let want = norm_linear(&cpu, &l, &here, &x, Room::Wide);
        let got = norm_linear(&gpu, &l, &there, &x, Room::Wide);
        assert_near(&l.what("norm_linear", rows), l.n(), &got, &want, |i| l.tolerance(want[i]));
    }
}

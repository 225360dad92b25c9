//! Linear layers.

use std::sync::Arc;

use pipeline_infer::backend::{
    Backend, Bytes, DType, Tensor,
    cpu::{Cpu, Simd, reference},
};

use crate::{DTYPES, assert_bits, assert_near, buf, devices, numbers, poisoned, read, tensor};

/// A linear layer of several parts.
struct Linear {
    dtype: DType,
    parts: Vec<usize>,
    k: usize,
    bias: bool,
}

impl Linear {
    fn n(&self) -> usize {
        self.parts.iter().sum()
    }

    fn tensors(&self) -> (Vec<Tensor>, Vec<Tensor>) {
        let part = |(i, &n): (usize, &usize)| {
            let seed = (i + 31 * self.k) as u64;
            let weights = tensor(&[n, self.k], self.dtype, &numbers(seed, n * self.k));
            (weights, tensor(&[n], self.dtype, &numbers(seed + 7, n)))
        };
        let (weights, biases): (Vec<_>, Vec<_>) = self.parts.iter().enumerate().map(part).unzip();
        (weights, if self.bias { biases } else { Vec::new() })
    }

    fn run(&self, cpu: &Cpu, x: &[f32], rows: usize) -> Vec<f32> {
        let (weights, biases) = self.tensors();
        let w = cpu.matrix(&weights, &biases).unwrap();
        let mut out = poisoned(cpu, rows * self.n());
        cpu.linear(&mut out, &buf(cpu, x), &w, rows).unwrap();
        let out = read(cpu, &out, rows * self.n());
        self.check_add(cpu, x, rows, &out);
        out
    }

    /// `linear_add` adds exactly what `linear` gives.
    fn check_add(&self, cpu: &Cpu, x: &[f32], rows: usize, product: &[f32]) {
        let (weights, biases) = self.tensors();
        let w = cpu.matrix(&weights, &biases).unwrap();
        let before = numbers(77, product.len());
        let mut out = buf(cpu, &before);
        cpu.linear_add(&mut out, &buf(cpu, x), &w, rows).unwrap();
        let want: Vec<f32> = before.iter().zip(product).map(|(a, b)| a + b).collect();
        assert_bits(&self.what(cpu, rows), &read(cpu, &out, want.len()), &want);
    }

    /// In f64; x is rounded to bf16 first if the weights are.
    fn reference(&self, x: &[f32], rows: usize) -> Vec<f32> {
        let (weights, biases) = self.tensors();
        let flat = |tensors: &[Tensor]| tensors.iter().flat_map(Tensor::to_f32).collect::<Vec<_>>();
        let narrow = if self.dtype == DType::BF16 { DType::BF16 } else { DType::F32 };
        let x: Vec<f32> = x.iter().map(|&x| reference::rounded(narrow, x)).collect();
        reference::linear(&x, &flat(&weights), &flat(&biases), rows, self.k)
    }

    fn what(&self, cpu: &Cpu, rows: usize) -> String {
        let (dtype, simd, threads) = (self.dtype.name(), cpu.simd().name(), cpu.threads());
        format!("linear {dtype} {:?}x{}, {rows} rows, {threads} threads, {simd}", self.parts, self.k)
    }
}

fn linears() -> Vec<Linear> {
    let shapes: [(&[usize], usize); 9] = [
        (&[1], 1),
        (&[1], 16),
        (&[3, 1, 2], 5),
        (&[7], 31),
        (&[5, 9], 33),
        (&[64, 16, 16], 64),
        (&[130], 100),
        (&[2, 2], 576),
        (&[33, 31], 1031),
    ];
    let all = DTYPES.into_iter().flat_map(|dtype| shapes.map(|(parts, k)| (dtype, parts, k)));
    all.map(|(dtype, parts, k)| Linear { dtype, parts: parts.to_vec(), k, bias: k % 3 != 0 }).collect()
}

#[test]
fn is_near_the_reference() {
    for l in linears() {
        for rows in [1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 20] {
            let x = numbers(rows as u64, rows * l.k);
            let want = l.reference(&x, rows);
            for cpu in devices(2) {
                assert_near(&l.what(&cpu, rows), &l.run(&cpu, &x, rows), &want, (l.k as f32).sqrt());
            }
        }
    }
}

#[test]
fn has_the_same_bits_for_any_rows_threads_and_instructions() {
    let portable = Cpu::with_simd(Some(1), Simd::Portable).unwrap();
    for l in linears() {
        let x = numbers(3, 21 * l.k);
        let want: Vec<f32> = x.chunks(l.k).flat_map(|row| l.run(&portable, row, 1)).collect();
        for cpu in devices(1).into_iter().chain(devices(3)) {
            for rows in [1, 2, 5, 6, 7, 8, 21] {
                let first = 21 - rows;
                let got = l.run(&cpu, &x[first * l.k..], rows);
                assert_bits(&l.what(&cpu, rows), &got, &want[first * l.n()..]);
            }
        }
    }
}

#[test]
fn takes_weights_at_any_address() {
    let (n, k) = (6, 40);
    for dtype in DTYPES {
        let aligned = tensor(&[n, k], dtype, &numbers(1, n * k));
        let bytes = [&[0xff], aligned.bytes()].concat();
        let len = bytes.len();
        let odd = Tensor::new("odd", vec![n, k], dtype, Bytes::new(Arc::new(bytes), 1..len)).unwrap();
        for cpu in devices(1) {
            for rows in [1, 9] {
                let x = buf(&cpu, &numbers(2, rows * k));
                let run = |t: &Tensor| {
                    let w = cpu.matrix(std::slice::from_ref(t), &[]).unwrap();
                    let mut out = poisoned(&cpu, rows * n);
                    cpu.linear(&mut out, &x, &w, rows).unwrap();
                    read(&cpu, &out, rows * n)
                };
                assert_bits("linear at an odd address", &run(&odd), &run(&aligned));
            }
        }
    }
}

#[test]
fn stages_share_one_device() {
    let cpu = Cpu::new(Some(3));
    let l = Linear { dtype: DType::F16, parts: vec![300], k: 300, bias: false };
    let x = numbers(1, 9 * 300);
    let want = l.run(&cpu, &x, 9);
    std::thread::scope(|s| {
        for _ in 0..4 {
            let cpu = cpu.clone();
            let (l, x, want) = (&l, &x, &want);
            s.spawn(move || (0..20).for_each(|_| assert_bits("linear", &l.run(&cpu, x, 9), want)));
        }
    });
}

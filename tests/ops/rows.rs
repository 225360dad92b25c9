//! Norms, sums, the gate and the embedding.

use pipeline_infer::{
    backend::{Backend, NormShape, Rotation, cpu::reference},
    batch::{OutputRow, SeqId},
};

use crate::{
    DTYPES, HEADS, LIMITS, Sequences, assert_bits, assert_near, buf, devices, numbers, poisoned, read, tensor,
};

#[test]
fn norms_are_near_the_reference_and_alike_on_all_devices() {
    for (rows, dim) in [(1, 1), (1, 16), (2, 5), (3, 31), (9, 64), (7, 576), (60, 1000)] {
        let len = rows * dim;
        let shape = NormShape { rows, dim, eps: 1e-5 };
        let (x, w) = (numbers(1, len), numbers(3, dim));
        let mut first: Option<Vec<f32>> = None;
        for cpu in devices(1).into_iter().chain(devices(3)) {
            let mut out = poisoned(&cpu, len);
            cpu.rms_norm(&mut out, &buf(&cpu, &x), &buf(&cpu, &w), shape);
            let got = read(&cpu, &out, len);
            let what = format!("norm {rows}x{dim} {}", cpu.simd().name());
            assert_near(&what, &got, &reference::rms_norm(&x, &w, shape), 1.0);
            assert_bits(&what, &got, first.get_or_insert_with(|| got.clone()));
        }
    }
}

#[test]
fn silu_mul_is_near_the_reference_and_alike_on_all_devices() {
    for (rows, dim) in [(1, 1), (2, 15), (3, 16), (5, 100), (7, 1536)] {
        let mut x: Vec<f32> = numbers(5, rows * 2 * dim).iter().map(|v| v * 20.0).collect();
        x[0] = -200.0;
        let mut first = None;
        for cpu in devices(1).into_iter().chain(devices(3)) {
            let mut out = poisoned(&cpu, rows * dim);
            cpu.silu_mul(&mut out, &buf(&cpu, &x), rows, dim);
            let got = read(&cpu, &out, rows * dim);
            let what = format!("silu_mul {rows}x{dim} {}", cpu.simd().name());
            assert_near(&what, &got, &reference::silu_mul(&x, dim), 1.0);
            assert_bits(&what, &got, first.get_or_insert_with(|| got.clone()));
        }
    }
}

#[test]
fn embed_copies_rows_and_refuses_unknown_tokens() {
    let (vocab, dim) = (10, 37);
    for cpu in devices(2) {
        for dtype in DTYPES {
            let parts = [
                tensor(&[4, dim], dtype, &numbers(1, 4 * dim)),
                tensor(&[6, dim], dtype, &numbers(2, 6 * dim)),
            ];
            let table = parts.iter().flat_map(|p| p.to_f32()).collect::<Vec<_>>();
            let matrix = cpu.matrix(&parts, &[]).unwrap();
            let mut micro = Sequences::new(HEADS).step(&[(0, 3), (1, 2)]);
            micro.ids = vec![9, 0, 4, 4, 1];
            micro.outputs = [1, 4].map(|row| OutputRow { row, seq: SeqId(0), seat: 0 }).to_vec();
            let mut batch = cpu.batch(LIMITS, Rotation::plain(&[1.0], 1.0)).unwrap();
            cpu.set_batch(&mut batch, &micro).unwrap();
            let mut out = poisoned(&cpu, 5 * dim);
            cpu.embed(&mut out, &matrix, None, &batch).unwrap();
            let row = |id: &u32| &table[*id as usize * dim..][..dim];
            let want = micro.ids.iter().map(row).collect::<Vec<_>>().concat();
            assert_bits("embed", &read(&cpu, &out, 5 * dim), &want);

            let mut gathered = poisoned(&cpu, 2 * dim);
            cpu.gather_outputs(&mut gathered, &out, &batch, dim).unwrap();
            let want = [row(&0), row(&1)].concat();
            assert_bits("gather_outputs", &read(&cpu, &gathered, 2 * dim), &want);

            micro.ids[2] = vocab;
            cpu.set_batch(&mut batch, &micro).unwrap();
            let error = cpu.embed(&mut out, &matrix, None, &batch).unwrap_err().to_string();
            assert!(error.contains("token 10"), "{error}");
        }
    }
}

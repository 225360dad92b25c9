//! The embedding, and rows that are wanted: copies, bit by bit. And that what is written is what is read.

use pipeline_infer::{
    backend::{Backend, DType, Limits, Random, Rotation, Tensor},
    batch::MicroBatch,
};

use crate::{
    DTYPES, Parts, Room, Sequences, ask, assert_bits, cpu,
    device::{gpu, quick},
    filled, numbers, poisoned, read, rounded, tensor,
};

const VOCAB: usize = 131;
const LIMITS: Limits = Limits { rows_max: 320, seqs_max: 16, outputs_max: 320, context_max: 512 };

fn embed<B: Backend>(b: &B, dtype: DType, dim: usize, micro: &MicroBatch) -> [Vec<f32>; 2] {
    let parts = [(1, 60), (2, 71)].map(|(seed, n)| tensor(&[n, dim], dtype, &numbers(seed, n * dim)));
    look_up(b, &parts, dim, micro)
}

/// Rows of the table, and those of them that are wanted.
fn look_up<B: Backend>(b: &B, parts: &[Tensor], dim: usize, micro: &MicroBatch) -> [Vec<f32>; 2] {
    let table = b.matrix(parts, &[]).unwrap();
    b.loaded().unwrap();
    let mut batch = b.batch(LIMITS, Rotation::plain(&[1.0], 1.0)).unwrap();
    b.set_batch(&mut batch, micro).unwrap();
    let mut out = poisoned(b, Room::Wide, b.rows(&batch) * dim);
    let mut wanted = poisoned(b, Room::Wide, b.outputs(&batch).max(1) * dim);
    b.pass(&batch, &mut || {
        b.embed(&mut out, &table, None, &batch)?;
        match b.outputs(&batch) {
            0 => Ok(()),
            _ => b.gather_outputs(&mut wanted, &out, &batch, dim),
        }
    })
    .unwrap();
    [read(b, &out, micro.rows() * dim), read(b, &wanted, micro.outputs.len() * dim)]
}

#[test]
fn embed_and_gather_outputs_copy_rows() {
    let steps: [&Parts; 8] = [
        &[(0, 1)],
        &[(0, 1), (1, 1), (2, 1)],
        &[(0, 5)],
        &[(0, 3), (1, 1), (2, 5)],
        &[(1, 17)],
        &[(0, 60), (1, 4), (2, 1)],
        &[(3, 129)],
        &[(0, 1), (1, 298), (2, 1)],
    ];
    for dtype in DTYPES {
        let Some(gpu) = gpu(dtype, 64) else { return };
        let dims = if quick() { &[5, 64][..] } else { &[1, 5, 8, 12, 40, 64, 1031, 3584] };
        for &dim in dims {
            for (i, parts) in steps.into_iter().enumerate() {
                let mut micro = Sequences::new(4, 512).step(parts);
                let n = micro.rows();
                for (row, id) in micro.ids.iter_mut().enumerate() {
                    *id = ((row * 37 + i * 11) % VOCAB) as u32;
                }
                // All rows, none, the last, every third.
                let wanted: Vec<usize> =
                    [(0..n).collect(), vec![], vec![n - 1], (0..n).step_by(3).collect()][i % 4].clone();
                ask(&mut micro, wanted);
                let (got, want) = (embed(&gpu, dtype, dim, &micro), embed(&cpu(), dtype, dim, &micro));
                let what = format!("{} rows of {dim} in {}", n, dtype.name());
                assert_bits(&format!("embed {what}"), dim, &got[0], &want[0]);
                assert_bits(&format!("gather_outputs {what}"), dim, &got[1], &want[1]);
            }
        }
    }
}

/// Random weights are made on the device: by rows of a table all of its numbers can be seen.
#[test]
fn random_weights_are_the_cpus() {
    for dtype in DTYPES {
        let Some(gpu) = gpu(dtype, 64) else { return };
        for (n, dim) in [(1usize, 1), (300, 7), (257, 129), (320, 4096)] {
            let part = |key: u64, n: usize| {
                let random = Random { key, centre: if key.is_multiple_of(2) { 1.0 } else { 0.0 } };
                Tensor::random("t", vec![n, dim], dtype, random).unwrap()
            };
            // The second part begins where the first one ends, at any address.
            let parts = [part(n as u64, n.div_ceil(3)), part(0xdead_beef_1234_5677, n - n.div_ceil(3))];
            let parts = if n > 1 { &parts[..] } else { &parts[..1] };
            let mut micro = Sequences::new(1, 512).step(&[(0, n)]);
            micro.ids = (0..n as u32).collect();
            let (got, want) = (look_up(&gpu, parts, dim, &micro), look_up(&cpu(), parts, dim, &micro));
            let what = format!("{n} random rows of {dim} in {}", dtype.name());
            assert_bits(&what, dim, &got[0], &want[0]);
        }
    }
}

#[test]
fn what_is_written_is_read_in_the_types_rounding() {
    for dtype in DTYPES {
        let Some(gpu) = gpu(dtype, 64) else { return };
        for len in [1, 2, 3, 8, 255, 256, 257, 100_003] {
            let mut values: Vec<f32> = numbers(len as u64, len).iter().map(|v| v * 100.0).collect();
            values[0] = f32::INFINITY;
            values[len / 2] = f32::NAN;
            // Half way between two numbers of either 16-bit type: to the even one. And below the normal ones.
            for (i, odd) in
                [1.0 + 2f32.powi(-11), 1.0 + 2f32.powi(-8), 3e-6, -0.0, 65519.0].into_iter().enumerate()
            {
                if i + 1 < len / 2 {
                    values[i + 1] = odd;
                }
            }
            for (room, kept) in [(Room::Wide, DType::F32), (Room::Working, dtype)] {
                let buf = filled(&gpu, room, len, &values);
                let what = format!("{len} numbers in {room:?} of {}", dtype.name());
                assert_bits(&what, len, &read(&gpu, &buf, len), &rounded(kept, values.clone()));
                // A part of them.
                let part = len.div_ceil(2);
                assert_bits(&what, len, &read(&gpu, &buf, part), &rounded(kept, values[..part].to_vec()));
            }
        }
    }
}

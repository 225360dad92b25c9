//! Rotation by time, place down and place across, and rows of images among those of tokens.

use pipeline_infer::{
    backend::{Backend, DType, HeadShape, KvShape, Limits, Rotation},
    batch::{IMAGE_ROW, MicroBatch},
};

use crate::{
    DTYPES, Room, Sequences, ask, assert_bits, assert_near, cpu, device::gpu, fill, numbers, poisoned, read,
    rounded, tensor, unit,
};

const LIMITS: Limits = Limits { rows_max: 200, seqs_max: 8, outputs_max: 200, context_max: 512 };
/// Micro-batches of prompts and, three times each so that they are recorded and repeated, of single rows.
const STEPS: &[&[(usize, usize)]] = &[
    &[(0, 70), (1, 33)],
    &[(0, 1), (1, 1), (2, 1)],
    &[(0, 1), (1, 1), (2, 1)],
    &[(0, 1), (1, 1), (2, 1)],
    &[(2, 5), (0, 1), (1, 129)],
    &[(1, 1)],
    &[(1, 1)],
    &[(1, 1)],
];

fn steps() -> Vec<MicroBatch> {
    let mut sequences = Sequences::new(4, LIMITS.context_max);
    let all = STEPS.iter().map(|parts| {
        let mut micro = sequences.step(parts);
        let rows = micro.rows();
        ask(&mut micro, 0..rows);
        micro
    });
    all.collect()
}

/// What a row turns by: far from its place, and now and then much later.
fn turns(micro: &MicroBatch) -> Vec<[u32; 3]> {
    let late = |p: u32| if p.is_multiple_of(11) { 100_000 } else { 0 };
    micro.positions.iter().map(|&p| [p / 3 + late(p), p * 7 % 50, p * 5 % 40 + 900]).collect()
}

/// The rotated rows of each step.
fn rotated<B: Backend>(
    b: &B,
    dtype: DType,
    heads: HeadShape,
    rotation: Rotation,
    steps: &[MicroBatch],
) -> Vec<Vec<f32>> {
    let (dim, room) = (heads.qkv_dim(), b.rows_room(LIMITS.rows_max));
    let kv = KvShape { blocks: 4 * 32, kv_heads: heads.kv_heads, head_dim: heads.head_dim, dtype };
    let (mut kv, mut batch) = (b.kv(kv).unwrap(), b.batch(LIMITS, rotation).unwrap());
    let mut qkv = poisoned(b, Room::Working, room * dim);
    let mut all = Vec::new();
    for (i, micro) in steps.iter().enumerate() {
        fill(b, &mut qkv, room * dim, &rounded(dtype, numbers(i as u64, micro.rows() * dim)));
        b.set_batch(&mut batch, micro).unwrap();
        let batch = &batch;
        b.pass(batch, &mut || b.rope_kv(&mut qkv, &mut kv, batch, heads, None)).unwrap();
        all.push(read(b, &qkv, micro.rows() * dim));
    }
    all
}

#[test]
fn sections_turn_by_their_own_numbers() {
    for (head_dim, sections) in [(12, [1, 2, 3]), (16, [2, 3, 3]), (128, [16, 24, 24])] {
        for dtype in DTYPES {
            let Some(gpu) = gpu(dtype, head_dim) else { return };
            let heads = HeadShape { heads: 4, kv_heads: 2, head_dim };
            let half = head_dim / 2;
            let inv_freq: Vec<f32> = (0..half).map(|i| 1e4f32.powf(-(i as f32) / half as f32)).collect();
            let rotation = |sections| Rotation { inv_freq: &inv_freq, scale: 1.0, sections };
            let plain = steps();
            let mut turned = plain.clone();
            // Some steps are of text alone.
            for micro in turned.iter_mut().enumerate().filter(|(i, _)| i % 4 != 3).map(|(_, micro)| micro) {
                micro.turns = turns(micro);
            }
            let got = rotated(&gpu, dtype, heads, rotation(Some(sections)), &turned);
            let want = rotated(&cpu(), dtype, heads, rotation(Some(sections)), &turned);
            for (i, (got, want)) in got.iter().zip(&want).enumerate() {
                let tolerance = |i: usize| 1.01 * unit(dtype) * want[i].abs() + 64.0 * 2f32.powi(-24);
                let what = format!("step {i}, heads of {head_dim} in {}", dtype.name());
                assert_near(&what, heads.qkv_dim(), got, want, tolerance);
            }
            // Text's bits are those of a model without sections.
            let bits = rotated(&gpu, dtype, heads, rotation(None), &plain);
            for (text, plain) in
                rotated(&gpu, dtype, heads, rotation(Some(sections)), &plain).iter().zip(&bits)
            {
                assert_bits("text", heads.qkv_dim(), text, plain);
            }
        }
    }
}

/// What a pass reads from the store is what is there when it runs, also where it is repeated; beyond it are zeros.
#[test]
fn rows_of_images_come_from_the_store() {
    const VOCAB: usize = 131;
    const STORE: usize = 40;
    for dtype in DTYPES {
        let Some(gpu) = gpu(dtype, 64) else { return };
        for dim in [5, 12, 64, 1031, 3584] {
            let table = rounded(dtype, numbers(1, VOCAB * dim));
            let matrix = gpu.matrix(&[tensor(&[VOCAB, dim], dtype, &table)], &[]).unwrap();
            gpu.loaded().unwrap();
            let mut batch = gpu.batch(LIMITS, Rotation::plain(&[1.0], 1.0)).unwrap();
            let mut store = gpu.buf(STORE * dim).unwrap();
            let room = gpu.rows_room(LIMITS.rows_max) * dim;
            let mut out = poisoned(&gpu, Room::Wide, room);
            for (i, mut micro) in steps().into_iter().enumerate() {
                let images = numbers(100 + i as u64, STORE * dim);
                gpu.write(&mut store, &images).unwrap();
                for (row, id) in micro.ids.iter_mut().enumerate() {
                    let n = row * 37 + i * 11;
                    // A few rows beyond the store.
                    *id = if n.is_multiple_of(3) {
                        (n % VOCAB) as u32
                    } else {
                        IMAGE_ROW | (n % (STORE + 2)) as u32
                    };
                }
                gpu.set_batch(&mut batch, &micro).unwrap();
                let batch = &batch;
                gpu.pass(batch, &mut || gpu.embed(&mut out, &matrix, Some(&store), batch)).unwrap();
                let row = |&id: &u32| match id & IMAGE_ROW {
                    0 => table[id as usize * dim..][..dim].to_vec(),
                    _ => match images.get((id & !IMAGE_ROW) as usize * dim..) {
                        Some(from) if !from.is_empty() => from[..dim].to_vec(),
                        _ => vec![0.0; dim],
                    },
                };
                let want: Vec<f32> = micro.ids.iter().flat_map(row).collect();
                let what = format!("step {i}, rows of {dim} in {}", dtype.name());
                assert_bits(&what, dim, &read(&gpu, &out, want.len()), &want);
            }
        }
    }
}

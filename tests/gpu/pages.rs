//! Pages of keys and values on their way from a device to another: every device has them alike on the host.

use std::ops::Range;

use pipeline_infer::{
    backend::{Backend, DType, HeadShape, KvShape, Limits, Rotation},
    batch::{KV_BLOCK, MicroBatch},
};

use crate::{
    DTYPES, Room, Sequences, cpu,
    device::{Cuda, gpu, gpus, pipeline},
    filled, numbers,
};

const HEADS: HeadShape = HeadShape { heads: 4, kv_heads: 2, head_dim: 64 };
const LIMITS: Limits = Limits { rows_max: 320, seqs_max: 16, outputs_max: 320, context_max: 512 };
const BLOCKS: usize = 40;

fn shape(dtype: DType) -> KvShape {
    KvShape { blocks: BLOCKS, kv_heads: HEADS.kv_heads, head_dim: HEADS.head_dim, dtype }
}

/// Any bytes.
fn bytes(seed: u64, blocks: &Range<usize>, dtype: DType) -> Vec<u8> {
    let len = KvShape { blocks: blocks.len(), ..shape(dtype) }.bytes();
    numbers(seed, len).into_iter().map(|n| (n * 127.0) as i8 as u8).collect()
}

/// What a step's keys and values are, on the host.
fn written<B: Backend>(b: &B, dtype: DType, micro: &MicroBatch) -> Vec<u8> {
    let inv_freq: Vec<f32> = (0..HEADS.head_dim / 2).map(|i| 0.7f32.powi(i as i32)).collect();
    let mut kv = b.kv(shape(dtype)).unwrap();
    let mut batch = b.batch(LIMITS, Rotation::plain(&inv_freq, 1.0)).unwrap();
    b.set_batch(&mut batch, micro).unwrap();
    let rows = numbers(5, micro.rows() * HEADS.qkv_dim());
    let mut qkv = filled(b, Room::Working, b.rows(&batch) * HEADS.qkv_dim(), &rows);
    b.pass(&batch, &mut || b.rope_kv(&mut qkv, &mut kv, &batch, HEADS, None)).unwrap();
    b.loaded().unwrap();
    b.read_pages(&kv, 0..BLOCKS).unwrap()
}

#[test]
fn pages_are_on_the_host_as_the_processors() {
    let Some(gpu) = gpu(DType::F32, HEADS.head_dim) else { return };
    let micro = Sequences::new(3, 160).step(&[(0, 37), (1, 1), (2, 150)]);
    let (got, want) = (written(&gpu, DType::F32, &micro), written(&cpu(), DType::F32, &micro));
    let number = |b: &[u8]| f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
    assert_eq!(got.len(), want.len());
    assert!(want.iter().any(|b| *b != 0));
    for (i, (g, w)) in got.chunks(4).zip(want.chunks(4)).enumerate() {
        assert!((number(g) - number(w)).abs() < 1e-4, "number {i}: {} and {}", number(g), number(w));
    }
}

#[test]
fn pages_cross_as_they_are() {
    if gpus() == 0 {
        return;
    }
    for dtype in DTYPES {
        let stages = pipeline(gpus() + 1, dtype, HEADS.head_dim);
        for (to, from) in stages.iter().flat_map(|to| stages.iter().map(move |from| (to, from))) {
            cross(dtype, from, to);
        }
        let [from, to] = &pipeline(2, dtype, HEADS.head_dim)[..] else { panic!("two stages") };
        to.stage_pages_from(from);
        cross(dtype, from, to);
    }
}

/// Some runs of blocks go from the one to the other; what lies beside them stays.
fn cross(dtype: DType, from: &Cuda, to: &Cuda) {
    let what = format!("{} from {} to {}", dtype.name(), from.name(), to.name());
    let (mut there, mut here) = (from.kv(shape(dtype)).unwrap(), to.kv(shape(dtype)).unwrap());
    let all = bytes(1, &(0..BLOCKS), dtype);
    from.write_pages(&mut there, 0..BLOCKS, &all).unwrap();
    assert!(from.read_pages(&there, 0..BLOCKS).unwrap() == all, "{what}: through the host");
    to.find_way(from).unwrap();
    let runs = [1..2, 4..9, 30..BLOCKS];
    to.fetch_pages(&mut here, (from, &there), &runs).unwrap();
    to.loaded().unwrap();
    let mut want = vec![0; all.len()];
    let block = KV_BLOCK * HEADS.kv_heads * HEADS.head_dim * dtype.size();
    for half in [0, all.len() / 2] {
        for run in &runs {
            let at = half + run.start * block..half + run.end * block;
            want[at.clone()].copy_from_slice(&all[at]);
        }
    }
    assert!(to.read_pages(&here, 0..BLOCKS).unwrap() == want, "{what}");
}

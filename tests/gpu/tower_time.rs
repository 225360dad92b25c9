//! How fast the 7b's vision tower is, whole and op by op: measurements, which `tools/gpu_check.py` runs and judges.

use std::sync::Arc;

use pipeline_infer::{
    backend::{
        Backend, DType, HeadShape, Norm, NormShape, Random, Tensor,
        cuda::Cuda,
        vision::{Pixels, Places, Reach, SegmentAttention, VisionOps},
    },
    grid::Grid,
    model::{
        vision::{Tower, TowerConfig, VisionSpec},
        weights::Weights,
    },
};

use crate::{Room, device::gpu, filled, numbers};

/// An image of 1024x1024 pixels, as the preprocessor cuts it.
const IMAGE: Grid = Grid { t: 1, h: 74, w: 74 };
const ROUNDS: u32 = 10;

/// Qwen2.5-VL-7B's tower.
pub(crate) fn spec() -> VisionSpec {
    VisionSpec {
        dim: 1280,
        heads: HeadShape { heads: 16, kv_heads: 16, head_dim: 80 },
        ffn: 3420,
        full: (0..32).map(|i| i % 8 == 7).collect(),
        patch: 14,
        frames: 2,
        merge: 2,
        window: 4,
        out: 3584,
        tokens_per_second: 2,
    }
}

/// Microseconds that something takes, once it has been done.
fn us(gpu: &Cuda, mut work: impl FnMut()) -> f64 {
    (0..3).for_each(|_| work());
    let start = gpu.mark().unwrap();
    (0..ROUNDS).for_each(|_| work());
    let end = gpu.mark().unwrap();
    gpu.synchronize().unwrap();
    let time = gpu.between(&start, &end).unwrap().expect("both have come");
    time.as_secs_f64() * 1e6 / f64::from(ROUNDS)
}

fn matrix(gpu: &Cuda, n: usize, k: usize) -> <Cuda as Backend>::Matrix {
    let random = |shape, key, centre| {
        Tensor::random("t", shape, DType::BF16, Random { key, centre }).unwrap().made().unwrap()
    };
    let matrix = gpu.matrix(&[random(vec![n, k], 1, 0.0)], &[random(vec![n], 2, 0.0)]).unwrap();
    gpu.loaded().unwrap();
    matrix
}

/// TFLOP/s of a large product.
fn matmul_rate(gpu: &Cuda) -> f64 {
    const SIDE: usize = 8192;
    let w = matrix(gpu, SIDE, SIDE);
    let x = filled(gpu, Room::Working, SIDE * SIDE, &numbers(1, SIDE * SIDE));
    let mut out = gpu.working_buf(SIDE * SIDE).unwrap();
    let us = us(gpu, || gpu.linear(&mut out, &x, &w, SIDE).unwrap());
    2.0 * (SIDE as f64).powi(3) / us / 1e6
}

/// Work of a pass, in products' additions and multiplications.
fn flops(spec: &VisionSpec, places: &Places) -> f64 {
    let (rows, dim) = (places.rows.len() as f64, spec.dim as f64);
    let pairs = |ends: &[u32]| ends.windows(2).map(|e| f64::from(e[1] - e[0]).powi(2)).sum::<f64>();
    let attention = |full: &bool| 4.0 * dim * pairs(if *full { &places.frames } else { &places.windows });
    let block = 2.0 * rows * dim * (4.0 * dim + 3.0 * spec.ffn as f64);
    let wide = 4.0 * dim;
    let merger = 2.0 * rows / 4.0 * wide * (wide + spec.out as f64);
    let embed = 2.0 * rows * dim * spec.patch_dim() as f64;
    embed + merger + spec.full.iter().map(|full| block + attention(full)).sum::<f64>()
}

#[test]
#[ignore = "a measurement"]
fn a_tower_works_at_half_of_the_products_rate() {
    let Some(gpu) = gpu(DType::BF16, 128) else { return };
    let rate = matmul_rate(&gpu);
    println!("8192x8192x8192: {rate:.0} TFLOP/s");
    let weights = Arc::new(Weights::dummy(DType::BF16, 1));
    let spec = Arc::new(spec());
    let config =
        TowerConfig { spec: spec.clone(), weights, blocks: 0..32, dtype: DType::BF16, rows_max: 22_000 };
    let mut tower = Tower::load(&gpu, &config).unwrap();
    let small = Grid { t: 1, h: 16, w: 16 };
    let passes =
        [vec![IMAGE], vec![IMAGE; 4], vec![small], vec![small; 64], vec![Grid { t: 1, h: 146, w: 146 }]];
    for grids in passes {
        let places = Places::new(&grids, 2, 4);
        tower.set(&gpu, &grids).unwrap();
        let patches = numbers(1, places.rows.len() * spec.patch_dim());
        tower.write_patches(&gpu, &patches).unwrap();
        let us = us(&gpu, || tower.forward(&gpu).unwrap());
        let reached = flops(&spec, &places) / us / 1e6;
        println!(
            "tower {}x{}x{}: {us:.0} us, {:.1} images/s, {reached:.0} TFLOP/s, {:.3} of a product's {rate:.0}",
            grids.len(),
            14 * grids[0].h,
            14 * grids[0].w,
            grids.len() as f64 * 1e6 / us,
            reached / rate
        );
    }
}

/// A block's ops for one image, each by itself.
struct Block<'a> {
    gpu: &'a Cuda,
    rows: usize,
}

impl Block<'_> {
    fn show(&self, name: &str, work: &str, amount: f64, op: impl FnMut()) {
        let us = us(self.gpu, op);
        // GFLOP a microsecond are 1e15 a second, MB 1e12.
        let (rate, unit) = (1e3 * amount / us, if work == "GFLOP" { "TFLOP/s" } else { "GB/s" });
        println!("op {name}: {us:.1} us, {amount:.1} {work}, {rate:.0} {unit}");
    }

    fn products(&self) {
        let gpu = self.gpu;
        let width = gpu.row_width(3420);
        let shapes = [
            ("qkv", 3840, 1280, false),
            ("out", 1280, 1280, true),
            ("gate/up", 2 * width, 1280, false),
            ("down", 1280, width, true),
        ];
        for (name, n, k, add) in shapes {
            let w = matrix(gpu, n, k);
            let x = filled(gpu, Room::Working, self.rows * k, &numbers(1, self.rows * k));
            let gflop = 2e-9 * (self.rows * n * k) as f64;
            let mut wide = gpu.buf(self.rows * n).unwrap();
            let mut own = gpu.working_buf(self.rows * n).unwrap();
            self.show(name, "GFLOP", gflop, || match add {
                true => gpu.linear_add(&mut wide, &x, &w, self.rows).unwrap(),
                false => gpu.linear(&mut own, &x, &w, self.rows).unwrap(),
            });
        }
    }
}

#[test]
#[ignore = "a measurement"]
fn a_towers_ops_one_by_one() {
    let Some(gpu) = gpu(DType::BF16, 128) else { return };
    let places = Places::new(&[IMAGE], 2, 4);
    let (spec, rows) = (spec(), places.rows.len());
    let block = Block { gpu: &gpu, rows: gpu.rows_room(rows) };
    block.products();
    let mut images = gpu.images(rows, &spec.inv_freq()).unwrap();
    gpu.set_images(&mut images, &places).unwrap();
    let (dim, padded) = (spec.dim, block.rows);
    let megabytes = |bytes: usize| bytes as f64 / 1e6;
    let mut qkv = filled(&gpu, Room::Working, padded * 3 * dim, &numbers(1, padded * 3 * dim));
    let mut out = gpu.working_buf(padded * dim).unwrap();
    block.show("rope", "MB", megabytes(rows * 2 * dim * 4), || {
        gpu.rope_places(&mut qkv, &images, spec.heads).unwrap()
    });
    let frames = [vec![7; 3 * 1036 * 1036]];
    let pixels = [Pixels { grid: IMAGE, frames: &frames, levels: &[[0.5; 256]; 3] }];
    let mut cutter = gpu.cutter(padded, spec.patch_shape()).unwrap();
    let mut patches = gpu.working_buf(padded * spec.patch_dim()).unwrap();
    // The host's copy to pinned memory among it.
    block.show("pixels to patches", "MB", megabytes(frames[0].len() + 2 * rows * spec.patch_dim()), || {
        gpu.cut(&mut patches, &mut cutter, &images, &pixels).unwrap();
    });
    let shape = |reach| SegmentAttention { heads: spec.heads, scale: 0.1, reach };
    block.show("windows", "MB", megabytes(rows * 4 * dim * 2), || {
        gpu.segment_attention(&mut out, &qkv, &images, shape(Reach::Window)).unwrap();
    });
    block.show("frame", "GFLOP", 4e-9 * (rows * rows * dim) as f64, || {
        gpu.segment_attention(&mut out, &qkv, &images, shape(Reach::Frame)).unwrap();
    });
    let hidden = filled(&gpu, Room::Wide, padded * dim, &numbers(2, padded * dim));
    let w = gpu.vector(&Tensor::from_f32("w", vec![dim], DType::F32, &vec![1.0; dim]).unwrap()).unwrap();
    gpu.loaded().unwrap();
    let norm = || Norm { w: &w, shape: NormShape { rows: padded, dim, eps: 1e-6 } };
    block.show("norm", "MB", megabytes(padded * dim * 6), || gpu.norm(&mut out, &hidden, norm()).unwrap());
    let width = gpu.row_width(spec.ffn);
    let gate_up = matrix(&gpu, 2 * width, dim);
    let mut wide = gpu.working_buf(padded * 2 * width).unwrap();
    let mut act = gpu.working_buf(padded * width).unwrap();
    block.show("norm, gate/up, gate", "GFLOP", 2e-9 * (padded * 2 * width * dim) as f64, || {
        gpu.norm_gate_up(&mut act, (&mut out, &mut wide), &hidden, norm(), &gate_up).unwrap();
    });
}

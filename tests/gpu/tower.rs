//! The vision tower on a GPU: transformers' tokens, in any number of parts, in company and alone.

use std::sync::Arc;

use pipeline_infer::{
    backend::{Backend, DType, vision::VisionOps},
    grid::Grid,
    model::{
        vision::{Tower, TowerConfig, VisionSpec},
        weights::Weights,
    },
};

use crate::{
    DTYPES, assert_bits, assert_near,
    common::{
        data,
        tower::{FOLDER, OUT, Parts, config, golden, patches},
    },
    cpu,
    device::gpu,
    read,
};

/// What tokens of up to 19 differ by after three blocks in a type.
fn tolerance(dtype: DType) -> f32 {
    match dtype {
        DType::F32 => 2e-4,
        DType::F16 => 0.04,
        DType::BF16 => 0.4,
    }
}

fn whole(dtype: DType) -> Vec<TowerConfig> {
    vec![config(&data(FOLDER), 0..3, dtype)]
}

#[test]
fn a_towers_tokens_are_those_of_transformers() {
    for dtype in DTYPES {
        let Some(gpu) = gpu(dtype, 64) else { return };
        let (grids, want) = golden();
        let got = Parts::load(&gpu, &whole(dtype)).run(&grids, &patches(&grids));
        let off = got.iter().zip(&want).map(|(g, w)| (g - w).abs()).fold(0f32, f32::max);
        println!("{}: off by {off:e} at most", dtype.name());
        assert_near(dtype.name(), OUT, &got, &want, |_| tolerance(dtype));
    }
}

#[test]
fn parts_of_a_tower_have_the_bits_of_the_whole() {
    for dtype in DTYPES {
        let Some(gpu) = gpu(dtype, 64) else { return };
        let (grids, _) = golden();
        let patches = patches(&grids);
        let want = Parts::load(&gpu, &whole(dtype)).run(&grids, &patches);
        for parts in [vec![0..1, 1..3], vec![0..2, 2..3], vec![0..1, 1..2, 2..3]] {
            let configs: Vec<_> =
                parts.iter().map(|part| config(&data(FOLDER), part.clone(), dtype)).collect();
            let mut parts = Parts::load(&gpu, &configs);
            for _ in 0..2 {
                // What the first pass leaves in rows that pad the second one does not matter.
                assert_bits(dtype.name(), OUT, &parts.run(&grids, &patches), &want);
            }
        }
    }
}

#[test]
fn an_image_alone_is_what_it_is_in_company() {
    for dtype in DTYPES {
        let Some(gpu) = gpu(dtype, 64) else { return };
        let (grids, want) = golden();
        let (mut tower, patches) = (Parts::load(&gpu, &whole(dtype)), patches(&grids));
        let (mut rest, mut alone) = (&patches[..], Vec::new());
        for grid in grids {
            let (own, after) = rest.split_at(1176 * grid.patches());
            alone.extend(tower.run(&[grid], own));
            rest = after;
        }
        assert_near(dtype.name(), OUT, &alone, &want, |_| tolerance(dtype));
    }
}

/// One block of the 7b's tower, and its merger, with random weights.
fn wide(dtype: DType) -> TowerConfig {
    let spec = VisionSpec { full: vec![false, true], ..crate::tower_time::spec() };
    let weights = Arc::new(Weights::dummy(dtype, 1));
    TowerConfig { spec: spec.into(), weights, blocks: 0..2, dtype, rows_max: 200 }
}

fn tokens<B: VisionOps>(b: &B, config: &TowerConfig, grids: &[Grid]) -> Vec<f32> {
    let mut tower = Tower::load(b, config).unwrap();
    tower.set(b, grids).unwrap();
    tower.write_patches(b, &patches(grids)).unwrap();
    tower.forward(b).unwrap();
    read(b, tower.tokens(), config.spec.out * grids.iter().map(|g| g.tokens(2)).sum::<usize>())
}

/// Its feed-forward part is as wide as no kernel likes it: rows are padded there.
#[test]
fn a_wide_tower_is_the_cpus() {
    for dtype in [DType::F16, DType::BF16] {
        let Some(gpu) = gpu(dtype, 64) else { return };
        let grids = [Grid { t: 1, h: 10, w: 12 }, Grid { t: 1, h: 4, w: 4 }];
        let (got, want) = (tokens(&gpu, &wide(dtype), &grids), tokens(&cpu(), &wide(dtype), &grids));
        let size =
            (want.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / want.len() as f64).sqrt() as f32;
        let off = got.iter().zip(&want).map(|(g, w)| (g - w).abs()).fold(0f32, f32::max);
        println!("{}: off by {off:e} at most, of numbers of {size:e}", dtype.name());
        let share = if dtype == DType::F16 { 0.02 } else { 0.15 };
        assert_near(dtype.name(), 3584, &got, &want, |_| share * size);
    }
}

#[test]
fn a_tower_refuses_more_patches_than_it_has_room_for() {
    let Some(gpu) = gpu(DType::F16, 64) else { return };
    let mut tower = Tower::load(&gpu, &whole(DType::F16)[0]).unwrap();
    let error = tower.set(&gpu, &[Grid { t: 1, h: 20, w: 22 }]).unwrap_err().to_string();
    assert_eq!(error, "request: 440 patches where there is room for 400");
    assert!(gpu.rows_room(400) >= 400);
}

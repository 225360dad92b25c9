//! The vision tower: transformers' tokens, whatever the company, the cut into parts, the threads and the instruction set.

mod common;

use std::{fs, ops::Range, path::Path, sync::Arc};

use common::{
    data,
    tower::{FOLDER, Parts, golden, patches},
};
use pipeline_infer::{
    backend::{
        Backend, DType,
        cpu::{Cpu, Simd},
        vision::{PatchShape, Pixels, Places, VisionOps},
    },
    grid::Grid,
    model::{
        vision::{Tower, TowerConfig},
        weights::Weights,
    },
    vision::{Preprocessor, Rgb, Size},
};

fn config(folder: &Path, blocks: Range<usize>) -> TowerConfig {
    common::tower::config(folder, blocks, DType::F16)
}

/// The tokens of images that go through the parts in turn.
fn run(cpu: &Cpu, folder: &Path, parts: &[Range<usize>], grids: &[Grid], patches: &[f32]) -> Vec<f32> {
    let configs: Vec<TowerConfig> = parts.iter().map(|part| config(folder, part.clone())).collect();
    Parts::load(cpu, &configs).run(grids, patches)
}

fn whole(cpu: &Cpu, grids: &[Grid], patches: &[f32]) -> Vec<f32> {
    run(cpu, &data(FOLDER), std::slice::from_ref(&(0..3)), grids, patches)
}

#[test]
fn tokens_are_those_of_transformers() {
    let (grids, expected) = golden();
    let tokens = whole(&Cpu::new(Some(2)), &grids, &patches(&grids));
    assert_eq!(tokens.len(), expected.len());
    // The largest is 19, and transformers' own f32 differs from f64 by 2e-5.
    for (i, (ours, theirs)) in tokens.iter().zip(&expected).enumerate() {
        assert!((ours - theirs).abs() <= 1e-4, "number {i} is {ours}, not {theirs}");
    }
}

#[test]
fn company_threads_and_instructions_change_no_bit() {
    let (grids, _) = golden();
    let patches = patches(&grids);
    let together = whole(&Cpu::new(Some(1)), &grids, &patches);
    for simd in Simd::ALL.into_iter().filter(|s| s.available()) {
        let cpu = Cpu::with_simd(Some(3), simd).unwrap();
        assert_eq!(whole(&cpu, &grids, &patches), together, "{}", simd.name());
    }
    let (cpu, mut rest, mut alone) = (Cpu::new(Some(2)), &patches[..], Vec::new());
    for grid in grids {
        let (own, after) = rest.split_at(1176 * grid.patches());
        alone.extend(whole(&cpu, &[grid], own));
        rest = after;
    }
    assert_eq!(alone, together);
}

#[test]
fn parts_of_a_tower_are_the_whole() {
    let (grids, _) = golden();
    let (cpu, patches) = (Cpu::new(Some(2)), patches(&grids));
    let together = whole(&cpu, &grids, &patches);
    for parts in [vec![0..1, 1..3], vec![0..2, 2..3], vec![0..1, 1..2, 2..3]] {
        assert_eq!(run(&cpu, &data(FOLDER), &parts, &grids, &patches), together, "{parts:?}");
    }
}

/// Frames of whole cells with pixels of all levels.
fn frames(count: usize, width: u32, height: u32) -> Vec<Rgb> {
    let bytes = 3 * width as usize * height as usize;
    let frame = |f: usize| (0..bytes).map(|i| (i * 37 + i / 251 * 11 + 101 * f) as u8).collect();
    (0..count).map(|f| Rgb { size: Size { width, height }, data: frame(f) }).collect()
}

#[test]
fn pixels_are_cut_as_the_preprocessor_cuts_them() {
    let cut = Preprocessor::usual().image.cut;
    let levels = cut.levels();
    let media = [frames(1, 28, 56), frames(1, 252, 140), frames(3, 84, 56), frames(4, 56, 56)];
    let patches: Vec<_> = media.iter().map(|frames| cut.cut(frames)).collect();
    let grids: Vec<Grid> = patches.iter().map(|patches| patches.grid).collect();
    let data: Vec<Vec<Vec<u8>>> =
        media.iter().map(|frames| frames.iter().map(|frame| frame.data.clone()).collect()).collect();
    let pixels: Vec<Pixels> = grids
        .iter()
        .zip(&data)
        .map(|(grid, frames)| Pixels { grid: *grid, frames, levels: &levels })
        .collect();
    let (all, cpu) = (patches.iter().flat_map(|p| p.rows.clone()).collect::<Vec<f32>>(), Cpu::new(Some(2)));
    // The tower's own order of cells.
    let places = Places::new(&grids, 2, 4);
    let cell = 4 * cut.row_len();
    let want: Vec<f32> =
        places.cells.iter().flat_map(|&i| all[i as usize * cell..][..cell].to_vec()).collect();
    let mut images = cpu.images(places.rows.len(), &[1.0]).unwrap();
    cpu.set_images(&mut images, &places).unwrap();
    let shape = PatchShape { side: 14, frames: 2, merge: 2 };
    let mut cutter = cpu.cutter(places.rows.len(), shape).unwrap();
    let mut out = cpu.working_buf(want.len()).unwrap();
    cpu.cut(&mut out, &mut cutter, &images, &pixels).unwrap();
    let mut got = vec![0.0; want.len()];
    cpu.read(&mut got, &out).unwrap();
    assert!(got == want);
}

#[test]
fn both_spellings_of_the_tensors_are_read() {
    let (grids, _) = golden();
    let (cpu, patches) = (Cpu::new(Some(2)), patches(&grids));
    let bytes = fs::read(data(FOLDER).join("model.safetensors")).unwrap();
    let (len, rest) = bytes.split_at(8);
    let (header, numbers) = rest.split_at(u64::from_le_bytes(len.try_into().unwrap()) as usize);
    let header = String::from_utf8(header.to_vec()).unwrap().replace("\"visual.", "\"model.visual.");
    let folder = tempfile::tempdir().unwrap();
    let renamed = [&(header.len() as u64).to_le_bytes(), header.as_bytes(), numbers].concat();
    fs::write(folder.path().join("model.safetensors"), renamed).unwrap();
    assert_eq!(
        run(&cpu, folder.path(), std::slice::from_ref(&(0..3)), &grids, &patches),
        whole(&cpu, &grids, &patches)
    );
}

#[test]
fn more_patches_than_there_is_room_for_are_refused() {
    let cpu = Cpu::new(Some(1));
    let mut tower = Tower::load(&cpu, &config(&data(FOLDER), 0..3)).unwrap();
    let error = tower.set(&cpu, &[Grid { t: 1, h: 20, w: 22 }]).unwrap_err().to_string();
    assert_eq!(error, "request: 440 patches where there is room for 400");
}

#[test]
fn random_weights_make_a_tower_too() {
    let cpu = Cpu::new(Some(2));
    let weights = Arc::new(Weights::dummy(DType::BF16, 1));
    let config = TowerConfig { weights, dtype: DType::BF16, ..config(&data(FOLDER), 0..3) };
    let mut tower = Tower::load(&cpu, &config).unwrap();
    let grids = [Grid { t: 1, h: 4, w: 4 }];
    tower.set(&cpu, &grids).unwrap();
    tower.write_patches(&cpu, &patches(&grids)).unwrap();
    tower.forward(&cpu).unwrap();
    let mut tokens = vec![0.0; 4 * 24];
    cpu.read(&mut tokens, tower.tokens()).unwrap();
    assert!(tokens.iter().all(|t| t.is_finite()) && tokens.iter().any(|t| *t != 0.0));
}

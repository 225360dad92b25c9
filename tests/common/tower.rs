//! The small tower of tests/data, on any device.

use std::{fs, ops::Range, path::Path, sync::Arc};

use pipeline_infer::{
    backend::{DType, vision::VisionOps},
    grid::Grid,
    model::{
        config::Config,
        vision::{Tower, TowerConfig, VisionSpec},
        weights::Weights,
    },
};
use serde_json::Value;

use super::data;

pub(crate) const FOLDER: &str = "vision-tower";
/// Numbers of a patch's state, and of a token.
const DIM: usize = 32;
pub(crate) const OUT: usize = 24;

/// Some of its blocks, of the tensors in a folder.
pub(crate) fn config(folder: &Path, blocks: Range<usize>, dtype: DType) -> TowerConfig {
    let spec = VisionSpec::read(&Config::read(&data(FOLDER)).unwrap()).unwrap();
    let weights = Weights::open(folder).unwrap();
    TowerConfig { spec: spec.into(), weights: Arc::new(weights), blocks, dtype, rows_max: 400 }
}

/// The images of the golden, and their tokens.
pub(crate) fn golden() -> (Vec<Grid>, Vec<f32>) {
    let value: Value = serde_json::from_slice(&fs::read(data(FOLDER).join("tower.json")).unwrap()).unwrap();
    let grids: Vec<[u32; 3]> = serde_json::from_value(value["grids"].clone()).unwrap();
    let tokens = fs::read(data(FOLDER).join("tokens.f32")).unwrap();
    let number = |bytes: &[u8]| f32::from_le_bytes(bytes.try_into().unwrap());
    (grids.into_iter().map(|[t, h, w]| Grid { t, h, w }).collect(), tokens.chunks(4).map(number).collect())
}

/// The patches of all images of the golden.
pub(crate) fn patches(grids: &[Grid]) -> Vec<f32> {
    let len = 1176 * grids.iter().map(|g| g.patches()).sum::<usize>();
    (0..len).map(|i| (i * 7919 % 1009) as f32 / 1009.0 * 4.0 - 2.0).collect()
}

/// A tower's blocks, loaded in parts that images go through in turn.
pub(crate) struct Parts<'a, B: VisionOps> {
    backend: &'a B,
    towers: Vec<Tower<B>>,
}

impl<'a, B: VisionOps> Parts<'a, B> {
    pub(crate) fn load(backend: &'a B, configs: &[TowerConfig]) -> Self {
        let towers = configs.iter().map(|config| Tower::load(backend, config).unwrap()).collect();
        Parts { backend, towers }
    }

    /// The tokens of images.
    pub(crate) fn run(&mut self, grids: &[Grid], patches: &[f32]) -> Vec<f32> {
        let mut hidden = vec![0.0; DIM * patches.len() / 1176];
        for (i, tower) in self.towers.iter_mut().enumerate() {
            tower.set(self.backend, grids).unwrap();
            match i {
                0 => tower.write_patches(self.backend, patches).unwrap(),
                _ => self.backend.write(tower.hidden(), &hidden).unwrap(),
            }
            tower.forward(self.backend).unwrap();
            self.backend.read(&mut hidden, tower.hidden()).unwrap();
        }
        let mut tokens = vec![0.0; OUT * grids.iter().map(|g| g.tokens(2)).sum::<usize>()];
        self.backend.read(&mut tokens, self.towers.last().unwrap().tokens()).unwrap();
        tokens
    }
}

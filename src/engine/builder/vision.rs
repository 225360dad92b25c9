//! What an engine is made from that reads images.

use std::{collections::BTreeSet, sync::Arc};

use super::{EngineBuilder, within};
use crate::{
    backend::DType,
    engine::{
        images::{Images, Room},
        vision::VisionConfig,
    },
    error::Result,
    layout::{Device, Layout, VisionStage},
    model::{spec::ModelSpec, weights::Weights},
    schedule::ImageConfig,
    vision::Size,
};

/// Patches of a pass of the vision tower: a single image, or a video, may have so many.
const PATCHES_MAX: usize = 32_768;
/// The same, for several images: more of them gain nothing, and the first would wait for the last.
const PATCHES_TOGETHER: usize = 8192;
/// Rows of the image store, and the fewest that an image of all patches needs.
const IMAGE_ROWS: usize = 16_384;
const PATCHES_FLAG_MAX: usize = 1 << 20;
const IMAGE_ROWS_FLAG_MAX: usize = 1 << 24;
/// Passes that have room at each boundary of the tower.
const PASSES_AT_BOUNDARY: usize = 2;

impl EngineBuilder {
    /// How many pixels an image, or a frame of a video, may have once it is resized: at least, and at most. Default: what the
    /// model's folder says.
    pub fn pixels(mut self, min: Option<u64>, max: Option<u64>) -> Self {
        self.pixels = (min, max);
        self
    }

    /// Patches of an image or a video at most, which buffers of the vision tower are made for. Default: 32,768.
    pub fn image_patches(mut self, patches: usize) -> Self {
        self.image_patches = Some(patches);
        self
    }

    /// Tokens of images that are kept beside the embedding, for prompts that wait and for images that come again.
    /// Default: 16,384.
    pub fn image_rows(mut self, rows: usize) -> Self {
        self.image_rows = Some(rows);
        self
    }

    /// Images of a usual request, and their pixels across and down: the vision tower is put where they, and the tokens that
    /// [`expect`](Self::expect) says, keep all GPUs equally busy. Default: one of 1024x1024.
    pub fn expect_images(mut self, images: usize, width: u32, height: u32) -> Self {
        self.expected_images = Some((images, Size { width, height }));
        self
    }

    pub(super) fn check_image_room(&self) -> Result<()> {
        within("--image-patches", self.image_patches, PATCHES_FLAG_MAX)?;
        within("--image-rows", self.image_rows, IMAGE_ROWS_FLAG_MAX)
    }

    /// The vision tower, and how much room it has; `None` for a model without one.
    pub(super) fn plan_vision(
        &self,
        layout: &Layout,
        spec: &ModelSpec,
        (weights, dtype): (&Arc<Weights>, DType),
    ) -> Result<Option<VisionConfig>> {
        let (Some(tower), Some(read)) = (&spec.vision, self.open_images(spec)?) else { return Ok(None) };
        let stages = layout.tower(Some(tower.full.len()))?;
        let room = self.image_room();
        Ok(Some(VisionConfig {
            // A pass for each stage, and one whose patches are cut, or whose tokens are on their way.
            passes: stages.len() + 1,
            depth: PASSES_AT_BOUNDARY,
            metrics: stages.iter().map(|_| Arc::default()).collect(),
            stages,
            spec: tower.clone(),
            weights: weights.clone(),
            dtype,
            patches_max: room.patches.next_multiple_of(tower.cell_rows()),
            rows: room.rows,
            preprocessor: read.preprocessor,
        }))
    }

    /// What is to be known of images in requests; `None` for a model that reads none.
    pub(super) fn open_images(&self, spec: &ModelSpec) -> Result<Option<Images>> {
        let Some(mut read) = Images::open(&self.model, spec, self.image_room())? else { return Ok(None) };
        let (min, max) = self.pixels;
        read.preprocessor = read.preprocessor.with_pixels(min, max)?;
        Ok(Some(read))
    }

    fn image_room(&self) -> Room {
        Room {
            patches: self.image_patches.unwrap_or(PATCHES_MAX),
            rows: self.image_rows.unwrap_or(IMAGE_ROWS),
        }
    }
}

/// The layout with the tower's stages. Where nothing is said it goes where the embedding is, or in equal parts over the
/// GPUs, which are equally busy without it.
pub(in crate::engine) fn place_tower(layout: Layout, spec: &ModelSpec) -> Result<Layout> {
    let depth = spec.vision.as_ref().map(|vision| vision.full.len());
    let gpus: BTreeSet<usize> = layout.stages().iter().filter_map(|stage| gpu(stage.device)).collect();
    let stages = match depth {
        Some(depth) if layout.vision().is_empty() && gpus.len() > 1 => {
            let cuts = Layout::even(gpus.len().min(depth), depth, Device::Cpu)?;
            let on = gpus.into_iter().map(Device::Cuda);
            on.zip(cuts.stages()).map(|(device, cut)| (device, cut.layers.clone())).collect()
        }
        _ => layout.tower(depth)?,
    };
    let stage = |(device, blocks)| VisionStage { device, blocks: Some(blocks) };
    layout.with_vision(stages.into_iter().map(stage).collect())
}

impl VisionConfig {
    /// The same tower in another layout. Metrics of stages that there have been go on counting.
    pub(in crate::engine) fn in_layout(&self, layout: &Layout) -> Result<VisionConfig> {
        let stages = layout.tower(Some(self.spec.full.len()))?;
        let mut metrics = self.metrics.clone();
        metrics.resize_with(stages.len(), Arc::default);
        Ok(VisionConfig { passes: stages.len() + 1, stages, metrics, ..self.clone() })
    }

    /// How the scheduler goes about it.
    pub(in crate::engine) fn scheduling(&self) -> ImageConfig {
        let patches = self.patches_max.min(PATCHES_TOGETHER);
        ImageConfig { rows: self.rows, patches, passes: self.passes }
    }
}

fn gpu(device: Device) -> Option<usize> {
    match device {
        Device::Cpu => None,
        Device::Cuda(i) => Some(i),
    }
}

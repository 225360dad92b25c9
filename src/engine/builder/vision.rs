//! What an engine is made from that reads images.

use std::{collections::BTreeSet, sync::Arc};

use super::{EngineBuilder, within};
use crate::{
    backend::DType,
    engine::{
        images::{Images, Room},
        meter::Meter,
        place::Sight,
        vision::{Extent, VisionConfig},
    },
    error::{Error, Result},
    layout::{Device, ImageLoad, Layout, VisionStage, tower::PATCHES_TOGETHER},
    model::{spec::ModelSpec, weights::Weights},
    schedule::ImageConfig,
    vision::Size,
};

const PATCHES_FLAG_MAX: usize = 1 << 20;
const IMAGE_ROWS_FLAG_MAX: usize = 1 << 24;

/// Puts the vision tower into layouts.
pub(in crate::engine) type Towers = dyn Fn(&Layout) -> Result<Layout> + Send + Sync;

impl EngineBuilder {
    /// How many pixels an image, or a frame of a video, may have once it is resized: at least, and at most. Default: what the
    /// model's folder says.
    pub fn pixels(mut self, min: Option<u64>, max: Option<u64>) -> Self {
        self.pixels = (min, max);
        self
    }

    /// Patches of an image or a video at most, which buffers of the vision tower are made for. Default: as many as the largest
    /// image has that the context has room for, and 32,768 at least.
    pub fn image_patches(mut self, patches: usize) -> Self {
        self.image_patches = Some(patches);
        self
    }

    /// Tokens of images that are kept beside the embedding, for prompts that wait and for images that come again.
    /// Default: as many as the largest image has that the context has room for, and 16,384 at least.
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
        (weights, dtype, meter): (&Arc<Weights>, DType, &Arc<Meter>),
    ) -> Result<Option<VisionConfig>> {
        let (Some(tower), Some(read)) = (&spec.vision, self.open_images(spec)?) else { return Ok(None) };
        let (stages, room) = (layout.tower(Some(tower.full.len()))?, read.room);
        Ok(Some(VisionConfig {
            // A pass for each stage, and one whose patches are cut, or whose tokens are on their way.
            passes: stages.len() + 1,
            metrics: stages.iter().map(|_| Arc::default()).collect(),
            stages,
            spec: tower.clone(),
            weights: weights.clone(),
            dtype,
            patches_max: room.patches.next_multiple_of(tower.cell_rows()),
            rows: room.rows,
            preprocessor: read.preprocessor,
            meter: meter.clone(),
        }))
    }

    /// What is to be known of images in requests; `None` for a model that reads none.
    pub(super) fn open_images(&self, spec: &ModelSpec) -> Result<Option<Images>> {
        let Some(mut read) = Images::open(&self.model, spec)? else { return Ok(None) };
        let (min, max) = self.pixels;
        read.preprocessor = read.preprocessor.with_pixels(min, max)?;
        let usual = Room::of(&read.preprocessor.image, self.plan_context(spec)?);
        read.room = Room {
            patches: self.image_patches.unwrap_or(usual.patches),
            rows: self.image_rows.unwrap_or(usual.rows),
        };
        Ok(Some(read))
    }

    /// What plans have to know of a tower; `None` for a model that reads no images.
    pub(super) fn sight(&self, spec: &ModelSpec, dtype: DType) -> Result<Option<Sight>> {
        let (Some(tower), Some(read)) = (&spec.vision, self.open_images(spec)?) else { return Ok(None) };
        let Room { patches, rows } = read.room;
        let extent = Extent { dtype, patches: patches.next_multiple_of(tower.cell_rows()), rows };
        let load = match self.expected_images {
            None => ImageLoad::usual(tower),
            Some((images, size)) => {
                let grid = read.preprocessor.image.grid(size).map_err(Error::Request)?;
                ImageLoad::new(tower, images, grid)
            }
        };
        Ok(Some(Sight { load, extent }))
    }

    /// How this engine's layouts get the tower: where nothing is said it goes where the embedding is, or, over several
    /// devices, where it makes the slowest of them as fast as can be.
    pub(super) fn towers(&self, spec: &Arc<ModelSpec>, dtype: DType, context: usize) -> Result<Arc<Towers>> {
        // What is wrong with what was asked for is said now.
        self.sight(spec, dtype)?;
        let (builder, spec) = (self.clone(), spec.clone());
        Ok(Arc::new(move |layout| {
            let depth = spec.vision.as_ref().map(|tower| tower.full.len());
            let devices: BTreeSet<Device> = layout.stages().iter().map(|stage| stage.device).collect();
            if depth.is_some() && layout.vision().is_empty() && devices.len() > 1 {
                return builder.unplaced(&spec, dtype, context)?.tower(layout);
            }
            let stage = |(device, blocks)| VisionStage { device, blocks: Some(blocks) };
            layout.clone().with_vision(layout.tower(depth)?.into_iter().map(stage).collect())
        }))
    }
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

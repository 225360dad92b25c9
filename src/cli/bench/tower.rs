//! What became of a workload's images: how many a second, what preparing them took, and how busy the vision tower was.

use serde::Serialize;

use super::{
    figures::Rate,
    limits::Shares,
    pictures::{Pictures, Prepared},
    session::{Measured, Run},
};
use crate::engine::StageStats;

/// Figures of images, in the order of the JSON object.
#[derive(Debug, Serialize)]
pub(super) struct ImageFigures {
    /// Of those that were asked for.
    pub(super) images_per_s: Rate,
    /// Milliseconds of a thread to decode and resize one; in the runs' time, unless they were prepared before.
    prepare_ms: f64,
    prepare_threads: usize,
    /// Of all its threads, if nothing else is to be done.
    prepare_images_per_s: f64,
    /// Images that have gone through the tower, and passes in which they did.
    encoded: u64,
    passes: u64,
    /// What the slowest of its stages allows: images a second, while it is busy.
    tower_images_per_s: Option<f64>,
    pub(super) stages: Vec<TowerStage>,
}

/// A stage of the tower, over all runs.
#[derive(Debug, Serialize)]
pub(super) struct TowerStage {
    pub(super) device: String,
    blocks: String,
    pub(super) weight_bytes: usize,
    /// All else that was taken of its GPU's memory.
    pub(super) buffer_bytes: Option<usize>,
    /// As of the decoder's stages.
    pub(super) device_bytes_peak: Option<usize>,
    /// Share of the runs' time.
    busy: f64,
    ms_per_image: Option<f64>,
    passes: u64,
    patches: u64,
    /// As of the decoder's stages.
    pub(super) of_limits: Option<Shares>,
}

impl ImageFigures {
    /// `limits` are shares of them, by stage.
    pub(super) fn of(
        pictures: &Pictures,
        requests: u32,
        (measured, limits): (&Measured, &dyn Fn(usize) -> Option<Shares>),
    ) -> ImageFigures {
        let Measured { runs, before, after, .. } = measured;
        let prepared = runs.iter().map(|run| run.prepared).fold(Prepared::default(), Prepared::and);
        let threads = prepared.threads / runs.len().max(1);
        let each_s = prepared.seconds / prepared.images.max(1) as f64;
        let count = |of: fn(&crate::schedule::ImageStats) -> u64| {
            let [was, is] = [before, after].map(|stats| stats.scheduler.images.as_ref().map_or(0, of));
            is - was
        };
        let encoded = count(|images| images.encoded);
        let seconds = runs.iter().map(|run| run.seconds).sum();
        let stage = |(i, (was, is))| TowerStage {
            of_limits: limits(i),
            ..TowerStage::of(was, is, (encoded, seconds))
        };
        let stages: Vec<TowerStage> =
            before.vision.iter().zip(&after.vision).enumerate().map(stage).collect();
        let slowest = stages.iter().filter_map(|stage| stage.ms_per_image).fold(0.0, f64::max);
        ImageFigures {
            images_per_s: Rate::of(images_of_run(pictures, requests), runs),
            prepare_ms: 1e3 * each_s,
            prepare_threads: threads,
            prepare_images_per_s: threads as f64 / each_s,
            encoded,
            passes: count(|images| images.passes),
            tower_images_per_s: (slowest > 0.0).then_some(1e3 / slowest),
            stages,
        }
    }

    /// Its stages, as a table.
    pub(super) fn rows(&self) -> Vec<Vec<String>> {
        let head = ["vision", "device", "blocks", "weights MB", "busy", "ms/image", "passes"];
        let mut rows = vec![head.map(String::from).to_vec()];
        for (i, stage) in self.stages.iter().enumerate() {
            rows.push(vec![
                i.to_string(),
                stage.device.clone(),
                stage.blocks.clone(),
                format!("{:.1}", stage.weight_bytes as f64 / 1e6),
                format!("{:.0}%", 100.0 * stage.busy),
                stage.ms_per_image.map_or("-".into(), |ms| format!("{ms:.2}")),
                stage.passes.to_string(),
            ]);
        }
        rows
    }

    /// What there is to say of all of it.
    pub(super) fn sums(&self) -> Vec<Vec<String>> {
        let number = |number: f64| format!("{number:.1}");
        let sums = [
            ("images encoded", self.encoded.to_string()),
            ("images/s, slowest stage alone", self.tower_images_per_s.map_or("-".into(), number)),
            ("preparing, ms an image", number(self.prepare_ms)),
            (
                "preparing, images/s",
                format!("{:.1} ({} threads)", self.prepare_images_per_s, self.prepare_threads),
            ),
        ];
        sums.map(|(name, value)| vec![name.into(), value]).to_vec()
    }
}

impl TowerStage {
    fn of(was: &StageStats, is: &StageStats, (images, seconds): (u64, f64)) -> TowerStage {
        let busy = (is.times.busy - was.times.busy).as_secs_f64();
        TowerStage {
            device: is.device.clone(),
            blocks: is.layers.clone(),
            weight_bytes: is.weight_bytes,
            buffer_bytes: is.buffer_bytes(),
            device_bytes_peak: is.memory.map(|memory| memory.device),
            busy: busy / seconds,
            ms_per_image: (images > 0).then(|| 1e3 * busy / images as f64),
            passes: is.times.batches - was.times.batches,
            patches: is.times.rows - was.times.rows,
            of_limits: None,
        }
    }
}

/// Images that the requests of a run ask for.
pub(super) fn images_of_run(pictures: &Pictures, requests: u32) -> f64 {
    f64::from(pictures.per_request) * f64::from(requests)
}

/// The same a second.
pub(super) fn rate_of_run(pictures: Option<&Pictures>, requests: u32, run: &Run) -> Option<f64> {
    pictures.map(|pictures| images_of_run(pictures, requests) / run.seconds)
}

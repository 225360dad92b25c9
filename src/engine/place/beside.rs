//! Room for another layout beside the one that runs.

use super::{Room, Scratch, TowerScratch, Unplaced};
use crate::{
    backend::cuda,
    batch::KV_BLOCK,
    error::{Error, Result},
    layout::{Device, Layout},
    model::{units::Unit, vision::VisionUnit},
};

/// Of a GPU's free memory, what is left for the driver while stages are made ready beside those that run: their recorded
/// passes.
const RESERVE_BYTES: usize = 256 << 20;

/// Says how many bytes of a GPU's memory are free.
pub(in crate::engine) type Free = fn(usize) -> Result<usize>;

impl Unplaced<'_> {
    /// What stages take with room for a layer more, and for their buffers once more.
    pub(super) fn with_spare(&self, scratch: Scratch) -> Scratch {
        let Scratch { stage, head, aside, layer, tower } = scratch;
        let (one, tokens) = (Unit::Layer(0), self.kv_tokens.unwrap_or_default());
        let pages = tokens.saturating_mul(one.kv_bytes_per_token(self.spec, self.dtype));
        let more = one.weight_bytes(self.spec, self.dtype).saturating_add(pages);
        // The tower comes as a whole before the one that runs goes.
        let block = match &self.spec.vision {
            Some(spec) => VisionUnit::Block(0).weight_bytes(spec, self.dtype),
            None => 0,
        };
        let tower =
            TowerScratch { stage: 2 * tower.stage, block: 2 * tower.block + block, store: 2 * tower.store };
        let stage = (2 * stage + layer).saturating_add(more);
        Scratch { stage, head: 2 * head, aside: 2 * aside, layer, tower }
    }
}

impl Room<'_> {
    /// Of the vision tower and the image store.
    pub(super) fn vision_bytes(&self, device: Device) -> usize {
        self.vision.get(&device).copied().unwrap_or(0)
    }

    /// What a GPU keeps for a relayout: the buffers of these stages once more, those of the vision tower, and a layer's
    /// weights; its pages are counted with the others.
    pub(super) fn spare_bytes(&self, gpu: usize, stages: &[usize]) -> usize {
        let layer = Unit::Layer(0).tensor_sizes(self.spec, self.dtype);
        let layer: usize = layer.into_iter().map(cuda::allocated).sum();
        let working: usize = stages.iter().map(|&i| self.working(i)).sum();
        working + self.vision_bytes(Device::Cuda(gpu)) + layer + cuda::kv_waste(1)
    }

    /// An error if stages of this layout have no room beside those of `now`, whose units stay where they are on the same
    /// device. The others come, and go from where they are only when all have come. `free`: what the driver says.
    pub(in crate::engine) fn check_beside(&self, now: &Room<'_>, blocks: usize, free: Free) -> Result<()> {
        let layer_kv = blocks * KV_BLOCK * self.spec.kv_bytes_per_token(self.dtype);
        for (device, stages) in self.by_device() {
            let Some(gpu) = device else { continue };
            let come = self.come(now.layout, gpu, &stages);
            let bytes = |unit: &Unit| {
                let sizes = unit.tensor_sizes(self.spec, self.dtype).into_iter();
                let pages = if let Unit::Layer(_) = unit { layer_kv + cuda::kv_waste(1) } else { 0 };
                sizes.map(cuda::allocated).sum::<usize>() + pages
            };
            let working: usize = stages.iter().map(|&i| self.working(i)).sum();
            let need = working
                + self.vision_bytes(Device::Cuda(gpu))
                + come.iter().map(bytes).sum::<usize>()
                + RESERVE_BYTES;
            let limit = self.memory.of(Device::Cuda(gpu), usize::MAX);
            let free = free(gpu)?.min(limit.saturating_sub(now.taken(gpu, layer_kv)));
            if need > free {
                let (need, free, units) = (need >> 20, free >> 20, come.len());
                let why = format!(
                    "bringing {units} units there needs {need} MiB of its memory for a while, and {free} MiB may be taken"
                );
                return Err(Error::Device { device: format!("cuda:{gpu}"), why });
            }
        }
        Ok(())
    }

    /// Units of these stages that are not on this GPU yet.
    fn come(&self, now: &Layout, gpu: usize, stages: &[usize]) -> Vec<Unit> {
        let here = |unit: &Unit| {
            let on = |i: &usize| now.stages()[*i].device == Device::Cuda(gpu);
            (0..now.stages().len()).filter(on).any(|i| now.units(i, self.spec).contains(unit))
        };
        let of = |&i: &usize| self.layout.units(i, self.spec);
        stages.iter().flat_map(of).filter(|unit| !here(unit)).collect()
    }

    /// What stages have taken of a GPU, with so many bytes for a layer's pages.
    fn taken(&self, gpu: usize, layer_kv: usize) -> usize {
        let by_device = self.by_device();
        let Some(stages) = by_device.get(&Some(gpu)) else { return 0 };
        let of = |&i: &usize| self.bytes(i) + self.layout.stages()[i].layers.len() * layer_kv;
        stages.iter().map(of).sum::<usize>() + self.vision_bytes(Device::Cuda(gpu))
    }
}

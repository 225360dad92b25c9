//! What the tower takes of devices' memory.

use std::{collections::BTreeMap, ops::Range};

use super::VisionConfig;
use crate::{
    backend::{DType, cuda},
    engine::images::Room,
    layout::{Device, tower::TowerScratch},
    model::vision::{TowerConfig, VisionSpec, vision_buffer_sizes, vision_units},
    transport::ring_bytes,
};

/// Passes that have room at each boundary of the tower.
pub(in crate::engine) const PASSES_AT_BOUNDARY: usize = 2;

/// Bytes of the weights of a part of the tower.
pub(super) fn weight_bytes(tower: &TowerConfig) -> usize {
    let units = vision_units(&tower.spec, &tower.blocks);
    units.into_iter().map(|unit| unit.weight_bytes(&tower.spec, tower.dtype)).sum()
}

/// How large a tower's passes and its store are: what its memory follows from.
#[derive(Debug, Clone, Copy)]
pub(in crate::engine) struct Extent {
    pub(in crate::engine) dtype: DType,
    /// Patches of a pass.
    pub(in crate::engine) patches: usize,
    /// Rows of the store.
    pub(in crate::engine) rows: usize,
}

impl Extent {
    /// Unless somebody asks for another.
    pub(in crate::engine) fn usual(dtype: DType) -> Extent {
        let Room { patches, rows } = Room::default();
        Extent { dtype, patches, rows }
    }
}

impl VisionConfig {
    /// What a part of the tower is loaded from.
    pub(super) fn part(&self, blocks: Range<usize>) -> TowerConfig {
        TowerConfig {
            spec: self.spec.clone(),
            weights: self.weights.clone(),
            blocks,
            dtype: self.dtype,
            rows_max: self.patches_max,
        }
    }

    /// Bytes that stages, and the store beside the embedding on `first`, take of each device, at most.
    pub(in crate::engine) fn bytes(&self, first: Device) -> BTreeMap<Device, usize> {
        let extent = Extent { dtype: self.dtype, patches: self.patches_max, rows: self.rows };
        let mut by = BTreeMap::new();
        for (i, (device, blocks)) in self.stages.iter().enumerate() {
            let of = On { gpu: *device != Device::Cpu, spec: &self.spec, extent };
            *by.entry(*device).or_insert(0) += of.weights(blocks) + of.working(blocks, i > 0);
        }
        *by.entry(first).or_insert(0) += On { gpu: first != Device::Cpu, spec: &self.spec, extent }.store();
        by
    }
}

/// What plans think that a tower takes beside weights, on GPUs or on a processor: as much as any of its stages.
pub(in crate::engine) fn tower_scratch(spec: &VisionSpec, extent: Extent, gpu: bool) -> TowerScratch {
    let (on, all) = (On { gpu, spec, extent }, 0..spec.full.len());
    let plain: usize =
        vision_units(spec, &all).into_iter().map(|unit| unit.weight_bytes(spec, extent.dtype)).sum();
    TowerScratch {
        stage: on.working(&all, true),
        block: on.weights(&all).saturating_sub(plain).div_ceil(all.len().max(1)),
        store: on.store(),
    }
}

/// A tower on a kind of device.
struct On<'a> {
    gpu: bool,
    spec: &'a VisionSpec,
    extent: Extent,
}

impl On<'_> {
    /// Of an allocation.
    fn allocated(&self, bytes: usize) -> usize {
        if self.gpu { cuda::allocated(bytes) } else { bytes }
    }

    /// Numbers that rows of `ffn` are made longer to.
    fn width(&self) -> usize {
        if self.gpu { cuda::row_width(self.spec.ffn, self.extent.dtype) } else { self.spec.ffn }
    }

    /// Weights of such a run, wider where rows are.
    fn weights(&self, blocks: &Range<usize>) -> usize {
        let wide = VisionSpec { ffn: self.width(), ..self.spec.clone() };
        let units = vision_units(&wide, blocks).into_iter();
        let sizes = units.flat_map(|unit| unit.tensor_sizes(&wide, self.extent.dtype));
        sizes.map(|bytes| self.allocated(bytes)).sum()
    }

    /// Buffers of a stage with such a run, and what its view of a GPU takes by itself. `behind` another stage it has the
    /// boundary's, too.
    fn working(&self, blocks: &Range<usize>, behind: bool) -> usize {
        let (spec, patches) = (self.spec, self.extent.patches);
        // On the processor what matrix products read is f32.
        let (rows, dtype) = match self.gpu {
            true => (cuda::rows_room(patches), self.extent.dtype),
            false => (patches, DType::F32),
        };
        let mut sizes = vision_buffer_sizes(spec, dtype, blocks, (rows, self.width()));
        if behind {
            sizes.push(ring_bytes(PASSES_AT_BOUNDARY, patches * spec.dim));
        }
        let cutter = if blocks.start == 0 { cuda::cutter_bytes(patches, spec.patch_shape()) } else { 0 };
        let own = match self.gpu {
            true => cuda::tower_bytes(patches, spec.dim, spec.heads.head_dim) + cutter,
            false => 0,
        };
        sizes.into_iter().map(|bytes| self.allocated(bytes)).sum::<usize>() + own
    }

    /// The store, and what brings tokens there.
    fn store(&self) -> usize {
        let (spec, Extent { patches, rows, .. }) = (self.spec, self.extent);
        let (tokens, wide) = (patches / spec.cell_rows(), DType::F32.size());
        let ring = ring_bytes(PASSES_AT_BOUNDARY, tokens * spec.out);
        let sizes = [rows * spec.out * wide, tokens * spec.out * wide, ring];
        let own = if self.gpu { cuda::view_bytes() } else { 0 };
        sizes.into_iter().map(|bytes| self.allocated(bytes)).sum::<usize>() + own
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::{
        backend::{
            Backend,
            cuda::{Cuda, PipelineFacts},
        },
        model::{shapes, vision::Tower, weights::Weights},
    };

    fn of_7b() -> VisionSpec {
        (*shapes::find("vl-7b").unwrap().unwrap().vision.unwrap()).clone()
    }

    #[test]
    fn stages_take_no_more_than_plans_think() {
        let spec = of_7b();
        for dtype in [DType::BF16, DType::F32] {
            let extent = Extent::usual(dtype);
            for gpu in [true, false] {
                let (on, scratch) = (On { gpu, spec: &spec, extent }, tower_scratch(&spec, extent, gpu));
                let plain = |blocks: &Range<usize>| {
                    let units = vision_units(&spec, blocks).into_iter();
                    units.map(|unit| unit.weight_bytes(&spec, dtype)).sum::<usize>()
                };
                for blocks in [0..32, 0..9, 9..20, 31..32] {
                    let taken = on.weights(&blocks) + on.working(&blocks, blocks.start > 0);
                    let planned = plain(&blocks) + scratch.stage + (scratch.block + 1) * blocks.len();
                    // The merger's own waste is shared out over all blocks.
                    assert!(
                        taken <= planned + (8 << 20),
                        "{blocks:?} {dtype:?} {gpu}: {taken} and {planned}"
                    );
                }
                assert_eq!(scratch.store, on.store());
            }
        }
        // Beside 1.35 GB of weights.
        let scratch = tower_scratch(&spec, Extent::usual(DType::BF16), true);
        assert!((1_900_000_000..2_300_000_000).contains(&scratch.stage), "{scratch:?}");
        assert!((500_000_000..700_000_000).contains(&scratch.store), "{scratch:?}");
    }

    #[test]
    fn a_gpu_gives_what_was_said() {
        let of = PipelineFacts { dtype: DType::BF16, head_dim: 128, seats: 1, in_flight: 1 };
        let cuda = match cuda::devices().and_then(|_| Cuda::new(0, of)) {
            Ok(cuda) => cuda,
            Err(error) => return println!("SKIPPED: no GPU: {error}"),
        };
        let spec = VisionSpec { full: vec![false, true, false], ..of_7b() };
        let extent = Extent { dtype: DType::BF16, patches: 8192, rows: 4096 };
        let weights = Arc::new(Weights::dummy(DType::BF16, 1));
        let config = TowerConfig {
            spec: Arc::new(spec.clone()),
            weights,
            blocks: 0..3,
            dtype: DType::BF16,
            rows_max: extent.patches,
        };
        let mut tower = Tower::load(&cuda, &config).unwrap();
        tower.warm_up(&cuda, extent.patches).unwrap();
        cuda.loaded().unwrap();
        let on = On { gpu: true, spec: &spec, extent };
        let said = on.weights(&(0..3)) + on.working(&(0..3), false);
        let taken = cuda.memory().expect("a GPU tells").taken;
        println!("{taken} bytes are taken of {said}");
        // What is said has whole pages, and room for trying algorithms.
        assert!(taken <= said && said - taken < taken / 20 + (96 << 20), "{taken} of {said}");
    }
}

//! What the tower takes of GPUs.

use std::{collections::BTreeMap, ops::Range};

use super::VisionConfig;
use crate::{
    backend::{
        DType, Limits,
        cuda::{self, StageNeeds},
    },
    layout::Device,
    model::vision::{TowerConfig, vision_buffer_sizes, vision_units},
    transport::ring_bytes,
};

/// Bytes of the weights of a part of the tower.
pub(super) fn weight_bytes(tower: &TowerConfig) -> usize {
    let units = vision_units(&tower.spec, &tower.blocks);
    units.into_iter().map(|unit| unit.weight_bytes(&tower.spec, tower.dtype)).sum()
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

    /// Bytes that stages, and the store beside the embedding on `first`, take of each GPU, at most.
    pub(in crate::engine) fn gpu_bytes(&self, first: Device) -> BTreeMap<usize, usize> {
        let mut by = BTreeMap::new();
        for (i, (device, blocks)) in self.stages.iter().enumerate() {
            if let Device::Cuda(gpu) = device {
                *by.entry(*gpu).or_insert(0) += self.stage_bytes(i, blocks);
            }
        }
        if let Device::Cuda(gpu) = first {
            let (tokens, wide) = (self.patches_max / self.spec.cell_rows(), DType::F32.size());
            let rows = [self.rows, tokens].map(|rows| cuda::allocated(rows * self.spec.out * wide));
            let ring = cuda::allocated(ring_bytes(self.depth, tokens * self.spec.out));
            *by.entry(gpu).or_insert(0) += rows.iter().sum::<usize>() + ring + self.view_bytes(1);
        }
        by
    }

    fn stage_bytes(&self, i: usize, blocks: &Range<usize>) -> usize {
        let (spec, rows) = (&self.spec, cuda::rows_room(self.patches_max));
        // Rows between two products are made a little longer.
        let width = spec.ffn.next_multiple_of(16);
        let mut sizes = vision_buffer_sizes(spec, self.dtype, blocks, (rows, width));
        // Rotations and segments.
        sizes.extend([rows * spec.heads.head_dim * 4, rows * 16]);
        if i > 0 {
            sizes.push(ring_bytes(self.depth, self.patches_max * spec.dim));
        }
        let weights = weight_bytes(&self.part(blocks.clone()));
        // Vectors take a smallest part of memory each, and narrow matrices are made wider.
        weights + weights / 16 + sizes.into_iter().map(cuda::allocated).sum::<usize>() + self.view_bytes(rows)
    }

    /// What a view of a GPU takes by itself.
    fn view_bytes(&self, rows: usize) -> usize {
        let limits = Limits { rows_max: rows, seqs_max: 1, outputs_max: 1, context_max: 1 };
        let spec = &self.spec;
        cuda::stage_bytes(&StageNeeds { limits, dim: spec.dim, head_dim: spec.heads.head_dim, vocab: None })
    }
}

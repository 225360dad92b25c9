//! What the tower takes of GPUs.

use std::{collections::BTreeMap, ops::Range};

use super::VisionConfig;
use crate::{
    backend::{
        DType, Limits,
        cuda::{self, StageNeeds},
    },
    layout::Device,
    model::vision::TowerConfig,
    transport::ring_bytes,
};

/// Bytes of the weights of a part of the tower.
pub(super) fn weight_bytes(tower: &TowerConfig) -> usize {
    let (spec, blocks, wide) = (&tower.spec, &tower.blocks, DType::F32.size());
    let matrix = |n: usize, k: usize| n * k * tower.dtype.size() + n * wide;
    let (dim, ffn, cell) = (spec.dim, spec.ffn, spec.cell_rows() * spec.dim);
    let block =
        matrix(3 * dim, dim) + matrix(dim, dim) + matrix(2 * ffn, dim) + matrix(dim, ffn) + 2 * dim * wide;
    let embed = if blocks.start == 0 { dim * spec.patch_dim() * tower.dtype.size() } else { 0 };
    let merger = dim * wide + matrix(cell, cell) + matrix(spec.out, cell);
    blocks.len() * block + embed + if blocks.end == spec.full.len() { merger } else { 0 }
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
        let (spec, narrow, wide) = (&self.spec, self.dtype.size(), DType::F32.size());
        let (rows, last) = (cuda::rows_room(self.patches_max), i + 1 == self.stages.len());
        let cells = rows / spec.cell_rows();
        // Rows between two products are made a little longer.
        let ffn = spec.ffn.next_multiple_of(16);
        let working = [spec.dim, spec.heads.qkv_dim(), spec.dim, 2 * ffn, ffn];
        let mut sizes: Vec<usize> = working.iter().map(|dim| rows * dim * narrow).collect();
        // Rotations and segments beside the hidden rows.
        sizes.extend([rows * spec.dim * wide, rows * spec.heads.head_dim * 4, rows * 16]);
        match i {
            0 => sizes.push(rows * spec.patch_dim() * narrow),
            _ => sizes.push(ring_bytes(self.depth, self.patches_max * spec.dim)),
        }
        if last {
            sizes.extend([rows * spec.dim * narrow, cells * spec.out * wide, cells * spec.out * wide]);
        }
        let weights = weight_bytes(&self.part(blocks.clone()));
        // Vectors take a page of memory's smallest part each, and narrow matrices are made wider.
        weights + weights / 16 + sizes.into_iter().map(cuda::allocated).sum::<usize>() + self.view_bytes(rows)
    }

    /// What a view of a GPU takes by itself.
    fn view_bytes(&self, rows: usize) -> usize {
        let limits = Limits { rows_max: rows, seqs_max: 1, outputs_max: 1, context_max: 1 };
        let spec = &self.spec;
        cuda::stage_bytes(&StageNeeds { limits, dim: spec.dim, head_dim: spec.heads.head_dim, vocab: None })
    }
}

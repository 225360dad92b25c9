//! What a layout places of a vision tower: units, with their bytes, and with the work that a pass makes them do.

use std::ops::Range;

use super::VisionSpec;
use crate::{
    backend::DType,
    grid::{self, Grid},
    model::units::{Demand, Work},
};

/// A part of a tower that is on one device as a whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum VisionUnit {
    /// From pixels to rows; always before the first block.
    Patches,
    /// Attention and feed-forward part.
    Block(usize),
    /// From rows to tokens; always after the last block.
    Merger,
}

/// The images of a pass, as far as its cost goes.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct VisionPass {
    /// Patches.
    pub rows: usize,
    /// Pairs of a row and another of its window.
    pub window_pairs: f64,
    /// Pairs of a row and another of its frame.
    pub frame_pairs: f64,
}

impl VisionPass {
    /// A pass over these images and videos.
    pub fn new(spec: &VisionSpec, grids: &[Grid]) -> Self {
        let pairs = |ends: Vec<u32>| ends.windows(2).map(|e| f64::from(e[1] - e[0]).powi(2)).sum();
        VisionPass {
            rows: grids.iter().map(|grid| grid.patches()).sum(),
            window_pairs: pairs(grid::windows(grids, spec.merge as u32, spec.window as u32).ends),
            frame_pairs: pairs(grid::frames(grids)),
        }
    }
}

/// The units of a stage with these blocks, in order.
pub fn vision_units(spec: &VisionSpec, blocks: &Range<usize>) -> Vec<VisionUnit> {
    let mut units: Vec<VisionUnit> = blocks.clone().map(VisionUnit::Block).collect();
    if blocks.start == 0 {
        units.insert(0, VisionUnit::Patches);
    }
    if blocks.end == spec.full.len() {
        units.push(VisionUnit::Merger);
    }
    units
}

/// Bytes of each of a stage's buffers for so many patches, on a device that keeps what matrix products read as `dtype` and
/// rows of `ffn` numbers `width` wide.
pub fn vision_buffer_sizes(
    spec: &VisionSpec,
    dtype: DType,
    blocks: &Range<usize>,
    (rows, width): (usize, usize),
) -> Vec<usize> {
    let (dim, wide) = (spec.dim, DType::F32.size());
    let working = [dim, spec.heads.qkv_dim(), dim, 2 * width, width];
    let mut sizes = vec![rows * dim * wide];
    sizes.extend(working.map(|numbers| rows * numbers * dtype.size()));
    if blocks.start == 0 {
        sizes.push(rows * spec.patch_dim() * dtype.size());
    }
    if blocks.end == spec.full.len() {
        let cells = rows.div_ceil(spec.cell_rows());
        sizes.push(cells * spec.cell_rows() * dim * dtype.size());
        sizes.extend([cells * spec.out * wide; 2]);
    }
    sizes
}

impl VisionUnit {
    /// Bytes of each of its tensors, in the order in which they are loaded.
    pub fn tensor_sizes(self, spec: &VisionSpec, dtype: DType) -> Vec<usize> {
        let (dim, ffn, wide) = (spec.dim, spec.ffn, spec.cell_rows() * spec.dim);
        let vector = |n: usize| n * DType::F32.size();
        let matrix = |n: usize, k: usize| n * k * dtype.size() + vector(n);
        match self {
            // It has no bias.
            VisionUnit::Patches => vec![dim * spec.patch_dim() * dtype.size()],
            VisionUnit::Block(_) => vec![
                vector(dim),
                matrix(spec.heads.qkv_dim(), dim),
                matrix(dim, dim),
                vector(dim),
                matrix(2 * ffn, dim),
                matrix(dim, ffn),
            ],
            VisionUnit::Merger => vec![vector(dim), matrix(wide, wide), matrix(spec.out, wide)],
        }
    }

    /// Bytes of its weights.
    pub fn weight_bytes(self, spec: &VisionSpec, dtype: DType) -> usize {
        self.tensor_sizes(spec, dtype).into_iter().sum()
    }

    /// What it does in a pass.
    pub fn work(self, spec: &VisionSpec, dtype: DType, pass: VisionPass) -> Work {
        let (dim, ffn, size, wide) = (spec.dim, spec.ffn, dtype.size(), DType::F32.size());
        let cells = pass.rows / spec.cell_rows();
        let products = |rows: usize, numbers: usize| Demand {
            bytes: self.weight_bytes(spec, dtype) as f64,
            flops: 2.0 * rows as f64 * numbers as f64,
        };
        match self {
            VisionUnit::Patches => Work {
                rows: pass.rows,
                products: products(pass.rows, dim * spec.patch_dim()),
                other_bytes: (pass.rows * (spec.patch_dim() * size + dim * wide)) as f64,
                kernels: 1,
                ..Work::default()
            },
            VisionUnit::Block(i) => {
                let pairs = if spec.full[i] { pass.frame_pairs } else { pass.window_pairs };
                let qkv = spec.heads.qkv_dim();
                // Two norms from wide rows to narrow ones; the rotation in place; gates and ups to one.
                let other = 2 * dim * (wide + size) + (2 * qkv + 3 * ffn) * size;
                Work {
                    rows: pass.rows,
                    products: products(pass.rows, (qkv + dim) * dim + 3 * ffn * dim),
                    attention: Demand {
                        bytes: (pass.rows * (qkv + dim) * size) as f64,
                        flops: 4.0 * pairs * dim as f64,
                    },
                    other_bytes: (pass.rows * other) as f64,
                    kernels: 9,
                    ..Work::default()
                }
            }
            VisionUnit::Merger => {
                let merged = spec.cell_rows() * dim;
                let norm = pass.rows * dim * (wide + size);
                let gelu = 2 * cells * merged * size;
                Work {
                    rows: cells,
                    products: products(cells, merged * (merged + spec.out)),
                    other_bytes: (norm + gelu + 3 * cells * spec.out * wide) as f64,
                    kernels: 5,
                    ..Work::default()
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::shapes;

    fn of_7b() -> VisionSpec {
        (*shapes::find("vl-7b").unwrap().unwrap().vision.unwrap()).clone()
    }

    #[test]
    fn units_make_up_a_tower() {
        let spec = of_7b();
        let units: Vec<VisionUnit> =
            [0..9, 9..32].iter().flat_map(|blocks| vision_units(&spec, blocks)).collect();
        assert_eq!((units.len(), units[0], units[33]), (34, VisionUnit::Patches, VisionUnit::Merger));
        assert_eq!(units, vision_units(&spec, &(0..32)));
        let bytes = |dtype| units.iter().map(|unit| unit.weight_bytes(&spec, dtype)).sum::<usize>();
        // 676,550,144 is what transformers' num_parameters() says of the tower of Qwen2.5-VL-7B.
        assert_eq!(bytes(DType::F32), 4 * 676_550_144);
        assert_eq!(bytes(DType::BF16) >> 20, 1291);
    }

    #[test]
    fn work_follows_rows_and_segments() {
        let spec = of_7b();
        // 1024x1024 pixels, resized to 1036x1036.
        let pass = VisionPass::new(&spec, &[Grid { t: 1, h: 74, w: 74 }]);
        assert_eq!((pass.rows, pass.frame_pairs), (5476, 5476.0 * 5476.0));
        // 9 of 10 windows along a side have 8 patches, the last 2.
        assert_eq!(pass.window_pairs, (9.0 * 64.0 + 4.0) * (9.0 * 64.0 + 4.0));
        let flops = |unit: VisionUnit| {
            let work = unit.work(&spec, DType::BF16, pass);
            work.products.flops + work.attention.flops
        };
        let all: f64 = vision_units(&spec, &(0..32)).into_iter().map(flops).sum();
        assert!((all / 7.68e12 - 1.0).abs() < 0.01, "{all:e}");
        assert!(flops(VisionUnit::Block(7)) > 1.6 * flops(VisionUnit::Block(6)));
        let two = VisionPass::new(&spec, &[Grid { t: 2, h: 74, w: 74 }]);
        assert_eq!((two.rows, two.frame_pairs), (2 * pass.rows, 2.0 * pass.frame_pairs));
    }
}

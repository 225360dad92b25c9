//! Gates and ups for many rows: kernels/gate_up.cu, which needs no room for what cublasLt would leave in memory between.
#![allow(unsafe_code)]

use std::sync::Arc;

use cudarc::driver::sys::CUtensorMap;

use super::{
    Cuda, DeviceFacts, DevicePtr, Grid, Kernel, Loading, Matrix, blas::WORKSPACE_BYTES, gemm::Meeting,
    launch::args, tensor_map, variants::Variants,
};
use crate::error::Result;

/// As in gate_up.cu: threads of a block, rows and gates of a tile, and the shared memory of stages and of what comes out.
const THREADS: u32 = 384;
const ROWS: usize = 256;
const FEATURES: usize = 128;
const SHARED: u32 = 4 * (3 * 128 * 128) + 2 * (64 * 256) + 1024;
/// Barriers.
const FIXED_BYTES: u32 = 64;
/// Rows of x that are brought at once: a group's.
const X_TILE: u32 = 64;
/// Multiprocessors, a block for each, that there may be.
const BLOCKS_MAX: u32 = 256;
/// Bytes of a part that a block leaves.
const PART_BYTES: usize = ROWS / 2 * 2 * FEATURES * 4;
const _: () = assert!(BLOCKS_MAX as usize * PART_BYTES <= WORKSPACE_BYTES, "room for a part of each");
const _: () = assert!(2 * 4 * BLOCKS_MAX as usize <= super::gemm::LEFT_BYTES, "a number for each group");
/// Tiles below each other whose rows, with weights for as many tiles beside each other, stay in the second-level cache.
const BAND: usize = 8;
/// With so many rounds of whole tiles it is little that some have nothing to do in the last one.
const ROUNDS_WHOLE: usize = 8;

pub(super) struct Kernels {
    load: Loading,
    /// One; it is compiled when it is first used.
    compiled: Variants<(), Kernel>,
}

/// `Shape` in gate_up.cu.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq)]
struct Shape {
    rows: u32,
    n: u32,
    heights: u32,
    widths: u32,
    band: u32,
    steps: u32,
    whole: u32,
}

impl Kernels {
    pub(super) fn load(load: &Loading) -> Kernels {
        Kernels { load: load.clone(), compiled: Variants::default() }
    }

    /// Makes it, if nobody has yet.
    fn compiled(&self) -> Result<Arc<Kernel>> {
        self.compiled.get((), [], |()| {
            let module = self.load.module("gate_up.cu", &[("DTYPE", self.load.dtype())])?;
            let kernel = module.kernel("gate_up")?;
            kernel.allow_shared(SHARED)?;
            Ok(kernel)
        })
    }
}

/// Whether a GPU of the kernel's architecture has what it needs besides.
pub(super) fn fits(facts: &DeviceFacts) -> bool {
    (2..=BLOCKS_MAX).contains(&facts.multiprocessors) && facts.shared_per_block_max >= SHARED + FIXED_BYTES
}

/// Makes what it takes to launch it, as far as that can be said before.
pub(super) fn prepare(cuda: &Cuda, w: &Matrix) -> Result<()> {
    cuda.kernels.gate_up.compiled()?;
    weights_map(cuda, w).map(drop)
}

fn weights_map(cuda: &Cuda, w: &Matrix) -> Result<CUtensorMap> {
    tensor_map::of_rows(cuda, (w.weights(), w.dtype), (w.n, w.k), FEATURES as u32)
}

/// `out = silu(x · gatesᵀ) * (x · upsᵀ)`, where the rows of `w` are the gates', then the ups'.
pub(super) fn launch(cuda: &Cuda, out: DevicePtr, x: DevicePtr, w: &Matrix, rows: usize) -> Result<()> {
    let n = w.n / 2;
    let (grid, shape) = plan(cuda.facts, n, w.k, rows);
    let x = tensor_map::of_rows(cuda, (x, w.dtype), (rows, w.k), X_TILE)?;
    let weights = weights_map(cuda, w)?;
    let out = tensor_map::of_rows(cuda, (out, w.dtype), (rows, n), X_TILE)?;
    let meeting = Meeting::of(cuda);
    let kernel = cuda.kernels.gate_up.compiled()?;
    // SAFETY: (Map, Map, Map, Meeting, Shape) as in gate_up.cu; the caller has checked the buffers against rows, n and k, and they
    // belong to the decoder, as the matrix does; the workspace has a part for each block, and `left` a number for each of its groups.
    unsafe { cuda.launch(&kernel, grid, &mut args![x, weights, out, meeting, shape]) }
}

/// How `rows` rows of `n` numbers are divided, with so many columns.
fn plan(facts: &DeviceFacts, n: usize, k: usize, rows: usize) -> (Grid, Shape) {
    let (heights, widths) = (rows.div_ceil(ROWS), n.div_ceil(FEATURES));
    let (tiles, steps) = (heights * widths, k.div_ceil(tensor_map::COLUMNS));
    let clusters = (facts.multiprocessors as usize / 2).min(tiles * steps);
    let rounds = tiles / clusters;
    // What is dealt out is more than a tile for each, where there are so many: no tile is in more than two parts then.
    let even = tiles.is_multiple_of(clusters) || rounds >= ROUNDS_WHOLE;
    let whole = if even { tiles } else { rounds.saturating_sub(1) * clusters };
    let bands = ((heights + BAND / 2) / BAND).max(1);
    let grid = Grid { blocks: [2 * clusters as u32, 1, 1], threads: THREADS, shared: SHARED, cluster: 1 };
    let [rows, n, heights, widths, band, steps, whole] =
        [rows, n, heights, widths, heights.div_ceil(bands), steps, whole].map(|v| v as u32);
    (grid, Shape { rows, n, heights, widths, band, steps, whole })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// With so many multiprocessors.
    fn hopper(multiprocessors: u32) -> DeviceFacts {
        DeviceFacts { multiprocessors, ..DeviceFacts::h200() }
    }

    #[test]
    fn the_last_of_few_tiles_are_dealt_out() {
        let of = |n, k, rows| {
            let (grid, s) = plan(&hopper(132), n, k, rows);
            (grid.blocks[0], [s.heights, s.widths, s.band, s.steps, s.whole])
        };
        // 7b: 148 tiles for 66 clusters, then twice as many, then so many that it is not worth it.
        assert_eq!(of(18_944, 3584, 256), (132, [1, 148, 1, 56, 66]));
        assert_eq!(of(18_944, 3584, 300), (132, [2, 148, 2, 56, 198]));
        assert_eq!(of(18_944, 3584, 4096), (132, [16, 148, 8, 56, 16 * 148]));
        // Nine are not eight and one.
        assert_eq!(of(18_944, 3584, 2300).1[2], 9);
        assert_eq!(of(18_944, 3584, 12 * 256).1[2], 6);
        // Less than a tile for each; just one; fewer steps than clusters.
        assert_eq!(of(128, 8192, 256), (132, [1, 1, 1, 128, 0]));
        assert_eq!(of(66 * 128, 64, 256), (132, [1, 66, 1, 1, 66]));
        assert_eq!(of(8, 72, 129), (4, [1, 1, 1, 2, 0]));
    }

    /// Steps of tiles as gate_up.cu's `take` gives them to a cluster of so many: tile, first and number.
    fn agenda(s: &Shape, clusters: u32, cluster: u32) -> Vec<(u32, u32, u32)> {
        let dealt = u64::from(s.heights * s.widths - s.whole) * u64::from(s.steps);
        let start = |cluster| (dealt * u64::from(clusters - cluster) / u64::from(clusters)) as u32;
        let mut all: Vec<(u32, u32, u32)> = Vec::new();
        for whole in (cluster..s.whole).step_by(clusters as usize) {
            let round = whole / clusters;
            let full = (round + 1) * clusters <= s.whole;
            let tile = if full { round * clusters + (whole + round) % clusters } else { whole };
            all.push((tile, 0, s.steps));
        }
        let (mut at, end) = (start(cluster + 1), start(cluster));
        while at < end {
            let first = at % s.steps;
            let count = (s.steps - first).min(end - at);
            all.push((s.whole + at / s.steps, first, count));
            at += count;
        }
        all
    }

    /// And each place of `corner` is one tile's.
    #[test]
    fn every_step_of_every_tile_is_done_once() {
        for (n, k, rows) in
            [(18_944, 3584, 256), (18_944, 3584, 640), (1000, 896, 3300), (9520, 328, 300), (8, 72, 129)]
        {
            let (grid, s) = plan(&hopper(132), n, k, rows);
            let (clusters, tiles) = (grid.blocks[0] / 2, s.heights * s.widths);
            let mut done = vec![0; (tiles * s.steps) as usize];
            for cluster in 0..clusters {
                let all = agenda(&s, clusters, cluster);
                // A tile's end, which is left to a cluster with a higher number, comes before a beginning that waits for one.
                let parts: Vec<_> = all.iter().skip_while(|part| part.2 == s.steps).collect();
                assert!(parts.iter().skip(1).all(|part| part.1 == 0), "{s:?}: {all:?}");
                for (tile, first, count) in all {
                    (first..first + count).for_each(|step| done[(tile * s.steps + step) as usize] += 1);
                }
            }
            assert!(done.iter().all(|&n| n == 1), "{s:?}");
            let mut places: Vec<_> = (0..tiles)
                .map(|tile| {
                    let (band, within) = (tile / (s.band * s.widths), tile % (s.band * s.widths));
                    let heights = s.band.min(s.heights - band * s.band);
                    (band * s.band + within % heights, within / heights)
                })
                .collect();
            places.sort_unstable();
            let each = (0..s.heights).flat_map(|height| (0..s.widths).map(move |width| (height, width)));
            assert!(places.into_iter().eq(each), "{s:?}");
        }
    }

    /// What gate_up.cu relies on.
    #[test]
    fn every_cluster_has_steps() {
        for multiprocessors in [2, 78, 114, 131, 132, 256] {
            for n in (8..5000).step_by(136).chain([18_944, 29_568]) {
                for k in [8, 64, 72, 640, 3584, 29_568] {
                    for rows in [129, 256, 257, 640, 2048, 8192] {
                        let facts = hopper(multiprocessors);
                        let (grid, s) = plan(&facts, n, k, rows);
                        let what = format!("{n}x{k}, {rows} rows on {multiprocessors}: {grid:?} {s:?}");
                        let (clusters, tiles) = (grid.blocks[0] / 2, s.heights * s.widths);
                        assert!(clusters >= 1 && 2 * clusters <= multiprocessors, "{what}");
                        let dealt = tiles - s.whole;
                        assert!(dealt == 0 || dealt * s.steps >= clusters, "{what}");
                        // Dealt out beside whole ones, a tile is in two parts at most; and whole rounds are full ones.
                        assert!(s.whole == 0 || dealt == 0 || dealt >= clusters, "{what}");
                        assert!(dealt == 0 || s.whole.is_multiple_of(clusters), "{what}");
                        assert!((1..=s.heights).contains(&s.band) && s.band <= 3 * BAND as u32 / 2, "{what}");
                    }
                }
            }
        }
    }
}

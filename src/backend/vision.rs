//! The ops of a vision tower, beside those of a decoder.
//!
//! Rows are patches, those of a window together. Nothing is cached: a row attends to all rows of its segment.

use super::{Backend, HeadShape, Norm};
use crate::{
    error::Result,
    grid::{self, Ends, Grid},
};

/// Which rows attend to each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reach {
    /// Those of a window.
    Window,
    /// Those of a pair of frames: an image's all.
    Frame,
}

/// Attention without a mask.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SegmentAttention {
    /// The heads.
    pub heads: HeadShape,
    /// Multiplies the scores.
    pub scale: f32,
    /// Which rows are a segment.
    pub reach: Reach,
}

/// Where the rows of a pass come from, for all its images and videos.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Places {
    /// Place down and across of each row's patch.
    pub rows: Vec<[u32; 2]>,
    /// Segments of [`Reach::Window`].
    pub windows: Ends,
    /// Segments of [`Reach::Frame`].
    pub frames: Ends,
    /// Each cell of the rows' order, counted in the images' own order.
    pub cells: Vec<u32>,
    /// Patches of a cell.
    pub cell_rows: usize,
}

impl Places {
    /// The rows of these images, whose cells are `merge` patches wide and windows `side` cells.
    pub fn new(grids: &[Grid], merge: u32, side: u32) -> Places {
        let cell_rows = (merge * merge) as usize;
        let grid::Windows { cells, ends: windows } = grid::windows(grids, merge, side);
        let places = grid::patch_places(grids, merge);
        let of_cell = |&cell: &u32| &places[cell as usize * cell_rows..][..cell_rows];
        let rows = cells.iter().flat_map(of_cell).copied().collect();
        // Windows never reach over frames, so a frame's rows stay between the same ends.
        Places { rows, windows, frames: grid::frames(grids), cells, cell_rows }
    }

    /// The segments.
    pub fn ends(&self, reach: Reach) -> &[u32] {
        match reach {
            Reach::Window => &self.windows,
            Reach::Frame => &self.frames,
        }
    }
}

/// How large the patches of a tower are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PatchShape {
    /// Pixels along a side.
    pub side: usize,
    /// Frames.
    pub frames: usize,
    /// Patches along a cell's side.
    pub merge: usize,
}

impl PatchShape {
    /// Numbers of a patch.
    pub fn len(self) -> usize {
        3 * self.frames * self.side * self.side
    }

    /// Whether it has none.
    pub fn is_empty(self) -> bool {
        self.len() == 0
    }
}

/// What the 256 levels of each colour become.
pub type Levels = [[f32; 256]; 3];

/// Pixels of an image or of a video, on their way to patches.
#[derive(Debug, Clone, Copy)]
pub struct Pixels<'a> {
    /// How they are cut.
    pub grid: Grid,
    /// Three numbers a pixel, row by row, of each frame; the last one is repeated until all patches are full.
    pub frames: &'a [Vec<u8>],
    /// What they become.
    pub levels: &'a Levels,
}

/// Rows that go from one buffer to another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RowRun {
    /// The first of them where they come from.
    pub from: usize,
    /// The first of them where they go to.
    pub to: usize,
    /// How many.
    pub rows: usize,
    /// Numbers a row.
    pub dim: usize,
}

/// A device that a vision tower can run on.
///
/// What a tower shares with a decoder is in [`Backend`]: [`Backend::norm_linear`], [`Backend::norm_gate_up`] and
/// [`Backend::linear_add`], for any number of rows.
pub trait VisionOps: Backend {
    /// A pass's [`Places`] as the ops want them: rotations, segments.
    type Images: Send;
    /// Room for the pixels of a pass.
    type Cutter: Send;

    /// Numbers of rows for which the device compiles, chooses or loads something when it first sees them, up to so many, those
    /// first that take most time; none where there is nothing of the kind.
    fn rows_tried(&self, rows_max: usize) -> Vec<usize>;

    /// Makes room for the places of up to `rows_max` rows. `inv_freq` is what places are multiplied by for the rotation.
    fn images(&self, rows_max: usize, inv_freq: &[f32]) -> Result<Self::Images>;
    /// Brings places to the device.
    fn set_images(&self, images: &mut Self::Images, from: &Places) -> Result<()>;

    /// Makes room for the pixels of up to `rows_max` patches.
    fn cutter(&self, rows_max: usize, shape: PatchShape) -> Result<Self::Cutter>;
    /// Cuts the pixels of all images of a pass into patches, `out` being `[rows, shape.len()]` in the order of the rows.
    fn cut(
        &self,
        out: &mut Self::Buf,
        cutter: &mut Self::Cutter,
        images: &Self::Images,
        from: &[Pixels<'_>],
    ) -> Result<()>;

    /// How long rows of `len` numbers between two products should be made, with zeros, so that the products are quick.
    fn row_width(&self, len: usize) -> usize;
    /// `out = x · wᵀ + bias`, for `rows` rows, each as long as those of `w`.
    fn linear(&self, out: &mut Self::Buf, x: &Self::Buf, w: &Self::Matrix, rows: usize) -> Result<()>;
    /// `out = norm(x)`.
    fn norm(&self, out: &mut Self::Buf, x: &Self::Buf, norm: Norm<'_, Self>) -> Result<()>;
    /// `x = x / 2 * (1 + erf(x / √2))`, for the first `len` numbers.
    fn gelu(&self, x: &mut Self::Buf, len: usize) -> Result<()>;
    /// Rotates queries and keys in place, by halves: the first quarter of a head's numbers, with those half a head
    /// further on, by the place down, the second by the place across.
    fn rope_places(&self, qkv: &mut Self::Buf, images: &Self::Images, heads: HeadShape) -> Result<()>;
    /// Attention of each row to all rows of its segment; `out` is `[rows, heads * head_dim]`.
    fn segment_attention(
        &self,
        out: &mut Self::Buf,
        qkv: &Self::Buf,
        images: &Self::Images,
        shape: SegmentAttention,
    ) -> Result<()>;
    /// Puts rows of `dim` numbers, one a cell, back into the images' own order.
    fn scatter_cells(
        &self,
        out: &mut Self::Buf,
        x: &Self::Buf,
        images: &Self::Images,
        dim: usize,
    ) -> Result<()>;
    /// Copies f32 rows: finished tokens to their place in the image store.
    fn copy_rows(&self, to: &mut Self::Buf, from: &Self::Buf, run: RowRun) -> Result<()>;
}

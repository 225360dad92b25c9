//! Pixels to the rows of floats that the vision tower reads.

use super::decode::Rgb;
use crate::grid::Grid;

/// How pixels become rows, as preprocessor_config.json has it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Cut {
    /// Pixels along a patch's side.
    pub patch: u32,
    /// Frames in a patch.
    pub frames: u32,
    /// Patches along the side of a token's cell.
    pub merge: u32,
    /// What a level is multiplied by.
    pub rescale: f64,
    /// Then taken off, for each colour.
    pub mean: [f64; 3],
    /// Then divided by.
    pub std: [f64; 3],
}

/// An image or video as the vision tower reads it.
#[derive(Debug, Clone, PartialEq)]
pub struct Patches {
    /// How many there are.
    pub grid: Grid,
    /// A row of `3 * frames * patch * patch` for each patch, cell after cell.
    pub rows: Vec<f32>,
}

impl Cut {
    /// Sides of an image are multiples of this.
    pub fn factor(&self) -> u32 {
        self.patch * self.merge
    }

    /// Numbers in a row.
    pub fn row_len(&self) -> usize {
        3 * (self.frames * self.patch * self.patch) as usize
    }

    /// Cuts frames of one size; the last one is repeated until they fill their patches.
    pub fn cut(&self, frames: &[Rgb]) -> Patches {
        let Some(last) = frames.last() else { panic!("no frames; this is a bug") };
        let size = last.size;
        assert!(frames.iter().all(|f| f.size == size), "frames of one size; this is a bug");
        let (h, w) = (size.height / self.patch, size.width / self.patch);
        assert!(
            h > 0 && w > 0 && size.height % self.factor() == 0 && size.width % self.factor() == 0,
            "sides of whole cells; this is a bug"
        );
        let grid = Grid { t: (frames.len() as u32).div_ceil(self.frames), h, w };
        let levels = self.levels();
        let mut rows = vec![0.0; grid.patches() * self.row_len()];
        let frame_pixels = self.row_len() * (h * w) as usize;
        for (t, rows) in rows.chunks_exact_mut(frame_pixels).enumerate() {
            let frame = |i| frames.get(t * self.frames as usize + i).unwrap_or(last);
            let together: Vec<&Rgb> = (0..self.frames as usize).map(frame).collect();
            self.cut_together(&together, &levels, rows);
        }
        Patches { grid, rows }
    }

    /// Whether every level of every colour becomes a finite number.
    pub(super) fn levels_are_finite(&self) -> bool {
        self.levels().iter().flatten().all(|v| v.is_finite())
    }

    /// Each level's float for each colour, in the original's arithmetic.
    pub fn levels(&self) -> [[f32; 256]; 3] {
        let level = |c: usize, v: usize| {
            ((v as f64 * self.rescale) as f32 - self.mean[c] as f32) / self.std[c] as f32
        };
        [0, 1, 2].map(|c| std::array::from_fn(|v| level(c, v)))
    }

    /// The frames of one row of the grid's time.
    fn cut_together(&self, frames: &[&Rgb], levels: &[[f32; 256]; 3], rows: &mut [f32]) {
        let (merge, square) = (self.merge as usize, (self.patch * self.patch) as usize);
        let across = (frames[0].size.width / self.factor()) as usize;
        for (i, row) in rows.chunks_exact_mut(self.row_len()).enumerate() {
            let (cell, within) = (i / (merge * merge), i % (merge * merge));
            let top = (cell / across * merge + within / merge) * self.patch as usize;
            let left = (cell % across * merge + within % merge) * self.patch as usize;
            for (c, row) in row.chunks_exact_mut(square * frames.len()).enumerate() {
                for (f, frame) in frames.iter().enumerate() {
                    // An image is its own second frame.
                    if f > 0 && std::ptr::eq(*frame, frames[f - 1]) {
                        row.copy_within((f - 1) * square..f * square, f * square);
                        continue;
                    }
                    self.cut_one(frame, [top, left, c], &levels[c], &mut row[f * square..][..square]);
                }
            }
        }
    }

    /// A patch of one colour of one frame.
    fn cut_one(&self, frame: &Rgb, [top, left, c]: [usize; 3], levels: &[f32; 256], out: &mut [f32]) {
        let (patch, width) = (self.patch as usize, frame.size.width as usize);
        for (y, out) in out.chunks_exact_mut(patch).enumerate() {
            let from = &frame.data[3 * ((top + y) * width + left)..][..3 * patch];
            for (out, pixel) in out.iter_mut().zip(from.chunks_exact(3)) {
                *out = levels[usize::from(pixel[c])];
            }
        }
    }
}

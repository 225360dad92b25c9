//! How an image or a video is cut into patches, and the orders and positions that follow from it alone.
//!
//! A patch is a square of 14×14 pixels in two frames; squares of `merge`×`merge` patches, the *cells*, become one
//! token of the language model. Patches are in the order of their cells, and the four of a cell row by row.

use crate::error::{Error, Result};

/// The patches of an image (`t` = 1) or a video, counted in time, down and across.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize)]
pub struct Grid {
    /// Frames, in pairs.
    pub t: u32,
    /// Patches down.
    pub h: u32,
    /// Patches across.
    pub w: u32,
}

impl Grid {
    /// Rows of the vision tower's input.
    pub fn patches(self) -> usize {
        self.t as usize * self.h as usize * self.w as usize
    }

    /// Tokens of the language model, for cells of `merge`×`merge` patches.
    pub fn tokens(self, merge: u32) -> usize {
        let cells = self.cells(merge);
        cells.t as usize * cells.h as usize * cells.w as usize
    }

    /// The grid counted in cells.
    fn cells(self, merge: u32) -> Grid {
        assert!(
            merge > 0 && self.h.is_multiple_of(merge) && self.w.is_multiple_of(merge),
            "a grid of whole cells; this is a bug"
        );
        Grid { t: self.t, h: self.h / merge, w: self.w / merge }
    }
}

/// Rows that attend to each other, as ranges of rows: segment `i` is `ends[i]..ends[i + 1]`.
pub type Ends = Vec<u32>;

/// The order in which the tower takes the cells, so that those of a window stand together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Windows {
    /// For each place the cell that comes there, counted over all grids. The inverse puts the merger's rows back.
    pub cells: Vec<u32>,
    /// Where each window's patches begin, and where the last one ends.
    pub ends: Ends,
}

/// Windows of `side`×`side` cells, from the upper left of each frame; those at the edges are smaller.
pub fn windows(grids: &[Grid], merge: u32, side: u32) -> Windows {
    assert!(side > 0, "a window of no cells; this is a bug");
    let (mut cells, mut ends, mut first) = (Vec::new(), vec![0], 0);
    for grid in grids {
        let g = grid.cells(merge);
        for t in 0..g.t {
            for top in (0..g.h).step_by(side as usize) {
                for left in (0..g.w).step_by(side as usize) {
                    let (bottom, right) = (g.h.min(top + side), g.w.min(left + side));
                    for y in top..bottom {
                        let row = first + (t * g.h + y) * g.w;
                        cells.extend(row + left..row + right);
                    }
                    ends.push(cells.len() as u32 * merge * merge);
                }
            }
        }
        first += g.t * g.h * g.w;
    }
    Windows { cells, ends }
}

/// The segments of full attention: a frame pair each.
pub fn frames(grids: &[Grid]) -> Ends {
    let mut ends = vec![0];
    let mut end = 0;
    for grid in grids {
        for _ in 0..grid.t {
            end += grid.h * grid.w;
            ends.push(end);
        }
    }
    ends
}

/// Each patch's place down and across, for the tower's rotary embedding, in the order of the patches.
pub fn patch_places(grids: &[Grid], merge: u32) -> Vec<[u32; 2]> {
    let mut places = Vec::with_capacity(grids.iter().map(|g| g.patches()).sum());
    for grid in grids {
        let g = grid.cells(merge);
        for _ in 0..g.t {
            for (y, x) in product(g.h, g.w) {
                places.extend(product(merge, merge).map(|(v, u)| [y * merge + v, x * merge + u]));
            }
        }
    }
    places
}

/// A part of a prompt as its positions see it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Span {
    /// That many tokens of text.
    Text(usize),
    /// An image's tokens.
    Image(Grid),
    /// A video's tokens.
    Video {
        /// Its patches.
        grid: Grid,
        /// Seconds from one pair of frames to the next.
        seconds: f64,
    },
}

/// The three-row positions of a prompt, and what comes after it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Positions {
    /// Time, down and across for each token.
    pub rows: Vec<[u32; 3]>,
    /// The token at index `n` after the prompt has position `n + delta` in all three rows.
    pub delta: i64,
}

/// The numbers of a model that positions depend on.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Spacing {
    /// Patches along a side of a token's cell.
    pub merge: u32,
    /// Positions in time for a second of video.
    pub tokens_per_second: u32,
}

/// Positions of a whole prompt.
///
/// As transformers has it: the seconds between pairs of frames count as whole ones, rounded down, and the text after
/// a video starts behind its larger side, whatever its length in time.
pub fn positions(spans: &[Span], spacing: Spacing) -> Result<Positions> {
    let mut rows: Vec<[u32; 3]> = Vec::new();
    let mut next = 0u64;
    for span in spans {
        let (grid, step) = match *span {
            Span::Text(len) => {
                rows.extend((next..next + len as u64).map(|p| [p as u32; 3]));
                next += len as u64;
                continue;
            }
            Span::Image(grid) => (grid, 1),
            // A float as an integer saturates.
            Span::Video { grid, seconds } => {
                (grid, u64::from(spacing.tokens_per_second).saturating_mul(seconds as u64))
            }
        };
        let g = grid.cells(spacing.merge);
        let last = u64::from(g.t.saturating_sub(1)).saturating_mul(step).saturating_add(next);
        if last.max(next + u64::from(g.h.max(g.w))) > i32::MAX as u64 {
            return Err(Error::Request("a video's frames are too far apart for its positions".into()));
        }
        for t in 0..u64::from(g.t) {
            let (t, p) = ((next + t * step) as u32, next as u32);
            rows.extend(product(g.h, g.w).map(|(y, x)| [t, p + y, p + x]));
        }
        next += u64::from(g.h.max(g.w));
    }
    let last = rows.iter().flatten().max().map_or(-1, |&p| i64::from(p));
    let delta = last + 1 - rows.len() as i64;
    Ok(Positions { rows, delta })
}

fn product(h: u32, w: u32) -> impl Iterator<Item = (u32, u32)> {
    (0..h).flat_map(move |y| (0..w).map(move |x| (y, x)))
}

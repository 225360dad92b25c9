//! The places of a pass as the kernels of segments read them: one run of bytes.

use crate::backend::vision::Places;

/// Where arrays begin, in bytes, and how long they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Layout {
    /// Places of rows come first: `[rows, 2]`.
    pub(super) rows: usize,
    pub(super) windows: Tiles,
    pub(super) frames: Tiles,
    pub(super) cells: usize,
    pub(super) cells_at: usize, // [cells]
    /// All of them.
    pub(super) bytes: usize,
}

/// Rows and their segments: `[count, 4]` of first row, segment's begin and end, for the fast kernel; `[rows, 2]` of
/// each row's segment for the plain one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Tiles {
    pub(super) at: usize,
    pub(super) count: usize,
    /// Rows of a tile.
    pub(super) rows: usize,
}

impl Layout {
    /// Bytes for up to so many rows. A tile has a row at least, and so has a cell.
    pub(super) fn bytes_max(rows_max: usize) -> usize {
        4 * (rows_max.next_multiple_of(2) * 2 + 2 * 4 * rows_max + rows_max)
    }

    /// Writes the places. `tiles`: rows of a tile of long segments and of short ones, and how long those are at most.
    pub(super) fn pack(to: &mut [u8], from: &Places, tiles: Option<([usize; 2], usize)>) -> Layout {
        let mut words = Words { to, at: 0 };
        from.rows.iter().flatten().for_each(|&place| words.put(place));
        let [windows, frames] = [&from.windows, &from.frames].map(|ends| {
            words.whole_vector();
            match tiles {
                Some(sizes) => words.tiles(ends, sizes),
                None => words.segments(ends),
            }
        });
        let cells_at = words.at;
        from.cells.iter().for_each(|&cell| words.put(cell));
        Layout { rows: from.rows.len(), windows, frames, cells: from.cells.len(), cells_at, bytes: words.at }
    }
}

struct Words<'a> {
    to: &'a mut [u8],
    at: usize,
}

impl Words<'_> {
    fn put(&mut self, word: u32) {
        self.to[self.at..self.at + 4].copy_from_slice(&word.to_le_bytes());
        self.at += 4;
    }

    fn whole_vector(&mut self) {
        self.at = self.at.next_multiple_of(16);
    }

    /// Tiles of the longest segments first: those that are begun last should be done soon.
    fn tiles(&mut self, ends: &[u32], ([long, short], short_max): ([usize; 2], usize)) -> Tiles {
        let mut segments: Vec<[u32; 2]> = ends.windows(2).map(|e| [e[0], e[1]]).collect();
        segments.sort_by_key(|[begin, end]| std::cmp::Reverse(end - begin));
        let longest = segments.first().map_or(0, |[begin, end]| end - begin) as usize;
        let rows = if longest > short_max { long } else { short };
        let (at, mut count) = (self.at, 0);
        for [begin, end] in segments {
            for first in (begin..end).step_by(rows) {
                [first, begin, end, 0].into_iter().for_each(|word| self.put(word));
                count += 1;
            }
        }
        Tiles { at, count, rows }
    }

    /// Each row's segment.
    fn segments(&mut self, ends: &[u32]) -> Tiles {
        let (at, mut count) = (self.at, 0);
        for ends in ends.windows(2) {
            for _ in ends[0]..ends[1] {
                self.put(ends[0]);
                self.put(ends[1]);
                count += 1;
            }
        }
        Tiles { at, count, rows: 1 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::grid::Grid;

    fn words(bytes: &[u8]) -> Vec<u32> {
        bytes.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
    }

    #[test]
    fn tiles_cover_each_segment_once() {
        for grids in [vec![(1, 2, 2)], vec![(1, 10, 18), (3, 4, 6)], vec![(1, 74, 74), (1, 2, 14)]] {
            let grids: Vec<Grid> = grids.into_iter().map(|(t, h, w)| Grid { t, h, w }).collect();
            let from = Places::new(&grids, 2, 4);
            let mut bytes = vec![0; Layout::bytes_max(from.rows.len())];
            let layout = Layout::pack(&mut bytes, &from, Some(([128, 64], 64)));
            assert_eq!(layout.rows, from.rows.len());
            assert_eq!(words(&bytes[layout.cells_at..layout.bytes]), from.cells);
            for (tiles, ends) in [(layout.windows, &from.windows), (layout.frames, &from.frames)] {
                let long = ends.windows(2).any(|e| e[1] - e[0] > 64);
                assert_eq!((tiles.at % 16, tiles.rows), (0, if long { 128 } else { 64 }));
                let mut seen = vec![0; layout.rows];
                let mut longest = u32::MAX;
                for tile in words(&bytes[tiles.at..][..16 * tiles.count]).chunks_exact(4) {
                    let [first, begin, end] = [tile[0], tile[1], tile[2]];
                    assert!(ends.windows(2).any(|e| e == [begin, end]) && end - begin <= longest);
                    longest = end - begin;
                    (first..end.min(first + tiles.rows as u32)).for_each(|row| seen[row as usize] += 1);
                }
                assert!(seen.iter().all(|&n| n == 1), "{grids:?}");
            }
        }
    }

    #[test]
    fn plain_rows_know_their_segments() {
        let from = Places::new(&[Grid { t: 2, h: 4, w: 10 }], 2, 4);
        let mut bytes = vec![0; Layout::bytes_max(from.rows.len())];
        let layout = Layout::pack(&mut bytes, &from, None);
        for (tiles, ends) in [(layout.windows, &from.windows), (layout.frames, &from.frames)] {
            assert_eq!(tiles.count, 80);
            for (row, of) in words(&bytes[tiles.at..][..8 * 80]).chunks_exact(2).enumerate() {
                assert!(ends.windows(2).any(|e| e == of) && (of[0]..of[1]).contains(&(row as u32)));
            }
        }
    }

    #[test]
    fn room_is_enough_for_the_smallest_segments() {
        for rows in 1..40u32 {
            let ends: Vec<u32> = (0..=rows).collect();
            let places = vec![[0, 0]; rows as usize];
            let cells = (0..rows).collect();
            let from = Places { rows: places, windows: ends.clone(), frames: ends, cells, cell_rows: 1 };
            for tiles in [None, Some(([128, 64], 64))] {
                let mut bytes = vec![0; Layout::bytes_max(rows as usize)];
                assert!(Layout::pack(&mut bytes, &from, tiles).bytes <= bytes.len());
            }
        }
    }
}

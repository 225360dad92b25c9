//! Pixels to patches, in the order of a tower's rows.

use super::{Cpu, GRAIN, memory::prefix_mut};
use crate::backend::vision::{PatchShape, Pixels, Places};

/// Cuts the pixels of a pass.
pub(super) fn cut(cpu: &Cpu, out: &mut [f32], shape: PatchShape, places: &Places, from: &[Pixels<'_>]) {
    let (len, merge) = (shape.len(), shape.merge as u32);
    let mut firsts = vec![0];
    for pixels in from {
        firsts.push(firsts[firsts.len() - 1] + pixels.grid.tokens(merge));
    }
    assert_eq!(firsts[from.len()], places.cells.len(), "pixels of other images; this is a bug");
    let rows = places.rows.len();
    cpu.pool.rows(prefix_mut(out, rows * len), len, GRAIN, |first, out| {
        for (i, row) in out.chunks_exact_mut(len).enumerate() {
            let (cell, within) = ((first + i) / places.cell_rows, (first + i) % places.cell_rows);
            let cell = places.cells[cell] as usize;
            let image = firsts.partition_point(|&first| first <= cell) - 1;
            cut_one(row, shape, &from[image], [cell - firsts[image], within]);
        }
    });
}

/// One patch: of so many cells' place, and within it.
fn cut_one(row: &mut [f32], shape: PatchShape, from: &Pixels<'_>, [cell, within]: [usize; 2]) {
    let PatchShape { side, frames, merge } = shape;
    let (down, across) = (from.grid.h as usize / merge, from.grid.w as usize / merge);
    let (time, place) = (cell / (down * across), cell % (down * across));
    let top = (place / across * merge + within / merge) * side;
    let left = (place % across * merge + within % merge) * side;
    let width = from.grid.w as usize * side;
    for (colour, row) in row.chunks_exact_mut(frames * side * side).enumerate() {
        for (f, row) in row.chunks_exact_mut(side * side).enumerate() {
            let frame = &from.frames[(time * frames + f).min(from.frames.len() - 1)];
            for (y, row) in row.chunks_exact_mut(side).enumerate() {
                let line = &frame[3 * ((top + y) * width + left)..][..3 * side];
                for (to, pixel) in row.iter_mut().zip(line.chunks_exact(3)) {
                    *to = from.levels[colour][usize::from(pixel[colour])];
                }
            }
        }
    }
}

//! Pixels to patches: kernels/patches.cu. The host brings 8-bit pixels, which are a tenth of the floats that become of them.
#![allow(unsafe_code)]

use super::{Buf, Cuda, Grid, Images, Kernel, Loading, PipelineFacts, launch::args, relay::Relay};
use crate::{
    backend::vision::{Levels, PatchShape, Pixels},
    error::Result,
};

/// Numbers of a `Picture` in patches.cu.
const PICTURE: usize = 8;
/// Ways in which levels become floats, at most: images and videos have one each.
const LEVELS_MAX: usize = 4;
const LEVELS_BYTES: usize = size_of::<Levels>();
const THREADS: u32 = 128;
/// Passes whose pixels may be on their way at once.
const PASSES: usize = 2;

/// Room for the pixels of a pass, and the kernel that cuts them.
pub struct Cutter {
    kernel: Kernel,
    shape: PatchShape,
    relay: Relay,
}

/// Bytes of a pass of so many patches: pictures, levels, pixels.
pub(super) fn bytes_max(rows_max: usize, shape: PatchShape) -> usize {
    let pictures = rows_max / (shape.merge * shape.merge);
    4 * PICTURE * pictures + LEVELS_MAX * LEVELS_BYTES + rows_max * shape.len()
}

impl Cutter {
    pub(super) fn new(cuda: &Cuda, rows_max: usize, shape: PatchShape) -> Result<Cutter> {
        let of = PipelineFacts { dtype: cuda.dtype, head_dim: 0, seats: 0, in_flight: 0 };
        let load = Loading { context: cuda.context, facts: cuda.facts, of };
        let sizes = [("SIDE", shape.side), ("FRAMES", shape.frames), ("MERGE", shape.merge)];
        let [side, frames, merge] = sizes.map(|(name, size)| (name, size as u32));
        let module = load.module("patches.cu", &[("DTYPE", load.dtype()), side, frames, merge])?;
        Ok(Cutter {
            kernel: module.kernel("cut_patches")?,
            shape,
            relay: Relay::new(cuda, bytes_max(rows_max, shape), PASSES)?,
        })
    }

    /// Brings pixels to the GPU and cuts them there. The host waits for nothing but the copy of two passes ago.
    pub(super) fn cut(
        &mut self,
        cuda: &Cuda,
        out: &mut Buf,
        images: &Images,
        from: &[Pixels<'_>],
    ) -> Result<()> {
        let (cells, count) = images.cells();
        let rows = count * self.shape.merge * self.shape.merge;
        let out = out.expect(cuda.dtype, rows * self.shape.len());
        let shape = self.shape;
        self.relay.bring(cuda, |bytes| pack(bytes, shape, count, from))?;
        let grid = Grid::row(rows as u32, THREADS);
        let (room, pictures) = (self.relay.room().ptr(), from.len() as u32);
        // SAFETY: (T*, const u8*, const u32*, u32) as in patches.cu; the buffer has been checked, `pack` has checked that the
        // pictures have as many cells as there are, and that their pixels are among the bytes.
        unsafe { cuda.launch(&self.kernel, grid, &mut args![out, room, cells, pictures]) }
    }
}

/// Writes what the kernel reads, for so many cells. How many bytes it is.
fn pack(to: &mut [u8], shape: PatchShape, cells: usize, from: &[Pixels<'_>]) -> usize {
    let mut tables: Vec<&Levels> = Vec::new();
    let mut pictures = Vec::with_capacity(PICTURE * from.len());
    let levels_at = 4 * PICTURE * from.len();
    let pixels_at = levels_at + LEVELS_MAX * LEVELS_BYTES;
    let (mut first, mut at) = (0, pixels_at);
    for pixels in from {
        let table =
            tables.iter().position(|levels| std::ptr::eq(*levels, pixels.levels)).unwrap_or(tables.len());
        if table == tables.len() {
            assert!(table < LEVELS_MAX, "more than {LEVELS_MAX} ways to make floats; this is a bug");
            tables.push(pixels.levels);
        }
        let (grid, merge) = (pixels.grid, shape.merge);
        let across = grid.w as usize / merge;
        let width = grid.w as usize * shape.side;
        let frame_bytes = 3 * width * grid.h as usize * shape.side;
        let whole = !pixels.frames.is_empty() && pixels.frames.iter().all(|frame| frame.len() == frame_bytes);
        assert!(whole, "frames of another size; this is a bug");
        let together = across * (grid.h as usize / merge);
        let levels = levels_at + table * LEVELS_BYTES;
        let picture = [first, across, together, width, at, pixels.frames.len(), frame_bytes, levels];
        pictures.extend(picture.map(|n| u32::try_from(n).expect("a pass of bounded size; this is a bug")));
        for frame in pixels.frames {
            to[at..][..frame_bytes].copy_from_slice(frame);
            at += frame_bytes;
        }
        first += grid.tokens(merge as u32);
    }
    assert_eq!(first, cells, "pixels of other images; this is a bug");
    let words = |to: &mut [u8], words: &mut dyn Iterator<Item = u32>| {
        to.chunks_exact_mut(4).zip(words).for_each(|(to, word)| to.copy_from_slice(&word.to_le_bytes()));
    };
    words(&mut to[..levels_at], &mut pictures.into_iter());
    let floats = tables.iter().flat_map(|levels| levels.iter().flatten());
    words(&mut to[levels_at..pixels_at], &mut floats.map(|level| level.to_bits()));
    at
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::grid::Grid;

    #[test]
    fn a_pass_is_packed_into_the_room_that_there_is() {
        let shape = PatchShape { side: 2, frames: 2, merge: 1 };
        let (a, b): (Levels, Levels) = ([[1.0; 256]; 3], [[2.0; 256]; 3]);
        let image = [vec![7; 3 * 4 * 6]];
        let video = [vec![8; 12], vec![9; 12], vec![10; 12]];
        let of = |h, w, t, frames, levels| Pixels { grid: Grid { t, h, w }, frames, levels };
        let from = [of(2, 3, 1, &image[..], &a), of(1, 1, 2, &video[..], &b), of(2, 3, 1, &image[..], &a)];
        let mut room = vec![0; bytes_max(14, shape)];
        let bytes = pack(&mut room, shape, 14, &from);
        let levels = 3 * 32;
        let pixels = levels + LEVELS_MAX * LEVELS_BYTES;
        assert_eq!(bytes, pixels + 72 + 36 + 72);
        let word = |i: usize| u32::from_le_bytes(room[4 * i..][..4].try_into().unwrap()) as usize;
        let second: Vec<usize> = (8..16).map(word).collect();
        assert_eq!(second, [6, 1, 1, 2, pixels + 72, 3, 12, levels + LEVELS_BYTES]);
        assert_eq!([word(16), word(23)], [8, levels]);
        assert_eq!((room[pixels], room[pixels + 72], room[pixels + 72 + 24]), (7, 8, 10));
        assert_eq!(f32::from_bits(word((levels + LEVELS_BYTES) / 4) as u32), 2.0);
    }
}

//! A micro-batch's arrays as batch.cuh wants them, one after another.

use super::{COUNTS, Places, Shape, blocks_used};
use crate::{backend::cuda::attention::PREFILL_ROWS, batch::MicroBatch};

/// `NONE` in batch.cuh.
const NONE: u32 = u32::MAX;

/// Writes the arrays one after another, and returns how many bytes they are.
pub(super) fn pack(bytes: &mut [u8], from: &MicroBatch, shape: &Shape, places: &Places) -> usize {
    let mut to = Writer { bytes, at: 0 };
    let counts = [shape.rows, from.seqs.len(), shape.outputs, shape.single, shape.tiles, 0, 0, 0];
    to.array(COUNTS, 0, counts.iter().map(|&n| n as u32));
    to.array(places.rows, NONE, from.ids.iter().copied());
    to.array(places.rows, 0, from.positions.iter().copied());
    let seqs = || from.seqs.iter();
    let row_seq = seqs().enumerate().flat_map(|(i, s)| std::iter::repeat_n(i as u32, s.len));
    to.array(places.rows, NONE, row_seq);
    to.array(places.seqs, 0, seqs().map(|s| s.row as u32));
    to.array(places.seqs, 0, seqs().map(|s| s.len as u32));
    to.array(places.seqs, 0, seqs().map(|s| (s.cached + s.len) as u32));
    let starts = seqs().scan(0, |at, s| {
        let start = *at;
        *at += blocks_used(s).len() as u32;
        Some(start)
    });
    to.array(places.seqs, 0, starts);
    to.array(places.seqs, 0, seqs().map(|s| s.seat));
    let singles = seqs().enumerate().filter(|(_, s)| s.len == 1).map(|(i, _)| i as u32);
    to.array(places.seqs, 0, singles);
    to.array(2 * places.tiles, 0, tiles(from));
    to.array(places.outputs, 0, from.outputs.iter().map(|o| o.row as u32));
    to.array(places.outputs, 0, from.outputs.iter().map(|o| o.seat));
    match from.turns.is_empty() {
        true => to.array(3 * places.turns, 0, from.positions.iter().flat_map(|&p| [p; 3])),
        false => to.array(3 * places.turns, 0, from.turns.iter().flatten().copied()),
    }
    for seq in &from.seqs {
        let used = blocks_used(seq);
        to.array(used.len(), 0, used);
    }
    to.at
}

/// Sequence and first row of each tile, those with the longest context first: they take longest.
fn tiles(from: &MicroBatch) -> impl Iterator<Item = u32> {
    let several = from.seqs.iter().enumerate().filter(|(_, s)| s.len > 1);
    let mut tiles: Vec<(usize, [u32; 2])> = several
        .flat_map(|(i, s)| {
            (0..s.len).step_by(PREFILL_ROWS).map(move |row| (s.cached + row, [i as u32, row as u32]))
        })
        .collect();
    tiles.sort_by_key(|&(context, _)| std::cmp::Reverse(context));
    tiles.into_iter().flat_map(|(_, tile)| tile)
}

struct Writer<'a> {
    bytes: &'a mut [u8],
    at: usize,
}

impl Writer<'_> {
    /// Writes the numbers, then `filler` up to `len` of them.
    fn array(&mut self, len: usize, filler: u32, numbers: impl Iterator<Item = u32>) {
        let room = self.bytes[self.at..][..4 * len].chunks_exact_mut(4);
        let all = numbers.chain(std::iter::repeat(filler));
        for (to, n) in room.zip(all) {
            to.copy_from_slice(&n.to_le_bytes());
        }
        self.at += 4 * len;
    }
}

//! A micro-batch on the GPU: one packed copy a step, laid out anew for every number of rows.
#![allow(unsafe_code)]

mod pack;

use std::{
    collections::HashMap,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
};

use self::pack::pack;
use super::{
    Buf, Cuda,
    attention::PREFILL_ROWS,
    copy,
    graph::Graph,
    memory::{DeviceBuf, DevicePtr},
    pad_rows,
    relay::Relay,
};
use crate::{
    backend::{DType, Limits, Rotation},
    batch::{KV_BLOCK, MicroBatch, SeqRows},
    error::Result,
};

/// Micro-batches whose copies may be on their way at once, at most. So the host is at most so many passes ahead of the device:
/// a driver takes some thousand launches, and keeps a thread that brings more spinning, with its locks. A pass through 20 layers of
/// a prompt is 230.
const STAGING_MAX: usize = 3;
/// `counts` in batch.cuh.
const COUNTS: usize = 8;

/// `struct Batch` in batch.cuh.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct BatchView {
    counts: DevicePtr,
    ids: DevicePtr,
    positions: DevicePtr,
    row_seq: DevicePtr,
    seq_row: DevicePtr,
    seq_rows: DevicePtr,
    seq_len: DevicePtr,
    seq_blocks: DevicePtr,
    blocks: DevicePtr,
    seq_seat: DevicePtr,
    single: DevicePtr,
    tiles: DevicePtr,
    output_row: DevicePtr,
    output_seat: DevicePtr,
    rotations: DevicePtr,
    turns: DevicePtr,
}

/// Room for a micro-batch, and the passes recorded over it.
pub struct Batch {
    limits: Limits,
    inv_freq: Buf,        // [half]
    rotations: DeviceBuf, // [rows, half] of (cosine, sine)
    half: usize,
    scale: f32,
    /// The first frequencies that turn by the second and by the third of a row's turns.
    bounds: [usize; 2],
    /// Rows have turns.
    sections: bool,
    relay: Relay,
    now: Shape,
    view: BatchView,
    /// KV blocks of the smallest pool that the ops have gone over: repeated passes do not ask again.
    pool: AtomicUsize,
    recorded: Mutex<HashMap<usize, Recorded>>,
}

/// What is known about a pass of so many rows.
pub(super) enum Recorded {
    /// It has run once, so that everything it needs has been loaded and chosen.
    Tried,
    Ready(Graph),
}

/// The micro-batch that the room holds.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Shape {
    /// Rows, and as many as the ops go over.
    pub(crate) rows: usize,
    pub(crate) rows_padded: usize,
    pub(crate) outputs: usize,
    pub(crate) outputs_padded: usize,
    /// Sequences of one row.
    pub(crate) single: usize,
    /// Tiles of the sequences of several rows.
    pub(crate) tiles: usize,
    /// Tokens that the last row of one of these sequences sees, at most.
    pub(crate) reach: usize,
    /// Nothing but single rows, all with an output: such a pass is recorded.
    pub(crate) decode: bool,
    /// More than the number of any KV block of it.
    pub(crate) blocks: usize,
}

/// Where arrays begin, in numbers of 4 bytes.
#[derive(Debug, Clone, Copy)]
struct Places {
    rows: usize,
    seqs: usize,
    tiles: usize,
    outputs: usize,
    /// Rows that have turns.
    turns: usize,
}

impl Places {
    /// For a shape. A recorded pass's places follow from its padded rows alone.
    fn of(shape: &Shape, seqs: usize, sections: bool) -> Places {
        let Shape { rows_padded, outputs_padded, tiles, decode, .. } = *shape;
        // Room for whole vectors of 16 bytes.
        let even = |n: usize| n.next_multiple_of(4);
        match decode {
            true => {
                let n = even(rows_padded);
                Places { rows: n, seqs: n, tiles: 0, outputs: n, turns: if sections { n } else { 0 } }
            }
            false => Places {
                rows: even(rows_padded),
                seqs: even(seqs),
                tiles: even(tiles),
                outputs: even(outputs_padded),
                turns: if sections { even(rows_padded) } else { 0 },
            },
        }
    }

    /// Numbers before the block lists.
    fn fixed(&self) -> usize {
        COUNTS + 3 * self.rows + 6 * self.seqs + 2 * self.tiles + 2 * self.outputs + 3 * self.turns
    }
}

/// Bytes of the packed arrays, and of the rotations.
pub(super) fn device_bytes(limits: Limits, half: usize) -> [usize; 2] {
    let rows = pad_rows(limits.rows_max);
    let places = Places {
        rows: rows + 4,
        seqs: limits.seqs_max.max(rows) + 4,
        tiles: rows.div_ceil(PREFILL_ROWS) + limits.seqs_max + 4,
        outputs: rows + 4,
        turns: rows + 4,
    };
    let blocks = limits.seqs_max * limits.context_max.div_ceil(KV_BLOCK);
    [4 * (places.fixed() + blocks), rows * half * 8]
}

impl Batch {
    pub(super) fn new(cuda: &Cuda, limits: Limits, rotation: Rotation) -> Result<Batch> {
        let Rotation { inv_freq, scale, sections } = rotation;
        let half = inv_freq.len();
        let [bytes, rotations] = device_bytes(limits, half);
        let mut frequencies = Buf { memory: cuda.take(4 * half)?.into(), dtype: DType::F32, len: half };
        copy::write(cuda, &mut frequencies, inv_freq)?;
        let relay = Relay::new(cuda, bytes, cuda.tokens.in_flight().clamp(1, STAGING_MAX))?;
        let rotations = cuda.take(rotations)?;
        let (now, null) = (Shape::default(), DevicePtr::NULL);
        let view = BatchView {
            counts: null,
            ids: null,
            positions: null,
            row_seq: null,
            seq_row: null,
            seq_rows: null,
            seq_len: null,
            seq_blocks: null,
            blocks: null,
            seq_seat: null,
            single: null,
            tiles: null,
            output_row: null,
            output_seat: null,
            rotations: rotations.ptr(),
            turns: null,
        };
        Ok(Batch {
            limits,
            inv_freq: frequencies,
            rotations,
            half,
            scale,
            bounds: rotation.bounds(),
            sections: sections.is_some(),
            relay,
            now,
            view,
            pool: AtomicUsize::new(usize::MAX),
            recorded: Mutex::default(),
        })
    }

    pub(crate) fn view(&self) -> BatchView {
        self.view
    }

    pub(crate) fn shape(&self) -> Shape {
        self.now
    }

    /// Panics if a KV block of the micro-batch is beyond a pool of so many; later ones are refused.
    pub(super) fn expect_blocks(&self, pool: usize) {
        let blocks = self.now.blocks;
        assert!(blocks <= pool, "KV block {} of {pool}; this is a bug", blocks - 1);
        self.pool.fetch_min(pool, Relaxed);
    }

    /// What rotations are made of: frequencies, how many, and what multiplies sines and cosines.
    pub(crate) fn frequencies(&self) -> (DevicePtr, usize, f32) {
        (self.inv_freq.f32s(self.half), self.half, self.scale)
    }

    /// The first frequencies that turn by the second and by the third of a row's turns.
    pub(crate) fn bounds(&self) -> [usize; 2] {
        self.bounds
    }

    /// The table of the pass: cosine and sine of each row's frequencies.
    pub(crate) fn rotations(&self) -> DevicePtr {
        self.rotations.ptr() // [rows, half]
    }

    /// Brings a micro-batch to the GPU.
    pub(super) fn set(&mut self, cuda: &Cuda, from: &MicroBatch) -> Result<()> {
        let room = Room { limits: self.limits, seats: cuda.tokens.seats(), blocks: self.pool.load(Relaxed) };
        let shape = shape(from);
        room.check(from, shape.blocks)
            .and_then(|()| from.check_turns(self.sections))
            .map_err(|why| cuda.error(format!("a micro-batch does not fit: {why}; this is a bug")))?;
        let places = Places::of(&shape, from.seqs.len(), self.sections);
        self.relay.bring(cuda, |bytes| pack(bytes, from, &shape, &places))?;
        self.now = shape;
        self.view = self.places_on_device(&places);
        Ok(())
    }

    fn places_on_device(&self, places: &Places) -> BatchView {
        let mut at = 0;
        let base = self.relay.room().ptr();
        let mut take = |len: usize| {
            let here = base.add(4 * at);
            at += len;
            here
        };
        let Places { rows, seqs, tiles, outputs, turns } = *places;
        BatchView {
            counts: take(COUNTS),
            ids: take(rows),
            positions: take(rows),
            row_seq: take(rows),
            seq_row: take(seqs),
            seq_rows: take(seqs),
            seq_len: take(seqs),
            seq_blocks: take(seqs),
            seq_seat: take(seqs),
            single: take(seqs),
            tiles: take(2 * tiles),
            output_row: take(outputs),
            output_seat: take(outputs),
            turns: if turns > 0 { take(3 * turns) } else { DevicePtr::NULL },
            blocks: take(0),
            rotations: self.rotations.ptr(),
        }
    }

    /// Records the ops for the passes to come, if these are to be repeated.
    pub(super) fn record(&self, cuda: &Cuda, ops: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        if self.now.decode {
            let graph = cuda.record(ops)?;
            let mut recorded = self.recorded.lock().unwrap_or_else(PoisonError::into_inner);
            recorded.insert(self.now.rows_padded, Recorded::Ready(graph));
        }
        Ok(())
    }

    /// Runs the ops, or repeats what they did.
    pub(super) fn pass(&self, cuda: &Cuda, ops: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        if !self.now.decode {
            return ops();
        }
        let key = self.now.rows_padded;
        let mut recorded = self.recorded.lock().unwrap_or_else(PoisonError::into_inner);
        match recorded.get_mut(&key) {
            Some(Recorded::Ready(graph)) => return cuda.repeat(graph),
            Some(Recorded::Tried) => (),
            None => {
                ops()?;
                recorded.insert(key, Recorded::Tried);
                return Ok(());
            }
        }
        let mut graph = cuda.record(ops)?;
        cuda.repeat(&mut graph)?;
        recorded.insert(key, Recorded::Ready(graph));
        Ok(())
    }
}

/// What a micro-batch has to fit into: what is beyond it would be read or written out of bounds.
struct Room {
    limits: Limits,
    seats: usize,
    blocks: usize,
}

impl Room {
    fn check(&self, from: &MicroBatch, blocks_end: usize) -> Result<(), String> {
        let Limits { rows_max, seqs_max, outputs_max, context_max } = self.limits;
        let over = |what: &str, n: usize, max: usize| Err(format!("{n} {what}, and there is room for {max}"));
        if from.rows() > rows_max || from.positions.len() != from.rows() {
            return over("rows", from.rows(), rows_max);
        }
        if from.seqs.len() > seqs_max {
            return over("sequences", from.seqs.len(), seqs_max);
        }
        if from.outputs.len() > outputs_max {
            return over("outputs", from.outputs.len(), outputs_max);
        }
        if from.outputs.iter().any(|o| o.row >= from.rows()) {
            return Err("an output row beyond the rows".into());
        }
        let taken = from.seqs.iter().map(|s| s.seat).chain(from.outputs.iter().map(|o| o.seat));
        if let Some(seat) = taken.max().filter(|&seat| seat as usize >= self.seats) {
            return over("as a seat", seat as usize, self.seats);
        }
        if blocks_end > self.blocks {
            return over("as a KV block", blocks_end - 1, self.blocks);
        }
        let mut row = 0;
        for seq in &from.seqs {
            let len = seq.cached + seq.len;
            if len > context_max || seq.blocks.len() * KV_BLOCK < len {
                return over("tokens of a sequence", len, context_max.min(seq.blocks.len() * KV_BLOCK));
            }
            if seq.row != row || seq.len == 0 || row + seq.len > from.rows() {
                return Err("rows that belong to no sequence, or to two".into());
            }
            let own = from.positions[row..row + seq.len].iter().zip(seq.cached..);
            if own.into_iter().any(|(&position, wanted)| position as usize != wanted) {
                return Err("a row that is not at its place in the sequence".into());
            }
            row += seq.len;
        }
        if row == from.rows() { Ok(()) } else { Err("rows that belong to no sequence".into()) }
    }
}

/// Blocks that hold a sequence's tokens.
fn blocks_used(seq: &SeqRows) -> impl ExactSizeIterator<Item = u32> {
    let used = (seq.cached + seq.len).div_ceil(KV_BLOCK);
    // Fewer are refused.
    seq.blocks.range(0..used.min(seq.blocks.len()))
}

/// More than the number of any block that is used: of 256 sequences of 8192 tokens, one of 131072.
fn blocks_end(from: &MicroBatch) -> usize {
    let ends = from.seqs.iter().map(|s| blocks_used(s).fold(0, u32::max));
    ends.max().map_or(0, |last| last as usize + 1)
}

fn shape(from: &MicroBatch) -> Shape {
    let single = from.seqs.iter().filter(|s| s.len == 1).count();
    let several = || from.seqs.iter().filter(|s| s.len > 1);
    let rows = from.rows();
    let decode = single == from.seqs.len() && from.outputs.len() == rows && rows > 0;
    let rows_padded = pad_rows(rows);
    Shape {
        rows,
        rows_padded,
        outputs: from.outputs.len(),
        outputs_padded: pad_rows(from.outputs.len()),
        single,
        tiles: several().map(|s| s.len.div_ceil(PREFILL_ROWS)).sum(),
        reach: several().map(|s| s.cached + s.len).max().unwrap_or(0),
        decode,
        blocks: blocks_end(from),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::batch::{OutputRow, SeqId};

    const ROOM: Room = Room {
        limits: Limits { rows_max: 64, seqs_max: 2, outputs_max: 2, context_max: 64 },
        seats: 4,
        blocks: 8,
    };

    /// Twenty rows of a sequence, and one of another, in the last block and at the last seat.
    fn fitting() -> MicroBatch {
        let of = |id, seat, row, len, cached, blocks: &[u32]| SeqRows {
            seq: SeqId(id),
            seat,
            row,
            len,
            cached,
            blocks: blocks.into(),
        };
        MicroBatch {
            ids: vec![0; 21],
            positions: (0..20).chain([16]).collect(),
            // The third block holds no token yet: it may be anything.
            seqs: vec![of(0, 0, 0, 20, 0, &[3, 0, 99]), of(1, 3, 20, 1, 16, &[1, 7])],
            outputs: vec![OutputRow { row: 20, seq: SeqId(1), seat: 3 }],
            ..MicroBatch::default()
        }
    }

    fn refused(spoil: impl FnOnce(&mut MicroBatch)) -> String {
        let mut batch = fitting();
        spoil(&mut batch);
        ROOM.check(&batch, blocks_end(&batch)).unwrap_err()
    }

    #[test]
    fn what_would_be_out_of_bounds_is_refused() {
        assert_eq!(ROOM.check(&fitting(), 8), Ok(()));
        assert_eq!(blocks_end(&fitting()), 8);
        assert_eq!(blocks_end(&MicroBatch::default()), 0);
        let block = refused(|b| b.seqs[1].blocks = [1, 8].into());
        assert_eq!(block, "8 as a KV block, and there is room for 8");
        assert!(refused(|b| b.seqs[1].blocks = [u32::MAX, 7].into()).contains("KV block"));
        assert!(refused(|b| b.seqs[1].blocks = [1].into()).contains("tokens of a sequence"));
        assert!(refused(|b| b.seqs[0].seat = 4).contains("seat"));
        assert!(refused(|b| b.outputs[0].seat = 4).contains("seat"));
        assert!(refused(|b| b.outputs[0].row = 21).contains("output row"));
        assert!(refused(|b| b.positions[3] = 5).contains("place in the sequence"));
        assert!(refused(|b| b.seqs[1].row = 19).contains("to two"));
        assert!(refused(|b| drop(b.seqs.pop())).contains("no sequence"));
        assert!(refused(|b| b.positions.truncate(20)).contains("rows"));
    }
}

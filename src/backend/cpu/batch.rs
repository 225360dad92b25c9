//! A micro-batch, checked, with the rotations of its positions and the cut of its rows for attention.

use std::ops::Range;

use super::{device_error, memory::Memory, pool::Pool};
use crate::{
    backend::{Limits, Rotation},
    batch::{Blocks, KV_BLOCK, MicroBatch},
    error::Result,
};

/// Rows of one sequence that attention takes together: they share the widening of keys and values.
pub(super) const TILE_ROWS: usize = 8;

/// A micro-batch as the ops want it.
pub struct Batch {
    pub(super) ids: Vec<u32>,         // [rows]
    pub(super) positions: Vec<usize>, // [rows]
    pub(super) cos: Memory<f32>,      // [rows_max, half]
    pub(super) sin: Memory<f32>,      // [rows_max, half]
    pub(super) half: usize,           // head_dim / 2
    pub(super) blocks: Vec<Blocks>,   // [seqs]
    pub(super) tiles: Vec<Tile>,
    pub(super) outputs: Vec<usize>, // rows
    /// One more than the largest KV block that the rows use.
    pub(super) blocks_end: usize,
    written: Vec<u32>,    // KV blocks
    turns: Vec<[u32; 3]>, // [rows], or none
    inv_freq: Vec<f32>,   // [half]
    /// The first frequencies that turn by the second and by the third of a row's turns.
    bounds: [usize; 2],
    sections: bool,
    rotation_scale: f32,
    limits: Limits,
}

/// Up to `TILE_ROWS` rows of one sequence.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Tile {
    /// Which of the micro-batch's sequences.
    pub(super) seq: usize,
    pub(super) rows: Range<usize>,
}

impl Batch {
    pub(super) fn new(limits: Limits, rotation: Rotation) -> Result<Self> {
        let Rotation { inv_freq, scale: rotation_scale, sections } = rotation;
        let rotations = limits.rows_max.checked_mul(inv_freq.len());
        let rotations = rotations.ok_or_else(|| device_error(format!("{limits:?} is too much")))?;
        let tiles = limits.seqs_max.saturating_add(limits.rows_max / TILE_ROWS).min(limits.rows_max);
        Ok(Batch {
            ids: room(limits.rows_max)?,
            positions: room(limits.rows_max)?,
            cos: Memory::new(rotations)?,
            sin: Memory::new(rotations)?,
            half: inv_freq.len(),
            blocks: room(limits.seqs_max)?,
            tiles: room(tiles)?,
            outputs: room(limits.rows_max)?,
            blocks_end: 0,
            written: room(
                limits.seqs_max.saturating_mul(2).min(limits.rows_max) + limits.rows_max / KV_BLOCK,
            )?,
            turns: room(if sections.is_some() { limits.rows_max } else { 0 })?,
            inv_freq: inv_freq.to_vec(),
            bounds: rotation.bounds(),
            sections: sections.is_some(),
            rotation_scale,
            limits,
        })
    }

    pub(super) fn rows(&self) -> usize {
        self.ids.len()
    }

    /// How many output rows there are.
    pub(super) fn outputs(&self) -> usize {
        self.outputs.len()
    }

    /// The row's cosines and sines.
    pub(super) fn rotation(&self, row: usize) -> (&[f32], &[f32]) {
        let range = row * self.half..(row + 1) * self.half;
        (&self.cos[range.clone()], &self.sin[range])
    }

    pub(super) fn set(&mut self, pool: &Pool, from: &MicroBatch) -> Result<()> {
        self.clear();
        let checked = check(from, self.limits).and_then(|()| from.check_turns(self.sections));
        checked.map_err(|why| device_error(format!("micro-batch: {why}")))?;
        for (seq, rows) in from.seqs.iter().enumerate() {
            let end = rows.row + rows.len;
            let tiles = (rows.row..end).step_by(TILE_ROWS);
            self.tiles.extend(tiles.map(|row| Tile { seq, rows: row..end.min(row + TILE_ROWS) }));
            let used = (rows.cached + rows.len).div_ceil(KV_BLOCK);
            let last = rows.blocks.range(0..used).max().map_or(0, |b| b as usize + 1);
            self.blocks_end = self.blocks_end.max(last);
            self.written.extend(rows.blocks.range(rows.cached / KV_BLOCK..used));
            self.blocks.push(rows.blocks.clone());
        }
        self.ids.extend(&from.ids);
        self.positions.extend(from.positions.iter().map(|&p| p as usize));
        self.turns.extend(&from.turns);
        self.outputs.extend(from.outputs.iter().map(|o| o.row));
        self.rotate(pool);
        self.check_written()
    }

    /// Rows that wrote to the same block at once would leave either's numbers, or neither's.
    fn check_written(&mut self) -> Result<()> {
        self.written.sort_unstable();
        match self.written.windows(2).find(|pair| pair[0] == pair[1]) {
            Some(pair) => Err(device_error(format!("micro-batch: KV block {} is written twice", pair[0]))),
            None => Ok(()),
        }
    }

    fn clear(&mut self) {
        self.ids.clear();
        self.positions.clear();
        self.turns.clear();
        self.blocks.clear();
        self.tiles.clear();
        self.outputs.clear();
        self.blocks_end = 0;
        self.written.clear();
    }

    /// The angle is rounded to f32, as the models were trained with.
    fn rotate(&mut self, pool: &Pool) {
        let len = self.rows() * self.half;
        let (inv_freq, scale, [down, across]) = (&self.inv_freq, self.rotation_scale, self.bounds);
        let (positions, turns) = (&self.positions, &self.turns);
        let places = |row: usize| match turns.get(row) {
            Some(turns) => turns.map(|turn| turn as f32),
            None => [positions[row] as f32; 3],
        };
        let rotate = |out: &mut [f32], f: fn(f32) -> f32| {
            pool.rows(out, inv_freq.len(), 512, |first, out| {
                for (row, out) in out.chunks_exact_mut(inv_freq.len()).enumerate() {
                    let places = places(first + row);
                    let sections = [0..down, down..across, across..out.len()];
                    for (section, place) in sections.into_iter().zip(places) {
                        for (o, freq) in out[section.clone()].iter_mut().zip(&inv_freq[section]) {
                            *o = f(place * freq) * scale;
                        }
                    }
                }
            });
        };
        rotate(&mut self.cos[..len], f32::cos);
        rotate(&mut self.sin[..len], f32::sin);
    }
}

/// A list that does not grow later.
fn room<T>(len: usize) -> Result<Vec<T>> {
    let mut list = Vec::new();
    let refused = |_| device_error(format!("no memory for a micro-batch of {len} rows"));
    list.try_reserve_exact(len).map_err(refused)?;
    Ok(list)
}

/// What the ops rely on.
fn check(from: &MicroBatch, limits: Limits) -> Result<(), String> {
    let rows = from.rows();
    if rows > limits.rows_max || from.seqs.len() > limits.seqs_max {
        return Err(format!("{rows} rows of {} sequences, there is room for {limits:?}", from.seqs.len()));
    }
    if from.positions.len() != rows {
        return Err(format!("{} positions for {rows} rows", from.positions.len()));
    }
    let mut next = 0;
    for s in &from.seqs {
        let end = s.row.checked_add(s.len).filter(|&end| s.row == next && s.len > 0 && end <= rows);
        let Some(end) = end else {
            return Err(format!("sequence {}: {} rows from {} on, of {rows}", s.seq.0, s.len, s.row));
        };
        next = end;
        let tokens = s.cached.saturating_add(s.len);
        if tokens > limits.context_max {
            return Err(format!("sequence {}: {tokens} tokens of at most {}", s.seq.0, limits.context_max));
        }
        if s.blocks.len() < tokens.div_ceil(KV_BLOCK) {
            return Err(format!("sequence {}: {tokens} tokens in {} KV blocks", s.seq.0, s.blocks.len()));
        }
        if let Some(i) = (0..s.len).find(|i| from.positions[s.row + i] as usize != s.cached + i) {
            let (row, position) = (s.row + i, from.positions[s.row + i]);
            return Err(format!("row {row} is at {position}, {i} after {} cached", s.cached));
        }
    }
    if next != rows {
        return Err(format!("row {next} belongs to no sequence"));
    }
    match from.outputs.iter().find(|o| o.row >= rows) {
        Some(o) => Err(format!("row {} is wanted, of {rows}", o.row)),
        None if from.outputs.len() > rows => Err(format!("{} outputs of {rows} rows", from.outputs.len())),
        None => Ok(()),
    }
}

//! Softmax attention over KV pages.
//!
//! A query meets its tokens block by block, in the order of their positions, with blocks at multiples of
//! `KV_BLOCK`: 16 scores at a time, the softmax rescaled whenever a larger score comes up. What a query sees
//! in a block depends on its own position only, so its result has the same bits in a prompt's chunk of any
//! length, alone, or with other sequences.
//!
//! The order: a score adds its products in four chains of every fourth number; a value's sum goes through
//! the tokens one by one; the sum of the softmax is kept in 16 lanes, one for each place in a block.
#![allow(unsafe_code)]
#![allow(clippy::needless_range_loop)] // tiles of registers: indices say more than iterators

use std::ops::Range;

use super::{
    Cpu,
    batch::{Batch, Tile},
    kv::Kv,
    memory::{Scratch, Shared, prefix, prefix_mut, with_scratch},
    simd::{Kernel, LANES, Vector, exp, widen},
};
use crate::{
    backend::{AttentionShape, DType, HeadShape},
    batch::KV_BLOCK,
    error::Result,
};

thread_local! {
    /// Sums and widened blocks, of each thread.
    static SUMS: Scratch<f32> = const { Scratch::new(None) };
}

/// Queries that go through a block together.
const QUERIES: usize = 4;
/// Multiplications below which other threads would come too late.
const ALONE: usize = 1 << 16;

const _: () = assert!(KV_BLOCK == LANES, "a block's scores are one vector");

pub(super) fn attention(
    cpu: &Cpu,
    out: &mut [f32],
    qkv: &[f32],
    kv: &Kv,
    batch: &Batch,
    shape: AttentionShape,
) -> Result<()> {
    kv.check(batch, shape.heads)?;
    let HeadShape { heads, kv_heads, head_dim } = shape.heads;
    let qkv = prefix(qkv, batch.rows() * shape.heads.qkv_dim());
    let out = Shared::new(prefix_mut(out, batch.rows() * shape.heads.q_dim()));
    let job = Job { out, qkv, kv, batch, shape };
    let tokens = |t: &Tile| t.rows.len() * (batch.positions[t.rows.end - 1] + 1);
    let work: usize = batch.tiles.iter().map(tokens).sum::<usize>() * heads * head_dim * 2;
    let tasks = batch.tiles.len() * kv_heads;
    let task = |i: usize| {
        // The last rows of a prompt have the most to do: they come first.
        let tile = &batch.tiles[batch.tiles.len() - 1 - i / kv_heads];
        let queries = Queries { job: &job, tile, kv_head: i % kv_heads };
        with_scratch(&SUMS, queries.room(), |room| cpu.simd.run(Run { room, queries }))
            .expect("no memory for the sums of a few rows");
    };
    if work < ALONE {
        (0..tasks).for_each(task)
    } else {
        cpu.pool.run(tasks, &task)
    }
    Ok(())
}

struct Job<'a> {
    out: Shared<'a, f32>, // [rows, heads, head_dim]
    qkv: &'a [f32],       // [rows, qkv_dim]
    kv: &'a Kv,
    batch: &'a Batch,
    shape: AttentionShape,
}

/// The queries of a tile's rows that share a key head, row by row.
struct Queries<'a> {
    job: &'a Job<'a>,
    tile: &'a Tile,
    kv_head: usize,
}

impl Queries<'_> {
    /// Query heads of a key head.
    #[inline(always)]
    fn group(&self) -> usize {
        self.job.shape.heads.heads / self.job.shape.heads.kv_heads
    }

    #[inline(always)]
    fn len(&self) -> usize {
        self.tile.rows.len() * self.group()
    }

    /// A query's row and head.
    #[inline(always)]
    fn place(&self, query: usize) -> (usize, usize) {
        (self.tile.rows.start + query / self.group(), self.kv_head * self.group() + query % self.group())
    }

    /// The positions that a query sees.
    #[inline(always)]
    fn sees(&self, query: usize) -> Range<usize> {
        let end = self.job.batch.positions[self.place(query).0] + 1;
        end - self.job.shape.window.unwrap_or(end).clamp(1, end)..end
    }

    #[inline(always)]
    fn numbers(&self, query: usize) -> *const f32 {
        let HeadShape { head_dim, .. } = self.job.shape.heads;
        let (row, head) = self.place(query);
        let start = row * self.job.shape.heads.qkv_dim() + head * head_dim;
        self.job.qkv[start..start + head_dim].as_ptr()
    }

    /// Numbers of a sum, whole vectors.
    #[inline(always)]
    fn stride(&self) -> usize {
        self.job.shape.heads.head_dim.next_multiple_of(LANES)
    }

    /// Numbers of scratch: those of `Sums`, and a widened block's keys and values.
    fn room(&self) -> usize {
        let block = KV_BLOCK * self.job.shape.heads.head_dim;
        self.len() * (self.stride() + LANES + 1) + 2 * block + LANES
    }
}

/// All queries of a task, with scratch.
struct Run<'a> {
    room: &'a mut [f32],
    queries: Queries<'a>,
}

/// What is known of the queries' results after some blocks.
struct Sums<'a> {
    /// Values times weights.
    values: &'a mut [f32], // [len, stride]
    /// Weights.
    weights: &'a mut [f32], // [len, LANES]
    /// Largest scores.
    largest: &'a mut [f32], // [len]
}

/// One head's part of a block.
#[derive(Clone, Copy)]
struct Block {
    keys: *const f32,   // [head_dim, KV_BLOCK]
    values: *const f32, // [KV_BLOCK, head_dim], and a vector more
    /// The first token's.
    position: usize,
}

impl Kernel for Run<'_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector>(self) {
        let Run { room, queries } = self;
        let (values, room) = room.split_at_mut(queries.len() * queries.stride());
        let (weights, room) = room.split_at_mut(queries.len() * LANES);
        // Whole vectors up to here, so that all of them lie on cache lines.
        let (wide, largest) = room.split_at_mut(room.len() - queries.len());
        values.fill(0.0);
        weights.fill(0.0);
        largest.fill(f32::NEG_INFINITY);
        let mut sums = Sums { values, weights, largest };
        let tokens = queries.sees(0).start..queries.sees(queries.len() - 1).end;
        for i in tokens.start / KV_BLOCK..tokens.end.div_ceil(KV_BLOCK) {
            let block = queries.block::<V>(i, wide);
            // SAFETY: a block of this head's.
            unsafe { queries.add_block::<V>(block, &mut sums) }
        }
        queries.finish::<V>(&mut sums);
    }
}

impl Queries<'_> {
    /// The sequence's `i`th block, widened to `wide` unless it is f32.
    #[inline(always)]
    fn block<V: Vector>(&self, i: usize, wide: &mut [f32]) -> Block {
        let kv = self.job.kv;
        let (dtype, position) = (kv.shape.dtype, i * KV_BLOCK);
        let start = kv.start(self.job.batch.blocks[self.tile.seq].at(i), self.kv_head);
        let keys = &kv.keys[start..][..kv.head_bytes()];
        let values = &kv.values[start..][..kv.head_bytes() + LANES * dtype.size()];
        if dtype == DType::F32 {
            return Block { keys: keys.as_ptr().cast(), values: values.as_ptr().cast(), position };
        }
        let len = KV_BLOCK * self.job.shape.heads.head_dim;
        let (wide_keys, wide_values) = wide.split_at_mut(len);
        // SAFETY: a block has `len` numbers of each.
        unsafe {
            widen::<V>(dtype, keys.as_ptr(), wide_keys);
            widen::<V>(dtype, values.as_ptr(), &mut wide_values[..len]);
        }
        Block { keys: wide_keys.as_ptr(), values: wide_values.as_ptr(), position }
    }

    /// SAFETY: the block is one of this head's.
    #[inline(always)]
    unsafe fn add_block<V: Vector>(&self, block: Block, sums: &mut Sums) {
        let mut query = 0;
        // SAFETY: the caller's.
        unsafe {
            while query + QUERIES <= self.len() {
                self.add_to::<V, QUERIES>(block, sums, query);
                query += QUERIES;
            }
            if query + 2 <= self.len() {
                self.add_to::<V, 2>(block, sums, query);
                query += 2;
            }
            if query < self.len() {
                self.add_to::<V, 1>(block, sums, query);
            }
        }
    }

    /// What a block adds to `R` queries from `first` on.
    ///
    /// SAFETY: as for `add_block`.
    #[inline(always)]
    unsafe fn add_to<V: Vector, const R: usize>(&self, block: Block, sums: &mut Sums, first: usize) {
        let mut seen = [(0, 0); R];
        for (r, seen) in seen.iter_mut().enumerate() {
            let Range { start, end } = self.sees(first + r);
            let within = |p: usize| p.clamp(block.position, block.position + KV_BLOCK) - block.position;
            *seen = (within(start), within(end));
        }
        if seen.iter().all(|(start, end)| start == end) {
            return;
        }
        let mut weights = [[0f32; KV_BLOCK]; R];
        // SAFETY: the caller's.
        unsafe {
            let scores = self.scores::<V, R>(block, first);
            for r in 0..R {
                if seen[r].0 < seen[r].1 {
                    self.weigh::<V>(scores[r], seen[r], &mut weights[r], sums, first + r);
                }
            }
            if seen.iter().all(|s| *s == seen[0]) {
                self.add_values::<V, R>(block, &weights, seen[0], sums, first);
            } else {
                for r in 0..R {
                    self.add_values::<V, 1>(block, &[weights[r]], seen[r], sums, first + r);
                }
            }
        }
    }

    /// Queries times keys.
    ///
    /// SAFETY: as for `add_block`.
    #[inline(always)]
    unsafe fn scores<V: Vector, const R: usize>(&self, block: Block, first: usize) -> [V; R] {
        const CHAINS: usize = 4;
        let head_dim = self.job.shape.heads.head_dim;
        let mut numbers = [self.numbers(first); R];
        for (r, numbers) in numbers.iter_mut().enumerate() {
            *numbers = self.numbers(first + r);
        }
        let mut chains = [[V::splat(0.0); CHAINS]; R];
        let mut scores = [V::splat(0.0); R];
        // SAFETY: the caller's; `numbers` has checked the queries, `Kv::check` that head_dim is even.
        unsafe {
            let mut d = 0;
            while d < head_dim {
                for c in 0..CHAINS {
                    // The last two chains have nothing left if head_dim is no multiple of four.
                    if c == 2 && d + 2 == head_dim {
                        break;
                    }
                    let key = V::load(block.keys.add((d + c) * KV_BLOCK));
                    for r in 0..R {
                        chains[r][c] = V::splat(*numbers[r].add(d + c)).fma(key, chains[r][c]);
                    }
                }
                d += CHAINS;
            }
        }
        for r in 0..R {
            let [a, b, c, d] = chains[r];
            scores[r] = a.add(c).add(b.add(d));
        }
        scores
    }

    /// Scores to weights: a softmax that is not yet divided by its sum.
    #[inline(always)]
    fn weigh<V: Vector>(
        &self,
        scores: V,
        (start, end): (usize, usize),
        weights: &mut [f32; KV_BLOCK],
        sums: &mut Sums,
        query: usize,
    ) {
        let mut scores = scores.mul(V::splat(self.job.shape.scale));
        let stride = self.stride();
        let values = &mut sums.values[query * stride..][..stride];
        let sum = &mut sums.weights[query * LANES..][..LANES];
        // SAFETY: 16 numbers each; the sum of values is of whole vectors.
        unsafe {
            if (start, end) != (0, KV_BLOCK) {
                scores.store(weights.as_mut_ptr());
                weights[..start].fill(f32::NEG_INFINITY);
                weights[end..].fill(f32::NEG_INFINITY);
                scores = V::load(weights.as_ptr());
            }
            let (before, here) = (sums.largest[query], scores.largest());
            let mut total = V::load(sum.as_ptr());
            if here > before {
                let scale = exp::<V>(V::splat(before - here));
                for i in (0..stride).step_by(LANES) {
                    let at = values.as_mut_ptr().add(i);
                    V::load(at).mul(scale).store(at);
                }
                total = total.mul(scale);
                sums.largest[query] = here;
            }
            let weight = exp(scores.sub(V::splat(sums.largest[query])));
            weight.store(weights.as_mut_ptr());
            total.add(weight).store(sum.as_mut_ptr());
        }
    }

    /// Weights times values. Tokens that a query does not see are left out: they may be anything.
    ///
    /// SAFETY: as for `add_block`.
    #[inline(always)]
    unsafe fn add_values<V: Vector, const R: usize>(
        &self,
        block: Block,
        weights: &[[f32; KV_BLOCK]; R],
        seen: (usize, usize),
        sums: &mut Sums,
        first: usize,
    ) {
        let stride = self.stride();
        let sums = &mut sums.values[first * stride..][..R * stride];
        let mut d = 0;
        // SAFETY: the caller's.
        unsafe {
            while V::WIDE && d + 4 * LANES <= stride {
                self.add_chunk::<V, R, 4>(block, weights, seen, sums, d);
                d += 4 * LANES;
            }
            while d < stride {
                self.add_chunk::<V, R, 1>(block, weights, seen, sums, d);
                d += LANES;
            }
        }
    }

    /// `C` vectors of the values from number `d` on. The last vector may reach into the next token's.
    ///
    /// SAFETY: as for `add_block`; `d` and `C` vectors lie within the stride.
    #[inline(always)]
    unsafe fn add_chunk<V: Vector, const R: usize, const C: usize>(
        &self,
        block: Block,
        weights: &[[f32; KV_BLOCK]; R],
        (start, end): (usize, usize),
        sums: &mut [f32], // [R, stride]
        d: usize,
    ) {
        let (stride, head_dim) = (self.stride(), self.job.shape.heads.head_dim);
        let mut chunk = [[V::splat(0.0); C]; R];
        // SAFETY: the caller's.
        unsafe {
            for r in 0..R {
                for c in 0..C {
                    chunk[r][c] = V::load(sums.as_ptr().add(r * stride + d + c * LANES));
                }
            }
            for token in start..end {
                for c in 0..C {
                    let value = V::load(block.values.add(token * head_dim + d + c * LANES));
                    for r in 0..R {
                        chunk[r][c] = V::splat(weights[r][token]).fma(value, chunk[r][c]);
                    }
                }
            }
            for r in 0..R {
                for c in 0..C {
                    chunk[r][c].store(sums.as_mut_ptr().add(r * stride + d + c * LANES));
                }
            }
        }
    }

    /// Divides by the sums of weights and writes the results.
    #[inline(always)]
    fn finish<V: Vector>(&self, sums: &mut Sums) {
        let (stride, heads) = (self.stride(), self.job.shape.heads);
        for query in 0..self.len() {
            let values = &mut sums.values[query * stride..][..stride];
            let weights = &sums.weights[query * LANES..][..LANES];
            // SAFETY: whole vectors of both.
            unsafe {
                let sum = V::splat(V::load(weights.as_ptr()).sum());
                for i in (0..stride).step_by(LANES) {
                    let at = values.as_mut_ptr().add(i);
                    V::load(at).div(sum).store(at);
                }
            }
            let (row, head) = self.place(query);
            let start = row * heads.q_dim() + head * heads.head_dim;
            // SAFETY: a query belongs to one task.
            let out = unsafe { self.job.out.part(start, heads.head_dim) };
            out.copy_from_slice(&values[..heads.head_dim]);
        }
    }
}

//! The ops of a vision tower: rotation by places, attention within segments, GELU.
//!
//! A row's attention goes through its segment's keys in blocks of 16, in their order: its bits do not depend on other
//! segments, nor on the number of threads.
#![allow(unsafe_code)]

use std::ops::Range;

use super::{
    Cpu, GRAIN, linear,
    memory::{Memory, Scratch, Shared, prefix, prefix_mut, with_scratch},
    patches,
    rope::rotate,
    simd::{Kernel, LANES, Vector, exp, store_part},
};
use crate::{
    backend::{
        HeadShape, Norm,
        vision::{PatchShape, Pixels, Places, RowRun, SegmentAttention, VisionOps},
    },
    error::{Error, Result},
};

thread_local! {
    /// A head's keys and values, and scores, of each thread.
    static ROOM: Scratch<f32> = const { Scratch::new(None) };
}

/// Queries of a task: enough that turning the keys costs little.
const TASK_ROWS: usize = 256;
/// Queries that go through the keys together.
const QUERIES: usize = 4;

/// The places of a pass.
pub struct Images {
    inv_freq: Vec<f32>, // [head_dim / 4]
    rows_max: usize,
    cos: Vec<f32>, // [rows, head_dim / 2]
    sin: Vec<f32>, // [rows, head_dim / 2]
    places: Places,
}

impl VisionOps for Cpu {
    type Images = Images;
    type Cutter = PatchShape;

    fn rows_tried(&self, _rows_max: usize) -> Vec<usize> {
        Vec::new()
    }

    fn images(&self, rows_max: usize, inv_freq: &[f32]) -> Result<Images> {
        let (cos, sin) = (Vec::new(), Vec::new());
        Ok(Images { inv_freq: inv_freq.to_vec(), rows_max, cos, sin, places: Places::default() })
    }

    fn set_images(&self, images: &mut Images, from: &Places) -> Result<()> {
        if from.rows.len() > images.rows_max {
            let why = format!("{} patches where there is room for {}", from.rows.len(), images.rows_max);
            return Err(Error::Request(why));
        }
        let freqs = &images.inv_freq;
        let angles = from.rows.iter().flatten().flat_map(|&p| freqs.iter().map(move |f| p as f32 * f));
        (images.cos, images.sin) = angles.map(|angle| (angle.cos(), angle.sin())).unzip();
        images.places.clone_from(from);
        Ok(())
    }

    fn cutter(&self, _rows_max: usize, shape: PatchShape) -> Result<PatchShape> {
        Ok(shape)
    }

    fn cut(
        &self,
        out: &mut Self::Buf,
        shape: &mut PatchShape,
        images: &Images,
        from: &[Pixels<'_>],
    ) -> Result<()> {
        patches::cut(self, out, *shape, &images.places, from);
        Ok(())
    }

    fn row_width(&self, len: usize) -> usize {
        len
    }

    fn linear(&self, out: &mut Self::Buf, x: &Self::Buf, w: &Self::Matrix, rows: usize) -> Result<()> {
        linear::linear(self, linear::Out::Set(out), x, w, rows)
    }

    fn norm(&self, out: &mut Self::Buf, x: &Self::Buf, norm: Norm<'_, Self>) -> Result<()> {
        self.rms_norm(out, x, norm.w, norm.shape);
        Ok(())
    }

    fn gelu(&self, x: &mut Self::Buf, len: usize) -> Result<()> {
        /// Each costs as much as a hundred numbers of other ops.
        const GRAIN: usize = 1 << 8;
        let gelu = |x: f32| {
            let x = f64::from(x);
            (x / 2.0 * (1.0 + erf(x * std::f64::consts::FRAC_1_SQRT_2))) as f32
        };
        self.pool.rows(prefix_mut(x, len), 1, GRAIN, |_, x| x.iter_mut().for_each(|x| *x = gelu(*x)));
        Ok(())
    }

    fn rope_places(&self, qkv: &mut Self::Buf, images: &Images, heads: HeadShape) -> Result<()> {
        let half = heads.head_dim / 2;
        assert_eq!(2 * images.inv_freq.len(), half, "rotations of other heads; this is a bug");
        let (dim, rows) = (heads.qkv_dim(), images.places.rows.len());
        self.pool.rows(prefix_mut(qkv, rows * dim), dim, GRAIN, |first, qkv| {
            for (i, row) in qkv.chunks_exact_mut(dim).enumerate() {
                let [cos, sin] = [&images.cos, &images.sin].map(|all| &all[(first + i) * half..][..half]);
                let rotated = &mut row[..(heads.heads + heads.kv_heads) * heads.head_dim];
                rotated.chunks_exact_mut(heads.head_dim).for_each(|head| rotate(head, cos, sin));
            }
        });
        Ok(())
    }

    fn segment_attention(
        &self,
        out: &mut Self::Buf,
        qkv: &Self::Buf,
        images: &Images,
        shape: SegmentAttention,
    ) -> Result<()> {
        attention(self, out, qkv, images.places.ends(shape.reach), shape)
    }

    fn scatter_cells(&self, out: &mut Self::Buf, x: &Self::Buf, images: &Images, dim: usize) -> Result<()> {
        let cells = &images.places.cells;
        let (out, x) = (prefix_mut(out, cells.len() * dim), prefix(x, cells.len() * dim));
        for (row, &cell) in x.chunks_exact(dim).zip(cells) {
            out[cell as usize * dim..][..dim].copy_from_slice(row);
        }
        Ok(())
    }

    fn copy_rows(&self, to: &mut Self::Buf, from: &Self::Buf, run: RowRun) -> Result<()> {
        let RowRun { from: first, to: at, rows, dim } = run;
        let from = &prefix(from, (first + rows) * dim)[first * dim..];
        prefix_mut(to, (at + rows) * dim)[at * dim..].copy_from_slice(from);
        Ok(())
    }
}

/// The error function, by its series of terms above zero.
fn erf(x: f64) -> f64 {
    // Beyond it differs from 1 by less than an f32 shows.
    const END: f64 = 4.5;
    if x.abs() >= END {
        return x.signum();
    }
    let (mut term, mut sum, mut n) = (x, x, 1.0);
    while term.abs() > sum.abs() * 1e-12 {
        n += 2.0;
        term *= 2.0 * x * x / n;
        sum += term;
    }
    std::f64::consts::FRAC_2_SQRT_PI * (-x * x).exp() * sum
}

fn attention(cpu: &Cpu, out: &mut [f32], qkv: &[f32], ends: &[u32], shape: SegmentAttention) -> Result<()> {
    let HeadShape { heads, kv_heads, .. } = shape.heads;
    assert_eq!(heads, kv_heads, "a tower's heads have keys of their own; this is a bug");
    let rows = ends.last().map_or(0, |&end| end as usize);
    let qkv = prefix(qkv, rows * shape.heads.qkv_dim());
    let out = Shared::new(prefix_mut(out, rows * shape.heads.q_dim()));
    let mut tasks = Vec::new();
    for ends in ends.windows(2) {
        let segment = ends[0] as usize..ends[1] as usize;
        for first in segment.clone().step_by(TASK_ROWS) {
            let queries = first..segment.end.min(first + TASK_ROWS);
            tasks.extend((0..heads).map(|head| (segment.clone(), queries.clone(), head)));
        }
    }
    let longest = ends.windows(2).map(|e| (e[1] - e[0]) as usize).max().unwrap_or(0);
    // The largest allocation is made, or refused, before the threads begin.
    drop(Memory::<f32>::new(room(longest, shape.heads.head_dim))?);
    cpu.pool.run(tasks.len(), &|i| {
        let (segment, queries, head) = tasks[i].clone();
        let len = room(segment.len(), shape.heads.head_dim);
        with_scratch(&ROOM, len, |room| {
            cpu.simd.run(Run { qkv, out, shape, segment, queries, head, room });
        })
        .expect("no memory for the keys of a segment");
    });
    Ok(())
}

/// Numbers of scratch for a segment: keys, values, scores.
fn room(rows: usize, head_dim: usize) -> usize {
    let whole = rows.next_multiple_of(LANES);
    whole * head_dim + rows * head_dim.next_multiple_of(LANES) + QUERIES * whole
}

/// Some queries of a head and a segment.
struct Run<'a> {
    qkv: &'a [f32],       // [rows, qkv_dim]
    out: Shared<'a, f32>, // [rows, q_dim]
    shape: SegmentAttention,
    segment: Range<usize>,
    queries: Range<usize>,
    head: usize,
    room: &'a mut [f32],
}

/// A head's keys, in blocks of 16 turned on their side, and values, and room for scores.
struct Turned<'a> {
    keys: &'a [f32],       // [blocks, head_dim, LANES]
    values: &'a [f32],     // [rows, stride]
    scores: &'a mut [f32], // [QUERIES, blocks * LANES]
}

impl Kernel for Run<'_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector>(mut self) {
        let room = std::mem::take(&mut self.room);
        let (whole, dim) = (self.segment.len().next_multiple_of(LANES), self.shape.heads.head_dim);
        let (keys, room) = room.split_at_mut(whole * dim);
        let (values, scores) = room.split_at_mut(self.segment.len() * self.stride());
        self.turn(keys, values);
        let mut turned = Turned { keys, values, scores };
        let mut query = self.queries.start;
        while query + QUERIES <= self.queries.end {
            self.attend::<V, QUERIES>(&mut turned, query);
            query += QUERIES;
        }
        for query in query..self.queries.end {
            self.attend::<V, 1>(&mut turned, query);
        }
    }
}

impl Run<'_> {
    #[inline(always)]
    fn stride(&self) -> usize {
        self.shape.heads.head_dim.next_multiple_of(LANES)
    }

    /// A row's numbers of this head: queries, keys or values.
    #[inline(always)]
    fn numbers(&self, row: usize, part: usize) -> &[f32] {
        let HeadShape { heads, head_dim, .. } = self.shape.heads;
        &self.qkv[row * self.shape.heads.qkv_dim() + (part * heads + self.head) * head_dim..][..head_dim]
    }

    #[inline(always)]
    fn turn(&self, keys: &mut [f32], values: &mut [f32]) {
        let dim = self.shape.heads.head_dim;
        keys.fill(0.0);
        for (i, row) in self.segment.clone().enumerate() {
            let block = &mut keys[i / LANES * LANES * dim..][..LANES * dim];
            for (d, key) in self.numbers(row, 1).iter().enumerate() {
                block[d * LANES + i % LANES] = *key;
            }
            let (value, rest) = values[i * self.stride()..][..self.stride()].split_at_mut(dim);
            value.copy_from_slice(self.numbers(row, 2));
            rest.fill(0.0);
        }
    }

    /// The results of `R` queries.
    #[inline(always)]
    fn attend<V: Vector, const R: usize>(&self, turned: &mut Turned, first: usize) {
        let (dim, len) = (self.shape.heads.head_dim, self.segment.len());
        let whole = len.next_multiple_of(LANES);
        let sums = self.weigh::<V, R>(turned, first);
        for d in (0..dim).step_by(LANES) {
            let mut chunk = [V::splat(0.0); R];
            for token in 0..len {
                let value = &turned.values[token * self.stride() + d..][..LANES];
                // SAFETY: 16 numbers.
                let value = unsafe { V::load(value.as_ptr()) };
                for r in 0..R {
                    chunk[r] = V::splat(turned.scores[r * whole + token]).fma(value, chunk[r]);
                }
            }
            for r in 0..R {
                let n = LANES.min(dim - d);
                let result = chunk[r].div(V::splat(sums[r]));
                let start = (first + r) * self.shape.heads.q_dim() + self.head * dim + d;
                // SAFETY: `n` numbers of this query and head, which no other task writes.
                unsafe {
                    match n {
                        LANES => result.store(self.out.at(start, n)),
                        _ => store_part(result, self.out.at(start, n), n),
                    }
                }
            }
        }
    }

    /// Scores, then weights that are not yet divided by their sums, which are returned.
    #[inline(always)]
    fn weigh<V: Vector, const R: usize>(&self, turned: &mut Turned, first: usize) -> [f32; R] {
        let (dim, len) = (self.shape.heads.head_dim, self.segment.len());
        let whole = len.next_multiple_of(LANES);
        let mut queries = [self.numbers(first, 0); R];
        for (r, query) in queries.iter_mut().enumerate() {
            *query = self.numbers(first + r, 0);
        }
        for (i, block) in turned.keys[..whole * dim].chunks_exact(LANES * dim).enumerate() {
            let mut scores = [V::splat(0.0); R];
            for (d, key) in block.chunks_exact(LANES).enumerate() {
                // SAFETY: 16 numbers.
                let key = unsafe { V::load(key.as_ptr()) };
                for r in 0..R {
                    scores[r] = V::splat(queries[r][d]).fma(key, scores[r]);
                }
            }
            for r in 0..R {
                let to = &mut turned.scores[r * whole + i * LANES..][..LANES];
                // SAFETY: 16 numbers.
                unsafe { scores[r].mul(V::splat(self.shape.scale)).store(to.as_mut_ptr()) }
            }
        }
        let mut sums = [0.0; R];
        for (scores, sum) in turned.scores.chunks_exact_mut(whole).zip(&mut sums) {
            scores[len..].fill(f32::NEG_INFINITY);
            *sum = softmax::<V>(scores);
        }
        sums
    }
}

/// Weights of whole vectors of scores; returns their sum.
#[inline(always)]
fn softmax<V: Vector>(scores: &mut [f32]) -> f32 {
    let mut largest = V::splat(f32::NEG_INFINITY);
    let mut sum = V::splat(0.0);
    // SAFETY: 16 numbers each.
    unsafe {
        for scores in scores.chunks_exact(LANES) {
            largest = largest.max(V::load(scores.as_ptr()));
        }
        let largest = V::splat(largest.largest());
        for scores in scores.chunks_exact_mut(LANES) {
            let weight = exp(V::load(scores.as_ptr()).sub(largest));
            weight.store(scores.as_mut_ptr());
            sum = sum.add(weight);
        }
    }
    sum.sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_error_function_is_that_of_tables() {
        for (x, y) in [
            (0.0, 0.0),
            (0.1, 0.112_462_916_018_285),
            (1.0, 0.842_700_792_949_715),
            (2.5, 0.999_593_047_982_555),
            (4.4, 0.999_999_999_510_829),
            (9.0, 1.0),
        ] {
            assert!((erf(x) - y).abs() < 1e-11 && (erf(-x) + y).abs() < 1e-11, "{x}: {}", erf(x));
        }
    }
}

//! What is tried while a stage loads, so that no step has to compile kernels, choose algorithms, load code or record a
//! pass.
//!
//! Single steps for every padded number of rows go through the whole stage twice, the second time to be recorded, and
//! their tokens are chosen in all ways that there are kernels for. Chunks of prompts go through one layer: their passes
//! are not recorded, and all layers want the same products. With up to 256 sequences and chunks of 2048 rows those are
//! 19 and 34 numbers of rows.

use std::sync::Arc;

use super::{pad_rows, tune::TIMED_ROWS_MAX};
use crate::{
    backend::{Limits, WarmUp},
    batch::{KV_BLOCK, MicroBatch, OutputRow, SeqId, SeqRows, SeqStart},
    request::SamplingParams,
};

/// Passes of more rows are recorded when they come: seldom, and what that costs is little beside the pass.
const RECORDED_ROWS_MAX: usize = 512;

/// Single steps, their tokens, and chunks of prompts, the largest first, since time for choosing may run out. `turn` says how
/// many of this process have begun the same: they begin elsewhere in the lists, and so choose at the same time.
pub(super) fn all(limits: Limits, turn: usize) -> Vec<WarmUp> {
    let singles_max = limits.seqs_max.min(limits.outputs_max).min(limits.rows_max);
    let mut all: Vec<WarmUp> = numbers_of_rows(singles_max.min(TIMED_ROWS_MAX)).map(singles).collect();
    // The first brings the sequences.
    if let [_, others @ ..] = &mut *all {
        begin_at(others, turn);
    }
    if let Some(first) = all.first_mut() {
        Arc::make_mut(&mut first.batch).starts = (0..singles_max as u32).map(start).collect();
    }
    let ends = (0..singles_max as u64).map(SeqId).collect();
    all.push(WarmUp { batch: Arc::new(MicroBatch { ends, ..MicroBatch::default() }), layers: 0, passes: 0 });
    let chunks = numbers_of_rows(limits.rows_max.min(TIMED_ROWS_MAX));
    let mut chunks: Vec<usize> = chunks.filter(|&rows| rows > singles_max).collect();
    chunks.reverse();
    begin_at(&mut chunks, turn);
    all.extend(chunks.into_iter().filter_map(|rows| chunk(rows, limits)));
    all
}

/// Turns a list by half for the second that goes through it, by quarters for the next two, and so on: all are far from what
/// others have done, or will do next.
fn begin_at<T>(list: &mut [T], turn: usize) {
    const BITS: u32 = 6;
    let share = (turn % (1 << BITS)).reverse_bits() >> (usize::BITS - BITS);
    list.rotate_left((share * list.len()) >> BITS);
}

/// Rows of a vision tower's passes: the largest of each number that ops go over, and of larger ones some. For most of them nothing
/// is tried, but their algorithms have code to load.
pub(super) fn tower_rows(rows_max: usize) -> Vec<usize> {
    let doubled = std::iter::successors(Some(2 * TIMED_ROWS_MAX), |rows| Some(2 * rows));
    let larger = doubled.take_while(|rows| *rows < rows_max).chain([rows_max]);
    let mut all: Vec<usize> = numbers_of_rows(rows_max.min(TIMED_ROWS_MAX)).collect();
    all.extend(larger.filter(|rows| *rows > TIMED_ROWS_MAX));
    all.reverse();
    all
}

/// One for each number of rows that ops go over, up to `max` rows: the largest that is padded to it.
fn numbers_of_rows(max: usize) -> impl Iterator<Item = usize> {
    let next = move |rows: usize| (rows < max).then(|| pad_rows(rows + 1).min(max));
    std::iter::successors(next(0), move |&rows| next(rows))
}

fn singles(rows: usize) -> WarmUp {
    let seqs: Vec<SeqRows> = (0..rows).map(|row| sequence(row, row..row + 1)).collect();
    let outputs =
        seqs.iter().enumerate().map(|(row, s)| OutputRow { row, seq: s.seq, seat: s.seat }).collect();
    let batch = MicroBatch { outputs, ..micro_batch(seqs) };
    let passes = if rows <= RECORDED_ROWS_MAX { 2 } else { 1 };
    WarmUp { batch: Arc::new(batch), layers: usize::MAX, passes }
}

/// So many rows of prompts; `None` if sequences are too few and too short.
fn chunk(rows: usize, limits: Limits) -> Option<WarmUp> {
    let starts = (0..rows).step_by(limits.context_max);
    let seqs: Vec<SeqRows> = starts
        .enumerate()
        .map(|(i, start)| sequence(i, start..rows.min(start + limits.context_max)))
        .collect();
    let fits = seqs.len() <= limits.seqs_max;
    fits.then(|| WarmUp { batch: Arc::new(micro_batch(seqs)), layers: 1, passes: 1 })
}

/// A sequence from its first token on, all in the first KV block: nobody has put anything there yet.
fn sequence(id: usize, rows: std::ops::Range<usize>) -> SeqRows {
    let blocks = vec![0; rows.len().div_ceil(KV_BLOCK)].into();
    SeqRows { seq: SeqId(id as u64), seat: id as u32, row: rows.start, len: rows.len(), cached: 0, blocks }
}

fn micro_batch(seqs: Vec<SeqRows>) -> MicroBatch {
    let positions: Vec<u32> = seqs.iter().flat_map(|s| 0..s.len as u32).collect();
    MicroBatch { ids: vec![0; positions.len()], positions, seqs, ..MicroBatch::default() }
}

/// The first sequence wants all that a greedy one can want, the second draws.
fn start(seat: u32) -> SeqStart {
    let greedy = SamplingParams {
        repetition_penalty: 1.1,
        logit_bias: vec![(0, 1.0)],
        logprobs: Some(1),
        ..SamplingParams::default()
    };
    let sampling = match seat {
        0 => greedy,
        1 => SamplingParams { temperature: 1.0, top_p: 0.9, ..SamplingParams::default() },
        _ => SamplingParams::default(),
    };
    let (sampling, generated) = (Arc::new(sampling), Arc::default());
    SeqStart { seq: SeqId(seat.into()), seat, sampling, seed: 0, prompt: [0].into(), generated }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(all: &[WarmUp]) -> Vec<usize> {
        all.iter().map(|w| w.batch.rows()).collect()
    }

    #[test]
    fn every_number_of_rows_that_ops_go_over_comes_once() {
        let limits = Limits { rows_max: 2304, seqs_max: 256, outputs_max: 256, context_max: 4096 };
        let all = all(limits, 0);
        let (singles, chunks): (Vec<_>, Vec<_>) = all.into_iter().partition(|w| w.layers > 1);
        assert_eq!(rows(&singles)[..8], [1, 2, 4, 8, 16, 24, 32, 40]);
        assert_eq!((singles.len(), rows(&singles)[18]), (19, 256));
        // The first of them ends the sequences.
        assert_eq!((rows(&chunks)[0], chunks[0].passes, chunks[0].batch.ends.len()), (0, 0, 256));
        assert_eq!((chunks.len(), rows(&chunks)[1]), (1 + 34, 2304));
        let mut padded: Vec<usize> =
            rows(&singles).into_iter().chain(rows(&chunks)).map(pad_rows).filter(|&n| n > 0).collect();
        padded.sort_unstable();
        let mut wanted: Vec<usize> = (1..=2304).map(pad_rows).collect();
        wanted.dedup();
        assert_eq!(padded, wanted);
        assert_eq!(singles[0].batch.starts.len(), 256);
        assert!(singles.iter().all(|w| w.passes == 2 && w.batch.outputs.len() == w.batch.rows()));
    }

    #[test]
    fn stages_begin_with_different_numbers_of_rows() {
        let limits = Limits { rows_max: 2304, seqs_max: 256, outputs_max: 256, context_max: 4096 };
        let of = |turn| {
            let all = all(limits, turn);
            // What brings the sequences comes first, and what ends them after all single steps.
            assert!(all[0].batch.starts.len() == 256 && all[19].batch.ends.len() == 256);
            (rows(&all[1..19]), rows(&all[20..]))
        };
        let (singles, chunks) = of(0);
        let begun: Vec<[usize; 2]> = (0..4)
            .map(|turn| {
                let (mut s, mut c) = of(turn);
                let begin = [singles.iter().position(|&n| n == s[0]), chunks.iter().position(|&n| n == c[0])];
                s.sort_unstable();
                c.sort_unstable_by(|a, b| b.cmp(a));
                assert_eq!((&s, &c), (&singles, &chunks), "all of them");
                begin.map(Option::unwrap)
            })
            .collect();
        assert_eq!(begun, [[0, 0], [9, 17], [4, 8], [13, 25]]);
    }

    #[test]
    fn a_tower_tries_every_number_of_rows_that_is_timed() {
        let all = tower_rows(32_768);
        assert_eq!((all[0], all[1], all[2]), (32_768, 16_384, 8192));
        assert!(all.is_sorted_by(|a, b| a > b) && all.contains(&5504) && all.last() == Some(&1), "{all:?}");
        assert_eq!(tower_rows(400)[..3], [400, 384, 352]);
        assert_eq!(tower_rows(10_000)[..2], [10_000, 8192]);
    }

    #[test]
    fn what_is_tried_fits() {
        let of = |rows_max, seqs_max, outputs_max, context_max| Limits {
            rows_max,
            seqs_max,
            outputs_max,
            context_max,
        };
        for limits in [of(1, 1, 1, 1), of(300, 3, 2, 90), of(2049, 1, 1, 2048), of(70_000, 4000, 4000, 8192)]
        {
            for warm in (0..5).flat_map(|turn| all(limits, turn)) {
                let batch = warm.batch;
                assert!(
                    batch.rows() <= limits.rows_max.min(TIMED_ROWS_MAX)
                        && batch.seqs.len() <= limits.seqs_max
                );
                assert!(batch.outputs.len() <= limits.outputs_max);
                assert!(
                    batch
                        .seqs
                        .iter()
                        .all(|s| s.len <= limits.context_max && (s.seat as usize) < limits.seqs_max)
                );
                assert_eq!(batch.seqs.iter().map(|s| s.len).sum::<usize>(), batch.rows());
            }
        }
    }
}

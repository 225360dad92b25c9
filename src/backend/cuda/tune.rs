//! Which of cublasLt's algorithms is the fastest for a product: they are tried.
//!
//! Not of products of many rows. An H200 that makes them without a pause is at the limit of its power, and there the fastest way is
//! the one that takes the least energy, which no short time at the full clock shows: of four, what was quickest so lost up to 7.5%
//! at work, and cublasLt's first guess nothing, in each of seven shapes of 7b and 72b of 1,536 to 8,192 rows. Own kernels are
//! compared with cublasLt by short times all the same: what they save is traffic of memory, and what was faster so was no slower at
//! work (docs/performance.md).
//!
//! A process spends at most about [`BUDGET`] on trying on each GPU, nearly all of it while a model is loaded: see `warm_up`. An
//! empty table costs 7b on an H200 about 100 products with few rows, 2 to 20 ms each, and some 30 of gates and ups with many.
//! Decoders on several GPUs share the shapes out: see `choices`.
#![allow(unsafe_code)]

use std::{sync::atomic::Ordering::Relaxed, time::Duration};

use cudarc::cublaslt::result::CublasError;

use super::{
    Cuda, DeviceFacts, act,
    blas::{Algo, Blas, Operands, Plan, Shape},
    driver::{Context, beside_no_recording},
    memory::{DeviceBuf, Event, Stream},
};
use crate::{backend::DType, error::Result};

/// Algorithms that are tried for a shape.
pub(super) const CANDIDATES: usize = 8;
/// Of products of more rows cublasLt's guess is taken.
const TRIED_ROWS_MAX: usize = 512;
/// Own kernels are compared with cublasLt's up to so many; with more, cublasLt multiplies.
pub(super) const TIMED_ROWS_MAX: usize = 8192;
/// Times that each is run, after a first time that loads its code; the best counts.
const ROUNDS: usize = 3;
/// One that takes so many times as long as the best is given up.
const HOPELESS: f32 = 1.3;
/// When choosing has taken so long on a GPU, cublasLt's guesses are taken for the rest, and not kept on disk.
const BUDGET: Duration = Duration::from_secs(6);

/// How many algorithms are asked for.
pub(super) fn candidates(shape: Shape) -> usize {
    // Nor of columns of a wider matrix: a start would load as much code again, for logits that are wanted less often.
    if shape.rows <= TRIED_ROWS_MAX && shape.width == shape.n { CANDIDATES } else { 1 }
}

/// Whether ways are to be tried for so many rows, after so much time.
pub(super) fn is_worth_it(rows: usize, spent: Duration) -> bool {
    rows <= TIMED_ROWS_MAX && spent < BUDGET
}

/// Times what is put into a stream.
///
/// Weights come from memory in a step, since a layer's are far more than a cache holds. So the cache is overwritten
/// before each run: 7b's smallest matrix would fit into half of an H200's.
pub(super) struct Clock {
    /// Without memory for it, times are of a warm cache.
    cache: Option<DeviceBuf>,
    start: Event,
    end: Event,
}

impl Clock {
    pub(super) fn new(context: Context, facts: &DeviceFacts) -> Result<Clock> {
        let cache = DeviceBuf::new(context, facts.l2_bytes).ok();
        Ok(Clock { cache, start: Event::timed(context)?, end: Event::timed(context)? })
    }

    /// Whether times are of a cold cache.
    pub(super) fn is_cold(&self) -> bool {
        self.cache.is_some()
    }

    fn cool(&self, stream: &Stream) -> Result<()> {
        match &self.cache {
            // SAFETY: as many bytes; dropping them waits for what still uses them.
            Some(cache) => unsafe { stream.fill(cache.ptr(), 0, cache.bytes()) },
            None => Ok(()),
        }
    }

    /// The milliseconds of each of two ways, the best of some runs, between short kernels as in a layer: with some ways they overlap.
    /// The more rows, the less do times differ.
    pub(super) fn compare(
        &self,
        cuda: &Cuda,
        rows: usize,
        ways: [&dyn Fn() -> Result<()>; 2],
    ) -> Result<[f32; 2]> {
        const SHORT: usize = 16 << 10;
        let cache = self.cache.as_ref().filter(|c| c.bytes() >= SHORT * DType::F32.size());
        let short = || cache.map_or(Ok(()), |cache| act::gelu_at(cuda, cache.ptr(), SHORT));
        let mut best = [f32::INFINITY; 2];
        let rounds = if rows <= TRIED_ROWS_MAX { 2 * ROUNDS } else { ROUNDS };
        for round in 0..=rounds {
            for (way, best) in ways.iter().zip(&mut best) {
                // Long enough for the host to be ahead: kernels are to follow each other without a pause.
                self.cool(&cuda.stream)?;
                self.cool(&cuda.stream)?;
                cuda.after_kernel.store(false, Relaxed);
                self.start.record(&cuda.stream)?;
                short()?;
                way()?;
                short()?;
                self.end.record(&cuda.stream)?;
                self.end.synchronize()?;
                let ms = self.end.ms_since(&self.start)?;
                // Its code is loaded in the first round.
                if round > 0 {
                    *best = best.min(ms);
                }
            }
        }
        cuda.after_kernel.store(false, Relaxed);
        Ok(best)
    }
}

impl Blas {
    /// The fastest of some algorithms, and how many milliseconds it takes; `None` if none can be run.
    ///
    /// SAFETY: as for `multiply`.
    pub(super) unsafe fn fastest(
        &self,
        stream: &Stream,
        plan: &Plan,
        operands: Operands,
        candidates: &[Algo],
    ) -> Result<Option<(f32, Algo)>> {
        let clock = Clock::new(self.context, self.facts)?;
        // Milliseconds; an algorithm that cannot be run says so at once.
        let time = |algo: &Algo| -> Result<Result<f32, CublasError>> {
            clock.cool(stream)?;
            // What a recording takes, which has to be waited for, is not the product's time.
            let beside = beside_no_recording();
            clock.start.record(stream)?;
            // SAFETY: the caller's.
            let ran = unsafe { self.enqueue(stream, plan, operands, algo) };
            clock.end.record(stream)?;
            drop(beside);
            clock.end.synchronize()?;
            ran.map_or_else(|e| Ok(Err(e)), |()| clock.end.ms_since(&clock.start).map(Ok))
        };
        let mut best: Option<(f32, Algo)> = None;
        for algo in candidates {
            // Its code is loaded now.
            let mut runs = time(algo)?.is_ok();
            for _ in 0..ROUNDS {
                let Some(ms) = runs.then(|| time(algo)).transpose()?.and_then(|ms| ms.ok()) else { break };
                runs = best.is_none_or(|(least, _)| ms < HOPELESS * least);
                if best.is_none_or(|(least, _)| ms < least) {
                    best = Some((ms, *algo));
                }
            }
        }
        Ok(best)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_tried_is_bounded() {
        let of = |rows| Shape {
            rows,
            n: 37888,
            width: 37888,
            k: 3584,
            dtype: DType::BF16,
            out: DType::BF16,
            bias: false,
            add: false,
        };
        assert_eq!([16, 512, 544, 8192].map(|rows| candidates(of(rows))), [8, 8, 1, 1]);
        assert!(is_worth_it(8192, Duration::ZERO) && !is_worth_it(8448, Duration::ZERO));
        assert!(!is_worth_it(16, BUDGET));
    }
}

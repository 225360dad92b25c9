//! Which of cublasLt's algorithms is the fastest for a product: they are tried.
//!
//! A process spends at most about [`BUDGET`] on that on each GPU, nearly all of it while a model is loaded: see `warm_up`. An
//! empty table costs 7b on an H200 some 200 shapes of 2 to 20 ms; its vision tower's are three times as many, and quicker.
//! Decoders on several GPUs share the shapes out: see `choices`.
#![allow(unsafe_code)]

use std::time::Duration;

use cudarc::cublaslt::result::CublasError;

use super::{
    blas::{Algo, Blas, Operands, Plan, Shape},
    driver::beside_no_recording,
    memory::{DeviceBuf, Event, Stream},
};
use crate::error::Result;

/// Algorithms that are tried for a shape.
pub(super) const CANDIDATES: usize = 8;
/// Of products that take their time: cublasLt guesses well there.
const CANDIDATES_LARGE: usize = 4;
/// Products of more rows do.
const SMALL_ROWS_MAX: usize = 512;
/// With more rows cublasLt's guess is taken: another algorithm would gain a few percent.
pub(super) const TIMED_ROWS_MAX: usize = 8192;
/// Times that each is run, after a first time that loads its code; the best counts.
const ROUNDS: usize = 3;
/// One that takes so many times as long as the best is given up.
const HOPELESS: f32 = 1.3;
/// When choosing has taken so long on a GPU, cublasLt's guesses are taken for the rest, and not kept on disk.
const BUDGET: Duration = Duration::from_secs(6);

/// How many algorithms are asked for.
pub(super) fn candidates(shape: Shape) -> usize {
    if shape.rows <= SMALL_ROWS_MAX { CANDIDATES } else { CANDIDATES_LARGE }
}

/// Whether algorithms are to be tried for a shape, after so much time.
pub(super) fn is_worth_it(shape: Shape, spent: Duration) -> bool {
    shape.rows <= TIMED_ROWS_MAX && spent < BUDGET
}

impl Blas {
    /// The fastest of some algorithms, and how many milliseconds it takes; `None` if none can be run.
    ///
    /// Weights come from memory in a step, since a layer's are far more than a cache holds. So the cache is overwritten
    /// before each run: 7b's smallest matrix would fit into half of an H200's.
    ///
    /// SAFETY: as for `multiply`.
    pub(super) unsafe fn fastest(
        &self,
        stream: &Stream,
        plan: &Plan,
        operands: Operands,
        candidates: &[Algo],
    ) -> Result<Option<(f32, Algo)>> {
        // Without memory for it, times are of a warm cache.
        let cache = DeviceBuf::new(self.context, self.facts.l2_bytes).ok();
        let (start, end) = (Event::timed(self.context)?, Event::timed(self.context)?);
        // Milliseconds; an algorithm that cannot be run says so at once.
        let time = |algo: &Algo| -> Result<Result<f32, CublasError>> {
            if let Some(cache) = &cache {
                // SAFETY: as many bytes, which live until `synchronize` below.
                unsafe { stream.fill(cache.ptr(), 0, cache.bytes())? };
            }
            // What a recording takes, which has to be waited for, is not the product's time.
            let beside = beside_no_recording();
            start.record(stream)?;
            // SAFETY: the caller's.
            let ran = unsafe { self.enqueue(stream, plan, operands, algo) };
            end.record(stream)?;
            drop(beside);
            end.synchronize()?;
            ran.map_or_else(|e| Ok(Err(e)), |()| end.ms_since(&start).map(Ok))
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
    use crate::backend::DType;

    #[test]
    fn what_is_tried_is_bounded() {
        let of = |rows| Shape {
            rows,
            n: 37888,
            k: 3584,
            dtype: DType::BF16,
            out: DType::BF16,
            bias: false,
            add: false,
        };
        assert_eq!([16, 512, 544, 8192].map(|rows| candidates(of(rows))), [8, 8, 4, 4]);
        assert!(is_worth_it(of(8192), Duration::ZERO) && !is_worth_it(of(8448), Duration::ZERO));
        assert!(!is_worth_it(of(16), BUDGET));
    }
}

//! How fast the processors are at what takes a pass's time, found out by a moment's work.

use std::{sync::Arc, time::Instant};

use super::Cpu;
use crate::{
    backend::{Backend, Bytes, DType, Tensor},
    error::Result,
};

/// Numbers of a row.
const K: usize = 4096;
/// Weights that one row goes over: more than most last caches hold.
const COLD_BYTES: usize = 128 << 20;
/// Weights that many rows go over.
const WARM_BYTES: usize = 4 << 20;
const ROWS: usize = 64;
/// The best of so many is what is reached when nobody disturbs.
const TRIES: usize = 3;
/// What it is made up from repeats after so many rows.
const PATTERN_ROWS: usize = 64;

/// What the processors reach in matrix products.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct CpuSpeed {
    /// Threads.
    pub threads: usize,
    /// Bytes of weights a second, for one row.
    pub bandwidth: f64,
    /// Operations a second for many rows, with weights in f32, f16 and bf16.
    pub rates: [f64; 3],
}

/// Measures the processors: some tenths of a second.
pub fn speed(threads: Option<usize>) -> Result<CpuSpeed> {
    let cpu = Cpu::new(threads);
    let rate = |dtype: DType| {
        let seconds = product(&cpu, dtype, WARM_BYTES, ROWS)?;
        Ok((2 * ROWS * WARM_BYTES / dtype.size()) as f64 / seconds)
    };
    Ok(CpuSpeed {
        threads: cpu.threads(),
        bandwidth: COLD_BYTES as f64 / product(&cpu, DType::BF16, COLD_BYTES, 1)?,
        rates: [rate(DType::F32)?, rate(DType::F16)?, rate(DType::BF16)?],
    })
}

/// Seconds of a product of so many rows with so many bytes of weights.
fn product(cpu: &Cpu, dtype: DType, bytes: usize, rows: usize) -> Result<f64> {
    let pattern: Vec<f32> = (0..PATTERN_ROWS * K).map(|i| (i * 7919 % 1009) as f32 / 1009.0 - 0.5).collect();
    let pattern = Tensor::from_f32("pattern", vec![PATTERN_ROWS, K], dtype, &pattern)?;
    let weights = pattern.bytes().repeat(bytes / pattern.bytes().len());
    let (n, len) = (weights.len() / K / dtype.size(), weights.len());
    let matrix =
        cpu.matrix(&[Tensor::new("probe", vec![n, K], dtype, Bytes::new(Arc::new(weights), 0..len))?], &[])?;
    let (mut x, mut out) = (cpu.buf(rows * K)?, cpu.buf(rows * n)?);
    cpu.write(&mut x, &vec![0.25; rows * K])?;
    let mut best = f64::INFINITY;
    for _ in 0..TRIES {
        let since = Instant::now();
        cpu.linear(&mut out, &x, &matrix, rows)?;
        best = best.min(since.elapsed().as_secs_f64());
    }
    Ok(best)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_processor_has_a_speed() {
        let speed = speed(Some(1)).unwrap();
        assert!(speed.threads == 1 && speed.bandwidth > 1e6 && speed.rates.iter().all(|rate| *rate > 1e6));
    }
}

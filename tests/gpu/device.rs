//! GPUs for tests, if there are any.

#![allow(dead_code)] // Each test file uses a part of it.

use std::{
    io::Write,
    sync::{Arc, OnceLock},
};

pub(crate) use pipeline_infer::backend::cuda::Cuda;
use pipeline_infer::{
    backend::{
        DType,
        cuda::{PipelineFacts, devices},
    },
    layout::{Device, Layout, Stage},
};

/// Seats of a backend under test.
pub(crate) const SEATS: usize = 128;

/// How many GPUs there are; says once why there are none. With PIPELINE_INFER_REQUIRE_GPU that fails the test.
pub(crate) fn gpus() -> usize {
    static SEEN: OnceLock<Result<usize, String>> = OnceLock::new();
    let seen = SEEN.get_or_init(|| {
        let found = devices().map(|all| all.len()).map_err(|e| e.to_string());
        if let Err(why) = &found {
            // Not by `eprintln!`, which is shown for failing tests alone.
            let _ = writeln!(std::io::stderr(), "SKIPPED: no GPU: {why}");
        }
        found
    });
    match seen {
        Ok(count) => *count,
        Err(why) if std::env::var_os("PIPELINE_INFER_REQUIRE_GPU").is_some() => panic!("no GPU: {why}"),
        Err(_) => 0,
    }
}

/// A backend on the first GPU.
pub(crate) fn gpu(dtype: DType, head_dim: usize) -> Option<Cuda> {
    let facts = PipelineFacts { dtype, head_dim, seats: SEATS, in_flight: 4 };
    (gpus() > 0).then(|| Cuda::new(0, facts).unwrap_or_else(|e| panic!("opening cuda:0: {e}")))
}

/// PIPELINE_INFER_GPU_QUICK: fewer shapes, for tools that make every access a hundred times slower.
pub(crate) fn quick() -> bool {
    std::env::var_os("PIPELINE_INFER_GPU_QUICK").is_some()
}

/// A backend for each of so many stages, over the GPUs there are.
pub(crate) fn pipeline(stages: usize, dtype: DType, head_dim: usize) -> Vec<Arc<Cuda>> {
    let ordinals: Vec<usize> = (0..stages).map(|i| i % gpus()).collect();
    let facts = PipelineFacts { dtype, head_dim, seats: SEATS, in_flight: 4 };
    Cuda::pipeline(&ordinals, facts).unwrap_or_else(|e| panic!("opening {ordinals:?}: {e}"))
}

/// So many stages of near-equal length over the GPUs there are.
pub(crate) fn layout(stages: usize, layers: usize) -> Layout {
    let even = Layout::even(stages, layers, Device::Cuda(0)).unwrap();
    let on = |(i, stage): (usize, &Stage)| Stage { device: Device::Cuda(i % gpus()), ..stage.clone() };
    Layout::new(even.stages().iter().enumerate().map(on).collect()).unwrap()
}

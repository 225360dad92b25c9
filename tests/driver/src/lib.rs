//! A GPU driver without GPUs: libcuda, NVRTC and cublasLt as the CUDA backend knows them, on threads that sleep for as
//! long as a GPU would work.
//!
//! Streams, events, graphs, memory and its limits are real, and so is what is copied and filled; kernels and products take
//! their time and leave memory as it is. What a driver would not notice is an error here, which ends the process: a wait for
//! an event that was never recorded, memory that is given back while a copy needs it, a launch in another GPU's context.
//!
//! Environment: `DRIVER_GPUS` (4), `DRIVER_GIB` of each (140), `DRIVER_QUEUE`: launches that a stream takes before whoever
//! brings more has to wait, holding its lock (1024), `DRIVER_LOCK`: `gpu` or `process`, whose lock that is (gpu),
//! `DRIVER_SPEED`: how many times as fast as an H200 (1), `DRIVER_COMPILE_MS`: for a file (0), `DRIVER_FAILS`: `2:5000`, the GPU that fails, and at which piece of its
//! work, `DRIVER_STUCK`: the same of one that never ends that piece, so that the end of the process waits for it too.
#![allow(non_snake_case)]

mod blas;
mod compiler;
mod graph;
mod memory;
mod queue;
mod state;

pub use self::{blas::*, compiler::*, graph::*, memory::*, queue::*, state::*};

//! `pipeline-infer` runs a transformer that is too large, or too busy, for one device: it cuts the layers into
//! contiguous stages and streams micro-batches through them.

pub mod backend;
pub mod batch;
pub mod cli;
pub mod engine;
pub mod error;
pub mod layout;
pub mod model;
pub mod pipeline;
pub mod request;
pub mod schedule;
pub mod telemetry;
pub mod text;
pub mod transport;

pub use engine::{Engine, EngineBuilder, Events};
pub use error::{Error, Result};
pub use layout::Layout;
pub use request::{Event, FinishReason, Message, Prompt, Request, SamplingParams, StopParams};

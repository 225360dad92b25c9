//! Stages on their threads, a channel or a boundary between them.

mod metrics;
mod stage;

pub use metrics::{StageMetrics, StageTimes};
pub use stage::{Input, Load, Outcome, Output, Stage, StagesHandle, spawn};

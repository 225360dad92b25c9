//! Stages on their threads, a channel or a boundary between them.

mod fault;
mod metrics;
mod outcome;
mod spans;
mod stage;
mod token_edge;

#[cfg(test)]
pub(crate) use fault::{Fault, Kind, Plan, Point};
pub use metrics::{StageMetrics, StageTimes};
pub use outcome::Outcome;
pub use spans::{Collecting, Probe, StageSpan, Work, collect};
pub use stage::{Input, Load, Output, Stage, StagesHandle, spawn};
pub use token_edge::{AwaitEnqueued, Enqueued, token_edge};

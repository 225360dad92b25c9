//! What runs next: no device, no thread, no clock. `plan` decides, `apply` records.

mod blocks;
mod cost;
mod prefix;
mod queue;
mod scheduler;
mod sequence;

pub use blocks::BlockPool;
pub use cost::{CostModel, PassShape, StageCost};
pub use prefix::{Keys, PromptKeys};
pub use scheduler::{Scheduler, SchedulerConfig, SchedulerStats};
pub use sequence::NewSequence;

//! What runs next: no device, no thread, no clock. `plan` decides, `apply` records.

mod blocks;
mod cost;
mod images;
mod prefix;
mod queue;
mod scheduler;
mod sequence;

pub use blocks::BlockPool;
pub use cost::{CostModel, StageCost};
pub use images::{ImageConfig, ImageId, ImagePass, ImageStats, PassImage, PromptImage, PromptImages};
pub use prefix::{Keys, PromptKeys};
pub use scheduler::{Scheduler, SchedulerConfig, SchedulerStats};
pub use sequence::NewSequence;

pub use crate::batch::PassShape;

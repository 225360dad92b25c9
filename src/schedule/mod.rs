//! What runs next: no device, no thread, no clock. `plan` decides, `apply` records.

mod blocks;
mod scheduler;
mod stats;

pub use blocks::{BlockPool, Lease};
pub use scheduler::{NewSequence, Scheduler, SchedulerConfig};
pub use stats::SchedulerStats;

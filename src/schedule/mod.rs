//! What runs next: no device, no thread, no clock. `plan` decides, `apply` records.

mod blocks;
mod scheduler;

pub use blocks::{BlockPool, Lease};
pub use scheduler::{NewSequence, Scheduler, SchedulerConfig};

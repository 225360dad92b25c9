//! What the scheduler hands to the stages.

use std::sync::Arc;

use crate::batch::MicroBatch;

/// A step: one micro-batch on its way through all stages.
#[derive(Debug, Clone)]
pub struct StepPlan {
    /// Counts up from 0.
    pub step: u64,
    /// The rows.
    pub batch: Arc<MicroBatch>,
}

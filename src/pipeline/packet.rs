//! What crosses a boundary beside the numbers.

use std::sync::Arc;

use crate::batch::MicroBatch;

/// A step's metadata.
#[derive(Debug, Clone)]
pub struct Packet {
    /// Which step.
    pub step: u64,
    /// Its rows.
    pub batch: Arc<MicroBatch>,
}

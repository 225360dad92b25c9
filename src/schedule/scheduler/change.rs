//! Other stages go on with what these have done.

use std::{collections::BTreeSet, ops::Range};

use super::Scheduler;
use crate::{
    batch::{MicroBatch, SeqId},
    schedule::{ImageConfig, sequence::Sequence},
};

impl Scheduler {
    /// Goes on with other stages, which hold the same blocks: as many micro-batches as these want are in flight from now on,
    /// their samplers know nobody, and their image store is empty. No step may be in flight, and no image.
    pub fn change_stages(&mut self, slots: usize, ahead: bool, images: Option<ImageConfig>) {
        assert!(self.steps.is_empty() && slots > 0, "stages change while a step is in flight; this is a bug");
        self.images = self.images.take().zip(images).map(|(old, config)| old.emptied(config));
        (self.config.slots, self.config.ahead) = (slots, ahead);
        self.samplers_new = true;
        self.cut_anew();
    }

    /// Runs of blocks that hold something of use: all that somebody holds, or that can be found. Blocks between two that
    /// are nearer than `gap` are among them.
    pub fn blocks_in_use(&self, gap: usize) -> Vec<Range<usize>> {
        self.pool.in_use(gap)
    }

    /// Tells the samplers of all sequences that they were told of, as far as these have come.
    pub(super) fn start_again(&self, batch: &mut MicroBatch) {
        let new: BTreeSet<SeqId> = batch.starts.iter().map(|start| start.seq).collect();
        let known = |s: &&Sequence| s.started && s.seat.is_some() && !new.contains(&s.new.seq);
        batch.starts.extend(self.sequences.iter().filter(known).map(Sequence::start));
    }
}

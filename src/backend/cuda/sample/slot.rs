//! Memory of the host for a step's sampling.
#![allow(unsafe_code)]

use super::{
    super::{Cuda, DevicePtr, memory::Pinned},
    SampleParams,
};
use crate::{error::Result, request::LOGPROBS_MAX};

/// Room of a step for prompts with penalties and for biases. When there are more, the host waits until it can be used
/// again.
pub(super) const START_WORDS: usize = 16 << 10;
/// `struct Logprobs` in argmax.cu, in words: the chosen one's, how many, their ids, their log-probabilities.
pub(super) const LOGPROBS_WORDS: usize = 2 + 2 * LOGPROBS_MAX as usize;

/// Memory of the host for one step.
pub(super) struct Slot {
    pub(super) params: Pinned,   // [outputs_max] of SampleParams
    pub(super) tokens: Pinned,   // [outputs_max]
    pub(super) logprobs: Pinned, // [outputs_max, LOGPROBS_WORDS]
    pub(super) start: Pinned,    // [START_WORDS]: prompts and biases of sequences that start
}

impl Slot {
    pub(super) fn new(cuda: &Cuda, outputs_max: usize) -> Result<Slot> {
        let pinned = |bytes| Pinned::new(cuda.context, bytes);
        Ok(Slot {
            params: pinned(outputs_max * size_of::<SampleParams>())?,
            tokens: pinned(outputs_max * 4)?,
            logprobs: pinned(outputs_max * LOGPROBS_WORDS * 4)?,
            start: pinned(4 * START_WORDS)?,
        })
    }
}

/// Words that kernels read from the host's memory.
pub(super) struct Staging<'a> {
    cuda: &'a Cuda,
    at: DevicePtr,
    room: &'a mut [u8],
    used: usize,
}

impl<'a> Staging<'a> {
    /// SAFETY: no GPU uses the memory, and `make_room` is called before each kernel's words.
    pub(super) unsafe fn new(cuda: &'a Cuda, memory: &'a mut Pinned) -> Self {
        let at = memory.ptr();
        // SAFETY: the caller's.
        Staging { cuda, at, room: unsafe { memory.as_mut_slice() }, used: 0 }
    }

    /// For so many words, which are read by a kernel that is launched before this is called again.
    pub(super) fn make_room(&mut self, words: usize) -> Result<()> {
        if self.used + 4 * words > self.room.len() {
            self.cuda.synchronize()?;
            self.used = 0;
        }
        Ok(())
    }

    /// Writes words after those before, and returns their address.
    pub(super) fn put(&mut self, words: impl ExactSizeIterator<Item = u32>) -> DevicePtr {
        let (here, bytes) = (self.at.add(self.used), 4 * words.len());
        for (to, word) in self.room[self.used..][..bytes].chunks_exact_mut(4).zip(words) {
            to.copy_from_slice(&word.to_le_bytes());
        }
        self.used += bytes;
        here
    }
}

//! Bytes of pass after pass to their place on the GPU.
#![allow(unsafe_code)]

use super::{
    Cuda,
    memory::{DeviceBuf, Event, Pinned},
};
use crate::error::Result;

/// Room on the GPU for what a pass needs from the host, and pinned buffers in turn: one is filled while others are on their way.
pub(super) struct Relay {
    room: DeviceBuf,
    buffers: Vec<(Pinned, Event)>,
    next: usize,
}

impl Relay {
    /// For so many bytes, of so many passes at once.
    pub(super) fn new(cuda: &Cuda, bytes: usize, passes: usize) -> Result<Relay> {
        let buffer = |_| Ok((Pinned::new(cuda.context, bytes)?, Event::new(cuda.context)?));
        let buffers = (0..passes).map(buffer).collect::<Result<_>>()?;
        Ok(Relay { room: cuda.take(bytes)?, buffers, next: 0 })
    }

    pub(super) fn room(&self) -> &DeviceBuf {
        &self.room
    }

    /// Fills a buffer and puts it on its way; `fill` says how many bytes there are. The host waits for nothing but the buffer's
    /// last copy, which was long ago as a rule.
    pub(super) fn bring(&mut self, cuda: &Cuda, fill: impl FnOnce(&mut [u8]) -> usize) -> Result<()> {
        let (pinned, copied) = &mut self.buffers[self.next];
        cuda.wait_on_host(copied)?;
        // SAFETY: the copy from it has been done.
        let bytes = fill(unsafe { pinned.as_mut_slice() });
        assert!(bytes <= self.room.bytes(), "{bytes} bytes where there is room for fewer; this is a bug");
        // SAFETY: as many bytes on both sides; the buffer is not touched until the event has been reached.
        unsafe { cuda.copy(self.room.ptr(), pinned.ptr(), bytes)? };
        cuda.record_event(copied)?;
        self.next = (self.next + 1) % self.buffers.len();
        Ok(())
    }
}

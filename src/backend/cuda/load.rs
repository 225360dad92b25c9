//! Weights from the host to the GPU, through pinned memory, by several threads.
#![allow(unsafe_code)]

use std::sync::{Mutex, MutexGuard, PoisonError};

use super::{
    driver::Context,
    memory::{DevicePtr, Event, Pinned, Stream},
};
use crate::error::Result;

/// Threads that copy for one stage: one core reads the page cache at 5 to 10 GB/s, the bus takes 55.
const LANES_MAX: usize = 8;
/// Bytes that a lane copies at once.
const CHUNK: usize = 8 << 20;

/// Lanes that copy side by side.
pub(super) struct Uploader {
    lanes: Vec<Mutex<Lane>>,
}

/// Two buffers: one is filled while the other is on its way.
struct Lane {
    stream: Stream,
    buffers: [(Pinned, Event); 2],
    next: usize,
}

impl Uploader {
    /// Lanes for a stage that shares the host with others.
    pub(super) fn new(context: Context, stages: usize) -> Result<Self> {
        let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
        let lanes = (cores / stages.max(1)).clamp(1, LANES_MAX);
        let lanes = (0..lanes).map(|_| Lane::new(context).map(Mutex::new)).collect::<Result<_>>()?;
        Ok(Uploader { lanes })
    }

    /// Copies bytes to the GPU. They are on their way when this returns; `finish` waits for them.
    ///
    /// SAFETY: there is room for them, which nobody else uses before `finish` has returned.
    pub(super) unsafe fn upload(&self, to: DevicePtr, bytes: &[u8]) -> Result<()> {
        let chunks = bytes.len().div_ceil(CHUNK);
        let used = self.lanes.len().min(chunks);
        let copy = |lane: usize| -> Result<()> {
            let mut guard = lock(&self.lanes[lane]);
            for chunk in (lane..chunks).step_by(used) {
                let part = &bytes[chunk * CHUNK..bytes.len().min((chunk + 1) * CHUNK)];
                // SAFETY: the caller's.
                unsafe { guard.copy(to.add(chunk * CHUNK), part)? };
            }
            Ok(())
        };
        if used <= 1 {
            return if used == 1 { copy(0) } else { Ok(()) };
        }
        std::thread::scope(|scope| {
            let copy = &copy;
            let threads: Vec<_> = (1..used).map(|lane| scope.spawn(move || copy(lane))).collect();
            let own = copy(0);
            let others =
                threads.into_iter().map(|t| t.join().expect("copying does not panic; this is a bug"));
            others.fold(own, Result::and)
        })
    }

    /// Waits until everything has arrived.
    pub(super) fn finish(&self) -> Result<()> {
        self.lanes.iter().try_for_each(|lane| lock(lane).stream.synchronize())
    }
}

impl Lane {
    fn new(context: Context) -> Result<Self> {
        let buffer = || Ok((Pinned::new(context, CHUNK)?, Event::new(context)?));
        Ok(Lane { stream: Stream::new(context)?, buffers: [buffer()?, buffer()?], next: 0 })
    }

    /// SAFETY: as for `upload`; at most `CHUNK` bytes.
    unsafe fn copy(&mut self, to: DevicePtr, bytes: &[u8]) -> Result<()> {
        let (pinned, sent) = &mut self.buffers[self.next];
        self.next = 1 - self.next;
        sent.synchronize()?;
        // SAFETY: its last copy has been done.
        unsafe { pinned.as_mut_slice()[..bytes.len()].copy_from_slice(bytes) };
        // SAFETY: the caller's; the buffer is not touched until the event has been reached.
        unsafe { self.stream.copy(to, pinned.ptr(), bytes.len())? };
        sent.record(&self.stream)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

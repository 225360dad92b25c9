//! Weights from the host to the GPU, through pinned memory, by several threads.
//!
//! Who loads a stage puts pieces into a queue and goes on; *lanes* bring them to the GPU, whatever matrix they belong to.
//! What a piece is read from and where it goes to live until it is there, so that no order of dropping is wrong.
#![allow(unsafe_code)]

use std::{
    array,
    ops::Range,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread::JoinHandle,
};

use crossbeam_channel as channel;

use super::{
    driver::Context,
    memory::{DeviceBuf, Event, Pinned, Stream},
};
use crate::{
    backend::Bytes,
    error::{Error, Result},
};

/// Bytes of a piece, and threads that copy for one stage: one core reads the page cache at 5 to 13 GB/s, the bus takes 55.
///
/// A copy should take the bus much longer than starting one (76 µs for 4 MiB), but what all lanes of all stages have in hand should stay
/// in the processors' caches. On a machine with 64 cores, GB/s of all GPUs together:
///
/// | lanes, bytes of a piece | 8, 4 MiB | 8, 2 MiB | 8, 1 MiB | 16, 1 MiB |
/// |---|---:|---:|---:|---:|
/// | one GPU, 15 GB | 46 | 45 | 39 | 40 |
/// | four, 145 GB | 67 | | 92 | 109 |
fn pieces_and_lanes(stages: usize) -> (usize, usize) {
    match stages {
        0..=1 => (4 << 20, 8),
        2 => (2 << 20, 8),
        _ => (1 << 20, 16),
    }
}
/// Pieces that a lane has in hand.
const SLOTS: usize = 2;
/// Bytes in the queue: lanes have work while memory for the next matrices is taken.
const QUEUED: usize = 512 << 20;

/// Brings bytes to a GPU.
pub(super) struct Uploader {
    context: Context,
    piece: usize,
    lanes_max: usize,
    /// Started when they are wanted, ended by `finish`: their pinned memory is needed for loading alone.
    lanes: Mutex<Option<Lanes>>,
}

struct Lanes {
    /// All lanes' slots: 32 MiB are had in some 12 ms, or 50 if four stages want them at once, before the first byte is on its way.
    buffers: Arc<Pinned>,
    pieces: channel::Sender<Piece>,
    /// The queue's other end, for lanes to come.
    queue: channel::Receiver<Piece>,
    threads: Vec<JoinHandle<Result<()>>>,
}

/// Bytes on their way to their place in a buffer.
struct Piece {
    from: Bytes,
    to: Arc<DeviceBuf>,
    at: usize,
}

impl Uploader {
    /// For a stage that shares the host with others, so many in all.
    pub(super) fn new(context: Context, stages: usize) -> Self {
        let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
        let (piece, most) = pieces_and_lanes(stages);
        let lanes_max = (cores / stages.max(1)).clamp(1, most);
        Uploader { context, piece, lanes_max, lanes: Mutex::default() }
    }

    /// Copies bytes to `at` in a buffer. They are on their way when this returns; `finish` waits for them, and tells what
    /// went wrong.
    pub(super) fn upload(&self, to: &Arc<DeviceBuf>, at: usize, from: &Bytes) -> Result<()> {
        assert!(at + from.len() <= to.bytes(), "an upload beyond its buffer; this is a bug");
        let mut lanes = self.lock();
        let lanes = match &mut *lanes {
            Some(lanes) => lanes,
            none => none.insert(Lanes::none(self)?),
        };
        for start in (0..from.len()).step_by(self.piece) {
            let part = from.part(start..from.len().min(start + self.piece));
            lanes.put(Piece { from: part, to: to.clone(), at: at + start }, self)?;
        }
        Ok(())
    }

    /// Waits until everything has arrived.
    pub(super) fn finish(&self) -> Result<()> {
        let Some(Lanes { pieces, queue, threads, .. }) = self.lock().take() else { return Ok(()) };
        // Lanes end when the queue is empty and closed.
        drop((pieces, queue));
        let ends = threads.into_iter().map(|t| t.join().expect("copying does not panic; this is a bug"));
        ends.fold(Ok(()), Result::and)
    }

    fn lock(&self) -> MutexGuard<'_, Option<Lanes>> {
        self.lanes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Uploader {
    fn drop(&mut self) {
        // Whoever wanted the bytes has waited for them, or has failed and said why.
        let _ = self.finish();
    }
}

impl Lanes {
    fn none(of: &Uploader) -> Result<Lanes> {
        let buffers = Arc::new(Pinned::of_one(of.context, of.lanes_max * SLOTS * of.piece)?);
        let (pieces, queue) = channel::bounded(QUEUED / of.piece);
        Ok(Lanes { buffers, pieces, queue, threads: Vec::new() })
    }

    /// Enqueues a piece, with one lane more if those there are do not keep up.
    fn put(&mut self, piece: Piece, of: &Uploader) -> Result<()> {
        let busy = self.threads.is_empty() || self.queue.len() > 2 * self.threads.len();
        if busy && self.threads.len() < of.lanes_max {
            let (context, queue, buffers) = (of.context, self.queue.clone(), self.buffers.clone());
            let slot = |i| self.threads.len() * SLOTS + i;
            let slots = array::from_fn(|i| slot(i) * of.piece..(slot(i) + 1) * of.piece);
            let lane = move || run(Lane::new(context, buffers, slots), &queue);
            let thread = std::thread::Builder::new().name("load".into()).spawn(lane);
            self.threads.push(thread.map_err(|e| Error::Engine(format!("no thread: {e}")))?);
        }
        self.pieces.send(piece).expect("this end of the queue is open; this is a bug");
        Ok(())
    }
}

/// A lane, until the queue is closed.
fn run(lane: Result<Lane>, queue: &channel::Receiver<Piece>) -> Result<()> {
    let outcome = lane.and_then(|mut lane| {
        queue.iter().try_for_each(|piece| lane.copy(piece))?;
        lane.stream.synchronize()
    });
    if outcome.is_err() {
        // Nobody may wait for room in a queue that no lane empties.
        queue.iter().for_each(drop);
    }
    outcome
}

/// One slot is filled while the other is on its way.
struct Lane {
    stream: Stream,
    buffers: Arc<Pinned>,
    slots: [Slot; SLOTS],
    next: usize,
}

struct Slot {
    /// Its part of the buffers, which is its own.
    part: Range<usize>,
    sent: Event,
    /// What is on its way, or has been.
    piece: Option<Piece>,
}

impl Lane {
    /// Its slots are those parts of the buffers.
    fn new(context: Context, buffers: Arc<Pinned>, slots: [Range<usize>; SLOTS]) -> Result<Self> {
        let slot = |part| Ok(Slot { part, sent: Event::new(context)?, piece: None });
        let [a, b] = slots;
        Ok(Lane { stream: Stream::new(context)?, buffers, slots: [slot(a)?, slot(b)?], next: 0 })
    }

    fn copy(&mut self, piece: Piece) -> Result<()> {
        let slot = &mut self.slots[self.next];
        self.next = 1 - self.next;
        // An event that was never recorded has been reached.
        slot.sent.synchronize()?;
        let bytes = piece.from.len();
        // SAFETY: the slot's part is its own, and its last copy has been done.
        piece.from.copy(unsafe { &mut self.buffers.part_mut(slot.part.clone())[..bytes] })?;
        let to = piece.to.ptr().add(piece.at);
        // SAFETY: `upload` has checked that the piece fits, and both ends live in the lane, whose slot is not touched until
        // the event has been reached.
        unsafe { self.stream.copy(to, self.buffers.ptr().add(slot.part.start), bytes)? };
        slot.piece = Some(piece);
        slot.sent.record(&self.stream)
    }
}

impl Drop for Lane {
    fn drop(&mut self) {
        // After a failure copies may still be under way.
        let _ = self.stream.synchronize();
    }
}

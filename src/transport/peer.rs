//! Between GPUs: a kernel of the sender writes to the receiver's memory, and events keep the order. The host passes on
//! where to look, and never waits for a GPU.
#![allow(unsafe_code)]

use std::sync::Arc;

use super::{Closed, Ends, Receiver, Sender, Transport};
use crate::{
    backend::{
        Backend,
        cuda::{Buf, Cuda, Event, Ring},
    },
    batch::Step,
    error::{Error, Result},
    sync::channel,
};

/// Into the memory of the receiver's GPU, where it can be reached and the self-test passes; else through pinned
/// memory of the host, with a warning.
#[derive(Debug, Clone, Copy, Default)]
pub struct Peer {
    /// Takes every self-test for failed: for tests of what is done then.
    pub distrust: bool,
}

/// Through pinned memory of the host, which every GPU reaches, and the processor.
#[derive(Debug, Clone, Copy, Default)]
pub struct Staged;

impl Transport<Cuda> for Peer {
    fn name(&self) -> &'static str {
        "peer"
    }

    fn connect(&self, from: Arc<Cuda>, to: Arc<Cuda>, depth: usize, len_max: usize) -> Result<Ends<Cuda>> {
        let why = if from.reaches(&to)? {
            let ring = to.ring(ring_bytes(depth, len_max))?;
            match from.self_test(&to, &ring)? {
                None if !self.distrust => {
                    made(&from, &to, "peer");
                    return ends(from, to, ring, depth, len_max);
                }
                wrong => wrong.unwrap_or_else(|| "a self-test that is made to fail".into()),
            }
        } else {
            "no peer access".into()
        };
        tracing::warn!(
            from = from.name(),
            to = to.name(),
            why,
            "these GPUs do not bring packets into each other's memory: they go through the host, which is slower"
        );
        Staged.connect(from, to, depth, len_max)
    }
}

impl Transport<Cuda> for Staged {
    fn name(&self) -> &'static str {
        "staged"
    }

    fn connect(&self, from: Arc<Cuda>, to: Arc<Cuda>, depth: usize, len_max: usize) -> Result<Ends<Cuda>> {
        let ring = to.host_ring(ring_bytes(depth, len_max))?;
        if let Some(wrong) = from.self_test(&to, &ring)? {
            let (from, to) = (from.name(), to.name());
            return Err(Error::Engine(format!("{from} to {to}, through pinned memory: {wrong}")));
        }
        made(&from, &to, "staged");
        ends(from, to, ring, depth, len_max)
    }
}

fn made(from: &Cuda, to: &Cuda, way: &str) {
    tracing::debug!(from = from.name(), to = to.name(), way, "boundary");
}

/// Bytes of a boundary's ring: room for all packets, and for the self-test.
pub fn ring_bytes(depth: usize, len_max: usize) -> usize {
    (depth * entry_bytes(len_max)).max(Cuda::TEST_BYTES)
}

/// Entries begin where wide stores may.
pub(super) fn entry_bytes(len_max: usize) -> usize {
    (4 * len_max).next_multiple_of(256)
}

/// One place in the ring.
struct Entry {
    index: usize,
    /// Recorded by the sender when the packet has been written.
    full: Event,
    /// Recorded by the receiver when it has been read.
    free: Event,
    /// Written to before, and not waited for since: that it has been read.
    used: bool,
}

fn ends(from: Arc<Cuda>, to: Arc<Cuda>, ring: Ring, depth: usize, len_max: usize) -> Result<Ends<Cuda>> {
    assert!(depth > 0, "a boundary without buffers; this is a bug");
    let ring = Arc::new(ring);
    let (full_in, full_out) = channel::bounded(depth);
    let (free_in, free_out) = channel::bounded(depth);
    for index in 0..depth {
        let entry = Entry { index, full: from.event()?, free: to.event()?, used: false };
        free_in.send(entry).expect("the boundary's own end is open; this is a bug");
    }
    let sender =
        PeerSender { cuda: from, ring: ring.clone(), len_max, full: full_in, free: free_out, room: None };
    let receiver = PeerReceiver { cuda: to, ring, len_max, full: full_out, free: free_in, came: None };
    Ok((Box::new(sender), Box::new(receiver)))
}

struct PeerSender {
    cuda: Arc<Cuda>,
    ring: Arc<Ring>,
    len_max: usize,
    full: channel::Sender<(Step, Entry, usize)>,
    free: channel::Receiver<Entry>,
    room: Option<Entry>,
}

impl Sender<Cuda> for PeerSender {
    fn wait_for_room(&mut self) -> Result<(), Closed> {
        if self.room.is_none() {
            self.room = Some(self.free.recv().map_err(|_| Closed)?);
        }
        Ok(())
    }

    fn clear(&mut self) -> Result<()> {
        match &mut self.room {
            Some(entry) if entry.used => {
                self.cuda.wait(&entry.free)?;
                entry.used = false;
                Ok(())
            }
            _ => Ok(()),
        }
    }

    fn send(&mut self, step: Step, hidden: &Buf, len: usize) -> Result<()> {
        self.clear()?;
        let mut entry = self.room.take().expect("nothing was waited for before a send; this is a bug");
        assert!(len <= self.len_max, "a packet larger than the boundary; this is a bug");
        entry.used = true;
        let to = self.ring.ptr().add(entry.index * entry_bytes(self.len_max));
        // SAFETY: the entry has room for `len_max` numbers and is ours until it has been sent; `f32s` checks the
        // buffer, which belongs to the decoder that sends.
        unsafe { self.cuda.send_rows(to, hidden.f32s(len), len, &entry.full)? };
        // Only now: a wait for an event that has not been recorded would be none.
        self.full.send((step, entry, len)).map_err(|_| Error::Engine("the next stage is gone".into()))
    }
}

struct PeerReceiver {
    cuda: Arc<Cuda>,
    ring: Arc<Ring>,
    len_max: usize,
    full: channel::Receiver<(Step, Entry, usize)>,
    free: channel::Sender<Entry>,
    came: Option<Came>,
}

/// A packet that the host knows of.
struct Came {
    entry: Entry,
    len: usize,
    /// The stream waits for it.
    awaited: bool,
}

impl Receiver<Cuda> for PeerReceiver {
    fn wait(&mut self) -> Result<Step, Closed> {
        let (step, entry, len) = self.full.recv().map_err(|_| Closed)?;
        self.came = Some(Came { entry, len, awaited: false });
        Ok(step)
    }

    fn arrive(&mut self) -> Result<()> {
        let came = self.came.as_mut().expect("nothing came that could arrive; this is a bug");
        if !came.awaited {
            self.cuda.wait(&came.entry.full)?;
            came.awaited = true;
        }
        Ok(())
    }

    fn take(&mut self, hidden: &mut Buf) -> Result<()> {
        self.arrive()?;
        let Came { entry, len, .. } = self.came.as_ref().expect("nothing came before a take; this is a bug");
        let from = self.ring.ptr().add(entry.index * entry_bytes(self.len_max));
        // SAFETY: the packet has been written to the entry, which is ours until it has been given back; `f32s` checks
        // the buffer, which belongs to the decoder that receives.
        unsafe { self.cuda.copy_rows(hidden.f32s(*len), from, *len) }
    }

    fn give_back(&mut self) -> Result<()> {
        let Came { entry, .. } =
            self.came.take().expect("nothing came before it is given back; this is a bug");
        // A record right after the copy would stand between it and the pass.
        self.cuda.record_event(&entry.free)?;
        // The sender may be gone already; then nobody needs the entry.
        let _ = self.free.send(entry);
        Ok(())
    }
}

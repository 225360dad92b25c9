//! Between a GPU and the processor: packets lie in pinned memory of the host. The GPU's host thread never waits for it; the
//! processor's waits for an event, before it takes its turn.
#![allow(unsafe_code)]

use std::sync::Arc;

use super::{
    Closed, EndsBetween, Receiver, Sender, Staged, Transport,
    peer::{entry_bytes, ring_bytes},
};
use crate::{
    backend::{
        Backend,
        cpu::Cpu,
        cuda::{Buf, Cuda, Event, Ring},
    },
    batch::Step,
    error::{Error, Result},
    sync::channel,
};

/// One place in the ring.
struct Entry {
    index: usize,
    /// Recorded by the GPU when it has written or read the packet.
    done: Event,
    /// That the processor has to wait for it first.
    used: bool,
}

/// What both ends have.
struct End<T> {
    /// The boundary's GPU.
    cuda: Arc<Cuda>,
    ring: Arc<Ring>,
    len_max: usize,
    /// Packets, or entries that are free.
    to: channel::Sender<T>,
}

impl<T> End<T> {
    fn at(&self, entry: &Entry) -> usize {
        entry.index * entry_bytes(self.len_max)
    }

    /// Waits on the host until the GPU is done with an entry.
    fn wait(&self, entry: &mut Entry) -> Result<()> {
        if entry.used {
            self.cuda.wait_on_host(&entry.done)?;
            entry.used = false;
        }
        Ok(())
    }
}

/// A step with its packet's place, and how many numbers it has.
type Packet = (Step, Entry, usize);

/// A boundary's channels.
struct Channels {
    full: (channel::Sender<Packet>, channel::Receiver<Packet>),
    free: (channel::Sender<Entry>, channel::Receiver<Entry>),
    ring: Arc<Ring>,
}

impl Channels {
    fn new(cuda: &Cuda, depth: usize, len_max: usize) -> Result<Channels> {
        assert!(depth > 0, "a boundary without buffers; this is a bug");
        let ring = cuda.host_ring(ring_bytes(depth, len_max))?;
        if let Some(wrong) = cuda.self_test(cuda, &ring)? {
            return Err(Error::Engine(format!("{} and cpu, through pinned memory: {wrong}", cuda.name())));
        }
        let (full, free) = (channel::bounded(depth), channel::bounded(depth));
        for index in 0..depth {
            let entry = Entry { index, done: cuda.event()?, used: false };
            free.0.send(entry).expect("the boundary's own end is open; this is a bug");
        }
        Ok(Channels { full, free, ring: Arc::new(ring) })
    }
}

impl Transport<Cuda, Cpu> for Staged {
    fn name(&self) -> &'static str {
        "staged"
    }

    fn connect(
        &self,
        cuda: Arc<Cuda>,
        cpu: Arc<Cpu>,
        depth: usize,
        len_max: usize,
    ) -> Result<EndsBetween<Cuda, Cpu>> {
        let Channels { full, free, ring } = Channels::new(&cuda, depth, len_max)?;
        let end = End { cuda: cuda.clone(), ring: ring.clone(), len_max, to: full.0 };
        let sender = FromGpu { end, free: free.1, room: None };
        let end = End { cuda, ring, len_max, to: free.0 };
        let receiver = ToCpu { cpu, end, full: full.1, came: None, failed: None };
        Ok((Box::new(sender), Box::new(receiver)))
    }
}

impl Transport<Cpu, Cuda> for Staged {
    fn name(&self) -> &'static str {
        "staged"
    }

    fn connect(
        &self,
        cpu: Arc<Cpu>,
        cuda: Arc<Cuda>,
        depth: usize,
        len_max: usize,
    ) -> Result<EndsBetween<Cpu, Cuda>> {
        let Channels { full, free, ring } = Channels::new(&cuda, depth, len_max)?;
        let end = End { cuda: cuda.clone(), ring: ring.clone(), len_max, to: full.0 };
        let sender = FromCpu { cpu, end, free: free.1, room: None, failed: None };
        let end = End { cuda, ring, len_max, to: free.0 };
        let receiver = ToGpu { end, full: full.1, came: None };
        Ok((Box::new(sender), Box::new(receiver)))
    }
}

struct FromGpu {
    end: End<Packet>,
    free: channel::Receiver<Entry>,
    room: Option<Entry>,
}

impl Sender<Cuda> for FromGpu {
    fn wait_for_room(&mut self) -> Result<(), Closed> {
        if self.room.is_none() {
            self.room = Some(self.free.recv().map_err(|_| Closed)?);
        }
        Ok(())
    }

    /// The processor has read an entry that it gives back.
    fn clear(&mut self) -> Result<()> {
        Ok(())
    }

    fn send(&mut self, step: Step, hidden: &Buf, len: usize) -> Result<()> {
        let End { cuda, ring, len_max, to } = &self.end;
        let mut entry = self.room.take().expect("nothing was waited for before a send; this is a bug");
        assert!(len <= *len_max, "a packet larger than the boundary; this is a bug");
        entry.used = true;
        let at = ring.ptr().add(self.end.at(&entry));
        // SAFETY: the entry has room for `len_max` numbers and is ours until it has been sent; `f32s` checks the
        // buffer, which belongs to the decoder that sends.
        unsafe { cuda.send_rows(at, hidden.f32s(len), len, &entry.done)? };
        // Only now: a wait for an event that has not been recorded would be none.
        to.send((step, entry, len)).map_err(|_| Error::Engine("the next stage is gone".into()))
    }
}

struct ToCpu {
    cpu: Arc<Cpu>,
    end: End<Entry>,
    full: channel::Receiver<Packet>,
    came: Option<(Entry, usize)>,
    /// What the GPU said instead of a packet.
    failed: Option<Error>,
}

impl Receiver<Cpu> for ToCpu {
    /// Waits for the GPU too: others may use the processor meanwhile.
    fn wait(&mut self) -> Result<Step, Closed> {
        let (step, mut entry, len) = self.full.recv().map_err(|_| Closed)?;
        self.failed = self.end.wait(&mut entry).err();
        self.came = Some((entry, len));
        Ok(step)
    }

    fn arrive(&mut self) -> Result<()> {
        self.failed.take().map_or(Ok(()), Err)
    }

    fn take(&mut self, hidden: &mut <Cpu as Backend>::Buf) -> Result<()> {
        self.arrive()?;
        let (entry, len) = self.came.as_ref().expect("nothing came before a take; this is a bug");
        // SAFETY: the GPU has written the packet to the entry, which is ours until it has been given back.
        unsafe { self.end.ring.read(self.end.at(entry), *len, |numbers| self.cpu.write(hidden, numbers)) }
    }

    fn give_back(&mut self) -> Result<()> {
        let (entry, _) = self.came.take().expect("nothing came before it is given back; this is a bug");
        // The sender may be gone already; then nobody needs the entry.
        let _ = self.end.to.send(entry);
        Ok(())
    }
}

struct FromCpu {
    cpu: Arc<Cpu>,
    end: End<Packet>,
    free: channel::Receiver<Entry>,
    room: Option<Entry>,
    /// What the GPU said instead of reading a packet.
    failed: Option<Error>,
}

impl Sender<Cpu> for FromCpu {
    /// Until the GPU has read what was there.
    fn wait_for_room(&mut self) -> Result<(), Closed> {
        if self.room.is_none() {
            let mut entry = self.free.recv().map_err(|_| Closed)?;
            self.failed = self.end.wait(&mut entry).err();
            self.room = Some(entry);
        }
        Ok(())
    }

    fn clear(&mut self) -> Result<()> {
        self.failed.take().map_or(Ok(()), Err)
    }

    fn send(&mut self, step: Step, hidden: &<Cpu as Backend>::Buf, len: usize) -> Result<()> {
        self.clear()?;
        let End { ring, len_max, to, .. } = &self.end;
        let entry = self.room.take().expect("nothing was waited for before a send; this is a bug");
        assert!(len <= *len_max, "a packet larger than the boundary; this is a bug");
        // SAFETY: the GPU has read what was in the entry, which has room for `len_max` numbers and is ours until it has
        // been sent.
        unsafe { ring.write(self.end.at(&entry), len, |numbers| self.cpu.read(numbers, hidden))? };
        to.send((step, entry, len)).map_err(|_| Error::Engine("the next stage is gone".into()))
    }
}

struct ToGpu {
    end: End<Entry>,
    full: channel::Receiver<Packet>,
    came: Option<(Entry, usize)>,
}

impl Receiver<Cuda> for ToGpu {
    fn wait(&mut self) -> Result<Step, Closed> {
        let (step, entry, len) = self.full.recv().map_err(|_| Closed)?;
        self.came = Some((entry, len));
        Ok(step)
    }

    /// What the processor has sent is there.
    fn arrive(&mut self) -> Result<()> {
        Ok(())
    }

    fn take(&mut self, hidden: &mut Buf) -> Result<()> {
        let (entry, len) = self.came.as_ref().expect("nothing came before a take; this is a bug");
        let from = self.end.ring.ptr().add(self.end.at(entry));
        // SAFETY: the packet has been written to the entry, which is ours until it has been given back; `f32s` checks
        // the buffer, which belongs to the decoder that receives.
        unsafe { self.end.cuda.copy_rows(hidden.f32s(*len), from, *len) }
    }

    fn give_back(&mut self) -> Result<()> {
        let (mut entry, _) = self.came.take().expect("nothing came before it is given back; this is a bug");
        // A record right after the copy would stand between it and the pass.
        self.end.cuda.record_event(&entry.done)?;
        entry.used = true;
        // The sender may be gone already; then nobody needs the entry.
        let _ = self.end.to.send(entry);
        Ok(())
    }
}

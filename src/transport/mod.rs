//! How hidden states cross from a stage to the next: one file a way.
//!
//! A boundary is a ring of buffers made once. The sender waits for room before it copies; the receiver gives
//! a buffer back once it has copied it out.

mod host;
mod peer;
mod pinned;

pub use host::Host;
pub use peer::{Peer, Staged, ring_bytes};

use std::sync::Arc;

use crate::{
    backend::{Backend, cpu::Cpu, cuda::Cuda},
    batch::Step,
    error::Result,
};

/// The other side is gone: the pipeline is ending.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Closed;

/// A way across a boundary, between devices of one kind or of two.
pub trait Transport<A: Backend, B: Backend = A>: Sync {
    /// As in logs.
    fn name(&self) -> &'static str;
    /// Makes the two ends of a boundary of `depth` buffers, each for `len_max` numbers.
    fn connect(&self, from: Arc<A>, to: Arc<B>, depth: usize, len_max: usize) -> Result<EndsBetween<A, B>>;
}

/// The two ends of a boundary.
pub type Ends<B> = EndsBetween<B, B>;

/// The two ends of a boundary between devices of two kinds.
pub type EndsBetween<A, B> = (Box<dyn Sender<A>>, Box<dyn Receiver<B>>);

/// The end that a stage writes to.
pub trait Sender<B: Backend>: Send {
    /// Waits until there is room for one step.
    fn wait_for_room(&mut self) -> Result<(), Closed>;
    /// What comes later on the device waits until the room that there is has been read there; `send` asks for it by
    /// itself if nobody has.
    fn clear(&mut self) -> Result<()>;
    /// Sends the first `len` numbers of `hidden`. There must be room.
    fn send(&mut self, step: Step, hidden: &B::Buf, len: usize) -> Result<()>;
}

/// The end that a stage reads from.
pub trait Receiver<B: Backend>: Send {
    /// Waits for a step.
    fn wait(&mut self) -> Result<Step, Closed>;
    /// What comes later on the device waits until the numbers of the step that came last are there; `take` asks for it
    /// by itself if nobody has.
    fn arrive(&mut self) -> Result<()>;
    /// Copies the numbers of the step that came last.
    fn take(&mut self, hidden: &mut B::Buf) -> Result<()>;
    /// Gives the buffer back that they came in, some time after `take`: when it delays nothing.
    fn give_back(&mut self) -> Result<()>;
}

/// Every way across between GPUs.
pub fn gpu_transports() -> [&'static dyn Transport<Cuda>; 3] {
    [&Peer { distrust: false }, &Staged, &Host]
}

/// Every way across between any two devices.
pub fn transports<A: Backend, B: Backend>() -> [&'static dyn Transport<A, B>; 1] {
    [&Host]
}

/// Every way across from a GPU to the processor.
pub fn down_transports() -> [&'static dyn Transport<Cuda, Cpu>; 2] {
    [&Staged, &Host]
}

/// Every way across from the processor to a GPU.
pub fn up_transports() -> [&'static dyn Transport<Cpu, Cuda>; 2] {
    [&Staged, &Host]
}

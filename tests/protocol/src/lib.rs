//! The channel protocol between worker, stages, boundaries and results, under shuttle: the pipeline's own files, compiled with
//! a scheduler's threads and channels ([`sync`]) and devices that keep account of order ([`world`]).
//!
//! `pipeline` and `transport` are the files of the crate next door, not copies. In place of what they import stand the modules
//! of the same names here. [`drive`] is what the engine's worker is to the stages.
#![cfg(not(test))]
#![allow(missing_docs, dead_code, reason = "the crate next door uses and documents the rest of its files")]

pub mod backend;
#[path = "../../../src/batch/mod.rs"]
pub mod batch;
pub mod drive;
#[path = "../../../src/error.rs"]
pub mod error;
pub mod explore;
pub mod model;
#[path = "../../../src/pipeline/mod.rs"]
pub mod pipeline;
#[path = "../../../src/request.rs"]
pub mod request;
pub mod sync;
#[path = "../../../src/transport/mod.rs"]
pub mod transport;
pub mod wiring;
pub mod world;

/// The same with bugs in them, as `build.rs` writes them from [`bugs::BUGS`].
pub mod seeded {
    include!(concat!(env!("OUT_DIR"), "/seeded.rs"));
}

use batch::{Sampled, Step};
pub use error::{Error, Result};
use sync::{channel, thread::JoinHandle};

/// A pipeline to try.
#[derive(Debug, Clone, Copy)]
pub struct Setup {
    pub stages: usize,
    /// Groups of sequences that take turns. Where the host runs ahead, two steps of each are in flight, else one.
    pub slots: usize,
    pub way: Way,
    /// Entries of each boundary.
    pub ring: usize,
    /// Room of the channel to the first stage.
    pub steps_room: usize,
}

/// How stages are joined.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    Peer,
    Staged,
    Host,
    /// Through the host, with ops that are done when they return.
    Processor {
        one_thread: bool,
    },
    /// On devices of two kinds, which meet in pinned memory: a bit for each stage that is on a GPU.
    Mixed {
        gpus: usize,
    },
}

/// A pipeline whose threads run.
pub struct Wired {
    pub steps: channel::Sender<Step>,
    pub results: channel::Receiver<(u64, Result<Vec<Sampled>>)>,
    /// Each with how many stages it has, and what they say of their loading.
    pub threads: Vec<(usize, channel::Receiver<Result<usize>>, JoinHandle<()>)>,
}

/// Starts the threads of a pipeline.
pub type Wire = fn(&Setup, &world::World) -> Wired;

impl Setup {
    /// As the engine makes it: boundaries and the steps' channel have room for what may be in flight.
    pub fn new(stages: usize, slots: usize, way: Way) -> Setup {
        let setup = Setup { stages, slots, way, ring: 0, steps_room: 0 };
        Setup { ring: setup.in_flight(), steps_room: setup.in_flight(), ..setup }
    }

    /// Steps in flight at most.
    pub fn in_flight(&self) -> usize {
        self.slots * self.group_max()
    }

    /// Steps of a group in flight at most.
    pub fn group_max(&self) -> usize {
        match self.way {
            Way::Processor { .. } => 1,
            // Tokens that the host does not know must be known where they are embedded.
            Way::Mixed { gpus } => 1 + (gpus & gpus >> (self.stages - 1) & 1),
            _ => 2,
        }
    }
}

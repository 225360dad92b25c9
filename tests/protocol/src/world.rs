//! Devices that work behind the host's back, as far as order goes: nothing is computed, and nothing is left to luck.
//!
//! A stream is a list of operations, each done after the one before it. Which operations of *different* streams are in order
//! follows from events and from what the host has waited for, and is kept as vector clocks. So a schedule of the host's threads stands for every speed of
//! the devices: an access that no event puts behind an earlier one to the same place is a violation, whether or not the
//! two would have met. A wait for an event that has not been recorded is no wait, as in CUDA.

use std::sync::{Arc, PoisonError};

use shuttle::{
    rand::{Rng, thread_rng},
    sync::{Mutex, MutexGuard},
};

use crate::error::{Error, Result};

/// By stage, how many of its stream's operations are known to be done.
type Clock = Vec<u64>;
/// An operation: the stage whose stream it is in, and its place there.
type At = (usize, u64);

/// What a stage that is made to fail does at a call to its device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The call is an error, and does nothing.
    Error,
    /// The call panics.
    Panic,
    /// The call returns. What it asked for, and all later work of the stage, is never done; a later call is an error.
    Lost,
}

/// All devices, shared by the stages.
#[derive(Clone)]
pub struct World(Arc<Mutex<State>>);

/// What there is to know of the devices.
pub struct State {
    streams: Vec<Stream>,
    events: Vec<Option<Clock>>,
    cells: Vec<Cell>,
    /// By step, that its tokens are there. There are as many as steps may be in flight.
    chosen: Vec<usize>,
    /// The table of last tokens.
    pub(crate) table: usize,
    /// What the host has waited for.
    done: Clock,
    /// Which stage fails, at which of its calls, and how.
    fault: Option<(usize, usize, Fault)>,
    violation: Option<String>,
}

#[derive(Default)]
struct Stream {
    clock: Clock,
    calls: usize,
    /// Nothing from this place on is ever done.
    lost: Option<u64>,
}

/// One place in memory, that holds one number.
#[derive(Clone)]
struct Cell {
    number: f32,
    wrote: Option<At>,
    read: Vec<At>,
}

impl World {
    /// Devices of so many stages, for so many steps in flight and sequences.
    pub fn new(stages: usize, in_flight: usize, seats: usize, fault: Option<(usize, usize, Fault)>) -> World {
        let stream = || Stream { clock: vec![0; stages], ..Stream::default() };
        let mut state = State {
            streams: (0..stages).map(|_| stream()).collect(),
            events: Vec::new(),
            cells: Vec::new(),
            chosen: Vec::new(),
            table: 0,
            done: vec![0; stages],
            fault,
            violation: None,
        };
        state.table = state.alloc(seats);
        state.chosen = (0..in_flight).map(|_| state.event()).collect();
        World(Arc::new(Mutex::new(state)))
    }

    /// Looks at the devices: a point where another thread may go on.
    pub fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A call of a stage to its device, which may be the one that fails.
    pub fn call<T>(&self, stage: usize, act: impl FnOnce(&mut State) -> T) -> Result<T> {
        let mut state = self.lock();
        let call = state.streams[stage].calls;
        state.streams[stage].calls += 1;
        if state.streams[stage].lost.is_some() && thread_rng().gen_bool(0.3) {
            return Err(made_to_fail());
        }
        match state.fault.filter(|fault| (fault.0, fault.1) == (stage, call)) {
            Some((_, _, Fault::Error)) => return Err(made_to_fail()),
            Some((_, _, Fault::Panic)) => {
                drop(state);
                // Without the panic hook, which would print the schedule.
                std::panic::resume_unwind(Box::new("made to fail"));
            }
            Some((_, _, Fault::Lost)) => {
                let next = state.streams[stage].clock[stage] + 1;
                state.streams[stage].lost = Some(next);
            }
            None => (),
        }
        Ok(act(&mut state))
    }
}

/// The error of the device that fails.
pub fn made_to_fail() -> Error {
    Error::Device { device: "test".into(), why: "made to fail".into() }
}

impl State {
    /// The first thing that was wrong.
    pub fn violation(&self) -> Option<&str> {
        self.violation.as_deref()
    }

    /// Takes note of something wrong. It is told in the end: a panic here would be taken for a stage's.
    pub fn violated(&mut self, what: String) {
        self.violation.get_or_insert(what);
    }

    /// Whether the stage that was made to fail has come to the call.
    pub fn has_failed(&self) -> bool {
        self.fault.is_some_and(|(stage, call, _)| self.streams[stage].calls > call)
    }

    pub(crate) fn alloc(&mut self, cells: usize) -> usize {
        let at = self.cells.len();
        self.cells.resize(at + cells, Cell { number: f32::NAN, wrote: None, read: Vec::new() });
        at
    }

    pub(crate) fn event(&mut self) -> usize {
        self.events.push(None);
        self.events.len() - 1
    }

    pub(crate) fn chosen(&self, step: u64) -> usize {
        self.chosen[step as usize % self.chosen.len()]
    }

    pub(crate) fn record(&mut self, stage: usize, event: usize) {
        self.advance(stage);
        self.events[event] = Some(self.streams[stage].clock.clone());
    }

    pub(crate) fn wait(&mut self, stage: usize, event: usize) {
        self.advance(stage);
        let State { streams, events, .. } = self;
        if let Some(recorded) = &events[event] {
            join(&mut streams[stage].clock, recorded);
        }
    }

    /// Waits on the host until an event has been reached: an error if what it stands behind is never done.
    pub(crate) fn synchronize(&mut self, event: usize) -> Result<()> {
        let recorded = self.events[event].clone().expect("the step's event has been recorded");
        self.finish(&recorded)
    }

    /// Waits on the host until everything in a stage's stream has been done.
    pub(crate) fn drain(&mut self, stage: usize) -> Result<()> {
        let all = self.streams[stage].clock.clone();
        self.finish(&all)
    }

    fn finish(&mut self, clock: &Clock) -> Result<()> {
        let lost = |(stage, stream): (usize, &Stream)| stream.lost.is_some_and(|lost| clock[stage] >= lost);
        if self.streams.iter().enumerate().any(lost) {
            return Err(made_to_fail());
        }
        join(&mut self.done, clock);
        Ok(())
    }

    /// Whether everything that an event stands behind is known by the host to be done.
    pub(crate) fn expect_done(&mut self, at: At, what: &str) {
        if self.done[at.0] < at.1 {
            self.violated(format!("{what}, which stage {} may not have written yet", at.0));
        }
    }

    pub(crate) fn read(&mut self, stage: usize, cell: usize) -> f32 {
        let at = self.advance(stage);
        let Cell { number, wrote, .. } = self.cells[cell];
        self.expect_behind(stage, wrote, "reads what is still being written by");
        let read = &mut self.cells[cell].read;
        read.retain(|earlier| earlier.0 != stage);
        read.push(at);
        number
    }

    pub(crate) fn write(&mut self, stage: usize, cell: usize, number: f32) -> At {
        let at = self.advance(stage);
        let Cell { wrote, read, .. } = self.cells[cell].clone();
        self.expect_behind(stage, wrote, "writes what is still being written by");
        self.expect_behind(stage, read, "writes what is still being read by");
        self.cells[cell] = Cell { number, wrote: Some(at), read: Vec::new() };
        at
    }

    /// The host reads what a device may have written.
    pub(crate) fn read_on_host(&mut self, cell: usize) -> f32 {
        let Cell { number, wrote, .. } = self.cells[cell];
        if let Some(at) = wrote {
            self.expect_done(at, "the host reads a packet");
        }
        number
    }

    /// The host writes where a device may have read.
    pub(crate) fn write_on_host(&mut self, cell: usize, number: f32) {
        let Cell { wrote, read, .. } = self.cells[cell].clone();
        for at in wrote.into_iter().chain(read) {
            if self.done[at.0] < at.1 {
                self.violated(format!("the host writes what stage {} may still be using", at.0));
            }
        }
        self.cells[cell] = Cell { number, wrote: None, read: Vec::new() };
    }

    /// Memory goes: nobody may still use it.
    pub(crate) fn free(&mut self, cells: std::ops::Range<usize>) {
        if self.streams.iter().any(|stream| stream.lost.is_some()) {
            return;
        }
        for cell in cells {
            let Cell { wrote, read, .. } = &self.cells[cell];
            let used = wrote.iter().chain(read).find(|at| self.done[at.0] < at.1).copied();
            if let Some((stage, _)) = used {
                self.violated(format!("memory is given back while stage {stage} may still use it"));
            }
        }
    }

    fn expect_behind(&mut self, stage: usize, earlier: impl IntoIterator<Item = At>, what: &str) {
        for (other, at) in earlier {
            // What the host has seen done is over before anything that it asks for now.
            if self.streams[stage].clock[other].max(self.done[other]) < at {
                self.violated(format!("stage {stage} {what} stage {other}"));
            }
        }
    }

    fn advance(&mut self, stage: usize) -> At {
        let time = &mut self.streams[stage].clock[stage];
        *time += 1;
        (stage, *time)
    }
}

fn join(clock: &mut Clock, other: &Clock) {
    clock.iter_mut().zip(other).for_each(|(mine, theirs)| *mine = (*mine).max(*theirs));
}

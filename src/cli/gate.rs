//! How much may be on its way at once: it bounds the memory that a long list of images takes.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

/// Lets so many in, and fewer while those inside hold much memory.
#[derive(Debug)]
pub(super) struct Gate {
    state: Mutex<State>,
    freed: Condvar,
    items_max: usize,
    bytes_max: usize,
}

#[derive(Debug, Default)]
struct State {
    items: usize,
    bytes: usize,
    closed: bool,
}

/// A place inside, until it is dropped.
#[derive(Debug)]
pub(super) struct Pass {
    gate: Arc<Gate>,
    bytes: usize,
}

impl Gate {
    /// With room for so many. Nobody enters while those inside hold `bytes_max` or more.
    pub(super) fn new(items_max: usize, bytes_max: usize) -> Arc<Gate> {
        Arc::new(Gate { state: Mutex::default(), freed: Condvar::new(), items_max, bytes_max })
    }

    /// Waits for room; `None` once the gate is closed.
    ///
    /// Who enters in the order of the items, and leaves in it, never waits for ever: the first one is inside, or nobody is.
    pub(super) fn enter(self: &Arc<Self>) -> Option<Pass> {
        let full = |state: &mut State| {
            !state.closed && (state.items >= self.items_max || state.bytes >= self.bytes_max)
        };
        let state = self.freed.wait_while(self.state(), full);
        let mut state = state.unwrap_or_else(PoisonError::into_inner);
        if state.closed {
            return None;
        }
        state.items += 1;
        Some(Pass { gate: self.clone(), bytes: 0 })
    }

    /// Nobody enters any more.
    pub(super) fn close(&self) {
        self.state().closed = true;
        self.freed.notify_all();
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Pass {
    /// So many bytes more are held until it is dropped.
    pub(super) fn hold(&mut self, bytes: usize) {
        self.bytes += bytes;
        self.gate.state().bytes += bytes;
    }
}

impl Drop for Pass {
    fn drop(&mut self) {
        let mut state = self.gate.state();
        state.items -= 1;
        state.bytes -= self.bytes;
        self.gate.freed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::{sync::mpsc, thread, time::Duration};

    use super::*;

    #[test]
    fn so_many_are_inside_and_hold_no_more_than_that_and_one() {
        let gate = Gate::new(2, 100);
        let (mut first, second) = (gate.enter().unwrap(), gate.enter().unwrap());
        let (send, entered) = mpsc::channel();
        let waiting = gate.clone();
        let thread = thread::spawn(move || {
            for _ in 0..2 {
                send.send(waiting.enter()).unwrap();
            }
        });
        let nobody = || entered.recv_timeout(Duration::from_millis(30)).is_err();
        assert!(nobody(), "two are inside");
        first.hold(150);
        drop(second);
        assert!(nobody(), "the first holds much");
        drop(first);
        let third = entered.recv().unwrap().unwrap();
        assert!(entered.recv().unwrap().is_some());
        gate.close();
        assert!(gate.enter().is_none());
        drop(third);
        thread.join().unwrap();
    }
}

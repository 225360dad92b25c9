//! What an engine counts while it runs, and the limit on what waits.

use std::sync::{
    Arc,
    atomic::{
        AtomicU64, AtomicUsize,
        Ordering::{Relaxed, SeqCst},
    },
};

use crate::error::{Error, Result};

/// The counters: clients and the engine's thread write them.
#[derive(Debug)]
pub(super) struct Counts {
    waiting: AtomicUsize,
    waiting_max: usize,
    rebuilds: AtomicU64,
    relayouts: AtomicU64,
}

/// A place among the requests that wait. Dropping it makes room for another one.
#[derive(Debug)]
pub(super) struct Waiting(Arc<Counts>);

impl Counts {
    pub(super) fn new(waiting_max: usize) -> Self {
        Counts {
            waiting: AtomicUsize::new(0),
            waiting_max,
            rebuilds: AtomicU64::new(0),
            relayouts: AtomicU64::new(0),
        }
    }

    /// Takes one of the places, if there is one.
    pub(super) fn wait(self: &Arc<Self>) -> Result<Waiting> {
        let max = self.waiting_max;
        let more = |waiting| (waiting < max).then_some(waiting + 1);
        match self.waiting.fetch_update(SeqCst, SeqCst, more) {
            Ok(_) => Ok(Waiting(self.clone())),
            Err(_) => Err(Error::Busy { max }),
        }
    }

    /// Requests that wait.
    pub(super) fn waiting(&self) -> usize {
        self.waiting.load(SeqCst)
    }

    /// Stages have been built anew.
    pub(super) fn rebuilt(&self) {
        self.rebuilds.fetch_add(1, Relaxed);
    }

    /// The layout has changed.
    pub(super) fn relaid(&self) {
        self.relayouts.fetch_add(1, Relaxed);
    }

    /// How often it has.
    pub(super) fn relayouts(&self) -> u64 {
        self.relayouts.load(Relaxed)
    }

    /// How often they have been built anew.
    pub(super) fn rebuilds(&self) -> u64 {
        self.rebuilds.load(Relaxed)
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.0.waiting.fetch_sub(1, SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_more_wait_than_may_however_many_ask_at_once() {
        let counts = Arc::new(Counts::new(5));
        for _ in 0..50 {
            let ask = || (0..4).filter_map(|_| counts.wait().ok()).collect::<Vec<_>>();
            let taken: usize = std::thread::scope(|scope| {
                let threads: Vec<_> = (0..4).map(|_| scope.spawn(ask)).collect();
                let taken: Vec<Waiting> = threads.into_iter().flat_map(|t| t.join().unwrap()).collect();
                assert_eq!(counts.waiting(), taken.len());
                taken.len()
            });
            assert_eq!(taken, 5, "all places are taken, and none twice");
            assert_eq!(counts.waiting(), 0);
        }
    }

    #[test]
    fn who_finds_no_place_is_told_how_many_there_are() {
        let counts = Arc::new(Counts::new(1));
        let _place = counts.wait().unwrap();
        let told = counts.wait().unwrap_err();
        assert_eq!(told.to_string(), "request: 1 requests wait already, and no more may");
    }
}

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
    waiting_tokens: AtomicUsize,
    limits: WaitingLimits,
    rebuilds: AtomicU64,
    relayouts: AtomicU64,
}

/// How much may wait.
#[derive(Debug, Clone, Copy)]
pub(super) struct WaitingLimits {
    pub(super) requests: usize,
    /// Of all their prompts together.
    pub(super) tokens: usize,
}

/// A place among the requests that wait, with its prompt's tokens. Dropping it makes room for another one.
#[derive(Debug)]
pub(super) struct Waiting {
    counts: Arc<Counts>,
    tokens: usize,
}

impl Counts {
    pub(super) fn new(limits: WaitingLimits) -> Self {
        let [waiting, waiting_tokens] = [0, 0].map(AtomicUsize::new);
        let [rebuilds, relayouts] = [0, 0].map(AtomicU64::new);
        Counts { waiting, waiting_tokens, limits, rebuilds, relayouts }
    }

    /// Takes one of the places, if there is one, for a prompt of so many tokens.
    pub(super) fn wait(self: &Arc<Self>, tokens: usize) -> Result<Waiting> {
        let max = self.limits.tokens;
        if tokens > max {
            let why = format!("the prompt has {tokens} tokens; all that wait may have {max} together");
            return Err(Error::Request(why));
        }
        let more = |waiting| (waiting < self.limits.requests).then_some(waiting + 1);
        if self.waiting.fetch_update(SeqCst, SeqCst, more).is_err() {
            return Err(Error::Busy { max: self.limits.requests });
        }
        let mut place = Waiting { counts: self.clone(), tokens: 0 };
        let more = |waiting: usize| waiting.checked_add(tokens).filter(|&all| all <= max);
        match self.waiting_tokens.fetch_update(SeqCst, SeqCst, more) {
            Ok(_) => {
                place.tokens = tokens;
                Ok(place)
            }
            Err(waiting) => Err(Error::BusyTokens { tokens, waiting, max }),
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
        self.counts.waiting_tokens.fetch_sub(self.tokens, SeqCst);
        self.counts.waiting.fetch_sub(1, SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(requests: usize, tokens: usize) -> Arc<Counts> {
        Arc::new(Counts::new(WaitingLimits { requests, tokens }))
    }

    #[test]
    fn no_more_wait_than_may_however_many_ask_at_once() {
        let counts = counts(5, 1000);
        for _ in 0..50 {
            let ask = || (0..4).filter_map(|_| counts.wait(3).ok()).collect::<Vec<_>>();
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
        let counts = counts(1, 1000);
        let _place = counts.wait(3).unwrap();
        let told = counts.wait(3).unwrap_err();
        assert_eq!(told.to_string(), "request: 1 requests wait already, and no more may");
    }

    #[test]
    fn prompts_that_wait_have_no_more_tokens_than_they_may_together() {
        let counts = counts(10, 100);
        let first = counts.wait(60).unwrap();
        let told = counts.wait(41).unwrap_err();
        assert_eq!(told, Error::BusyTokens { tokens: 41, waiting: 60, max: 100 });
        assert_eq!(
            told.to_string(),
            "request: the prompts that wait have 60 tokens, and with its 41 more than 100"
        );
        assert_eq!(counts.waiting(), 1, "who is refused takes no place");
        let second = counts.wait(40).unwrap();
        drop(first);
        assert!(counts.wait(61).is_err());
        drop(second);
        counts.wait(100).unwrap();
        // One that never could.
        let told = counts.wait(101).unwrap_err();
        assert_eq!(
            told.to_string(),
            "request: the prompt has 101 tokens; all that wait may have 100 together"
        );
        assert_eq!(counts.waiting(), 0);
    }
}

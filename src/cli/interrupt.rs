//! Ctrl-C (SIGINT), SIGTERM and SIGHUP.

use std::{
    process,
    sync::{
        Arc,
        atomic::{AtomicU8, Ordering},
    },
    thread,
    time::Duration,
};

use super::EXIT_INTERRUPTED;
use crate::error::{Error, Result};

/// How long the end of the process may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// Nobody listens: a signal ends the process.
const DEAF: u8 = 0;
/// A signal is taken note of.
const LISTENING: u8 = 1;
/// There was one, and a second one ends the process.
const SIGNALLED: u8 = 2;

/// Takes note of a signal while someone listens. While nobody does (a model is loading, say), a signal ends
/// the process.
#[derive(Clone)]
pub(super) struct Interrupt {
    state: Arc<AtomicU8>,
}

impl Interrupt {
    /// Takes over the signals, once a process.
    pub(super) fn install() -> Result<Self> {
        let interrupt = Interrupt::detached();
        let heard = interrupt.clone();
        ctrlc::set_handler(move || {
            if !heard.signal() {
                end_for_certain();
                process::exit(EXIT_INTERRUPTED.into());
            }
        })
        .map_err(|e| Error::Engine(format!("signal handler: {e}")))?;
        Ok(interrupt)
    }

    /// One that no signal of the process reaches.
    pub(super) fn detached() -> Self {
        Interrupt { state: Arc::new(AtomicU8::new(DEAF)) }
    }

    /// From now on one signal is taken note of.
    pub(super) fn listen(&self) {
        self.state.store(LISTENING, Ordering::SeqCst);
    }

    /// From now on a signal ends the process.
    pub(super) fn ignore(&self) {
        self.state.store(DEAF, Ordering::SeqCst);
    }

    /// Whether there was a signal since [`Interrupt::listen`].
    pub(super) fn signalled(&self) -> bool {
        self.state.load(Ordering::SeqCst) == SIGNALLED
    }

    /// A signal has come. Whether it was taken note of.
    pub(super) fn signal(&self) -> bool {
        self.state.compare_exchange(LISTENING, SIGNALLED, Ordering::SeqCst, Ordering::SeqCst).is_ok()
    }
}

/// The process is about to end: what its libraries do then may wait for a GPU that never ends what it does. That is not waited for.
pub(super) fn end_for_certain() {
    let end = || {
        thread::sleep(PATIENCE);
        process::abort()
    };
    // Without a thread it ends when it ends.
    let _ = thread::Builder::new().name("end".into()).spawn(end);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_signal_is_heard_and_only_while_someone_listens() {
        let interrupt = Interrupt::detached();
        assert!(!interrupt.signal() && !interrupt.signalled());
        interrupt.listen();
        assert!(!interrupt.signalled());
        assert!(interrupt.signal() && interrupt.signalled());
        assert!(!interrupt.signal(), "the second one ends the process");
        interrupt.ignore();
        assert!(!interrupt.signalled() && !interrupt.signal());
    }
}

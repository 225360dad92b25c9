//! Ctrl-C (SIGINT), SIGTERM and SIGHUP.

use std::{
    process,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use crossbeam_channel::{Receiver, bounded, select};

use super::EXIT_INTERRUPTED;
use crate::error::{Error, Result};

/// Where signals arrive. While nobody listens (a model is loading, say), a signal ends the process.
pub(super) struct Interrupt {
    signals: Receiver<()>,
    listening: Arc<AtomicBool>,
}

/// What came first.
pub(super) enum Next<T> {
    /// A value.
    Value(T),
    /// The other side has ended.
    End,
    /// A signal.
    Interrupted,
}

impl Interrupt {
    /// Takes over the signals, once a process.
    pub(super) fn install() -> Result<Self> {
        let (send, signals) = bounded(1);
        let listening = Arc::new(AtomicBool::new(false));
        let heard = Arc::clone(&listening);
        ctrlc::set_handler(move || {
            // A second signal while the first is still waiting: something hangs.
            if !heard.load(Ordering::SeqCst) || send.try_send(()).is_err() {
                process::exit(EXIT_INTERRUPTED.into());
            }
        })
        .map_err(|e| Error::Engine(format!("signal handler: {e}")))?;
        Ok(Interrupt { signals, listening })
    }

    /// One that never comes.
    #[cfg(test)]
    pub(super) fn never() -> Self {
        Interrupt { signals: crossbeam_channel::never(), listening: Arc::default() }
    }

    /// One that the sender brings about.
    #[cfg(test)]
    pub(super) fn by(signals: Receiver<()>) -> Self {
        Interrupt { signals, listening: Arc::default() }
    }

    /// From now on signals are kept for [`Interrupt::next`] (or end the process again).
    pub(super) fn listen(&self, on: bool) {
        self.listening.store(on, Ordering::SeqCst);
    }

    /// Waits for a value or a signal. A signal goes first, so that a fast stream cannot drown it.
    pub(super) fn next<T>(&self, values: &Receiver<T>) -> Next<T> {
        if self.signals.try_recv().is_ok() {
            return Next::Interrupted;
        }
        select! {
            recv(self.signals) -> signal => match signal {
                Ok(()) => Next::Interrupted,
                Err(_) => values.recv().map_or(Next::End, Next::Value),
            },
            recv(values) -> value => value.map_or(Next::End, Next::Value),
        }
    }
}

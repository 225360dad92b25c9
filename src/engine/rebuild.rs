//! Stages that have failed are taken down and built anew, on a thread of their own: drivers take their time, and clients
//! are answered meanwhile.

use std::{
    collections::VecDeque,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    time::{Duration, Instant},
};

use crossbeam_channel as channel;

use super::{
    StageFacts,
    progress::Progress,
    recipe::{Recipe, Start},
    relayout::Change,
    stock::Stock,
    wire::Wired,
};
use crate::error::{Error, Result, quiet_panic};

/// The fault that comes as so many'th within the period is not answered by building anew.
const FAULTS_MAX: usize = 3;
const FAULTS_PERIOD: Duration = Duration::from_secs(60);
/// Loading again takes at most this, and so many times what the first time took.
pub(super) const LOAD_MIN: Duration = Duration::from_secs(60);
const LOAD_FACTOR: u32 = 4;

/// Stages that have been built, and what is known of them.
pub(super) type Built = (Wired, Vec<StageFacts>);

/// Stages that are being built anew.
pub(super) struct Rebuild {
    pub(super) built: channel::Receiver<Result<Built>>,
    /// Comes when it has taken too long.
    pub(super) late: channel::Receiver<Instant>,
    /// Why it is needed.
    pub(super) fault: Error,
    unwanted: Arc<AtomicBool>,
}

impl Rebuild {
    /// Starts a thread that takes the old stages down, and then builds new ones. `loading` is what that took the first time.
    pub(super) fn start(recipe: &Recipe, old: Old, fault: Error, loading: Duration) -> Result<Self> {
        let (done, built) = channel::bounded(1);
        let unwanted = Arc::<AtomicBool>::default();
        let (start, stop, why) = (recipe.start.clone(), unwanted.clone(), fault.clone());
        let run = move || {
            let made = old.end(&why).and_then(|()| match stop.load(SeqCst) {
                true => Err(Error::Engine("it has ended".into())),
                false => build(&*start, None, Progress::untold()),
            });
            // An engine that has ended wants them no more: dropping them takes them down.
            let _ = done.send(made);
        };
        let failed = |e| Error::Engine(format!("rebuild: no thread: {e}"));
        std::thread::Builder::new().name("rebuild".into()).spawn(run).map_err(failed)?;
        let late = channel::after(recipe.patience + LOAD_MIN + loading * LOAD_FACTOR);
        Ok(Rebuild { built, late, fault, unwanted })
    }

    /// The engine ends: what is being built is taken down, if it comes in time.
    pub(super) fn abandon(self, patience: Duration) {
        self.unwanted.store(true, SeqCst);
        match self.built.recv_timeout(patience) {
            Ok(Ok((stages, _))) => _ = stages.end(),
            Ok(Err(_)) | Err(channel::RecvTimeoutError::Disconnected) => (),
            Err(channel::RecvTimeoutError::Timeout) => {
                tracing::warn!("stages are still being built anew, and are left behind");
            }
        }
    }
}

/// What has to be gone before stages are built anew.
pub(super) struct Old {
    /// The stages that ran, if they have not ended yet.
    pub(super) running: Option<Wired>,
    /// Others that were being made ready to take over.
    pub(super) change: Option<Change>,
    pub(super) patience: Duration,
}

impl Old {
    /// Takes them down. Whoever waits for the others is told why.
    pub(super) fn end(self, why: &Error) -> Result<()> {
        let Old { running, change, patience } = self;
        let ended = running.map_or(Ok(()), Wired::end);
        ended.and(change.map_or(Ok(()), |change| change.abandon(why, patience)))
    }
}

/// Starts stages that may go on with what others hold, and waits until they have loaded.
pub(super) fn build(start: &Start, before: Option<Arc<Stock>>, progress: Progress) -> Result<Built> {
    let build = || {
        let mut wired = start(before, progress)?;
        let facts = wired.loaded()?;
        Ok((wired, facts))
    };
    let panicked = |_| Err(Error::Engine("building the stages panicked; this is a bug".into()));
    quiet_panic(build).unwrap_or_else(panicked)
}

/// Takes stages down that are not built anew. The channel closes when that is done.
pub(super) fn take_down(old: Old, why: &Error) -> channel::Receiver<()> {
    let ((done, ended), why) = (channel::bounded(0), why.clone());
    let run = move || {
        // Threads that hang have been warned of.
        let _ = old.end(&why);
        drop(done);
    };
    // Without a thread it is done here and now, where what it should run is dropped.
    let _ = std::thread::Builder::new().name("take down".into()).spawn(run);
    ended
}

/// When there were faults, of late.
#[derive(Debug, Default)]
pub(super) struct Faults(VecDeque<Instant>);

impl Faults {
    /// Counts one. An error if there are too many for building anew to be of use.
    pub(super) fn count(&mut self, now: Instant) -> Result<(), String> {
        self.0.retain(|at| now.duration_since(*at) < FAULTS_PERIOD);
        self.0.push_back(now);
        match self.0.len() {
            n if n >= FAULTS_MAX => {
                let period = FAULTS_PERIOD.as_secs();
                Err(format!("the stages are not built anew: it was fault {n} within {period} seconds"))
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_faults_of_the_last_minute_count() {
        let (mut faults, start) = (Faults::default(), Instant::now());
        let at = |seconds| start + Duration::from_secs(seconds);
        for seconds in [0, 40, 61, 101, 122] {
            assert_eq!(faults.count(at(seconds)), Ok(()), "at {seconds}");
        }
        let told = faults.count(at(160)).unwrap_err();
        assert_eq!(told, "the stages are not built anew: it was fault 3 within 60 seconds");
    }
}

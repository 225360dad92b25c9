//! What shows while weights load, and how fast they did.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::engine::LoadProgress;

/// Loading that takes less shows nothing.
const PATIENCE: Duration = Duration::from_millis(300);
const STYLE: &str = "{prefix} [{bar:32}] {msg}";

/// How long an engine took to load.
#[derive(Debug, Clone, Copy)]
pub(super) struct Loaded {
    /// All of it: compiling or opening kernels, taking memory, bringing weights.
    pub(super) took: Duration,
    /// Of the weights alone, from the first stage's first one to the last stage's last.
    pub(super) weights: Option<Speed>,
}

/// So many bytes in that time.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Speed {
    bytes: usize,
    time: Duration,
}

/// Follows an engine's loading, with a bar on a terminal's stderr if it takes its time.
#[derive(Clone)]
pub(super) struct Meter(Arc<Mutex<State>>);

struct State {
    shows: bool,
    bar: Option<ProgressBar>,
    began: Option<Instant>,
    now: Option<Speed>,
}

impl Meter {
    /// `shows`: whether there may be a bar.
    pub(super) fn new(shows: bool) -> Meter {
        Meter(Arc::new(Mutex::new(State { shows, bar: None, began: None, now: None })))
    }

    /// Takes note of how far it is.
    pub(super) fn told(&self, progress: LoadProgress) {
        self.state().told(progress, Instant::now());
    }

    /// Takes the bar away. Stages that still load after another one's failure do not bring it back.
    pub(super) fn end(&self) -> Option<Speed> {
        let mut state = self.state();
        state.shows = false;
        if let Some(bar) = state.bar.take() {
            bar.finish_and_clear();
        }
        state.now
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn told(&mut self, progress: LoadProgress, at: Instant) {
        let LoadProgress { bytes_total, bytes_done, passes_total, passes_done } = progress;
        let time = at.duration_since(*self.began.get_or_insert(at));
        // Passes that are made later are no matter of the weights'.
        let speed = match self.now {
            Some(speed) if speed.bytes == bytes_done => speed,
            _ => Speed { bytes: bytes_done, time },
        };
        self.now = Some(speed);
        if !self.shows || time < PATIENCE {
            return;
        }
        let bar = self.bar.get_or_insert_with(bar);
        let warming = bytes_done == bytes_total && passes_total > 0;
        let (what, text, total, done) = match warming {
            true => {
                ("warming up", format!("{passes_done} of {passes_total} passes"), passes_total, passes_done)
            }
            false => ("loading weights", text(speed, bytes_total), bytes_total, bytes_done),
        };
        bar.set_prefix(what);
        bar.set_message(text);
        bar.set_length(total as u64);
        bar.set_position(done as u64);
    }
}

impl Speed {
    /// `None` where no time has passed.
    pub(super) fn gb_per_s(self) -> Option<f64> {
        let seconds = self.time.as_secs_f64();
        (seconds > 0.0).then(|| self.bytes as f64 / 1e9 / seconds)
    }
}

/// A bar on stderr; nothing where that is no terminal.
pub(super) fn bar() -> ProgressBar {
    let style = ProgressStyle::with_template(STYLE).expect("a template that is correct; this is a bug");
    ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr_with_hz(10))
        .with_style(style.progress_chars("=> "))
}

fn text(speed: Speed, bytes_total: usize) -> String {
    let gb = |bytes: usize| bytes as f64 / 1e9;
    let rate = speed.gb_per_s().map_or(String::new(), |rate| format!(", {rate:.1} GB/s"));
    format!("{:.2} of {:.2} GB{rate}", gb(speed.bytes), gb(bytes_total))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn progress(bytes_total: usize, bytes_done: usize) -> LoadProgress {
        LoadProgress { bytes_total, bytes_done, passes_total: 0, passes_done: 0 }
    }

    #[test]
    fn passes_are_shown_after_the_weights_and_do_not_make_them_slower() {
        let (meter, began) = (Meter::new(true), Instant::now());
        let tell = |bytes_done, passes_done, ms| {
            let told = LoadProgress { passes_total: 50, passes_done, ..progress(2_000_000_000, bytes_done) };
            meter.state().told(told, began + Duration::from_millis(ms));
            meter.state().bar.as_ref().map(|bar| (bar.prefix(), bar.message()))
        };
        let shown = |what: &str, text: &str| Some((what.to_owned(), text.to_owned()));
        assert_eq!(tell(0, 0, 0), None);
        // Another stage still loads.
        assert_eq!(tell(1_000_000_000, 1, 500), shown("loading weights", "1.00 of 2.00 GB, 2.0 GB/s"));
        assert_eq!(tell(2_000_000_000, 1, 1000), shown("warming up", "1 of 50 passes"));
        assert_eq!(tell(2_000_000_000, 9, 9000), shown("warming up", "9 of 50 passes"));
        assert_eq!(meter.end().unwrap().gb_per_s(), Some(2.0));
    }

    #[test]
    fn a_bar_comes_late_and_not_again_after_the_end() {
        let (meter, began) = (Meter::new(true), Instant::now());
        let tell = |bytes_done, ms| {
            let progress = progress(4_000_000_000, bytes_done);
            meter.state().told(progress, began + Duration::from_millis(ms));
            meter.state().bar.as_ref().map(|bar| (bar.position(), bar.message()))
        };
        assert_eq!(tell(0, 0), None);
        assert_eq!(tell(1_000_000_000, 299), None);
        let (position, message) = tell(2_000_000_000, 400).unwrap();
        assert_eq!((position, &message[..]), (2_000_000_000, "2.00 of 4.00 GB, 5.0 GB/s"));
        assert_eq!(tell(4_000_000_000, 1000).unwrap().1, "4.00 of 4.00 GB, 4.0 GB/s");
        assert_eq!(meter.end().unwrap().gb_per_s(), Some(4.0));
        assert_eq!(tell(4_000_000_000, 2000), None);
    }

    #[test]
    fn who_wants_no_bar_still_knows_how_fast_it_was() {
        let (meter, began) = (Meter::new(false), Instant::now());
        assert_eq!(meter.end(), None);
        for (bytes_done, ms) in [(0, 0), (1_000_000_000, 500)] {
            let progress = progress(1_000_000_000, bytes_done);
            meter.state().told(progress, began + Duration::from_millis(ms));
        }
        assert!(meter.state().bar.is_none());
        assert_eq!(meter.end().unwrap().gb_per_s(), Some(2.0));
    }
}

//! How far a batch is.

use std::time::{Duration, Instant};

use indicatif::ProgressBar;

use super::results::Done;
use crate::cli::loading;

/// Where there is no bar, and logs are asked for, they tell so often.
const LOG_EVERY: Duration = Duration::from_secs(30);

/// A bar on a terminal's stderr: how many items are done, at which rate, and how long the rest takes.
pub(super) struct Progress {
    bar: ProgressBar,
    total: Option<usize>,
    /// By earlier runs.
    before: Done,
    done: Done,
    began: Instant,
    logged: Instant,
}

impl Progress {
    pub(super) fn new(total: Option<usize>, before: Done) -> Progress {
        let bar = loading::bar();
        bar.set_prefix("batch");
        bar.set_length(total.unwrap_or_default() as u64);
        let now = Instant::now();
        let progress = Progress { bar, total, before, done: before, began: now, logged: now };
        progress.show(now);
        progress
    }

    /// One more item is written.
    pub(super) fn written(&mut self, failed: bool) {
        self.done.items += 1;
        self.done.failed += usize::from(failed);
        let now = Instant::now();
        self.show(now);
        if now.duration_since(self.logged) >= LOG_EVERY {
            self.logged = now;
            tracing::info!("batch: {}", self.text(now));
        }
    }

    /// Time has passed.
    pub(super) fn tick(&self) {
        self.show(Instant::now());
    }

    /// What is done, earlier runs included.
    pub(super) fn done(&self) -> Done {
        self.done
    }

    /// Takes the bar away.
    pub(super) fn end(&self) {
        self.bar.finish_and_clear();
    }

    fn show(&self, now: Instant) {
        self.bar.set_message(self.text(now));
        self.bar.set_position(self.done.items as u64);
    }

    fn text(&self, now: Instant) -> String {
        let Done { items, failed } = self.done;
        let mut text = match self.total {
            Some(total) => format!("{items} of {total}"),
            None => format!("{items} items"),
        };
        let (seconds, new) = (now.duration_since(self.began).as_secs_f64(), items - self.before.items);
        if new > 0 && seconds > 0.0 {
            let rate = new as f64 / seconds;
            text += &format!(", {rate:.1}/s");
            if let Some(left) = self.total.and_then(|total| total.checked_sub(items)) {
                text += &format!(", {} left", clock(left as f64 / rate));
            }
        }
        if failed > 0 {
            text += &format!(", {failed} failed");
        }
        text
    }
}

/// `0:05`, `12:34`, `3:00:00`.
fn clock(seconds: f64) -> String {
    let s = seconds.ceil() as u64;
    let (h, m, s) = (s / 3600, s / 60 % 60, s % 60);
    if h > 0 { format!("{h}:{m:02}:{s:02}") } else { format!("{m}:{s:02}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_is_this_runs_and_the_rest_follows_from_it() {
        let mut progress = Progress::new(Some(100), Done { items: 10, failed: 1 });
        assert_eq!(progress.text(progress.began), "10 of 100, 1 failed");
        progress.done = Done { items: 30, failed: 1 };
        let later = progress.began + Duration::from_secs(10);
        assert_eq!(progress.text(later), "30 of 100, 2.0/s, 0:35 left, 1 failed");
        progress.total = None;
        progress.done.failed = 0;
        assert_eq!(progress.text(later), "30 items, 2.0/s");
        assert_eq!([0.2, 59.9, 754.0, 10800.0].map(clock), ["0:01", "1:00", "12:34", "3:00:00"]);
    }
}

//! When everything happened.

/// A moment or a time, in nanoseconds.
pub type Nanos = u64;

/// Seconds as nanoseconds.
pub fn nanos(seconds: f64) -> Nanos {
    (seconds * 1e9).round() as Nanos
}

/// A run: when everything happened, on the virtual clock.
#[derive(Debug, Clone, Default)]
pub struct Trace {
    /// Each step, in their order.
    pub steps: Vec<StepTrace>,
    /// What each request got, in the order that they were given in.
    pub answers: Vec<Answer>,
    /// The device of each stage.
    pub devices: Vec<usize>, // [stages]
    /// Micro-batches that can travel at the same time.
    pub slots: usize,
}

/// A step on its way.
#[derive(Debug, Clone, Default)]
pub struct StepTrace {
    /// When the first stage had it.
    pub sent: Nanos,
    /// Its rows.
    pub rows: usize,
    /// When each stage began and ended it, as far as it came.
    pub passes: Vec<(Nanos, Nanos)>, // [stages]
}

/// What a request got.
#[derive(Debug, Clone, Default)]
pub struct Answer {
    /// When it was submitted.
    pub came: Nanos,
    /// Tokens of its prompt.
    pub prompt: usize,
    /// When the host had each of its tokens.
    pub tokens: Vec<Nanos>,
    /// When it ended, and why; none if the run did not come to that.
    pub end: Option<(Nanos, End)>,
}

/// Why a request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// It had all its tokens.
    Done,
    /// Its client went away.
    Cancelled,
}

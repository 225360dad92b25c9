//! When a stage of the tower worked: passes' marks, which are read when they have come.

use std::{
    collections::VecDeque,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use crossbeam_channel as channel;

use super::Cut;
use crate::{
    backend::Backend,
    engine::meter::{Meter, VisionSpan},
    error::Result,
    pipeline::StageMetrics,
};

/// How often marks are looked for while nothing else comes.
const LOOK: Duration = Duration::from_millis(1);
/// How long passes may take to end after the last one has been asked for.
const LAST: Duration = Duration::from_secs(1);

/// A stage's passes whose times have not been read.
pub(super) struct Spans<B: Backend> {
    stage: usize,
    backend: Arc<B>,
    metrics: Arc<StageMetrics>,
    meter: Arc<Meter>,
    /// When they began and ended.
    open: VecDeque<(Arc<Cut>, [B::Mark; 2])>,
    /// The latest moment that was read, on both clocks. The device tells times between two marks, the less exactly the
    /// longer they are.
    last: Option<(B::Mark, Duration)>,
}

impl<B: Backend> Spans<B> {
    pub(super) fn new(
        stage: usize,
        backend: Arc<B>,
        (metrics, meter): (Arc<StageMetrics>, Arc<Meter>),
    ) -> Self {
        Spans { stage, backend, metrics, meter, open: VecDeque::new(), last: None }
    }

    /// Waits for what comes next, and reads marks meanwhile; `None` when nothing more comes.
    pub(super) fn wait<T>(&mut self, coming: &channel::Receiver<T>) -> Result<Option<T>> {
        if self.last.is_none() {
            self.begin()?;
        }
        while !self.open.is_empty() {
            match coming.recv_timeout(LOOK) {
                Ok(next) => return Ok(Some(next)),
                Err(channel::RecvTimeoutError::Timeout) => self.read()?,
                Err(channel::RecvTimeoutError::Disconnected) => return self.end().map(|()| None),
            }
        }
        Ok(coming.recv().ok())
    }

    /// A pass has been asked of the device.
    pub(super) fn add(&mut self, work: Arc<Cut>, marks: [B::Mark; 2]) {
        self.open.push_back((work, marks));
    }

    /// Tells of the passes that are over.
    pub(super) fn read(&mut self) -> Result<()> {
        while let (Some((_, [began, ended])), Some((last, at))) = (self.open.front(), &self.last) {
            let times = (self.backend.between(last, began)?, self.backend.between(began, ended)?);
            let (Some(before), Some(busy)) = times else { break };
            let began = *at + before;
            let (work, [_, ended]) = self.open.pop_front().expect("just seen; this is a bug");
            self.last = Some((ended, began + busy));
            self.metrics.add_pass(busy);
            self.meter.vision(VisionSpan {
                stage: self.stage,
                pass: work.pass,
                began,
                ended: began + busy,
                images: work.grids.len(),
                cost: work.cost,
            });
        }
        Ok(())
    }

    /// Brings the two clocks together, while the device has nothing to do for this stage.
    fn begin(&mut self) -> Result<()> {
        let mark = self.backend.mark()?;
        while self.backend.between(&mark, &mark)?.is_none() {
            thread::yield_now();
        }
        self.last = Some((mark, self.meter.start().elapsed()));
        Ok(())
    }

    fn end(&mut self) -> Result<()> {
        let since = Instant::now();
        while !self.open.is_empty() && since.elapsed() < LAST {
            self.read()?;
            thread::sleep(LOOK);
        }
        Ok(())
    }
}

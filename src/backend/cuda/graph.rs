//! Passes recorded once and repeated: one launch instead of hundreds.
#![allow(unsafe_code)]

use cudarc::driver::{result, sys};

use super::{
    driver::{Context, alone, beside_no_recording},
    memory::Stream,
};
use crate::error::Result;

/// A recorded pass.
pub(super) struct Graph {
    context: Context,
    raw: sys::CUgraphExec,
}

// SAFETY: it may be launched from any thread, one at a time: its owner is borrowed mutably.
unsafe impl Send for Graph {}

impl Graph {
    /// Records what `ops` puts into the stream, without running it.
    pub(super) fn record(stream: &Stream, ops: &mut dyn FnMut() -> Result<()>) -> Result<Graph> {
        alone(|| Graph::record_alone(stream, ops))
    }

    fn record_alone(stream: &Stream, ops: &mut dyn FnMut() -> Result<()>) -> Result<Graph> {
        let context = stream.context;
        context.enter()?;
        // Other modes make errors of what other threads do that does not disturb: asking for events, say.
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
        // SAFETY: the stream lives.
        context.check("recording a pass", unsafe { result::stream::begin_capture(stream.raw, mode) })?;
        let outcome = ops();
        // SAFETY: the stream lives; the capture must end in any case.
        let graph = unsafe { result::stream::end_capture(stream.raw) };
        let recorded = graph.map(Recorded);
        outcome?;
        let recorded = context.check("recording a pass", recorded)?;
        let mut raw = std::ptr::null_mut();
        // SAFETY: the graph has just been recorded.
        let made = unsafe { sys::cuGraphInstantiateWithFlags(&mut raw, recorded.0, 0).result() };
        context.check("making a recorded pass ready", made)?;
        Ok(Graph { context, raw })
    }

    /// Puts the pass at the end of the stream.
    pub(super) fn launch(&mut self, stream: &Stream) -> Result<()> {
        self.context.enter()?;
        let beside = beside_no_recording();
        // SAFETY: both live; the addresses in it do too: the buffers belong to whoever recorded them.
        let outcome = unsafe { result::graph::launch(self.raw, stream.raw) };
        drop(beside);
        self.context.check("repeating a pass", outcome).map_err(|error| stream.explain(error))
    }
}

/// What has been recorded: what is made of it does not need it.
struct Recorded(sys::CUgraph);

impl Drop for Recorded {
    fn drop(&mut self) {
        // Where nothing could be recorded there may be none.
        if !self.0.is_null() {
            // SAFETY: it was recorded by whoever drops it, and is destroyed here alone.
            let _ = unsafe { result::graph::destroy(self.0) };
        }
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        if !self.context.is_abandoned() && self.context.enter().is_ok() {
            // SAFETY: made in `record`, destroyed here alone.
            let _ = unsafe { result::graph::exec_destroy(self.raw) };
        }
    }
}

//! Memory of a GPU, pinned memory of the host, streams and events.
#![allow(unsafe_code)]

use std::{ffi::c_void, ops::Range};

use cudarc::driver::{result, sys};

use super::driver::{Context, beside_no_recording};
use crate::error::{Error, Result};

/// An address on a GPU, or of pinned memory that GPUs can reach.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(transparent)]
pub(crate) struct DevicePtr(pub(crate) u64);

impl DevicePtr {
    pub(crate) const NULL: DevicePtr = DevicePtr(0);

    /// An address `bytes` further on.
    pub(crate) fn add(self, bytes: usize) -> DevicePtr {
        DevicePtr(self.0 + bytes as u64)
    }
}

/// A plain allocation: peers that have been given access reach it at full speed.
pub(crate) struct DeviceBuf {
    context: Context,
    ptr: DevicePtr,
    bytes: usize,
}

impl DeviceBuf {
    pub(super) fn new(context: Context, bytes: usize) -> Result<Self> {
        context.enter()?;
        if bytes == 0 {
            return Ok(DeviceBuf { context, ptr: DevicePtr::NULL, bytes });
        }
        let _beside = beside_no_recording();
        // SAFETY: the context is current; the memory is freed once, in drop.
        let ptr = unsafe { result::malloc_sync(bytes) }.map_err(|e| {
            let free = result::mem_get_info().map_or(0, |(free, _)| free);
            let why = match e.0 {
                sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => {
                    format!("{bytes} bytes of its memory are needed, and {free} are free")
                }
                _ => format!("taking {bytes} bytes of memory: {e:?}"),
            };
            Error::Device { device: format!("cuda:{}", context.ordinal), why }
        })?;
        Ok(DeviceBuf { context, ptr: DevicePtr(ptr), bytes })
    }

    pub(crate) fn ptr(&self) -> DevicePtr {
        self.ptr
    }

    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for DeviceBuf {
    fn drop(&mut self) {
        if self.bytes > 0 && !self.context.is_abandoned() && self.context.enter().is_ok() {
            let _beside = beside_no_recording();
            // SAFETY: allocated in `new`, freed here alone. The driver waits for what still uses it.
            let _ = unsafe { result::free_sync(self.ptr.0) };
        }
    }
}

/// Memory of the host that GPUs read and write by themselves.
pub(crate) struct Pinned {
    context: Context,
    at: *mut u8,
    bytes: usize,
}

// SAFETY: plain memory.
unsafe impl Send for Pinned {}
// SAFETY: as above; shared access is to raw addresses, and to parts that whoever asks for them has to himself.
unsafe impl Sync for Pinned {}

impl Pinned {
    /// Zeroed memory that every GPU reaches at its address.
    pub(super) fn new(context: Context, bytes: usize) -> Result<Self> {
        // Not write-combined: the host reads it too.
        Self::with(context, bytes, sys::CU_MEMHOSTALLOC_PORTABLE | sys::CU_MEMHOSTALLOC_DEVICEMAP)
    }

    /// Zeroed memory that is meant for this GPU's copies alone.
    pub(super) fn of_one(context: Context, bytes: usize) -> Result<Self> {
        Self::with(context, bytes, 0)
    }

    fn with(context: Context, bytes: usize, flags: u32) -> Result<Self> {
        context.enter()?;
        let beside = beside_no_recording();
        // SAFETY: freed once, in drop.
        let at = context
            .check("pinning memory of the host", unsafe { result::malloc_host(bytes.max(1), flags) })?;
        let at = at.cast::<u8>();
        drop(beside);
        // SAFETY: as many bytes.
        unsafe { at.write_bytes(0, bytes) };
        Ok(Pinned { context, at, bytes })
    }

    /// The address, as the host and the GPUs see it.
    pub(crate) fn ptr(&self) -> DevicePtr {
        DevicePtr(self.at as u64)
    }

    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Where `len` f32 lie, from a byte on that is aligned for them.
    pub(super) fn numbers(&self, at: usize, len: usize) -> *mut f32 {
        let end = len.checked_mul(4).and_then(|bytes| bytes.checked_add(at));
        let within = end.is_some_and(|end| end <= self.bytes) && at.is_multiple_of(4);
        assert!(within, "{len} numbers from byte {at} on, of {}; this is a bug", self.bytes);
        // SAFETY: within the allocation, which begins on a page.
        unsafe { self.at.add(at).cast() }
    }

    /// The bytes.
    ///
    /// SAFETY: no GPU writes them now.
    pub(crate) unsafe fn as_slice(&self) -> &[u8] {
        // SAFETY: allocated and zeroed.
        unsafe { std::slice::from_raw_parts(self.at, self.bytes) }
    }

    /// Some of the bytes.
    ///
    /// SAFETY: no GPU, and nobody else, reads or writes these now.
    #[allow(clippy::mut_from_ref)]
    pub(super) unsafe fn part_mut(&self, part: Range<usize>) -> &mut [u8] {
        assert!(part.start <= part.end && part.end <= self.bytes, "beyond pinned memory; this is a bug");
        // SAFETY: within the allocation, which is zeroed; the caller sees to the rest.
        unsafe { std::slice::from_raw_parts_mut(self.at.add(part.start), part.len()) }
    }

    /// The bytes.
    ///
    /// SAFETY: no GPU reads or writes them now.
    pub(crate) unsafe fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: nobody else has it, and the caller sees to GPUs.
        unsafe { self.part_mut(0..self.bytes) }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        if !self.context.is_abandoned() && self.context.enter().is_ok() {
            let _beside = beside_no_recording();
            // SAFETY: allocated in `new`, freed here alone.
            let _ = unsafe { result::free_host(self.at.cast::<c_void>()) };
        }
    }
}

/// A queue of work on a GPU, in order.
pub(crate) struct Stream {
    pub(super) context: Context,
    pub(super) raw: sys::CUstream,
}

// SAFETY: a stream may be used from any thread.
unsafe impl Send for Stream {}
// SAFETY: as above.
unsafe impl Sync for Stream {}

impl Stream {
    pub(super) fn new(context: Context) -> Result<Self> {
        context.enter()?;
        let raw = context
            .check("making a stream", result::stream::create(result::stream::StreamKind::NonBlocking))?;
        Ok(Stream { context, raw })
    }

    /// One whose kernels go before those of others on the GPU, where both have some to begin.
    pub(super) fn urgent(context: Context) -> Result<Self> {
        context.enter()?;
        let (mut raw, mut least, mut greatest) = (std::ptr::null_mut(), 0, 0);
        let flags = sys::CUstream_flags_enum::CU_STREAM_NON_BLOCKING as u32;
        // SAFETY: writes two numbers, and then a handle.
        let made = unsafe {
            sys::cuCtxGetStreamPriorityRange(&mut least, &mut greatest)
                .result()
                .and_then(|()| sys::cuStreamCreateWithPriority(&mut raw, flags, greatest).result())
        };
        context.check("making a stream", made)?;
        Ok(Stream { context, raw })
    }

    /// Waits until everything in it has ended.
    pub(super) fn synchronize(&self) -> Result<()> {
        self.context.enter()?;
        // SAFETY: the stream lives.
        self.context.check("running", unsafe { result::stream::synchronize(self.raw) })
    }

    /// An error if something in it has failed, or anything else on its GPU in a way that ends the context.
    pub(super) fn check(&self) -> Result<()> {
        self.is_idle().map(drop)
    }

    /// Whether all that was put into it has been done; an error as from `check`.
    pub(super) fn is_idle(&self) -> Result<bool> {
        self.context.enter()?;
        let _beside = beside_no_recording();
        // SAFETY: the stream lives.
        match unsafe { sys::cuStreamQuery(self.raw) }.result() {
            Err(e) if e.0 == sys::CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            outcome => self.context.check("running", outcome).map(|()| true),
        }
    }

    /// An error of something that was to go into it, with what is known about the stream beside.
    pub(super) fn explain(&self, error: Error) -> Error {
        let Error::Device { device, why } = error else { return error };
        let mut recording = sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE;
        // SAFETY: the stream lives; writes one number.
        let asked = unsafe { sys::cuStreamIsCapturing(self.raw, &mut recording) }.result();
        use sys::CUstreamCaptureStatus::*;
        let state = match (asked, recording) {
            (Err(e), _) => format!("cannot be asked whether it is recorded: {:?}", e.0),
            // Another question would spoil the recording.
            (_, CU_STREAM_CAPTURE_STATUS_ACTIVE) => "is being recorded".into(),
            (_, CU_STREAM_CAPTURE_STATUS_INVALIDATED) => "has a spoilt recording".into(),
            (_, CU_STREAM_CAPTURE_STATUS_NONE) => match self.check() {
                Ok(()) => "is not being recorded and has not failed".into(),
                Err(error) => format!("is not being recorded and has failed: {error}"),
            },
        };
        Error::Device { device, why: format!("{why}; the stream {state}") }
    }

    /// What comes later waits for the event, which must have been recorded: otherwise this does nothing.
    pub(crate) fn wait(&self, event: &Event) -> Result<()> {
        self.context.enter()?;
        let flags = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
        // SAFETY: both live.
        let outcome = unsafe { result::stream::wait_event(self.raw, event.raw, flags) };
        self.context.check("waiting for an event", outcome)
    }

    /// Copies between any two addresses: of GPUs or of pinned memory.
    ///
    /// SAFETY: both have `bytes` bytes and live until the copy has been done.
    pub(crate) unsafe fn copy(&self, to: DevicePtr, from: DevicePtr, bytes: usize) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        self.context.enter()?;
        // SAFETY: the caller's.
        let outcome = unsafe { sys::cuMemcpyAsync(to.0, from.0, bytes, self.raw) }.result();
        self.context.check("copying", outcome)
    }

    /// Sets bytes.
    ///
    /// SAFETY: there are `bytes` bytes, which live until it has been done.
    pub(crate) unsafe fn fill(&self, at: DevicePtr, byte: u8, bytes: usize) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        self.context.enter()?;
        let _beside = beside_no_recording();
        // SAFETY: the caller's.
        self.context.check("filling", unsafe { result::memset_d8_async(at.0, byte, bytes, self.raw) })
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if !self.context.is_abandoned() && self.context.enter().is_ok() {
            // SAFETY: made in `new`, destroyed here alone.
            let _ = unsafe { result::stream::destroy(self.raw) };
        }
    }
}

/// A place in a stream that others can wait for.
pub struct Event {
    context: Context,
    raw: sys::CUevent,
}

// SAFETY: an event may be used from any thread.
unsafe impl Send for Event {}
// SAFETY: as above.
unsafe impl Sync for Event {}

impl Event {
    /// For ordering alone.
    pub(super) fn new(context: Context) -> Result<Self> {
        Event::make(context, sys::CUevent_flags::CU_EVENT_DISABLE_TIMING)
    }

    /// That remembers when it was reached.
    pub(super) fn timed(context: Context) -> Result<Self> {
        Event::make(context, sys::CUevent_flags::CU_EVENT_DEFAULT)
    }

    fn make(context: Context, flags: sys::CUevent_flags) -> Result<Self> {
        context.enter()?;
        Ok(Event { context, raw: context.check("making an event", result::event::create(flags))? })
    }

    /// Puts it at the end of a stream of the same GPU.
    pub(crate) fn record(&self, stream: &Stream) -> Result<()> {
        self.context.enter()?;
        // SAFETY: both live.
        self.context.check("recording an event", unsafe { result::event::record(self.raw, stream.raw) })
    }

    /// Waits until it has been reached.
    pub(crate) fn synchronize(&self) -> Result<()> {
        self.context.enter()?;
        // SAFETY: it lives.
        self.context.check("running", unsafe { result::event::synchronize(self.raw) })
    }

    /// Whether it has been reached.
    pub(crate) fn reached(&self) -> Result<bool> {
        self.context.enter()?;
        // SAFETY: it lives.
        match unsafe { result::event::query(self.raw) } {
            Err(e) if e.0 == sys::CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            outcome => self.context.check("running", outcome).map(|()| true),
        }
    }

    /// Milliseconds from an earlier one to this one; both timed and reached.
    pub(crate) fn ms_since(&self, earlier: &Event) -> Result<f32> {
        self.context.enter()?;
        // SAFETY: both live.
        let outcome = unsafe { result::event::elapsed(earlier.raw, self.raw) };
        self.context.check("reading the time", outcome)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        if !self.context.is_abandoned() && self.context.enter().is_ok() {
            // SAFETY: made in `make`, destroyed here alone.
            let _ = unsafe { result::event::destroy(self.raw) };
        }
    }
}

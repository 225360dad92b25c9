//! Memory of one GPU in the reach of another, and the proof that what is copied there arrives, in order.
#![allow(unsafe_code)]

use cudarc::driver::sys;

use super::{
    Cuda, DevicePtr, copy,
    memory::{DeviceBuf, Event, Pinned},
};
use crate::error::Result;

/// Packets of the self-test: enough that one which overtakes another shows.
const TEST_PACKETS: usize = 16;
/// Numbers of each: more than one copy engine's granule, and no round number.
const TEST_NUMBERS: usize = 50_001;

/// Memory that packets cross a boundary in.
pub(crate) enum Ring {
    /// On the receiver's GPU.
    Device(DeviceBuf),
    /// On the host.
    Host(Pinned),
}

impl Ring {
    pub(crate) fn ptr(&self) -> DevicePtr {
        match self {
            Ring::Device(memory) => memory.ptr(),
            Ring::Host(memory) => memory.ptr(),
        }
    }
}

impl Cuda {
    /// Whether kernels here may write to memory of `to`, after asking the driver for it.
    pub(crate) fn reaches(&self, to: &Cuda) -> Result<bool> {
        if self.context.ordinal == to.context.ordinal {
            return Ok(true);
        }
        let mut possible = 0;
        // SAFETY: both devices exist; writes one number.
        let asked =
            unsafe { sys::cuDeviceCanAccessPeer(&mut possible, self.context.device, to.context.device) };
        self.context.check("asking for access to another GPU", asked.result())?;
        if possible == 0 {
            return Ok(false);
        }
        let allowed = self.context.allow_access_to(to.context);
        if let Err(error) = &allowed {
            tracing::warn!(to = to.context.ordinal, %error, "no peer access");
        }
        Ok(allowed.is_ok())
    }

    /// Memory on this GPU that packets come to.
    pub(crate) fn ring(&self, bytes: usize) -> Result<Ring> {
        self.take(bytes).map(Ring::Device)
    }

    /// Memory on the host that packets come through.
    pub(crate) fn host_ring(&self, bytes: usize) -> Result<Ring> {
        Pinned::new(self.context, bytes).map(Ring::Host)
    }

    /// An event of this GPU, for order.
    pub(crate) fn event(&self) -> Result<Event> {
        Event::new(self.context)
    }

    /// Puts `numbers` f32 on their way, then the event.
    ///
    /// SAFETY: there are as many at both addresses until the event has been reached.
    pub(crate) unsafe fn send_rows(
        &self,
        to: DevicePtr,
        from: DevicePtr,
        numbers: usize,
        sent: &Event,
    ) -> Result<()> {
        // SAFETY: the caller's.
        unsafe { self.copy_rows(to, from, numbers)? };
        self.record_event(sent)
    }

    /// Puts `numbers` f32 on their way.
    ///
    /// SAFETY: there are as many at both addresses until an event that is recorded later has been reached.
    pub(crate) unsafe fn copy_rows(&self, to: DevicePtr, from: DevicePtr, numbers: usize) -> Result<()> {
        // SAFETY: the caller's.
        unsafe { copy::rows(self, to, from, numbers) }
    }

    /// Whether packets sent to `to` through a ring arrive whole and in order.
    pub(crate) fn passes_self_test(&self, to: &Cuda, ring: &Ring) -> Result<bool> {
        let bytes = 4 * TEST_NUMBERS;
        let source = DeviceBuf::new(self.context, bytes)?;
        let arrived = Pinned::new(to.context, TEST_PACKETS * bytes)?;
        let (mut sent, mut taken) = (Vec::new(), Vec::new());
        for packet in 0..TEST_PACKETS {
            if let Some(taken) = taken.last() {
                self.wait(taken)?;
            }
            // SAFETY: as many bytes; each packet waits for the one before it.
            unsafe { self.stream.fill(source.ptr(), packet as u8 + 1, bytes)? };
            sent.push(self.event()?);
            // SAFETY: the ring has room for a packet of rows, which the caller has checked to be larger.
            unsafe { self.send_rows(ring.ptr(), source.ptr(), TEST_NUMBERS, &sent[packet])? };
            to.wait(&sent[packet])?;
            taken.push(to.event()?);
            // SAFETY: as many bytes, in a part of its own.
            unsafe { to.copy(arrived.ptr().add(packet * bytes), ring.ptr(), bytes)? };
            to.record_event(&taken[packet])?;
        }
        self.synchronize()?;
        to.synchronize()?;
        // SAFETY: both streams have ended.
        let bytes_there = unsafe { arrived.as_slice() };
        Ok(bytes_there.chunks(bytes).enumerate().all(|(i, part)| part.iter().all(|&b| b == i as u8 + 1)))
    }

    /// Bytes that the self-test sends.
    pub(crate) const TEST_BYTES: usize = 4 * TEST_NUMBERS;
}

//! Memory of one GPU in the reach of another, and the proof that what is copied there arrives, in order.
#![allow(unsafe_code)]

use cudarc::driver::sys;

use super::{
    Cuda, DevicePtr, copy,
    driver::Context,
    memory::{DeviceBuf, Event, Pinned},
};
use crate::{backend::mix, error::Result};

/// Packets of the self-test: enough that one which overtakes another shows.
const TEST_PACKETS: usize = 16;
/// Numbers of each: more than one copy engine's granule, and no round number.
const TEST_NUMBERS: usize = 50_001;
/// Bytes from one packet to the next where all lie together: each begins where wide loads may.
const TEST_STRIDE: usize = (4 * TEST_NUMBERS).next_multiple_of(256);

/// Bytes of all packets.
pub(super) const TEST_BYTES_ALL: usize = TEST_PACKETS * TEST_STRIDE;

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

    /// Shows f32 that lie in memory of the host, from a byte on.
    ///
    /// SAFETY: nobody writes them meanwhile.
    pub(crate) unsafe fn read<T>(&self, at: usize, len: usize, look: impl FnOnce(&[f32]) -> T) -> T {
        // SAFETY: `on_host` checks the place; zeroed when it was made, so that there are numbers; the caller's.
        look(unsafe { std::slice::from_raw_parts(self.on_host(at, len), len) })
    }

    /// Lets f32 be written that lie in memory of the host, from a byte on.
    ///
    /// SAFETY: nobody reads or writes them meanwhile.
    pub(crate) unsafe fn write<T>(&self, at: usize, len: usize, put: impl FnOnce(&mut [f32]) -> T) -> T {
        // SAFETY: as above.
        put(unsafe { std::slice::from_raw_parts_mut(self.on_host(at, len), len) })
    }

    fn on_host(&self, at: usize, len: usize) -> *mut f32 {
        let Ring::Host(memory) = self else { panic!("memory that the host does not reach; this is a bug") };
        memory.numbers(at, len)
    }
}

/// Whether each of these GPUs could reach the memory of all others.
pub fn all_could_reach(ordinals: &[usize]) -> Result<bool> {
    let contexts = ordinals.iter().map(|&i| Context::of(i)).collect::<Result<Vec<_>>>()?;
    for &from in &contexts {
        for &to in contexts.iter().filter(|to| to.ordinal != from.ordinal) {
            if !could_reach(from, to)? {
                return Ok(false);
            }
        }
    }
    Ok(true)
}

fn could_reach(from: Context, to: Context) -> Result<bool> {
    let mut possible = 0;
    // SAFETY: both devices exist; writes one number.
    let asked = unsafe { sys::cuDeviceCanAccessPeer(&mut possible, from.device, to.device) };
    from.check("asking for access to another GPU", asked.result())?;
    Ok(possible != 0)
}

impl Cuda {
    /// Whether kernels here may write to memory of `to`, after asking the driver for it.
    pub(crate) fn reaches(&self, to: &Cuda) -> Result<bool> {
        if self.context.ordinal == to.context.ordinal {
            return Ok(true);
        }
        if !could_reach(self.context, to.context)? {
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

    /// Waits on the host until an event of this GPU has been reached, or a stage of its pipeline has failed.
    pub(crate) fn wait_on_host(&self, event: &Event) -> Result<()> {
        self.tokens.until(event)
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

    /// Sends packets to `to` through a ring. Tells what is wrong if they do not arrive whole and in order.
    pub(crate) fn self_test(&self, to: &Cuda, ring: &Ring) -> Result<Option<String>> {
        let mut wanted = Pinned::new(self.context, TEST_BYTES_ALL)?;
        // SAFETY: no GPU knows of it yet.
        fill_packets(unsafe { wanted.as_mut_slice() });
        let source = DeviceBuf::new(self.context, wanted.bytes())?;
        let arrived = Pinned::new(to.context, wanted.bytes())?;
        // SAFETY: as many bytes, which live until the streams have ended.
        unsafe { self.copy(source.ptr(), wanted.ptr(), wanted.bytes())? };
        let outcome = self.send_packets(to, ring, &source, &arrived);
        // After a failure too: what is under way uses the memory.
        let ended = [self.synchronize(), to.synchronize()];
        outcome.and(ended.into_iter().collect::<Result<()>>())?;
        // SAFETY: both streams have ended.
        Ok(wrong_packet(unsafe { arrived.as_slice() }))
    }

    /// Each packet through the same place, which it may only come to when the one before it has been taken.
    fn send_packets(&self, to: &Cuda, ring: &Ring, source: &DeviceBuf, arrived: &Pinned) -> Result<()> {
        let mut taken: Option<Event> = None;
        for at in (0..TEST_PACKETS).map(|packet| packet * TEST_STRIDE) {
            if let Some(taken) = &taken {
                self.wait(taken)?;
            }
            let sent = self.event()?;
            // SAFETY: the ring has room for a packet: `TEST_BYTES`.
            unsafe { self.send_rows(ring.ptr(), source.ptr().add(at), TEST_NUMBERS, &sent)? };
            to.wait(&sent)?;
            // SAFETY: as many bytes, in a part of its own.
            unsafe { to.copy(arrived.ptr().add(at), ring.ptr(), Cuda::TEST_BYTES)? };
            let next = to.event()?;
            to.record_event(&next)?;
            taken = Some(next);
        }
        Ok(())
    }

    /// Bytes that the self-test sends.
    pub(crate) const TEST_BYTES: usize = 4 * TEST_NUMBERS;
}

/// A number of a test packet. It depends on the packet and on the place, so what is swapped, shifted, left out or left
/// over is not what belongs there.
fn test_number(packet: usize, i: usize) -> u32 {
    // Never zero, which fresh memory is full of.
    (mix((packet * TEST_NUMBERS + i) as u64) >> 32) as u32 | 1
}

/// Writes all test packets.
pub(super) fn fill_packets(bytes: &mut [u8]) {
    for (packet, bytes) in bytes.chunks_exact_mut(TEST_STRIDE).enumerate() {
        let (numbers, _) = bytes.as_chunks_mut::<4>();
        for (i, to) in numbers[..TEST_NUMBERS].iter_mut().enumerate() {
            *to = test_number(packet, i).to_le_bytes();
        }
    }
}

/// The first number that is not what was sent, in words; `None` if there is none.
pub(super) fn wrong_packet(arrived: &[u8]) -> Option<String> {
    let packets = arrived.chunks_exact(TEST_STRIDE).enumerate();
    let mut numbers = packets.flat_map(|(packet, bytes)| {
        let (numbers, _) = bytes.as_chunks::<4>();
        numbers[..TEST_NUMBERS].iter().enumerate().map(move |(i, n)| (packet, i, u32::from_le_bytes(*n)))
    });
    let (packet, i, got) = numbers.find(|&(packet, i, got)| got != test_number(packet, i))?;
    let (want, of) = (test_number(packet, i), TEST_PACKETS);
    Some(format!("number {i} of packet {packet} of {of} arrived as {got:#010x}, not as {want:#010x}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn packets() -> Vec<u8> {
        let mut bytes = vec![0; TEST_PACKETS * TEST_STRIDE];
        fill_packets(&mut bytes);
        bytes
    }

    /// A place in a packet, and what the check says to packets that are spoilt from there.
    fn spoilt(seed: u64, spoil: impl Fn(&mut [u8], usize, usize)) -> String {
        let draw = |n: u64, below: usize| (mix(seed ^ mix(n)) % below as u64) as usize;
        // Not the first packet, nor a packet's last numbers.
        let (packet, i) = (1 + draw(1, TEST_PACKETS - 1), draw(2, TEST_NUMBERS - 64));
        let mut bytes = packets();
        spoil(&mut bytes, packet, i);
        let said = wrong_packet(&bytes).expect("it is noticed");
        assert!(said.contains(&format!("of packet {packet} ")) && !said.contains('\n'), "{said}");
        said
    }

    fn at(packet: usize, i: usize) -> std::ops::Range<usize> {
        let start = packet * TEST_STRIDE + 4 * i;
        start..start + 4
    }

    #[test]
    fn what_did_not_arrive_as_it_was_sent_is_noticed() {
        assert_eq!(wrong_packet(&packets()), None);
        for seed in 0..8 {
            let first = |said: String, i: usize| assert!(said.starts_with(&format!("number {i} ")), "{said}");
            let i = std::cell::Cell::new(0);
            let end = |packet: usize| at(packet, TEST_NUMBERS).start;
            // Two neighbours swapped.
            first(
                spoilt(seed, |b, p, n| {
                    i.set(n);
                    let (a, c) = (at(p, n), at(p, n + 1));
                    b[a.start..c.end].rotate_left(4)
                }),
                i.get(),
            );
            // All from here on one number further, and one byte further.
            first(
                spoilt(seed, |b, p, n| {
                    i.set(n);
                    b.copy_within(at(p, n).start..end(p) - 4, at(p, n).end)
                }),
                i.get() + 1,
            );
            first(
                spoilt(seed, |b, p, n| {
                    i.set(n);
                    b[at(p, n).start..end(p)].rotate_right(1)
                }),
                i.get(),
            );
            // Cut short: zeros, or what the packet before left.
            first(
                spoilt(seed, |b, p, n| {
                    i.set(n);
                    b[at(p, n).start..end(p)].fill(0)
                }),
                i.get(),
            );
            first(
                spoilt(seed, |b, p, n| {
                    i.set(n);
                    let from = at(p - 1, n).start..end(p - 1);
                    b.copy_within(from, at(p, n).start)
                }),
                i.get(),
            );
            // A stale number, a stale packet, and one bit.
            first(
                spoilt(seed, |b, p, n| {
                    i.set(n);
                    b.copy_within(at(p - 1, n), at(p, n).start)
                }),
                i.get(),
            );
            first(spoilt(seed, |b, p, _| b.copy_within(at(p - 1, 0).start..end(p - 1), at(p, 0).start)), 0);
            first(
                spoilt(seed, |b, p, n| {
                    i.set(n);
                    b[at(p, n).start + n % 4] ^= 1 << (n % 8)
                }),
                i.get(),
            );
        }
    }

    /// No two neighbours, in a packet or of the packets before and after, are alike.
    #[test]
    fn numbers_differ_from_those_around_them() {
        for packet in 0..TEST_PACKETS {
            for i in 0..TEST_NUMBERS {
                let number = test_number(packet, i);
                assert!(
                    number != 0
                        && number != test_number(packet, i + 1)
                        && number != test_number(packet + 1, i)
                );
            }
        }
    }
}

//! Pages of keys and values from one GPU to another, and to the host.
//!
//! Who fetches puts the copies into its own stream. The GPU that they come from must be done with the pages: its streams
//! are not asked.
#![allow(unsafe_code)]

use std::{
    ops::Range,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use super::{
    Cuda, DevicePtr, Kv, lost,
    memory::{DeviceBuf, Event, Pinned, Stream},
    peer::{TEST_BYTES_ALL, fill_packets, wrong_packet},
};
use crate::{batch::KV_BLOCK, error::Result};

/// Bytes that go through the host at a time, of two such parts: large enough that starting a copy is nothing beside it.
const PART: usize = 8 << 20;

/// How pages come from other GPUs, by their numbers.
#[derive(Default)]
pub(super) struct Ways(Mutex<Vec<(usize, Way)>>);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    /// Read from the other GPU's memory.
    Peer,
    /// Through pinned memory of the host.
    Staged,
}

impl Ways {
    fn lock(&self) -> MutexGuard<'_, Vec<(usize, Way)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn from(&self, ordinal: usize) -> Option<Way> {
        self.lock().iter().find(|(from, _)| *from == ordinal).map(|(_, way)| *way)
    }
}

/// Finds out whether memory of `from` can be read, and whether what is read is right.
pub(super) fn find_way(cuda: &Cuda, from: &Cuda) -> Result<()> {
    let ordinal = from.context.ordinal;
    if cuda.ways.from(ordinal).is_some() {
        return Ok(());
    }
    // One may wait for the other, in whatever pipelines they are.
    lost::work_together(&[ordinal, cuda.context.ordinal]);
    let why = match (ordinal == cuda.context.ordinal, cuda.reaches(from)?) {
        (true, _) => None,
        (_, true) => read_test(cuda, from)?,
        (_, false) => Some("no peer access".into()),
    };
    let way = if why.is_none() { Way::Peer } else { Way::Staged };
    if let Some(why) = why {
        let (from, to) = (ordinal, cuda.context.ordinal);
        tracing::warn!(from, to, why, "pages go through the host between these GPUs, which is slower");
    }
    cuda.ways.lock().push((ordinal, way));
    Ok(())
}

impl Cuda {
    /// Lets pages from this GPU come through the host, whatever can be reached: for tests of what is done then.
    pub fn stage_pages_from(&self, from: &Cuda) {
        self.ways.lock().push((from.context.ordinal, Way::Staged));
    }
}

/// Reads what has been written on the other GPU. Tells what is wrong.
pub(super) fn read_test(cuda: &Cuda, from: &Cuda) -> Result<Option<String>> {
    let mut wanted = Pinned::new(from.context, TEST_BYTES_ALL)?;
    // SAFETY: no GPU knows of it yet.
    fill_packets(unsafe { wanted.as_mut_slice() });
    let source = DeviceBuf::new(from.context, TEST_BYTES_ALL)?;
    let (here, arrived) =
        (DeviceBuf::new(cuda.context, TEST_BYTES_ALL)?, Pinned::new(cuda.context, TEST_BYTES_ALL)?);
    // A stage may be at work on the other GPU, and be recording its own stream.
    let there = Stream::new(from.context)?;
    // SAFETY: all have as many bytes, and live until the streams have been waited for.
    let outcome = unsafe {
        let written = there.copy(source.ptr(), wanted.ptr(), TEST_BYTES_ALL);
        written.and(there.synchronize()).and_then(|()| {
            cuda.copy(here.ptr(), source.ptr(), TEST_BYTES_ALL)?;
            cuda.copy(arrived.ptr(), here.ptr(), TEST_BYTES_ALL)
        })
    };
    // After a failure too: what is under way uses the memory.
    let ended = cuda.synchronize();
    outcome.and(ended)?;
    // SAFETY: the stream has ended.
    Ok(wrong_packet(unsafe { arrived.as_slice() }))
}

/// Copies runs of blocks from another GPU's pages.
pub(super) fn fetch(cuda: &Cuda, to: &mut Kv, from: (&Cuda, &Kv), runs: &[Range<usize>]) -> Result<()> {
    let (of, pages) = from;
    assert!(to.shape == pages.shape, "pages of another shape; this is a bug");
    let way = cuda.ways.from(of.context.ordinal).expect("pages by no way; this is a bug");
    let mut stage = match way {
        Way::Peer => None,
        Way::Staged => Some(Through::new(cuda, of)?),
    };
    let block = to.block_bytes();
    for run in runs {
        assert!(run.end <= to.shape.blocks, "pages beyond the pool; this is a bug");
        let (at, bytes) = (run.start * block, run.len() * block);
        for (to, from) in [(to.keys(), pages.keys()), (to.values(), pages.values())] {
            let (to, from) = (to.add(at), from.add(at));
            match &mut stage {
                // SAFETY: both sides have these blocks; the caller waits for the stream before either goes.
                None => unsafe { cuda.copy(to, from, bytes)? },
                Some(through) => through.copy(to, from, bytes)?,
            }
        }
    }
    stage.map_or(Ok(()), |through| through.wait())
}

/// Two parts of pinned memory: one is filled while the other is emptied.
struct Through<'a> {
    cuda: &'a Cuda,
    there: Arc<Stream>,
    parts: [Part; 2],
    next: usize,
}

struct Part {
    memory: Pinned,
    full: Event,
    free: Event,
    used: bool,
}

impl<'a> Through<'a> {
    fn new(cuda: &'a Cuda, from: &Cuda) -> Result<Self> {
        let part = || {
            Ok(Part {
                memory: Pinned::new(cuda.context, PART)?,
                full: Event::new(from.context)?,
                free: Event::new(cuda.context)?,
                used: false,
            })
        };
        let there = Arc::new(Stream::new(from.context)?);
        cuda.tokens.depend_on(&there);
        Ok(Through { cuda, there, parts: [part()?, part()?], next: 0 })
    }

    /// Both sides have as many bytes, and live until `wait` has returned.
    fn copy(&mut self, to: DevicePtr, from: DevicePtr, bytes: usize) -> Result<()> {
        for at in (0..bytes).step_by(PART) {
            let (len, part) = ((bytes - at).min(PART), &mut self.parts[self.next]);
            self.next = 1 - self.next;
            if std::mem::replace(&mut part.used, true) {
                self.there.wait(&part.free)?;
            }
            // SAFETY: the part has room, and is written when it has been emptied.
            unsafe { self.there.copy(part.memory.ptr(), from.add(at), len)? };
            part.full.record(&self.there)?;
            self.cuda.wait(&part.full)?;
            // SAFETY: as many bytes, which have come by then.
            unsafe { self.cuda.copy(to.add(at), part.memory.ptr(), len)? };
            self.cuda.record_event(&part.free)?;
        }
        Ok(())
    }

    /// Waits for all of it. Each may wait for the other: if one fails, nobody waits on.
    fn wait(&self) -> Result<()> {
        let ends = [self.cuda.end_of(&self.there), self.cuda.synchronize()];
        ends.into_iter().collect()
    }
}

impl Drop for Through<'_> {
    fn drop(&mut self) {
        // After a failure copies may be under way.
        let _ = self.wait();
    }
}

/// A run of blocks on the host: keys, then values.
pub(super) fn read(cuda: &Cuda, from: &Kv, blocks: Range<usize>) -> Result<Vec<u8>> {
    let block = from.block_bytes();
    assert!(blocks.end <= from.shape.blocks, "pages beyond the pool; this is a bug");
    let (at, bytes) = (blocks.start * block, blocks.len() * block);
    let (pinned, stream) = (Pinned::new(cuda.context, 2 * bytes)?, Stream::new(cuda.context)?);
    // SAFETY: as many bytes on both sides, which live until the stream has been waited for.
    let copied = unsafe {
        stream
            .copy(pinned.ptr(), from.keys().add(at), bytes)
            .and_then(|()| stream.copy(pinned.ptr().add(bytes), from.values().add(at), bytes))
    };
    copied.and(stream.synchronize())?;
    // SAFETY: the stream has ended.
    Ok(unsafe { pinned.as_slice() }[..2 * bytes].to_vec())
}

/// Writes a run of blocks, and waits until it is there.
pub(super) fn write(cuda: &Cuda, to: &mut Kv, blocks: Range<usize>, from: &[u8]) -> Result<()> {
    let block = to.block_bytes();
    let (at, bytes) = (blocks.start * block, blocks.len() * block);
    assert!(
        blocks.end <= to.shape.blocks && from.len() == 2 * bytes,
        "pages beyond the pool, or of another shape; this is a bug"
    );
    let (mut pinned, stream) = (Pinned::new(cuda.context, 2 * bytes)?, Stream::new(cuda.context)?);
    // SAFETY: no GPU knows of it yet.
    unsafe { pinned.as_mut_slice()[..2 * bytes].copy_from_slice(from) };
    // SAFETY: as in `read`.
    let copied = unsafe {
        stream
            .copy(to.keys().add(at), pinned.ptr(), bytes)
            .and_then(|()| stream.copy(to.values().add(at), pinned.ptr().add(bytes), bytes))
    };
    copied.and(stream.synchronize())
}

impl Kv {
    /// Bytes of a block's keys, or values.
    fn block_bytes(&self) -> usize {
        KV_BLOCK * self.shape.kv_heads * self.shape.head_dim * self.shape.dtype.size()
    }
}

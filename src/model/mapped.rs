//! Files in memory, page by page as they are used.

use std::{fs::File, io, ops::Range};

use memmap2::Mmap;

/// A file's bytes.
pub(super) struct Mapped(Mmap);

impl Mapped {
    /// Maps the whole file.
    #[allow(unsafe_code)]
    pub(super) fn new(file: &File) -> io::Result<Mapped> {
        // SAFETY: the map is read-only, and its bytes are only ever read as bytes, of which every pattern is
        // valid. Another process that writes to the file can change numbers under us, and one that cuts it off
        // ends this process with SIGBUS: no reader of mapped files can rule that out, and checkpoints are
        // replaced by renaming, which leaves the mapped file as it is.
        unsafe { Mmap::map(file) }.map(Mapped)
    }

    /// Starts reading a part ahead of its first use. It is advice, so its failure does not matter.
    pub(super) fn read_ahead(&self, range: Range<usize>) {
        #[cfg(unix)]
        let _ = self.0.advise_range(memmap2::Advice::WillNeed, range.start, range.len());
        #[cfg(not(unix))]
        let _ = range;
    }
}

impl AsRef<[u8]> for Mapped {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

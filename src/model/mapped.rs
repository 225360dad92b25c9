//! Files in memory, page by page as they are used.

use std::{
    fs::File,
    path::{Path, PathBuf},
};

use memmap2::Mmap;

use crate::{
    backend::Store,
    error::{Error, Result},
};

/// A file's bytes.
pub(super) struct Mapped {
    map: Mmap,
    file: File,
    path: PathBuf,
}

impl Mapped {
    /// Maps the whole file. Without advice to the operating system: 269 MB of SmolLM2 were read in 0.05 s when
    /// cached and 0.16 s when not, and with `MADV_WILLNEED` in 0.06 s and 0.29 s.
    #[allow(unsafe_code)]
    pub(super) fn new(path: &Path, file: File) -> Result<Mapped> {
        // SAFETY: the map is read-only, and its bytes are only ever read as bytes, of which every pattern is
        // valid. Another process that writes to the file can change numbers under us, and one that cuts it off
        // ends this process with SIGBUS: no reader of mapped files can rule that out, and checkpoints are
        // replaced by renaming, which leaves the mapped file as it is.
        let map = unsafe { Mmap::map(&file) }.map_err(|e| Error::io(path, e))?;
        Ok(Mapped { map, file, path: path.to_path_buf() })
    }
}

impl Store for Mapped {
    fn bytes(&self) -> &[u8] {
        &self.map
    }

    /// By a system call: one core copied 13 GB/s out of the page cache that way, and 9 GB/s through pages of the map that
    /// had not been touched (`MADV_POPULATE_READ` changed nothing), whose faults get in each other's way besides.
    #[cfg(unix)]
    fn copy(&self, at: usize, to: &mut [u8]) -> Result<()> {
        std::os::unix::fs::FileExt::read_exact_at(&self.file, to, at as u64)
            .map_err(|e| Error::io(&self.path, e))
    }

    #[cfg(not(unix))]
    fn copy(&self, at: usize, to: &mut [u8]) -> Result<()> {
        to.copy_from_slice(&self.map[at..at + to.len()]);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn what_is_copied_is_what_is_mapped_and_a_file_that_was_cut_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("numbers");
        let bytes: Vec<u8> = (0..40_000u32).map(|i| (i % 251) as u8).collect();
        fs::write(&path, &bytes).unwrap();
        let mapped = Mapped::new(&path, File::open(&path).unwrap()).unwrap();
        assert_eq!(mapped.bytes(), bytes);
        for (at, len) in [(0, 40_000), (1, 4096), (4095, 2), (39_999, 1), (40_000, 0)] {
            let mut to = vec![0; len];
            mapped.copy(at, &mut to).unwrap();
            assert_eq!(to, bytes[at..at + len], "{len} from {at} on");
        }
        if cfg!(unix) {
            File::options().write(true).open(&path).unwrap().set_len(10_000).unwrap();
            let told = mapped.copy(9_000, &mut [0; 2000]).unwrap_err().to_string();
            assert!(told.starts_with(&path.display().to_string()), "{told}");
        }
    }
}

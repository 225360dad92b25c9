//! Colour maps of TIFF files, which the decoder does not know: it is given their pixels as levels of grey, which are
//! numbers of colours.

use std::borrow::Cow;

/// Bytes of an entry of a directory: tag, type, count, value.
const ENTRY: usize = 12;
const BITS: u16 = 258;
const PHOTOMETRIC: u16 = 262;
const SAMPLES: u16 = 277;
const COLORS: u16 = 320;
/// Values of [`PHOTOMETRIC`].
const GREY: u16 = 1;
const MAPPED: u16 = 3;

/// Colours by their numbers.
pub(super) type Palette = [[u8; 3]; 256];

/// A file, as the decoder may have it, and the colours that its levels then stand for. Any file that is not a TIFF with a
/// number of eight bits for each pixel stays as it is.
pub(super) fn take_off(bytes: &[u8]) -> (Cow<'_, [u8]>, Option<Box<Palette>>) {
    match File::new(bytes).and_then(|file| file.palette()) {
        Some((at, value, palette)) => {
            let mut bytes = bytes.to_vec();
            bytes[at..at + 2].copy_from_slice(&value);
            (bytes.into(), Some(palette))
        }
        None => (bytes.into(), None),
    }
}

/// The pixels of such a file.
pub(super) fn paint(numbers: &[u8], palette: &Palette) -> Vec<u8> {
    numbers.iter().flat_map(|&number| palette[usize::from(number)]).collect()
}

struct File<'a> {
    bytes: &'a [u8],
    big_endian: bool,
}

impl<'a> File<'a> {
    fn new(bytes: &'a [u8]) -> Option<Self> {
        let big_endian = match bytes.get(..4)? {
            b"II*\0" => false,
            b"MM\0*" => true,
            _ => return None,
        };
        Some(File { bytes, big_endian })
    }

    /// Where the file says that its pixels are numbers, what to write there instead, and the colours.
    fn palette(&self) -> Option<(usize, [u8; 2], Box<Palette>)> {
        let photometric = self.entry(PHOTOMETRIC)?;
        let one_of_eight = self.u16(self.entry(BITS)? + 8)? == 8
            && self.entry(SAMPLES).is_none_or(|entry| self.u16(entry + 8) == Some(1));
        if self.u16(photometric + 8)? != MAPPED || !one_of_eight {
            return None;
        }
        let colors = self.entry(COLORS)?;
        if self.u32(colors + 4)? != 3 * 256 {
            return None;
        }
        // All reds, then all greens, then all blues, of 16 bits each.
        let at = self.u32(colors + 8)? as usize;
        let map = self.bytes.get(at..)?.get(..3 * 256 * 2)?;
        let high = |i: usize| map[2 * i + usize::from(!self.big_endian)];
        let palette = std::array::from_fn(|i| [high(i), high(256 + i), high(512 + i)]);
        let grey = if self.big_endian { GREY.to_be_bytes() } else { GREY.to_le_bytes() };
        Some((photometric + 8, grey, Box::new(palette)))
    }

    /// Where the first directory has this tag.
    fn entry(&self, tag: u16) -> Option<usize> {
        let directory = self.u32(4)? as usize;
        let count = usize::from(self.u16(directory)?);
        let mut entries = (0..count).map(|i| directory + 2 + ENTRY * i);
        entries.find(|&entry| self.u16(entry) == Some(tag))
    }

    fn u16(&self, at: usize) -> Option<u16> {
        let bytes = self.bytes.get(at..)?.first_chunk()?;
        Some(if self.big_endian { u16::from_be_bytes(*bytes) } else { u16::from_le_bytes(*bytes) })
    }

    fn u32(&self, at: usize) -> Option<u32> {
        let bytes = self.bytes.get(at..)?.first_chunk()?;
        Some(if self.big_endian { u32::from_be_bytes(*bytes) } else { u32::from_le_bytes(*bytes) })
    }
}

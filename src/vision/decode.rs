//! Files of pixels to 8-bit RGB.

use std::{fmt::Display, io::Cursor, path::Path};

use image::{DynamicImage, ImageDecoder, ImageFormat, ImageReader, metadata::Orientation};

use super::{palette, size::Size, turn::Turn};
use crate::error::{Error, Result, quiet_panic, shown};

/// The formats that are read, by what a file begins with.
const FORMATS: [ImageFormat; 6] = [
    ImageFormat::Png,
    ImageFormat::Jpeg,
    ImageFormat::WebP,
    ImageFormat::Gif,
    ImageFormat::Bmp,
    ImageFormat::Tiff,
];

/// What a file may take, checked before its pixels are decoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Of a file.
    pub bytes_max: u64,
    /// Of an image, as its header tells them.
    pub pixels_max: u64,
    /// Of memory within a decoder; the decoders keep it as well as they can.
    pub decoder_bytes_max: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Limits { bytes_max: 256 << 20, pixels_max: 100_000_000, decoder_bytes_max: 1 << 30 }
    }
}

impl Limits {
    pub(super) fn too_large(self, path: &Path) -> Error {
        Error::data(path, format!("is larger than {} MiB", self.bytes_max >> 20))
    }
}

/// An image without transparency.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rgb {
    /// Pixels across and down.
    pub size: Size,
    /// Three numbers a pixel, row by row.
    pub data: Vec<u8>,
}

/// Decodes a file's bytes: the first frame, upright, on white. `path` is for messages.
///
/// Of 16 bits the upper eight are taken.
pub fn decode(path: &Path, bytes: &[u8], limits: Limits) -> Result<Rgb> {
    decode_in_turn(path, bytes, limits).map(|(image, _)| image)
}

/// The same, with the room that the image takes until it is resized: there may be none for a while.
pub(super) fn decode_in_turn(path: &Path, bytes: &[u8], limits: Limits) -> Result<(Rgb, Turn<'static>)> {
    let bad = |why: &dyn Display| Error::data(path, shown(&why.to_string()));
    if bytes.len() as u64 > limits.bytes_max {
        return Err(limits.too_large(path));
    }
    let Some(format) = image::guess_format(bytes).ok().filter(|f| FORMATS.contains(f)) else {
        let why = if bytes.is_empty() { "is empty" } else { "is no PNG, JPEG, WebP, GIF, BMP or TIFF image" };
        return Err(bad(&why));
    };
    let name = format.extensions_str()[0].to_uppercase();
    if format == ImageFormat::Jpeg && !jpeg_ends(bytes) {
        // The decoder would paint what is missing grey.
        return Err(bad(&"is a truncated JPEG image"));
    }
    // A panic within a decoder is a bug of its own, not one of the rest of the run.
    match quiet_panic(|| pixels(bytes, format, limits)) {
        Ok(Ok(image)) => Ok(image),
        Ok(Err(why)) => Err(bad(&format!("{name} image: {why}"))),
        Err(_) => Err(bad(&format!("{name} image: the decoder broke down"))),
    }
}

fn pixels(bytes: &[u8], format: ImageFormat, limits: Limits) -> Result<(Rgb, Turn<'static>), String> {
    let broken = |e: image::ImageError| match e {
        // Its text begins with the format, which the message has already.
        image::ImageError::Decoding(e) => {
            std::error::Error::source(&e).map_or("is damaged".into(), |s| s.to_string())
        }
        other => other.to_string(),
    };
    let (bytes, palette) = match format {
        ImageFormat::Tiff => palette::take_off(bytes),
        _ => (bytes.into(), None),
    };
    let mut reader = ImageReader::with_format(Cursor::new(&*bytes), format);
    let mut inner = image::Limits::no_limits();
    inner.max_alloc = Some(limits.decoder_bytes_max);
    reader.limits(inner);
    let mut decoder = reader.into_decoder().map_err(broken)?;
    let (width, height) = decoder.dimensions();
    let size = Size { width, height };
    if size.pixels() == 0 {
        return Err(format!("has no pixels ({width}x{height})"));
    }
    if size.pixels() > limits.pixels_max {
        return Err(format!("{width}x{height} pixels are more than {}", limits.pixels_max));
    }
    if decoder.total_bytes() > limits.decoder_bytes_max {
        return Err(format!("its pixels take more than {} MiB", limits.decoder_bytes_max >> 20));
    }
    // Decoded pixels are there twice while they are turned, or become colours of eight bits.
    let turn = Turn::wait(decoder.total_bytes() + decoder.total_bytes().max(3 * size.pixels()));
    // Damaged metadata leave the pixels as they are.
    let orientation = decoder.orientation().unwrap_or(Orientation::NoTransforms);
    let mut image = DynamicImage::from_decoder(decoder).map_err(broken)?;
    image.apply_orientation(orientation);
    let size = Size { width: image.width(), height: image.height() };
    let data = match (palette, image) {
        (Some(palette), DynamicImage::ImageLuma8(numbers)) => palette::paint(&numbers, &palette),
        (_, image) => rgb(image),
    };
    Ok((Rgb { size, data }, turn))
}

fn rgb(image: DynamicImage) -> Vec<u8> {
    let high = |v: u16| (v >> 8) as u8;
    match image {
        DynamicImage::ImageRgb8(image) => image.into_raw(),
        DynamicImage::ImageRgba8(image) => image.pixels().flat_map(|p| on_white(p.0)).collect(),
        DynamicImage::ImageLuma8(image) => image.pixels().flat_map(|p| [p.0[0]; 3]).collect(),
        DynamicImage::ImageLumaA8(image) => {
            image.pixels().flat_map(|p| on_white([p.0[0], p.0[0], p.0[0], p.0[1]])).collect()
        }
        DynamicImage::ImageLuma16(image) => image.pixels().flat_map(|p| [high(p.0[0]); 3]).collect(),
        DynamicImage::ImageLumaA16(image) => {
            image.pixels().flat_map(|p| on_white([p.0[0], p.0[0], p.0[0], p.0[1]].map(high))).collect()
        }
        DynamicImage::ImageRgb16(image) => image.into_raw().into_iter().map(high).collect(),
        DynamicImage::ImageRgba16(image) => image.pixels().flat_map(|p| on_white(p.0.map(high))).collect(),
        floats => floats.into_rgba8().pixels().flat_map(|p| on_white(p.0)).collect(),
    }
}

/// A pixel laid over white, rounded as Pillow pastes it.
fn on_white([r, g, b, alpha]: [u8; 4]) -> [u8; 3] {
    let alpha = u32::from(alpha);
    [r, g, b].map(|v| {
        let sum = u32::from(v) * alpha + 255 * (255 - alpha) + 128;
        (((sum >> 8) + sum) >> 8) as u8
    })
}

/// Whether a JPEG file's image has its end marker: whatever is cut off takes it along.
fn jpeg_ends(bytes: &[u8]) -> bool {
    const SCAN: u8 = 0xda;
    const END: u8 = 0xd9;
    // Behind the start marker; a thumbnail's markers are within a segment, which is skipped as a whole.
    let mut at = 2usize;
    let mut scans = false;
    loop {
        let Some(marker) = bytes.get(at..at + 2) else { return false };
        match (marker[0], marker[1]) {
            (0xff, END) => return scans,
            // Padding, stuffed zeros, restarts and markers without a length.
            (0xff, 0xff) => at += 1,
            (0xff, 0x00 | 0x01 | 0xd0..=0xd8) => at += 2,
            (0xff, kind) => {
                scans |= kind == SCAN;
                let Some(len) = bytes.get(at + 2..at + 4) else { return false };
                at += 2 + usize::from(u16::from_be_bytes([len[0], len[1]])).max(2);
            }
            // Coded pixels, up to the next marker.
            _ => match bytes[at..].iter().position(|&b| b == 0xff) {
                Some(skip) => at += skip,
                None => return false,
            },
        }
    }
}

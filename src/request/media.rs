//! Images and videos of requests.

use std::{fmt, sync::Arc};

/// An image, or the frames of a video, decoded and at the size at which they are cut into patches.
///
/// 8-bit pixels are a tenth of the patches that become of them, which are cut when their turn comes. Copies share them.
#[derive(Clone, PartialEq)]
pub struct Media {
    /// Pixels across.
    pub width: u32,
    /// Pixels down.
    pub height: u32,
    /// Three numbers a pixel, row by row, of each frame; an image is one frame.
    pub frames: Arc<[Vec<u8>]>,
    /// For videos: seconds from one patch's frames to the next one's.
    pub seconds: Option<f64>,
}

impl fmt::Debug for Media {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Media { width, height, frames, seconds } = self;
        write!(f, "Media {{ {width}x{height}, {} frames, seconds: {seconds:?} }}", frames.len())
    }
}

/// A part of a message.
#[derive(Debug, Clone, PartialEq)]
pub enum Part {
    /// Text.
    Text(String),
    /// An image or a video.
    Media(Media),
}

/// An image or a video within a message's text.
#[derive(Debug, Clone, PartialEq)]
pub struct Inset {
    /// Bytes of the text before it.
    pub at: usize,
    /// It.
    pub media: Media,
}

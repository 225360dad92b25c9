//! Images and videos in a tokenized prompt.

use crate::{
    error::{Error, Result},
    grid::{Grid, Span},
};

/// The tokens that stand for images and videos.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pads {
    /// `<|image_pad|>`.
    pub image: u32,
    /// `<|video_pad|>`.
    pub video: u32,
}

/// A prompt in which each image and video has as many tokens as the tower makes of it.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Placed {
    /// The tokens.
    pub ids: Vec<u32>,
    /// The same, as positions see them. Those that are no text are the images and videos in their order.
    pub spans: Vec<Span>,
}

/// The images and the videos of a prompt, each kind in the prompt's order.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Media<'a> {
    /// A grid for each image.
    pub images: &'a [Grid],
    /// A grid for each video, and the seconds from one pair of frames to the next.
    pub videos: &'a [(Grid, f64)],
}

/// Repeats each placeholder, of which a template writes one for each image and video.
pub fn place(ids: &[u32], pads: Pads, media: Media, merge: u32) -> Result<Placed> {
    let count = |pad: u32| ids.iter().filter(|&&id| id == pad).count();
    matched("image", count(pads.image), media.images.len())?;
    matched("video", count(pads.video), media.videos.len())?;
    let (mut images, mut videos) = (media.images.iter(), media.videos.iter());
    let mut placed = Placed::default();
    for &id in ids {
        let span = if id == pads.image {
            images.next().map(|&grid| (Span::Image(grid), grid.tokens(merge)))
        } else if id == pads.video {
            videos.next().map(|&(grid, seconds)| (Span::Video { grid, seconds }, grid.tokens(merge)))
        } else {
            None
        };
        let Some((span, tokens)) = span else {
            placed.ids.push(id);
            match placed.spans.last_mut() {
                Some(Span::Text(len)) => *len += 1,
                _ => placed.spans.push(Span::Text(1)),
            }
            continue;
        };
        placed.ids.extend(std::iter::repeat_n(id, tokens));
        placed.spans.push(span);
    }
    Ok(placed)
}

fn matched(kind: &str, places: usize, given: usize) -> Result<()> {
    match places == given {
        true => Ok(()),
        false => {
            Err(Error::Request(format!("{kind}s: {given} given, but the prompt has places for {places}")))
        }
    }
}

//! Images of requests: what there is to read of their prompts, and what the scheduler has to know of them.

use std::{
    hash::{BuildHasher, Hasher, RandomState},
    path::{Path, PathBuf},
    sync::Arc,
};

use super::side_by_side::side_by_side;
use crate::{
    backend::vision::{Levels, Pixels},
    error::{Error, Result},
    grid::{Grid, Spacing, Span, positions},
    model::{spec::ModelSpec, vision::VisionSpec},
    request::{Media, Prompt, Request},
    schedule::{ImageId, PromptImage, PromptImages},
    vision::{self as pixels, Cut, Pads, Placed, Preprocessor, Recipe, Rgb, Size},
};

/// What an engine does with images.
pub(super) struct Images {
    pub(super) preprocessor: Preprocessor,
    spec: Arc<VisionSpec>,
    pads: Pads,
    hashes: Hashes,
    pub(super) room: Room,
}

/// Makes ids of pixels. They are keyed hashes of 128 bits, with random numbers of this process: nobody outside can make
/// an image that passes for another one.
#[derive(Default)]
struct Hashes {
    low: RandomState,
    high: RandomState,
}

/// A prompt's tokens, and its images.
pub(super) type Prepared = (Vec<u32>, Option<Arc<PromptImages>>, Vec<Media>);

/// How large images may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Room {
    /// Patches of a pass, which a single image may have.
    pub(super) patches: usize,
    /// Rows of the store.
    pub(super) rows: usize,
}

/// An image of all patches finds room in the store.
impl Default for Room {
    fn default() -> Self {
        Room { patches: 32_768, rows: 16_384 }
    }
}

impl Room {
    /// For the largest image that there can be: what the model's folder allows, and a sequence of `context` tokens has room
    /// for, is not refused.
    pub(super) fn of(recipe: &Recipe, context: usize) -> Room {
        let (usual, Cut { patch, merge, .. }) = (Room::default(), recipe.cut);
        let (cell, largest) = ((merge * merge) as usize, recipe.bounds.max / u64::from(patch).pow(2));
        let patches = usize::try_from(largest).unwrap_or(usize::MAX).min(context.saturating_mul(cell));
        Room { patches: patches.max(usual.patches), rows: patches.div_ceil(cell).max(usual.rows) }
    }
}

impl Images {
    /// What the model's folder says about pixels; `None` for a model that reads none.
    pub(super) fn open(dir: &Path, spec: &ModelSpec) -> Result<Option<Images>> {
        let (Some(vision), Some(pads)) = (&spec.vision, spec.pads) else { return Ok(None) };
        let preprocessor = Preprocessor::read_or_usual(dir)?;
        for recipe in [preprocessor.image, preprocessor.video] {
            let Cut { patch, frames, merge, .. } = recipe.cut;
            let of = [vision.patch, vision.frames, vision.merge];
            if [patch, frames, merge].map(|n| n as usize) != of {
                let why = format!(
                    "patches of {patch} pixels and {frames} frames in cells of {merge}: the tower's are {of:?}"
                );
                return Err(Error::data(dir.join("preprocessor_config.json"), why));
            }
        }
        Ok(Some(Images {
            preprocessor,
            spec: vision.clone(),
            pads: Pads { image: pads.image, video: pads.video },
            hashes: Hashes::default(),
            room: Room::default(),
        }))
    }

    /// An image, from a file's bytes.
    pub(super) fn image(&self, path: &Path, bytes: &[u8]) -> Result<Media> {
        Ok(media(vec![self.preprocessor.image_pixels(path, bytes)?], None))
    }

    /// A video, from the files of its frames.
    pub(super) fn video(&self, frames: &[PathBuf], fps: f64) -> Result<Media> {
        let (frames, seconds) = self.preprocessor.video_pixels(frames, fps)?;
        Ok(media(frames, Some(seconds)))
    }

    /// Puts images in a prompt's tokens, of which a placeholder each stands for them.
    pub(super) fn place(&self, ids: &[u32], media: Vec<Media>) -> Result<Prepared> {
        let (mut images, mut videos) = (Vec::new(), Vec::new());
        for (i, media) in media.iter().enumerate() {
            let grid = self.grid(i, media)?;
            match media.seconds {
                None => images.push(grid),
                Some(seconds) => videos.push((grid, seconds)),
            }
        }
        let merge = self.spec.merge as u32;
        let all = pixels::Media { images: &images, videos: &videos };
        let Placed { ids, spans } = pixels::place(ids, self.pads, all, merge)?;
        if media.is_empty() {
            return Ok((ids, None, media));
        }
        let spacing = Spacing { merge, tokens_per_second: self.spec.tokens_per_second };
        let at = positions(&spans, spacing)?;
        let (mut start, mut images, mut ordered) = (0, Vec::new(), Vec::new());
        // Each kind is in its own order.
        let (stills, moving): (Vec<Media>, Vec<Media>) = media.into_iter().partition(|m| m.seconds.is_none());
        let (mut stills, mut moving) = (stills.into_iter(), moving.into_iter());
        for span in spans {
            let (grid, media) = match span {
                Span::Text(len) => {
                    start += len;
                    continue;
                }
                Span::Image(grid) => (grid, stills.next()),
                Span::Video { grid, .. } => (grid, moving.next()),
            };
            let media = media.expect("as many as placeholders; this is a bug");
            let tokens = start..start + grid.tokens(merge);
            start = tokens.end;
            images.push(PromptImage { image: self.hashes.id(&media), tokens, patches: grid.patches() });
            ordered.push(media);
        }
        let images = PromptImages { images, turns: at.rows, delta: at.delta };
        Ok((ids, Some(images.into()), ordered))
    }

    /// How an image is cut. An error if it is not made for this model, or too large.
    fn grid(&self, i: usize, media: &Media) -> Result<Grid> {
        let kind = if media.seconds.is_some() { "video" } else { "image" };
        let wrong = |why: String| Err(Error::Request(format!("{kind} {i}: {why}")));
        let Media { width, height, frames, .. } = media;
        let factor = (self.spec.patch * self.spec.merge) as u32;
        let bytes = 3 * *width as usize * *height as usize;
        if *width == 0 || *height == 0 || width % factor != 0 || height % factor != 0 {
            return wrong(format!("{width}x{height} pixels are not whole tokens of {factor}x{factor}"));
        }
        if frames.is_empty() || frames.iter().any(|frame| frame.len() != bytes) {
            return wrong(format!("its frames are not all of {width}x{height} pixels"));
        }
        let Some(grid) = grid(&self.spec, media) else { return wrong("it has too many frames".into()) };
        let (patches, tokens) = (grid.patches(), grid.tokens(self.spec.merge as u32));
        let Room { patches: patches_max, rows } = self.room;
        if patches > patches_max {
            let (of, way) = match frames.len() {
                1 => (String::new(), "smaller, --max-context gives it room"),
                n => (format!("{n} frames of "), "smaller"),
            };
            return wrong(format!(
                "its {patches} patches ({of}{width}x{height} pixels) are more than a pass of the tower holds, {patches_max}; \
                 --max-pixels makes it {way}"
            ));
        }
        if tokens > rows {
            return wrong(format!("its {tokens} tokens are more than the store of images holds, {rows}"));
        }
        Ok(grid)
    }
}

/// All images and videos of a request, in their order.
pub(super) fn media_of(request: &Request) -> Result<Vec<Media>> {
    match request.prompt {
        Prompt::Chat(_) if !request.media.is_empty() => {
            Err(Error::Request("images of a conversation belong to its messages".into()))
        }
        _ => Ok(all_media(request).cloned().collect()),
    }
}

fn all_media(request: &Request) -> impl Iterator<Item = &Media> {
    let messages = match &request.prompt {
        Prompt::Chat(messages) => &messages[..],
        _ => &[],
    };
    let insets = messages.iter().flat_map(|message| &message.media);
    request.media.iter().chain(insets.map(|inset| &inset.media))
}

/// What `prepare` makes of each request. An image's id takes milliseconds, and requests that come together wait for the last of
/// them: several threads share those with images.
pub(super) fn each<T: Send>(requests: &[Request], prepare: impl Fn(&Request) -> T + Sync) -> Vec<T> {
    match requests.iter().filter(|request| all_media(request).next().is_some()).count() {
        ..=1 => requests.iter().map(prepare).collect(),
        _ => side_by_side(requests.len(), |i| prepare(&requests[i])),
    }
}

/// How an image is cut, if it is of whole cells.
pub(super) fn grid(spec: &VisionSpec, media: &Media) -> Option<Grid> {
    let t = u32::try_from(media.frames.len()).ok()?.div_ceil(spec.frames as u32);
    let patch = spec.patch as u32;
    Some(Grid { t, h: media.height / patch, w: media.width / patch })
}

/// What levels of pixels become, of images and of videos' frames.
pub(super) struct Tables {
    image: Levels,
    video: Levels,
}

impl Tables {
    pub(super) fn new(recipes: &Preprocessor) -> Tables {
        Tables { image: recipes.image.cut.levels(), video: recipes.video.cut.levels() }
    }

    /// An image's pixels for a pass of the tower, cut in this way.
    pub(super) fn pixels<'a>(&'a self, media: &'a Media, grid: Grid) -> Pixels<'a> {
        let levels = if media.seconds.is_some() { &self.video } else { &self.image };
        Pixels { grid, frames: &media.frames, levels }
    }
}

fn media(frames: Vec<Rgb>, seconds: Option<f64>) -> Media {
    let Size { width, height } = frames.first().expect("no frames; this is a bug").size;
    Media { width, height, frames: frames.into_iter().map(|frame| frame.data).collect(), seconds }
}

impl Hashes {
    fn id(&self, media: &Media) -> ImageId {
        let hash = |state: &RandomState| {
            let mut hasher = state.build_hasher();
            // Frames of images and of videos may be made floats in different ways.
            hasher.write_u8(u8::from(media.seconds.is_some()));
            hasher.write_u32(media.width);
            hasher.write_u32(media.height);
            media.frames.iter().for_each(|frame| hasher.write(frame));
            u128::from(hasher.finish())
        };
        ImageId(hash(&self.low) | hash(&self.high) << 64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_model_allows_has_room_where_the_context_has() {
        let room = |max: u64, context: usize| {
            let recipes = Preprocessor::usual().with_pixels(None, Some(max)).unwrap();
            let Room { patches, rows } = Room::of(&recipes.image, context);
            (patches, rows)
        };
        let (usual, hub) = ((32_768, 16_384), 12_845_056);
        assert_eq!(room(1_003_520, 128_000), usual);
        assert_eq!(room(hub, 8192), usual);
        assert_eq!(room(hub, 12_000), (48_000, 16_384));
        assert_eq!(room(hub, 128_000), (65_536, 16_384));
        assert_eq!(room(1 << 26, 128_000), (342_392, 85_598));
    }
}

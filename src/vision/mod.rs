//! Images and videos to rows of floats: decoding, resizing, patches. No weights, no device.
//!
//! Everything here is a function of its arguments; callers choose the threads, and large images wait for each other.

mod config;
mod decode;
mod palette;
mod patches;
mod prompt;
mod resize;
mod size;
mod turn;

pub use config::Recipe;
pub use decode::{Limits, Rgb, decode};
pub use patches::{Cut, Patches};
pub use prompt::{Media, Pads, Placed, place};
pub use resize::resize;
pub use size::{Bounds, Size, smart_resize};

use self::decode::decode_in_turn;

use std::{
    fs::{self, File},
    io::{self, Read},
    path::{Path, PathBuf},
};

use crate::error::{Error, Result, shown};

/// Frames of a video, at most.
pub const FRAMES_MAX: usize = 768;

const IMAGE_BOUNDS: Bounds = Bounds { min: 56 * 56, max: 28 * 28 * 1280 };
const VIDEO_BOUNDS: Bounds = Bounds { min: 128 * 28 * 28, max: 28 * 28 * 768 };
/// All frames of a video share the pixels of this many tokens: nine tenths of 128,000.
const VIDEO_TOKENS_MAX: u64 = 115_200;

/// What a model's folder says about pixels.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Preprocessor {
    /// For images.
    pub image: Recipe,
    /// For frames of videos.
    pub video: Recipe,
    /// What files may take.
    pub limits: Limits,
}

/// A video as the vision tower reads it.
#[derive(Debug, Clone, PartialEq)]
pub struct Video {
    /// Its patches.
    pub patches: Patches,
    /// Seconds from one row of the grid's time to the next.
    pub seconds: f64,
}

impl Preprocessor {
    /// Reads preprocessor_config.json of a model's folder, and video_preprocessor_config.json where there is one.
    pub fn read(dir: &Path) -> Result<Preprocessor> {
        let path = dir.join("preprocessor_config.json");
        let missing =
            || Error::io(&path, "is missing: the model's folder does not say how to prepare images");
        let image = Recipe::read(&path, IMAGE_BOUNDS)?.ok_or_else(missing)?;
        let video = Recipe::read(&dir.join("video_preprocessor_config.json"), VIDEO_BOUNDS)?.unwrap_or(image);
        Ok(Preprocessor { image, video, limits: Limits::default() })
    }

    /// The same, and what is usual where the folder does not say.
    pub fn read_or_usual(dir: &Path) -> Result<Preprocessor> {
        match Recipe::read(&dir.join("preprocessor_config.json"), IMAGE_BOUNDS)? {
            Some(_) => Preprocessor::read(dir),
            None => Ok(Preprocessor::usual()),
        }
    }

    /// What is usual.
    pub fn usual() -> Preprocessor {
        let of = |bounds| {
            let recipe = Recipe::parse(Path::new("usual"), b"{}", bounds);
            recipe.expect("what is usual is right; this is a bug")
        };
        Preprocessor { image: of(IMAGE_BOUNDS), video: of(VIDEO_BOUNDS), limits: Limits::default() }
    }

    /// With other bounds of pixels for images and frames. One that is given wins over the other's default.
    pub fn with_pixels(mut self, min: Option<u64>, max: Option<u64>) -> Result<Preprocessor> {
        for recipe in [&mut self.image, &mut self.video] {
            let mut bounds = recipe.bounds;
            bounds.min = min.unwrap_or(bounds.min.min(max.unwrap_or(u64::MAX)));
            bounds.max = max.unwrap_or(bounds.max.max(bounds.min));
            recipe.bounds = config::check(bounds, recipe.cut.factor()).map_err(|why| {
                let (name, why) = why.split_once(": ").unwrap_or(("pixels", &why));
                Error::usage(format!("--{}", name.replace('_', "-")), why)
            })?;
        }
        Ok(self)
    }

    /// An image from a file.
    pub fn image_file(&self, path: &Path) -> Result<Patches> {
        self.image(path, &read(path, self.limits)?)
    }

    /// An image from a file's bytes; `path` is for messages.
    pub fn image(&self, path: &Path, bytes: &[u8]) -> Result<Patches> {
        Ok(self.image.cut.cut(&[self.image_pixels(path, bytes)?]))
    }

    /// The same, before it is cut.
    pub fn image_pixels(&self, path: &Path, bytes: &[u8]) -> Result<Rgb> {
        let (image, _turn) = decode_in_turn(path, bytes, self.limits)?;
        let Recipe { bounds, cut } = self.image;
        let size = smart_resize(image.size, cut.factor(), bounds).map_err(|why| Error::data(path, why))?;
        Ok(resize(image, size))
    }

    /// A file's bytes, no more than there may be.
    pub fn file(&self, path: &Path) -> Result<Vec<u8>> {
        read(path, self.limits)
    }

    /// A video from the files of its frames, of which there are `fps` a second.
    pub fn video_files(&self, frames: &[PathBuf], fps: f64) -> Result<Video> {
        let (frames, seconds) = self.video_pixels(frames, fps)?;
        Ok(Video { patches: self.video.cut.cut(&frames), seconds })
    }

    /// The same, before it is cut: the frames, and the seconds from one row of the grid's time to the next.
    pub fn video_pixels(&self, frames: &[PathBuf], fps: f64) -> Result<(Vec<Rgb>, f64)> {
        if !(fps.is_finite() && fps > 0.0) {
            return Err(Error::usage("fps", format!("{fps} is no number of frames a second")));
        }
        let Recipe { bounds, cut } = self.video;
        let Some(first) = frames.first() else {
            return Err(Error::Request("a video has no frames".into()));
        };
        if frames.len() > FRAMES_MAX {
            let why = format!("a video has {} frames, more than {FRAMES_MAX}", frames.len());
            return Err(Error::Request(why));
        }
        let bounds = share(bounds, cut, frames.len() as u64);
        let (mut of_first, mut resized) = (None, Vec::with_capacity(frames.len()));
        for path in frames {
            let (frame, _turn) = decode_in_turn(path, &read(path, self.limits)?, self.limits)?;
            let of_first = *of_first.get_or_insert(frame.size);
            if frame.size != of_first {
                let [a, b] = [frame.size, of_first].map(|s| format!("{}x{}", s.width, s.height));
                return Err(Error::data(path, format!("is {a}, and the video's first frame is {b}")));
            }
            let size =
                smart_resize(frame.size, cut.factor(), bounds).map_err(|why| Error::data(first, why))?;
            resized.push(resize(frame, size));
        }
        Ok((resized, f64::from(cut.frames) / fps))
    }
}

/// A frame's bounds where all frames share a number of tokens.
fn share(bounds: Bounds, cut: Cut, frames: u64) -> Bounds {
    let total = VIDEO_TOKENS_MAX * u64::from(cut.factor()).pow(2);
    let even = total * u64::from(cut.frames) / frames;
    let floor = (bounds.min as f64 * 1.05) as u64;
    Bounds { max: bounds.max.min(even).max(floor), ..bounds }
}

/// A file's bytes, no more than there may be.
fn read(path: &Path, limits: Limits) -> Result<Vec<u8>> {
    let failed = |e: io::Error| Error::io(path, shown(&e.to_string()));
    let check = |meta: fs::Metadata| match meta.is_file() {
        true if meta.len() > limits.bytes_max => Err(limits.too_large(path)),
        true => Ok(meta.len()),
        false if meta.is_dir() => Err(Error::io(path, "is a folder, not an image")),
        false => Err(Error::io(path, "is not a file")),
    };
    // Before it is opened: to open a pipe is to wait for its writer.
    check(fs::metadata(path).map_err(failed)?)?;
    let file = File::open(path).map_err(failed)?;
    let mut bytes = Vec::with_capacity(check(file.metadata().map_err(failed)?)? as usize);
    // Files without a length, as in /proc, are bounded as well.
    file.take(limits.bytes_max + 1).read_to_end(&mut bytes).map_err(failed)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_of_a_video_share_its_pixels() {
        let cut = Recipe::parse(Path::new("c"), b"{}", VIDEO_BOUNDS).unwrap().cut;
        let max = |frames| share(VIDEO_BOUNDS, cut, frames).max;
        assert_eq!(max(1), 28 * 28 * 768);
        assert_eq!(max(300), 28 * 28 * 768);
        assert_eq!(max(480), 28 * 28 * 480);
        // No frame is brought below the lower bound.
        assert_eq!(max(100_000), 105_369);
    }
}

//! Images of a workload's requests: made-up photographs as files, which threads prepare while requests run.

use std::{io::Cursor, path::Path, sync::Arc, time::Instant};

use clap::{Args, value_parser};
use image::{ExtendedColorType, ImageEncoder, codecs::jpeg::JpegEncoder};
use serde::Serialize;

use super::random::Random;
use crate::{
    backend::mix,
    cli::{setup::Setup, sides::Sides},
    engine::{Engine, side_by_side::side_by_side},
    error::{Error, Result},
    model::{hub, open_model, spec::Pads},
    request::Media,
    vision::{Preprocessor, Size},
};

/// Pixels of all images of a run at most: they are made before the clock starts.
const PIXELS_MAX: u64 = 1 << 32;
const QUALITY: u8 = 90;

/// Images of each request.
#[derive(Debug, Clone, Copy, PartialEq, Args)]
#[command(next_help_heading = "Images")]
pub(super) struct Asked {
    /// Images of each request, before its tokens: made-up photographs as JPEG files, each another one, which threads decode
    /// and resize while requests run
    #[arg(long, value_name = "N", conflicts_with = "prompt_file", value_parser = value_parser!(u32).range(1..=1024))]
    images: Option<u32>,
    /// Their pixels across and down, before the model's folder says how to resize them
    #[arg(long, value_name = "WxH", default_value = "1024x1024", requires = "images")]
    image_size: Sides,
    /// All requests of a run have the same images
    #[arg(long, requires = "images")]
    same_images: bool,
    /// Decodes and resizes them before the clock starts
    #[arg(long, requires = "images")]
    prepared: bool,
}

/// The same, as this model reads them. With its description in the order of the JSON object.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(super) struct Pictures {
    /// Of each request.
    pub(super) per_request: u32,
    pub(super) width: u32,
    pub(super) height: u32,
    /// All requests of a run have the same.
    pub(super) same: bool,
    /// Before the clock starts.
    pub(super) prepared: bool,
    /// Of each, once it has been resized.
    pub(super) patches: usize,
    pub(super) tokens: usize,
    #[serde(skip)]
    pads: Pads,
}

/// A file's bytes.
pub(super) type Picture = Arc<[u8]>;

/// What preparing took.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub(super) struct Prepared {
    pub(super) images: u64,
    /// Of all threads together.
    pub(super) seconds: f64,
    /// At once.
    pub(super) threads: usize,
}

impl Asked {
    /// None if there are none. An error if the model reads no images, or none of this size.
    pub(super) fn of(self, setup: &Setup) -> Result<Option<Pictures>> {
        let Some(per_request) = self.images else { return Ok(None) };
        let dir = hub::resolve(&setup.model)?;
        let spec = open_model(&dir, true)?.spec;
        let (Some(tower), Some(pads)) = (&spec.vision, spec.pads) else {
            let why = format!("{per_request}: the model reads no images");
            return Err(Error::usage("--images", why));
        };
        let Size { width, height } = self.image_size.0;
        let wrong = |why| Error::usage(format!("--image-size {width}x{height}"), why);
        let grid = Preprocessor::read_or_usual(&dir)?.image.grid(self.image_size.0).map_err(wrong)?;
        Ok(Some(Pictures {
            per_request,
            width,
            height,
            same: self.same_images,
            prepared: self.prepared,
            patches: grid.patches(),
            tokens: grid.tokens(tower.merge as u32),
            pads,
        }))
    }
}

impl Pictures {
    /// Tokens of a prompt that stand for them, with what is around each.
    pub(super) fn prompt_tokens(&self) -> usize {
        self.per_request as usize * (self.tokens + 2)
    }

    /// A prompt with a placeholder for each, before its own tokens, none of which may be one.
    pub(super) fn prompt(&self, ids: &[u32]) -> Vec<u32> {
        let Pads { image, start, end, .. } = self.pads;
        let around = [start, image, end].repeat(self.per_request as usize);
        [&around[..], ids].concat()
    }

    /// As in a workload's id: `.img2x1024x768`.
    pub(super) fn id(&self) -> String {
        let Pictures { per_request, width, height, .. } = self;
        let same = if self.same { ".same" } else { "" };
        let prepared = if self.prepared { ".prepared" } else { "" };
        format!(".img{per_request}x{width}x{height}{same}{prepared}")
    }

    /// An error if those of a run are too many to be made beforehand.
    pub(super) fn check(&self, requests: u32) -> Result<()> {
        let all = u64::from(self.per_request) * if self.same { 1 } else { u64::from(requests) };
        let pixels = all * u64::from(self.width) * u64::from(self.height);
        match pixels > PIXELS_MAX {
            true => {
                Err(Error::usage("--images", format!("{all} of them have more than {PIXELS_MAX} pixels")))
            }
            false => Ok(()),
        }
    }

    /// Those of each request of a run.
    pub(super) fn files(&self, requests: u32, seed: u64) -> Vec<Vec<Picture>> {
        let each = self.per_request as usize;
        let count = if self.same { each } else { each * requests as usize };
        let made = side_by_side(count, |i| jpeg(self.width, self.height, mix(seed ^ i as u64)));
        let of = |i: usize| made[if self.same { 0 } else { i * each }..][..each].to_vec();
        (0..requests as usize).map(of).collect()
    }
}

impl Prepared {
    /// With those of another thread.
    pub(super) fn and(self, other: Prepared) -> Prepared {
        Prepared {
            images: self.images + other.images,
            seconds: self.seconds + other.seconds,
            threads: self.threads + other.threads,
        }
    }
}

/// A request's images, from their files.
pub(super) fn prepare(engine: &Engine, files: &[Picture]) -> Result<(Vec<Media>, Prepared)> {
    let since = Instant::now();
    let path = Path::new("made-up image");
    let media = files.iter().map(|file| engine.image(path, file)).collect::<Result<_>>()?;
    let (images, seconds) = (files.len() as u64, since.elapsed().as_secs_f64());
    Ok((media, Prepared { images, seconds, threads: 0 }))
}

/// Slopes, edges and some noise, as photographs have them: noise alone would keep the decoder much longer than they do.
fn jpeg(width: u32, height: u32, seed: u64) -> Picture {
    let mut random = Random::new(seed);
    let [across, down, phase] = [0; 3].map(|_: u32| 60 + (random.next() % 60) as u32);
    let mut pixels = Vec::with_capacity(3 * width as usize * height as usize);
    for y in 0..height {
        for x in 0..width {
            // Four bits for each of three colours.
            let noise = random.next();
            let edge = ((x + phase) / across + y / down) % 3;
            let slope = (x + 2 * y) * 100 / (width + 2 * height);
            let colour = |c: u32| {
                let high = if edge == c { 90 } else { 0 };
                (high + slope * (c + 1) / 3 + ((noise >> (8 * c)) & 15) as u32).min(255) as u8
            };
            pixels.extend([0, 1, 2].map(colour));
        }
    }
    let mut file = Cursor::new(Vec::new());
    let made = JpegEncoder::new_with_quality(&mut file, QUALITY);
    let made = made.write_image(&pixels, width, height, ExtendedColorType::Rgb8);
    made.expect("any pixels become a file; this is a bug");
    file.into_inner().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pictures(same: bool) -> Pictures {
        let pads = Pads { image: 7, video: 8, start: 5, end: 6 };
        Pictures {
            per_request: 2,
            width: 80,
            height: 50,
            same,
            prepared: false,
            patches: 24,
            tokens: 6,
            pads,
        }
    }

    #[test]
    fn each_request_has_images_of_its_own_unless_told_otherwise() {
        let files = pictures(false).files(3, 1);
        let all: Vec<&Picture> = files.iter().flatten().collect();
        assert_eq!((files.len(), all.len()), (3, 6));
        for (i, file) in all.iter().enumerate() {
            let size =
                crate::vision::decode(Path::new("x"), file, crate::vision::Limits::default()).unwrap().size;
            assert_eq!(size, Size { width: 80, height: 50 });
            assert!(!all[..i].contains(file));
        }
        assert_eq!(pictures(false).files(3, 1), files);
        assert_ne!(pictures(false).files(3, 2)[0], files[0]);
        let same = pictures(true).files(3, 1);
        assert!(same.iter().all(|of| *of == same[0]) && same[0][0] != same[0][1]);
    }

    #[test]
    fn a_prompt_has_a_placeholder_for_each() {
        let pictures = pictures(false);
        assert_eq!(pictures.prompt(&[1, 2]), [5, 7, 6, 5, 7, 6, 1, 2]);
        assert_eq!((pictures.prompt_tokens(), pictures.id()), (16, ".img2x80x50".into()));
        pictures.check(1000).unwrap();
        assert!(pictures.check(1_000_000).is_err());
    }
}

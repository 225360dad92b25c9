//! preprocessor_config.json and video_preprocessor_config.json.

use std::{
    fs::File,
    io::{ErrorKind, Read},
    path::Path,
};

use serde::Deserialize;

use super::{
    patches::Cut,
    size::{Bounds, PIXELS_MAX, Size, smart_resize},
};
use crate::{
    error::{Error, Result, shown},
    grid::Grid,
};

const CONFIG_BYTES_MAX: u64 = 1 << 20;
/// `PIL.Image.BICUBIC`.
const BICUBIC: u32 = 3;

/// What is read of either file; others of its keys change nothing here.
#[derive(Deserialize)]
struct Keys {
    min_pixels: Option<u64>,
    max_pixels: Option<u64>,
    size: Option<SizeKeys>,
    patch_size: Option<u32>,
    temporal_patch_size: Option<u32>,
    merge_size: Option<u32>,
    resample: Option<u32>,
    rescale_factor: Option<f64>,
    image_mean: Option<[f64; 3]>,
    image_std: Option<[f64; 3]>,
    do_resize: Option<bool>,
    do_rescale: Option<bool>,
    do_normalize: Option<bool>,
}

#[derive(Deserialize, Default)]
struct SizeKeys {
    #[serde(alias = "min_pixels")]
    shortest_edge: Option<u64>,
    #[serde(alias = "max_pixels")]
    longest_edge: Option<u64>,
}

/// What one of the files says.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Recipe {
    /// How many pixels an image or a frame may have.
    pub bounds: Bounds,
    /// How it is cut.
    pub cut: Cut,
}

impl Recipe {
    /// How an image of so many pixels is cut, once it is resized. The error says what is wrong with its size.
    pub fn grid(&self, size: Size) -> Result<Grid, String> {
        let Size { width, height } = smart_resize(size, self.cut.factor(), self.bounds)?;
        Ok(Grid { t: 1, h: height / self.cut.patch, w: width / self.cut.patch })
    }

    /// Reads a file; `defaults` are for bounds that it does not tell. `None` if there is no such file.
    pub(super) fn read(path: &Path, defaults: Bounds) -> Result<Option<Recipe>> {
        let file = match File::open(path) {
            Ok(file) => file,
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(Error::io(path, e)),
        };
        let mut bytes = Vec::new();
        file.take(CONFIG_BYTES_MAX + 1).read_to_end(&mut bytes).map_err(|e| Error::io(path, e))?;
        if bytes.len() as u64 > CONFIG_BYTES_MAX {
            return Err(Error::data(path, "is larger than a configuration can be"));
        }
        Recipe::parse(path, &bytes, defaults).map(Some)
    }

    /// Parses a file's bytes; `path` is for messages.
    pub fn parse(path: &Path, bytes: &[u8], defaults: Bounds) -> Result<Recipe> {
        let bad = |why: String| Error::data(path, why);
        let keys: Keys = serde_json::from_slice(bytes).map_err(|e| bad(shown(&e.to_string())))?;
        let side = |name: &str, value: Option<u32>, otherwise: u32, max: u32| match value.unwrap_or(otherwise)
        {
            n if (1..=max).contains(&n) => Ok(n),
            n => Err(bad(format!("{name}: {n} is not from 1 to {max}"))),
        };
        if keys.resample.is_some_and(|r| r != BICUBIC) {
            return Err(bad("resample: only 3, bicubic, is supported".into()));
        }
        if keys.do_resize == Some(false) {
            return Err(bad("do_resize: images of any size are not supported".into()));
        }
        let normalize = keys.do_normalize.unwrap_or(true);
        let mean = keys.image_mean.unwrap_or([0.48145466, 0.4578275, 0.40821073]);
        let std = keys.image_std.unwrap_or([0.26862954, 0.26130258, 0.27577711]);
        let cut = Cut {
            patch: side("patch_size", keys.patch_size, 14, 64)?,
            frames: side("temporal_patch_size", keys.temporal_patch_size, 2, 8)?,
            merge: side("merge_size", keys.merge_size, 2, 8)?,
            rescale: if keys.do_rescale.unwrap_or(true) {
                keys.rescale_factor.unwrap_or(1.0 / 255.0)
            } else {
                1.0
            },
            mean: if normalize { mean } else { [0.0; 3] },
            std: if normalize { std } else { [1.0; 3] },
        };
        if !(cut.std.iter().all(|s| (*s as f32).is_normal()) && cut.levels_are_finite()) {
            return Err(bad("image_mean, image_std, rescale_factor: they give no ordinary numbers".into()));
        }
        let size = keys.size.unwrap_or_default();
        let min = keys.min_pixels.or(size.shortest_edge).unwrap_or(defaults.min);
        let max = keys.max_pixels.or(size.longest_edge).unwrap_or(defaults.max);
        let bounds = check(Bounds { min, max }, cut.factor()).map_err(bad)?;
        Ok(Recipe { bounds, cut })
    }
}

/// Bounds that some image of whole cells is within.
pub(super) fn check(bounds: Bounds, factor: u32) -> Result<Bounds, String> {
    let Bounds { min, max } = bounds;
    let cell = u64::from(factor) * u64::from(factor);
    if max < cell {
        return Err(format!("max_pixels: {max} are less than a token's {cell}"));
    }
    if min > max {
        return Err(format!("min_pixels: {min} are more than max_pixels, {max}"));
    }
    if min > PIXELS_MAX {
        return Err(format!("min_pixels: {min} are more than {PIXELS_MAX}"));
    }
    Ok(Bounds { min, max: max.min(PIXELS_MAX) })
}

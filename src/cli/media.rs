//! Images and videos that prompts bring along: where they are, and how they are found and read.

use std::{
    cmp::Ordering,
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use clap::Args;

use crate::{
    engine::{Engine, EngineBuilder},
    error::{Error, Result, shown},
    request::Media,
    vision::FRAMES_MAX,
};

/// What files of images are called, where they are looked for. What they are is told by their first bytes.
pub(super) const EXTENSIONS: [&str; 9] = ["png", "jpg", "jpeg", "jpe", "webp", "gif", "bmp", "tif", "tiff"];

/// How many pixels the model sees.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Images")]
pub(super) struct Pixels {
    /// Pixels of an image, or of a frame, at most; larger ones are made smaller: 1003520 or 1280x28x28
    /// [default: preprocessor_config.json's]
    #[arg(long, value_name = "PIXELS", value_parser = product)]
    max_pixels: Option<u64>,
    /// Pixels of an image, or of a frame, at least; smaller ones are made larger [default: preprocessor_config.json's]
    #[arg(long, value_name = "PIXELS", value_parser = product)]
    min_pixels: Option<u64>,
}

impl Pixels {
    /// The flag that is given, if one is.
    pub(super) fn flag(&self) -> Option<&'static str> {
        match (self.max_pixels, self.min_pixels) {
            (Some(_), _) => Some("--max-pixels"),
            (_, Some(_)) => Some("--min-pixels"),
            _ => None,
        }
    }

    /// An engine that keeps to it.
    pub(super) fn apply(&self, builder: EngineBuilder) -> EngineBuilder {
        builder.pixels(self.min_pixels, self.max_pixels)
    }
}

/// Where an image or a video comes from.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Source {
    /// A file.
    Image(PathBuf),
    /// A file's bytes, and what to call it.
    Bytes(String, Arc<[u8]>),
    /// The files in a folder, in their natural order, of which there are so many a second.
    Folder(PathBuf, f64),
    /// The same, one by one.
    Frames(Vec<PathBuf>, f64),
    /// It is there already.
    Ready(Media),
}

/// An image or a video in its place: in this message of the prompt, after so many bytes of its text.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Wanted {
    pub(super) message: usize,
    pub(super) at: usize,
    pub(super) source: Source,
}

impl Wanted {
    /// Before a prompt's text.
    pub(super) fn first(source: Source) -> Wanted {
        Wanted { message: 0, at: 0, source }
    }
}

impl Source {
    /// Whether it is there at all, which can be told before a model is loaded in vain.
    pub(super) fn check(&self) -> Result<()> {
        let (path, folder) = match self {
            Source::Image(path) => (path, false),
            Source::Folder(path, _) => (path, true),
            _ => return Ok(()),
        };
        let meta = fs::metadata(path).map_err(|e| Error::io(path, e))?;
        match (folder, meta.is_dir()) {
            (true, true) => frames(path).map(drop),
            (true, false) => Err(Error::io(path, "is no folder of frames")),
            (false, true) => Err(Error::io(path, "is a folder, not an image")),
            (false, false) if !meta.is_file() => Err(Error::io(path, "is not a file")),
            (false, false) => Ok(()),
        }
    }

    /// Reads, decodes and resizes it, here and now.
    pub(super) fn open(&self, engine: &Engine) -> Result<Media> {
        match self {
            Source::Image(path) => engine.image_file(path),
            Source::Bytes(name, bytes) => engine.image(Path::new(name), bytes),
            Source::Folder(path, fps) => engine.video(&frames(path)?, *fps),
            Source::Frames(files, fps) => engine.video(files, *fps),
            Source::Ready(media) => Ok(media.clone()),
        }
    }
}

/// Bytes of the pixels.
pub(super) fn bytes(media: &Media) -> usize {
    media.frames.iter().map(Vec::len).sum()
}

/// Tokens that the model makes of it.
pub(super) fn tokens(engine: &Engine, media: &Media) -> usize {
    let Some(tower) = &engine.spec().vision else { return 0 };
    let cell = (tower.patch * tower.merge).max(1);
    let cells = (media.width as usize / cell) * (media.height as usize / cell);
    cells * media.frames.len().div_ceil(tower.frames.max(1))
}

/// The frames in a folder.
fn frames(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(dir).map_err(|e| Error::io(dir, e))? {
        let path = entry.map_err(|e| Error::io(dir, e))?.path();
        if is_image(&path) && !is_hidden(&path) {
            files.push(path);
        }
    }
    match files.len() {
        0 => Err(none_in(dir)),
        n if n > FRAMES_MAX => Err(Error::data(dir, format!("has {n} frames, more than {FRAMES_MAX}"))),
        _ => {
            files.sort_by(|a, b| natural(a, b));
            Ok(files)
        }
    }
}

/// That there are no images where some should be.
pub(super) fn none_in(path: &Path) -> Error {
    Error::data(path, format!("holds no images (known by .{})", EXTENSIONS.join(", .")))
}

/// Whether a file is called like an image.
pub(super) fn is_image(path: &Path) -> bool {
    let extension = path.extension().unwrap_or_default();
    EXTENSIONS.iter().any(|known| extension.eq_ignore_ascii_case(known))
}

/// Whether a name begins with a dot.
pub(super) fn is_hidden(path: &Path) -> bool {
    path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"."))
}

/// The order of names as people count: 9.png before 10.png. Names that differ in leading zeros alone follow each other.
pub(super) fn natural(a: &Path, b: &Path) -> Ordering {
    let by_parts = || {
        let mut parts = a.components().zip(b.components());
        let part = parts.find_map(|(a, b)| {
            let order = counted(a.as_os_str().as_encoded_bytes(), b.as_os_str().as_encoded_bytes());
            (order != Ordering::Equal).then_some(order)
        });
        part.unwrap_or_else(|| a.components().count().cmp(&b.components().count()))
    };
    by_parts().then_with(|| a.cmp(b))
}

fn counted(mut a: &[u8], mut b: &[u8]) -> Ordering {
    loop {
        let (Some(&x), Some(&y)) = (a.first(), b.first()) else { return a.len().cmp(&b.len()) };
        if x.is_ascii_digit() && y.is_ascii_digit() {
            let (m, n) = (number(&mut a), number(&mut b));
            match m.len().cmp(&n.len()).then_with(|| m.cmp(n)) {
                Ordering::Equal => continue,
                order => return order,
            }
        }
        match x.cmp(&y) {
            Ordering::Equal => (a, b) = (&a[1..], &b[1..]),
            order => return order,
        }
    }
}

/// Takes the digits that a text begins with, less leading zeros.
fn number<'a>(text: &mut &'a [u8]) -> &'a [u8] {
    let end = text.iter().position(|c| !c.is_ascii_digit()).unwrap_or(text.len());
    let (digits, rest) = text.split_at(end);
    *text = rest;
    &digits[digits.iter().position(|&c| c != b'0').unwrap_or(digits.len())..]
}

/// A count, or a product: `1280x28x28`, `1280*28*28`.
fn product(text: &str) -> Result<u64, String> {
    let factors = text.split(['x', '*']).map(|part| part.trim().parse::<u64>().ok());
    let product = factors.reduce(|a, b| a?.checked_mul(b?)).flatten();
    product.ok_or_else(|| format!("expected pixels, such as 1003520 or 1280x28x28, not {:?}", shown(text)))
}

/// Frames a second.
pub(super) fn fps(text: &str) -> Result<f64, String> {
    let number = text.parse().ok().filter(|fps: &f64| fps.is_finite() && *fps > 0.0);
    number.ok_or_else(|| "expected frames a second, a number above 0".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_in_the_order_in_which_people_count() {
        let sorted =
            ["1.png", "2.png", "007.png", "7.png", "10.png", "a/2.png", "a/10.png", "a10/1.png", "b.png"];
        let mut names: Vec<&Path> = sorted.iter().rev().map(Path::new).collect();
        names.sort_by(|a, b| natural(a, b));
        assert_eq!(names, sorted.map(Path::new));
        let long = ["f99999999999999999999998.png", "f99999999999999999999999.png"].map(Path::new);
        assert_eq!(natural(long[0], long[1]), Ordering::Less);
        assert_eq!(natural(Path::new("x1a"), Path::new("x1")), Ordering::Greater);
    }

    #[test]
    fn pixels_are_numbers_or_products() {
        assert_eq!(product("1003520"), Ok(1003520));
        assert_eq!(product("1280x28x28"), Ok(1003520));
        assert_eq!(product("1280 * 28*28"), Ok(1003520));
        for text in ["", "x", "1x", "-1", "1.5", "99999999999x99999999999"] {
            product(text).unwrap_err();
        }
        assert_eq!(fps("0.5"), Ok(0.5));
        for text in ["", "0", "-1", "nan", "inf", "two"] {
            fps(text).unwrap_err();
        }
    }

    #[test]
    fn images_are_known_by_their_extension() {
        for name in ["a.png", "b.JPG", "c.x.Tiff"] {
            assert!(is_image(Path::new(name)), "{name}");
        }
        for name in ["png", "a.txt", "a.png.part", ".png", "a."] {
            assert!(!is_image(Path::new(name)), "{name}");
        }
        assert!(is_hidden(Path::new("a/._b.png")) && !is_hidden(Path::new(".a/b.png")));
    }
}

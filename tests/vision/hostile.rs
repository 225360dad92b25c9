//! Damaged files: an error that names the file, in one line and soon.

use std::{
    fs,
    path::Path,
    time::{Duration, Instant},
};

use pipeline_infer::vision::{Limits, decode};

use super::{data, preprocessor};

/// One of each format, small.
const SMALL: [&str; 9] = [
    "grey-alpha.png",
    "turned.jpg",
    "progressive.jpg",
    "lossless.webp",
    "lossy.webp",
    "frames.gif",
    "rgb.bmp",
    "lzw.tiff",
    "palette.tiff",
];

fn error(path: &Path, bytes: &[u8]) -> Option<String> {
    let begun = Instant::now();
    let error = decode(path, bytes, Limits::default()).err().map(|e| e.to_string());
    assert!(begun.elapsed() < Duration::from_secs(2), "{}: took {:?}", path.display(), begun.elapsed());
    if let Some(error) = &error {
        assert!(error.starts_with(&path.display().to_string()) && !error.contains('\n'), "{error}");
        assert!(!error.contains("broke down"), "{error}");
    }
    error
}

#[test]
fn a_file_may_end_anywhere() {
    for name in SMALL {
        let bytes = fs::read(data(name)).unwrap();
        let refused = (0..bytes.len()).filter(|&len| error(Path::new(name), &bytes[..len]).is_some()).count();
        assert!(refused > bytes.len() / 2, "{name}: only {refused} of {} lengths are refused", bytes.len());
        // What ends in the middle is no image.
        assert!(error(Path::new(name), &bytes[..bytes.len() / 2]).is_some(), "{name}");
        assert_eq!(error(Path::new(name), &bytes), None);
    }
}

#[test]
fn a_byte_may_be_anything() {
    for name in SMALL {
        let bytes = fs::read(data(name)).unwrap();
        for at in 0..bytes.len() {
            // Headers are where a byte changes most.
            let values = [bytes[at] ^ 0x10, 0, 0xff];
            for &value in &values[..if at < 200 { 3 } else { 1 }] {
                let mut damaged = bytes.clone();
                damaged[at] = value;
                error(Path::new(name), &damaged);
            }
        }
    }
}

#[test]
fn bombs_are_refused_by_their_headers() {
    for name in ["bomb.png", "bomb.gif", "bomb.bmp", "bomb.jpg", "bomb.webp", "bomb.tiff"] {
        let path = data("hostile").join(name);
        let error = error(&path, &fs::read(&path).unwrap()).unwrap();
        assert!(error.contains("pixels are more than 100000000"), "{error}");
    }
}

#[test]
fn what_is_no_image_says_so() {
    let preprocessor = preprocessor("{}").unwrap();
    let folder = tempfile::tempdir().unwrap();
    let error = |name: &str, bytes: &[u8]| {
        let path = folder.path().join(name);
        fs::write(&path, bytes).unwrap();
        let error = preprocessor.image_file(&path).unwrap_err().to_string();
        error.strip_prefix(&format!("{}: ", path.display())).unwrap_or_else(|| panic!("{error}")).to_string()
    };
    assert_eq!(error("a.png", b""), "is empty");
    assert_eq!(error("b.png", b"hello, this is text"), "is no PNG, JPEG, WebP, GIF, BMP or TIFF image");
    assert_eq!(error("c.ico", &[0, 0, 1, 0, 1, 0]), "is no PNG, JPEG, WebP, GIF, BMP or TIFF image");
    let ribbon = fs::read(data("hostile/ribbon.png")).unwrap();
    assert_eq!(error("d.png", &ribbon), "is 10000x20: one side is more than 200 times the other");
    let zero = error("e.png", &fs::read(data("hostile/zero.png")).unwrap());
    assert!(zero.starts_with("PNG image: "), "{zero}");
    assert!(
        preprocessor
            .image_file(folder.path())
            .unwrap_err()
            .to_string()
            .ends_with("is a folder, not an image")
    );
    let absent = preprocessor.image_file(&folder.path().join("absent.png")).unwrap_err().to_string();
    assert!(absent.contains("absent.png: No such file"), "{absent}");
    let large = Limits { bytes_max: 100, ..Limits::default() };
    let path = data("odd.png");
    assert!(
        decode(&path, &fs::read(&path).unwrap(), large).unwrap_err().to_string().contains("is larger than")
    );
}

#[test]
fn the_extension_does_not_matter() {
    let preprocessor = preprocessor("{}").unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("photo.png");
    fs::copy(data("turned.jpg"), &path).unwrap();
    assert_eq!(preprocessor.image_file(&path), preprocessor.image_file(&data("turned.jpg")));
    // One pixel is an image too.
    assert_eq!(preprocessor.image_file(&data("one.png")).unwrap().grid.tokens(2), 4);
}

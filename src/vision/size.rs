//! The size that an image is given before it is cut into patches.

/// Larger images than this are cut into patches by no configuration: their floats would take 24 bytes a pixel.
pub(crate) const PIXELS_MAX: u64 = 1 << 26;

/// Width over height, or the reverse, at most.
const RATIO_MAX: f64 = 200.0;

/// Pixels across and down.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Size {
    /// Across.
    pub width: u32,
    /// Down.
    pub height: u32,
}

impl Size {
    /// Width times height.
    pub fn pixels(self) -> u64 {
        u64::from(self.width) * u64::from(self.height)
    }
}

/// How many pixels an image may have once it is resized.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bounds {
    /// At least.
    pub min: u64,
    /// At most.
    pub max: u64,
}

/// The size next to an image's own whose sides are multiples of `factor` and whose pixels are within the bounds.
///
/// Halves are rounded to even, as Python rounds them. The error says what is wrong with the size.
pub fn smart_resize(size: Size, factor: u32, bounds: Bounds) -> Result<Size, String> {
    let Size { width, height } = size;
    if width == 0 || height == 0 {
        return Err(format!("has no pixels ({width}x{height})"));
    }
    let (w, h, f) = (f64::from(width), f64::from(height), f64::from(factor));
    if w.max(h) / w.min(h) > RATIO_MAX {
        return Err(format!("is {width}x{height}: one side is more than {RATIO_MAX} times the other"));
    }
    let near = |x: f64| (x / f).round_ties_even() * f;
    let (mut to_w, mut to_h) = (near(w), near(h));
    if to_w * to_h > bounds.max as f64 {
        let beta = (h * w / bounds.max as f64).sqrt();
        to_h = f.max((h / beta / f).floor() * f);
        to_w = f.max((w / beta / f).floor() * f);
    } else if to_w * to_h < bounds.min as f64 {
        let beta = (bounds.min as f64 / (h * w)).sqrt();
        to_h = (h * beta / f).ceil() * f;
        to_w = (w * beta / f).ceil() * f;
    }
    // Where min is tiny, a side of less than half a factor would come to nothing.
    let (to_w, to_h) = (to_w.max(f), to_h.max(f));
    if to_w * to_h > PIXELS_MAX as f64 {
        return Err(format!("is {width}x{height}, which would become {to_w}x{to_h}: too large"));
    }
    Ok(Size { width: to_w as u32, height: to_h as u32 })
}

#[cfg(test)]
mod tests {
    use super::*;

    const HUB: Bounds = Bounds { min: 3136, max: 12845056 };

    fn resized(height: u32, width: u32) -> (u32, u32) {
        let size = smart_resize(Size { width, height }, 28, HUB).unwrap();
        (size.height, size.width)
    }

    #[test]
    fn sizes_are_those_of_the_original() {
        assert_eq!(resized(300, 451), (308, 448));
        assert_eq!(resized(1080, 1920), (1092, 1932));
        assert_eq!(resized(512, 512), (504, 504));
        assert_eq!(resized(1024, 1024), (1036, 1036));
        assert_eq!(resized(1, 1), (56, 56));
        // 42 / 28 is 1.5, which is 2; 70 / 28 is 2.5, which is 2 as well.
        assert_eq!(resized(42, 70), (56, 56));
        assert_eq!(resized(6000, 6000), (3584, 3584));
    }

    #[test]
    fn a_ribbon_is_refused() {
        let error = |width, height| smart_resize(Size { width, height }, 28, HUB).unwrap_err();
        assert_eq!(error(10000, 20), "is 10000x20: one side is more than 200 times the other");
        assert_eq!(error(0, 5), "has no pixels (0x5)");
        assert!(smart_resize(Size { width: 4000, height: 20 }, 28, HUB).is_ok());
    }
}

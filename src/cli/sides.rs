//! Pixels across and down, as flags have them.

use std::str::FromStr;

use crate::vision::Size;

const SIDE_MAX: u32 = 16_384;

/// `1024x768`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Sides(pub(super) Size);

impl FromStr for Sides {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number = |text: &str| text.trim().parse().ok().filter(|n| (1..=SIDE_MAX).contains(n));
        let sides = text.split_once(['x', 'X']).and_then(|(w, h)| Some((number(w)?, number(h)?)));
        match sides {
            Some((width, height)) => Ok(Sides(Size { width, height })),
            None => Err(format!("expected pixels across and down, such as 1024x768 (up to {SIDE_MAX})")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sides_are_bounded() {
        assert_eq!("20x30".parse::<Sides>(), Ok(Sides(Size { width: 20, height: 30 })));
        for text in ["", "20", "0x5", "5x", "-1x2", "99999x1", "axb", "1x2x3"] {
            text.parse::<Sides>().unwrap_err();
        }
    }
}

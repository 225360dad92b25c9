//! Which layers run on which device. The first stage holds the embedding, the last one the head.

use std::{fmt, ops::Range, str::FromStr};

use crate::error::{Error, Result};

/// A device that a stage runs on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Device {
    /// The host's processors.
    #[default]
    Cpu,
    /// A GPU, by its number.
    Cuda(usize),
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Device::Cpu => f.write_str("cpu"),
            Device::Cuda(i) => write!(f, "cuda:{i}"),
        }
    }
}

impl FromStr for Device {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text.split_once(':') {
            None if text == "cpu" => Ok(Device::Cpu),
            None if text == "cuda" => Ok(Device::Cuda(0)),
            Some(("cuda", number)) if number.parse::<usize>().is_ok() => {
                Ok(Device::Cuda(number.parse().expect("checked to be a number; this is a bug")))
            }
            _ => Err(Error::usage(format!("device {text:?}"), "it is neither cpu nor cuda:N")),
        }
    }
}

/// One stage: consecutive layers on a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stage {
    /// Where.
    pub device: Device,
    /// Which layers.
    pub layers: Range<usize>,
}

/// All stages, in the order of the data.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    stages: Vec<Stage>,
}

impl Layout {
    /// A layout of these stages. They must cover layers from 0 on without gap or overlap.
    pub fn new(stages: Vec<Stage>) -> Result<Self> {
        let mut next = 0;
        for (i, stage) in stages.iter().enumerate() {
            let Range { start, end } = stage.layers.clone();
            let why = if end <= start {
                format!("stage {i} has no layers")
            } else if start > next {
                format!("{} in no stage", layers(next..start))
            } else if start < next {
                format!("{} in two stages", layers(start..next.min(end)))
            } else {
                next = end;
                continue;
            };
            return Err(Error::usage("--layout", why));
        }
        if stages.is_empty() {
            return Err(Error::usage("--layout", "it has no stages"));
        }
        Ok(Layout { stages })
    }

    /// `stages` stages of near-equal length; the first ones take what is left over, since the head weighs
    /// on the last.
    pub fn even(stages: usize, layers: usize, device: Device) -> Result<Self> {
        if stages == 0 {
            return Err(Error::usage("--stages", "at least one stage is needed"));
        }
        if stages > layers {
            let why = format!("{stages} stages for a model of {layers} layers: a stage would be empty");
            return Err(Error::usage("--stages", why));
        }
        let mut start = 0;
        let cut = (0..stages)
            .map(|i| {
                let end = start + layers / stages + usize::from(i < layers % stages);
                let stage = Stage { device, layers: start..end };
                start = end;
                stage
            })
            .collect();
        Layout::new(cut)
    }

    /// The stages, in the order of the data.
    pub fn stages(&self) -> &[Stage] {
        &self.stages
    }

    /// How many layers there are in all.
    pub fn layers(&self) -> usize {
        self.stages.last().map_or(0, |s| s.layers.end)
    }

    /// Whether it fits a model of this many layers.
    pub fn check(&self, layers: usize) -> Result<()> {
        let have = self.layers();
        if have == layers {
            return Ok(());
        }
        let why = if have < layers {
            format!("{} in no stage: the model has {layers} layers", self::layers(have..layers))
        } else {
            format!("layer {} does not exist: the model has {layers} layers", have - 1)
        };
        Err(Error::usage("--layout", why))
    }
}

/// `layer 3 is`, `layers 3-5 are`.
fn layers(range: Range<usize>) -> String {
    match range.len() {
        1 => format!("layer {} is", range.start),
        _ => format!("layers {}-{} are", range.start, range.end - 1),
    }
}

impl fmt::Display for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.layers.len() {
            1 => write!(f, "{}", self.layers.start),
            _ => write!(f, "{}-{}", self.layers.start, self.layers.end - 1),
        }
    }
}

impl fmt::Display for Layout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, stage) in self.stages.iter().enumerate() {
            let comma = if i == 0 { "" } else { "," };
            write!(f, "{comma}{stage}@{}", stage.device)?;
        }
        Ok(())
    }
}

/// `0-9,10-29`, each part optionally with its device: `0-9@cpu,10-29@cuda:1`.
impl FromStr for Layout {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let wrong = |part: &str| {
            let why = format!("{part:?} is not of the form FIRST-LAST or FIRST-LAST@DEVICE");
            Error::usage("--layout", why)
        };
        let mut stages = Vec::new();
        for part in text.split(',') {
            let (run, device) = match part.split_once('@') {
                Some((run, device)) => (run, device.parse()?),
                None => (part, Device::default()),
            };
            let (first, last) = run.split_once('-').unwrap_or((run, run));
            let number = |s: &str| s.trim().parse::<usize>().ok().filter(|&n| n < usize::MAX);
            let (Some(first), Some(last)) = (number(first), number(last)) else { return Err(wrong(part)) };
            if last < first {
                return Err(Error::usage("--layout", format!("{part:?} ends before it begins")));
            }
            stages.push(Stage { device, layers: first..last + 1 });
        }
        Layout::new(stages).map_err(|e| match e {
            Error::Usage { why, .. } => Error::usage(format!("--layout {text}"), why),
            other => other,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(text: &str) -> String {
        text.parse::<Layout>().unwrap_err().to_string()
    }

    #[test]
    fn even_layouts_cover_every_layer_once_and_differ_by_one_at_most() {
        for layers in 1..40 {
            for stages in 1..=layers {
                let layout = Layout::even(stages, layers, Device::Cpu).unwrap();
                let lens: Vec<usize> = layout.stages().iter().map(|s| s.layers.len()).collect();
                assert_eq!(lens.len(), stages);
                assert_eq!(lens.iter().sum::<usize>(), layers);
                assert!(lens[0] - lens[stages - 1] <= 1, "{lens:?}");
                layout.check(layers).unwrap();
            }
            assert!(Layout::even(layers + 1, layers, Device::Cpu).is_err());
        }
        assert!(Layout::even(0, 4, Device::Cpu).is_err());
    }

    #[test]
    fn text_form_goes_both_ways() {
        for text in ["0-9@cpu,10-29@cpu", "0@cpu,1-2@cuda:3", "0@cpu"] {
            assert_eq!(text.parse::<Layout>().unwrap().to_string(), text);
        }
        assert_eq!("0-1,2".parse::<Layout>().unwrap().to_string(), "0-1@cpu,2@cpu");
    }

    #[test]
    fn gaps_overlaps_and_nonsense_are_named() {
        assert!(message("0-3,5-9").contains("layer 4 is in no stage"));
        assert!(message("1-3").contains("layer 0 is in no stage"));
        assert!(message("0-5,4-9").contains("layers 4-5 are in two stages"));
        assert!(message("0-3,2").contains("layer 2 is in two stages"));
        assert!(message("3-1").contains("ends before it begins"));
        assert!(message("0-3@gpu").contains("neither cpu nor cuda:N"));
        for text in ["", ",", "a-b", "0-", "-3", "0-18446744073709551615", "0--1", "1e3"] {
            assert!(!message(text).contains('\n'), "{text:?}");
        }
        let layout: Layout = "0-9".parse().unwrap();
        assert!(layout.check(12).unwrap_err().to_string().contains("layers 10-11 are in no stage"));
        assert!(layout.check(5).unwrap_err().to_string().contains("layer 9 does not exist"));
    }
}

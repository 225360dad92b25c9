//! Which layers run on which device, and which had better.
//!
//! The first stage holds the embedding, the last one the head, unless all share it (`head`). `parse` reads layouts as users write them; `plan` cuts a model
//! where costs say, which `cost` predicts for the devices that `devices` describes and `profile` has measured; `planner`
//! puts these together, with a vision tower as `tower` and `joint` place it, and `predict` says what a layout will do; `measured` gathers what it did, and `compare` puts the two
//! beside each other.

pub mod compare;
pub mod cost;
pub mod devices;
mod head;
pub mod joint;
pub mod limits;
pub mod measured;
mod parse;
pub mod plan;
pub mod planner;
pub mod predict;
pub mod profile;
pub mod tower;
mod vision;

pub use compare::{Compared, VisionCompared, compare, compare_vision};
pub use devices::DeviceSpec;
pub use limits::MemoryLimits;
pub use measured::{Measured, StageTime, VisionTime};
pub use parse::Given;
pub use planner::{Planner, Workload};
pub use predict::Prediction;
pub use tower::ImageLoad;
pub use vision::VisionStage;

use std::{fmt, ops::Range, str::FromStr};

use crate::error::{Error, Result, shown};

/// A device that a stage runs on.
///
/// ```
/// use pipeline_infer::layout::Device;
///
/// assert_eq!("cuda:1".parse::<Device>()?, Device::Cuda(1));
/// assert_eq!(Device::Cpu.to_string(), "cpu");
/// # Ok::<(), pipeline_infer::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, PartialOrd, Ord)]
pub enum Device {
    /// The host's processors.
    #[default]
    Cpu,
    /// A GPU, by its number.
    Cuda(usize),
}

impl Device {
    /// A GPU's number.
    pub(crate) fn gpu(self) -> Option<usize> {
        match self {
            Device::Cpu => None,
            Device::Cuda(i) => Some(i),
        }
    }
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
            _ => Err(Error::usage(format!("device \"{}\"", shown(text)), "it is neither cpu nor cuda:N")),
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
///
/// It is a value, a short form ([`str::parse`], [`ToString`]) and a file ([`Layout::open`], [`Layout::to_toml`]).
///
/// ```
/// use pipeline_infer::{Layout, layout::{Device, Stage}};
///
/// let stages = vec![
///     Stage { device: Device::Cuda(2), layers: 0..21 },
///     Stage { device: Device::Cuda(0), layers: 21..80 },
/// ];
/// let layout = Layout::new(stages)?;
/// assert_eq!(layout.to_string(), "0-20@cuda:2,21-79@cuda:0");
/// assert_eq!(layout, "0-20@cuda:2,21-79@cuda:0".parse()?);
/// assert_eq!(layout, Layout::from_toml(&layout.to_toml(), "layout.toml".as_ref())?);
/// // Layer 21 would be in no stage.
/// assert!("0-20,22-79".parse::<Layout>().is_err());
/// # Ok::<(), pipeline_infer::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    stages: Vec<Stage>,
    vision: Vec<VisionStage>,
    split_head: bool,
}

impl Layout {
    /// A layout of these stages. They must cover layers from 0 on without gap or overlap.
    pub fn new(stages: Vec<Stage>) -> Result<Self> {
        match fault(&stages) {
            Some((_, why)) => Err(Error::usage("--layout", why)),
            None => Ok(Layout { stages, vision: Vec::new(), split_head: false }),
        }
    }

    /// `stages` stages of near-equal length; the first ones take what is left over, since the head weighs
    /// on the last.
    ///
    /// ```
    /// # use pipeline_infer::{Layout, layout::Device};
    /// assert_eq!(Layout::even(3, 8, Device::Cpu)?.to_string(), "0-2@cpu,3-5@cpu,6-7@cpu");
    /// # Ok::<(), pipeline_infer::Error>(())
    /// ```
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
    ///
    /// ```
    /// # use pipeline_infer::Layout;
    /// let told = "0-3,4-6".parse::<Layout>()?.check(8).unwrap_err();
    /// assert_eq!(told.to_string(), "--layout: layer 7 is in no stage: the model has 8 layers");
    /// # Ok::<(), pipeline_infer::Error>(())
    /// ```
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

/// The first stage that does not go on where the one before it ended, and what is wrong with it.
fn fault(stages: &[Stage]) -> Option<(usize, String)> {
    let mut next = 0;
    for (i, stage) in stages.iter().enumerate() {
        let Range { start, end } = stage.layers.clone();
        if start == next && end > start {
            next = end;
            continue;
        }
        let mut sorted = stages.to_vec();
        sorted.sort_by_key(|s| s.layers.start);
        let why = if end <= start {
            format!("stage {i} has no layers")
        } else if sorted != stages && fault(&sorted).is_none() {
            format!("stage {i} begins with layer {start}: stages are not in the order of their layers")
        } else if start > next {
            format!("stage {i} begins with layer {start}: {} in no stage", layers(next..start))
        } else {
            format!("stage {i} begins with layer {start}: {} in two stages", layers(start..next.min(end)))
        };
        return Some((i, why));
    }
    stages.is_empty().then(|| (0, "it has no stages".into()))
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
        for stage in &self.vision {
            write!(f, "{stage}@{},", stage.device)?;
        }
        for (i, stage) in self.stages.iter().enumerate() {
            let comma = if i == 0 { "" } else { "," };
            write!(f, "{comma}{stage}@{}", stage.device)?;
        }
        if self.split_head { write!(f, ",{}", head::SPLIT) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
    fn a_layout_is_checked_against_its_model() {
        let layout: Layout = "0-9".parse().unwrap();
        assert!(layout.check(12).unwrap_err().to_string().contains("layers 10-11 are in no stage"));
        assert!(layout.check(5).unwrap_err().to_string().contains("layer 9 does not exist"));
        layout.check(10).unwrap();
    }
}

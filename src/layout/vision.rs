//! Stages of the vision tower, beside the decoder's.

use std::{fmt, ops::Range};

use super::{Device, Layout, Stage};
use crate::error::{Error, Result, shown};

/// A run of the vision tower's blocks on a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VisionStage {
    /// Where.
    pub device: Device,
    /// Which blocks; `None`: all that there are.
    pub blocks: Option<Range<usize>>,
}

impl Layout {
    /// With the vision tower on these stages, in the order of its blocks; none where there is no tower, or where it goes by
    /// default.
    ///
    /// ```
    /// # use pipeline_infer::{Layout, layout::{Device, VisionStage}};
    /// let layers: Layout = "0-13@cuda:0,14-27@cuda:1".parse()?;
    /// let on = |gpu, blocks| VisionStage { device: Device::Cuda(gpu), blocks: Some(blocks) };
    /// let layout = layers.with_vision(vec![on(0, 0..12), on(1, 12..32)])?;
    /// assert_eq!(layout.to_string(), "v0-11@cuda:0,v12-31@cuda:1,0-13@cuda:0,14-27@cuda:1");
    /// // Of another tower some blocks would be nowhere.
    /// assert!(layout.tower(Some(32)).is_ok() && layout.tower(Some(40)).is_err());
    /// # Ok::<(), pipeline_infer::Error>(())
    /// ```
    pub fn with_vision(mut self, vision: Vec<VisionStage>) -> Result<Self> {
        let mut next = 0;
        for (i, stage) in vision.iter().enumerate() {
            let why = match &stage.blocks {
                None if vision.len() > 1 => "it has all blocks, and there are others".into(),
                Some(blocks) if blocks.is_empty() => "it has no blocks".into(),
                Some(blocks) if blocks.start != next => {
                    format!("it begins with block {}, and {next} comes next", blocks.start)
                }
                blocks => {
                    next = blocks.as_ref().map_or(0, |blocks| blocks.end);
                    continue;
                }
            };
            return Err(Error::usage("--layout", format!("vision stage {i}: {why}")));
        }
        self.vision = vision;
        Ok(self)
    }

    /// The stages of the vision tower.
    pub fn vision(&self) -> &[VisionStage] {
        &self.vision
    }

    /// The device and the blocks of each stage of a tower of so many blocks; the tower goes where the embedding is if
    /// nothing is said. An error if there are other blocks, or no tower.
    pub fn tower(&self, depth: Option<usize>) -> Result<Vec<(Device, Range<usize>)>> {
        let wrong = |why: String| Err(Error::usage("--layout", why));
        let Some(depth) = depth else {
            return match self.vision.is_empty() {
                true => Ok(Vec::new()),
                false => wrong("it has vision stages, and the model reads no images".into()),
            };
        };
        let all = |device| Ok(vec![(device, 0..depth)]);
        match &self.vision[..] {
            [] => all(self.stages[0].device),
            [VisionStage { device, blocks: None }] => all(*device),
            stages => {
                let end =
                    stages.last().and_then(|stage| stage.blocks.as_ref()).map_or(0, |blocks| blocks.end);
                if end != depth {
                    return wrong(format!("its vision stages have {end} blocks, and the tower has {depth}"));
                }
                Ok(stages.iter().filter_map(|s| Some((s.device, s.blocks.clone()?))).collect())
            }
        }
    }
}

impl fmt::Display for VisionStage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.blocks {
            None => f.write_str("vision"),
            Some(blocks) => write!(f, "v{}", Stage { device: self.device, layers: blocks.clone() }),
        }
    }
}

/// A vision stage as it is written: its blocks, `None` for all, and its device if it names one.
pub(super) type Named = (Option<Range<usize>>, Option<Device>);

/// A vision stage of the short form, if it is one.
pub(super) fn parse(text: &str) -> Option<Result<Named, String>> {
    let rest = text.trim().strip_prefix('v')?;
    let (run, device) = match rest.split_once('@') {
        Some((run, device)) => match device.trim().parse::<Device>() {
            Ok(device) => (run, Some(device)),
            Err(_) => {
                return Some(Err(format!("device \"{}\": it is neither cpu nor cuda:N", shown(device))));
            }
        },
        None => (rest, None),
    };
    Some(match run.trim() {
        "ision" => Ok((None, device)),
        run => super::parse::layers(run).map(|blocks| (Some(blocks), device)),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vision_stages_go_both_ways() {
        for text in [
            "vision@cuda:1,0-9@cuda:0,10-27@cuda:1",
            "v0-15@cuda:0,v16-31@cpu,0-1@cuda:0,2-3@cpu",
            "v0@cpu,v1-7@cpu,0@cpu",
        ] {
            let layout = text.parse::<Layout>().unwrap();
            assert_eq!(layout.to_string(), text);
            assert_eq!(Layout::from_toml(&layout.to_toml(), "x".as_ref()).unwrap(), layout);
        }
        let said = |text: &str| text.parse::<Layout>().unwrap().to_string();
        assert_eq!(said("vision,0-1@cuda:2,2@cuda:1"), "vision@cuda:2,0-1@cuda:2,2@cuda:1");
        assert_eq!(said("0-1,v0-3,2,v4"), "v0-3@cpu,v4@cpu,0-1@cpu,2@cpu");
    }

    #[test]
    fn what_is_wrong_with_vision_stages_is_named() {
        for (text, want) in [
            ("v0-3,v5,0", "vision stage 1: it begins with block 5, and 4 comes next"),
            ("v1-3,0", "vision stage 0: it begins with block 1, and 0 comes next"),
            ("vision,v0,0", "vision stage 0: it has all blocks, and there are others"),
            ("v3-1,0", "vision stage 0, \"v3-1\": it ends before it begins"),
            ("vision@x,0", "vision stage 0, \"vision@x\": device \"x\": it is neither cpu nor cuda:N"),
            ("video,0", "vision stage 0, \"video\": it is not of the form"),
            ("vision", "it has no stages"),
            ("vision@cuda:0,0-1", "stage 0, \"0-1\": it names no device, and other stages name GPUs"),
        ] {
            let said = text.parse::<Layout>().unwrap_err().to_string();
            assert!(said.contains(want), "{text}: {said}");
        }
        let layout: Layout = "v0-3@cuda:1,v4-7@cpu,0-2@cuda:0".parse().unwrap();
        assert_eq!(layout.tower(Some(8)).unwrap(), [(Device::Cuda(1), 0..4), (Device::Cpu, 4..8)]);
        let said = |depth| layout.tower(depth).unwrap_err().to_string();
        assert_eq!(said(Some(9)), "--layout: its vision stages have 8 blocks, and the tower has 9");
        assert_eq!(said(None), "--layout: it has vision stages, and the model reads no images");
        let plain: Layout = "0-2@cuda:0".parse().unwrap();
        assert_eq!(plain.tower(Some(5)).unwrap(), [(Device::Cuda(0), 0..5)]);
        assert!(plain.tower(None).unwrap().is_empty());
    }
}

//! Layouts as users write them: the short form, and TOML files.

use std::{fs, ops::Range, path::Path, str::FromStr};

use serde::Deserialize;
use toml::Spanned;

use super::{Device, Layout, Stage, VisionStage, fault, head, vision};
use crate::error::{Error, Result, shown};

/// A layout's file is a few KiB.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// A layout that somebody wrote, and whether it says where its stages go.
///
/// ```
/// use pipeline_infer::layout::Given;
///
/// assert!(!Given::from_arg("0-9,10-29")?.placed && Given::from_arg("0-9@cuda:1,10-29@cuda:0")?.placed);
/// let told = Given::from_arg("0-9@cuda:1,10-29").unwrap_err().to_string();
/// assert!(told.ends_with("it names no device, and other stages name GPUs"), "{told}");
/// # Ok::<(), pipeline_infer::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Given {
    /// On the processor, if it does not say.
    pub layout: Layout,
    /// Whether its stages name their devices. Where some name GPUs, all must name theirs.
    pub placed: bool,
}

/// Why stages of which some name their devices are refused.
const SOME_PLACED: &str = "it names no device, and other stages name GPUs";

impl Given {
    /// What `--layout` says: a file if it ends in `.toml`, else the short form.
    pub fn from_arg(text: &str) -> Result<Given> {
        if text.ends_with(".toml") { Given::open(Path::new(text)) } else { text.parse() }
    }

    /// A TOML file, as [`Layout::open`] reads it.
    pub fn open(path: &Path) -> Result<Given> {
        let meta = fs::metadata(path).map_err(|e| Error::io(path, e))?;
        if !meta.is_file() {
            return Err(Error::io(path, "it is not a file"));
        }
        if meta.len() > FILE_BYTES_MAX {
            return Err(Error::data(path, format!("it is larger than {FILE_BYTES_MAX} bytes")));
        }
        let bytes = fs::read(path).map_err(|e| Error::io(path, e))?;
        let text = String::from_utf8(bytes).map_err(|_| Error::data(path, "it is not text"))?;
        Given::from_toml(&text, path)
    }

    fn from_toml(text: &str, path: &Path) -> Result<Given> {
        let wrong = |at: Option<usize>, why: String| {
            let line = at.map(|at| text[..at.min(text.len())].matches('\n').count() + 1);
            let place = line.map_or(String::new(), |line| format!("line {line}: "));
            Error::data(path, format!("{place}{why}"))
        };
        let file: FileForm =
            toml::from_str(text).map_err(|e| wrong(e.span().map(|span| span.start), shown(e.message())))?;
        let split = match &file.head {
            None => false,
            Some(head) if head.get_ref() == "all" => true,
            Some(head) => {
                let why = format!(
                    "head = \"{}\": it can be split over \"all\" devices alone",
                    shown(head.get_ref())
                );
                return Err(wrong(Some(head.span().start), why));
            }
        };
        let line_of = |i: usize| file.stage.get(i).map(|stage| stage.span().start);
        let mut stages = Vec::new();
        for (i, stage) in file.stage.iter().enumerate() {
            let StageForm { layers: run, device } = stage.get_ref();
            let bad = |at: &Spanned<String>, why: String| {
                wrong(Some(at.span().start), format!("stage {i}, \"{}\": {why}", shown(at.get_ref())))
            };
            let layers = layers(run.get_ref()).map_err(|why| bad(run, why))?;
            let place = |device: &Spanned<String>| {
                let parsed = device.get_ref().parse::<Device>();
                parsed.map_err(|_| bad(device, "it is neither cpu nor cuda:N".into()))
            };
            stages.push((layers, device.as_ref().map(place).transpose()?));
        }
        let mut towers = Vec::new();
        for (i, stage) in file.vision.iter().enumerate() {
            let VisionForm { blocks, device } = stage.get_ref();
            let bad = |at: &Spanned<String>, why: String| {
                wrong(Some(at.span().start), format!("vision stage {i}, \"{}\": {why}", shown(at.get_ref())))
            };
            let run = |run: &Spanned<String>| layers(run.get_ref()).map_err(|why| bad(run, why));
            let place = |device: &Spanned<String>| {
                let parsed = device.get_ref().parse::<Device>();
                parsed.map_err(|_| bad(device, "it is neither cpu nor cuda:N".into()))
            };
            towers.push((blocks.as_ref().map(run).transpose()?, device.as_ref().map(place).transpose()?));
        }
        let placed =
            placed(&stages, &towers).map_err(|i| wrong(line_of(i), format!("stage {i}: {SOME_PLACED}")))?;
        let stages = on_devices(stages);
        match fault(&stages) {
            Some((i, why)) => Err(wrong(line_of(i), why)),
            None => {
                let layout = with_towers(Layout::new(stages)?, towers).map_err(|e| wrong(None, why(e)))?;
                Ok(Given { layout: layout.with_split_head(split), placed })
            }
        }
    }
}

impl FromStr for Given {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let wrong = |(i, part): (usize, &str), why: String| {
            Error::usage(what(text), format!("stage {i}, \"{}\": {why}", shown(part)))
        };
        let (mut towers, mut parts) = (Vec::new(), Vec::new());
        let before =
            text.trim_end().strip_suffix(head::SPLIT).and_then(|text| text.trim_end().strip_suffix(','));
        let (stages, split) = (before.unwrap_or(text), before.is_some());
        for part in stages.split(',') {
            match vision::parse(part) {
                None => parts.push((parts.len(), part)),
                Some(tower) => towers.push(tower.map_err(|why| {
                    let (i, part) = (towers.len(), shown(part));
                    Error::usage(what(text), format!("vision stage {i}, \"{part}\": {why}"))
                })?),
            }
        }
        let stage = |&part: &(usize, &str)| {
            let (run, device) = match part.1.split_once('@') {
                Some((run, device)) => {
                    (run, Some(device.trim().parse::<Device>().map_err(|e| wrong(part, why(e)))?))
                }
                None => (part.1, None),
            };
            Ok((layers(run).map_err(|why| wrong(part, why))?, device))
        };
        let stages = parts.iter().map(stage).collect::<Result<Vec<_>>>()?;
        let placed = placed(&stages, &towers).map_err(|i| wrong(parts[i], SOME_PLACED.into()))?;
        let layout = Layout::new(on_devices(stages)).and_then(|layout| with_towers(layout, towers));
        let layout = layout.map_err(|e| Error::usage(what(text), why(e)))?;
        Ok(Given { layout: layout.with_split_head(split), placed })
    }
}

/// `0-9,10-29`, or with devices: `0-9@cpu,10-29@cuda:1`. Without them all stages are on the processor. The vision tower
/// is where the embedding is, or on stages of its own: `vision@cuda:2,…`, or `v0-15@cuda:2,v16-31@cuda:3,…`. With
/// `…,head@all` at its end the head is split over the devices: see [`Layout::with_split_head`].
impl FromStr for Layout {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        text.parse::<Given>().map(|given| given.layout)
    }
}

impl Layout {
    /// Reads a TOML file: a table `[[stage]]` for each stage, with `layers = "0-20"` and `device = "cuda:0"`, and if wanted
    /// `[[vision]]` with `blocks = "0-15"` and `device`, and before all tables `head = "all"` for a split head. Without devices all stages are on the processor.
    pub fn open(path: &Path) -> Result<Layout> {
        Given::open(path).map(|given| given.layout)
    }

    /// The same from its text; `path` is for messages.
    ///
    /// ```
    /// # use pipeline_infer::Layout;
    /// let text = "[[stage]]\nlayers = '0-20'\ndevice = 'cuda:2'\n[[stage]]\nlayers = '21-79'\ndevice = 'cuda:0'\n";
    /// let layout = Layout::from_toml(text, "layout.toml".as_ref())?;
    /// assert_eq!(layout.to_string(), "0-20@cuda:2,21-79@cuda:0");
    /// # Ok::<(), pipeline_infer::Error>(())
    /// ```
    pub fn from_toml(text: &str, path: &Path) -> Result<Layout> {
        Given::from_toml(text, path).map(|given| given.layout)
    }

    /// As a TOML file.
    pub fn to_toml(&self) -> String {
        let stage = |s: &Stage| format!("[[stage]]\nlayers = \"{s}\"\ndevice = \"{}\"\n", s.device);
        let vision = |s: &VisionStage| {
            let blocks = s.blocks.as_ref().map(|b| format!("blocks = \"{}-{}\"\n", b.start, b.end - 1));
            format!("[[vision]]\n{}device = \"{}\"\n", blocks.unwrap_or_default(), s.device)
        };
        let head = self.splits_head().then(|| "head = \"all\"\n".to_owned()).into_iter();
        let tables = head.chain(self.vision().iter().map(vision).chain(self.stages().iter().map(stage)));
        tables.collect::<Vec<_>>().join("\n")
    }
}

/// Those that name no device are where the embedding is.
fn with_towers(layout: Layout, towers: Vec<vision::Named>) -> Result<Layout> {
    let first = layout.stages()[0].device;
    let stage = |(blocks, device): vision::Named| VisionStage { device: device.unwrap_or(first), blocks };
    layout.with_vision(towers.into_iter().map(stage).collect())
}

/// Whether stages name devices, or else the first that does not where others name GPUs.
fn placed(stages: &[(Range<usize>, Option<Device>)], towers: &[vision::Named]) -> Result<bool, usize> {
    let without = stages.iter().position(|(_, device)| device.is_none());
    let gpu = |device| device != Device::Cpu;
    let on_gpu = |(_, device): &(_, Option<Device>)| device.is_some_and(gpu);
    match without {
        Some(i) if stages.iter().any(on_gpu) || towers.iter().any(|(_, d)| d.is_some_and(gpu)) => Err(i),
        _ => Ok(stages.iter().any(|(_, device)| device.is_some())),
    }
}

fn on_devices(stages: Vec<(Range<usize>, Option<Device>)>) -> Vec<Stage> {
    let stage = |(layers, device): (_, Option<Device>)| Stage { device: device.unwrap_or_default(), layers };
    stages.into_iter().map(stage).collect()
}

fn what(text: &str) -> String {
    format!("--layout {}", shown(text))
}

/// What is wrong, without what it is wrong with.
fn why(error: Error) -> String {
    match error {
        Error::Usage { what, why } if what != "--layout" => format!("{what}: {why}"),
        Error::Usage { why, .. } => why,
        other => other.to_string(),
    }
}

/// `0-9`, or `3` alone.
pub(super) fn layers(text: &str) -> Result<Range<usize>, String> {
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let digits = |s: &str| !s.is_empty() && s.bytes().all(|b| b.is_ascii_digit());
    if !digits(first.trim()) || !digits(last.trim()) {
        return Err("it is not of the form FIRST-LAST or FIRST-LAST@DEVICE".into());
    }
    let number = |s: &str| s.trim().parse::<usize>().ok().filter(|&n| n < usize::MAX);
    match (number(first), number(last)) {
        (Some(first), Some(last)) if last < first => Err("it ends before it begins".into()),
        (Some(first), Some(last)) => Ok(first..last + 1),
        _ => Err("no model has so many layers".into()),
    }
}

/// A file's tables, before they are understood.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FileForm {
    head: Option<Spanned<String>>,
    #[serde(default)]
    stage: Vec<Spanned<StageForm>>,
    #[serde(default)]
    vision: Vec<Spanned<VisionForm>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct VisionForm {
    blocks: Option<Spanned<String>>,
    device: Option<Spanned<String>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct StageForm {
    layers: Spanned<String>,
    device: Option<Spanned<String>>,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(text: &str) -> String {
        text.parse::<Layout>().unwrap_err().to_string()
    }

    fn of_file(text: &str) -> String {
        Layout::from_toml(text, "l.toml".as_ref()).unwrap_err().to_string()
    }

    #[test]
    fn text_form_goes_both_ways() {
        for text in [
            "0-9@cpu,10-29@cpu",
            "0@cpu,1-2@cuda:3",
            "0@cpu",
            "0-1@cuda:0,2-3@cuda:0,4@cuda:1",
            "v0-3@cuda:0,0-1@cuda:0,2-3@cuda:1,head@all",
        ] {
            let layout = text.parse::<Layout>().unwrap();
            assert_eq!(layout.to_string(), text);
            assert_eq!(Layout::from_toml(&layout.to_toml(), "x".as_ref()).unwrap(), layout);
        }
        assert_eq!("0-1,2".parse::<Layout>().unwrap().to_string(), "0-1@cpu,2@cpu");
        assert_eq!(" 0 - 1 @cpu, 2 @ cuda".parse::<Layout>().unwrap().to_string(), "0-1@cpu,2@cuda:0");
    }

    #[test]
    fn gaps_overlaps_and_nonsense_are_named() {
        for (text, want) in [
            ("0-3,5-9", "--layout 0-3,5-9: stage 1 begins with layer 5: layer 4 is in no stage"),
            ("1-3", "stage 0 begins with layer 1: layer 0 is in no stage"),
            ("0-5,4-9", "stage 1 begins with layer 4: layers 4-5 are in two stages"),
            ("0-3,2", "layer 2 is in two stages"),
            ("4-7,0-3", "stage 0 begins with layer 4: stages are not in the order of their layers"),
            ("3-1", "stage 0, \"3-1\": it ends before it begins"),
            ("0-3@gpu", "stage 0, \"0-3@gpu\": device \"gpu\": it is neither cpu nor cuda:N"),
            ("0-3,4-7@cuda:-1", "stage 1, \"4-7@cuda:-1\""),
            ("0-18446744073709551615", "no model has so many layers"),
            ("0-99999999999999999999999", "no model has so many layers"),
            ("0-1,x", "stage 1, \"x\": it is not of the form"),
            ("0-1,head@cuda:0", "stage 1, \"head@cuda:0\": it is not of the form"),
            ("head@all", "stage 0, \"head@all\": device \"all\""),
            ("head@all,0-1", "stage 0, \"head@all\""),
            ("0-1@cuda:0,2-3", "stage 1, \"2-3\": it names no device, and other stages name GPUs"),
        ] {
            assert!(message(text).contains(want), "{text}: {}", message(text));
        }
        for text in [
            "",
            ",",
            "a-b",
            "0-",
            "-3",
            "0--1",
            "1e3",
            "0-1\n",
            "0-1@",
            "+1",
            "0-1@cuda:99999999999999999999",
        ] {
            if let Err(e) = text.parse::<Layout>() {
                assert!(!e.to_string().contains('\n'), "{text:?}");
            }
        }
        assert!(message(&"0-1,".repeat(10_000)).len() < 600, "long input is not repeated");
    }

    #[test]
    fn files_name_the_line() {
        let good = "[[stage]]\nlayers = \"0-3\"\n";
        for (text, want) in [
            ("", "l.toml: it has no stages".to_owned()),
            ("x = 1", "l.toml: line 1: unknown field `x`".into()),
            ("[[stage]]\nlayer = \"0\"", "line 2: unknown field `layer`".into()),
            ("[[stage]]\nlayers = 3", "line 2: invalid type: integer `3`".into()),
            ("[[stage]]\ndevice = \"cpu\"", "line 1: missing field `layers`".into()),
            ("[[stage\n", "l.toml: line 1: ".into()),
            ("head = 'cpu'\n[[stage]]\nlayers = '0'", "line 1: head = \"cpu\": it can be split over".into()),
            ("[stage]\nlayers = \"0\"", "line 1: invalid type: map".into()),
            (&format!("{good}[[stage]]\nlayers = \"5-9\""), "line 3: stage 1 begins with layer 5".into()),
            (&format!("{good}[[stage]]\nlayers = \"3-9\""), "layer 3 is in two stages".into()),
            (&format!("{good}[[stage]]\nlayers = \"9-4\""), "line 4: stage 1, \"9-4\": it ends".into()),
            (
                &format!("{good}[[stage]]\nlayers = \"4\"\ndevice = \"cuda\""),
                "line 1: stage 0: it names no device".into(),
            ),
            (&format!("{good}device = \"tpu\""), "line 3: stage 0, \"tpu\": it is neither cpu".into()),
        ] {
            let said = of_file(text);
            assert!(said.contains(&want) && !said.contains('\n'), "{text:?}: {said}");
        }
        let missing = Given::from_arg("no/such.toml").unwrap_err().to_string();
        assert!(missing.starts_with("no/such.toml: "), "{missing}");
        assert!(Layout::open(Path::new("src")).unwrap_err().to_string().contains("not a file"));
    }
}

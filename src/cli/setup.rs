//! The flags that make an engine: the model, where its stages run, and how much they may use.

use std::{
    path::{Path, PathBuf},
    str::FromStr,
    time::Instant,
};

use clap::{Args, ValueEnum};

use super::loading::{Loaded, Meter, Speed};
use crate::{
    backend::DType,
    engine::{self, Engine, EngineBuilder, WeightSource},
    error::{Error, Result, shown},
    layout::{Device, Given, MemoryLimits, planner::Split},
    model::{arch, config::Config, hub},
};

/// The model and its pipeline.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Model and pipeline")]
pub(super) struct Setup {
    /// A folder with config.json and safetensors, or OWNER/NAME[@REVISION] on the Hugging Face hub
    #[arg(long, value_name = "DIR")]
    pub(super) model: String,
    /// Cuts the layers into N stages, or into as many as are worth it (auto: at most one a GPU) [default: 1]
    #[arg(long, value_name = "N|auto", conflicts_with = "layout")]
    pub(super) stages: Option<Stages>,
    /// How they are cut: even (near-equal lengths) or planned (the slowest stage as fast as can be) [default:
    /// planned on several GPUs, else even]
    #[arg(long, value_name = "SPLIT", conflicts_with = "layout")]
    pub(super) split: Option<Cut>,
    /// Which layers make each stage, and on which device: 0-9,10-29 or 0-9@cuda:0,10-29@cuda:1, or a file that
    /// ends in .toml; with ,head@all behind them the head is split over the stages' devices
    #[arg(long, value_name = "STAGES")]
    pub(super) layout: Option<String>,
    /// Where the stages run: auto (GPUs if there are any), cpu, cuda (successive GPUs) or cuda:N; a layout names devices itself
    #[arg(long, value_name = "DEVICE", default_value = "auto", conflicts_with = "layout")]
    device: String,
    /// Which devices the stages may be on, in as many stages as are worth it unless --stages says: cuda:0,cuda:1 or, for a model
    /// larger than all GPUs, cuda,cpu (cuda: all GPUs; cpu: what has no room there)
    #[arg(long, value_name = "DEVICES", conflicts_with_all = ["layout", "device"])]
    devices: Option<String>,
    /// The type that weights, keys and values are kept in; auto is the checkpoint's
    #[arg(long, value_name = "TYPE", default_value = "auto")]
    dtype: Kept,
    /// real reads the model's weights; dummy takes random ones, from config.json alone
    #[arg(long, value_name = "SOURCE", default_value = "real")]
    weights: Source,
    /// The longest sequence, prompt and answer together [default: the model's, at most 8192]
    #[arg(long, value_name = "TOKENS")]
    pub(super) max_context: Option<usize>,
    /// For the KV cache, all stages together: bytes, or with K, M, G (powers of 1000) or KiB, MiB, GiB
    /// (powers of 1024) [default: on the CPU enough for 8 of the longest sequences, or for --running of them, at
    /// most a quarter of the free memory; on GPUs what weights and buffers leave]
    #[arg(long, value_name = "BYTES", value_parser = bytes)]
    kv_memory: Option<usize>,
    /// Takes at most so many bytes of devices' memory, as if no more were free: cuda:1=40g,cuda:3=20g (powers of 1000)
    #[arg(long, value_name = "DEVICE=BYTES")]
    device_memory: Option<String>,
    /// Plans from device data alone, not from what earlier runs have measured; and keeps nothing of this run's
    #[arg(long)]
    no_profiles: bool,
    /// Micro-batches in flight at most [default: the number of devices]
    #[arg(long, value_name = "N")]
    pub(super) slots: Option<usize>,
    /// Prompt tokens in each micro-batch [default: up to 256 on the CPU, on one GPU 8192, on several 1024 to
    /// 4096, the fewer the wider the model is; fewer where few wait and where answers that are under way would notice]
    #[arg(long, value_name = "TOKENS")]
    pub(super) chunk: Option<usize>,
    /// Sequences that run at once at most; others wait [default: 64 on the CPU, 256 on GPUs]
    #[arg(long, value_name = "N")]
    pub(super) running: Option<usize>,
    /// Computes every prompt from its first token on, even if another one has begun the same
    #[arg(long)]
    no_prefix_cache: bool,
    /// Requests that wait for their first step at most; more are refused [default: 4096]
    #[arg(long, value_name = "N")]
    pub(super) waiting: Option<usize>,
    /// Tokens of the prompts of all requests that wait, together, at most; more are refused [default: 67108864]
    #[arg(long, value_name = "TOKENS")]
    pub(super) waiting_tokens: Option<usize>,
    /// Moves a layer to another GPU where a stage is slower than the others for long: another process is on its GPU, or it
    /// is throttled. Each GPU keeps room for one more layer
    #[arg(long)]
    balance: bool,
    #[arg(skip)]
    movable: bool,
    /// CPU threads [default: all cores]
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    /// Writes a trace of what the stages do, for Perfetto or chrome://tracing
    #[arg(long, value_name = "FILE", help_heading = "Output")]
    timeline: Option<PathBuf>,
}

/// How many stages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stages {
    Of(usize),
    Auto,
}

impl FromStr for Stages {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Stages::Auto),
            _ => text.parse().map(Stages::Of).map_err(|_| "expected a number of stages, or auto".into()),
        }
    }
}

/// A [`Split`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Cut {
    Even,
    Planned,
}

impl Cut {
    /// As in the flag.
    pub(super) fn name(self) -> &'static str {
        match self {
            Cut::Even => "even",
            Cut::Planned => "planned",
        }
    }
}

impl From<Cut> for Split {
    fn from(cut: Cut) -> Split {
        match cut {
            Cut::Even => Split::Even,
            Cut::Planned => Split::Planned,
        }
    }
}

/// A [`DType`], or the checkpoint's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Kept {
    Auto,
    F32,
    F16,
    Bf16,
}

impl Kept {
    pub(super) fn dtype(self) -> Option<DType> {
        match self {
            Kept::Auto => None,
            Kept::F32 => Some(DType::F32),
            Kept::F16 => Some(DType::F16),
            Kept::Bf16 => Some(DType::BF16),
        }
    }
}

/// A [`WeightSource`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Source {
    Real,
    Dummy,
}

impl Setup {
    /// With room to move, and with prompts that are computed each from its first token on.
    pub(super) fn moving(self) -> Setup {
        Setup { movable: true, no_prefix_cache: true, ..self }
    }

    /// The model's own name: its folder's, or its name on the hub.
    pub(super) fn model_name(&self) -> String {
        let path = Path::new(&self.model);
        // Of `.` and the like, what they stand for.
        let path = match path.file_name() {
            Some(_) => path.to_path_buf(),
            None => path.canonicalize().unwrap_or_default(),
        };
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        match name.split('@').next().unwrap_or_default() {
            "" => "model".into(),
            name => name.replace(char::is_whitespace, "-"),
        }
    }

    /// What answers depend on: the model and how it is kept, not where it runs.
    pub(super) fn answers_as(&self) -> String {
        format!("{} {:?} {:?} {:?}", self.model_name(), self.dtype, self.weights, self.max_context)
    }

    /// The engine's description, with what can be checked before a file is opened.
    pub(super) fn builder(&self) -> Result<EngineBuilder> {
        let mut builder = Engine::builder().prefix_cache(!self.no_prefix_cache).weights(match self.weights {
            Source::Real => WeightSource::Real,
            Source::Dummy => WeightSource::Dummy,
        });
        builder = builder.profiles(!self.no_profiles).balance(self.balance).movable(self.movable);
        if let Some(text) = &self.device_memory {
            builder = builder.device_memory(text.parse::<MemoryLimits>()?);
        }
        if let Some(layout) = &self.layout {
            // Cuts alone say nothing of devices.
            let Given { layout, placed } = Given::from_arg(layout)?;
            builder = if placed { builder.layout(layout) } else { builder.cuts(layout) };
        }
        builder = match self.device.as_str() {
            "auto" => builder,
            "cuda" => builder.gpus(),
            text => builder.device(text.parse::<Device>().map_err(|_| {
                Error::usage(format!("--device {text}"), "it is none of auto, cpu, cuda and cuda:N")
            })?),
        };
        if let Some(text) = &self.devices {
            builder = builder.devices(named_devices(text)?);
        }
        if let Some(dtype) = self.dtype.dtype() {
            builder = builder.dtype(dtype);
        }
        let stages = match self.stages {
            Some(Stages::Of(n)) => Some(n),
            Some(Stages::Auto) => {
                builder = builder.stages_auto();
                None
            }
            None => None,
        };
        if let Some(cut) = self.split {
            builder = builder.split(cut.into());
        }
        type Set = fn(EngineBuilder, usize) -> EngineBuilder;
        let counts: [(&str, Option<usize>, Set); 9] = [
            ("--stages", stages, EngineBuilder::stages),
            ("--max-context", self.max_context, EngineBuilder::max_context),
            ("--kv-memory", self.kv_memory, EngineBuilder::kv_memory),
            ("--slots", self.slots, EngineBuilder::slots),
            ("--chunk", self.chunk, EngineBuilder::chunk),
            ("--running", self.running, EngineBuilder::running),
            ("--waiting", self.waiting, EngineBuilder::waiting),
            ("--waiting-tokens", self.waiting_tokens, EngineBuilder::waiting_tokens),
            ("--threads", self.threads, EngineBuilder::threads),
        ];
        for (flag, count, set) in counts {
            match count {
                Some(0) => return Err(Error::usage(flag, "it must be at least 1")),
                Some(count) => builder = set(builder, count),
                None => {}
            }
        }
        if let Some(path) = &self.timeline {
            builder = builder.timeline(path);
        }
        Ok(builder)
    }

    /// An error for this flag if the model reads no images. That is known before its weights are loaded.
    pub(super) fn must_see(&self, flag: &str) -> Result<()> {
        let config = Config::read(&hub::resolve(&self.model)?)?;
        match arch::find(&config)?.spec(&config)?.vision {
            Some(_) => Ok(()),
            None => Err(Error::usage(flag, "the model reads no images")),
        }
    }

    /// Finds the model (which may download it), loads it and starts the stages.
    ///
    /// `shows`: whether there may be a progress bar.
    pub(super) fn start(&self, builder: EngineBuilder, shows: bool) -> Result<Engine> {
        self.start_timed(builder, shows).map(|(engine, _)| engine)
    }

    /// The same, with how long it took from finding the model on.
    pub(super) fn start_timed(&self, builder: EngineBuilder, shows: bool) -> Result<(Engine, Loaded)> {
        let model = hub::resolve(&self.model)?;
        let started = Instant::now();
        let meter = Meter::new(shows);
        let told = meter.clone();
        let engine = builder.model(&model).on_load(move |progress| told.told(progress)).build();
        let weights = meter.end();
        let engine = engine?;
        let took = started.elapsed();
        tracing::info!(
            model = %model.display(),
            arch = engine.spec().arch,
            layout = %engine.layout(),
            context_max = engine.context_max(),
            kv_tokens = engine.kv_tokens(),
            seconds = took.as_secs_f64(),
            weights_gb_per_s = weights.and_then(Speed::gb_per_s),
            "loaded"
        );
        Ok((engine, Loaded { took, weights }))
    }
}

/// `cuda:0,cuda:1,cpu`, or `cuda,cpu` with all GPUs that can be used.
pub(super) fn named_devices(text: &str) -> Result<Vec<Device>> {
    let mut devices = Vec::new();
    for part in text.split(',').map(str::trim) {
        match part {
            "cuda" => devices.extend(engine::gpus()?.into_iter().map(|gpu| gpu.device)),
            _ => devices.push(part.parse::<Device>().map_err(|_| {
                Error::usage(format!("--devices {}", shown(part)), "it is none of cpu, cuda and cuda:N")
            })?),
        }
    }
    Ok(devices)
}

/// `512`, `1.5G`, `64MiB`.
fn bytes(text: &str) -> Result<usize, String> {
    const UNITS: [(&str, u64); 12] = [
        ("KiB", 1 << 10),
        ("MiB", 1 << 20),
        ("GiB", 1 << 30),
        ("TiB", 1 << 40),
        ("KB", 1_000),
        ("MB", 1_000_000),
        ("GB", 1_000_000_000),
        ("TB", 1_000_000_000_000),
        ("K", 1_000),
        ("M", 1_000_000),
        ("G", 1_000_000_000),
        ("T", 1_000_000_000_000),
    ];
    let text = text.trim();
    let ends = |unit: &str| text.len() > unit.len() && text.is_char_boundary(text.len() - unit.len());
    let unit = UNITS
        .iter()
        .find(|(unit, _)| ends(unit) && text[text.len() - unit.len()..].eq_ignore_ascii_case(unit));
    let (number, scale) = unit.map_or((text, 1), |(unit, scale)| (&text[..text.len() - unit.len()], *scale));
    let number = number.trim_end();
    let digits = !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit() || b == b'.');
    let count = match number.parse::<u64>() {
        Ok(whole) => whole.checked_mul(scale),
        Err(_) => number
            .parse::<f64>()
            .ok()
            .map(|n| n * scale as f64)
            .filter(|n| *n < 2f64.powi(63))
            .map(|n| n as u64),
    };
    let count = count.filter(|_| digits).and_then(|count| usize::try_from(count).ok());
    count.ok_or_else(|| "expected bytes, such as 4096, 500M or 1.5GiB".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_have_suffixes() {
        let cases = [
            ("0", 0),
            ("4096", 4096),
            ("2K", 2000),
            ("2kb", 2000),
            ("500M", 500_000_000),
            ("64MiB", 64 << 20),
            ("1.5GiB", 3 << 29),
            ("3 G", 3_000_000_000),
            ("1TiB", 1 << 40),
        ];
        for (text, want) in cases {
            assert_eq!(bytes(text), Ok(want), "{text}");
        }
        for text in
            ["", "K", "-1", "1e9", "inf", "1.2.3", "1X", "1Ki", "99999999999999999999", "9999999999T", "1€"]
        {
            bytes(text).unwrap_err();
        }
    }
}

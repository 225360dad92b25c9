//! `pipeline-infer plan`: what a layout will do before anything is loaded, and which is the best.

mod picture;
mod ranking;
mod tables;

use clap::{ArgMatches, Args, FromArgMatches, ValueEnum, value_parser};
use serde::Serialize;

use self::{picture::Picture, ranking::Ranking};
use super::{
    Subcommand,
    interrupt::Interrupt,
    print,
    setup::{Cut, Kept, Source, Stages, named_devices},
    sides::Sides,
};
use crate::{
    backend::DType,
    engine,
    error::{Error, Result},
    layout::{
        DeviceSpec, Given, ImageLoad, Layout, MemoryLimits, Planner, Prediction, Workload, planner::Scratch,
    },
    model::{hub, open_model, shapes, spec::ModelSpec},
    vision::{Preprocessor, Recipe, Size},
};

pub(super) const SUBCOMMAND: Subcommand = Subcommand {
    name: "plan",
    about: "Predicts what a layout will do, on this machine's GPUs or on described ones, and finds the best",
    flags: PlanArgs::augment_args,
    run,
};

/// Pixels of an image of the models that are known by name, as their folders have it.
const PIXELS: (u64, u64) = (3136, 12_845_056);
const SIZE: Size = Size { width: 1024, height: 1024 };
/// Tokens of a sequence that buffers are estimated for.
const CONTEXT_MAX: usize = 8192;

#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Model and devices")]
struct PlanArgs {
    /// A folder with config.json, OWNER/NAME on the Hugging Face hub, or a shape such as 7b, 72b or llama-3.1-8b
    #[arg(long, value_name = "MODEL")]
    model: String,
    /// Stages, or as many as are worth it (auto: at most one a device, in any order of the devices) [default: auto]
    #[arg(long, value_name = "N|auto", conflicts_with = "layout")]
    stages: Option<Stages>,
    /// How they are cut: even (near-equal lengths) or planned (the slowest stage as fast as can be) [default: planned]
    #[arg(long, value_name = "SPLIT", conflicts_with_all = ["layout", "compare"])]
    split: Option<Cut>,
    /// Explains this layout: 0-9@cuda:0,10-29@cuda:1, perhaps with ,head@all behind it, or a file that ends in .toml
    #[arg(long, value_name = "STAGES")]
    layout: Option<String>,
    /// In any order of the devices, where they differ
    #[arg(long, conflicts_with = "layout")]
    any_order: bool,
    /// 8xh100-80g,4xl4, or NAME:mem=24g,bw=900g,bf16=150t (also free=, f16=, f32=, link=); cpu, cuda and cuda:N are this
    /// machine's [default: this machine's GPUs]
    #[arg(long, value_name = "DEVICES")]
    devices: Option<String>,
    /// Takes at most so many bytes of devices' memory, as if no more were free: cuda:1=40g,cuda:3=20g (powers of 1000)
    #[arg(long, value_name = "DEVICE=BYTES")]
    device_memory: Option<String>,
    /// Predicts from device data alone, not from what earlier runs have measured
    #[arg(long)]
    no_profiles: bool,
    /// The type that weights, keys and values are kept in; auto is the checkpoint's
    #[arg(long, value_name = "TYPE", default_value = "auto")]
    dtype: Kept,
    /// real looks at the model's weights; dummy needs config.json alone
    #[arg(long, value_name = "SOURCE", default_value = "dummy")]
    weights: Source,
    /// Tokens whose keys and values must have room [default: those of all requests, or as many as fit]
    #[arg(long, value_name = "N", value_parser = value_parser!(u64).range(1..=1 << 40))]
    kv_tokens: Option<u64>,
    #[command(flatten)]
    asked: Asked,
    /// Ranks numbers of stages (or the one that is given) and ways to cut them
    #[arg(long, help_heading = "Output")]
    compare: bool,
    /// table is for people; json is one object
    #[arg(long, value_name = "FORMAT", default_value = "table", help_heading = "Output")]
    format: Format,
}

/// What the plan is for.
#[derive(Debug, Clone, Copy, Args)]
#[command(next_help_heading = "Workload")]
struct Asked {
    /// Requests that run at once
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = value_parser!(u32).range(1..=4096))]
    running: u32,
    /// Prompt tokens of each, beside those of its images
    #[arg(long, value_name = "TOKENS", default_value_t = 512, value_parser = value_parser!(u32).range(1..=100_000_000))]
    input_len: u32,
    /// New tokens of each
    #[arg(long, value_name = "TOKENS", default_value_t = 256, value_parser = value_parser!(u32).range(1..=100_000_000))]
    output_len: u32,
    /// Prompt tokens in a micro-batch
    #[arg(long, value_name = "TOKENS", default_value_t = 2048, value_parser = value_parser!(u32).range(1..=65_536))]
    chunk: u32,
    /// Images of each, of a model that reads them [default: 1]
    #[arg(long, value_name = "N", value_parser = value_parser!(u32).range(0..=1024))]
    images: Option<u32>,
    /// Their pixels across and down [default: 1024x1024]
    #[arg(long, value_name = "WxH")]
    image_size: Option<Sides>,
}

/// A model, and what there is to know of it before it is loaded.
struct Known {
    spec: ModelSpec,
    /// Its checkpoint's.
    dtype: DType,
    /// How it has images cut.
    recipe: Recipe,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    Table,
    Json,
}

/// What is told, in the order of the JSON object.
#[derive(Serialize)]
struct Told {
    model: String,
    layers: usize,
    dtype: DType,
    workload: Workload,
    #[serde(skip_serializing_if = "Option::is_none")]
    images: Option<ImageLoad>,
    devices: Vec<DeviceSpec>,
    /// Whether the times of each device's units have been measured.
    measured: Vec<bool>,
    scratch: Scratch,
    #[serde(skip_serializing_if = "Option::is_none")]
    plan: Option<Prediction>,
    #[serde(skip_serializing_if = "Option::is_none")]
    ranking: Option<Ranking>,
}

fn run(matches: &ArgMatches) -> Result<u8> {
    let args = PlanArgs::from_arg_matches(matches).expect("clap has parsed these flags; this is a bug");
    // Nobody listens for signals: one ends the process.
    Interrupt::install()?;
    if args.stages == Some(Stages::Of(0)) {
        return Err(Error::usage("--stages", "it must be at least 1"));
    }
    if args.any_order && args.split == Some(Cut::Even) {
        return Err(Error::usage("--any-order", "--split even takes the devices in their order"));
    }
    let given = args.layout.as_deref().map(Given::from_arg).transpose()?;
    let devices = args.devices()?;
    let known = args.model()?;
    let (spec, dtype) = (&known.spec, args.dtype.dtype().unwrap_or(known.dtype));
    let mut planner = Planner::new(spec, dtype, &devices);
    if args.devices_are_here() {
        planner.split_head = engine::split_head(&devices)?;
    }
    planner.images = args.asked.images(&known)?;
    planner.workload = args.asked.workload(planner.images);
    planner.kv_tokens = args.kv_tokens.map(|tokens| usize::try_from(tokens).unwrap_or(usize::MAX));
    planner.scratch = engine::scratch(spec, dtype, planner.workload, CONTEXT_MAX.min(spec.context_max));
    planner.cpu_scratch = engine::cpu_scratch(spec, planner.workload);
    if !args.no_profiles {
        planner.profiles = engine::profiles(spec, dtype, &devices);
    }
    let given = match given {
        Some(Given { layout, placed: false }) => Some(planner.place(&layout)?),
        given => given.map(|given| given.layout),
    };
    let (plan, ranking) = match args.compare {
        true => (None, Some(ranking::rank(&planner, args.stages, given.as_ref())?)),
        false => (Some(planner.predict(&args.layout(&planner, given)?)?), None),
    };
    let told = Told {
        model: args.model.clone(),
        layers: spec.layers.len(),
        dtype,
        workload: planner.workload,
        images: planner.images,
        measured: planner
            .profiles
            .iter()
            .map(|found| found.as_ref().is_some_and(|p| p.knows_layers()))
            .collect(),
        scratch: planner.scratch,
        plan,
        ranking,
        devices: devices.clone(),
    };
    let text = match args.format {
        Format::Json => serde_json::to_string(&told).expect("plain data becomes JSON; this is a bug") + "\n",
        Format::Table => told.text(),
    };
    print(text.as_bytes())
}

impl PlanArgs {
    /// Whether no device is a described one.
    fn devices_are_here(&self) -> bool {
        let here = |part: &str| part == "cpu" || part == "cuda" || part.starts_with("cuda:");
        self.devices.as_ref().is_none_or(|text| text.split(',').all(|part| here(part.trim())))
    }

    fn devices(&self) -> Result<Vec<DeviceSpec>> {
        let limits = self.device_memory.as_ref().map(|text| text.parse::<MemoryLimits>()).transpose()?;
        let mut devices = match &self.devices {
            Some(text) if self.devices_are_here() => engine::device_specs(&named_devices(text)?, None)?,
            Some(text) => DeviceSpec::list(text)?,
            None => self.gpus()?,
        };
        let limits = limits.unwrap_or_default();
        limits.check(&devices)?;
        limits.apply(&mut devices);
        Ok(devices)
    }

    fn gpus(&self) -> Result<Vec<DeviceSpec>> {
        engine::gpus().map_err(|error| match error {
            Error::Device { why, .. } => Error::usage(
                "--devices",
                format!("no GPU to plan for: {why}; describe devices, such as 4xh100-80g"),
            ),
            other => other,
        })
    }

    fn model(&self) -> Result<Known> {
        if let Some(spec) = shapes::find(&self.model) {
            if self.weights == Source::Real {
                let why = format!("{} is a shape by name, which has none: name a folder", self.model);
                return Err(Error::usage("--weights real", why));
            }
            let recipe = Preprocessor::usual().with_pixels(Some(PIXELS.0), Some(PIXELS.1))?.image;
            return Ok(Known { spec: spec?, dtype: DType::BF16, recipe });
        }
        let looks_like_shape =
            !self.model.contains(['/', '\\', '.']) && !std::path::Path::new(&self.model).exists();
        if looks_like_shape {
            let known: Vec<_> = shapes::names().collect();
            let why = format!("neither a folder nor a known shape (known: {})", known.join(", "));
            return Err(Error::usage(format!("--model {}", self.model), why));
        }
        let dir = hub::resolve(&self.model)?;
        let model = open_model(&dir, self.weights == Source::Dummy)?;
        let recipe = Preprocessor::read_or_usual(&dir)?.image;
        Ok(Known { spec: model.spec, dtype: model.dtype, recipe })
    }

    /// The layout that is asked for.
    fn layout(&self, planner: &Planner<'_>, given: Option<Layout>) -> Result<Layout> {
        if let Some(layout) = given {
            return Ok(layout);
        }
        let even = self.split == Some(Cut::Even);
        match self.stages.unwrap_or(Stages::Auto) {
            Stages::Of(n) if even => planner.even(n),
            Stages::Of(n) if self.any_order => planner.plan_any_order(n),
            Stages::Of(n) => planner.plan(n),
            Stages::Auto => match planner.plan_auto()? {
                layout if even => planner.even(layout.stages().len()),
                layout => Ok(layout),
            },
        }
    }
}

impl Asked {
    /// None for a model that reads none.
    fn images(&self, known: &Known) -> Result<Option<ImageLoad>> {
        let Some(tower) = &known.spec.vision else {
            let asked = self.images.is_some() || self.image_size.is_some();
            let wrong = || Error::usage("--images", "the model reads no images");
            return if asked { Err(wrong()) } else { Ok(None) };
        };
        let size = self.image_size.map_or(SIZE, |Sides(size)| size);
        let wrong = |why| Error::usage(format!("--image-size {}x{}", size.width, size.height), why);
        let grid = known.recipe.grid(size).map_err(wrong)?;
        Ok(Some(ImageLoad::new(tower, self.images.unwrap_or(1) as usize, grid)))
    }

    fn workload(&self, images: Option<ImageLoad>) -> Workload {
        Workload {
            running: self.running as usize,
            prompt: self.input_len as usize + images.map_or(0, |images| images.prompt_tokens()),
            new: self.output_len as usize,
            chunk: self.chunk as usize,
        }
    }
}

impl Told {
    fn text(&self) -> String {
        let mut text = tables::heading(self);
        if let Some(ranking) = &self.ranking {
            text += &ranking.table();
        }
        if let Some(plan) = &self.plan {
            text += &tables::plan(plan, self.workload.running);
            let wanted = self.workload.kv_tokens().min(plan.kv_tokens);
            text += &Picture::of_terminal().draw(plan, wanted);
        }
        text
    }
}

//! An engine under measurement: it is made with room for a workload, warmed up, and run again and again.

use clap::{Args, value_parser};

use super::{
    drive::{Driven, Work, drive},
    host::{self, CpuTimes},
    limits::Demands,
    pictures::{Pictures, Prepared},
    record::{Record, Recorder},
    workload::TOKENS_MAX,
};
use crate::{
    backend::cuda::Energy,
    cli::{compared, loading::Loaded, setup::Setup},
    engine::{Comparison, Engine, EngineStats, RUNNING_MAX},
    error::{Error, Result},
    layout::{self, Device, DeviceSpec},
    request::Usage,
};

/// How often, and how.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Measurement")]
pub(super) struct Runs {
    /// Runs that are not measured, before the others
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = value_parser!(u32).range(0..=1000))]
    pub(super) warmup: u32,
    /// Runs that are measured [default: 2; 1 where prompts come from a file, since a second run would find them cached]
    #[arg(long, value_name = "N", value_parser = value_parser!(u32).range(1..=1000))]
    pub(super) repeat: Option<u32>,
    /// Measures every pass of a GPU, not one in eight: spans become exact, and each pass takes some microseconds more
    #[arg(long)]
    pub(super) exact: bool,
    /// What the devices reach, as plan --devices describes them (cpu:mem=64g,bw=20g,bf16=500g), for shares of their
    /// limits [default: that of known GPUs]
    #[arg(long, value_name = "DEVICES")]
    pub(super) limits: Option<String>,
}

/// What an engine must have room for.
#[derive(Debug, Clone)]
pub(super) struct Need {
    /// Requests.
    pub(super) at_once: usize,
    /// Of a usual request, the tokens of its images among them.
    pub(super) input_len: usize,
    pub(super) output_len: usize,
    pub(super) images: Option<Pictures>,
    /// Prompt and answer together, of the longest; none if that is not known yet.
    pub(super) context: Option<usize>,
    /// Of all requests together; none if that is not known yet.
    pub(super) kv_tokens: Option<usize>,
    /// The flags that ask for it.
    pub(super) asked: String,
}

/// An engine under measurement.
pub(super) struct Session {
    pub(super) engine: Engine,
    pub(super) loaded: Loaded,
    pub(super) demands: Demands,
    energy: Option<Energy>,
    /// Runs that are still to come before the first one that counts.
    warmup: u32,
    repeat: u32,
    /// Runs that have begun.
    begun: u64,
}

/// Several runs.
pub(super) struct Measured {
    pub(super) runs: Vec<Run>,
    /// From when the first of them began.
    pub(super) before: EngineStats,
    /// From when the last had ended.
    pub(super) after: EngineStats,
    /// Memory of the process until then, at most: what comes later is not the engine's.
    pub(super) host_bytes_peak: Option<usize>,
    /// What stages took beside what plans said before.
    pub(super) compared: Comparison,
}

/// One run over the workload.
pub(super) struct Run {
    /// From submitting the first request to the end of the last.
    pub(super) seconds: f64,
    /// What each request took.
    pub(super) usages: Vec<Usage>,
    /// And the one that came later.
    pub(super) late: Option<Usage>,
    /// What the engine told.
    pub(super) record: Record,
    /// What preparing its images took.
    pub(super) prepared: Prepared,
    /// What its GPUs consumed, if they tell.
    pub(super) joules: Option<f64>,
    /// What the host's processor did.
    pub(super) cpu: CpuTimes,
}

impl Runs {
    /// Devices whose rates are given.
    pub(super) fn described(&self) -> Result<Option<Vec<DeviceSpec>>> {
        let list = |text: &String| {
            DeviceSpec::list(text).map_err(|error| match error {
                Error::Usage { what, why } => Error::usage(what.replace("--devices", "--limits"), why),
                error => error,
            })
        };
        self.limits.as_ref().map(list).transpose()
    }
}

impl Session {
    /// An engine with room for the workload. `shows`: whether there may be a progress bar.
    pub(super) fn start(setup: &Setup, runs: &Runs, need: &Need, shows: bool) -> Result<Session> {
        let described = runs.described()?;
        let mut builder = setup.builder()?.expect(need.input_len, need.output_len);
        if let Some(Pictures { per_request, width, height, .. }) = need.images {
            builder = builder.expect_images(per_request as usize, width, height);
        }
        if runs.exact {
            builder = builder.measure_all();
        }
        if let (None, Some(context)) = (setup.max_context, need.context) {
            builder = builder.max_context(context);
        }
        if setup.running.is_none() {
            builder = builder.running(need.at_once.min(RUNNING_MAX));
        }
        if setup.waiting.is_none() {
            builder = builder.waiting(need.at_once);
        }
        if setup.waiting_tokens.is_none() {
            builder = builder.waiting_tokens(TOKENS_MAX as usize);
        }
        let (engine, loaded) = setup.start_timed(builder, shows).map_err(|error| match error {
            Error::Usage { what, why } if what == "--max-context" && setup.max_context.is_none() => {
                Error::usage(&need.asked, why)
            }
            error => error,
        })?;
        let room = engine.context_max();
        if need.context.is_some_and(|context| room < context) {
            let why = format!("a sequence has room for {room} tokens: --kv-memory");
            return Err(Error::usage(&need.asked, why));
        }
        let wanted = need.kv_tokens.filter(|&wanted| engine.kv_tokens() < wanted && setup.running.is_none());
        if let Some(wanted) = wanted {
            let tokens = engine.kv_tokens();
            tracing::warn!(tokens, wanted, "the KV cache does not hold all requests at once");
        }
        Ok(Session {
            demands: Demands::of(&engine, described.as_deref())?,
            energy: energy(&engine),
            warmup: runs.warmup,
            repeat: runs.repeat.unwrap_or(if need.context.is_some() { 2 } else { 1 }),
            engine,
            loaded,
            begun: 0,
        })
    }

    /// Warms up, then measures: `work` says what a run submits, given its number and whether it is a warm-up.
    pub(super) fn measure(&mut self, work: &dyn Fn(u64, bool) -> Work) -> Result<Measured> {
        for _ in 0..std::mem::take(&mut self.warmup) {
            let run = drive(&self.engine, work(self.begun, true), None)?;
            self.begun += 1;
            tracing::info!(seconds = run.seconds, "warm-up");
        }
        let before = self.engine.stats();
        let mut recorder = Recorder::new(&self.engine, self.demands.clone());
        let mut runs = Vec::new();
        for _ in 0..self.repeat {
            let run = self.run(work(self.begun, false), &mut recorder)?;
            self.begun += 1;
            tracing::info!(seconds = run.seconds, "run");
            runs.push(run);
        }
        let (after, host_bytes_peak) = (self.engine.stats(), host::memory_peak());
        let measured = runs.last().map_or_else(layout::Measured::default, |run| run.record.measured.clone());
        let compared = self.engine.compare(&measured)?;
        compared::keep(&self.engine, &measured, &compared);
        Ok(Measured { runs, before, after, host_bytes_peak, compared })
    }

    fn run(&self, work: Work, recorder: &mut Recorder) -> Result<Run> {
        let (cpu, joules) = (host::cpu_times(), self.joules());
        let Driven { seconds, usages, late, prepared } = drive(&self.engine, work, Some(recorder))?;
        let joules = joules.zip(self.joules()).map(|(was, is)| is - was);
        let cpu = host::between(&cpu, &host::cpu_times());
        Ok(Run { seconds, usages, late, prepared, record: recorder.end(), joules, cpu })
    }

    fn joules(&self) -> Option<f64> {
        let energy = self.energy.as_ref()?;
        energy.joules().inspect_err(|error| tracing::warn!(%error, "energy")).ok()
    }
}

/// The counters of the GPUs that have stages; none where some stage has no GPU, or nobody counts.
fn energy(engine: &Engine) -> Option<Energy> {
    let gpu = |device: Device| match device {
        Device::Cpu => None,
        Device::Cuda(ordinal) => Some(ordinal),
    };
    let layout = engine.layout();
    let tower = layout.vision().iter().map(|stage| stage.device);
    let devices = layout.stages().iter().map(|stage| stage.device).chain(tower);
    let mut gpus = devices.map(gpu).collect::<Option<Vec<_>>>()?;
    gpus.sort_unstable();
    gpus.dedup();
    Energy::open(&gpus).inspect_err(|error| tracing::info!(%error, "no energy is told")).ok()
}

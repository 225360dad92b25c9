//! What an engine's stages took, beside what plans say of them; and the profiles that follow from it.

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use serde::Serialize;

use super::{Engine, Measurement, place};
use crate::{
    batch::PassShape,
    error::{Error, Result},
    layout::{
        Compared, DeviceSpec, Measured, Planner, VisionCompared, compare, compare_vision,
        profile::{self, Profile},
    },
};

/// Measurements that wait to be read, at most.
const ROOM: usize = 1 << 14;
/// How often they are read; and how long the last ones may take to come.
const LOOK: Duration = Duration::from_millis(10);
const LATE: Duration = Duration::from_millis(20);
/// Steps whose spans have not come, at most: of others nothing is kept.
const STEPS_MAX: usize = 1 << 14;

/// What was measured of an engine's stages beside what plans say of them.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Comparison {
    /// The stages' devices, each once.
    pub devices: Vec<DeviceSpec>,
    /// Whether what plans say of each device's units was measured in earlier runs.
    pub profiled: Vec<bool>,
    /// Stages' passes, those first that took longest in all.
    pub passes: Vec<Compared>,
    /// The same of the vision tower's stages.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub vision: Vec<VisionCompared>,
}

impl Engine {
    /// What its stages took for passes beside what plans say, which may know it from earlier runs.
    pub fn compare(&self, measured: &Measured) -> Result<Comparison> {
        let devices = place::of_layout(&self.layout(), self.facts.threads)?;
        let mut planner = Planner::new(self.spec(), self.dtype(), &devices);
        if self.facts.profiles {
            planner.profiles = place::profiles(self.spec(), self.dtype(), &devices);
        }
        let passes = compare(&planner, &self.layout(), &measured.times())?;
        let vision = compare_vision(&planner, &self.layout(), &measured.vision_times())?;
        let profiled = planner.profiles.iter().map(Option::is_some).collect();
        Ok(Comparison { devices, profiled, passes, vision })
    }

    /// Keeps what its stages took in the cache folder, for plans to come: a file for each kind of device of the comparison. None
    /// if it was built without profiles, or if the environment names no such folder.
    pub fn keep_profiles(&self, measured: &Measured, comparison: &Comparison) -> Result<Vec<PathBuf>> {
        let Some(folder) = profile::folder().filter(|_| self.facts.profiles) else { return Ok(Vec::new()) };
        let devices = &comparison.devices;
        let on = |device| devices.iter().find(|spec| spec.device == device).cloned();
        let stages: Option<Vec<DeviceSpec>> = self.layout().stages().iter().map(|s| on(s.device)).collect();
        let stages = stages.ok_or_else(|| Error::Engine("the comparison is of other devices".into()))?;
        let (spec, dtype) = (self.spec(), self.dtype());
        let keep = |profile: &Profile| {
            let device = devices.iter().find(|device| device.name == profile.device);
            let older = device.and_then(|device| Profile::open(&folder, spec, dtype, device));
            profile.store(&folder, older.as_ref())
        };
        let layout = self.layout();
        let tower = measured.vision_times();
        let times = profile::without_towers(measured.times(), spec, &layout, &tower);
        let profiles = Profile::of_run(spec, dtype, &layout, &stages, &times);
        let profiles = Profile::with_tower(profiles, (spec, dtype), (&layout, devices), &tower);
        profiles.iter().map(keep).collect()
    }

    /// Begins to gather what the stages' passes take.
    pub fn watch(&self) -> Result<Watch> {
        Watch::start(self)
    }
}

/// Gathers what the passes of an engine's stages take, on a thread of its own.
///
/// ```
/// use pipeline_infer::{Engine, Prompt, Request};
///
/// let engine = Engine::builder().model("tests/data/chat-llama").stages(2).profiles(false).build()?;
/// let watch = engine.watch()?;
/// let mut request = Request::new(Prompt::Ids(vec![1, 2, 3]));
/// request.stop.max_tokens = Some(20);
/// engine.submit(request)?.for_each(drop);
/// let comparison = engine.compare(&watch.end())?;
/// assert!(comparison.passes.iter().all(|pass| pass.predicted > 0.0 && pass.measured > 0.0));
/// # Ok::<(), pipeline_infer::Error>(())
/// ```
pub struct Watch {
    ended: Arc<AtomicBool>,
    thread: Option<JoinHandle<Measured>>,
}

impl Watch {
    fn start(engine: &Engine) -> Result<Watch> {
        let ended = Arc::new(AtomicBool::new(false));
        let mut reader = Reader {
            from: engine.measurements(ROOM),
            shapes: BTreeMap::new(),
            measured: Measured::default(),
        };
        let told = ended.clone();
        let read = move || {
            while !told.load(Relaxed) {
                reader.read();
                thread::sleep(LOOK);
            }
            thread::sleep(LATE);
            reader.read();
            reader.measured
        };
        let thread = thread::Builder::new().name("watch".into()).spawn(read);
        let thread = thread.map_err(|e| Error::Engine(format!("watch: no thread: {e}")))?;
        Ok(Watch { ended, thread: Some(thread) })
    }

    /// What there was.
    pub fn end(mut self) -> Measured {
        self.ended.store(true, Relaxed);
        let thread = self.thread.take().expect("it ends once; this is a bug");
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.ended.store(true, Relaxed);
    }
}

struct Reader {
    from: super::Measurements,
    /// Of steps whose spans may come.
    shapes: BTreeMap<u64, PassShape>,
    measured: Measured,
}

impl Reader {
    fn read(&mut self) {
        for measurement in self.from.try_iter() {
            match measurement {
                Measurement::Relaid { .. } => {
                    // What other stages took says nothing of these.
                    self.shapes.clear();
                    self.measured = Measured::default();
                }
                Measurement::Planned { step, .. } => {
                    self.shapes.insert(step.step, PassShape::of(&step.batch));
                    if self.shapes.len() > STEPS_MAX {
                        self.shapes.pop_first();
                    }
                }
                Measurement::Span(span) => {
                    if let Some(&shape) = self.shapes.get(&span.step) {
                        self.measured.add(span.stage, shape, span.taken().as_secs_f64());
                    }
                }
                Measurement::Vision(span) => {
                    self.measured.add_vision(span.stage, span.cost, (span.ended - span.began).as_secs_f64());
                }
                Measurement::Applied { .. } => (),
            }
        }
    }
}

//! The scheduler under a virtual clock: the very code that runs the stages, with stages that only cost time.
//!
//! A [`Machine`] says what passes, boundaries and the host take; a [`Simulation`] lets a [`Scheduler`] plan for it; a
//! [`Trace`] tells when everything happened, and a [`Report`] what that comes to. Stages compute what a [`World`] says:
//! nothing, for figures; or tokens that follow from simulated KV blocks, to find what the scheduler does wrong.
//!
//! ```
//! use pipeline_infer::{
//!     schedule::{SchedulerConfig, StageCost},
//!     simulate::*,
//! };
//!
//! let cost = StageCost { base: 1e-3, row: 1e-5, ..StageCost::default() };
//! let config = SchedulerConfig { slots: 4, chunk: 512, ahead: true, ..SchedulerConfig::default() };
//! let simulation = Simulation::new(Machine::new(vec![cost; 4]), config, 4096);
//! let work = Workload { requests: 64, input_len: 100, output_len: 50, ..Workload::default() };
//! let trace = simulation.run(&work.arrivals(|| 7), &mut Blank);
//! let report = Report::of(&trace);
//! assert!(report.bubble < 0.1, "four even stages are busy nearly all the time: {report:?}");
//! ```
//!
//! [`Scheduler`]: crate::schedule::Scheduler

mod clock;
mod cost;
mod report;
mod trace;
mod work;

pub use clock::{Blank, Machine, Simulation, Stage, World};
pub use cost::read_costs;
pub use report::{DecodeReport, Percentiles, Report, StageReport};
pub use trace::{Answer, End, Nanos, StepTrace, Trace, nanos};
pub use work::{Arrival, Workload};

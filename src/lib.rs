//! `pipeline-infer` runs a transformer that is too large, or too busy, for one device: it cuts the layers into
//! contiguous stages and streams micro-batches through them.
//!
//! An [`Engine`] loads a model folder as the Hugging Face hub has it and starts its stages. Requests that are
//! submitted before earlier ones have ended share the pipeline; each gives an iterator of events.
//!
//! ```
//! use pipeline_infer::{Engine, Event, Message, Prompt, Request};
//!
//! # fn main() -> pipeline_infer::Result<()> {
//! let engine = Engine::builder().model("tests/data/chat-llama").stages(2).build()?;
//! let mut request = Request::new(Prompt::Chat(vec![Message::new("user", "Hello")]));
//! request.stop.max_tokens = Some(5);
//! let mut tokens = 0;
//! for event in engine.submit(request)? {
//!     match event {
//!         Event::Token { text, .. } => {
//!             print!("{text}");
//!             tokens += 1;
//!         }
//!         Event::Finished { text, reason, .. } => println!("{text} [{}]", reason.name()),
//!         Event::Error(error) => return Err(error),
//!         _ => {}
//!     }
//! }
//! assert!(tokens <= 5);
//! # Ok(())
//! # }
//! ```
//!
//! A [`Layout`] says which layers run where; any layout gives the same answer, bit for bit:
//!
//! ```
//! # use pipeline_infer::{Engine, Event, Layout, Prompt, Request};
//! # fn main() -> pipeline_infer::Result<()> {
//! let answer = |layout: &str| -> pipeline_infer::Result<Vec<u32>> {
//!     let layout: Layout = layout.parse()?;
//!     let engine = Engine::builder().model("tests/data/chat-llama").layout(layout).build()?;
//!     let mut request = Request::new(Prompt::Ids(vec![1, 2, 3]));
//!     request.stop.max_tokens = Some(8);
//!     request.stop.ignore_eos = true;
//!     let id = |event| match event {
//!         Event::Token { id, .. } => Some(id),
//!         _ => None,
//!     };
//!     Ok(engine.submit(request)?.filter_map(id).collect())
//! };
//! assert_eq!(answer("0-3")?, answer("0,1-3")?);
//! # Ok(())
//! # }
//! ```
//!
//! The modules, in the order of a request's way: [`request`], [`text`] (prompts to tokens and back) and
//! [`vision`] (pixels to patches, whose places are in [`grid`]), [`engine`] (threads and channels), [`schedule`]
//! (what runs next), [`simulate`] (the same under a virtual clock), [`batch`] (what crosses to the stages),
//! [`pipeline`] and [`transport`] (stages and the boundaries between them), [`layout`], [`model`] (the forward
//! pass over the ops), [`backend`] (the ops).

pub mod backend;
pub mod batch;
pub mod cli;
pub mod engine;
pub mod error;
pub mod grid;
pub mod layout;
pub mod model;
pub mod pipeline;
pub mod request;
pub mod schedule;
pub mod simulate;
mod sync;
pub mod telemetry;
pub mod text;
pub mod transport;
pub mod vision;

pub use engine::{Engine, EngineBuilder, Events};
pub use error::{Error, Result};
pub use layout::Layout;
pub use request::{Event, FinishReason, Message, Prompt, Request, SamplingParams, StopParams};

//! What the pipeline's threads wait on and talk through. Everything in `pipeline` and `transport` takes it from here, since
//! `tests/protocol` compiles those modules with a scheduler's own instead, and tries their interleavings.

pub(crate) use std::{sync::Mutex, thread};

pub(crate) use crossbeam_channel as channel;

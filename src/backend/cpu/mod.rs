//! The CPU.

pub mod sample;

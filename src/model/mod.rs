//! Models: what they are (`spec`), how a folder says so (`arch`, `config`), their weights and their forward pass.

pub mod arch;
pub mod config;
pub mod decoder;
mod folder;
pub mod hub;
pub mod spec;
pub mod weights;

pub use folder::{Model, open_model};

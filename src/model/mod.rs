//! Models: what they are (`spec`), how a folder says so (`arch`, `config`), their weights and their forward pass.

pub mod arch;
pub mod config;
pub mod decoder;
mod folder;
pub mod hub;
mod mapped;
pub mod shapes;
pub mod spec;
pub mod units;
pub mod vision;
pub mod weights;

pub use folder::{Model, open_model};

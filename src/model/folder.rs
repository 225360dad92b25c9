//! A model folder, opened.

use std::path::{Path, PathBuf};

use super::{
    arch::{self, Arch},
    config::{Config, GenerationConfig},
    spec::{ModelSpec, Role},
    weights::Weights,
};
use crate::{
    backend::{DType, Tensor},
    error::Result,
};

/// The seed of random weights: the same folder gives the same ones every time.
const DUMMY_SEED: u64 = 0;

/// What a folder holds. The weights are read when they are asked for.
pub struct Model {
    /// The folder.
    pub dir: PathBuf,
    /// Its config.json.
    pub config: Config,
    /// What config.json describes.
    pub spec: ModelSpec,
    /// The architecture that it names.
    pub arch: &'static dyn Arch,
    /// Its tensors.
    pub weights: Weights,
    /// The checkpoint's type: config.json's, else the embedding's.
    pub dtype: DType,
    /// Its generation_config.json.
    pub generation: GenerationConfig,
}

/// Opens a model folder. `dummy` makes up the weights, from config.json alone.
pub fn open_model(dir: &Path, dummy: bool) -> Result<Model> {
    let config = Config::read(dir)?;
    let arch = arch::find(&config)?;
    let spec = arch.spec(&config)?;
    let generation = GenerationConfig::read(dir, &config)?;
    let stated = match (config.dtype()?, config.text_config()?) {
        (None, Some(text)) => text.dtype()?,
        (stated, _) => stated,
    };
    let (weights, dtype) = if dummy {
        let dtype = stated.unwrap_or(DType::F32);
        (Weights::dummy(dtype, DUMMY_SEED), dtype)
    } else {
        let weights = Weights::open(dir)?;
        let dtype = match stated {
            Some(dtype) => dtype,
            None => arch.load(&weights, &spec, Role::Embed)?.dtype,
        };
        (weights, dtype)
    };
    Ok(Model { dir: dir.to_path_buf(), config, spec, arch, weights, dtype, generation })
}

impl Model {
    /// The tensor that has this role, in the file's type.
    pub fn tensor(&self, role: Role) -> Result<Tensor> {
        self.arch.load(&self.weights, &self.spec, role)
    }
}

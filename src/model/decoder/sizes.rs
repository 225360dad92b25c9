//! How many bytes a decoder takes, told before it is loaded.

use crate::{
    backend::DType,
    model::{spec::ModelSpec, units::Unit},
};

/// Bytes of the weights of a stage with these units.
pub fn weight_bytes(spec: &ModelSpec, dtype: DType, units: &[Unit]) -> usize {
    weight_sizes(spec, dtype, units).into_iter().sum()
}

/// Bytes of each matrix, and of each vector, of a stage with these units, in the order in which they are loaded.
pub fn weight_sizes(spec: &ModelSpec, dtype: DType, units: &[Unit]) -> Vec<usize> {
    let mut sizes: Vec<usize> = units.iter().flat_map(|unit| unit.tensor_sizes(spec, dtype)).collect();
    if spec.tied && units.contains(&Unit::Embed) && units.contains(&Unit::Head) {
        // The head's matrix comes last, and is the embedding's.
        sizes.pop();
    }
    sizes
}

/// Bytes of each of a stage's buffers for so many rows, and for so many output rows if it has the head, on a device that
/// keeps what matrix products read as `dtype`.
pub fn buffer_sizes(spec: &ModelSpec, dtype: DType, rows: usize, outputs: Option<usize>) -> Vec<usize> {
    let (heads, wide) = (spec.heads, DType::F32.size());
    let working = [spec.dim, heads.qkv_dim(), heads.q_dim(), 2 * spec.ffn, spec.ffn];
    let mut sizes = vec![rows * spec.dim * wide];
    sizes.extend(working.map(|dim| rows * dim * dtype.size()));
    if let Some(outputs) = outputs {
        sizes.extend([spec.dim * wide, spec.dim * dtype.size(), spec.vocab * wide].map(|row| outputs * row));
    }
    sizes
}

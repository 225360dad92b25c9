//! A layer's pages of keys and values: `[blocks, kv_heads, KV_BLOCK, head_dim]` each.

use super::{Batch, Cuda, DevicePtr, memory::DeviceBuf};
use crate::{
    backend::{HeadShape, KvShape},
    error::Result,
};

/// One layer's pages.
pub struct Kv {
    keys: DeviceBuf,
    values: DeviceBuf,
    pub(super) shape: KvShape,
}

impl Kv {
    pub(super) fn new(cuda: &Cuda, shape: KvShape) -> Result<Kv> {
        assert!(shape.dtype == cuda.dtype, "pages of another type than the model's; this is a bug");
        let bytes = shape.bytes() / 2;
        // Zeroed: a masked token's value is multiplied by zero, which a NaN would survive.
        Ok(Kv { keys: cuda.zeroed(bytes)?, values: cuda.zeroed(bytes)?, shape })
    }

    /// Panics if the pages are of other heads, or if there are too few for the micro-batch.
    pub(super) fn expect(&self, heads: HeadShape, batch: &Batch) {
        batch.expect_blocks(self.shape.blocks);
        let here = (self.shape.kv_heads, self.shape.head_dim);
        assert!(here == (heads.kv_heads, heads.head_dim), "pages of other heads; this is a bug");
    }

    pub(super) fn keys(&self) -> DevicePtr {
        self.keys.ptr()
    }

    pub(super) fn values(&self) -> DevicePtr {
        self.values.ptr()
    }
}

//! What a vision tower is, as config.json has it.

use crate::{
    backend::{HeadShape, vision::PatchShape},
    error::{Result, shown},
    model::config::Config,
};

// Far above any tower, and small enough that no product of them overflows.
const DEPTH_MAX: usize = 1024;
const DIM_MAX: usize = 1 << 16;
const SIDE_MAX: usize = 64;

/// Qwen2.5-VL's tower.
#[derive(Debug, Clone, PartialEq)]
pub struct VisionSpec {
    /// Numbers of a patch's state.
    pub dim: usize,
    /// Attention heads, each with keys and values of its own.
    pub heads: HeadShape,
    /// Numbers between the two halves of the feed-forward part.
    pub ffn: usize,
    /// For each block whether it attends to the whole frame, not to a window.
    pub full: Vec<bool>,
    /// Pixels along a patch's side.
    pub patch: usize,
    /// Frames of a patch.
    pub frames: usize,
    /// Patches along a cell's side.
    pub merge: usize,
    /// Cells along a window's side.
    pub window: usize,
    /// Numbers of a token: the language model's.
    pub out: usize,
    /// Positions in time for a second of video.
    pub tokens_per_second: u32,
}

impl VisionSpec {
    /// Colours of a pixel.
    pub const COLORS: usize = 3;
    /// Added to the mean square of every norm.
    pub const EPS: f32 = 1e-6;

    /// Reads `vision_config` of a config.json.
    pub fn read(config: &Config) -> Result<VisionSpec> {
        let vision = config.required("vision_config", config.object("vision_config")?)?;
        let size = |key: &str, max: usize| vision.size(key, max);
        let act = vision.text("hidden_act")?.unwrap_or("silu");
        if act != "silu" {
            return Err(vision.error("hidden_act", format!("\"{}\" is not known (known: silu)", shown(act))));
        }
        for key in ["in_channels", "in_chans"] {
            if size(key, SIDE_MAX)?.is_some_and(|n| n != Self::COLORS) {
                return Err(vision.error(key, "it is not 3"));
            }
        }
        let dim = vision.required("hidden_size", size("hidden_size", DIM_MAX)?)?;
        let heads = size("num_heads", DIM_MAX)?.unwrap_or(16);
        if !dim.is_multiple_of(4 * heads) {
            return Err(
                vision.error("num_heads", format!("heads of {dim} / {heads} numbers cannot be rotated"))
            );
        }
        let (patch, merge) =
            (size("patch_size", SIDE_MAX)?.unwrap_or(14), size("spatial_merge_size", SIDE_MAX)?.unwrap_or(2));
        let window = size("window_size", DIM_MAX)?.unwrap_or(112) / merge / patch;
        if window == 0 {
            return Err(
                vision.error("window_size", format!("it has no cell of {merge} patches of {patch} pixels"))
            );
        }
        let depth = size("depth", DEPTH_MAX)?.unwrap_or(32);
        Ok(VisionSpec {
            dim,
            heads: HeadShape { heads, kv_heads: heads, head_dim: dim / heads },
            ffn: size("intermediate_size", DIM_MAX)?.unwrap_or(3420),
            full: full(&vision, depth)?,
            patch,
            frames: size("temporal_patch_size", SIDE_MAX)?.unwrap_or(2),
            merge,
            window,
            out: vision.required("out_hidden_size", size("out_hidden_size", DIM_MAX)?)?,
            tokens_per_second: vision.count("tokens_per_second", 1000)?.unwrap_or(4) as u32,
        })
    }

    /// Numbers of a patch's pixels.
    pub fn patch_dim(&self) -> usize {
        Self::COLORS * self.frames * self.patch * self.patch
    }

    /// How large patches and cells are.
    pub fn patch_shape(&self) -> PatchShape {
        PatchShape { side: self.patch, frames: self.frames, merge: self.merge }
    }

    /// Patches of a cell.
    pub fn cell_rows(&self) -> usize {
        self.merge * self.merge
    }

    /// Radians a place, for the rotation: for places down and across alike.
    pub fn inv_freq(&self) -> Vec<f32> {
        let half = (self.heads.head_dim / 2) as f32;
        (0..self.heads.head_dim / 4).map(|i| 1.0 / 10_000f32.powf(2.0 * i as f32 / half)).collect()
    }
}

fn full(vision: &Config, depth: usize) -> Result<Vec<bool>> {
    const KEY: &str = "fullatt_block_indexes";
    let blocks = vision.ids(KEY)?.unwrap_or_else(|| vec![7, 15, 23, 31]);
    let mut full = vec![false; depth];
    for block in blocks {
        if let Some(full) = full.get_mut(block as usize) {
            *full = true;
        }
    }
    Ok(full)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(text: &str) -> Result<VisionSpec> {
        VisionSpec::read(&Config::parse("config.json", text.as_bytes()).unwrap())
    }

    #[test]
    fn the_hubs_tower_is_read() {
        let spec = spec(
            r#"{"vision_config": {"depth": 32, "hidden_act": "silu", "hidden_size": 1280, "intermediate_size": 3420,
            "num_heads": 16, "in_chans": 3, "out_hidden_size": 2048, "patch_size": 14, "spatial_merge_size": 2,
            "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31], "tokens_per_second": 2}}"#,
        )
        .unwrap();
        assert_eq!((spec.heads.head_dim, spec.window, spec.patch_dim()), (80, 4, 1176));
        let full: Vec<usize> = (0..32).filter(|&i| spec.full[i]).collect();
        assert_eq!(full, [7, 15, 23, 31]);
        assert_eq!((spec.inv_freq().len(), spec.inv_freq()[0]), (20, 1.0));
    }

    #[test]
    fn wrong_towers_are_named_by_their_key() {
        for (text, key) in [
            ("{}", "vision_config"),
            (r#"{"vision_config": {"hidden_size": 64}}"#, "vision_config.out_hidden_size"),
            (r#"{"vision_config": {"hidden_size": 40, "num_heads": 4}}"#, "vision_config.num_heads"),
            (r#"{"vision_config": {"hidden_size": 64, "window_size": 20}}"#, "vision_config.window_size"),
            (r#"{"vision_config": {"hidden_act": "relu"}}"#, "vision_config.hidden_act"),
            (r#"{"vision_config": {"in_chans": 1}}"#, "vision_config.in_chans"),
        ] {
            let said = spec(text).unwrap_err().to_string();
            assert!(said.starts_with(&format!("config.json: {key}: ")), "{said}");
        }
    }
}

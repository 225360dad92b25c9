//! Pixels to patches: the processor's bits, rounded to the type, for images and videos of any size in company.

use std::path::Path;

use pipeline_infer::{
    backend::{
        DType,
        vision::{Levels, PatchShape, Pixels, Places, VisionOps},
    },
    grid::Grid,
    vision::Recipe,
};

use crate::{DTYPES, Room, assert_bits, cpu, device::gpu, poisoned, read, rounded};

const SHAPE: PatchShape = PatchShape { side: 14, frames: 2, merge: 2 };

/// An image or a video: how it is cut, and its frames.
type Media = (Grid, Vec<Vec<u8>>);

/// So many frames of random pixels.
fn media(h: u32, w: u32, frames: usize, seed: u64) -> Media {
    let bytes = 3 * (h * w) as usize * 14 * 14;
    let byte = |f: usize, i: usize| {
        let state = (i as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(seed + 977 * f as u64);
        (state ^ state >> 29).wrapping_mul(0xbf58_476d_1ce4_e5b9).to_be_bytes()[0]
    };
    let grid = Grid { t: frames.div_ceil(2) as u32, h, w };
    (grid, (0..frames).map(|f| (0..bytes).map(|i| byte(f, i)).collect()).collect())
}

/// What each image's levels become, of which there are two kinds.
fn levels() -> [Levels; 2] {
    let of = |text: &str| {
        let bounds = pipeline_infer::vision::Bounds { min: 3136, max: 1 << 20 };
        Recipe::parse(Path::new("p"), text.as_bytes(), bounds).unwrap().cut.levels()
    };
    [of("{}"), of(r#"{"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.9]}"#)]
}

fn cut<B: VisionOps>(b: &B, passes: &[Vec<Media>]) -> Vec<Vec<f32>> {
    let levels = levels();
    let rows_max = 400;
    let mut cutter = b.cutter(rows_max, SHAPE).unwrap();
    let mut images = b.images(rows_max, &[1.0; 20]).unwrap();
    let one = |media: &Vec<Media>| {
        let grids: Vec<Grid> = media.iter().map(|(grid, _)| *grid).collect();
        let places = Places::new(&grids, 2, 4);
        b.set_images(&mut images, &places).unwrap();
        let pixels: Vec<Pixels> = media
            .iter()
            .map(|(grid, frames)| Pixels {
                grid: *grid,
                frames,
                levels: &levels[usize::from(frames.len() > 1)],
            })
            .collect();
        let len = places.rows.len() * SHAPE.len();
        let mut out = poisoned(b, Room::Working, len);
        b.cut(&mut out, &mut cutter, &images, &pixels).unwrap();
        read(b, &out, len)
    };
    passes.iter().map(one).collect()
}

#[test]
fn pixels_are_cut_as_on_the_processor() {
    // More passes than pixels of may be on their way.
    let passes: Vec<Vec<Media>> = vec![
        vec![media(2, 2, 1, 1)],
        vec![media(10, 18, 1, 2), media(4, 6, 3, 3), media(2, 28, 1, 4)],
        vec![media(6, 4, 2, 5), media(6, 4, 5, 6)],
        (0..20).map(|i| media(2, 4, 1, 10 + i)).collect(),
        vec![media(20, 20, 1, 7)],
    ];
    let want = cut(&cpu(), &passes);
    for dtype in DTYPES {
        let Some(gpu) = gpu(dtype, 64) else { return };
        for (i, (got, want)) in cut(&gpu, &passes).iter().zip(&want).enumerate() {
            let want = if dtype == DType::F32 { want.clone() } else { rounded(dtype, want.clone()) };
            assert_bits(&format!("pass {i}, {}", dtype.name()), SHAPE.len(), got, &want);
        }
    }
}

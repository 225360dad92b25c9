//! The ops of a vision tower against the CPU's: rotation by places, attention within segments, GELU, rows put back.

use pipeline_infer::{
    backend::{
        DType, HeadShape, Norm, NormShape,
        vision::{Places, Reach, SegmentAttention, VisionOps},
    },
    grid::Grid,
};

use crate::{
    DTYPES, Room, assert_bits, assert_near, cpu,
    device::{gpu, quick},
    filled, numbers, poisoned, read, rounded, tensor, unit,
};

/// Images and videos of a pass: windows and frames of every kind of length.
fn passes() -> Vec<Vec<Grid>> {
    let of = |list: &[(u32, u32, u32)]| list.iter().map(|&(t, h, w)| Grid { t, h, w }).collect();
    let all: Vec<Vec<Grid>> = vec![
        of(&[(1, 2, 2)]),
        of(&[(1, 8, 8)]),
        of(&[(2, 6, 10), (1, 2, 2)]),
        of(&[(1, 10, 18), (1, 4, 6), (3, 2, 4)]),
        of(&[(1, 16, 16), (1, 8, 8), (1, 2, 28)]),
        of(&[(1, 2, 4), (1, 26, 38)]),
    ];
    all.into_iter().take(if quick() { 4 } else { 9 }).collect()
}

#[derive(Clone, Copy, Debug)]
struct Case {
    heads: usize,
    head_dim: usize,
    dtype: DType,
}

impl Case {
    fn shape(&self) -> HeadShape {
        HeadShape { heads: self.heads, kv_heads: self.heads, head_dim: self.head_dim }
    }

    fn inv_freq(&self) -> Vec<f32> {
        let quarter = self.head_dim / 4;
        (0..quarter).map(|i| 10_000f32.powf(-(i as f32) / quarter as f32)).collect()
    }

    /// Scores with a standard deviation of 2, as in attention.rs.
    fn attention(&self, reach: Reach) -> SegmentAttention {
        SegmentAttention { heads: self.shape(), scale: 6.0 / (self.head_dim as f32).sqrt(), reach }
    }

    fn qkv(&self, rows: usize) -> Vec<f32> {
        rounded(self.dtype, numbers(rows as u64, rows * self.shape().qkv_dim()))
    }
}

fn images<B: VisionOps>(b: &B, case: Case, places: &Places) -> B::Images {
    let mut images = b.images(places.rows.len(), &case.inv_freq()).unwrap();
    b.set_images(&mut images, places).unwrap();
    images
}

/// Rotated rows; then what attention makes of rows as they are, for windows and for frames.
fn run<B: VisionOps>(b: &B, case: Case, places: &Places, qkv: &[f32]) -> [Vec<f32>; 3] {
    let rows = places.rows.len();
    let [dim, out_dim] = [case.shape().qkv_dim(), case.shape().q_dim()];
    let images = images(b, case, places);
    // Rows that are not there hold anything, as in a tower.
    let mut rotated = filled(b, Room::Working, (rows + 3) * dim, qkv);
    let given = filled(b, Room::Working, (rows + 3) * dim, qkv);
    b.rope_places(&mut rotated, &images, case.shape()).unwrap();
    let attended = [Reach::Window, Reach::Frame].map(|reach| {
        let mut out = poisoned(b, Room::Working, rows * out_dim);
        b.segment_attention(&mut out, &given, &images, case.attention(reach)).unwrap();
        read(b, &out, rows * out_dim)
    });
    let [windows, frames] = attended;
    [read(b, &rotated, rows * dim), windows, frames]
}

fn check(case: Case, grids: &[Grid]) {
    let Some(gpu) = gpu(case.dtype, 64) else { return };
    let places = Places::new(grids, 2, 4);
    let qkv = case.qkv(places.rows.len());
    let (got, want) = (run(&gpu, case, &places, &qkv), run(&cpu(), case, &places, &qkv));
    let what = |op: &str| format!("{op} {case:?} {grids:?}");
    let [dim, out_dim] = [case.shape().qkv_dim(), case.shape().q_dim()];
    // One rounding to the type; before it, last bits of sines.
    let tolerance = |i: usize| 1.01 * unit(case.dtype) * want[0][i].abs() + 16.0 * 2f32.powi(-24);
    assert_near(&what("rope_places"), dim, &got[0], &want[0], tolerance);
    for (i, op) in [(1, "windows"), (2, "frames")] {
        // The weights of values, all at most 1 together, may be rounded to the type, and so is the result.
        let tolerance = |at: usize| unit(case.dtype) * (1.0 + want[i][at].abs()) + 256.0 * 2f32.powi(-24);
        assert_near(&what(op), out_dim, &got[i], &want[i], tolerance);
    }
    for (i, again) in run(&gpu, case, &places, &qkv).iter().enumerate() {
        assert_bits(&what("again"), if i == 0 { dim } else { out_dim }, again, &got[i]);
    }
}

fn check_all(head_dim: usize, heads: &[usize]) {
    for dtype in DTYPES {
        for (i, grids) in passes().iter().enumerate() {
            check(Case { heads: heads[i % heads.len()], head_dim, dtype }, grids);
        }
    }
}

#[test]
fn segments_with_heads_of_80() {
    check_all(80, &[16, 1, 3]);
}

#[test]
fn segments_with_heads_of_16_and_64() {
    check_all(16, &[2, 5]);
    check_all(64, &[4, 1]);
}

#[test]
fn segments_with_heads_of_96_and_128() {
    check_all(96, &[1, 4]);
    check_all(128, &[3, 2]);
}

/// No tensor cores take these.
#[test]
fn segments_with_heads_of_odd_sizes() {
    check_all(20, &[3]);
    check_all(72, &[2]);
    check_all(256, &[1]);
}

/// A whole image of 1024x1024, and rows beside it.
#[test]
fn a_long_context_of_patches() {
    for dtype in [DType::F16, DType::BF16] {
        check(
            Case { heads: 2, head_dim: 80, dtype },
            &[Grid { t: 1, h: 74, w: 74 }, Grid { t: 1, h: 2, w: 2 }],
        );
    }
}

/// Rows of other segments, and what is after the last row, may be anything.
#[test]
fn a_segment_sees_its_own_rows_alone() {
    for dtype in DTYPES {
        let Some(gpu) = gpu(dtype, 64) else { return };
        let case = Case { heads: 2, head_dim: 80, dtype };
        let places = Places::new(&[Grid { t: 2, h: 10, w: 14 }], 2, 4);
        let dim = case.shape().qkv_dim();
        let clean = case.qkv(places.rows.len());
        let want = run(&gpu, case, &places, &clean);
        for (i, ends) in [(1, &places.windows), (2, &places.frames)] {
            for own in ends.windows(2).map(|e| e[0] as usize..e[1] as usize) {
                let mut other = clean.clone();
                other[..own.start * dim].fill(f32::NAN);
                other[own.end * dim..].fill(f32::NAN);
                let got = run(&gpu, case, &places, &other);
                let part = own.start * case.shape().q_dim()..own.end * case.shape().q_dim();
                let what = format!("rows {own:?} in {}", dtype.name());
                assert_bits(&what, case.shape().q_dim(), &got[i][part.clone()], &want[i][part]);
            }
        }
    }
}

#[test]
fn more_places_than_there_is_room_for_are_refused() {
    let Some(gpu) = gpu(DType::BF16, 64) else { return };
    let mut images = gpu.images(60, &[1.0; 20]).unwrap();
    let places = Places::new(&[Grid { t: 1, h: 8, w: 8 }], 2, 4);
    let why = gpu.set_images(&mut images, &places).unwrap_err().to_string();
    assert_eq!(why, "request: 64 patches where there is room for 60");
    let why = gpu.images(60, &[1.0; 65]).err().unwrap().to_string();
    assert!(why.starts_with("device cuda:0: heads of 260 numbers"), "{why}");
}

fn gelu<B: VisionOps>(b: &B, x: &[f32]) -> Vec<f32> {
    let mut buf = filled(b, Room::Working, x.len() + 9, x);
    b.gelu(&mut buf, x.len()).unwrap();
    read(b, &buf, x.len())
}

#[test]
fn gelu_is_the_exact_one() {
    for dtype in DTYPES {
        let Some(gpu) = gpu(dtype, 64) else { return };
        for len in [1, 7, 8, 9, 2047, 2048, 2049, 100_003] {
            let mut x: Vec<f32> = numbers(len as u64, len).iter().map(|v| v * 6.0).collect();
            x[0] = if len % 2 == 0 { -30.0 } else { 30.0 };
            let x = rounded(dtype, x);
            let (got, want) = (gelu(&gpu, &x), gelu(&cpu(), &x));
            let tolerance = |i: usize| (unit(dtype) + 2f32.powi(-21)) * want[i].abs() + 2f32.powi(-25);
            assert_near(&format!("gelu of {len} in {}", dtype.name()), len, &got, &want, tolerance);
        }
    }
}

fn norm<B: VisionOps>(b: &B, shape: NormShape, x: &[f32]) -> Vec<f32> {
    let w: Vec<f32> = numbers(3, shape.dim).iter().map(|v| 1.0 + 0.5 * v).collect();
    let w = b.vector(&tensor(&[shape.dim], DType::F32, &w)).unwrap();
    b.loaded().unwrap();
    let len = shape.rows * shape.dim;
    let (x, mut out) = (filled(b, Room::Wide, len, x), poisoned(b, Room::Working, len));
    b.norm(&mut out, &x, Norm { w: &w, shape }).unwrap();
    read(b, &out, len)
}

#[test]
fn norms_by_themselves() {
    for dtype in DTYPES {
        let Some(gpu) = gpu(dtype, 64) else { return };
        for (rows, dim) in [(1, 1), (3, 5), (4, 32), (9, 1280), (300, 1280), (2, 5120)] {
            let shape = NormShape { rows, dim, eps: 1e-6 };
            let x: Vec<f32> = numbers(rows as u64, rows * dim).iter().map(|v| 3.0 * v).collect();
            let (got, want) = (norm(&gpu, shape, &x), norm(&cpu(), shape, &x));
            // The smallest numbers of f16 are 2^-24 apart.
            let tolerance = |i: usize| (1.01 * unit(dtype) + 2f32.powi(-20)) * want[i].abs() + 2f32.powi(-25);
            assert_near(&format!("norm {rows}x{dim} in {}", dtype.name()), dim, &got, &want, tolerance);
        }
    }
}

#[test]
fn cells_go_back_to_their_places() {
    for dtype in [DType::F32, DType::BF16] {
        let Some(gpu) = gpu(dtype, 64) else { return };
        for (i, grids) in passes().iter().enumerate() {
            let dim = [1, 7, 24, 1030, 3584][i % 5];
            let case = Case { heads: 1, head_dim: 16, dtype };
            let places = Places::new(grids, 2, 4);
            let count = places.cells.len();
            let x = numbers(i as u64, count * dim);
            let mut want = vec![0.0; count * dim];
            for (row, &cell) in x.chunks_exact(dim).zip(&places.cells) {
                want[cell as usize * dim..][..dim].copy_from_slice(row);
            }
            let images = images(&gpu, case, &places);
            let (from, mut out) =
                (filled(&gpu, Room::Wide, count * dim, &x), poisoned(&gpu, Room::Wide, count * dim));
            gpu.scatter_cells(&mut out, &from, &images, dim).unwrap();
            assert_bits(&format!("cells of {grids:?}"), dim, &read(&gpu, &out, count * dim), &want);
        }
    }
}

/// The room for places is used again and again, and a copy may be on its way while the next pass is written.
#[test]
fn passes_follow_each_other_without_waiting() {
    let Some(gpu) = gpu(DType::BF16, 64) else { return };
    let case = Case { heads: 2, head_dim: 80, dtype: DType::BF16 };
    let all: Vec<Places> = passes().iter().map(|grids| Places::new(grids, 2, 4)).collect();
    let rows = all.iter().map(|p| p.rows.len()).max().unwrap();
    let mut images = gpu.images(rows, &case.inv_freq()).unwrap();
    let attention = case.attention(Reach::Frame);
    let mut buffers: Vec<_> = all
        .iter()
        .map(|p| {
            let qkv =
                filled(&gpu, Room::Working, p.rows.len() * case.shape().qkv_dim(), &case.qkv(p.rows.len()));
            (qkv, poisoned(&gpu, Room::Working, p.rows.len() * case.shape().q_dim()))
        })
        .collect();
    for (places, (qkv, out)) in all.iter().zip(&mut buffers) {
        gpu.set_images(&mut images, places).unwrap();
        gpu.segment_attention(out, qkv, &images, attention).unwrap();
    }
    for (places, (_, out)) in all.iter().zip(&buffers) {
        let rows = places.rows.len();
        let [_, _, want] = run(&gpu, case, places, &case.qkv(rows));
        assert_bits("a pass among others", case.shape().q_dim(), &read(&gpu, out, want.len()), &want);
    }
}

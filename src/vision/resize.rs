//! Pillow's bicubic filter with antialiasing, to the last bit.
//!
//! Two passes over 8-bit pixels, one across and one down, with 8 bits between them; weights have 22 bits after the
//! point and sums 32. A weight belongs to an output pixel and an input pixel, so the inner loops go over numbers that
//! share one: those of a row when going down, those of [`BAND`] rows, turned on their side, when going across.

use super::{decode::Rgb, size::Size};

const PRECISION_BITS: u32 = 22;
/// Rows that are turned on their side together: 48 numbers a pixel.
const BAND: usize = 16;
/// Numbers that are summed up together: as many as the registers of the oldest x86-64 hold.
const LANES: usize = 16;

/// The image at another size.
///
/// Since Pillow 13 the pass down comes first where it takes away more than twice as many rows as the other takes away
/// columns. The order shows, by some levels where there is much contrast.
pub fn resize(image: Rgb, to: Size) -> Rgb {
    let (rows_less, columns_less) = (less(image.size.height, to.height), less(image.size.width, to.width));
    if rows_less > 0 && rows_less > 2 * columns_less {
        across(down(image, to.height), to.width)
    } else {
        down(across(image, to.width), to.height)
    }
}

fn less(from: u32, to: u32) -> i64 {
    i64::from(from) - i64::from(to)
}

/// The weights of one direction.
struct Weights {
    /// For each output pixel the first input pixel and the number of them.
    spans: Vec<(usize, usize)>,
    /// For each output pixel `stride` weights, the rest of them unused.
    values: Vec<i32>,
    stride: usize,
}

impl Weights {
    fn new(from: u32, to: u32) -> Weights {
        const SUPPORT: f64 = 2.0;
        let scale = f64::from(from) / f64::from(to);
        let filter_scale = scale.max(1.0);
        let support = SUPPORT * filter_scale;
        let stride = support.ceil() as usize * 2 + 1;
        let mut values = vec![0; stride * to as usize];
        let mut spans = Vec::with_capacity(to as usize);
        let mut exact = vec![0.0; stride];
        for (i, values) in values.chunks_exact_mut(stride).enumerate() {
            let center = (i as f64 + 0.5) * scale;
            let first = (center - support + 0.5).max(0.0) as usize;
            let end = ((center + support + 0.5) as usize).min(from as usize);
            let exact = &mut exact[..end - first];
            let mut sum = 0.0;
            for (x, weight) in exact.iter_mut().enumerate() {
                *weight = bicubic(((x + first) as f64 - center + 0.5) * (1.0 / filter_scale));
                sum += *weight;
            }
            for (value, weight) in values.iter_mut().zip(&*exact) {
                let weight = if sum == 0.0 { *weight } else { *weight / sum };
                let scaled = weight * f64::from(1 << PRECISION_BITS);
                *value = if weight < 0.0 { scaled - 0.5 } else { scaled + 0.5 } as i32;
            }
            spans.push((first, end - first));
        }
        Weights { spans, values, stride }
    }

    /// The first input pixel of an output pixel, and the weights from there on.
    fn of(&self, i: usize) -> (usize, &[i32]) {
        let (first, len) = self.spans[i];
        (first, &self.values[i * self.stride..][..len])
    }
}

fn bicubic(x: f64) -> f64 {
    const A: f64 = -0.5;
    let x = x.abs();
    if x < 1.0 {
        ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0
    } else if x < 2.0 {
        (((x - 5.0) * x + 8.0) * x - 4.0) * A
    } else {
        0.0
    }
}

fn clip(sum: i32) -> u8 {
    (sum >> PRECISION_BITS).clamp(0, 255) as u8
}

fn across(image: Rgb, width: u32) -> Rgb {
    if width == image.size.width {
        return image;
    }
    let (from, to) = (image.size.width as usize, width as usize);
    let weights = Weights::new(image.size.width, width);
    let mut data = vec![0; 3 * to * image.size.height as usize];
    let mut band = vec![[[0u8; BAND]; 3]; from];
    for (rows, out) in image.data.chunks(3 * from * BAND).zip(data.chunks_mut(3 * to * BAND)) {
        turn(&mut band, rows);
        for x in 0..to {
            let (first, weights) = weights.of(x);
            for c in 0..3 {
                let mut sums = [1i32 << (PRECISION_BITS - 1); BAND];
                for (pixel, &weight) in band[first..].iter().zip(weights) {
                    for (sum, &value) in sums.iter_mut().zip(&pixel[c]) {
                        *sum += i32::from(value) * weight;
                    }
                }
                for (row, sum) in out.chunks_exact_mut(3 * to).zip(sums) {
                    row[3 * x + c] = clip(sum);
                }
            }
        }
    }
    Rgb { size: Size { width, ..image.size }, data }
}

/// Rows of pixels become columns of them; what stood in missing rows stays.
fn turn(band: &mut [[[u8; BAND]; 3]], rows: &[u8]) {
    for (r, row) in rows.chunks_exact(3 * band.len()).enumerate() {
        for (pixel, values) in band.iter_mut().zip(row.chunks_exact(3)) {
            for c in 0..3 {
                pixel[c][r] = values[c];
            }
        }
    }
}

fn down(image: Rgb, height: u32) -> Rgb {
    if height == image.size.height {
        return image;
    }
    let row = 3 * image.size.width as usize;
    let weights = Weights::new(image.size.height, height);
    let mut data = vec![0; row * height as usize];
    for (y, out) in data.chunks_exact_mut(row).enumerate() {
        let (first, weights) = weights.of(y);
        let rows = &image.data[first * row..(first + weights.len()) * row];
        let (whole, rest) = out.as_chunks_mut::<LANES>();
        for (i, out) in whole.iter_mut().enumerate() {
            let mut sums = [1i32 << (PRECISION_BITS - 1); LANES];
            for (values, &weight) in rows.chunks_exact(row).zip(weights) {
                let values: &[u8; LANES] =
                    values[i * LANES..][..LANES].try_into().expect("LANES long; this is a bug");
                for (sum, &value) in sums.iter_mut().zip(values) {
                    *sum += i32::from(value) * weight;
                }
            }
            *out = sums.map(clip);
        }
        for (i, out) in (row - rest.len()..).zip(rest) {
            let products =
                rows.chunks_exact(row).zip(weights).map(|(values, &weight)| i32::from(values[i]) * weight);
            *out = clip((1 << (PRECISION_BITS - 1)) + products.sum::<i32>());
        }
    }
    Rgb { size: Size { height, ..image.size }, data }
}

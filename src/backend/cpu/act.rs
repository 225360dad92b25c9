//! The gate of the feed-forward part.
#![allow(unsafe_code)]

use super::{
    Cpu, GRAIN,
    memory::{prefix, prefix_mut},
    simd::{Kernel, LANES, Vector, exp, load_part, store_part},
};

pub(super) fn silu_mul(cpu: &Cpu, out: &mut [f32], gate_up: &[f32], rows: usize, dim: usize) {
    let gate_up = prefix(gate_up, rows * 2 * dim);
    // An exponential costs as much as several numbers of other ops.
    cpu.pool.rows(prefix_mut(out, rows * dim), dim, GRAIN / 4, |row, out| {
        let gate_up = &gate_up[row * 2 * dim..][..2 * out.len()];
        cpu.simd.run(SiluMul { out, gate_up, dim });
    });
}

struct SiluMul<'a> {
    out: &'a mut [f32],
    gate_up: &'a [f32],
    dim: usize,
}

impl Kernel for SiluMul<'_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector>(self) {
        let whole = self.dim / LANES * LANES;
        let rest = self.dim - whole;
        for (out, row) in self.out.chunks_exact_mut(self.dim).zip(self.gate_up.chunks_exact(2 * self.dim)) {
            let (gate, up) = row.split_at(self.dim);
            let (out, gate, up) = (out.as_mut_ptr(), gate.as_ptr(), up.as_ptr());
            // SAFETY: `dim` numbers of each.
            unsafe {
                for i in (0..whole).step_by(LANES) {
                    silu::<V>(V::load(gate.add(i))).mul(V::load(up.add(i))).store(out.add(i));
                }
                if rest > 0 {
                    let gate = silu::<V>(load_part(gate.add(whole), rest));
                    store_part(gate.mul(load_part(up.add(whole), rest)), out.add(whole), rest);
                }
            }
        }
    }
}

/// `x / (1 + e^-x)`.
#[inline(always)]
fn silu<V: Vector>(x: V) -> V {
    x.div(exp(V::splat(0.0).sub(x)).add(V::splat(1.0)))
}

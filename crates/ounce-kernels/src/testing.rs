//! Helpers shared by the tests of this crate.

use crate::view::{FloatType, View, ViewMut};
use half::{bf16, f16};

/// Numbers in [-1, 1) from a fixed generator (xorshift, `[Marsaglia03]`).
pub(crate) fn noise(n: usize, seed: u32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(12345);
    (0..n)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 17;
            state ^= state << 5;
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        })
        .collect()
}

/// Asserts `|got - want| <= tolerance * max(1, |want|)` for every element.
#[track_caller]
pub(crate) fn assert_close(got: &[f32], want: &[f64], tolerance: f64) {
    assert_eq!(got.len(), want.len());
    for (i, (&got, &want)) in got.iter().zip(want).enumerate() {
        let error = (f64::from(got) - want).abs();
        assert!(error <= tolerance * want.abs().max(1.0), "element {i}: {got}, want {want}");
    }
}

/// Every way to store floating-point numbers.
pub(crate) const FLOAT_TYPES: [FloatType; 3] = [FloatType::F32, FloatType::Bf16, FloatType::F16];

/// Numbers stored as one of the types.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Stored {
    F32(Vec<f32>),
    Bf16(Vec<bf16>),
    F16(Vec<f16>),
}

impl Stored {
    /// `x`, rounded.
    pub(crate) fn new(x: &[f32], float_type: FloatType) -> Self {
        let mut stored = match float_type {
            FloatType::F32 => Stored::F32(vec![0.0; x.len()]),
            FloatType::Bf16 => Stored::Bf16(vec![bf16::ZERO; x.len()]),
            FloatType::F16 => Stored::F16(vec![f16::ZERO; x.len()]),
        };
        stored.view_mut().store(0..x.len(), x);
        stored
    }

    pub(crate) fn view(&self) -> View<'_> {
        match self {
            Stored::F32(x) => View::F32(x),
            Stored::Bf16(x) => View::Bf16(x),
            Stored::F16(x) => View::F16(x),
        }
    }

    pub(crate) fn view_mut(&mut self) -> ViewMut<'_> {
        match self {
            Stored::F32(x) => ViewMut::F32(x),
            Stored::Bf16(x) => ViewMut::Bf16(x),
            Stored::F16(x) => ViewMut::F16(x),
        }
    }

    /// The values.
    pub(crate) fn wide(&self) -> Vec<f32> {
        let mut wide = vec![0.0; self.view().len()];
        self.view().widen(&mut wide);
        wide
    }
}

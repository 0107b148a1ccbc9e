//! What the session reads and writes between steps: parameters, states, data, losses, results.

use half::bf16;
use ounce_ir::{DType, ParamId, ValueId};
use ounce_kernels::convert::{bf16_to_f32, round_bf16};
use ounce_kernels::master::{join_master, split_masters};
use ounce_kernels::view::BLOCK;

use crate::Arena;
use crate::arena::Element;
use crate::resolve::{Place, Resolved};

/// The resident buffers of a plan in an arena.
#[derive(Debug)]
pub struct Buffers<'a> {
    pub(crate) arena: &'a mut Arena,
    pub(crate) resolved: &'a Resolved,
}

impl Buffers<'_> {
    /// A parameter, in its own shape.
    ///
    /// # Panics
    /// If the plan does not hold it, or not as f32 (see [`Buffers::has_param`] and
    /// [`Buffers::param_is_split`]).
    pub fn param(&mut self, p: ParamId) -> &mut [f32] {
        let place = self.resolved.param(p);
        self.slice(place, || format!("parameter {p}"))
    }

    /// What ops read of a parameter: elements from `start` on, as f32.
    ///
    /// # Panics
    /// If the plan does not hold it, as f32 or bf16, or it ends before `dst` does.
    pub fn read_param(&mut self, p: ParamId, start: usize, dst: &mut [f32]) {
        let range = start..start + dst.len();
        if self.param_is_split(p) {
            bf16_to_f32(dst, &self.halves(p)[range]);
        } else {
            dst.copy_from_slice(&self.param(p)[range]);
        }
    }

    /// What the update reads of a parameter: elements from `start` on. Of a bf16 parameter without
    /// its lower half, as evaluation plans hold it, that is what ops read.
    ///
    /// # Panics
    /// As [`Buffers::read_param`].
    pub fn read_master(&mut self, p: ParamId, start: usize, dst: &mut [f32]) {
        self.read_param(p, start, dst);
        let Some(k) = self.lower_half(p) else { return };
        for (x, &lo) in dst.iter_mut().zip(&self.state_i16(p, k)[start..]) {
            *x = join_master(round_bf16(*x), lo);
        }
    }

    /// Sets elements of a parameter from `start` on. A bf16 parameter takes the rounded half, its
    /// state the rest, if the plan holds it.
    ///
    /// # Panics
    /// As [`Buffers::read_param`].
    pub fn write_master(&mut self, p: ParamId, start: usize, src: &[f32]) {
        if !self.param_is_split(p) {
            return self.param(p)[start..start + src.len()].copy_from_slice(src);
        }
        let (mut hi, mut lo) = ([bf16::ZERO; BLOCK], [0; BLOCK]);
        for (i, src) in src.chunks(BLOCK).enumerate() {
            let (hi, lo) = (&mut hi[..src.len()], &mut lo[..src.len()]);
            split_masters(hi, lo, src);
            let first = start + i * BLOCK;
            let range = first..first + src.len();
            self.halves(p)[range.clone()].copy_from_slice(hi);
            if let Some(k) = self.lower_half(p) {
                self.state_i16(p, k)[range].copy_from_slice(lo);
            }
        }
    }

    /// Whether a parameter is stored as the rounded halves of its masters.
    pub fn param_is_split(&self, p: ParamId) -> bool {
        self.resolved.param(p).is_some_and(|place| place.dtype == DType::Bf16)
    }

    /// The rounded halves of a bf16 parameter.
    fn halves(&mut self, p: ParamId) -> &mut [bf16] {
        let place = self.resolved.param(p);
        self.slice(place, || format!("parameter {p}"))
    }

    /// The state with the lower halves of a parameter, if the plan holds them.
    fn lower_half(&self, p: ParamId) -> Option<u32> {
        self.resolved.master_lo.filter(|&k| self.resolved.state(p, k).is_some())
    }

    /// State `k` of a trained parameter, as 16-bit integers.
    ///
    /// # Panics
    /// If the plan does not hold it, or not as i16.
    pub fn state_i16(&mut self, p: ParamId, k: u32) -> &mut [i16] {
        let place = self.resolved.state(p, k);
        self.slice(place, || format!("state {k} of parameter {p}"))
    }

    /// State `k` of a trained parameter, in the parameter's shape.
    ///
    /// # Panics
    /// If the plan does not hold it, or not as f32.
    pub fn state(&mut self, p: ParamId, k: u32) -> &mut [f32] {
        let place = self.resolved.state(p, k);
        self.slice(place, || format!("state {k} of parameter {p}"))
    }

    /// Data of the step: `[N]` over the whole token axis, or `[R]`.
    ///
    /// # Panics
    /// If the plan does not hold it, or not as i32 (see [`Buffers::has_session`]).
    pub fn session_i32(&mut self, v: ValueId) -> &mut [i32] {
        let place = self.resolved.session(v);
        self.slice(place, || format!("value {v}"))
    }

    /// Losses, results or the clip scale.
    ///
    /// # Panics
    /// If the plan does not hold it, or not as f32.
    pub fn session_f32(&mut self, v: ValueId) -> &mut [f32] {
        let place = self.resolved.session(v);
        self.slice(place, || format!("value {v}"))
    }

    /// Parts of the squared gradient norm.
    ///
    /// # Panics
    /// If the plan does not hold it, or not as f64.
    pub fn session_f64(&mut self, v: ValueId) -> &mut [f64] {
        let place = self.resolved.session(v);
        self.slice(place, || format!("value {v}"))
    }

    /// Whether the plan holds a parameter.
    pub fn has_param(&self, p: ParamId) -> bool {
        self.resolved.param(p).is_some()
    }

    /// Whether the plan holds a value for the session.
    pub fn has_session(&self, v: ValueId) -> bool {
        self.resolved.session(v).is_some()
    }

    fn slice<T: Element>(&mut self, place: Option<Place>, name: impl Fn() -> String) -> &mut [T] {
        let place = place.unwrap_or_else(|| panic!("the plan holds {}", name()));
        let (have, want): (DType, DType) = (place.dtype, T::DTYPE);
        assert_eq!(have, want, "element type of {}", name());
        self.arena.slice_mut(place.at, place.n_elems)
    }
}

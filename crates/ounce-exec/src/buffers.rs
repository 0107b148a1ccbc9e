//! What the session reads and writes between steps: parameters, states, data, losses, results.

use ounce_ir::{DType, ParamId, ValueId};

use crate::Arena;
use crate::arena::Element;
use crate::resolve::{Place, Program};

/// The resident buffers of a plan in an arena.
#[derive(Debug)]
pub struct Buffers<'a> {
    pub(crate) arena: &'a mut Arena,
    pub(crate) program: &'a Program,
}

impl Buffers<'_> {
    /// A parameter, in its own shape.
    ///
    /// # Panics
    /// If the plan does not hold it, or not as f32 (see [`Buffers::has_param`]).
    pub fn param(&mut self, p: ParamId) -> &mut [f32] {
        let place = self.program.param(p);
        self.slice(place, || format!("parameter {p}"))
    }

    /// State `k` of a trained parameter, in the parameter's shape.
    ///
    /// # Panics
    /// If the plan does not hold it, or not as f32.
    pub fn state(&mut self, p: ParamId, k: u32) -> &mut [f32] {
        let place = self.program.state(p, k);
        self.slice(place, || format!("state {k} of parameter {p}"))
    }

    /// Data of the step: `[N]` over the whole token axis, or `[R]`.
    ///
    /// # Panics
    /// If the plan does not hold it, or not as i32 (see [`Buffers::has_session`]).
    pub fn session_i32(&mut self, v: ValueId) -> &mut [i32] {
        let place = self.program.session(v);
        self.slice(place, || format!("value {v}"))
    }

    /// Losses, results or the clip scale.
    ///
    /// # Panics
    /// If the plan does not hold it, or not as f32.
    pub fn session_f32(&mut self, v: ValueId) -> &mut [f32] {
        let place = self.program.session(v);
        self.slice(place, || format!("value {v}"))
    }

    /// Parts of the squared gradient norm.
    ///
    /// # Panics
    /// If the plan does not hold it, or not as f64.
    pub fn session_f64(&mut self, v: ValueId) -> &mut [f64] {
        let place = self.program.session(v);
        self.slice(place, || format!("value {v}"))
    }

    /// Whether the plan holds a parameter.
    pub fn has_param(&self, p: ParamId) -> bool {
        self.program.param(p).is_some()
    }

    /// Whether the plan holds a value for the session.
    pub fn has_session(&self, v: ValueId) -> bool {
        self.program.session(v).is_some()
    }

    fn slice<T: Element>(&mut self, place: Option<Place>, name: impl Fn() -> String) -> &mut [T] {
        let place = place.unwrap_or_else(|| panic!("the plan holds {}", name()));
        let (have, want): (DType, DType) = (place.dtype, T::DTYPE);
        assert_eq!(have, want, "element type of {}", name());
        self.arena.slice_mut(place.at, place.n_elems)
    }
}

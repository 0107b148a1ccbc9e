//! One reservation of memory, and the slices of it that a task may touch.
//!
//! Idea: address space is reserved once and pages appear when they are first written, so a fresh
//! arena costs nothing and only buffers in use become resident. A task gets its operands as slices
//! through `Operands`, which holds the arena exclusively and proves, before it hands out anything,
//! that no written operand shares a byte with another, except for an output that takes the place of
//! its input. So the slices are sound whatever the plan says, and a wrong plan panics.
//!
//! Complexity: the proof is O(writes x operands) comparisons per task, nothing beside a kernel.

use std::marker::PhantomData;
use std::ops::Range;
use std::ptr::NonNull;

use half::{bf16, f16};
use ounce_ir::DType;
use ounce_kernels::inout::InOut;
use ounce_kernels::master::MasterMut;
use ounce_kernels::view::{View, ViewMut};

use crate::ExecError;
use crate::spec::{Extent, OpSpec, OperandSpec};

/// Plans place buffers at multiples of this many bytes; offsets are kept in this unit.
pub(crate) const UNIT_BYTES: u64 = 64;

/// An anonymous mapping of zeros, resident only where it was written.
#[derive(Debug)]
pub struct Arena {
    base: NonNull<u8>,
    bytes: usize,
}

// SAFETY: the mapping is owned by this value alone and bound to no thread.
unsafe impl Send for Arena {}
// SAFETY: a shared arena hands out nothing; every access goes through `&mut`.
unsafe impl Sync for Arena {}

impl Arena {
    /// Reserves `bytes` bytes without touching them.
    ///
    /// # Errors
    /// [`ExecError::Reserve`] if the system refuses the address space.
    pub fn reserve(bytes: u64) -> Result<Self, ExecError> {
        let len = usize::try_from(bytes).unwrap_or(usize::MAX).max(1);
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a fresh anonymous mapping at an address of the system's choice touches nothing
        // that exists.
        let base = unsafe {
            libc::mmap(std::ptr::null_mut(), len, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0)
        };
        if base == libc::MAP_FAILED {
            let source = std::io::Error::last_os_error();
            return Err(ExecError::Reserve { bytes, source });
        }
        // Fewer address translations make kernels a few per cent faster. The advice may be refused;
        // large pages never reach beyond the mapping.
        #[cfg(target_os = "linux")]
        // SAFETY: the range is the mapping just made.
        let _ = unsafe { libc::madvise(base, len, libc::MADV_HUGEPAGE) };
        let base = NonNull::new(base.cast()).expect("a mapping does not start at address zero");
        Ok(Self { base, bytes: len })
    }

    /// Bytes reserved.
    pub fn bytes(&self) -> u64 {
        self.bytes as u64
    }

    /// `n_elems` elements from byte `at * 64` on.
    ///
    /// # Panics
    /// If they do not lie within the arena.
    pub(crate) fn slice_mut<T: Plain>(&mut self, at: u32, n_elems: u64) -> &mut [T] {
        let start = u64::from(at) * UNIT_BYTES;
        let end = n_elems.checked_mul(size_of::<T>() as u64).and_then(|b| b.checked_add(start));
        assert!(end.is_some_and(|end| end <= self.bytes()), "slice lies within the arena");
        // SAFETY: in bounds by the assertion; the mapping is page aligned and `start` a multiple of
        // 64, so `T` is aligned; every bit pattern is a `T`; exclusive because `self` is.
        unsafe {
            let first = self.base.add(start as usize).cast::<T>();
            std::slice::from_raw_parts_mut(first.as_ptr(), n_elems as usize)
        }
    }
}

impl Arena {
    /// A float operand from byte `at * 64` on.
    ///
    /// # Panics
    /// If it does not lie within the arena, or is stored in no float type.
    pub(crate) fn view(&mut self, at: u32, operand: &OperandSpec, extent: Extent) -> View<'_> {
        let n_elems = operand.elems(extent);
        match operand.dtype {
            DType::F32 => View::F32(self.slice_mut(at, n_elems)),
            DType::Bf16 => View::Bf16(self.slice_mut(at, n_elems)),
            DType::F16 => View::F16(self.slice_mut(at, n_elems)),
            other => panic!("{other} is not a float type"),
        }
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        // SAFETY: the mapping of `reserve`, which nobody borrows any more.
        let rc = unsafe { libc::munmap(self.base.as_ptr().cast(), self.bytes) };
        debug_assert_eq!(rc, 0, "unmapping our own mapping succeeds");
    }
}

/// A type of which every bit pattern is a value, aligned to at most 64 bytes.
///
/// # Safety
/// Exactly that.
pub(crate) unsafe trait Plain: Copy + 'static {}
// SAFETY: plain numbers.
unsafe impl Plain for f32 {}
// SAFETY: plain numbers.
unsafe impl Plain for f64 {}
// SAFETY: plain numbers.
unsafe impl Plain for i32 {}
// SAFETY: plain numbers.
unsafe impl Plain for u64 {}
// SAFETY: plain numbers.
unsafe impl Plain for i16 {}
// SAFETY: 16 bits, of which every pattern is a number or a NaN.
unsafe impl Plain for bf16 {}
// SAFETY: as above.
unsafe impl Plain for f16 {}

/// The Rust type of a stored element type.
pub(crate) trait Element: Plain {
    const DTYPE: DType;
}
impl Element for f32 {
    const DTYPE: DType = DType::F32;
}
impl Element for f64 {
    const DTYPE: DType = DType::F64;
}
impl Element for i32 {
    const DTYPE: DType = DType::I32;
}
impl Element for i16 {
    const DTYPE: DType = DType::I16;
}
impl Element for bf16 {
    const DTYPE: DType = DType::Bf16;
}
impl Element for f16 {
    const DTYPE: DType = DType::F16;
}

/// What is wrong with a task's operands, or nothing.
///
/// `offsets` (in units of 64 bytes) are those of `op`'s operands, then that of the scratch if there
/// is any.
pub(crate) fn check_operands(
    op: &OpSpec,
    offsets: &[u32],
    extent: Extent,
    scratch_bytes: u64,
    arena_bytes: u64,
) -> Result<(), String> {
    let n_operands = op.operands.len() + usize::from(scratch_bytes > 0);
    if offsets.len() != n_operands {
        return Err(format!("has {} operands, needs {n_operands}", offsets.len()));
    }
    let range = |i: usize| operand_range(op, offsets, extent, scratch_bytes, i);
    for i in 0..n_operands {
        if range(i).end > arena_bytes {
            return Err(format!("operand {i} at {:?} leaves the {arena_bytes} bytes", range(i)));
        }
    }
    for w in op.n_reads()..n_operands {
        let mut handed_on = false;
        for i in (0..w).filter(|&i| overlap(&range(i), &range(w))) {
            let pair = (i, w.wrapping_sub(op.first_output()));
            let in_place = op.kind.in_place().contains(&pair)
                && range(i) == range(w)
                && op.operands[i].dtype == op.operands[w].dtype;
            if !in_place || handed_on {
                return Err(format!(
                    "operand {w} at {:?} overlaps operand {i} at {:?}",
                    range(w),
                    range(i)
                ));
            }
            handed_on = true;
        }
    }
    Ok(())
}

/// Bytes of the arena that an operand takes.
fn operand_range(
    op: &OpSpec,
    offsets: &[u32],
    extent: Extent,
    scratch_bytes: u64,
    index: usize,
) -> Range<u64> {
    let start = u64::from(offsets[index]) * UNIT_BYTES;
    let bytes = op.operands.get(index).map_or(scratch_bytes, |o| o.bytes(extent));
    start..start + bytes
}

fn overlap(a: &Range<u64>, b: &Range<u64>) -> bool {
    a.start < b.end && b.start < a.end
}

/// The operands of one task as slices. Each written one is handed out once.
pub(crate) struct Operands<'a> {
    base: NonNull<u8>,
    op: &'a OpSpec,
    offsets: &'a [u32],
    extent: Extent,
    scratch_bytes: u64,
    /// Bit `i`: operand `i` was handed out for writing.
    written: u64,
    arena: PhantomData<&'a mut Arena>,
}

impl<'a> Operands<'a> {
    /// The operands of `op` at `offsets`.
    ///
    /// # Panics
    /// If [`check_operands`] refuses them.
    pub(crate) fn new(
        arena: &'a mut Arena,
        op: &'a OpSpec,
        offsets: &'a [u32],
        extent: Extent,
        scratch_bytes: u64,
    ) -> Self {
        if let Err(what) = check_operands(op, offsets, extent, scratch_bytes, arena.bytes()) {
            panic!("operands of {}: {what}", op.kind.name());
        }
        let base = arena.base;
        Self { base, op, offsets, extent, scratch_bytes, written: 0, arena: PhantomData }
    }

    /// Elements per token of input `i` (all of them if it has no leading dimension).
    pub(crate) fn input_width(&self, i: usize) -> usize {
        self.op.operands[i].row_elems as usize
    }

    /// Elements per token of output `i`.
    pub(crate) fn output_width(&self, i: usize) -> usize {
        self.op.operands[self.op.first_output() + i].row_elems as usize
    }

    /// Input value `i`.
    pub(crate) fn input<T: Element>(&self, i: usize) -> &'a [T] {
        assert!(i < self.op.n_inputs, "input {i} exists");
        self.read(i)
    }

    /// Input value `i`, stored in any float type.
    pub(crate) fn input_view(&self, i: usize) -> View<'a> {
        assert!(i < self.op.n_inputs, "input {i} exists");
        self.read_view(i)
    }

    /// The parameter of use `i`.
    pub(crate) fn weight(&self, i: usize) -> View<'a> {
        assert!(i < self.op.n_uses, "use {i} exists");
        self.read_view(self.op.n_inputs + i)
    }

    /// The parameter of use `i`, if the op has that many.
    pub(crate) fn weight_if_any(&self, i: usize) -> Option<View<'a>> {
        (i < self.op.n_uses).then(|| self.weight(i))
    }

    /// Gradient sum `i`, if the op has that many.
    pub(crate) fn sum_if_any(&mut self, i: usize) -> Option<&'a mut [f32]> {
        (i < self.op.n_sums).then(|| self.write(self.op.n_reads() + i))
    }

    /// Gradient sum 0.
    pub(crate) fn sum(&mut self) -> &'a mut [f32] {
        self.sum_if_any(0).expect("the op adds to a sum")
    }

    /// Gradient sum 0, stored in any float type.
    pub(crate) fn sum_view(&mut self) -> ViewMut<'a> {
        assert!(self.op.n_sums > 0, "the op adds to a sum");
        self.write_view(self.op.n_reads())
    }

    /// Output value `i`.
    pub(crate) fn output<T: Element>(&mut self, i: usize) -> &'a mut [T] {
        assert!(i < self.op.n_outputs, "output {i} exists");
        self.write(self.op.first_output() + i)
    }

    /// Output value `i`, stored in any float type.
    pub(crate) fn output_view(&mut self, i: usize) -> ViewMut<'a> {
        assert!(i < self.op.n_outputs, "output {i} exists");
        self.write_view(self.op.first_output() + i)
    }

    /// Output `output` with the input whose place it may take.
    pub(crate) fn in_out(&mut self, output: usize, input: usize) -> InOut<'a> {
        if self.in_place(output, input) {
            InOut::InPlace(self.output_view(output))
        } else {
            InOut::separate(self.output_view(output), self.input_view(input))
        }
    }

    /// Whether the output takes the place of the input.
    pub(crate) fn in_place(&self, output: usize, input: usize) -> bool {
        self.range(self.op.first_output() + output) == self.range(input)
    }

    /// The exact values of the updated parameter: itself, or with the last state, the lower halves.
    pub(crate) fn master(&mut self) -> MasterMut<'a> {
        let param = self.op.first_updated();
        if self.op.operands[param].dtype == DType::F32 {
            return MasterMut::F32(self.write(param));
        }
        let last_state = self.op.operands.len() - 1;
        MasterMut::Split { hi: self.write(param), lo: self.write(last_state) }
    }

    /// State `k` of the updated parameter.
    pub(crate) fn state(&mut self, k: usize) -> &'a mut [f32] {
        self.write(self.op.first_updated() + 1 + k)
    }

    /// The scratch, empty if the op needs none.
    pub(crate) fn scratch<T: Plain>(&mut self) -> &'a mut [T] {
        if self.scratch_bytes == 0 {
            return &mut [];
        }
        let index = self.op.operands.len();
        self.take(index);
        // SAFETY: the last operand, handed out once by `take`.
        unsafe { self.slice_mut(index) }
    }

    fn range(&self, index: usize) -> Range<u64> {
        operand_range(self.op, self.offsets, self.extent, self.scratch_bytes, index)
    }

    fn read<T: Element>(&self, index: usize) -> &'a [T] {
        assert_eq!(self.op.operands[index].dtype, T::DTYPE, "element type of operand {index}");
        let range = self.range(index);
        let shared =
            (self.op.n_reads()..self.offsets.len()).all(|w| !overlap(&self.range(w), &range));
        assert!(shared, "operand {index} is read where nothing is written");
        // SAFETY: `new` checked the bounds; nothing that is written overlaps it, so it stays as it
        // is for `'a`; alignment and bit patterns as in `Arena::slice_mut`.
        unsafe {
            let first = self.base.add(range.start as usize).cast::<T>();
            let n_elems = (range.end - range.start) as usize / size_of::<T>();
            std::slice::from_raw_parts(first.as_ptr(), n_elems)
        }
    }

    fn write<T: Element>(&mut self, index: usize) -> &'a mut [T] {
        assert!(index >= self.op.n_reads(), "operand {index} is written");
        assert_eq!(self.op.operands[index].dtype, T::DTYPE, "element type of operand {index}");
        self.take(index);
        // SAFETY: a written operand, handed out once by `take`.
        unsafe { self.slice_mut(index) }
    }

    fn read_view(&self, index: usize) -> View<'a> {
        match self.op.operands[index].dtype {
            DType::Bf16 => View::Bf16(self.read(index)),
            DType::F16 => View::F16(self.read(index)),
            _ => View::F32(self.read(index)),
        }
    }

    fn write_view(&mut self, index: usize) -> ViewMut<'a> {
        match self.op.operands[index].dtype {
            DType::Bf16 => ViewMut::Bf16(self.write(index)),
            DType::F16 => ViewMut::F16(self.write(index)),
            _ => ViewMut::F32(self.write(index)),
        }
    }

    fn take(&mut self, index: usize) {
        let bit = 1u64 << (index - self.op.n_reads());
        assert_eq!(self.written & bit, 0, "operand {index} is handed out once");
        self.written |= bit;
    }

    /// # Safety
    /// `index` is a written operand that was not handed out before.
    unsafe fn slice_mut<T: Plain>(&self, index: usize) -> &'a mut [T] {
        let range = self.range(index);
        // SAFETY: `new` checked the bounds and that no other operand overlaps this one but an input
        // whose place it takes, which `read` refuses; the arena is held exclusively for `'a`;
        // alignment and bit patterns as in `Arena::slice_mut`.
        unsafe {
            let first = self.base.add(range.start as usize).cast::<T>();
            let n_elems = (range.end - range.start) as usize / size_of::<T>();
            std::slice::from_raw_parts_mut(first.as_ptr(), n_elems)
        }
    }
}

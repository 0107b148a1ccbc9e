//! A step allocates nothing, on any thread: counted by an allocator that counts.

mod support;

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

use ounce_exec::StepInputs;
use ounce_ir::OptimizerKind;
use ounce_program::StepShape;
use support::{Cut, ROW_TOKENS, Session, gpt2_like, llama_like, rows, spans, training};

struct Counting;

static N_ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

// SAFETY: hands every call on to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        N_ALLOCATIONS.fetch_add(1, Ordering::SeqCst);
        // SAFETY: the caller's promises are the system's conditions.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

#[test]
fn steps_allocate_nothing_on_any_thread() {
    for forward in [gpt2_like(0.1), llama_like()] {
        let graph = training(&forward, OptimizerKind::AdamW, true);
        let shape = StepShape::new(4, ROW_TOKENS);
        let cut = Cut { micro_batch_rows: 2, run_tokens: 64, in_place: true, recompute: true };
        let mut session = Session::new(&graph, shape, cut, 3);
        session.exec.start_profile();
        let rows = rows(4, 1);
        let spans = spans(shape, &rows);
        session.set_rows(&graph, shape, &rows);
        let mut inputs = StepInputs { lr: 1e-3, ..StepInputs::forward(&spans) };
        session.exec.run(&mut session.arena, &inputs).expect("finite numbers");
        let before = N_ALLOCATIONS.load(Ordering::SeqCst);
        for step in 2..5 {
            inputs.step = step;
            session.exec.run(&mut session.arena, &inputs).expect("finite numbers");
        }
        assert_eq!(session.exec.first_overflow(&mut session.arena, &inputs), None);
        assert_eq!(N_ALLOCATIONS.load(Ordering::SeqCst) - before, 0, "allocations in steps 2 to 4");
    }
}

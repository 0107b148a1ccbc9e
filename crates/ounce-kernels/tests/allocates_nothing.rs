//! No kernel touches the heap: a counting allocator watches every one of them, on all threads of the
//! pool. (The test runner has a thread of its own, which allocates when it likes.)

use half::{bf16, f16};
use ounce_kernels::activation::{
    Gate, GeluKind, gelu_backward, gelu_forward, glu_backward, glu_forward, glu_packed_backward,
    glu_packed_forward,
};
use ounce_kernels::attention::{
    AttentionDims, HeadsMut, HeadsRef, RowSpan, attention_backward,
    attention_backward_scratch_elems, attention_forward, attention_forward_scratch_elems,
};
use ounce_kernels::elementwise;
use ounce_kernels::embed::{embed_forward, embed_scatter, embed_scatter_scratch_u64};
use ounce_kernels::gemm::{MatMut, MatRef, Start, gemm, gemm_scratch_elems};
use ounce_kernels::head::{head_forward, head_scratch_elems, head_train};
use ounce_kernels::inout::InOut;
use ounce_kernels::master::MasterMut;
use ounce_kernels::norm::{
    layer_norm_backward, layer_norm_backward_scratch_elems, layer_norm_forward, rms_norm_backward,
    rms_norm_forward,
};
use ounce_kernels::optim::{
    AdamwHyper, adamw, any_nonfinite, sgd, sum_squares, sum_squares_scratch_f64,
};
use ounce_kernels::philox::PhiloxKey;
use ounce_kernels::pool::Pool;
use ounce_kernels::rope::rope;
use ounce_kernels::view::{FloatType, View, ViewMut};
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::atomic::{AtomicUsize, Ordering};

struct Counting;

static N_ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    /// Whether this thread runs kernels.
    static IS_WATCHED: Cell<bool> = const { Cell::new(false) };
}

// SAFETY: everything is passed on to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // A thread that is ending has no such flag any more, and runs no kernel.
        if IS_WATCHED.try_with(Cell::get).unwrap_or(false) {
            N_ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        }
        // SAFETY: the caller's promise is the system allocator's.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

// N tokens, C channels, V words, two heads.
const N: usize = 128;
const C: usize = 64;
const V: usize = 100;

/// Runs `f` twice, the second time after the workers fell asleep, and expects no allocation.
fn quiet(name: &str, mut f: impl FnMut()) {
    let before = N_ALLOCATIONS.load(Ordering::Relaxed);
    f();
    std::thread::sleep(std::time::Duration::from_millis(1));
    f();
    assert_eq!(N_ALLOCATIONS.load(Ordering::Relaxed), before, "{name} allocates");
}

#[test]
fn kernels_allocate_nothing() {
    let pool = Pool::new(3);
    let n_watched = AtomicUsize::new(0);
    pool.run(&|_| {
        IS_WATCHED.set(true);
        n_watched.fetch_add(1, Ordering::Relaxed);
    });
    assert_eq!((n_watched.into_inner(), IS_WATCHED.get()), (3, true), "all threads, and this one");
    drop(std::hint::black_box(Box::new(1)));
    assert!(
        N_ALLOCATIONS.load(Ordering::Relaxed) > 0,
        "what a watched thread allocates is counted"
    );
    let (x, w) = (vec![0.5; N * C], vec![0.25; V * C]);
    let (mut y, mut z, mut dtable) = (vec![0.0; N * C], vec![0.0; N * C], vec![0.0; V * C]);
    let targets: Vec<i32> = (0..N as i32).map(|i| i % V as i32).collect();
    let mut loss = vec![0.0; N];

    let mut scratch = vec![0.0; gemm_scratch_elems(N, V, C, FloatType::F32, 3)];
    let mut logits = vec![0.0; N * V];
    let (x_mat, w_mat) = (MatRef::new(&x, N, C), MatRef::new(&w, V, C).t());
    quiet("gemm", || {
        let c = MatMut::new(&mut logits, N, V);
        gemm(&pool, c, x_mat, w_mat, Start::FromC, None, &mut scratch);
    });

    let mut scratch = vec![0.0; head_scratch_elems(64, V, C, FloatType::F32, 3)];
    quiet("head", || {
        let (x, w) = (View::from(&x), View::from(&w));
        head_forward(&pool, &mut loss, x, w, &targets, None, 64, &mut scratch);
        let dw = Some(&mut dtable[..]);
        let dx = ViewMut::from(&mut y);
        head_train(&pool, &mut loss, dx, dw, x, w, &targets, Some(30.0), 1.0, 64, &mut scratch);
    });

    let dims = AttentionDims {
        n_heads: 2,
        n_kv_heads: 2,
        head_dim: C / 2,
        scale: 0.1,
        window: Some(9),
        soft_cap: Some(5.0),
    };
    let heads = HeadsRef::dense(&x, 2, C / 2);
    let rows = [RowSpan { start: 0, len: 100 }];
    let mut lse = vec![0.0; N * 2];
    let (mut dk, mut dv) = (vec![0.0; N * C], vec![0.0; N * C]);
    let mut scratch = vec![
        0.0;
        attention_forward_scratch_elems(dims, 3)
            .max(attention_backward_scratch_elems(dims, N, 3))
    ];
    quiet("attention", || {
        let o = ViewMut::from(&mut y);
        attention_forward(&pool, o, &mut lse, heads, heads, heads, &rows, dims, &mut scratch);
        let [dq, dk, dv] = [&mut z, &mut dk, &mut dv].map(|d| HeadsMut::dense(d, 2, C / 2));
        attention_backward(
            &pool,
            dq,
            dk,
            dv,
            View::from(&x),
            heads,
            heads,
            heads,
            View::from(&y),
            &lse,
            &rows,
            dims,
            &mut scratch,
        );
    });

    elementwise_kernels_allocate_nothing(&pool);
}

/// Mixed types, so that every buffer for 16-bit numbers is used.
fn elementwise_kernels_allocate_nothing(pool: &Pool) {
    let [x, w, norm_w] = [vec![0.5; N * C], vec![0.25; V * C], vec![1.0; C]];
    let bf16s = vec![bf16::ONE; N * C];
    let [x, w, norm_w, x16] =
        [View::F32(&x), View::F32(&w), View::F32(&norm_w), View::Bf16(&bf16s)];
    let (mut y, mut z, mut dtable) =
        (vec![f16::ZERO; N * C], vec![0.0f32; N * C], vec![0.0; V * C]);
    let [mut dw, mut db] = [const { [0.0; C] }; 2];
    let targets: Vec<i32> = (0..N as i32).map(|i| i % V as i32).collect();

    let mut scratch = vec![0.0; layer_norm_backward_scratch_elems(N, 3)];
    quiet("norm", || {
        let (mut y, b) = (ViewMut::F16(&mut y), Some(norm_w));
        layer_norm_forward(pool, y.reborrow(), x16, norm_w, b, 1e-5, C);
        rms_norm_forward(pool, y.reborrow(), x, norm_w, 1e-5, 0.0, C);
        let (dx, db) = (y.reborrow(), Some(&mut db[..]));
        layer_norm_backward(pool, dx, &mut dw, db, x, x16, norm_w, 1e-5, C, &mut scratch);
        rms_norm_backward(pool, y, &mut dw, x, x16, norm_w, 1e-5, 1.0, C, &mut scratch);
    });

    quiet("activation", || {
        let mut y = ViewMut::F16(&mut y);
        gelu_forward(pool, InOut::InPlace(y.reborrow()), GeluKind::Tanh);
        gelu_backward(pool, InOut::separate(y.reborrow(), x), x16, GeluKind::Erf);
        let gate = Gate::Silu;
        glu_forward(pool, InOut::separate(y.reborrow(), x16), x, gate);
        let (wide, half) = (ViewMut::F32(&mut z), N * C / 2);
        glu_packed_backward(pool, wide, x16.slice(0..half), x, C / 2, gate);
        glu_packed_forward(pool, y.reborrow().slice(0..half), x16, C / 2, gate);
        glu_backward(pool, InOut::InPlace(y), InOut::in_place(&mut z), x16, gate);
    });

    let key = PhiloxKey { seed: 1, step: 1, site: 1 };
    let freqs = [1.0; C / 4];
    let mut keys = vec![0; embed_scatter_scratch_u64(N)];
    quiet("elementwise, rope and embed", || {
        let mut y = ViewMut::F16(&mut y);
        elementwise::add(pool, InOut::InPlace(y.reborrow()), x16);
        elementwise::scale(pool, InOut::InPlace(y.reborrow()), 2.0);
        elementwise::copy(pool, y.reborrow(), x16);
        elementwise::zero(pool, y.reborrow());
        elementwise::bias_grad(pool, &mut db, x16, C);
        elementwise::dropout(pool, InOut::InPlace(y.reborrow()), C, 0.5, key, 0);
        rope(pool, InOut::InPlace(y.reborrow()), &targets, &freqs, 1.0, 2, C / 2, false);
        embed_forward(pool, y, &targets, w, C);
        embed_scatter(pool, &mut dtable, &targets, x16, C, &mut keys);
    });
    optimizers_allocate_nothing(pool);
}

fn optimizers_allocate_nothing(pool: &Pool) {
    let (x, mut y) = (vec![0.5; N * C], vec![0.0; N * C]);
    let (mut hi, mut lo) = (vec![bf16::ONE; N * C], vec![0; N * C]);
    let (mut m, mut v) = (vec![0.0; N * C], vec![0.0; N * C]);
    let mut sums = vec![0.0; sum_squares_scratch_f64(N * C)];
    let hyper = AdamwHyper::default();
    quiet("optim", || {
        adamw(pool, MasterMut::F32(&mut y), &x, &mut m, &mut v, &hyper);
        let split = MasterMut::Split { hi: &mut hi, lo: &mut lo };
        sgd(pool, split, &x, 0.1, 0.0, 1.0);
        assert!(sum_squares(pool, &x, &mut sums) > 0.0);
        assert!(!any_nonfinite(pool, View::Bf16(&hi)));
    });
}

//! Measures the kernels: GFLOP/s per shape beside the machine's register-only peak, same run.
//!
//! `cargo run --release -p ounce-kernels --example kernel_bench -- [n_threads] [filter] [tier]
//! [--json]`
#![expect(clippy::print_stdout, reason = "a measurement prints its table")]

use half::bf16;
use ounce_kernels::activation::{GeluKind, gelu_backward, gelu_forward};
use ounce_kernels::attention::{
    AttentionDims, HeadsMut, HeadsRef, RowSpan, attention_backward,
    attention_backward_scratch_elems, attention_forward, attention_forward_scratch_elems,
};
use ounce_kernels::convert::round_bf16;
use ounce_kernels::elementwise;
use ounce_kernels::gemm::{MatMut, MatRef, Start, gemm, gemm_scratch_elems};
use ounce_kernels::head::{head_forward, head_scratch_elems, head_train};
use ounce_kernels::inout::InOut;
use ounce_kernels::master::MasterMut;
use ounce_kernels::norm::{layer_norm_backward, layer_norm_forward};
use ounce_kernels::optim::{AdamwHyper, adamw, sum_squares, sum_squares_scratch_f64};
use ounce_kernels::peak::{Unit, multiply_adds};
use ounce_kernels::philox::PhiloxKey;
use ounce_kernels::pool::Pool;
use ounce_kernels::rope::rope;
use ounce_kernels::tier::{Tier, set_tier, tier};
use ounce_kernels::view::{FloatType, View, ViewMut};
use std::cell::Cell;
use std::time::{Duration, Instant};

/// What one process measures with.
struct Bench {
    pool: Pool,
    filter: String,
    json: bool,
    /// What a copy between two large buffers reads and writes, GB/s.
    copy_rate: Cell<f64>,
}

fn main() {
    let (flags, args): (Vec<String>, Vec<String>) =
        std::env::args().skip(1).partition(|arg| arg.starts_with("--"));
    let mut args = args.into_iter();
    let n_threads = args.next().and_then(|a| a.parse().ok()).unwrap_or(2);
    let filter = args.next().unwrap_or_default();
    if let Some(name) = args.next() {
        let known = Tier::available().find(|tier| tier.to_string() == name);
        set_tier(Some(known.expect("the third argument is a tier of this machine")));
    }
    let json = flags.iter().any(|flag| flag == "--json");
    let pool = Pool::new(n_threads);
    let bench = Bench { pool, filter, json, copy_rate: Cell::new(f64::NAN) };
    bench.peaks();
    for model in [&GPT2, &SMOLLM2_135M] {
        bench.products(model);
    }
    bench.attention();
    bench.head();
    bench.streams();
}

/// A product `y = x W` of a model's layers and how often a step has it.
struct Product {
    name: &'static str,
    n_in: usize,
    n_out: usize,
    count: usize,
}

/// The products of a model's step.
struct Model {
    name: &'static str,
    n_tokens: usize,
    /// Whether weights are stored (in, out), as in GPT-2, instead of (out, in).
    in_out: bool,
    layers: &'static [Product],
    n_vocab: usize,
}

/// Tokens of a chunk of the head.
const HEAD_CHUNK: usize = 512;

const GPT2: Model = Model {
    name: "gpt2 4x1024",
    n_tokens: 4096,
    in_out: true,
    layers: &[
        Product { name: "qkv", n_in: 768, n_out: 2304, count: 12 },
        Product { name: "attn-out", n_in: 768, n_out: 768, count: 12 },
        Product { name: "fc", n_in: 768, n_out: 3072, count: 12 },
        Product { name: "proj", n_in: 3072, n_out: 768, count: 12 },
    ],
    n_vocab: 50257,
};
const SMOLLM2_135M: Model = Model {
    name: "smollm2-135m 4x512",
    n_tokens: 2048,
    in_out: false,
    layers: &[
        Product { name: "q, o", n_in: 576, n_out: 576, count: 60 },
        Product { name: "k, v", n_in: 576, n_out: 192, count: 60 },
        Product { name: "gate, up", n_in: 576, n_out: 1536, count: 60 },
        Product { name: "down", n_in: 1536, n_out: 576, count: 30 },
    ],
    n_vocab: 49152,
};

/// How a product is called.
#[derive(Clone, Copy)]
struct Call {
    /// Rows and columns of C, and the depth.
    m: usize,
    n: usize,
    k: usize,
    /// Which operands are stored transposed.
    a_transposed: bool,
    b_transposed: bool,
    /// Whether C is an f32 sum or logits, whatever the operands are.
    f32_result: bool,
    start: Start,
}

impl Call {
    /// Forward, dX and dW of a product over `n_tokens` tokens.
    fn all(
        n_tokens: usize,
        p: &Product,
        in_out: bool,
        f32_result: bool,
    ) -> [(&'static str, Self); 3] {
        let (a_transposed, f32) = (false, f32_result);
        let (t, i, o) = (n_tokens, p.n_in, p.n_out);
        let (zero, sum) = (Start::Zero, Start::FromC);
        let call = |m, n, k, b_transposed, f32_result| Call {
            m,
            n,
            k,
            a_transposed,
            b_transposed,
            f32_result,
            start: zero,
        };
        let (rows, cols) = if in_out { (i, o) } else { (o, i) };
        let dw = Call { a_transposed: true, start: sum, ..call(rows, cols, t, false, true) };
        [("forward", call(t, o, i, !in_out, f32)), ("dX", call(t, i, o, in_out, false)), ("dW", dw)]
    }

    fn flop(&self) -> f64 {
        2.0 * (self.m * self.n * self.k) as f64
    }
}

/// What a kernel took, in seconds, and the peak measured around it, in FLOP/s.
struct Measured {
    seconds: f64,
    peak: f64,
}

impl Bench {
    /// Seconds of one call: the least of at least 3 within 0.4 s, since others disturb in one
    /// direction only.
    fn seconds(&self, mut f: impl FnMut(&Pool)) -> f64 {
        f(&self.pool);
        let begin = Instant::now();
        let (mut least, mut n) = (f64::INFINITY, 0);
        while n < 3 || begin.elapsed().as_secs_f64() < 0.4 {
            least = least.min(self.seconds_once(&mut f));
            n += 1;
        }
        least
    }

    /// Seconds of this call; on one thread those of the processor, which do not count what others
    /// took of it.
    fn seconds_once(&self, mut f: impl FnMut(&Pool)) -> f64 {
        let (begin, begin_cpu) = (Instant::now(), thread_cpu_time());
        f(&self.pool);
        if let (1, Some(begin), Some(end)) = (self.pool.n_threads(), begin_cpu, thread_cpu_time()) {
            return end.saturating_sub(begin).as_secs_f64();
        }
        begin.elapsed().as_secs_f64()
    }

    /// FLOP/s of a unit on operands that never leave registers, all threads together.
    fn peak_of(&self, unit: Unit) -> f64 {
        const STEPS: usize = 100_000;
        let Some(flop) = multiply_adds(unit, STEPS) else { return f64::NAN };
        let run = |pool: &Pool| {
            pool.run(&|_| {
                multiply_adds(unit, STEPS);
            });
        };
        let least = (0..5).map(|_| self.seconds_once(run)).fold(f64::INFINITY, f64::min);
        flop * self.pool.n_threads() as f64 / least
    }

    fn peaks(&self) {
        let units = [(Unit::F32, "f32 multiply-adds"), (Unit::Bf16Pairs, "bf16 pairs")];
        for (unit, what) in units {
            let rate = self.peak_of(unit);
            if !rate.is_nan() {
                self.line(&format!("registers only: {what}"), None, rate, None, "GFLOP/s");
            }
        }
    }

    /// Prints one result; `of` is the rate that it is a share of.
    fn line(&self, name: &str, seconds: Option<f64>, rate: f64, of: Option<f64>, unit: &str) {
        let (rate, of) = (rate / 1e9, of.map(|of| of / 1e9));
        if self.json {
            let key = if unit == "GB/s" { "gb_per_s" } else { "gflop_per_s" };
            let ms = seconds.map_or(String::new(), |s| format!(", \"ms\": {:.4}", s * 1e3));
            let share = of.map_or(String::new(), |of| format!(", \"share\": {:.4}", rate / of));
            println!("{{\"kernel\": \"{name}\", \"{key}\": {rate:.2}{ms}{share}}}");
            return;
        }
        let ms = seconds.map_or_else(|| " ".repeat(12), |s| format!("{:9.3} ms", s * 1e3));
        let share =
            of.map_or(String::new(), |of| format!(" = {:4.0} % of {of:.0}", 100.0 * rate / of));
        println!("{name:48} {ms} {rate:7.1} {unit}{share}");
    }

    /// A kernel bound by arithmetic: GFLOP/s, and its share of the greatest peak measured before and
    /// after it, because the clock of a shared machine wanders.
    fn compute(&self, name: &str, flop: f64, f: impl FnMut(&Pool)) {
        self.compute_on(name, flop, Unit::F32, f);
    }

    fn compute_on(
        &self,
        name: &str,
        flop: f64,
        unit: Unit,
        f: impl FnMut(&Pool),
    ) -> Option<Measured> {
        if !name.contains(&self.filter) {
            return None;
        }
        let before = self.peak_of(unit);
        let seconds = self.seconds(f);
        let peak = before.max(self.peak_of(unit));
        self.line(name, Some(seconds), flop / seconds, Some(peak), "GFLOP/s");
        Some(Measured { seconds, peak })
    }

    /// A kernel bound by memory: GB/s of what it must read and write.
    fn stream(&self, name: &str, bytes: usize, f: impl FnMut(&Pool)) {
        if !name.contains(&self.filter) {
            return;
        }
        let seconds = self.seconds(f);
        let rate = bytes as f64 / seconds;
        if name == "copy" {
            self.copy_rate.set(rate);
        }
        let copy_rate = Some(self.copy_rate.get()).filter(|rate| !rate.is_nan());
        self.line(name, Some(seconds), rate, copy_rate, "GB/s");
    }

    /// Every product of a model's step, in f32, in bf16, and in bf16 by pairs.
    fn products(&self, model: &Model) {
        let default = tier();
        let mut kinds = vec![("f32", FloatType::F32, default), ("bf16", FloatType::Bf16, default)];
        if Tier::Avx512Bf16.is_available() && default == Tier::Avx512 {
            kinds.push(("bf16 in pairs", FloatType::Bf16, Tier::Avx512Bf16));
        }
        for (kind, float_type, tier) in kinds {
            set_tier(Some(tier));
            let unit = unit_of(float_type);
            let (mut flop, mut seconds, mut possible) = (0.0, 0.0, 0.0);
            let mut add = |p: &Product, calls: [(&str, Call); 3], count: f64| {
                for (pass, call) in calls {
                    let name = format!("gemm {}, {kind}: {} {pass}", model.name, p.name);
                    if let Some(measured) = self.product(&name, call, float_type, unit) {
                        flop += count * call.flop();
                        seconds += count * measured.seconds;
                        possible += count * measured.seconds * measured.peak;
                    }
                }
            };
            for p in model.layers {
                add(p, Call::all(model.n_tokens, p, model.in_out, false), p.count as f64);
            }
            let head = Product {
                name: "head",
                n_in: model.layers[0].n_in,
                n_out: model.n_vocab,
                count: 1,
            };
            let calls = Call::all(HEAD_CHUNK, &head, false, true);
            add(&head, calls, (model.n_tokens / HEAD_CHUNK) as f64);
            if seconds > 0.0 {
                let name = format!("gemm {}, {kind}: all, by FLOP", model.name);
                self.line(
                    &name,
                    Some(seconds),
                    flop / seconds,
                    Some(possible / seconds),
                    "GFLOP/s",
                );
            }
        }
        set_tier(Some(default));
    }

    fn product(
        &self,
        name: &str,
        call: Call,
        float_type: FloatType,
        unit: Unit,
    ) -> Option<Measured> {
        if !name.contains(&self.filter) {
            return None;
        }
        let Call { m, n, k, a_transposed, b_transposed, f32_result, start } = call;
        let c_type = if f32_result { FloatType::F32 } else { float_type };
        let [a, b] = [m * k, k * n].map(|n| Buffer::new(float_type, &filled(n)));
        let (a, b) = (a.view(), b.view());
        let a = if a_transposed { MatRef::new(a, k, m).t() } else { MatRef::new(a, m, k) };
        let b = if b_transposed { MatRef::new(b, n, k).t() } else { MatRef::new(b, k, n) };
        let mut c = Buffer::new(c_type, &zeros(m * n));
        let n_threads = self.pool.n_threads();
        let mut scratch = zeros(gemm_scratch_elems(m, n, k, c_type, n_threads));
        self.compute_on(name, call.flop(), unit, |pool| {
            gemm(pool, MatMut::new(c.view_mut(), m, n), a, b, start, None, &mut scratch);
        })
    }
}

/// A call of attention: `n_rows` rows of `row_len` tokens.
struct Attention {
    name: &'static str,
    row_len: usize,
    n_heads: usize,
    n_kv_heads: usize,
    head_dim: usize,
    n_rows: usize,
}

const ATTENTIONS: [Attention; 4] = [
    Attention {
        name: "T1024 H12 D64",
        row_len: 1024,
        n_heads: 12,
        n_kv_heads: 12,
        head_dim: 64,
        n_rows: 4,
    },
    Attention {
        name: "T512 H9/3 D64",
        row_len: 512,
        n_heads: 9,
        n_kv_heads: 3,
        head_dim: 64,
        n_rows: 4,
    },
    Attention {
        name: "T2048 H32/4 D64",
        row_len: 2048,
        n_heads: 32,
        n_kv_heads: 4,
        head_dim: 64,
        n_rows: 1,
    },
    Attention {
        name: "T64 H4 D32 nano",
        row_len: 64,
        n_heads: 4,
        n_kv_heads: 4,
        head_dim: 32,
        n_rows: 12,
    },
];

impl Bench {
    fn attention(&self) {
        for call in &ATTENTIONS {
            for (kind, float_type) in [("f32", FloatType::F32), ("bf16", FloatType::Bf16)] {
                let name = format!("attention {}, {kind}", call.name);
                if name.contains(&self.filter) {
                    self.attention_of(&name, call, float_type);
                }
            }
        }
    }

    fn attention_of(&self, name: &str, call: &Attention, float_type: FloatType) {
        let Attention { row_len, n_heads, n_kv_heads, head_dim, n_rows, .. } = *call;
        let (scale, window, soft_cap) = (0.125, None, None);
        let dims = AttentionDims { n_heads, n_kv_heads, head_dim, scale, window, soft_cap };
        let rows: Vec<_> =
            (0..n_rows).map(|row| RowSpan { start: row * row_len, len: row_len }).collect();
        let (n, width) = (n_rows * row_len, (n_heads + 2 * n_kv_heads) * head_dim);
        let offsets = [0, n_heads * head_dim, (n_heads + n_kv_heads) * head_dim];
        let widths = [n_heads * head_dim, n_kv_heads * head_dim, n_kv_heads * head_dim];
        let [qkv, d_o] =
            [n * width, n * n_heads * head_dim].map(|n| Buffer::new(float_type, &filled(n)));
        let data = qkv.view();
        let [q, k, v] = offsets.map(|col_offset| HeadsRef { data, row_stride: width, col_offset });
        let [mut o, mut dqkv] = [&d_o, &qkv].map(Buffer::clone);
        let mut lse = zeros(n * n_heads);
        let n_threads = self.pool.n_threads();
        let scratch_elems = attention_forward_scratch_elems(dims, n_threads)
            .max(attention_backward_scratch_elems(dims, n, n_threads));
        let mut scratch = zeros(scratch_elems);
        // Pairs of a query and a key it sees; one product is 2 D FLOP for each.
        let pairs = (n_rows * n_heads * row_len * (row_len + 1) / 2) as f64;
        let product = 2.0 * head_dim as f64 * pairs;
        self.compute(&format!("{name} forward"), 2.0 * product, |pool| {
            let o = o.view_mut();
            attention_forward(pool, o, &mut lse, q, k, v, &rows, dims, &mut scratch);
        });
        self.compute(&format!("{name} backward"), 5.0 * product, |pool| {
            let [dq, dk, dv] = HeadsMut::packed(dqkv.view_mut(), width, offsets, widths);
            let (d_o, o) = (d_o.view(), o.view());
            attention_backward(pool, dq, dk, dv, d_o, q, k, v, o, &lse, &rows, dims, &mut scratch);
        });
    }

    /// The head in small and in large chunks: weights are packed, and their gradient is read and
    /// written, once per chunk.
    fn head(&self) {
        for (kind, float_type) in [("f32", FloatType::F32), ("bf16", FloatType::Bf16)] {
            for chunk in [HEAD_CHUNK, 4 * HEAD_CHUNK] {
                let name = format!("head {kind}, chunks of {chunk}");
                if name.contains(&self.filter) {
                    self.head_of(&name, chunk, float_type);
                }
            }
        }
    }

    fn head_of(&self, name: &str, chunk: usize, float_type: FloatType) {
        let (n, v, c) = (4 * HEAD_CHUNK, 50257, 768);
        let [x, w] = [n * c, v * c].map(|n| Buffer::new(float_type, &filled(n)));
        let (mut dx, x, w) = (x.clone(), x.view(), w.view());
        let targets: Vec<i32> = (0..n).map(|i| (i * 37 % v) as i32).collect();
        let (mut loss, mut dw) = (zeros(n), zeros(v * c));
        let mut scratch = zeros(head_scratch_elems(chunk, v, c, float_type, self.pool.n_threads()));
        let product = 2.0 * (n * v * c) as f64;
        let unit = unit_of(float_type);
        self.compute_on(&format!("{name}: forward"), product, unit, |pool| {
            head_forward(pool, &mut loss, x, w, &targets, None, chunk, &mut scratch);
        });
        self.compute_on(&format!("{name}: train"), 3.0 * product, unit, |pool| {
            let (dx, dw) = (dx.view_mut(), Some(&mut dw[..]));
            head_train(pool, &mut loss, dx, dw, x, w, &targets, None, 1e-3, chunk, &mut scratch);
        });
    }

    /// Kernels that pass over memory once, on buffers larger than a cache.
    fn streams(&self) {
        let (n, c) = (8192, 3072);
        let (x, dy, w) = (filled(n * c), filled(n * c), filled(c));
        let mut y = zeros(n * c);
        let bytes = 4 * n * c;
        let [xv, dyv, wv] = [&x, &dy, &w].map(View::from);
        self.stream("copy", 2 * bytes, |pool| elementwise::copy(pool, (&mut y).into(), xv));
        self.stream("add", 3 * bytes, |pool| {
            elementwise::add(pool, InOut::separate(&mut y, &x), dyv);
        });
        for kind in [GeluKind::Tanh, GeluKind::Erf] {
            self.stream(&format!("gelu {kind:?} forward"), 2 * bytes, |pool| {
                gelu_forward(pool, InOut::separate(&mut y, &x), kind);
            });
            self.stream(&format!("gelu {kind:?} backward"), 3 * bytes, |pool| {
                gelu_backward(pool, InOut::separate(&mut y, &dy), xv, kind);
            });
        }
        let key = PhiloxKey { seed: 1, step: 2, site: 3 };
        self.stream("dropout", 2 * bytes, |pool| {
            elementwise::dropout(pool, InOut::separate(&mut y, &x), c, 0.1, key, 0);
        });
        self.stream("layer norm forward", 2 * bytes, |pool| {
            layer_norm_forward(pool, (&mut y).into(), xv, wv, Some(wv), 1e-5, c);
        });
        let (mut dw, mut db, mut stats) = (vec![0.0; c], vec![0.0; c], vec![0.0; 2 * n]);
        self.stream("layer norm backward", 5 * bytes, |pool| {
            let db = Some(&mut db[..]);
            layer_norm_backward(
                pool,
                (&mut y).into(),
                &mut dw,
                db,
                dyv,
                xv,
                wv,
                1e-5,
                c,
                &mut stats,
            );
        });
        self.stream("bias grad", bytes, |pool| elementwise::bias_grad(pool, &mut db, dyv, c));
        let positions: Vec<i32> = (0..n as i32).collect();
        let freqs: Vec<f32> = (0..32).map(|i| 0.75f32.powi(i)).collect();
        self.stream("rope", 2 * bytes, |pool| {
            rope(pool, InOut::separate(&mut y, &x), &positions, &freqs, 1.0, c / 64, 64, false);
        });
        let (mut m, mut v) = (zeros(n * c), zeros(n * c));
        let hyper = AdamwHyper::default();
        self.stream("adamw", 7 * bytes, |pool| {
            adamw(pool, MasterMut::F32(&mut y), &x, &mut m, &mut v, &hyper);
        });
        let mut sums = vec![0.0; sum_squares_scratch_f64(n * c)];
        self.stream("sum of squares", bytes, |pool| {
            std::hint::black_box(sum_squares(pool, &x, &mut sums));
        });
    }
}

/// What products of such operands run on in the tier in use.
fn unit_of(float_type: FloatType) -> Unit {
    let is_pairs = tier() == Tier::Avx512Bf16 && float_type == FloatType::Bf16;
    if is_pairs { Unit::Bf16Pairs } else { Unit::F32 }
}

/// Numbers in f32 or bf16.
enum Buffer {
    F32(Vec<f32>),
    Bf16(Vec<bf16>),
}

impl Clone for Buffer {
    fn clone(&self) -> Self {
        match self {
            Buffer::F32(x) => Buffer::F32(on_large_pages(x.len(), x.iter().copied())),
            Buffer::Bf16(x) => Buffer::Bf16(on_large_pages(x.len(), x.iter().copied())),
        }
    }
}

impl Buffer {
    /// `x` as f32 or else, rounded, as bf16.
    fn new(float_type: FloatType, x: &[f32]) -> Self {
        match float_type {
            FloatType::F32 => Buffer::F32(on_large_pages(x.len(), x.iter().copied())),
            _ => Buffer::Bf16(on_large_pages(x.len(), x.iter().map(|&x| round_bf16(x)))),
        }
    }

    fn view(&self) -> View<'_> {
        match self {
            Buffer::F32(x) => View::F32(x),
            Buffer::Bf16(x) => View::Bf16(x),
        }
    }

    fn view_mut(&mut self) -> ViewMut<'_> {
        match self {
            Buffer::F32(x) => ViewMut::F32(x),
            Buffer::Bf16(x) => ViewMut::Bf16(x),
        }
    }
}

/// What Linux has accounted to this thread.
fn thread_cpu_time() -> Option<Duration> {
    // It accounts when it schedules.
    std::thread::yield_now();
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").ok()?;
    Some(Duration::from_nanos(text.split(' ').next()?.parse().ok()?))
}

/// Small varied numbers, no subnormals.
fn filled(n: usize) -> Vec<f32> {
    on_large_pages(n, (0..n).map(|i| ((i * 7919) % 1013) as f32 / 1013.0 - 0.5))
}

fn zeros(n: usize) -> Vec<f32> {
    on_large_pages(n, std::iter::repeat_n(0.0, n))
}

/// `n` elements on large pages, as those of a step are: strided operands touch a page per row, and
/// on small ones waiting for their addresses would be measured too.
fn on_large_pages<T>(n: usize, elems: impl Iterator<Item = T>) -> Vec<T> {
    let mut x: Vec<T> = Vec::with_capacity(n);
    #[cfg(target_os = "linux")]
    {
        const PAGE_BYTES: usize = 4096;
        let first: *mut u8 = x.as_mut_ptr().cast();
        let skip = first.align_offset(PAGE_BYTES);
        let bytes = (n * size_of::<T>()).saturating_sub(skip);
        let first_page = first.wrapping_add(skip).cast();
        // SAFETY: the advice changes no contents, and may be refused.
        unsafe { libc::madvise(first_page, bytes, libc::MADV_HUGEPAGE) };
    }
    x.extend(elems);
    x
}

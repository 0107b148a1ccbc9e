//! Measures the kernels: GFLOP/s per shape beside the machine's register-only peak, same run.
//!
//! `cargo run --release -p ounce-kernels --example kernel_bench -- [n_threads] [filter] [tier]`
#![expect(clippy::print_stdout, reason = "a measurement prints its table")]

use ounce_kernels::activation::{GeluKind, gelu_backward, gelu_forward};
use ounce_kernels::attention::{
    AttentionDims, HeadsMut, HeadsRef, RowSpan, attention_backward,
    attention_backward_scratch_elems, attention_forward, attention_forward_scratch_elems,
};
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
use ounce_kernels::view::{FloatType, View};
use std::time::{Duration, Instant};

/// What one process measures with.
struct Bench {
    pool: Pool,
    filter: String,
}

fn main() {
    let mut args = std::env::args().skip(1);
    let n_threads = args.next().and_then(|a| a.parse().ok()).unwrap_or(2);
    let filter = args.next().unwrap_or_default();
    if let Some(name) = args.next() {
        let known = Tier::available().find(|tier| tier.to_string() == name);
        set_tier(Some(known.expect("the third argument is a tier of this machine")));
    }
    let pool = Pool::new(n_threads);
    let bench = Bench { pool, filter };
    println!("tier {}, {n_threads} threads, peak {:.0} GFLOP/s", tier(), bench.peak());
    bench.products();
    bench.attention();
    bench.head();
    bench.streams();
}

impl Bench {
    /// Seconds of one call: the median of at least 3 within 0.4 s. On one thread it is the mean
    /// of processor time, which other processes disturb less but Linux counts coarsely.
    fn seconds(&self, mut f: impl FnMut(&Pool)) -> f64 {
        f(&self.pool);
        let (begin, begin_cpu) = (Instant::now(), thread_cpu_time());
        let mut times = Vec::new();
        while times.len() < 3 || begin.elapsed().as_secs_f64() < 0.4 {
            let start = Instant::now();
            f(&self.pool);
            times.push(start.elapsed().as_secs_f64());
        }
        if let (1, Some(begin), Some(end)) = (self.pool.n_threads(), begin_cpu, thread_cpu_time()) {
            return end.saturating_sub(begin).as_secs_f64() / times.len() as f64;
        }
        times.sort_by(f64::total_cmp);
        times[times.len() / 2]
    }

    /// GFLOP/s of fused multiply-adds that never leave registers, all threads together.
    fn peak(&self) -> f64 {
        const STEPS: usize = 1_000_000;
        let Some(flop) = multiply_adds(Unit::F32, STEPS) else { return f64::NAN };
        let seconds = self.seconds(|pool| {
            pool.run(&|_| {
                multiply_adds(Unit::F32, STEPS);
            });
        });
        flop * self.pool.n_threads() as f64 / seconds / 1e9
    }

    /// A kernel bound by arithmetic: GFLOP/s, and its share of the peak measured just before and
    /// after it, because the clock of a shared machine wanders.
    fn compute(&self, name: &str, flop: f64, f: impl FnMut(&Pool)) {
        if !name.contains(&self.filter) {
            return;
        }
        let before = self.peak();
        let seconds = self.seconds(f);
        let peak = f64::midpoint(before, self.peak());
        let rate = flop / seconds / 1e9;
        let (ms, percent) = (seconds * 1e3, 100.0 * rate / peak);
        println!("{name:28} {ms:9.3} ms {rate:7.1} GFLOP/s = {percent:4.0} % of {peak:.0}");
    }

    /// A kernel bound by memory: GB/s of what it must read and write.
    fn stream(&self, name: &str, bytes: usize, f: impl FnMut(&Pool)) {
        if !name.contains(&self.filter) {
            return;
        }
        let seconds = self.seconds(f);
        println!("{name:28} {:9.3} ms {:7.1} GB/s", seconds * 1e3, bytes as f64 / seconds / 1e9);
    }

    fn products(&self) {
        let layers = [
            ("qkv", 4096, 2304, 768),
            ("fc", 4096, 3072, 768),
            ("proj", 4096, 768, 3072),
            ("attn-out", 4096, 768, 768),
            ("nano-qkv", 768, 384, 128),
            ("nano-fc", 768, 512, 128),
        ];
        for (name, m, n, k) in layers {
            self.product(&format!("gemm {name} NT forward"), m, n, k, "NT", Start::Zero);
            self.product(&format!("gemm {name} NN dx"), m, k, n, "NN", Start::Zero);
            self.product(&format!("gemm {name} TN dw"), n, k, m, "TN", Start::FromC);
        }
        for chunk in [512, 1024] {
            self.product(&format!("gemm head {chunk} NT"), chunk, 50257, 768, "NT", Start::Zero);
            self.product(&format!("gemm head {chunk} NN dx"), chunk, 768, 50257, "NN", Start::Zero);
            self.product(
                &format!("gemm head {chunk} TN dw"),
                50257,
                768,
                chunk,
                "TN",
                Start::FromC,
            );
        }
    }

    fn product(&self, name: &str, m: usize, n: usize, k: usize, layout: &str, start: Start) {
        if !name.contains(&self.filter) {
            return;
        }
        let (a, b) = (filled(m * k), filled(k * n));
        let mut c = vec![0.0; m * n];
        let mut scratch =
            vec![0.0; gemm_scratch_elems(m, n, k, FloatType::F32, self.pool.n_threads())];
        let a =
            if layout.starts_with('N') { MatRef::new(&a, m, k) } else { MatRef::new(&a, k, m).t() };
        let b =
            if layout.ends_with('N') { MatRef::new(&b, k, n) } else { MatRef::new(&b, n, k).t() };
        self.compute(name, 2.0 * (m * n * k) as f64, |pool| {
            gemm(pool, MatMut::new(&mut c, m, n), a, b, start, None, &mut scratch);
        });
    }
}

impl Bench {
    fn attention(&self) {
        for (name, t, n_heads, n_kv_heads, head_dim, n_rows) in [
            ("attn T1024 H12 D64", 1024, 12, 12, 64, 4),
            ("attn T2048 H32/4 D64", 2048, 32, 4, 64, 1),
            ("attn T64 H4 D32 nano", 64, 4, 4, 32, 12),
        ] {
            if !name.contains(&self.filter) {
                continue;
            }
            let dims = AttentionDims {
                n_heads,
                n_kv_heads,
                head_dim,
                scale: 0.125,
                window: None,
                soft_cap: None,
            };
            let rows: Vec<_> = (0..n_rows).map(|row| RowSpan { start: row * t, len: t }).collect();
            let (n, width) = (n_rows * t, (n_heads + 2 * n_kv_heads) * head_dim);
            let offsets = [0, n_heads * head_dim, (n_heads + n_kv_heads) * head_dim];
            let widths = [n_heads * head_dim, n_kv_heads * head_dim, n_kv_heads * head_dim];
            let (qkv, d_o) = (filled(n * width), filled(n * n_heads * head_dim));
            let [q, k, v] =
                offsets.map(|col_offset| HeadsRef { data: &qkv, row_stride: width, col_offset });
            let (mut o, mut lse) = (vec![0.0; n * n_heads * head_dim], vec![0.0; n * n_heads]);
            let mut dqkv = vec![0.0; n * width];
            let n_threads = self.pool.n_threads();
            let mut scratch = vec![
                0.0;
                attention_forward_scratch_elems(dims, n_threads)
                    .max(attention_backward_scratch_elems(dims, n_threads))
            ];
            // Pairs of a query and a key it sees; one product is 2 D FLOP for each.
            let pairs = (n_rows * n_heads * t * (t + 1) / 2) as f64;
            let product = 2.0 * head_dim as f64 * pairs;
            self.compute(&format!("{name} forward"), 2.0 * product, |pool| {
                attention_forward(pool, &mut o, &mut lse, q, k, v, &rows, dims, &mut scratch);
            });
            self.compute(&format!("{name} backward"), 5.0 * product, |pool| {
                let [dq, dk, dv] = HeadsMut::packed(&mut dqkv, width, offsets, widths);
                attention_backward(
                    pool,
                    dq,
                    dk,
                    dv,
                    &d_o,
                    q,
                    k,
                    v,
                    &o,
                    &lse,
                    &rows,
                    dims,
                    &mut scratch,
                );
            });
        }
    }

    fn head(&self) {
        let (n, v, c, chunk) = (1024, 50257, 768, 512);
        if !"head train forward".contains(&self.filter) {
            return;
        }
        let (x, w) = (filled(n * c), filled(v * c));
        let targets: Vec<i32> = (0..n).map(|i| (i * 37 % v) as i32).collect();
        let (mut loss, mut dx, mut dw) = (vec![0.0; n], vec![0.0; n * c], vec![0.0; v * c]);
        let mut scratch =
            vec![0.0; head_scratch_elems(chunk, v, c, FloatType::F32, self.pool.n_threads())];
        let product = 2.0 * (n * v * c) as f64;
        let (x, w) = (View::from(&x), View::from(&w));
        self.compute("head forward", product, |pool| {
            head_forward(pool, &mut loss, x, w, &targets, None, chunk, &mut scratch);
        });
        self.compute("head train", 3.0 * product, |pool| {
            let dw = Some(&mut dw[..]);
            let dx = (&mut dx).into();
            head_train(pool, &mut loss, dx, dw, x, w, &targets, None, 1e-3, chunk, &mut scratch);
        });
    }

    /// Kernels that pass over memory once, on buffers larger than a cache.
    fn streams(&self) {
        let (n, c) = (8192, 3072);
        let (x, dy, w) = (filled(n * c), filled(n * c), filled(c));
        let mut y = vec![0.0; n * c];
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
        let (mut m, mut v) = (vec![0.0; n * c], vec![0.0; n * c]);
        let hyper = AdamwHyper {
            lr: 1e-4,
            beta1: 0.9,
            beta2: 0.95,
            eps: 1e-8,
            weight_decay: 0.1,
            bias_correction1: 0.1,
            bias_correction2: 0.05,
            grad_scale: 1.0,
        };
        self.stream("adamw", 7 * bytes, |pool| {
            adamw(pool, MasterMut::F32(&mut y), &x, &mut m, &mut v, &hyper);
        });
        let mut sums = vec![0.0; sum_squares_scratch_f64(n * c)];
        self.stream("sum of squares", bytes, |pool| {
            std::hint::black_box(sum_squares(pool, &x, &mut sums));
        });
    }
}

/// What Linux has accounted to this thread.
fn thread_cpu_time() -> Option<Duration> {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").ok()?;
    Some(Duration::from_nanos(text.split(' ').next()?.parse().ok()?))
}

/// Small varied numbers, no subnormals.
fn filled(n: usize) -> Vec<f32> {
    (0..n).map(|i| ((i * 7919) % 1013) as f32 / 1013.0 - 0.5).collect()
}

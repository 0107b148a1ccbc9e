//! Every op's definition, in f64, on slices: the specification that kernels are compared with.
//!
//! The plainest loops that say what is meant. Shapes: N tokens, C channels, K and M the widths of a
//! linear layer, V vocabulary, H heads, D head dim. Matrices are row-major; the number of tokens
//! follows from the length of a slice. Forward ops return their output; gradient ops return the
//! gradients of their inputs and add to sums. Gradients are of the mean loss, as `dy` brings it.

use std::borrow::Cow;
use std::ops::Range;

use ounce_ir::{AttentionSpec, Gate, GeluKind, WeightLayout};

/// `table[idx]` (N, C), a zero row for a negative index.
pub fn embed(idx: &[i32], table: &[f64], n_channels: usize) -> Vec<f64> {
    let mut y = vec![0.0; idx.len() * n_channels];
    for (&i, y) in idx.iter().zip(y.chunks_mut(n_channels)) {
        if let Ok(i) = usize::try_from(i) {
            y.copy_from_slice(&table[i * n_channels..(i + 1) * n_channels]);
        }
    }
    y
}

/// Adds row n of `rows` (N, C) to row `idx[n]` of `dw` (V, C); negative indices are skipped.
pub fn embed_scatter(dw: &mut [f64], idx: &[i32], rows: &[f64], n_channels: usize) {
    for (&i, row) in idx.iter().zip(rows.chunks(n_channels)) {
        if let Ok(i) = usize::try_from(i) {
            add_to(&mut dw[i * n_channels..(i + 1) * n_channels], row);
        }
    }
}

/// A linear layer's weight: M outputs from K inputs.
#[derive(Debug, Clone, Copy)]
pub struct Weight<'a> {
    /// Elements in the order of `layout`.
    pub data: &'a [f64],
    /// K.
    pub n_in: usize,
    /// M.
    pub n_out: usize,
    /// `[M, K]` or `[K, M]`.
    pub layout: WeightLayout,
}

impl Weight<'_> {
    /// The elements in the order of `layout`.
    fn laid_out(&self, layout: WeightLayout) -> Cow<'_, [f64]> {
        let (n_rows, n_columns) = match self.layout {
            WeightLayout::OutIn => (self.n_out, self.n_in),
            WeightLayout::InOut => (self.n_in, self.n_out),
        };
        if layout == self.layout {
            return Cow::Borrowed(self.data);
        }
        let column = |c| (0..n_rows).map(move |r| self.data[r * n_columns + c]);
        Cow::Owned((0..n_columns).flat_map(column).collect())
    }
}

/// `y[n, m] = sum over k of x[n, k] w[m, k], + b[m]`.
pub fn linear(x: &[f64], w: Weight<'_>, b: Option<&[f64]>) -> Vec<f64> {
    let bias = b.map_or(vec![0.0; w.n_out], <[f64]>::to_vec);
    let mut y = bias.repeat(x.len() / w.n_in);
    add_product(&mut y, x, &w.laid_out(WeightLayout::InOut), w.n_in, w.n_out);
    y
}

/// `dx[n, k] = sum over m of dy[n, m] w[m, k]`.
pub fn linear_grad_input(dy: &[f64], w: Weight<'_>) -> Vec<f64> {
    let mut dx = vec![0.0; dy.len() / w.n_out * w.n_in];
    add_product(&mut dx, dy, &w.laid_out(WeightLayout::OutIn), w.n_out, w.n_in);
    dx
}

/// Adds `a` (N, `n_inner`) times `b` (`n_inner`, `n_columns`) to `c`.
fn add_product(c: &mut [f64], a: &[f64], b: &[f64], n_inner: usize, n_columns: usize) {
    for (c, a) in c.chunks_mut(n_columns).zip(a.chunks(n_inner)) {
        for (a, b) in a.iter().zip(b.chunks(n_columns)) {
            add_scaled(c, *a, b);
        }
    }
}

/// `dw[m, k] += sum over n of dy[n, m] x[n, k]`; `x` (N, `n_in`), `dy` (N, `n_out`).
pub fn linear_grad_weight(
    dw: &mut [f64],
    x: &[f64],
    dy: &[f64],
    n_in: usize,
    n_out: usize,
    layout: WeightLayout,
) {
    for (x, dy) in x.chunks(n_in).zip(dy.chunks(n_out)) {
        let (rows, columns) = match layout {
            WeightLayout::OutIn => (dy, x),
            WeightLayout::InOut => (x, dy),
        };
        for (dw, row) in dw.chunks_mut(columns.len()).zip(rows) {
            add_scaled(dw, *row, columns);
        }
    }
}

/// `db[m] += sum over n of dy[n, m]`.
pub fn bias_grad(db: &mut [f64], dy: &[f64]) {
    for dy in dy.chunks(db.len()) {
        add_to(db, dy);
    }
}

/// `y = (x - mean) / sqrt(var + eps) * w + b` over the last dimension; the variance is biased.
pub fn layer_norm(x: &[f64], w: &[f64], b: Option<&[f64]>, eps: f64) -> Vec<f64> {
    let normalized = x.chunks(w.len()).flat_map(|x| standardize(x, eps).0);
    let channel = |i: usize| i % w.len();
    normalized
        .enumerate()
        .map(|(i, x)| x * w[channel(i)] + b.map_or(0.0, |b| b[channel(i)]))
        .collect()
}

/// `(x - mean) / sqrt(var + eps)` of one token, and `1 / sqrt(var + eps)`.
fn standardize(x: &[f64], eps: f64) -> (Vec<f64>, f64) {
    let mean = mean(x.iter().copied());
    let variance = self::mean(x.iter().map(|x| (x - mean).powi(2)));
    let r = 1.0 / (variance + eps).sqrt();
    (x.iter().map(|x| (x - mean) * r).collect(), r)
}

/// `dx = r (g - mean(g) - z mean(g z))` with `z` the standardized input, `r` the reciprocal
/// deviation and `g = dy w`; adds `dy z` to `dw` and `dy` to `db`.
pub fn layer_norm_grad(
    x: &[f64],
    dy: &[f64],
    w: &[f64],
    eps: f64,
    mut dw: Option<&mut [f64]>,
    mut db: Option<&mut [f64]>,
) -> Vec<f64> {
    let mut dx = Vec::new();
    for (x, dy) in x.chunks(w.len()).zip(dy.chunks(w.len())) {
        let (z, r) = standardize(x, eps);
        if let Some(dw) = dw.as_deref_mut() {
            add_to(dw, &product(dy, &z));
        }
        if let Some(db) = db.as_deref_mut() {
            add_to(db, dy);
        }
        let g = product(dy, w);
        let mean_g = mean(g.iter().copied());
        let mean_gz = mean(product(&g, &z).into_iter());
        dx.extend(g.iter().zip(&z).map(|(g, z)| r * (g - mean_g - z * mean_gz)));
    }
    dx
}

/// `y = x / sqrt(mean(x^2) + eps) * (offset + w)` over groups of as many channels as `w` has.
pub fn rms_norm(x: &[f64], w: &[f64], eps: f64, offset: f64) -> Vec<f64> {
    let groups = x.chunks(w.len());
    let y = groups.flat_map(|x| {
        let r = reciprocal_rms(x, eps);
        x.iter().zip(w).map(move |(x, w)| x * r * (offset + w))
    });
    y.collect()
}

fn reciprocal_rms(x: &[f64], eps: f64) -> f64 {
    1.0 / (mean(x.iter().map(|x| x * x)) + eps).sqrt()
}

/// `dx = r (g - z mean(g z))` with `z = x r`, `r` the reciprocal root mean square and
/// `g = dy (offset + w)`; adds `dy z` to `dw`.
pub fn rms_norm_grad(
    x: &[f64],
    dy: &[f64],
    w: &[f64],
    eps: f64,
    offset: f64,
    mut dw: Option<&mut [f64]>,
) -> Vec<f64> {
    let factor: Vec<f64> = w.iter().map(|w| offset + w).collect();
    let mut dx = Vec::new();
    for (x, dy) in x.chunks(w.len()).zip(dy.chunks(w.len())) {
        let r = reciprocal_rms(x, eps);
        let z: Vec<f64> = x.iter().map(|x| x * r).collect();
        if let Some(dw) = dw.as_deref_mut() {
            add_to(dw, &product(dy, &z));
        }
        let g = product(dy, &factor);
        let mean_gz = mean(product(&g, &z).into_iter());
        dx.extend(g.iter().zip(&z).map(|(g, z)| r * (g - z * mean_gz)));
    }
    dx
}

/// Rotary frequencies and the heads that they turn.
#[derive(Debug, Clone, Copy)]
pub struct Rotation<'a> {
    /// R frequencies, radians per position; 2R elements of every head are turned.
    pub inv_freq: &'a [f32],
    /// Multiplies cosine and sine.
    pub scale: f64,
    /// H, heads that are turned.
    pub n_heads: usize,
    /// D.
    pub head_dim: usize,
    /// Whether to turn back, which is the gradient.
    pub inverse: bool,
}

/// Turns elements `i` and `i + R` of the first heads by `positions[n] * inv_freq[i]`; elements of a
/// head from 2R on and columns behind those heads stay as they are. `x` (N, H D or more).
pub fn rope(x: &[f64], positions: &[i32], rotation: Rotation<'_>) -> Vec<f64> {
    let mut y = x.to_vec();
    let n_pairs = rotation.inv_freq.len();
    for (y, &position) in y.chunks_mut(x.len() / positions.len()).zip(positions) {
        for head in y.chunks_mut(rotation.head_dim).take(rotation.n_heads) {
            for (i, &inv_freq) in rotation.inv_freq.iter().enumerate() {
                let angle = f64::from(position) * f64::from(inv_freq);
                let sign = if rotation.inverse { -1.0 } else { 1.0 };
                let (sin, cos) =
                    (sign * angle.sin() * rotation.scale, angle.cos() * rotation.scale);
                let (a, b) = (head[i], head[i + n_pairs]);
                head[i] = a * cos - b * sin;
                head[i + n_pairs] = b * cos + a * sin;
            }
        }
    }
    y
}

/// Query (N, H D), keys and values (N, Hkv D).
#[derive(Debug, Clone)]
pub struct Qkv {
    /// Queries, or their gradient.
    pub q: Vec<f64>,
    /// Keys, or their gradient.
    pub k: Vec<f64>,
    /// Values, or their gradient.
    pub v: Vec<f64>,
}

impl Qkv {
    /// Takes apart what stands side by side in each token's (H + 2 Hkv) D elements.
    pub fn unpack(qkv: &[f64], spec: &AttentionSpec) -> Self {
        let (q_width, kv_width) = (spec.q_width() as usize, spec.kv_width() as usize);
        let columns = |range: Range<usize>| {
            let tokens = qkv.chunks(q_width + 2 * kv_width);
            tokens.flat_map(|token| token[range.clone()].to_vec()).collect()
        };
        Self {
            q: columns(0..q_width),
            k: columns(q_width..q_width + kv_width),
            v: columns(q_width + kv_width..q_width + 2 * kv_width),
        }
    }

    /// The reverse of [`Qkv::unpack`].
    pub fn pack(&self, spec: &AttentionSpec) -> Vec<f64> {
        let (q_width, kv_width) = (spec.q_width() as usize, spec.kv_width() as usize);
        let kv = self.k.chunks(kv_width).zip(self.v.chunks(kv_width));
        self.q.chunks(q_width).zip(kv).flat_map(|(q, (k, v))| [q, k, v].concat()).collect()
    }
}

/// Where head `head` of token `token` stands in a value of `n_heads` heads side by side.
fn head_at(spec: &AttentionSpec, n_heads: u32, token: usize, head: usize) -> Range<usize> {
    let d = spec.head_dim as usize;
    let start = (token * n_heads as usize + head) * d;
    start..start + d
}

/// All (row, query token, query head) with the key head that the query head reads.
fn queries<'a>(
    rows: &'a [Range<usize>],
    spec: &'a AttentionSpec,
) -> impl Iterator<Item = (&'a Range<usize>, usize, usize, usize)> + 'a {
    let n_heads = spec.n_heads as usize;
    let group = n_heads / spec.n_kv_heads as usize;
    let tokens = rows.iter().flat_map(|row| row.clone().map(move |i| (row, i)));
    tokens.flat_map(move |(row, i)| (0..n_heads).map(move |h| (row, i, h, h / group)))
}

/// Keys that query `i` of a row sees: `window` of them up to itself, within the row.
fn keys(row: &Range<usize>, i: usize, spec: &AttentionSpec) -> Range<usize> {
    let first = spec.window.map_or(0, |window| (i + 1).saturating_sub(window as usize));
    row.start.max(first)..i + 1
}

/// A score and its slope: `s = scale x`, or `cap tanh(scale x / cap)` with the soft cap.
fn score(x: f64, spec: &AttentionSpec) -> (f64, f64) {
    let scale = f64::from(spec.scale);
    let Some(cap) = spec.soft_cap.map(f64::from) else { return (scale * x, scale) };
    let y = soft_cap(scale * x, cap);
    (y, scale * soft_cap_slope(scale * x, cap))
}

/// `o[i] = sum over keys j of softmax(s[i, j]) v[j]` per head, with `s[i, j] = scale q[i] k[j]`,
/// perhaps softly capped, and `lse[i] = log(sum over j of exp(s[i, j]))`. The keys are those of the
/// row from the window's start to `i`. Tokens outside of `rows` get zeros.
///
/// Returns o (N, H D) and lse (N, H).
pub fn attention(qkv: &Qkv, rows: &[Range<usize>], spec: &AttentionSpec) -> (Vec<f64>, Vec<f64>) {
    let n_heads = spec.n_heads as usize;
    let mut o = vec![0.0; qkv.q.len()];
    let mut lse = vec![0.0; qkv.q.len() / spec.head_dim as usize];
    for (row, i, h, kv_head) in queries(rows, spec) {
        let at_q = head_at(spec, spec.n_heads, i, h);
        let at_kv = |j| head_at(spec, spec.n_kv_heads, j, kv_head);
        let keys = keys(row, i, spec);
        let scores: Vec<f64> = keys
            .clone()
            .map(|j| score(dot(&qkv.q[at_q.clone()], &qkv.k[at_kv(j)]), spec).0)
            .collect();
        let sum = log_sum_exp(&scores);
        lse[i * n_heads + h] = sum;
        for (j, score) in keys.zip(scores) {
            let p = (score - sum).exp();
            for (o, v) in o[at_q.clone()].iter_mut().zip(&qkv.v[at_kv(j)]) {
                *o += p * v;
            }
        }
    }
    (o, lse)
}

/// Gradients of [`attention`]. With `p` the softmax: `dv[j] += p d_o[i]`,
/// `ds = p (d_o[i] v[j] - d_o[i] o[i])` times the slope of the score, `dq[i] += ds k[j]`,
/// `dk[j] += ds q[i]`.
pub fn attention_grad(
    qkv: &Qkv,
    o: &[f64],
    lse: &[f64],
    d_o: &[f64],
    rows: &[Range<usize>],
    spec: &AttentionSpec,
) -> Qkv {
    let zeros = |x: &[f64]| vec![0.0; x.len()];
    let mut d = Qkv { q: zeros(&qkv.q), k: zeros(&qkv.k), v: zeros(&qkv.v) };
    for (row, i, h, kv_head) in queries(rows, spec) {
        let at_q = head_at(spec, spec.n_heads, i, h);
        let (q, d_o) = (&qkv.q[at_q.clone()], &d_o[at_q.clone()]);
        let d_o_o = dot(d_o, &o[at_q.clone()]);
        for j in keys(row, i, spec) {
            let at_kv = head_at(spec, spec.n_kv_heads, j, kv_head);
            let (k, v) = (&qkv.k[at_kv.clone()], &qkv.v[at_kv.clone()]);
            let (s, slope) = score(dot(q, k), spec);
            let p = (s - lse[i * spec.n_heads as usize + h]).exp();
            let ds = p * (dot(d_o, v) - d_o_o) * slope;
            add_scaled(&mut d.v[at_kv.clone()], p, d_o);
            add_scaled(&mut d.q[at_q.clone()], ds, k);
            add_scaled(&mut d.k[at_kv], ds, q);
        }
    }
    d
}

/// `x` times the (approximate) probability that a normal variable is below `x`.
pub fn gelu(x: &[f64], kind: GeluKind) -> Vec<f64> {
    x.iter().map(|&x| x * gelu_gate(x, kind)).collect()
}

fn gelu_gate(x: f64, kind: GeluKind) -> f64 {
    match kind {
        GeluKind::Tanh => 0.5 * (1.0 + gelu_angle(x).tanh()),
        GeluKind::Erf => 0.5 * (1.0 + erf(x * std::f64::consts::FRAC_1_SQRT_2)),
    }
}

fn gelu_angle(x: f64) -> f64 {
    (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3))
}

/// `dx = dy (gate(x) + x gate'(x))`.
pub fn gelu_grad(x: &[f64], dy: &[f64], kind: GeluKind) -> Vec<f64> {
    x.iter().zip(dy).map(|(&x, dy)| dy * gelu_slope(x, kind)).collect()
}

fn gelu_slope(x: f64, kind: GeluKind) -> f64 {
    let d_gate = match kind {
        GeluKind::Tanh => {
            let d_angle = (2.0 / std::f64::consts::PI).sqrt() * (1.0 + 3.0 * 0.044715 * x * x);
            0.5 * (1.0 - gelu_angle(x).tanh().powi(2)) * d_angle
        }
        GeluKind::Erf => (-0.5 * x * x).exp() / (2.0 * std::f64::consts::PI).sqrt(),
    };
    gelu_gate(x, kind) + x * d_gate
}

/// The error function, to the last few bits: `2/sqrt(pi) exp(-x^2) sum of 2^n x^(2n+1) / (2n+1)!!`,
/// whose terms all have the sign of `x`, so that nothing cancels.
pub fn erf(x: f64) -> f64 {
    // 1 - erf(6) is 2e-17.
    if x.abs() > 6.0 {
        return x.signum();
    }
    let (mut term, mut sum) = (x, 0.0);
    let mut n = 0.0;
    while sum + term != sum {
        sum += term;
        n += 1.0;
        term *= 2.0 * x * x / (2.0 * n + 1.0);
    }
    std::f64::consts::FRAC_2_SQRT_PI * (-x * x).exp() * sum
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

/// What a gate goes through, and its slope: `silu(x) = x sigmoid(x)`, or GELU.
fn through(x: f64, gate: Gate) -> (f64, f64) {
    match gate {
        Gate::Silu => (x * sigmoid(x), sigmoid(x) * (1.0 + x * (1.0 - sigmoid(x)))),
        Gate::Gelu(kind) => (x * gelu_gate(x, kind), gelu_slope(x, kind)),
    }
}

/// Takes apart gate and up that stand side by side in each token's 2 `width` elements.
pub fn split_glu(x: &[f64], width: usize) -> (Vec<f64>, Vec<f64>) {
    let half = |range: Range<usize>| {
        x.chunks(2 * width).flat_map(|token| token[range.clone()].to_vec()).collect()
    };
    (half(0..width), half(width..2 * width))
}

/// The reverse of [`split_glu`].
pub fn join_glu(gate: &[f64], up: &[f64], width: usize) -> Vec<f64> {
    gate.chunks(width).zip(up.chunks(width)).flat_map(|(g, u)| [g, u].concat()).collect()
}

/// `act(gate) up`.
pub fn glu(gate: &[f64], up: &[f64], kind: Gate) -> Vec<f64> {
    gate.iter().zip(up).map(|(&g, u)| through(g, kind).0 * u).collect()
}

/// `dgate = dy up act'(gate)` and `dup = dy act(gate)`.
pub fn glu_grad(gate: &[f64], up: &[f64], dy: &[f64], kind: Gate) -> (Vec<f64>, Vec<f64>) {
    let (act, slope): (Vec<f64>, Vec<f64>) = gate.iter().map(|&g| through(g, kind)).unzip();
    (product(&product(dy, up), &slope), product(dy, &act))
}

/// `cap tanh(x / cap)`.
fn soft_cap(x: f64, cap: f64) -> f64 {
    cap * (x / cap).tanh()
}

/// `1 - tanh(x / cap)^2`.
fn soft_cap_slope(x: f64, cap: f64) -> f64 {
    1.0 - (x / cap).tanh().powi(2)
}

/// `cap tanh(x / cap)` of every element.
pub fn soft_caps(x: &[f64], cap: f64) -> Vec<f64> {
    x.iter().map(|&x| soft_cap(x, cap)).collect()
}

/// `dx = dy (1 - tanh(x / cap)^2)`.
pub fn soft_caps_grad(x: &[f64], dy: &[f64], cap: f64) -> Vec<f64> {
    x.iter().zip(dy).map(|(&x, dy)| dy * soft_cap_slope(x, cap)).collect()
}

/// `factor x`. Its own gradient.
pub fn scale(x: &[f64], factor: f64) -> Vec<f64> {
    x.iter().map(|x| factor * x).collect()
}

/// `a + b`.
pub fn add(a: &[f64], b: &[f64]) -> Vec<f64> {
    a.iter().zip(b).map(|(a, b)| a + b).collect()
}

/// `x / (1 - p)` where the random word is at least `p 2^32`, else 0. `x` (N, C); `word` gives the
/// word of (token, channel). Its own gradient.
pub fn dropout(
    x: &[f64],
    n_channels: usize,
    p: f64,
    word: impl Fn(usize, usize) -> u32,
) -> Vec<f64> {
    let threshold = p * 2.0_f64.powi(32);
    let kept = |i: usize| f64::from(word(i / n_channels, i % n_channels)) >= threshold.floor();
    x.iter().enumerate().map(|(i, x)| if kept(i) { x / (1.0 - p) } else { 0.0 }).collect()
}

/// Rows `idx` of `x` (N, C).
pub fn take_rows(x: &[f64], idx: &[i32], n_channels: usize) -> Vec<f64> {
    let row = |&i: &i32| x[i as usize * n_channels..][..n_channels].to_vec();
    idx.iter().flat_map(row).collect()
}

/// `x w^T`, softly capped if there is a cap.
fn logits(x: &[f64], w: Weight<'_>, cap: Option<f64>) -> Vec<f64> {
    let logits = linear(x, w, None);
    match cap {
        Some(cap) => soft_caps(&logits, cap),
        None => logits,
    }
}

/// `log(sum(exp(logits))) - logits[target]` per token, with `logits = x w^T`, softly capped if there
/// is a cap; 0 without a target.
///
/// `x` (N, C), `targets` (N), `w` (V, C); returns the losses (N).
pub fn cross_entropy(x: &[f64], targets: &[i32], w: Weight<'_>, cap: Option<f64>) -> Vec<f64> {
    let logits = logits(x, w, cap);
    let loss = |(&target, logits): (&i32, &[f64])| {
        let target = usize::try_from(target).ok()?;
        Some(log_sum_exp(logits) - logits[target])
    };
    targets.iter().zip(logits.chunks(w.n_out)).map(|token| loss(token).unwrap_or(0.0)).collect()
}

/// Losses as [`cross_entropy`] gives them, and the gradients of `grad_scale` times their sum:
/// with `d_logits = grad_scale (softmax - onehot)`, times the slope of the cap, returns
/// `dx = d_logits w` and adds `d_logits^T x` to `dw`.
pub fn cross_entropy_train(
    x: &[f64],
    targets: &[i32],
    w: Weight<'_>,
    grad_scale: f64,
    cap: Option<f64>,
    dw: Option<&mut [f64]>,
) -> (Vec<f64>, Vec<f64>) {
    let mut d_logits = logits(x, w, cap);
    for (&target, logits) in targets.iter().zip(d_logits.chunks_mut(w.n_out)) {
        let Ok(target) = usize::try_from(target) else {
            logits.fill(0.0);
            continue;
        };
        let sum = log_sum_exp(logits);
        for (v, logit) in logits.iter_mut().enumerate() {
            let onehot = if v == target { 1.0 } else { 0.0 };
            // `logit / cap` is the tanh already.
            let slope = cap.map_or(1.0, |cap| 1.0 - (*logit / cap).powi(2));
            *logit = grad_scale * ((*logit - sum).exp() - onehot) * slope;
        }
    }
    if let Some(dw) = dw {
        linear_grad_weight(dw, x, &d_logits, w.n_in, w.n_out, w.layout);
    }
    (cross_entropy(x, targets, w, cap), linear_grad_input(&d_logits, w))
}

/// `sum(g^2)`.
pub fn sum_squares(g: &[f64]) -> f64 {
    g.iter().map(|g| g * g).sum()
}

/// `min(1, max_norm / (norm + 1e-6))`, with `norm` the root of the sum of `parts`: PyTorch's
/// `clip_grad_norm_`. Source: `[Pascanu13]`.
pub fn clip_scale(parts: &[f64], max_norm: f64) -> f64 {
    let norm = parts.iter().sum::<f64>().sqrt();
    (max_norm / (norm + 1e-6)).min(1.0)
}

/// Settings of an update.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Hyper {
    /// Learning rate.
    pub lr: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled decay of the parameters that have `decay` set.
    pub weight_decay: f64,
    /// Bound on the global gradient norm, in graphs with a `clip_scale`.
    pub max_grad_norm: f64,
}

/// AdamW as in `torch.optim.AdamW`, with `step` counted from 1 and `scale` multiplying the gradient:
/// `w -= lr decay w`, then `w -= lr (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)`.
///
/// Source: `[LoshchilovHutter19]`.
pub fn adamw(
    w: &mut [f64],
    m: &mut [f64],
    v: &mut [f64],
    g: &[f64],
    scale: f64,
    step: u64,
    h: &Hyper,
) {
    let t = step as f64;
    let (corrected1, corrected2) = (1.0 - h.beta1.powf(t), 1.0 - h.beta2.powf(t));
    for (((w, m), v), g) in w.iter_mut().zip(m).zip(v).zip(g) {
        let g = g * scale;
        *w -= h.lr * h.weight_decay * *w;
        *m = h.beta1 * *m + (1.0 - h.beta1) * g;
        *v = h.beta2 * *v + (1.0 - h.beta2) * g * g;
        *w -= h.lr * (*m / corrected1) / ((*v / corrected2).sqrt() + h.eps);
    }
}

/// `w -= lr (scale g + decay w)`, as in `torch.optim.SGD` without momentum.
pub fn sgd(w: &mut [f64], g: &[f64], scale: f64, h: &Hyper) {
    for (w, g) in w.iter_mut().zip(g) {
        *w -= h.lr * (scale * g + h.weight_decay * *w);
    }
}

fn mean(x: impl ExactSizeIterator<Item = f64>) -> f64 {
    let n = x.len() as f64;
    x.sum::<f64>() / n
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn product(a: &[f64], b: &[f64]) -> Vec<f64> {
    a.iter().zip(b).map(|(a, b)| a * b).collect()
}

fn add_to(sum: &mut [f64], x: &[f64]) {
    add_scaled(sum, 1.0, x);
}

fn add_scaled(sum: &mut [f64], factor: f64, x: &[f64]) {
    for (sum, x) in sum.iter_mut().zip(x) {
        *sum += factor * x;
    }
}

fn log_sum_exp(x: &[f64]) -> f64 {
    let max = x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    max + x.iter().map(|x| (x - max).exp()).sum::<f64>().ln()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn erf_has_its_published_values() {
        for (x, y) in [
            (0.0, 0.0),
            (0.5, 0.520_499_877_813_046_5),
            (1.0, 0.842_700_792_949_714_9),
            (2.0, 0.995_322_265_018_952_7),
            (3.5, 0.999_999_256_901_627_7),
            (7.0, 1.0),
        ] {
            assert!((erf(x) - y).abs() < 2e-15, "erf({x}) is {}", erf(x));
            assert_eq!(erf(-x), -erf(x));
        }
    }

    #[test]
    fn packing_puts_query_keys_and_values_of_a_token_side_by_side() {
        let spec = AttentionSpec {
            n_heads: 2,
            n_kv_heads: 1,
            head_dim: 1,
            scale: 1.0,
            packed: true,
            window: None,
            soft_cap: None,
        };
        let qkv = Qkv { q: vec![1.0, 2.0, 5.0, 6.0], k: vec![3.0, 7.0], v: vec![4.0, 8.0] };
        let packed = qkv.pack(&spec);
        assert_eq!(packed, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]);
        assert_eq!(Qkv::unpack(&packed, &spec).pack(&spec), packed);
    }

    #[test]
    fn equal_scores_attend_equally_to_the_tokens_before() {
        let spec = AttentionSpec {
            n_heads: 1,
            n_kv_heads: 1,
            head_dim: 1,
            scale: 1.0,
            packed: false,
            window: None,
            soft_cap: None,
        };
        let qkv = Qkv { q: vec![0.0; 4], k: vec![1.0; 4], v: vec![1.0, 3.0, 8.0, 9.0] };
        let (o, lse) = attention(&qkv, std::slice::from_ref(&(0..3)), &spec);
        assert_eq!(o[..2], [1.0, 2.0]);
        assert!((o[2] - 4.0).abs() < 1e-15 && (lse[2] - 3.0_f64.ln()).abs() < 1e-15);
        assert_eq!((o[3], lse[3]), (0.0, 0.0), "a gap");
    }

    #[test]
    fn dropout_keeps_the_mean() {
        let n = 1 << 16;
        let word = |token, channel| crate::philox::word(7, 3, 0, token, channel);
        let y = dropout(&vec![1.0; n], 8, 0.25, word);
        assert!(y.iter().all(|&y| y == 0.0 || y == 1.0 / 0.75));
        assert!((mean(y.into_iter()) - 1.0).abs() < 0.01);
    }

    #[test]
    fn the_clip_scale_bounds_the_norm_and_leaves_small_gradients_alone() {
        assert_eq!(clip_scale(&[0.09, 0.16], 1.0), 1.0);
        assert!((clip_scale(&[9.0, 16.0], 1.0) - 0.2).abs() < 1e-6);
    }
}

//! Elementary functions as branch-free f32 polynomials that the compiler turns into vector code.
//!
//! Idea: range reduction and a short polynomial, every step an explicit `mul_add`, so that all
//! tiers round alike. Coefficients are Chebyshev interpolants computed in exact rational
//! arithmetic; the stated errors are of the polynomial alone, and about 1 ulp of rounding comes on
//! top. Source of the methods: `[CodyWaite80]` (exp); the form
//! `erfc(z) = exp(-z^2) t P(t)`, `t = 1 / (1 + p z)` is that of `[Hastings55]`, here of degree 9.

/// `1.5 * 2^23`: adding it rounds a small f32 to the nearest integer, kept in the low bits.
const ROUND: f32 = 12_582_912.0;
/// High part of ln 2, exact in few bits, so that `n * LN2_HI` is exact.
const LN2_HI: f32 = 0.693_359_4;
/// `ln 2 - LN2_HI`.
const LN2_LO: f32 = -2.121_944_4e-4;

/// `e^x`, about 1 ulp; below -87.33 (subnormal results) it returns 0, NaN stays NaN.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    // Above 88.73 the result is infinite; 100 keeps the exponent arithmetic in range.
    let (p, n) = exp_parts(if x > 100.0 { 100.0 } else { x });
    // 2^n in two halves: 2^128 is no f32, but 2^64 * 2^64 overflows to infinity as it should.
    let half = n >> 1;
    let result = (p + 1.0) * power_of_two(half) * power_of_two(n.wrapping_sub(half));
    if x < -87.33 { 0.0 } else { result }
}

/// A term of a softmax, `e^x` for `x <= 0` (or above it by what rounding leaves), the largest term
/// being 1; NaN stays NaN. The same bits as [`exp`].
///
/// Below e^-50 = 2e-22 it is 0: a million such terms do not reach the last bit of the sum, but
/// multiplied on as they are they become subnormal numbers, which cost a hundred cycles each.
#[inline(always)]
pub(crate) fn softmax_term(x: f32) -> f32 {
    let (p, n) = exp_parts(x);
    let result = (p + 1.0) * power_of_two(n);
    if x < -50.0 { 0.0 } else { result }
}

/// `(p, n)` with `e^x = 2^n (1 + p)` and `|p| < 0.42`.
#[inline(always)]
fn exp_parts(x: f32) -> (f32, i32) {
    let z = x.mul_add(std::f32::consts::LOG2_E, ROUND);
    let n = z - ROUND;
    let r = n.mul_add(-LN2_LO, n.mul_add(-LN2_HI, x));
    // (e^r - 1 - r) / r^2 on |r| <= ln(2)/2, relative error of e^r 1.0e-8.
    let mut q = 0.001_392_621_3;
    q = r.mul_add(q, 0.008_363_203);
    q = r.mul_add(q, 0.041_666_554);
    q = r.mul_add(q, 0.166_665_77);
    q = r.mul_add(q, 0.5);
    ((r * r).mul_add(q, r), (z.to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32))
}

/// `tanh(x)` to full relative precision, also around 0: `(e^2x - 1) / (e^2x + 1)`, where the
/// difference is taken before anything is lost.
#[inline(always)]
pub fn tanh(x: f32) -> f32 {
    // Beyond 10 the result is 1 to the last bit; NaN stays NaN.
    let x = if x > 10.0 { 10.0 } else { x };
    let x = if x < -10.0 { -10.0 } else { x };
    let (p, n) = exp_parts(2.0 * x);
    let power = power_of_two(n);
    let minus_one = power.mul_add(p, power - 1.0);
    minus_one / (minus_one + 2.0)
}

#[inline(always)]
fn power_of_two(n: i32) -> f32 {
    f32::from_bits(((n.wrapping_add(127)) as u32) << 23)
}

/// `1 / (1 + e^-x)` and `1 - ` that, both to full relative precision in their tails.
#[inline(always)]
pub fn sigmoid_pair(x: f32) -> (f32, f32) {
    // Below -80 the sigmoid is under 2e-35; the clamp keeps `e` finite.
    let neg = if -x > 80.0 { 80.0 } else { -x };
    let e = exp(neg);
    let s = 1.0 / (1.0 + e);
    (s, e * s)
}

/// The normal distribution's `(Phi(x), phi(x))`: probability below `x`, and density at `x`.
#[inline(always)]
pub fn normal(x: f32) -> (f32, f32) {
    const P: f32 = 0.35;
    let z = x.abs() * std::f32::consts::FRAC_1_SQRT_2;
    let t = 1.0 / z.mul_add(P, 1.0);
    // erfc(z) exp(z^2) / t for z in [0, 9.6], relative error 9.5e-9.
    let mut q = 0.035_909_217;
    q = t.mul_add(q, -0.145_313_41);
    q = t.mul_add(q, 0.149_211_1);
    q = t.mul_add(q, 0.015_688_16);
    q = t.mul_add(q, 0.050_530_05);
    q = t.mul_add(q, 0.165_894_52);
    q = t.mul_add(q, 0.144_207_8);
    q = t.mul_add(q, 0.189_428_85);
    q = t.mul_add(q, 0.196_949_97);
    q = t.mul_add(q, 0.197_493_77);
    let gauss = exp(-0.5 * x * x);
    let tail = 0.5 * gauss * t * q;
    let below = if x < 0.0 { tail } else { 1.0 - tail };
    (below, gauss * 0.398_942_3)
}

/// `(sin(x), cos(x))`, about 1 ulp of 1, for |x| up to a few million.
///
/// The multiple of pi/2 is taken off in f64, where it is exact enough for any position and
/// frequency; what remains is at most pi/4.
#[inline(always)]
pub fn sin_cos(x: f32) -> (f32, f32) {
    /// `1.5 * 2^52`, as [`ROUND`] in f64.
    const ROUND_F64: f64 = 6_755_399_441_055_744.0;
    let z = f64::from(x).mul_add(std::f64::consts::FRAC_2_PI, ROUND_F64);
    let n = z - ROUND_F64;
    let r = n.mul_add(-std::f64::consts::FRAC_PI_2, f64::from(x)) as f32;
    let u = r * r;
    // (sin(r) - r) / r^3 and (cos(r) - 1 + u / 2) / u^2 in u; relative errors 1.4e-8 and 1.1e-9.
    let s = u.mul_add(u.mul_add(-0.000_195_873_87, 0.008_332_746), -0.166_666_65);
    let c = u.mul_add(u.mul_add(2.454_743_7e-5, -0.001_388_830_1), 0.041_666_664);
    let sin = (u * r).mul_add(s, r);
    let cos = (u * u).mul_add(c, u.mul_add(-0.5, 1.0));
    let quadrant = z.to_bits() as u32;
    let (sin, cos) = if quadrant & 1 == 0 { (sin, cos) } else { (cos, sin) };
    let sin = if quadrant & 2 == 0 { sin } else { -sin };
    let cos = if quadrant.wrapping_add(1) & 2 == 0 { cos } else { -cos };
    (sin, cos)
}

/// Lanes of a sum along a row.
pub(crate) const LANES: usize = 16;

/// The sum of `f` over equally long slices, element by element: fixed lanes and then a fixed tree,
/// so that the order of additions is the same for every vector width.
#[inline(always)]
pub(crate) fn lane_sum<const S: usize>(slices: [&[f32]; S], f: impl Fn([f32; S]) -> f32) -> f32 {
    let mut sums = [0.0; LANES];
    add_to_lanes(&mut sums, slices, f);
    fold_lanes(sums, |a, b| a + b)
}

/// Adds `f` of every element to its lane. Pieces of a row may follow each other if all but the last
/// are a multiple of [`LANES`] long.
#[inline(always)]
pub(crate) fn add_to_lanes<const S: usize>(
    sums: &mut [f32; LANES],
    slices: [&[f32]; S],
    f: impl Fn([f32; S]) -> f32,
) {
    let n = slices[0].len();
    let whole = n - n % LANES;
    for start in (0..whole).step_by(LANES) {
        let blocks = slices.map(|s| &s[start..start + LANES]);
        for (lane, sum) in sums.iter_mut().enumerate() {
            *sum += f(blocks.map(|b| b[lane]));
        }
    }
    for (sum, i) in sums.iter_mut().zip(whole..n) {
        *sum += f(slices.map(|s| s[i]));
    }
}

/// Folds lanes by halves. The black box keeps this tree out of the compiler's sight while it
/// compiles the loop before: seeing it, it gathers lanes by pairs and the loop runs at a third.
#[inline(always)]
pub(crate) fn fold_lanes<T: Copy, const N: usize>(lanes: [T; N], f: impl Fn(T, T) -> T) -> T {
    let mut lanes = std::hint::black_box(lanes);
    let mut width = N / 2;
    while width > 0 {
        for lane in 0..width {
            lanes[lane] = f(lanes[lane], lanes[lane + width]);
        }
        width /= 2;
    }
    lanes[0]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Points over all magnitudes that matter, both signs.
    fn points() -> impl Iterator<Item = f32> {
        (-40_000..40_000).map(|i| i as f32 * 0.0025)
    }

    #[test]
    fn exp_is_within_two_ulp_of_f64_and_right_at_the_ends() {
        for x in points().filter(|x| (-87.3..88.7).contains(x)) {
            let want = f64::from(x).exp();
            let error = (f64::from(exp(x)) - want).abs() / want;
            assert!(error < 2.0 * f64::from(f32::EPSILON), "exp({x}): relative error {error:e}");
        }
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(-100.0), 0.0);
        assert_eq!(exp(89.0), f32::INFINITY);
        assert_eq!(exp(f32::INFINITY), f32::INFINITY);
        assert!(exp(f32::NAN).is_nan());
    }

    #[test]
    fn a_term_of_a_softmax_is_the_exponential_or_nothing() {
        for x in points().filter(|x| (-60.0..1.0).contains(x)) {
            assert_eq!(softmax_term(x), if x < -50.0 { 0.0 } else { exp(x) }, "{x}");
        }
        assert_eq!((softmax_term(0.0), softmax_term(-1e30)), (1.0, 0.0));
        assert_eq!(softmax_term(f32::NEG_INFINITY), 0.0);
        assert!(softmax_term(f32::NAN).is_nan());
    }

    #[test]
    fn sigmoid_keeps_relative_precision_in_both_tails() {
        for x in points().filter(|x| x.abs() < 79.0) {
            let want = 1.0 / (1.0 + (-f64::from(x)).exp());
            let rest = 1.0 / (1.0 + f64::from(x).exp());
            let (s, r) = sigmoid_pair(x);
            assert!((f64::from(s) - want).abs() < 4e-7 * want, "sigmoid({x})");
            assert!((f64::from(r) - rest).abs() < 5e-7 * rest, "1 - sigmoid({x})");
        }
        assert!(sigmoid_pair(f32::NAN).0.is_nan());
    }

    #[test]
    fn tanh_keeps_relative_precision_around_zero() {
        for x in points().chain((1..2000).map(|i| i as f32 * 1e-6)) {
            let want = f64::from(x).tanh();
            assert!((f64::from(tanh(x)) - want).abs() <= 4e-7 * want.abs(), "tanh({x})");
        }
        assert_eq!((tanh(0.0), tanh(1e30), tanh(f32::NEG_INFINITY)), (0.0, 1.0, -1.0));
        assert!(tanh(f32::NAN).is_nan());
    }

    /// Probability below x by Simpson's rule from the mean, in f64.
    fn normal_reference(x: f64) -> f64 {
        let density = |t: f64| (-0.5 * t * t).exp() / (2.0 * std::f64::consts::PI).sqrt();
        let n = 2000;
        let h = x / f64::from(n);
        let inner: f64 =
            (1..n).map(|i| density(f64::from(i) * h) * [2.0, 4.0][i as usize % 2]).sum();
        0.5 + (density(0.0) + inner + density(x)) * h / 3.0
    }

    #[test]
    fn sine_and_cosine_are_within_an_ulp_of_one_at_any_angle() {
        for x in points().chain((0..20_000).map(|i| i as f32 * 97.3)) {
            let (want_sin, want_cos) = f64::from(x).sin_cos();
            let (sin, cos) = sin_cos(x);
            assert!((f64::from(sin) - want_sin).abs() < 1.2e-7, "sin({x}) = {sin}");
            assert!((f64::from(cos) - want_cos).abs() < 1.2e-7, "cos({x}) = {cos}");
        }
        assert_eq!(sin_cos(0.0), (0.0, 1.0));
        assert!(sin_cos(f32::NAN).0.is_nan());
    }

    #[test]
    fn lanes_add_up_to_the_plain_sum() {
        for n in [0, 1, 15, 16, 17, 100] {
            let x: Vec<f32> = (0..n).map(|i| i as f32).collect();
            assert_eq!(lane_sum([&x, &x], |[a, b]| a + b), (n * n) as f32 - n as f32);
        }
    }

    #[test]
    fn the_normal_distribution_agrees_with_numerical_integration() {
        for i in -120..=120 {
            let x = i as f32 * 0.05;
            let (below, density) = normal(x);
            let want = normal_reference(f64::from(x));
            assert!((f64::from(below) - want).abs() < 2e-7, "Phi({x}) = {below}, want {want}");
            let want = (-0.5 * f64::from(x).powi(2)).exp() / (2.0 * std::f64::consts::PI).sqrt();
            assert!((f64::from(density) - want).abs() < 1e-6 * want, "phi({x})");
        }
        assert_eq!(normal(-30.0).0, 0.0);
        assert_eq!(normal(30.0).0, 1.0);
    }
}

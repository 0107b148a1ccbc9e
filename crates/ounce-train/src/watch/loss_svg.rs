//! `loss.svg`: the loss over the steps, as measured, smoothed, and on held-out data.
//!
//! Above 600 points the measured curve is drawn as the span from the smallest to the largest loss of
//! consecutive points, so that a spike stays visible however long the run. The smoothed curve is a
//! local line: around each of at most 600 means of consecutive points a line is fitted to the means
//! within a twenty-fifth of the run to either side, with tricube weights (LOESS, `[Cleveland79]`). Unlike
//! an exponential mean it does not lag behind a falling loss. Points that are not finite are left out.
//! The scale covers all that is shown.

use super::text::{Px, decimal_ticks, put, tick_label};

const WIDTH: f64 = 960.0;
const HEIGHT: f64 = 480.0;
const LEFT: f64 = 64.0;
const RIGHT: f64 = 868.0;
const TOP: f64 = 48.0;
const BOTTOM: f64 = 424.0;
const MAX_POINTS: usize = 600;

/// The curve of `points` and `eval`, both (step, loss) in ascending steps: a complete SVG document.
pub fn loss_svg(points: &[(u64, f64)], eval: &[(u64, f64)]) -> String {
    let finite = |p: &[(u64, f64)]| -> Vec<(f64, f64)> {
        p.iter().filter(|p| p.1.is_finite()).map(|p| (p.0 as f64, p.1)).collect()
    };
    let (points, eval) = (finite(points), finite(eval));
    let smooth = smoothed(&points);
    let scale = Scale::new(&points, &eval);
    let mut out = String::with_capacity(32 * 1024);
    put!(
        out,
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" \
         aria-label=\"loss over steps\" font-family=\"system-ui, -apple-system, 'Segoe UI', Inter, \
         'DejaVu Sans', sans-serif\" font-size=\"12\">\n{STYLE}\
         <rect class=\"ol-ground\" width=\"{WIDTH}\" height=\"{HEIGHT}\"/>\n"
    );
    axes(&mut out, &scale);
    if points.is_empty() && eval.is_empty() {
        put!(
            out,
            "<text class=\"ol-text\" x=\"{}\" y=\"{}\" text-anchor=\"middle\">no steps yet</text>\n",
            Px(f64::midpoint(LEFT, RIGHT)),
            Px(f64::midpoint(TOP, BOTTOM))
        );
    }
    let raw =
        if points.len() > MAX_POINTS { envelope(&points, &scale) } else { line(&points, &scale) };
    put!(out, "<path class=\"ol-raw\" d=\"{raw}\"/>\n<path class=\"ol-halo\" d=\"");
    let curve = line(&smooth, &scale);
    put!(out, "{curve}\"/>\n<path class=\"ol-smooth\" d=\"{curve}\"/>\n");
    let eval = thinned(&eval);
    put!(out, "<path class=\"ol-eval-line\" d=\"{}\"/>\n", line(&eval, &scale));
    for &(step, loss) in &eval {
        put!(
            out,
            "<circle class=\"ol-eval\" cx=\"{}\" cy=\"{}\" r=\"4\"/>\n",
            Px(scale.x(step)),
            Px(scale.y(loss))
        );
    }
    if let Some(&(step, loss)) = smooth.last() {
        let (x, y) = (Px(scale.x(step)), Px(scale.y(loss)));
        put!(out, "<circle class=\"ol-end\" cx=\"{x}\" cy=\"{y}\" r=\"3.5\"/>\n");
    }
    end_labels(&mut out, &scale, smooth.last(), eval.last());
    legend(&mut out, !points.is_empty(), !eval.is_empty());
    out.push_str("</svg>\n");
    out
}

const STYLE: &str = "<style>\
.ol-ground{fill:#fff}.ol-text{fill:#5d636b}.ol-strong{fill:#1b1e23;font-weight:600}\
.ol-grid{stroke:#e7e8ea}.ol-axis{stroke:#b9bdc3}\
.ol-raw{fill:none;stroke:#3f6fa8;stroke-opacity:.45;stroke-linejoin:round}\
.ol-halo{fill:none;stroke:#fff;stroke-opacity:.8;stroke-width:4.5;stroke-linejoin:round}\
.ol-smooth{fill:none;stroke:#2a5d9c;stroke-width:2;stroke-linejoin:round;stroke-linecap:round}\
.ol-end{fill:#2a5d9c;stroke:#fff;stroke-width:1.5}\
.ol-eval-line{fill:none;stroke:#c2571a;stroke-opacity:.7;stroke-dasharray:2 3}\
.ol-eval{fill:#c2571a;stroke:#fff;stroke-width:1.5}\
@media (prefers-color-scheme:dark){\
.ol-ground{fill:#17191d}.ol-text{fill:#9aa1aa}.ol-strong{fill:#eceef0}\
.ol-grid{stroke:#2a2e34}.ol-axis{stroke:#4a5058}\
.ol-raw{stroke:#6fa3dd;stroke-opacity:.45}.ol-halo{stroke:#17191d}.ol-smooth{stroke:#7db3ee}\
.ol-end{fill:#7db3ee;stroke:#17191d}\
.ol-eval-line{stroke:#f0954f}.ol-eval{fill:#f0954f;stroke:#17191d}}\
</style>\n";

/// Linear scales from steps and losses to pixels.
struct Scale {
    steps: (f64, f64),
    losses: (f64, f64),
}

impl Scale {
    fn new(points: &[(f64, f64)], eval: &[(f64, f64)]) -> Self {
        let all = || points.iter().chain(eval);
        let range = |numbers: &mut dyn Iterator<Item = f64>| {
            numbers.fold((f64::INFINITY, f64::NEG_INFINITY), |(lo, hi), x| (lo.min(x), hi.max(x)))
        };
        let steps = range(&mut all().map(|p| p.0));
        let losses = range(&mut all().map(|p| p.1));
        if !(steps.0 <= steps.1 && (losses.1 - losses.0).is_finite()) {
            return Self { steps: (0.0, 1.0), losses: (0.0, 1.0) };
        }
        // A run that begins at its beginning begins at the axis.
        let first = if steps.0 <= 0.05 * steps.1 { 0.0 } else { steps.0 };
        let pad = (0.05 * (losses.1 - losses.0)).max(1e-3 * losses.1.abs()).max(1e-9);
        let low = losses.0 - pad;
        Self {
            steps: (first, steps.1.max(first + 1.0)),
            losses: (if losses.0 >= 0.0 { low.max(0.0) } else { low }, losses.1 + pad),
        }
    }

    fn x(&self, step: f64) -> f64 {
        LEFT + (RIGHT - LEFT) * (step - self.steps.0) / (self.steps.1 - self.steps.0)
    }

    fn y(&self, loss: f64) -> f64 {
        BOTTOM - (BOTTOM - TOP) * (loss - self.losses.0) / (self.losses.1 - self.losses.0)
    }
}

/// A local line through the points, at most [`MAX_POINTS`] of it; begins at the first step and ends
/// at the last.
fn smoothed(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let (Some(first), Some(last)) = (points.first(), points.last()) else { return Vec::new() };
    let mean = |group: &[(f64, f64)]| {
        let sum = group.iter().fold((0.0, 0.0), |s, p| (s.0 + p.0, s.1 + p.1));
        (sum.0 / group.len() as f64, sum.1 / group.len() as f64)
    };
    let means: Vec<_> = points.chunks(points.len().div_ceil(MAX_POINTS)).map(mean).collect();
    let reach = (means.len() / 25).max(1);
    let n = means.len();
    let fit = |i: usize| {
        // The window keeps its width at both ends of the run.
        let lo = i.saturating_sub(reach).min(n.saturating_sub(2 * reach + 1));
        let window = &means[lo..(lo + 2 * reach + 1).min(n)];
        let x = match i {
            0 => first.0,
            i if i + 1 == n => last.0,
            i => means[i].0,
        };
        (x, local_line(window, x))
    };
    (0..n).map(fit).collect()
}

/// The value at `x` of the line fitted to `points` with tricube weights around `x`.
fn local_line(points: &[(f64, f64)], x: f64) -> f64 {
    let farthest = points.iter().map(|p| (p.0 - x).abs()).fold(0.0, f64::max).max(1e-9) * 1.001;
    let (mut w, mut wx, mut wy, mut wxx, mut wxy) = (0.0, 0.0, 0.0, 0.0, 0.0);
    for p in points {
        let d = p.0 - x;
        let weight = (1.0 - (d.abs() / farthest).powi(3)).powi(3);
        w += weight;
        wx += weight * d;
        wy += weight * p.1;
        wxx += weight * d * d;
        wxy += weight * d * p.1;
    }
    let det = w * wxx - wx * wx;
    if det.abs() <= 1e-9 * w * wxx { wy / w } else { (wxx * wy - wx * wxy) / det }
}

/// At most [`MAX_POINTS`] of the points, evenly, with the last one.
fn thinned(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let n = points.len().min(MAX_POINTS);
    (1..=n).map(|i| points[i * points.len() / n - 1]).collect()
}

fn line(points: &[(f64, f64)], scale: &Scale) -> String {
    let mut d = String::new();
    for (i, &(step, loss)) in points.iter().enumerate() {
        let verb = if i == 0 { 'M' } else { 'L' };
        put!(d, "{verb}{} {}", Px(scale.x(step)), Px(scale.y(loss)));
    }
    d
}

/// The lowest and the highest point of each group of consecutive points, in their order.
fn envelope(points: &[(f64, f64)], scale: &Scale) -> String {
    let mut ends = Vec::with_capacity(2 * MAX_POINTS);
    for group in points.chunks(points.len().div_ceil(MAX_POINTS)) {
        let by_loss = |a: &&(f64, f64), b: &&(f64, f64)| a.1.total_cmp(&b.1);
        let mut pair = [group.iter().min_by(by_loss), group.iter().max_by(by_loss)];
        pair.sort_by(|a, b| a.partial_cmp(b).expect("steps are finite"));
        ends.extend(pair.into_iter().flatten());
    }
    line(&ends, scale)
}

fn axes(out: &mut String, scale: &Scale) {
    let y_ticks = decimal_ticks(scale.losses.0, scale.losses.1, 6);
    let step = y_ticks.windows(2).next().map_or(1.0, |w| w[1] - w[0]);
    for y_tick in y_ticks {
        let y = scale.y(y_tick);
        put!(
            out,
            "<path class=\"ol-grid\" d=\"M{} {}H{}\"/><text class=\"ol-text\" x=\"{}\" y=\"{}\" \
             text-anchor=\"end\">{}</text>\n",
            Px(LEFT),
            Px(y.round() + 0.5),
            Px(RIGHT),
            Px(LEFT - 9.0),
            Px(y + 4.0),
            tick_label(y_tick, step)
        );
    }
    put!(out, "<path class=\"ol-axis\" d=\"M{} {}H{}", Px(LEFT), Px(BOTTOM + 0.5), Px(RIGHT));
    let x_ticks: Vec<f64> = decimal_ticks(scale.steps.0, scale.steps.1, 8)
        .into_iter()
        .filter(|x| x.fract() == 0.0)
        .collect();
    for &x in &x_ticks {
        put!(out, "M{} {}v5", Px(scale.x(x)), Px(BOTTOM));
    }
    out.push_str("\"/>\n");
    for x in x_ticks {
        put!(
            out,
            "<text class=\"ol-text\" x=\"{}\" y=\"{}\" text-anchor=\"middle\">{}</text>",
            Px(scale.x(x)),
            Px(BOTTOM + 20.0),
            tick_label(x, 1.0)
        );
    }
    put!(
        out,
        "<text class=\"ol-text\" x=\"{}\" y=\"{}\" text-anchor=\"middle\" \
         font-weight=\"600\">step</text><text class=\"ol-text\" x=\"{}\" y=\"{}\" \
         text-anchor=\"end\" font-weight=\"600\">loss</text>\n",
        Px(f64::midpoint(LEFT, RIGHT)),
        Px(BOTTOM + 42.0),
        Px(LEFT - 9.0),
        Px(TOP - 14.0)
    );
}

/// The last numbers at the right end; pushed apart where they would cover each other.
fn end_labels(
    out: &mut String,
    scale: &Scale,
    train: Option<&(f64, f64)>,
    eval: Option<&(f64, f64)>,
) {
    let apart = 15.0;
    let mut ys = [train, eval].map(|p| p.map(|p| scale.y(p.1) + 4.0));
    if let [Some(a), Some(b)] = &mut ys
        && (*a - *b).abs() < apart
    {
        let (middle, half) = (f64::midpoint(*a, *b), apart / 2.0);
        let sign = if *a <= *b { 1.0 } else { -1.0 };
        (*a, *b) = (middle - sign * half, middle + sign * half);
    }
    for ((point, y), name) in [train, eval].into_iter().zip(ys).zip(["train", "eval"]) {
        if let (Some((_, loss)), Some(y)) = (point, y) {
            put!(
                out,
                "<text x=\"{}\" y=\"{}\"><tspan class=\"ol-strong\">{loss:.3}</tspan> \
                 <tspan class=\"ol-text\" font-size=\"11\">{name}</tspan></text>\n",
                Px(RIGHT + 8.0),
                Px(y)
            );
        }
    }
}

fn legend(out: &mut String, has_points: bool, has_eval: bool) {
    let mut x = LEFT;
    let mut item = |shown: bool, mark: &str, name: &str| {
        if shown {
            put!(
                out,
                "<g transform=\"translate({} 20)\">{mark}<text class=\"ol-text\" x=\"28\" \
                 y=\"4\">{name}</text></g>\n",
                Px(x)
            );
            x += 28.0 + 6.6 * name.len() as f64 + 22.0;
        }
    };
    item(has_points, "<path class=\"ol-raw\" d=\"M0 2l5 -5 5 8 5 -7 7 4\"/>", "training step");
    item(has_points, "<path class=\"ol-smooth\" d=\"M0 0H22\"/>", "smoothed");
    item(has_eval, "<circle class=\"ol-eval\" cx=\"13\" cy=\"0\" r=\"4\"/>", "evaluation");
}

#[cfg(test)]
mod tests {
    use super::super::text::tests::assert_well_formed;
    use super::*;

    fn falling(n: u64) -> Vec<(u64, f64)> {
        let noise = |i: u64| ((i * 2654435761) % 1000) as f64 / 1000.0 - 0.5;
        let loss = |i: u64| 3.0 + 7.0 * (-8.0 * i as f64 / n as f64).exp() + 0.5 * noise(i);
        (1..=n).map(|i| (i, loss(i))).collect()
    }

    #[test]
    fn every_length_of_run_has_a_well_formed_picture() {
        for n in [0, 1, 2, 3, 10, 599, 600, 601, 20_000] {
            let svg = loss_svg(&falling(n), &[(n / 2, 4.0), (n, 3.5)]);
            assert_well_formed(&svg);
            assert!(svg.len() < 64 * 1024, "{} bytes for {n} points", svg.len());
        }
        assert!(loss_svg(&[], &[]).contains("no steps yet"));
        assert!(loss_svg(&falling(1), &[]).contains("<circle class=\"ol-end\""));
        assert_well_formed(&loss_svg(&[(5, 0.0), (6, 0.0)], &[]));
    }

    #[test]
    fn points_that_are_not_finite_are_left_out() {
        let mut points = falling(50);
        points[20].1 = f64::NAN;
        points[30].1 = f64::INFINITY;
        assert_well_formed(&loss_svg(&points, &[(10, f64::NAN)]));
        assert!(loss_svg(&[(1, f64::NAN)], &[]).contains("no steps yet"));
    }

    #[test]
    fn a_straight_line_is_smoothed_to_itself() {
        let points: Vec<_> = (1..=2000).map(|i| (i as f64, 10.0 - 0.001 * i as f64)).collect();
        let smooth = smoothed(&points);
        assert_eq!((smooth[0].0, smooth.last().unwrap().0), (1.0, 2000.0));
        for (x, y) in smooth {
            assert!((y - (10.0 - 0.001 * x)).abs() < 1e-9, "{x} {y}");
        }
    }

    #[test]
    fn smoothing_takes_noise_away_and_does_not_lag() {
        let points: Vec<_> = falling(3000).iter().map(|p| (p.0 as f64, p.1)).collect();
        for (x, y) in smoothed(&points) {
            let truth = 3.0 + 7.0 * (-8.0 * x / 3000.0).exp();
            assert!((y - truth).abs() < 0.15, "{x}: {y} for {truth}");
        }
    }

    #[test]
    fn a_spike_of_one_step_stays_visible_in_a_long_run() {
        let mut points: Vec<_> = (1..=100_000).map(|i| (i as f64, 3.0)).collect();
        points[54_321].1 = 9.0;
        let scale = Scale::new(&points, &[]);
        let top = format!(" {}", Px(scale.y(9.0)));
        assert!(envelope(&points, &scale).contains(&top));
    }

    #[test]
    fn the_last_numbers_stand_at_the_end_without_covering_each_other() {
        let svg = loss_svg(&[(1, 3.0), (2, 3.0)], &[(2, 3.0)]);
        assert_eq!(svg.matches("<tspan class=\"ol-strong\">3.000</tspan>").count(), 2);
        let ys: Vec<f64> = svg
            .lines()
            .filter(|l| l.contains("<tspan"))
            .filter_map(|l| l.split("y=\"").nth(1)?.split('"').next()?.parse().ok())
            .collect();
        assert!((ys[0] - ys[1]).abs() >= 14.9, "{ys:?}");
    }
}

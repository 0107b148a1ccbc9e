//! A plan as a picture: bytes over the instructions, stacked by category.
//!
//! ```text
//!   MiB   [legend]
//!   2048 | - - budget - - - - - - - - -
//!        |        __o__ peak
//!        |    ___/     \____   stacked areas, process at the bottom
//!      0 |___/______________\________
//!  forward  ====
//! backward      ================        one lane per kind of work
//!   stages  |a|b|c|b|a|      update
//! ```
//! The areas are painted from the top of the stack to its bottom, each down to the baseline, so that
//! one upper edge per category is all that is stored. Colours differ in lightness from their
//! neighbours in the stack, so that they are told apart without seeing hues; text is never coloured.
//! Colours are CSS classes with a dark variant, for a page or a viewer in dark mode.

use ounce_ir::Graph;
use ounce_program::{Category, Plan};

use super::columns::{Columns, Span, Work};
use super::text::{MIB, Px, binary_ticks, decimal_ticks, escape, grouped, mib, put, tick_label};

/// Columns of a picture at most.
pub(super) const MAX_COLUMNS: usize = 1200;

const WIDTH: f64 = 1200.0;
/// The plot area.
pub(super) const LEFT: f64 = 92.0;
pub(super) const RIGHT: f64 = 1180.0;
pub(super) const TOP: f64 = 56.0;
pub(super) const BOTTOM: f64 = 416.0;
const LANE_HEIGHT: f64 = 15.0;
const LANES_TOP: f64 = BOTTOM + 12.0;
const STAGES_TOP: f64 = LANES_TOP + 4.0 * LANE_HEIGHT + 5.0;
const STAGE_HEIGHT: f64 = 9.0;
/// From the stages' cells to the axis below their names: names written upwards or across.
const TALL_NAMES: f64 = 56.0;
const FLAT_NAMES: f64 = 24.0;
const AXIS_HEIGHT: f64 = 42.0;
/// Narrower gaps in a lane are closed.
const MIN_GAP: f64 = 4.0;
/// Width of a character of the labels, as an estimate.
const CHAR_WIDTH: f64 = 6.0;

/// One category in the picture: from the bottom of the stack to its top, with class, light and dark
/// colour.
pub(super) const STACK: [(Category, &str, &str, &str); Category::ALL.len()] = [
    (Category::Process, "oz-process", "#a9adb3", "#6f757d"),
    (Category::Data, "oz-data", "#77772b", "#b9b95c"),
    (Category::Weights, "oz-weights", "#3f6fa8", "#4b7fbd"),
    (Category::OptimizerState, "oz-state", "#9fd0ea", "#93c6e2"),
    (Category::Gradients, "oz-gradients", "#2c8a5b", "#35936a"),
    (Category::Saved, "oz-saved", "#e5cd77", "#d8be66"),
    (Category::Working, "oz-working", "#cf6a72", "#d87981"),
    (Category::Scratch, "oz-scratch", "#7d2e63", "#a55490"),
];

/// Where a category's bytes stand in [`Category::ALL`].
pub(super) fn index_of(category: Category) -> usize {
    Category::ALL.iter().position(|&c| c == category).expect("ALL has every category")
}

/// The picture of `plan`, which was made for `graph`: a complete SVG document.
pub fn plan_svg(graph: &Graph, plan: &Plan) -> String {
    svg_of_columns(&Columns::new(graph, plan, MAX_COLUMNS), plan)
}

pub(super) fn svg_of_columns(columns: &Columns, plan: &Plan) -> String {
    let frame = Frame::new(columns, plan);
    let mut body = String::with_capacity(64 * 1024);
    legend(&mut body, columns);
    y_axis(&mut body, &frame);
    areas(&mut body, &frame, columns);
    lanes(&mut body, &frame, columns);
    let names_height = stage_row(&mut body, &frame, columns);
    let axis_top = STAGES_TOP + STAGE_HEIGHT + names_height;
    x_axis(&mut body, &frame, axis_top);
    budget_line(&mut body, &frame, columns, plan);
    peak_mark(&mut body, &frame, columns, plan);

    let mut out = String::with_capacity(body.len() + 8 * 1024);
    let (width, height) = (Px(WIDTH), Px(axis_top + AXIS_HEIGHT));
    put!(
        out,
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" role=\"img\" \
         aria-label=\"bytes over the instructions of a step, peak {} MiB\" \
         font-family=\"system-ui, -apple-system, 'Segoe UI', Inter, 'DejaVu Sans', sans-serif\" \
         font-size=\"11\">\n",
        mib(plan.certificate.peak_bytes)
    );
    style(&mut out);
    put!(out, "<rect class=\"oz-ground\" width=\"{width}\" height=\"{height}\"/>\n{body}</svg>\n");
    out
}

/// Scales from bytes and instructions to pixels.
struct Frame {
    y_max_bytes: f64,
    /// The budget, unless there is none or it is far above the peak.
    budget_bytes: Option<u64>,
    n_instrs: usize,
    n_columns: usize,
}

impl Frame {
    fn new(columns: &Columns, plan: &Plan) -> Self {
        let c = &plan.certificate;
        let peak = c.peak_bytes.max(c.max_load_bytes).max(1);
        // A budget far above the peak would flatten the picture.
        let budget_bytes = Some(c.budget_bytes).filter(|&b| b / 2 <= peak);
        let y_max_bytes = 1.16 * peak.max(budget_bytes.unwrap_or(0)) as f64;
        let (n_instrs, n_columns) = (columns.n_instrs.max(1), columns.bytes.len().max(1));
        Self { y_max_bytes, budget_bytes, n_instrs, n_columns }
    }

    fn y(&self, bytes: u64) -> f64 {
        BOTTOM - (BOTTOM - TOP) * bytes as f64 / self.y_max_bytes
    }

    fn x_of_instr(&self, instr: usize) -> f64 {
        LEFT + (RIGHT - LEFT) * instr as f64 / self.n_instrs as f64
    }

    fn x_of_column(&self, column: usize) -> f64 {
        LEFT + (RIGHT - LEFT) * column as f64 / self.n_columns as f64
    }
}

fn style(out: &mut String) {
    let neutral = [
        (".oz-ground", "fill", "#ffffff", "#17191d"),
        (".oz-text", "fill", "#5d636b", "#9aa1aa"),
        (".oz-strong", "fill", "#1b1e23", "#eceef0"),
        (".oz-grid", "stroke", "#e7e8ea", "#2a2e34"),
        (".oz-axis", "stroke", "#b9bdc3", "#4a5058"),
        (".oz-edge", "stroke", "#ffffff", "#17191d"),
        (".oz-rule", "stroke", "#1b1e23", "#eceef0"),
        (".oz-dot", "fill", "#1b1e23", "#eceef0"),
        (".oz-tag", "fill", "#ffffff", "#17191d"),
        (".oz-forward", "fill", "#8a929c", "#8a929c"),
        (".oz-recompute", "fill", "#d9822b", "#e39a4c"),
        (".oz-backward", "fill", "#59616b", "#b3bac2"),
        (".oz-update", "fill", "#1b1e23", "#eceef0"),
        (".oz-track", "fill", "#f3f4f5", "#1f2227"),
        (".oz-cell-a", "fill", "#d5d8dc", "#3a3f46"),
        (".oz-cell-b", "fill", "#b6bac0", "#555b63"),
    ];
    let stacked = STACK.map(|(_, class, light, dark)| (class, light, dark));
    out.push_str("<style>\n");
    for (selector, property, light, _) in neutral {
        put!(out, "{selector}{{{property}:{light}}}");
    }
    for (class, light, _) in stacked {
        put!(out, ".{class}{{fill:{light};stroke:{light};background:{light}}}");
    }
    out.push_str("\n@media (prefers-color-scheme:dark){");
    for (selector, property, _, dark) in neutral {
        put!(out, "{selector}{{{property}:{dark}}}");
    }
    for (class, _, dark) in stacked {
        put!(out, ".{class}{{fill:{dark};stroke:{dark};background:{dark}}}");
    }
    out.push_str("}\n</style>\n");
}

fn legend(out: &mut String, columns: &Columns) {
    let mut x = LEFT;
    for (category, class, ..) in STACK {
        let i = index_of(category);
        if columns.bytes.iter().all(|b| b[i] == 0) {
            continue;
        }
        let name = category.name();
        put!(
            out,
            "<rect class=\"{class}\" x=\"{}\" y=\"14\" width=\"10\" height=\"10\" rx=\"1.5\"/>",
            Px(x)
        );
        put!(
            out,
            "<text class=\"oz-text\" x=\"{}\" y=\"23.5\" font-size=\"12\">{name}</text>\n",
            Px(x + 17.0)
        );
        x += 17.0 + 6.6 * name.len() as f64 + 20.0;
    }
}

fn y_axis(out: &mut String, frame: &Frame) {
    let ticks = binary_ticks(frame.y_max_bytes / MIB);
    let step = ticks.get(1).copied().unwrap_or(1.0);
    for tick in ticks {
        let y = frame.y((tick * MIB) as u64);
        let (class, label) =
            (if tick == 0.0 { "oz-axis" } else { "oz-grid" }, tick_label(tick, step));
        put!(
            out,
            "<path class=\"{class}\" d=\"M{} {}H{}\"/>",
            Px(LEFT),
            Px(y.round() + 0.5),
            Px(RIGHT)
        );
        put!(
            out,
            "<text class=\"oz-text\" x=\"{}\" y=\"{}\" text-anchor=\"end\">{label}</text>\n",
            Px(LEFT - 9.0),
            Px(y + 4.0)
        );
    }
    put!(
        out,
        "<text class=\"oz-text\" x=\"{}\" y=\"{}\" text-anchor=\"end\" font-weight=\"600\">MiB</text>\n",
        Px(LEFT - 9.0),
        Px(TOP - 12.0)
    );
}

/// Cumulated areas, the top of the stack first.
fn areas(out: &mut String, frame: &Frame, columns: &Columns) {
    let mut sums = columns.bytes.iter().map(|b| b.iter().sum::<u64>()).collect::<Vec<_>>();
    for (category, class, ..) in STACK.into_iter().rev() {
        let i = index_of(category);
        let most = columns.bytes.iter().map(|b| b[i]).max().unwrap_or(0);
        // Below a third of a pixel there is only the edge to be seen.
        if frame.y(0) - frame.y(most) > 0.3 {
            put!(out, "<path class=\"{class}\" stroke-width=\"0.7\" d=\"");
            put!(out, "M{} {}", Px(LEFT), Px(BOTTOM));
            let mut last = String::new();
            for (c, &sum) in sums.iter().enumerate() {
                let y = Px(frame.y(sum)).to_string();
                if y != last {
                    put!(out, "H{}V{y}", Px(frame.x_of_column(c)));
                    last = y;
                }
            }
            put!(out, "H{}V{}Z\"/>\n", Px(RIGHT), Px(BOTTOM));
        }
        for (sum, bytes) in sums.iter_mut().zip(&columns.bytes) {
            *sum -= bytes[i];
        }
    }
}

/// Where each kind of work happens. Gaps of a few pixels, where kinds take turns, are not drawn.
fn lanes(out: &mut String, frame: &Frame, columns: &Columns) {
    for (lane, work) in Work::ALL.into_iter().enumerate() {
        let y = LANES_TOP + LANE_HEIGHT * lane as f64;
        let name = work.name();
        put!(
            out,
            "<text class=\"oz-text\" x=\"{}\" y=\"{}\" text-anchor=\"end\">{name}</text>",
            Px(LEFT - 9.0),
            Px(y + 8.5)
        );
        put!(
            out,
            "<rect class=\"oz-track\" x=\"{}\" y=\"{}\" width=\"{}\" height=\"9\"/>",
            Px(LEFT),
            Px(y),
            Px(RIGHT - LEFT)
        );
        put!(out, "<path class=\"oz-{name}\" d=\"");
        let busy = |c: &usize| columns.work[*c][lane];
        let mut bar: Option<(f64, f64)> = None;
        let mut draw = |bar: Option<(f64, f64)>| {
            if let Some((x0, x1)) = bar {
                put!(out, "M{} {}H{}v9H{}Z", Px(x0), Px(y), Px(x1), Px(x0));
            }
        };
        for c in (0..columns.work.len()).filter(busy) {
            let (x0, x1) = (frame.x_of_column(c), frame.x_of_column(c + 1));
            bar = match bar {
                Some((start, end)) if x0 - end < MIN_GAP => Some((start, x1)),
                done => {
                    draw(done);
                    Some((x0, x1))
                }
            };
        }
        draw(bar);
        out.push_str("\"/>\n");
    }
}

/// The stages as cells in two tones with their names, where these find room. Gives the height that
/// the names take.
fn stage_row(out: &mut String, frame: &Frame, columns: &Columns) -> f64 {
    let width = |s: &Span| frame.x_of_instr(s.end) - frame.x_of_instr(s.start);
    let mean_width = (RIGHT - LEFT) / columns.stages.len().max(1) as f64;
    let use_stages = columns.micro_batches.is_empty() || mean_width > 10.0;
    let (spans, what) = if use_stages {
        (&columns.stages, "stage")
    } else {
        (&columns.micro_batches, "micro-batch")
    };
    put!(
        out,
        "<text class=\"oz-text\" x=\"{}\" y=\"{}\" text-anchor=\"end\">{what}</text>\n",
        Px(LEFT - 9.0),
        Px(STAGES_TOP + 8.5)
    );
    let (mut next_free_x, mut names_height) = (f64::MIN, FLAT_NAMES);
    for (i, span) in spans.iter().enumerate() {
        let (x, w) = (frame.x_of_instr(span.start), width(span));
        let class = if i % 2 == 0 { "oz-cell-a" } else { "oz-cell-b" };
        put!(
            out,
            "<rect class=\"{class}\" x=\"{}\" y=\"{}\" width=\"{}\" height=\"{}\"/>",
            Px(x),
            Px(STAGES_TOP),
            Px(w),
            Px(STAGE_HEIGHT)
        );
        let (name, middle) = (escape(&span.name), x + w / 2.0);
        let y = STAGES_TOP + STAGE_HEIGHT;
        if w > CHAR_WIDTH * span.name.len() as f64 + 8.0 && x >= next_free_x {
            put!(
                out,
                "<text class=\"oz-text\" x=\"{}\" y=\"{}\" text-anchor=\"middle\">{name}</text>\n",
                Px(middle),
                Px(y + 13.0)
            );
            next_free_x = x + w;
        } else if middle - 5.0 >= next_free_x {
            put!(
                out,
                "<text class=\"oz-text\" transform=\"translate({} {})rotate(-90)\" \
                 text-anchor=\"end\" font-size=\"10\">{name}</text>\n",
                Px(middle + 3.5),
                Px(y + 5.0)
            );
            next_free_x = middle + 6.5;
            names_height = TALL_NAMES;
        }
    }
    names_height
}

fn x_axis(out: &mut String, frame: &Frame, y: f64) {
    put!(out, "<path class=\"oz-axis\" d=\"M{} {}H{}", Px(LEFT), Px(y + 0.5), Px(RIGHT));
    let ticks = decimal_ticks(0.0, frame.n_instrs as f64, 10);
    for &tick in &ticks {
        put!(out, "M{} {}v4", Px(frame.x_of_instr(tick as usize)), Px(y));
    }
    out.push_str("\"/>\n");
    for tick in ticks.into_iter().filter(|t| t.fract() == 0.0) {
        put!(
            out,
            "<text class=\"oz-text\" x=\"{}\" y=\"{}\" text-anchor=\"middle\">{}</text>",
            Px(frame.x_of_instr(tick as usize)),
            Px(y + 17.0),
            grouped(tick as u64)
        );
    }
    put!(
        out,
        "<text class=\"oz-text\" x=\"{}\" y=\"{}\" text-anchor=\"middle\" \
         font-weight=\"600\">instructions of one step</text>\n",
        Px(f64::midpoint(LEFT, RIGHT)),
        Px(y + 34.0)
    );
}

fn budget_line(out: &mut String, frame: &Frame, columns: &Columns, plan: &Plan) {
    let Some(budget_bytes) = frame.budget_bytes else { return };
    let y = frame.y(budget_bytes).round() + 0.5;
    put!(
        out,
        "<path class=\"oz-rule\" stroke-width=\"1.4\" stroke-dasharray=\"7 4\" d=\"M{} {}H{}\"/>",
        Px(LEFT),
        Px(y),
        Px(RIGHT)
    );
    // On the side where the peak is not.
    let at_left = frame.x_of_column(columns.peak) > f64::midpoint(LEFT, RIGHT);
    let (x, anchor) = if at_left { (LEFT + 4.0, "start") } else { (RIGHT - 4.0, "end") };
    put!(
        out,
        "<text class=\"oz-strong\" x=\"{}\" y=\"{}\" text-anchor=\"{anchor}\" font-size=\"12\" \
         font-weight=\"600\">budget {} MiB</text>\n",
        Px(x),
        Px(y - 7.0),
        mib(plan.certificate.budget_bytes)
    );
}

/// A dot on the largest load and a label above it, clear of the budget line.
fn peak_mark(out: &mut String, frame: &Frame, columns: &Columns, plan: &Plan) {
    if columns.bytes.is_empty() {
        return;
    }
    let c = &plan.certificate;
    let column_width = (RIGHT - LEFT) / frame.n_columns as f64;
    let x = frame.x_of_column(columns.peak) + column_width / 2.0;
    let load_y = frame.y(columns.load(columns.peak));
    let peak_y = frame.y(c.peak_bytes);
    if load_y - peak_y > 1.0 {
        // What placement could not avoid.
        put!(
            out,
            "<path class=\"oz-rule\" stroke-width=\"1\" stroke-dasharray=\"1 3\" d=\"M{} {}H{}\"/>",
            Px(LEFT),
            Px(peak_y.round() + 0.5),
            Px(RIGHT)
        );
    }
    let top = frame.budget_bytes.map_or(peak_y, |b| frame.y(b).min(peak_y));
    let label = format!("peak {} MiB", mib(c.peak_bytes));
    let half = CHAR_WIDTH * 1.12 * label.len() as f64 / 2.0;
    let label_x = x.clamp(LEFT + half, RIGHT - half);
    let label_y = (top - 20.0).max(TOP - 6.0);
    put!(
        out,
        "<path class=\"oz-rule\" fill=\"none\" d=\"M{} {}V{}\"/>",
        Px(x),
        Px(load_y),
        Px(label_y + 5.0)
    );
    put!(
        out,
        "<circle class=\"oz-dot oz-edge\" stroke-width=\"1.5\" cx=\"{}\" cy=\"{}\" r=\"4.5\"/>",
        Px(x),
        Px(load_y)
    );
    put!(
        out,
        "<text class=\"oz-strong\" x=\"{}\" y=\"{}\" text-anchor=\"middle\" font-size=\"12\" \
         font-weight=\"600\">{label}</text>\n",
        Px(label_x),
        Px(label_y)
    );
}

#[cfg(test)]
mod tests {
    use super::super::columns::tests::{micro_batched, small};
    use super::super::text::tests::assert_well_formed;
    use super::*;

    #[test]
    fn the_picture_is_well_formed_and_names_what_it_shows() {
        for (graph, plan) in [small(None), small(Some(0)), micro_batched()] {
            let svg = plan_svg(&graph, &plan);
            assert_well_formed(&svg);
            for word in ["MiB", "weights", "forward", "backward", "update", "instructions"] {
                assert!(svg.contains(&format!(">{word}")), "{word} is missing");
            }
            assert!(svg.contains(&format!(">peak {} MiB<", mib(plan.certificate.peak_bytes))));
        }
    }

    #[test]
    fn the_row_below_names_stages_or_micro_batches() {
        let (graph, plan) = small(None);
        let svg = plan_svg(&graph, &plan);
        for name in ["embed", "attn.0", "mlp.1", "head"] {
            assert!(svg.contains(&format!(">{name}<")), "{name} is missing");
        }
        let (graph, plan) = micro_batched();
        let mut columns = Columns::new(&graph, &plan, MAX_COLUMNS);
        assert!(svg_of_columns(&columns, &plan).contains(">stage<"));
        columns.stages = vec![columns.stages[0].clone(); 1000];
        let svg = svg_of_columns(&columns, &plan);
        assert!(svg.contains(">micro-batch<") && svg.contains(">micro-batch 2<"));
    }

    #[test]
    fn a_budget_is_drawn_unless_there_is_none_or_it_is_far_away() {
        let (graph, mut plan) = small(Some(0));
        assert!(plan_svg(&graph, &plan).contains(">budget "));
        for budget_bytes in [u64::MAX, 3 * plan.certificate.peak_bytes] {
            plan.certificate.budget_bytes = budget_bytes;
            assert!(!plan_svg(&graph, &plan).contains(">budget "));
        }
    }

    #[test]
    fn the_edge_of_an_area_is_at_its_bytes() {
        let (graph, plan) = small(None);
        let columns = Columns::new(&graph, &plan, MAX_COLUMNS);
        let frame = Frame::new(&columns, &plan);
        let mut out = String::new();
        areas(&mut out, &frame, &columns);
        let first = out.lines().next().expect("an area");
        // The first area is the whole stack: its first edge is the load of the first column.
        let edge =
            format!("M{} {}H{}V{}", Px(LEFT), Px(BOTTOM), Px(LEFT), Px(frame.y(columns.load(0))));
        assert!(first.contains(&edge), "{edge} in {first}");
        assert!((frame.y(0) - BOTTOM).abs() < 1e-9);
        assert!(frame.y(columns.load(columns.peak)) > TOP);
    }

    #[test]
    fn a_plan_without_instructions_is_drawn_too() {
        let (graph, mut plan) = small(None);
        plan.instrs.clear();
        plan.buffers = ounce_ir::Table::default();
        assert_well_formed(&plan_svg(&graph, &plan));
    }
}

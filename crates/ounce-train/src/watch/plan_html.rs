//! `plan.html`: the picture of a plan with what a person asks next, in one self-contained page.
//!
//! Where the bytes of the peak are, what is proved and by how much it could be better, what was
//! chosen; hovering the picture, or the arrow keys, show the bytes at any instruction. The page needs
//! no network and no script for anything but the hover. Data for the script is JSON whose `<` is
//! escaped, so that no name can end the element.

use std::collections::BTreeMap;

use ounce_ir::Graph;
use ounce_plan::{explain, n_runs};
use ounce_program::{Instr, Plan};
use serde_json::json;

use super::columns::{Columns, Work};
use super::plan_svg::{BOTTOM, LEFT, MAX_COLUMNS, RIGHT, STACK, TOP, index_of, svg_of_columns};
use super::text::{escape, grouped, mib, mib_in_table, percent_over, put, seconds};

/// A page about `plan`, which was made for `graph`, under `title`.
pub fn plan_html(graph: &Graph, plan: &Plan, title: &str) -> String {
    let columns = Columns::new(graph, plan, MAX_COLUMNS);
    let mut out = String::with_capacity(256 * 1024);
    let title = escape(title);
    put!(
        out,
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <title>{title}: memory plan</title>\n<style>\n{}</style>\n</head>\n<body>\n<main>\n\
         <h1>{title}</h1>\n<p class=\"lead\">{}</p>\n",
        include_str!("plan_html.css"),
        lead(graph, plan)
    );
    numbers(&mut out, plan);
    put!(
        out,
        "<figure class=\"card\"><div class=\"scroll\" tabindex=\"0\" \
         aria-label=\"bytes over instructions; arrow keys move\">\n{}</div>\
         <div id=\"tip\" role=\"status\" hidden></div></figure>\n<div class=\"tables\">\n",
        svg_of_columns(&columns, plan)
    );
    peak_table(&mut out, plan, &columns);
    certificate_table(&mut out, plan);
    choice_table(&mut out, plan);
    put!(
        out,
        "</div>\n<details class=\"card\"><summary>The same as text</summary><pre>{}</pre></details>\n\
         <footer>{}</footer>\n</main>\n",
        escape(&explain(plan)),
        how_to_read(&columns)
    );
    put!(
        out,
        "<script type=\"application/json\" id=\"plan\">{}</script>\n",
        data(graph, plan, &columns)
    );
    put!(out, "<script>\n{}</script>\n</body>\n</html>\n", include_str!("plan_html.js"));
    out
}

fn lead(graph: &Graph, plan: &Plan) -> String {
    let shape = &plan.shape;
    let (rows, stages) = (shape.n_rows, graph.stages.len());
    format!(
        "{} parameters in {} stage{}; a step of {} row{} of {} tokens on {} thread{}",
        grouped(graph.n_params_elems()),
        grouped(stages as u64),
        plural(stages as u64),
        grouped(rows),
        plural(rows),
        grouped(shape.row_tokens),
        plan.n_threads,
        plural(u64::from(plan.n_threads)),
    )
}

fn plural(n: u64) -> &'static str {
    if n == 1 { "" } else { "s" }
}

/// The budget, unless there is none.
fn budget_bytes(plan: &Plan) -> Option<u64> {
    Some(plan.certificate.budget_bytes).filter(|&b| b != u64::MAX)
}

/// The four numbers on top.
fn numbers(out: &mut String, plan: &Plan) {
    let c = &plan.certificate;
    out.push_str("<dl class=\"numbers\">\n");
    let mut tile = |name: &str, big: String, meter: Option<f64>, note: String| {
        put!(out, "<div class=\"card\"><dt>{name}</dt><dd><div class=\"big\">{big}</div>");
        if let Some(share) = meter {
            let percent = 100.0 * share.clamp(0.0, 1.0);
            put!(out, "<div class=\"meter\"><i style=\"width:{percent:.1}%\"></i></div>");
        }
        put!(out, "<div class=\"note\">{note}</div></dd></div>\n");
    };
    let of_mib = |bytes| format!("{} <small>MiB</small>", mib(bytes));
    let share = budget_bytes(plan).map(|b| c.peak_bytes as f64 / b.max(1) as f64);
    let peak_note = match (budget_bytes(plan), share) {
        (Some(budget), Some(share)) => {
            format!("{:.1} % of the budget of {} MiB", 100.0 * share, mib(budget))
        }
        _ => "no budget was given".to_owned(),
    };
    tile("Peak of the process", of_mib(c.peak_bytes), share, peak_note);
    tile(
        "No placement needs less than",
        of_mib(c.max_load_bytes),
        None,
        format!("{} MiB lost to placement", mib(c.peak_bytes.saturating_sub(c.max_load_bytes))),
    );
    let (number, unit) = split_unit(&seconds(c.step_s));
    tile(
        "Predicted step",
        format!("{number} <small>{unit}</small>"),
        None,
        format!("{} above recomputing nothing", percent_over(c.step_s, c.unconstrained_step_s)),
    );
    let (number, unit) = split_unit(&seconds(c.step_bound_s));
    tile(
        "No schedule is faster than",
        format!("{number} <small>{unit}</small>"),
        None,
        format!("gap of this plan {}", percent_over(c.step_s, c.step_bound_s)),
    );
    out.push_str("</dl>\n");
}

fn split_unit(text: &str) -> (String, String) {
    let (number, unit) = text.rsplit_once(' ').unwrap_or((text, ""));
    (number.to_owned(), unit.to_owned())
}

/// Bytes per category at the marked column, in the order of the stack, its top first.
fn peak_table(out: &mut String, plan: &Plan, columns: &Columns) {
    let bytes = columns.bytes.get(columns.peak).copied().unwrap_or_default();
    let sum = bytes.iter().sum::<u64>().max(1);
    let peak = plan.certificate.peak_bytes;
    let most = bytes.iter().copied().max().unwrap_or(0).max(1);
    out.push_str(
        "<section class=\"card\"><h2>At the peak</h2>\n<table><thead><tr><th>category</th>\
         <th></th><th>MiB</th><th>share</th></tr></thead><tbody>\n",
    );
    for (category, class, ..) in STACK.into_iter().rev() {
        let b = bytes[index_of(category)];
        put!(
            out,
            "<tr><td class=\"name\"><span class=\"swatch {class}\"></span>{}</td>\
             <td class=\"share\" style=\"text-align:left\"><i class=\"{class}\" \
             style=\"width:{:.1}%\"></i></td><td>{}</td><td>{:.1} %</td></tr>\n",
            category.name(),
            100.0 * b as f64 / most as f64,
            mib_in_table(b, peak),
            100.0 * b as f64 / sum as f64
        );
    }
    let slack = peak.saturating_sub(sum);
    put!(
        out,
        "<tr><td class=\"name\"><span class=\"swatch\"></span>lost to placement</td><td></td>\
         <td>{}</td><td></td></tr>\n</tbody><tfoot><tr><th>peak</th><td></td><td>{}</td><td></td>\
         </tr></tfoot></table></section>\n",
        mib_in_table(slack, peak),
        mib_in_table(peak, peak)
    );
}

fn rows(out: &mut String, heading: &str, rows: &[(&str, String)]) {
    put!(out, "<section class=\"card\"><h2>{heading}</h2>\n<table><tbody>\n");
    for (name, value) in rows {
        put!(out, "<tr><th>{name}</th><td>{value}</td></tr>\n");
    }
    out.push_str("</tbody></table></section>\n");
}

fn certificate_table(out: &mut String, plan: &Plan) {
    let c = &plan.certificate;
    let of_mib = |bytes| format!("{} MiB", mib(bytes));
    let budget = budget_bytes(plan);
    let room = budget.map_or("–".to_owned(), |b| of_mib(b.saturating_sub(c.peak_bytes)));
    let gap = percent_over(c.peak_bytes as f64, c.max_load_bytes as f64);
    rows(
        out,
        "Certificate",
        &[
            ("budget", budget.map_or("none".to_owned(), of_mib)),
            ("peak", of_mib(c.peak_bytes)),
            ("room left", room),
            ("lower bound of the peak", of_mib(c.max_load_bytes)),
            ("gap of the peak", gap),
            ("predicted step", seconds(c.step_s)),
            ("recomputing nothing", seconds(c.unconstrained_step_s)),
            ("lower bound of the step", seconds(c.step_bound_s)),
            ("gap of the step", percent_over(c.step_s, c.step_bound_s)),
        ],
    );
}

fn choice_table(out: &mut String, plan: &Plan) {
    let choice = &plan.choice;
    let tokens = |n| format!("{} tokens", grouped(n));
    rows(
        out,
        "Choices",
        &[
            ("loop order", choice.loop_order.to_string()),
            ("micro-batches per step", grouped(choice.n_micro_batches)),
            ("tokens per step", grouped(plan.shape.n_tokens())),
            ("the head takes at once", tokens(choice.head_chunk_tokens)),
            (
                "gradients",
                if choice.release_gradients { "released early" } else { "held for the update" }
                    .to_owned(),
            ),
            ("values kept for backward", grouped(choice.n_kept)),
            ("forward ops run again", grouped(choice.n_recomputed)),
            ("ops run", grouped(n_runs(plan) as u64)),
            ("arena", format!("{} MiB", mib(plan.arena_bytes))),
            ("process outside the arena", format!("{} MiB", mib(plan.baseline_bytes))),
        ],
    );
}

fn how_to_read(columns: &Columns) -> String {
    let n = columns.bytes.len();
    let mut text = "One step from left to right; the height is what the process holds at that \
                    instruction."
        .to_owned();
    if n < columns.n_instrs {
        put!(
            text,
            " {} instructions are drawn as {} columns, each at the largest load within it.",
            grouped(columns.n_instrs as u64),
            grouped(n as u64)
        );
    }
    text
}

/// What the script shows: columns in KiB, and what runs there.
fn data(graph: &Graph, plan: &Plan, columns: &Columns) -> String {
    let mut ids = BTreeMap::new();
    let mut names = Vec::new();
    let name: Vec<usize> = columns
        .instr
        .iter()
        .zip(&columns.doing)
        .map(|(&i, &work)| {
            let text = describe(graph, &plan.instrs[i], work);
            *ids.entry(text.clone()).or_insert_with(|| {
                names.push(text);
                names.len() - 1
            })
        })
        .collect();
    let kib =
        |k: usize| -> Vec<u64> { columns.bytes.iter().map(|b| b[k].div_ceil(1024)).collect() };
    let data = json!({
        "left": LEFT, "right": RIGHT, "top": TOP, "bottom": BOTTOM,
        "peak": columns.peak,
        "instr": columns.instr,
        "name": name,
        "names": names,
        "categories": STACK.map(|(category, ..)| category.name()),
        "classes": STACK.map(|(_, class, ..)| class),
        "kib": STACK.map(|(category, ..)| kib(index_of(category))),
    });
    data.to_string().replace('<', "\\u003c")
}

/// `attention in attn.3 (again)`.
fn describe(graph: &Graph, instr: &Instr, work: Work) -> String {
    match instr {
        Instr::Run { op, .. } => {
            let op = &graph.ops[*op];
            let again = if work == Work::Recompute { " (again)" } else { "" };
            match (op.stage, op.updates) {
                (Some(stage), _) => {
                    format!("{} in {}{again}", op.kind.name(), graph.stages[stage].name)
                }
                (None, Some(param)) => {
                    format!("{} of {}", op.kind.name(), graph.params[param].name)
                }
                (None, None) => op.kind.name().to_owned(),
            }
        }
        Instr::Zero { value, .. } => format!("zero {}", graph.values[*value].name),
        Instr::Copy { .. } => "copy between tiers".to_owned(),
        Instr::Wait { .. } => "wait for a copy".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::super::columns::tests::{micro_batched, small};
    use super::*;
    use ounce_plan::timeline;

    fn script_data(html: &str) -> serde_json::Value {
        let (_, rest) = html.split_once("id=\"plan\">").expect("data");
        serde_json::from_str(rest.split_once("</script>").expect("an end").0).unwrap()
    }

    #[test]
    fn the_page_needs_nothing_from_elsewhere() {
        let (graph, plan) = small(Some(0));
        let html = plan_html(&graph, &plan, "gpt2");
        let addresses: Vec<_> = html.match_indices("http").map(|(i, _)| &html[i..i + 26]).collect();
        assert_eq!(addresses.len(), 2, "{addresses:?}");
        assert!(addresses.iter().all(|a| *a == "http://www.w3.org/2000/svg"));
        for word in ["src=", "href=", "@import", "url("] {
            assert!(!html.contains(word), "{word}");
        }
    }

    #[test]
    fn the_page_states_certificate_and_choices() {
        let (graph, plan) = small(Some(0));
        let html = plan_html(&graph, &plan, "gpt2");
        let c = &plan.certificate;
        for bytes in [c.budget_bytes, c.peak_bytes, c.max_load_bytes] {
            assert!(html.contains(&format!("<td>{} MiB</td>", mib(bytes))));
        }
        for s in [c.step_s, c.step_bound_s] {
            assert!(html.contains(&format!("<td>{}</td>", seconds(s))));
        }
        assert!(html.contains("<td>layer-major</td>"));
        assert!(html.contains(&format!("<td>{}</td>", grouped(plan.choice.n_recomputed))));
        assert!(html.contains(&escape(&explain(&plan))));
    }

    #[test]
    fn no_budget_is_said_in_words() {
        let (graph, plan) = small(None);
        let html = plan_html(&graph, &plan, "gpt2");
        assert!(html.contains("no budget was given"));
        assert!(!html.contains("17,592,186,044,416"), "u64::MAX as MiB");
    }

    #[test]
    fn a_title_cannot_leave_its_element() {
        let (mut graph, plan) = small(None);
        let name = "</script><script>alert(1)</script>";
        let stages: Vec<_> = graph.stages.ids().collect();
        graph.stages[stages[0]].name = name.to_owned();
        let html = plan_html(&graph, &plan, name);
        assert!(!html.contains("<script>alert"));
        assert!(html.contains("<h1>&lt;/script&gt;"));
        let names = script_data(&html)["names"].to_string();
        assert!(names.contains("embed in </script>"), "{names}");
    }

    #[test]
    fn hovering_shows_the_bytes_of_the_timeline() {
        for (graph, plan) in [small(None), micro_batched()] {
            let data = script_data(&plan_html(&graph, &plan, "gpt2"));
            let rows = timeline(&plan);
            let instrs = data["instr"].as_array().unwrap();
            assert_eq!(instrs.len(), rows.len().min(MAX_COLUMNS));
            for (column, instr) in instrs.iter().enumerate() {
                let row = rows[instr.as_u64().unwrap() as usize];
                for (k, (category, ..)) in STACK.into_iter().enumerate() {
                    let kib = data["kib"][k][column].as_u64().unwrap();
                    assert_eq!(kib, row[index_of(category)].div_ceil(1024));
                }
                let name = data["name"][column].as_u64().unwrap() as usize;
                assert!(data["names"][name].is_string());
            }
        }
    }
}

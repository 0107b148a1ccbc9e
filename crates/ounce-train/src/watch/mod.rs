//! Watching a run: what a person sees of it beside the progress bar, and what other tools read.
//!
//! Pictures are pure functions of what they show and are written by hand as SVG and HTML, without
//! external resources; writers hold one fixed buffer each and never grow, so that watching a run
//! costs the same at step 10 and at step 10 million.
//!
//! Files, in reading order: `text` (numbers and ticks for people), `columns` (a plan as a few hundred
//! columns), `plan_svg` (bytes over the instructions), `plan_html` (the same with tables and hover),
//! `loss_svg` (the loss curve), `metrics` (`metrics.jsonl`), `crc32c` and `tensorboard` (event
//! files), `health` (warnings when a number leaves its healthy range).

mod text;

mod columns;

mod plan_svg;

mod plan_html;

mod loss_svg;

mod metrics;

mod crc32c;
mod tensorboard;

mod health;

pub use health::{Health, StepNumbers, Warning};
pub use loss_svg::loss_svg;
pub use metrics::{MAX_LINE_BYTES, MetricsWriter, for_each_line};
pub use plan_html::plan_html;
pub use plan_svg::plan_svg;
pub use tensorboard::{EventWriter, MAX_TAG_BYTES};

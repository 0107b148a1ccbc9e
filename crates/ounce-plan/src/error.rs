//! What can go wrong when planning.

use ounce_program::Category;

/// A plan that cannot be made.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// Even the least-peak plan is larger than the budget.
    #[error(
        "the plan does not fit: budget {}, smallest feasible budget: {}; of that {}\n\
         hint: give that budget, or plan a smaller step",
        mib(*budget_bytes), mib_up(*smallest_bytes), table(dominating)
    )]
    DoesNotFit {
        /// The budget that was asked for.
        budget_bytes: u64,
        /// The smallest that works.
        smallest_bytes: u64,
        /// What the smallest plan holds at its peak, largest first.
        dominating: Vec<(Category, u64)>,
    },
}

/// Bytes as MiB with two digits.
pub(crate) fn mib(bytes: u64) -> String {
    format!("{:.2} MiB", bytes as f64 / (1024.0 * 1024.0))
}

/// Bytes as MiB with two digits, rounded up, so that the figure works as a budget.
fn mib_up(bytes: u64) -> String {
    const MIB: u64 = 1 << 20;
    let hundredths = (u128::from(bytes) * 100).div_ceil(u128::from(MIB));
    format!("{}.{:02} MiB", hundredths / 100, hundredths % 100)
}

fn table(rows: &[(Category, u64)]) -> String {
    let rows = rows.iter().filter(|(_, bytes)| *bytes > 0);
    rows.map(|(c, bytes)| format!("{} {}", c.name(), mib(*bytes))).collect::<Vec<_>>().join(", ")
}

//! Plans that fit into one budget together.
//!
//! Training, evaluation and sampling take turns in one arena, but the tables of their instructions are there all the
//! time: a plan may take what the tables of the others leave. How large those are is known when they are planned, and
//! in a smaller budget a plan may have more instructions. So each is planned in what the largest tables of the others
//! so far leave, until none has to be planned again.
//!
//! Invariant: what is known of tables only grows, so that this ends. Complexity: one plan each where no plan has
//! tables beyond those that the process declares, a few where some have.

use crate::Result;

/// Rounds after which plans that still displace each other count as none.
const MAX_ROUNDS: usize = 8;

/// What a plan takes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Need {
    /// At its peak, with its own tables.
    pub(crate) peak_bytes: u64,
    /// Of its instructions, beside what the process declares.
    pub(crate) tables_bytes: u64,
}

/// Plans `n` things, each by `plan` (its number, its budget), so that together they fit into `budget_bytes`; `None`
/// where that is not found.
///
/// # Errors
/// Those of `plan`.
pub(crate) fn plan_together<P>(
    n: usize,
    budget_bytes: u64,
    need: impl Fn(&P) -> Need,
    mut plan: impl FnMut(usize, u64) -> Result<Option<P>>,
) -> Result<Option<Vec<P>>> {
    let mut plans: Vec<Option<P>> = (0..n).map(|_| None).collect();
    let mut tables_bytes = vec![0; n];
    for _ in 0..MAX_ROUNDS {
        let mut is_stable = true;
        for i in 0..n {
            let others_bytes = tables_bytes.iter().sum::<u64>() - tables_bytes[i];
            let fits = |p: &P| need(p).peak_bytes + others_bytes <= budget_bytes;
            if plans[i].as_ref().is_some_and(fits) {
                continue;
            }
            is_stable = false;
            // Two of them at once would take memory that nothing counts.
            plans[i] = None;
            let Some(planned) = plan(i, budget_bytes.saturating_sub(others_bytes))? else {
                return Ok(None);
            };
            tables_bytes[i] = tables_bytes[i].max(need(&planned).tables_bytes);
            plans[i] = Some(planned);
        }
        if is_stable {
            return Ok(plans.into_iter().collect());
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A plan that takes all of its budget above `least`, with more tables the smaller the budget is.
    fn plan(least: u64, tables: impl Fn(u64) -> u64) -> impl Fn(u64) -> Option<Need> {
        move |budget| {
            (budget >= least).then(|| Need { peak_bytes: budget, tables_bytes: tables(budget) })
        }
    }

    fn together(budget: u64, plans: &[&dyn Fn(u64) -> Option<Need>]) -> Option<Vec<Need>> {
        let found = plan_together(plans.len(), budget, |&need| need, |i, b| Ok(plans[i](b)));
        found.expect("nothing fails here")
    }

    #[test]
    fn each_leaves_room_for_the_tables_of_the_others() {
        let (a, b) = (plan(50, |_| 10), plan(60, |budget| 100 - budget));
        let found = together(100, &[&a, &b]).expect("they fit");
        // The second has 90 and so 10 of tables, which leaves 90 to the first.
        assert_eq!(found.iter().map(|n| n.peak_bytes).collect::<Vec<_>>(), [90, 90]);
        for (need, others) in found.iter().zip([found[1].tables_bytes, found[0].tables_bytes]) {
            assert!(need.peak_bytes + others <= 100);
        }
    }

    #[test]
    fn plans_without_tables_are_planned_once() {
        let mut n = 0;
        let found = plan_together(
            3,
            100,
            |&need| need,
            |_, budget| {
                n += 1;
                Ok(Some(Need { peak_bytes: budget, tables_bytes: 0 }))
            },
        );
        assert_eq!((found.expect("nothing fails here").map(|plans| plans.len()), n), (Some(3), 3));
    }

    #[test]
    fn what_does_not_fit_together_is_none() {
        let (a, b) = (plan(50, |_| 60), plan(50, |_| 0));
        assert!(together(100, &[&a, &b]).is_none());
        let (c, d) = (plan(95, |_| 10), plan(0, |_| 10));
        assert!(together(100, &[&c, &d]).is_none());
    }
}

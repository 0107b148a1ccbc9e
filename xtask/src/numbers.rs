//! Numbers in what programs print, and what is made of them.

use serde_json::Value;

use crate::Result;

pub(crate) const MIB: f64 = 1024.0 * 1024.0;

pub(crate) fn number(value: &Value, key: &str) -> Result<f64> {
    value[key].as_f64().ok_or_else(|| format!("no number {key:?} in {value}"))
}

/// The figure after `smallest feasible budget: ` as an argument of `--memory`.
pub(crate) fn smallest_budget(stderr: &str) -> Option<String> {
    let (_, rest) = stderr.split_once("smallest feasible budget: ")?;
    let mut words = rest.split_whitespace();
    let amount = words.next()?.trim_end_matches([',', ';', '.']);
    let unit = words.next().unwrap_or_default();
    // `61.5 MiB` or `61.5MiB`.
    let has_unit = amount.ends_with('B');
    let unit = unit.trim_end_matches(|c: char| !c.is_ascii_alphabetic());
    Some(if has_unit { amount.to_owned() } else { format!("{amount}{unit}") })
}

pub(crate) fn median(mut numbers: Vec<f64>) -> f64 {
    numbers.sort_by(f64::total_cmp);
    match numbers.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => numbers[n / 2],
        n => f64::midpoint(numbers[n / 2 - 1], numbers[n / 2]),
    }
}

/// A figure such as `1800MiB` or `2GiB` in MiB.
pub(crate) fn mib(memory: &str) -> Result<f64> {
    let digits = memory.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let amount: f64 = digits.trim().parse().map_err(|_| format!("{memory:?} is not an amount"))?;
    match &memory[digits.len()..] {
        "GiB" => Ok(amount * 1024.0),
        "MiB" => Ok(amount),
        "KiB" => Ok(amount / 1024.0),
        "B" => Ok(amount / MIB),
        unit => Err(format!("{unit:?} is not a unit")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_smallest_budget_is_read_from_the_message() {
        let told = |text: &str| smallest_budget(text);
        assert_eq!(told("x\nsmallest feasible budget: 61 MiB\n"), Some("61MiB".to_owned()));
        assert_eq!(
            told("smallest feasible budget: 61.5 MiB (planned)"),
            Some("61.5MiB".to_owned())
        );
        assert_eq!(
            told("smallest feasible budget: 64000000B, of which"),
            Some("64000000B".to_owned())
        );
        assert_eq!(told("nothing"), None);
    }

    #[test]
    fn amounts_are_read_in_mib() {
        assert_eq!(mib("2GiB"), Ok(2048.0));
        assert_eq!(mib("61.5MiB"), Ok(61.5));
        assert_eq!(mib("1048576B"), Ok(1.0));
        assert!(mib("12 parsecs").is_err());
    }

    #[test]
    fn the_median_is_the_middle() {
        assert_eq!(median(vec![3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(vec![4.0, 1.0]), 2.5);
    }
}

//! Numbers, ticks and escapes that the pictures share.

use std::fmt;

/// Bytes per MiB.
pub(super) const MIB: f64 = 1024.0 * 1024.0;

/// Appends formatted text to a `String`.
macro_rules! put {
    ($out:expr, $($arg:tt)*) => {{
        use std::fmt::Write as _;
        write!($out, $($arg)*).expect("writing to a string cannot fail");
    }};
}
pub(super) use put;

/// A coordinate in pixels, printed with at most one decimal.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Px(pub(super) f64);

impl fmt::Display for Px {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let tenths = (self.0 * 10.0).round() as i64;
        let sign = if tenths < 0 { "-" } else { "" };
        match (tenths.abs() / 10, tenths.abs() % 10) {
            (whole, 0) => write!(f, "{sign}{whole}"),
            (whole, tenth) => write!(f, "{sign}{whole}.{tenth}"),
        }
    }
}

/// Text that is safe between tags and within quoted attributes, of HTML and of XML.
pub(super) fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            // XML 1.0 has no other control characters.
            c if c.is_control() && !matches!(c, '\n' | '\t') => out.push('\u{fffd}'),
            c => out.push(c),
        }
    }
    out
}

/// `1234567` as `1,234,567`.
pub(super) fn grouped(n: u64) -> String {
    let digits = n.to_string();
    let mut out = String::with_capacity(digits.len() + digits.len() / 3);
    for (i, c) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(c);
    }
    out
}

/// A number at least 0 with `decimals` digits after the point and grouped digits before it.
pub(super) fn grouped_decimal(x: f64, decimals: usize) -> String {
    let text = format!("{x:.decimals$}");
    match text.split_once('.') {
        Some((whole, rest)) => match whole.parse() {
            Ok(whole) => format!("{}.{rest}", grouped(whole)),
            Err(_) => text,
        },
        None => text.parse().map_or(text, grouped),
    }
}

/// Bytes as MiB with at least three significant digits, without the unit.
pub(super) fn mib(bytes: u64) -> String {
    let x = bytes as f64 / MIB;
    let decimals = match x {
        x if x >= 100.0 || bytes == 0 => 1,
        x if x >= 0.1 => 2,
        _ => 4,
    };
    grouped_decimal(x, decimals)
}

/// Bytes as MiB with as many decimals as suit a table whose largest number is `most_bytes`.
pub(super) fn mib_in_table(bytes: u64, most_bytes: u64) -> String {
    let x = bytes as f64 / MIB;
    let decimals = if most_bytes as f64 >= 100.0 * MIB { 1 } else { 3 };
    let least = 10_f64.powi(-decimals);
    match bytes {
        1.. if x < least => format!("< {least}"),
        _ => grouped_decimal(x, decimals as usize),
    }
}

/// Seconds with three significant digits, in ms below one second.
pub(super) fn seconds(s: f64) -> String {
    match s {
        s if !s.is_finite() => "not known".to_owned(),
        s if s >= 100.0 => format!("{s:.0} s"),
        s if s >= 10.0 => format!("{s:.1} s"),
        s if s >= 1.0 => format!("{s:.2} s"),
        s if s >= 0.1 => format!("{:.0} ms", s * 1e3),
        s => format!("{:.2} ms", s * 1e3),
    }
}

/// `part / whole - 1` in percent, or a dash where that means nothing.
pub(super) fn percent_over(part: f64, whole: f64) -> String {
    let percent = 100.0 * (part / whole - 1.0);
    if percent.is_finite() { format!("{percent:.1} %") } else { "–".to_owned() }
}

/// Ticks at multiples of 1, 2 or 5 times a power of ten that lie in `lo..=hi`, about `n_wanted`.
pub(super) fn decimal_ticks(lo: f64, hi: f64, n_wanted: usize) -> Vec<f64> {
    debug_assert!(lo < hi && n_wanted > 0);
    let rough = (hi - lo) / n_wanted as f64;
    let power = 10_f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0]
        .map(|m| m * power)
        .into_iter()
        .find(|&step| step >= rough * 0.999)
        .unwrap_or(10.0 * power);
    ticks(lo, hi, step)
}

/// Ticks at multiples of a power of two, from 0 to `hi`: 4 to 8 of them.
pub(super) fn binary_ticks(hi: f64) -> Vec<f64> {
    debug_assert!(hi > 0.0);
    ticks(0.0, hi, 2_f64.powf((hi / 8.0).log2().ceil()))
}

fn ticks(lo: f64, hi: f64, step: f64) -> Vec<f64> {
    let first = (lo / step - 1e-9).ceil() as i64;
    let last = (hi / step + 1e-9).floor() as i64;
    (first..=last).map(|i| i as f64 * step).collect()
}

/// A tick's label: as many decimals as its neighbours need to differ.
pub(super) fn tick_label(x: f64, step: f64) -> String {
    let mut decimals = 0;
    let is_whole = |x: f64| (x - x.round()).abs() < 1e-6;
    while decimals < 9 && !is_whole(step * 10_f64.powi(decimals)) {
        decimals += 1;
    }
    let sign = if x < 0.0 { "−" } else { "" };
    format!("{sign}{}", grouped_decimal(x.abs(), decimals as usize))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// Tags are balanced and attributes quoted: what browsers forgive and XML readers do not.
    pub(in super::super) fn assert_well_formed(xml: &str) {
        let mut open: Vec<&str> = Vec::new();
        let mut rest = xml;
        while let Some(at) = rest.find('<') {
            assert!(!rest[..at].contains('>'), "stray > in {:?}", &rest[..at]);
            let end = rest[at..].find('>').expect("a tag ends") + at;
            let tag = &rest[at + 1..end];
            assert_eq!(tag.matches('"').count() % 2, 0, "{tag}");
            assert_eq!(tag.matches('=').count(), tag.matches("=\"").count(), "{tag}");
            let name = tag.trim_start_matches('/').split([' ', '/']).next().expect("a name");
            if tag.starts_with('/') {
                assert_eq!(open.pop(), Some(name));
            } else if !tag.ends_with('/') {
                open.push(name);
            }
            rest = &rest[end + 1..];
        }
        assert!(open.is_empty(), "not closed: {open:?}");
        assert!(!xml.contains("NaN") && !xml.contains("inf"), "a number is not finite");
    }

    #[test]
    fn pixels_have_at_most_one_decimal() {
        let text = |x| Px(x).to_string();
        assert_eq!(text(3.0), "3");
        assert_eq!(text(7.12), "7.1");
        assert_eq!(text(-0.04), "0");
        assert_eq!(text(-0.26), "-0.3");
    }

    #[test]
    fn digits_are_grouped_in_threes() {
        assert_eq!(grouped(0), "0");
        assert_eq!(grouped(999), "999");
        assert_eq!(grouped(1000), "1,000");
        assert_eq!(grouped(1234567), "1,234,567");
        assert_eq!(grouped_decimal(12345.678, 1), "12,345.7");
    }

    #[test]
    fn mebibytes_keep_three_digits() {
        assert_eq!(mib(0), "0.0");
        assert_eq!(mib(1 << 30), "1,024.0");
        assert_eq!(mib(3 << 19), "1.50");
        assert_eq!(mib(4096), "0.0039");
    }

    #[test]
    fn numbers_of_a_table_share_their_decimals() {
        let most = 2 << 30;
        let table = [0, 70 << 10, 100 << 20, most].map(|b| mib_in_table(b, most));
        assert_eq!(table, ["0.0", "< 0.1", "100.0", "2,048.0"]);
        assert_eq!(mib_in_table(70 << 10, 1 << 20), "0.068");
    }

    #[test]
    fn seconds_have_three_digits() {
        let texts = [123.4, 12.34, 1.234, 0.1234, 0.01234, f64::NAN].map(seconds);
        assert_eq!(texts, ["123 s", "12.3 s", "1.23 s", "123 ms", "12.34 ms", "not known"]);
        assert_eq!(percent_over(1.5, 1.0), "50.0 %");
        assert_eq!(percent_over(1.5, 0.0), "–");
    }

    #[test]
    fn markup_in_names_is_escaped() {
        assert_eq!(escape("<b a='1'>&\""), "&lt;b a=&#39;1&#39;&gt;&amp;&quot;");
        assert_eq!(escape("a\u{0}b"), "a\u{fffd}b");
    }

    #[test]
    fn decimal_ticks_are_round_and_inside() {
        assert_eq!(decimal_ticks(0.0, 10.0, 5), [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]);
        assert_eq!(decimal_ticks(2.3, 3.9, 4), [2.5, 3.0, 3.5]);
        assert_eq!(decimal_ticks(1.0, 20000.0, 5), [5000.0, 10000.0, 15000.0, 20000.0]);
    }

    #[test]
    fn binary_ticks_are_powers_of_two_apart() {
        assert_eq!(
            binary_ticks(2048.0),
            [0.0, 256.0, 512.0, 768.0, 1024.0, 1280.0, 1536.0, 1792.0, 2048.0]
        );
        assert_eq!(binary_ticks(0.9), [0.0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875]);
        for hi in [0.3, 1.0, 7.0, 100.0, 1025.0, 1e6] {
            assert!((4..=9).contains(&binary_ticks(hi).len()), "{hi}");
        }
    }

    #[test]
    fn tick_labels_have_the_decimals_of_the_step() {
        assert_eq!(tick_label(0.5, 0.25), "0.50");
        assert_eq!(tick_label(2000.0, 500.0), "2,000");
        assert_eq!(tick_label(-1.5, 0.5), "−1.5");
        // The difference of two ticks is not exact.
        assert_eq!(tick_label(10.805, 10.805 - 10.8), "10.805");
        assert_eq!(tick_label(0.3, 0.3 - 0.2), "0.3");
    }
}

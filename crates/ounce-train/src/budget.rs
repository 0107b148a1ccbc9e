//! Bytes: what the user states, what the machine has, what the process uses.
//!
//! A budget counts everything the kernel charges to the process: resident memory and the page tables
//! that map it. Budgets are used in whole units of 64 KiB ([`BUDGET_QUANTUM_BYTES`]), so that the
//! smallest feasible one can be printed exactly in MiB.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Budgets are rounded down to whole units of this many bytes (1/16 MiB).
pub const BUDGET_QUANTUM_BYTES: u64 = 64 << 10;

/// Share of the free memory that `auto` takes, in percent: the rest is for what other programs do next.
pub(crate) const AUTO_PERCENT: u64 = 90;

/// What `--memory` says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Memory {
    /// What this machine and its cgroup have free.
    Auto,
    /// Bytes, as stated.
    Bytes(u64),
}

impl Memory {
    /// Parses `64MiB`, `1.5GiB`, `12345B` or `auto`.
    ///
    /// # Errors
    /// A message with a hint.
    pub fn parse(text: &str) -> Result<Self, String> {
        let text = text.trim();
        if text == "auto" {
            return Ok(Self::Auto);
        }
        let at = text.find(|c: char| c.is_ascii_alphabetic()).unwrap_or(text.len());
        let (number, unit) = (text[..at].trim(), &text[at..]);
        let scale = match unit {
            "B" => 1.0,
            "KiB" => 1024.0,
            "MiB" => 1024.0 * 1024.0,
            "GiB" => 1024.0 * 1024.0 * 1024.0,
            "TiB" => 1024.0 * 1024.0 * 1024.0 * 1024.0,
            _ => {
                let meant = unit.chars().next().map(|c| c.to_ascii_uppercase());
                let meant = meant.filter(|c| "KMGT".contains(*c) && number.parse::<f64>().is_ok());
                let hint = meant.map_or_else(
                    || "write it as `64MiB`, `2GiB`, `12345B` or `auto`".to_owned(),
                    |c| format!("perhaps `{number}{c}iB`"),
                );
                return Err(format!(
                    "`{text}` is not an amount of memory: the unit is missing or unknown\nhint: {hint}"
                ));
            }
        };
        match number.parse::<f64>() {
            Ok(n) if n > 0.0 && n * scale < 1e18 => Ok(Self::Bytes((n * scale) as u64)),
            Ok(n) if n > 0.0 => Err(format!(
                "`{text}` is more memory than there is anywhere\nhint: write it as `64MiB`, `2GiB`, `12345B` or `auto`"
            )),
            _ => Err(format!(
                "`{text}` is not an amount of memory: `{number}` is not a positive number\n\
                 hint: write it as `64MiB`, `2GiB`, `12345B` or `auto`"
            )),
        }
    }

    /// The budget in bytes, in whole quanta but for less than one; `auto` asks the machine.
    pub fn resolve(self) -> u64 {
        let bytes = match self {
            Self::Bytes(bytes) => bytes,
            Self::Auto => free_bytes() / 100 * AUTO_PERCENT,
        };
        if bytes < BUDGET_QUANTUM_BYTES {
            return bytes;
        }
        bytes / BUDGET_QUANTUM_BYTES * BUDGET_QUANTUM_BYTES
    }
}

impl std::fmt::Display for Memory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Bytes(bytes) => write!(f, "{bytes}B"),
        }
    }
}

impl Serialize for Memory {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Memory {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        // A bare number lacks its unit, which is what the message should say.
        #[derive(Deserialize)]
        #[serde(untagged, expecting = "expected `64MiB`, `2GiB`, `12345B` or `auto`")]
        enum Given {
            Text(String),
            Number(f64),
        }
        let text = match Given::deserialize(d)? {
            Given::Text(text) => text,
            Given::Number(number) => number.to_string(),
        };
        Self::parse(&text).map_err(serde::de::Error::custom)
    }
}

/// Memory that this process may still take: the least of the machine's and every cgroup's.
fn free_bytes() -> u64 {
    let machine = read_kib("/proc/meminfo", "MemAvailable:").unwrap_or(1 << 30);
    cgroup_dirs().iter().filter_map(|dir| cgroup_free_bytes(dir)).fold(machine, u64::min)
}

/// Memory of this machine and of the cgroups that this process is in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct MemoryOfMachine {
    /// What the machine has.
    pub total_bytes: u64,
    /// What it has free (`MemAvailable`).
    pub available_bytes: u64,
    /// The tightest limit of a cgroup, version 1 or 2; `None` without one.
    pub cgroup_limit_bytes: Option<u64>,
    /// What this process may still take, cgroups counted.
    pub free_bytes: u64,
}

/// Asks the machine.
pub(crate) fn memory_of_machine() -> MemoryOfMachine {
    let field = |key| read_kib("/proc/meminfo", key).unwrap_or(0);
    let (total_bytes, available_bytes) = (field("MemTotal:"), field("MemAvailable:"));
    let dirs = cgroup_dirs();
    let limits = dirs.iter().filter_map(|dir| cgroup_limit_bytes(dir));
    MemoryOfMachine {
        total_bytes,
        available_bytes,
        // Version 1 says "no limit" with a number beyond any memory.
        cgroup_limit_bytes: limits.filter(|&limit| limit <= total_bytes).min(),
        free_bytes: free_bytes().min(available_bytes),
    }
}

/// Folders of the memory cgroups that this process is in, versions 1 and 2, ancestors included.
fn cgroup_dirs() -> Vec<PathBuf> {
    let table = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let mut dirs = Vec::new();
    for line in table.lines() {
        let mut fields = line.splitn(3, ':');
        let (Some(_), Some(controllers), Some(path)) =
            (fields.next(), fields.next(), fields.next())
        else {
            continue;
        };
        let root = match controllers {
            "" => "/sys/fs/cgroup",
            c if c.split(',').any(|c| c == "memory") => "/sys/fs/cgroup/memory",
            _ => continue,
        };
        // Inside a container the path may be the host's; the root is then the container's own.
        let path = Path::new(path.trim_start_matches('/'));
        dirs.extend(path.ancestors().map(|p| Path::new(root).join(p)));
    }
    dirs
}

/// The limit of one cgroup.
fn cgroup_limit_bytes(dir: &Path) -> Option<u64> {
    let number = |name: &str| std::fs::read_to_string(dir.join(name)).ok()?.trim().parse().ok();
    number("memory.max").or_else(|| number("memory.limit_in_bytes"))
}

/// Limit minus use of one cgroup, page cache that can be dropped not counted as use.
fn cgroup_free_bytes(dir: &Path) -> Option<u64> {
    let number = |name: &str| -> Option<u64> {
        std::fs::read_to_string(dir.join(name)).ok()?.trim().parse().ok()
    };
    let limit = cgroup_limit_bytes(dir)?;
    let used = number("memory.current").or_else(|| number("memory.usage_in_bytes"))?;
    let stat = std::fs::read_to_string(dir.join("memory.stat")).unwrap_or_default();
    let droppable = stat
        .lines()
        .find_map(|l| l.strip_prefix("inactive_file "))
        .and_then(|n| n.trim().parse::<u64>().ok())
        .unwrap_or(0);
    Some(limit.saturating_sub(used.saturating_sub(droppable)))
}

/// Bytes of the field `key` of a `/proc` table in kB.
fn read_kib(path: &str, key: &str) -> Option<u64> {
    let table = std::fs::read_to_string(path).ok()?;
    let field = table.lines().find_map(|l| l.strip_prefix(key))?;
    field.split_whitespace().next()?.parse::<u64>().ok().map(|kib| kib * 1024)
}

/// Highest resident memory of this process so far in bytes (`VmHWM`); 0 where the system does not tell.
pub fn peak_resident_bytes() -> u64 {
    read_kib("/proc/self/status", "VmHWM:").unwrap_or(0)
}

/// Resident memory of this process now in bytes (`VmRSS`); 0 where the system does not tell.
pub fn resident_bytes() -> u64 {
    read_kib("/proc/self/status", "VmRSS:").unwrap_or(0)
}

/// Bytes for people: `1.97 GiB`, `12.06 MiB`.
pub fn format_bytes(bytes: u64) -> String {
    let b = bytes as f64;
    match bytes {
        0..1024 => format!("{bytes} B"),
        1024..1048576 => format!("{:.1} KiB", b / 1024.0),
        1048576..1073741824 => format!("{:.2} MiB", b / 1048576.0),
        _ => format!("{:.2} GiB", b / 1073741824.0),
    }
}

/// A budget exactly, in MiB: `41.0625 MiB`. Exact because budgets come in 1/16 MiB.
pub fn format_budget(bytes: u64) -> String {
    format!("{} MiB", bytes as f64 / 1048576.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amounts_of_memory_parse() {
        assert_eq!(Memory::parse("64MiB"), Ok(Memory::Bytes(64 << 20)));
        assert_eq!(Memory::parse("2GiB"), Ok(Memory::Bytes(2 << 30)));
        assert_eq!(Memory::parse("1.5 GiB"), Ok(Memory::Bytes(3 << 29)));
        assert_eq!(Memory::parse("12345B"), Ok(Memory::Bytes(12345)));
        assert_eq!(Memory::parse("auto"), Ok(Memory::Auto));
    }

    #[test]
    fn what_is_no_amount_is_refused_with_a_hint() {
        for text in ["64", "64MB", "", "MiB", "-1MiB", "0MiB", "1e400GiB", "nanB", "12 parsecs"] {
            let e = Memory::parse(text).unwrap_err();
            assert!(e.contains("\nhint: "), "{text}: {e}");
        }
    }

    #[test]
    fn a_budget_printed_in_mib_is_that_very_budget() {
        for quanta in [1, 7, 656, 657, 31_415] {
            let bytes = quanta * BUDGET_QUANTUM_BYTES;
            assert_eq!(Memory::parse(&format_budget(bytes)).unwrap().resolve(), bytes);
            assert_eq!(Memory::Bytes(bytes + 1).resolve(), bytes);
        }
    }

    #[test]
    fn auto_is_some_of_what_is_free() {
        let bytes = Memory::Auto.resolve();
        assert!(bytes > 0 && bytes < read_kib("/proc/meminfo", "MemTotal:").unwrap());
    }

    #[test]
    fn the_peak_is_at_least_what_is_resident() {
        let now = resident_bytes();
        assert!(now > 0 && peak_resident_bytes() >= now / 2);
    }
}

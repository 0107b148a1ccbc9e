//! Memory cgroups (versions 1 and 2) of a size, to run programs in.

use std::path::{Path, PathBuf};
use std::process::Output;

use crate::Result;
use crate::shell::output;

/// A memory cgroup, removed when dropped.
pub(crate) struct Cgroup {
    folder: PathBuf,
}

impl Cgroup {
    /// `None` where this process may not make one.
    pub(crate) fn new(bytes: u64) -> Option<Self> {
        let name = format!("ounce-accept-{}-{bytes}", std::process::id());
        let places =
            [("/sys/fs/cgroup/memory", "memory.limit_in_bytes"), ("/sys/fs/cgroup", "memory.max")];
        places.into_iter().find_map(|(parent, limit)| {
            let folder = Path::new(parent).join(&name);
            std::fs::create_dir(&folder).ok()?;
            let group = Self { folder };
            std::fs::write(group.folder.join(limit), bytes.to_string()).ok()?;
            Some(group)
        })
    }

    /// Runs a program in the group, to its end.
    pub(crate) fn run(&self, program: &str, args: &[&str]) -> Result<Output> {
        let procs = self.folder.join("cgroup.procs");
        let enter = format!("echo $$ > {} && exec \"$@\"", procs.display());
        output("sh", &[&["-c", &enter, "sh", program], args].concat())
    }

    /// Processes of the group that the kernel has killed for want of memory, if it tells.
    pub(crate) fn n_killed(&self) -> Option<u64> {
        ["memory.oom_control", "memory.events"].into_iter().find_map(|name| {
            let table = std::fs::read_to_string(self.folder.join(name)).ok()?;
            let count = table.lines().find_map(|line| line.strip_prefix("oom_kill "))?;
            count.trim().parse().ok()
        })
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // An empty group that stays behind does no harm; the next run has another name.
        let _ = std::fs::remove_dir(&self.folder);
    }
}

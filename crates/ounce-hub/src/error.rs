//! What can go wrong between a hub and the cache.

use std::io;
use std::path::{Path, PathBuf};

/// Every failure of this crate. Each message ends with a `hint:` line.
#[derive(Debug, thiserror::Error)]
pub enum HubError {
    /// The request makes no sense for this model.
    #[error("{what}\nhint: {hint}")]
    Usage {
        /// What was asked for.
        what: String,
        /// What to ask for instead.
        hint: String,
    },
    /// The hub has no such model, revision or file.
    #[error(
        "{url}: the hub has nothing there (404)\nhint: check the name, and the revision after @"
    )]
    NotFound {
        /// What was asked for.
        url: String,
    },
    /// The hub does not let us in.
    #[error(
        "{url}: the hub wants a token for this ({status})\n\
         hint: set HF_TOKEN to a token of an account that may read the model"
    )]
    Unauthorized {
        /// What was asked for.
        url: String,
        /// 401 or 403.
        status: u16,
    },
    /// What the hub said makes no sense.
    #[error("{url}: {what}\nhint: check HF_ENDPOINT, or try again later")]
    BadAnswer {
        /// What was asked for.
        url: String,
        /// What is wrong with the answer.
        what: String,
    },
    /// The network failed. What has arrived is kept.
    #[error(
        "{url}: {what}\nhint: check the network and run the same command again: it goes on where it stopped"
    )]
    Network {
        /// What was asked for.
        url: String,
        /// What happened.
        what: String,
    },
    /// A file arrived whole, but it is not the file that the hub announced. It was removed.
    #[error(
        "{file}: its checksum is {found}, the hub says {expected}\nhint: run the same command again"
    )]
    Checksum {
        /// The file's name.
        file: String,
        /// What the hub announced.
        expected: String,
        /// What arrived.
        found: String,
    },
    /// Too little room.
    #[error(
        "{} has {free_bytes} bytes free, {needed_bytes} are needed\n\
         hint: free some disk space, or set HF_HOME to another disk",
        dir.display()
    )]
    NoRoom {
        /// The cache.
        dir: PathBuf,
        /// What is still to be fetched.
        needed_bytes: u64,
        /// What there is.
        free_bytes: u64,
    },
    /// The cache cannot be written or read.
    #[error("{}: {source}\nhint: check the permissions and the disk of the cache (HF_HOME)", path.display())]
    Files {
        /// The file or directory.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// The caller asked to stop. What has arrived is kept.
    #[error("stopped\nhint: run the same command again: it goes on where it stopped")]
    Interrupted,
}

impl HubError {
    /// Writing or reading `path` failed.
    pub(crate) fn files(path: &Path) -> impl FnOnce(io::Error) -> Self {
        |source| Self::Files { path: path.into(), source }
    }
}

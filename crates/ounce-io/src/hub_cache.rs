//! Models by name in the cache that Hugging Face's tools share.
//!
//! Layout: `models--ORG--NAME/` holds `refs/REV`, a file with the name of a commit; `snapshots/COMMIT/`, the files as
//! links; and `blobs/`, what they link to. `ounce pull` fills it, and so do `transformers` and `hf download`.

use std::path::{Path, PathBuf};

use crate::error::IoError;
use crate::json::read_small_file;
use crate::model_files::is_plain_name;

/// The revision that is meant where none is named.
pub const DEFAULT_REVISION: &str = "main";
/// Longest name of an organisation, a model or a revision.
const MAX_PART_BYTES: usize = 96;

/// A model on the hub: ORG/NAME or ORG/NAME@REVISION.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HubName {
    /// Who publishes it.
    pub organisation: String,
    /// The model.
    pub name: String,
    /// A branch, a tag or a commit.
    pub revision: String,
}

impl HubName {
    /// The folder of the model in the cache.
    pub fn folder(&self) -> String {
        format!("models--{}--{}", self.organisation, self.name)
    }
}

impl std::fmt::Display for HubName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.organisation, self.name)?;
        if self.revision == DEFAULT_REVISION { Ok(()) } else { write!(f, "@{}", self.revision) }
    }
}

/// The model that a path names, if it has the form of such a name.
pub fn hub_name(path: &Path) -> Option<HubName> {
    let text = path.to_str()?;
    let (text, revision) = text.split_once('@').unwrap_or((text, DEFAULT_REVISION));
    let (organisation, name) = text.split_once('/')?;
    let is_part = |part: &&str| {
        let is_allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        part.len() <= MAX_PART_BYTES
            && is_plain_name(part)
            && part.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '_')
            && part.chars().all(is_allowed)
            // The cache joins names by two dashes.
            && !part.contains("--")
            && !part.contains("..")
    };
    [organisation, name, revision].iter().all(is_part).then(|| HubName {
        organisation: organisation.to_owned(),
        name: name.to_owned(),
        revision: revision.to_owned(),
    })
}

/// Whether a revision is the name of a commit.
pub fn is_commit(revision: &str) -> bool {
    revision.len() == 40 && revision.bytes().all(|b| b.is_ascii_hexdigit())
}

/// The files of a model in the cache at `hub_dir`.
///
/// # Errors
/// `Missing`, with the command that fetches it.
pub fn cached_snapshot(hub_dir: &Path, name: &HubName) -> Result<PathBuf, IoError> {
    let folder = hub_dir.join(name.folder());
    let commit = if is_commit(&name.revision) {
        Some(name.revision.clone())
    } else {
        let path = folder.join("refs").join(&name.revision);
        let text = path.exists().then(|| read_small_file(&path, 1 << 10)).transpose()?;
        text.map(|bytes| String::from_utf8_lossy(&bytes).trim().to_owned()).filter(|c| is_commit(c))
    };
    let snapshot = commit.map(|commit| folder.join("snapshots").join(commit));
    snapshot.filter(|dir| dir.is_dir()).ok_or_else(|| IoError::Missing {
        path: name.to_string().into(),
        hint: format!("`ounce pull {name}` fetches it into {}", hub_dir.display()).into(),
    })
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn names_are_told_from_paths() {
        let name = hub_name(Path::new("HuggingFaceTB/SmolLM2-135M@v1.0")).unwrap();
        assert_eq!(name.folder(), "models--HuggingFaceTB--SmolLM2-135M");
        assert_eq!((name.revision.as_str(), name.to_string().len()), ("v1.0", 31));
        assert_eq!(hub_name(Path::new("a/b")).unwrap().to_string(), "a/b");
        for path in [
            "a", "a/b/c", "/a/b", "./b", "../b", "a/..", "a/b@", "a/b c", "a/x--y", "a/",
            "a/b@../x",
        ] {
            assert_eq!(hub_name(Path::new(path)), None, "{path}");
        }
    }

    #[test]
    fn a_model_is_found_by_its_revision_or_its_commit() {
        let hub = tempfile::tempdir().unwrap();
        let commit = "0123456789abcdef0123456789abcdef01234567";
        let snapshot = hub.path().join("models--a--b/snapshots").join(commit);
        fs::create_dir_all(&snapshot).unwrap();
        fs::create_dir_all(hub.path().join("models--a--b/refs")).unwrap();
        fs::write(hub.path().join("models--a--b/refs/main"), commit).unwrap();
        let find = |text: &str| cached_snapshot(hub.path(), &hub_name(Path::new(text)).unwrap());
        assert_eq!(find("a/b").unwrap(), snapshot);
        assert_eq!(find(&format!("a/b@{commit}")).unwrap(), snapshot);
        for text in ["a/b@other", "a/c"] {
            let message = find(text).unwrap_err().to_string();
            assert!(message.contains(&format!("`ounce pull {text}` fetches it")), "{message}");
        }
        fs::write(hub.path().join("models--a--b/refs/main"), "../../../etc").unwrap();
        assert!(find("a/b").is_err());
    }
}

//! What a model on a hub consists of, and which of it is fetched.
//!
//! Of an answer nothing is believed: names must be plain (no folders, no way out), lengths are bounded by the free
//! disk later, and a file without a checksum is not fetched.

use serde_json::Value;

use crate::digest::Checksum;

/// Most files of one model.
const MAX_FILES: usize = 10_000;
/// Longest name of a file.
const MAX_NAME_BYTES: usize = 255;
/// Kinds of files that cannot run code.
const SAFE_ENDINGS: [&str; 7] =
    [".json", ".safetensors", ".gguf", ".jinja", ".md", ".txt", "tokenizer.model"];

/// One file of a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RemoteFile {
    pub(crate) name: String,
    pub(crate) n_bytes: u64,
    pub(crate) checksum: Checksum,
}

/// A model at one commit.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Listing {
    pub(crate) commit: String,
    pub(crate) files: Vec<RemoteFile>,
    /// Names of files that are not fetched.
    pub(crate) left_out: Vec<String>,
}

impl Listing {
    /// Reads the hub's answer about a revision.
    ///
    /// # Errors
    /// What is wrong with it.
    pub(crate) fn parse(answer: &[u8]) -> Result<Self, String> {
        let answer: Value =
            serde_json::from_slice(answer).map_err(|e| format!("the answer is not JSON: {e}"))?;
        let commit = answer["sha"].as_str().filter(|sha| ounce_io::is_commit(sha));
        let commit = commit.ok_or("the answer names no commit")?.to_owned();
        let all = answer["siblings"].as_array().ok_or("the answer lists no files")?;
        if all.len() > MAX_FILES {
            return Err(format!("the model has {} files, at most {MAX_FILES} are read", all.len()));
        }
        let mut listing = Self { commit, files: Vec::new(), left_out: Vec::new() };
        for file in all {
            let name = file["rfilename"].as_str().unwrap_or_default();
            if !is_safe(name) {
                listing.left_out.push(name.chars().take(MAX_NAME_BYTES).collect());
                continue;
            }
            let about = RemoteFile::parse(name, file);
            listing.files.push(about.ok_or(format!("`{name}` has no length or no checksum"))?);
        }
        listing.files.sort_by(|a, b| a.name.cmp(&b.name));
        listing.files.dedup_by(|a, b| a.name == b.name);
        Ok(listing)
    }
}

impl RemoteFile {
    fn parse(name: &str, file: &Value) -> Option<Self> {
        let is_hex = |text: &&str, n: usize| {
            text.len() == n && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
        };
        let large = &file["lfs"];
        let (n_bytes, checksum) = if large.is_object() {
            let sha256 = large["sha256"].as_str().filter(|hex| is_hex(hex, 64))?;
            (&large["size"], Checksum::Sha256(sha256.to_owned()))
        } else {
            let blob = file["blobId"].as_str().filter(|hex| is_hex(hex, 40))?;
            (&file["size"], Checksum::GitBlob(blob.to_owned()))
        };
        Some(Self { name: name.to_owned(), n_bytes: n_bytes.as_u64()?, checksum })
    }
}

/// Whether a file of this name is fetched: a plain name of a kind that cannot run code.
fn is_safe(name: &str) -> bool {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | '+' | ' ');
    name.len() <= MAX_NAME_BYTES
        && !name.starts_with('.')
        && name.chars().all(is_plain)
        && SAFE_ENDINGS.iter().any(|ending| name.ends_with(ending))
}

#[cfg(test)]
mod tests {
    use super::*;

    const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

    fn listing(siblings: &str) -> Result<Listing, String> {
        Listing::parse(format!(r#"{{"sha": "{COMMIT}", "siblings": {siblings}}}"#).as_bytes())
    }

    #[test]
    fn only_plain_files_that_cannot_run_code_are_fetched() {
        let file =
            |name: &str| format!(r#"{{"rfilename": "{name}", "size": 3, "blobId": "{COMMIT}"}}"#);
        let names = [
            "config.json",
            "model.safetensors",
            "pytorch_model.bin",
            "x.py",
            "../x.json",
            "sub/x.json",
            ".x.json",
            "tokenizer.model",
            "a.pkl",
            "chat_template.jinja",
            "w.gguf",
        ];
        let all = names.map(file).join(",");
        let found = listing(&format!("[{all}]")).unwrap();
        let fetched: Vec<&str> = found.files.iter().map(|f| f.name.as_str()).collect();
        let want = [
            "chat_template.jinja",
            "config.json",
            "model.safetensors",
            "tokenizer.model",
            "w.gguf",
        ];
        assert_eq!(fetched, want);
        assert_eq!(found.left_out.len(), 6);
    }

    #[test]
    fn files_without_length_or_checksum_and_answers_of_another_form_are_refused() {
        for siblings in [
            r#"[{"rfilename": "a.json"}]"#,
            r#"[{"rfilename": "a.json", "size": 1, "blobId": "../../etc"}]"#,
            r#"[{"rfilename": "a.json", "size": -1, "blobId": "0123456789abcdef0123456789abcdef01234567"}]"#,
            r#"[{"rfilename": "a.json", "lfs": {"sha256": "00", "size": 1}}]"#,
        ] {
            assert!(listing(siblings).unwrap_err().contains("`a.json`"), "{siblings}");
        }
        assert!(listing("3").unwrap_err().contains("lists no files"));
        assert!(Listing::parse(b"<html>").unwrap_err().contains("not JSON"));
        assert!(Listing::parse(b"{}").unwrap_err().contains("no commit"));
    }
}

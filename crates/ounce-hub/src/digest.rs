//! Checksums as the hub has them: SHA-256 of large files, and of small ones Git's name of the content, the SHA-1 of
//! `blob LENGTH\0` and the content. Large files are trusted to SHA-256; SHA-1 stands for small texts only.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use sha1::Sha1;
use sha2::{Digest, Sha256};

/// What a file must hash to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Checksum {
    /// In hex.
    Sha256(String),
    /// In hex.
    GitBlob(String),
}

impl Checksum {
    /// The checksum in hex, which is the name of the file in the cache too.
    pub(crate) fn hex(&self) -> &str {
        match self {
            Self::Sha256(hex) | Self::GitBlob(hex) => hex,
        }
    }

    /// The checksum of a file of `n_bytes`, in hex.
    pub(crate) fn of_file(&self, path: &Path, n_bytes: u64) -> io::Result<String> {
        match self {
            Self::Sha256(_) => hash(path, Sha256::new()),
            Self::GitBlob(_) => {
                let mut sha1 = Sha1::new();
                sha1.update(format!("blob {n_bytes}\0"));
                hash(path, sha1)
            }
        }
    }
}

fn hash<D: Digest>(path: &Path, mut digest: D) -> io::Result<String> {
    let mut file = File::open(path)?;
    let mut buffer = vec![0; 256 << 10];
    loop {
        let n = file.read(&mut buffer)?;
        if n == 0 {
            break;
        }
        digest.update(&buffer[..n]);
    }
    let hex = |text: String, byte: &u8| text + &format!("{byte:02x}");
    Ok(digest.finalize().iter().fold(String::new(), hex))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksums_are_those_of_sha256sum_and_git() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x");
        std::fs::write(&path, "hello\n").unwrap();
        let sha256 = Checksum::Sha256(String::new()).of_file(&path, 6).unwrap();
        assert_eq!(sha256, "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03");
        let blob = Checksum::GitBlob(String::new()).of_file(&path, 6).unwrap();
        assert_eq!(blob, "ce013625030ba8dba906f756967f9e9ca394464a");
    }
}

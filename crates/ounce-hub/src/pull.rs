//! From a hub into the cache.
//!
//! Every file becomes a blob named by its checksum. It grows as `blobs/CHECKSUM.incomplete`, which a later run goes on
//! with, and is renamed when its length and checksum are right. When all files are there, they are linked into
//! `snapshots/COMMIT/`, and last `refs/REVISION` names the commit: so a model is in the cache whole or not at all.
//! A file that is there already is not fetched again.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use ounce_io::{HubName, is_commit};

use crate::client::{Client, network};
use crate::error::HubError;
use crate::listing::{Listing, RemoteFile};

/// Bytes that are read from the network at once.
const CHUNK_BYTES: usize = 256 << 10;
/// How often a transfer is begun again that makes no progress.
const MAX_TRIES: u32 = 3;

/// What to fetch, and from where to where.
#[derive(Debug, Clone)]
pub struct PullSettings {
    /// The model.
    pub name: HubName,
    /// Only these files; all safe ones where it is empty.
    pub files: Vec<String>,
    /// The hub, such as `https://huggingface.co`.
    pub endpoint: String,
    /// Sent to the hub.
    pub token: Option<String>,
    /// The cache.
    pub hub_dir: PathBuf,
}

/// How far a file is.
#[derive(Debug, Clone, Copy)]
pub struct Progress<'a> {
    /// Its name.
    pub file: &'a str,
    /// What has arrived, with what was there before.
    pub n_bytes: u64,
    /// What it will be.
    pub of_bytes: u64,
}

/// What was fetched.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PullRecord {
    /// The directory of the model.
    pub path: PathBuf,
    /// Its commit.
    pub commit: String,
    /// Its files.
    pub files: Vec<String>,
    /// Bytes that came over the network.
    pub fetched_bytes: u64,
    /// Files of the hub that were not fetched: they might run code, or lie in folders.
    pub left_out: Vec<String>,
}

/// Fetches a model; `progress` is told how far it is, and says `false` to stop.
///
/// # Errors
/// A model that is not there or not ours to read; a failing network or disk; a checksum that is wrong.
pub fn pull(
    settings: &PullSettings,
    progress: &mut dyn FnMut(Progress<'_>) -> bool,
) -> Result<PullRecord, HubError> {
    let HubName { organisation, name, revision } = &settings.name;
    let endpoint = settings.endpoint.trim_end_matches('/');
    let client = Client::new(endpoint, settings.token.clone());
    let url = format!("{endpoint}/api/models/{organisation}/{name}/revision/{revision}?blobs=true");
    let listing = Listing::parse(&client.get(&url)?)
        .map_err(|what| HubError::BadAnswer { url: url.clone(), what })?;
    let files = choose(settings, &listing)?;
    let folder = settings.hub_dir.join(settings.name.folder());
    let blobs = folder.join("blobs");
    fs::create_dir_all(&blobs).map_err(HubError::files(&blobs))?;
    check_room(&blobs, &files)?;
    let mut fetched_bytes = 0;
    for file in &files {
        let url = format!(
            "{endpoint}/{organisation}/{name}/resolve/{}/{}",
            listing.commit,
            encode(&file.name)
        );
        fetched_bytes += fetch(&client, &url, &blobs, file, progress)?;
    }
    let path = folder.join("snapshots").join(&listing.commit);
    for file in &files {
        link(&path, file)?;
    }
    if !is_commit(revision) {
        let refs = folder.join("refs");
        fs::create_dir_all(&refs).map_err(HubError::files(&refs))?;
        let file = refs.join(revision);
        // Half of it is never seen.
        ounce_io::write_file(&file, listing.commit.as_bytes()).map_err(|e| HubError::Files {
            path: file.clone(),
            source: std::io::Error::other(e.to_string().lines().next().unwrap_or_default()),
        })?;
    }
    Ok(PullRecord {
        path,
        commit: listing.commit,
        files: files.into_iter().map(|file| file.name).collect(),
        fetched_bytes,
        left_out: listing.left_out,
    })
}

/// The files that are wanted. Of several GGUF files (the same model in several types) one must be chosen.
fn choose(settings: &PullSettings, listing: &Listing) -> Result<Vec<RemoteFile>, HubError> {
    let is_gguf = |name: &&str| Path::new(name).extension().is_some_and(|e| e == "gguf");
    let names = listing.files.iter().map(|file| file.name.as_str());
    let gguf: Vec<&str> = names.filter(is_gguf).collect();
    let usage = |what: String, hint: String| HubError::Usage { what, hint };
    if listing.files.is_empty() {
        let what = format!("{} has no file that can be used", settings.name);
        return Err(usage(what, "pickle files are never fetched: look for safetensors".into()));
    }
    if settings.files.is_empty() {
        if gguf.len() > 1 {
            let what = format!("{} has {} GGUF files", settings.name, gguf.len());
            let hint = format!("choose one: --file {}", gguf.join(", --file "));
            return Err(usage(what, hint));
        }
        return Ok(listing.files.clone());
    }
    for wanted in &settings.files {
        if !listing.files.iter().any(|file| file.name == *wanted) {
            let names: Vec<&str> = listing.files.iter().map(|file| file.name.as_str()).collect();
            let what = format!("{} has no file `{wanted}` that is fetched", settings.name);
            return Err(usage(what, format!("it has {}", names.join(", "))));
        }
    }
    let is_wanted = |file: &&RemoteFile| settings.files.contains(&file.name);
    Ok(listing.files.iter().filter(is_wanted).cloned().collect())
}

/// Refuses what the disk has no room for.
fn check_room(blobs: &Path, files: &[RemoteFile]) -> Result<(), HubError> {
    let mut needed_bytes = 0_u64;
    for file in files.iter().filter(|file| !blobs.join(file.checksum.hex()).exists()) {
        let there = incomplete(blobs, file).metadata().map_or(0, |m| m.len());
        needed_bytes = needed_bytes.saturating_add(file.n_bytes.saturating_sub(there));
    }
    let free_bytes = ounce_io::real_disk().free_bytes(blobs).map_err(HubError::files(blobs))?;
    if needed_bytes <= free_bytes {
        return Ok(());
    }
    Err(HubError::NoRoom { dir: blobs.into(), needed_bytes, free_bytes })
}

fn incomplete(blobs: &Path, file: &RemoteFile) -> PathBuf {
    blobs.join(format!("{}.incomplete", file.checksum.hex()))
}

/// Fetches one file unless it is there; returns the bytes that came.
fn fetch(
    client: &Client,
    url: &str,
    blobs: &Path,
    file: &RemoteFile,
    progress: &mut dyn FnMut(Progress<'_>) -> bool,
) -> Result<u64, HubError> {
    let blob = blobs.join(file.checksum.hex());
    if blob.metadata().is_ok_and(|m| m.len() == file.n_bytes) {
        return Ok(0);
    }
    let path = incomplete(blobs, file);
    let mut target = OpenOptions::new();
    let target = target.create(true).append(true).open(&path).map_err(HubError::files(&path))?;
    // Two that append to one file would make nothing of it.
    target.try_lock().map_err(|e| match e {
        TryLockError::Error(e) => HubError::files(&path)(e),
        TryLockError::WouldBlock => HubError::files(&path)(io::Error::other(
            "another pull is fetching it, wait for its end",
        )),
    })?;
    if !path.exists() && blob.exists() {
        // The other one has come to its end in between.
        return Ok(0);
    }
    let mut transfer = Transfer { target, path: &path, file, url, n_fetched: 0 };
    let mut n_tries = 0;
    loop {
        let before = transfer.len()?;
        if before == file.n_bytes {
            break;
        }
        match transfer.go_on(client, progress) {
            Ok(()) => {}
            Err(HubError::Network { .. }) if n_tries < MAX_TRIES => {}
            Err(e) => return Err(e),
        }
        // A connection that breaks now and then is no failure while something arrives.
        n_tries = if transfer.len()? > before { 0 } else { n_tries + 1 };
        if n_tries == MAX_TRIES {
            return Err(network(url, &format!("ended after {before} of {} bytes", file.n_bytes)));
        }
    }
    transfer.target.sync_all().map_err(HubError::files(&path))?;
    let found = file.checksum.of_file(&path, file.n_bytes).map_err(HubError::files(&path))?;
    if found != file.checksum.hex() {
        // What arrived is of no use.
        fs::remove_file(&path).map_err(HubError::files(&path))?;
        let expected = file.checksum.hex().to_owned();
        return Err(HubError::Checksum { file: file.name.clone(), expected, found });
    }
    fs::rename(&path, &blob).map_err(HubError::files(&blob))?;
    Ok(transfer.n_fetched)
}

/// A file on its way.
struct Transfer<'a> {
    target: File,
    path: &'a Path,
    file: &'a RemoteFile,
    url: &'a str,
    n_fetched: u64,
}

impl Transfer<'_> {
    fn len(&self) -> Result<u64, HubError> {
        Ok(self.target.metadata().map_err(HubError::files(self.path))?.len())
    }

    /// One request; what arrives is appended, at most as much as was announced.
    fn go_on(
        &mut self,
        client: &Client,
        progress: &mut dyn FnMut(Progress<'_>) -> bool,
    ) -> Result<(), HubError> {
        let failed = |e| HubError::files(self.path)(e);
        let there = self.len()?;
        // More than announced is not the file.
        let start = if there > self.file.n_bytes { 0 } else { there };
        let (response, start) = client.get_from(self.url, start)?;
        if start != there {
            self.target.set_len(start).map_err(failed)?;
        }
        let mut left = self.file.n_bytes - start;
        let mut reader = response.into_body().into_reader();
        let mut buffer = vec![0; CHUNK_BYTES];
        while left > 0 {
            let most = left.min(CHUNK_BYTES as u64) as usize;
            let n = reader.read(&mut buffer[..most]).map_err(|e| network(self.url, &e))?;
            if n == 0 {
                break;
            }
            self.target.write_all(&buffer[..n]).map_err(failed)?;
            left -= n as u64;
            self.n_fetched += n as u64;
            let n_bytes = self.file.n_bytes - left;
            let told = Progress { file: &self.file.name, n_bytes, of_bytes: self.file.n_bytes };
            if !progress(told) {
                return Err(HubError::Interrupted);
            }
        }
        Ok(())
    }
}

/// Links a blob into the directory of the model.
fn link(snapshot: &Path, file: &RemoteFile) -> Result<(), HubError> {
    fs::create_dir_all(snapshot).map_err(HubError::files(snapshot))?;
    let path = snapshot.join(&file.name);
    let target = Path::new("../../blobs").join(file.checksum.hex());
    if fs::read_link(&path).is_ok_and(|old| old == target) {
        return Ok(());
    }
    if path.symlink_metadata().is_ok() {
        fs::remove_file(&path).map_err(HubError::files(&path))?;
    }
    std::os::unix::fs::symlink(target, &path).map_err(HubError::files(&path))
}

/// A file's name in an address: names are plain but for spaces and pluses.
fn encode(name: &str) -> String {
    name.replace(' ', "%20").replace('+', "%2B")
}

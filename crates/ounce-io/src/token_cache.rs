//! Token ids on disk, so that text is tokenized once and then read by `pread`, block by block.
//!
//! Layout, all little endian:
//!
//! ```text
//!  0  "OUNCETOK"    8  version u32   12  bytes per id u32 (2 or 4)   16  number of ids u64
//! 24  tokenizer's fingerprint u64   32  number of sources u32        36  largest id u32
//! 40  offset of the ids u64         48  XXH64 of all behind the head 56  XXH64 of the head without this field u64
//! 64  number of rows u64, 0 for a stream                             72  bytes of notes u64
//! 80  per source: length of its path u32, path, its bytes u64, mtime ns u64, XXH64 of its bytes u64
//! ..  the ids, those of a row with the top bit set where they are supervised
//! ..  for rows: the number of the first id of each row, and of the end, u64 each
//! ..  the notes: a JSON object of whoever wrote the cache
//! ```
//!
//! A cache holds one stream of ids, or rows of ids. Rows of other numbers than ids are kept the same way (`packs.rs`).
//!
//! Invariants: a cache that opens is complete and undamaged (every byte is covered by one of the two hashes); it is
//! fresh if tokenizer and sources are the same, where a source counts as the same if path, length and time agree, or
//! path, length and content. A cache is written as a stream and appears when it is complete.
//!
//! Memory: one batch of text and its ids while writing (`encode.rs`), one small buffer on the stack while reading.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::atomic::AtomicFile;
use crate::dataset::RowOptions;
use crate::disk::parent_of;
use crate::encode::encode_files;
use crate::error::IoError;
use crate::hash::{SourceHash, Xxh64, hash_file};
use crate::json::open_regular;
use crate::temp::create_locked;
use crate::tokenizer::{Tokenizer, tokenizer_fingerprint};

const MAGIC: &[u8; 8] = b"OUNCETOK";
/// Goes up with every change of the layout or of how text is cut and joined.
const VERSION: u32 = 2;
const FIXED_BYTES: usize = 80;
/// Where the hash of the head stands.
const HASH_AT: usize = 56;
/// Longest notes that are read.
const MAX_NOTES_BYTES: u64 = 4 << 20;
/// Set on ids of a row that are supervised.
pub(crate) const SUPERVISED_BIT: u32 = 1 << 31;
/// Longest head: the paths of the sources are in it.
const MAX_HEAD_BYTES: u64 = 1 << 20;
/// Bytes of ids that are written at once.
const WRITE_BYTES: usize = 64 << 10;
/// Bytes of the buffer through which ids are read.
const READ_BYTES: usize = 8 << 10;

const DAMAGED: &str = "delete the file: it is made again from the text";

/// An open token cache.
#[derive(Debug)]
pub struct TokenCache {
    path: PathBuf,
    file: File,
    head: Head,
}

/// What the head of a cache says.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Head {
    id_bytes: u32,
    n_tokens: u64,
    fingerprint: u64,
    max_id: u32,
    data_offset: u64,
    data_hash: u64,
    n_rows: u64,
    notes_bytes: u64,
    sources: Vec<SourceRecord>,
}

/// A data file as it was when it was tokenized.
#[derive(Debug, Clone, PartialEq, Eq)]
struct SourceRecord {
    path: PathBuf,
    mtime_ns: u64,
    content: SourceHash,
}

/// Where the cache for these data files and this tokenizer lies within `dir`.
///
/// # Errors
/// `Missing`, `Read`.
pub fn cache_path(dir: &Path, files: &[PathBuf], fingerprint: u64) -> Result<PathBuf, IoError> {
    let mut hash = Xxh64::new();
    hash.update(&fingerprint.to_le_bytes());
    for file in files {
        let record = SourceRecord::stat(file)?;
        hash.update(record.path.as_os_str().as_bytes());
        hash.update(&[0]);
    }
    Ok(dir.join(format!("tokens-{:016x}.bin", hash.digest())))
}

/// Tokenizes `files` on `n_threads` threads into one stream of ids at `cache_path`: rows of `.jsonl` files are joined
/// by the tokenizer's end-of-text token where it has one.
///
/// # Errors
/// As reading the text; `BadLine` for text that the tokenizer cannot encode; `Write`.
pub fn tokenize_to_cache(
    files: &[PathBuf],
    tokenizer: &Tokenizer,
    cache_path: &Path,
    n_threads: usize,
) -> Result<TokenCache, IoError> {
    let (options, fingerprint) = (RowOptions::default(), tokenizer.fingerprint());
    tokenize_to_cache_with(files, &options, tokenizer, fingerprint, cache_path, n_threads)
}

/// The same, with rows read as `options` say, for a cache that goes by `fingerprint`.
///
/// # Errors
/// As [`tokenize_to_cache`].
pub fn tokenize_to_cache_with(
    files: &[PathBuf],
    options: &RowOptions,
    tokenizer: &Tokenizer,
    fingerprint: u64,
    cache_path: &Path,
    n_threads: usize,
) -> Result<TokenCache, IoError> {
    let id_bytes = if tokenizer.vocab_size() <= 1 << 16 { 2 } else { 4 };
    let mut writer = CacheWriter::create(cache_path, id_bytes, fingerprint, files)?;
    let done = encode_files(files, options, tokenizer, n_threads, |ids| writer.append(ids))?;
    let notes = StreamNotes { file_tokens: done.file_tokens, n_bad: done.n_bad };
    writer.finish(&done.hashes, &notes)?;
    TokenCache::open(cache_path)
}

/// Notes of a stream.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct StreamNotes {
    /// Ids of each file.
    pub file_tokens: Vec<u64>,
    /// Broken rows that were passed over.
    pub n_bad: u64,
}

impl TokenCache {
    /// Opens a cache and verifies all of it.
    ///
    /// # Errors
    /// `Missing`, `Read`, `BadFile` where it is damaged or of another version.
    pub fn open(path: &Path) -> Result<Self, IoError> {
        let file = open_regular(path)?;
        let head = Head::read(&file, path)?;
        let cache = Self { path: path.into(), file, head };
        cache.verify_data()?;
        Ok(cache)
    }

    /// Opens the cache at `path` if it is there, undamaged, and still what tokenizing `files` would give.
    ///
    /// # Errors
    /// `Missing` or `Read` for the data files; a missing, stale or damaged cache is `None`.
    pub fn open_fresh(
        path: &Path,
        files: &[PathBuf],
        fingerprint: u64,
    ) -> Result<Option<Self>, IoError> {
        let Ok(cache) = Self::open(path) else { return Ok(None) };
        if cache.head.fingerprint != fingerprint || cache.head.sources.len() != files.len() {
            return Ok(None);
        }
        for (record, file) in cache.head.sources.iter().zip(files) {
            if !record.is_same(file)? {
                return Ok(None);
            }
        }
        Ok(Some(cache))
    }

    /// Opens the cache for `files` in the directory `dir`, made if it is not there; makes it with the tokenizer at
    /// `tokenizer_path`, on this thread, where there is none that is fresh. The tokenizer is loaded only then.
    ///
    /// # Errors
    /// As [`tokenize_to_cache`] and [`Tokenizer::load`].
    pub fn open_or_build(
        dir: &Path,
        files: &[PathBuf],
        tokenizer_path: &Path,
    ) -> Result<Self, IoError> {
        let fingerprint = tokenizer_fingerprint(tokenizer_path)?;
        let path = cache_path(dir, files, fingerprint)?;
        if let Some(cache) = Self::open_fresh(&path, files, fingerprint)? {
            return Ok(cache);
        }
        fs::create_dir_all(dir).map_err(|e| IoError::writing(dir, 0, e))?;
        tokenize_to_cache(files, &Tokenizer::load(tokenizer_path)?, &path, 1)
    }

    /// Number of ids.
    pub fn n_tokens(&self) -> u64 {
        self.head.n_tokens
    }

    /// The largest id, which must be below the model's vocabulary size; 0 without any id.
    pub fn max_id(&self) -> u32 {
        self.head.max_id
    }

    /// What the cache goes by: the tokenizer, and how the data was read.
    pub fn fingerprint(&self) -> u64 {
        self.head.fingerprint
    }

    /// What the files held from which the ids were made, whatever they are called.
    pub fn contents_hash(&self) -> u64 {
        let mut hash = Xxh64::new();
        for source in &self.head.sources {
            hash.update(&source.content.n_bytes.to_le_bytes());
            hash.update(&source.content.hash.to_le_bytes());
        }
        hash.digest()
    }

    /// Number of rows, 0 for a stream.
    pub fn n_rows(&self) -> u64 {
        self.head.n_rows
    }

    /// Reads where row `row` begins, and its length in ids.
    ///
    /// # Errors
    /// `Read`; `BadFile` where the file was changed since it was opened.
    ///
    /// # Panics
    /// If there is no such row.
    pub fn row(&self, row: u64) -> Result<(u64, usize), IoError> {
        assert!(row < self.n_rows(), "row {row} of {}", self.n_rows());
        let mut ends = [0; 16];
        let offset = self.head.index_offset() + 8 * row;
        self.file.read_exact_at(&mut ends, offset).map_err(|e| IoError::reading(&self.path, e))?;
        let (start, end) = (u64_at(&ends, 0), u64_at(&ends, 8));
        if start > end || end > self.n_tokens() {
            return Err(IoError::bad_file(&self.path, "a row's place is impossible", DAMAGED));
        }
        Ok((start, (end - start) as usize))
    }

    /// Reads the start of row `row` and returns its length, at most `ids.len()`. Allocates nothing.
    ///
    /// # Errors
    /// As [`Self::row`].
    pub fn read_row(
        &self,
        row: u64,
        ids: &mut [i32],
        supervised: &mut [bool],
    ) -> Result<usize, IoError> {
        let (start, len) = self.row(row)?;
        let len = len.min(ids.len());
        self.read(start, &mut ids[..len])?;
        for (id, supervised) in ids[..len].iter_mut().zip(supervised) {
            *supervised = *id < 0;
            *id &= !SUPERVISED_BIT as i32;
        }
        Ok(len)
    }

    /// What the writer of the cache noted.
    ///
    /// # Errors
    /// `Read`; `BadFile` where the notes are not of this kind.
    pub fn notes<T: DeserializeOwned>(&self) -> Result<T, IoError> {
        let mut bytes = vec![0; self.head.notes_bytes as usize];
        let offset = self.head.notes_offset();
        self.file.read_exact_at(&mut bytes, offset).map_err(|e| IoError::reading(&self.path, e))?;
        serde_json::from_slice(&bytes)
            .map_err(|e| IoError::bad_file(&self.path, format!("broken notes: {e}"), DAMAGED))
    }

    /// Removes the name of the file, which stays readable while it is open.
    pub(crate) fn remove_file(&self) -> Result<(), IoError> {
        fs::remove_file(&self.path).map_err(|e| IoError::writing(&self.path, 0, e))
    }

    /// The cache's own path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The first data file, for messages.
    pub fn source_path(&self) -> &Path {
        self.head.sources.first().map_or(&self.path, |source| &source.path)
    }

    /// Reads ids `start..start + dst.len()`. Allocates nothing.
    ///
    /// # Errors
    /// `Read`; `BadFile` where the file was cut short since it was opened.
    ///
    /// # Panics
    /// If the range reaches beyond the last id.
    pub fn read(&self, start: u64, dst: &mut [i32]) -> Result<(), IoError> {
        let end = start.checked_add(dst.len() as u64);
        assert!(
            end.is_some_and(|end| end <= self.n_tokens()),
            "ids {start}.. of {} do not exist",
            self.n_tokens()
        );
        let id_bytes = self.head.id_bytes as usize;
        let mut buffer = [0; READ_BYTES];
        let mut offset = self.head.data_offset + start * id_bytes as u64;
        for part in dst.chunks_mut(READ_BYTES / id_bytes) {
            let bytes = &mut buffer[..part.len() * id_bytes];
            let read = self.file.read_exact_at(bytes, offset);
            read.map_err(|e| IoError::reading(&self.path, e))?;
            offset += bytes.len() as u64;
            if id_bytes == 2 {
                let ids = bytes.as_chunks().0;
                part.iter_mut().zip(ids).for_each(|(x, &id)| *x = u16::from_le_bytes(id).into());
            } else {
                let ids = bytes.as_chunks().0;
                part.iter_mut().zip(ids).for_each(|(x, &id)| *x = i32::from_le_bytes(id));
            }
        }
        Ok(())
    }

    /// Compares the ids with their hash.
    fn verify_data(&self) -> Result<(), IoError> {
        let mut hash = Xxh64::new();
        let mut buffer = [0; READ_BYTES];
        let end = self.head.notes_offset() + self.head.notes_bytes;
        let mut at = self.head.data_offset;
        while at < end {
            let bytes = &mut buffer[..((end - at) as usize).min(READ_BYTES)];
            let read = self.file.read_exact_at(bytes, at);
            read.map_err(|e| IoError::reading(&self.path, e))?;
            hash.update(bytes);
            at += bytes.len() as u64;
        }
        if hash.digest() == self.head.data_hash {
            return Ok(());
        }
        Err(IoError::bad_file(&self.path, "the ids do not match their checksum", DAMAGED))
    }
}

impl SourceRecord {
    /// The file as it is now, with its content still unread.
    fn stat(file: &Path) -> Result<Self, IoError> {
        let failed = |e| IoError::reading(file, e);
        let metadata = fs::metadata(file).map_err(failed)?;
        Ok(Self {
            path: file.canonicalize().map_err(failed)?,
            // Wraps for times before 1970: only equality matters.
            mtime_ns: (metadata.mtime() as u64)
                .wrapping_mul(1_000_000_000)
                .wrapping_add(metadata.mtime_nsec() as u64),
            content: SourceHash { n_bytes: metadata.len(), hash: 0 },
        })
    }

    /// Whether `file` still has the content of this record.
    fn is_same(&self, file: &Path) -> Result<bool, IoError> {
        let now = Self::stat(file)?;
        if now.path != self.path || now.content.n_bytes != self.content.n_bytes {
            return Ok(false);
        }
        if now.mtime_ns == self.mtime_ns {
            return Ok(true);
        }
        let (n_bytes, hash) = hash_file(file)?;
        Ok(SourceHash { n_bytes, hash } == self.content)
    }
}

impl Head {
    /// Bytes behind the head, if they can be counted.
    fn behind_bytes(&self) -> Option<u64> {
        let index =
            if self.n_rows == 0 { 0 } else { self.n_rows.checked_add(1)?.checked_mul(8)? };
        let ids = self.n_tokens.checked_mul(u64::from(self.id_bytes))?;
        let notes = Some(self.notes_bytes).filter(|&n| n <= MAX_NOTES_BYTES)?;
        ids.checked_add(index)?.checked_add(notes)
    }

    fn index_offset(&self) -> u64 {
        self.data_offset + self.n_tokens * u64::from(self.id_bytes)
    }

    fn notes_offset(&self) -> u64 {
        self.index_offset() + if self.n_rows == 0 { 0 } else { 8 * (self.n_rows + 1) }
    }

    /// The head as bytes; its length depends on the paths only.
    fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend(MAGIC);
        bytes.extend(VERSION.to_le_bytes());
        bytes.extend(self.id_bytes.to_le_bytes());
        bytes.extend(self.n_tokens.to_le_bytes());
        bytes.extend(self.fingerprint.to_le_bytes());
        bytes.extend((self.sources.len() as u32).to_le_bytes());
        bytes.extend(self.max_id.to_le_bytes());
        bytes.extend(self.data_offset.to_le_bytes());
        bytes.extend(self.data_hash.to_le_bytes());
        bytes.extend([0; 8]);
        bytes.extend(self.n_rows.to_le_bytes());
        bytes.extend(self.notes_bytes.to_le_bytes());
        for source in &self.sources {
            let path = source.path.as_os_str().as_bytes();
            bytes.extend((path.len() as u32).to_le_bytes());
            bytes.extend(path);
            for field in [source.content.n_bytes, source.mtime_ns, source.content.hash] {
                bytes.extend(field.to_le_bytes());
            }
        }
        let hash = head_hash(&bytes);
        bytes[HASH_AT..HASH_AT + 8].copy_from_slice(&hash.to_le_bytes());
        bytes
    }

    /// Reads and checks the head of an open file.
    fn read(file: &File, path: &Path) -> Result<Self, IoError> {
        let bad = |reason: &str| IoError::bad_file(path, reason, DAMAGED);
        let failed = |e| IoError::reading(path, e);
        let file_bytes = file.metadata().map_err(failed)?.len();
        let mut fixed = [0; FIXED_BYTES];
        if file_bytes < FIXED_BYTES as u64 {
            return Err(bad("too short for a token cache"));
        }
        file.read_exact_at(&mut fixed, 0).map_err(failed)?;
        let data_offset = u64_at(&fixed, 40);
        if !fixed.starts_with(MAGIC) || u32_at(&fixed, 8) != VERSION {
            return Err(bad("not a token cache of this version"));
        }
        if data_offset > file_bytes.min(MAX_HEAD_BYTES) || data_offset < FIXED_BYTES as u64 {
            return Err(bad("the head's length is impossible"));
        }
        let mut bytes = vec![0; data_offset as usize];
        file.read_exact_at(&mut bytes, 0).map_err(failed)?;
        if head_hash(&bytes) != u64_at(&bytes, HASH_AT) {
            return Err(bad("the head does not match its checksum"));
        }
        let head = Self::parse(&bytes).ok_or_else(|| bad("the head is malformed"))?;
        if head.behind_bytes() != Some(file_bytes - data_offset) {
            return Err(bad("the file's length is not that of its ids"));
        }
        Ok(head)
    }

    fn parse(bytes: &[u8]) -> Option<Self> {
        let mut rest = &bytes[FIXED_BYTES..];
        let mut sources = Vec::new();
        for _ in 0..u32_at(bytes, 32) {
            let (n, after) = rest.split_first_chunk::<4>()?;
            let (path, after) = after.split_at_checked(u32::from_le_bytes(*n) as usize)?;
            let (fields, after) = after.split_at_checked(24)?;
            sources.push(SourceRecord {
                path: std::ffi::OsStr::from_bytes(path).into(),
                mtime_ns: u64_at(fields, 8),
                content: SourceHash { n_bytes: u64_at(fields, 0), hash: u64_at(fields, 16) },
            });
            rest = after;
        }
        let id_bytes = u32_at(bytes, 12);
        (rest.is_empty() && (id_bytes == 2 || id_bytes == 4)).then(|| Self {
            id_bytes,
            n_tokens: u64_at(bytes, 16),
            fingerprint: u64_at(bytes, 24),
            max_id: u32_at(bytes, 36),
            data_offset: u64_at(bytes, 40),
            data_hash: u64_at(bytes, 48),
            n_rows: u64_at(bytes, 64),
            notes_bytes: u64_at(bytes, 72),
            sources,
        })
    }
}

/// Hash of a head, without the field that holds the hash.
fn head_hash(bytes: &[u8]) -> u64 {
    let mut hash = Xxh64::new();
    hash.update(&bytes[..HASH_AT]);
    hash.update(&bytes[HASH_AT + 8..]);
    hash.digest()
}

/// Makes the checksums of a damaged cache right again, where its layout still allows it, so that fuzzing gets behind
/// them.
#[cfg(any(test, feature = "testing"))]
pub(crate) fn reseal(bytes: &mut [u8]) {
    if bytes.len() < FIXED_BYTES {
        return;
    }
    let data_offset = u64_at(bytes, 40);
    if !(FIXED_BYTES as u64..=bytes.len() as u64).contains(&data_offset) {
        return;
    }
    let (head, data) = bytes.split_at_mut(data_offset as usize);
    let mut hash = Xxh64::new();
    hash.update(data);
    head[48..56].copy_from_slice(&hash.digest().to_le_bytes());
    let hash = head_hash(head);
    head[HASH_AT..HASH_AT + 8].copy_from_slice(&hash.to_le_bytes());
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

/// Writes ids behind a provisional head, then the index of rows and the notes, and the true head at the end.
///
/// Memory: two small buffers. The index waits in a file of its own until all ids are written.
pub(crate) struct CacheWriter {
    path: PathBuf,
    file: AtomicFile,
    head: Head,
    hash: Xxh64,
    buffer: Vec<u8>,
    starts: Option<RowStarts>,
}

/// The index of rows in the making: the number of each one's first id.
struct RowStarts {
    /// Has no name any more, so that nothing is left of it whatever happens.
    file: File,
    /// The last of them.
    buffer: Vec<u8>,
}

impl RowStarts {
    fn create(cache_path: &Path) -> std::io::Result<Self> {
        let (dir, name) = (parent_of(cache_path), cache_path.file_name().unwrap_or_default());
        let open = |path: &Path| File::options().read(true).write(true).create_new(true).open(path);
        let (file, path) = create_locked(&dir, &name.to_string_lossy(), open)?;
        fs::remove_file(path)?;
        Ok(Self { file, buffer: Vec::with_capacity(WRITE_BYTES + 8) })
    }

    fn push(&mut self, start: u64) -> std::io::Result<()> {
        self.buffer.extend(start.to_le_bytes());
        if self.buffer.len() >= WRITE_BYTES { self.flush() } else { Ok(()) }
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.file.write_all(&self.buffer)?;
        self.buffer.clear();
        Ok(())
    }
}

impl CacheWriter {
    /// Begins a cache of these files, with ids of 2 or 4 bytes.
    pub(crate) fn create(
        path: &Path,
        id_bytes: u32,
        fingerprint: u64,
        files: &[PathBuf],
    ) -> Result<Self, IoError> {
        let sources = files.iter().map(|f| SourceRecord::stat(f)).collect::<Result<Vec<_>, _>>()?;
        let mut head = Head {
            id_bytes,
            n_tokens: 0,
            fingerprint,
            max_id: 0,
            data_offset: 0,
            data_hash: 0,
            n_rows: 0,
            notes_bytes: 0,
            sources,
        };
        head.data_offset = head.to_bytes().len() as u64;
        if head.data_offset > MAX_HEAD_BYTES {
            return Err(IoError::Usage {
                what: format!("{} data files are too many for one cache", head.sources.len()),
                hint: "join the files".into(),
            });
        }
        let mut file = AtomicFile::create(path)?;
        file.write_all(&vec![0; head.data_offset as usize])?;
        let buffer = Vec::with_capacity(2 * WRITE_BYTES);
        Ok(Self { path: path.into(), file, head, hash: Xxh64::new(), buffer, starts: None })
    }

    /// Appends ids, with or without their top bit.
    pub(crate) fn append(&mut self, ids: &[u32]) -> Result<(), IoError> {
        self.head.n_tokens += ids.len() as u64;
        let plain = ids.iter().map(|id| id & !SUPERVISED_BIT);
        self.head.max_id = plain.fold(self.head.max_id, u32::max);
        for part in ids.chunks(WRITE_BYTES / 4) {
            if self.head.id_bytes == 2 {
                let narrow = |&id: &u32| {
                    u16::try_from(id).expect("the vocabulary has at most 65,536 ids").to_le_bytes()
                };
                self.buffer.extend(part.iter().flat_map(narrow));
            } else {
                self.buffer.extend(part.iter().flat_map(|id| id.to_le_bytes()));
            }
            self.flush_if_full()?;
        }
        Ok(())
    }

    /// Appends one row.
    pub(crate) fn append_row(&mut self, ids: &[u32]) -> Result<(), IoError> {
        let n_bytes = self.file.n_written_bytes() + self.index_bytes();
        let failed = |e| IoError::writing(&self.path, n_bytes, e);
        let starts = match &mut self.starts {
            Some(starts) => starts,
            none => none.insert(RowStarts::create(&self.path).map_err(failed)?),
        };
        starts.push(self.head.n_tokens).map_err(failed)?;
        self.head.n_rows += 1;
        self.append(ids)
    }

    /// Bytes of the index of the rows so far.
    fn index_bytes(&self) -> u64 {
        8 * (self.head.n_rows + 1)
    }

    /// Puts the index behind the ids.
    fn append_starts(&mut self) -> Result<(), IoError> {
        let Some(mut starts) = self.starts.take() else { return Ok(()) };
        let index_bytes = self.index_bytes();
        let n_bytes = self.file.n_written_bytes() + index_bytes;
        let pushed = starts.push(self.head.n_tokens).and_then(|()| starts.flush());
        pushed.map_err(|e| IoError::writing(&self.path, n_bytes, e))?;
        self.flush()?;
        let mut at = 0;
        while at < index_bytes {
            self.buffer.resize((index_bytes - at).min(WRITE_BYTES as u64) as usize, 0);
            let read = starts.file.read_exact_at(&mut self.buffer, at);
            read.map_err(|e| IoError::writing(&self.path, n_bytes, e))?;
            at += self.buffer.len() as u64;
            self.flush()?;
        }
        Ok(())
    }

    fn flush_if_full(&mut self) -> Result<(), IoError> {
        if self.buffer.len() >= WRITE_BYTES { self.flush() } else { Ok(()) }
    }

    fn flush(&mut self) -> Result<(), IoError> {
        self.hash.update(&self.buffer);
        self.file.write_all(&self.buffer)?;
        self.buffer.clear();
        Ok(())
    }

    /// Completes the cache: its sources as they were read, and notes.
    pub(crate) fn finish(
        mut self,
        hashes: &[SourceHash],
        notes: &impl Serialize,
    ) -> Result<(), IoError> {
        self.append_starts()?;
        let notes = serde_json::to_vec(notes).expect("plain fields serialize");
        if notes.len() as u64 > MAX_NOTES_BYTES {
            return Err(IoError::Usage {
                what: format!("{} data files are too many to be told apart", hashes.len()),
                hint: "join small files into larger ones".into(),
            });
        }
        self.head.notes_bytes = notes.len() as u64;
        self.buffer.extend(notes);
        self.flush()?;
        for (source, hash) in self.head.sources.iter_mut().zip(hashes) {
            if source.content.n_bytes != hash.n_bytes {
                return Err(IoError::bad_file(
                    &source.path,
                    format!(
                        "changed from {} to {} bytes while it was read",
                        source.content.n_bytes, hash.n_bytes
                    ),
                    "do not write to the file while it is in use",
                ));
            }
            source.content = hash.clone();
        }
        self.head.data_hash = self.hash.digest();
        self.file.write_all_at(0, &self.head.to_bytes())?;
        self.file.finish()
    }
}

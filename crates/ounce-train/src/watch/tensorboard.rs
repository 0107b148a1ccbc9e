//! TensorBoard event files: scalars over steps.
//!
//! An event file is a sequence of TFRecords, each holding one `Event` message:
//! ```text
//! record   = length u64 | masked crc of length u32 | data | masked crc of data u32   (little endian)
//! Event    = 1: wall_time f64, 2: step i64, and one of 3: file_version "brain.Event:2",
//!            5: Summary { 1: Value { 1: tag, 2: simple_value f32 } }, 7: SessionLog { 1: status }
//! ```
//! The first record is the version. Records are collected in one fixed buffer, which is written out
//! when the next record does not fit, on [`EventWriter::flush`] and on drop: nothing here grows.
//! A record is never torn between two buffers; a crash tears at most the last one, which readers skip.
//!
//! Source: tensorflow/core/lib/io/record_writer.cc, tensorflow/core/util/event.proto and
//! tensorflow/core/framework/summary.proto in the TensorFlow repository (formats only).

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use super::crc32c::masked_crc32c;

/// Longest tag that [`EventWriter::scalar`] takes.
pub const MAX_TAG_BYTES: usize = 256;

/// Records that wait for the next flush: about 500 scalars.
const BUFFER_BYTES: usize = 32 * 1024;
/// Room for the largest `Event` written here: a scalar with the longest tag.
const MAX_EVENT_BYTES: usize = MAX_TAG_BYTES + 64;
const VERSION: &[u8] = b"brain.Event:2";

/// Writes scalars to one event file.
#[derive(Debug)]
pub struct EventWriter<W: Write = File> {
    sink: W,
    buffer: Box<[u8]>,
    n_buffered: usize,
    path: PathBuf,
}

impl EventWriter<File> {
    /// A new event file in `dir`, which is created if it does not exist; files of earlier runs stay.
    ///
    /// # Errors
    /// Creating the directory or the file failed.
    pub fn create(dir: &Path) -> io::Result<Self> {
        fs::create_dir_all(dir)?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let mut suffix = 0;
        let (path, file) = loop {
            // Readers take files in the order of their names and look for `tfevents` in them.
            let (secs, pid) = (now.as_secs(), std::process::id());
            let path = dir.join(format!("events.out.tfevents.{secs:010}.ounce.{pid}.{suffix}"));
            match OpenOptions::new().write(true).create_new(true).open(&path) {
                Ok(file) => break (path, file),
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists && suffix < 1000 => suffix += 1,
                Err(e) => return Err(e),
            }
        };
        let mut writer = Self::new(file, now.as_secs_f64())?;
        writer.path = path;
        writer.flush()?;
        Ok(writer)
    }
}

impl<W: Write> EventWriter<W> {
    /// Writes to `sink`, beginning with the version record.
    ///
    /// # Errors
    /// Writing to `sink` failed.
    pub fn new(sink: W, wall_time_s: f64) -> io::Result<Self> {
        let buffer = vec![0; BUFFER_BYTES].into_boxed_slice();
        let mut writer = Self { sink, buffer, n_buffered: 0, path: PathBuf::new() };
        let mut event = Message::new();
        event.double(1, wall_time_s);
        event.bytes(3, VERSION);
        writer.record(event.written())?;
        Ok(writer)
    }

    /// The file, for messages; empty for a writer made by [`EventWriter::new`].
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// One point of the curve `tag`. TensorBoard groups tags by what stands before their first slash.
    ///
    /// # Errors
    /// `InvalidInput` for a tag above [`MAX_TAG_BYTES`]; or writing failed.
    pub fn scalar(&mut self, step: u64, tag: &str, value: f32, wall_time_s: f64) -> io::Result<()> {
        if tag.len() > MAX_TAG_BYTES {
            let what = format!("tag of {} bytes, at most {MAX_TAG_BYTES} are allowed", tag.len());
            return Err(io::Error::new(io::ErrorKind::InvalidInput, what));
        }
        let mut point = Message::new();
        point.bytes(1, tag.as_bytes());
        point.float(2, value);
        let mut summary = Message::new();
        summary.bytes(1, point.written());
        self.event(step, wall_time_s, 5, summary.written())
    }

    /// Says that the run goes on after a restart and that `step` is its next one: TensorBoard then
    /// drops points of `step` and later that an interrupted run had left in older files.
    ///
    /// # Errors
    /// Writing failed.
    pub fn restart(&mut self, step: u64, wall_time_s: f64) -> io::Result<()> {
        const START: u64 = 1;
        let mut log = Message::new();
        log.varint(1, START);
        self.event(step, wall_time_s, 7, log.written())
    }

    /// Hands all buffered records to the sink.
    ///
    /// # Errors
    /// Writing failed. What was buffered is given up, so that a full disk fails once and not forever.
    pub fn flush(&mut self) -> io::Result<()> {
        let n = std::mem::take(&mut self.n_buffered);
        self.sink.write_all(&self.buffer[..n])?;
        self.sink.flush()
    }

    fn event(&mut self, step: u64, wall_time_s: f64, field: u8, body: &[u8]) -> io::Result<()> {
        let mut event = Message::new();
        event.double(1, wall_time_s);
        event.varint(2, step);
        event.bytes(field, body);
        self.record(event.written())
    }

    fn record(&mut self, data: &[u8]) -> io::Result<()> {
        let length = (data.len() as u64).to_le_bytes();
        let parts = [
            &length[..],
            &masked_crc32c(&length).to_le_bytes(),
            data,
            &masked_crc32c(data).to_le_bytes(),
        ];
        let n_bytes: usize = parts.iter().map(|p| p.len()).sum();
        debug_assert!(n_bytes <= BUFFER_BYTES);
        if self.n_buffered + n_bytes > BUFFER_BYTES {
            self.flush()?;
        }
        for part in parts {
            self.buffer[self.n_buffered..][..part.len()].copy_from_slice(part);
            self.n_buffered += part.len();
        }
        Ok(())
    }
}

impl<W: Write> Drop for EventWriter<W> {
    fn drop(&mut self) {
        // Nobody is left to hear of a failure; who wants to know calls `flush`.
        let _ = self.flush();
    }
}

/// A protobuf message on the stack.
///
/// A field is a key, `number << 3 | wire type`, and its value: wire type 0 a varint, 1 eight bytes,
/// 2 a length and that many bytes, 5 four bytes. Field numbers here are below 16: keys take one byte.
struct Message {
    bytes: [u8; MAX_EVENT_BYTES],
    n: usize,
}

impl Message {
    fn new() -> Self {
        Self { bytes: [0; MAX_EVENT_BYTES], n: 0 }
    }

    fn written(&self) -> &[u8] {
        &self.bytes[..self.n]
    }

    fn push(&mut self, bytes: &[u8]) {
        self.bytes[self.n..][..bytes.len()].copy_from_slice(bytes);
        self.n += bytes.len();
    }

    fn raw_varint(&mut self, mut x: u64) {
        while x >= 0x80 {
            self.push(&[x as u8 | 0x80]);
            x >>= 7;
        }
        self.push(&[x as u8]);
    }

    fn varint(&mut self, field: u8, x: u64) {
        self.push(&[field << 3]);
        self.raw_varint(x);
    }

    fn double(&mut self, field: u8, x: f64) {
        self.push(&[field << 3 | 1]);
        self.push(&x.to_le_bytes());
    }

    fn float(&mut self, field: u8, x: f32) {
        self.push(&[field << 3 | 5]);
        self.push(&x.to_le_bytes());
    }

    fn bytes(&mut self, field: u8, x: &[u8]) {
        self.push(&[field << 3 | 2]);
        self.raw_varint(x.len() as u64);
        self.push(x);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The data of each record; panics if a length or a checksum is wrong.
    fn records(mut file: &[u8]) -> Vec<Vec<u8>> {
        let mut out = Vec::new();
        while !file.is_empty() {
            let n = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
            let crc = |at: usize| u32::from_le_bytes(file[at..at + 4].try_into().unwrap());
            assert_eq!(crc(8), masked_crc32c(&file[..8]));
            assert_eq!(crc(12 + n), masked_crc32c(&file[12..12 + n]));
            out.push(file[12..12 + n].to_vec());
            file = &file[16 + n..];
        }
        out
    }

    fn written(f: impl FnOnce(&mut EventWriter<&mut Vec<u8>>)) -> Vec<Vec<u8>> {
        let mut file = Vec::new();
        let mut writer = EventWriter::new(&mut file, 1.5).unwrap();
        f(&mut writer);
        drop(writer);
        records(&file)
    }

    #[test]
    fn the_first_record_is_the_version() {
        let mut want = vec![0x09];
        want.extend(1.5_f64.to_le_bytes());
        want.extend(b"\x1a\x0dbrain.Event:2");
        assert_eq!(written(|_| ()), [want]);
    }

    #[test]
    fn a_scalar_is_encoded_as_protobuf_says() {
        let records = written(|w| w.scalar(300, "loss", 2.5, 2.0).unwrap());
        let mut want = vec![0x09];
        want.extend(2.0_f64.to_le_bytes());
        want.extend([0x10, 0xAC, 0x02]); // step: 300 is 0b10_0101100
        want.extend([0x2A, 13, 0x0A, 11]); // summary, value
        want.extend(b"\x0a\x04loss\x15");
        want.extend(2.5_f32.to_le_bytes());
        assert_eq!(records[1], want);
    }

    #[test]
    fn a_restart_is_a_session_log_of_status_start() {
        let records = written(|w| w.restart(7, 2.0).unwrap());
        assert_eq!(records[1][9..], [0x10, 7, 0x3A, 2, 0x08, 1]);
    }

    #[test]
    fn many_scalars_pass_through_the_fixed_buffer_in_order() {
        let tag = "t".repeat(MAX_TAG_BYTES);
        let records = written(|w| {
            for step in 0..1000 {
                w.scalar(step, &tag, step as f32, f64::MAX).unwrap();
            }
            w.scalar(u64::MAX, &tag, f32::NAN, 0.0).unwrap();
        });
        assert_eq!(records.len(), 1002);
        for (step, r) in records[1..1001].iter().enumerate() {
            assert_eq!(r[r.len() - 4..], (step as f32).to_le_bytes());
        }
    }

    #[test]
    fn a_tag_beyond_the_limit_is_refused() {
        let mut file = Vec::new();
        let mut writer = EventWriter::new(&mut file, 0.0).unwrap();
        let e = writer.scalar(1, &"t".repeat(MAX_TAG_BYTES + 1), 0.0, 0.0).unwrap_err();
        assert_eq!(e.to_string(), "tag of 257 bytes, at most 256 are allowed");
    }

    #[test]
    fn files_of_one_second_get_names_of_their_own() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().join("runs");
        let a = EventWriter::create(&dir).unwrap();
        let b = EventWriter::create(&dir).unwrap();
        assert_ne!(a.path(), b.path());
        // The version record is on disk before the first scalar.
        assert_eq!(records(&fs::read(a.path()).unwrap()).len(), 1);
    }

    #[test]
    fn a_full_disk_is_reported_and_later_records_go_on() {
        struct Full(bool);
        impl Write for Full {
            fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
                if self.0 { Err(io::ErrorKind::StorageFull.into()) } else { Ok(bytes.len()) }
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let mut writer = EventWriter::new(Full(true), 0.0).unwrap();
        assert_eq!(writer.flush().unwrap_err().kind(), io::ErrorKind::StorageFull);
        writer.sink.0 = false;
        writer.scalar(1, "loss", 1.0, 0.0).unwrap();
        writer.flush().unwrap();
    }
}

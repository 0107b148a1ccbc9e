//! A part of a file as a stream, by `pread` through one small buffer: for parsers of headers.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;

/// Bytes `at..end` of a file.
#[derive(Debug)]
pub(crate) struct Window<'a> {
    pub(crate) file: &'a File,
    pub(crate) at: u64,
    pub(crate) end: u64,
}

impl Read for Window<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n_wanted = (buffer.len() as u64).min(self.end - self.at) as usize;
        let n_read = self.file.read_at(&mut buffer[..n_wanted], self.at)?;
        self.at += n_read as u64;
        Ok(n_read)
    }
}

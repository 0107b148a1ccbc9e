//! Damage: a valid file and a string of random bytes become a file that is nearly valid.
//!
//! Idea: the random bytes are read as a short program of edits (cut, flip, insert, repeat and more),
//! so the same bytes give the same file, and a finding can be kept and tried again. Words that
//! formats like these stumble over are at hand.

/// Words to put into files.
const WORDS: [&[u8]; 34] = [
    b"{",
    b"}",
    b"[",
    b"]",
    b"\"",
    b",",
    b":",
    b"\n",
    b"\\",
    b"\0",
    b"\xff",
    b"\xef\xbb\xbf",
    b"null",
    b"true",
    b"-1",
    b"0",
    b"0.5",
    b"1e999",
    b"4000000",
    b"4294967295",
    b"4294967296",
    b"9223372036854775808",
    b"18446744073709551615",
    b"99999999999999999999",
    b"\\ud800",
    b"\\u0000",
    b"{}",
    b"[]",
    b"\"\"",
    b"\"F32\"",
    b"\"../../x.safetensors\"",
    b"\"__metadata__\":{},",
    b"{\"text\": \"a\"}\n",
    b"\xe2\x96\x81",
];
/// Longest file that edits make.
const MAX_BYTES: usize = 1 << 20;

/// Random bytes, read from the front; zeros when they are used up.
#[derive(Debug)]
pub(super) struct Choices<'a>(pub(super) &'a [u8]);

impl Choices<'_> {
    pub(super) fn byte(&mut self) -> u8 {
        let Some((&first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        first
    }

    /// A number below `n`, or 0 where there is none.
    pub(super) fn below(&mut self, n: usize) -> usize {
        let number = usize::from(self.byte()) << 8 | usize::from(self.byte());
        if n <= 1 << 8 { number % n.max(1) } else { (number * n) >> 16 }
    }

    /// A place in `n` bytes: every other time near the front, where headers are.
    fn place(&mut self, n: usize) -> usize {
        if self.byte() & 1 == 0 { self.below(n.min(64)) } else { self.below(n) }
    }
}

/// `bytes` after up to four edits.
pub(super) fn mutate(mut bytes: Vec<u8>, choices: &mut Choices<'_>) -> Vec<u8> {
    for _ in 0..=choices.byte() % 4 {
        edit(&mut bytes, choices);
        bytes.truncate(MAX_BYTES);
    }
    bytes
}

fn edit(bytes: &mut Vec<u8>, choices: &mut Choices<'_>) {
    let kind = choices.byte() % 9;
    let at = choices.place(bytes.len());
    let end = (at + choices.below(32)).min(bytes.len());
    match kind {
        0 => bytes.truncate(at),
        1 if !bytes.is_empty() => bytes[at] ^= 1 << (choices.byte() % 8),
        2 if !bytes.is_empty() => bytes[at] = choices.byte(),
        3 => insert(bytes, at..at, WORDS[choices.below(WORDS.len())]),
        4 => insert(bytes, at..end, WORDS[choices.below(WORDS.len())]),
        5 => bytes.extend_from_within(at..end),
        6 => insert(bytes, at..end, &[]),
        7 => {
            let word = WORDS[choices.below(WORDS.len())].repeat(1 << (choices.byte() % 15));
            insert(bytes, at..at, &word);
        }
        _ => overwrite_number(bytes, at, choices),
    }
}

fn insert(bytes: &mut Vec<u8>, range: std::ops::Range<usize>, word: &[u8]) {
    bytes.splice(range, word.iter().copied());
}

/// Puts a number that is easily mistaken for a length over eight or four bytes.
fn overwrite_number(bytes: &mut [u8], at: usize, choices: &mut Choices<'_>) {
    let n = bytes.len() as u64;
    let numbers =
        [0, 1, 7, 8, n - n.min(8), n, n + 1, 1 << 31, 1 << 32, 1 << 63, u64::MAX - 7, u64::MAX];
    let number = numbers[choices.below(numbers.len())].to_le_bytes();
    let n_bytes = if choices.byte() & 1 == 0 { 8 } else { 4 };
    let room = bytes.len().saturating_sub(at).min(n_bytes);
    bytes[at..at + room].copy_from_slice(&number[..room]);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_program_of_edits_ends_in_a_file_of_bounded_length() {
        arbtest::arbtest(|u| {
            let valid = if u.arbitrary()? { b"{\"a\": [1, 2]}".to_vec() } else { u.arbitrary()? };
            let program = u.bytes(u.len())?;
            let first = mutate(valid.clone(), &mut Choices(program));
            assert!(first.len() <= MAX_BYTES);
            assert_eq!(mutate(valid, &mut Choices(program)), first);
            Ok(())
        })
        .budget_ms(100);
    }
}

//! Thrift's compact encoding, walked by a grammar, so that what a Parquet file claims is known before the library
//! believes it.
//!
//! Idea: what bytes mean to the library is not what they say of themselves. It reads a field that it knows as the type
//! that it expects, whatever type is written there, cuts numbers to their 32 bits, passes over lists of truth values
//! without taking a byte (so that a list of two billion costs nobody anything but time), and makes room for what a list
//! claims to hold. Here fields of known numbers must have their type, numbers must fit, a list may claim no more
//! entries than there are bytes, and what the format does not have (maps, lists of truth values) is refused. What is
//! accepted is read by the library the same way.
//!
//! Complexity: linear in the bytes; the depth of unknown fields is bounded by [`MAX_DEPTH`], that of known ones by the
//! grammar.
//! Source: Thrift's compact protocol; the `parquet` crate's reader of it.

/// Deepest nesting of structures and lists of which the grammar knows nothing.
const MAX_DEPTH: u32 = 8;

/// The type of a field, with what it is made of.
pub(super) enum Shape {
    Bool,
    Byte,
    I16,
    I32,
    I64,
    Double,
    Bytes,
    List(&'static Self),
    Struct(&'static [Field]),
}

/// A field of a structure: its number, its name and its type.
pub(super) struct Field(pub(super) i64, pub(super) &'static str, pub(super) Shape);

/// What a walk meets in a field, beside the field's name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Seen {
    Number(i64),
    /// So many bytes.
    Bytes(usize),
    /// A structure begins; in a list, one for each entry.
    Begin,
    End,
}

/// What is told of everything met.
pub(super) type Visit<'a> = &'a mut dyn FnMut(&'static str, Seen);

impl Shape {
    /// Whether a field written as type `kind` is of this shape.
    fn is(&self, kind: u8) -> bool {
        match self {
            Self::Bool => matches!(kind, 1 | 2),
            Self::Byte => kind == 3,
            Self::I16 => kind == 4,
            Self::I32 => kind == 5,
            Self::I64 => kind == 6,
            Self::Double => kind == 7,
            Self::Bytes => kind == 8,
            Self::List(_) => kind == 9,
            Self::Struct(_) => kind == 12,
        }
    }
}

/// Bytes, and how far they are read. Where a method returns `None`, they end too early or are not what they must be.
pub(super) struct Compact<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Compact<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0 }
    }

    /// Bytes read so far.
    pub(super) fn n_read(&self) -> usize {
        self.at
    }

    /// Reads a structure with the given fields to its end.
    pub(super) fn structure(&mut self, fields: &'static [Field], visit: Visit<'_>) -> Option<()> {
        let mut id = 0;
        while let Some(kind) = self.field(&mut id)? {
            match fields.iter().find(|field| field.0 == id) {
                Some(Field(_, name, shape)) => {
                    if !shape.is(kind) {
                        return None;
                    }
                    self.value(name, shape, visit)?;
                }
                None => self.skip(kind, 0)?,
            }
        }
        Some(())
    }

    fn value(&mut self, name: &'static str, shape: &'static Shape, visit: Visit<'_>) -> Option<()> {
        match shape {
            // In a structure its value is in its type.
            Shape::Bool => {}
            Shape::Byte => self.pass(1)?,
            Shape::I16 => visit(name, Seen::Number(self.number()?.try_into().ok().map(i16::into)?)),
            Shape::I32 => visit(name, Seen::Number(self.number()?.try_into().ok().map(i32::into)?)),
            Shape::I64 => visit(name, Seen::Number(self.number()?)),
            Shape::Double => self.pass(8)?,
            Shape::Bytes => visit(name, Seen::Bytes(self.text()?)),
            Shape::List(entry) => {
                let (kind, n) = self.list()?;
                if n > 0 && !entry.is(kind) {
                    return None;
                }
                for _ in 0..n {
                    self.value(name, entry, visit)?;
                }
            }
            Shape::Struct(fields) => {
                visit(name, Seen::Begin);
                self.structure(fields, visit)?;
                visit(name, Seen::End);
            }
        }
        Some(())
    }

    fn byte(&mut self) -> Option<u8> {
        let byte = *self.bytes.get(self.at)?;
        self.at += 1;
        Some(byte)
    }

    fn pass(&mut self, n: usize) -> Option<()> {
        self.at = self.at.checked_add(n).filter(|&at| at <= self.bytes.len())?;
        Some(())
    }

    fn varint(&mut self) -> Option<u64> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            value |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Some(value);
            }
        }
        None
    }

    /// A number in zigzag form.
    fn number(&mut self) -> Option<i64> {
        let n = self.varint()?;
        Some((n >> 1) as i64 ^ -((n & 1) as i64))
    }

    /// Passes over bytes behind their length, which is returned.
    fn text(&mut self) -> Option<usize> {
        let n = usize::try_from(self.varint()?).ok()?;
        self.pass(n)?;
        Some(n)
    }

    /// The type of the next field of a structure, whose number goes to `id`; `Some(None)` at its end.
    #[expect(clippy::option_option, reason = "broken, ended, or a field")]
    fn field(&mut self, id: &mut i64) -> Option<Option<u8>> {
        let byte = self.byte()?;
        if byte == 0 {
            return Some(None);
        }
        *id = match byte >> 4 {
            0 => self.number()?,
            delta => *id + i64::from(delta),
        };
        // Readers cut it to 16 bits, so that it would be another one.
        i16::try_from(*id).ok()?;
        Some(Some(byte & 0x0f))
    }

    /// The type of a list's entries and their number, each at least a byte.
    fn list(&mut self) -> Option<(u8, u64)> {
        let byte = self.byte()?;
        let n = if byte >> 4 == 15 { self.varint()? } else { u64::from(byte >> 4) };
        let n_left = (self.bytes.len() - self.at) as u64;
        (n <= n_left).then_some((byte & 0x0f, n))
    }

    /// Passes over a value of which only its type is known.
    fn skip(&mut self, kind: u8, depth: u32) -> Option<()> {
        if depth > MAX_DEPTH {
            return None;
        }
        match kind {
            1 | 2 => {}
            3 => self.pass(1)?,
            4..=6 => {
                self.varint()?;
            }
            7 => self.pass(8)?,
            8 => {
                self.text()?;
            }
            9 | 10 => {
                let (kind, n) = self.list()?;
                if n > 0 && matches!(kind, 1 | 2) {
                    return None;
                }
                for _ in 0..n {
                    self.skip(kind, depth + 1)?;
                }
            }
            12 => {
                let mut id = 0;
                while let Some(kind) = self.field(&mut id)? {
                    self.skip(kind, depth + 1)?;
                }
            }
            _ => return None,
        }
        Some(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    static INNER: [Field; 1] = [Field(1, "inner", Shape::I64)];
    static OUTER: [Field; 5] = [
        Field(1, "small", Shape::I32),
        Field(2, "text", Shape::Bytes),
        Field(3, "list", Shape::List(&Shape::Struct(&INNER))),
        Field(4, "truth", Shape::Bool),
        Field(20, "short", Shape::I16),
    ];

    fn walk(bytes: &[u8]) -> Option<Vec<(&'static str, Seen)>> {
        let (mut input, mut seen) = (Compact::new(bytes), Vec::new());
        input.structure(&OUTER, &mut |name, what| seen.push((name, what)))?;
        assert_eq!(input.n_read(), bytes.len());
        Some(seen)
    }

    #[test]
    fn known_fields_are_told_and_unknown_ones_passed_over() {
        // -1; "ab"; two structures, the first with 300; true; 9 as a list of two lists of numbers; 20 by its number.
        let bytes = [
            &[0x15, 1, 0x18, 2, b'a', b'b', 0x19, 0x2c, 0x16, 0xd8, 4, 0, 0, 0x11][..],
            &[0x59, 0x29, 0x15, 2, 0x26, 4, 6, 0x04, 40, 14, 0],
        ];
        let seen = walk(&bytes.concat()).unwrap_or_default();
        let list = |seen| ("list", seen);
        let expected = [
            ("small", Seen::Number(-1)),
            ("text", Seen::Bytes(2)),
            list(Seen::Begin),
            ("inner", Seen::Number(300)),
            list(Seen::End),
            list(Seen::Begin),
            list(Seen::End),
            ("short", Seen::Number(7)),
        ];
        assert_eq!(seen, expected);
    }

    #[test]
    fn what_readers_would_take_for_something_else_is_refused() {
        let cases: [(&str, &[u8]); 11] = [
            ("a text where a number must be", &[0x18, 1, 0, 0]),
            ("a structure where a list must be", &[0x3c, 0, 0]),
            ("a list of numbers where structures must be", &[0x39, 0x15, 2, 0]),
            ("33 bits where 32 must be", &[0x15, 0x80, 0x80, 0x80, 0x80, 0x20, 0]),
            ("17 bits where 16 must be", &[0x04, 40, 0x80, 0x80, 8, 0]),
            ("field 65537, which is field 1 in 16 bits", &[0x05, 0x82, 0x80, 8, 2, 0]),
            ("more entries than bytes", &[0x59, 0xf5, 0xff, 0xff, 0xff, 0xff, 7, 0]),
            ("truth values without bytes", &[0x59, 0x11, 1, 0]),
            ("a map", &[0x5b, 0]),
            ("a text beyond the end", &[0x28, 9, 0]),
            ("a structure without an end", &[0x15, 1]),
        ];
        for (what, bytes) in cases {
            assert_eq!(walk(bytes), None, "{what}");
        }
        let deep = |n: usize| [vec![0x5c; n], vec![0; n + 1]].concat();
        assert!(walk(&deep(MAX_DEPTH as usize)).is_some());
        assert!(walk(&deep(100_000)).is_none());
    }
}

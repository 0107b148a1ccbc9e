//! A plan as text: one line per buffer and instruction, for file tests and for people.

use std::fmt::{Display, Formatter, Result};

use crate::{BufferRef, Instr, Plan};

impl Display for BufferRef {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        write!(f, "{}+{}:{}", self.buffer, self.at, self.bytes)
    }
}

impl Display for Instr {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        match self {
            Self::Run { op, tokens, operands } => {
                write!(f, "run {op} tokens {}..{}", tokens.start, tokens.end)?;
                operands.iter().try_for_each(|o| write!(f, " {o}"))
            }
            Self::Zero { value, dst } => write!(f, "zero {value} {dst}"),
            Self::Copy { src, dst, tag } => write!(f, "copy {src} -> {dst} tag {}", tag.0),
            Self::Wait { tag } => write!(f, "wait {}", tag.0),
        }
    }
}

impl Display for Plan {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        let s = &self.shape;
        writeln!(
            f,
            "plan rows {} of {} tokens, arena {} bytes",
            s.n_rows, s.row_tokens, self.arena_bytes
        )?;
        for (id, b) in self.buffers.iter() {
            let (start, end) = (b.live.start, b.live.end);
            writeln!(
                f,
                "{id}: {:?} at {} bytes {} live {start}..{end}",
                b.role, b.offset, b.bytes
            )?;
        }
        for (i, instr) in self.instrs.iter().enumerate() {
            writeln!(f, "{i}: {instr}")?;
        }
        Ok(())
    }
}

//! The symbolic memory: which byte of what lies at each address.
//!
//! A piece is a range of addresses with one [`Content`]: a thing and the address at which its byte 0
//! would lie. Byte `x` of the memory then holds byte `x - origin` of the thing, so splitting a piece
//! changes nothing in it, and "these rows of that value lie here" is one comparison.
//! Pieces are disjoint; an address in no piece holds nothing that may be read.
//! A read or write of a range that touches `k` of `n` pieces costs `O((k + 1) log n)`, and every
//! piece that a write removes was once added by another.

use std::collections::BTreeMap;

use ounce_ir::{Graph, ParamId, ValueId};
use ounce_program::Tier;

/// Bytes `start..end` of a tier.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) tier: Tier,
    pub(crate) start: u64,
    pub(crate) end: u64,
}

impl Place {
    /// Whether the two share a byte.
    pub(crate) fn overlaps(&self, other: &Self) -> bool {
        self.tier == other.tier && self.start < other.end && other.start < self.end
    }
}

/// Something that bytes can be a part of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Thing {
    /// A value.
    Value(ValueId),
    /// A gradient sum after so many additions.
    Sum(ValueId, u32),
    /// A parameter, as at the start of the step or updated.
    Param(ParamId, bool),
    /// An optimizer state, as at the start of the step or updated.
    State(ParamId, u32, bool),
}

/// A thing, and the address of its byte 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Content {
    pub(crate) thing: Thing,
    pub(crate) origin: i64,
}

impl Content {
    /// The content of a place at whose start lies byte `first_byte` of `thing`.
    pub(crate) fn at(place: &Place, thing: Thing, first_byte: u64) -> Self {
        Self { thing, origin: place.start as i64 - first_byte as i64 }
    }

    /// "byte 256 of h.0.attn", for the byte at `address`.
    pub(crate) fn describe(&self, graph: &Graph, address: u64) -> String {
        let byte = address as i64 - self.origin;
        let age = |updated: bool| if updated { "updated" } else { "not updated" };
        match self.thing {
            Thing::Value(v) => format!("byte {byte} of {}", graph.values[v].name),
            Thing::Sum(v, n) => {
                format!("byte {byte} of {} ({n} added so far)", graph.values[v].name)
            }
            Thing::Param(p, updated) => {
                format!("byte {byte} of {}, {}", graph.params[p].name, age(updated))
            }
            Thing::State(p, k, updated) => {
                let (param, state) = (&graph.params[p].name, &graph.states[k as usize].name);
                format!("byte {byte} of {param}.{state}, {}", age(updated))
            }
        }
    }
}

/// A range of addresses with one content.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Piece {
    pub(crate) start: u64,
    pub(crate) end: u64,
    pub(crate) content: Content,
}

/// The memory of all tiers.
#[derive(Debug, Default)]
pub(crate) struct Memory {
    tiers: [BTreeMap<u64, Piece>; 3],
}

impl Memory {
    /// The pieces of a place, cut to it, in ascending order.
    pub(crate) fn pieces(&self, place: &Place) -> impl Iterator<Item = Piece> {
        let tier = &self.tiers[place.tier as usize];
        let (start, end) = (place.start, place.end);
        // Pieces are disjoint, so only the last one that starts before the place can reach into it.
        let from = tier.range(..start).next_back().map_or(start, |(&at, _)| at);
        let overlapping = tier.range(from..end.max(from)).filter(move |(_, p)| p.end > start);
        overlapping.map(move |(_, p)| Piece {
            start: p.start.max(start),
            end: p.end.min(end),
            ..*p
        })
    }

    /// The first address of the place that does not hold `content`, and what it holds instead.
    pub(crate) fn mismatch(
        &self,
        place: &Place,
        content: Content,
    ) -> Option<(u64, Option<Content>)> {
        let mut next = place.start;
        for piece in self.pieces(place) {
            if piece.start > next {
                return Some((next, None));
            }
            if piece.content != content {
                return Some((next, Some(piece.content)));
            }
            next = piece.end;
        }
        (next < place.end).then_some((next, None))
    }

    /// Overwrites the place; `None` leaves bytes that may not be read.
    pub(crate) fn write(&mut self, place: &Place, content: Option<Content>) {
        let tier = &mut self.tiers[place.tier as usize];
        let from = tier.range(..place.start).next_back().map_or(place.start, |(&at, _)| at);
        let old: Vec<Piece> = tier.range(from..place.end.max(from)).map(|(_, p)| *p).collect();
        for piece in old.into_iter().filter(|p| p.end > place.start) {
            tier.remove(&piece.start);
            let before = Piece { end: place.start, ..piece };
            let after = Piece { start: place.end, ..piece };
            for rest in [before, after].into_iter().filter(|p| p.start < p.end) {
                tier.insert(rest.start, rest);
            }
        }
        if let Some(content) = content
            && place.start < place.end
        {
            tier.insert(place.start, Piece { start: place.start, end: place.end, content });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(start: u64, end: u64) -> Place {
        Place { tier: Tier::Host, start, end }
    }

    fn value(id: u32) -> Thing {
        Thing::Value(ValueId(id))
    }

    #[test]
    fn a_read_finds_exactly_the_rows_that_were_written() {
        let mut memory = Memory::default();
        let whole = place(64, 256);
        memory.write(&whole, Some(Content::at(&whole, value(0), 1000)));
        let part = place(128, 192);
        assert_eq!(memory.mismatch(&part, Content::at(&part, value(0), 1064)), None);
        assert!(memory.mismatch(&part, Content::at(&part, value(0), 1000)).is_some());
        assert!(memory.mismatch(&part, Content::at(&part, value(1), 1064)).is_some());
    }

    #[test]
    fn a_write_in_the_middle_leaves_both_ends() {
        let mut memory = Memory::default();
        let whole = place(0, 300);
        memory.write(&whole, Some(Content::at(&whole, value(0), 0)));
        let hole = place(100, 200);
        memory.write(&hole, None);
        let (left, right) = (place(0, 100), place(200, 300));
        assert_eq!(memory.mismatch(&left, Content::at(&left, value(0), 0)), None);
        assert_eq!(memory.mismatch(&right, Content::at(&right, value(0), 200)), None);
        let want = Content::at(&whole, value(0), 0);
        assert_eq!(memory.mismatch(&whole, want), Some((100, None)));
        assert_eq!(memory.mismatch(&hole, Content::at(&hole, value(0), 100)), Some((100, None)));
    }

    #[test]
    fn two_adjacent_halves_are_one_value_and_tiers_are_apart() {
        let mut memory = Memory::default();
        for half in [place(64, 128), place(0, 64)] {
            memory.write(&half, Some(Content::at(&half, value(7), half.start)));
        }
        let whole = place(0, 128);
        assert_eq!(memory.mismatch(&whole, Content::at(&whole, value(7), 0)), None);
        let disk = Place { tier: Tier::Disk, ..whole };
        assert_eq!(memory.mismatch(&disk, Content::at(&disk, value(7), 0)), Some((0, None)));
    }
}

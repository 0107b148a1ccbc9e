//! Encoding a long text in pieces without changing its ids.
//!
//! Idea: `text.rs` cuts where pre-tokenizers cut anyway, so for them each piece is encoded as it stands. Tokenizers of
//! SentencePiece origin put a space before every text they see, also before a piece that goes on in the middle: it
//! then must be taken away again. Which of these a tokenizer needs is found by trying: for a few short texts the ids
//! of both halves must join to the ids of the whole.

use std::ops::Range;

use super::{Fault, Tokenizer, Words};
use crate::text::{Piece, PieceStart};

/// How to encode a piece so that its ids continue those before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum Rule {
    /// As it stands.
    #[default]
    AsIs,
    /// Without the first id, which stands for the space put before it.
    DropFirstId,
    /// Without its leading space, which is put before it anyway.
    DropSpace,
}

/// The rules of one tokenizer.
#[derive(Debug, Default)]
pub(super) struct PieceRules {
    newline: Rule,
    space: Rule,
}

impl PieceRules {
    /// Tries out which rules this tokenizer needs.
    pub(super) fn find(tokenizer: &Tokenizer) -> Self {
        let newline = [("a", "\nb"), ("the 9", "\n\n  The"), ("it's", "\n- x")];
        let space = [("a", " b"), ("the 9", " The end."), ("it's", " the")];
        let first_that_holds = |probes: &[(&str, &str)]| {
            let rules = [Rule::AsIs, Rule::DropFirstId, Rule::DropSpace];
            let holds = |rule: &Rule| probes.iter().all(|probe| rule.joins(tokenizer, *probe));
            // A tokenizer for which none holds is encoded piece by piece without a guarantee.
            rules.into_iter().find(holds).unwrap_or_default()
        };
        Self { newline: first_that_holds(&newline), space: first_that_holds(&space) }
    }

    /// Appends the ids of `piece`.
    pub(super) fn encode(
        &self,
        tokenizer: &Tokenizer,
        piece: &Piece<'_>,
        words: &mut Words,
        ids: &mut Vec<u32>,
    ) -> Result<(), Fault> {
        self.rule(piece.start).encode(tokenizer, piece.text, words, ids)
    }

    /// The ids of a piece, and the bytes of it that each stands for.
    pub(super) fn encode_with_places(
        &self,
        tokenizer: &Tokenizer,
        text: &str,
        start: PieceStart,
        words: &mut Words,
    ) -> Result<(Vec<u32>, Vec<Range<usize>>), Fault> {
        let rule = self.rule(start);
        let rest = if rule == Rule::DropSpace { text.strip_prefix(' ') } else { None };
        let (mut ids, mut places) = tokenizer.encode_places(rest.unwrap_or(text), words)?;
        if rule == Rule::DropFirstId && !ids.is_empty() {
            ids.remove(0);
            places.remove(0);
        }
        if rest.is_some() {
            for place in &mut places {
                *place = place.start + 1..place.end + 1;
            }
        }
        Ok((ids, places))
    }

    fn rule(&self, start: PieceStart) -> Rule {
        match start {
            PieceStart::Newline => self.newline,
            PieceStart::Space => self.space,
            PieceStart::Row { .. } | PieceStart::Forced => Rule::AsIs,
        }
    }
}

impl Rule {
    fn encode(
        self,
        tokenizer: &Tokenizer,
        text: &str,
        words: &mut Words,
        ids: &mut Vec<u32>,
    ) -> Result<(), Fault> {
        match self {
            Self::AsIs => tokenizer.encode_into(text, words, ids),
            Self::DropFirstId => {
                let start = ids.len();
                tokenizer.encode_into(text, words, ids)?;
                ids.drain(start..(start + 1).min(ids.len()));
                Ok(())
            }
            Self::DropSpace => {
                tokenizer.encode_into(text.strip_prefix(' ').unwrap_or(text), words, ids)
            }
        }
    }

    /// Whether the ids of `left` and then `right` by this rule are those of the whole.
    fn joins(self, tokenizer: &Tokenizer, (left, right): (&str, &str)) -> bool {
        let (mut words, mut parts, mut whole) = (Words::default(), Vec::new(), Vec::new());
        tokenizer.encode_into(left, &mut words, &mut parts).is_ok()
            && self.encode(tokenizer, right, &mut words, &mut parts).is_ok()
            && tokenizer.encode_into(&format!("{left}{right}"), &mut words, &mut whole).is_ok()
            && parts == whole
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::text::find_cut;

    #[test]
    fn a_cut_by_the_rules_never_changes_the_ids() {
        // Goal: the promise of `text.rs`. Method: random texts of awkward parts, cut where a piece would be cut.
        let parts = [
            "a",
            "The",
            "word",
            "it's",
            "I'LL",
            "9",
            "2024",
            " ",
            "  ",
            "\n",
            "\n\n",
            "\r\n",
            "\t",
            ".",
            "...",
            ",",
            "-",
            "(",
            "\"",
            "é",
            "Ω",
            "漢字",
            "한",
            "e\u{301}",
            "🙂",
            "\u{a0}",
            "\u{2581}",
            "<|endoftext|>",
            "<s>",
            "<0x0A>",
            "__",
            "'",
        ];
        for name in ["stories260k", "bpe512", "gpt2-like", "llama3-like"] {
            let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name);
            let tokenizer = Tokenizer::load(&dir).unwrap();
            let (mut n_cuts, mut words) = (0, Words::default());
            arbtest::arbtest(|u| {
                let mut text = String::new();
                for _ in 0..u.int_in_range(2..=24)? {
                    text.push_str(u.choose(&parts)?);
                }
                let seen =
                    text.char_indices().nth(u.int_in_range(1..=40)?).map_or(text.len(), |c| c.0);
                let (at, start) = find_cut(&text[..seen]);
                if start == PieceStart::Forced {
                    return Ok(());
                }
                n_cuts += 1;
                let (left, right) = text.split_at(at);
                let mut ids = Vec::new();
                tokenizer.encode_into(left, &mut words, &mut ids).unwrap();
                let piece = Piece { text: right, start, path: &dir, line: 1 };
                tokenizer.encode_piece(&piece, &mut words, &mut ids).unwrap();
                let whole = tokenizer.encode(&text).unwrap();
                assert_eq!(ids, whole, "{name}: {left:?} then {right:?}");
                Ok(())
            })
            .budget_ms(400);
            assert!(n_cuts > 20, "{name}: {n_cuts} cuts tried");
        }
    }
}

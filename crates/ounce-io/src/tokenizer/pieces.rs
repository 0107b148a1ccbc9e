//! Encoding a long text in pieces without changing its ids.
//!
//! Idea: `text.rs` cuts where pre-tokenizers cut anyway, so for them each piece is encoded as it stands. Tokenizers of
//! SentencePiece origin put a space before every text they see, also before a piece that goes on in the middle: it
//! then must be taken away again. Which of these a tokenizer needs is found by trying: for a few short texts the ids
//! of both halves must join to the ids of the whole.

use super::{Fault, Tokenizer};
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
        ids: &mut Vec<u32>,
    ) -> Result<(), Fault> {
        let rule = match piece.start {
            PieceStart::Newline => self.newline,
            PieceStart::Space => self.space,
            PieceStart::Row { .. } | PieceStart::Forced => Rule::AsIs,
        };
        rule.encode(tokenizer, piece.text, ids)
    }
}

impl Rule {
    fn encode(self, tokenizer: &Tokenizer, text: &str, ids: &mut Vec<u32>) -> Result<(), Fault> {
        match self {
            Self::AsIs => tokenizer.encode_into(text, ids),
            Self::DropFirstId => {
                let start = ids.len();
                tokenizer.encode_into(text, ids)?;
                ids.drain(start..(start + 1).min(ids.len()));
                Ok(())
            }
            Self::DropSpace => tokenizer.encode_into(text.strip_prefix(' ').unwrap_or(text), ids),
        }
    }

    /// Whether the ids of `left` and then `right` by this rule are those of the whole.
    fn joins(self, tokenizer: &Tokenizer, (left, right): (&str, &str)) -> bool {
        let (mut parts, mut whole) = (Vec::new(), Vec::new());
        tokenizer.encode_into(left, &mut parts).is_ok()
            && self.encode(tokenizer, right, &mut parts).is_ok()
            && tokenizer.encode_into(&format!("{left}{right}"), &mut whole).is_ok()
            && parts == whole
    }
}

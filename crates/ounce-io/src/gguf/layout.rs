//! How the numbers of a tensor are arranged in a GGUF file, and how they are read in the other arrangement.
//!
//! * Interleaved: rotary positions turn pairs of elements. Hugging Face pairs element `j` of a head with `j + D/2`,
//!   llama.cpp's `llama` pairs neighbours, so its rows are `0, D/2, 1, D/2 + 1, ...` of each head.
//! * Transposed: GPT-2's linear layers are `[in, out]` in Hugging Face and `[out, in]` in GGUF.
//!
//! Reading is through a function that reads a range of the source, so nothing ever holds a tensor. Rows are copied one
//! by one; a transposed range of `k` rows is read as `k`-wide pieces of every row of the source, so it is best to ask
//! for many rows at once. Complexity: one pass over the range, with a buffer of at most 16 KiB.

/// The arrangement of a tensor in a GGUF file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Layout {
    Same,
    Interleaved { n_heads: usize },
    Transposed,
}

/// Where to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Direction {
    ToHuggingFace,
    ToGguf,
}

/// Elements of the buffer of a transposed reading.
const BUFFER_ELEMS: usize = 4 << 10;

impl Layout {
    /// The shape on the other side of `shape`.
    pub(super) fn other_shape(self, shape: &[usize]) -> Vec<usize> {
        let mut other = shape.to_vec();
        if self == Self::Transposed {
            other.reverse();
        }
        other
    }

    /// Whether a tensor of `shape` can be arranged so.
    pub(super) fn fits(self, shape: &[usize]) -> bool {
        match self {
            Self::Same => true,
            Self::Interleaved { n_heads } => {
                n_heads > 0 && shape.first().is_some_and(|rows| rows.is_multiple_of(2 * n_heads))
            }
            Self::Transposed => shape.len() == 2,
        }
    }

    /// Reads elements `start..` of the target from the source.
    ///
    /// # Shapes
    /// `shape` is the target's.
    ///
    /// # Errors
    /// Those of `read(start, dst)`, which reads a range of the source.
    pub(super) fn read<E>(
        self,
        direction: Direction,
        shape: &[usize],
        start: usize,
        dst: &mut [f32],
        mut read: impl FnMut(usize, &mut [f32]) -> Result<(), E>,
    ) -> Result<(), E> {
        let n_columns: usize = shape.iter().skip(1).product();
        match self {
            Self::Same => read(start, dst),
            Self::Interleaved { n_heads } => {
                let n_rows = shape.first().copied().unwrap_or(0);
                let (mut at, mut rest) = (start, dst);
                while !rest.is_empty() {
                    let (row, column) = (at / n_columns, at % n_columns);
                    let (part, others) = rest.split_at_mut(rest.len().min(n_columns - column));
                    let source = source_row(direction, n_rows / n_heads, row);
                    read(source * n_columns + column, part)?;
                    at += part.len();
                    rest = others;
                }
                Ok(())
            }
            Self::Transposed => {
                let n_source_columns = shape.first().copied().unwrap_or(0);
                let end = start + dst.len();
                let mut buffer = vec![0.0; dst.len().div_ceil(n_columns.max(1)).min(BUFFER_ELEMS)];
                for column in 0..n_columns {
                    // Rows of the target whose element in this column lies in the range.
                    let row_at = |at: usize| at.saturating_sub(column).div_ceil(n_columns);
                    let rows = row_at(start)..row_at(end);
                    for first in rows.clone().step_by(BUFFER_ELEMS) {
                        let part = &mut buffer[..BUFFER_ELEMS.min(rows.end - first)];
                        read(column * n_source_columns + first, part)?;
                        for (row, &x) in (first..).zip(part.iter()) {
                            dst[row * n_columns + column - start] = x;
                        }
                    }
                }
                Ok(())
            }
        }
    }
}

/// The row of the source that becomes row `row` of the target, in heads of `d` rows.
fn source_row(direction: Direction, d: usize, row: usize) -> usize {
    let (head, i) = (row / d, row % d);
    head * d
        + match direction {
            Direction::ToHuggingFace => 2 * (i % (d / 2)) + i / (d / 2),
            Direction::ToGguf => (i % 2) * (d / 2) + i / 2,
        }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reads all of `src` in ranges of `n` elements.
    fn convert(layout: Layout, to: Direction, shape: &[usize], n: usize, src: &[f32]) -> Vec<f32> {
        let mut dst = vec![f32::NAN; src.len()];
        for (i, part) in dst.chunks_mut(n).enumerate() {
            let read = |at: usize, dst: &mut [f32]| -> Result<(), ()> {
                dst.copy_from_slice(&src[at..at + dst.len()]);
                Ok(())
            };
            layout.read(to, shape, i * n, part, read).unwrap();
        }
        dst
    }

    #[test]
    fn neighbours_become_halves_and_halves_neighbours() {
        let gguf: Vec<f32> = (0..16).map(|i| i as f32).collect();
        let layout = Layout::Interleaved { n_heads: 2 };
        for n in [1, 3, 16] {
            let hf = convert(layout, Direction::ToHuggingFace, &[8, 2], n, &gguf);
            // Rows 0, 2 | 1, 3 of the first head, then the same of the second.
            let rows: Vec<f32> = hf.iter().step_by(2).map(|x| x / 2.0).collect();
            assert_eq!(rows, [0.0, 2.0, 1.0, 3.0, 4.0, 6.0, 5.0, 7.0]);
            assert_eq!(convert(layout, Direction::ToGguf, &[8, 2], n, &hf), gguf);
        }
    }

    #[test]
    fn a_matrix_is_transposed_in_ranges_of_any_length() {
        let src: Vec<f32> = (0..6).map(|i| i as f32).collect();
        for n in 1..=6 {
            let found = convert(Layout::Transposed, Direction::ToHuggingFace, &[3, 2], n, &src);
            assert_eq!(found, [0.0, 3.0, 1.0, 4.0, 2.0, 5.0]);
        }
        assert_eq!(Layout::Transposed.other_shape(&[3, 2]), [2, 3]);
    }

    #[test]
    fn what_cannot_be_arranged_so_is_known_beforehand() {
        assert!(!Layout::Interleaved { n_heads: 3 }.fits(&[8, 4]));
        assert!(!Layout::Interleaved { n_heads: 0 }.fits(&[8, 4]));
        assert!(!Layout::Transposed.fits(&[8]));
    }
}

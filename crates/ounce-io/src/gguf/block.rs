//! Element types of ggml: how a block of numbers lies in bytes.
//!
//! A quantised type stores blocks of 32 or 256 elements: small integers and one or two 16-bit scales. Decoding
//! multiplies in f32, in the order in which ggml does it, so that the numbers are ggml's own bit for bit.
//!
//! | type | block | bytes | element |
//! |---|---|---|---|
//! | `Q8_0` | 32 | 34 | `d q`, `q` of 8 bits with sign |
//! | `Q4_0` | 32 | 18 | `d (q - 8)`; byte `j` holds elements `j` (low half) and `j + 16` |
//! | `Q4_1` | 32 | 20 | `d q + m` |
//! | `Q4_K` | 256 | 144 | eight sub-blocks of 32, each with a scale and a minimum of 6 bits |
//! | `Q6_K` | 256 | 210 | sixteen sub-blocks of 16, each with a scale of 8 bits; `q - 32` of 6 bits |
//!
//! Source: the block structures and reference routines of ggml (`ggml-common.h`, `ggml-quants.c`).

use half::{bf16, f16};

/// Elements of the largest block.
pub(super) const MAX_BLOCK_ELEMS: usize = 256;

/// Element types that are read; those of ggml's others are refused by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[expect(missing_docs, reason = "ggml's own names")]
pub enum GgmlType {
    F32,
    F16,
    Bf16,
    Q8_0,
    Q4_0,
    Q4_1,
    Q4K,
    Q6K,
}

impl GgmlType {
    const ALL: [Self; 8] = [
        Self::F32,
        Self::F16,
        Self::Bf16,
        Self::Q8_0,
        Self::Q4_0,
        Self::Q4_1,
        Self::Q4K,
        Self::Q6K,
    ];

    /// The type with ggml's number `code`.
    pub(super) fn from_code(code: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|t| t.code() == code)
    }

    /// Ggml's number.
    pub(super) fn code(self) -> u32 {
        match self {
            Self::F32 => 0,
            Self::F16 => 1,
            Self::Q4_0 => 2,
            Self::Q4_1 => 3,
            Self::Q8_0 => 8,
            Self::Q4K => 12,
            Self::Q6K => 14,
            Self::Bf16 => 30,
        }
    }

    /// Ggml's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::Bf16 => "BF16",
            Self::Q8_0 => "Q8_0",
            Self::Q4_0 => "Q4_0",
            Self::Q4_1 => "Q4_1",
            Self::Q4K => "Q4_K",
            Self::Q6K => "Q6_K",
        }
    }

    /// Elements of one block.
    pub fn block_elems(self) -> usize {
        match self {
            Self::F32 | Self::F16 | Self::Bf16 => 1,
            Self::Q8_0 | Self::Q4_0 | Self::Q4_1 => 32,
            Self::Q4K | Self::Q6K => MAX_BLOCK_ELEMS,
        }
    }

    /// Bytes of one block.
    pub fn block_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
            Self::Q8_0 => 34,
            Self::Q4_0 => 18,
            Self::Q4_1 => 20,
            Self::Q4K => 144,
            Self::Q6K => 210,
        }
    }

    /// Decodes whole blocks.
    ///
    /// # Shapes
    /// `bytes` and `dst` hold the same number of blocks.
    pub(super) fn decode(self, bytes: &[u8], dst: &mut [f32]) {
        debug_assert_eq!(bytes.len() / self.block_bytes(), dst.len() / self.block_elems());
        match self {
            Self::F32 => blocks(bytes, dst, |b: &[u8; 4], [x]: &mut [f32; 1]| {
                *x = f32::from_le_bytes(*b);
            }),
            Self::F16 => blocks(bytes, dst, |b: &[u8; 2], [x]: &mut [f32; 1]| *x = half(b, 0)),
            Self::Bf16 => blocks(bytes, dst, |b: &[u8; 2], [x]: &mut [f32; 1]| {
                *x = bf16::from_le_bytes(*b).to_f32();
            }),
            Self::Q8_0 => blocks(bytes, dst, q8_0),
            Self::Q4_0 => blocks(bytes, dst, q4_0),
            Self::Q4_1 => blocks(bytes, dst, q4_1),
            Self::Q4K => blocks(bytes, dst, q4_k),
            Self::Q6K => blocks(bytes, dst, q6_k),
        }
    }

    /// Encodes whole blocks.
    ///
    /// # Errors
    /// The index of an element that is finite and becomes infinite in this type.
    ///
    /// # Panics
    /// For a type that is only read (`Q4_0`, `Q4_1`, `Q4_K`, `Q6_K`).
    pub(super) fn encode(self, src: &[f32], bytes: &mut [u8]) -> Result<(), usize> {
        match self {
            Self::F32 => write(src, bytes, f32::to_le_bytes),
            Self::F16 => write(src, bytes, |x| f16::from_f32(x).to_le_bytes()),
            Self::Bf16 => write(src, bytes, |x| bf16::from_f32(x).to_le_bytes()),
            Self::Q8_0 => {
                for (elems, block) in src.chunks_exact(32).zip(bytes.chunks_exact_mut(34)) {
                    encode_q8_0(elems, block);
                }
            }
            Self::Q4_0 | Self::Q4_1 | Self::Q4K | Self::Q6K => {
                panic!("{} is read, not written", self.name())
            }
        }
        let most = match self {
            Self::F16 => 65520.0,
            // The scale is 1/127 of the largest element, as binary16.
            Self::Q8_0 => 65520.0 * 127.0,
            // What rounds to infinity.
            Self::Bf16 => f32::from_bits(0x7f7f_8000),
            _ => return Ok(()),
        };
        match src.iter().position(|x| x.is_finite() && x.abs() >= most) {
            Some(at) => Err(at),
            None => Ok(()),
        }
    }
}

/// Applies `decode` to every block of `B` bytes and `E` elements.
fn blocks<const B: usize, const E: usize>(
    bytes: &[u8],
    dst: &mut [f32],
    decode: impl Fn(&[u8; B], &mut [f32; E]),
) {
    for (block, elems) in bytes.as_chunks::<B>().0.iter().zip(dst.as_chunks_mut::<E>().0) {
        decode(block, elems);
    }
}

/// Writes each element as `N` bytes.
fn write<const N: usize>(src: &[f32], bytes: &mut [u8], narrow: impl Fn(f32) -> [u8; N]) {
    for (elem, &x) in bytes.as_chunks_mut::<N>().0.iter_mut().zip(src) {
        *elem = narrow(x);
    }
}

/// The binary16 at byte `at`.
fn half(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

fn q8_0(block: &[u8; 34], elems: &mut [f32; 32]) {
    let d = half(block, 0);
    for (x, &q) in elems.iter_mut().zip(&block[2..]) {
        *x = f32::from(q as i8) * d;
    }
}

fn q4_0(block: &[u8; 18], elems: &mut [f32; 32]) {
    let d = half(block, 0);
    for (j, &q) in block[2..].iter().enumerate() {
        elems[j] = (f32::from(q & 15) - 8.0) * d;
        elems[j + 16] = (f32::from(q >> 4) - 8.0) * d;
    }
}

fn q4_1(block: &[u8; 20], elems: &mut [f32; 32]) {
    let (d, m) = (half(block, 0), half(block, 2));
    for (j, &q) in block[4..].iter().enumerate() {
        elems[j] = f32::from(q & 15) * d + m;
        elems[j + 16] = f32::from(q >> 4) * d + m;
    }
}

fn q4_k(block: &[u8; 144], elems: &mut [f32; 256]) {
    let (d, d_min) = (half(block, 0), half(block, 2));
    let packed = &block[4..16];
    // Four scales and four minima of 6 bits fill the low bits of the first eight bytes; of the other four of each, the
    // low 4 bits are in the last four bytes and the high 2 bits on top of the first eight.
    let scale_and_min = |j: usize| {
        if j < 4 {
            return (packed[j] & 63, packed[j + 4] & 63);
        }
        (packed[j + 4] & 15 | (packed[j - 4] >> 6) << 4, packed[j + 4] >> 4 | (packed[j] >> 6) << 4)
    };
    for (pair, (bytes, out)) in block[16..].chunks(32).zip(elems.chunks_mut(64)).enumerate() {
        for (half, out) in out.chunks_mut(32).enumerate() {
            let (scale, min) = scale_and_min(2 * pair + half);
            let (scale, min) = (d * f32::from(scale), d_min * f32::from(min));
            for (x, &q) in out.iter_mut().zip(bytes) {
                *x = scale * f32::from(q >> (4 * half) & 15) - min;
            }
        }
    }
}

fn q6_k(block: &[u8; 210], elems: &mut [f32; 256]) {
    let d = half(block, 208);
    for (n, out) in elems.chunks_mut(128).enumerate() {
        let low = &block[64 * n..64 * (n + 1)];
        let high = &block[128 + 32 * n..128 + 32 * (n + 1)];
        let scales = &block[192 + 8 * n..192 + 8 * (n + 1)];
        for (i, x) in out.iter_mut().enumerate() {
            let (quarter, l) = (i / 32, i % 32);
            let four = low[l + 32 * (quarter % 2)] >> (4 * (quarter / 2)) & 15;
            let two = high[l] >> (2 * quarter) & 3;
            let q = i32::from(four | two << 4) - 32;
            *x = d * f32::from(scales[i / 16] as i8) * q as f32;
        }
    }
}

fn encode_q8_0(elems: &[f32], block: &mut [u8]) {
    let most = elems.iter().fold(0.0_f32, |most, x| most.max(x.abs()));
    let d = most / 127.0;
    let inverse = if d == 0.0 { 0.0 } else { 1.0 / d };
    block[..2].copy_from_slice(&f16::from_f32(d).to_le_bytes());
    for (q, &x) in block[2..].iter_mut().zip(elems) {
        *q = (x * inverse).round() as i8 as u8;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Random blocks and what ggml's own Python package decodes them to: type, bytes, bits of the elements, in hex.
    const GOLDEN: &str = include_str!("../../tests/data/gguf/blocks.txt");

    fn bytes(hex: &str) -> Vec<u8> {
        let digit = |at: usize| u8::from_str_radix(&hex[at..at + 2], 16).unwrap();
        (0..hex.len()).step_by(2).map(digit).collect()
    }

    #[test]
    fn blocks_decode_to_the_bits_of_ggml() {
        let mut seen = Vec::new();
        for line in GOLDEN.lines() {
            let fields: Vec<&str> = line.split(' ').collect();
            let kind = GgmlType::ALL.into_iter().find(|t| t.name() == fields[0]).unwrap();
            let (blocks, expected) = (bytes(fields[1]), bytes(fields[2]));
            let mut elems = vec![0.0; expected.len() / 4];
            kind.decode(&blocks, &mut elems);
            let found: Vec<u8> = elems.iter().flat_map(|x| x.to_le_bytes()).collect();
            assert_eq!(found, expected, "{}", kind.name());
            seen.push(kind);
        }
        assert_eq!(seen.len(), GgmlType::ALL.len());
    }

    #[test]
    fn q8_0_is_within_half_a_step_of_what_was_written() {
        let src: Vec<f32> = (0..64).map(|i| ((i * 37) % 64) as f32 / 7.0 - 4.0).collect();
        let (mut block, mut back) = ([0; 68], [0.0; 64]);
        GgmlType::Q8_0.encode(&src, &mut block).unwrap();
        GgmlType::Q8_0.decode(&block, &mut back);
        for (a, b) in src.iter().zip(back) {
            assert!((a - b).abs() <= 5.0 / 127.0 / 2.0 * 1.01, "{a} became {b}");
        }
        let mut zeros = [1; 34];
        GgmlType::Q8_0.encode(&[0.0; 32], &mut zeros).unwrap();
        assert_eq!(zeros, [0; 34]);
    }

    #[test]
    fn what_does_not_fit_into_16_bits_is_told() {
        let src = [1.0, f32::INFINITY, 70000.0];
        assert_eq!(GgmlType::F16.encode(&src, &mut [0; 6]), Err(2));
        assert_eq!(GgmlType::Bf16.encode(&src, &mut [0; 6]), Ok(()));
        assert_eq!(GgmlType::Bf16.encode(&[f32::MAX], &mut [0; 2]), Err(0));
    }
}

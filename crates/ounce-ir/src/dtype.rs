//! Stored element types and their sizes in bytes, block-quantized types included.

/// How the elements of a value are stored. The stored dtype is part of a value's meaning.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum DType {
    /// IEEE binary32.
    F32,
    /// bfloat16: the upper half of binary32.
    Bf16,
    /// IEEE binary16.
    F16,
    /// IEEE binary64, for sums of squares.
    F64,
    /// 32-bit signed integers: token ids, positions, targets.
    I32,
    /// 16-bit signed integers: the lower halves of split masters.
    I16,
    /// GGML Q8_0: blocks of 32 elements, one f16 scale and 32 bytes.
    Q8_0,
    /// GGML Q4_0: blocks of 32 elements, one f16 scale and 16 bytes.
    Q4_0,
    /// GGML Q4_1: blocks of 32 elements, f16 scale and minimum and 16 bytes.
    Q4_1,
}

impl DType {
    /// All dtypes, in declaration order.
    pub const ALL: [Self; 9] = [
        Self::F32,
        Self::Bf16,
        Self::F16,
        Self::F64,
        Self::I32,
        Self::I16,
        Self::Q8_0,
        Self::Q4_0,
        Self::Q4_1,
    ];

    /// Elements per storage block (1 for plain types).
    pub const fn block_elems(self) -> u64 {
        match self {
            Self::Q8_0 | Self::Q4_0 | Self::Q4_1 => 32,
            Self::F32 | Self::Bf16 | Self::F16 | Self::F64 | Self::I32 | Self::I16 => 1,
        }
    }

    /// Bytes per storage block.
    pub const fn block_bytes(self) -> u64 {
        match self {
            Self::F32 | Self::I32 => 4,
            Self::Bf16 | Self::F16 | Self::I16 => 2,
            Self::F64 => 8,
            Self::Q8_0 => 34,
            Self::Q4_0 => 18,
            Self::Q4_1 => 20,
        }
    }

    /// Bytes of `n_elems` elements: whole blocks, so rows of a quantized matrix are padded up.
    pub const fn bytes(self, n_elems: u64) -> u64 {
        n_elems.div_ceil(self.block_elems()) * self.block_bytes()
    }

    /// Whether activations and gradients may be stored in it. Ops read any of these, compute in f32
    /// and round what they write once, to nearest even.
    pub const fn is_float(self) -> bool {
        matches!(self, Self::F32 | Self::Bf16 | Self::F16)
    }

    /// The name in the textual form.
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
            Self::F64 => "f64",
            Self::I32 => "i32",
            Self::I16 => "i16",
            Self::Q8_0 => "q8_0",
            Self::Q4_0 => "q4_0",
            Self::Q4_1 => "q4_1",
        }
    }

    /// The dtype of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|d| d.name() == name)
    }
}

impl std::fmt::Display for DType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_count_whole_blocks() {
        assert_eq!(DType::F32.bytes(3), 12);
        assert_eq!(DType::Bf16.bytes(3), 6);
        assert_eq!(DType::Q8_0.bytes(33), 68);
        assert_eq!(DType::Q4_1.bytes(32), 20);
    }

    #[test]
    fn names_parse_back() {
        for d in DType::ALL {
            assert_eq!(DType::from_name(d.name()), Some(d));
        }
    }
}

//! CRC-32C (Castagnoli), the checksum of TFRecord files.
//!
//! One table of 256 words, built at compile time; a byte per step, which is far faster than a run
//! writes events. Polynomial 0x1EDC6F41, reflected. Source: RFC 3720, appendix B.4, has test vectors.

const TABLE: [u32; 256] = table();

const fn table() -> [u32; 256] {
    let mut table = [0; 256];
    let mut byte = 0;
    while byte < 256 {
        let mut crc = byte as u32;
        let mut bit = 0;
        while bit < 8 {
            crc = if crc & 1 == 1 { (crc >> 1) ^ 0x82F6_3B78 } else { crc >> 1 };
            bit += 1;
        }
        table[byte] = crc;
        byte += 1;
    }
    table
}

/// The checksum of `bytes`.
pub(super) fn crc32c(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0, |crc, &b| (crc >> 8) ^ TABLE[((crc ^ b as u32) & 0xFF) as usize])
}

/// The checksum as TFRecord stores it: rotated and offset, so that a checksum over data that holds
/// checksums stays meaningful.
pub(super) fn masked_crc32c(bytes: &[u8]) -> u32 {
    crc32c(bytes).rotate_right(15).wrapping_add(0xA282_EAD8)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_vectors_of_rfc_3720_hold() {
        assert_eq!(crc32c(&[0; 32]), 0x8A91_36AA);
        assert_eq!(crc32c(&[0xFF; 32]), 0x62A8_AB43);
        let ascending: Vec<u8> = (0..32).collect();
        assert_eq!(crc32c(&ascending), 0x46DD_794E);
        let descending: Vec<u8> = (0..32).rev().collect();
        assert_eq!(crc32c(&descending), 0x113F_DB5C);
        assert_eq!(crc32c(b"123456789"), 0xE306_9283);
        assert_eq!(crc32c(b""), 0);
    }

    #[test]
    fn the_mask_is_that_of_tfrecord() {
        assert_eq!(masked_crc32c(b""), 0xA282_EAD8);
        // Every event file begins so: a record of 24 bytes, the version.
        assert_eq!(masked_crc32c(&24_u64.to_le_bytes()).to_le_bytes(), *b"\xa3\x7fK\"");
    }
}

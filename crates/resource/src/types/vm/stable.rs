//! Values that are the same on every node and in every version: what a guest sees must not change under it.

/// FNV-1a over the parts, each ended by a zero byte; spread, since the last bytes would change few bits. Not for secrets.
pub(crate) fn hash(parts: &[&str]) -> u64 {
    let mut hash: u64 = 0xcbf2_9ce4_8422_2325;
    for part in parts {
        for byte in part.bytes().chain([0]) {
            hash = (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
    }
    // The finisher of MurmurHash3.
    hash = (hash ^ (hash >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
    hash = (hash ^ (hash >> 33)).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    hash ^ (hash >> 33)
}

/// The machine's UUID (of version 8: made by a rule of one's own).
pub(crate) fn uuid(cluster: &str, vm: &str) -> String {
    let (high, low) = (hash(&[cluster, vm, "uuid", "high"]), hash(&[cluster, vm, "uuid", "low"]));
    format!(
        "{:08x}-{:04x}-8{:03x}-{:04x}-{:012x}",
        high >> 32,
        (high >> 16) & 0xffff,
        high & 0xfff,
        0x8000 | ((low >> 48) & 0x3fff),
        low & 0xffff_ffff_ffff
    )
}

/// A name as one component of a path, short (24 bytes at most) and different for different names.
pub(crate) fn directory(name: &str) -> String {
    const PLAIN_MAX: usize = 20;
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_');
    if name.len() <= PLAIN_MAX && !name.is_empty() && name.bytes().all(plain) {
        return name.to_owned();
    }
    // A dot, which no plain name has.
    format!("vm.{:016x}", hash(&[name]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn they_never_change() {
        assert_eq!(directory("web-1"), "web-1");
        assert_eq!(directory("../x"), format!("vm.{:016x}", hash(&["../x"])));
        assert!(directory("a name with blanks that is long").len() <= 24);
        assert_eq!(hash(&["a", "b"]), 0x9ee0_55ea_1a8e_c313, "guests would get other addresses");
        assert_eq!(uuid("c", "vm").len(), 36);
        assert_ne!(hash(&["ab", ""]), hash(&["a", "b"]));
    }
}

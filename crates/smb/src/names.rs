//! Names on the share. ext4 takes every byte but `/` and NUL in a name; SMB reserves `" * : < > ? | \` and the
//! control characters. Each of these is carried as the private-use character `U+F000 + c`; Samba's catia module
//! on the server has the same table ([`catia_mappings`]).
//!
//! A name that is not UTF-8, or holds one of those private-use characters itself, has no form on the share
//! and has to go by the control protocol; so the mapping is one to one where it is defined.

use std::borrow::Cow;
use std::fmt::Write as _;

const RESERVED: [u8; 8] = [b'"', b'*', b':', b'<', b'>', b'?', b'|', b'\\'];
const PRIVATE_BASE: u32 = 0xF000;

fn is_reserved(c: char) -> bool {
    u8::try_from(c).is_ok_and(|byte| (1..=0x1f).contains(&byte) || RESERVED.contains(&byte))
}

fn is_stand_in(c: char) -> bool {
    u32::from(c).checked_sub(PRIVATE_BASE).and_then(char::from_u32).is_some_and(is_reserved)
}

/// The form of a file name on the share; `None` when it has none.
#[must_use]
pub fn to_share(name: &[u8]) -> Option<Cow<'_, str>> {
    let name = std::str::from_utf8(name).ok()?;
    if name.is_empty() || name == "." || name == ".." {
        return None;
    }
    if name.chars().any(|c| c == '/' || c == '\0' || is_stand_in(c)) {
        return None;
    }
    if !name.chars().any(is_reserved) {
        return Some(Cow::Borrowed(name));
    }
    let stand_in = |c: char| {
        if is_reserved(c) { char::from_u32(PRIVATE_BASE + u32::from(c)).unwrap_or(c) } else { c }
    };
    Some(Cow::Owned(name.chars().map(stand_in).collect()))
}

/// The file name behind a name on the share.
#[must_use]
pub fn from_share(name: &str) -> String {
    let original = |c: char| {
        if is_stand_in(c) { char::from_u32(u32::from(c) - PRIVATE_BASE).unwrap_or(c) } else { c }
    };
    name.chars().map(original).collect()
}

/// The table as value of Samba's `catia:mappings`.
#[must_use]
pub fn catia_mappings() -> String {
    let mut out = String::new();
    for byte in (1..=0x1fu8).chain(RESERVED) {
        let separator = if out.is_empty() { "" } else { "," };
        // Writing to a String cannot fail.
        let _ = write!(out, "{separator}0x{byte:02x}:0x{:04x}", PRIVATE_BASE + u32::from(byte));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn plain_names_are_not_copied() {
        assert!(matches!(to_share("Bär 1.qcow2".as_bytes()), Some(Cow::Borrowed("Bär 1.qcow2"))));
    }

    #[test]
    fn reserved_characters_have_stand_ins() {
        assert_eq!(to_share(b"a:b\\c").as_deref(), Some("a\u{f03a}b\u{f05c}c"));
        assert!(catia_mappings().starts_with("0x01:0xf001,"));
        assert!(catia_mappings().ends_with(",0x5c:0xf05c"));
    }

    #[test]
    fn names_without_a_form_are_refused() {
        let none: [&[u8]; 7] = [b"", b".", b"..", b"a/b", b"a\0", b"\xff", "\u{f03a}".as_bytes()];
        for name in none {
            assert_eq!(to_share(name), None, "{name:?}");
        }
    }

    proptest! {
        #[test]
        fn round_trip(bytes in prop::collection::vec(any::<u8>(), 1..40)) {
            if let Some(shared) = to_share(&bytes) {
                let back = from_share(&shared).into_bytes();
                prop_assert_eq!(&back, &bytes);
                prop_assert!(!shared.chars().any(is_reserved));
            }
        }

        #[test]
        fn every_utf8_name_without_stand_ins_has_a_form(name in "[^/\\x00\u{f000}-\u{f0ff}]{3,40}") {
            let shared = to_share(name.as_bytes());
            prop_assert_eq!(shared.map(|shared| from_share(&shared)), Some(name));
        }
    }
}

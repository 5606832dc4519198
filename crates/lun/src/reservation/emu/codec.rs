//! The registry as text, one thing a line, with a checksum at the end, so that a person can read it in the lab. Pure.

use super::registry::{Nexus, REGISTRATIONS_MAX, Registration, Registry, Window};
use crate::reservation::types::ReservationType;
use std::fmt::Write;
use std::str::{FromStr, SplitWhitespace};

const HEAD: &str = "csvfs-reservations 1";
/// Longest registry, in bytes: every nexus known and registered.
pub(crate) const BYTES_MAX: u64 = 256 * REGISTRATIONS_MAX as u64;

pub(crate) fn encode(registry: &Registry) -> String {
    let Registry { generation, bytes, .. } = registry;
    let settled = u8::from(registry.settled);
    let mut text = format!("{HEAD}\ngeneration {generation}\nbytes {bytes}\nsettled {settled}\n");
    for one in &registry.known {
        let _ = writeln!(text, "known {} {} {}", nexus_text(one.nexus), one.offset, one.size_limit);
    }
    for one in &registry.registrations {
        let _ = writeln!(text, "registration {} {:016x}", nexus_text(one.nexus), one.key);
    }
    if let Some((nexus, kind)) = registry.reservation {
        let _ = writeln!(text, "reservation {} {}", nexus_text(nexus), kind.scsi());
    }
    let crc = crc32fast::hash(text.as_bytes());
    let _ = writeln!(text, "crc {crc:08x}");
    text
}

fn nexus_text(nexus: Nexus) -> String {
    match nexus {
        Nexus::Loop { index, sequence } => format!("loop {index} {sequence}"),
        Nexus::File { key } => format!("file {key:016x}"),
    }
}

/// `None` when anything at all is wrong with it.
pub(crate) fn decode(text: &str) -> Option<Registry> {
    let body_len = text.rfind("crc ")?;
    let (body, last) = text.split_at_checked(body_len)?;
    let crc = u32::from_str_radix(last.strip_prefix("crc ")?.strip_suffix('\n')?, 16).ok()?;
    if crc != crc32fast::hash(body.as_bytes()) {
        return None;
    }
    let mut lines = body.lines();
    if lines.next()? != HEAD {
        return None;
    }
    let mut registry = Registry::default();
    for line in lines {
        let mut words = line.split_whitespace();
        match words.next()? {
            "generation" => registry.generation = number(&mut words)?,
            "bytes" => registry.bytes = number(&mut words)?,
            "settled" => registry.settled = number::<u8>(&mut words)? == 1,
            "known" => registry.known.push(Window {
                nexus: nexus(&mut words)?,
                offset: number(&mut words)?,
                size_limit: number(&mut words)?,
            }),
            "registration" => {
                registry
                    .registrations
                    .push(Registration { nexus: nexus(&mut words)?, key: key(&mut words)? });
            }
            "reservation" => {
                let holder = nexus(&mut words)?;
                registry.reservation = Some((holder, ReservationType::from_scsi(number(&mut words)?)?));
            }
            _ => return None,
        }
        if words.next().is_some() {
            return None;
        }
    }
    Some(registry)
}

fn number<T: FromStr>(words: &mut SplitWhitespace<'_>) -> Option<T> {
    words.next()?.parse().ok()
}

fn key(words: &mut SplitWhitespace<'_>) -> Option<u64> {
    u64::from_str_radix(words.next()?, 16).ok()
}

fn nexus(words: &mut SplitWhitespace<'_>) -> Option<Nexus> {
    match words.next()? {
        "loop" => Some(Nexus::Loop { index: number(words)?, sequence: number(words)? }),
        "file" => Some(Nexus::File { key: key(words)? }),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sample() -> Registry {
        let nexus = Nexus::Loop { index: 3, sequence: 7784 };
        Registry {
            generation: 9,
            registrations: vec![
                Registration { nexus, key: 0xaa },
                Registration { nexus: Nexus::File { key: u64::MAX }, key: u64::MAX },
            ],
            reservation: Some((nexus, ReservationType::default())),
            known: vec![Window { nexus, offset: 0, size_limit: 4096 }],
            bytes: 1 << 30,
            settled: true,
        }
    }

    #[test]
    fn what_was_written_is_read() {
        for registry in [sample(), Registry::default()] {
            assert_eq!(decode(&encode(&registry)), Some(registry));
        }
    }

    #[test]
    fn a_changed_byte_or_a_missing_end_is_noticed() {
        let text = encode(&sample());
        assert_eq!(decode(""), None);
        for at in 0..text.len() {
            assert_eq!(decode(&text[..at]), None, "cut at {at}");
            let mut bytes = text.clone().into_bytes();
            bytes[at] ^= 1;
            let changed = String::from_utf8(bytes).unwrap();
            assert_ne!(decode(&changed), Some(sample()), "changed at {at}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_taken(text in "\\PC*") {
            let body = format!("{HEAD}\n{text}\n");
            let crc = crc32fast::hash(body.as_bytes());
            let _ = decode(&text);
            let _ = decode(&format!("{body}crc {crc:08x}\n"));
        }
    }
}

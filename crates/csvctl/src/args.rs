//! Forms of arguments that several commands take: switches, durations, lists of names, `KEY=VALUE`.

use clap::ValueEnum;
use std::collections::BTreeMap;

/// On or off.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Switch {
    On,
    Off,
}

impl Switch {
    pub(crate) fn is_on(self) -> bool {
        self == Switch::On
    }
}

/// As [`Switch`] has it.
pub(crate) fn on_off(text: &str) -> Result<bool, String> {
    match text {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => Err("it must be on or off".to_owned()),
    }
}

pub(crate) fn key_value(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or("it must be KEY=VALUE")?;
    if key.is_empty() {
        return Err("it must be KEY=VALUE, and there is no key before \"=\"".to_owned());
    }
    Ok((key.to_owned(), value.to_owned()))
}

/// Pairs as a map.
///
/// # Errors
/// A key is given twice.
pub(crate) fn unique(pairs: Vec<(String, String)>) -> anyhow::Result<BTreeMap<String, String>> {
    let mut map = BTreeMap::new();
    for (key, value) in pairs {
        if let Some(other) = map.insert(key.clone(), value.clone()) {
            anyhow::bail!("{key} is given twice, as \"{other}\" and as \"{value}\"; give it once");
        }
    }
    Ok(map)
}

/// Names between commas; the empty text is the empty list.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Names(pub(crate) Vec<String>);

/// See [`Names`].
pub(crate) fn names(text: &str) -> Result<Names, String> {
    if text.is_empty() {
        return Ok(Names::default());
    }
    let names: Vec<String> = text.split(',').map(|name| name.trim().to_owned()).collect();
    if names.iter().any(String::is_empty) {
        return Err("there is no name before or after a comma".to_owned());
    }
    Ok(Names(names))
}

/// Units of a duration, greatest first.
const UNITS_MS: [(&str, u64); 5] =
    [("d", 86_400_000), ("h", 3_600_000), ("m", 60_000), ("s", 1_000), ("ms", 1)];

/// A duration such as `500ms`, `5s`, `3m`, `1h30m`, in milliseconds.
pub(crate) fn duration_ms(text: &str) -> Result<u64, String> {
    let wrong = || "it must be a number with its unit, such as 500ms, 5s, 3m or 1h".to_owned();
    let mut rest = text;
    let mut sum_ms: u64 = 0;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
        let (number, tail) = rest.split_at(digits);
        let letters = tail.find(|c: char| c.is_ascii_digit()).unwrap_or(tail.len());
        let (unit, after) = tail.split_at(letters);
        let of_unit = UNITS_MS.iter().find(|(name, _)| *name == unit).ok_or_else(wrong)?.1;
        let part: u64 = number.parse().map_err(|_| wrong())?;
        let added = part.checked_mul(of_unit).and_then(|part| sum_ms.checked_add(part));
        sum_ms = added.ok_or("it is too long")?;
        rest = after;
    }
    if text.is_empty() { Err(wrong()) } else { Ok(sum_ms) }
}

/// As [`duration_ms`] reads it.
pub(crate) fn duration_text(mut ms: u64) -> String {
    if ms == 0 {
        return "0s".to_owned();
    }
    let mut text = String::new();
    for (unit, of_unit) in UNITS_MS {
        if ms >= of_unit {
            text += &format!("{}{unit}", ms / of_unit);
            ms %= of_unit;
        }
    }
    text
}

/// A duration, or the word `default`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct OrDefault<T>(pub(crate) Option<T>);

/// See [`OrDefault`].
pub(crate) fn duration_or_default(text: &str) -> Result<OrDefault<u64>, String> {
    if text == "default" {
        return Ok(OrDefault(None));
    }
    duration_ms(text).map(|ms| OrDefault(Some(ms))).map_err(|why| format!("{why}, or \"default\""))
}

/// A duration, or the word `never`, which is 0.
pub(crate) fn duration_or_never(text: &str) -> Result<u64, String> {
    if text == "never" {
        return Ok(0);
    }
    duration_ms(text).map_err(|why| format!("{why}, or \"never\""))
}

/// A number, or the word `default`.
pub(crate) fn number_or_default(text: &str) -> Result<OrDefault<u32>, String> {
    if text == "default" {
        return Ok(OrDefault(None));
    }
    let number = text.parse().map_err(|_| "it must be a number, or \"default\"")?;
    Ok(OrDefault(Some(number)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_read_as_they_are_written() {
        for (text, ms) in [
            ("500ms", 500),
            ("5s", 5_000),
            ("3m", 180_000),
            ("1h", 3_600_000),
            ("1h30m", 5_400_000),
            ("2d1ms", 172_800_001),
            ("0s", 0),
        ] {
            assert_eq!(duration_ms(text), Ok(ms), "{text}");
            assert_eq!(duration_text(ms), text);
        }
        for ms in (0..3).flat_map(|i| [999, 60_001, 86_399_999, 900_000].map(|ms| ms * (i + 1))) {
            assert_eq!(duration_ms(&duration_text(ms)), Ok(ms));
        }
        assert_eq!(duration_ms("90m"), Ok(5_400_000));
        for text in ["", "5", "s", "5x", "-5s", "5 s", "1.5h", "99999999999999999999s", "99999999999999d"] {
            assert!(duration_ms(text).is_err(), "{text}");
        }
    }

    #[test]
    fn words_stand_for_values() {
        assert_eq!(duration_or_default("default"), Ok(OrDefault(None)));
        assert_eq!(duration_or_default("2s"), Ok(OrDefault(Some(2_000))));
        assert!(duration_or_default("never").unwrap_err().contains("default"));
        assert_eq!((duration_or_never("never"), duration_or_never("1m")), (Ok(0), Ok(60_000)));
        assert_eq!(number_or_default("0"), Ok(OrDefault(Some(0))));
        assert!(number_or_default("-1").is_err());
    }

    #[test]
    fn lists_and_pairs_are_checked() {
        assert_eq!(names("n1, n2").unwrap().0, ["n1", "n2"]);
        assert!(names("").unwrap().0.is_empty());
        assert!(names("n1,").is_err());
        assert_eq!(key_value("a=b=c"), Ok(("a".into(), "b=c".into())));
        assert!(key_value("a").is_err() && key_value("=a").is_err());
        let twice = unique(vec![("a".into(), "1".into()), ("a".into(), "2".into())]);
        assert!(twice.unwrap_err().to_string().contains("twice"));
    }
}

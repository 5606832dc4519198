//! Reading properties, and describing them.
//!
//! A value has the form that its [`Property`] says: `check_properties` has refused everything else before a resource is
//! opened. What is read here still never panics: a value of another form counts as not given.

use crate::api::{Form, Property, Spec};
use std::collections::BTreeMap;
use std::path::PathBuf;

/// Properties of a resource.
pub(crate) type Properties = BTreeMap<String, String>;

/// Text; empty counts as not given.
pub(crate) fn text<'a>(properties: &'a Properties, name: &str) -> Option<&'a str> {
    properties.get(name).map(|value| value.trim()).filter(|value| !value.is_empty())
}

/// `true` or `false`.
pub(crate) fn flag(properties: &Properties, name: &str, default: bool) -> bool {
    text(properties, name).map_or(default, |value| value == "true")
}

/// A whole number.
pub(crate) fn number(properties: &Properties, name: &str, default: u64) -> u64 {
    text(properties, name).and_then(|value| value.parse().ok()).unwrap_or(default)
}

/// A path.
pub(crate) fn path(properties: &Properties, name: &str) -> Option<PathBuf> {
    text(properties, name).map(PathBuf::from)
}

/// Parts of a list with commas, without blanks around them.
pub(crate) fn list(properties: &Properties, name: &str) -> Vec<String> {
    let parts = text(properties, name).unwrap_or_default().split(',');
    parts.map(str::trim).filter(|part| !part.is_empty()).map(str::to_owned).collect()
}

/// Values of one property of all dependencies of one type.
pub(crate) fn of_dependencies<'a>(
    spec: &'a Spec,
    kind: &'a str,
    name: &'a str,
) -> impl Iterator<Item = &'a str> {
    spec.depends_on
        .iter()
        .filter(move |dependency| dependency.kind == kind)
        .filter_map(move |dependency| text(&dependency.properties, name))
}

/// A property that need not be given.
pub(crate) fn optional(name: &str, form: Form, default: Option<&str>, help: &str) -> Property {
    Property {
        name: name.to_owned(),
        numbered: false,
        required: false,
        default: default.map(str::to_owned),
        form,
        help: help.to_owned(),
        live: false,
    }
}

/// A property that must be given.
pub(crate) fn required(name: &str, form: Form, help: &str) -> Property {
    Property { required: true, ..optional(name, form, None, help) }
}

/// One of these words.
pub(crate) fn words(words: &[&str]) -> Form {
    Form::Words(words.iter().map(|word| (*word).to_owned()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_read_and_defaults_stand_in() {
        let properties = Properties::from([
            ("a".to_owned(), " x, y ,,z".to_owned()),
            ("b".to_owned(), "false".to_owned()),
            ("n".to_owned(), "17".to_owned()),
            ("empty".to_owned(), "  ".to_owned()),
        ]);
        assert_eq!(list(&properties, "a"), ["x", "y", "z"]);
        assert!(!flag(&properties, "b", true));
        assert!(flag(&properties, "c", true));
        assert_eq!(number(&properties, "n", 1), 17);
        assert_eq!(number(&properties, "m", 1), 1);
        assert_eq!(text(&properties, "empty"), None);
    }
}

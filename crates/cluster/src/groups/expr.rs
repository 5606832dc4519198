//! Dependency expressions: what must be online before a resource goes online, such as `[Disk] and ([Address1] or [Address2])`.
//!
//! Grammar (`and` binds tighter than `or`; words in any case; brackets may be left out around a name):
//!
//! ```text
//! any  := all ("or" all)*          all := term ("and" term)*          term := "(" any ")" | "[" name "]" | name
//! ```
//!
//! An empty text depends on nothing. Bounds: [`NAMES_MAX`] names, [`DEPTH_MAX`] levels.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

/// Names in an expression.
pub const NAMES_MAX: usize = 64;
/// Parentheses within each other.
pub const DEPTH_MAX: usize = 16;

/// A parsed expression.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Expr {
    /// Depends on nothing: always satisfied.
    Nothing,
    /// A resource.
    Resource(String),
    /// All of these, at least two.
    All(Vec<Expr>),
    /// One of these, at least two.
    Any(Vec<Expr>),
}

/// Why a text is no expression.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ExprError {
    /// Not by the grammar.
    #[error(
        "\"{text}\" is no dependency expression: {why}; write for example \"[Disk] and ([Address1] or [Address2])\""
    )]
    Syntax {
        /// What was given.
        text: String,
        /// What is wrong with it.
        why: String,
    },
    /// Too long or too deep.
    #[error("a dependency expression can have {NAMES_MAX} resources and {DEPTH_MAX} levels of parentheses")]
    TooBig,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Token {
    Open,
    Close,
    And,
    Or,
    Name(String),
}

impl Expr {
    /// Reads an expression.
    ///
    /// # Errors
    /// Not by the grammar; too big.
    pub fn parse(text: &str) -> Result<Expr, ExprError> {
        let syntax = |why: String| ExprError::Syntax { text: text.into(), why };
        let tokens = tokens(text).map_err(syntax)?;
        if tokens.is_empty() {
            return Ok(Expr::Nothing);
        }
        if tokens.iter().filter(|token| matches!(token, Token::Name(_))).count() > NAMES_MAX {
            return Err(ExprError::TooBig);
        }
        let mut parser = Parser { tokens: &tokens, at: 0 };
        let expr = parser.any(0).map_err(|why| why.map_or(ExprError::TooBig, syntax))?;
        match parser.tokens.get(parser.at) {
            None => Ok(expr),
            Some(token) => Err(syntax(format!("{token} is too much"))),
        }
    }

    /// Every resource that it names.
    #[must_use]
    pub fn names(&self) -> BTreeSet<&str> {
        match self {
            Expr::Nothing => BTreeSet::new(),
            Expr::Resource(name) => BTreeSet::from([name.as_str()]),
            Expr::All(parts) | Expr::Any(parts) => parts.iter().flat_map(Expr::names).collect(),
        }
    }

    /// Is it satisfied, where `online` tells of each resource whether it is?
    pub fn holds(&self, online: &impl Fn(&str) -> bool) -> bool {
        match self {
            Expr::Nothing => true,
            Expr::Resource(name) => online(name),
            Expr::All(parts) => parts.iter().all(|part| part.holds(online)),
            Expr::Any(parts) => parts.iter().any(|part| part.holds(online)),
        }
    }
}

impl fmt::Display for Expr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let join = |f: &mut fmt::Formatter<'_>, parts: &[Expr], word: &str| {
            for (i, part) in parts.iter().enumerate() {
                if i > 0 {
                    write!(f, " {word} ")?;
                }
                match part {
                    Expr::All(_) | Expr::Any(_) => write!(f, "({part})")?,
                    Expr::Nothing | Expr::Resource(_) => write!(f, "{part}")?,
                }
            }
            Ok(())
        };
        match self {
            Expr::Nothing => Ok(()),
            Expr::Resource(name) => write!(f, "[{name}]"),
            Expr::All(parts) => join(f, parts, "and"),
            Expr::Any(parts) => join(f, parts, "or"),
        }
    }
}

impl fmt::Display for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Token::Open => f.write_str("\"(\""),
            Token::Close => f.write_str("\")\""),
            Token::And => f.write_str("\"and\""),
            Token::Or => f.write_str("\"or\""),
            Token::Name(name) => write!(f, "\"{name}\""),
        }
    }
}

fn tokens(text: &str) -> Result<Vec<Token>, String> {
    let mut tokens = Vec::new();
    let mut rest = text.trim_start();
    while let Some(first) = rest.chars().next() {
        let (token, length) = match first {
            '(' => (Token::Open, 1),
            ')' => (Token::Close, 1),
            ']' => return Err("\"]\" without \"[\"".into()),
            '[' => {
                let end = rest.find(']').ok_or("\"[\" without \"]\"")?;
                let name = rest[1..end].trim();
                if name.is_empty() || name.contains('[') {
                    return Err("there must be one name between \"[\" and \"]\"".into());
                }
                (Token::Name(name.into()), end + 1)
            }
            _ => {
                let end = rest.find(|c: char| c.is_whitespace() || "()[]".contains(c)).unwrap_or(rest.len());
                let word = &rest[..end];
                let token = if word.eq_ignore_ascii_case("and") {
                    Token::And
                } else if word.eq_ignore_ascii_case("or") {
                    Token::Or
                } else {
                    Token::Name(word.into())
                };
                (token, end)
            }
        };
        tokens.push(token);
        rest = rest[length..].trim_start();
    }
    Ok(tokens)
}

struct Parser<'a> {
    tokens: &'a [Token],
    at: usize,
}

impl Parser<'_> {
    fn take(&mut self, token: &Token) -> bool {
        let there = self.tokens.get(self.at) == Some(token);
        self.at += usize::from(there);
        there
    }

    /// The error is `None` when it is too deep.
    fn any(&mut self, depth: usize) -> Result<Expr, Option<String>> {
        let mut parts = vec![self.all(depth)?];
        while self.take(&Token::Or) {
            parts.push(self.all(depth)?);
        }
        Ok(one_or(parts, Expr::Any))
    }

    fn all(&mut self, depth: usize) -> Result<Expr, Option<String>> {
        let mut parts = vec![self.term(depth)?];
        while self.take(&Token::And) {
            parts.push(self.term(depth)?);
        }
        Ok(one_or(parts, Expr::All))
    }

    fn term(&mut self, depth: usize) -> Result<Expr, Option<String>> {
        if depth > DEPTH_MAX {
            return Err(None);
        }
        if self.take(&Token::Open) {
            let expr = self.any(depth + 1)?;
            return if self.take(&Token::Close) { Ok(expr) } else { Err(Some("\"(\" without \")\"".into())) };
        }
        match self.tokens.get(self.at) {
            Some(Token::Name(name)) => {
                self.at += 1;
                Ok(Expr::Resource(name.clone()))
            }
            Some(token) => Err(Some(format!("a resource is missing before {token}"))),
            None => Err(Some("a resource is missing at the end".into())),
        }
    }
}

fn one_or(mut parts: Vec<Expr>, many: fn(Vec<Expr>) -> Expr) -> Expr {
    if parts.len() == 1 { parts.remove(0) } else { many(parts) }
}

/// A way round in what depends on what, if there is one, as names in order; the last depends on the first.
#[must_use]
pub fn cycle<'a>(depends: &BTreeMap<&'a str, BTreeSet<&'a str>>) -> Option<Vec<&'a str>> {
    let mut done = BTreeSet::new();
    for start in depends.keys() {
        // Depth first, with the way kept by hand: nothing limits how long it may be.
        let mut way: Vec<(&str, Vec<&str>)> = Vec::new();
        let open = |name: &'a str| -> (&'a str, Vec<&'a str>) {
            (name, depends.get(name).map_or_else(Vec::new, |names| names.iter().copied().collect()))
        };
        if !done.contains(start) {
            way.push(open(start));
        }
        while let Some((name, left)) = way.last_mut() {
            let Some(next) = left.pop() else {
                done.insert(*name);
                way.pop();
                continue;
            };
            if let Some(at) = way.iter().position(|(name, _)| *name == next) {
                return Some(way[at..].iter().map(|(name, _)| *name).collect());
            }
            if !done.contains(next) {
                way.push(open(next));
            }
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn names(text: &str) -> Vec<String> {
        Expr::parse(text).unwrap().names().into_iter().map(str::to_owned).collect()
    }

    #[test]
    fn and_binds_tighter_than_or() {
        let expr = Expr::parse("a and b or [c d] AND (e Or f)").unwrap();
        assert_eq!(expr.to_string(), "([a] and [b]) or ([c d] and ([e] or [f]))");
        let holds = |online: &str| expr.holds(&|name: &str| online.split(',').any(|on| on == name));
        assert!(holds("a,b") && holds("c d,f") && !holds("a,e") && !holds("c d"));
        assert_eq!(names("x and (x or y)"), ["x", "y"]);
        assert_eq!(Expr::parse("  ").unwrap(), Expr::Nothing);
        assert!(Expr::Nothing.holds(&|_| false));
    }

    #[test]
    fn bad_ones_say_what_is_wrong() {
        for (text, why) in [
            ("a and", "missing at the end"),
            ("and b", "missing before \"and\""),
            ("a b", "\"b\" is too much"),
            ("(a or b", "without \")\""),
            ("a)", "too much"),
            ("[a", "without \"]\""),
            ("a]", "without \"[\""),
            ("[]", "one name"),
            ("()", "missing before \")\""),
        ] {
            let error = Expr::parse(text).unwrap_err().to_string();
            assert!(error.contains(why), "{text}: {error}");
        }
        let deep = format!("{}a{}", "(".repeat(DEPTH_MAX + 1), ")".repeat(DEPTH_MAX + 1));
        assert_eq!(Expr::parse(&deep), Err(ExprError::TooBig));
        let long = vec!["a"; NAMES_MAX + 1].join(" or ");
        assert_eq!(Expr::parse(&long), Err(ExprError::TooBig));
    }

    #[test]
    fn a_cycle_is_named_in_its_order() {
        let map = |edges: &[(&'static str, &[&'static str])]| {
            edges.iter().map(|(name, on)| (*name, on.iter().copied().collect())).collect::<BTreeMap<_, _>>()
        };
        assert_eq!(cycle(&map(&[("a", &["b", "c"]), ("b", &["c"]), ("c", &[])])), None);
        assert_eq!(cycle(&map(&[("a", &["a"])])), Some(vec!["a"]));
        let found = cycle(&map(&[("a", &["b"]), ("b", &["c"]), ("c", &["d"]), ("d", &["b"])])).unwrap();
        assert_eq!(found, ["b", "c", "d"]);
    }

    fn any_expr() -> impl Strategy<Value = Expr> {
        let leaf = "[a-e]{1,3}".prop_filter("not a word", |name| name != "and" && name != "or");
        leaf.prop_map(Expr::Resource).prop_recursive(4, 24, 3, |inner| {
            let parts = prop::collection::vec(inner, 2..4);
            (any::<bool>(), parts)
                .prop_map(|(all, parts)| if all { Expr::All(parts) } else { Expr::Any(parts) })
        })
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_back(expr in any_expr(), online in prop::collection::btree_set("[a-e]{1,3}", 0..8)) {
            let read = Expr::parse(&expr.to_string()).unwrap();
            prop_assert_eq!(&read, &expr);
            let on = |name: &str| online.contains(name);
            prop_assert_eq!(read.holds(&on), expr.holds(&on));
        }

        #[test]
        fn nothing_makes_it_panic(text in "[\\[\\]() a-cANDor]{0,40}") {
            let _ = Expr::parse(&text);
        }
    }
}

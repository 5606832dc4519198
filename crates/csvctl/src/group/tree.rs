//! What depends on what in a group, as a tree: each resource with what must be online before it below.

use csv_cluster::db::{ClusterDb, Resource};
use csv_cluster::groups::expr::Expr;
use std::collections::{BTreeMap, BTreeSet};

/// Lines of the tree. At the left stand the resources that nothing depends on. What stands at several places is taken apart at the
/// first one only, so there are never more lines than names in the dependencies.
pub(crate) fn lines(db: &ClusterDb, group: &str) -> Vec<String> {
    let resources: BTreeMap<&str, &Resource> =
        crate::names::resources_of(db, group).map(|resource| (resource.name.as_str(), resource)).collect();
    let depends: BTreeMap<&str, Expr> = resources
        .iter()
        .map(|(name, resource)| (*name, Expr::parse(&resource.depends).unwrap_or(Expr::Nothing)))
        .collect();
    let below: BTreeSet<&str> = depends.values().flat_map(Expr::names).collect();
    let mut tree =
        Tree { resources: &resources, depends: &depends, seen: BTreeSet::new(), lines: Vec::new() };
    for name in resources.keys().filter(|name| !below.contains(*name)) {
        tree.resource(name, "", "");
    }
    tree.lines
}

struct Tree<'a> {
    resources: &'a BTreeMap<&'a str, &'a Resource>,
    depends: &'a BTreeMap<&'a str, Expr>,
    seen: BTreeSet<String>,
    lines: Vec<String>,
}

impl Tree<'_> {
    /// `first` stands before its own line, `rest` before those below it.
    fn resource(&mut self, name: &str, first: &str, rest: &str) {
        let shown = match self.resources.get(name) {
            Some(resource) => format!("{name} ({}): {}", resource.kind, resource.status.state),
            None => format!("{name}: not in this group"),
        };
        let known = !self.seen.insert(name.to_owned());
        let expr = self.depends.get(name).cloned().unwrap_or(Expr::Nothing);
        if known && expr != Expr::Nothing {
            self.lines.push(format!("{first}{shown}, see above"));
            return;
        }
        self.lines.push(format!("{first}{shown}"));
        self.parts(all(&expr), rest);
    }

    fn parts(&mut self, parts: &[Expr], rest: &str) {
        for (i, part) in parts.iter().enumerate() {
            let last = i + 1 == parts.len();
            let (first, below) = if last { ("└─ ", "   ") } else { ("├─ ", "│  ") };
            self.part(part, &format!("{rest}{first}"), &format!("{rest}{below}"));
        }
    }

    fn part(&mut self, expr: &Expr, first: &str, rest: &str) {
        match expr {
            Expr::Nothing => {}
            Expr::Resource(name) => self.resource(name, first, rest),
            Expr::All(parts) => {
                self.lines.push(format!("{first}all of"));
                self.parts(parts, rest);
            }
            Expr::Any(parts) => {
                self.lines.push(format!("{first}one of"));
                self.parts(parts, rest);
            }
        }
    }
}

/// What stands below a resource: the parts of its expression, all of which it needs.
fn all(expr: &Expr) -> &[Expr] {
    match expr {
        Expr::Nothing => &[],
        Expr::All(parts) => parts,
        Expr::Resource(_) | Expr::Any(_) => std::slice::from_ref(expr),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testbed::Bed;

    #[test]
    fn the_tree_shows_every_resource_with_what_it_needs() {
        let mut bed = Bed::nodes(1);
        bed.group(
            "fs",
            &[
                ("disk", "PhysicalDisk", ""),
                ("ip1", "IPAddress", ""),
                ("ip2", "IPAddress", ""),
                ("name", "NetworkName", "[ip1] or [ip2]"),
                ("share", "FileShare", "[disk] and [name]"),
                ("backup", "GenericApplication", "share"),
                ("alone", "GenericApplication", ""),
                ("audit", "GenericApplication", "[share] and [ip1]"),
            ],
        );
        let expected = "\
alone (GenericApplication): offline
audit (GenericApplication): offline
├─ share (FileShare): offline
│  ├─ disk (PhysicalDisk): offline
│  └─ name (NetworkName): offline
│     └─ one of
│        ├─ ip1 (IPAddress): offline
│        └─ ip2 (IPAddress): offline
└─ ip1 (IPAddress): offline
backup (GenericApplication): offline
└─ share (FileShare): offline, see above";
        assert_eq!(lines(&bed.db, "fs").join("\n"), expected);
    }

    #[test]
    fn a_choice_of_several_together_is_taken_apart() {
        let mut bed = Bed::nodes(1);
        bed.group("g", &[("a", "T", ""), ("b", "T", ""), ("c", "T", ""), ("x", "T", "([a] and [b]) or [c]")]);
        let text = lines(&bed.db, "g").join("\n");
        assert!(text.starts_with("x (T): offline\n└─ one of\n   ├─ all of\n   │  ├─ a"), "{text}");
        assert!(lines(&bed.db, "other").is_empty());
    }
}

//! Reads every file in `crates/cluster/cases`, plans, and compares. `cases/README.md` tells how to write one.

use super::spec::{CaseFile, duration_ms, node_id};
use crate::db::tests::Bed;
use crate::db::{Applied, Command, GroupState, MoveCause, MoveKind, ResourceState};
use crate::groups::balance::{self, Trigger};
use crate::groups::candidates::{explain, verdicts};
use crate::groups::manager::{GroupView, plan, waiting};
use csv_types::NodeId;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

const LEAST: usize = 60;

fn files() -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("cases");
    let entries = std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path());
    let mut files: Vec<PathBuf> =
        entries.filter(|path| path.extension().is_some_and(|ending| ending == "toml")).collect();
    files.sort();
    files
}

#[test]
fn every_case_plans_as_it_says() {
    let files = files();
    assert!(files.len() >= LEAST, "only {} cases were found", files.len());
    let mut wrong = Vec::new();
    for path in &files {
        let name = path.file_name().unwrap().to_string_lossy();
        let text = std::fs::read_to_string(path).unwrap();
        let case: CaseFile = toml::from_str(&text).unwrap_or_else(|error| panic!("{name}: {error}"));
        let differs = std::panic::catch_unwind(|| Run::new(&case).all(&case));
        match differs {
            Ok(differs) if differs.is_empty() => {}
            Ok(differs) => wrong.push(format!("{name}: {}\n{}", case.about, differs.join("\n"))),
            Err(_) => wrong.push(format!("{name}: {}\n    it panicked, see above", case.about)),
        }
    }
    assert!(wrong.is_empty(), "{} of {} cases differ\n\n{}", wrong.len(), files.len(), wrong.join("\n\n"));
}

/// A case while it runs.
struct Run {
    bed: Bed,
    silent: BTreeMap<NodeId, bool>,
    differs: Vec<String>,
}

impl Run {
    fn new(case: &CaseFile) -> Run {
        Run { bed: case.bed(), silent: BTreeMap::new(), differs: Vec::new() }
    }

    fn all(mut self, case: &CaseFile) -> Vec<String> {
        let view = case.view(&self.bed, &self.silent);
        self.lookups(case, &view);
        self.plan("plan", &view, &case.plan);
        for (number, step) in case.steps.iter().enumerate() {
            self.bed.now += step.after.as_deref().map_or(0, duration_ms);
            for event in &step.happens {
                self.happens(event);
            }
            let view = case.view(&self.bed, &self.silent);
            self.plan(&format!("step {}", number + 1), &view, &step.plan);
        }
        self.differs
    }

    /// What people ask, before anything is done.
    fn lookups(&mut self, case: &CaseFile, view: &GroupView) {
        let db = &self.bed.db;
        let mut found: Vec<(String, Vec<String>, &[String])> = Vec::new();
        for (group, expected) in &case.verdicts {
            let verdict = |(node, verdict): (NodeId, Result<(), String>)| match verdict {
                Ok(()) => format!("{} fits", db.node_name(node)),
                Err(why) => why,
            };
            let lines = verdicts(db, view, group).into_iter().map(verdict).collect();
            found.push((format!("verdicts.{group}"), lines, expected));
        }
        for (group, expected) in &case.explain {
            let line = |(node, why): (NodeId, String)| format!("{}: {why}", db.node_name(node));
            let lines = explain(db, view, group).into_iter().map(line).collect();
            found.push((format!("explain.{group}"), lines, expected));
        }
        let waits = waiting(db, view);
        for (group, expected) in &case.waiting {
            let line = waits.get(group).cloned().unwrap_or_default();
            found.push((format!("waiting.{group}"), vec![line], std::slice::from_ref(expected)));
        }
        let look = balance::balance(db, view, Trigger::DryRun);
        if let Some(expected) = &case.balance {
            let name = |node| db.node_name(node);
            let line = |found: &balance::Move| {
                format!("{}: {} to {} ({})", found.group, name(found.from), name(found.to), found.why)
            };
            found.push(("balance".into(), look.moves.iter().map(line).collect(), expected));
        }
        if let Some(expected) = &case.kept {
            let line = |kept: &balance::Kept| format!("{}: {}", kept.what, kept.why);
            found.push(("kept".into(), look.kept.iter().map(line).collect(), expected));
        }
        for (what, lines, expected) in found {
            compare(&mut self.differs, &what, expected, &lines);
        }
    }

    /// Plans, compares, applies, and makes sure that this was all.
    fn plan(&mut self, what: &str, view: &GroupView, expected: &[String]) {
        let commands = plan(&self.bed.db, view);
        let lines: Vec<String> = commands.iter().map(short).collect();
        compare(&mut self.differs, what, expected, &lines);
        for command in &commands {
            let applied = self.bed.ok(command.clone());
            assert_ne!(applied, Applied::Unchanged, "{command:?} changed nothing");
        }
        let again: Vec<String> = plan(&self.bed.db, view).iter().map(short).collect();
        compare(&mut self.differs, &format!("{what}, planned again"), &[], &again);
    }

    fn happens(&mut self, event: &str) {
        let words: Vec<&str> = event.split(' ').collect();
        match words[..] {
            ["order", group, "online"] => drop(self.bed.ok(Command::GroupOnline { name: group.into() })),
            ["order", group, "offline"] => {
                let (name, reason) = (group.into(), "order".into());
                self.bed.ok(Command::GroupOffline { name, reason });
            }
            ["move", group, "to", node] => {
                let generation = self.bed.db.groups[group].generation;
                let (name, to, reason) = (group.into(), Some(node_id(node)), "order".into());
                let (how, cause) = (MoveKind::Live, MoveCause::Order);
                self.bed.ok(Command::GroupRelease { name, generation, to, how, reason, cause });
            }
            [name, what] if self.bed.db.groups.contains_key(name) => self.group_event(name, what),
            [name, what] => self.node_event(node_id(name), what),
            _ => panic!("\"{event}\" cannot happen; see cases/README.md"),
        }
    }

    fn group_event(&mut self, name: &str, what: &str) {
        let group = &self.bed.db.groups[name];
        let (generation, node) = (group.generation, group.owner.expect("it has no owner"));
        let (reason, named) = ("it does not work".to_owned(), name.to_owned());
        let status = |state, of_all| self.bed.group_status_command(name, state, of_all);
        let command = match what {
            "online" => status(GroupState::Online, ResourceState::Online),
            "partial" => status(GroupState::Partial { reason }, ResourceState::Failed),
            "failed" => status(GroupState::Failed { reason }, ResourceState::Failed),
            "released" => Command::GroupReleased { name: named, generation, node },
            "migrated" => Command::GroupMigrated { name: named, generation, node },
            "cancelled" => Command::GroupReleaseCancelled { name: named, generation, node, reason },
            _ => panic!("a group cannot be \"{what}\""),
        };
        self.bed.ok(command);
    }

    fn node_event(&mut self, node: NodeId, what: &str) {
        let incarnation = self.bed.db.nodes[&node].incarnation;
        let reason = "not heard".to_owned();
        let command = match what {
            "up" => Command::NodeUp { node, incarnation: incarnation + 1 },
            "down" => return self.bed.missed(node, &reason),
            "stopped" => return self.bed.goodbye(node, "it stopped"),
            "isolated" => Command::NodeIsolated { node, incarnation, reason },
            "pause" => Command::NodePause { node, drain: false },
            "drain" => Command::NodePause { node, drain: true },
            "drained" => Command::NodeDrained { node },
            "resume" => Command::NodeResume { node },
            "leave" => Command::NodeLeave { node, incarnation },
            "silent" | "reports" => {
                self.silent.insert(node, what == "silent");
                return;
            }
            _ => panic!("a node cannot be \"{what}\""),
        };
        self.bed.ok(command);
    }
}

/// Lines with a minus were expected, lines with a plus were found.
fn compare(differs: &mut Vec<String>, what: &str, expected: &[String], found: &[String]) {
    if expected == found {
        return;
    }
    differs.push(format!("  {what}:"));
    let missing = expected.iter().filter(|line| !found.contains(line)).map(|line| format!("    - {line}"));
    let mark = |line: &String| if expected.contains(line) { "    = " } else { "    + " };
    differs.extend(missing.chain(found.iter().map(|line| format!("{}{line}", mark(line)))));
}

#[allow(clippy::wildcard_enum_match_arm, reason = "every other command is wrong")]
fn short(command: &Command) -> String {
    match command {
        Command::GroupAssign { name, to, reason, .. } => format!("{name}: assign {to} ({reason})"),
        Command::GroupRelease { name, to: Some(to), how, reason, cause, .. } => {
            let cause = serde_json::to_value(cause).unwrap();
            format!("{name}: move to {to}, {how}, {} ({reason})", cause.as_str().unwrap())
        }
        Command::GroupRelease { name, to: None, reason, .. } => format!("{name}: stop ({reason})"),
        Command::GroupUnplaced { name, reason, .. } => format!("{name}: no owner ({reason})"),
        Command::GroupGiveUp { name, reason, .. } => format!("{name}: give up ({reason})"),
        Command::Property { key, .. } if key == balance::LAST => "look at the balance".into(),
        _ => panic!("{command:?} is not the manager's"),
    }
}

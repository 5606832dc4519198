//! `csvctl node drain`: waits until a node has neither volumes nor groups any more.

use crate::admin;
use crate::output::Bar;
use anyhow::bail;
use csv_cluster::db::{ClusterDb, GroupState};
use csv_types::NodeId;
use csv_types::admin::ClusterRequest;
use csv_types::config::LocalConfig;
use csvd::groups::Moving;
use std::time::{Duration, Instant};

const LOOK_EVERY: Duration = Duration::from_millis(200);
/// The node is asked how far a move is.
const ASK_EVERY: u32 = 5;
/// For something to leave, or a move to get on: longer than a planned move of a volume may take.
const STILL_MAX: Duration = Duration::from_secs(300);

/// What a node still has.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Left {
    volumes: Vec<String>,
    groups: Vec<String>,
    /// The first group that moves.
    moving: Option<String>,
}

impl Left {
    fn of(db: &ClusterDb, node: NodeId) -> Left {
        let names = |names: Vec<&str>| names.into_iter().map(str::to_owned).collect::<Vec<_>>();
        let groups = names(db.groups_of(node));
        let moves =
            |name: &&String| matches!(db.groups[*name].state, GroupState::Releasing { to: Some(_), .. });
        let moving = groups.iter().find(moves).cloned();
        Left { volumes: names(db.volumes_of(node)), groups, moving }
    }

    fn is_empty(&self) -> bool {
        self.volumes.is_empty() && self.groups.is_empty()
    }

    fn shown(&self) -> String {
        let list = |what: &str, names: &[String]| match names {
            [] => None,
            names => Some(format!("{what} {}", names.join(", "))),
        };
        let parts = [list("volumes", &self.volumes), list("groups", &self.groups)];
        parts.into_iter().flatten().collect::<Vec<_>>().join(" and ")
    }

    /// Why it may be that nothing leaves.
    fn advice(&self) -> String {
        let mut advice = Vec::new();
        if !self.volumes.is_empty() {
            advice.push("is there another node that is Up and has a path to the LUN?".to_owned());
        }
        if let Some(group) = self.moving.as_ref().or(self.groups.first()) {
            advice.push(format!("`csvctl group candidates {group}` says which nodes can have group {group}"));
        }
        advice.join("; ")
    }
}

/// Waits. The node goes on with it whether or not somebody waits.
pub(crate) fn wait(config: &LocalConfig, node: NodeId, name: &str) -> anyhow::Result<()> {
    let bar = Bar::new();
    let result = looks(config, node, name, &bar);
    bar.clear();
    result
}

fn looks(config: &LocalConfig, node: NodeId, name: &str, bar: &Bar) -> anyhow::Result<()> {
    let mut before = (Left::default(), String::new());
    let mut changed = Instant::now();
    let mut progress = (String::new(), None);
    let mut look: u32 = 0;
    loop {
        let left = Left::of(&admin::database(config)?, node);
        if left.is_empty() {
            return Ok(());
        }
        match &left.moving {
            Some(group) if look.is_multiple_of(ASK_EVERY) => {
                let request = ClusterRequest::MoveProgress { group: group.clone() };
                if let Ok(Some(moving)) = admin::ask_typed::<Moving>(config, request) {
                    progress = (format!("; {group}: {}", moving.text), moving.percent);
                }
            }
            Some(_) => {}
            None => progress = (String::new(), None),
        }
        look = look.wrapping_add(1);
        let now = (left, progress.0.clone());
        if now != before {
            before = now;
            changed = Instant::now();
        }
        let (left, text) = &before;
        if changed.elapsed() >= STILL_MAX {
            bail!(
                "{name} still has {}, and nothing has moved for {} s; it goes on being drained. {}",
                left.shown(),
                STILL_MAX.as_secs(),
                left.advice()
            );
        }
        bar.show(format!("{name} still has {}{text}", left.shown()), progress.1);
        std::thread::sleep(LOOK_EVERY);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testbed::{Bed, n};
    use csv_cluster::db::Command;

    #[test]
    fn groups_count_as_volumes_do() {
        let mut bed = Bed::nodes(2);
        assert!(Left::of(&bed.db, n(1)).is_empty());
        bed.machine("a", 1);
        bed.machine("vm", 1);
        bed.machine("other", 2);
        let left = Left::of(&bed.db, n(1));
        assert_eq!((left.shown().as_str(), left.moving.as_deref()), ("groups a, vm", None));
        assert!(
            left.advice().contains("candidates a") && !left.advice().contains("LUN"),
            "{}",
            left.advice()
        );
        bed.release("vm", 2);
        let left = Left::of(&bed.db, n(1));
        assert_eq!(left.moving.as_deref(), Some("vm"));
        assert!(left.advice().contains("candidates vm"));
        bed.by_owner("vm", |name, generation, node| Command::GroupMigrated { name, generation, node });
        assert_eq!(Left::of(&bed.db, n(1)).shown(), "groups a");
        let both = Left { volumes: vec!["Volume1".into()], ..left };
        assert_eq!(both.shown(), "volumes Volume1 and groups a, vm");
        assert!(both.advice().contains("path to the LUN"));
    }
}

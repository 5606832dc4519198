//! `csvctl group move`, and what else moves groups.

use super::{ORDERED, Told, finish};
use crate::admin;
use crate::names;
use crate::wait::{Goal, Watch};
use anyhow::bail;
use csv_cluster::db::{Applied, ClusterDb, Command, Group, GroupState, MoveCause, MoveKind};
use csv_types::NodeId;
use csv_types::admin::ClusterRequest;
use csv_types::config::LocalConfig;
use csvd::groups::Candidate;

/// Options of every command that moves a group.
#[derive(Debug, Clone, Default, clap::Args)]
pub(crate) struct MoveOptions {
    /// Node to move it to; without, the best of the others.
    #[arg(long, value_name = "NODE")]
    pub(crate) to: Option<String>,
    #[command(flatten)]
    how: How,
    /// Do not wait until it is there.
    #[arg(long)]
    pub(crate) no_wait: bool,
}

#[derive(Debug, Clone, Copy, Default, clap::Args)]
#[group(multiple = false)]
struct How {
    /// Virtual machines go on running (default). Where that cannot be, as --quick.
    #[arg(long)]
    live: bool,
    /// Virtual machines are saved to a file and resumed from there.
    #[arg(long)]
    quick: bool,
    /// Virtual machines are shut down and started there.
    #[arg(long)]
    shutdown: bool,
}

impl How {
    /// `machines`: are there virtual machines in the group? What has none is stopped here and started there.
    fn kind(self, machines: bool) -> MoveKind {
        match self {
            How { live: true, .. } => MoveKind::Live,
            How { quick: true, .. } => MoveKind::Quick,
            How { shutdown: true, .. } => MoveKind::Shutdown,
            How { .. } if machines => MoveKind::Live,
            How { .. } => MoveKind::Shutdown,
        }
    }
}

/// A move that is to be ordered.
#[derive(Debug, Clone)]
pub(crate) struct Order {
    pub(crate) to: NodeId,
    pub(crate) how: MoveKind,
    pub(crate) cause: MoveCause,
    pub(crate) reason: String,
}

/// Orders a move and waits for it.
pub(crate) fn run(
    config: &LocalConfig,
    name: &str,
    options: &MoveOptions,
    told: Told<'_>,
) -> anyhow::Result<()> {
    let db = admin::database(config)?;
    let group = names::group(&db, name)?;
    let rows = candidates(config, name)?;
    let to = target(&db, group, options.to.as_deref(), &rows)?;
    let machines = names::resources_of(&db, name).any(|resource| resource.kind == names::MACHINE);
    let order =
        Order { to, how: options.how.kind(machines), cause: MoveCause::Order, reason: ORDERED.to_owned() };
    let watch = give(config, &db, group, order)?;
    // Only now: a node that is down is refused.
    if let Some(why) = unfit(&db, to, &rows) {
        eprintln!(
            "WARNING: {why}; it is moved there all the same, as you order, and may be moved away again"
        );
    }
    if options.no_wait { Ok(()) } else { finish(config, watch, told) }
}

/// Orders a move of a group as the database has it.
pub(crate) fn give(
    config: &LocalConfig,
    db: &ClusterDb,
    group: &Group,
    order: Order,
) -> anyhow::Result<Watch> {
    let Order { to, how, cause, reason } = order;
    let (name, generation) = (group.name.clone(), group.generation);
    let command = Command::GroupRelease { name, generation, to: Some(to), how, reason, cause };
    let applied = admin::give(config, &command)?;
    Ok(Watch::new(db, group, Goal::Moved(to), applied != Applied::Unchanged))
}

/// Which nodes could have the group, best first.
pub(crate) fn candidates(config: &LocalConfig, name: &str) -> anyhow::Result<Vec<Candidate>> {
    admin::ask_typed(config, ClusterRequest::Candidates { group: name.to_owned() })
}

/// Where a group is to go.
fn target(db: &ClusterDb, group: &Group, to: Option<&str>, rows: &[Candidate]) -> anyhow::Result<NodeId> {
    let name = &group.name;
    let Some(owner) = group.owner else {
        let reason = match &group.state {
            GroupState::Offline { reason } => reason.as_str(),
            GroupState::Pending
            | GroupState::Online
            | GroupState::Partial { .. }
            | GroupState::Failed { .. }
            | GroupState::Releasing { .. } => "",
        };
        let first = match to {
            Some(node) => format!("; `csvctl group set {name} --preferred {node}` has it start there"),
            None => String::new(),
        };
        bail!(
            "no node has group {name} ({reason}), so there is nothing to move; `csvctl group online {name}` starts it on the \
             best node{first}"
        );
    };
    let owner_name = db.node_name(owner);
    if let Some(to) = to {
        let to = names::node_id(db, to)?;
        if to == owner {
            bail!("{owner_name} has group {name} already; `csvctl group candidates {name}` lists the others");
        }
        return Ok(to);
    }
    let best = rows.iter().find(|row| row.fit && row.node != owner_name);
    if let Some(best) = best {
        return names::node_id(db, &best.node);
    }
    let others: Vec<&str> =
        rows.iter().filter(|row| row.node != owner_name).map(|row| row.why.as_str()).collect();
    if others.is_empty() {
        bail!("group {name} stays on {owner_name}: the cluster has no other node");
    }
    bail!("group {name} stays on {owner_name}, no other node can have it: {}", others.join("; "))
}

/// The rule that stops the node, if one does.
fn unfit<'a>(db: &ClusterDb, to: NodeId, rows: &'a [Candidate]) -> Option<&'a str> {
    let name = db.node_name(to);
    rows.iter().find(|row| row.node == name && !row.fit).map(|row| row.why.as_str())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testbed::{Bed, n};
    use clap::Parser;

    #[derive(Debug, Parser)]
    struct Cli {
        #[command(flatten)]
        options: MoveOptions,
    }

    fn parse(words: &[&str]) -> Result<MoveOptions, clap::Error> {
        Cli::try_parse_from([&["x"], words].concat()).map(|cli| cli.options)
    }

    fn row(node: &str, fit: bool, why: &str) -> Candidate {
        Candidate { node: node.into(), fit, why: why.into() }
    }

    #[test]
    fn live_is_the_default_and_one_way_at_a_time() {
        assert_eq!(parse(&[]).unwrap().how.kind(true), MoveKind::Live);
        assert_eq!(parse(&["--live"]).unwrap().how.kind(true), MoveKind::Live);
        assert_eq!(parse(&["--quick"]).unwrap().how.kind(true), MoveKind::Quick);
        assert_eq!(parse(&["--shutdown", "--to", "n2"]).unwrap().how.kind(true), MoveKind::Shutdown);
        assert!(parse(&["--live", "--quick"]).is_err());
        assert_eq!(
            parse(&[]).unwrap().how.kind(false),
            MoveKind::Shutdown,
            "there is nothing that could go on running"
        );
        assert_eq!(parse(&["--quick"]).unwrap().how.kind(false), MoveKind::Quick);
    }

    #[test]
    fn the_best_other_node_is_taken() {
        let mut bed = Bed::nodes(3);
        bed.machine("vm", 1);
        let group = &bed.db.groups["vm"];
        let rows = [row("n1", true, "it was there last"), row("n3", true, "idle"), row("n2", true, "busy")];
        assert_eq!(target(&bed.db, group, None, &rows).unwrap(), n(3));
        assert_eq!(target(&bed.db, group, Some("n2"), &rows).unwrap(), n(2));
        let error = |to, rows: &[Candidate]| target(&bed.db, group, to, rows).unwrap_err().to_string();
        assert!(error(Some("n1"), &rows).contains("n1 has group vm already"));
        assert!(error(Some("n9"), &rows).contains("nodes: n1, n2, n3"));
        let none = [row("n1", true, ""), row("n2", false, "n2 is down"), row("n3", false, "n3 is paused")];
        assert!(error(None, &none).contains("n2 is down; n3 is paused"));
        assert!(error(None, &none[..1]).contains("no other node"));
        assert_eq!(unfit(&bed.db, n(2), &none), Some("n2 is down"));
        assert_eq!(unfit(&bed.db, n(2), &rows), None);
    }

    #[test]
    fn what_no_node_has_cannot_be_moved() {
        let mut bed = Bed::nodes(2);
        bed.group("g", &[]);
        let error = |to| target(&bed.db, &bed.db.groups["g"], to, &[]).unwrap_err().to_string();
        assert!(error(None).contains("`csvctl group online g`"), "{}", error(None));
        assert!(error(Some("n2")).contains("--preferred n2"), "{}", error(Some("n2")));
    }
}

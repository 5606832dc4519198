//! `csvctl cluster balance`: virtual machines go from nodes that are loaded too much to others, by order instead of by time.

use crate::admin;
use crate::group::moves::{self, Order};
use crate::names;
use crate::output::table;
use crate::wait;
use anyhow::bail;
use csv_cluster::db::{ClusterDb, MoveCause, MoveKind};
use csv_cluster::groups::balance::{Balance, Move};
use csv_types::admin::ClusterRequest;
use csv_types::config::LocalConfig;
use serde_json::{Value, json};

/// Arguments of `csvctl cluster balance`.
#[derive(Debug, Clone, Copy, clap::Args)]
pub(crate) struct BalanceArgs {
    /// Only say what would be moved and why, and what not.
    #[arg(long)]
    dry_run: bool,
    /// Do not wait until the moves are done.
    #[arg(long, conflicts_with = "dry_run")]
    no_wait: bool,
}

/// What became of a move.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Outcome {
    of: Move,
    /// Why it was not done; `None`: it was, or is under way.
    failed: Option<String>,
}

/// Looks, and moves unless it is a dry run.
pub(crate) fn run(config: &LocalConfig, args: BalanceArgs, json: bool) -> anyhow::Result<()> {
    let db = admin::database(config)?;
    let found: Balance = admin::ask_typed(config, ClusterRequest::BalanceDryRun)?;
    if args.dry_run {
        if json {
            println!("{}", serde_json::to_string_pretty(&object(&db, &found))?);
        } else {
            print!("{}", text(&db, &found, "would go"));
        }
        return Ok(());
    }
    if !json {
        print!("{}", text(&db, &found, "goes"));
    }
    let done = carry_out(config, &db, &found, args.no_wait);
    let failed: Vec<&Outcome> = done.iter().filter(|outcome| outcome.failed.is_some()).collect();
    if json {
        let rows: Vec<Value> = done.iter().map(|outcome| outcome_object(&db, outcome)).collect();
        let kept = &found.kept;
        println!("{}", serde_json::to_string_pretty(&json!({ "moves": rows, "kept": kept }))?);
    } else if !done.is_empty() {
        let verb = if args.no_wait { "are on their way" } else { "were moved" };
        println!("{} of {} {verb}", done.len() - failed.len(), done.len());
    }
    if failed.is_empty() {
        return Ok(());
    }
    let why: Vec<String> = failed
        .iter()
        .map(|outcome| format!("{}: {}", outcome.of.group, outcome.failed.as_deref().unwrap_or_default()))
        .collect();
    bail!("{} of {} groups were not moved:\n{}", failed.len(), done.len(), why.join("\n"))
}

/// Orders every move, then waits for one after the other while all go on.
fn carry_out(config: &LocalConfig, db: &ClusterDb, found: &Balance, no_wait: bool) -> Vec<Outcome> {
    let ordered: Vec<_> = found.moves.iter().map(|of| (of, order(config, db, of))).collect();
    ordered
        .into_iter()
        .map(|(of, watch)| {
            let result =
                watch.and_then(|watch| if no_wait { Ok(()) } else { wait::until(config, watch).map(drop) });
            Outcome { of: of.clone(), failed: result.err().map(|error| format!("{error:#}")) }
        })
        .collect()
}

fn order(config: &LocalConfig, db: &ClusterDb, of: &Move) -> anyhow::Result<wait::Watch> {
    let group = names::group(db, &of.group)?;
    if group.owner != Some(of.from) {
        bail!("it has left {} meanwhile", db.node_name(of.from));
    }
    let (how, cause) = (MoveKind::Live, MoveCause::Balance);
    moves::give(config, db, group, Order { to: of.to, how, cause, reason: of.why.clone() })
}

fn text(db: &ClusterDb, found: &Balance, goes: &str) -> String {
    let mut text = String::new();
    if found.moves.is_empty() {
        text += "nothing is to be moved\n";
    } else {
        let mut cells = vec![["GROUP", "FROM", "TO", "WHY"].map(str::to_owned).to_vec()];
        for of in &found.moves {
            let (from, to) = (db.node_name(of.from), db.node_name(of.to));
            cells.push(vec![of.group.clone(), from, to, of.why.clone()]);
        }
        text += &format!("what {goes}, while it runs:\n{}", table(&cells));
    }
    if !found.kept.is_empty() {
        let mut cells = vec![["WHAT STAYS", "WHY"].map(str::to_owned).to_vec()];
        cells.extend(found.kept.iter().map(|kept| vec![kept.what.clone(), kept.why.clone()]));
        text += &format!("\n{}", table(&cells));
    }
    text
}

fn move_object(db: &ClusterDb, of: &Move) -> Value {
    json!({
        "group": of.group,
        "from": db.node_name(of.from),
        "to": db.node_name(of.to),
        "why": of.why,
    })
}

fn outcome_object(db: &ClusterDb, outcome: &Outcome) -> Value {
    let mut object = move_object(db, &outcome.of);
    if let Value::Object(object) = &mut object {
        object.insert("failed".to_owned(), json!(outcome.failed));
    }
    object
}

fn object(db: &ClusterDb, found: &Balance) -> Value {
    let moves: Vec<Value> = found.moves.iter().map(|of| move_object(db, of)).collect();
    json!({ "moves": moves, "kept": found.kept })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testbed::{Bed, n};
    use csv_cluster::groups::balance::Kept;

    fn found() -> Balance {
        let of = Move { group: "vm1".into(), from: n(1), to: n(2), why: "n1 is 90 % loaded".into() };
        let kept = Kept { what: "vm2".into(), why: "it is in maintenance".into() };
        Balance { moves: vec![of], kept: vec![kept] }
    }

    #[test]
    fn moves_and_what_stays_are_told_by_name() {
        let bed = Bed::nodes(2);
        let shown = text(&bed.db, &found(), "would go");
        let line = shown.lines().find(|line| line.starts_with("vm1")).unwrap();
        assert!(line.contains("n1") && line.contains("n2") && line.ends_with("90 % loaded"), "{shown}");
        assert!(
            shown.contains("vm2") && shown.contains("maintenance") && shown.contains("would go"),
            "{shown}"
        );
        assert!(text(&bed.db, &Balance::default(), "goes").contains("nothing is to be moved"));
        let shown = object(&bed.db, &found());
        assert_eq!((&shown["moves"][0]["from"], &shown["moves"][0]["to"]), (&json!("n1"), &json!("n2")));
        assert_eq!(shown["kept"][0]["what"], "vm2");
        let outcome = Outcome { of: found().moves.remove(0), failed: Some("no memory".into()) };
        assert_eq!(outcome_object(&bed.db, &outcome)["failed"], "no memory");
    }
}

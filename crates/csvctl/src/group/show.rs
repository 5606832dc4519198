//! `csvctl group list`, `show` and `candidates`.

use super::moves;
use super::policy;
use super::tree;
use crate::admin;
use crate::names::{dash, group as find, node_names, resources_of};
use crate::output::{rfc3339, table};
use crate::resource::show as resources;
use csv_cluster::db::{ClusterDb, Group, GroupState};
use csv_types::NodeId;
use csv_types::admin::ClusterRequest;
use csv_types::config::LocalConfig;
use csvd::groups::{Candidate, Waiting};
use serde_json::{Value, json};

/// What starts wait for.
pub(crate) fn waiting(config: &LocalConfig) -> anyhow::Result<Waiting> {
    admin::ask_typed(config, ClusterRequest::GroupsWaiting)
}

/// `csvctl group list`.
pub(super) fn list(config: &LocalConfig, json: bool) -> anyhow::Result<()> {
    let db = admin::database(config)?;
    let waiting = waiting(config)?;
    if json {
        let rows: Vec<Value> = db.groups.values().map(|group| row(&db, group, &waiting)).collect();
        println!("{}", serde_json::to_string_pretty(&rows)?);
    } else {
        print!("{}", list_table(&db, &waiting));
    }
    Ok(())
}

fn list_table(db: &ClusterDb, waiting: &Waiting) -> String {
    let head = ["GROUP", "STATE", "OWNER", "PREFERRED", "PRIORITY", "SINCE", "REASON"];
    let mut cells = vec![head.map(str::to_owned).to_vec()];
    for group in db.groups.values() {
        cells.push(vec![
            group.name.clone(),
            state_word(group),
            owner(db, group),
            node_names(db, &group.policy.preferred),
            policy::priority_word(group.policy.priority),
            since(group.since_unix_ms),
            dash(reason(db, group, waiting)),
        ]);
    }
    table(&cells)
}

/// Name of the owner, or `-`.
pub(crate) fn owner(db: &ClusterDb, group: &Group) -> String {
    group.owner.map_or_else(|| "-".to_owned(), |owner| db.node_name(owner))
}

pub(crate) fn since(unix_ms: u64) -> String {
    rfc3339(unix_ms / 1000 * 1000)
}

/// State, with maintenance if it is in it.
pub(crate) fn state_word(group: &Group) -> String {
    let maintenance = if group.maintenance { ", maintenance" } else { "" };
    format!("{}{maintenance}", group.state)
}

/// Why it is so.
pub(crate) fn reason(db: &ClusterDb, group: &Group, waiting: &Waiting) -> String {
    let waits = waiting.get(&group.name).filter(|_| group.want_online);
    if let Some(owner) = group.owner.filter(|_| !db.group_owner_stands(group)) {
        let waits = waits.map_or_else(String::new, |waits| format!("; {waits}"));
        return format!("{} was lost{waits}", db.node_name(owner));
    }
    match &group.state {
        GroupState::Offline { reason } => waits.unwrap_or(reason).clone(),
        GroupState::Pending if !group.want_online => "it is to be offline".to_owned(),
        GroupState::Pending | GroupState::Online => String::new(),
        GroupState::Partial { reason } => reason.clone(),
        GroupState::Failed { reason } => match &group.given_up {
            Some(why) => format!("{reason}; not moved any more: {why}"),
            None => reason.clone(),
        },
        GroupState::Releasing { to: Some(to), how, reason, .. } => {
            format!("to {} ({how}): {reason}", db.node_name(*to))
        }
        GroupState::Releasing { to: None, reason, .. } => format!("goes offline: {reason}"),
    }
}

/// A row of `csvctl group list --json`.
pub(crate) fn row(db: &ClusterDb, group: &Group, waiting: &Waiting) -> Value {
    json!({
        "name": group.name,
        "state": state_name(group),
        "maintenance": group.maintenance,
        "owner": group.owner.map(|owner| db.node_name(owner)),
        "want_online": group.want_online,
        "preferred": group.policy.preferred.iter().map(|node| db.node_name(*node)).collect::<Vec<_>>(),
        "priority": group.policy.priority,
        "since": rfc3339(group.since_unix_ms),
        "reason": reason(db, group, waiting),
        "waits_for": waiting.get(&group.name),
    })
}

/// One word, so that programs can compare it.
fn state_name(group: &Group) -> &'static str {
    match group.state {
        GroupState::Offline { .. } => "offline",
        GroupState::Pending => "pending",
        GroupState::Online => "online",
        GroupState::Partial { .. } => "partial",
        GroupState::Failed { .. } => "failed",
        GroupState::Releasing { .. } => "moving",
    }
}

/// `csvctl group show`.
pub(super) fn show(config: &LocalConfig, name: &str, json: bool) -> anyhow::Result<()> {
    let db = admin::database(config)?;
    let group = find(&db, name)?;
    let waiting = waiting(config)?;
    let rows = moves::candidates(config, name)?;
    if json {
        println!("{}", serde_json::to_string_pretty(&object(&db, group, &waiting, &rows))?);
    } else {
        print!("{}", text(&db, group, &waiting, &rows));
    }
    Ok(())
}

fn object(db: &ClusterDb, group: &Group, waiting: &Waiting, rows: &[Candidate]) -> Value {
    let failures = group.failures.iter().map(|failure| {
        json!({ "node": db.node_name(failure.node), "at": rfc3339(failure.at_unix_ms), "why": failure.why })
    });
    let mut object = row(db, group, waiting);
    let more = json!({
        "policy": policy::object(db, &group.policy),
        "generation": group.generation,
        "last_owner": group.last_owner.map(|node| db.node_name(node)),
        "placed": rfc3339(group.placed_unix_ms),
        "displaced": group.displaced,
        "moving_to": moving_to(group).map(|node| db.node_name(node)),
        "resources": resources_of(db, &group.name).map(|of| resources::row(db, of)).collect::<Vec<_>>(),
        "failures": failures.collect::<Vec<_>>(),
        "failovers": group.failovers.iter().map(|at| rfc3339(*at)).collect::<Vec<_>>(),
        "given_up": group.given_up,
        "candidates": rows,
    });
    if let (Value::Object(object), Value::Object(more)) = (&mut object, more) {
        object.extend(more);
    }
    object
}

fn moving_to(group: &Group) -> Option<NodeId> {
    if let GroupState::Releasing { to, .. } = &group.state { *to } else { None }
}

fn text(db: &ClusterDb, group: &Group, waiting: &Waiting, rows: &[Candidate]) -> String {
    let mut text = String::new();
    text += &table(&facts(db, group, waiting));
    text += &place(db, group, rows);
    text
}

/// What is to be said of the group itself, in pairs.
fn facts(db: &ClusterDb, group: &Group, waiting: &Waiting) -> Vec<Vec<String>> {
    let mut facts = vec![
        ("group", group.name.clone()),
        ("state", format!("{} since {}", state_word(group), since(group.since_unix_ms))),
        ("owner", owner(db, group)),
        ("wanted", if group.want_online { "online" } else { "offline" }.to_owned()),
    ];
    let reason = reason(db, group, waiting);
    if !reason.is_empty() {
        facts.insert(2, ("reason", reason));
    }
    if let Some(last) = group.last_owner.filter(|last| group.owner != Some(*last)) {
        facts.push(("last owner", db.node_name(last)));
    }
    let first = group.policy.preferred.first();
    if let Some(first) =
        first.filter(|first| group.displaced && group.owner.is_some_and(|owner| owner != **first))
    {
        let text =
            format!("not its most preferred ({}); when it goes back says failback", db.node_name(*first));
        facts.push(("place", text));
    }
    facts.into_iter().map(|(key, value)| vec![key.to_owned(), value]).collect()
}

/// Everything below the head: resources, dependencies, policy, failures, candidates. Also for `csvctl vm show`.
pub(crate) fn place(db: &ClusterDb, group: &Group, rows: &[Candidate]) -> String {
    let mut text = String::new();
    let name = &group.name;
    if resources_of(db, name).next().is_none() {
        text += &format!("\nno resources; `csvctl resource add R --group {name} --type T` makes one\n");
    } else {
        text += &format!("\nresources\n{}", indented(&resources::of_group_table(db, name)));
        text += &format!("\nwhat depends on what\n{}", indented(&(tree::lines(db, name).join("\n") + "\n")));
    }
    text += &format!("\n{}", settled_policy(db, group));
    text += &failures(db, group);
    text + &format!("\nwhere it could be\n{}", indented(&candidates_table(rows)))
}

/// Policy, and how much of it is used up.
pub(crate) fn settled_policy(db: &ClusterDb, group: &Group) -> String {
    let rows: Vec<Vec<String>> =
        policy::rows(db, &group.policy).into_iter().map(|(key, value)| vec![key.to_owned(), value]).collect();
    format!("policy\n{}", indented(&table(&rows)))
}

fn failures(db: &ClusterDb, group: &Group) -> String {
    let mut text = String::new();
    if !group.failovers.is_empty() {
        let last: Vec<String> = group.failovers.iter().map(|at| since(*at)).collect();
        let threshold = policy::threshold(db, &group.policy);
        text += &format!(
            "\nmoved for failure ({threshold} allowed within {})\n{}",
            crate::args::duration_text(group.policy.failover_period_ms),
            indented(&(last.join("\n") + "\n"))
        );
    }
    if !group.failures.is_empty() {
        let rows: Vec<Vec<String>> = group
            .failures
            .iter()
            .map(|failure| vec![since(failure.at_unix_ms), db.node_name(failure.node), failure.why.clone()])
            .collect();
        text += &format!("\nfailed since it was last online\n{}", indented(&table(&rows)));
    }
    if let Some(why) = &group.given_up {
        let name = &group.name;
        text += &format!(
            "\nnot moved any more: {why}\n  mend what failed, then `csvctl group online {name}` starts it again\n"
        );
    }
    text
}

fn indented(text: &str) -> String {
    text.lines().map(|line| if line.is_empty() { "\n".to_owned() } else { format!("  {line}\n") }).collect()
}

/// `csvctl group candidates`.
pub(super) fn candidates(config: &LocalConfig, name: &str, json: bool) -> anyhow::Result<()> {
    let rows = moves::candidates(config, name)?;
    if json {
        println!("{}", serde_json::to_string_pretty(&rows)?);
    } else {
        print!("{}", candidates_table(&rows));
    }
    Ok(())
}

fn candidates_table(rows: &[Candidate]) -> String {
    let mut cells = vec![["NODE", "CAN", "WHY"].map(str::to_owned).to_vec()];
    for row in rows {
        let can = if row.fit { "yes" } else { "no" };
        cells.push(vec![row.node.clone(), can.to_owned(), row.why.clone()]);
    }
    table(&cells)
}

#[cfg(test)]
mod tests;

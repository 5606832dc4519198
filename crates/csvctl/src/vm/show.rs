//! `csvctl vm list` and `show`.

use crate::admin;
use crate::group::moves;
use crate::group::show as groups;
use crate::names::{self, dash, machines};
use crate::output::{rfc3339, table};
use crate::resource::{self, show as resources, types};
use csv_cluster::db::{ClusterDb, Group, GroupState, Resource, ResourceState};
use csv_types::NodeId;
use csv_types::admin::ClusterRequest;
use csv_types::config::LocalConfig;
use csvd::groups::{Candidate, MoveProgress, Moving, Waiting};
use serde_json::{Value, json};
use std::collections::BTreeMap;

/// What moves while it runs, by group.
type Moves = BTreeMap<String, MoveProgress>;

/// `csvctl vm list`.
pub(super) fn list(config: &LocalConfig, json: bool) -> anyhow::Result<()> {
    let db = admin::database(config)?;
    let waiting = groups::waiting(config)?;
    let moves = moves_of(config, &db);
    if json {
        let rows: Vec<Value> = machines(&db).map(|of| row(&db, of, &waiting, &moves)).collect();
        println!("{}", serde_json::to_string_pretty(&rows)?);
    } else {
        print!("{}", list_table(&db, &waiting, &moves));
    }
    Ok(())
}

/// How far the moves of virtual machines are. An owner that does not answer has no word on it.
fn moves_of(config: &LocalConfig, db: &ClusterDb) -> Moves {
    let mut moves = Moves::new();
    for group in machines(db).filter_map(|of| db.groups.get(&of.group)) {
        let moving = matches!(group.state, GroupState::Releasing { to: Some(_), .. });
        if !moving || moves.contains_key(&group.name) {
            continue;
        }
        let request = ClusterRequest::MoveProgress { group: group.name.clone() };
        if let Ok(Some(progress)) = admin::ask_typed::<Moving>(config, request) {
            moves.insert(group.name.clone(), progress);
        }
    }
    moves
}

fn list_table(db: &ClusterDb, waiting: &Waiting, moves: &Moves) -> String {
    let head = ["VM", "NODE", "STATE", "MEMORY", "CPUS", "WHAT IT DOES"];
    let mut cells = vec![head.map(str::to_owned).to_vec()];
    for of in machines(db) {
        cells.push(vec![
            of.name.clone(),
            dash(resources::node(db, of).unwrap_or_default()),
            state_words(db, of),
            format!("{} MiB", of.memory_mib()),
            of.cpus().to_string(),
            dash(doing(db, of, waiting, moves)),
        ]);
    }
    table(&cells)
}

fn group_of<'a>(db: &'a ClusterDb, of: &Resource) -> Option<&'a Group> {
    db.groups.get(&of.group)
}

/// State of a machine, in a word of machines.
fn state(db: &ClusterDb, of: &Resource) -> &'static str {
    let group = group_of(db, of);
    if group.is_some_and(|group| group.owner.is_some() && !db.group_owner_stands(group)) {
        return "lost";
    }
    if moving_to(db, of).is_some() {
        return "moving";
    }
    match of.status.state {
        ResourceState::Online => "running",
        ResourceState::Offline => "off",
        ResourceState::OnlinePending => "starting",
        ResourceState::OfflinePending => "stopping",
        ResourceState::Failed => "failed",
        ResourceState::Unknown => "unknown",
    }
}

/// Where its group goes.
fn moving_to(db: &ClusterDb, of: &Resource) -> Option<NodeId> {
    let group = group_of(db, of).filter(|group| db.group_owner_stands(group))?;
    if let GroupState::Releasing { to, .. } = &group.state { *to } else { None }
}

/// State with where it goes.
fn state_words(db: &ClusterDb, of: &Resource) -> String {
    match moving_to(db, of) {
        Some(to) => format!("moving to {}", db.node_name(to)),
        None => state(db, of).to_owned(),
    }
}

/// What it is doing, or why it is as it is.
fn doing(db: &ClusterDb, of: &Resource, waiting: &Waiting, moves: &Moves) -> String {
    if let Some(progress) = moves.get(&of.group).filter(|progress| progress.resource == of.name) {
        return progress.text.clone();
    }
    if !of.status.why.is_empty() {
        return of.status.why.clone();
    }
    if !of.want_online {
        return "it is to stay off".to_owned();
    }
    let Some(group) = group_of(db, of) else { return String::new() };
    let maintenance = if group.maintenance { "its group is in maintenance" } else { "" };
    match (&group.state, of.status.state) {
        (GroupState::Online | GroupState::Partial { .. }, ResourceState::Online) => maintenance.to_owned(),
        _ => groups::reason(db, group, waiting),
    }
}

fn row(db: &ClusterDb, of: &Resource, waiting: &Waiting, moves: &Moves) -> Value {
    json!({
        "name": of.name,
        "group": of.group,
        "node": resources::node(db, of),
        "state": state(db, of),
        "moving_to": moving_to(db, of).map(|node| db.node_name(node)),
        "since": rfc3339(of.status.since_unix_ms),
        "memory_mib": of.memory_mib(),
        "cpus": of.cpus(),
        "doing": doing(db, of, waiting, moves),
        "percent": moves.get(&of.group).and_then(|progress| progress.percent),
    })
}

/// How a machine is after an order.
pub(crate) fn tell(db: &ClusterDb, name: &str, json: bool) -> anyhow::Result<()> {
    let of = names::machine(db, name)?;
    if json {
        let row = row(db, of, &Waiting::new(), &Moves::new());
        println!("{}", serde_json::to_string_pretty(&row)?);
    } else {
        let on = resources::node(db, of).map_or_else(String::new, |node| format!(" on {node}"));
        println!("virtual machine {name} is {}{on}", state_words(db, of));
    }
    Ok(())
}

/// What a machine is asked for `csvctl vm show`.
struct Asked {
    waiting: Waiting,
    moves: Moves,
    candidates: Vec<Candidate>,
    /// The guest, by its own word; the reason when it cannot be asked.
    guest: Option<Result<Value, String>>,
}

/// `csvctl vm show`.
pub(super) fn show(config: &LocalConfig, name: &str, json: bool) -> anyhow::Result<()> {
    let db = admin::database(config)?;
    let of = names::machine(&db, name)?;
    let group = names::group(&db, &of.group)?;
    let online = of.status.state == ResourceState::Online && db.group_owner_stands(group);
    let guest = online
        .then(|| resource::ask(config, name, "status", json!({})).map_err(|error| format!("{error:#}")));
    let asked = Asked {
        waiting: groups::waiting(config)?,
        moves: moves_of(config, &db),
        candidates: moves::candidates(config, &of.group)?,
        guest,
    };
    let info = types::ask(config, Some(&of.kind))?;
    let properties = resources::properties(&of.properties, info.first());
    if json {
        let mut object = row(&db, of, &asked.waiting, &asked.moves);
        let more = json!({
            "guest": asked.guest.as_ref().and_then(|guest| guest.as_ref().ok()),
            "guest_error": asked.guest.as_ref().and_then(|guest| guest.as_ref().err()),
            "properties": resources::shown_properties(of),
            "properties_with_defaults": properties,
            "policy": of.policy,
            "placement": groups::row(&db, group, &asked.waiting),
            "candidates": asked.candidates,
        });
        if let (Value::Object(object), Value::Object(more)) = (&mut object, more) {
            object.extend(more);
        }
        println!("{}", serde_json::to_string_pretty(&object)?);
        return Ok(());
    }
    print!("{}", head(&db, of, &asked));
    print!("\n{}", resources::properties_table(&properties));
    println!("`csvctl resource types {}` says what each does", of.kind);
    print!("{}", groups::place(&db, group, &asked.candidates));
    Ok(())
}

fn head(db: &ClusterDb, of: &Resource, asked: &Asked) -> String {
    let mut facts = vec![
        ("vm", of.name.clone()),
        ("state", format!("{} since {}", state_words(db, of), groups::since(of.status.since_unix_ms))),
        ("node", dash(resources::node(db, of).unwrap_or_default())),
    ];
    let doing = doing(db, of, &asked.waiting, &asked.moves);
    if !doing.is_empty() {
        facts.insert(2, ("reason", doing));
    }
    if of.group != of.name {
        facts.push(("group", of.group.clone()));
    }
    facts.push(("size", format!("{} MiB, processors: {}", of.memory_mib(), of.cpus())));
    match &asked.guest {
        Some(Ok(guest)) => facts.extend(guest_facts(guest)),
        Some(Err(why)) => facts.push(("guest", format!("cannot be asked: {why}"))),
        None => {}
    }
    table(&facts.into_iter().map(|(key, value)| vec![key.to_owned(), value]).collect::<Vec<_>>())
}

/// What the machine's verb `status` says, as far as it says it.
fn guest_facts(guest: &Value) -> Vec<(&'static str, String)> {
    let word = |value: &Value| value.as_str().map(str::to_owned);
    let mut facts = Vec::new();
    facts.extend(word(&guest["status"]).map(|status| ("guest", status)));
    facts.extend(word(&guest["why"]).map(|why| ("", why)));
    let hardware = &guest["hardware"];
    let parts: Vec<String> =
        ["machine", "accelerator", "cpu"].iter().filter_map(|key| word(&hardware[*key])).collect();
    if !parts.is_empty() {
        facts.push(("hardware", parts.join(", ")));
    }
    facts.extend(guest["pid"].as_u64().map(|pid| ("QEMU's process", pid.to_string())));
    if guest["saved_state"] == true {
        facts.push(("saved state", "there; the next start goes on from it".to_owned()));
    }
    facts
}

#[cfg(test)]
mod tests;

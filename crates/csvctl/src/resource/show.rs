//! `csvctl resource list` and `show`.

use super::{policy, types};
use crate::admin;
use crate::args::duration_text;
use crate::group::show::{since, waiting};
use crate::names::{self, dash, node_names, resources_of};
use crate::output::{rfc3339, table};
use csv_cluster::db::{ClusterDb, FileHead, Resource};
use csv_resource::api::TypeInfo;
use csv_types::config::LocalConfig;
use csvd::groups::Waiting;
use serde_json::{Value, json};
use std::collections::BTreeMap;

/// `csvctl resource list`.
pub(super) fn list(config: &LocalConfig, group: Option<&str>, json: bool) -> anyhow::Result<()> {
    let db = admin::database(config)?;
    if let Some(group) = group {
        names::group(&db, group)?;
    }
    let rows: Vec<&Resource> =
        db.resources.values().filter(|of| group.is_none_or(|group| of.group == group)).collect();
    if json {
        let rows: Vec<Value> = rows.into_iter().map(|resource| row(&db, resource)).collect();
        println!("{}", serde_json::to_string_pretty(&rows)?);
    } else {
        print!("{}", list_table(&db, &rows));
    }
    Ok(())
}

fn list_table(db: &ClusterDb, rows: &[&Resource]) -> String {
    let head = ["RESOURCE", "TYPE", "GROUP", "NODE", "STATE", "SINCE", "REASON"];
    let mut cells = vec![head.map(str::to_owned).to_vec()];
    for of in rows {
        let [state, since, reason] = status_cells(of);
        let (name, kind, group) = (of.name.clone(), of.kind.clone(), of.group.clone());
        cells.push(vec![name, kind, group, dash(node(db, of).unwrap_or_default()), state, since, reason]);
    }
    table(&cells)
}

/// The resources of one group.
pub(crate) fn of_group_table(db: &ClusterDb, group: &str) -> String {
    let head = ["RESOURCE", "TYPE", "STATE", "SINCE", "REASON"];
    let mut cells = vec![head.map(str::to_owned).to_vec()];
    for of in resources_of(db, group) {
        let [state, since, reason] = status_cells(of);
        cells.push(vec![of.name.clone(), of.kind.clone(), state, since, reason]);
    }
    table(&cells)
}

fn status_cells(of: &Resource) -> [String; 3] {
    let reason = if of.status.why.is_empty() && !of.want_online {
        "it is to stay offline".to_owned()
    } else {
        of.status.why.clone()
    };
    [of.status.state.to_string(), since(of.status.since_unix_ms), dash(reason)]
}

/// Name of the node that has its group.
pub(crate) fn node(db: &ClusterDb, of: &Resource) -> Option<String> {
    let owner = db.groups.get(&of.group)?.owner?;
    Some(db.node_name(owner))
}

/// What is shown of a property's value: not what must stay secret.
pub(crate) fn shown<'a>(name: &str, value: &'a str) -> &'a str {
    if name.ends_with("secret") || name.ends_with("password") { "(secret)" } else { value }
}

/// Properties that are set, without secrets.
pub(crate) fn shown_properties(of: &Resource) -> BTreeMap<&str, &str> {
    of.properties.iter().map(|(name, value)| (name.as_str(), shown(name, value))).collect()
}

/// A row of `csvctl resource list --json`.
pub(crate) fn row(db: &ClusterDb, of: &Resource) -> Value {
    json!({
        "name": of.name,
        "type": of.kind,
        "group": of.group,
        "node": node(db, of),
        "state": of.status.state,
        "since": rfc3339(of.status.since_unix_ms),
        "reason": of.status.why,
        "want_online": of.want_online,
        "depends": of.depends,
        "properties": shown_properties(of),
    })
}

/// A property of a resource, for people and programs.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub(crate) struct Shown {
    name: String,
    /// What it is; `None`: not set, and without default.
    value: Option<String>,
    /// It is set, not the type's default.
    set: bool,
    what: String,
}

/// Properties that are set, and the type's defaults of the others.
pub(crate) fn properties(set: &BTreeMap<String, String>, of_type: Option<&TypeInfo>) -> Vec<Shown> {
    let known = of_type.map_or(&[][..], |of| of.properties.as_slice());
    let mut rows: Vec<Shown> = Vec::new();
    for property in known {
        let own: Vec<_> = set.iter().filter(|(name, _)| property.names(name)).collect();
        rows.extend(own.iter().map(|(name, value)| Shown {
            name: (*name).clone(),
            value: Some(shown(name, value).to_owned()),
            set: true,
            what: property.help.clone(),
        }));
        if own.is_empty() {
            let (name, value) = (property.name.clone(), property.default.clone());
            rows.push(Shown { name, value, set: false, what: property.help.clone() });
        }
    }
    let unknown = set.iter().filter(|(name, _)| !known.iter().any(|property| property.names(name)));
    rows.extend(unknown.map(|(name, value)| Shown {
        name: name.clone(),
        value: Some(shown(name, value).to_owned()),
        set: true,
        what: String::new(),
    }));
    rows
}

pub(crate) fn properties_table(rows: &[Shown]) -> String {
    let mut cells = vec![["PROPERTY", "VALUE", "IS"].map(str::to_owned).to_vec()];
    for row in rows {
        let from = if row.set { "set" } else { "default" }.to_owned();
        let value = row.value.clone().unwrap_or_else(|| "-".to_owned());
        cells.push(vec![row.name.clone(), value, from]);
    }
    table(&cells)
}

/// `csvctl resource show`.
pub(super) fn show(config: &LocalConfig, name: &str, json: bool) -> anyhow::Result<()> {
    let db = admin::database(config)?;
    let of = names::resource(&db, name)?;
    let waiting = waiting(config)?;
    let known = types::ask(config, Some(&of.kind));
    let info = known.as_ref().ok().and_then(|types| types.first());
    if json {
        println!("{}", serde_json::to_string_pretty(&object(&db, of, &waiting, info))?);
        return Ok(());
    }
    print!("{}", text(&db, of, &waiting, info));
    if let Err(error) = known {
        println!("\nits type is not known on this node: {error:#}");
    }
    Ok(())
}

fn object(db: &ClusterDb, of: &Resource, waiting: &Waiting, info: Option<&TypeInfo>) -> Value {
    let mut object = row(db, of);
    let dependents: Vec<&str> = dependents(db, of);
    let more = json!({
        "possible": of.possible.iter().map(|node| db.node_name(*node)).collect::<Vec<_>>(),
        "policy": of.policy,
        "checkpoints": of.checkpoints,
        "checkpoints_kept": kept(db, of),
        "dependents": dependents,
        "properties_with_defaults": properties(&of.properties, info),
        "group_waits_for": waiting.get(&of.group),
    });
    if let (Value::Object(object), Value::Object(more)) = (&mut object, more) {
        object.extend(more);
    }
    object
}

/// Resources that depend on it directly.
fn dependents<'a>(db: &'a ClusterDb, of: &Resource) -> Vec<&'a str> {
    let depends = |other: &&Resource| {
        csv_cluster::groups::expr::Expr::parse(&other.depends)
            .is_ok_and(|expr| expr.names().contains(of.name.as_str()))
    };
    db.resources.values().filter(depends).map(|other| other.name.as_str()).collect()
}

fn text(db: &ClusterDb, of: &Resource, waiting: &Waiting, info: Option<&TypeInfo>) -> String {
    let facts = facts(db, of, waiting, info);
    let pairs: Vec<Vec<String>> = facts.into_iter().map(|(key, value)| vec![key.to_owned(), value]).collect();
    let rows = properties(&of.properties, info);
    let mut text = table(&pairs);
    if !rows.is_empty() {
        text += &format!("\n{}", properties_table(&rows));
        text += &format!("`csvctl resource types {}` says what each does\n", of.kind);
    }
    let policy: Vec<Vec<String>> = policy_rows(of, info);
    text + &format!("\npolicy\n{}", table(&policy))
}

/// The policy, with what "default" means for the type.
fn policy_rows(of: &Resource, info: Option<&TypeInfo>) -> Vec<Vec<String>> {
    let looks = |key: &str| {
        let info = info?;
        let looks = match key {
            "looks-alive" => info.looks_alive,
            "is-alive" => info.is_alive,
            _ => return None,
        };
        Some(duration_text(u64::try_from(looks.as_millis()).ok()?))
    };
    let row = |(key, value): (&str, String)| {
        let value = match looks(key).filter(|_| value == "default") {
            Some(looks) => format!("default ({looks})"),
            None => value,
        };
        vec![format!("  {key}"), value]
    };
    policy::rows(&of.policy).into_iter().map(row).collect()
}

fn facts(
    db: &ClusterDb,
    of: &Resource,
    waiting: &Waiting,
    info: Option<&TypeInfo>,
) -> Vec<(&'static str, String)> {
    let what = info.map_or_else(String::new, |info| format!(" ({})", info.help));
    let mut facts = vec![
        ("resource", of.name.clone()),
        ("type", format!("{}{what}", of.kind)),
        ("group", of.group.clone()),
        ("node", dash(node(db, of).unwrap_or_default())),
        ("state", format!("{} since {}", of.status.state, since(of.status.since_unix_ms))),
    ];
    if !of.status.why.is_empty() {
        facts.push(("reason", of.status.why.clone()));
    }
    facts.push(("wanted", if of.want_online { "online" } else { "offline" }.to_owned()));
    if let Some(group) = db.groups.get(&of.group) {
        let reason = crate::group::show::reason(db, group, waiting);
        let reason = if reason.is_empty() { reason } else { format!(": {reason}") };
        facts.push(("its group is", format!("{}{reason}", crate::wait::place(db, group))));
    }
    facts.push(("depends on", dash(of.depends.clone())));
    facts.push(("needed by", dash(dependents(db, of).join(","))));
    let possible = if of.possible.is_empty() { "any".to_owned() } else { node_names(db, &of.possible) };
    facts.push(("possible owners", possible));
    facts.push(("files and settings that follow it", dash(files(db, of))));
    facts
}

/// What the cluster keeps of each file or setting that follows it; nothing of one that was never saved.
fn kept(db: &ClusterDb, of: &Resource) -> Vec<Option<FileHead>> {
    let head = |(index, path): (usize, &String)| {
        let value = db.checkpoints.get(&FileHead::key(&of.name, index))?;
        FileHead::decode(value).map(|(head, _)| head).filter(|head| head.path == *path)
    };
    of.checkpoints.iter().enumerate().map(head).collect()
}

fn files(db: &ClusterDb, of: &Resource) -> String {
    let text = |(path, kept): (&String, Option<FileHead>)| match kept {
        None => format!("{path} (not saved yet)"),
        Some(head) if head.modified_unix_ns == 0 => {
            format!("{path} (saved by {})", db.node_name(head.node))
        }
        Some(head) => {
            let (node, ms) = (db.node_name(head.node), head.modified_unix_ns / 1_000_000);
            let written = rfc3339(u64::try_from(ms).unwrap_or(0));
            format!("{path} ({} bytes, written {written}, saved by {node})", head.bytes)
        }
    };
    of.checkpoints.iter().zip(kept(db, of)).map(text).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testbed::Bed;
    use csv_cluster::db::{Command, ResourceState};

    fn bed() -> Bed {
        let mut bed = Bed::nodes(2);
        bed.group("fs", &[("ip", "IPAddress", ""), ("share", "FileShare", "ip")]);
        bed.want("fs");
        bed.assign("fs", 2);
        let failed = [
            ("ip", ResourceState::Failed, "10.0.0.5 is in use"),
            ("share", ResourceState::Offline, "waits for [ip], which has failed"),
        ];
        bed.tell("fs", &failed, None);
        bed
    }

    #[test]
    fn rows_have_state_node_and_reason() {
        let mut bed = bed();
        bed.ok(Command::ResourceOffline { name: "share".into() });
        bed.tell("fs", &[("share", ResourceState::Offline, "")], None);
        let rows: Vec<&Resource> = bed.db.resources.values().collect();
        let text = list_table(&bed.db, &rows);
        let line = |name: &str| text.lines().find(|line| line.starts_with(name)).unwrap().to_owned();
        assert!(line("ip").contains("fs") && line("ip").contains("n2") && line("ip").contains("failed"));
        assert!(line("ip").ends_with("10.0.0.5 is in use"), "{text}");
        assert!(line("share").ends_with("it is to stay offline"), "{text}");
        let object = row(&bed.db, &bed.db.resources["ip"]);
        assert_eq!((&object["state"], &object["node"]), (&json!("failed"), &json!("n2")));
        assert!(of_group_table(&bed.db, "fs").lines().count() == 3);
    }

    #[test]
    fn files_that_follow_say_whether_they_are_kept() {
        let mut bed = bed();
        let (path, node) = ("/etc/a".to_owned(), csv_types::NodeId(2));
        let head =
            FileHead { path, node, mode: 0, uid: 0, gid: 0, bytes: 5, modified_unix_ns: 1_000_000_000 };
        let change = csv_cluster::db::ResourceChange {
            checkpoints: Some(["/etc/a", "/etc/b", "/etc/c", "sysctl:a.b"].map(str::to_owned).into()),
            ..Default::default()
        };
        bed.ok(Command::ResourceSet { name: "ip".into(), change });
        bed.ok(Command::CheckpointPut {
            name: FileHead::key("ip", 0),
            value: head.encode(b"bytes"),
            owner: None,
        });
        // Of a file that stood there before.
        bed.ok(Command::CheckpointPut {
            name: FileHead::key("ip", 1),
            value: head.encode(b"bytes"),
            owner: None,
        });
        let setting = FileHead { path: "sysctl:a.b".into(), modified_unix_ns: 0, ..head };
        bed.ok(Command::CheckpointPut {
            name: FileHead::key("ip", 3),
            value: setting.encode(b"1\n"),
            owner: None,
        });
        assert_eq!(
            files(&bed.db, &bed.db.resources["ip"]),
            "/etc/a (5 bytes, written 1970-01-01T00:00:01Z, saved by n2), /etc/b (not saved yet), /etc/c (not saved yet), sysctl:a.b (saved by n2)"
        );
    }

    #[test]
    fn properties_come_with_the_defaults_of_the_type() {
        let info = csv_resource::types::find("VirtualMachine", None).unwrap().info();
        let set = BTreeMap::from(
            [("disk", "/a"), ("disk1", "/b"), ("cpus", "4"), ("odd", "x")]
                .map(|(name, value)| (name.to_owned(), value.to_owned())),
        );
        let rows = properties(&set, Some(&info));
        let find = |name: &str| rows.iter().find(|row| row.name == name).unwrap();
        assert!(find("disk").set && find("disk1").set && find("odd").set);
        assert_eq!((find("cpus").value.as_deref(), find("cpus").set), (Some("4"), true));
        assert_eq!((find("memory_mib").value.as_deref(), find("memory_mib").set), (Some("1024"), false));
        assert_eq!(find("kernel").value, None);
        assert_eq!(rows.iter().filter(|row| row.name == "disk").count(), 1);
        let secret = BTreeMap::from([("tsig_secret".to_owned(), "c2VjcmV0".to_owned())]);
        assert_eq!(properties(&secret, None)[0].value.as_deref(), Some("(secret)"));
        assert_eq!(shown("tsig_secret_file", "/etc/key"), "/etc/key");
        let alone = properties(&set, None);
        assert_eq!(alone.len(), 4);
        assert!(
            properties_table(&rows)
                .lines()
                .any(|line| line.starts_with("memory_mib") && line.contains("default"))
        );
    }

    #[test]
    fn show_tells_what_hangs_together() {
        let bed = bed();
        let info = csv_resource::types::find("IPAddress", None).unwrap().info();
        let waiting = Waiting::new();
        let text = text(&bed.db, &bed.db.resources["ip"], &waiting, Some(&info));
        for word in
            ["needed by", "share", "10.0.0.5 is in use", "duplicate_check", "default (5s)", "pending on n2"]
        {
            assert!(text.contains(word), "{word}: {text}");
        }
        let object = object(&bed.db, &bed.db.resources["ip"], &waiting, None);
        assert_eq!(object["dependents"], json!(["share"]));
        assert_eq!(object["policy"]["restart_threshold"], 1);
    }
}

//! What is shown of groups.

use super::*;
use crate::names::MACHINE;
use crate::testbed::{Bed, n};
use csv_cluster::db::{Command, GroupPolicy, ResourceState};

fn bed() -> Bed {
    let mut bed = Bed::nodes(3);
    bed.group("db", &[("disk", "PhysicalDisk", ""), ("app", "GenericApplication", "disk")]);
    let policy = GroupPolicy { preferred: vec![n(2), n(1)], priority: 3000, ..GroupPolicy::default() };
    bed.ok(Command::GroupPolicy { name: "db".into(), policy });
    bed.machine("vm", 1);
    bed.group("idle", &[]);
    bed
}

fn line(text: &str, begin: &str) -> String {
    text.lines().find(|line| line.starts_with(begin)).unwrap_or_else(|| panic!("{begin}: {text}")).to_owned()
}

#[test]
fn the_list_says_of_each_group_where_and_why() {
    let mut bed = bed();
    bed.want("db");
    let waiting = Waiting::from([("db".to_owned(), "group x of higher priority starts first".to_owned())]);
    let text = list_table(&bed.db, &waiting);
    let db = line(&text, "db");
    assert!(db.contains("n2,n1") && db.contains("high") && db.ends_with("starts first"), "{text}");
    assert!(line(&text, "idle").contains("offline") && line(&text, "idle").ends_with("it is new"), "{text}");
    assert!(line(&text, "vm").contains("online") && line(&text, "vm").ends_with('-'), "{text}");
    bed.release("vm", 2);
    bed.ok(Command::GroupMaintenance { name: "vm".into(), on: true });
    let text = list_table(&bed.db, &waiting);
    assert!(line(&text, "vm").contains("moving, maintenance"), "{text}");
    assert!(line(&text, "vm").ends_with("to n2 (live): on request"), "{text}");
    bed.down(1);
    let text = list_table(&bed.db, &Waiting::new());
    assert!(line(&text, "vm").ends_with("n1 was lost"), "{text}");
}

#[test]
fn rows_for_programs_have_single_words() {
    let mut bed = bed();
    bed.tell("vm", &[("vm", ResourceState::Failed, "x")], Some(GroupState::Partial { reason: "x".into() }));
    let waiting = Waiting::new();
    let object = row(&bed.db, &bed.db.groups["vm"], &waiting);
    assert_eq!(
        (&object["state"], &object["owner"], &object["reason"]),
        (&json!("partial"), &json!("n1"), &json!("x"))
    );
    let object = row(&bed.db, &bed.db.groups["idle"], &waiting);
    assert_eq!((&object["state"], &object["owner"]), (&json!("offline"), &Value::Null));
}

#[test]
fn show_has_everything() {
    let mut bed = bed();
    bed.want("db");
    bed.assign("db", 1);
    let states = [
        ("disk", ResourceState::Failed, "reserved by n9"),
        ("app", ResourceState::Offline, "waits for [disk]"),
    ];
    bed.tell("db", &states, Some(GroupState::Failed { reason: "[disk] reserved by n9".into() }));
    bed.by_owner("db", |name, generation, _| Command::GroupGiveUp {
        name,
        generation,
        reason: "no other".into(),
    });
    let rows = [
        Candidate { node: "n1".into(), fit: true, why: "it failed there".into() },
        Candidate { node: "n3".into(), fit: false, why: "n3 is paused".into() },
    ];
    let waiting = Waiting::new();
    let shown = text(&bed.db, &bed.db.groups["db"], &waiting, &rows);
    for word in [
        "failed since",
        "[disk] reserved by n9; not moved any more: no other",
        "app (GenericApplication): offline",
        "└─ disk (PhysicalDisk): failed",
        "waits for [disk]",
        "preferred           n2,n1",
        "failover-threshold  default (2)",
        "failed since it was last online",
        "csvctl group online db",
        "n3 is paused",
        "not its most preferred (n2)",
    ] {
        assert!(shown.contains(word), "{word}: {shown}");
    }
    assert!(shown.lines().all(|line| line.trim_end() == line), "no blanks at the ends");
    let object = object(&bed.db, &bed.db.groups["db"], &waiting, &rows);
    assert_eq!(object["failures"][0]["node"], "n1");
    assert_eq!(object["given_up"], "no other");
    assert_eq!(object["candidates"][1]["fit"], false);
    assert_eq!(object["resources"].as_array().unwrap().len(), 2);
    assert_eq!(object["policy"]["preferred"], json!(["n2", "n1"]));
    assert_eq!(object["moving_to"], Value::Null);
    let empty = text(&bed.db, &bed.db.groups["idle"], &waiting, &[]);
    assert!(empty.contains("csvctl resource add R --group idle"), "{empty}");
}

#[test]
fn failovers_are_counted_against_what_is_allowed() {
    let mut bed = bed();
    let generation = bed.db.groups["vm"].generation;
    bed.ok(Command::GroupRelease {
        name: "vm".into(),
        generation,
        to: Some(n(3)),
        how: csv_cluster::db::MoveKind::Shutdown,
        reason: "it failed".into(),
        cause: csv_cluster::db::MoveCause::Failure,
    });
    let group = &bed.db.groups["vm"];
    let shown = text(&bed.db, group, &Waiting::new(), &[]);
    assert!(shown.contains("moved for failure (2 allowed within 6h)"), "{shown}");
    assert_eq!(object(&bed.db, group, &Waiting::new(), &[])["moving_to"], "n3");
    assert_eq!(bed.db.resources["vm"].kind, MACHINE);
}

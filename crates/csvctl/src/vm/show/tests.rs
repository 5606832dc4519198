//! What is shown of virtual machines.

use super::*;
use crate::names::MACHINE;
use crate::testbed::Bed;
use csv_cluster::db::{Command, ResourceChange};

fn bed() -> Bed {
    let mut bed = Bed::nodes(2);
    bed.machine("web", 1);
    let sizes = [("memory_mib", "2048"), ("cpus", "4")];
    let properties = sizes.map(|(key, value)| (key.to_owned(), Some(value.to_owned()))).into();
    bed.ok(Command::ResourceSet {
        name: "web".into(),
        change: ResourceChange { properties, ..ResourceChange::default() },
    });
    bed.group("mail", &[("mail", MACHINE, "")]);
    bed.group("fs", &[("ip", "IPAddress", "")]);
    bed
}

fn line(text: &str, begin: &str) -> String {
    text.lines().find(|line| line.starts_with(begin)).unwrap_or_else(|| panic!("{begin}: {text}")).to_owned()
}

#[test]
fn the_list_has_machines_only_with_size_and_state() {
    let mut bed = bed();
    let (waiting, moves) = (Waiting::new(), Moves::new());
    let text = list_table(&bed.db, &waiting, &moves);
    assert_eq!(text.lines().count(), 3);
    let web = line(&text, "web");
    assert!(
        web.contains("n1") && web.contains("running") && web.contains("2048 MiB") && web.contains(" 4 "),
        "{web}"
    );
    assert!(line(&text, "mail").contains("off") && line(&text, "mail").contains("1024 MiB"), "{text}");
    bed.tell(
        "web",
        &[("web", ResourceState::OnlinePending, "reads its saved state")],
        Some(GroupState::Pending),
    );
    let text = list_table(&bed.db, &waiting, &moves);
    assert!(line(&text, "web").contains("starting") && line(&text, "web").ends_with("saved state"), "{text}");
    bed.want("mail");
    let waiting = Waiting::from([("mail".to_owned(), "as many groups as allowed".to_owned())]);
    let text = list_table(&bed.db, &waiting, &moves);
    assert!(line(&text, "mail").ends_with("as many groups as allowed"), "{text}");
}

#[test]
fn a_move_is_told_with_how_far_it_is() {
    let mut bed = bed();
    bed.release("web", 2);
    let progress =
        MoveProgress { resource: "web".into(), text: "sends the guest: 60 %".into(), percent: Some(60) };
    let moves = Moves::from([("web".to_owned(), progress)]);
    let text = list_table(&bed.db, &Waiting::new(), &moves);
    assert!(line(&text, "web").contains("moving to n2") && line(&text, "web").ends_with("60 %"), "{text}");
    let object = row(&bed.db, &bed.db.resources["web"], &Waiting::new(), &moves);
    assert_eq!((&object["percent"], &object["state"]), (&json!(60), &json!("moving")));
    let without = list_table(&bed.db, &Waiting::new(), &Moves::new());
    assert!(line(&without, "web").ends_with("to n2 (live): on request"), "{without}");
    bed.down(1);
    let lost = list_table(&bed.db, &Waiting::new(), &Moves::new());
    assert!(line(&lost, "web").contains("lost"), "{lost}");
}

#[test]
fn a_guest_is_told_by_its_own_word() {
    let bed = bed();
    let asked = |guest| Asked { waiting: Waiting::new(), moves: Moves::new(), candidates: Vec::new(), guest };
    let of = &bed.db.resources["web"];
    let status = json!({
        "status": "paused",
        "phase": "running",
        "pid": 4711,
        "hardware": { "machine": "pc-q35-7.2", "accelerator": "kvm", "cpu": "Westmere" },
        "saved_state": true,
    });
    let text = head(&bed.db, of, &asked(Some(Ok(status))));
    for word in ["paused", "pc-q35-7.2, kvm, Westmere", "4711", "the next start goes on from it"] {
        assert!(text.contains(word), "{word}: {text}");
    }
    let text = head(&bed.db, of, &asked(Some(Err("its host ended".into()))));
    assert!(text.contains("cannot be asked: its host ended"), "{text}");
    assert!(!head(&bed.db, of, &asked(None)).contains("guest"));
}

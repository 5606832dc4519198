//! Checks of LUNs. One that carries a volume of this cluster is only read: its keys and its reservation must be as the
//! database says. On any other one reservations are tried with keys of the check's own, unless somebody uses it.

use super::report::{Outcome, Run, Verdict, failed, passed, skipped, warning};
use csv_cluster::db::{ClusterDb, Volume, parse_own_key};
use csv_lun::reservation::check::{self, CheckResult};
use csv_lun::reservation::{Holder, ReservationType, Reservations};
use csv_lun::{Lun, LunOptions, is_mounted, read_label};
use csv_ondisk::Label;
use serde_json::Value;
use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;
use std::thread::sleep;
use std::time::Duration;

/// Checks of one LUN, about.
pub(super) const COUNT: u64 = 17;
const FIO_S: u32 = 2;
const P99_GOOD_US: f64 = 50_000.0;
const P99_MAX_US: f64 = 1_000_000.0;
/// Keys change while nodes come and go; what stays wrong for so many looks is wrong.
const LOOKS: u32 = 5;
const BETWEEN_LOOKS: Duration = Duration::from_millis(700);

/// Checks one LUN. `database` gives the cluster's database as it is now, if this machine is in a cluster.
pub(super) fn run(run: &mut Run, device: &Path, database: &dyn Fn() -> Option<ClusterDb>) {
    let area = format!("storage {}", device.display());
    run.begin(&area);
    let label = match label(device) {
        Ok(label) => label,
        Err(why) => {
            run.add(&area, "open", failed(why, "check the path to the storage, and the name of the device"));
            return;
        }
    };
    let volume = database().and_then(|db| {
        let id = label.as_ref()?.volume_id;
        db.volumes.values().find(|volume| volume.id == id).map(|volume| volume.name.clone())
    });
    if let Some(name) = volume {
        run.add(&area, "label", passed(format!("it is volume {name} of this cluster; it is only read")));
        run.begin(&format!("{area}: keys and reservation"));
        run.add(&area, "reservations", in_use(device, &name, database));
    } else {
        match &label {
            Some(label) => run.add(
                &area,
                "label",
                passed(format!("volume {} of cluster {}", label.name, label.cluster_id)),
            ),
            None => run.add(&area, "label", passed("it carries no csvfs volume")),
        }
        try_reservations(run, &area, device);
    }
    run.begin(&format!("{area}: read latency"));
    run.add(&area, "read latency", latency(device));
}

fn label(device: &Path) -> Result<Option<Label>, String> {
    let lun = Lun::open(device, LunOptions::default()).map_err(|error| error.to_string())?;
    read_label(&lun).map_err(|error| error.to_string())
}

fn try_reservations(run: &mut Run, area: &str, device: &Path) {
    match is_mounted(device) {
        Ok(None) => {}
        Ok(Some(user)) => {
            let text = format!("not tried, because the LUN is in use: {user}");
            run.add(area, "reservations", skipped(text, "end what uses it, then check it again"));
            return;
        }
        Err(error) => {
            let text = format!("not tried, because nobody can say whether the LUN is in use: {error}");
            run.add(area, "reservations", skipped(text, "check it when that can be read"));
            return;
        }
    }
    let results = check::validate(device, &mut |step| {
        run.begin(&format!("{area}: {} ({} of {})", step.name, step.number, step.of));
    });
    for CheckResult { name, outcome, text } in results {
        let verdict = match outcome {
            check::Outcome::Passed => passed(text),
            check::Outcome::Warning => {
                warning(text, "it works; see the documentation of the storage whether it can be switched on")
            }
            check::Outcome::Failed => {
                failed(text, "do not use this LUN for a volume before its storage can do that")
            }
            check::Outcome::Skipped => skipped(text, "nothing; use two nodes to see it"),
        };
        run.add(area, name, verdict);
    }
}

/// A LUN whose nodes are at work: looked at, again and again while it does not fit.
fn in_use(device: &Path, name: &str, database: &dyn Fn() -> Option<ClusterDb>) -> Verdict {
    let lun = match Reservations::open(device) {
        Ok(lun) => lun,
        Err(error) if error.is_unsupported() => {
            return warning(
                format!("the LUN has no reservations: {error}"),
                "nodes are fenced by waiting for their leases; use storage with persistent reservations if it must be faster",
            );
        }
        Err(error) => return failed(error.to_string(), "check the path to the storage"),
    };
    let mut verdict = skipped("not looked at", "run it again");
    for _ in 0..LOOKS {
        let found = lun.read_keys().and_then(|keys| Ok((keys.keys, lun.read_reservation()?)));
        verdict = match (found, database()) {
            (Ok((keys, holder)), Some(db)) => match db.volumes.get(name) {
                Some(volume) => judge(&db, volume, &keys, holder),
                None => skipped("the volume was removed meanwhile", "run it again"),
            },
            (Err(error), _) if error.is_unsupported() => {
                return warning(
                    format!("keys cannot be read: {error}"),
                    "a fence on this LUN cannot be verified",
                );
            }
            (Err(error), _) => {
                failed(format!("the keys cannot be read: {error}"), "check the path to the storage")
            }
            (_, None) => skipped("the database cannot be asked", "run it again"),
        };
        if verdict.outcome == Outcome::Passed {
            break;
        }
        sleep(BETWEEN_LOOKS);
    }
    verdict
}

fn judge(db: &ClusterDb, volume: &Volume, keys: &[u64], holder: Option<Holder>) -> Verdict {
    let found: BTreeSet<u64> = keys.iter().copied().collect();
    let wanted: BTreeSet<u64> = volume.members.keys().filter_map(|node| db.key_of(volume, *node)).collect();
    let list = |keys: Vec<&u64>| {
        keys.into_iter()
            .map(|key| match parse_own_key(db.id, *key) {
                Some((node, generation)) => format!("{} (generation {generation})", db.node_name(node)),
                None => format!("{key:#x}, which is not of this cluster"),
            })
            .collect::<Vec<_>>()
            .join(", ")
    };
    let missing: Vec<&u64> = wanted.difference(&found).collect();
    let foreign: Vec<&u64> = found.difference(&wanted).collect();
    if !foreign.is_empty() {
        return failed(
            format!("keys are registered that the database does not know: {}", list(foreign)),
            "find out who uses the LUN; keys of this cluster's nodes go at the volume's next failover",
        );
    }
    if !missing.is_empty() {
        return failed(
            format!("keys are not registered: {}", list(missing)),
            "look at `csvctl events`: these nodes cannot write the LUN",
        );
    }
    if wanted.is_empty() {
        return passed("no node may write the LUN, and none has a key");
    }
    let right = ReservationType::WriteExclusiveRegistrantsOnly;
    match holder {
        Some(holder) if holder.kind == right && (holder.key == 0 || found.contains(&holder.key)) => passed(
            format!("the keys of {} node(s) and the reservation are as the database says", wanted.len()),
        ),
        Some(holder) => failed(
            format!("the reservation is {} of key {:#x}", holder.kind, holder.key),
            "move the volume to another node; that makes it anew",
        ),
        None => failed(
            "the LUN is not reserved: a node without a key could write it",
            "move the volume to another node; that makes it anew",
        ),
    }
}

fn latency(device: &Path) -> Verdict {
    let output = Command::new("fio")
        .args([
            "--name=validate",
            "--readonly",
            "--rw=randread",
            "--bs=4k",
            "--direct=1",
            "--iodepth=1",
            "--thread",
        ])
        .args([
            "--ioengine=psync",
            "--time_based",
            "--output-format=json",
            "--clat_percentiles=0",
            "--lat_percentiles=1",
        ])
        .args(["--percentile_list=50:99", "--randrepeat=0", "--allow_file_create=0"])
        .arg(format!("--runtime={FIO_S}"))
        .arg(format!("--filename={}", device.display()))
        .output();
    match output {
        Err(error) => skipped(format!("fio cannot be run: {error}"), "install the package fio"),
        Ok(output) if !output.status.success() => failed(
            format!("fio cannot read it: {}", String::from_utf8_lossy(&output.stderr).trim()),
            "check the path to the storage",
        ),
        Ok(output) => judge_latency(&String::from_utf8_lossy(&output.stdout)),
    }
}

fn judge_latency(text: &str) -> Verdict {
    let json: Value =
        text.find('{').and_then(|at| serde_json::from_str(&text[at..]).ok()).unwrap_or_default();
    let read = &json["jobs"][0]["read"];
    let percentile = |at: &str| read["lat_ns"]["percentile"][at].as_f64().map(|ns| ns / 1000.0);
    let (Some(median), Some(p99)) = (percentile("50.000000"), percentile("99.000000")) else {
        return skipped("fio's answer is not understood", "measure it by hand with fio");
    };
    let text = format!("4 KiB read at random: median {median:.0} µs, 99% {p99:.0} µs");
    let next = "look at the storage and at the network to it";
    if p99 > P99_MAX_US {
        failed(text, next)
    } else if p99 > P99_GOOD_US {
        warning(text, next)
    } else {
        passed(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use csv_cluster::db::{Command as DbCommand, Init, NewNode, Secrets, reservation_key};
    use csv_types::{Epoch, NodeId, VolumeId};
    use uuid::Uuid;

    fn database() -> ClusterDb {
        let mut db = ClusterDb::default();
        let node = NewNode {
            name: "n1".into(),
            addr: "10.0.0.1".parse().unwrap(),
            feature_level: 1,
            version: "0.1.0".into(),
            cert_sha256: String::new(),
        };
        let id = Uuid::from_u128(9);
        let init = Init { name: "c".into(), id, node, secrets: Secrets::default(), settings: vec![] };
        let (name, me) = ("V".to_owned(), NodeId(1));
        for command in [
            DbCommand::Init(Box::new(init)),
            DbCommand::NodeUp { node: me, incarnation: 1 },
            DbCommand::VolumeAdd {
                name: name.clone(),
                id: VolumeId(Uuid::from_u128(5)),
                fs: "ext4".into(),
                preferred: vec![],
                label_epoch: Epoch(0),
            },
            DbCommand::VolumeAdmit { name, node: me, incarnation: 1, from_generation: 0 },
        ] {
            db.apply(&command.by(me, 1)).unwrap();
        }
        db
    }

    #[test]
    fn keys_must_be_as_the_database_says() {
        let db = database();
        let volume = &db.volumes["V"];
        let key = reservation_key(db.id, NodeId(1), 1);
        let kind = ReservationType::WriteExclusiveRegistrantsOnly;
        let good = Some(Holder { key, kind });
        let fails = |keys: &[u64], holder, word: &str| {
            let verdict = judge(&db, volume, keys, holder);
            assert!(verdict.outcome == Outcome::Failed && verdict.text.contains(word), "{verdict:?}");
        };
        assert_eq!(judge(&db, volume, &[key, key], good).outcome, Outcome::Passed);
        fails(&[], None, "not registered: n1 (generation 1)");
        fails(&[key, 7], good, "0x7, which is not of this cluster");
        fails(&[key, reservation_key(db.id, NodeId(2), 4)], good, "node 2 (generation 4)");
        fails(&[key], None, "not reserved");
        fails(&[key], Some(Holder { key, kind: ReservationType::WriteExclusive }), "the reservation is");
    }

    #[test]
    fn latency_is_read_from_fio() {
        let sample = |p99: u64| {
            format!(
                "note\n{{\"jobs\":[{{\"read\":{{\"lat_ns\":{{\"percentile\":{{\"50.000000\":90000,\"99.000000\":{p99}}}}}}}}}]}}"
            )
        };
        assert_eq!(judge_latency(&sample(250_000)).outcome, Outcome::Passed);
        assert_eq!(judge_latency(&sample(90_000_000)).outcome, Outcome::Warning);
        assert_eq!(judge_latency(&sample(3_000_000_000)).outcome, Outcome::Failed);
        assert_eq!(judge_latency("what").outcome, Outcome::Skipped);
    }
}

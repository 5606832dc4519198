//! Checks of a cluster: what every node says of itself and of the others, judged.

use super::report::{Run, Verdict, failed, passed, warning};
use csv_cluster::db::{ClusterDb, VolumeState};
use csv_types::config::PORTS_PER_VOLUME;
use csvd::check::{ClusterFacts, LinkFacts, LunFacts, NodeFacts};
use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::time::Duration;

const NETWORK: &str = "network";
const NODES: &str = "nodes";
const LUNS: &str = "LUNs";
const RTT_GOOD_US: u64 = 20_000;
const CLOCK_GOOD_MS: u64 = 1_000;
const CONNECT_LIMIT: Duration = Duration::from_secs(2);

/// Judges the facts.
pub(super) fn run(run: &mut Run, db: &ClusterDb, facts: &ClusterFacts) {
    let answered: Vec<&NodeFacts> = std::iter::once(&facts.asked)
        .chain(facts.others.iter().filter_map(|(_, facts)| facts.as_ref().ok()))
        .collect();
    for (name, answer) in &facts.others {
        let verdict = match answer {
            Ok(_) => passed("its csvd answers"),
            Err(why) => failed(
                why.clone(),
                format!(
                    "look whether {name} and its csvd run; a node that is gone for good is removed with `csvctl cluster evict {name}`"
                ),
            ),
        };
        run.add(NODES, name.clone(), verdict);
    }
    for node in &answered {
        run.add(NODES, format!("{} takes part", node.name), part(node));
        run.add(NODES, format!("{} feature level", node.name), level(db, node));
    }
    run.add(NODES, "versions", versions(&answered));
    run.add(NODES, "Samba", samba(&answered));
    for node in &answered {
        for peer in &node.peers {
            run.add(
                NETWORK,
                format!("{} to {}", node.name, peer.name),
                link(&peer.link, db.settings.heartbeat_ms),
            );
        }
    }
    for peer in &facts.asked.peers {
        if let LinkFacts::Good { clock_ahead_ms, .. } = peer.link {
            run.add(
                NODES,
                format!("clock of {}", peer.name),
                clock(clock_ahead_ms, db.settings.clock_skew_max_ms),
            );
        }
    }
    for volume in db.volumes.keys() {
        run.add(LUNS, volume.clone(), seen_by(volume, &answered));
    }
}

fn part(node: &NodeFacts) -> Verdict {
    match &node.cut_off {
        None => passed(format!("its database is at {}", node.applied)),
        Some(why) => failed(
            format!("it is cut off: {why}"),
            "look at `csvctl quorum show`, its network and its csvd's log",
        ),
    }
}

fn level(db: &ClusterDb, node: &NodeFacts) -> Verdict {
    if node.feature_level < db.feature_level {
        let next = format!("update csvd on {}", node.name);
        return failed(
            format!("it knows {}, the cluster is at {}", node.feature_level, db.feature_level),
            next,
        );
    }
    passed(format!("it knows {}, the cluster is at {}", node.feature_level, db.feature_level))
}

fn versions(nodes: &[&NodeFacts]) -> Verdict {
    let versions: BTreeSet<&str> = nodes.iter().map(|node| node.version.as_str()).collect();
    let list =
        nodes.iter().map(|node| format!("{} {}", node.name, node.version)).collect::<Vec<_>>().join(", ");
    if versions.len() > 1 {
        return warning(
            format!("different versions of csvd: {list}"),
            "update the older ones, then run `csvctl cluster update-level`",
        );
    }
    passed(format!("every node runs csvd {}", versions.first().copied().unwrap_or("of no version")))
}

fn samba(nodes: &[&NodeFacts]) -> Verdict {
    let without: Vec<&str> =
        nodes.iter().filter(|node| node.samba.is_none()).map(|node| node.name.as_str()).collect();
    if !without.is_empty() {
        return failed(
            format!("smbd cannot be run on {}", without.join(", ")),
            "install the package samba there",
        );
    }
    let versions: BTreeSet<&str> = nodes.iter().filter_map(|node| node.samba.as_deref()).collect();
    let list = versions.iter().copied().collect::<Vec<_>>().join(", ");
    if versions.len() > 1 {
        return warning(format!("different versions: {list}"), "bring the nodes to one version of Samba");
    }
    passed(list)
}

fn link(link: &LinkFacts, heartbeat_ms: u64) -> Verdict {
    match link {
        LinkFacts::Bad(why) => failed(
            why.clone(),
            "check the network between them in this direction: cable, address, firewall (TCP, the cluster's port)",
        ),
        LinkFacts::Good { rtt_us, rtt_us_max, .. } => {
            let ms = |us: u64| format!("{}.{:02} ms", us / 1000, us % 1000 / 10);
            let text = format!("round trip {} to {}", ms(*rtt_us), ms(*rtt_us_max));
            if *rtt_us > RTT_GOOD_US || *rtt_us_max / 1000 > heartbeat_ms {
                return warning(
                    text,
                    "a slow network makes every change slow; raise heartbeat_ms if it cannot be made faster",
                );
            }
            passed(text)
        }
    }
}

fn clock(ahead_ms: i64, skew_max_ms: u64) -> Verdict {
    let off = ahead_ms.unsigned_abs();
    let text = format!("{off} ms {} this node's", if ahead_ms >= 0 { "ahead of" } else { "behind" });
    let next = "run a time service on every node (chrony, ntpd or systemd-timesyncd)";
    if off > skew_max_ms {
        failed(text, next)
    } else if off > CLOCK_GOOD_MS {
        warning(text, next)
    } else {
        passed(text)
    }
}

fn seen_by(name: &str, nodes: &[&NodeFacts]) -> Verdict {
    let (mut right, mut none, mut wrong) = (Vec::new(), Vec::new(), Vec::new());
    for node in nodes {
        let volume = node.volumes.iter().find(|volume| volume.volume == name);
        match volume.and_then(|volume| volume.lun.as_ref()) {
            Some(LunFacts::Right) => right.push(node.name.clone()),
            Some(LunFacts::Other(what)) => wrong.push(format!("{} finds {what}", node.name)),
            Some(LunFacts::Failed(why)) => wrong.push(format!("{}: {why}", node.name)),
            None => none.push(node.name.clone()),
        }
    }
    if right.is_empty() {
        let text = format!("no node sees it; {}", wrong.join(", "));
        return failed(text.trim_end_matches("; ").to_owned(), "check the storage and the paths to it");
    }
    if !wrong.is_empty() {
        return failed(
            wrong.join("; "),
            "check the paths of these nodes, and `luns` in their /etc/csv/csv.toml",
        );
    }
    if !none.is_empty() {
        return warning(
            format!("seen by {}, not by {}", right.join(", "), none.join(", ")),
            "nodes without a path send their data through the coordinator; give them one for direct I/O",
        );
    }
    passed(format!("seen by {}", right.join(", ")))
}

/// Ports that must be served: the cluster service of each node, and control protocol and SMB of each volume's owner.
pub(super) fn ports(run: &mut Run, db: &ClusterDb, cluster_port: u16) {
    for node in db.nodes.values() {
        let name = format!("cluster port of {}", node.name);
        run.add(NETWORK, name, served(node.addr, cluster_port, "its csvd"));
    }
    for volume in db.volumes.values() {
        let owner = volume.owner.filter(|_| volume.state == VolumeState::Online);
        let Some(owner) = owner.and_then(|owner| db.nodes.get(&owner)) else { continue };
        let offset = volume.index.saturating_mul(PORTS_PER_VOLUME);
        for (port, what) in [(db.settings.control_port, "control protocol"), (db.settings.smb_port, "SMB")] {
            let name = format!("{} at {}: {what}", volume.name, owner.name);
            run.add(NETWORK, name, served(owner.addr, port.saturating_add(offset), "its coordinator"));
        }
    }
}

fn served(addr: IpAddr, port: u16, who: &str) -> Verdict {
    let at = SocketAddr::new(addr, port);
    match TcpStream::connect_timeout(&at, CONNECT_LIMIT) {
        Ok(_) => passed(format!("{at} is served")),
        Err(error) => failed(
            format!("{at}: {error}"),
            format!("look whether {who} runs, and whether a firewall is between"),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::super::report::Outcome;
    use super::*;
    use csv_types::NodeId;
    use csvd::check::{PeerFacts, VolumeFacts};

    fn node(number: u32, lun: Option<LunFacts>) -> NodeFacts {
        let device = lun.is_some().then(|| "/dev/sda".to_owned());
        NodeFacts {
            node: NodeId(number),
            name: format!("n{number}"),
            version: "0.1.0".into(),
            feature_level: 1,
            kernel: "6.12".into(),
            samba: Some("Version 4.22".into()),
            cut_off: None,
            applied: 5,
            volumes: vec![VolumeFacts { volume: "V".into(), device, lun }],
            peers: vec![PeerFacts {
                node: NodeId(3 - number),
                name: format!("n{}", 3 - number),
                link: LinkFacts::Good { rtt_us: 300, rtt_us_max: 900, clock_ahead_ms: -3 },
            }],
        }
    }

    #[test]
    fn luns_are_compared() {
        let all = |one: Option<LunFacts>, two: Option<LunFacts>| {
            let (one, two) = (node(1, one), node(2, two));
            seen_by("V", &[&one, &two])
        };
        assert_eq!(all(Some(LunFacts::Right), Some(LunFacts::Right)), passed("seen by n1, n2"));
        assert_eq!(all(Some(LunFacts::Right), None).outcome, Outcome::Warning);
        assert_eq!(all(None, None).outcome, Outcome::Failed);
        let other = all(Some(LunFacts::Right), Some(LunFacts::Other("volume W".into())));
        assert!(other.outcome == Outcome::Failed && other.text.contains("n2 finds volume W"));
    }

    #[test]
    fn what_differs_is_told() {
        let (one, mut two) = (node(1, None), node(2, None));
        assert_eq!(versions(&[&one, &two]).outcome, Outcome::Passed);
        assert_eq!(samba(&[&one, &two]).outcome, Outcome::Passed);
        two.version = "0.2.0".into();
        two.samba = None;
        two.cut_off = Some("no quorum".into());
        assert_eq!(versions(&[&one, &two]).outcome, Outcome::Warning);
        assert_eq!(samba(&[&one, &two]).outcome, Outcome::Failed);
        assert_eq!(part(&two).outcome, Outcome::Failed);
        let db = ClusterDb { feature_level: 2, ..ClusterDb::default() };
        assert_eq!(level(&db, &one).outcome, Outcome::Failed);
        for (ahead_ms, outcome) in
            [(5, Outcome::Passed), (-2_000, Outcome::Warning), (-90_000, Outcome::Failed)]
        {
            assert_eq!(clock(ahead_ms, 60_000).outcome, outcome);
        }
        let slow = LinkFacts::Good { rtt_us: 30_000, rtt_us_max: 40_000, clock_ahead_ms: 0 };
        assert_eq!(link(&slow, 300).outcome, Outcome::Warning);
        assert_eq!(link(&LinkFacts::Bad("no".into()), 300).outcome, Outcome::Failed);
    }

    #[test]
    fn a_node_that_does_not_answer_fails() {
        let facts = ClusterFacts {
            asked: node(1, None),
            others: vec![("n2".into(), Err("cannot be reached".into()))],
        };
        let mut report = Run::new(9);
        run(&mut report, &ClusterDb::default(), &facts);
        let checks = report.finish();
        assert!(checks.iter().any(|check| check.name == "n2" && check.outcome == Outcome::Failed));
        assert!(checks.iter().any(|check| check.name == "n1 to n2"));
    }
}

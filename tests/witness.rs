//! Two nodes and a disk witness: whatever of the three is lost, exactly one side goes on.
//!
//! The network between the nodes is cut again and again, with the witness on a random node. Then one node can change files and
//! the other one cannot: its csvfs says why, and the LUN itself refuses its writes. After the cut is healed both are back.
//! Each node is killed; the witness LUN is taken away and brought back.

use anyhow::{Context as _, bail, ensure};
use csv_tests::lab::{Lab, MOUNT};
use csv_tests::rng::{self, Rng};
use csv_tests::wait;
use serde::Deserialize;
use std::time::{Duration, Instant};

/// In a quick run and in a long one.
const CUTS: [u32; 2] = [6, 20];
/// Until one side goes on; a crash of the witness's holder costs a challenge besides.
const GO_ON: Duration = Duration::from_secs(30);
/// Until the other side has noticed.
const NOTICE: Duration = Duration::from_secs(30);
const HEALED: Duration = Duration::from_secs(60);
/// A change of the node without majority is given up after this time; then it has waited in vain for long enough.
const IN_VAIN_S: u32 = 4;
const ALL: [&str; 3] = ["n1", "n2", "witness"];

/// `csvctl quorum show --json`.
#[derive(Debug, Deserialize)]
struct Quorum {
    voters: Vec<String>,
    witness_at: Option<String>,
    tolerates: Option<usize>,
}

fn quorum(lab: &Lab, node: &str) -> anyhow::Result<Quorum> {
    Ok(serde_json::from_str(&lab.ctl(node, &["quorum", "show", "--json"])?)?)
}

/// Both nodes serve the volume, and all three vote and answer.
fn wait_whole(lab: &Lab) -> anyhow::Result<String> {
    let mut last = String::new();
    let whole = wait::until("both nodes and the witness to be back", HEALED, || {
        let seen = quorum(lab, "n1")?;
        last = format!("{seen:?}");
        if seen.voters != ALL || seen.tolerates != Some(1) || quorum(lab, "n2")?.tolerates.is_none() {
            bail!("{last}");
        }
        for node in lab.nodes() {
            let row = lab.state(node)?;
            if row.mode != "direct" {
                bail!("{node} is {} ({})", row.mode, row.reason);
            }
        }
        Ok(seen.witness_at)
    });
    whole.with_context(|| format!("quorum: {last}"))
}

/// Lets the other node have the witness.
fn move_witness(lab: &Lab, holder: &str) -> anyhow::Result<()> {
    lab.lab("fail-path", &[holder, "--witness"])?;
    let moved = wait::until("the witness on the other node", HEALED, || {
        Ok(quorum(lab, other(holder))?.witness_at.filter(|node| node != holder))
    });
    lab.lab("heal-path", &[holder, "--witness"])?;
    moved.map(drop)
}

fn other(node: &str) -> &'static str {
    if node == "n1" { "n2" } else { "n1" }
}

/// Tries to make a file until `limit`; how long it took.
fn make_file(lab: &Lab, node: &str, name: &str, limit: Duration) -> anyhow::Result<Duration> {
    let begun = Instant::now();
    let script =
        format!("timeout {} sh -c 'echo {name} > {MOUNT}/{name} && sync {MOUNT}/{name}'", limit.as_secs());
    lab.sh(node, &script).with_context(|| format!("{node} cannot make a file"))?;
    Ok(begun.elapsed())
}

/// The side without majority: no change goes through, its csvfs says why, the LUN refuses its writes.
fn check_loser(lab: &Lab, node: &str, name: &str) -> anyhow::Result<()> {
    let row = wait::until(&format!("csvfs of {node} to say that it has stopped"), NOTICE, || {
        let row = lab.state(node)?;
        Ok((row.mode == "paused" || row.mode == "unavailable").then_some(row))
    })?;
    ensure!(!row.reason.is_empty(), "{node} is {} and does not say why", row.mode);
    let script = format!("timeout -k 2 {IN_VAIN_S} sh -c 'echo x > {MOUNT}/{name}'");
    let tried = lab.exec(node, &["sh", "-ec", &script], HEALED)?;
    ensure!(!tried.status.success(), "{node} has made a file without majority");
    let device = lab.lun_device(node)?;
    // Into the reserved part of the label's area, which holds zeros: should it go through, nothing is lost.
    let script = format!(
        "dd if=/dev/zero of={0} bs=4096 count=1 oflag=direct conv=nocreat,notrunc seek=$(( $(stat -c %s {1}) / 4096 - 8 )) 2>&1",
        device.display(),
        lab.lun_image().display()
    );
    let written = lab.exec(node, &["sh", "-ec", &script], HEALED)?;
    ensure!(!written.status.success(), "the LUN takes writes of {node}: {}", written.stdout);
    Ok(())
}

fn cut(lab: &Lab, round: u32, holder: &str) -> anyhow::Result<()> {
    lab.lab("partition", &["n1"])?;
    let begun = Instant::now();
    // Whoever has the witness goes on; that this is not the other one is checked below.
    let (winner, loser) = (holder, other(holder));
    let (good, bad) = (format!("cut-{round}-{winner}"), format!("cut-{round}-{loser}"));
    make_file(lab, winner, &good, GO_ON)?;
    let took = begun.elapsed();
    check_loser(lab, loser, &bad)?;
    let files = lab.sh(winner, &format!("ls {MOUNT}"))?;
    ensure!(files.contains(&good) && !files.contains(&bad), "files on {winner}: {files}");
    ensure!(quorum(lab, winner)?.tolerates.is_some(), "{winner} says that it has no quorum");
    ensure!(quorum(lab, loser)?.tolerates.is_none(), "{loser} says that it has quorum");
    lab.lab("heal", &[])?;
    println!("cut {round}: {winner} went on after {} ms, {loser} stopped", took.as_millis());
    Ok(())
}

#[test]
fn exactly_one_side_goes_on() -> anyhow::Result<()> {
    let mut rng = Rng::new(rng::seed("witness"));
    let lab = two_nodes()?;
    let cuts = CUTS[usize::from(csv_tests::full())];
    for round in 0..cuts {
        let mut holder = wait_whole(&lab)?;
        if rng.below(4) == 0 {
            move_witness(&lab, &holder)?;
            holder = wait_whole(&lab)?;
        }
        cut(&lab, round, &holder).with_context(|| format!("cut {round}, the witness on {holder}"))?;
    }
    wait_whole(&lab)?;
    let files = lab.sh("n1", &format!("ls {MOUNT} | grep -c ^cut-"))?;
    ensure!(files.trim() == cuts.to_string(), "{files} files after {cuts} cuts");
    lab.finish()
}

#[test]
fn each_of_the_three_may_be_lost() -> anyhow::Result<()> {
    let lab = two_nodes()?;
    for (round, node) in ["n1", "n2", "n1"].into_iter().enumerate() {
        let holder = wait_whole(&lab)?;
        lab.lab("crash", &[node])?;
        let took = make_file(&lab, other(node), &format!("crash-{round}"), GO_ON)?;
        println!(
            "{node} crashed, the witness on {holder}: {} went on after {} ms",
            other(node),
            took.as_millis()
        );
        lab.lab("restart", &[node])?;
    }
    wait_whole(&lab)?;
    for node in ["n1", "n2"] {
        lab.lab("fail-path", &[node, "--witness"])?;
    }
    wait::until("the witness to lose its vote", HEALED, || {
        Ok((!quorum(&lab, "n1")?.voters.iter().any(|voter| voter == "witness")).then_some(()))
    })?;
    for node in ["n1", "n2"] {
        make_file(&lab, node, &format!("without-{node}"), GO_ON)?;
    }
    for node in ["n1", "n2"] {
        lab.lab("heal-path", &[node, "--witness"])?;
    }
    wait_whole(&lab)?;
    let events = lab.ctl("n1", &["events"])?;
    for word in ["the disk witness runs here now", "the witness loses its vote", "the witness gets a vote"] {
        ensure!(events.contains(word), "no event \"{word}\":\n{events}");
    }
    lab.finish()
}

fn two_nodes() -> anyhow::Result<Lab> {
    let args = ["--nodes", "2", "--witness", "--size", "512M"];
    let times = ["--set", "witness_renew_ms=1000", "--set", "witness_challenge_ms=4000"];
    Lab::up_with("witness", "ext4", &[&args[..], &times].concat())
}

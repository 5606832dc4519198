//! Three nodes on the same few files at random against a model, while paths and modes of nodes fail and heal.
//! Repeat a failure with the printed CSV_SEED.

use csv_tests::driver::Driver;
use csv_tests::lab::{Lab, MODE_DEADLINE, MOUNT};
use csv_tests::model::Model;
use csv_tests::node_agent::NodeAgent;
use csv_tests::rng::{self, Rng};
use csv_tests::wait;
use std::cell::Cell;

/// About every so many operations something happens to a node's way to its data.
const FAULT_EVERY: u64 = 150;

fn steps() -> u64 {
    if csv_tests::full() { 20_000 } else { 4_000 }
}

fn agents(lab: &Lab, dir: &str) -> anyhow::Result<Vec<NodeAgent>> {
    lab.sh("n2", &format!("mkdir {dir}"))?;
    ["n1", "n2", "n3"].iter().map(|node| NodeAgent::start(lab, node, dir)).collect()
}

/// What can happen to a node without its applications noticing.
fn disturb(lab: &Lab, rng: &mut Rng) -> anyhow::Result<&'static str> {
    match rng.below(7) {
        0 => lab.lab("fail-path", &["n1"]).map(|_| "path of n1 fails"),
        1..4 => {
            lab.lab("heal-path", &["n1"])?;
            // The probe takes seconds, in which thousands of operations would go the other way.
            wait::until("n1 to have its path back", MODE_DEADLINE, || {
                Ok((lab.state("n1")?.mode != "block-redirected").then_some("path of n1 heals"))
            })
        }
        4 => lab.redirect("n1", true).map(|()| "n1 redirected"),
        5 => lab.redirect("n1", false).map(|()| "n1 not redirected"),
        _ => {
            let on = rng.one_in(2);
            lab.redirect("n3", on).map(|()| if on { "n3 redirected" } else { "n3 not redirected" })
        }
    }
}

fn run(fs: &str) -> anyhow::Result<()> {
    let seed = rng::seed(&format!("coherence on {fs}"));
    let lab = Lab::up_with("coherence", fs, &["--size", "4G"])?;
    let dir = format!("{MOUNT}/coherence");
    let mut driver = Driver::new(agents(&lab, &dir)?, Model::new(None), seed);
    // The faults have random numbers of their own, so that the operations stay the same without them.
    let mut rng = Rng::new(seed ^ 0xfa17);
    let faults = Cell::new(0u32);
    driver.run(steps(), |step| {
        if rng.one_in(FAULT_EVERY) {
            let what = disturb(&lab, &mut rng)?;
            faults.set(faults.get() + 1);
            println!("step {step}: {what}");
        }
        Ok(())
    })?;
    for agent in driver.into_nodes() {
        agent.stop()?;
    }
    lab.redirect("n1", false)?;
    lab.redirect("n3", false)?;
    lab.lab("heal-path", &["n1"])?;
    let counts = lab.state("n1")?.io;
    println!(
        "coherence on {fs}: {} operations, {} faults, seed {seed}; n1 {counts:?}",
        steps(),
        faults.get()
    );
    anyhow::ensure!(faults.get() > 0, "no fault was injected");
    anyhow::ensure!(
        counts.direct_writes > 0 && counts.fs_writes + counts.control_writes > 0,
        "n1 did not write in both ways: {counts:?}"
    );
    lab.finish()
}

#[test]
fn ext4() -> anyhow::Result<()> {
    run("ext4")
}

#[test]
fn xfs() -> anyhow::Result<()> {
    run("xfs")
}

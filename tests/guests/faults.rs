//! The faults, one after the other, on one cluster. After each: fio on the survivors has seen no error and no wrong byte,
//! no acknowledged record is lost, there is one owner, and the victim comes back by itself. `CSV_TEST_FAULT` picks those whose
//! names contain it.

use super::cluster::{self, MOUNT, VOLUME, ctl, wait_mode, wait_moved, wait_one_owner};
use super::load::{self, Fio, Stamps};
use anyhow::{Context as _, ensure};
use csv_tests::guest::{Rig, Vm};
use std::time::{Duration, Instant};

/// For a metadata operation while the volume fails over.
const FAILOVER_LIMIT: Duration = Duration::from_secs(150);
/// Records written after a file was removed whose blocks a frozen node knows.
const RECORDS_AFTER: u64 = 150;

pub(crate) fn run(rig: &mut Rig) -> anyhow::Result<()> {
    let result = all(rig);
    if result.is_err() {
        print_events(rig);
    }
    result
}

fn all(rig: &mut Rig) -> anyhow::Result<()> {
    let started = Instant::now();
    cluster::create(rig)?;
    let owner = one_owner(rig)?;
    load::write_common(rig.node(&owner)?)?;
    rig.nodes.iter().try_for_each(load::check_common)?;
    println!("cluster: three nodes, {VOLUME} on {owner}, in {:.1} s", started.elapsed().as_secs_f64());
    let wanted = std::env::var("CSV_TEST_FAULT").unwrap_or_default();
    for (name, fault) in FAULTS.into_iter().filter(|(name, _)| name.contains(&wanted)) {
        let started = Instant::now();
        fault(rig).with_context(|| format!("fault: {name}"))?;
        rig.nodes.iter().try_for_each(load::check_common)?;
        let owner = one_owner(rig)?;
        println!("{name}: done in {:.1} s, {owner} owns {VOLUME}", started.elapsed().as_secs_f64());
    }
    ctl(rig.node("g1")?, &format!("volume offline {VOLUME}"))?;
    wait_offline(rig)
}

type Fault = fn(&mut Rig) -> anyhow::Result<()>;

const FAULTS: [(&str, Fault); 6] = [
    ("power cut of the coordinator", power_cut),
    ("freeze of the coordinator", freeze),
    ("path of a data server fails", data_server_path),
    ("path of the coordinator fails", coordinator_path),
    ("network of the coordinator cut", partition),
    ("power cut of the storage", storage_restart),
];

fn one_owner(rig: &Rig) -> anyhow::Result<String> {
    wait_one_owner(&rig.nodes.iter().collect::<Vec<_>>())
}

fn others<'a>(rig: &'a Rig, victim: &str) -> Vec<&'a Vm> {
    rig.nodes.iter().filter(|node| node.name != victim).collect()
}

fn start_fio(nodes: &[&Vm]) -> anyhow::Result<Vec<Fio>> {
    nodes.iter().map(|node| Fio::start(node)).collect()
}

fn finish_fio(jobs: Vec<Fio>, nodes: &[&Vm]) -> anyhow::Result<()> {
    jobs.into_iter().zip(nodes).try_for_each(|(job, node)| job.finish(node))
}

/// How long until a survivor can make a file again, and make it durable. It is asked right after the fault; until the old owner's lease is over
/// a call waits.
fn time_failover(what: &str, survivor: &Vm, since: Instant) -> anyhow::Result<()> {
    let script =
        format!("dd if=/dev/zero of={MOUNT}/after bs=4k count=1 conv=fsync 2>&1 && rm {MOUNT}/after");
    survivor.start(&script, FAILOVER_LIMIT)?.ok()?;
    println!("{what}: a file can be made on {} after {:.1} s", survivor.name, since.elapsed().as_secs_f64());
    Ok(())
}

fn power_cut(rig: &mut Rig) -> anyhow::Result<()> {
    let victim = one_owner(rig)?;
    let jobs = start_fio(&others(rig, &victim))?;
    let stamps = Stamps::start(rig.node(&victim)?, "power-cut")?;
    rig.power_cut(&victim)?;
    let since = Instant::now();
    let survivors = others(rig, &victim);
    time_failover("power cut", survivors[0], since)?;
    wait_moved(survivors[0], &victim)?;
    for survivor in &survivors {
        let last = stamps.check(survivor)?;
        println!("power cut: {} finds all {last} acknowledged records", survivor.name);
    }
    finish_fio(jobs, &survivors)?;
    survivors.iter().try_for_each(|node| load::check_common(node))?;
    rig.power_on(&victim)?;
    let node = rig.node(&victim)?;
    cluster::start_csvd(node)?;
    wait_mode(node, "direct")?;
    stamps.check(node).map(drop)
}

/// The frozen node has writes under way and layouts of a file that is then removed; its blocks go to other files. When it wakes
/// up, none of its writes may land there.
fn freeze(rig: &mut Rig) -> anyhow::Result<()> {
    let victim = one_owner(rig)?;
    let (frozen, survivors) = (rig.node(&victim)?, others(rig, &victim));
    let jobs = start_fio(&survivors)?;
    let stamps = Stamps::start(frozen, "freeze")?;
    // A deep queue, so that some of it is caught on its way.
    frozen.sh(&load::deep_queue())?;
    frozen.freeze()?;
    let since = Instant::now();
    time_failover("freeze", survivors[0], since)?;
    wait_moved(survivors[0], &victim)?;
    stamps.check(survivors[1])?;
    survivors[0].sh(&format!("rm {MOUNT}/freeze; sync"))?;
    let fresh = Stamps::start(survivors[0], "fresh")?;
    fresh.wait_more(RECORDS_AFTER)?;
    frozen.thaw()?;
    let thawed = Instant::now();
    wait_mode(frozen, "direct")?;
    println!("freeze: the node is back {:.1} s after it woke up", thawed.elapsed().as_secs_f64());
    // Older kernels call a reservation conflict a nexus error.
    let refused = frozen.sh("dmesg | grep -cE 'nexus error|reservation conflict' || true")?;
    println!("freeze: the LUN refused {} stale writes", refused.trim());
    fresh.wait_more(1)?;
    fresh.finish(survivors[0], frozen)?;
    finish_fio(jobs, &survivors)
}

fn set_path(vm: &Vm, state: &str) -> anyhow::Result<()> {
    vm.sh(&format!("echo {state} >/sys/block/sda/device/state")).map(drop)
}

fn data_server_path(rig: &mut Rig) -> anyhow::Result<()> {
    let owner = one_owner(rig)?;
    let all: Vec<&Vm> = rig.nodes.iter().collect();
    let victim = others(rig, &owner)[0];
    let jobs = start_fio(&all)?;
    let stamps = Stamps::start(victim, "path")?;
    set_path(victim, "offline")?;
    wait_mode(victim, "block-redirected")?;
    stamps.wait_more(10)?;
    set_path(victim, "running")?;
    wait_mode(victim, "direct")?;
    stamps.wait_more(10)?;
    ensure!(one_owner(rig)? == owner, "the coordinator changed");
    stamps.finish(victim, rig.node(&owner)?)?;
    finish_fio(jobs, &all)
}

fn coordinator_path(rig: &mut Rig) -> anyhow::Result<()> {
    let victim = one_owner(rig)?;
    let (node, survivors) = (rig.node(&victim)?, others(rig, &victim));
    let jobs = start_fio(&survivors)?;
    set_path(node, "offline")?;
    let since = Instant::now();
    time_failover("coordinator's path", survivors[0], since)?;
    wait_moved(survivors[0], &victim)?;
    set_path(node, "running")?;
    wait_mode(node, "direct")?;
    finish_fio(jobs, &survivors)
}

fn partition(rig: &mut Rig) -> anyhow::Result<()> {
    let victim = one_owner(rig)?;
    let (node, survivors) = (rig.node(&victim)?, others(rig, &victim));
    let jobs = start_fio(&survivors)?;
    let stamps = Stamps::start(node, "partition")?;
    rig.network.cut(&victim)?;
    let since = Instant::now();
    time_failover("partition", survivors[0], since)?;
    wait_moved(survivors[0], &victim)?;
    stamps.check(survivors[1])?;
    let row = cluster::state(node)
        .map_or_else(|error| format!("{error:#}"), |row| format!("{} ({})", row.mode, row.reason));
    println!("partition: the node that is cut off says: {row}");
    rig.network.plug(&victim)?;
    wait_mode(node, "direct")?;
    finish_fio(jobs, &survivors)
}

fn storage_restart(rig: &mut Rig) -> anyhow::Result<()> {
    let owner = one_owner(rig)?;
    // QEMU's initiators come back as others than before, so the storage refuses the nodes until they have registered anew. What a
    // node had not synced then may be lost, and its programs are told so by fsync; what was acknowledged may not.
    let writer = others(rig, &owner)[0].name.clone();
    let jobs = start_fio(&rig.nodes.iter().collect::<Vec<_>>())?;
    let stamps = Stamps::start_again(rig.node(&writer)?, "storage")?;
    let since = Instant::now();
    rig.storage.restart(&rig.common)?;
    println!("storage: up again after {:.1} s", since.elapsed().as_secs_f64());
    let all: Vec<&Vm> = rig.nodes.iter().collect();
    all.iter().try_for_each(|node| wait_mode(node, "direct"))?;
    stamps.wait_more(10)?;
    println!("storage: records are written again after {:.1} s", since.elapsed().as_secs_f64());
    stamps.finish(rig.node(&writer)?, rig.node(&owner)?)?;
    finish_fio(jobs, &all)
}

fn wait_offline(rig: &Rig) -> anyhow::Result<()> {
    csv_tests::wait::until("the volume is offline", cluster::CONVERGE, || {
        for node in &rig.nodes {
            let state = cluster::listed(node)?.state;
            ensure!(state == "Offline", "{}: it is {state}", node.name);
        }
        Ok(Some(()))
    })
}

fn print_events(rig: &Rig) {
    for node in rig.nodes.iter().filter(|node| node.is_on()) {
        match node.sh("timeout 20 /csv/bin/csvctl events --local | tail -n 60; timeout 20 /csv/bin/csvctl events | tail -n 60; \
             timeout 20 /csv/bin/csvctl cluster status") {
            Ok(text) => println!("--- {}: its events\n{text}", node.name),
            Err(error) => println!("--- {}: no events: {error:#}", node.name),
        }
    }
}

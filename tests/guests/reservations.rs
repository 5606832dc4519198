//! Persistent reservations by crates/lun on the guests' disk: each operation, a fence against a frozen writer, a power
//! cut of the storage, the kernel's own calls.

use anyhow::{Context as _, ensure};
use csv_tests::guest::{Rig, Vm};
use serde_json::Value;
use std::time::{Duration, Instant};

const DISK: &str = "/dev/sda";
/// A device of the kernel's device mapper on the disk: there, only the kernel's own calls make reservations.
const MAPPED: &str = "/dev/mapper/lun";
const KEYS: [(&str, &str); 3] = [("g1", "0xa1"), ("g2", "0xa2"), ("g3", "0xa3")];
/// Offset of the block that g1 and g3 both write; hexadecimal for `pr`.
const BLOCK: u64 = 0x20_0000;
const LOOP_LIMIT: Duration = Duration::from_secs(120);

/// One operation of the example `pr` in a guest: its JSON.
fn pr(vm: &Vm, args: &str) -> anyhow::Result<Value> {
    // The example's exit status tells no more than its object does.
    let text = vm.sh(&format!("/csv/bin/examples/pr {args} || test $? -eq 1"))?;
    serde_json::from_str(&text).with_context(|| format!("pr {args}: {text}"))
}

fn good(vm: &Vm, args: &str) -> anyhow::Result<Value> {
    let value = pr(vm, args)?;
    ensure!(value["ok"] == true, "{}: pr {args}: {value}", vm.name);
    Ok(value["result"].clone())
}

fn conflict(vm: &Vm, args: &str) -> anyhow::Result<Value> {
    let value = pr(vm, args)?;
    ensure!(value["ok"] == false && value["conflict"] == true, "{}: pr {args}: {value}", vm.name);
    Ok(value)
}

/// The keys on the disk, in order.
fn keys(vm: &Vm) -> anyhow::Result<Vec<String>> {
    let mut keys: Vec<String> = serde_json::from_value(good(vm, &format!("keys {DISK}"))?["keys"].clone())?;
    keys.sort();
    Ok(keys)
}

pub(crate) fn run(rig: &mut Rig) -> anyhow::Result<()> {
    operations(rig)?;
    frozen_writer(rig)?;
    storage_power_cut(rig)?;
    kernel_calls(rig)
}

fn operations(rig: &Rig) -> anyhow::Result<()> {
    let [g1, g2, g3] = [rig.node("g1")?, rig.node("g2")?, rig.node("g3")?];
    ensure!(good(g1, &format!("kind {DISK}"))? == "scsi");
    let results = good(g1, &format!("validate {DISK}"))?;
    for one in results.as_array().context("no list")? {
        println!("validate: {}: {} {}", one["name"], one["outcome"], one["text"]);
        ensure!(one["outcome"] != "Failed", "{one}");
    }
    for (name, key) in KEYS {
        let registered = good(rig.node(name)?, &format!("register {DISK} - {key}"))?;
        ensure!(registered["aptpl"] == true, "{name}: {registered}");
    }
    conflict(g2, &format!("register {DISK} 0xbb 0xcc"))?;
    good(g1, &format!("reserve {DISK} 0xa1"))?;
    conflict(g2, &format!("reserve {DISK} 0xa2"))?;
    let status = good(g2, &format!("status {DISK}"))?;
    println!("status: {status}");
    let list = status.as_array().context("no list")?;
    for (name, key) in KEYS {
        let one = list.iter().find(|one| one["key"] == key).with_context(|| format!("no {key}: {status}"))?;
        ensure!(one["initiator"].as_str().is_some_and(|text| text.contains(&format!(":{name}"))), "{one}");
        ensure!(one["holder"] == (name == "g1"), "{one}");
    }
    ensure!(list.len() == KEYS.len(), "{status}");
    for (name, key) in KEYS {
        good(rig.node(name)?, &format!("write {DISK} 0x100000 {key}"))?;
    }
    // An orderly exit and coming back.
    good(g3, &format!("unregister {DISK} 0xa3"))?;
    conflict(g3, &format!("write {DISK} 0x100000 0xa3"))?;
    good(g3, &format!("ensure-registered {DISK} 0xa3"))?;
    good(g3, &format!("write {DISK} 0x100000 0xa3"))?;
    // The reservation goes over to who preempts its holder.
    good(g2, &format!("preempt {DISK} 0xa2 0xa1"))?;
    let holder = good(g2, &format!("reservation {DISK}"))?;
    ensure!(holder["key"] == "0xa2" && holder["type"] == 5, "{holder}");
    conflict(g1, &format!("write {DISK} 0x100000 0xa1"))?;
    good(g1, &format!("ensure-registered {DISK} 0xa1"))?;
    Ok(())
}

/// A node freezes in the middle of its writes, is fenced, and wakes up: none of its writes may come through.
fn frozen_writer(rig: &Rig) -> anyhow::Result<()> {
    let [g1, g2, g3] = [rig.node("g1")?, rig.node("g2")?, rig.node("g3")?];
    let write = format!(
        "i=0; while dd if=/dev/zero of={DISK} bs=4096 count=1 seek={} oflag=direct 2>/tmp/dd; \
         do i=$((i + 1)); echo $i >/csv/own/writes; done; echo $i; cat /tmp/dd",
        BLOCK / 4096
    );
    let writer = g3.start(&write, LOOP_LIMIT)?;
    let count = g3.own().join("writes");
    let written = || std::fs::read_to_string(&count).ok()?.trim().parse::<u64>().ok();
    csv_tests::wait::until("g3 writes", LOOP_LIMIT, || Ok(written().filter(|n| *n >= 3)))?;
    g3.freeze()?;
    let started = Instant::now();
    let report = good(g1, &format!("fence {DISK} 0xa1 0xa3"))?;
    println!("reservations: fenced a frozen node in {} ms: {report}", started.elapsed().as_millis());
    ensure!(report["victims"][0]["outcome"] == "aborted", "{report}");
    ensure!(report["keys"].as_array().is_some_and(|keys| keys.len() == 2), "{report}");
    good(g1, &format!("write {DISK} {BLOCK:#x} 0xa1"))?;
    g3.thaw()?;
    let text = writer.ok()?;
    ensure!(text.contains("Invalid exchange"), "g3's writes ended with: {text}");
    let value = conflict(g3, &format!("write {DISK} {BLOCK:#x} 0xa3"))?;
    ensure!(value["errno"] == 52, "{value}");
    for vm in [g1, g2, g3] {
        let read = good(vm, &format!("read {DISK} {BLOCK:#x}"))?;
        ensure!(read["first"] == 0xc5, "{} reads what the fenced node wrote: {read}", vm.name);
    }
    ensure!(good(g3, &format!("check-fenced {DISK} 0xa3"))? == "fenced");
    let fence = pr(g3, &format!("fence {DISK} 0xa3 0xa1"))?;
    ensure!(fence["kind"] == "fatal", "a fenced node fences: {fence}");
    good(g2, &format!("write {DISK} 0x100000 0xa2"))?;
    Ok(())
}

/// What was registered with APTPL outlives a power cut of the storage, and the fence with it.
fn storage_power_cut(rig: &mut Rig) -> anyhow::Result<()> {
    let before = keys(rig.node("g1")?)?;
    rig.storage.restart(&rig.common)?;
    let g1 = rig.node("g1")?;
    let after = keys(g1)?;
    ensure!(before == after, "before {before:?}, after {after:?}");
    let holder = good(g1, &format!("reservation {DISK}"))?;
    ensure!(holder["type"] == 5, "the reservation is gone: {holder}");
    good(g1, &format!("write {DISK} 0x100000 0xa1"))?;
    conflict(rig.node("g3")?, &format!("write {DISK} 0x100000 0xa3"))?;
    // QEMU's initiator comes back with another session id, so by the standard it is another one, with the same key: it
    // is not registered, and registers again. (An initiator in a kernel keeps its id.)
    conflict(g1, &format!("clear {DISK} 0xa1"))?;
    good(g1, &format!("ensure-registered {DISK} 0xa1"))?;
    ensure!(keys(g1)? == ["0xa1", "0xa1", "0xa2"]);
    // g2's earlier session holds the reservation: this target refuses g2 until another node has taken it.
    let g2 = rig.node("g2")?;
    good(g2, &format!("ensure-registered {DISK} 0xa2"))?;
    ensure!(keys(g1)? == ["0xa1", "0xa1", "0xa2", "0xa2"]);
    let refused = pr(g2, &format!("fence {DISK} 0xa2 0xa1"))?;
    ensure!(refused["kind"] == "fatal", "{refused}");
    // A fence takes both.
    good(g1, &format!("fence {DISK} 0xa1 0xa2"))?;
    ensure!(keys(g1)? == ["0xa1", "0xa1"]);
    conflict(g2, &format!("write {DISK} 0x100000 0xa2"))?;
    good(g2, &format!("ensure-registered {DISK} 0xa2"))?;
    good(g2, &format!("write {DISK} 0x100000 0xa2"))?;
    println!("reservations: they outlived a power cut of the storage: {after:?}, held by {holder}");
    Ok(())
}

/// The same through the kernel's calls (`IOC_PR_*`), which a device of the device mapper has.
fn kernel_calls(rig: &Rig) -> anyhow::Result<()> {
    let [g1, g2, g3] = [rig.node("g1")?, rig.node("g2")?, rig.node("g3")?];
    good(g1, &format!("clear {DISK} 0xa1"))?;
    ensure!(keys(g1)?.is_empty());
    for vm in [g1, g2, g3] {
        vm.sh(&format!(
            "echo \"0 $(blockdev --getsz {DISK}) linear {DISK} 0\" | dmsetup create --noudevsync lun"
        ))?;
        vm.sh(&format!("test -b {MAPPED} || dmsetup mknodes"))?;
    }
    ensure!(good(g1, &format!("kind {MAPPED}"))? == "ioctl");
    for (name, key) in KEYS {
        good(rig.node(name)?, &format!("register-ignore {MAPPED} {key}"))?;
    }
    good(g1, &format!("reserve {MAPPED} 0xa1"))?;
    conflict(g2, &format!("reserve {MAPPED} 0xa2"))?;
    // Only newer kernels can read them.
    let read = pr(g1, &format!("keys {MAPPED}"))?;
    ensure!(read["ok"] == true || read["unsupported"] == true, "{read}");
    let report = good(g2, &format!("preempt-abort {MAPPED} 0xa2 0xa1"))?;
    ensure!(report["aborted"] == true, "{report}");
    // What the kernel did, as SCSI commands see it.
    let left = keys(g2)?;
    ensure!(left == ["0xa2", "0xa3"], "{left:?}");
    let value = conflict(g1, &format!("write {MAPPED} 0x100000 0xa1"))?;
    println!("reservations: the kernel's calls; the fenced write: {value}");
    good(g3, &format!("write {MAPPED} 0x100000 0xa3"))?;
    good(g2, &format!("release {MAPPED} 0xa2"))?;
    good(g2, &format!("clear {MAPPED} 0xa2"))?;
    for vm in [g1, g2, g3] {
        vm.sh("dmsetup remove --noudevsync lun")?;
    }
    Ok(())
}

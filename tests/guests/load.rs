//! What the nodes do while something fails: fio on a file of each node's own, which checks what it wrote, and a writer of
//! numbered records, of which none that was acknowledged may be lost.

use super::cluster::MOUNT;
use anyhow::{Context as _, bail, ensure};
use csv_tests::guest::channel::Running;
use csv_tests::guest::{Vm, stamps};
use csv_tests::wait;
use std::path::PathBuf;
use std::time::Duration;

/// Longest time for a load; it is ended before.
const LIMIT: Duration = Duration::from_secs(600);
const PROGRESS_LIMIT: Duration = Duration::from_secs(120);
/// Records written before a fault.
const RECORDS_MIN: u64 = 20;

/// fio on one node.
#[derive(Debug)]
pub(crate) struct Fio {
    node: String,
    running: Running,
}

impl Fio {
    /// Starts it and waits until it does I/O.
    pub(crate) fn start(vm: &Vm) -> anyhow::Result<Fio> {
        let name = &vm.name;
        let running = vm.start(
            &format!(
                "dd if=/dev/zero of={MOUNT}/fio-{name} bs=1M count=4 conv=fsync 2>/csv/own/log/fio
                 fio --name={name} --filename={MOUNT}/fio-{name} --thread --ioengine=psync --direct=1 --rw=randrw --bs=16k \
                 --size=4m --fallocate=none --verify=crc32c --verify_fatal=1 --verify_state_save=0 --verify_backlog=64 \
                 --rate_iops=30,30 --time_based --runtime={} >/csv/own/log/fio 2>&1 &
                 echo $! >/tmp/fio.pid; wait $! || echo \"exit status $?\"; cat /csv/own/log/fio",
                LIMIT.as_secs()
            ),
            LIMIT,
        )?;
        vm.sh(&is_open(&format!("fio-{name}"), "$(cat /tmp/fio.pid)"))?;
        Ok(Fio { node: name.clone(), running })
    }

    /// Ends it: it verifies what it has written since the last time, and must have seen no error.
    pub(crate) fn finish(self, vm: &Vm) -> anyhow::Result<()> {
        let ended = vm.sh("kill -INT $(cat /tmp/fio.pid)");
        let text = self.running.ok()?;
        let node = &self.node;
        ensure!(ended.is_ok(), "fio on {node} ended by itself:\n{text}");
        ensure!(text.contains("err= 0"), "fio on {node} saw errors:\n{text}");
        ensure!(!text.contains("verify: bad"), "fio on {node} read wrong data:\n{text}");
        Ok(())
    }
}

/// Writes the file that every node checks after every fault.
pub(crate) fn write_common(vm: &Vm) -> anyhow::Result<()> {
    vm.sh(&common("--do_verify=0 --end_fsync=1")).map(drop)
}

/// Reads it, past every cache, and checks it.
pub(crate) fn check_common(vm: &Vm) -> anyhow::Result<()> {
    let text = vm.sh(&common("--verify_only"))?;
    ensure!(text.contains("err= 0"), "{}: fio does not verify the common file:\n{text}", vm.name);
    Ok(())
}

/// Script that lets fio write with many requests at once, in the background, for as long as the node lets it.
pub(crate) fn deep_queue() -> String {
    format!(
        "dd if=/dev/zero of={MOUNT}/deep bs=1M count=8 conv=fsync 2>/csv/own/log/deep
         setsid fio --name=deep --filename={MOUNT}/deep --thread --ioengine=libaio --iodepth=32 --direct=1 \
         --rw=randwrite --bs=16k --size=8m --fallocate=none --time_based --runtime=60 >>/csv/own/log/deep 2>&1 </dev/null &
         echo $! >/tmp/deep.pid
         {}; sleep 2",
        is_open("deep", "$(cat /tmp/deep.pid)")
    )
}

/// Script that waits until a process has a file of the volume open.
fn is_open(file: &str, pid: &str) -> String {
    format!(
        "for i in $(seq 600); do readlink /proc/{pid}/fd/* 2>/dev/null | grep -q {MOUNT}/{file} && break; sleep 0.1; done"
    )
}

fn common(how: &str) -> String {
    format!(
        "fio --name=common --filename={MOUNT}/common --thread --ioengine=psync --direct=1 --rw=write --bs=64k --size=8m \
         --fallocate=none --verify=crc32c --verify_fatal=1 --verify_state_save=0 {how} 2>&1"
    )
}

/// A writer of numbered records.
#[derive(Debug)]
pub(crate) struct Stamps {
    file: String,
    acknowledged: PathBuf,
    running: Running,
}

impl Stamps {
    /// Starts a writer on a node and waits until it has written some. An error ends it.
    pub(crate) fn start(vm: &Vm, name: &str) -> anyhow::Result<Stamps> {
        Stamps::start_as(vm, name, "1")
    }

    /// A writer that writes a record again when that could not be made durable.
    pub(crate) fn start_again(vm: &Vm, name: &str) -> anyhow::Result<Stamps> {
        Stamps::start_as(vm, name, "")
    }

    fn start_as(vm: &Vm, name: &str, first: &str) -> anyhow::Result<Stamps> {
        let file = format!("{MOUNT}/{name}");
        // A file for each: a guest goes on knowing one that was removed outside.
        let told = format!("acknowledged-{name}");
        let acknowledged = vm.own().join(&told);
        let script =
            format!("echo $$ >/tmp/stamp.pid; exec /csv/own/agent stamp {file} /csv/own/{told} {first} 2>&1");
        let running = vm.start(&script, LIMIT)?;
        let stamps = Stamps { file, acknowledged, running };
        stamps.wait_for(RECORDS_MIN)?;
        Ok(stamps)
    }

    /// The last one acknowledged.
    pub(crate) fn last(&self) -> anyhow::Result<u64> {
        stamps::last(&self.acknowledged)
    }

    /// Waits until so many more are acknowledged.
    pub(crate) fn wait_more(&self, count: u64) -> anyhow::Result<()> {
        self.wait_for(self.last()? + count)
    }

    fn wait_for(&self, number: u64) -> anyhow::Result<()> {
        let mut ended = None;
        wait::until(&format!("record {number} is written"), PROGRESS_LIMIT, || {
            ended = self.running.ended();
            Ok((ended.is_some() || self.last()? >= number).then_some(()))
        })?;
        match ended {
            Some(said) => bail!("the writer of records ended, having said: {said}"),
            None => Ok(()),
        }
    }

    /// Ends the writer and checks on a node that nothing acknowledged is lost.
    pub(crate) fn finish(self, writer: &Vm, reader: &Vm) -> anyhow::Result<()> {
        writer.sh("kill -KILL $(cat /tmp/stamp.pid)")?;
        let ended = self.running.wait()?;
        ensure!(ended.status.code().is_none(), "the writer of records ended before: {}", ended.stdout);
        check(reader, &self.file, stamps::last(&self.acknowledged)?)
    }

    /// What the writer, whose node is dead or frozen, had acknowledged; checked on another node.
    pub(crate) fn check(&self, reader: &Vm) -> anyhow::Result<u64> {
        let last = self.last()?;
        check(reader, &self.file, last)?;
        Ok(last)
    }
}

/// Are the records of a file there up to this one?
fn check(reader: &Vm, file: &str, last: u64) -> anyhow::Result<()> {
    reader
        .sh(&format!("/csv/own/agent stamps {file} {last}"))
        .with_context(|| format!("{} reads the records", reader.name))
        .map(drop)
}

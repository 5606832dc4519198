//! Processes are killed at random under the load of n1 (direct) and n3 (block-redirected): the csvfs of the
//! coordinator, which csvd starts again, SMB workers, smbd, csvd of any node. Applications wait and go on: no error,
//! no wrong byte, and every call has the one outcome that the model has, though its first try may have been killed
//! between its doing and its answer. Appends through the coordinator are left out: see `Driver::without_appends`.
//!
//! Only the csvfs of the nodes that do the work is left alone: its open files end with it.

use anyhow::{Context as _, ensure};
use csv_tests::driver::Driver;
use csv_tests::lab::{Lab, MOUNT, VOLUME};
use csv_tests::membership::{kill_csvd, start_csvd};
use csv_tests::model::Model;
use csv_tests::node_agent::NodeAgent;
use csv_tests::rng::{self, Rng};
use csv_tests::wait;
use std::process::{Child, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::Duration;

const DEADLINE: Duration = Duration::from_secs(300);
/// csvd waits longer before each restart, up to 30 s.
const BACK_DEADLINE: Duration = Duration::from_secs(90);

fn kills() -> u32 {
    if csv_tests::full() { 40 } else { 12 }
}

/// fio on a file of its own, which checks what it wrote. It runs until it is interrupted.
fn fio(lab: &Lab, node: &str, log: &tempfile::NamedTempFile) -> anyhow::Result<Child> {
    let mut command = lab.command(node);
    command
        .args(["fio", "--name=kills", "--ioengine=libaio", "--direct=1", "--rw=randrw", "--iodepth=4"])
        .args(["--bsrange=4k-64k", "--size=64m", "--fallocate=none", "--time_based", "--runtime=1200"])
        .args([
            "--verify=crc32c",
            "--verify_fatal=1",
            "--verify_state_save=0",
            "--verify_backlog=256",
            "--fsync=64",
        ])
        .arg(format!("--filename={MOUNT}/kills-{node}.img"))
        .stdin(Stdio::null())
        .stdout(log.reopen()?)
        .stderr(log.reopen()?);
    command.spawn().with_context(|| format!("starting fio on {node}"))
}

fn stop_fio(mut fio: Child, log: &tempfile::NamedTempFile) -> anyhow::Result<()> {
    let pid = nix::unistd::Pid::from_raw(i32::try_from(fio.id())?);
    let running = fio.try_wait()?.is_none();
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGINT).ok();
    let status = wait::exit_within(&mut fio, DEADLINE)?;
    let text = std::fs::read_to_string(log.path())?;
    ensure!(running, "fio ended before its time:\n{text}");
    ensure!(status.is_some(), "fio did not end:\n{text}");
    ensure!(text.contains("err= 0"), "fio saw errors ({status:?}):\n{text}");
    Ok(())
}

/// The load of n1 is not to lose the csvfs that it stands on, so n2 gets the volume back that it lost: with its csvfs, or with a
/// csvd that was not back in time on a busy machine.
fn own_by_n2(lab: &Lab) -> anyhow::Result<()> {
    let owner = wait::until("the volume to have an owner", BACK_DEADLINE, || {
        Ok(Some(lab.owner("n1")?).filter(|owner| !owner.is_empty()))
    })?;
    if owner == "n2" {
        return Ok(());
    }
    lab.wait_mode("n2", "direct")?;
    lab.move_volume("n2")
}

/// Kills something. Gives what it was.
fn strike(lab: &Lab, rng: &mut Rng) -> anyhow::Result<String> {
    match rng.below(5) {
        0 | 1 => {
            own_by_n2(lab)?;
            let epoch = lab.state("n1")?.epoch;
            lab.sh("n2", &format!("kill -KILL $(cat /run/csv/{VOLUME}.pid)"))?;
            wait::until("a new epoch on n1 and n3", BACK_DEADLINE, || {
                let back = |node: &str| lab.state(node).map(|row| row.epoch > epoch);
                Ok((back("n1")? && back("n3")?).then_some(()))
            })?;
            Ok("csvfs of the coordinator".into())
        }
        2 => {
            let workers = lab.sh("n3", "pgrep -x csv-smbc || true")?;
            let workers: Vec<&str> = workers.split_whitespace().collect();
            let Some(worker) = workers.get(rng.index(workers.len())) else {
                return Ok("no SMB worker, there is none".into());
            };
            lab.sh("n3", &format!("kill -KILL {worker} || true"))?;
            Ok("an SMB worker of n3".into())
        }
        3 => {
            lab.sh("n2", "pkill -KILL -x smbd || true")?;
            Ok("smbd".into())
        }
        _ => {
            let node = ["n1", "n2", "n3"][rng.index(3)];
            kill_csvd(lab, node)?;
            start_csvd(lab, node)?;
            wait::until(&format!("csvd of {node}"), BACK_DEADLINE, || lab.state(node).map(Some))?;
            Ok(format!("csvd of {node}"))
        }
    }
}

/// Kills at random times until it is done or the other end of `stop` is gone.
fn killer(lab: &Lab, seed: u64, stop: &Receiver<()>) -> anyhow::Result<u32> {
    let mut rng = Rng::new(seed ^ 0x6b11);
    for done in 0..kills() {
        // The random time between two kills; ends early when the load has failed.
        let pause = Duration::from_millis(100 + rng.below(2500));
        if stop.recv_timeout(pause) != Err(RecvTimeoutError::Timeout) {
            return Ok(done);
        }
        let what = strike(lab, &mut rng).with_context(|| format!("kill {done}"))?;
        println!("killed: {what}");
    }
    Ok(kills())
}

fn run(fs: &str) -> anyhow::Result<()> {
    let seed = rng::seed(&format!("kills on {fs}"));
    let lab = Lab::up_with("kills", fs, &["--size", "4G"])?;
    lab.wait_mode("n1", "direct")?;
    lab.sh("n1", &format!("mkdir {MOUNT}/kills"))?;
    let dir = format!("{MOUNT}/kills");
    let logs = [tempfile::NamedTempFile::new()?, tempfile::NamedTempFile::new()?];
    let fios = [fio(&lab, "n1", &logs[0])?, fio(&lab, "n3", &logs[1])?];
    let agents = vec![NodeAgent::start(&lab, "n1", &dir)?, NodeAgent::start(&lab, "n3", &dir)?];
    let mut driver = Driver::new(agents, Model::new(None), seed).without_appends();
    let over = AtomicBool::new(false);
    let (stop, stopped) = channel();
    let mut steps = 0u64;
    let result = std::thread::scope(|scope| {
        let (lab, over) = (&lab, &over);
        let killing = scope.spawn(move || {
            let killed = killer(lab, seed, &stopped);
            over.store(true, Ordering::Relaxed);
            killed
        });
        let mut worked = Ok(());
        while worked.is_ok() && !over.load(Ordering::Relaxed) {
            worked = driver.run(20, |_| Ok(()));
            steps += 20;
        }
        drop(stop);
        let killed = killing.join().map_err(|_| anyhow::anyhow!("the killer panicked"))?;
        worked.and(killed)
    });
    for (fio, log) in fios.into_iter().zip(&logs) {
        let ended = stop_fio(fio, log);
        if result.is_ok() {
            ended?;
        }
    }
    let killed = result?;
    driver.run(200, |_| Ok(()))?;
    for agent in driver.into_nodes() {
        agent.stop()?;
    }
    println!("kills on {fs}: {killed} kills, {} operations, seed {seed}", steps + 200);
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

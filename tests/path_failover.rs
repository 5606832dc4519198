//! A node loses its path to the LUN in the middle of its work and gets it back: the application sees no error and no
//! wrong byte, and the mode says what happens.

use anyhow::{Context as _, ensure};
use csv_tests::lab::{Lab, MOUNT};
use csv_tests::wait;
use std::process::Stdio;
use std::time::Duration;

const DEADLINE: Duration = Duration::from_secs(300);
const ROUNDS: u32 = 3;

#[test]
fn fio_verifies_through_failing_and_healing_paths() -> anyhow::Result<()> {
    let lab = Lab::up("path")?;
    lab.wait_mode("n1", "direct")?;
    let file = format!("{MOUNT}/path.img");
    // Laid out before: fio that is interrupted while it lays its file out tells nothing.
    lab.sh("n1", &format!("dd if=/dev/zero of={file} bs=1M count=128 oflag=direct conv=fsync status=none"))?;
    let log = tempfile::NamedTempFile::new()?;
    let mut command = lab.command("n1");
    command
        .args([
            "fio",
            "--name=path",
            "--ioengine=libaio",
            "--direct=1",
            "--rw=randrw",
            "--bs=4k",
            "--iodepth=16",
        ])
        .args([
            "--size=128m",
            "--fallocate=none",
            "--verify=crc32c",
            "--verify_fatal=1",
            "--verify_state_save=0",
            "--verify_backlog=512",
        ])
        .args(["--time_based", "--runtime=600"])
        .arg(format!("--filename={file}"))
        .stdin(Stdio::null())
        .stdout(log.reopen()?)
        .stderr(log.reopen()?);
    let mut fio = command.spawn().context("starting fio")?;
    let worked = rounds(&lab, &mut fio);
    // Enough rounds: fio ends at an interrupt, and verifies what it has.
    let pid = nix::unistd::Pid::from_raw(i32::try_from(fio.id())?);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGINT).ok();
    let status = wait::exit_within(&mut fio, DEADLINE)?;
    let text = std::fs::read_to_string(log.path())?;
    worked.with_context(|| format!("fio says:\n{text}"))?;
    ensure!(status.is_some(), "fio did not end:\n{text}");
    ensure!(text.contains("err= 0"), "fio saw errors ({status:?}):\n{text}");
    ensure!(!text.contains("verify: bad"), "fio read wrong data:\n{text}");

    let events = lab.ctl("n1", &["events", "--local", "--json"])?;
    let changes = events.matches("mode-change").count();
    println!("path_failover: {ROUNDS} failures, {changes} mode changes in the log");
    ensure!(changes >= 2 * usize::try_from(ROUNDS)?, "only {changes} mode changes in the log:\n{events}");
    lab.finish()
}

/// Fails and heals the path; in each state I/O must go on, in the way that the mode names.
fn rounds(lab: &Lab, fio: &mut std::process::Child) -> anyhow::Result<()> {
    for round in 1..=ROUNDS {
        progress(lab, fio, "direct", |io| io.direct_writes)?;
        lab.lab("fail-path", &["n1"])?;
        let row = lab.wait_mode("n1", "block-redirected")?;
        ensure!(row.reason.contains("PathFailed"), "the reason is {:?}", row.reason);
        progress(lab, fio, "block-redirected", |io| io.block_writes)?;
        lab.lab("heal-path", &["n1"])?;
        lab.wait_mode("n1", "direct")?;
        println!("round {round}: failed and healed");
    }
    progress(lab, fio, "direct", |io| io.direct_writes)
}

/// Waits until a count has grown by some hundred.
fn progress(
    lab: &Lab,
    fio: &mut std::process::Child,
    mode: &str,
    count: impl Fn(&csv_types::admin::IoCounts) -> u64,
) -> anyhow::Result<()> {
    let start = count(&lab.state("n1")?.io);
    wait::until(&format!("writes in mode {mode}"), Duration::from_secs(60), || {
        ensure!(fio.try_wait()?.is_none(), "fio has ended");
        Ok((count(&lab.state("n1")?.io) >= start + 200).then_some(()))
    })
}

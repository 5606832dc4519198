//! flock, POSIX and open-file-description locks between nodes, waiting ones too; what happens when a holder dies;
//! QEMU's own image locking.

use anyhow::{Context as _, ensure};
use csv_tests::driver::Node as _;
use csv_tests::lab::{Lab, MOUNT};
use csv_tests::node_agent::NodeAgent;
use csv_tests::ops::{How, LockKind, LockMode, Op, Reply};
use csv_tests::wait;
use std::process::Stdio;
use std::time::Duration;

/// A lock that must not be granted is watched for this long.
const NOT_GRANTED: Duration = Duration::from_millis(700);
/// A lock that became free is granted well before this.
const GRANTED: Duration = Duration::from_secs(20);
/// A dead process's locks go with it at once; a dead node's after its session.
const HOLDER_DEATH: Duration = Duration::from_secs(60);

const AGAIN: Reply = Reply::Failed { errno: libc::EAGAIN };
const KINDS: [LockKind; 3] = [LockKind::Flock, LockKind::Posix, LockKind::Ofd];

fn lock(kind: LockKind, mode: LockMode, wait: bool) -> Op {
    Op::Lock { slot: 0, kind, mode, start: 0, len: 0, wait }
}

fn range(mode: LockMode, start: u64, len: u64) -> Op {
    Op::Lock { slot: 0, kind: LockKind::Posix, mode, start, len, wait: false }
}

fn open(lab: &Lab, node: &str, name: &str) -> anyhow::Result<NodeAgent> {
    let mut agent = NodeAgent::start(lab, node, MOUNT)?;
    let how = How { create: true, ..How::default() };
    expect(&mut agent, &Op::Open { slot: 0, name: name.into(), how }, &Reply::Done)?;
    Ok(agent)
}

fn expect(agent: &mut NodeAgent, op: &Op, reply: &Reply) -> anyhow::Result<()> {
    let got = agent.call(op)?;
    ensure!(got == *reply, "{op:?}: expected {reply:?}, got {got:?}");
    Ok(())
}

/// Shared and exclusive locks of one kind between two nodes, then a waiter that is let in by an unlock.
fn between_nodes(lab: &Lab, kind: LockKind, a: &str, b: &str) -> anyhow::Result<()> {
    use LockMode::{Exclusive, Shared, Unlock};
    let name = format!("lock-{kind:?}-{a}-{b}");
    let (mut first, mut second) = (open(lab, a, &name)?, open(lab, b, &name)?);
    expect(&mut first, &lock(kind, Shared, false), &Reply::Done)?;
    expect(&mut second, &lock(kind, Shared, false), &Reply::Done)?;
    expect(&mut second, &lock(kind, Exclusive, false), &AGAIN)?;
    expect(&mut second, &lock(kind, Unlock, false), &Reply::Done)?;
    expect(&mut first, &lock(kind, Exclusive, false), &Reply::Done)?;
    expect(&mut second, &lock(kind, Shared, false), &AGAIN)?;
    second.send(&lock(kind, Exclusive, true))?;
    let early = second.answer(NOT_GRANTED)?;
    ensure!(early.is_none(), "{kind:?} on {b} was granted while {a} holds it: {early:?}");
    expect(&mut first, &lock(kind, Unlock, false), &Reply::Done)?;
    let granted = second.answer(GRANTED)?.with_context(|| format!("{kind:?} on {b} still waits"))?;
    ensure!(granted == Reply::Done, "{kind:?} on {b}: {granted:?}");
    expect(&mut first, &lock(kind, Shared, false), &AGAIN)?;
    first.stop()?;
    second.stop()
}

/// A holder that is killed lets the waiter on another node in.
fn holder_killed(lab: &Lab, kind: LockKind) -> anyhow::Result<()> {
    let name = format!("killed-{kind:?}");
    let (mut holder, mut waiter) = (open(lab, "n1", &name)?, open(lab, "n3", &name)?);
    expect(&mut holder, &lock(kind, LockMode::Exclusive, false), &Reply::Done)?;
    waiter.send(&lock(kind, LockMode::Exclusive, true))?;
    ensure!(waiter.answer(NOT_GRANTED)?.is_none(), "{kind:?} was granted twice");
    // The holder's own process, as seen on its node: the one that has this file open.
    lab.sh("n1", &format!("kill -9 $(fuser {MOUNT}/{name} 2>/dev/null)"))?;
    let granted = waiter.answer(HOLDER_DEATH)?.with_context(|| format!("{kind:?} outlives its holder"))?;
    ensure!(granted == Reply::Done, "{kind:?} after the holder's death: {granted:?}");
    waiter.stop()
}

#[test]
fn locks_between_nodes() -> anyhow::Result<()> {
    let lab = Lab::up("locks")?;
    for kind in KINDS {
        for (a, b) in [("n1", "n2"), ("n2", "n3"), ("n3", "n1")] {
            between_nodes(&lab, kind, a, b)?;
        }
        holder_killed(&lab, kind)?;
        println!("locks: {kind:?} between all nodes, and after a holder's death");
    }
    byte_ranges(&lab)?;
    node_crash(&lab)?;
    lab.finish()
}

/// Ranges split and stay apart; flock and POSIX locks do not see each other.
fn byte_ranges(lab: &Lab) -> anyhow::Result<()> {
    use LockMode::{Exclusive, Shared, Unlock};
    let (mut first, mut second) = (open(lab, "n1", "ranges")?, open(lab, "n3", "ranges")?);
    expect(&mut first, &range(Exclusive, 0, 100), &Reply::Done)?;
    expect(&mut first, &range(Unlock, 40, 20), &Reply::Done)?;
    expect(&mut second, &range(Exclusive, 40, 20), &Reply::Done)?;
    expect(&mut second, &range(Shared, 39, 1), &AGAIN)?;
    expect(&mut second, &range(Shared, 60, 1), &AGAIN)?;
    expect(&mut second, &range(Exclusive, 100, 0), &Reply::Done)?;
    expect(&mut first, &range(Exclusive, 1 << 40, 1), &AGAIN)?;
    expect(&mut second, &lock(LockKind::Flock, Exclusive, false), &Reply::Done)?;
    first.stop()?;
    second.stop()
}

/// A node that crashes loses its locks, but not before its session is over.
fn node_crash(lab: &Lab) -> anyhow::Result<()> {
    let (mut holder, mut waiter) = (open(lab, "n1", "crash")?, open(lab, "n3", "crash")?);
    expect(&mut holder, &lock(LockKind::Posix, LockMode::Exclusive, false), &Reply::Done)?;
    waiter.send(&lock(LockKind::Posix, LockMode::Exclusive, true))?;
    lab.lab("crash", &["n1"])?;
    let granted = waiter.answer(HOLDER_DEATH)?.context("a crashed node keeps its lock for ever")?;
    ensure!(granted == Reply::Done, "after the node's crash: {granted:?}");
    waiter.stop()?;
    lab.lab("restart", &["n1"])?;
    lab.wait_mode("n1", "direct").map(drop)
}

#[test]
fn qemu_refuses_an_image_open_on_another_node() -> anyhow::Result<()> {
    let lab = Lab::up("qemu")?;
    let image = format!("{MOUNT}/vm.img");
    lab.sh("n1", &format!("truncate -s 64M {image}"))?;
    let drive = format!("file={image},format=raw,cache=none,if=none,id=d0");
    let mut machine =
        vec!["qemu-system-x86_64", "-machine", "q35", "-accel", "tcg", "-m", "64", "-S", "-nodefaults"];
    // Without a device on the drive QEMU does not lock for writing.
    machine.extend(["-display", "none", "-drive", &drive, "-device", "virtio-blk-pci,drive=d0"]);
    let monitor = ["-monitor", "stdio"];
    let mut command = lab.command("n1");
    command.args(&machine).args(monitor).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut first = command.spawn().context("starting qemu on n1")?;
    let mut input = first.stdin.take().context("qemu without standard input")?;
    let output = first.stdout.take().context("qemu without standard output")?;
    // The monitor greets before the drive is open, but answers a question only afterwards.
    std::io::Write::write_all(&mut input, b"info block\n")?;
    let mut lines = std::io::BufRead::lines(std::io::BufReader::new(output)).map_while(Result::ok);
    ensure!(lines.any(|line| line.contains(&image)), "qemu on n1 did not open {image}");

    let second = lab.exec("n3", &[&machine[..], &["-monitor", "none"]].concat(), Duration::from_secs(20));
    let text = match second {
        Ok(ended) => ended.failed("qemu on n3 with the image of n1")?,
        Err(error) => anyhow::bail!("qemu on n3 opened an image that is open on n1: {error:#}"),
    };
    ensure!(
        text.contains("lock\nIs another process") || text.contains("\"write\" lock"),
        "qemu on n3 failed for another reason: {text}"
    );
    println!("locks: qemu on n3 says {}", text.trim());

    std::io::Write::write_all(&mut input, b"quit\n")?;
    ensure!(wait::exit_within(&mut first, GRANTED)?.is_some(), "qemu on n1 did not quit");
    // Free again.
    let mut again = lab.command("n3");
    let script = format!("echo quit | {} -monitor stdio", machine.join(" "));
    wait::run(again.args(["sh", "-c", &script]), Duration::from_secs(30))?
        .ok("qemu on n3 after n1 has quit")?;
    lab.finish()
}

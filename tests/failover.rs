//! The volume's coordinator moves: because its node loses power, because somebody wants it, because of whatever happens at
//! random. Meanwhile other nodes work: one reads and overwrites directly, and everybody calls for metadata. Nobody sees
//! an error. How long things stood still is measured and printed; only what no machine excuses fails here.

use anyhow::{Context as _, bail, ensure};
use csv_tests::driver::{Driver, Node as _};
use csv_tests::lab::{Lab, MOUNT, VOLUME};
use csv_tests::membership::{kill_csvd, start_csvd};
use csv_tests::model::Model;
use csv_tests::node_agent::NodeAgent;
use csv_tests::ops::{How, Op, Reply};
use csv_tests::rng::{self, Rng};
use csv_tests::wait;
use std::process::{Child, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

const DEADLINE: Duration = Duration::from_secs(120);
/// A stand-still of metadata longer than this is a fault on any machine.
const OUTAGE_MAX: Duration = Duration::from_secs(45);

fn rounds(quick: u32, full: u32) -> u32 {
    if csv_tests::full() { full } else { quick }
}

/// fio on one node, direct, which checks what it wrote.
struct Direct {
    fio: Child,
    log: tempfile::NamedTempFile,
}

impl Direct {
    fn start(lab: &Lab, node: &str) -> anyhow::Result<Direct> {
        let file = format!("{MOUNT}/direct-{node}.img");
        lab.sh(
            node,
            &format!("dd if=/dev/zero of={file} bs=1M count=64 oflag=direct conv=fsync status=none"),
        )?;
        let log = tempfile::NamedTempFile::new()?;
        let mut command = lab.command(node);
        command
            .args(["fio", "--name=direct", "--ioengine=libaio", "--direct=1", "--rw=randrw", "--bs=4k"])
            .args(["--iodepth=4", "--size=64m", "--fallocate=none", "--time_based", "--runtime=3600"])
            .args(["--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0", "--verify_backlog=256"])
            .args(["--rate_iops=500,500", "--output-format=json", "--allow_file_create=0"])
            .arg(format!("--filename={file}"))
            .stdin(Stdio::null())
            .stdout(log.reopen()?)
            .stderr(Stdio::null());
        Ok(Direct { fio: command.spawn().context("starting fio")?, log })
    }

    /// Ends it. The longest that one read or write took, in milliseconds.
    fn end(mut self) -> anyhow::Result<f64> {
        let pid = nix::unistd::Pid::from_raw(i32::try_from(self.fio.id())?);
        let running = self.fio.try_wait()?.is_none();
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGINT).ok();
        let status = wait::exit_within(&mut self.fio, DEADLINE)?;
        let text = std::fs::read_to_string(self.log.path())?;
        ensure!(running, "fio ended before its time:\n{text}");
        let json: serde_json::Value =
            serde_json::from_str(&text[text.find('{').context("no JSON from fio")?..])
                .with_context(|| format!("fio ({status:?}) says:\n{text}"))?;
        let job = &json["jobs"][0];
        ensure!(job["error"] == 0, "fio saw errors:\n{text}");
        let slowest = |what: &str| job[what]["lat_ns"]["max"].as_f64().unwrap_or(0.0) / 1e6;
        Ok(slowest("read").max(slowest("write")))
    }
}

/// Metadata calls of one node without a pause: creates, looks, renames, removes.
struct Meta<'a> {
    over: &'a AtomicBool,
    /// When each call began that took over 50 ms, and how long it took.
    slow: &'a Mutex<Vec<(Instant, Duration)>>,
}

impl Meta<'_> {
    fn run(&self, mut agent: NodeAgent, tag: &str) -> anyhow::Result<u64> {
        let mut calls = 0;
        let how = How { create: true, ..How::default() };
        while !self.over.load(Ordering::Relaxed) {
            let (name, other) = (format!("{tag}-{}", calls % 97), format!("{tag}-moved"));
            let ops = [
                Op::Open { slot: 1, name: name.clone(), how },
                // What is to be found after a crash has to be on the disk before it.
                Op::Sync { slot: 1 },
                Op::Close { slot: 1 },
                Op::Stat { name: name.clone() },
                Op::Open { slot: 2, name, how },
                Op::Close { slot: 2 },
                Op::Stat { name: other },
            ];
            for op in &ops {
                let began = Instant::now();
                let reply = agent.call(op)?;
                let took = began.elapsed();
                calls += 1;
                if took > Duration::from_millis(50) {
                    self.slow.lock().map_err(|_| anyhow::anyhow!("poisoned"))?.push((began, took));
                }
                let absent = matches!((op, &reply), (Op::Stat { .. }, Reply::Failed { errno: libc::ENOENT }));
                if let Reply::Failed { errno } = reply
                    && !absent
                {
                    bail!("{op:?} failed with {errno} after {} ms", took.as_millis());
                }
            }
        }
        agent.stop()?;
        Ok(calls)
    }
}

/// A file that n1 makes longer without fsync, so that its size is known to the coordinator and not durable. A coordinator
/// that loses power takes nothing of it along.
struct Growing {
    writer: NodeAgent,
    reader: NodeAgent,
    size: u64,
}

impl Growing {
    const STEP: u64 = 300_000;

    fn start(lab: &Lab) -> anyhow::Result<Growing> {
        let (writer, reader) = (NodeAgent::start(lab, "n1", MOUNT)?, NodeAgent::start(lab, "n3", MOUNT)?);
        let mut growing = Growing { writer, reader, size: 0 };
        growing.open(0)?;
        Ok(growing)
    }

    fn done(&mut self, op: &Op) -> anyhow::Result<()> {
        let reply = self.writer.call(op)?;
        ensure!(!matches!(reply, Reply::Failed { .. }), "{op:?}: {reply:?}");
        Ok(())
    }

    fn open(&mut self, slot: u32) -> anyhow::Result<()> {
        let how = How { create: true, ..How::default() };
        self.done(&Op::Open { slot, name: "growing".into(), how })
    }

    fn grow(&mut self, seed: u64) -> anyhow::Result<()> {
        self.done(&Op::Write { slot: 0, offset: self.size, len: Self::STEP, seed })?;
        self.size += Self::STEP;
        // The end of one of its opens commits the size.
        self.open(1)?;
        self.done(&Op::Close { slot: 1 })
    }

    fn check(&mut self) -> anyhow::Result<()> {
        self.done(&Op::Sync { slot: 0 })?;
        let how = How::default();
        let opened = self.reader.call(&Op::Open { slot: 0, name: "growing".into(), how })?;
        ensure!(!matches!(opened, Reply::Failed { .. }), "opening on n3: {opened:?}");
        let read = Op::Read { slot: 0, offset: 0, len: self.size + 1 };
        let (there, here) = (self.reader.call(&read)?, self.writer.call(&read)?);
        self.reader.call(&Op::Close { slot: 0 })?;
        let Reply::Data { hex } = &here else { bail!("reading on n1: {here:?}") };
        ensure!(
            u64::try_from(hex.len() / 2)? == self.size,
            "{} bytes are left of {}",
            hex.len() / 2,
            self.size
        );
        ensure!(there == here, "n3 reads something else than n1");
        Ok(())
    }

    fn end(self) -> anyhow::Result<()> {
        self.writer.stop()?;
        self.reader.stop()
    }
}

/// Runs `act` under the load of n1 and n3. Gives the slowest direct I/O of n1 in milliseconds.
fn under_load(
    lab: &Lab,
    slow: &Mutex<Vec<(Instant, Duration)>>,
    act: impl FnOnce() -> anyhow::Result<()>,
) -> anyhow::Result<f64> {
    let direct = Direct::start(lab, "n1")?;
    let dir = format!("{MOUNT}/meta");
    lab.sh("n1", &format!("mkdir -p {dir}"))?;
    let over = AtomicBool::new(false);
    let worked = std::thread::scope(|scope| {
        let load = |node: &'static str| {
            let meta = Meta { over: &over, slow };
            let agent = NodeAgent::start(lab, node, &dir);
            scope
                .spawn(move || agent.and_then(|agent| meta.run(agent, node)).with_context(|| node.to_owned()))
        };
        let loads = [load("n1"), load("n3")];
        let acted = act();
        over.store(true, Ordering::Relaxed);
        let mut calls = 0;
        for load in loads {
            calls += load.join().map_err(|_| anyhow::anyhow!("a load panicked"))??;
        }
        acted.map(|()| calls)
    });
    let slowest = direct.end();
    let calls = worked?;
    println!("load: {calls} metadata calls, none failed");
    slowest
}

fn longest_since(slow: &Mutex<Vec<(Instant, Duration)>>, since: Instant) -> Duration {
    let slow = slow.lock().map(|slow| slow.clone()).unwrap_or_default();
    slow.iter()
        .filter(|(began, took)| *began + *took > since)
        .map(|(_, took)| *took)
        .max()
        .unwrap_or_default()
}

/// The coordinator's node loses power again and again.
#[test]
fn coordinator_crashes() -> anyhow::Result<()> {
    let rounds = rounds(4, 20);
    let lab = Lab::up_with("crash", "ext4", &["--size", "2G", "--all-paths"])?;
    let slow = Mutex::default();
    let mut outages = Vec::new();
    let mut growing = Growing::start(&lab)?;
    let slowest = under_load(&lab, &slow, || {
        for round in 0..rounds {
            ensure!(lab.owner("n1")? == "n2", "n2 does not coordinate");
            growing.grow(round.into())?;
            let epoch = lab.state("n1")?.epoch;
            let began = Instant::now();
            lab.lab("crash", &["n2"])?;
            wait::until("a new coordinator", OUTAGE_MAX, || {
                Ok((lab.state("n1")?.epoch > epoch && lab.state("n3")?.epoch > epoch).then_some(()))
            })?;
            lab.lab("restart", &["n2"])?;
            lab.wait_mode("n2", "direct")?;
            outages.push(longest_since(&slow, began));
            growing.check()?;
            lab.move_volume("n2")?;
        }
        Ok(())
    })?;
    growing.end()?;
    outages.sort_unstable();
    let ms: Vec<u128> = outages.iter().map(Duration::as_millis).collect();
    let median = ms.get(ms.len() / 2).copied().unwrap_or_default();
    println!(
        "coordinator_crashes: {rounds} power cuts, metadata stood still for {median} ms (median), {} ms (worst) of \
         {ms:?}; slowest direct I/O {slowest:.0} ms",
        ms.last().copied().unwrap_or_default()
    );
    ensure!(outages.last().is_some_and(|worst| *worst < OUTAGE_MAX), "an outage took too long");
    lab.finish()
}

/// Planned moves under load, one after the other.
#[test]
fn planned_moves() -> anyhow::Result<()> {
    let moves = rounds(12, 50);
    let lab = Lab::up_with("moves", "ext4", &["--size", "2G", "--all-paths"])?;
    let slow = Mutex::default();
    let began = Instant::now();
    let slowest = under_load(&lab, &slow, || {
        for number in 0..moves {
            let to = ["n3", "n1", "n2"][usize::try_from(number)? % 3];
            lab.move_volume(to)?;
        }
        Ok(())
    })?;
    let longest = longest_since(&slow, began).as_millis();
    println!(
        "planned_moves: {moves} moves, longest metadata call {longest} ms, slowest direct I/O {slowest:.0} ms"
    );
    lab.finish()
}

/// What can happen to the cluster. Whatever is taken away is given back by the same call, so nothing is done by hand
/// between. Before a node loses what it has not written, everything is synced: what was acknowledged without that may
/// be lost with its memory, as on any file system.
fn strike(lab: &Lab, rng: &mut Rng, sync: &mut dyn FnMut() -> anyhow::Result<()>) -> anyhow::Result<String> {
    let n2_back = || -> anyhow::Result<()> {
        wait::until("n2 to be back", DEADLINE, || {
            Ok((["direct", "block-redirected"].contains(&lab.state("n2")?.mode.as_str())).then_some(()))
        })
    };
    match rng.below(9) {
        0 => {
            sync()?;
            lab.lab("crash", &["n2"])?;
            lab.lab("restart", &["n2"])?;
            n2_back()?;
            Ok("power of n2".into())
        }
        1 => {
            lab.sh("n2", &format!("kill -KILL $(cat /run/csv/{VOLUME}.pid)"))?;
            n2_back()?;
            Ok("csvfs of n2".into())
        }
        2 => {
            let node = ["n1", "n2", "n3"][rng.index(3)];
            kill_csvd(lab, node)?;
            start_csvd(lab, node)?;
            wait::until(&format!("csvd of {node}"), DEADLINE, || lab.state(node).map(Some))?;
            Ok(format!("csvd of {node}"))
        }
        3 => {
            sync()?;
            lab.lab("partition", &["n2"])?;
            // Longer than it takes to be given up.
            std::thread::sleep(Duration::from_millis(500 + rng.below(5000)));
            lab.lab("heal", &[])?;
            n2_back()?;
            Ok("network of n2".into())
        }
        4 => {
            sync()?;
            lab.sh("n2", "pkill -STOP -x 'csvd|csvfs'")?;
            std::thread::sleep(Duration::from_millis(500 + rng.below(4000)));
            lab.sh("n2", "pkill -CONT -x 'csvd|csvfs'")?;
            n2_back()?;
            Ok("n2 freezes".into())
        }
        5 => {
            lab.lab("fail-path", &["n1"])?;
            lab.lab("heal-path", &["n1"])?;
            wait::until("n1 to have its path back", DEADLINE, || {
                Ok((lab.state("n1")?.mode == "direct").then_some(()))
            })?;
            Ok("path of n1".into())
        }
        6 => {
            lab.sh("n2", "pkill -KILL -x smbd || true")?;
            lab.sh("n3", "pkill -KILL -x csv-smbc || true")?;
            Ok("smbd of n2, SMB workers of n3".into())
        }
        _ => {
            let to = ["n1", "n2"][rng.index(2)];
            lab.move_volume(to)?;
            Ok(format!("move to {to}"))
        }
    }
}

/// Random faults from a seed under the coherence driver of n1 and n3.
#[test]
fn random_faults() -> anyhow::Result<()> {
    let (seed, count) = (rng::seed("random_faults"), rounds(15, 100));
    let lab = Lab::up_with("random", "ext4", &["--size", "4G"])?;
    lab.wait_mode("n1", "direct")?;
    let dir = format!("{MOUNT}/random");
    lab.sh("n1", &format!("mkdir {dir}"))?;
    let agents = vec![NodeAgent::start(&lab, "n1", &dir)?, NodeAgent::start(&lab, "n3", &dir)?];
    let mut driver = Driver::new(agents, Model::new(None), seed).without_appends();
    let mut rng = Rng::new(seed ^ 0xfa11);
    for number in 0..count {
        driver.run(30 + rng.below(60), |_| Ok(())).with_context(|| format!("before fault {number}"))?;
        // A volume that n1 coordinates cannot be hurt by what happens to n2.
        if rng.one_in(2) {
            lab.move_volume("n2")?;
        }
        let mut sync = || driver.sync_all();
        let what = strike(&lab, &mut rng, &mut sync).with_context(|| format!("fault {number}"))?;
        println!("fault {number}: {what}");
    }
    driver.run(300, |_| Ok(()))?;
    for agent in driver.into_nodes() {
        agent.stop()?;
    }
    println!("random_faults: {count} faults, seed {seed}");
    lab.finish()
}

//! A lab for one suite: brought up with a name of its own, taken down when the handle is dropped.
//!
//! A failed suite takes its lab down too, unless `CSV_TEST_KEEP=1`. [`Lab::finish`] is the good end: it stops the
//! nodes cleanly, checks the file system on the LUN, and only then takes the lab down.

use crate::wait::{self, Ended};
use crate::{fsck, tools};
use anyhow::{Context as _, bail};
use csv_types::admin::{IoCounts, MapExtent};
use serde::Deserialize;
use std::ffi::OsStr;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// Name of the lab's volume.
pub const VOLUME: &str = "Volume1";
/// Where it is mounted on every node.
pub const MOUNT: &str = "/ClusterStorage/Volume1";

const UP_DEADLINE: Duration = Duration::from_secs(180);
const DOWN_DEADLINE: Duration = Duration::from_secs(120);
/// For commands that only look or switch.
const COMMAND_DEADLINE: Duration = Duration::from_secs(120);
/// A change of mode shows at the next status exchange.
pub const MODE_DEADLINE: Duration = Duration::from_secs(30);

/// A row of `csvctl volume state --json`.
#[derive(Debug, Clone, Deserialize)]
pub struct Row {
    /// Node name.
    pub node: String,
    /// Volume name.
    pub volume: String,
    /// `coordinator` or `data-server`.
    pub role: String,
    /// Kebab-case mode.
    pub mode: String,
    /// Why, in words.
    pub reason: String,
    /// Ownership number.
    pub epoch: u64,
    /// Counts since csvfs started.
    pub io: IoCounts,
}

/// A running lab.
#[derive(Debug)]
pub struct Lab {
    name: String,
    fs: String,
    csvctl: PathBuf,
    dir: PathBuf,
    nodes: Vec<String>,
    env: Vec<(String, String)>,
    up: bool,
    /// One lab at a time on this machine.
    _turn: File,
}

impl Lab {
    /// Three nodes: n2 coordinates, n1 has a path to the LUN, n3 has none.
    ///
    /// # Errors
    /// Not root, csvctl not built, or the lab did not come up.
    pub fn up(suite: &str) -> anyhow::Result<Lab> {
        let fs = std::env::var("CSV_TEST_FS").unwrap_or_else(|_| "ext4".into());
        Lab::up_with(suite, &fs, &["--size", "4G"])
    }

    /// With a file system and more arguments of `csvctl lab up`.
    ///
    /// # Errors
    /// See [`Lab::up`].
    pub fn up_with(suite: &str, fs: &str, args: &[&str]) -> anyhow::Result<Lab> {
        Lab::up_with_env(suite, fs, args, &[])
    }

    /// With an environment for every program of the lab: csvd has it, and passes it on.
    ///
    /// # Errors
    /// See [`Lab::up`].
    pub fn up_with_env(suite: &str, fs: &str, args: &[&str], env: &[(&str, &str)]) -> anyhow::Result<Lab> {
        if !nix::unistd::geteuid().is_root() {
            bail!("the end-to-end suites need root: they make network namespaces, loop devices and mounts");
        }
        let turn = take_turn()?;
        // Names of interfaces and namespaces are made from it, and those are short.
        let name = format!("t{}{}", suite.chars().take(3).collect::<String>(), std::process::id() % 100_000);
        let csvctl = tools::csvctl()?;
        let dir = PathBuf::from("/var/tmp/csv-lab").join(&name);
        let count = args.iter().position(|arg| *arg == "--nodes").and_then(|at| args.get(at + 1));
        let count: usize = count.map_or(Ok(3), |count| count.parse()).context("--nodes")?;
        let nodes = (1..=count).map(|number| format!("n{number}")).collect();
        let env = env.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        let lab = Lab { name, fs: fs.to_owned(), csvctl, dir, nodes, env, up: true, _turn: turn };
        println!("{suite}: lab {} on {fs}", lab.name);
        let mut command = lab.csvctl_command();
        command.args(["lab", "up", "--name", &lab.name, "--fs", fs]).args(args);
        wait::run(&mut command, UP_DEADLINE)?.ok("csvctl lab up")?;
        Ok(lab)
    }

    /// The lab's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Path of csvctl.
    #[must_use]
    pub fn csvctl(&self) -> &PathBuf {
        &self.csvctl
    }

    /// The lab's directory.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The LUN's backing file on this machine.
    #[must_use]
    pub fn lun_image(&self) -> PathBuf {
        self.dir.join("lun.img")
    }

    /// The loop device that is a node's path to the LUN.
    ///
    /// # Errors
    /// The lab's notes do not tell; the node has none.
    pub fn lun_device(&self, node: &str) -> anyhow::Result<PathBuf> {
        #[derive(Deserialize)]
        struct Notes {
            nodes: Vec<NodeNotes>,
        }
        #[derive(Deserialize)]
        struct NodeNotes {
            name: String,
            lun: Option<PathBuf>,
        }
        let notes: Notes = serde_json::from_slice(&std::fs::read(self.dir.join("lab.json"))?)?;
        let node = notes.nodes.into_iter().find(|notes| notes.name == node).and_then(|notes| notes.lun);
        node.context("the node has no path to the LUN")
    }

    fn csvctl_command(&self) -> Command {
        let mut command = Command::new(&self.csvctl);
        command.envs(self.env.iter().map(|(key, value)| (key, value)));
        command
    }

    /// `csvctl lab exec ... node --`, to which a program is added.
    #[must_use]
    pub fn command(&self, node: &str) -> Command {
        let mut command = self.csvctl_command();
        command.args(["lab", "exec", "--name", &self.name, node, "--"]);
        command
    }

    /// Runs a program as on a node, to its end.
    ///
    /// # Errors
    /// It cannot be started or does not end in time. A failure of the program is in the result.
    pub fn exec(&self, node: &str, argv: &[impl AsRef<OsStr>], deadline: Duration) -> anyhow::Result<Ended> {
        wait::run(self.command(node).args(argv), deadline)
    }

    /// Runs a shell script as on a node and gives what it printed.
    ///
    /// # Errors
    /// It failed; with what it printed.
    pub fn sh(&self, node: &str, script: &str) -> anyhow::Result<String> {
        self.exec(node, &["sh", "-ec", script], COMMAND_DEADLINE)?.ok(&format!("{node}: {script}"))
    }

    /// `csvctl lab VERB --name LAB ARGS`.
    ///
    /// # Errors
    /// It failed.
    pub fn lab(&self, verb: &str, args: &[&str]) -> anyhow::Result<String> {
        let mut command = self.csvctl_command();
        command.args(["lab", verb, "--name", &self.name]).args(args);
        wait::run(&mut command, UP_DEADLINE)?.ok(&format!("csvctl lab {verb} {}", args.join(" ")))
    }

    /// csvctl as on a node, found as a user's is: by its name.
    ///
    /// # Errors
    /// It failed.
    pub fn ctl(&self, node: &str, args: &[&str]) -> anyhow::Result<String> {
        let argv: Vec<&str> = std::iter::once("csvctl").chain(args.iter().copied()).collect();
        self.exec(node, &argv, COMMAND_DEADLINE)?.ok(&format!("{node}: csvctl {}", args.join(" ")))
    }

    /// State of all nodes, as seen from one.
    ///
    /// # Errors
    /// csvctl fails or prints something else.
    pub fn state_from(&self, node: &str) -> anyhow::Result<Vec<Row>> {
        let text = self.ctl(node, &["volume", "state", "--json"])?;
        serde_json::from_str(&text).with_context(|| format!("state: {text}"))
    }

    /// A node's own row.
    ///
    /// # Errors
    /// See [`Lab::state_from`]; or the node is missing in its own state.
    pub fn state(&self, node: &str) -> anyhow::Result<Row> {
        let rows = self.state_from(node)?;
        rows.into_iter().find(|row| row.node == node).with_context(|| format!("{node} has no row of its own"))
    }

    /// Waits until a node is in a mode.
    ///
    /// # Errors
    /// Not within [`MODE_DEADLINE`].
    pub fn wait_mode(&self, node: &str, mode: &str) -> anyhow::Result<Row> {
        wait::until(&format!("{node} in mode {mode}"), MODE_DEADLINE, || {
            let row = self.state(node)?;
            if row.mode != mode {
                bail!("it is {} ({})", row.mode, row.reason);
            }
            Ok(Some(row))
        })
    }

    /// Lets a node coordinate the volume, and waits until it does; nothing when it does already.
    ///
    /// # Errors
    /// Refused, or not in effect in time.
    pub fn move_volume(&self, node: &str) -> anyhow::Result<()> {
        wait::until(&format!("{VOLUME} to be moved to {node}"), MODE_DEADLINE, || {
            if self.owner(node)? == node {
                return Ok(Some(()));
            }
            // Refused while something else is being done to the volume.
            let asked = self.ctl(node, &["volume", "move", VOLUME, node]);
            if let Err(error) = &asked {
                println!("moving {VOLUME} to {node}: {error:#}");
            }
            Ok(None)
        })
    }

    /// Who coordinates the volume, as `node` has it; empty when nobody does.
    ///
    /// # Errors
    /// csvctl fails or prints something else.
    pub fn owner(&self, node: &str) -> anyhow::Result<String> {
        #[derive(Deserialize)]
        struct Volume {
            name: String,
            owner: Option<String>,
            state: String,
        }
        let volumes: Vec<Volume> = serde_json::from_str(&self.ctl(node, &["volume", "list", "--json"])?)?;
        let online = volumes.into_iter().find(|v| v.name == VOLUME && v.state == "Online");
        Ok(online.and_then(|v| v.owner).unwrap_or_default())
    }

    /// Switches fs-redirection of a node and waits for it.
    ///
    /// # Errors
    /// Refused, or not in effect in time.
    pub fn redirect(&self, node: &str, on: bool) -> anyhow::Result<()> {
        let word = if on { "on" } else { "off" };
        self.ctl(node, &["volume", "redirect", word, "--volume", VOLUME, "--node", node])?;
        wait::until(&format!("redirect {word} on {node}"), MODE_DEADLINE, || {
            Ok(((self.state(node)?.mode == "fs-redirected") == on).then_some(()))
        })
    }

    /// Where a file (relative to the mount point) lies on the LUN.
    ///
    /// # Errors
    /// csvctl fails or prints something else.
    pub fn map(&self, node: &str, path: &str) -> anyhow::Result<Vec<MapExtent>> {
        let text = self.ctl(node, &["volume", "map", &format!("{MOUNT}/{path}"), "--json"])?;
        serde_json::from_str(&text).with_context(|| format!("map of {path}: {text}"))
    }

    /// Bytes received and sent on the node's network, without loopback.
    ///
    /// # Errors
    /// The node's `/proc/net/dev` cannot be read.
    pub fn network_bytes(&self, node: &str) -> anyhow::Result<u64> {
        let text = self.sh(node, "cat /proc/net/dev")?;
        parse_network_bytes(&text).with_context(|| format!("/proc/net/dev of {node}: {text}"))
    }

    /// Stops every node cleanly (data servers first), checks the file system, takes the lab down.
    ///
    /// # Errors
    /// A node does not stop, the file system is not clean, or something is left behind.
    pub fn finish(mut self) -> anyhow::Result<()> {
        // Data servers first, so that the coordinator has nothing to take back.
        let others = self.nodes.iter().filter(|node| *node != "n2");
        for node in others.chain(self.nodes.iter().filter(|node| *node == "n2")) {
            self.lab("stop", &[node])?;
        }
        fsck::check(&self.lun_image(), &self.fs)?;
        self.down()
    }

    fn down(&mut self) -> anyhow::Result<()> {
        self.up = false;
        let mut command = Command::new(&self.csvctl);
        command.args(["lab", "down", "--name", &self.name]);
        wait::run(&mut command, DOWN_DEADLINE)?.ok("csvctl lab down")?;
        Ok(())
    }

    /// Names of the nodes.
    #[must_use]
    pub fn nodes(&self) -> &[String] {
        &self.nodes
    }
}

/// Of each log of a suite that failed, so much is printed, in lines. What differs from an earlier line only in the time
/// (the first word) counts once.
const LOG_TAIL: usize = 100;

fn print_log_tails(dir: &Path, nodes: &[String]) {
    for node in nodes {
        for log in ["csvd.log", "node.log"] {
            let Ok(text) = std::fs::read_to_string(dir.join(node).join("log").join(log)) else { continue };
            let mut seen = std::collections::HashSet::new();
            let lines: Vec<&str> = text
                .lines()
                .filter(|line| seen.insert(line.split_once(' ').map_or(*line, |(_, rest)| rest)))
                .collect();
            println!("--- {node}: end of {log}");
            lines[lines.len().saturating_sub(LOG_TAIL)..].iter().for_each(|line| println!("{line}"));
        }
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if !self.up {
            return;
        }
        print_log_tails(&self.dir, &self.nodes);
        if std::env::var_os("CSV_TEST_KEEP").is_some() {
            println!("lab {} is left up; csvctl lab down --name {}", self.name, self.name);
        } else if let Err(error) = self.down() {
            println!("taking lab {} down: {error:#}", self.name);
        }
    }
}

/// Waits for this suite's turn; the lock goes when the file is closed, also when the process dies. It is on a directory
/// that is there anyhow, so nothing is left behind.
fn take_turn() -> anyhow::Result<File> {
    let path = Path::new("/var/tmp");
    let dir = File::open(path).with_context(|| format!("opening {}", path.display()))?;
    rustix::fs::flock(&dir, rustix::fs::FlockOperation::LockExclusive)
        .with_context(|| format!("locking {}", path.display()))?;
    Ok(dir)
}

fn parse_network_bytes(text: &str) -> Option<u64> {
    let mut sum = 0;
    for line in text.lines().filter_map(|line| line.split_once(':')) {
        let (name, counters) = line;
        let counters: Vec<u64> = counters.split_ascii_whitespace().map_while(|n| n.parse().ok()).collect();
        if name.trim() != "lo" && counters.len() >= 9 {
            sum += counters[0] + counters[8];
        }
    }
    (sum > 0).then_some(sum)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn network_bytes_leave_loopback_out() {
        let text = "Inter-|   Receive                |  Transmit\n face |bytes packets errs drop fifo frame\n\
                    lo: 999 1 0 0 0 0 0 0 999 1 0 0 0 0 0 0\n  eth0: 100 2 0 0 0 0 0 0 30 1 0 0 0 0 0 0\n";
        assert_eq!(parse_network_bytes(text), Some(130));
        assert_eq!(parse_network_bytes("lo: 1 1 0 0 0 0 0 0 1 1 0 0 0 0 0 0\n"), None);
    }
}

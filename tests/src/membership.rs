//! What the suites about membership need besides a lab: csvd alone, raw requests, and a machine that joins by itself.

use crate::lab::Lab;
use crate::wait;
use anyhow::{Context as _, ensure};
use csv_net::{JoinError, JoinGrant, JoinOptions, JoinRequest, Token};
use nix::sched::{CloneFlags, setns};
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

const DEADLINE: Duration = Duration::from_secs(60);

/// Kills csvd of a node, and nothing else of it.
///
/// # Errors
/// It does not end.
pub fn kill_csvd(lab: &Lab, node: &str) -> anyhow::Result<()> {
    // A node is a PID namespace of its own.
    lab.sh(node, "pkill -KILL -x csvd")?;
    wait::until(&format!("csvd of {node} to end"), DEADLINE, || {
        Ok(lab.sh(node, "pgrep -x csvd || true")?.trim().is_empty().then_some(()))
    })
}

/// Starts csvd of a node, and waits until it answers.
///
/// # Errors
/// It does not.
pub fn start_csvd(lab: &Lab, node: &str) -> anyhow::Result<()> {
    let csvd = lab.csvctl().with_file_name("csvd");
    let log = lab.dir().join(node).join("log/csvd.log");
    let script = format!(
        "setsid --fork {} --config /etc/csv/csv.toml </dev/null >>{} 2>&1",
        csvd.display(),
        log.display()
    );
    lab.sh(node, &script)?;
    wait::until(&format!("csvd of {node} to answer"), DEADLINE, || {
        Ok(lab.ctl(node, &["events", "--local"]).is_ok().then_some(()))
    })
}

/// Sends csvd of a node a request as JSON, and gives its answer.
///
/// # Errors
/// It cannot be asked, or refuses.
pub fn ask(lab: &Lab, node: &str, request: &Value) -> anyhow::Result<Value> {
    let answer = answer(lab, node, request)?;
    ensure!(answer["answer"] != "error", "{request}: {answer}");
    Ok(answer)
}

/// As [`ask`], with the answer that it refuses, too.
///
/// # Errors
/// It cannot be asked.
pub fn answer(lab: &Lab, node: &str, request: &Value) -> anyhow::Result<Value> {
    let pid = std::fs::read_to_string(lab.dir().join(node).join("holder.pid"))?;
    let socket = format!("/proc/{}/root/run/csv/csvd.sock", pid.trim());
    let mut stream = UnixStream::connect(&socket).with_context(|| format!("connecting to {socket}"))?;
    stream.set_read_timeout(Some(DEADLINE))?;
    writeln!(stream, "{request}")?;
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line)?;
    serde_json::from_str(&line).with_context(|| format!("answer: {line}"))
}

/// Names and numbers of all nodes, as one has them.
///
/// # Errors
/// csvctl fails or prints something else.
pub fn numbers(lab: &Lab, from: &str) -> anyhow::Result<BTreeMap<String, u64>> {
    let nodes: Vec<Value> = serde_json::from_str(&lab.ctl(from, &["node", "list", "--json"])?)?;
    nodes
        .iter()
        .map(|node| {
            let name = node["name"].as_str().context("a node without name")?;
            Ok((name.to_owned(), node["id"].as_u64().context("a node without number")?))
        })
        .collect()
}

/// State of a node, as another one has it; empty when it is none.
///
/// # Errors
/// csvctl fails or prints something else.
pub fn state_of(lab: &Lab, from: &str, node: &str) -> anyhow::Result<String> {
    let nodes: Vec<Value> = serde_json::from_str(&lab.ctl(from, &["node", "list", "--json"])?)?;
    let found = nodes.iter().find(|row| row["name"] == node);
    Ok(found.and_then(|row| row["state"].as_str()).unwrap_or_default().to_owned())
}

/// Waits until a node is in that state.
///
/// # Errors
/// Not in time.
pub fn wait_state(lab: &Lab, from: &str, node: &str, state: &str) -> anyhow::Result<()> {
    wait::until(&format!("{node} to be {state}"), DEADLINE, || {
        let now = state_of(lab, from, node)?;
        ensure!(now == state, "it is {now}");
        Ok(Some(()))
    })
}

/// Asks to join as a machine on the network of `node`, saying what the request says.
///
/// # Errors
/// The network cannot be entered. What the cluster answers is in the result.
pub fn join_as(
    lab: &Lab,
    node: &str,
    token: &Token,
    request: JoinRequest,
    options: &JoinOptions,
) -> anyhow::Result<Result<JoinGrant, JoinError>> {
    let namespace = File::open(format!("/run/netns/csv-{}-{node}", lab.name()))?;
    // A thread enters the namespace and ends with it; the runtime stays on that thread.
    std::thread::scope(|scope| {
        let asked = scope.spawn(|| {
            setns(&namespace, CloneFlags::CLONE_NEWNET).context("entering the network namespace")?;
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            Ok(runtime.block_on(csv_net::join(token, request, options)))
        });
        asked.join().map_err(|_| anyhow::anyhow!("the joining thread panicked"))?
    })
}

/// A small file system in memory in place of a directory of a node that is down. What was in the directory is copied
/// there, and back at the end.
#[derive(Debug)]
pub struct Small {
    dir: PathBuf,
}

impl Small {
    /// `size` as tmpfs takes it.
    ///
    /// # Errors
    /// It cannot be mounted, or is too small for what is there.
    pub fn under(dir: &Path, size: &str) -> anyhow::Result<Small> {
        let at = dir.display();
        let script = format!(
            "mv {at} {at}.kept; mkdir -m 700 {at}; mount -t tmpfs -o size={size},mode=700 csv-test {at}; cp -a {at}.kept/. {at}/"
        );
        let small = Small { dir: dir.to_owned() };
        wait::run(Command::new("sh").args(["-ec", &script]), DEADLINE)?.ok(&script)?;
        Ok(small)
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let at = self.dir.display();
        let script =
            format!("rm -rf {at}.kept; cp -a {at} {at}.kept; umount -l {at}; rm -rf {at}; mv {at}.kept {at}");
        let ended = wait::run(Command::new("sh").args(["-ec", &script]), DEADLINE);
        if let Err(error) = ended.and_then(|ended| ended.ok(&script)) {
            println!("taking the small file system at {at} away: {error:#}");
        }
    }
}

//! What the benchmark needs of a lab: which nodes play which part, running a program as on a node, switching
//! redirection. Everything goes through csvctl's own command line, as a user would do it.

use anyhow::{Context as _, bail};
use csv_types::admin::MapExtent;
use csv_types::config::Config;
use serde::Deserialize;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

/// Redirection takes effect at the next status exchange; this is far more.
const MODE_WAIT: Duration = Duration::from_secs(30);
/// Between two looks at the state.
const MODE_POLL: Duration = Duration::from_millis(100);
/// Name of a lab that is brought up for the benchmark alone.
const OWN_NAME: &str = "bench";

/// A row of `csvctl volume state --json`, as far as it is needed here.
#[derive(Debug, Clone, Deserialize)]
pub(super) struct StateRow {
    pub(super) node: String,
    pub(super) volume: String,
    pub(super) role: String,
    pub(super) mode: String,
}

/// A lab and the parts of its nodes.
#[derive(Debug)]
pub(super) struct BenchLab {
    program: PathBuf,
    name: String,
    /// Brought up here, so taken down here.
    own: bool,
    pub(super) volume: String,
    pub(super) coordinator: String,
    pub(super) direct: Option<String>,
    pub(super) block_redirected: Option<String>,
}

impl BenchLab {
    /// Takes the named lab, or the running one, or brings one up.
    pub(super) fn open(name: Option<&str>) -> anyhow::Result<BenchLab> {
        let program = std::env::current_exe().context("finding csvctl's own path")?;
        let (name, own) = match name {
            Some(name) => (name.to_owned(), false),
            None => match &running(&program)?[..] {
                [only] => (only.clone(), false),
                [] => (up(&program)?, true),
                several => {
                    bail!("{} labs run ({}); choose one with --lab", several.len(), several.join(", "))
                }
            },
        };
        let mut lab = BenchLab {
            program,
            name,
            own,
            volume: String::new(),
            coordinator: String::new(),
            direct: None,
            block_redirected: None,
        };
        match lab.find_parts() {
            Ok(()) => Ok(lab),
            Err(error) => {
                lab.close().ok();
                Err(error)
            }
        }
    }

    /// Takes the lab down when it was brought up here.
    pub(super) fn close(&self) -> anyhow::Result<()> {
        if self.own {
            run(Command::new(&self.program).args(["lab", "down", "--name", &self.name]))?;
        }
        Ok(())
    }

    fn find_parts(&mut self) -> anyhow::Result<()> {
        let rows = self.state("n1")?;
        let owner = rows.iter().find(|row| row.role == "coordinator");
        let owner = owner.with_context(|| format!("lab {}: no node is the coordinator", self.name))?;
        self.volume.clone_from(&owner.volume);
        self.coordinator.clone_from(&owner.node);
        let data_server = |mode: &str| {
            let row =
                rows.iter().find(|r| r.volume == owner.volume && r.role != "coordinator" && r.mode == mode);
            row.map(|row| row.node.clone())
        };
        self.direct = data_server("direct");
        self.block_redirected = data_server("block-redirected");
        Ok(())
    }

    /// The state of every node, as seen from `node`.
    pub(super) fn state(&self, node: &str) -> anyhow::Result<Vec<StateRow>> {
        let text = self.ctl(node, &["volume", "state", "--json"])?;
        serde_json::from_str(&text)
            .with_context(|| format!("reading the volume state of lab {}: {text}", self.name))
    }

    /// Runs a program as on a node and gives its standard output.
    pub(super) fn exec(&self, node: &str, argv: &[impl AsRef<std::ffi::OsStr>]) -> anyhow::Result<String> {
        let mut command = Command::new(&self.program);
        command.args(["lab", "exec", "--name", &self.name, node, "--"]).args(argv);
        run(&mut command)
    }

    /// Runs csvctl itself as on a node.
    pub(super) fn ctl(&self, node: &str, args: &[&str]) -> anyhow::Result<String> {
        let mut argv = vec![self.program.as_os_str()];
        argv.extend(args.iter().map(std::ffi::OsStr::new));
        self.exec(node, &argv)
    }

    /// Where the volume is mounted on every node.
    pub(super) fn mount_point(&self) -> String {
        format!("/ClusterStorage/{}", self.volume)
    }

    /// The LUN's device on a node.
    pub(super) fn lun(&self, node: &str) -> anyhow::Result<String> {
        let config = Config::parse(&self.exec(node, &["cat", "/run/csv/csv.toml"])?)?;
        let lun = config.volume(&self.volume).and_then(|volume| volume.lun.clone());
        let lun = lun.with_context(|| format!("node {node} has no path to the LUN of {}", self.volume))?;
        Ok(lun.to_string_lossy().into_owned())
    }

    /// Where a file of the volume lies on the LUN; by its path below the mount point.
    pub(super) fn map(&self, path: &str) -> anyhow::Result<Vec<MapExtent>> {
        let path = format!("{}/{path}", self.mount_point());
        let text = self.ctl(&self.coordinator, &["volume", "map", &path, "--json"])?;
        serde_json::from_str(&text).with_context(|| format!("reading the map of {path}: {text}"))
    }

    /// Switches a node's redirection and waits until its state says so.
    pub(super) fn redirect(&self, node: &str, on: bool) -> anyhow::Result<()> {
        let word = if on { "on" } else { "off" };
        self.ctl(node, &["volume", "redirect", word, "--volume", &self.volume, "--node", node])?;
        let deadline = Instant::now() + MODE_WAIT;
        loop {
            let rows = self.state(node)?;
            let row = rows.iter().find(|row| row.node == node && row.volume == self.volume);
            let mode = row.map_or("unknown", |row| row.mode.as_str());
            if (mode == "fs-redirected") == on {
                return Ok(());
            }
            if Instant::now() > deadline {
                bail!("node {node} is still {mode} {} s after redirect {word}", MODE_WAIT.as_secs());
            }
            std::thread::sleep(MODE_POLL);
        }
    }
}

fn up(program: &PathBuf) -> anyhow::Result<String> {
    // Without --prealloc the host file system would allocate during the first writes, and the raw job would pay.
    run(Command::new(program).args(["lab", "up", "--name", OWN_NAME, "--size", "6G", "--prealloc"]))?;
    Ok(OWN_NAME.to_owned())
}

/// Names of the labs that run.
fn running(program: &PathBuf) -> anyhow::Result<Vec<String>> {
    let text = run(Command::new(program).args(["lab", "list", "--json"]))?;
    let labs: Vec<serde_json::Value> =
        serde_json::from_str(&text).with_context(|| format!("reading the list of labs: {text}"))?;
    let name = |lab: &serde_json::Value| {
        let name = lab.as_str().or_else(|| lab.get("name").and_then(serde_json::Value::as_str));
        name.map(str::to_owned)
    };
    Ok(labs.iter().filter_map(name).collect())
}

/// Runs to the end; a failure carries the command and what it printed.
fn run(command: &mut Command) -> anyhow::Result<String> {
    let output: Output =
        command.stdin(Stdio::null()).output().with_context(|| format!("running {}", line(command)))?;
    if !output.status.success() {
        let error = String::from_utf8_lossy(&output.stderr);
        let text = String::from_utf8_lossy(&output.stdout);
        bail!("{}: {}\n{}\n{}", line(command), output.status, error.trim(), last_lines(&text, 10));
    }
    String::from_utf8(output.stdout).with_context(|| format!("output of {}", line(command)))
}

fn line(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ")
}

fn last_lines(text: &str, count: usize) -> String {
    let lines: Vec<&str> = text.trim().lines().collect();
    lines[lines.len().saturating_sub(count)..].join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_command_is_told_with_its_words() {
        let error =
            run(Command::new("sh").args(["-c", "echo seen; echo why >&2; exit 3"])).unwrap_err().to_string();
        for word in ["sh -c", "3", "why", "seen"] {
            assert!(error.contains(word), "{word} in {error}");
        }
        assert_eq!(run(Command::new("echo").arg("x")).unwrap(), "x\n");
        assert_eq!(last_lines("a\nb\nc\n", 2), "b\nc");
    }
}

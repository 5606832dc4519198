//! Memory that an open file costs: how much the node's csvfs grows when so many files are opened and read. It runs
//! inside a node (`csvctl bench memory DIR open N`), because a process can be looked at by its name only there.

use super::Plan;
use super::jobs::ModeName;
use super::lab::BenchLab;
use anyhow::{Context as _, bail};
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::Write as _;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

/// Each file holds one block, so that its layout is held too.
const FILE_BYTES: usize = 4096;

/// Files opened to see what an open file costs.
const FILES: u64 = 1000;

/// What an open file costs csvfs on the coordinator and on the direct node. Says little on a node whose csvfs has
/// served a heavy load before: memory freed after that is used again without the process growing.
pub(super) fn of_nodes(lab: &BenchLab, plan: &Plan, dir: &str) -> anyhow::Result<Vec<(ModeName, u64)>> {
    let mut result = Vec::new();
    for mode in [ModeName::Coordinator, ModeName::Direct] {
        let node = if mode == ModeName::Direct { lab.direct.as_ref() } else { Some(&lab.coordinator) };
        let Some(node) = node.filter(|_| plan.modes.contains(&mode)) else { continue };
        let others = [lab.block_redirected.as_ref(), Some(&lab.coordinator), lab.direct.as_ref()];
        // Making files takes memory too, so another node does it.
        let maker = others.into_iter().flatten().find(|other| *other != node).unwrap_or(node);
        let step = |on: &str, part: &str, step: &str| {
            let dir = format!("{dir}/memory-{mode}-{part}");
            let text = lab.ctl(on, &["bench", "memory", &dir, step, &FILES.to_string()]);
            text.with_context(|| format!("memory per open file on {node}"))
        };
        step(maker, "warm", "make")?;
        step(maker, "open", "make")?;
        // The first files bring buffers and tables to their working size.
        step(node, "warm", "open")?;
        let text = step(node, "open", "open")?;
        let memory: Memory =
            serde_json::from_str(text.trim()).with_context(|| format!("reading {text:?}"))?;
        result.push((mode, memory.bytes_per_file()));
    }
    Ok(result)
}

/// Arguments of the helper.
#[derive(Debug, clap::Args)]
pub(crate) struct MemoryArgs {
    /// Directory on the volume.
    dir: PathBuf,
    /// What to do there.
    #[arg(value_enum)]
    step: Step,
    /// How many files.
    #[arg(value_parser = clap::value_parser!(u64).range(1..=100_000))]
    files: u64,
}

/// A step of the measurement. Another node makes the files, so that the measured one knows nothing of them yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Step {
    /// Make the directory and the files.
    Make,
    /// Open and read all of them, and print how csvfs grew.
    Open,
}

/// What the helper prints.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Memory {
    pub(super) files: u64,
    pub(super) rss_bytes_before: u64,
    pub(super) rss_bytes_after: u64,
}

impl Memory {
    /// Growth by file; 0 when csvfs shrank.
    pub(super) fn bytes_per_file(self) -> u64 {
        self.rss_bytes_after.saturating_sub(self.rss_bytes_before) / self.files.max(1)
    }
}

/// Runs the helper; the step `open` prints its result.
///
/// # Errors
/// csvfs does not run here, or an operation failed, with the file's name.
pub(super) fn run(args: &MemoryArgs) -> anyhow::Result<()> {
    match args.step {
        Step::Make => make(&args.dir, args.files),
        Step::Open => {
            let memory = measure(&args.dir, args.files, csvfs_pid()?)?;
            writeln!(std::io::stdout(), "{}", serde_json::to_string(&memory)?).context("printing the result")
        }
    }
}

fn file_path(dir: &Path, number: u64) -> PathBuf {
    dir.join(format!("m{number:06}"))
}

fn make(dir: &Path, files: u64) -> anyhow::Result<()> {
    std::fs::create_dir_all(dir).with_context(|| format!("making {}", dir.display()))?;
    for number in 0..files {
        let path = file_path(dir, number);
        std::fs::write(&path, [1; FILE_BYTES]).with_context(|| format!("writing {}", path.display()))?;
    }
    Ok(())
}

fn measure(dir: &Path, files: u64, pid: u32) -> anyhow::Result<Memory> {
    allow_files(files)?;
    let rss_bytes_before = rss_bytes(pid)?;
    let mut open = Vec::new();
    let mut block = [0; FILE_BYTES];
    for number in 0..files {
        let path = file_path(dir, number);
        let file = File::open(&path).with_context(|| format!("opening {}", path.display()))?;
        file.read_exact_at(&mut block, 0).with_context(|| format!("reading {}", path.display()))?;
        open.push(file);
    }
    let rss_bytes_after = rss_bytes(pid)?;
    Ok(Memory { files, rss_bytes_before, rss_bytes_after })
}

fn allow_files(files: u64) -> anyhow::Result<()> {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let now = getrlimit(Resource::Nofile);
    let wanted = files + 64;
    if now.current.is_some_and(|current| current < wanted) {
        let limit = Rlimit { current: Some(wanted), maximum: now.maximum.map(|most| most.max(wanted)) };
        setrlimit(Resource::Nofile, limit).with_context(|| format!("allowing {wanted} open files"))?;
    }
    Ok(())
}

/// The one csvfs of this node.
fn csvfs_pid() -> anyhow::Result<u32> {
    let entries = std::fs::read_dir("/proc").context("reading /proc")?;
    let pids = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u32>().ok());
    let is_csvfs = |pid: &u32| {
        std::fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name.trim() == "csvfs")
    };
    match pids.filter(is_csvfs).collect::<Vec<_>>()[..] {
        [pid] => Ok(pid),
        [] => bail!("no csvfs runs here; memory is measured inside a node"),
        _ => bail!("several csvfs run here; memory is measured on a node with one volume"),
    }
}

fn rss_bytes(pid: u32) -> anyhow::Result<u64> {
    let path = format!("/proc/{pid}/status");
    let text = std::fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
    parse_rss(&text).with_context(|| format!("{path} has no line \"VmRSS\""))
}

fn parse_rss(status: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib << 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rss_is_read_in_bytes() {
        assert_eq!(parse_rss("Name:\tcsvfs\nVmRSS:\t   12 kB\n"), Some(12_288));
        assert_eq!(parse_rss("Name:\tcsvfs\n"), None);
        assert!(rss_bytes(std::process::id()).unwrap() > 4096);
    }

    #[test]
    fn made_files_are_opened_and_read() {
        let dir = tempfile::tempdir().unwrap();
        assert!(measure(dir.path(), 3, std::process::id()).is_err(), "nothing is there yet");
        make(dir.path(), 3).unwrap();
        let memory = measure(dir.path(), 3, std::process::id()).unwrap();
        assert!(memory.files == 3 && memory.rss_bytes_before > 4096);
    }

    #[test]
    fn growth_by_file_never_underflows() {
        let grown = Memory { files: 10, rss_bytes_before: 1000, rss_bytes_after: 6000 };
        assert_eq!(grown.bytes_per_file(), 500);
        assert_eq!(Memory { rss_bytes_after: 1, ..grown }.bytes_per_file(), 0);
    }
}

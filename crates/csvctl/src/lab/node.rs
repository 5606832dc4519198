//! A node of the lab: its first process, its mounts, its csvd.
//!
//! The first process ("holder") is process 1 of a PID namespace, so killing it kills everything of the node at
//! once, whatever state it is in, and takes the node's mount namespace along. It runs `csvctl lab node-init`, which
//! makes the private directories and then only reaps. `/run/csv` and `/ClusterStorage` are fresh at each start, as
//! after a boot; `/etc/csv` and `/var/lib/csv` lie in the lab's directory and stay.

use super::spec::{Lab, LabNode, WITNESS};
use super::sys::{run_command, wait_until};
use super::{lun, net};
use anyhow::{Context, bail};
use csv_types::config::{LocalConfig, NodeFile};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::wait::{WaitPidFlag, waitpid};
use rustix::mount::{MountFlags, UnmountFlags, mount, mount_bind, unmount};
use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

/// The cluster service's port; each node has a network of its own.
const CLUSTER_PORT: u16 = 7440;
/// Time for the holder to make its mounts.
const HOLDER_LIMIT: Duration = Duration::from_secs(10);
/// Time for a killed node to be gone; the kernel has to end every process of it.
const KILL_LIMIT: Duration = Duration::from_secs(30);

/// Arguments of the hidden `csvctl lab node-init`.
#[derive(Debug, clap::Args)]
pub(crate) struct InitArgs {
    /// Directory of the node in the lab's directory.
    #[arg(long)]
    dir: PathBuf,
    /// Host name of the node.
    #[arg(long)]
    node: String,
}

/// The first process of a node. Returns only when it cannot be made.
pub(crate) fn init(args: &InitArgs) -> anyhow::Result<()> {
    // Still the host's /proc: this is the number by which the host knows this process.
    let host_pid = fs::read_link("/proc/self").context("cannot read /proc/self")?;
    make_mounts(&args.dir)?;
    fs::write("/proc/sys/kernel/hostname", &args.node).context("cannot set the host name")?;
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGCHLD);
    signals.thread_block()?;
    let (path, new) = (args.dir.join("holder.pid"), args.dir.join("holder.pid.new"));
    fs::write(&new, host_pid.to_string_lossy().as_bytes())?;
    fs::rename(new, path)?;
    loop {
        signals.wait()?;
        while waitpid(None, Some(WaitPidFlag::WNOHANG)).is_ok_and(|status| status.pid().is_some()) {}
    }
}

fn make_mounts(dir: &Path) -> anyhow::Result<()> {
    // Copies of other labs' namespaces would keep them alive for as long as this node lives.
    while unmount("/run/netns", UnmountFlags::DETACH).is_ok() {}
    detach_volumes();
    let tmpfs = |path: &str| {
        mount("csv-lab", path, "tmpfs", MountFlags::NOSUID, c"mode=0755,size=64m")
            .with_context(|| format!("cannot mount {path}"))
    };
    let bind = |name: &str, path: &str| {
        mount_bind(dir.join(name), path).with_context(|| format!("cannot bind {path}"))
    };
    tmpfs("/ClusterStorage")?;
    tmpfs("/run/csv")?;
    bind("state", "/var/lib/csv")?;
    bind("etc", "/etc/csv")?;
    mount("sysfs", "/sys", "sysfs", MountFlags::empty(), None).context("cannot mount /sys")?;
    mount("proc", "/proc", "proc", MountFlags::empty(), None).context("cannot mount /proc")
}

/// Takes volumes that the host itself has mounted out of this node: a copy would keep them busy.
fn detach_volumes() {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    for line in mounts.lines().filter(|line| line.contains(" - fuse.csvfs ")) {
        if let Some(path) = line.split(' ').nth(4) {
            let _ = unmount(path.replace("\\040", " "), UnmountFlags::DETACH);
        }
    }
}

fn luns(lab: &Lab, node: &LabNode) -> BTreeMap<String, PathBuf> {
    let volume = node.lun.iter().map(|lun| (lab.volume.clone(), lun.clone()));
    let witness = node.witness_lun.iter().map(|lun| (WITNESS.to_owned(), lun.clone()));
    volume.chain(witness).chain(node.disk_luns.clone()).collect()
}

/// Writes the node's csv.toml for its present LUN device.
fn write_config(lab: &Lab, node: &LabNode) -> anyhow::Result<()> {
    let local = LocalConfig {
        watchdog: None,
        memory_mib: None,
        node: node.name.clone(),
        addr: Some(lab.addr(node).into()),
        cluster_port: CLUSTER_PORT,
        // The loop devices of all labs are on this machine; each node has its own.
        scan_luns: false,
        run_dir: "/run/csv".into(),
        state_dir: "/var/lib/csv".into(),
        mount_dir: "/ClusterStorage".into(),
        secrets_dir: "/etc/csv/secrets".into(),
        luns: luns(lab, node),
    };
    let text = toml::to_string(&NodeFile { local })?;
    let path = lab.node_dir(&node.name).join("etc/csv.toml");
    fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))
}

/// Is the node's first process there, and is it really this node's?
pub(crate) fn running(lab: &Lab, node: &LabNode) -> Option<i32> {
    let pid = node.holder_pid?;
    let ours = net::inode(&lab.node_netns(&node.name))?;
    let its = fs::metadata(format!("/proc/{pid}/ns/net")).ok()?;
    (its.ino() == ours).then_some(pid)
}

/// A file of the node, seen from the host. The node must run.
pub(crate) fn path_of(lab: &Lab, node: &LabNode, path: &str) -> anyhow::Result<PathBuf> {
    let pid = running(lab, node).with_context(|| {
        format!(
            "node {0} of lab {1} is down; `csvctl lab restart --name {1} {0}` starts it",
            node.name, lab.name
        )
    })?;
    Ok(PathBuf::from(format!("/proc/{pid}/root{path}")))
}

/// Starts a node that is down: path to the LUN, configuration, holder, csvd.
pub(super) fn start(lab: &mut Lab, name: &str) -> anyhow::Result<()> {
    let node_dir = lab.node_dir(name);
    for dir in ["etc", "state", "log"] {
        fs::create_dir_all(node_dir.join(dir))?;
    }
    lun::attach_nodes(lab)?;
    net::switch_on(lab, lab.node(name)?)?;
    write_config(lab, lab.node(name)?)?;
    let pid = start_holder(lab, name)?;
    lab.node_mut(name)?.holder_pid = Some(pid);
    lab.save()?;
    start_csvd(lab, name, pid)
}

fn log_file(lab: &Lab, node: &str, name: &str) -> anyhow::Result<File> {
    let path = lab.node_dir(node).join("log").join(name);
    let open = OpenOptions::new().create(true).append(true).open(&path);
    open.with_context(|| format!("cannot open {}", path.display()))
}

fn start_holder(lab: &Lab, name: &str) -> anyhow::Result<i32> {
    let dir = lab.node_dir(name);
    let pid_file = dir.join("holder.pid");
    let _ = fs::remove_file(&pid_file);
    let log = log_file(lab, name, "node.log")?;
    let mut command = Command::new("setsid");
    command
        .args(["--fork", "nsenter", &format!("--net=/run/netns/{}", lab.node_netns(name))])
        .args(["unshare", "--mount", "--uts", "--ipc", "--pid", "--fork", "--propagation", "private"])
        .arg(std::env::current_exe().context("cannot find csvctl's own path")?)
        .args(["lab", "node-init", "--node", name, "--dir"])
        .arg(&dir)
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log);
    let status = command.status().context("cannot run setsid")?;
    let read = || fs::read_to_string(&pid_file).ok()?.trim().parse::<i32>().ok();
    if !status.success() || !wait_until(HOLDER_LIMIT, || read().is_some()) {
        bail!("node {name} did not start:\n{}", tail(&dir.join("log/node.log"), 10));
    }
    read().context("holder.pid vanished")
}

/// Starts csvd in the node; the node's first process becomes its parent.
fn start_csvd(lab: &Lab, name: &str, holder: i32) -> anyhow::Result<()> {
    let csvd = std::env::current_exe().context("cannot find csvctl's own path")?.with_file_name("csvd");
    if !csvd.is_file() {
        bail!("{} is not there; build it (make build) or install csvd beside csvctl", csvd.display());
    }
    let log = log_file(lab, name, "csvd.log")?;
    let mut command = Command::new("nsenter");
    command
        .args(["-t", &holder.to_string(), "-m", "-u", "-i", "-n", "-p", "setsid", "--fork"])
        .arg(csvd)
        .args(["--config", "/etc/csv/csv.toml"])
        .env("CSV_LAB", &lab.name)
        .env("CSV_NODE", name)
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log);
    // `output` would wait for csvd to close its log; `status` waits for setsid only.
    let status = command.status().context("cannot run nsenter")?;
    if !status.success() {
        bail!("csvd of {name} did not start:\n{}", tail(&lab.node_dir(name).join("log/csvd.log"), 10));
    }
    Ok(())
}

/// Kills every process of the node at once and waits until they are gone.
pub(super) fn kill(lab: &Lab, node: &LabNode) -> anyhow::Result<()> {
    if let Some(pid) = running(lab, node) {
        run_command(Command::new("kill").args(["-KILL", &pid.to_string()]))?;
    }
    if !wait_until(KILL_LIMIT, || running(lab, node).is_none()) {
        bail!("node {} does not die; a process of it hangs in the kernel", node.name);
    }
    Ok(())
}

/// Last lines of a log, indented.
pub(super) fn tail(path: &Path, lines: usize) -> String {
    let text = fs::read(path).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let all: Vec<&str> = text.lines().collect();
    let last = &all[all.len().saturating_sub(lines)..];
    if last.is_empty() {
        return format!("    ({} is empty)", path.display());
    }
    last.iter().map(|line| format!("    {line}")).collect::<Vec<_>>().join("\n")
}

//! Running things as on a node: `lab exec`, and csvctl itself with `--lab`.

use super::node;
use super::spec::Lab;
use anyhow::{Context, bail};
use nix::sched::{CloneFlags, setns};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use rustix::process::{Pid, PidfdFlags, kill_process, pidfd_open};
use std::ffi::{OsStr, OsString};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus};

/// A signal that the kernel made for the terminal (`si_code`); the whole foreground group gets it.
const SI_KERNEL: i32 = 0x80;

/// Arguments of `csvctl lab exec`.
#[derive(Debug, clap::Args)]
pub(crate) struct ExecArgs {
    /// Lab; may be left out when only one runs.
    #[arg(long)]
    pub(crate) name: Option<String>,
    /// Node, for example n1.
    pub(crate) node: String,
    /// Command and its arguments.
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    pub(crate) command: Vec<OsString>,
}

/// Moves this process into the node. Children also come into its PID namespace.
///
/// Must be called while the process has one thread: the kernel refuses otherwise.
pub(crate) fn enter(lab: &Lab, name: &str) -> anyhow::Result<()> {
    let node = lab.node(name)?;
    let cwd = std::env::current_dir().unwrap_or_else(|_| PathBuf::from("/"));
    // The process is held first and checked then, so the check cannot be about another one.
    let Some(pid) = node.holder_pid.and_then(Pid::from_raw) else { bail!("node {name} was never started") };
    let held = pidfd_open(pid, PidfdFlags::empty());
    node::path_of(lab, node, "/")?;
    let held = held.with_context(|| format!("cannot reach node {name}"))?;
    let all = CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWNET
        | CloneFlags::CLONE_NEWUTS
        | CloneFlags::CLONE_NEWIPC
        | CloneFlags::CLONE_NEWPID;
    setns(held, all).with_context(|| format!("cannot enter node {name}; are you root?"))?;
    if std::env::set_current_dir(&cwd).is_err() {
        std::env::set_current_dir("/").context("cannot change to /")?;
    }
    Ok(())
}

/// Runs a command in the node and passes on signals and its end. Returns the exit status for csvctl: that of the
/// command, or 128 plus the number of the signal that killed it.
pub(crate) fn exec(lab: &Lab, node: &str, words: &[OsString]) -> anyhow::Result<u8> {
    let mut signals = SigSet::empty();
    for signal in [
        Signal::SIGCHLD,
        Signal::SIGHUP,
        Signal::SIGINT,
        Signal::SIGQUIT,
        Signal::SIGTERM,
        Signal::SIGUSR1,
        Signal::SIGUSR2,
    ] {
        signals.add(signal);
    }
    signals.thread_block()?;
    let signal_fd = SignalFd::with_flags(&signals, SfdFlags::SFD_CLOEXEC)?;
    // Before: the node's /proc does not know this process.
    let path = path_with_own_dir();
    enter(lab, node)?;
    // The child inherits the mask, so it is open for the moment of its birth.
    signals.thread_unblock()?;
    // setpriv makes the command die with this process, even by SIGKILL.
    let spawned = Command::new("setpriv")
        .args(["--pdeathsig", "KILL", "--"])
        .args(words)
        .env("CSV_LAB", &lab.name)
        .env("CSV_NODE", node)
        .env("PATH", path)
        .spawn();
    signals.thread_block()?;
    let mut child = spawned.context("cannot run setpriv (package util-linux)")?;
    let status = attend(&mut child, &signal_fd)?;
    let code = status.code().or_else(|| status.signal().map(|signal| 128 + signal));
    Ok(code.and_then(|code| u8::try_from(code).ok()).unwrap_or(255))
}

/// Passes signals on until the child ends. What the terminal sent, the child has got itself.
fn attend(child: &mut Child, signals: &SignalFd) -> anyhow::Result<ExitStatus> {
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(status);
        }
        let Some(info) = signals.read_signal()? else { continue };
        let number = i32::try_from(info.ssi_signo).unwrap_or(0);
        if number == Signal::SIGCHLD as i32 || info.ssi_code == SI_KERNEL {
            continue;
        }
        if let Some(signal) = rustix::process::Signal::from_named_raw(number) {
            // Fails only when the child has just ended.
            let _ = kill_process(Pid::from_child(child), signal);
        }
    }
}

/// So that `lab exec n1 -- csvctl ...` finds the csvctl that runs it.
fn path_with_own_dir() -> OsString {
    let path = std::env::var_os("PATH").unwrap_or_else(|| OsString::from("/usr/sbin:/usr/bin:/sbin:/bin"));
    let own = std::env::current_exe().ok().and_then(|exe| exe.parent().map(Path::to_path_buf));
    prepend(own, &path)
}

fn prepend(dir: Option<PathBuf>, path: &OsStr) -> OsString {
    let dirs: Vec<PathBuf> = dir.into_iter().chain(std::env::split_paths(path)).collect();
    std::env::join_paths(dirs).unwrap_or_else(|_| path.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_directory_comes_first() {
        assert_eq!(prepend(Some("/opt/csv".into()), OsStr::new("/bin:/sbin")), "/opt/csv:/bin:/sbin");
        assert_eq!(prepend(Some("/odd:dir".into()), OsStr::new("/bin")), "/bin");
    }
}

//! `csvctl lab down`: removes a lab, in whatever state it is.
//!
//! It relies on the kernel's word and not on the lab's notes: processes are found by their network namespace, loop
//! devices by their backing file, namespaces by name. Every step is tried even if an earlier one failed; the registry
//! entry stays until all have succeeded, so the command can be repeated.

use super::spec::{self, Lab, RegistryLock};
use super::sys::wait_until;
use super::{lun, net};
use anyhow::{Context, bail};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

/// Time for killed processes to be gone.
const KILL_LIMIT: Duration = Duration::from_secs(30);

/// Removes the lab of that name.
pub(crate) fn run(name: &str) -> anyhow::Result<()> {
    spec::check_name(name)?;
    let lock = RegistryLock::take()?;
    let namespaces = net::namespaces(name);
    let dir = match spec::dir_of(name) {
        Ok(dir) => dir,
        Err(e) if namespaces.is_empty() && !is_lab_dir(&spec::default_dir(name)) => {
            lock.unregister(name)?;
            return Err(e);
        }
        Err(_) => spec::default_dir(name),
    };
    let mut failures = Vec::new();
    failures.extend(kill_all(&namespaces).err());
    for device in lun::attached(&dir) {
        failures.extend(lun::detach(&device).err());
    }
    // The bridge's namespace last: its links go with the nodes'.
    for ns in namespaces.iter().rev() {
        failures.extend(net::remove(ns).err());
    }
    if failures.is_empty() {
        failures.extend(remove_dir(&dir).err());
    }
    if failures.is_empty() {
        return lock.unregister(name);
    }
    let failures: Vec<String> = failures.iter().map(|e| format!("{e:#}")).collect();
    bail!(
        "lab {name} is not wholly removed, repeat `csvctl lab down --name {name}`:\n  {}",
        failures.join("\n  ")
    )
}

/// Processes in any of the namespaces, this one left out.
fn members(inodes: &[u64]) -> Vec<Pid> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    let own = rustix::process::getpid();
    entries
        .filter_map(Result::ok)
        .filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok())
        .filter_map(Pid::from_raw)
        .filter(|pid| *pid != own && is_member(*pid, inodes))
        .collect()
}

fn is_member(pid: Pid, inodes: &[u64]) -> bool {
    fs::metadata(format!("/proc/{}/ns/net", pid.as_raw_nonzero()))
        .is_ok_and(|meta| inodes.contains(&meta.ino()))
}

fn kill_all(namespaces: &[String]) -> anyhow::Result<()> {
    let inodes: Vec<u64> = namespaces.iter().filter_map(|ns| net::inode(ns)).collect();
    let gone = wait_until(KILL_LIMIT, || {
        let members = members(&inodes);
        for pid in &members {
            // Held first, then checked again, so a number given out anew is never killed.
            if let Ok(held) = pidfd_open(*pid, PidfdFlags::empty())
                && is_member(*pid, &inodes)
            {
                let _ = pidfd_send_signal(held, Signal::KILL);
            }
        }
        members.is_empty()
    });
    if !gone {
        let pids: Vec<String> = members(&inodes).iter().map(|pid| pid.as_raw_nonzero().to_string()).collect();
        bail!("processes {} do not die; they hang in the kernel", pids.join(", "));
    }
    Ok(())
}

fn is_lab_dir(dir: &Path) -> bool {
    dir.join("lab.json").exists()
}

/// Only a directory that a lab made is ever removed.
fn remove_dir(dir: &Path) -> anyhow::Result<()> {
    if dir.exists() && !is_lab_dir(dir) {
        // Not more than the empty directory of a lab that failed before its first file.
        return fs::remove_dir(dir).with_context(|| {
            format!("{} does not look like a lab's directory; remove it by hand", dir.display())
        });
    }
    match fs::remove_dir_all(dir) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => {
            Err(e).with_context(|| format!("cannot remove {}", dir.display()))
        }
        Err(_) | Ok(()) => Ok(()),
    }
}

/// Removes every lab of this machine.
pub(crate) fn run_all() -> anyhow::Result<()> {
    for name in spec::names()? {
        run(&name)?;
    }
    Ok(())
}

/// Is anything of the lab running? For `lab list`.
pub(super) fn running_nodes(lab: &Lab) -> usize {
    lab.nodes.iter().filter(|node| super::node::running(lab, node).is_some()).count()
}

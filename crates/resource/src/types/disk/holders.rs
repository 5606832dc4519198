//! Who keeps a file system busy: processes with a file, a directory, a program or a mapping on it, and mounts in it.

use crate::types::mounts;
use std::collections::HashSet;
use std::fs;
use std::path::Path;

/// Names told.
const NAMES_MAX: usize = 8;

/// Names them, for a message.
pub(super) fn describe(point: &Path) -> String {
    let mut found: Vec<String> = mounts::all()
        .unwrap_or_default()
        .into_iter()
        .filter(|mount| mount.point != point && mount.point.starts_with(point))
        .map(|mount| format!("a mount at {}", mount.point.display()))
        .collect();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let name = entry.file_name();
        let Some(pid) = name.to_str().filter(|name| name.bytes().all(|byte| byte.is_ascii_digit())) else {
            continue;
        };
        if let Some(what) = uses(&entry.path(), point) {
            let program = fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
            found.push(format!("{} (pid {pid}: {what})", program.trim()));
        }
    }
    let more = found.len().saturating_sub(NAMES_MAX);
    found.truncate(NAMES_MAX);
    match (found.is_empty(), more) {
        (true, _) => {
            "nobody that /proc shows; perhaps the kernel itself (NFS server, loop device, swap)".to_owned()
        }
        (false, 0) => found.join(", "),
        (false, more) => format!("{} and {more} more", found.join(", ")),
    }
}

/// Where a device is mounted, by this process and in other namespaces of mounts; for a message. `None` when nowhere.
pub(super) fn mounts_of(number: &str) -> Option<String> {
    let points = |process: &Path| -> Vec<String> {
        let mounts = mounts::of(&process.join("mountinfo")).unwrap_or_default().into_iter();
        mounts.filter(|mount| mount.device == number).map(|mount| mount.point.display().to_string()).collect()
    };
    let own = Path::new("/proc/thread-self");
    let mut found: Vec<String> =
        points(own).iter().map(|point| format!("it is mounted at {point}")).collect();
    let namespace = |process: &Path| fs::read_link(process.join("ns/mnt")).ok();
    let mut seen = HashSet::from([namespace(own)]);
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let process = entry.path();
        if !name.bytes().all(|byte| byte.is_ascii_digit()) || !seen.insert(namespace(&process)) {
            continue;
        }
        let program = fs::read_to_string(process.join("comm")).unwrap_or_default();
        let place = format!("in the namespace of {} (pid {name})", program.trim());
        found.extend(points(&process).iter().map(|point| format!("it is mounted at {point} {place}")));
    }
    found.truncate(NAMES_MAX);
    (!found.is_empty()).then(|| found.join(", "))
}

/// What of the file system a process uses.
fn uses(process: &Path, point: &Path) -> Option<String> {
    let on_it = |path: &Path| fs::read_link(path).ok().filter(|target| target.starts_with(point));
    for (link, what) in [("cwd", "works in"), ("root", "has its root at"), ("exe", "runs")] {
        if let Some(target) = on_it(&process.join(link)) {
            return Some(format!("{what} {}", target.display()));
        }
    }
    for entry in fs::read_dir(process.join("fd")).into_iter().flatten().flatten() {
        if let Some(target) = on_it(&entry.path()) {
            return Some(format!("has {} open", target.display()));
        }
    }
    let maps = fs::read_to_string(process.join("maps")).ok()?;
    let mapped = maps.lines().filter_map(|line| line.split_once('/')).map(|(_, path)| format!("/{path}"));
    mapped.into_iter().find(|path| Path::new(path).starts_with(point)).map(|path| format!("maps {path}"))
}

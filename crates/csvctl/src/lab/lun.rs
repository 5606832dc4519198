//! The lab's LUN: one backing file, and for each node that has a path a loop device of its own on it, opened with
//! O_DIRECT, as several initiators see one SAN disk.

use super::spec::Lab;
use super::sys::{run, run_command, wait_until};
use anyhow::{Context, bail};
use rustix::fs::FallocateFlags;
use std::fs::{self, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// A detached loop device stays while somebody has it open; this long is waited for that.
const DETACH_LIMIT: Duration = Duration::from_secs(10);

/// Makes the backing file, its blocks allocated; with `prealloc` also written, so that no write in the guest is
/// a first write of the host's file system.
pub(super) fn create_image(path: &Path, bytes: u64, prealloc: bool) -> anyhow::Result<()> {
    let file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .open(path)
        .with_context(|| format!("cannot create {}", path.display()))?;
    rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, bytes).with_context(|| {
        format!(
            "cannot allocate {} MiB for {}, where {} are free; choose a smaller size or another --dir",
            bytes >> 20,
            path.display(),
            free(path).map_or("an unknown number of MiB".to_owned(), |free| format!("{} MiB", free >> 20)),
        )
    })?;
    if prealloc {
        let zeros = vec![0u8; 4 << 20];
        let mut left = bytes;
        let mut file = &file;
        while left > 0 {
            let now = usize::try_from(left).map_or(zeros.len(), |left| left.min(zeros.len()));
            file.write_all(&zeros[..now]).with_context(|| format!("cannot write {}", path.display()))?;
            left -= now as u64;
        }
        file.sync_all()?;
    }
    Ok(())
}

/// Bytes that are free on the file system of a file that is there.
fn free(path: &Path) -> Option<u64> {
    let stat = rustix::fs::statvfs(path).ok()?;
    Some(stat.f_bavail.saturating_mul(stat.f_frsize))
}

/// A new loop device on the image.
pub(super) fn attach(image: &Path) -> anyhow::Result<PathBuf> {
    let mut command = Command::new("losetup");
    command.args(["--find", "--show", "--direct-io=on", "--sector-size", "512"]).arg(image);
    let device = run_command(&mut command)
        .context("cannot attach the LUN; the lab's directory must be on a file system that takes O_DIRECT")?;
    let device = PathBuf::from(device.trim());
    if !is_direct(&device) {
        let _ = run("losetup", &["-d".as_ref(), device.as_os_str()]);
        bail!("{} refuses O_DIRECT; put the lab on ext4 or XFS with --dir", image.display());
    }
    Ok(device)
}

fn sysfs(device: &Path) -> PathBuf {
    Path::new("/sys/block").join(device.file_name().unwrap_or_default()).join("loop")
}

fn is_direct(device: &Path) -> bool {
    fs::read_to_string(sysfs(device).join("dio")).is_ok_and(|dio| dio.trim() == "1")
}

/// Loop devices on images in the directory, also on deleted ones, by the kernel's word.
pub(super) fn attached(dir: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir("/sys/block") else { return Vec::new() };
    let backing = |name: &str| fs::read_to_string(format!("/sys/block/{name}/loop/backing_file")).ok();
    entries
        .filter_map(Result::ok)
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .filter(|name| backing(name).is_some_and(|file| Path::new(file.trim_end()).parent() == Some(dir)))
        .map(|name| Path::new("/dev").join(name))
        .collect()
}

/// Detaches a device and waits until nobody holds it any more: from then on nothing that a dead node had in flight
/// or in memory can reach the image through it.
pub(super) fn detach(device: &Path) -> anyhow::Result<()> {
    if !sysfs(device).exists() {
        return Ok(());
    }
    run("losetup", &["-d".as_ref(), device.as_os_str()])?;
    // Whoever fences the node at this moment may undo the order to detach when the last user is gone.
    let gone = || {
        let gone = !sysfs(device).exists();
        if !gone {
            let _ = run("losetup", &["-d".as_ref(), device.as_os_str()]);
        }
        gone
    };
    if !wait_until(DETACH_LIMIT, gone) {
        bail!("{} is still in use; `fuser -vm {0}` may tell by whom", device.display());
    }
    Ok(())
}

/// Attaches what the nodes with a path lack.
pub(super) fn attach_nodes(lab: &mut Lab) -> anyhow::Result<()> {
    let (image, witness) = (lab.lun_image(), lab.witness.then(|| lab.witness_image()));
    let disks: Vec<_> = lab.disks.iter().map(|name| (name.clone(), lab.disk_image(name))).collect();
    let lacks = |device: &Option<PathBuf>| device.as_ref().is_none_or(|device| !sysfs(device).exists());
    for node in &mut lab.nodes {
        if node.path && lacks(&node.lun) {
            node.lun = Some(attach(&image)?);
        }
        if let Some(witness) = &witness
            && lacks(&node.witness_lun)
        {
            node.witness_lun = Some(attach(witness)?);
        }
        for (name, image) in &disks {
            if lacks(&node.disk_luns.get(name).cloned()) {
                node.disk_luns.insert(name.clone(), attach(image)?);
            }
        }
    }
    lab.save()
}

/// Bytes from `8G`, `512M`, `65536`.
pub(super) fn parse_size(text: &str) -> Result<u64, String> {
    let wrong = || format!("\"{text}\" is not a size; write for example 8G or 512M");
    let (digits, unit) = text.split_at(text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len()));
    let shift = match unit.to_ascii_uppercase().trim_end_matches("IB").trim_end_matches('B') {
        "" => 0,
        "K" => 10,
        "M" => 20,
        "G" => 30,
        "T" => 40,
        _ => return Err(wrong()),
    };
    let bytes = digits.parse::<u64>().ok().and_then(|n| n.checked_mul(1 << shift)).ok_or_else(wrong)?;
    if !(64 << 20..=64 << 40).contains(&bytes) || bytes % 4096 != 0 {
        return Err(format!("\"{text}\" must be 64M to 64T and a multiple of 4096 bytes"));
    }
    Ok(bytes)
}

/// A shared disk from `SIZE[:NAME]`.
pub(super) fn parse_disk(text: &str) -> Result<(u64, Option<String>), String> {
    let (size, name) = match text.split_once(':') {
        Some((size, name)) => (size, Some(name)),
        None => (text, None),
    };
    if let Some(name) = name {
        let fine = |b: u8| b.is_ascii_alphanumeric() || b == b'-' || b == b'_';
        if name.is_empty() || name.len() > 64 || !name.bytes().all(fine) {
            return Err(format!("\"{name}\" cannot be a disk's name: 1 to 64 of a-z, A-Z, 0-9, - and _"));
        }
    }
    Ok((parse_size(size)?, name.map(str::to_owned)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks() {
        assert_eq!(parse_disk("512M"), Ok((512 << 20, None)));
        assert_eq!(parse_disk("1G:data"), Ok((1 << 30, Some("data".to_owned()))));
        for bad in ["", ":data", "1G:", "1G:a/b", "1G:a b", "1M:data"] {
            assert!(parse_disk(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn an_image_too_large_tells_what_is_free() {
        let dir = tempfile::tempdir().unwrap();
        let error = format!("{:#}", create_image(&dir.path().join("lun.img"), 1 << 50, false).unwrap_err());
        assert!(error.contains("1073741824 MiB") && error.contains("MiB are free"), "{error}");
    }

    #[test]
    fn sizes() {
        assert_eq!(parse_size("8G"), Ok(8 << 30));
        assert_eq!(parse_size("512MiB"), Ok(512 << 20));
        assert_eq!(parse_size("134217728"), Ok(128 << 20));
        for bad in ["", "G", "8X", "1M", "100000001", "99999999999999999999G", "-1G"] {
            assert!(parse_size(bad).is_err(), "{bad}");
        }
    }
}

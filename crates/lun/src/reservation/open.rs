//! Which back end a device needs, by sysfs.

use super::Backend;
use super::emu::Emulated;
use super::error::{Errors, PrOp, ReservationError};
use super::nvme::Nvme;
use super::pr_ioctl::PrIoctl;
use super::scsi::Scsi;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use std::fs::{self, Metadata};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

/// Most paths of one multipath device.
const PATHS_MAX: usize = 64;

/// Number of a loop device; `None` for anything else.
pub(crate) fn loop_index(stat: &Metadata) -> Option<u32> {
    let dir = stat.file_type().is_block_device().then(|| sysfs_of(stat))??;
    name_of(&dir).strip_prefix("loop")?.parse().ok()
}

/// Where to read what every node may read, whatever it has registered. The device itself; but the lab's emulation takes
/// reading away together with writing, so there it is the file behind the loop device.
#[must_use]
pub fn read_path(device: &Path) -> PathBuf {
    let index = fs::metadata(device).ok().and_then(|stat| loop_index(&stat));
    let file = index.and_then(|index| super::emu::loopdev::backing_file(index).ok());
    file.filter(|file| file.is_file()).unwrap_or_else(|| device.to_owned())
}

/// The directory of the whole disk in sysfs.
fn sysfs_of(stat: &Metadata) -> Option<PathBuf> {
    let (major, minor) = (rustix::fs::major(stat.rdev()), rustix::fs::minor(stat.rdev()));
    let dir = fs::canonicalize(format!("/sys/dev/block/{major}:{minor}")).ok()?;
    if dir.join("partition").exists() { dir.parent().map(Path::to_path_buf) } else { Some(dir) }
}

fn name_of(dir: &Path) -> String {
    dir.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

pub(super) fn backend(path: &Path, errors: &Errors) -> Result<Box<dyn Backend>, ReservationError> {
    let rejected = |why: String| errors.rejected(PrOp::Open, why);
    let stat = fs::metadata(path).map_err(|error| rejected(error.to_string()))?;
    if stat.is_file() {
        return Ok(Box::new(Emulated::on_file(path, errors.clone())?));
    }
    if !stat.file_type().is_block_device() {
        return Err(errors.unsupported(PrOp::Open, "it is neither a block device nor a file"));
    }
    let dir = sysfs_of(&stat).ok_or_else(|| rejected("sysfs does not know it; is /sys mounted?".into()))?;
    if let Some(index) = loop_index(&stat) {
        return Ok(Box::new(Emulated::on_loop(index, errors.clone())?));
    }
    let name = name_of(&dir);
    let paths = multipath_slaves(&dir);
    let first = paths.first().map_or(&*name, |path| path);
    if first.starts_with("nvme") {
        return Ok(Box::new(Nvme::new(open_device(path, errors)?, errors.clone())?));
    }
    if first.starts_with("sd") {
        let devices = match paths.is_empty() {
            true => vec![open_device(path, errors)?],
            false => open_paths(&paths, errors)?,
        };
        return Ok(Box::new(Scsi::new(devices, errors.clone())));
    }
    Ok(Box::new(PrIoctl::new(open_device(path, errors)?, errors.clone())))
}

/// Names of the paths of a multipath device, sorted; empty for any other device.
fn multipath_slaves(dir: &Path) -> Vec<String> {
    if !fs::read_to_string(dir.join("dm/uuid")).is_ok_and(|uuid| uuid.starts_with("mpath-")) {
        return Vec::new();
    }
    let Ok(entries) = fs::read_dir(dir.join("slaves")) else { return Vec::new() };
    let mut names: Vec<_> = entries
        .filter_map(Result::ok)
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .take(PATHS_MAX)
        .collect();
    names.sort();
    names
}

/// Opens every path that can be opened; a path that is down is left out.
fn open_paths(names: &[String], errors: &Errors) -> Result<Vec<OwnedFd>, ReservationError> {
    let mut last = None;
    let mut devices = Vec::new();
    for name in names {
        match open_device(&Path::new("/dev").join(name), errors) {
            Ok(device) => devices.push(device),
            Err(error) => {
                tracing::warn!(name, %error, "a path of a multipath device cannot be opened");
                last = Some(error);
            }
        }
    }
    match last {
        Some(error) if devices.is_empty() => Err(error),
        _ => Ok(devices),
    }
}

fn open_device(path: &Path, errors: &Errors) -> Result<OwnedFd, ReservationError> {
    let open = |flags| rustix::fs::open(path, flags | OFlags::CLOEXEC | OFlags::NONBLOCK, Mode::empty());
    match open(OFlags::RDWR) {
        // Write-protected; reading keys works all the same.
        Err(Errno::ROFS | Errno::ACCESS | Errno::PERM) => open(OFlags::RDONLY),
        other => other,
    }
    .map_err(|errno| errors.rejected(PrOp::Open, format!("cannot open {}: {errno}", path.display())))
}

//! Is a LUN in use on this node? By a mount, or by anything else in the kernel that holds the device: swap,
//! LVM, mdraid, a detached mount in another process.
//!
//! The answer is about this node and this moment; use by other nodes shows in the label only.

use rustix::fs::{FileType, Mode, OFlags};
use rustix::io::Errno;
use std::fs;
use std::io;
use std::path::Path;

/// Who uses the LUN on this node, in words; `None` when nobody does. A file counts as used when a loop device
/// stands on it.
///
/// # Errors
/// When the path, `/proc/self/mountinfo` or sysfs cannot be read.
pub fn is_mounted(path: &Path) -> io::Result<Option<String>> {
    let stat = rustix::fs::stat(path)?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::BlockDevice {
        return loop_device_on(path);
    }
    let (major, minor) = (rustix::fs::major(stat.st_rdev), rustix::fs::minor(stat.st_rdev));
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    if let Some(point) = mount_point_of(&mounts, &format!("{major}:{minor}")) {
        return Ok(Some(format!("it is mounted at {point}")));
    }
    match rustix::fs::open(path, OFlags::RDONLY | OFlags::EXCL | OFlags::CLOEXEC, Mode::empty()) {
        Ok(_) => Ok(None),
        Err(Errno::BUSY) => Ok(Some(
            "the kernel holds it (a mount in another namespace, swap, LVM, mdraid or multipath)".into(),
        )),
        Err(errno) => Err(errno.into()),
    }
}

/// Mount point of a device in the text of `/proc/self/mountinfo`, with its octal escapes as they are.
fn mount_point_of<'a>(mountinfo: &'a str, device: &str) -> Option<&'a str> {
    mountinfo.lines().find_map(|line| {
        let mut fields = line.split(' ');
        (fields.nth(2)? == device).then(|| fields.nth(1))?
    })
}

fn loop_device_on(path: &Path) -> io::Result<Option<String>> {
    let path = path.canonicalize()?;
    for entry in fs::read_dir("/sys/block")? {
        let entry = entry?;
        // Only attached loop devices have the file, and any of them may go away while we look.
        let Ok(backing) = fs::read_to_string(entry.path().join("loop/backing_file")) else { continue };
        if path == Path::new(backing.trim_end_matches('\n')) {
            let name = entry.file_name().to_string_lossy().into_owned();
            return Ok(Some(format!("loop device /dev/{name} stands on it; use that device instead")));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testutil::{LoopDevice, Mounted, lun_file, run};

    #[test]
    fn mountinfo_is_searched_by_device_number() {
        let text = "22 1 254:0 / / rw shared:1 - ext4 /dev/vda rw\n90 22 7:3 / /mnt/a\\040b rw - xfs /dev/loop3 rw\n";
        assert_eq!(mount_point_of(text, "7:3"), Some("/mnt/a\\040b"));
        assert_eq!(mount_point_of(text, "7:30"), None);
        assert_eq!(mount_point_of(text, "4:0"), None);
    }

    #[test]
    fn a_mounted_device_is_in_use_until_it_is_unmounted() {
        let Some(device) = LoopDevice::new(64 << 20, 512) else { return };
        assert_eq!(is_mounted(device.path()).unwrap(), None);
        run("mkfs.ext4", &["-q", "-F"], device.path());
        let mounted = Mounted::new(device.path());
        let user = is_mounted(device.path()).unwrap().unwrap();
        assert!(user.contains(mounted.point().to_str().unwrap()), "{user}");
        drop(mounted);
        assert_eq!(is_mounted(device.path()).unwrap(), None);
    }

    #[test]
    fn a_file_below_a_loop_device_is_in_use() {
        let Some(device) = LoopDevice::new(1 << 20, 512) else { return };
        let user = is_mounted(device.backing()).unwrap().unwrap();
        assert!(user.contains(device.path().to_str().unwrap()), "{user}");
        assert_eq!(is_mounted(lun_file(1 << 20).path()).unwrap(), None);
    }
}

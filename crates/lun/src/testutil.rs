//! LUNs for tests: files, and loop devices on them where the tests run as root.

use std::path::{Path, PathBuf};
use std::process::Command;
use tempfile::NamedTempFile;

/// A sparse file on a file system that can do direct I/O (the source tree's; `/tmp` may be a tmpfs).
pub(crate) fn lun_file(len: u64) -> NamedTempFile {
    let file = NamedTempFile::new_in(env!("CARGO_MANIFEST_DIR")).unwrap();
    file.as_file().set_len(len).unwrap();
    file
}

/// A loop device on a file of its own; detached when dropped, also by a panic.
pub(crate) struct LoopDevice {
    path: PathBuf,
    _backing: NamedTempFile,
}

impl LoopDevice {
    /// `None` when not run as root: the tests that need a block device cannot run then.
    pub(crate) fn new(len: u64, sector_bytes: u32) -> Option<LoopDevice> {
        if !rustix::process::geteuid().is_root() {
            return None;
        }
        let backing = lun_file(len);
        let output = Command::new("losetup")
            .args(["--find", "--show", "--direct-io=on", "--sector-size", &sector_bytes.to_string()])
            .arg(backing.path())
            .output()
            .unwrap();
        assert!(output.status.success(), "losetup: {}", String::from_utf8_lossy(&output.stderr));
        let path = PathBuf::from(String::from_utf8(output.stdout).unwrap().trim());
        Some(LoopDevice { path, _backing: backing })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let status = Command::new("losetup").arg("--detach").arg(&self.path).status();
        if !status.is_ok_and(|status| status.success()) && !std::thread::panicking() {
            panic!("losetup could not detach {}", self.path.display());
        }
    }
}

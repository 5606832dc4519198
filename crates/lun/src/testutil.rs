//! LUNs for tests: files, and loop devices on them where the tests run as root.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use tempfile::NamedTempFile;

/// A sparse file on a file system that can do direct I/O (the source tree's; `/tmp` may be a tmpfs).
pub(crate) fn lun_file(len: u64) -> NamedTempFile {
    let file = NamedTempFile::new_in(env!("CARGO_MANIFEST_DIR")).unwrap();
    file.as_file().set_len(len).unwrap();
    file
}

/// The reservation registry that a test makes beside a LUN's file; deleted when dropped.
pub(crate) struct RegistryFile(PathBuf);

impl RegistryFile {
    pub(crate) fn of(backing: &Path) -> RegistryFile {
        let mut name = backing.as_os_str().to_owned();
        name.push(".pr");
        RegistryFile(name.into())
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for RegistryFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// A loop device on a file of its own; detached when dropped, also by a panic.
pub(crate) struct LoopDevice {
    path: PathBuf,
    backing: Arc<NamedTempFile>,
    attached: bool,
}

impl LoopDevice {
    /// `None` when not run as root: the tests that need a block device cannot run then.
    pub(crate) fn new(len: u64, sector_bytes: u32) -> Option<LoopDevice> {
        LoopDevice::with_args(len, &["--sector-size", &sector_bytes.to_string()])
    }

    /// With further arguments to losetup.
    pub(crate) fn with_args(len: u64, args: &[&str]) -> Option<LoopDevice> {
        if !rustix::process::geteuid().is_root() {
            return None;
        }
        Some(LoopDevice::attach(Arc::new(lun_file(len)), args))
    }

    /// Another loop device on the same file.
    pub(crate) fn second(&self) -> LoopDevice {
        LoopDevice::attach(Arc::clone(&self.backing), &[])
    }

    fn attach(backing: Arc<NamedTempFile>, args: &[&str]) -> LoopDevice {
        let output = Command::new("losetup")
            .args(["--find", "--show", "--direct-io=on"])
            .args(args)
            .arg(backing.path())
            .output()
            .unwrap();
        assert!(output.status.success(), "losetup: {}", String::from_utf8_lossy(&output.stderr));
        let path = PathBuf::from(String::from_utf8(output.stdout).unwrap().trim());
        LoopDevice { path, backing, attached: true }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Detached and attached anew, as after a power cut; perhaps under another number.
    pub(crate) fn reattach(mut self) -> LoopDevice {
        run("losetup", &["--detach"], &self.path);
        self.attached = false;
        self.second()
    }

    pub(crate) fn backing(&self) -> &Path {
        self.backing.path()
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        if !self.attached {
            return;
        }
        let status = Command::new("losetup").arg("--detach").arg(&self.path).status();
        if !status.is_ok_and(|status| status.success()) && !std::thread::panicking() {
            panic!("losetup could not detach {}", self.path.display());
        }
    }
}

/// A temporary mount; unmounted when dropped, also by a panic.
pub(crate) struct Mounted {
    point: tempfile::TempDir,
}

impl Mounted {
    pub(crate) fn new(device: &Path) -> Mounted {
        let point = tempfile::tempdir().unwrap();
        let status = Command::new("mount").arg(device).arg(point.path()).status().unwrap();
        assert!(status.success(), "mount {}", device.display());
        Mounted { point }
    }

    pub(crate) fn point(&self) -> &Path {
        self.point.path()
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let status = Command::new("umount").arg(self.point.path()).status();
        if !status.is_ok_and(|status| status.success()) && !std::thread::panicking() {
            panic!("umount {} failed", self.point.path().display());
        }
    }
}

/// Runs a program to its end; it must succeed.
pub(crate) fn run(program: &str, args: &[&str], path: &Path) {
    let output = Command::new(program).args(args).arg(path).output().unwrap();
    assert!(output.status.success(), "{program}: {}", String::from_utf8_lossy(&output.stderr));
}

//! A formatted loop device with its file system mounted, gone again when dropped.

use crate::hidden::{FsKind, HiddenFs, MountError};
use csv_proto::{Attr, Cred};
use csv_types::FileId;
use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

pub(super) const IMAGE_BYTES: u64 = 512 << 20;

/// The LUN is a sparse file; reading and writing that file is what another node does to the LUN.
pub(super) struct Rig {
    pub(super) kind: FsKind,
    fs: Option<HiddenFs>,
    pub(super) lun: File,
    pub(super) device: PathBuf,
    pub(super) image: PathBuf,
    _dir: tempfile::TempDir,
}

pub(super) fn on_each_fs(test: impl Fn(&mut Rig)) {
    if !is_root() {
        return;
    }
    for kind in [FsKind::Ext4, FsKind::Xfs] {
        let mut rig = Rig::formatted(kind, &[]);
        rig.mount();
        test(&mut rig);
    }
}

/// Says so when not.
pub(super) fn is_root() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        // Past the harness, which swallows the output of tests that pass.
        writeln!(std::io::stderr(), "SKIPPED: needs root for loop devices and mounts").unwrap();
    }
    root
}

pub(super) fn run(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).output().unwrap();
    assert!(output.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

pub(super) fn attach(image: &std::path::Path) -> PathBuf {
    run("losetup", &["--find", "--show", "--direct-io=on", image.to_str().unwrap()]).into()
}

pub(super) fn detach(device: &std::path::Path) {
    run("losetup", &["--detach", device.to_str().unwrap()]);
}

impl Rig {
    pub(super) fn unformatted(kind: FsKind) -> Rig {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("lun");
        let lun = File::options().create_new(true).read(true).write(true).open(&image).unwrap();
        lun.set_len(IMAGE_BYTES).unwrap();
        Rig { kind, fs: None, lun, device: attach(&image), image, _dir: dir }
    }

    pub(super) fn formatted(kind: FsKind, more: &[&str]) -> Rig {
        let rig = Rig::unformatted(kind);
        let device = rig.device.to_str().unwrap();
        match kind {
            FsKind::Ext4 => run("mkfs.ext4", &[&["-q", "-F", "-m", "0"], more, &[device]].concat()),
            FsKind::Xfs => run("mkfs.xfs", &[&["-q", "-f", "-m", "reflink=0"], more, &[device]].concat()),
        };
        rig
    }

    pub(super) fn mount(&mut self) {
        self.fs = Some(self.try_mount(false).unwrap());
    }

    /// A child that another test has just forked holds our descriptors, hence the former mount, until its exec.
    /// Nothing tells when that is.
    pub(super) fn try_mount(&self, read_only: bool) -> Result<HiddenFs, MountError> {
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            match HiddenFs::mount(&self.device, self.kind, read_only) {
                Err(MountError::InUseHere { .. }) if Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(1));
                }
                other => return other,
            }
        }
    }

    pub(super) fn unmount(&mut self) {
        self.fs = None;
    }

    /// As after the end of the process that had it mounted.
    pub(super) fn remount(&mut self) {
        self.unmount();
        self.mount();
    }

    pub(super) fn fs(&self) -> &HiddenFs {
        self.fs.as_ref().unwrap()
    }

    pub(super) fn root(&self) -> FileId {
        self.fs().root()
    }

    pub(super) fn file(&self, name: &[u8]) -> FileId {
        id(&self.fs().create(self.root(), name, 0o644, 0).unwrap().0)
    }

    pub(super) fn lun_bytes(&self, offset: u64, len: u64) -> Vec<u8> {
        let mut bytes = vec![0; usize::try_from(len).unwrap()];
        self.lun.read_exact_at(&mut bytes, offset).unwrap();
        bytes
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.fs = None;
        // Not `detach`: a panic here would hide the one that ended the test.
        let _detached = Command::new("losetup").arg("--detach").arg(&self.device).status();
    }
}

pub(super) fn id(attr: &Attr) -> FileId {
    csv_proto::file_id(attr.file).unwrap()
}

pub(super) fn cred(uid: u32, gid: u32, umask: u32) -> Cred {
    Cred { uid, gid, pid: 1, umask }
}

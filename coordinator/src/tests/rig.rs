//! A volume on a loop device and its coordinator.

pub(crate) use super::node::*;

use crate::{Coordinator, FsKind, Limits, Options, StartError};
use csv_types::{Epoch, FileId, NodeId};
use parking_lot::{Condvar, Mutex};
use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use tokio::sync::RwLock;

pub(crate) const WAIT: Duration = Duration::from_secs(20);
pub(crate) const N1: NodeId = NodeId(1);
pub(crate) const N2: NodeId = NodeId(2);
pub(crate) const N3: NodeId = NodeId(3);
/// ENOENT and others, as they come over the wire.
pub(crate) const ENOENT: i32 = libc::ENOENT;

pub(crate) type Events = Arc<(Mutex<Vec<(String, String)>>, Condvar)>;

pub(crate) struct Rig {
    pub(crate) coordinator: Option<Arc<Coordinator>>,
    pub(crate) events: Events,
    /// What the fence callback says.
    pub(crate) fences: Arc<AtomicBool>,
    /// What the confirm callback says.
    pub(crate) confirms: Arc<AtomicBool>,
    pub(crate) lease_ms: u64,
    pub(crate) recall_ms: u64,
    pub(crate) limits: Limits,
    /// Nodes that the next coordinator knows to be fenced.
    pub(crate) gone: Vec<NodeId>,
    lun: File,
    device: PathBuf,
    kind: FsKind,
    epoch: u64,
    _dir: tempfile::TempDir,
}

pub(crate) fn on_each_fs(test: impl Fn(&mut Rig)) {
    for kind in [FsKind::Ext4, FsKind::Xfs] {
        on(kind, &test);
    }
}

pub(crate) fn on(kind: FsKind, test: impl Fn(&mut Rig)) {
    if !rustix::process::geteuid().is_root() {
        // Past the harness, which swallows the output of tests that pass.
        writeln!(std::io::stderr(), "SKIPPED: needs root for loop devices and mounts").unwrap();
        return;
    }
    let mut rig = Rig::new(kind);
    rig.start();
    test(&mut rig);
}

pub(crate) fn wait_until(done: impl Fn() -> bool) {
    let deadline = Instant::now() + WAIT;
    while !done() {
        assert!(Instant::now() < deadline);
        std::thread::yield_now();
    }
}

fn run(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).output().unwrap();
    assert!(output.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

impl Rig {
    fn new(kind: FsKind) -> Rig {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("lun");
        let lun = File::options().create_new(true).read(true).write(true).open(&image).unwrap();
        lun.set_len(512 << 20).unwrap();
        let device = run("losetup", &["--find", "--show", "--direct-io=on", image.to_str().unwrap()]);
        match kind {
            FsKind::Ext4 => run("mkfs.ext4", &["-q", "-F", "-m", "0", &device]),
            FsKind::Xfs => run("mkfs.xfs", &["-q", "-f", "-m", "reflink=0", &device]),
        };
        Rig {
            coordinator: None,
            events: Arc::default(),
            fences: Arc::new(AtomicBool::new(true)),
            confirms: Arc::new(AtomicBool::new(true)),
            lease_ms: 5000,
            recall_ms: 1000,
            limits: Limits::default(),
            gone: Vec::new(),
            lun,
            device: device.into(),
            kind,
            epoch: 0,
            _dir: dir,
        }
    }

    /// Starts the next coordinator. A former one of this process may take a moment to let go of the device.
    pub(crate) fn start(&mut self) {
        self.epoch += 1;
        let deadline = Instant::now() + WAIT;
        loop {
            match Coordinator::start(self.options()) {
                Ok(coordinator) => {
                    self.coordinator = Some(coordinator);
                    return;
                }
                Err(StartError::Mount(crate::hidden::MountError::InUseHere { .. }))
                    if Instant::now() < deadline =>
                {
                    std::thread::yield_now();
                }
                Err(error) => panic!("{error}"),
            }
        }
    }

    fn options(&self) -> Options {
        let (events, fences) = (Arc::clone(&self.events), Arc::clone(&self.fences));
        Options {
            volume_name: "vol".to_owned(),
            volume_id: uuid::Uuid::from_u128(7),
            epoch: Epoch(self.epoch),
            device: self.device.clone(),
            fs_kind: self.kind,
            read_only: false,
            unsynced_lost: false,
            lease_ms: self.lease_ms,
            recall_ms: self.recall_ms,
            limits: self.limits,
            nodes: vec![(N1, "n1".to_owned()), (N2, "n2".to_owned()), (N3, "n3".to_owned())],
            gone: self.gone.clone(),
            redirect_all: false,
            redirect_nodes: Vec::new(),
            maintenance: false,
            own_node: N1,
            on_event: Arc::new(move |kind, message| {
                events.0.lock().push((kind.to_owned(), message));
                events.1.notify_all();
            }),
            fence: Arc::new(move |_| fences.load(Ordering::SeqCst)),
            confirm: Arc::new({
                let confirms = Arc::clone(&self.confirms);
                move || confirms.load(Ordering::SeqCst)
            }),
        }
    }

    pub(crate) fn co(&self) -> &Arc<Coordinator> {
        self.coordinator.as_ref().unwrap()
    }

    /// A file's lock. Each task that holds it or waits for it has one more reference to it.
    pub(crate) fn lock_of(&self, file: FileId) -> Arc<RwLock<()>> {
        Arc::clone(&self.co().core.lock().file(file).lock)
    }

    pub(crate) fn node(&self, node: NodeId) -> Arc<Node> {
        Node::connect(self.co(), node, [u8::try_from(node.0).unwrap(); 16], 0)
    }

    /// Would the next owner find ext4's journal in need of recovery? Asked when the mount is gone.
    pub(crate) fn needs_recovery(&mut self) -> bool {
        drop(self.coordinator.take());
        let deadline = Instant::now() + WAIT;
        while csv_lun::is_mounted(&self.device).unwrap().is_some() {
            assert!(Instant::now() < deadline, "the file system stays mounted");
            std::thread::yield_now();
        }
        let lun = csv_lun::Lun::open(&self.device, csv_lun::LunOptions::default()).unwrap();
        csv_lun::probe::ext4_needs_recovery(&lun).unwrap().unwrap()
    }

    /// The file system's own checker, after the coordinator has let go of the device.
    pub(crate) fn check_file_system(&mut self) {
        let last = Arc::downgrade(&self.coordinator.take().unwrap());
        let deadline = Instant::now() + WAIT;
        while last.strong_count() > 0 {
            assert!(Instant::now() < deadline, "somebody keeps the coordinator");
            std::thread::yield_now();
        }
        self.start();
        self.coordinator.take().unwrap().stop().unwrap();
        let device = self.device.to_str().unwrap();
        let deadline = Instant::now() + WAIT;
        loop {
            let output = match self.kind {
                FsKind::Ext4 => Command::new("e2fsck").args(["-f", "-n", device]).output().unwrap(),
                FsKind::Xfs => Command::new("xfs_repair").args(["-n", device]).output().unwrap(),
            };
            if output.status.success() {
                return;
            }
            // The mount goes away a moment after its last descriptor.
            assert!(Instant::now() < deadline, "{}", String::from_utf8_lossy(&output.stdout));
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Whatever changes the file system waits until the result is dropped.
    pub(crate) fn freeze(&self) -> Frozen {
        let path = self.co().fs().root_path();
        run("fsfreeze", &["--freeze", &path]);
        Frozen(path)
    }

    /// Waits for an event of this kind.
    pub(crate) fn event(&self, kind: &str) -> String {
        let deadline = Instant::now() + WAIT;
        let mut events = self.events.0.lock();
        loop {
            if let Some((_, message)) = events.iter().find(|(found, _)| found == kind) {
                return message.clone();
            }
            assert!(!self.events.1.wait_until(&mut events, deadline).timed_out(), "no {kind}: {events:?}");
        }
    }

    pub(crate) fn write_lun(&self, offset: u64, data: &[u8]) {
        self.lun.write_all_at(data, offset).unwrap();
        self.lun.sync_data().unwrap();
    }

    pub(crate) fn read_lun(&self, offset: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        self.lun.read_exact_at(&mut data, offset).unwrap();
        data
    }
}

pub(crate) struct Frozen(String);

impl Drop for Frozen {
    fn drop(&mut self) {
        run("fsfreeze", &["--unfreeze", &self.0]);
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        if let Some(coordinator) = self.coordinator.take() {
            coordinator.crash();
        }
        let _detached = Command::new("losetup").arg("--detach").arg(&self.device).status();
    }
}

//! On loop devices: two on one file are two nodes with one LUN (docs/decisions/008).

use super::*;
use crate::types::testbed::{Bed, properties, sh, spec};
use std::fs::{self, File};
use std::io::Write as _;
use std::process::{Child, Command};
use tempfile::NamedTempFile;

/// A file with a file system, and a loop device on it for each node. Everything is gone when dropped.
struct Lun {
    file: NamedTempFile,
    devices: Vec<String>,
}

impl Lun {
    /// `None` when not run as root.
    fn new(mkfs: &[&str], megabytes: u64) -> Option<Lun> {
        if !rustix::process::geteuid().is_root() {
            return None;
        }
        // Where direct I/O works; /tmp may be a tmpfs.
        let file = NamedTempFile::new_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        file.as_file().set_len(megabytes << 20).unwrap();
        let path = file.path().to_str().unwrap().to_owned();
        if let [program, args @ ..] = mkfs {
            sh(program, &[args, &[path.as_str()]].concat());
        }
        let mut lun = Lun { file, devices: Vec::new() };
        for _ in 0..2 {
            let device = sh("losetup", &["--find", "--show", "--direct-io=on", &path]);
            lun.devices.push(device.trim().to_owned());
        }
        Some(lun)
    }

    fn ext4() -> Option<Lun> {
        Lun::new(&["mkfs.ext4", "-q", "-F"], 64)
    }

    /// A node by number, whose disk is called `data`.
    fn node(&self, number: u32) -> Bed {
        let device = self.devices[number as usize - 1].clone();
        Bed::changed(number, |node| {
            node.luns.insert("data".into(), device.into());
        })
    }
}

impl Drop for Lun {
    fn drop(&mut self) {
        for device in &self.devices {
            let _ =
                Command::new("umount").arg("--lazy").arg(device).stderr(std::process::Stdio::null()).status();
            let _ = Command::new("losetup").args(["--detach", device]).status();
        }
        let _ = fs::remove_file(format!("{}.pr", self.file.path().display()));
    }
}

fn disk(bed: &Bed, generation: u64, more: &[(&str, &str)]) -> Box<dyn Resource> {
    let mount = point(bed);
    let mut spec =
        spec("PhysicalDisk", &[("device", "data"), ("fs", "ext4"), ("mount", mount.to_str().unwrap())]);
    spec.properties.extend(properties(more));
    spec.generation = generation;
    bed.open(&PhysicalDisk, spec)
}

fn point(bed: &Bed) -> PathBuf {
    bed.dir().join("disk")
}

/// Ends when dropped.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn contradictions_are_refused() {
    for (pair, expected) in [
        (("device", "dev/sda"), "neither"),
        (("mount", "/"), "mount point"),
        (("mount", "/a/../b"), "mount point"),
        (("options", "noatime,bind"), "\"bind\""),
    ] {
        let mut given = properties(&[("device", "data"), ("fs", "ext4"), ("mount", "/srv/data")]);
        given.extend(properties(&[pair]));
        let error = PhysicalDisk.check(&given).unwrap_err();
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn a_disk_comes_online_is_adopted_and_goes_in_good_order() {
    let Some(lun) = Lun::ext4() else { return };
    let bed = lun.node(1);
    let mut resource = disk(&bed, 1, &[("options", "noatime"), ("check", "always")]);
    assert!(resource.looks_alive().is_err());
    resource.online().unwrap();
    resource.looks_alive().unwrap();
    resource.is_alive().unwrap();
    fs::write(point(&bed).join("file"), "text").unwrap();
    drop(resource);
    let mut adopted = disk(&bed, 1, &[]);
    adopted.adopt().unwrap();
    adopted.is_alive().unwrap();
    let file = File::create(point(&bed).join("busy")).unwrap();
    let error = adopted.offline().unwrap_err();
    assert!(error.to_string().contains(&format!("(pid {}", std::process::id())), "{error}");
    let told = adopted.control("holders", &serde_json::Value::Null).unwrap();
    assert!(told["holders"].as_str().unwrap().contains("busy"), "{told}");
    adopted.is_alive().unwrap();
    drop(file);
    adopted.offline().unwrap();
    adopted.terminate().unwrap();
    assert!(bed.saved().is_none());
    assert!(adopted.looks_alive().is_err());
    // The next node finds what was written, and nobody to push out.
    let other = lun.node(2);
    let mut next = disk(&other, 2, &[]);
    next.online().unwrap();
    assert_eq!(fs::read_to_string(point(&other).join("file")).unwrap(), "text");
    assert!(!other.events().iter().any(|event| event.contains("was taken from")), "{:?}", other.events());
    next.offline().unwrap();
}

#[test]
fn the_next_owner_shuts_the_old_one_out_which_tells_at_once() {
    let Some(lun) = Lun::ext4() else { return };
    let (old, new) = (lun.node(1), lun.node(2));
    let mut first = disk(&old, 1, &[]);
    first.online().unwrap();
    let mut synced = File::create(point(&old).join("synced")).unwrap();
    synced.write_all(b"kept").unwrap();
    synced.sync_all().unwrap();
    fs::write(point(&old).join("unsynced"), vec![7; 1 << 20]).unwrap();
    let began = std::time::Instant::now();
    let mut second = disk(&new, 2, &[]);
    second.online().unwrap();
    println!("takeover from a live owner: {:?}", began.elapsed());
    assert!(new.events().iter().any(|event| event.contains("taken from node 1")), "{:?}", new.events());
    assert_eq!(fs::read_to_string(point(&new).join("synced")).unwrap(), "kept");
    let lost = old.failure_reported(Duration::from_secs(60)).unwrap();
    println!("the old owner has told after {:?}", began.elapsed());
    assert!(lost.contains("node 2"), "{lost}");
    assert!(first.looks_alive().is_err());
    assert!(synced.write_all(b"late").and_then(|()| synced.sync_all()).is_err());
    // With a file open and nothing that can be written any more.
    first.terminate().unwrap();
    assert!(
        device::mounted(&device::number(Path::new(&lun.devices[0])).unwrap(), &point(&old))
            .unwrap()
            .is_none()
    );
    drop(synced);
    second.is_alive().unwrap();
    // What is late does not come back.
    let error = disk(&old, 1, &[]).online().unwrap_err();
    assert!(error.to_string().contains("later than"), "{error}");
    second.offline().unwrap();
    sh("e2fsck", &["-f", "-n", lun.file.path().to_str().unwrap()]);
}

#[test]
fn terminate_leaves_a_busy_disk_that_nobody_can_write() {
    let Some(lun) = Lun::ext4() else { return };
    let bed = lun.node(1);
    let mut resource = disk(&bed, 1, &[]);
    resource.online().unwrap();
    let path = point(&bed).join("file");
    let mut file = File::create(&path).unwrap();
    file.write_all(b"before").unwrap();
    let sleeper = Command::new("sleep").arg("1000").current_dir(point(&bed)).spawn().unwrap();
    let sleeper = Process(sleeper);
    // A new host, which has no keeper.
    drop(resource);
    let mut resource = disk(&bed, 1, &[]);
    resource.terminate().unwrap();
    assert!(file.write_all(b"after").and_then(|()| file.sync_all()).is_err());
    assert!(!path.exists());
    resource.terminate().unwrap();
    drop((file, sleeper));
    let other = lun.node(2);
    let mut next = disk(&other, 2, &[]);
    next.online().unwrap();
    assert_eq!(fs::read_to_string(point(&other).join("file")).unwrap(), "before");
    next.offline().unwrap();
}

#[test]
fn a_disk_that_is_not_what_it_should_be_is_refused() {
    let Some(lun) = Lun::ext4() else { return };
    let bed = lun.node(1);
    let refused = |bed: &Bed, more: &[(&str, &str)]| disk(bed, 1, more).online().unwrap_err();
    let error = refused(&bed, &[("fs", "xfs")]);
    assert!(matches!(&error, Failure::Config(text) if text.contains("ext4")), "{error}");
    let error = refused(&bed, &[("device", "other")]);
    assert!(matches!(&error, Failure::NotHere(text) if text.contains("data")), "{error}");
    let error = refused(&bed, &[("device", "/dev/disk/by-id/none")]);
    assert!(matches!(&error, Failure::NotHere(_)), "{error}");
    let error = refused(&bed, &[("device", "/etc/hostname")]);
    assert!(matches!(&error, Failure::Config(_)), "{error}");
    let elsewhere = bed.dir().join("elsewhere");
    fs::create_dir(&elsewhere).unwrap();
    sh("mount", &[&lun.devices[0], elsewhere.to_str().unwrap()]);
    let error = refused(&bed, &[]);
    sh("umount", &[elsewhere.to_str().unwrap()]);
    assert!(error.to_string().contains("in use"), "{error}");
    assert!(bed.saved().is_none());
    let foreign = Bed::changed(1, |node| {
        node.cluster_id = "other".into();
        node.luns = bed.node().luns.clone();
    });
    let mut theirs = disk(&foreign, 1, &[]);
    theirs.online().unwrap();
    let other = lun.node(2);
    let error = refused(&other, &[]);
    assert!(error.to_string().contains("outside this cluster"), "{error}");
    let mut forced = disk(&other, 1, &[("break_foreign", "true")]);
    forced.online().unwrap();
    theirs.terminate().unwrap();
    forced.offline().unwrap();
}

#[test]
fn a_volume_of_the_cluster_and_an_empty_disk_are_refused() {
    let Some(lun) = Lun::new(&[], 64) else { return };
    let bed = lun.node(1);
    let error = disk(&bed, 1, &[]).online().unwrap_err();
    assert!(matches!(&error, Failure::Config(text) if text.contains("mkfs.ext4")), "{error}");
    let request = csv_lun::CreateRequest {
        lun: PathBuf::from(&lun.devices[0]),
        name: "vol1".into(),
        fs: csv_ondisk::FsKind::Ext4,
        cluster_id: uuid::Uuid::from_u128(1),
        force: true,
    };
    csv_lun::create_volume(&request, &mut |_| {}).unwrap();
    let error = disk(&bed, 1, &[]).online().unwrap_err();
    assert!(matches!(&error, Failure::Config(text) if text.contains("ClusterSharedVolume")), "{error}");
}

#[test]
fn xfs_replays_its_log_and_needs_no_reservation_when_told_so() {
    let Some(lun) = Lun::new(&["mkfs.xfs", "-q"], 320) else { return };
    let bed = lun.node(1);
    let mut resource = disk(&bed, 1, &[("fs", "xfs"), ("reservations", "off")]);
    resource.online().unwrap();
    fs::write(point(&bed).join("file"), "text").unwrap();
    let held = File::open(point(&bed).join("file")).unwrap();
    resource.is_alive().unwrap();
    resource.terminate().unwrap();
    drop(held);
    resource.online().unwrap();
    assert_eq!(fs::read_to_string(point(&bed).join("file")).unwrap(), "text");
    resource.offline().unwrap();
}

#[test]
fn a_file_system_with_errors_is_corrected_or_refused() {
    let Some(lun) = Lun::ext4() else { return };
    let bed = lun.node(1);
    let image = lun.file.path().to_str().unwrap();
    sh("debugfs", &["-w", "-R", "set_super_value free_inodes_count 1", image]);
    let mut resource = disk(&bed, 1, &[("check", "always")]);
    resource.online().unwrap();
    assert!(bed.events().iter().any(|event| event.contains("were corrected")), "{:?}", bed.events());
    resource.offline().unwrap();
    // A root directory that has gone is nothing for e2fsck -p.
    sh("debugfs", &["-w", "-R", "clri <2>", image]);
    let error = resource.online().unwrap_err();
    assert!(error.to_string().contains("run e2fsck on it by hand"), "{error}");
    resource.terminate().unwrap();
    assert!(bed.saved().is_none());
}

#[test]
fn a_file_system_that_has_gone_read_only_is_not_alive() {
    let Some(lun) = Lun::ext4() else { return };
    let bed = lun.node(1);
    let mut resource = disk(&bed, 1, &[("options", "errors=remount-ro")]);
    resource.online().unwrap();
    let name = lun.devices[0].rsplit('/').next().unwrap();
    fs::write(format!("/sys/fs/ext4/{name}/trigger_fs_error"), "test").unwrap();
    let error = resource.looks_alive().unwrap_err();
    assert!(error.to_string().contains("read-only after an error"), "{error}");
    resource.terminate().unwrap();
    // Read-only because it was asked for is another matter.
    let mut resource = disk(&bed, 1, &[("options", "ro")]);
    resource.online().unwrap();
    resource.is_alive().unwrap();
    resource.offline().unwrap();
}

/// A mount that is gone when dropped.
struct Mounted(PathBuf);

impl Mounted {
    fn bind(from: &Path, to: PathBuf) -> Mounted {
        fs::create_dir(&to).unwrap();
        sh("mount", &["--bind", from.to_str().unwrap(), to.to_str().unwrap()]);
        Mounted(to)
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(&self.0).status();
    }
}

#[test]
fn a_mount_point_behind_a_symbolic_link_is_followed_to_its_end() {
    let Some(lun) = Lun::ext4() else { return };
    let bed = lun.node(1);
    fs::create_dir(bed.dir().join("real")).unwrap();
    std::os::unix::fs::symlink(bed.dir().join("real"), bed.dir().join("link")).unwrap();
    let given = bed.dir().join("link/disk");
    let real = bed.dir().join("real/disk");
    let number = device::number(Path::new(&lun.devices[0])).unwrap();
    let mounted = || device::mounted(&number, &real).unwrap().is_some();
    let mut resource = disk(&bed, 1, &[("mount", given.to_str().unwrap())]);
    resource.online().unwrap();
    assert!(mounted());
    resource.looks_alive().unwrap();
    resource.is_alive().unwrap();
    resource.offline().unwrap();
    assert!(!mounted());
    resource.online().unwrap();
    resource.terminate().unwrap();
    assert!(!mounted());
    assert_eq!(csv_lun::is_mounted(Path::new(&lun.devices[0])).unwrap(), None);
}

#[test]
fn a_disk_with_another_mount_of_it_is_kept_and_shut_down_by_terminate() {
    let Some(lun) = Lun::ext4() else { return };
    let (bed, other) = (lun.node(1), lun.node(2));
    let mut resource = disk(&bed, 1, &[]);
    resource.online().unwrap();
    let bound = Mounted::bind(&point(&bed), bed.dir().join("bound"));
    let mut file = File::create(bound.0.join("file")).unwrap();
    file.write_all(b"before").unwrap();
    let error = resource.offline().unwrap_err();
    assert!(error.to_string().contains(bound.0.to_str().unwrap()), "{error}");
    let claim = Claim {
        device: PathBuf::from(&lun.devices[0]),
        key: key::own(bed.node(), 1),
        generation: 1,
        break_foreign: false,
    };
    assert!(claim.is_held().unwrap());
    // The bind mount can be written, and no other mount is left to reach it by.
    file.write_all(b" and after").and_then(|()| file.sync_all()).unwrap();
    resource.terminate().unwrap();
    assert!(bed.events().iter().any(|event| event.contains("was shut down")), "{:?}", bed.events());
    assert!(!claim.is_held().unwrap());
    assert!(file.write_all(b" late").and_then(|()| file.sync_all()).is_err());
    let mut next = disk(&other, 2, &[]);
    next.online().unwrap();
    assert_eq!(fs::read_to_string(point(&other).join("file")).unwrap(), "before and after");
    next.is_alive().unwrap();
    next.offline().unwrap();
}

#[test]
fn another_mount_of_xfs_or_of_a_read_only_disk_is_shut_down_as_well() {
    for (mkfs, more) in [
        (&["mkfs.xfs", "-q"][..], &[("fs", "xfs")][..]),
        (&["mkfs.ext4", "-q", "-F"][..], &[("options", "ro")][..]),
    ] {
        let Some(lun) = Lun::new(mkfs, 320) else { return };
        let bed = lun.node(1);
        let mut resource = disk(&bed, 1, more);
        resource.online().unwrap();
        let bound = Mounted::bind(&point(&bed), bed.dir().join("bound"));
        assert!(resource.offline().is_err());
        resource.terminate().unwrap();
        assert!(bed.events().iter().any(|event| event.contains("was shut down")), "{:?}", bed.events());
        assert!(File::create(bound.0.join("file")).is_err());
    }
}

#[test]
fn a_disk_that_is_mounted_in_another_namespace_counts_as_used() {
    let Some(lun) = Lun::ext4() else { return };
    let bed = lun.node(1);
    let mut resource = disk(&bed, 1, &[]);
    resource.online().unwrap();
    let path = point(&bed).join("file");
    // The disks of other tests are not to be held by it.
    let script = format!(
        "while read -r device at rest; do case $device in /dev/loop*) [ $at = {} ] || umount -l $at;; esac; done \
         </proc/self/mounts; echo in >{}; exec sleep 1000",
        point(&bed).display(),
        path.display()
    );
    let args = ["--mount", "--propagation", "private", "sh", "-c", &script];
    let apart = Process(Command::new("unshare").args(args).spawn().unwrap());
    while !path.exists() {
        std::thread::sleep(Duration::from_millis(20));
    }
    let error = resource.offline().unwrap_err();
    assert!(error.to_string().contains(&format!("(pid {})", apart.0.id())), "{error}");
    let within = PathBuf::from(format!("/proc/{}/root{}", apart.0.id(), path.display()));
    fs::write(&within, "still").unwrap();
    resource.terminate().unwrap();
    let late = File::create(&within).and_then(|mut file| file.write_all(b"late"));
    assert!(late.is_err());
}

#[test]
fn a_disk_with_a_mount_over_it_is_not_given_up() {
    let Some(lun) = Lun::ext4() else { return };
    let bed = lun.node(1);
    let mut resource = disk(&bed, 1, &[("reservations", "off")]);
    resource.online().unwrap();
    let mut file = File::create(point(&bed).join("file")).unwrap();
    sh("mount", &["-t", "tmpfs", "over", point(&bed).to_str().unwrap()]);
    let over = Mounted(point(&bed));
    assert!(resource.offline().is_err());
    resource.terminate().unwrap();
    assert!(file.write_all(b"late").and_then(|()| file.sync_all()).is_err());
    drop(over);
}

#[test]
fn a_disk_is_not_taken_when_that_cannot_be_kept() {
    let Some(lun) = Lun::ext4() else { return };
    let bed = lun.node(1);
    bed.set_full(true);
    let mut resource = disk(&bed, 1, &[]);
    let error = resource.online().unwrap_err();
    assert!(error.to_string().contains("could not be kept"), "{error}");
    let device = PathBuf::from(&lun.devices[0]);
    let claim = Claim { device, key: key::own(bed.node(), 1), generation: 1, break_foreign: false };
    assert!(!claim.is_held().unwrap());
    assert_eq!(csv_lun::is_mounted(&claim.device).unwrap(), None);
}

//! The device: which one, what is on it, and its file system checked, mounted, and taken down.

use super::holders;
use crate::api::{Context, EventLevel, Failure};
use crate::types::mounts::{self, Mount};
use crate::types::run::{Bounded, Program};
use csv_lun::{Lun, LunOptions, probe, reservation, sys};
use nix::mount::{MntFlags, umount2};
use rustix::fs::{Mode, OFlags, openat};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_flag, fsconfig_set_string,
    fsmount, fsopen,
};
use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// For a check of the file system, which may have to read all of it.
const CHECK_LIMIT: Duration = Duration::from_secs(6 * 3600);
/// For mounting, which may replay a log and, with ext4's mmp, waits some time.
const MOUNT_LIMIT: Duration = Duration::from_secs(600);
/// For one look at the disk.
pub(super) const LOOK_LIMIT: Duration = Duration::from_secs(10);
/// For each step of taking it down by force.
const FORCE_LIMIT: Duration = Duration::from_secs(5);
/// How often a busy file system is tried again: programs that have just ended let go of it late.
const BUSY_TRIES: u32 = 10;
const BUSY_PAUSE: Duration = Duration::from_millis(200);

/// The device of a property, by the node's name for it or by path.
pub(super) fn resolve(context: &Context, given: &str) -> Result<PathBuf, Failure> {
    let luns = &context.node().luns;
    let path = if given.starts_with('/') {
        PathBuf::from(given)
    } else {
        luns.get(given).cloned().ok_or_else(|| {
            let names: Vec<&str> = luns.keys().map(String::as_str).collect();
            let names = if names.is_empty() { "none".to_owned() } else { names.join(", ") };
            Failure::NotHere(format!("this node has no device named {given}; its file has {names}"))
        })?
    };
    let stat = fs::metadata(&path).map_err(|error| {
        Failure::NotHere(format!(
            "the disk {} is not on this node: {error}; check its cable, zoning or iSCSI session",
            path.display()
        ))
    })?;
    if !stat.file_type().is_block_device() {
        return Err(Failure::Config(format!("{} is no block device", path.display())));
    }
    Ok(path)
}

/// Its number as mountinfo has it.
pub(super) fn number(device: &Path) -> std::io::Result<String> {
    let rdev = fs::metadata(device)?.rdev();
    Ok(format!("{}:{}", rustix::fs::major(rdev), rustix::fs::minor(rdev)))
}

/// The mount at the point, if it is that of the device.
pub(super) fn mounted(device: &str, point: &Path) -> Result<Option<Mount>, Failure> {
    let mount = mounts::at(point).map_err(|error| Failure::new(format!("mounts cannot be read: {error}")))?;
    Ok(mount.filter(|mount| mount.device == device))
}

/// Makes the mount point; its path without symbolic links, as mountinfo will have it.
pub(super) fn make_point(point: &Path) -> Result<PathBuf, Failure> {
    fs::create_dir_all(point)
        .and_then(|()| fs::canonicalize(point))
        .map_err(|error| Failure::new(format!("the mount point {} cannot be made: {error}", point.display())))
}

fn open_lun(path: &Path) -> Result<Lun, Failure> {
    Lun::open(path, LunOptions { read_only: true, ..LunOptions::default() }).map_err(Failure::new)
}

/// Is it free, and is the right file system on it? Reads only.
pub(super) fn examine(device: &Path, fs: &str) -> Result<(), Failure> {
    let shown = device.display();
    let user = csv_lun::is_mounted(device)
        .map_err(|error| Failure::new(format!("who uses {shown} cannot be found out: {error}")))?;
    if let Some(user) = user {
        return Err(Failure::new(format!("the disk {shown} is in use on this node: {user}; end that first")));
    }
    // In the lab this node sees nothing of it before it has registered.
    let found = probe(&open_lun(&reservation::read_path(device))?).map_err(Failure::new)?;
    if found.label.is_some() {
        return Err(Failure::Config(format!(
            "the disk {shown} carries {}; use a ClusterSharedVolume, or another disk",
            found.describe()
        )));
    }
    match found.fs {
        Some(info) if info.kind.as_str() == fs => Ok(()),
        _ => Err(Failure::Config(format!(
            "the disk {shown} holds {}, not {fs}; make the file system (mkfs.{fs}) or correct the property fs",
            found.describe()
        ))),
    }
}

/// Forgets what the page cache has of the disk from before this node had it.
pub(super) fn forget_cache(device: &Path) -> Result<(), Failure> {
    open_lun(device)?.drop_page_cache().map_err(Failure::new)
}

/// Checks the file system before it is mounted.
pub(super) fn check(context: &Context, device: &Path, fs: &str, how: &str) -> Result<(), Failure> {
    if how == "never" || (fs == "xfs" && how != "always") {
        // XFS replays its log when it is mounted, and needs no more.
        return Ok(());
    }
    context.progress(&format!("checking the file system on {}", device.display()));
    let shown = device.to_string_lossy();
    if fs == "xfs" {
        let what = format!(
            "the XFS on {shown} has errors, or a log to be replayed: mount it once by hand, then xfs_repair"
        );
        let program = Program::new("xfs_repair", "xfsprogs", CHECK_LIMIT).args(["-n", &shown]);
        return program.succeed(context, &what).map(drop);
    }
    // Does nothing, quickly, where the file system was unmounted well or its journal is enough.
    let mut args = vec!["-p"];
    if how == "always" {
        args.push("-f");
    }
    args.push(&shown);
    let output = Program::new("e2fsck", "e2fsprogs", CHECK_LIMIT).args(args).run(context)?;
    match output.code {
        Some(0) => Ok(()),
        // e2fsck(8): corrected; 2: and a reboot is wanted where it was mounted.
        Some(1..=3) => {
            let text = format!("errors on {shown} were corrected: {}", output.said());
            context.event(EventLevel::Warning, &text);
            Ok(())
        }
        _ => Err(Failure::new(format!(
            "the file system on {shown} has errors that e2fsck -p does not correct: {}; run e2fsck on it by hand while \
             this resource is offline",
            output.said()
        ))),
    }
}

/// Mounts it.
pub(super) fn mount(
    context: &Context,
    device: &Path,
    fs: &str,
    number: &str,
    point: &Path,
    options: &str,
) -> Result<(), Failure> {
    let shown = point.display();
    let there = mounts::at(point).map_err(|error| Failure::new(format!("mounts cannot be read: {error}")))?;
    if let Some(there) = there {
        let text =
            format!("{shown} is a mount of {} ({}) already; choose another mount", there.device, there.fs);
        return Err(Failure::new(text));
    }
    context.progress(&format!("mounting {} at {shown}", device.display()));
    let what = format!("{} could not be mounted at {shown}", device.display());
    let mut args = vec!["-t".to_owned(), fs.to_owned()];
    if !options.is_empty() {
        args.extend(["-o".to_owned(), options.to_owned()]);
    }
    args.extend([device.to_string_lossy().into_owned(), point.to_string_lossy().into_owned()]);
    Program::new("mount", "mount", MOUNT_LIMIT).args(args).succeed(context, &what)?;
    // A mount that is not found again would count as gone, and its disk as free.
    mounted(number, point)?.map(drop).ok_or_else(|| {
        Failure::new(format!("{what}: mount says it is, but {number} is not there in mountinfo"))
    })
}

/// Unmounts in good order.
pub(super) fn unmount(context: &Context, calls: &mut Bounded, point: &Path) -> Result<(), Failure> {
    let shown = point.display();
    context.progress(&format!("writing {shown} to its disk"));
    let path = point.to_owned();
    calls.long(context, &format!("writing {shown} to its disk"), move || {
        let root = File::open(&path).map_err(|error| format!("{}: {error}", path.display()))?;
        rustix::fs::syncfs(&root)
            .map_err(|errno| format!("{} was not written to its disk: {errno}", path.display()))
    })?;
    for _ in 0..BUSY_TRIES {
        let path = point.to_owned();
        let done = calls.long(context, &format!("unmounting {shown}"), move || {
            Ok(umount2(&path, MntFlags::UMOUNT_NOFOLLOW))
        })?;
        match done {
            Ok(()) => return Ok(()),
            Err(nix::Error::EBUSY) => crate::types::run::pause(context, BUSY_PAUSE)?,
            Err(errno) => return Err(Failure::new(format!("{shown} cannot be unmounted: {errno}"))),
        }
    }
    Err(Failure::new(format!(
        "{shown} cannot be unmounted, it is kept busy by {}; end them, or let this resource's dependents end them",
        holders::describe(point)
    )))
}

/// Who still uses the disk on this node now that our mount of it is gone, such as a bind mount or a mount in another
/// namespace; `None` when nobody does. Looks again for a while at what the kernel holds, since a detached mount ends late.
pub(super) fn used_by(calls: &mut Bounded, device: &Path, number: &str) -> Result<Option<String>, Failure> {
    for _ in 0..BUSY_TRIES {
        if !Path::new("/sys/dev/block").join(number).exists() {
            // What the node has lost, nothing of it writes.
            return Ok(None);
        }
        let path = device.to_owned();
        let what = format!("finding out who uses {}", device.display());
        let user = calls.call(FORCE_LIMIT, &what, move || {
            csv_lun::is_mounted(&path).map_err(|error| format!("{}: {error}", path.display()))
        })?;
        if user.is_none() {
            return Ok(None);
        }
        // A mount does not end by itself.
        if let Some(mounts) = holders::mounts_of(number) {
            return Ok(Some(mounts));
        }
        std::thread::sleep(BUSY_PAUSE);
    }
    Ok(Some(
        "the kernel holds it (files open on a mount that was detached, swap, LVM, mdraid or multipath)"
            .into(),
    ))
}

/// What [`take_down`] came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Down {
    /// Our mount is gone; another one of the same file system may write on.
    Unmounted,
    /// The file system is shut down, whoever has it mounted.
    ShutDown,
}

/// Takes the file system down so that nothing of this node can write it any more, whoever has files open. Where the disk is
/// still ours, what was written before is kept if that takes no longer than some seconds.
pub(super) fn take_down(
    calls: &mut Bounded,
    device: &Path,
    point: &Path,
    is_ours: bool,
) -> Result<Down, Failure> {
    let shown = point.display();
    let path = point.to_owned();
    let tried = is_ours.then(|| {
        calls.call(FORCE_LIMIT, &format!("unmounting {shown}"), move || {
            if let Ok(root) = File::open(&path) {
                let _ = rustix::fs::syncfs(&root);
            }
            Ok(umount2(&path, MntFlags::UMOUNT_NOFOLLOW))
        })
    });
    // As a power cut; the log is flushed only to a disk that is ours and answers.
    let flags = match tried {
        Some(Ok(Ok(()))) => return Ok(Down::Unmounted),
        Some(Ok(Err(_))) => sys::SHUTDOWN_LOGFLUSH,
        Some(Err(_)) | None => sys::SHUTDOWN_NOLOGFLUSH,
    };
    let path = point.to_owned();
    // A call of its own, since the one before may hang for as long as the disk does.
    let mut force = Bounded::default();
    force.call(FORCE_LIMIT, &format!("shutting the file system at {shown} down"), move || {
        let root = File::open(&path).map_err(|error| error.to_string())?;
        sys::fs_shutdown(&root, flags).map_err(|error| error.to_string())
    })?;
    umount2(point, MntFlags::MNT_DETACH)
        .map_err(|errno| Failure::new(format!("{shown} is shut down but cannot be detached: {errno}")))?;
    if is_ours {
        drop_cache(&mut force, device);
    }
    Ok(Down::ShutDown)
}

/// Drops metadata that the log has already, on its way to its place: it must not arrive there after others have written.
fn drop_cache(calls: &mut Bounded, device: &Path) {
    let device = device.to_owned();
    let _ = calls.call(FORCE_LIMIT, "dropping the disk's cache", move || {
        open_lun(&device)
            .and_then(|lun| lun.drop_page_cache().map_err(Failure::new))
            .map_err(|e| e.to_string())
    });
}

/// Shuts the file system of the disk down where no mount of it can be reached from here, by one more mount of it.
pub(super) fn shut_down(device: &Path, fs: &str, is_ours: bool) -> Result<(), Failure> {
    let shown = device.display();
    let flags = if is_ours { sys::SHUTDOWN_LOGFLUSH } else { sys::SHUTDOWN_NOLOGFLUSH };
    let (path, kind) = (device.to_owned(), fs.to_owned());
    let mut force = Bounded::default();
    force.call(FORCE_LIMIT, &format!("shutting the file system on {shown} down"), move || {
        let root = mount_apart(&path, &kind)
            .map_err(|errno| format!("{} cannot be reached to be shut down: {errno}", path.display()))?;
        sys::fs_shutdown(&root, flags).map_err(|error| error.to_string())
    })?;
    if is_ours {
        drop_cache(&mut force, device);
    }
    Ok(())
}

/// The root directory of a mount that is nowhere in the tree, so that no namespace gets it and it ends with its file.
/// The kernel gives one super block to all mounts of a device.
fn mount_apart(device: &Path, fs: &str) -> rustix::io::Result<OwnedFd> {
    let attempt = |read_only: bool| {
        let config = fsopen(fs, FsOpenFlags::FSOPEN_CLOEXEC)?;
        fsconfig_set_string(&config, "source", device)?;
        if read_only {
            fsconfig_set_flag(&config, "ro")?;
        }
        fsconfig_create(&config)?;
        fsmount(&config, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty())
    };
    // Busy when the one that is there is read-only.
    let mount = match attempt(false) {
        Err(Errno::BUSY | Errno::ROFS | Errno::ACCESS) => attempt(true)?,
        other => other?,
    };
    openat(&mount, ".", OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
}

/// A look at the disk itself, past every cache, and at the directory.
pub(super) fn look(calls: &mut Bounded, device: &Path, point: &Path) -> Result<(), Failure> {
    let (device, point) = (device.to_owned(), point.to_owned());
    let what = format!("listing {}", point.display());
    calls.call(LOOK_LIMIT, &what, move || {
        let lun = open_lun(&device).map_err(|error| error.to_string())?;
        probe(&lun).map_err(|error| error.to_string())?;
        let said = |error: std::io::Error| format!("{} cannot be listed: {error}", point.display());
        fs::read_dir(&point).map_err(said)?.next().transpose().map_err(said).map(drop)
    })
}

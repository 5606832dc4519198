//! The FUSE connection: mounting, and writing replies from any thread.
//!
//! csvfs mounts by itself and keeps /dev/fuse, because the data path reads requests with their payload into an
//! aligned buffer of its own (fuser's buffer would cost a copy of every byte written). fuser gets all other
//! requests over a socket pair, as if that were /dev/fuse.

use super::abi;
use anyhow::{Context, Result, bail};
use nix::mount::{MntFlags, MsFlags};
use rustix::io::Errno;
use std::fs::File;
use std::io::IoSlice;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

/// Largest read or write that the kernel sends, in bytes.
pub(crate) const IO_BYTES_MAX: usize = 1 << 20;

/// An open FUSE connection; the mount goes away with it.
#[derive(Debug)]
pub(crate) struct Device {
    file: File,
    mount_point: PathBuf,
    /// Once only: a second time it could take off the mount of this volume's next csvfs.
    unmounted: AtomicBool,
}

impl Device {
    /// Mounts `/ClusterStorage/<volume>`. A mount left behind by a csvfs that died is taken away first.
    ///
    /// # Errors
    /// In words for the administrator.
    pub(crate) fn mount(volume: &str, mount_point: &Path) -> Result<Device> {
        clear_dead_mount(mount_point)?;
        std::fs::create_dir_all(mount_point)
            .with_context(|| format!("cannot create the mount point {}", mount_point.display()))?;
        let file = File::options().read(true).write(true).open("/dev/fuse").context(
            "cannot open /dev/fuse: the kernel has no FUSE; load the fuse module (modprobe fuse) and start again",
        )?;
        let options = format!(
            "fd={},rootmode=40000,user_id=0,group_id=0,default_permissions,allow_other,max_read={IO_BYTES_MAX}",
            file.as_raw_fd()
        );
        nix::mount::mount(
            Some(format!("csvfs:{volume}").as_str()),
            mount_point,
            Some("fuse.csvfs"),
            MsFlags::empty(),
            Some(options.as_str()),
        )
        .with_context(|| match rustix::process::geteuid().is_root() {
            true => format!("cannot mount on {}", mount_point.display()),
            false => format!("cannot mount on {}: csvfs must run as root", mount_point.display()),
        })?;
        rustix::io::ioctl_fionbio(&file, true).context("cannot make /dev/fuse non-blocking")?;
        Ok(Device { file, mount_point: mount_point.to_owned(), unmounted: AtomicBool::new(false) })
    }

    /// Reads one request: its first [`abi::WRITE_HEAD_BYTES`] bytes into `head`, the rest into `payload`.
    /// EAGAIN when there is none, ENODEV when the connection is over.
    pub(crate) fn receive(&self, head: &mut [u8], payload: &mut [u8]) -> Result<usize, Errno> {
        let mut parts = [std::io::IoSliceMut::new(head), std::io::IoSliceMut::new(payload)];
        rustix::io::readv(&self.file, &mut parts)
    }

    /// Sends a reply with data. A request that the kernel has given up gives ENOENT, which is not an error.
    pub(crate) fn reply(&self, unique: u64, data: &[u8]) {
        let head = abi::out_header(unique, 0, data.len());
        self.send(&[IoSlice::new(&head), IoSlice::new(data)]);
    }

    /// As `reply`, with data that lies in several places.
    pub(crate) fn reply_parts(&self, unique: u64, parts: &[&[u8]]) {
        let head = abi::out_header(unique, 0, parts.iter().map(|part| part.len()).sum());
        let parts: Vec<IoSlice<'_>> =
            std::iter::once(&head[..]).chain(parts.iter().copied()).map(IoSlice::new).collect();
        self.send(&parts);
    }

    /// Answers a write.
    pub(crate) fn wrote(&self, unique: u64, len: usize) {
        self.reply(unique, &abi::write_out(u32::try_from(len).unwrap_or(u32::MAX)));
    }

    /// Sends an error.
    pub(crate) fn error(&self, unique: u64, errno: Errno) {
        let head = abi::out_header(unique, errno.raw_os_error(), 0);
        self.send(&[IoSlice::new(&head)]);
    }

    /// Sends a whole message as it is (fuser's).
    pub(crate) fn send_raw(&self, message: &[u8]) {
        self.send(&[IoSlice::new(message)]);
    }

    /// Makes the kernel drop what it caches of a file for mmap(2), after writing back what is dirty; waits for that.
    pub(crate) fn drop_pages(&self, nodeid: u64) {
        self.send(&[IoSlice::new(&abi::inval_inode(nodeid))]);
    }

    fn send(&self, parts: &[IoSlice<'_>]) {
        match rustix::io::writev(&self.file, parts) {
            Ok(_) | Err(Errno::NOENT | Errno::NODEV) => {}
            Err(error) => tracing::error!(%error, "a FUSE reply was refused by the kernel"),
        }
    }

    /// Takes the mount away; the kernel then ends the connection.
    pub(crate) fn unmount(&self) {
        if self.unmounted.swap(true, Ordering::AcqRel) {
            return;
        }
        if let Err(error) = nix::mount::umount2(&self.mount_point, MntFlags::MNT_DETACH) {
            tracing::debug!(%error, "unmount");
        }
    }
}

impl AsFd for Device {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        self.unmount();
    }
}

fn clear_dead_mount(mount_point: &Path) -> Result<()> {
    match std::fs::symlink_metadata(mount_point) {
        // ENOTCONN: the connection of an earlier csvfs is dead.
        Err(error) if error.raw_os_error() == Some(nix::libc::ENOTCONN) => {
            nix::mount::umount2(mount_point, MntFlags::MNT_DETACH)
                .with_context(|| format!("cannot take the dead mount off {}", mount_point.display()))
        }
        Ok(_) if is_mounted(mount_point)? => bail!(
            "{} is a mount point already: another csvfs serves this volume here, or something else is mounted; \
             stop it or unmount it first",
            mount_point.display()
        ),
        Ok(_) | Err(_) => Ok(()),
    }
}

fn is_mounted(mount_point: &Path) -> Result<bool> {
    let table =
        std::fs::read_to_string("/proc/self/mountinfo").context("cannot read /proc/self/mountinfo")?;
    let wanted = mount_point.to_string_lossy().replace(' ', "\\040");
    Ok(table.lines().any(|line| line.split(' ').nth(4) == Some(wanted.as_str())))
}

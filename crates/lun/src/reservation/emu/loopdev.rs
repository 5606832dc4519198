//! Loop devices as the paths of a file LUN: which file is behind one, and taking one's access away and giving it back.
//!
//! Access is taken in two steps (docs/decisions/008). First the device is cut to one sector, so that the block layer
//! refuses new I/O at its door. The kernel makes that change while the device stands still; requests that had passed the
//! door by then wait, and run after it. So the second step moves the device's window past any possible end of the
//! file. The kernel waits for all that is under way before it moves the window; a request that comes to the device after that is
//! sent to a place where no data can be. When the second step returns, no write of that device can reach data any more.
//!
//! ext4 refuses a write at that place. XFS takes it and makes the file as large; [`mend`] cuts it back. The pause
//! between the steps is there so that this does not happen: it is for the requests that wait, and nothing depends on it.

use super::registry::{Nexus, Window};
use crate::sys::raw::{LoopInfo, loop_info, set_loop_info};
use rustix::fs::{Mode, OFlags};
use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Where the window of a device without access begins: past the largest file of ext4, and so far out that a sum with
/// any position on a LUN cannot overflow.
pub(crate) const NOWHERE: u64 = 1 << 62;
/// Bytes that a device shows between the two steps.
const CUT_BYTES: u64 = 512;
/// Time for the requests that had passed the door.
const CUT_PAUSE: Duration = Duration::from_millis(20);
/// Older kernels ask to try again when pages were dirtied meanwhile.
const TRIES_MAX: u32 = 100;
const TRY_PAUSE: Duration = Duration::from_millis(20);

/// An attached loop device, kept open, so that it stays attached as it is.
#[derive(Debug)]
pub(crate) struct Attached {
    device: OwnedFd,
    pub(crate) nexus: Nexus,
    pub(crate) info: LoopInfo,
}

fn sysfs(index: u32, file: &str) -> io::Result<String> {
    let text = fs::read_to_string(format!("/sys/block/loop{index}/{file}"))?;
    Ok(text.trim_end_matches('\n').to_owned())
}

/// The file behind a loop device, by the kernel's word.
///
/// # Errors
/// `NotFound` when nothing is attached.
pub(crate) fn backing_file(index: u32) -> io::Result<PathBuf> {
    sysfs(index, "loop/backing_file").map(PathBuf::from)
}

/// The attachment that a loop device has now.
pub(crate) fn nexus(index: u32) -> io::Result<Nexus> {
    let sequence = sysfs(index, "diskseq")?.parse().map_err(io::Error::other)?;
    Ok(Nexus::Loop { index, sequence })
}

/// Opens an attached loop device.
pub(crate) fn open(index: u32) -> io::Result<Attached> {
    let path = format!("/dev/loop{index}");
    let device = rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    let info = loop_info(device.as_fd())?;
    // Asked while it is open: it cannot be attached anew from here on.
    Ok(Attached { device, nexus: nexus(index)?, info })
}

/// Has this nexus ceased to be: detached, or attached anew?
pub(crate) fn is_gone(one: Nexus) -> bool {
    match one {
        Nexus::Loop { index, .. } => match nexus(index) {
            Ok(now) => now != one || backing_file(index).is_err(),
            Err(_) => true,
        },
        Nexus::File { .. } => false,
    }
}

/// Cuts the file back to `bytes` when a request of a device without access has made it larger.
pub(crate) fn mend(backing: &Path, bytes: u64) -> io::Result<()> {
    if bytes == 0 || fs::metadata(backing)?.len() < NOWHERE {
        return Ok(());
    }
    fs::OpenOptions::new().write(true).open(backing)?.set_len(bytes)
}

impl Attached {
    /// Has its access been taken away?
    pub(crate) fn is_cut_off(&self) -> bool {
        self.info.offset == NOWHERE
    }

    /// What it shows while it has access.
    pub(crate) fn window(&self) -> Window {
        // The original is not known when the registry was lost: then the whole file.
        let cut_off = self.is_cut_off();
        let or_none = |value| if cut_off { 0 } else { value };
        Window {
            nexus: self.nexus,
            offset: or_none(self.info.offset),
            size_limit: or_none(self.info.size_limit),
        }
    }

    /// Takes its access away. When this returns, no write that came by it can reach the file any more.
    pub(crate) fn cut_off(&mut self) -> io::Result<()> {
        if self.is_cut_off() {
            return Ok(());
        }
        let offset = self.info.offset;
        self.set(offset, CUT_BYTES)?;
        std::thread::sleep(CUT_PAUSE);
        self.set(NOWHERE, CUT_BYTES)
    }

    /// Gives it access to its window.
    pub(crate) fn restore(&mut self, window: Window) -> io::Result<()> {
        if (self.info.offset, self.info.size_limit) == (window.offset, window.size_limit) {
            return Ok(());
        }
        self.set(window.offset, window.size_limit)
    }

    fn set(&mut self, offset: u64, size_limit: u64) -> io::Result<()> {
        self.info.offset = offset;
        self.info.size_limit = size_limit;
        for _ in 1..TRIES_MAX {
            match set_loop_info(self.device.as_fd(), &self.info) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => std::thread::sleep(TRY_PAUSE),
                other => return other,
            }
        }
        set_loop_info(self.device.as_fd(), &self.info)
    }
}

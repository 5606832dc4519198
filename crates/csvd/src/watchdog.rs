//! Who ends this machine, or csvd, when csvd cannot do what it has to: a watchdog, fed for as long as csvd has control.
//!
//! Two of them, both by choice. systemd's (`WatchdogSec=` of the unit) kills a csvd that stands still and starts another one;
//! csvfs goes on meanwhile. The kernel's (`watchdog = "/dev/watchdog"` in the node's file) resets the machine, when csvd stands
//! still, stays away, or cannot stop I/O that must stop (a kernel that hangs in a path, for example). With storage that has
//! reservations neither is needed for the data: a node that is given up is fenced. They bound how long a useless node stays one.
//!
//! What is fed is decided by [`csvd has control`](crate::engine::Engine::in_control). A kernel watchdog goes on when csvd is
//! killed; it is put out only by a stop in good order (the "magic close" of
//! <https://docs.kernel.org/watchdog/watchdog-api.html>).

use crate::daemon::Daemon;
use anyhow::{Context, Result};
use sd_notify::NotifyState;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

/// Longest time between two looks.
const EVERY_MAX: Duration = Duration::from_secs(5);
/// What a kernel watchdog without a word about it is taken for.
const TIMEOUT_DEFAULT: Duration = Duration::from_secs(30);

/// Both watchdogs, and the thread that feeds them.
#[derive(Debug)]
pub(crate) struct Watchdog {
    stop: Sender<()>,
    thread: JoinHandle<()>,
}

impl Watchdog {
    /// Says that csvd is ready, and feeds from now on.
    ///
    /// # Errors
    /// When the device cannot be opened: who asked for a watchdog must not be without.
    pub(crate) fn start(daemon: &Arc<Daemon>) -> Result<Watchdog> {
        let device = daemon.config.watchdog.as_deref().map(Device::open).transpose()?;
        if let Err(error) = sd_notify::notify(&[NotifyState::Ready]) {
            tracing::warn!(%error, "systemd could not be told that csvd is ready");
        }
        let timeouts = [sd_notify::watchdog_enabled(), device.as_ref().map(|device| device.timeout)];
        let every =
            timeouts.into_iter().flatten().min().map_or(EVERY_MAX, |least| (least / 3).min(EVERY_MAX));
        let (stop, stopped) = channel();
        let daemon = Arc::clone(daemon);
        let thread = std::thread::Builder::new()
            .name("watchdog".into())
            .spawn(move || feed(&daemon, device, every, &stopped))
            .context("cannot start the watchdog's thread")?;
        Ok(Watchdog { stop, thread })
    }

    /// A stop in good order: nobody is reset for it.
    pub(crate) fn put_out(self) {
        // The thread is there for as long as its receiver.
        let _ = self.stop.send(());
        let _ = self.thread.join();
    }
}

fn feed(daemon: &Daemon, mut device: Option<Device>, every: Duration, stopped: &Receiver<()>) {
    let mut told = String::new();
    loop {
        match stopped.recv_timeout(every) {
            Err(RecvTimeoutError::Timeout) => {}
            Ok(()) => {
                let _ = sd_notify::notify(&[NotifyState::Stopping]);
                if let Some(device) = device {
                    device.put_out();
                }
                return;
            }
            Err(RecvTimeoutError::Disconnected) => return,
        }
        match daemon.in_control() {
            Ok(()) => {
                told.clear();
                let _ = sd_notify::notify(&[NotifyState::Watchdog]);
                if let Some(error) = device.as_mut().and_then(|device| device.feed().err()) {
                    tracing::error!(%error, "the watchdog cannot be fed");
                }
            }
            Err(why) if why != told => {
                daemon.event("watchdog-hungry", format!("the watchdog is not fed any more: {why}"));
                told = why;
            }
            Err(_) => {}
        }
    }
}

/// A kernel watchdog. Dropping it does not put it out.
#[derive(Debug)]
struct Device {
    file: File,
    timeout: Duration,
}

impl Device {
    fn open(path: &Path) -> Result<Device> {
        let file = OpenOptions::new().write(true).open(path).with_context(|| {
            format!(
                "cannot open the watchdog {}; load its driver, or take `watchdog` out of the node's file",
                path.display()
            )
        })?;
        Ok(Device { file, timeout: timeout_of(path, Path::new("/sys/class/watchdog")) })
    }

    fn feed(&mut self) -> std::io::Result<()> {
        self.file.write_all(b"1")
    }

    fn put_out(mut self) {
        if let Err(error) = self.file.write_all(b"V") {
            tracing::error!(%error, "the watchdog could not be put out: it will reset this machine");
        }
    }
}

/// By the kernel's word. `/dev/watchdog` is `watchdog0`.
fn timeout_of(device: &Path, class: &Path) -> Duration {
    let name = device.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let name = if name == "watchdog" { "watchdog0" } else { name };
    let text = fs::read_to_string(class.join(name).join("timeout")).unwrap_or_default();
    match text.trim().parse() {
        Ok(seconds) if seconds > 0 => Duration::from_secs(seconds),
        Ok(_) | Err(_) => TIMEOUT_DEFAULT,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_is_the_kernels() {
        let class = tempfile::tempdir().unwrap();
        fs::create_dir(class.path().join("watchdog0")).unwrap();
        fs::write(class.path().join("watchdog0/timeout"), "12\n").unwrap();
        assert_eq!(timeout_of(Path::new("/dev/watchdog"), class.path()), Duration::from_secs(12));
        assert_eq!(timeout_of(Path::new("/dev/watchdog0"), class.path()), Duration::from_secs(12));
        assert_eq!(timeout_of(Path::new("/dev/watchdog1"), class.path()), TIMEOUT_DEFAULT);
        fs::write(class.path().join("watchdog0/timeout"), "0\n").unwrap();
        assert_eq!(timeout_of(Path::new("/dev/watchdog"), class.path()), TIMEOUT_DEFAULT);
    }

    #[test]
    fn a_device_is_fed_and_put_out_by_the_magic_letter() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let mut device = Device::open(file.path()).unwrap();
        device.feed().unwrap();
        device.feed().unwrap();
        device.put_out();
        assert_eq!(fs::read(file.path()).unwrap(), b"11V");
        assert!(Device::open(Path::new("/nowhere/watchdog")).unwrap_err().to_string().contains("driver"));
    }
}

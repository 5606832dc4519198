//! The heartbeat in the label, by which other nodes see that this one has the volume: from the beginning of the epoch until
//! the file system is unmounted, whatever order is being carried out, in a thread of its own.
//!
//! Another epoch in the label means that another node has taken the volume: the file system here is shut down at once,
//! without waiting for the order that is being carried out, and one that is only being mounted is given up when it is.

use crate::app::App;
use crate::role::Role;
use crate::takeover::beat;
use anyhow::{Context, Result};
use csv_coordinator::Coordinator;
use csv_lun::{LabelIoError, LunError};
use csv_types::Epoch;
use parking_lot::Mutex;
use std::sync::{Arc, Weak};

/// What is beaten for.
#[derive(Debug, Default)]
pub(crate) struct Heartbeat(Mutex<Option<Held>>);

#[derive(Debug)]
struct Held {
    epoch: Epoch,
    /// Not while the file system is being mounted.
    coordinator: Weak<Coordinator>,
    /// Another node has taken the volume.
    lost: bool,
}

impl Heartbeat {
    /// The epoch has begun in the label.
    pub(crate) fn begin(&self, epoch: Epoch) {
        *self.0.lock() = Some(Held { epoch, coordinator: Weak::new(), lost: false });
    }

    /// The file system is mounted. False when the volume was lost meanwhile.
    #[must_use]
    pub(crate) fn mounted(&self, coordinator: &Arc<Coordinator>) -> bool {
        match &mut *self.0.lock() {
            Some(held) => {
                held.coordinator = Arc::downgrade(coordinator);
                !held.lost
            }
            None => false,
        }
    }

    /// The file system is unmounted.
    pub(crate) fn end(&self) {
        *self.0.lock() = None;
    }

    /// The epoch to beat for.
    fn epoch(&self) -> Option<Epoch> {
        self.0.lock().as_ref().filter(|held| !held.lost).map(|held| held.epoch)
    }

    /// Another node has taken the volume from the owner of `epoch`. Nothing when that ownership is over anyway.
    fn lose(&self, epoch: Epoch) -> Option<Weak<Coordinator>> {
        let mut held = self.0.lock();
        let held = held.as_mut().filter(|held| held.epoch == epoch)?;
        held.lost = true;
        Some(held.coordinator.clone())
    }
}

impl App {
    /// Starts the thread. It ends with the process: until then something may be mounted.
    pub(crate) fn start_heartbeat(self: &Arc<Self>) -> Result<()> {
        let app = self.clone();
        std::thread::Builder::new()
            .name("heartbeat".into())
            .spawn(move || {
                loop {
                    app.beat();
                    std::thread::sleep(csv_lun::label::HEARTBEAT_PERIOD);
                }
            })
            .context("cannot start a thread")?;
        Ok(())
    }

    fn beat(self: &Arc<Self>) {
        let Some(epoch) = self.heartbeat.epoch() else { return };
        let Some(lun) = self.client.modes.lun() else { return };
        match beat(&lun, epoch) {
            Ok(()) => {}
            Err(error @ LabelIoError::Stale { .. }) => self.taken_by_another(epoch, &error),
            // The file system here uses the same path: another node must take the volume, and learns of it by the mode.
            Err(LabelIoError::Lun(error @ LunError::PathFailed { .. })) => {
                self.client.path_failed(&error.to_string());
            }
            Err(error) => tracing::warn!(%error, "heartbeat"),
        }
    }

    fn taken_by_another(&self, epoch: Epoch, error: &LabelIoError) {
        let Some(coordinator) = self.heartbeat.lose(epoch) else { return };
        let text = format!("{error}; the file system here ends without writing");
        self.client.events.report("volume-lost", text);
        if let Some(coordinator) = coordinator.upgrade() {
            self.forget_mount();
            coordinator.crash();
        }
        let mut role = self.role.lock();
        if let Role::Owner(owner) = &*role
            && owner.coordinator.options().epoch == epoch
        {
            self.lose(&mut role);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_beats_from_the_beginning_of_the_epoch_until_the_end_of_the_mount() {
        let heartbeat = Heartbeat::default();
        assert_eq!(heartbeat.epoch(), None);
        heartbeat.begin(Epoch(4));
        assert_eq!(heartbeat.epoch(), Some(Epoch(4)), "while it is being mounted");
        heartbeat.end();
        assert_eq!(heartbeat.epoch(), None);
    }

    #[test]
    fn what_was_lost_is_not_beaten_for_any_more() {
        let heartbeat = Heartbeat::default();
        heartbeat.begin(Epoch(4));
        assert!(heartbeat.lose(Epoch(3)).is_none(), "that ownership is over");
        assert!(heartbeat.lose(Epoch(4)).is_some());
        assert_eq!(heartbeat.epoch(), None);
        heartbeat.begin(Epoch(6));
        assert_eq!(heartbeat.epoch(), Some(Epoch(6)));
    }
}

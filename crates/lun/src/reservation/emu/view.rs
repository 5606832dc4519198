//! What an open LUN asks of the emulation: may this node write, and was an error that the device gave a conflict?

use super::registry::Nexus;
use super::{Store, loopdev};
use crate::reservation::error::{Errors, PrOp};
use std::path::Path;
use std::sync::Arc;

/// The emulation as one open file LUN sees it.
#[derive(Debug)]
pub(crate) struct View {
    store: Store,
    loop_index: Option<u32>,
}

impl View {
    /// `None` when the LUN is neither a regular file nor a loop device on one.
    pub(crate) fn of(path: &Arc<Path>) -> Option<View> {
        let stat = std::fs::metadata(path).ok()?;
        let (backing, loop_index) = if stat.is_file() {
            (path.canonicalize().ok()?, None)
        } else {
            let index = crate::reservation::loop_index(&stat)?;
            let backing = loopdev::backing_file(index).ok()?;
            if !backing.is_file() {
                return None;
            }
            (backing, Some(index))
        };
        let store = Store::new(backing, Errors(Arc::clone(path)));
        Some(View { store, loop_index })
    }

    /// May a node with this key write the plain file? Reads the registry, when there is one. Always true for a loop
    /// device, where the kernel sees to it.
    pub(crate) fn may_write(&self, key: Option<u64>) -> bool {
        let nexus = Nexus::File { key: key.unwrap_or(0) };
        // A damaged registry keeps everybody out.
        self.loop_index.is_some()
            || self.store.read(PrOp::ReadKeys).is_ok_and(|registry| registry.may_write(nexus))
    }

    /// Has this node lost its access? To be asked after an error of the device.
    pub(crate) fn is_fenced(&self, key: Option<u64>) -> bool {
        let Ok(registry) = self.store.read(PrOp::ReadKeys) else { return false };
        let nexus = match self.loop_index {
            None => Nexus::File { key: key.unwrap_or(0) },
            Some(index) => match loopdev::nexus(index) {
                Ok(nexus) => nexus,
                Err(_) => return false,
            },
        };
        let known = self.loop_index.is_none() || registry.known.iter().any(|one| one.nexus == nexus);
        let cut_off = known && !registry.may_write(nexus);
        cut_off || key.is_some_and(|key| !registry.has_key(key))
    }
}

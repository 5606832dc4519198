//! Where the control service finds the coordinator of the volume, if this node has it.

use crate::coordinator::Coordinator;
use parking_lot::RwLock;
use std::sync::{Arc, Weak};

/// Empty at first, and after the coordinator that was put there has ended: it is not kept alive here. Clones are the
/// same place.
#[derive(Debug, Clone, Default)]
pub struct Place(Arc<RwLock<Weak<Coordinator>>>);

impl Place {
    /// From now on this one is found.
    pub fn set(&self, coordinator: &Arc<Coordinator>) {
        *self.0.write() = Arc::downgrade(coordinator);
    }

    /// From now on nobody is found.
    pub fn clear(&self) {
        *self.0.write() = Weak::new();
    }

    /// The coordinator.
    #[must_use]
    pub fn get(&self) -> Option<Arc<Coordinator>> {
        self.0.read().upgrade()
    }

    /// An event of the coordinator; without one it goes to the log only.
    pub(super) fn event(&self, kind: &str, message: String) {
        match self.get() {
            Some(coordinator) => coordinator.event(kind, message),
            None => tracing::info!(kind, "{message}"),
        }
    }
}

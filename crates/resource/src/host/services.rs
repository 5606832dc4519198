//! What the host offers to its resources ([`Services`]), and where it keeps what they save.

use super::Shared;
use super::worker::Worker;
use crate::api::{EventLevel, Failure, NodeInfo, Services};
use crate::protocol::FromHost;
use serde_json::Value;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};
use std::{fmt, fs, io};

/// For one resource.
pub(crate) struct Offered {
    pub(crate) node: Arc<NodeInfo>,
    pub(crate) shared: Arc<Shared>,
    /// A resource's own thread may outlive its being open.
    pub(crate) worker: Weak<Worker>,
    pub(crate) name: String,
}

impl fmt::Debug for Offered {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Offered").field("name", &self.name).finish_non_exhaustive()
    }
}

impl Services for Offered {
    fn node(&self) -> &NodeInfo {
        &self.node
    }

    fn progress(&self, text: &str) {
        if let Some(worker) = self.worker.upgrade() {
            worker.progress(text, &self.shared);
        }
    }

    fn cancelled(&self) -> bool {
        self.worker.upgrade().is_none_or(|worker| worker.cancelled())
    }

    fn report(&self, alive: Result<(), String>) {
        if let Some(worker) = self.worker.upgrade() {
            worker.report(alive, &self.shared);
        }
    }

    fn event(&self, level: EventLevel, text: &str) {
        tracing::info!(resource = self.name, ?level, "{text}");
        self.shared.outbox.tell(FromHost::Event { name: self.name.clone(), level, text: text.to_owned() });
    }

    fn save(&self, state: Option<Value>) -> Result<(), Failure> {
        let path = self.state_file();
        let forgets = state.is_none();
        write_state(&path, state).map_err(|e| {
            if forgets {
                return Failure::new(format!(
                    "nothing of {} is here any more, but {} could not be removed: {e}; remove it",
                    self.name,
                    path.display()
                ));
            }
            Failure::new(format!(
                "what a next resource host must know of {} could not be kept in {}: {e}; make room on the file system of the \
                 run directory, or see why it cannot be written",
                self.name,
                path.display()
            ))
        })
    }

    fn saved(&self) -> Option<Value> {
        let bytes = fs::read(self.state_file()).ok()?;
        let damaged = |e: &serde_json::Error| {
            let text = format!("what an earlier resource host kept is damaged: {e}");
            self.event(EventLevel::Error, &text);
        };
        serde_json::from_slice(&bytes).inspect_err(damaged).ok()
    }
}

impl Offered {
    fn state_file(&self) -> PathBuf {
        state_file(&self.node.run_dir, &self.name)
    }
}

/// Where a host keeps what a next one needs of a resource; it is there while something of the resource may be on this node.
#[must_use]
pub fn state_file(run_dir: &Path, resource: &str) -> PathBuf {
    run_dir.join("rhs/state").join(format!("{}.json", file_name(resource)))
}

/// By rename, so that it is there as a whole or not at all. Not synced: it is worth nothing after a boot.
fn write_state(path: &Path, state: Option<Value>) -> io::Result<()> {
    let Some(state) = state else {
        return match fs::remove_file(path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
            _ => Ok(()),
        };
    };
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent)?;
    }
    let fresh = path.with_extension("json.new");
    let written = fs::write(&fresh, serde_json::to_vec(&state)?).and_then(|()| fs::rename(&fresh, path));
    if written.is_err() {
        // It takes room that is missing.
        let _ = fs::remove_file(&fresh);
    }
    written
}

/// A file name for a resource's name, which may contain anything.
pub(crate) fn file_name(name: &str) -> String {
    let mut text = String::with_capacity(name.len());
    for (at, byte) in name.bytes().enumerate() {
        if byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b' ') || (byte == b'.' && at > 0) {
            text.push(char::from(byte));
        } else {
            // Writing to a String cannot fail.
            let _ = write!(text, "%{byte:02X}");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::{file_name, write_state};

    #[test]
    fn a_state_that_cannot_be_kept_is_an_error_and_leaves_the_former_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a/b.json");
        write_state(&path, Some("first".into())).unwrap();
        // In the way of what is renamed.
        std::fs::create_dir(path.with_extension("json.new")).unwrap();
        assert!(write_state(&path, Some("second".into())).is_err());
        assert_eq!(std::fs::read(&path).unwrap(), b"\"first\"");
        write_state(&path, None).unwrap();
        write_state(&path, None).unwrap();
        assert!(!path.exists());
    }

    #[test]
    fn names_become_file_names() {
        assert_eq!(file_name("web 1.a"), "web 1.a");
        assert_eq!(file_name("../x"), "%2E.%2Fx");
        assert_eq!(file_name("ä"), "%C3%A4");
    }
}

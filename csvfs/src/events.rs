//! Events of this volume on this node: what was decided or seen in the background, and why.
//!
//! Kept in a bounded ring for `csvctl events`, appended to `<state_dir>/<volume>.events.jsonl`, and traced. A full
//! or broken disk loses the file copy, never the operation that reported.

use csv_types::NodeId;
use csv_types::admin::Event;
use parking_lot::Mutex;
use std::collections::VecDeque;
use std::fs::File;
use std::io::Write;
use std::path::Path;

const EVENTS_MAX: usize = 2048;
const FILE_BYTES_MAX: u64 = 8 << 20;

/// See the module.
#[derive(Debug)]
pub(crate) struct Events {
    node: NodeId,
    volume: String,
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    seq: u64,
    ring: VecDeque<Event>,
    file: Option<File>,
    path: std::path::PathBuf,
}

impl Events {
    pub(crate) fn new(node: NodeId, volume: &str, state_dir: &Path) -> Events {
        let path = state_dir.join(format!("{volume}.events.jsonl"));
        let file = File::options().create(true).append(true).open(&path).ok();
        let inner = Mutex::new(Inner { file, path, ..Inner::default() });
        Events { node, volume: volume.to_owned(), inner }
    }

    /// Reports an event; `kind` is a stable word.
    pub(crate) fn report(&self, kind: &str, message: String) {
        tracing::info!(kind, "{message}");
        let mut inner = self.inner.lock();
        inner.seq += 1;
        let event = Event {
            seq: inner.seq,
            unix_ms: crate::client::channel::unix_ms(),
            node: self.node,
            volume: self.volume.clone(),
            kind: kind.to_owned(),
            message,
        };
        inner.write(&event);
        if inner.ring.len() >= EVENTS_MAX {
            inner.ring.pop_front();
        }
        inner.ring.push_back(event);
    }

    /// Events with a greater number, oldest first.
    pub(crate) fn after(&self, seq: u64) -> Vec<Event> {
        self.inner.lock().ring.iter().filter(|event| event.seq > seq).cloned().collect()
    }
}

impl Inner {
    fn write(&mut self, event: &Event) {
        if let Some(file) = &self.file
            && file.metadata().is_ok_and(|m| m.len() > FILE_BYTES_MAX)
        {
            let _ = std::fs::rename(&self.path, self.path.with_extension("jsonl.1"));
            self.file = File::options().create(true).append(true).open(&self.path).ok();
        }
        if let (Some(file), Ok(mut line)) = (&mut self.file, serde_json::to_vec(event)) {
            line.push(b'\n');
            let _ = file.write_all(&line);
        }
    }
}

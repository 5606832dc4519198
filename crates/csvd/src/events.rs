//! Event log of the node: what csvd and its csvfs processes decided or saw.
//!
//! A bounded ring in memory and JSON lines in `<state_dir>/events.jsonl`; the file moves to `events.jsonl.1` when
//! it reaches its limit, so at most twice the limit is on disk. Numbers go on growing over restarts because the
//! ring is filled from the files at start. If the file cannot be written, the event stays in memory and the
//! failure is logged: events never stop the daemon.

use csv_types::NodeId;
use csv_types::admin::Event;
use std::collections::VecDeque;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

/// Events kept in memory and given out.
const EVENTS_MAX: usize = 4096;
/// Size at which the file is moved away.
const FILE_BYTES_MAX: u64 = 8 << 20;

/// See the module's text.
#[derive(Debug)]
pub(crate) struct EventLog {
    node: NodeId,
    path: PathBuf,
    file_bytes_max: u64,
    ring: VecDeque<Event>,
    next_seq: u64,
}

impl EventLog {
    /// Opens the log in `state_dir` and reads back what is there. Lines that are not events are skipped.
    pub(crate) fn open(state_dir: &Path, node: NodeId) -> EventLog {
        let path = state_dir.join("events.jsonl");
        let mut log =
            EventLog { node, path, file_bytes_max: FILE_BYTES_MAX, ring: VecDeque::new(), next_seq: 1 };
        for file in [log.old_path(), log.path.clone()] {
            match File::open(&file) {
                Ok(file) => log.read_back(BufReader::new(file)),
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                Err(e) => tracing::warn!(file = %file.display(), error = %e, "cannot read old events"),
            }
        }
        log
    }

    /// The node's number, once it is known.
    pub(crate) fn set_node(&mut self, node: NodeId) {
        self.node = node;
    }

    fn old_path(&self) -> PathBuf {
        self.path.with_extension("jsonl.1")
    }

    fn read_back(&mut self, file: impl BufRead) {
        for line in file.lines().map_while(Result::ok) {
            if let Ok(event) = serde_json::from_str::<Event>(&line) {
                self.next_seq = self.next_seq.max(event.seq.saturating_add(1));
                self.keep(event);
            }
        }
    }

    fn keep(&mut self, event: Event) {
        if self.ring.len() == EVENTS_MAX {
            self.ring.pop_front();
        }
        self.ring.push_back(event);
    }

    /// An event of csvd itself.
    pub(crate) fn add(&mut self, volume: &str, kind: &str, message: String) {
        tracing::info!(volume, kind, "{message}");
        let unix_ms = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis());
        let event = Event {
            seq: 0,
            unix_ms: u64::try_from(unix_ms).unwrap_or(u64::MAX),
            node: self.node,
            volume: volume.to_owned(),
            kind: kind.to_owned(),
            message,
        };
        self.append(event);
    }

    /// Events of a csvfs, renumbered. `dedupe`: the csvfs may have told them to an earlier csvd.
    pub(crate) fn import(&mut self, events: Vec<Event>, dedupe: bool) {
        for event in events {
            let known = |e: &Event| Event { seq: event.seq, ..e.clone() } == event;
            if !(dedupe && self.ring.iter().any(known)) {
                self.append(event);
            }
        }
    }

    fn append(&mut self, mut event: Event) {
        event.seq = self.next_seq;
        self.next_seq += 1;
        if let Err(e) = self.write(&event) {
            tracing::warn!(file = %self.path.display(), error = %e, "event kept in memory only");
        }
        self.keep(event);
    }

    fn write(&self, event: &Event) -> io::Result<()> {
        if fs::metadata(&self.path).is_ok_and(|meta| meta.len() >= self.file_bytes_max) {
            fs::rename(&self.path, self.old_path())?;
        }
        let mut line = serde_json::to_vec(event)?;
        line.push(b'\n');
        OpenOptions::new().create(true).append(true).open(&self.path)?.write_all(&line)
    }

    /// Events with a greater number than `after`, oldest first.
    pub(crate) fn after(&self, after: u64) -> Vec<Event> {
        self.ring.iter().filter(|event| event.seq > after).cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_go_on_after_a_restart_and_duplicates_are_dropped() {
        let dir = tempfile::tempdir().unwrap();
        let mut log = EventLog::open(dir.path(), NodeId(1));
        log.add("", "start", "a".into());
        log.add("Volume1", "spawn", "b".into());
        let told = Event { seq: 77, kind: "mode-change".into(), ..log.after(1)[0].clone() };
        log.import(vec![told.clone()], true);
        let mut log = EventLog::open(dir.path(), NodeId(1));
        assert_eq!(log.after(0).len(), 3);
        log.import(vec![told.clone()], true);
        assert_eq!(log.after(0).len(), 3);
        log.import(vec![told], false);
        assert_eq!(log.after(3).iter().map(|e| e.seq).collect::<Vec<_>>(), [4]);
    }

    #[test]
    fn file_and_ring_are_bounded() {
        let dir = tempfile::tempdir().unwrap();
        let mut log = EventLog::open(dir.path(), NodeId(1));
        log.file_bytes_max = 2000;
        for i in 0..EVENTS_MAX + 10 {
            log.add("", "tick", format!("{i}"));
        }
        assert_eq!(log.after(0).len(), EVENTS_MAX);
        for file in [log.path.clone(), log.old_path()] {
            assert!(fs::metadata(file).unwrap().len() < 2200);
        }
        let last = log.after(0).last().unwrap().seq;
        let mut again = EventLog::open(dir.path(), NodeId(1));
        again.add("", "start", String::new());
        assert_eq!(again.after(last).len(), 1);
    }
}

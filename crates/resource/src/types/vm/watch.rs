//! What QEMU tells by itself: kept for the entry points, and reported at once when the machine has failed.

use super::monitor::Happening;
use super::process::log_tail;
use crate::api::{Context, EventLevel};
use parking_lot::{Condvar, Mutex};
use serde_json::Value;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// A guest that has gone on for so long after its storage came back is out of the trouble: the next loss is told again.
const IO_HEALED: Duration = Duration::from_secs(60);

/// See the module. One for each QEMU.
#[derive(Debug)]
pub(crate) struct Watch {
    context: Context,
    log: PathBuf,
    /// A guest that shuts itself down stays off, and has not failed.
    stays_shut_down: bool,
    seen: Mutex<Seen>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Seen {
    exited: Option<String>,
    shut_itself_down: bool,
    /// The end of QEMU is wanted, or the machine is not online (yet): no reports.
    quiet: bool,
    /// Status of the migration, as told last.
    migration: Option<String>,
    io: Option<IoTrouble>,
    resets: u64,
}

/// A request of the guest failed.
#[derive(Debug, Clone)]
struct IoTrouble {
    what: String,
    /// The guest goes on since.
    resumed: Option<Instant>,
    /// That it goes on has been told.
    told: bool,
}

impl Watch {
    pub(crate) fn new(context: Context, log: PathBuf, stays_shut_down: bool) -> Watch {
        let seen = Mutex::new(Seen { quiet: true, ..Seen::default() });
        Watch { context, log, stays_shut_down, seen, changed: Condvar::new() }
    }

    /// From the monitor's thread.
    pub(crate) fn tell(&self, happening: Happening) {
        let report = match happening {
            Happening::Exited(how) => self.exited(how),
            Happening::Event { name, data } => self.event(&name, &data),
        };
        self.changed.notify_all();
        if let Some(why) = report {
            self.context.report(Err(why));
        }
    }

    fn exited(&self, how: String) -> Option<String> {
        let mut seen = self.seen.lock();
        seen.exited = Some(how);
        let stays = seen.shut_itself_down && self.stays_shut_down;
        let quiet = seen.quiet || stays;
        let told = stays && !seen.quiet;
        let why = self.end_in_words(&seen);
        drop(seen);
        if told {
            self.context.event(EventLevel::Info, "the guest shut itself down and stays off");
        }
        (!quiet).then_some(why)
    }

    fn event(&self, name: &str, data: &Value) -> Option<String> {
        let mut seen = self.seen.lock();
        match name {
            "SHUTDOWN" => {
                let guest = data["guest"].as_bool().unwrap_or(false);
                seen.shut_itself_down = guest && data["reason"] == "guest-shutdown";
            }
            "RESET" => seen.resets += 1,
            "GUEST_PANICKED" => {
                return (!seen.quiet)
                    .then(|| "the guest's kernel panicked; its console tells more".to_owned());
            }
            "MIGRATION" => seen.migration = data["status"].as_str().map(str::to_owned),
            "BLOCK_IO_ERROR" if data["action"] == "stop" => {
                let reason = match data["nospace"].as_bool() {
                    Some(true) => "no space left",
                    Some(false) | None => data["reason"].as_str().unwrap_or("input/output error"),
                };
                let disk = data["node-name"].as_str().unwrap_or("a disk");
                let operation = data["operation"].as_str().unwrap_or("request");
                let what = format!("{operation} on {disk}: {reason}");
                let flapping =
                    seen.io.as_ref().is_some_and(|io| io.resumed.is_none_or(|at| at.elapsed() < IO_HEALED));
                if flapping && let Some(io) = &mut seen.io {
                    (io.what, io.resumed) = (what, None);
                    return None;
                }
                let text = format!("storage lost ({what}); the guest is paused until it is back");
                seen.io = Some(IoTrouble { what, resumed: None, told: false });
                drop(seen);
                self.context.event(EventLevel::Warning, &text);
            }
            _ => {}
        }
        None
    }

    /// The storage is waiting again, by what QEMU says: the guest is stopped at a failed request.
    pub(crate) fn io_stopped(&self) -> String {
        let mut seen = self.seen.lock();
        let unknown = IoTrouble { what: "an earlier request".into(), resumed: None, told: false };
        let io = seen.io.get_or_insert(unknown);
        io.resumed = None;
        io.what.clone()
    }

    /// The guest runs.
    pub(crate) fn io_runs(&self) {
        let mut seen = self.seen.lock();
        let Some(io) = &mut seen.io else { return };
        match io.resumed {
            None => io.resumed = Some(Instant::now()),
            Some(at) if at.elapsed() >= IO_HEALED => {
                seen.io = None;
                return;
            }
            Some(_) => {}
        }
        if !std::mem::replace(&mut io.told, true) {
            drop(seen);
            self.context.event(EventLevel::Info, "storage answers again; the guest goes on");
        }
    }

    /// From now on an end of QEMU is expected (or not).
    pub(crate) fn quiet(&self, quiet: bool) {
        self.seen.lock().quiet = quiet;
    }

    /// How QEMU ended, if it has.
    pub(crate) fn end(&self) -> Option<String> {
        let seen = self.seen.lock();
        seen.exited.is_some().then(|| self.end_in_words(&seen))
    }

    /// It ended because the guest shut itself down.
    pub(crate) fn shut_itself_down(&self) -> bool {
        self.seen.lock().shut_itself_down
    }

    pub(crate) fn resets(&self) -> u64 {
        self.seen.lock().resets
    }

    /// The status of the migration that was told last.
    pub(crate) fn migration(&self) -> Option<String> {
        self.seen.lock().migration.clone()
    }

    pub(crate) fn forget_migration(&self) {
        self.seen.lock().migration = None;
    }

    /// Waits until something happens, for `limit` at most.
    pub(crate) fn wait(&self, limit: Duration) {
        let mut seen = self.seen.lock();
        if seen.exited.is_none() {
            self.changed.wait_for(&mut seen, limit);
        }
    }

    /// Waits for a migration to have come to its end, for `limit` at most.
    pub(crate) fn wait_migration(&self, limit: Duration) {
        let ended = |seen: &Seen| {
            let status = seen.migration.as_deref();
            seen.exited.is_some() || matches!(status, Some("completed" | "failed" | "cancelled"))
        };
        let mut seen = self.seen.lock();
        self.changed.wait_while_for(&mut seen, |seen| !ended(seen), limit);
    }

    fn end_in_words(&self, seen: &Seen) -> String {
        if seen.shut_itself_down {
            return "the guest shut itself down".to_owned();
        }
        let how = seen.exited.as_deref().unwrap_or("it ended");
        let said = log_tail(&self.log);
        if said.is_empty() {
            format!("QEMU is gone: {how}")
        } else {
            format!("QEMU is gone: {how}; it said: {}", said.join(" | "))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::testbed::Bed;
    use serde_json::json;

    fn watch(bed: &Bed, stays: bool) -> Watch {
        let watch = Watch::new(bed.context(), bed.dir().join("log"), stays);
        watch.quiet(false);
        watch
    }

    fn event(name: &str, data: Value) -> Happening {
        Happening::Event { name: name.into(), data }
    }

    fn reported(bed: &Bed) -> Option<String> {
        bed.failure_reported(Duration::ZERO)
    }

    #[test]
    fn an_end_is_reported_with_its_reason() {
        let bed = Bed::new();
        std::fs::write(bed.dir().join("log"), "qemu-system-x86_64: bad thing\n").unwrap();
        watch(&bed, false).tell(Happening::Exited("it was killed by signal 9".into()));
        let text = reported(&bed).unwrap();
        assert!(text.contains("signal 9") && text.contains("bad thing"), "{text}");
    }

    #[test]
    fn an_end_that_is_wanted_is_not_reported() {
        let bed = Bed::new();
        let watch = watch(&bed, false);
        watch.quiet(true);
        watch.tell(Happening::Exited("it ended".into()));
        assert_eq!(reported(&bed), None);
        assert!(watch.end().is_some());
    }

    #[test]
    fn a_guest_that_shuts_itself_down_fails_or_stays() {
        for stays in [false, true] {
            let bed = Bed::new();
            let watch = watch(&bed, stays);
            watch.tell(event("SHUTDOWN", json!({ "guest": true, "reason": "guest-shutdown" })));
            watch.tell(Happening::Exited("it ended".into()));
            let expected = (!stays).then(|| "the guest shut itself down".to_owned());
            assert_eq!(reported(&bed), expected);
            assert_eq!(bed.events().len(), usize::from(stays));
        }
    }

    #[test]
    fn lost_storage_is_told_once_at_its_loss_and_once_at_its_return() {
        let bed = Bed::new();
        let watch = watch(&bed, false);
        let lost = || {
            let data =
                json!({ "action": "stop", "operation": "write", "node-name": "disk0", "reason": "EIO" });
            event("BLOCK_IO_ERROR", data)
        };
        for _ in 0..3 {
            watch.tell(lost());
            assert!(watch.io_stopped().contains("disk0"));
            watch.io_runs();
        }
        assert_eq!(bed.events().len(), 2, "{:?}", bed.events());
        assert_eq!(reported(&bed), None);
    }

    #[test]
    fn a_panic_is_reported() {
        let bed = Bed::new();
        watch(&bed, false).tell(event("GUEST_PANICKED", json!({ "action": "pause" })));
        assert!(reported(&bed).unwrap().contains("panicked"));
    }
}

//! The resource: entry points of a virtual machine. See [`super`] for what they promise.

use super::agent::{self, Heartbeat};
use super::command::{self, Hardware, Place, Start};
use super::config::{Config, OfflineAction};
use super::monitor::Monitor;
use super::nic::{self, Link};
use super::preflight;
use super::process::{Process, leftovers, log_tail};
use super::running::{Halted, Phase, Running, tidy};
use super::watch::Watch;
use crate::api::{Context, EventLevel, Failure, Resource, Spec};
use crate::types::keep;
use crate::types::run::Bounded;
use serde::{Deserialize, Serialize};
use serde_json::json;
use std::os::unix::fs::DirBuilderExt;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// For QEMU to open its images and its monitor.
const START_LIMIT: Duration = Duration::from_secs(90);
/// For a QEMU that gives up its start to be gone.
const END_LIMIT: Duration = Duration::from_secs(1);
/// For a monitor that an earlier host had, to be free.
const ADOPT_LIMIT: Duration = Duration::from_secs(30);
/// How often a guest that does not shut down is asked again: some miss the power button while they boot.
const PRESS_AGAIN: Duration = Duration::from_secs(15);
/// How often somebody is told that it is still waited for.
const TELL: Duration = Duration::from_secs(5);
/// How long a guest may be nowhere after it was sent away, before that counts as failed.
const MIGRATED_LIMIT: Duration = Duration::from_secs(60);
/// For an image to answer a read.
const READ_LIMIT: Duration = Duration::from_secs(2);

/// What a next host needs to find a machine.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Saved {
    pid: i32,
    start_ticks: u64,
    hardware: Hardware,
    phase: Phase,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Machine {
    pub(crate) context: Context,
    pub(crate) name: String,
    pub(crate) config: Config,
    pub(crate) place: Place,
    pub(crate) running: Option<Running>,
    /// How the next offline ends the guest, if it was told.
    pub(crate) next_offline: Option<OfflineAction>,
    /// The guest shut itself down and stays off.
    pub(crate) off: bool,
    /// Its state was saved, and cannot be removed: the guest stands still until that is mended.
    pub(crate) kept_stopped: bool,
    heartbeat: Heartbeat,
    hanging: Bounded,
}

impl Machine {
    pub(crate) fn open(spec: Spec, context: Context, config: Config) -> Result<Machine, Failure> {
        Ok(Machine {
            place: Place::of(context.node(), &spec.name)?,
            context,
            name: spec.name,
            config,
            running: None,
            next_offline: None,
            off: false,
            kept_stopped: false,
            heartbeat: Heartbeat::default(),
            hanging: Bounded::default(),
        })
    }

    /// The QEMU that should be there.
    pub(crate) fn running(&self) -> Result<&Running, Failure> {
        let running = self.running.as_ref();
        running
            .ok_or_else(|| Failure::new(format!("the virtual machine \"{}\" does not run here", self.name)))
    }

    /// Keeps what a next host needs.
    pub(crate) fn remember(&self) -> Result<(), Failure> {
        let saved = self.running.as_ref().map(|running| Saved {
            pid: running.process.pid(),
            start_ticks: running.process.start_ticks(),
            hardware: running.hardware.clone(),
            phase: running.phase,
        });
        saved.map_or_else(|| self.context.save(None), |saved| keep(&self.context, &saved))
    }

    /// Keeps a new phase. That its QEMU is here is kept already, so a failure is only told.
    fn remember_phase(&self) {
        if let Err(failure) = self.remember() {
            self.context.event(EventLevel::Error, &failure.to_string());
        }
    }

    pub(crate) fn enter(&mut self, phase: Phase) {
        if let Some(running) = &mut self.running {
            running.enter(phase);
            running.watch.quiet(phase != Phase::Running);
        }
        self.remember_phase();
    }

    fn new_watch(&self) -> Arc<Watch> {
        let watch = Watch::new(Arc::clone(&self.context), self.place.log(), self.config.stays_shut_down);
        Arc::new(watch)
    }

    fn connect(&self, process: &Arc<Process>, limit: Duration) -> Result<(Monitor, Arc<Watch>), String> {
        let watch = self.new_watch();
        let hears = Arc::clone(&watch);
        let monitor =
            Monitor::connect(&self.place.qmp(), process, limit, move |happening| hears.tell(happening))?;
        Ok((monitor, watch))
    }

    /// Starts a QEMU whose guest does not run yet. On failure nothing of it is left.
    pub(crate) fn launch(&mut self, hardware: Option<Hardware>, start: Start) -> Result<(), Failure> {
        let hardware = hardware.unwrap_or_else(|| command::hardware(&self.config));
        preflight::check(&self.config, &hardware, &self.context, &mut self.hanging)?;
        let dir = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&self.place.dir);
        dir.map_err(|error| Failure::new(format!("{} cannot be made: {error}", self.place.dir.display())))?;
        tidy(&self.place);
        let node = self.context.node();
        let args = command::arguments(&self.config, node, &self.name, &self.place, &hardware, start)?;
        let mut saved = Saved { pid: 0, start_ticks: 0, hardware: hardware.clone(), phase: Phase::Starting };
        // Before there is a process: from here on a next host looks for one, by its command line.
        keep(&self.context, &saved)?;
        let process = Process::spawn(&self.config.qemu, &args, &self.place.log());
        let process = Arc::new(process.inspect_err(|_| self.context.forget())?);
        (saved.pid, saved.start_ticks) = (process.pid(), process.start_ticks());
        if let Err(failure) = keep(&self.context, &saved) {
            process.kill()?;
            self.context.forget();
            return Err(failure);
        }
        let connected = self.connect(&process, START_LIMIT);
        let (monitor, watch) = connected.map_err(|error| {
            // It closes its monitor just before it ends.
            let ended = process.wait(END_LIMIT);
            let how = if ended { process.outcome() } else { error };
            match process.kill() {
                Ok(()) => {
                    self.context.forget();
                    preflight::explain(&log_tail(&self.place.log()), &how)
                }
                Err(failure) => failure,
            }
        })?;
        let phase = Phase::Starting;
        let mut running = Running { monitor, process, watch, hardware, phase, phase_since: Instant::now() };
        // The alias "q35" means another machine in another version of QEMU.
        let kind = running.ask("qom-get", json!({ "path": "/machine", "property": "type" }));
        if let Some(kind) = kind.ok().as_ref().and_then(|kind| kind.as_str()) {
            kind.trim_end_matches("-machine").clone_into(&mut running.hardware.machine);
        }
        self.running = Some(running);
        self.remember_phase();
        self.attach_cards().inspect_err(|_| drop(self.end()))
    }

    fn attach_cards(&self) -> Result<(), Failure> {
        let node = self.context.node();
        for (index, card) in self.config.nics.iter().enumerate() {
            if let Link::Bridge(bridge) = &card.link {
                let run_dir = node.run_dir.to_string_lossy();
                let tap = nic::tap_name(&node.cluster_id, &self.name, &run_dir, index);
                nic::attach(&self.context, &tap, bridge)?;
            }
        }
        Ok(())
    }

    /// Lets the guest of a started QEMU run; from here on the machine is online.
    pub(crate) fn go(&mut self) -> Result<(), Halted> {
        self.running().map_err(|failure| Halted { failure, surely: true })?.resume()?;
        self.heartbeat.begin_anew();
        (self.next_offline, self.kept_stopped) = (None, false);
        self.enter(Phase::Running);
        Ok(())
    }

    /// Ends QEMU at once; nothing of it is left.
    pub(crate) fn end(&mut self) -> Result<(), Failure> {
        if let Some(running) = &self.running {
            running.kill()?;
        }
        self.forget();
        Ok(())
    }

    /// QEMU has ended.
    pub(crate) fn forget(&mut self) {
        self.running = None;
        (self.off, self.next_offline, self.kept_stopped) = (false, None, false);
        tidy(&self.place);
        self.context.forget();
    }

    /// Ends what hosts have left that died before they could keep what they started.
    fn end_leftovers(&self) -> Result<(), Failure> {
        let own = self.running.as_ref().map(|running| running.process.pid());
        for process in leftovers(&self.place.marker(), own) {
            let text =
                format!("ending QEMU (process {}), which was started for this machine before", process.pid());
            self.context.event(EventLevel::Warning, &text);
            process.kill()?;
        }
        Ok(())
    }

    /// The guest runs on from what is here already, if anything is; has it been so?
    fn take_what_is_here(&mut self) -> Result<bool, Failure> {
        let Some(running) = &self.running else { return Ok(false) };
        let not_arrived = || {
            let text = "a migration to this node did not arrive; the machine is started from its disks";
            self.context.event(EventLevel::Warning, text);
        };
        if running.process.has_ended() {
            if running.phase == Phase::Incoming {
                not_arrived();
            }
            self.forget();
            return Ok(false);
        }
        let status = running.status();
        match (running.phase, status.as_deref()) {
            (Phase::Running, Ok(_)) => return Ok(true),
            (Phase::Incoming, Ok("paused" | "running")) => {
                self.go()?;
                return Ok(true);
            }
            (Phase::Incoming, _) => not_arrived(),
            (Phase::Migrated, Ok("postmigrate" | "paused")) => {
                self.take_back()?;
                return Ok(true);
            }
            (Phase::Starting | Phase::Migrated | Phase::Off | Phase::Running, _) => {}
        }
        self.end()?;
        Ok(false)
    }

    /// The guest is asked to shut itself down, until it has or its time is over.
    fn shut_down(&mut self) -> Result<(), Failure> {
        let limit = self.config.shutdown_timeout;
        let running = self.running()?;
        running.watch.quiet(true);
        if matches!(running.status()?.as_str(), "paused" | "io-error" | "suspended" | "postmigrate") {
            // A guest that does not run hears no button. Storage that is still lost stops it again.
            self.unsave()?;
            running.resume()?;
        }
        if self.config.guest_agent && self.heartbeat.has_answered() {
            let _ = agent::shut_down(&self.place.agent());
        }
        let began = Instant::now();
        let (mut pressed, mut told) = (None::<Instant>, Instant::now());
        while began.elapsed() < limit {
            if self.context.cancelled() {
                running.watch.quiet(false);
                return Err(Failure::Cancelled);
            }
            if pressed.is_none_or(|at| at.elapsed() >= PRESS_AGAIN) {
                pressed = Some(Instant::now());
                if running.ask("system_powerdown", json!({})).is_err() && running.process.has_ended() {
                    break;
                }
            }
            if running.process.wait(Duration::from_millis(500).min(limit)) {
                return Ok(());
            }
            if told.elapsed() >= TELL {
                told = Instant::now();
                let text = format!(
                    "waiting for the guest to shut down, {} s of {}",
                    began.elapsed().as_secs(),
                    limit.as_secs()
                );
                self.context.progress(&text);
            }
        }
        if !running.process.has_ended() {
            let text = format!(
                "the guest did not shut down within {} s (shutdown_timeout_s) and is killed",
                limit.as_secs()
            );
            self.context.event(EventLevel::Warning, &text);
        }
        Ok(())
    }

    /// Judges a guest by QEMU's word for its state.
    pub(crate) fn judge(&mut self, status: &str) -> Result<(), Failure> {
        if status == "postmigrate" && self.running()?.phase == Phase::Running && !self.kept_stopped {
            // A host died while it sent the guest; QEMU has sent it to its end.
            self.enter(Phase::Migrated);
        }
        let running = self.running.as_ref().ok_or_else(|| Failure::new("QEMU is gone"))?;
        match (running.phase, status) {
            (_, "internal-error") => {
                Err(Failure::new("QEMU stopped the guest by an internal error; see its log"))
            }
            (_, "guest-panicked") => Err(Failure::new("the guest's kernel panicked; its console tells more")),
            (_, "watchdog") => Err(Failure::new("the guest's watchdog stopped it: the guest hangs")),
            (_, "shutdown") => Err(Failure::new("the guest shut itself down")),
            (Phase::Starting, _) => Err(Failure::new("the guest was never started")),
            (Phase::Incoming, _) => Err(Failure::new("the guest has not arrived here")),
            (Phase::Migrated, _) if running.phase_since.elapsed() > MIGRATED_LIMIT => {
                Err(Failure::new("the guest was sent to another node, where nobody has let it go on"))
            }
            (_, "running") => {
                running.watch.io_runs();
                self.hear_agent()
            }
            (_, "io-error") => {
                let what = running.watch.io_stopped();
                self.retry_storage(&what);
                Ok(())
            }
            _ => {
                self.heartbeat.begin_anew();
                Ok(())
            }
        }
    }

    fn hear_agent(&mut self) -> Result<(), Failure> {
        if !self.config.guest_agent {
            return Ok(());
        }
        let resets = self.running()?.watch.resets();
        self.heartbeat.check(&self.place.agent(), self.config.agent_timeout, resets)
    }

    /// Lets a guest go on that was stopped at a failed request, once its images answer; the request is tried again, and stops it
    /// again if it fails.
    fn retry_storage(&mut self, what: &str) {
        let paths: Vec<_> = self.config.disks.iter().map(|disk| disk.path.clone()).collect();
        let read = self.hanging.call(READ_LIMIT, "reading the machine's images", move || {
            paths.iter().try_for_each(|path| read_first_block(path).map_err(|error| error.to_string()))
        });
        if read.is_ok()
            && let Ok(running) = self.running()
            && let Err(error) = running.resume()
        {
            self.context
                .event(EventLevel::Warning, &format!("the guest ({what}) could not go on yet: {error}"));
        }
    }
}

/// Reads past what the page cache has, as far as the file system lets it.
fn read_first_block(path: &std::path::Path) -> std::io::Result<()> {
    use std::io::Read;
    let mut file = std::fs::File::open(path)?;
    let _ = rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed);
    file.read(&mut [0; 512]).map(drop)
}

impl Resource for Machine {
    fn adopt(&mut self) -> Result<(), Failure> {
        if let Some(running) = &self.running {
            // csvd is another one, the host is the same: it has the monitor, which takes one connection only.
            if running.process.has_ended() {
                return Err(Failure::new(running.watch.end().unwrap_or_else(|| "QEMU has ended".to_owned())));
            }
            let status = running.status()?;
            return self.judge(&status);
        }
        let gone = || Failure::new("there is no virtual machine of an earlier host");
        let saved = self.context.saved().ok_or_else(gone)?;
        let saved: Saved = serde_json::from_value(saved).map_err(|error| {
            Failure::new(format!("what an earlier host kept of the virtual machine makes no sense: {error}"))
        })?;
        if saved.phase == Phase::Off {
            self.off = true;
            return Ok(());
        }
        let process = Process::find(saved.pid, saved.start_ticks);
        let process = Arc::new(
            process.ok_or_else(|| Failure::new("QEMU has ended while no resource host looked after it"))?,
        );
        let connected = self.connect(&process, ADOPT_LIMIT);
        let (monitor, watch) =
            connected.map_err(|error| Failure::new(format!("QEMU (process {}): {error}", process.pid())))?;
        let mut running = Running {
            monitor,
            process,
            watch,
            hardware: saved.hardware,
            phase: saved.phase,
            phase_since: Instant::now(),
        };
        let status = running.status()?;
        if running.phase == Phase::Starting && status == "running" {
            // The host died between letting it go on and keeping that it does.
            running.enter(Phase::Running);
        }
        running.watch.quiet(running.phase != Phase::Running);
        self.running = Some(running);
        self.remember_phase();
        self.judge(&status)
    }

    fn online(&mut self) -> Result<(), Failure> {
        if self.take_what_is_here()? {
            return Ok(());
        }
        self.off = false;
        self.end_leftovers()?;
        if self.resume_saved()? {
            return Ok(());
        }
        self.launch(None, Start::Cold)?;
        if self.context.cancelled() {
            self.end()?;
            return Err(Failure::Cancelled);
        }
        let gone = self.go();
        if gone.is_err() {
            self.end()?;
        }
        Ok(gone?)
    }

    fn offline(&mut self) -> Result<(), Failure> {
        let Some(running) = &self.running else {
            self.forget();
            return Ok(());
        };
        if running.process.has_ended() {
            self.forget();
            return Ok(());
        }
        match running.phase {
            Phase::Migrated => {
                running.quit()?;
                self.forget();
                return Ok(());
            }
            Phase::Starting | Phase::Incoming | Phase::Off => return self.end(),
            Phase::Running => {}
        }
        match self.next_offline.unwrap_or(self.config.offline_action) {
            OfflineAction::Kill => {}
            OfflineAction::Shutdown => self.shut_down()?,
            OfflineAction::Save => return self.save(),
        }
        self.end()
    }

    fn terminate(&mut self) -> Result<(), Failure> {
        if self.running.is_none()
            && let Some(saved) = self.context.saved()
            && let Ok(saved) = serde_json::from_value::<Saved>(saved)
            && let Some(process) = Process::find(saved.pid, saved.start_ticks)
        {
            process.kill()?;
        }
        self.end()?;
        self.end_leftovers()
    }

    fn looks_alive(&mut self) -> Result<(), Failure> {
        if self.off {
            return Ok(());
        }
        let running = self.running()?;
        let Some(why) = running.watch.end() else {
            return if running.process.has_ended() { Err(Failure::new("QEMU has ended")) } else { Ok(()) };
        };
        if self.config.stays_shut_down && running.watch.shut_itself_down() {
            self.off = true;
            if let Some(running) = &mut self.running {
                running.phase = Phase::Off;
            }
            self.remember_phase();
            self.running = None;
            return Ok(());
        }
        Err(Failure::Failed(why))
    }

    fn is_alive(&mut self) -> Result<(), Failure> {
        self.looks_alive()?;
        if self.off {
            return Ok(());
        }
        let status = self.running()?.status()?;
        self.judge(&status)
    }

    fn control(&mut self, verb: &str, arguments: &serde_json::Value) -> Result<serde_json::Value, Failure> {
        self.verb(verb, arguments)
    }
}

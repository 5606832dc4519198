//! `GenericService`, and `systemd:UNIT`: a unit of the node's systemd, through `systemctl`. The unit should not be enabled:
//! the cluster starts it, not the boot.
//!
//! The end of its main process is seen at once by a pidfd; then systemd is asked, because a service may change its
//! main process in good order. A unit that restarts itself (`Restart=`) has failed all the same: the cluster counts.

use super::property;
use crate::api::{Context, EventLevel, Failure, Form, Property, Resource, ResourceType, Spec, TypeInfo};
use crate::processes::{self, Identity, Ran};
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::process::Command;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

/// For questions; systemd answers at once, unless the machine is in deep trouble.
const ASK_LIMIT: Duration = Duration::from_secs(30);
/// For a unit to be gone after SIGKILL.
const KILL_LIMIT: Duration = Duration::from_secs(60);

/// See the module's text.
#[derive(Debug, Default)]
pub(super) struct GenericService {
    /// Named by the type (`systemd:UNIT`) instead of a property.
    unit: Option<String>,
}

impl GenericService {
    /// # Errors
    /// That is no name of a unit.
    pub(super) fn of_unit(unit: &str) -> Result<GenericService, String> {
        Ok(GenericService { unit: Some(full_name(unit)?) })
    }
}

impl ResourceType for GenericService {
    fn info(&self) -> TypeInfo {
        let unit = Property {
            name: "unit".to_owned(),
            numbered: false,
            required: true,
            default: None,
            form: Form::Text,
            help: "the unit, such as nginx or nginx.service".to_owned(),
            live: false,
        };
        let name = self.unit.as_ref().map(|unit| format!("systemd:{unit}"));
        TypeInfo {
            name: name.unwrap_or_else(|| "GenericService".to_owned()),
            help: "A unit of systemd, which should be installed and not enabled on every node".to_owned(),
            properties: if self.unit.is_some() { Vec::new() } else { vec![unit] },
            verbs: vec![("show".to_owned(), "state of the unit, as systemd has it".to_owned())],
            // A look is a process of its own; the end of the main process is seen without.
            looks_alive: Duration::from_secs(15),
            is_alive: Duration::from_secs(60),
            shared: false,
        }
    }

    fn check(&self, properties: &BTreeMap<String, String>) -> Result<(), String> {
        match properties.get("unit") {
            Some(unit) if self.unit.is_none() => full_name(unit).map(drop).map_err(|e| format!("unit: {e}")),
            Some(_) | None => Ok(()),
        }
    }

    fn open(&self, spec: Spec, context: Context) -> Result<Box<dyn Resource>, Failure> {
        let unit = match (&self.unit, property(&spec, "unit")) {
            (Some(unit), _) => unit.clone(),
            (None, Some(unit)) => full_name(unit).map_err(Failure::Config)?,
            (None, None) => return Err(Failure::Config("unit: not given".to_owned())),
        };
        Ok(Box::new(Service { systemctl: Systemctl::new(context, unit), watch: Arc::default() }))
    }
}

/// `nginx` is `nginx.service`.
fn full_name(unit: &str) -> Result<String, String> {
    let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, ':' | '-' | '_' | '.' | '\\' | '@');
    if unit.is_empty() || unit.starts_with(['-', '.']) || !unit.chars().all(good) || unit.len() > 255 {
        return Err(format!("\"{unit}\" is no name of a systemd unit"));
    }
    Ok(if unit.contains('.') { unit.to_owned() } else { format!("{unit}.service") })
}

/// Asks systemd about one unit.
#[derive(Debug, Clone)]
struct Systemctl {
    context: Context,
    unit: String,
}

/// What systemd says of a unit.
#[derive(Debug, Default)]
struct Shown {
    load: String,
    active: String,
    sub: String,
    main_pid: i32,
    file_state: String,
}

impl Systemctl {
    fn new(context: Context, unit: String) -> Systemctl {
        Systemctl { context, unit }
    }

    fn run(&self, args: &[&str], limit: Option<Duration>) -> Result<Ran, Failure> {
        // Tests have a systemctl of their own.
        let program = std::env::var_os("CSV_SYSTEMCTL").unwrap_or_else(|| "systemctl".into());
        let mut command = Command::new(program);
        command.args(args).arg("--").arg(&self.unit);
        processes::run(command, Some(&*self.context), limit, None, |_| Ok(()))
    }

    fn order(&self, args: &[&str], limit: Option<Duration>) -> Result<(), Failure> {
        let ran = self.run(args, limit)?;
        if ran.status.success() {
            return Ok(());
        }
        let how = processes::ended_how(ran.status);
        let why = format!("systemctl {} {} {how}: {}", args.join(" "), self.unit, ran.last_words());
        // 5: "unit not loaded", systemctl(1).
        Err(if ran.status.code() == Some(5) { Failure::NotHere(why) } else { Failure::Failed(why) })
    }

    fn show(&self) -> Result<Shown, Failure> {
        let asked = "--property=LoadState,ActiveState,SubState,MainPID,UnitFileState";
        let ran = self.run(&["show", asked], Some(ASK_LIMIT))?;
        if !ran.status.success() {
            return Err(Failure::new(format!("systemctl show {}: {}", self.unit, ran.last_words())));
        }
        let mut shown = Shown::default();
        for (name, value) in ran.stdout.lines().filter_map(|line| line.split_once('=')) {
            match name {
                "LoadState" => value.clone_into(&mut shown.load),
                "ActiveState" => value.clone_into(&mut shown.active),
                "SubState" => value.clone_into(&mut shown.sub),
                "MainPID" => shown.main_pid = value.parse().unwrap_or(0),
                "UnitFileState" => value.clone_into(&mut shown.file_state),
                _ => {}
            }
        }
        Ok(shown)
    }

    fn look(&self) -> Result<Shown, Failure> {
        let shown = self.show()?;
        if matches!(shown.active.as_str(), "active" | "reloading" | "refreshing") {
            return Ok(shown);
        }
        Err(Failure::new(format!("unit {} is {} ({})", self.unit, shown.active, shown.sub)))
    }
}

#[derive(Debug)]
struct Service {
    systemctl: Systemctl,
    watch: Arc<Mutex<Watch>>,
}

/// Which main process is waited for.
#[derive(Debug, Default)]
struct Watch {
    /// Changes whenever nobody is interested any more in what was watched.
    round: u64,
    main: Option<Identity>,
}

impl Service {
    fn unwatch(&self) {
        let mut watch = self.watch.lock();
        watch.round += 1;
        watch.main = None;
    }

    /// Waits for the end of the main process, then asks systemd what that means.
    fn watch(&self, shown: &Shown) {
        let main = Identity::of(shown.main_pid);
        let mut watch = self.watch.lock();
        if main == watch.main {
            return;
        }
        watch.round += 1;
        watch.main = main;
        let round = watch.round;
        drop(watch);
        let (systemctl, seen) = (self.systemctl.clone(), Arc::clone(&self.watch));
        let waiting = move || {
            let mut main = main;
            while let Some(process) = main {
                // One that cannot be held has ended since it was seen.
                if let Some(pidfd) = process.hold() {
                    processes::wait_for_end_for_ever(&pidfd);
                }
                if seen.lock().round != round {
                    return;
                }
                let now = systemctl.look();
                let mut watch = seen.lock();
                if watch.round != round {
                    return;
                }
                match now {
                    Ok(shown) => main = Identity::of(shown.main_pid).filter(|next| Some(*next) != main),
                    Err(why) => {
                        systemctl.context.report(Err(why.to_string()));
                        main = None;
                    }
                }
                watch.main = main;
            }
        };
        // Without the thread, polls see it later.
        let _ = thread::Builder::new().name("unit".to_owned()).spawn(waiting);
    }
}

impl Resource for Service {
    fn adopt(&mut self) -> Result<(), Failure> {
        self.is_alive()
    }

    fn online(&mut self) -> Result<(), Failure> {
        let before = self.systemctl.show()?;
        if before.load == "not-found" {
            return Err(Failure::NotHere(format!(
                "unit {} is not installed on this node",
                self.systemctl.unit
            )));
        }
        if before.load == "masked" {
            return Err(Failure::NotHere(format!("unit {} is masked on this node", self.systemctl.unit)));
        }
        if before.file_state.starts_with("enabled") {
            let text = format!(
                "unit {} is enabled: it would start at boot without the cluster; disable it on this node",
                self.systemctl.unit
            );
            self.systemctl.context.event(EventLevel::Warning, &text);
        }
        self.systemctl.order(&["start"], None)?;
        let shown = self.systemctl.look()?;
        self.watch(&shown);
        Ok(())
    }

    fn offline(&mut self) -> Result<(), Failure> {
        self.unwatch();
        self.systemctl.order(&["stop"], None)?;
        self.gone()
    }

    fn terminate(&mut self) -> Result<(), Failure> {
        self.unwatch();
        // Refused when it does not run.
        let _ = self.systemctl.order(&["kill", "--signal=SIGKILL"], Some(ASK_LIMIT));
        // So that it does not restart itself; counts as failed afterwards, which is forgotten.
        let stopped = self.systemctl.order(&["stop"], Some(KILL_LIMIT));
        let _ = self.systemctl.order(&["reset-failed"], Some(ASK_LIMIT));
        match self.gone() {
            Ok(()) => Ok(()),
            Err(why) => Err(stopped.err().unwrap_or(why)),
        }
    }

    fn looks_alive(&mut self) -> Result<(), Failure> {
        let main = self.watch.lock().main;
        // Its main process is there: nothing to ask.
        if main.is_some_and(Identity::is_there) {
            return Ok(());
        }
        self.is_alive()
    }

    fn is_alive(&mut self) -> Result<(), Failure> {
        let shown = self.systemctl.look()?;
        self.watch(&shown);
        Ok(())
    }

    fn control(&mut self, verb: &str, _arguments: &serde_json::Value) -> Result<serde_json::Value, Failure> {
        if verb != "show" {
            return Err(Failure::Unsupported(format!("a unit of systemd cannot \"{verb}\"")));
        }
        let shown = self.systemctl.show()?;
        Ok(serde_json::json!({
            "unit": self.systemctl.unit, "load": shown.load, "active": shown.active, "sub": shown.sub,
            "main_pid": shown.main_pid, "file_state": shown.file_state,
        }))
    }
}

impl Service {
    fn gone(&self) -> Result<(), Failure> {
        let shown = self.systemctl.show()?;
        if matches!(shown.active.as_str(), "inactive" | "failed") && shown.main_pid == 0 {
            return Ok(());
        }
        let Shown { active, sub, .. } = shown;
        Err(Failure::new(format!("unit {} is still {active} ({sub})", self.systemctl.unit)))
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        self.unwatch();
    }
}

#[cfg(test)]
mod tests {
    use super::full_name;

    #[test]
    fn names_of_units() {
        assert_eq!(full_name("nginx").unwrap(), "nginx.service");
        assert_eq!(full_name("getty@tty1.service").unwrap(), "getty@tty1.service");
        for bad in ["", "-x", "a/b", "a b", ".."] {
            assert!(full_name(bad).is_err(), "{bad}");
        }
    }
}

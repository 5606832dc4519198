//! `GenericApplication`: any program that runs in the foreground. Online is: it runs. It gets a session of its own and a
//! mark in its environment, so that what it starts is found, and ended, with it, also what leaves the session and changes its
//! environment (it is looked for every 20 s, and when it is to end); its end is known at once by a pidfd.

use super::{keep, launch, log, property, property_ms};
use crate::api::{Context, EventLevel, Failure, Form, Property, Resource, ResourceType, Spec, TypeInfo};
use crate::processes::{self, Identity};
use parking_lot::Mutex;
use rustix::fd::OwnedFd;
use rustix::process::Signal;
use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

/// Marks every process of a resource.
const MARK: &str = "CSV_RESOURCE_ID";
/// Between SIGTERM and SIGKILL by default.
const STOP_TIMEOUT_MS: u64 = 20_000;
/// Between two looks at what it has started, which cost more than the one at itself.
const SEE_EVERY: Duration = Duration::from_secs(20);

/// See the module's text.
#[derive(Debug)]
pub(super) struct GenericApplication;

impl ResourceType for GenericApplication {
    fn info(&self) -> TypeInfo {
        let text = |name: &str, help: &str| Property {
            name: name.to_owned(),
            numbered: false,
            required: false,
            default: None,
            form: Form::Text,
            help: help.to_owned(),
            live: false,
        };
        TypeInfo {
            name: "GenericApplication".to_owned(),
            help: "Any program that stays in the foreground; online while it runs".to_owned(),
            properties: vec![
                Property {
                    required: true,
                    ..text("command", "program and arguments, quoted as in a shell; nothing is expanded")
                },
                Property { form: Form::Path, ..text("directory", "where it starts; \"/\" without") },
                text("user", "user that it runs as; that of csvd without"),
                Property { numbered: true, ..text("env", "NAME=VALUE for its environment") },
                Property {
                    form: Form::Number { min: 0, max: 3_600_000 },
                    default: Some(STOP_TIMEOUT_MS.to_string()),
                    ..text("stop_timeout_ms", "milliseconds between SIGTERM and SIGKILL when it goes offline")
                },
            ],
            verbs: vec![("pid".to_owned(), "number of its process".to_owned())],
            looks_alive: Duration::from_secs(5),
            is_alive: Duration::from_secs(60),
            shared: false,
        }
    }

    fn check(&self, properties: &BTreeMap<String, String>) -> Result<(), String> {
        let command = properties.get("command").map(String::as_str).unwrap_or_default();
        let words = shell_words::split(command).map_err(|e| format!("command: {e}"))?;
        if words.first().is_none_or(String::is_empty) {
            return Err("command: names no program".to_owned());
        }
        let is_variable = |value: &str| value.split_once('=').is_some_and(|(name, _)| !name.is_empty());
        match properties.iter().find(|(name, value)| name.starts_with("env") && !is_variable(value)) {
            Some((name, value)) => Err(format!("{name} is NAME=VALUE, not \"{value}\"")),
            None => Ok(()),
        }
    }

    fn open(&self, spec: Spec, context: Context) -> Result<Box<dyn Resource>, Failure> {
        self.check(&spec.properties).map_err(Failure::Config)?;
        let node = context.node();
        let mark = format!("{MARK}={}/{}/{}", node.cluster_id, node.node, spec.name);
        let (running, family, seen) = (None, Vec::new(), None);
        Ok(Box::new(Application { spec, context, mark, running, family, seen }))
    }
}

#[derive(Debug)]
struct Application {
    spec: Spec,
    context: Context,
    /// `NAME=VALUE`.
    mark: String,
    running: Option<Running>,
    /// What was seen of it last: its process, and what that had started.
    family: Vec<Identity>,
    /// When that was.
    seen: Option<Instant>,
}

#[derive(Debug)]
struct Running {
    identity: Identity,
    pidfd: Arc<OwnedFd>,
    watch: Arc<Mutex<Watch>>,
}

/// What the thread that waits for the end knows.
#[derive(Debug, Default)]
struct Watch {
    /// Its end is wanted.
    stopping: bool,
    ended: Option<String>,
}

impl Application {
    fn start(&mut self) -> Result<(), Failure> {
        let mut run = self.command()?;
        // Before there is a process: from here on a next host looks for one, by its mark.
        keep(&self.context, &serde_json::json!({}))?;
        let log = log::open(self.context.node(), &self.spec.name)?;
        let errors = log.try_clone().map_err(Failure::new)?;
        run.stdin(Stdio::null()).stdout(log).stderr(errors);
        let mut child = run.spawn().map_err(|e| processes::cannot_start("csv-rhs", &e))?;
        let pid = i32::try_from(child.id()).map_err(Failure::new)?;
        let identity = Identity::of(pid);
        let Some((identity, pidfd)) = identity.and_then(|identity| Some((identity, identity.hold()?))) else {
            let how = child.wait().map_or_else(|e| e.to_string(), processes::ended_how);
            return Err(Failure::new(format!("its process {how} at once; see its log")));
        };
        if let Err(failure) = keep(&self.context, &identity) {
            let ended = processes::kill_all(Some(identity), &self.mark, &[]);
            // Its end, so that it is no zombie.
            let _ = child.try_wait();
            return Err(ended.err().unwrap_or(failure));
        }
        self.watch(identity, pidfd, Some(child))
    }

    /// csv-rhs itself, which becomes the program; see [`launch`].
    fn command(&self) -> Result<Command, Failure> {
        let command = property(&self.spec, "command").unwrap_or_default();
        let words = shell_words::split(command).map_err(|e| Failure::Config(format!("command: {e}")))?;
        let (program, args) = words.split_first().ok_or(Failure::Config("command: empty".to_owned()))?;
        let directory = property(&self.spec, "directory").unwrap_or("/");
        if !Path::new(directory).is_dir() {
            return Err(Failure::NotHere(format!("directory {directory} is not there")));
        }
        let program = find_program(program, Path::new(directory))?;
        let user = property(&self.spec, "user").unwrap_or_default();
        if !user.is_empty() && !matches!(nix::unistd::User::from_name(user), Ok(Some(_))) {
            return Err(Failure::NotHere(format!("there is no user {user} on this node")));
        }
        // What is running, even when it was replaced on disk by an update.
        let mut run = Command::new("/proc/self/exe");
        run.arg(launch::LAUNCH).args([user, directory]).arg(&program).args(args);
        for (_, value) in self.spec.properties.iter().filter(|(name, _)| name.starts_with("env")) {
            let (name, value) = value.split_once('=').unwrap_or((value, ""));
            run.env(name, value);
        }
        let (name, value) = self.mark.split_once('=').unwrap_or((MARK, ""));
        run.env(name, value).env("CSV_RESOURCE_NAME", &self.spec.name);
        Ok(run)
    }

    /// From now on its end is reported at once.
    fn watch(&mut self, identity: Identity, pidfd: OwnedFd, child: Option<Child>) -> Result<(), Failure> {
        let pidfd = Arc::new(pidfd);
        let watch = Arc::new(Mutex::new(Watch::default()));
        let (held, seen, context) = (Arc::clone(&pidfd), Arc::clone(&watch), Arc::clone(&self.context));
        let waiting = move || {
            processes::wait_for_end_for_ever(&held);
            let status = child.and_then(|mut child| child.wait().ok());
            let how = status.map_or_else(|| "ended".to_owned(), processes::ended_how);
            let how = format!("process {} {how}", identity.pid);
            let mut watch = seen.lock();
            watch.ended = Some(how.clone());
            if !watch.stopping {
                context.report(Err(how));
            }
        };
        self.running = Some(Running { identity, pidfd, watch });
        let started = thread::Builder::new().name("waiter".to_owned()).stack_size(128 << 10).spawn(waiting);
        started.map(drop).map_err(|e| Failure::new(format!("cannot start a thread: {e}")))
    }

    fn look(&self) -> Result<&Running, Failure> {
        let running = self.running.as_ref().ok_or_else(|| Failure::new("it was not started"))?;
        match &running.watch.lock().ended {
            Some(how) => Err(Failure::new(how)),
            None => Ok(running),
        }
    }

    /// Remembers what it has started: of a process whose parent has ended, nobody can tell any more.
    fn see_family(&mut self) {
        let leader = self.running.as_ref().map(|running| running.identity);
        self.family = processes::family_by_lists(leader.into_iter().chain(std::mem::take(&mut self.family)));
        self.seen = Some(Instant::now());
    }

    /// Ends what is left of it.
    fn sweep(&mut self) -> Result<(), Failure> {
        if let Some(running) = &self.running {
            running.watch.lock().stopping = true;
        }
        let saved = self.context.saved().and_then(|saved| serde_json::from_value(saved).ok());
        let identity = self.running.as_ref().map(|running| running.identity).or(saved);
        processes::kill_all(identity, &self.mark, &self.family)?;
        (self.family, self.seen) = (Vec::new(), None);
        self.running = None;
        self.context.forget();
        Ok(())
    }
}

impl Resource for Application {
    fn adopt(&mut self) -> Result<(), Failure> {
        let saved = self.context.saved().ok_or_else(|| Failure::new("no process of it is known"))?;
        let identity: Identity = serde_json::from_value(saved).map_err(Failure::new)?;
        let gone = || Failure::new(format!("process {} has ended", identity.pid));
        let pidfd = identity.hold().ok_or_else(gone)?;
        self.watch(identity, pidfd, None)
    }

    fn online(&mut self) -> Result<(), Failure> {
        if self.look().is_ok() {
            return Ok(());
        }
        // Of an earlier host, or of a program that ended and left others behind.
        self.sweep()?;
        self.start()
    }

    fn offline(&mut self) -> Result<(), Failure> {
        // Before anything of it ends, and thoroughly.
        let leader = self.running.as_ref().map(|running| running.identity);
        self.family = processes::family(leader.into_iter().chain(std::mem::take(&mut self.family)));
        if let Some(running) = &self.running {
            running.watch.lock().stopping = true;
            running.identity.signal_group(Signal::TERM);
            let limit = property_ms(&self.spec, "stop_timeout_ms", STOP_TIMEOUT_MS);
            if !processes::wait_for_end(&running.pidfd, Some(limit), || self.context.cancelled()) {
                let text = format!("process {} did not end by SIGTERM and is killed", running.identity.pid);
                self.context.event(EventLevel::Warning, &text);
            }
        }
        self.sweep()
    }

    fn terminate(&mut self) -> Result<(), Failure> {
        self.sweep()
    }

    fn looks_alive(&mut self) -> Result<(), Failure> {
        self.look()?;
        if self.seen.is_none_or(|at| at.elapsed() >= SEE_EVERY) {
            self.see_family();
        }
        Ok(())
    }

    fn is_alive(&mut self) -> Result<(), Failure> {
        let running = self.look()?;
        if running.identity.is_there() {
            self.see_family();
            return Ok(());
        }
        Err(Failure::new(format!("process {} has ended", running.identity.pid)))
    }

    fn control(&mut self, verb: &str, _arguments: &serde_json::Value) -> Result<serde_json::Value, Failure> {
        match verb {
            "pid" => Ok(self.look()?.identity.pid.into()),
            _ => Err(Failure::Unsupported(format!("GenericApplication cannot \"{verb}\""))),
        }
    }
}

/// The program's file: by its path, or as a shell would find it.
fn find_program(program: &str, directory: &Path) -> Result<PathBuf, Failure> {
    let is_program = |path: &Path| {
        fs::metadata(path).is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
    };
    if program.contains('/') {
        let path = directory.join(program);
        if is_program(&path) {
            return Ok(path);
        }
        return Err(Failure::NotHere(format!("{} is no program on this node", path.display())));
    }
    let paths = std::env::var_os("PATH").unwrap_or_else(|| "/usr/sbin:/usr/bin:/sbin:/bin".into());
    std::env::split_paths(&paths)
        .map(|place| place.join(program))
        .find(|path| is_program(path))
        .ok_or_else(|| Failure::NotHere(format!("there is no program {program} on this node")))
}

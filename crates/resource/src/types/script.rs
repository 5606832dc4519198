//! `GenericScript`: a program that is called for every entry point, with its name as only argument; exit status 0 is yes. What
//! calls that change something say is in the resource's log ([`log`]), where a server that they start can write on. A
//! call that nobody waits for any more is killed with its process group.

use super::{keep, log, property};
use crate::api::{Context, EventLevel, Failure, Form, Property, Resource, ResourceType, Spec, TypeInfo};
use crate::processes::{self, Identity};
use rustix::process::Signal;
use std::fs::File;
use std::process::Command;
use std::time::Duration;

/// For `close`, which nobody waits for, and for the end of what was killed.
const CLOSE_LIMIT: Duration = Duration::from_secs(10);

/// See the module's text.
#[derive(Debug)]
pub(super) struct GenericScript;

impl ResourceType for GenericScript {
    fn info(&self) -> TypeInfo {
        let help = "A program that is called with online, offline, terminate, looks_alive, is_alive or close; its \
                    environment has CSV_RESOURCE_NAME, CSV_GROUP_NAME, CSV_NODE_NAME, and CSV_PROPERTY_x for every \
                    other property";
        let script = Property {
            name: "script".to_owned(),
            numbered: false,
            required: true,
            default: None,
            form: Form::Path,
            help: "the program, on every node".to_owned(),
            live: false,
        };
        let parameter = Property {
            name: "parameter".to_owned(),
            numbered: true,
            required: false,
            form: Form::Text,
            help: "anything that the script wants to know".to_owned(),
            ..script.clone()
        };
        TypeInfo {
            name: "GenericScript".to_owned(),
            help: help.to_owned(),
            properties: vec![script, parameter],
            verbs: Vec::new(),
            looks_alive: Duration::from_secs(5),
            is_alive: Duration::from_secs(60),
            shared: false,
        }
    }

    fn open(&self, spec: Spec, context: Context) -> Result<Box<dyn Resource>, Failure> {
        let script = property(&spec, "script").unwrap_or_default().to_owned();
        if script.is_empty() {
            return Err(Failure::Config("script: names no program".to_owned()));
        }
        Ok(Box::new(Script { spec, context, script }))
    }
}

#[derive(Debug)]
struct Script {
    spec: Spec,
    context: Context,
    script: String,
}

impl Script {
    fn command(&self, entry: &str) -> Command {
        let mut command = Command::new(&self.script);
        command.arg(entry).current_dir("/");
        command.env("CSV_RESOURCE_NAME", &self.spec.name).env("CSV_GROUP_NAME", &self.spec.group);
        command.env("CSV_NODE_NAME", &self.context.node().node);
        for (name, value) in self.spec.properties.iter().filter(|(name, _)| *name != "script") {
            command.env(format!("CSV_PROPERTY_{name}"), value);
        }
        command
    }

    fn call(
        &self,
        entry: &str,
        limit: Option<Duration>,
        log: Option<&File>,
        started: impl FnOnce(Identity) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        let ran = processes::run(self.command(entry), Some(&*self.context), limit, log, started)?;
        if ran.status.success() {
            return Ok(());
        }
        let how = processes::ended_how(ran.status);
        Err(Failure::new(format!("{} {entry} {how}: {}", self.script, ran.last_words())))
    }

    /// A call that changes something. Kept while it runs, so that a next host can end it: this one may be killed because
    /// the script hangs.
    fn change(&self, entry: &str) -> Result<(), Failure> {
        end_leftover(&self.context);
        let starts = entry == "online";
        note(&self.context, starts, &serde_json::json!({}))?;
        let log = log_of(&self.context, starts, &self.spec.name)?;
        let ended = self.call(entry, None, log.as_ref(), |process| note(&self.context, starts, &process));
        self.context.forget();
        ended
    }
}

/// Keeps that a call runs. What ends a resource is called even when that fails.
pub(super) fn note(context: &Context, starts: bool, state: &impl serde::Serialize) -> Result<(), Failure> {
    match keep(context, state) {
        Err(failure) if !starts => {
            context.event(EventLevel::Error, &failure.to_string());
            Ok(())
        }
        kept => kept,
    }
}

/// Where a call that changes something writes: what it starts may outlive this host. What ends a resource goes on without.
pub(super) fn log_of(context: &Context, starts: bool, name: &str) -> Result<Option<File>, Failure> {
    match log::open(context.node(), name) {
        Err(failure) if starts => Err(failure),
        log => Ok(log.ok()),
    }
}

/// Ends the call that an earlier host left behind.
pub(super) fn end_leftover(context: &Context) {
    let saved = context.saved().and_then(|saved| serde_json::from_value::<Identity>(saved).ok());
    if let Some(process) = saved
        && let Some(pidfd) = process.hold()
    {
        process.signal_group(Signal::KILL);
        processes::wait_for_end(&pidfd, Some(CLOSE_LIMIT), || false);
    }
}

impl Resource for Script {
    fn adopt(&mut self) -> Result<(), Failure> {
        end_leftover(&self.context);
        self.is_alive()
    }

    fn online(&mut self) -> Result<(), Failure> {
        self.change("online")
    }

    fn offline(&mut self) -> Result<(), Failure> {
        self.change("offline")
    }

    fn terminate(&mut self) -> Result<(), Failure> {
        self.change("terminate")
    }

    fn looks_alive(&mut self) -> Result<(), Failure> {
        self.call("looks_alive", None, None, |_| Ok(()))
    }

    fn is_alive(&mut self) -> Result<(), Failure> {
        self.call("is_alive", None, None, |_| Ok(()))
    }
}

impl Drop for Script {
    fn drop(&mut self) {
        // Nobody hears how it went.
        let _ = self.call("close", Some(CLOSE_LIMIT), None, |_| Ok(()));
    }
}

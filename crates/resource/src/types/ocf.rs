//! `ocf:PROVIDER:AGENT`: agents of the Open Cluster Framework, standard 1.1, as Pacemaker runs them; Debian has
//! them in the package resource-agents.
//!
//! An agent is a program under `$OCF_ROOT/resource.d/PROVIDER/AGENT`, called with an action; parameters come as
//! `OCF_RESKEY_x`. What it knows it says by `meta-data`, in XML ([`metadata`]). Both looks are its `monitor`; the thorough one
//! may be told to look deeper (`check_level`). An action that nobody waits for any more is killed with its process group.

mod metadata;

use super::script::{end_leftover, log_of, note};
use super::{property, property_ms};
use crate::api::{Context, EventLevel, Failure, Form, Property, Resource, ResourceType, Spec, TypeInfo};
use crate::processes::{self, Ran};
use metadata::Metadata;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

/// Where agents are, unless the environment says otherwise.
const ROOT: &str = "/usr/lib/ocf";
/// For `meta-data`, which asks nobody.
const METADATA_LIMIT: Duration = Duration::from_secs(20);
/// Of our own, beside the agent's parameters: `OCF_CHECK_LEVEL` of the thorough look.
const CHECK_LEVEL: &str = "check_level";
/// Of our own: milliseconds for `stop` when the resource is terminated.
const STOP_TIMEOUT: &str = "stop_timeout_ms";

/// An agent that is installed on this node.
#[derive(Debug)]
pub(super) struct OcfAgent {
    agent: Agent,
    metadata: Metadata,
}

/// Where an agent is.
#[derive(Debug, Clone)]
struct Agent {
    /// `ocf:PROVIDER:AGENT`.
    kind: String,
    root: PathBuf,
    path: PathBuf,
    provider: String,
    name: String,
}

impl OcfAgent {
    /// `PROVIDER:AGENT`.
    ///
    /// # Errors
    /// It is not installed, or does not say what it is.
    pub(super) fn find(agent: &str) -> Result<OcfAgent, String> {
        let root = std::env::var_os("OCF_ROOT").map_or_else(|| PathBuf::from(ROOT), PathBuf::from);
        let Some((provider, name)) = agent.split_once(':').filter(|(p, n)| is_word(p) && is_word(n)) else {
            return Err(format!(
                "\"ocf:{agent}\" is not ocf:PROVIDER:AGENT, such as ocf:heartbeat:Filesystem"
            ));
        };
        let path = root.join("resource.d").join(provider).join(name);
        if !path.is_file() {
            return Err(format!(
                "OCF agent ocf:{agent} is not installed on this node: there is no {}; Debian has agents in the \
                 package resource-agents",
                path.display()
            ));
        }
        let (provider, name) = (provider.to_owned(), name.to_owned());
        let agent = Agent { kind: format!("ocf:{agent}"), root, path, provider, name };
        let mut command = agent.command("meta-data", &agent.kind);
        command.current_dir("/");
        let ran = processes::run(command, None, Some(METADATA_LIMIT), None, |_| Ok(()))
            .map_err(|e| e.to_string())?;
        let metadata = Metadata::parse(&ran.stdout)
            .map_err(|e| format!("{} does not say what it is: {e} {}", agent.kind, ran.last_words()))?;
        Ok(OcfAgent { agent, metadata })
    }
}

/// No path, nothing hidden.
fn is_word(text: &str) -> bool {
    let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    !text.is_empty() && !text.starts_with('.') && text.chars().all(good)
}

impl ResourceType for OcfAgent {
    fn info(&self) -> TypeInfo {
        let mut properties: Vec<Property> =
            self.metadata.parameters.iter().map(metadata::Parameter::property).collect();
        let number = |name: &str, default: Option<String>, help: &str| Property {
            name: name.to_owned(),
            numbered: false,
            required: false,
            default,
            form: Form::Number { min: 0, max: 3_600_000 },
            help: help.to_owned(),
            live: false,
        };
        let stop = self.metadata.stop_timeout.as_millis().to_string();
        for own in [
            number(CHECK_LEVEL, Some("0".to_owned()), "how deep the thorough look goes (OCF_CHECK_LEVEL)"),
            number(STOP_TIMEOUT, Some(stop), "milliseconds for the agent's stop when it is terminated"),
        ] {
            if !properties.iter().any(|known| known.name == own.name) {
                properties.push(own);
            }
        }
        TypeInfo {
            name: self.agent.kind.clone(),
            help: self.metadata.help.clone(),
            properties,
            verbs: vec![("validate-all".to_owned(), "lets the agent check its parameters here".to_owned())],
            looks_alive: self.metadata.monitor_interval,
            is_alive: self.metadata.monitor_interval,
            shared: false,
        }
    }

    fn open(&self, spec: Spec, context: Context) -> Result<Box<dyn Resource>, Failure> {
        let monitor_timeout = self.metadata.monitor_timeout;
        let stop_timeout = self.metadata.stop_timeout;
        Ok(Box::new(OcfResource { agent: self.agent.clone(), spec, context, monitor_timeout, stop_timeout }))
    }
}

impl Agent {
    /// The environment of the standard.
    fn command(&self, action: &str, instance: &str) -> Command {
        let mut command = Command::new(&self.path);
        command.arg(action).current_dir("/");
        command.env("OCF_ROOT", &self.root).env("OCF_RA_VERSION_MAJOR", "1").env("OCF_RA_VERSION_MINOR", "1");
        command.env("OCF_RESOURCE_INSTANCE", instance).env("OCF_RESOURCE_TYPE", &self.name);
        command.env("OCF_RESOURCE_PROVIDER", &self.provider).env("__OCF_ACTION", action);
        // Agents look for their tools by name.
        if std::env::var_os("PATH").is_none() {
            command.env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin");
        }
        command
    }
}

#[derive(Debug)]
struct OcfResource {
    agent: Agent,
    spec: Spec,
    context: Context,
    monitor_timeout: Duration,
    stop_timeout: Duration,
}

impl OcfResource {
    /// `limit` is the time that the action has: some agents give up, or kill what they manage, shortly before it is over.
    fn command(&self, action: &str, level: Option<&str>, limit: Duration) -> Command {
        let mut command = self.agent.command(action, &self.spec.name);
        // Agents use it in names of files.
        command.env("OCF_RESOURCE_INSTANCE", crate::host::file_name(&self.spec.name));
        // Some name the node that they run on.
        command.env("OCF_RESKEY_CRM_meta_on_node", &self.context.node().node);
        command.env("OCF_RESKEY_CRM_meta_timeout", limit.as_millis().to_string());
        if let Some(level) = level {
            command.env("OCF_CHECK_LEVEL", level);
        }
        let own = |name: &str| name == CHECK_LEVEL || name == STOP_TIMEOUT;
        for (name, value) in self.spec.properties.iter().filter(|(name, _)| !own(name)) {
            command.env(format!("OCF_RESKEY_{name}"), value);
        }
        command
    }

    fn action(&self, action: &str, limit: Option<Duration>) -> Result<(), Failure> {
        end_leftover(&self.context);
        let starts = action == "start";
        note(&self.context, starts, &serde_json::json!({}))?;
        let log = log_of(&self.context, starts, &self.spec.name)?;
        let started = |process| note(&self.context, starts, &process);
        // What is not killed here is given up by the cluster after that time.
        let has = limit.unwrap_or_else(|| Duration::from_millis(self.spec.pending_timeout_ms));
        let command = self.command(action, None, has);
        let ran = processes::run(command, Some(&*self.context), limit, log.as_ref(), started);
        self.context.forget();
        self.ended(action, &ran?)
    }

    fn monitor(&self, level: Option<&str>) -> Result<(), Failure> {
        let command = self.command("monitor", level, self.monitor_timeout);
        let ran =
            processes::run(command, Some(&*self.context), Some(self.monitor_timeout), None, |_| Ok(()))?;
        self.ended("monitor", &ran)
    }

    /// Exit codes of the OCF standard 1.1, "return codes".
    fn ended(&self, action: &str, ran: &Ran) -> Result<(), Failure> {
        let said = ran.last_words();
        let why = |what: &str| format!("{} {action}: {what}: {said}", self.agent.kind);
        match ran.status.code() {
            // 8: it runs in its promoted role, which nobody here gave it, but it runs.
            Some(0 | 8) => Ok(()),
            Some(190 | 191) => {
                self.context.event(EventLevel::Warning, &why("it runs and is about to fail"));
                Ok(())
            }
            Some(2) => Err(Failure::Config(why("wrong parameters"))),
            Some(3) => Err(Failure::Unsupported(why("the agent does not know the action"))),
            Some(4) => Err(Failure::NotHere(why("not enough rights"))),
            Some(5) => Err(Failure::NotHere(why("what it needs is not installed on this node"))),
            Some(6) => Err(Failure::Config(why("not configured"))),
            Some(7) => Err(Failure::Failed(why("it does not run"))),
            Some(9) => Err(Failure::Failed(why("it failed in its promoted role"))),
            Some(_) | None => Err(Failure::Failed(why(&processes::ended_how(ran.status)))),
        }
    }

    /// Nothing of it runs: what the agent's monitor says, not what its stop promises.
    fn gone(&self) -> Result<(), Failure> {
        let command = self.command("monitor", None, self.monitor_timeout);
        let ran =
            processes::run(command, Some(&*self.context), Some(self.monitor_timeout), None, |_| Ok(()))?;
        match ran.status.code() {
            // Not installed means not running as well.
            Some(5 | 7) => Ok(()),
            Some(0 | 8 | 190 | 191) => Err(Failure::new(format!("{} still runs", self.agent.kind))),
            Some(_) | None => self.ended("monitor", &ran),
        }
    }
}

impl Resource for OcfResource {
    fn adopt(&mut self) -> Result<(), Failure> {
        end_leftover(&self.context);
        self.is_alive()
    }

    fn online(&mut self) -> Result<(), Failure> {
        self.action("start", None)
    }

    fn offline(&mut self) -> Result<(), Failure> {
        self.action("stop", None)
    }

    fn terminate(&mut self) -> Result<(), Failure> {
        let default = u64::try_from(self.stop_timeout.as_millis()).unwrap_or(u64::MAX);
        let limit = property_ms(&self.spec, STOP_TIMEOUT, default);
        let stopped = self.action("stop", Some(limit));
        // An agent that is not installed here has started nothing here; one that failed to stop may have nothing to stop.
        stopped.or_else(|why| self.gone().map_err(|_| why))
    }

    fn looks_alive(&mut self) -> Result<(), Failure> {
        self.monitor(None)
    }

    fn is_alive(&mut self) -> Result<(), Failure> {
        self.monitor(property(&self.spec, CHECK_LEVEL))
    }

    fn control(&mut self, verb: &str, _arguments: &serde_json::Value) -> Result<serde_json::Value, Failure> {
        if verb != "validate-all" {
            return Err(Failure::Unsupported(format!("an OCF agent cannot \"{verb}\"")));
        }
        let command = self.command("validate-all", None, self.monitor_timeout);
        let ran =
            processes::run(command, Some(&*self.context), Some(self.monitor_timeout), None, |_| Ok(()))?;
        self.ended("validate-all", &ran).map(|()| serde_json::Value::Null)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::testbed::{Bed, spec};
    use std::os::unix::fs::PermissionsExt;

    const METADATA: &str = "<resource-agent><actions><action name=\"stop\" timeout=\"40s\"/>\
                            <action name=\"monitor\" timeout=\"30s\"/></actions></resource-agent>";

    /// An agent of these lines of shell, with `$said` as the file that it can write to.
    fn agent(bed: &Bed, lines: &str) -> OcfAgent {
        let path = bed.dir().join("agent");
        let said = bed.dir().join("said");
        std::fs::write(&path, format!("#!/bin/sh\nsaid={}\n{lines}\n", said.display())).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        let (root, text) = (bed.dir().to_owned(), |text: &str| text.to_owned());
        let agent = Agent { kind: text("ocf:t:a"), root, path, provider: text("t"), name: text("a") };
        OcfAgent { agent, metadata: Metadata::parse(METADATA).unwrap() }
    }

    #[test]
    fn an_action_is_told_the_time_that_it_has() {
        let bed = Bed::new();
        let agent = agent(&bed, "echo $1 $OCF_RESKEY_CRM_meta_timeout >>$said; [ $1 != monitor ]");
        let mut resource = bed.open(&agent, spec("ocf:t:a", &[("stop_timeout_ms", "50000")]));
        resource.online().unwrap();
        assert!(resource.is_alive().is_err());
        resource.offline().unwrap();
        resource.terminate().unwrap();
        let mut plain = bed.open(&agent, spec("ocf:t:a", &[]));
        plain.terminate().unwrap();
        let told = std::fs::read_to_string(bed.dir().join("said")).unwrap();
        let told: Vec<&str> = told.lines().collect();
        assert_eq!(told, ["start 180000", "monitor 30000", "stop 180000", "stop 50000", "stop 40000"]);
    }
}

//! What a resource type is.
//!
//! A [`ResourceType`] describes itself, checks properties, and opens resources. An open [`Resource`] has the entry points of
//! a failover cluster: online, offline, terminate, looks_alive, is_alive, control; close is its drop. One thread
//! of the resource host calls the entry points of one resource, one after the other; `terminate` comes from that
//! thread too, when an online or offline that took too long has returned, or from a new host when it never does.
//!
//! **What outlives the host.** A resource host can be killed at any moment (a neighbour hung, csvd was updated). What it
//! manages must go on: programs are started in a session of their own, and whatever is needed to find them again
//! (process number with start time, socket, address) is kept with `Context::save`. A new host opens the resource with
//! `Context::saved` and calls `adopt`, which must answer whether everything is there as it was, and must start nothing.
//!
//! **Entry points** return when what they do is done. One that takes long calls `Context::progress` now and then, and
//! looks at `Context::cancelled`, which becomes true when nobody waits for it any more: then it gives up and returns.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// Why an entry point failed; for people: what happened, to what, and what to do next.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    /// It did not work; another try, or another node, may.
    #[error("{0}")]
    Failed(String),
    /// It cannot work on this node as things are (a program or an image is missing): no restart here helps.
    #[error("{0}")]
    NotHere(String),
    /// It cannot work anywhere before the configuration is changed.
    #[error("{0}")]
    Config(String),
    /// `control`: the type does not know that verb.
    #[error("{0}")]
    Unsupported(String),
    /// Given up because nobody waits for it any more.
    #[error("given up, since nobody waits for it any more")]
    Cancelled,
}

impl Failure {
    /// `Failed`, from anything that can be written.
    pub fn new(what: impl fmt::Display) -> Failure {
        Failure::Failed(what.to_string())
    }
}

/// Form of a property's value.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Form {
    /// Any text.
    Text,
    /// One of these words.
    Words(Vec<String>),
    /// `true` or `false`.
    Bool,
    /// A whole number within these bounds.
    Number {
        /// Least.
        min: u64,
        /// Greatest.
        max: u64,
    },
    /// An absolute path.
    Path,
    /// An IP address.
    Address,
    /// An IP address with the length of its prefix, such as `10.0.0.5/24`.
    AddressWithPrefix,
}

/// A property that a type knows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Property {
    /// Name; with `prefix`, every property that begins so (`disk` stands for `disk`, `disk1`, `disk2`, ...).
    pub name: String,
    /// See `name`.
    pub numbered: bool,
    /// Must be given.
    pub required: bool,
    /// Value when it is not given; for people.
    pub default: Option<String>,
    /// Form.
    pub form: Form,
    /// What it does, with its unit.
    pub help: String,
    /// Can it be changed while the resource is online, taking effect at once? Else it takes effect at the next online.
    pub live: bool,
}

/// What a type says of itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TypeInfo {
    /// Name.
    pub name: String,
    /// What it does, one sentence.
    pub help: String,
    /// What it knows.
    pub properties: Vec<Property>,
    /// Verbs of `control`, with what they do.
    pub verbs: Vec<(String, String)>,
    /// Between two looks by default.
    pub looks_alive: Duration,
    /// Between two thorough looks by default.
    pub is_alive: Duration,
    /// May several nodes have it online at the same time? It then goes along with a group that moves while it runs.
    pub shared: bool,
}

/// A resource as its host needs to know it. Everything that a type may want to know is in here.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Spec {
    /// Name, unique in the cluster.
    pub name: String,
    /// Its type.
    pub kind: String,
    /// Its group.
    pub group: String,
    /// Properties.
    pub properties: BTreeMap<String, String>,
    /// Names, types and properties of the resources of its group that it depends on, directly or not. (A share asks its
    /// name and address, an application its disk.)
    pub depends_on: Vec<Dependency>,
    /// Between two looks; 0: never; `None`: as its type says.
    pub looks_alive_ms: Option<u64>,
    /// Between two thorough looks; 0: never; `None`: as its type says.
    pub is_alive_ms: Option<u64>,
    /// An entry point that does not return for so long hangs.
    pub deadlock_timeout_ms: u64,
    /// For going online or offline without progress.
    pub pending_timeout_ms: u64,
    /// Number of the ownership of its group under which it is opened.
    pub generation: u64,
    /// Shared library of its type, if it has one.
    pub library: Option<PathBuf>,
}

/// See [`Spec::depends_on`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dependency {
    /// Name.
    pub name: String,
    /// Type.
    pub kind: String,
    /// Properties.
    pub properties: BTreeMap<String, String>,
}

/// The node, as far as resources need to know it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeInfo {
    /// Name of the cluster.
    pub cluster: String,
    /// Identity of the cluster.
    pub cluster_id: String,
    /// This node's name.
    pub node: String,
    /// This node's number.
    pub node_id: u32,
    /// This node's address for everything between nodes.
    pub addr: String,
    /// Sockets and pids; lost at boot.
    pub run_dir: PathBuf,
    /// What is kept.
    pub state_dir: PathBuf,
    /// Where volumes are mounted.
    pub mount_dir: PathBuf,
    /// PEM files `ca.pem`, `node.pem`, `node.key`.
    pub secrets_dir: PathBuf,
    /// Devices by name, as the node's file has them.
    pub luns: BTreeMap<String, PathBuf>,
}

/// What the host offers to a resource. Cloned freely; may be used from threads that the resource starts.
pub trait Services: Send + Sync + fmt::Debug {
    /// This node.
    fn node(&self) -> &NodeInfo;
    /// The entry point that runs gets on; extends its time. The text is shown to people.
    fn progress(&self, text: &str);
    /// Nobody waits any more for the entry point that runs.
    fn cancelled(&self) -> bool;
    /// The resource has failed, or an alarm that it gave is over: tells it at once, without waiting for the next poll. Counts only while
    /// it is online.
    fn report(&self, alive: Result<(), String>);
    /// For the log of the cluster.
    fn event(&self, level: EventLevel, text: &str);
    /// Keeps what a new host needs to take over what this one has started. Lost at boot. `None` forgets it.
    ///
    /// # Errors
    /// It could not be kept. Whoever is about to make something must make nothing then: no next host would know of it.
    fn save(&self, state: Option<serde_json::Value>) -> Result<(), Failure>;
    /// Forgets what was saved. A failure is only told: it leaves a resource that counts as one that may be here.
    fn forget(&self) {
        if let Err(failure) = self.save(None) {
            self.event(EventLevel::Error, &failure.to_string());
        }
    }
    /// What was saved last, by this host or an earlier one.
    fn saved(&self) -> Option<serde_json::Value>;
}

/// See [`Services`].
pub type Context = Arc<dyn Services>;

/// How bad an event is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum EventLevel {
    /// For the record.
    Info,
    /// Something works less well.
    Warning,
    /// Something does not work.
    Error,
}

/// A resource type.
pub trait ResourceType: Send + Sync {
    /// What it says of itself.
    fn info(&self) -> TypeInfo;

    /// Checks properties beyond their form (see [`check_properties`]); asks nothing of the node, so that any node can check.
    ///
    /// # Errors
    /// What is wrong, in words that name the property.
    fn check(&self, properties: &BTreeMap<String, String>) -> Result<(), String> {
        let _ = properties;
        Ok(())
    }

    /// Opens a resource. Starts and changes nothing.
    ///
    /// # Errors
    /// The resource cannot be used on this node.
    fn open(&self, spec: Spec, context: Context) -> Result<Box<dyn Resource>, Failure>;
}

/// An open resource. Dropping it closes it, which must not end what is online.
pub trait Resource: Send {
    /// A new host after an earlier one: is what was online still there, and can this host look after it? Starts nothing.
    ///
    /// # Errors
    /// Something of it is gone. What is left is ended by `terminate`.
    fn adopt(&mut self) -> Result<(), Failure>;

    /// Brings it online.
    ///
    /// # Errors
    /// It is not online; what was begun is ended by `terminate`.
    fn online(&mut self) -> Result<(), Failure>;

    /// Takes it offline in good order.
    ///
    /// # Errors
    /// It may be online still; it is ended by `terminate`.
    fn offline(&mut self) -> Result<(), Failure>;

    /// Ends it at once, whatever state it is in. Afterwards nothing of it is left on this node.
    ///
    /// # Errors
    /// Something of it could not be ended: the resource must not be started elsewhere.
    fn terminate(&mut self) -> Result<(), Failure>;

    /// A quick look, cheap enough for every few seconds.
    ///
    /// # Errors
    /// It does not look alive; a thorough look follows at once.
    fn looks_alive(&mut self) -> Result<(), Failure>;

    /// A thorough look.
    ///
    /// # Errors
    /// It is not alive: it has failed.
    fn is_alive(&mut self) -> Result<(), Failure>;

    /// Anything else; see [`TypeInfo::verbs`].
    ///
    /// # Errors
    /// `Unsupported` for a verb that the type does not know; else what failed.
    fn control(&mut self, verb: &str, arguments: &serde_json::Value) -> Result<serde_json::Value, Failure> {
        let _ = arguments;
        Err(Failure::Unsupported(format!("this resource type cannot \"{verb}\"")))
    }
}

/// Checks names and forms of properties against what a type knows.
///
/// # Errors
/// Everything that is wrong, one sentence each.
pub fn check_properties(info: &TypeInfo, properties: &BTreeMap<String, String>) -> Result<(), Vec<String>> {
    let mut wrong = Vec::new();
    for (name, value) in properties {
        match info.properties.iter().find(|known| known.names(name)) {
            None => wrong.push(format!(
                "{} has no property \"{name}\"; it knows {}",
                info.name,
                info.properties.iter().map(|known| known.name.as_str()).collect::<Vec<_>>().join(", ")
            )),
            Some(known) => {
                if let Err(takes) = known.form.check(value) {
                    wrong.push(format!("{name} cannot be \"{value}\": it takes {takes}"));
                }
            }
        }
    }
    for known in info.properties.iter().filter(|known| known.required) {
        if !properties.keys().any(|name| known.names(name)) {
            wrong.push(format!("{} needs the property \"{}\": {}", info.name, known.name, known.help));
        }
    }
    if wrong.is_empty() { Ok(()) } else { Err(wrong) }
}

impl Property {
    /// Is that this property?
    #[must_use]
    pub fn names(&self, name: &str) -> bool {
        match name.strip_prefix(self.name.as_str()) {
            Some("") => true,
            Some(number) => self.numbered && number.bytes().all(|byte| byte.is_ascii_digit()),
            None => false,
        }
    }
}

impl Form {
    /// Is the value of this form? The error says what it takes.
    ///
    /// # Errors
    /// What it takes, in words.
    pub fn check(&self, value: &str) -> Result<(), String> {
        let (good, takes) = match self {
            Form::Text => (!value.contains('\0'), "text without NUL".to_owned()),
            Form::Words(words) => (words.iter().any(|word| word == value), words.join(" or ")),
            Form::Bool => (matches!(value, "true" | "false"), "true or false".to_owned()),
            Form::Number { min, max } => {
                let inside = value.parse::<u64>().is_ok_and(|number| (*min..=*max).contains(&number));
                (inside, format!("{min} to {max}"))
            }
            Form::Path => (value.starts_with('/') && !value.contains('\0'), "an absolute path".to_owned()),
            Form::Address => (value.parse::<std::net::IpAddr>().is_ok(), "an IP address".to_owned()),
            Form::AddressWithPrefix => (
                address_with_prefix(value).is_some(),
                "an IP address with its prefix, such as 10.0.0.5/24".to_owned(),
            ),
        };
        if good { Ok(()) } else { Err(takes) }
    }
}

/// Takes `10.0.0.5/24` apart.
#[must_use]
pub fn address_with_prefix(text: &str) -> Option<(std::net::IpAddr, u8)> {
    let (addr, prefix) = text.split_once('/')?;
    let addr: std::net::IpAddr = addr.parse().ok()?;
    let prefix: u8 = prefix.parse().ok()?;
    (prefix <= if addr.is_ipv4() { 32 } else { 128 }).then_some((addr, prefix))
}

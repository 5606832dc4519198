//! What csvd and a resource host say to each other: JSON objects, one per line, over a Unix stream socket.
//!
//! csvd makes the socket, binds it to `<run_dir>/rhs/<host>.sock`, and starts the host with the listening socket as its standard
//! input; so a host can be connected to as soon as it is started, and a csvd that has started anew finds it by the path. One
//! connection at a time counts: a new one takes over, what the former asked is answered to nobody.
//!
//! **Lease.** A host may keep its resources online only while csvd says so: every [`ToHost::Lease`] gives it that much
//! time from the moment at which it was said. When the time is over (csvd is gone, or cut off from the majority, so that another
//! node may start the same resources) the host terminates everything, tells so when somebody connects, and ends nothing else.
//!
//! **Calls** are numbered by csvd, and answered once each. A call for a resource whose thread is busy waits for its turn,
//! except `Cancel`. Lost connection: csvd asks with `Hello` how everything is, and repeats what it still wants; entry points
//! are level-triggered, so `Online` of one that is online is answered with success.

use crate::api::{EventLevel, NodeInfo, Spec};
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Version of the protocol; a host of another version is told to end once its resources are offline.
pub const VERSION: u32 = 1;
/// Bytes of a line.
pub const LINE_BYTES_MAX: usize = 4 << 20;
/// Resources in one host.
pub const RESOURCES_MAX: usize = 4096;

/// What was found of a resource that was opened to be taken over.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Found {
    /// It is online, and looked after from now on.
    pub online: bool,
    /// Why not, else.
    pub why: String,
}

/// From csvd.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "say", rename_all = "kebab-case")]
pub enum ToHost {
    /// The first line of a connection.
    Hello {
        /// [`VERSION`].
        version: u32,
        /// This node.
        node: NodeInfo,
    },
    /// See the module. Answered with [`FromHost::Beat`], by a thread that no resource can hold up.
    Lease {
        /// From the moment at which it was said, in milliseconds.
        for_ms: u64,
        /// That moment, by CLOCK_BOOTTIME in milliseconds: a message that was long on its way extends nothing. Without, it is
        /// that of its arrival.
        #[serde(default)]
        at_boot_ms: Option<u64>,
    },
    /// Answered with [`FromHost::Beat`], as `Lease`, whose end it does not change.
    Ping,
    /// Opens a resource, or gives an open one another specification (polls at once, the rest at the next online). With
    /// `adopt`, what an earlier host left online is taken over. Answered with `Answer`; with `adopt`, and when it could be
    /// opened, its value is a [`Found`].
    Open {
        /// Number of the call.
        call: u64,
        /// The resource.
        spec: Box<Spec>,
        /// Take over what is there.
        adopt: bool,
    },
    /// Calls an entry point.
    Call {
        /// Number of the call.
        call: u64,
        /// Resource.
        name: String,
        /// Which.
        entry: Entry,
    },
    /// Nobody waits any more for this call.
    Cancel {
        /// The call.
        call: u64,
    },
    /// Polls stop (maintenance) or go on.
    Polls {
        /// Resource.
        name: String,
        /// Go on?
        on: bool,
    },
    /// Forgets a resource, which should be offline. Answered with `Answer`.
    Close {
        /// Number of the call.
        call: u64,
        /// Resource.
        name: String,
    },
    /// Ends the host. What is online stays as it is, for a next host.
    End,
}

/// An entry point.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Entry {
    /// Bring online.
    Online,
    /// Take offline in good order.
    Offline,
    /// End at once.
    Terminate,
    /// Look thoroughly, now.
    IsAlive,
    /// Anything else.
    Control {
        /// What.
        verb: String,
        /// With what.
        arguments: Value,
    },
}

/// State of a resource in a host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum HostState {
    /// Not online; nothing of it is there.
    Offline,
    /// In `online`.
    OnlinePending,
    /// Online, polled.
    Online,
    /// In `offline` or `terminate`.
    OfflinePending,
    /// It failed; something of it may be left until `terminate` succeeds.
    Failed,
}

/// A resource, as it is now.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Snapshot {
    /// Name.
    pub name: String,
    /// Group.
    pub group: String,
    /// Generation under which it was opened.
    pub generation: u64,
    /// State.
    pub state: HostState,
    /// Why, when it failed.
    pub why: String,
}

/// To csvd.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "say", rename_all = "kebab-case")]
pub enum FromHost {
    /// Answer to `Hello`.
    Welcome {
        /// [`VERSION`].
        version: u32,
        /// Process number.
        pid: u32,
        /// Everything that is open.
        resources: Vec<Snapshot>,
    },
    /// The host is there. `stuck` names resources whose thread has been in one entry point for longer than its deadlock time-out.
    Beat {
        /// Resource, entry point, milliseconds.
        stuck: Vec<Stuck>,
    },
    /// A call's answer.
    Answer {
        /// The call.
        call: u64,
        /// Resource.
        name: String,
        /// How it went.
        outcome: Outcome,
    },
    /// A pending call gets on.
    Progress {
        /// The call.
        call: u64,
        /// Resource.
        name: String,
        /// What it does.
        text: String,
    },
    /// A resource that was online has failed by itself: a poll, or its own report.
    Failed {
        /// Resource.
        name: String,
        /// Why.
        why: String,
    },
    /// The lease was over; everything was terminated.
    LeaseOver {
        /// What could not be ended, with reasons.
        left: Vec<(String, String)>,
    },
    /// For the log.
    Event {
        /// Resource.
        name: String,
        /// How bad.
        level: EventLevel,
        /// What.
        text: String,
    },
}

/// See [`FromHost::Beat`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stuck {
    /// Resource.
    pub name: String,
    /// Entry point.
    pub entry: String,
    /// For how long, in milliseconds.
    pub for_ms: u64,
}

/// How a call went.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// Done.
    Done(Value),
    /// It did not work.
    Failed {
        /// For people.
        why: String,
        /// Another try on this node may help.
        retry: bool,
        /// Another node may help.
        elsewhere: bool,
    },
}

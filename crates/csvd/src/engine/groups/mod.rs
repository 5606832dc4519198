//! Groups on this node: drives [`csv_cluster::groups::local::LocalGroup`] for every group that this node owns, and the resource
//! hosts in which their resources run.
//!
//! ```text
//!  database ──changes──> driver (one thread) ──effects──> hosts ──> csv-rhs
//!     ^                    │  ^                              │
//!     └── teller <─────────┘  └──────── answers, failures ───┘
//!  leader of a move: migrate (a task per group) ──verbs──> driver here, and that of the other node
//! ```
//!
//! Level-triggered like the rest of the engine: the driver compares what the database says with what it drives, and the
//! teller what the driver sees with what the database says. A lost answer or a crash is made up for in the next round.
//!
//! * **Lease.** Hosts keep what they have online only while this node is in contact with the majority, up to the same moment at
//!   which csvfs stops its I/O ([`Engine::contact_limit`]).
//! * **A csvd that starts** finds hosts and what they have, and acts only when its database has everything that was
//!   decided until then: what an old one says would start what runs elsewhere by now.
//! * **What nobody owns here is ended**: resources that are open in a host, or that a host has left a note of, and whose
//!   group is not driven here and is not about to arrive.
//! * This node takes a new incarnation only when nothing of any group is left ([`Groups::is_quiet`]).

mod checkpoints;
mod driver;
mod hear;
mod hosts;
mod incoming;
mod leftovers;
pub(crate) mod load;
mod migrate;
mod outside;
pub(crate) mod properties;
mod release;
mod spec;
mod tell;

use super::Engine;
use anyhow::{Context, Result};
use csv_cluster::groups::local::Input;
use csv_resource::api::Spec;
use csv_resource::client::{Host, HostEvent};
use csv_resource::protocol::Entry;
use csvd::groups::MoveProgress;
use hosts::HostId;
use parking_lot::Mutex;
use serde_json::Value;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::Duration;
use tokio::sync::{Notify, oneshot, watch};

pub(crate) use outside::end_hosts_of_a_former_life;

/// Messages to the driver that wait.
const NEWS: usize = 8192;
/// For everything to be ended at once, when good order took too long.
const STOP_LIMIT: Duration = Duration::from_secs(20);

/// Who hears the answer of something that was asked from outside the driver.
type Reply = oneshot::Sender<Result<Value, String>>;

/// What the driver hears.
#[derive(Debug)]
enum News {
    /// Something may have changed.
    Wake,
    /// A resource host says something.
    Host { id: HostId, event: HostEvent },
    /// A host was started, or could not be.
    HostUp { id: HostId, result: Result<Arc<Host>, String> },
    /// Something is asked of a resource.
    Ask { what: What, reply: Reply },
    /// A group is about to arrive here, under the generation after this one.
    Expect {
        group: String,
        generation: u64,
        /// A machine of it whose guest is paused, and stays so.
        paused: Option<String>,
        reply: Reply,
    },
    /// It does not.
    Unexpect { group: String, generation: u64 },
    /// The database has all that was decided before it was asked.
    CaughtUp(bool),
    /// Files of a resource were put in place, or could not be.
    Restored { group: String, generation: u64, call: u64, result: Result<(), String> },
    /// Files of a resource were saved, after which this may be handed in.
    Saved { group: String, generation: u64, input: Box<Input> },
    /// A move is over, for the engine's part.
    MoveEnded { group: String, generation: u64, failed: bool },
    /// Takes everything offline in good order, whatever the database says, and starts nothing more.
    Finish,
    /// The same, without good order.
    Stop(String),
}

/// See [`News::Ask`].
#[derive(Debug)]
enum What {
    /// Opens it.
    Open { spec: Box<Spec>, own_host: bool },
    /// Calls an entry point.
    Call { resource: String, entry: Entry },
}

/// A call of the owner's state machine.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Local {
    group: String,
    generation: u64,
    call: u64,
}

/// What a call is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Doing {
    Open,
    Adopt,
    Online,
    Offline,
    Terminate,
    Close,
}

/// Who asked something of a host.
#[derive(Debug)]
enum Asker {
    /// A group.
    Local(Local, Doing),
    /// A group that has arrived here running: its resource is opened, then waited for, then looked after.
    Arrival(Local, incoming::Step),
    /// Nobody: it is ended.
    Leftover(leftovers::Step),
    /// Somebody outside.
    Outside(Reply),
    /// Nobody waits.
    Nobody,
}

/// What the teller brings into the database.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Told {
    generation: u64,
    state: csv_cluster::db::GroupState,
    resources: BTreeMap<String, csv_cluster::db::ResourceStatus>,
    /// Nothing of it is here any more, as it was asked.
    released: bool,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Groups {
    news: SyncSender<News>,
    /// Until the driver has it.
    heard: Mutex<Option<Receiver<News>>>,
    told: Mutex<BTreeMap<String, Told>>,
    tell: Notify,
    /// Nothing of any group is left here.
    quiet: watch::Sender<bool>,
    /// What moves while it runs, by group.
    moving: Mutex<BTreeMap<String, MoveProgress>>,
    /// How busy this machine is.
    pub(crate) load: load::Load,
}

impl Groups {
    pub(crate) fn new() -> Groups {
        let (news, heard) = sync_channel(NEWS);
        Groups {
            news,
            heard: Mutex::new(Some(heard)),
            told: Mutex::default(),
            tell: Notify::new(),
            quiet: watch::Sender::new(false),
            moving: Mutex::default(),
            load: load::Load::default(),
        }
    }

    /// Starts the threads and tasks.
    pub(crate) fn start(&self, engine: &Arc<Engine>) -> Result<()> {
        let heard = self.heard.lock().take().context("groups are started once")?;
        let driven = engine.clone();
        std::thread::Builder::new()
            .name("groups".to_owned())
            .spawn(move || driver::Driver::new(driven, heard).run())
            .context("cannot start a thread")?;
        tokio::spawn(engine.clone().tell_groups());
        tokio::spawn(engine.clone().follow_groups());
        tokio::spawn(engine.clone().keep_checkpoints());
        tokio::spawn(engine.clone().watch_load());
        Ok(())
    }

    /// The driver looks again. When its queue is full it does so anyhow.
    pub(crate) fn wake(&self) {
        let _full = self.news.try_send(News::Wake);
    }

    fn send(&self, news: News) -> Result<(), String> {
        self.news
            .try_send(news)
            .map_err(|_| "csvd has too much to do with its resources; try again".to_owned())
    }

    async fn ask(&self, what: What, limit: Duration) -> Result<Value, String> {
        let (reply, answer) = oneshot::channel();
        self.send(News::Ask { what, reply })?;
        answered(answer, limit).await
    }

    /// The entry point `control` of a resource that is open here.
    pub(crate) async fn control(
        &self,
        resource: &str,
        verb: &str,
        arguments: Value,
        limit: Duration,
    ) -> Result<Value, String> {
        let entry = Entry::Control { verb: verb.to_owned(), arguments };
        self.ask(What::Call { resource: resource.to_owned(), entry }, limit).await
    }

    /// Is nothing of any group left on this node?
    pub(crate) fn is_quiet(&self) -> bool {
        *self.quiet.borrow()
    }

    /// How far the move of a group has come, if it moves while it runs.
    pub(crate) fn progress(&self, group: &str) -> Option<MoveProgress> {
        self.moving.lock().get(group).cloned()
    }

    /// Takes everything offline: in good order within the limit, at once after that. Nothing is started any more.
    pub(crate) async fn stop_all(&self, limit: Duration) {
        let mut quiet = self.quiet.subscribe();
        if self.send(News::Finish).is_err() {
            return;
        }
        let orderly = tokio::time::timeout(limit, quiet.wait_for(|quiet| *quiet)).await.is_ok();
        if !orderly {
            let _sent = self.send(News::Stop("csvd stops, and going offline takes too long".to_owned()));
            let _in_time = tokio::time::timeout(STOP_LIMIT, quiet.wait_for(|quiet| *quiet)).await;
        }
    }
}

async fn answered(
    answer: oneshot::Receiver<Result<Value, String>>,
    limit: Duration,
) -> Result<Value, String> {
    match tokio::time::timeout(limit, answer).await {
        Ok(Ok(answer)) => answer,
        Ok(Err(_)) => {
            Err("its resource host ended meanwhile; it is not known whether it was done".to_owned())
        }
        Err(_) => Err(format!("there is no answer after {} s; it may still be done", limit.as_secs())),
    }
}

impl Engine {
    /// Carries changes of the database to the driver.
    async fn follow_groups(self: Arc<Self>) {
        let mut changes = self.db.changes();
        loop {
            self.groups.wake();
            self.groups.tell.notify_one();
            if self.is_stopping() || changes.changed().await.is_err() {
                return;
            }
        }
    }

    /// Asks the majority something, and waits until its answer is here: everything that was decided before is known then.
    pub(super) async fn catch_up(&self) -> bool {
        self.comes_back_as(&format!("groups.{}", self.me().0), self.next_mark()).await
    }
}

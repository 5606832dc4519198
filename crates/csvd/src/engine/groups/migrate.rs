//! Moves the virtual machines of a group to another node while they run. One task per move, on the owner.
//!
//! ```text
//!   owner                                             target
//!   what is the hardware?
//!   Prepare ───────────────────────────────────────>  opens everything, brings online what several nodes may have,
//!           <─────────────────────────────── where    and has a QEMU wait for each guest
//!   sends guest after guest
//!   tells the database: the group has moved ═══════>  sees that it owns the group: the guests go on
//!   sees that it does not own the group any more:
//!   ends what is left
//! ```
//!
//! At most one end runs a guest at any moment: the target lets it go on only as owner, and the owner gives it up by the
//! same log entry. The guest stands still from the end of its transfer until then.
//!
//! Failure. Whatever fails before the log entry: guests that were sent are taken back, the target is told, the database hears
//! that the group stays. The log entry's outcome is not known: asked for until it is. The owner dies: the target's
//! guests wait until the group is assigned anew. csvd starts anew in between: this begins from the start, and finds by the
//! guest's state what was done already.

use super::incoming::comes;
use super::spec::{is_shared, resources_of, spec_of};
use super::{News, What};
use crate::engine::Engine;
use crate::engine::propose::Failed;
use csv_cluster::db::{Command, GroupState};
use csv_resource::api::Spec;
use csv_resource::protocol::Entry;
use csv_types::NodeId;
use csvd::check::NodeRequest;
use csvd::groups::MoveProgress;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

const PROPOSE_LIMIT: Duration = Duration::from_secs(5);
/// Between two words for guests that were sent; several times in the minute after which they would count as lost.
const HOLD_EVERY: Duration = Duration::from_secs(10);
/// For verbs that only look or switch.
const QUICK: Duration = Duration::from_secs(30);
/// For the other node to have everything ready.
const PREPARE_LIMIT: Duration = Duration::from_secs(120);
/// For a guest's memory to go over; the machine itself gives up earlier when nothing moves.
const SEND_LIMIT: Duration = Duration::from_secs(7200);
/// For the database here to have what its asker has seen.
const SEE_LIMIT: Duration = Duration::from_secs(5);
/// Between two tries to tell what became of the move.
const TELL_AGAIN: Duration = Duration::from_millis(500);

/// What is to be moved.
#[derive(Debug, Clone)]
pub(super) struct Order {
    pub(super) group: String,
    pub(super) generation: u64,
    pub(super) to: NodeId,
    pub(super) machines: Vec<String>,
}

/// What the owner asks the target.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "group", rename_all = "kebab-case")]
pub(crate) enum GroupRequest {
    /// Get ready for a group and wait for one of its guests. Answered with where (`uri`).
    Prepare {
        /// The group.
        name: String,
        /// Under which its owner has it.
        generation: u64,
        /// The virtual machine.
        machine: String,
        /// What it is made of.
        hardware: Value,
        /// The guest is paused, and stays so.
        paused: bool,
    },
    /// Has the guest arrived whole? Answered with true or false.
    HasArrived {
        /// The virtual machine.
        machine: String,
    },
    /// The group does not come.
    Cancel {
        /// The group.
        name: String,
        /// Under which its owner has it.
        generation: u64,
    },
    /// The entry point `control` of a resource.
    Control {
        /// The resource.
        resource: String,
        /// What to do.
        verb: String,
        /// With what.
        arguments: Value,
    },
    /// How far is the move of a group?
    Progress {
        /// The group.
        name: String,
    },
    /// Check properties of a resource type that the asker does not have.
    CheckProperties {
        /// The type.
        kind: String,
        /// Name to value.
        properties: std::collections::BTreeMap<String, String>,
    },
}

/// The task.
pub(super) async fn run(engine: Arc<Engine>, order: Order) {
    let failed = engine.migrate(&order).await.is_err();
    let (group, generation) = (order.group, order.generation);
    let _full = engine.groups.news.try_send(News::MoveEnded { group, generation, failed });
}

impl Engine {
    async fn migrate(self: &Arc<Self>, order: &Order) -> Result<(), ()> {
        let sent = Mutex::new(Vec::new());
        let moved = async {
            let moved = self.send_all(order, &sent).await;
            match moved {
                Ok(()) => self.hand_over(order).await,
                Err(why) => self.stay(order, &why).await,
            }
        };
        tokio::select! {
            moved = moved => moved,
            never = self.hold(&sent) => match never {},
        }
    }

    /// Guests that were sent stand still for as long as others of the group are under way, and nobody takes them for lost.
    async fn hold(&self, sent: &Mutex<Vec<String>>) -> Infallible {
        loop {
            tokio::time::sleep(HOLD_EVERY).await;
            let machines = sent.lock().clone();
            for machine in machines {
                // Refused by one that has been taken back meanwhile.
                let _held = self.groups.control(&machine, "hold", json!({}), HOLD_EVERY).await;
            }
        }
    }

    /// After this every guest stands still here, and is whole at the other end.
    async fn send_all(self: &Arc<Self>, order: &Order, sent: &Mutex<Vec<String>>) -> Result<(), String> {
        for machine in &order.machines {
            let progress = MoveProgress {
                resource: machine.clone(),
                text: format!("{} gets ready for {machine}", self.node_name(order.to)),
                percent: None,
            };
            self.groups.moving.lock().insert(order.group.clone(), progress);
            self.send_one(order, machine)
                .await
                .map_err(|why| format!("{machine} could not be moved: {why}"))?;
            sent.lock().push(machine.clone());
        }
        Ok(())
    }

    async fn send_one(self: &Arc<Self>, order: &Order, machine: &str) -> Result<(), String> {
        let status = self.groups.control(machine, "status", json!({}), QUICK).await?;
        if status["phase"] == "migrated" {
            // A csvd before this one has sent it.
            let arrived = GroupRequest::HasArrived { machine: machine.to_owned() };
            if self.ask_about_groups(order.to, arrived, QUICK).await == Ok(Value::Bool(true)) {
                return Ok(());
            }
            self.groups.control(machine, "take-back", json!({}), QUICK).await?;
        }
        let prepare = GroupRequest::Prepare {
            name: order.group.clone(),
            generation: order.generation,
            machine: machine.to_owned(),
            hardware: status["hardware"].clone(),
            paused: status["status"] == "paused",
        };
        let there = self
            .ask_about_groups(order.to, prepare, PREPARE_LIMIT)
            .await
            .map_err(|why| format!("{} cannot take it: {why}", self.node_name(order.to)))?;
        let arguments = json!({ "uri": there["uri"], "tls_hostname": self.node_name(order.to) });
        let account = tokio::select! {
            account = self.groups.control(machine, "migrate", arguments, SEND_LIMIT) => account?,
            () = self.is_gone(order.to) => {
                // Nobody waits for it any more, which ends it; a connection to a machine without power lasts for long.
                self.groups.wake();
                return Err(format!("{} is not up any more", self.node_name(order.to)));
            }
        };
        tracing::info!(machine, %account, "sent");
        Ok(())
    }

    /// Waits until the node is not up, by the database.
    async fn is_gone(&self, node: NodeId) {
        let mut changes = self.db.changes();
        while self.db.read().nodes.get(&node).is_some_and(|node| node.is_up()) {
            if changes.changed().await.is_err() {
                return;
            }
        }
    }

    fn releases(&self, order: &Order) -> bool {
        let db = self.db.read();
        db.groups.get(&order.group).is_some_and(|group| {
            group.owner == Some(self.me())
                && group.generation == order.generation
                && matches!(&group.state, GroupState::Releasing { to, .. } if *to == Some(order.to))
        })
    }

    /// Is every guest still as it was sent: standing still here, and whole there?
    async fn all_sent(self: &Arc<Self>, order: &Order) -> Result<(), String> {
        for machine in &order.machines {
            let status = self.groups.control(machine, "status", json!({}), QUICK).await?;
            if status["phase"] != "migrated" {
                return Err(format!("{machine} was started here again while others of its group moved"));
            }
            let arrived = GroupRequest::HasArrived { machine: machine.clone() };
            if self.ask_about_groups(order.to, arrived, QUICK).await? != Value::Bool(true) {
                let shown = self.node_name(order.to);
                return Err(format!("{machine} is not on {shown} any more"));
            }
        }
        Ok(())
    }

    /// The database is told that the group has moved, until it is known whether it has.
    async fn hand_over(self: &Arc<Self>, order: &Order) -> Result<(), ()> {
        if let Err(why) = self.all_sent(order).await {
            return self.stay(order, &why).await;
        }
        let (name, generation, node) = (order.group.clone(), order.generation, self.me());
        let command = Command::GroupMigrated { name, generation, node };
        loop {
            match self.propose(command.clone(), PROPOSE_LIMIT).await {
                Ok(_) => return Ok(()),
                // The leader may have refused since it had been done, which this node may have yet to hear.
                Err(Failed::Refused(_)) if !self.catch_up().await => {
                    if self.is_stopping() {
                        return Err(());
                    }
                    tokio::time::sleep(TELL_AGAIN).await;
                }
                Err(Failed::Refused(refused)) if !self.owns(order) => {
                    // It had been done, or somebody else has the group: there is nothing to take back here.
                    tracing::debug!(group = order.group, %refused, "the move was told already, or is void");
                    return Ok(());
                }
                Err(Failed::Refused(refused)) => return self.stay(order, &refused.to_string()).await,
                Err(Failed::Unknown(_) | Failed::NoLeader(_)) if self.is_stopping() => return Err(()),
                Err(Failed::Unknown(_) | Failed::NoLeader(_)) => tokio::time::sleep(TELL_AGAIN).await,
            }
        }
    }

    fn owns(&self, order: &Order) -> bool {
        let db = self.db.read();
        let group = db.groups.get(&order.group);
        group.is_some_and(|group| group.owner == Some(self.me()) && group.generation == order.generation)
    }

    /// The move failed: guests go on here, and everybody hears of it.
    async fn stay(self: &Arc<Self>, order: &Order, why: &str) -> Result<(), ()> {
        for machine in &order.machines {
            let status = self.groups.control(machine, "status", json!({}), QUICK).await;
            if status.is_ok_and(|status| status["phase"] == "migrated") {
                let back = self.groups.control(machine, "take-back", json!({}), QUICK).await;
                if let Err(why) = back {
                    self.event(machine, "resource-warning", format!("{machine} does not go on here: {why}"));
                }
            }
        }
        let cancel = GroupRequest::Cancel { name: order.group.clone(), generation: order.generation };
        // Where it is not heard the database tells the same.
        let _heard = self.ask_about_groups(order.to, cancel, QUICK).await;
        let (name, generation, node) = (order.group.clone(), order.generation, self.me());
        let command = Command::GroupReleaseCancelled { name, generation, node, reason: why.to_owned() };
        while self.releases(order) && !self.is_stopping() {
            if let Ok(_) | Err(Failed::Refused(_)) = self.propose(command.clone(), PROPOSE_LIMIT).await {
                break;
            }
            tokio::time::sleep(TELL_AGAIN).await;
        }
        Err(())
    }

    pub(super) fn node_name(&self, node: NodeId) -> String {
        self.db.read().node_name(node)
    }

    /// Asks another node, or this one.
    pub(crate) async fn ask_about_groups(
        self: &Arc<Self>,
        node: NodeId,
        request: GroupRequest,
        limit: Duration,
    ) -> Result<Value, String> {
        if node == self.me() {
            return self.answer_about_groups(request).await;
        }
        let request = serde_json::to_value(request).map_err(|error| error.to_string())?;
        self.ask_node::<Result<Value, String>>(node, NodeRequest::Group { request }, limit).await?
    }

    /// What another node asks.
    pub(crate) async fn answer_about_groups(
        self: &Arc<Self>,
        request: GroupRequest,
    ) -> Result<Value, String> {
        match request {
            GroupRequest::Prepare { name, generation, machine, hardware, paused } => {
                self.expect_group(&name, generation, paused.then(|| machine.clone())).await?;
                self.prepare(&name, generation, &machine, hardware).await
            }
            GroupRequest::HasArrived { machine } => {
                let status = self.groups.control(&machine, "status", json!({}), QUICK).await?;
                Ok(Value::Bool(status["phase"] == "incoming" && status["status"] == "paused"))
            }
            GroupRequest::Cancel { name, generation } => {
                self.groups.send(News::Unexpect { group: name, generation })?;
                Ok(Value::Null)
            }
            GroupRequest::Control { resource, verb, arguments } => {
                self.groups.control(&resource, &verb, arguments, SEND_LIMIT).await
            }
            GroupRequest::Progress { name } => {
                serde_json::to_value(self.groups.progress(&name)).map_err(|error| error.to_string())
            }
            GroupRequest::CheckProperties { kind, properties } => {
                let checked =
                    tokio::task::spawn_blocking(move || super::properties::check_here(&kind, &properties));
                let checked = checked.await.map_err(|error| error.to_string())?;
                serde_json::to_value(checked).map_err(|error| error.to_string())
            }
        }
    }

    /// The driver does not take what comes for a leftover.
    async fn expect_group(&self, name: &str, generation: u64, paused: Option<String>) -> Result<(), String> {
        self.see(|db| comes(db, name, generation, self.me()))
            .await
            .map_err(|()| format!("this node does not know of a move of group {name} to it"))?;
        let (reply, answer) = tokio::sync::oneshot::channel();
        self.groups.send(News::Expect { group: name.to_owned(), generation, paused, reply })?;
        super::answered(answer, QUICK).await.map(drop)
    }

    /// The target's part: everything is open here, and the guest is waited for.
    async fn prepare(
        &self,
        name: &str,
        generation: u64,
        machine: &str,
        hardware: Value,
    ) -> Result<Value, String> {
        for (spec, own_host) in self.to_prepare(name, generation, machine)? {
            let resource = spec.name.clone();
            let shared = is_shared(&spec.kind);
            self.groups.ask(What::Open { spec: Box::new(spec), own_host }, QUICK).await?;
            if shared {
                let online = What::Call { resource: resource.clone(), entry: Entry::Online };
                self.groups.ask(online, PREPARE_LIMIT).await.map_err(|why| format!("{resource}: {why}"))?;
            }
        }
        let listen = self.config_addr()?;
        let arguments = json!({ "listen": listen, "hardware": hardware });
        self.groups.control(machine, "incoming", arguments, PREPARE_LIMIT).await
    }

    /// What several nodes may have, then the machine.
    fn to_prepare(&self, name: &str, generation: u64, machine: &str) -> Result<Vec<(Spec, bool)>, String> {
        let db = self.db.read();
        let group = db.groups.get(name).ok_or_else(|| format!("there is no group {name}"))?;
        let resources = resources_of(&db, name);
        let spec = |of: &csv_cluster::db::Resource| {
            (spec_of(group, generation, &resources, &db.types, of), of.policy.separate_monitor)
        };
        let machine =
            resources.get(machine).ok_or_else(|| format!("group {name} has no resource {machine}"))?;
        let shared = resources.values().filter(|of| of.want_online && is_shared(&of.kind));
        Ok(shared.chain([machine]).map(spec).collect())
    }

    fn config_addr(&self) -> Result<String, String> {
        let own = self.db.read().nodes.get(&self.me()).map(|node| node.addr.to_string());
        own.ok_or_else(|| "this node has no address".to_owned())
    }

    /// Waits until the database here is so. Not long.
    async fn see(&self, holds: impl Fn(&csv_cluster::db::ClusterDb) -> bool) -> Result<(), ()> {
        let mut changes = self.db.changes();
        let deadline = tokio::time::Instant::now() + SEE_LIMIT;
        while !holds(&self.db.read()) {
            match tokio::time::timeout_at(deadline, changes.changed()).await {
                Ok(Ok(())) => {}
                Ok(Err(_)) | Err(_) => return Err(()),
            }
        }
        Ok(())
    }
}

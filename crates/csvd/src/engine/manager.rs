//! What the leader does for all: says who is up and who is down, gives volumes their owners, and keeps the set of voters
//! as it should be. It proposes what pure functions of `csv-cluster` return; the database refuses what is out of date,
//! so a leader that is not one any more does no harm.

use super::Engine;
use csv_cluster::db::{Command, EventKind, NewEvent, Witness};
use csv_cluster::failover::{NodeReport, View, plan};
use csv_cluster::membership::{Observer, verdicts};
use csv_cluster::quorum::{VoterId as Voter, target_voters};
use csv_raft::{Metrics, RaftNode, Role};
use csv_types::NodeId;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

const TICK: Duration = Duration::from_millis(200);
const PROPOSE_LIMIT: Duration = Duration::from_secs(3);
/// A learner this close behind may vote.
const LAG_MAX: u64 = 500;
/// A follower that answered within this time is there.
const ACK_AGE_MS_MAX: u64 = 2_000;

impl Engine {
    /// The loop; runs everywhere and does something on the leader.
    pub(crate) async fn manage(self: Arc<Self>) {
        while !self.is_stopping() {
            let metrics = self.raft.metrics();
            if metrics.role == Role::Leader && metrics.has_quorum() && self.db.read().initialised() {
                self.do_lead(&metrics).await;
            }
            // A change of a report is acted upon at once.
            let _news = tokio::time::timeout(TICK, self.planning.notified()).await;
        }
    }

    async fn do_lead(&self, metrics: &Metrics) {
        let commands = {
            let db = self.db.read();
            let heartbeats = self.heartbeats.lock();
            let observer = Observer {
                me: self.me(),
                incarnation: self.incarnation.get(),
                now_unix_ms: super::unix_ms(),
            };
            verdicts(&db, &heartbeats, observer)
        };
        self.carry_out(commands).await;
        let commands = {
            let view = View { now_unix_ms: super::unix_ms(), me: self.me(), reports: self.all_reports() };
            plan(&self.db.read(), &view)
        };
        self.carry_out(commands).await;
        let commands = {
            let view = self.group_view();
            csv_cluster::groups::manager::plan(&self.db.read(), &view)
        };
        self.carry_out(commands).await;
        if let Err(error) = self.keep_members(metrics).await {
            tracing::debug!(error, "members");
        }
    }

    async fn carry_out(&self, commands: Vec<Command>) {
        for command in commands {
            if let Err(error) = self.propose(command.clone(), PROPOSE_LIMIT).await {
                tracing::debug!(?command, %error, "a command of the manager was not carried out");
            }
        }
    }

    pub(crate) fn all_reports(&self) -> BTreeMap<NodeId, NodeReport> {
        let mut reports = self.reports.lock().clone();
        let mut own = self.own_report.lock().clone();
        own.incarnation = self.incarnation.get();
        reports.insert(self.me(), own);
        reports
    }

    /// Every node is a member; who votes is decided by the rules of quorum.
    async fn keep_members(&self, metrics: &Metrics) -> Result<(), String> {
        let text = |error: csv_raft::ProposeError| error.to_string();
        let wanted: BTreeMap<u64, RaftNode> = self
            .addresses()
            .into_iter()
            .filter(|(node, _)| self.db.read().nodes.contains_key(node))
            .map(|(node, at)| (node.0.into(), RaftNode { name: at.name, addr: at.addr.to_string() }))
            .collect();
        self.keep_witness(metrics).await?;
        for (id, node) in &wanted {
            if !metrics.nodes.contains_key(id) {
                return self.raft.add_learner(*id, node.clone(), PROPOSE_LIMIT).await.map_err(text);
            }
        }
        let current: BTreeSet<Voter> = metrics.voter_ids().into_iter().map(Voter).collect();
        let (decision, changed) = {
            let db = self.db.read();
            let decision = target_voters(&db, &self.able(metrics), &current, self.witness_answers(metrics));
            let changed = decision.voters != current;
            (decision, changed)
        };
        if changed {
            let voters = decision.voters.iter().map(|voter| voter.0).collect();
            self.raft.change_voters(voters, PROPOSE_LIMIT).await.map_err(text)?;
            self.tell_voters(decision.reason).await;
            return Ok(());
        }
        let stays = |id: u64| wanted.contains_key(&id) || (id == Voter::WITNESS.0 && self.has_witness());
        let gone: BTreeSet<u64> = metrics.learners.iter().copied().filter(|id| !stays(*id)).collect();
        if gone.is_empty() { Ok(()) } else { self.raft.remove_nodes(gone, PROPOSE_LIMIT).await.map_err(text) }
    }

    fn has_witness(&self) -> bool {
        self.db.read().quorum.witness != Witness::None
    }

    /// The witness is a member for as long as the database names one.
    async fn keep_witness(&self, metrics: &Metrics) -> Result<(), String> {
        if metrics.nodes.contains_key(&Voter::WITNESS.0) || !self.has_witness() {
            return Ok(());
        }
        let _one = self.changing_witness.lock().await;
        let node = match self.db.read().quorum.witness.clone() {
            Witness::None => return Ok(()),
            Witness::Disk { name, device, .. } => RaftNode { name, addr: device },
            Witness::Node { name, addr } => {
                if self.witness_certificate().is_none() {
                    // It has not joined yet.
                    return Ok(());
                }
                RaftNode { name, addr: addr.to_string() }
            }
        };
        let added = self.raft.add_learner(Voter::WITNESS.0, node, PROPOSE_LIMIT).await;
        added.map_err(|error| error.to_string())
    }

    async fn tell_voters(&self, reason: String) {
        let event = NewEvent {
            id: EventKind::VotersChanged.id(),
            at_unix_ms: super::unix_ms(),
            node: None,
            subject: self.identity.cluster_name.clone(),
            level: EventKind::VotersChanged.level(),
            message: reason,
        };
        self.carry_out(vec![Command::EventAdd { events: vec![event] }]).await;
    }

    /// Nodes that can vote: heard, answering, and with nearly the whole log.
    fn able(&self, metrics: &Metrics) -> BTreeSet<NodeId> {
        let mut able: BTreeSet<NodeId> = self
            .heartbeats
            .lock()
            .heard()
            .into_iter()
            .filter(|node| {
                metrics.followers.get(&u64::from(node.0)).is_some_and(|follower| {
                    follower.lag <= LAG_MAX && follower.ack_age_ms.is_some_and(|age| age <= ACK_AGE_MS_MAX)
                })
            })
            .collect();
        able.insert(self.me());
        able
    }

    fn witness_answers(&self, metrics: &Metrics) -> bool {
        metrics.followers.get(&Voter::WITNESS.0).is_some_and(|follower| {
            follower.lag <= LAG_MAX && follower.ack_age_ms.is_some_and(|age| age <= ACK_AGE_MS_MAX)
        })
    }
}

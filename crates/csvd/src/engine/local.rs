//! This node's view of itself: does it hear the majority, is it still the one that the cluster takes for up, what does it
//! report. When it is cut off it stops its own I/O (agents do that), in bounded time: nobody waits for it longer than
//! [`Engine::contact_limit`].

use super::Engine;
use super::contact::newest_contact;
use csv_cluster::db::{ClusterDb, Node, NodeState};
use csv_cluster::failover::NodeReport;
use csv_cluster::membership::{Input, Output};
use csv_raft::{Role, Stop};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

const TICK: Duration = Duration::from_millis(200);
/// An engine that has not looked at itself for so long hangs.
const LOOK_LIMIT_MS: u64 = 10_000;
/// In this time csvfs stops its I/O when it must.
const STOP_LIMIT_MS: u64 = 10_000;

impl Engine {
    /// The loop.
    pub(crate) async fn watch_self(self: Arc<Self>) {
        let mut ticks = tokio::time::interval(TICK);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        while !self.is_stopping() {
            ticks.tick().await;
            self.looked_at_ms.store(self.now_ms(), Ordering::Relaxed);
            let mut out = Vec::new();
            self.heartbeats.lock().step(&Input::Tick { at_ms: self.now_ms() }, &mut out);
            self.membership_news(&out);
            self.look_for_contact();
            if let Some(mark) = self.slept.lock().next_to_ask() {
                tokio::spawn(self.clone().confirm_awake(mark));
            }
            self.renew_incarnation_aside();
        }
    }

    /// What heartbeats told.
    pub(crate) fn membership_news(&self, news: &[Output]) {
        for output in news {
            match output {
                Output::Heard { node, .. } => self.peers.retry_now(*node),
                Output::Missed { node, silent_ms } => {
                    tracing::info!(%node, silent_ms, "no heartbeat");
                    self.reports.lock().remove(node);
                }
                Output::Slept { ms } => {
                    self.slept.lock().begin(self.next_mark());
                    self.confirmed.lock().forget();
                    let text = format!("this node stood still for {ms} ms; the others may have given it up");
                    self.event("", "slept", text);
                }
            }
        }
    }

    /// After how long without a majority this node stops.
    pub(crate) fn contact_limit(&self) -> Duration {
        Duration::from_millis(self.db.read().settings.contact_limit_ms())
    }

    /// Has this node been in contact with a majority within the limit, as far as it knows?
    pub(crate) fn in_contact(&self) -> bool {
        let limit_ms = u64::try_from(self.contact_limit().as_millis()).unwrap_or(u64::MAX);
        let last = *self.last_contact_ms.lock();
        last.is_some_and(|at_ms| self.now_ms().saturating_sub(at_ms) <= limit_ms)
    }

    fn look_for_contact(&self) {
        let metrics = self.raft.metrics();
        let limit_ms = u64::try_from(self.contact_limit().as_millis()).unwrap_or(u64::MAX);
        let now_ms = self.now_ms();
        let slept = self.slept.lock().is_unconfirmed();
        let age_ms = if slept { None } else { self.confirmed.lock().contact_age_ms(&metrics, now_ms) };
        let contact_ms = {
            let mut last = self.last_contact_ms.lock();
            *last = newest_contact(*last, now_ms, age_ms);
            *last
        };
        let why = match metrics.role {
            Role::Stopped => Some(match self.raft.stopped() {
                Some(Stop::Fatal(why)) => format!("the database of this node has stopped: {why}"),
                Some(Stop::Shutdown) | None => "the database of this node has stopped".to_owned(),
            }),
            _ if !self.db.read().initialised() => Some("this node has no database yet".to_owned()),
            _ if contact_ms.is_some_and(|at| now_ms.saturating_sub(at) <= limit_ms) => None,
            _ if slept => Some("this node stood still, and has not reached a majority since".to_owned()),
            Role::Leader | Role::Learner | Role::Follower | Role::Candidate => {
                Some(format!("no quorum: this node has not reached a majority for {limit_ms} ms"))
            }
        };
        // csvfs may have been running all the time; that csvd was away for a moment is no reason to stop it.
        if why.is_none() || now_ms > limit_ms {
            if self.starting.swap(false, Ordering::AcqRel) {
                self.volumes.wake_all();
            }
        } else if self.is_starting() {
            return;
        }
        let mut cut_off = self.cut_off.lock();
        if *cut_off == why {
            return;
        }
        match &why {
            // Before the first contact there is no I/O to stop.
            Some(why) if cut_off.is_some() => tracing::info!("{why}"),
            Some(why) => self.event("", "cut-off", format!("{why}; I/O stops here")),
            None => self.event("", "contact", "this node is in contact with the majority".to_owned()),
        }
        self.cut_off_at_ms.store(now_ms, Ordering::Relaxed);
        *cut_off = why;
        drop(cut_off);
        self.volumes.wake_all();
    }

    /// Does this node do what it has to: look at itself, and do no I/O when it must not? Says why not.
    pub(crate) fn in_control(&self) -> Result<(), String> {
        let ago = |at_ms: &AtomicU64| self.now_ms().saturating_sub(at_ms.load(Ordering::Relaxed));
        if ago(&self.looked_at_ms) > LOOK_LIMIT_MS {
            return Err(format!("the engine has stood still for {} ms", ago(&self.looked_at_ms)));
        }
        let must_stop =
            !self.is_starting() && self.cut_off().is_some() && ago(&self.cut_off_at_ms) > STOP_LIMIT_MS;
        if must_stop && !self.groups.is_quiet() {
            return Err("resources are online here although they must not be".to_owned());
        }
        for agent in self.volumes.all() {
            if let Some(silence) = agent.stands_still() {
                return Err(format!(
                    "the agent of {} has stood still for {} s",
                    agent.volume.name,
                    silence.as_secs()
                ));
            }
            if must_stop && agent.does_io() {
                return Err(format!("csvfs of {} does I/O although it must not", agent.volume.name));
            }
        }
        Ok(())
    }

    /// A node that the cluster has given up begins a new life, once nothing of the former one is left.
    pub(super) fn renew_incarnation(&self) {
        if self.cut_off().is_some() {
            return;
        }
        let now = self.incarnation.get();
        let known = {
            let db = self.db.read();
            db.nodes.get(&self.me()).filter(|node| is_given_up(node, now)).map(|node| node.incarnation)
        };
        let Some(known) = known else { return };
        let reports = self.volumes.all();
        if !reports.iter().all(|agent| agent.is_quiet()) || !self.groups.is_quiet() {
            return;
        }
        match self.incarnation.renew(known) {
            Ok(number) => {
                let text =
                    format!("the cluster had given this node up; it comes back as incarnation {number}");
                self.event("", "new-life", text);
                self.volumes.wake_all();
            }
            Err(error) => tracing::error!(%error, "no new incarnation"),
        }
    }

    /// Are heartbeats of this node heard here?
    pub(crate) fn hears(&self, node: csv_types::NodeId) -> bool {
        node == self.me() || self.heartbeats.lock().peer(node).is_some_and(|peer| peer.heard)
    }

    /// Puts the report for the next beats together.
    pub(crate) fn report_changed(&self) {
        let volumes = self.volumes.all();
        let seen = self.groups.load.get();
        let report = NodeReport {
            incarnation: self.incarnation.get(),
            volumes: volumes.iter().map(|agent| (agent.volume.name.clone(), agent.report())).collect(),
            load: seen.cpu_permille / 10,
            cpus: seen.cpus,
            memory_mib: self.config.memory_mib.unwrap_or_else(|| seen.for_machines_mib()),
            memory_used_mib: seen.used_mib,
            cpu_permille: seen.cpu_permille,
        };
        *self.own_report.lock() = report;
        self.planning.notify_one();
    }
}

/// One that is down needs a number above the one that is known; that of a machine whose clock is behind may be below it.
fn is_given_up(node: &Node, incarnation: u64) -> bool {
    match node.state {
        NodeState::Down => node.incarnation >= incarnation,
        NodeState::Up | NodeState::Isolated => node.incarnation > incarnation,
        NodeState::Joining => false,
    }
}

/// Nodes in the state Up or Isolated.
pub(crate) fn up_nodes(db: &ClusterDb) -> usize {
    db.nodes.values().filter(|node| matches!(node.state, NodeState::Up | NodeState::Isolated)).count()
}

#[cfg(test)]
mod tests {
    use super::*;
    use csv_cluster::db::AdminState;

    fn node(state: NodeState, incarnation: u64) -> Node {
        Node {
            id: csv_types::NodeId(1),
            name: "n1".into(),
            addr: std::net::Ipv4Addr::LOCALHOST.into(),
            feature_level: 1,
            version: String::new(),
            vote: true,
            state,
            admin: AdminState::Active,
            leaving: false,
            stopped: false,
            incarnation,
            failures: Vec::new(),
            quarantined_until_unix_ms: None,
            cert_sha256: String::new(),
            since_unix_ms: 0,
            down_reason: String::new(),
        }
    }

    #[test]
    fn a_node_that_is_down_begins_a_new_life_whatever_its_clock_says() {
        assert!(is_given_up(&node(NodeState::Down, 5), 5));
        // It booted with its clock behind, so its number is below that of its former life.
        assert!(is_given_up(&node(NodeState::Down, 5), 3));
        // It was heard in its new life, and the leader has not said so yet.
        assert!(!is_given_up(&node(NodeState::Down, 5), 6));
        for state in [NodeState::Up, NodeState::Isolated] {
            assert!(is_given_up(&node(state, 5), 3));
            assert!(!is_given_up(&node(state, 5), 5));
        }
        assert!(!is_given_up(&node(NodeState::Joining, 0), 5));
    }
}

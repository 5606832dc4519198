//! Commands about nodes.

use super::super::command::{Answer, Applied, Command, Init, NewNode};
use super::super::events::EventKind;
use super::super::key::NODE_ID_MAX;
use super::super::node::{AdminState, Node, NodeState};
use super::super::refused::Refused;
use super::super::settings::Settings;
use super::super::{ClusterDb, FORMAT, NODES_MAX};
use super::{At, check_name, done, is_sha256, unchanged};
use csv_types::NodeId;

impl ClusterDb {
    /// The commands that are about whether a node is there; `None` for others.
    pub(super) fn apply_node(&mut self, at: At, by: NodeId, command: &Command) -> Option<Answer> {
        Some(if let Command::NodeAdd { node, token_sha256, expect_id } = command {
            self.node_add(at, node, token_sha256, *expect_id)
        } else if let Command::NodeReplace { old, node, token_sha256, expect_id } = command {
            self.node_replace(at, *old, node, (token_sha256, *expect_id))
        } else if let Command::NodeUp { node, incarnation } = command {
            self.node_up((at, by), *node, *incarnation)
        } else if let Command::NodeIsolated { node, incarnation, reason } = command {
            self.node_isolated(at, *node, *incarnation, reason)
        } else if let Command::NodeDown { node, incarnation, reason, planned } = command {
            self.node_down((at, by), *node, *incarnation, reason, *planned)
        } else if let Command::NodeLeave { node, incarnation } = command {
            self.node_leave(at, *node, *incarnation)
        } else if let Command::NodeEvict { node } = command {
            self.node_evict((at, by), *node)
        } else if let Command::ForceStart { node } = command {
            self.force_start((at, by), *node)
        } else {
            return None;
        })
    }

    pub(super) fn init(&mut self, at: At, init: &Init) -> Answer {
        if self.initialised() {
            return Err(Refused::ClusterExists { cluster: self.name.clone() });
        }
        check_name("cluster", &init.name)?;
        if init.name.len() > 15 {
            let why = "it must have 1 to 15 characters".into();
            return Err(Refused::BadName { what: "cluster".into(), name: init.name.clone(), why });
        }
        if init.id.is_nil() {
            return Err(Refused::Invalid("the cluster's id must not be nil".into()));
        }
        check_name("node", &init.node.name)?;
        let level = init.node.feature_level;
        if level == 0 {
            return Err(Refused::Invalid("feature levels begin with 1".into()));
        }
        let mut settings = Settings::default();
        settings.set_all(&init.settings)?;
        self.format = FORMAT;
        self.name = init.name.clone();
        self.id = init.id;
        self.feature_level = level;
        self.settings = settings;
        self.secrets = init.secrets.clone();
        self.emit(
            at,
            EventKind::ClusterCreated,
            None,
            &init.name,
            format!("cluster {} was created", init.name),
        );
        Ok(Applied::Node(self.insert_node(at, &init.node)))
    }

    fn insert_node(&mut self, at: At, new: &NewNode) -> NodeId {
        let id = NodeId(self.next_node_id);
        self.next_node_id += 1;
        let node = Node {
            id,
            name: new.name.clone(),
            addr: new.addr,
            feature_level: new.feature_level,
            version: new.version.clone(),
            vote: true,
            state: NodeState::Joining,
            admin: AdminState::Active,
            leaving: false,
            incarnation: 0,
            failures: Vec::new(),
            quarantined_until_unix_ms: None,
            cert_sha256: new.cert_sha256.clone(),
            since_unix_ms: at,
            down_reason: String::new(),
            stopped: false,
        };
        self.nodes.insert(id, node);
        let message = format!("{} ({}) was added as node number {}", new.name, new.addr, id.0);
        self.emit(at, EventKind::NodeAdded, Some(id), &new.name, message);
        id
    }

    fn node_add(&mut self, at: At, new: &NewNode, token: &str, expect_id: Option<NodeId>) -> Answer {
        self.check_new(at, new, (token, expect_id), None)?;
        self.use_token(token);
        Ok(Applied::Node(self.insert_node(at, new)))
    }

    fn use_token(&mut self, token: &str) {
        if let Some(token) = self.tokens.get_mut(token) {
            token.uses_left = token.uses_left.saturating_sub(1);
        }
    }

    /// May that node come in, when `old` goes?
    fn check_new(
        &self,
        at: At,
        new: &NewNode,
        (token, expect_id): (&str, Option<NodeId>),
        old: Option<NodeId>,
    ) -> Result<(), Refused> {
        let bad_token = |why: &str| Refused::Token { why: why.into() };
        let entry = self.tokens.get(token).ok_or_else(|| bad_token("not known in this cluster"))?;
        if at >= entry.expires_unix_ms {
            return Err(bad_token("expired"));
        }
        if entry.uses_left == 0 {
            return Err(bad_token("used up"));
        }
        check_name("node", &new.name)?;
        let duplicate = |what: &str, name: String, hint: &str| Refused::Duplicate {
            what: what.into(),
            name,
            hint: hint.into(),
        };
        if self.node_by_name(&new.name).is_some_and(|node| Some(node.id) != old) {
            let hint = ": give the machine another host name, or evict the old node first";
            return Err(duplicate("node", new.name.clone(), hint));
        }
        if let Some(other) = self.nodes.values().find(|node| node.addr == new.addr && Some(node.id) != old) {
            let hint = format!(" (node {}): every node needs an address of its own", other.name);
            return Err(duplicate("address", new.addr.to_string(), &hint));
        }
        if self.nodes.len() >= NODES_MAX && old.is_none() {
            return Err(Refused::TooMany { what: "nodes".into(), max: NODES_MAX as u64 });
        }
        if self.next_node_id > NODE_ID_MAX {
            return Err(Refused::TooMany {
                what: "nodes in the life of a cluster (numbers are not used twice)".into(),
                max: u64::from(NODE_ID_MAX),
            });
        }
        if new.feature_level < self.feature_level {
            let (node, has, level) = (new.name.clone(), new.feature_level, self.feature_level);
            return Err(Refused::WrongVersion { node, has, level });
        }
        if !new.cert_sha256.is_empty() && !is_sha256(&new.cert_sha256) {
            return Err(Refused::Invalid(
                "the certificate's SHA-256 must be 64 lower-case hex digits".into(),
            ));
        }
        if let Some(expected) = expect_id.filter(|expected| expected.0 != self.next_node_id) {
            return Err(Refused::OtherNodeId { next: self.next_node_id, expected: expected.0 });
        }
        Ok(())
    }

    fn node_replace(
        &mut self,
        at: At,
        old: NodeId,
        new: &NewNode,
        (token, expect_id): (&str, NodeId),
    ) -> Answer {
        let gone = self.need_node(old)?.clone();
        if gone.name != new.name {
            let why = format!("{} cannot take the place of {}", new.name, gone.name);
            return Err(Refused::Invalid(why));
        }
        self.check_new(at, new, (token, Some(expect_id)), Some(old))?;
        match gone.state {
            NodeState::Joining | NodeState::Down => {}
            NodeState::Up | NodeState::Isolated => {
                let why = "another machine of that name is in the cluster; if it is this one, wait until it is down";
                return Err(Self::node_state(&gone, at, why));
            }
        }
        let owned = self.volumes_of(old);
        if !owned.is_empty() {
            return Err(Refused::OwnsVolumes { node: gone.name, volumes: owned.join(", ") });
        }
        self.use_token(token);
        self.order_fences(at, old, &format!("{} begins anew", gone.name));
        self.remove_node(old, Some(expect_id));
        let message = format!("{} lost its database and begins anew as node number {expect_id}", gone.name);
        self.emit(at, EventKind::NodeEvicted, Some(old), &gone.name, message);
        let id = self.insert_node(at, new);
        if let Some(node) = self.nodes.get_mut(&id) {
            node.vote = gone.vote;
        }
        Ok(Applied::Node(id))
    }

    fn node_up(&mut self, (at, by): (At, NodeId), id: NodeId, incarnation: u64) -> Answer {
        let node = self.need_node(id)?;
        let stale = Refused::StaleIncarnation {
            node: node.name.clone(),
            got: incarnation,
            current: node.incarnation,
        };
        let newer = incarnation > node.incarnation;
        match node.state {
            NodeState::Up if incarnation == node.incarnation => return unchanged(),
            NodeState::Isolated if incarnation == node.incarnation => {}
            NodeState::Joining | NodeState::Down | NodeState::Up | NodeState::Isolated if !newer => {
                return Err(stale);
            }
            NodeState::Joining | NodeState::Down => {
                if let Some(until) = node.quarantined_until_unix_ms.filter(|until| at < *until) {
                    let failures = node.failures.len() as u64;
                    let left_s = (until - at).div_ceil(1000);
                    return Err(Refused::Quarantined { node: node.name.clone(), left_s, failures });
                }
            }
            NodeState::Up | NodeState::Isolated => {
                let (leaving, reason) = (node.leaving, "it started again without having been missed");
                self.take_down((at, by), id, reason, leaving);
                if self.need_node(id)?.quarantined(at) {
                    return done();
                }
            }
        }
        let Some(node) = self.nodes.get_mut(&id) else { return unchanged() };
        node.state = NodeState::Up;
        node.incarnation = incarnation;
        node.leaving = false;
        node.quarantined_until_unix_ms = None;
        node.down_reason.clear();
        node.stopped = false;
        node.since_unix_ms = at;
        let name = node.name.clone();
        self.emit(at, EventKind::NodeUp, Some(id), &name, format!("{name} is up"));
        done()
    }

    /// The node, if that is its incarnation.
    fn need_incarnation(&self, id: NodeId, incarnation: u64) -> Result<&Node, Refused> {
        let node = self.need_node(id)?;
        if node.incarnation == incarnation {
            return Ok(node);
        }
        let (name, current) = (node.name.clone(), node.incarnation);
        Err(Refused::StaleIncarnation { node: name, got: incarnation, current })
    }

    fn node_isolated(&mut self, at: At, id: NodeId, incarnation: u64, reason: &str) -> Answer {
        let node = self.need_incarnation(id, incarnation)?;
        match node.state {
            NodeState::Up => {}
            NodeState::Isolated => return unchanged(),
            NodeState::Joining | NodeState::Down => {
                return Err(Self::node_state(node, at, "only a node that is up can become isolated"));
            }
        }
        let Some(node) = self.nodes.get_mut(&id) else { return unchanged() };
        node.state = NodeState::Isolated;
        node.since_unix_ms = at;
        node.down_reason = reason.into();
        let name = node.name.clone();
        self.emit(at, EventKind::NodeIsolated, Some(id), &name, format!("{name} is isolated: {reason}"));
        done()
    }

    fn node_down(
        &mut self,
        (at, by): (At, NodeId),
        id: NodeId,
        incarnation: u64,
        reason: &str,
        planned: bool,
    ) -> Answer {
        let node = self.need_incarnation(id, incarnation)?;
        if node.state == NodeState::Down {
            return unchanged();
        }
        let planned = planned || node.state == NodeState::Joining;
        // One that was about to stop and fell silent has not said that it has come to its end.
        let stopped = node.state == NodeState::Joining || (planned && by == id);
        self.take_down((at, by), id, reason, planned);
        if let Some(node) = self.nodes.get_mut(&id) {
            node.stopped = stopped;
        }
        done()
    }

    /// Gives a node up: it is `Down`, each of its keys must go, and a failure counts unless it was planned.
    fn take_down(&mut self, (at, by): (At, NodeId), id: NodeId, reason: &str, planned: bool) {
        let (window_ms, quarantine_ms) = (self.settings.quarantine_window_ms, self.settings.quarantine_ms);
        let failures_max = usize::try_from(self.settings.quarantine_failures).unwrap_or(usize::MAX);
        // Never so many that fewer than a majority of the nodes could be in.
        let kept_out = self.nodes.values().filter(|node| node.id != id && node.quarantined(at)).count();
        let may_quarantine = (kept_out + 1) * 2 < self.nodes.len();
        let Some(node) = self.nodes.get_mut(&id) else { return };
        self.down_by.insert(id, by);
        node.state = NodeState::Down;
        node.since_unix_ms = at;
        node.down_reason = reason.into();
        node.stopped = false;
        node.leaving = false;
        let name = node.name.clone();
        let mut quarantined = false;
        if !planned {
            node.failures.retain(|failure| at.saturating_sub(*failure) < window_ms);
            node.failures.push(at);
            quarantined = failures_max > 0 && node.failures.len() >= failures_max && may_quarantine;
            if quarantined {
                node.quarantined_until_unix_ms = Some(at.saturating_add(quarantine_ms));
            }
            // Only the newest matter; keeps the record small when quarantine is off.
            let surplus = node.failures.len().saturating_sub(100);
            node.failures.drain(..surplus);
        }
        let count = node.failures.len();
        let kind = if planned { EventKind::NodeStopped } else { EventKind::NodeDown };
        self.emit(at, kind, Some(id), &name, format!("{name} is down: {reason}"));
        if quarantined {
            let message = format!(
                "{name} failed {count} times within {} min and is kept out for {} min",
                window_ms / 60_000,
                quarantine_ms / 60_000
            );
            self.emit(at, EventKind::NodeQuarantined, Some(id), &name, message);
        }
        self.order_fences(at, id, &format!("{name} is down: {reason}"));
    }

    fn node_leave(&mut self, at: At, id: NodeId, incarnation: u64) -> Answer {
        let node = self.need_incarnation(id, incarnation)?;
        if !node.is_up() {
            return Err(Self::node_state(node, at, "only a node that is up can leave in good order"));
        }
        if node.leaving {
            return unchanged();
        }
        let Some(node) = self.nodes.get_mut(&id) else { return unchanged() };
        node.leaving = true;
        let name = node.name.clone();
        let message = format!("{name} is about to stop; its volumes and its vote move away first");
        self.emit(at, EventKind::NodeLeaving, Some(id), &name, message);
        done()
    }

    fn node_evict(&mut self, (at, by): (At, NodeId), id: NodeId) -> Answer {
        let node = self.need_node(id)?;
        let name = node.name.clone();
        if self.nodes.len() == 1 {
            return Err(Refused::LastNode { node: name });
        }
        let owned = self.volumes_of(id);
        if !owned.is_empty() {
            return Err(Refused::OwnsVolumes { node: name, volumes: owned.join(", ") });
        }
        let groups = self.groups_of(id);
        if node.is_up() && !groups.is_empty() {
            return Err(Refused::OwnsGroups { node: name, groups: groups.join(", ") });
        }
        // Of a node that is not known any more nobody waits for the end of what it had.
        let may_run_ms = self.may_run_for_ms(node, by, at);
        if node.state == NodeState::Down && !groups.is_empty() && may_run_ms > 0 {
            let (groups, seconds) = (groups.join(", "), may_run_ms.div_ceil(1_000));
            let why = format!("its groups ({groups}) may run there for {seconds} s more; evict it then");
            return Err(Self::node_state(node, at, &why));
        }
        let in_use = match node.state {
            NodeState::Joining | NodeState::Down => false,
            NodeState::Up => node.admin != AdminState::Paused,
            NodeState::Isolated => true,
        };
        if in_use {
            let why = format!("run `csvctl node drain {name}` first, or stop csvd there");
            return Err(Self::node_state(node, at, &why));
        }
        self.order_fences(at, id, &format!("{name} was evicted"));
        self.remove_node(id, None);
        self.emit(
            at,
            EventKind::NodeEvicted,
            Some(id),
            &name,
            format!("{name} was removed from the cluster"),
        );
        done()
    }

    /// Takes a node out of every record; `heir` gets its rank among preferred owners.
    pub(super) fn remove_node(&mut self, id: NodeId, heir: Option<NodeId>) {
        self.nodes.remove(&id);
        self.down_by.remove(&id);
        for mark in ["registered", "awake"] {
            self.properties.remove(&format!("{mark}.{}", id.0));
        }
        for volume in self.volumes.values_mut() {
            match heir {
                Some(heir) => {
                    volume.preferred.iter_mut().filter(|node| **node == id).for_each(|node| *node = heir)
                }
                None => volume.preferred.retain(|node| *node != id),
            }
            volume.failures.retain(|failure| failure.node != id);
            // What is not to be fenced any more need not be remembered: the number never comes back.
            volume.members.retain(|&node, member| {
                node != id || member.state == super::super::volume::MemberState::FencePending
            });
        }
        self.remove_node_from_groups(id, heir);
    }
}

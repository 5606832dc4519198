//! What an instance knows about itself and the others, at the time of asking.

use crate::network::Acks;
use crate::types::{RaftNode, VoterId};
use openraft::{RaftMetrics, ServerState};
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};

/// Role of a voter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// Gets the log, does not vote.
    Learner,
    /// Votes, follows a leader.
    Follower,
    /// Wants to lead.
    Candidate,
    /// Leads.
    Leader,
    /// Does nothing any more.
    Stopped,
}

/// What the leader knows about another voter or learner.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Follower {
    /// Highest log index that is known to be the same there.
    pub matched: Option<u64>,
    /// Entries that it lacks.
    pub lag: u64,
    /// Milliseconds since a message was sent that it acknowledged; `None` when it never did.
    pub ack_age_ms: Option<u64>,
}

/// State of an instance.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Metrics {
    /// This voter.
    pub id: VoterId,
    /// Its role.
    pub role: Role,
    /// Term of its vote.
    pub term: u64,
    /// Who leads in that term, as far as it knows.
    pub leader: Option<VoterId>,
    /// Last entry of its log.
    pub last_log: Option<u64>,
    /// Last entry that its state machine has taken.
    pub applied: Option<u64>,
    /// Last entry that its snapshot covers.
    pub snapshot: Option<u64>,
    /// Last entry that was purged.
    pub purged: Option<u64>,
    /// Sets of voters; a majority of each is needed. There are two while the voters change. Two that stay are a
    /// change whose leader was lost: `change_voters` to the same aim ends it.
    pub voters: Vec<BTreeSet<VoterId>>,
    /// Those that get the log and do not vote.
    pub learners: BTreeSet<VoterId>,
    /// Everyone's name and address.
    pub nodes: BTreeMap<VoterId, RaftNode>,
    /// Log index of this membership.
    pub membership_index: Option<u64>,
    /// On the leader: the others.
    pub followers: BTreeMap<VoterId, Follower>,
    /// On the leader: age of the newest moment at which a majority still followed it; `None` when there was none.
    /// 0 for a sole voter.
    pub quorum_age_ms: Option<u64>,
    /// On a follower: milliseconds since a message of the leader was taken.
    pub leader_age_ms: Option<u64>,
    /// For how long followers elect nobody else after they heard the leader.
    pub lease_ms: u64,
}

impl Metrics {
    /// Does this voter belong to a majority, as far as it can know? A leader: a majority followed it within the
    /// lease. Another one: it heard the leader within the lease, whether or not that still has its quorum; see
    /// [`Metrics::contact_age_ms`].
    #[must_use]
    pub fn has_quorum(&self) -> bool {
        let age_ms = match self.role {
            Role::Leader => self.quorum_age_ms,
            Role::Follower | Role::Learner => self.leader_age_ms,
            Role::Candidate | Role::Stopped => None,
        };
        age_ms.is_some_and(|age_ms| age_ms <= self.lease_ms)
    }

    /// Age of the newest moment of which this voter knows that a majority was on its side; `None` when it knows of none.
    ///
    /// A leader sends heartbeats for ever, also when a majority has elected another one since, so a follower that hears
    /// it knows of two voters only. That is enough where two are a majority. Otherwise the leader has to say that a
    /// majority answers it: `confirmed_age_ms` is the age of the last time that the present leader (of this term) had
    /// its quorum. A follower then knows of no moment later than either.
    #[must_use]
    pub fn contact_age_ms(&self, confirmed_age_ms: Option<u64>) -> Option<u64> {
        match self.role {
            Role::Leader => self.quorum_age_ms,
            Role::Follower | Role::Learner if self.is_majority_with_leader() => self.leader_age_ms,
            Role::Follower | Role::Learner => Some(self.leader_age_ms?.max(confirmed_age_ms?)),
            Role::Candidate | Role::Stopped => None,
        }
    }

    /// Are this voter and its leader enough for each set of voters?
    fn is_majority_with_leader(&self) -> bool {
        let Some(leader) = self.leader else { return false };
        let two = BTreeSet::from([self.id, leader]);
        self.voters.iter().all(|set| set.intersection(&two).count() > set.len() / 2)
    }

    /// All that have a vote, in either set.
    #[must_use]
    pub fn voter_ids(&self) -> BTreeSet<VoterId> {
        self.voters.iter().flatten().copied().collect()
    }

    pub(crate) fn new(
        raft: &RaftMetrics<VoterId, RaftNode>,
        acks: &Acks,
        leader_age_ms: Option<u64>,
        lease_ms: u64,
    ) -> Self {
        let membership = raft.membership_config.membership();
        let voters = membership.get_joint_config().clone();
        let role = role(raft);
        let followers = raft.replication.iter().flatten().filter(|(id, _)| **id != raft.id);
        let followers = followers
            .map(|(id, matched)| {
                let matched = matched.map(|id| id.index);
                let next = |index: Option<u64>| index.map_or(0, |index| index + 1);
                let lag = next(raft.last_log_index).saturating_sub(next(matched));
                (*id, Follower { matched, lag, ack_age_ms: acks.age_ms(*id) })
            })
            .collect();
        let quorum_age_ms = (role == Role::Leader).then(|| quorum_age_ms(raft.id, &voters, acks)).flatten();
        Metrics {
            id: raft.id,
            role,
            term: raft.current_term,
            leader: raft.current_leader,
            last_log: raft.last_log_index,
            applied: raft.last_applied.map(|id| id.index),
            snapshot: raft.snapshot.map(|id| id.index),
            purged: raft.purged.map(|id| id.index),
            voters,
            learners: membership.learner_ids().collect(),
            nodes: membership.nodes().map(|(id, node)| (*id, node.clone())).collect(),
            membership_index: raft.membership_config.log_id().map(|id| id.index),
            followers,
            quorum_age_ms,
            leader_age_ms,
            lease_ms,
        }
    }
}

fn role(raft: &RaftMetrics<VoterId, RaftNode>) -> Role {
    if raft.running_state.is_err() {
        return Role::Stopped;
    }
    match raft.state {
        ServerState::Learner => Role::Learner,
        ServerState::Follower => Role::Follower,
        ServerState::Candidate => Role::Candidate,
        ServerState::Leader => Role::Leader,
        ServerState::Shutdown => Role::Stopped,
    }
}

/// In each set of voters the age of the acknowledgement that made a majority; the oldest of those.
fn quorum_age_ms(me: VoterId, voters: &[BTreeSet<VoterId>], acks: &Acks) -> Option<u64> {
    let age_in = |set: &BTreeSet<VoterId>| {
        let mut ages: Vec<u64> =
            set.iter().filter_map(|id| if *id == me { Some(0) } else { acks.age_ms(*id) }).collect();
        ages.sort_unstable();
        ages.get(set.len() / 2).copied()
    };
    voters.iter().map(age_in).try_fold(0, |oldest: u64, age| Some(oldest.max(age?)))
}

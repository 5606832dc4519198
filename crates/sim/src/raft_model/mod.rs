//! A model of consensus: not openraft, which is no pure state machine, but a small and honest replicated log with the same promises
//! and the same way to fail. Terms, votes and log are durable only after a sync; what depends on them is said only then.
//! Followers grant no vote while they hear a leader (lease). Voters change one at a time ([`csv_cluster::quorum`] decides
//! which), by entries that count as soon as they are in a log. Learners get the log and have no vote.
//!
//! Its own invariants are checked by [`crate::invariants`]: one leader per term, a leader has every committed entry,
//! nobody applies anything else at an index.

mod leader;

use crate::rng::Rng;
use csv_cluster::db::Envelope;
use csv_types::NodeId;
pub use leader::Peer;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::rc::Rc;

/// A voter's number: the node's, or the witness's.
pub type Voter = u64;

/// Between two appends of a leader, in milliseconds.
pub const HEARTBEAT_MS: u64 = 200;
const ELECTION_MS: (u64, u64) = (900, 1500);
/// While a leader was heard this lately, no vote is given.
const LEASE_MS: u64 = 750;

/// Number of a proposal: who made it, and which of his.
pub type Proposal = (NodeId, u64);

/// What an entry says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Payload {
    /// Nothing: a new leader's first.
    Noop,
    /// Who votes from now on.
    Voters(BTreeSet<Voter>),
    /// A command for the database, and whose answer is waited for.
    Command(Rc<Envelope>, Option<Proposal>),
}

/// An entry of the log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Term of the leader that wrote it.
    pub term: u64,
    /// What it says.
    pub payload: Payload,
}

/// The durable state.
#[derive(Debug, Clone, Default)]
pub struct Disk {
    term: u64,
    voted_for: Option<Voter>,
    /// Entries from index 1 on.
    pub log: Vec<Rc<Entry>>,
}

/// A write to the disk.
#[derive(Debug, Clone)]
pub enum DiskOp {
    /// Term and vote.
    Vote(u64, Option<Voter>),
    /// The log is cut to this length.
    Truncate(usize),
    /// An entry at its end.
    Append(Rc<Entry>),
}

impl Disk {
    /// Of a cluster that begins with this log.
    #[must_use]
    pub fn begin(log: Vec<Rc<Entry>>) -> Disk {
        Disk { term: 0, voted_for: None, log }
    }

    /// A write takes effect.
    pub fn apply(&mut self, op: DiskOp) {
        match op {
            DiskOp::Vote(term, voted_for) => (self.term, self.voted_for) = (term, voted_for),
            DiskOp::Truncate(len) => self.log.truncate(len),
            DiskOp::Append(entry) => self.log.push(entry),
        }
    }
}

/// A message between voters.
#[derive(Debug, Clone)]
pub enum Message {
    /// Give me your vote.
    Vote { term: u64, last: (u64, usize) },
    /// A vote, or none.
    Voted { term: u64, granted: bool },
    /// Entries after `prev` (term, index); none is a heartbeat.
    Append { term: u64, prev: (u64, usize), entries: Vec<Rc<Entry>>, commit: usize, sent_ms: u64 },
    /// How far the logs agree; or, refused, how far at least.
    Appended { term: u64, ok: bool, index: usize, sent_ms: u64 },
}

/// What it is.
#[derive(Debug)]
pub enum Role {
    /// It follows.
    Follower,
    /// It wants to lead.
    Candidate(BTreeSet<Voter>),
    /// It leads; what is known of the others.
    Leader(BTreeMap<Voter, Peer>),
}

/// One voter or learner.
#[derive(Debug)]
pub struct Raft {
    /// Its number.
    pub id: Voter,
    members: BTreeSet<Voter>,
    /// Its term.
    pub term: u64,
    voted_for: Option<Voter>,
    /// Its log, index 1 first.
    pub log: Vec<Rc<Entry>>,
    /// Its role.
    pub role: Role,
    /// The leader that it knows, and when it was heard.
    pub leader: Option<Voter>,
    heard_ms: Option<u64>,
    election_ms: u64,
    beat_ms: u64,
    /// Committed up to here.
    pub commit: usize,
    /// Of the log, this much is on the disk.
    stable: usize,
    unsynced: VecDeque<DiskOp>,
    issued: u64,
    synced: u64,
    syncing: Option<(usize, usize)>,
    held: VecDeque<(u64, Voter, Message)>,
}

/// Does `last` reach as far as `mine`?
fn up_to_date(last: (u64, usize), mine: (u64, usize)) -> bool {
    last >= mine
}

impl Raft {
    /// After a start, from the disk.
    #[must_use]
    pub fn start(id: Voter, members: BTreeSet<Voter>, disk: &Disk, now_ms: u64, rng: &mut Rng) -> Raft {
        Raft {
            id,
            members,
            term: disk.term,
            voted_for: disk.voted_for,
            log: disk.log.clone(),
            role: Role::Follower,
            leader: None,
            heard_ms: None,
            election_ms: now_ms + rng.range(ELECTION_MS.0, ELECTION_MS.1),
            beat_ms: 0,
            commit: 0,
            stable: disk.log.len(),
            unsynced: VecDeque::new(),
            issued: 0,
            synced: 0,
            syncing: None,
            held: VecDeque::new(),
        }
    }

    /// Who votes, by the newest entry that says so, and its index.
    #[must_use]
    pub fn voters(&self) -> (BTreeSet<Voter>, usize) {
        let found = self.log.iter().enumerate().rev().find_map(|(at, entry)| match &entry.payload {
            Payload::Voters(voters) => Some((voters.clone(), at + 1)),
            Payload::Noop | Payload::Command(..) => None,
        });
        found.unwrap_or_default()
    }

    /// A voter stands for election; and one that is none any more by an entry that may not be committed, since it may be
    /// the only one that has it.
    fn may_stand(&self) -> bool {
        let mut configs = self.log.iter().enumerate().rev().filter_map(|(at, entry)| match &entry.payload {
            Payload::Voters(voters) => Some((voters, at + 1)),
            Payload::Noop | Payload::Command(..) => None,
        });
        let Some((voters, since)) = configs.next() else { return false };
        let mut before = || configs.next().is_some_and(|(voters, _)| voters.contains(&self.id));
        voters.contains(&self.id) || (since > self.commit && before())
    }

    fn last(&self) -> (u64, usize) {
        (self.log.last().map_or(0, |entry| entry.term), self.log.len())
    }

    fn term_at(&self, index: usize) -> Option<u64> {
        if index == 0 { Some(0) } else { self.log.get(index - 1).map(|entry| entry.term) }
    }

    /// Does it lead?
    #[must_use]
    pub fn leads(&self) -> bool {
        matches!(self.role, Role::Leader(_))
    }

    /// For how long it has not heard a leader, or, leading, a majority. `None`: never.
    #[must_use]
    pub fn contact_age_ms(&self, now_ms: u64) -> Option<u64> {
        match &self.role {
            Role::Leader(peers) => self.quorum_age_ms(peers, now_ms),
            Role::Follower | Role::Candidate(_) => self.heard_ms.map(|at| now_ms.saturating_sub(at)),
        }
    }

    fn persist(&mut self, op: DiskOp) {
        self.unsynced.push_back(op);
        self.issued += 1;
    }

    fn send(&mut self, to: Voter, message: Message) {
        self.held.push_back((self.issued, to, message));
    }

    /// Messages that may go out now.
    pub fn outbox(&mut self) -> Vec<(Voter, Message)> {
        let mut out = Vec::new();
        while self.held.front().is_some_and(|(need, _, _)| *need <= self.synced) {
            out.extend(self.held.pop_front().map(|(_, to, message)| (to, message)));
        }
        out
    }

    /// Is there something to sync, and no sync under way? Then one begins now.
    pub fn begin_sync(&mut self) -> bool {
        let begins = self.syncing.is_none() && !self.unsynced.is_empty();
        if begins {
            self.syncing = Some((self.unsynced.len(), self.log.len()));
        }
        begins
    }

    /// What the sync that has just begun writes.
    #[must_use]
    pub fn sync_ops(&self) -> Vec<DiskOp> {
        let ops = self.syncing.map_or(0, |(ops, _)| ops);
        self.unsynced.iter().take(ops).cloned().collect()
    }

    /// The sync under way has ended.
    pub fn end_sync(&mut self, disk: &mut Disk) {
        let Some((ops, len)) = self.syncing.take() else { return };
        for op in self.unsynced.drain(..ops) {
            disk.apply(op);
            self.synced += 1;
        }
        self.stable = len.min(self.log.len());
        self.advance();
    }

    /// The machine dies: of what was not synced, any part from the beginning may be on the disk.
    pub fn crash(&mut self, disk: &mut Disk, rng: &mut Rng) {
        let kept = rng.below(self.unsynced.len() + 1);
        for op in self.unsynced.drain(..kept) {
            disk.apply(op);
        }
    }

    fn set_term(&mut self, term: u64, voted_for: Option<Voter>) {
        (self.term, self.voted_for) = (term, voted_for);
        self.persist(DiskOp::Vote(term, voted_for));
    }

    fn follow(&mut self, term: u64, leader: Option<Voter>) {
        if term > self.term {
            self.set_term(term, None);
        }
        self.role = Role::Follower;
        self.leader = leader;
    }

    /// Time passes.
    pub fn tick(&mut self, now_ms: u64, rng: &mut Rng) {
        if self.leads() {
            if now_ms >= self.beat_ms {
                self.beat_ms = now_ms + HEARTBEAT_MS;
                self.replicate(now_ms);
            }
            return;
        }
        if now_ms < self.election_ms {
            return;
        }
        self.election_ms = now_ms + rng.range(ELECTION_MS.0, ELECTION_MS.1);
        let (voters, _) = self.voters();
        if !self.may_stand() {
            return;
        }
        self.set_term(self.term + 1, Some(self.id));
        self.leader = None;
        self.role = Role::Candidate(BTreeSet::from([self.id]));
        let message = Message::Vote { term: self.term, last: self.last() };
        let me = self.id;
        for to in voters.into_iter().filter(|to| *to != me) {
            self.send(to, message.clone());
        }
        self.count_votes(now_ms);
    }

    /// A message arrives.
    pub fn receive(&mut self, now_ms: u64, from: Voter, message: Message, rng: &mut Rng) {
        match message {
            Message::Vote { term, last } => self.asked_for_vote(now_ms, from, term, last, rng),
            Message::Voted { term, granted } => {
                if term > self.term {
                    self.follow(term, None);
                } else if let Role::Candidate(votes) = &mut self.role
                    && term == self.term
                    && granted
                {
                    votes.insert(from);
                    self.count_votes(now_ms);
                }
            }
            Message::Append { term, prev, entries, commit, sent_ms } => {
                if term < self.term {
                    let refusal = Message::Appended { term: self.term, ok: false, index: 0, sent_ms };
                    self.send(from, refusal);
                    return;
                }
                self.follow(term, Some(from));
                self.heard_ms = Some(now_ms);
                self.election_ms = now_ms + rng.range(ELECTION_MS.0, ELECTION_MS.1);
                let (ok, index) = self.append(prev, entries, commit);
                self.send(from, Message::Appended { term, ok, index, sent_ms });
            }
            Message::Appended { term, ok, index, sent_ms } => {
                if term > self.term {
                    self.follow(term, None);
                } else if term == self.term {
                    self.appended(from, ok, index, sent_ms);
                }
            }
        }
    }

    fn asked_for_vote(&mut self, now_ms: u64, from: Voter, term: u64, last: (u64, usize), rng: &mut Rng) {
        let leased = self.heard_ms.is_some_and(|at| now_ms.saturating_sub(at) < LEASE_MS)
            || self.contact_age_ms(now_ms).is_some_and(|age| self.leads() && age < LEASE_MS);
        if leased && term > self.term {
            return;
        }
        if term > self.term {
            self.follow(term, None);
        }
        let free = self.voted_for.is_none_or(|whom| whom == from);
        let granted = term == self.term && free && up_to_date(last, self.last());
        if granted {
            if self.voted_for.is_none() {
                self.set_term(term, Some(from));
            }
            self.election_ms = now_ms + rng.range(ELECTION_MS.0, ELECTION_MS.1);
        }
        self.send(from, Message::Voted { term: self.term, granted });
    }

    /// Takes entries over. Whether the logs agree up to `prev`, and up to where then.
    fn append(&mut self, prev: (u64, usize), entries: Vec<Rc<Entry>>, commit: usize) -> (bool, usize) {
        if self.term_at(prev.1) != Some(prev.0) {
            // What is committed here every leader has.
            return (false, self.commit);
        }
        let mut index = prev.1;
        for entry in entries {
            index += 1;
            match self.term_at(index) {
                Some(term) if term == entry.term => continue,
                Some(_) => {
                    self.log.truncate(index - 1);
                    self.persist(DiskOp::Truncate(index - 1));
                }
                None => {}
            }
            self.log.push(entry.clone());
            self.persist(DiskOp::Append(entry));
        }
        self.commit = self.commit.max(commit.min(index));
        (true, index)
    }
}

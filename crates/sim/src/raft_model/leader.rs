//! The leader's part.

use super::{DiskOp, Entry, Message, Payload, Raft, Role, Voter};
use csv_cluster::quorum::majority;
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

/// Entries in one message.
const BATCH_MAX: usize = 64;

/// What a leader knows of another.
#[derive(Debug, Clone, Copy)]
pub struct Peer {
    next: usize,
    matched: usize,
    /// Where the logs agree is not known: `next` stays until an append is taken.
    probing: bool,
    /// When the newest append that it has answered was sent.
    acked_ms: Option<u64>,
}

impl Raft {
    pub(super) fn count_votes(&mut self, now_ms: u64) {
        let Role::Candidate(votes) = &self.role else { return };
        let (voters, _) = self.voters();
        if votes.intersection(&voters).count() < majority(voters.len()) {
            return;
        }
        let peer = Peer { next: self.log.len() + 1, matched: 0, probing: true, acked_ms: None };
        let peers = self.members.iter().filter(|id| **id != self.id).map(|id| (*id, peer)).collect();
        self.role = Role::Leader(peers);
        self.leader = Some(self.id);
        // Time for a first answer.
        self.heard_ms = Some(now_ms);
        self.propose(Payload::Noop);
        self.beat_ms = 0;
    }

    /// Appends an entry; `None` when this does not lead.
    pub fn propose(&mut self, payload: Payload) -> Option<(usize, u64)> {
        if !self.leads() {
            return None;
        }
        let entry = Rc::new(Entry { term: self.term, payload });
        self.log.push(entry.clone());
        self.persist(DiskOp::Append(entry));
        self.beat_ms = 0;
        Some((self.log.len(), self.term))
    }

    /// Changes who votes, by at most one. Only after this leader has committed something, and when no change is under way.
    pub fn change_voters(&mut self, voters: BTreeSet<Voter>) -> bool {
        let (current, since) = self.voters();
        let ready = self.leads() && since <= self.commit && self.term_at(self.commit) == Some(self.term);
        let one = current.symmetric_difference(&voters).count() == 1 && !voters.is_empty();
        ready && one && self.propose(Payload::Voters(voters)).is_some()
    }

    pub(super) fn replicate(&mut self, now_ms: u64) {
        let Role::Leader(peers) = &mut self.role else { return };
        let mut messages = Vec::new();
        for (id, peer) in peers.iter_mut() {
            let from = peer.next.min(self.log.len() + 1).max(1);
            let to = (from - 1 + BATCH_MAX).min(self.log.len());
            let prev = from - 1;
            let prev_term = if prev == 0 { 0 } else { self.log[prev - 1].term };
            let entries = self.log[prev..to].to_vec();
            if !peer.probing {
                peer.next = to + 1;
            }
            let (term, commit) = (self.term, self.commit);
            let prev = (prev_term, prev);
            messages.push((*id, Message::Append { term, prev, entries, commit, sent_ms: now_ms }));
        }
        for (to, message) in messages {
            self.send(to, message);
        }
    }

    pub(super) fn appended(&mut self, from: Voter, ok: bool, index: usize, sent_ms: u64) {
        let Role::Leader(peers) = &mut self.role else { return };
        let Some(peer) = peers.get_mut(&from) else { return };
        peer.acked_ms = peer.acked_ms.max(Some(sent_ms));
        peer.probing = !ok;
        if ok {
            peer.matched = peer.matched.max(index);
            peer.next = peer.next.max(index + 1);
        } else {
            peer.next = peer.next.min(index + 1).max(peer.matched + 1);
        }
        self.advance();
    }

    /// Commits what a majority has.
    pub(super) fn advance(&mut self) {
        let Role::Leader(peers) = &self.role else { return };
        let (voters, since) = self.voters();
        let has = |voter: &Voter| {
            if *voter == self.id { self.stable } else { peers.get(voter).map_or(0, |peer| peer.matched) }
        };
        let mut matched: Vec<usize> = voters.iter().map(has).collect();
        matched.sort_unstable_by(|a, b| b.cmp(a));
        let Some(&index) = matched.get(majority(voters.len()) - 1) else { return };
        if index > self.commit && self.term_at(index) == Some(self.term) {
            self.commit = index;
            self.beat_ms = 0;
        }
        if since <= self.commit && !voters.contains(&self.id) {
            self.role = Role::Follower;
            self.leader = None;
        }
    }

    /// Gives the lead up, and does not stand for election before then.
    pub fn resign(&mut self, until_ms: u64) {
        self.role = Role::Follower;
        (self.leader, self.heard_ms) = (None, None);
        self.election_ms = until_ms;
    }

    pub(super) fn quorum_age_ms(&self, peers: &BTreeMap<Voter, Peer>, now_ms: u64) -> Option<u64> {
        let (voters, _) = self.voters();
        let age = |voter: &Voter| {
            if *voter == self.id {
                return Some(0);
            }
            let acked = peers.get(voter).and_then(|peer| peer.acked_ms)?;
            Some(now_ms.saturating_sub(acked))
        };
        let mut ages: Vec<u64> = voters.iter().map(|voter| age(voter).unwrap_or(u64::MAX)).collect();
        ages.sort_unstable();
        let age = *ages.get(majority(voters.len()) - 1)?;
        // A leader that nobody has answered yet was at least elected.
        if age == u64::MAX { self.heard_ms.map(|at| now_ms.saturating_sub(at)) } else { Some(age) }
    }

    /// Others that answered within `age_ms` and lack at most `lag` entries.
    #[must_use]
    pub fn answering(&self, now_ms: u64, age_ms: u64, lag: usize) -> BTreeSet<Voter> {
        let Role::Leader(peers) = &self.role else { return BTreeSet::new() };
        let able = |peer: &Peer| {
            peer.acked_ms.is_some_and(|at| now_ms.saturating_sub(at) <= age_ms)
                && peer.matched + lag >= self.log.len()
        };
        peers.iter().filter(|(_, peer)| able(peer)).map(|(id, _)| *id).collect()
    }
}

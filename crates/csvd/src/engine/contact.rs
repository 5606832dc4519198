//! When a majority was last known to be on this node's side.
//!
//! A Raft leader goes on sending heartbeats when it has lost its majority, so that a follower hears it says nothing
//! (safety rule 6 of the design would not hold in a minority that has the former leader in it). A leader therefore puts into its
//! beats whether a majority answered it within its lease; a follower counts the last such word of the leader that it has
//! now. Words of another leader or of another term are void: they may have been under way for long.
//!
//! The witness sends no beats. While it leads, which it does for a moment only, the node on which its voter runs speaks
//! for it; besides, a node that is a majority together with its leader needs nobody's word.
//!
//! A node that **stood still** (suspended, frozen) finds messages of before when it wakes up, and Raft's own clocks have stood still
//! with the machine. So from then on nothing counts but what was asked after it woke: a command of its own that has
//! come back with the log. Until then the last contact is the one of before, and it is cut off when that is too old,
//! which it is at once after a long sleep.

use super::Engine;
use csv_cluster::db::Command;
use csv_cluster::quorum::VoterId;
use csv_net::Beat;
use csv_raft::Metrics;
use csv_types::NodeId;
use std::sync::Arc;
use std::time::Duration;

/// The last word of a leader that had its quorum.
#[derive(Debug, Default)]
pub(crate) struct Confirmed {
    word: Option<Word>,
}

#[derive(Debug, Clone, Copy)]
struct Word {
    term: u64,
    leader: u64,
    /// By the clock of the engine that heard it.
    at_ms: u64,
}

impl Confirmed {
    /// A beat came. A node speaks for itself, or for the witness.
    pub(crate) fn hear(&mut self, from: NodeId, beat: &Beat, at_ms: u64) {
        let may_say = |leader: &u64| *leader == u64::from(from.0) || *leader == VoterId::WITNESS.0;
        if let Some(leader) = beat.leader.filter(may_say).filter(|_| beat.has_quorum) {
            self.word = Some(Word { term: beat.term, leader, at_ms });
        }
    }

    /// Before a moment at which this node stood still nothing counts.
    pub(crate) fn forget(&mut self) {
        self.word = None;
    }

    /// How old the newest moment of contact with a majority is.
    pub(crate) fn contact_age_ms(&self, metrics: &Metrics, now_ms: u64) -> Option<u64> {
        let word = self
            .word
            .filter(|word| word.term == metrics.term && Some(word.leader) == metrics.leader)
            // The majority had answered at most one lease before.
            .map(|word| now_ms.saturating_sub(word.at_ms).saturating_add(metrics.lease_ms));
        metrics.contact_age_ms(word)
    }
}

/// For one try at [`Engine::confirm_awake`].
const PROPOSE_LIMIT: Duration = Duration::from_secs(3);

/// Has this node stood still, and does it not know yet what has become of it?
#[derive(Debug, Default)]
pub(crate) struct Slept {
    /// Of the last sleep; greater than any before.
    mark: Option<u64>,
    /// Somebody asks.
    asking: bool,
}

impl Slept {
    pub(crate) fn begin(&mut self, mark: u64) {
        self.mark = Some(mark);
    }

    /// Nothing that the clocks of Raft say counts.
    pub(crate) fn is_unconfirmed(&self) -> bool {
        self.mark.is_some()
    }

    /// The sleep after which the majority has to be asked; only one asks at a time.
    pub(crate) fn next_to_ask(&mut self) -> Option<u64> {
        let mark = self.mark.filter(|_| !self.asking)?;
        self.asking = true;
        Some(mark)
    }

    /// The answer is there, or it failed. Is that sleep over? One that came meanwhile is not.
    pub(crate) fn asked(&mut self, mark: u64, confirmed: bool) -> bool {
        self.asking = false;
        let over = confirmed && self.mark == Some(mark);
        if over {
            self.mark = None;
        }
        over
    }
}

impl Engine {
    /// Asks the majority once, after this node stood still: what had been decided until now is known here when a command that
    /// is given now is applied here.
    pub(crate) async fn confirm_awake(self: Arc<Self>, mark: u64) {
        let asked_ms = self.now_ms();
        let confirmed = self.comes_back(mark).await;
        if self.slept.lock().asked(mark, confirmed) {
            let mut last = self.last_contact_ms.lock();
            *last = (*last).max(Some(asked_ms));
        }
    }

    async fn comes_back(&self, mark: u64) -> bool {
        self.comes_back_as(&format!("awake.{}", self.me().0), mark).await
    }

    /// Has the majority taken that mark in, under that property, and has it come back here?
    pub(crate) async fn comes_back_as(&self, key: &str, mark: u64) -> bool {
        let key = key.to_owned();
        let mut changes = self.db.changes();
        let value = Some(mark.to_string());
        if self
            .propose(Command::Property { key: key.clone(), value: value.clone() }, PROPOSE_LIMIT)
            .await
            .is_err()
        {
            return false;
        }
        let deadline = tokio::time::Instant::now() + PROPOSE_LIMIT;
        while self.db.read().properties.get(&key) != value.as_ref() {
            if tokio::time::timeout_at(deadline, changes.changed()).await.is_err() {
                return false;
            }
        }
        true
    }
}

/// When the majority was last heard. What is known of it is lost at a change of role: a new leader has no acknowledgement
/// yet, or those of a term long ago, and a candidate has no leader. Neither means that the node is cut off, so the newest
/// moment counts that was ever known.
pub(crate) fn newest_contact(last_ms: Option<u64>, now_ms: u64, age_ms: Option<u64>) -> Option<u64> {
    last_ms.max(age_ms.map(|age_ms| now_ms.saturating_sub(age_ms)))
}

/// Does the leader of which `own` knows have its quorum, as far as the voters of this process can tell?
pub(crate) fn vouches(own: &Metrics, witness: Option<&Metrics>) -> bool {
    let leads = |metrics: &Metrics| metrics.role == csv_raft::Role::Leader && metrics.has_quorum();
    leads(own)
        || witness.is_some_and(|witness| {
            leads(witness) && own.leader == Some(witness.id) && own.term == witness.term
        })
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use csv_raft::Role;
    use std::collections::{BTreeMap, BTreeSet};

    /// Voter 1 of five (with the witness), in term 7, under that leader.
    pub(crate) fn metrics(role: Role, leader: u64) -> Metrics {
        Metrics {
            id: 1,
            role,
            term: 7,
            leader: Some(leader),
            last_log: None,
            applied: None,
            snapshot: None,
            purged: None,
            voters: vec![BTreeSet::from([1, 2, 3, 4, 1000])],
            learners: BTreeSet::new(),
            nodes: BTreeMap::new(),
            membership_index: None,
            followers: BTreeMap::new(),
            quorum_age_ms: None,
            leader_age_ms: Some(50),
            lease_ms: 700,
        }
    }

    fn beat(term: u64, leader: u64, has_quorum: bool) -> Beat {
        Beat { term, leader: Some(leader), has_quorum, ..Beat::default() }
    }

    #[test]
    fn a_follower_counts_what_its_leader_says_of_its_quorum_and_not_that_it_is_heard() {
        let follower = metrics(Role::Follower, 2);
        let mut confirmed = Confirmed::default();
        assert_eq!(confirmed.contact_age_ms(&follower, 1_000), None);
        confirmed.hear(NodeId(2), &beat(7, 2, true), 1_000);
        assert_eq!(confirmed.contact_age_ms(&follower, 1_000), Some(700));
        // The leader loses its majority and goes on sending heartbeats.
        confirmed.hear(NodeId(2), &beat(7, 2, false), 9_000);
        assert_eq!(confirmed.contact_age_ms(&follower, 9_000), Some(8_700));
        // Beats come, and Raft's messages do not.
        confirmed.hear(NodeId(2), &beat(7, 2, true), 9_000);
        let deaf = Metrics { leader_age_ms: Some(5_000), ..follower.clone() };
        assert_eq!(confirmed.contact_age_ms(&deaf, 9_000), Some(5_000));
        // A node that follows the same leader knows no better.
        confirmed.hear(NodeId(3), &beat(7, 2, true), 19_000);
        assert_eq!(confirmed.contact_age_ms(&follower, 19_000), Some(10_700));
        confirmed.forget();
        assert_eq!(confirmed.contact_age_ms(&follower, 9_000), None);
    }

    #[test]
    fn a_new_leader_is_not_cut_off_before_its_first_acknowledgement() {
        // A follower heard its leader at 9,900; then it stands for election, wins, and has no answer yet.
        let heard = newest_contact(None, 10_000, Some(100));
        let candidate = newest_contact(heard, 11_000, None);
        // Acknowledgements of an earlier term of its own are old.
        let leader = newest_contact(candidate, 11_100, Some(11_000));
        assert_eq!((heard, candidate, leader), (Some(9_900), Some(9_900), Some(9_900)));
        assert_eq!(newest_contact(leader, 11_200, Some(50)), Some(11_150));
        assert_eq!(newest_contact(None, 10_000, None), None);
    }

    #[test]
    fn a_sleep_is_over_when_the_majority_was_asked_after_it() {
        let mut slept = Slept::default();
        assert_eq!((slept.is_unconfirmed(), slept.next_to_ask()), (false, None));
        slept.begin(5);
        assert_eq!((slept.is_unconfirmed(), slept.next_to_ask()), (true, Some(5)));
        assert_eq!(slept.next_to_ask(), None, "one asks already");
        assert!(!slept.asked(5, false));
        assert_eq!(slept.next_to_ask(), Some(5));
        // The answer to that is of before the second sleep.
        slept.begin(9);
        assert!(!slept.asked(5, true) && slept.is_unconfirmed());
        assert_eq!(slept.next_to_ask(), Some(9));
        assert!(slept.asked(9, true) && !slept.is_unconfirmed());
    }

    #[test]
    fn words_of_a_former_leader_are_void() {
        let mut confirmed = Confirmed::default();
        confirmed.hear(NodeId(2), &beat(6, 2, true), 1_000);
        assert_eq!(confirmed.contact_age_ms(&metrics(Role::Follower, 2), 1_000), None);
        confirmed.hear(NodeId(3), &beat(7, 3, true), 1_000);
        assert_eq!(confirmed.contact_age_ms(&metrics(Role::Follower, 2), 1_000), None);
        assert_eq!(confirmed.contact_age_ms(&metrics(Role::Follower, 3), 1_000), Some(700));
    }

    #[test]
    fn two_that_are_a_majority_need_no_word() {
        let mut follower = metrics(Role::Follower, 1000);
        follower.voters = vec![BTreeSet::from([1, 2, 1000])];
        assert_eq!(Confirmed::default().contact_age_ms(&follower, 1_000), Some(50));
        // While the voters change, both sets count.
        follower.voters.push(BTreeSet::from([1, 2, 3, 1000]));
        assert_eq!(Confirmed::default().contact_age_ms(&follower, 1_000), None);
        // One that has just joined hears the only voter.
        let learner = Metrics { id: 5, voters: vec![BTreeSet::from([2])], ..metrics(Role::Learner, 2) };
        assert_eq!(Confirmed::default().contact_age_ms(&learner, 1_000), Some(50));
    }

    #[test]
    fn who_may_speak_of_the_quorum() {
        let leader = Metrics { quorum_age_ms: Some(100), ..metrics(Role::Leader, 1) };
        let lost = Metrics { quorum_age_ms: Some(701), ..metrics(Role::Leader, 1) };
        let follower = metrics(Role::Follower, 1000);
        let witness = Metrics { id: 1000, quorum_age_ms: Some(100), ..metrics(Role::Leader, 1000) };
        assert!(vouches(&leader, None));
        assert!(!vouches(&lost, None));
        assert!(!vouches(&follower, None));
        assert!(vouches(&follower, Some(&witness)));
        assert!(!vouches(&metrics(Role::Follower, 2), Some(&witness)));
        assert!(!vouches(&follower, Some(&Metrics { term: 6, ..witness })));
    }
}

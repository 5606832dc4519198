use super::*;
use crate::db::tests::{Bed, addr, n};
use crate::db::{Command, QuorumConfig, Witness};
use proptest::prelude::*;

const W: u64 = 1000;

fn voters(ids: &[u64]) -> BTreeSet<VoterId> {
    ids.iter().copied().map(VoterId).collect()
}

fn up(ids: &[u32]) -> BTreeSet<NodeId> {
    ids.iter().copied().map(NodeId).collect()
}

fn live(up: &BTreeSet<NodeId>, witness_up: bool) -> BTreeSet<VoterId> {
    let nodes = up.iter().copied().map(VoterId::from);
    nodes.chain(witness_up.then_some(VoterId::WITNESS)).collect()
}

fn bed(nodes: u32, witness: bool, dynamic: bool) -> Bed {
    let mut bed = Bed::nodes(nodes);
    let witness = if witness { Witness::Node { name: "w".into(), addr: addr(200) } } else { Witness::None };
    bed.ok(Command::QuorumSet { config: QuorumConfig { witness, dynamic } });
    bed
}

/// Steps until nothing changes; every step must be safe.
fn settle(bed: &Bed, up: &BTreeSet<NodeId>, current: &mut BTreeSet<VoterId>, witness_up: bool) -> usize {
    for steps in 0..200 {
        let next = target_voters(&bed.db, up, current, witness_up).voters;
        if next == *current {
            return steps;
        }
        let live = live(up, witness_up);
        assert_eq!(current.symmetric_difference(&next).count(), 1, "one voter at a time");
        assert!(has_quorum(current, &live) && has_quorum(&next, &live), "{current:?} -> {next:?}");
        *current = next;
    }
    panic!("does not come to rest: {current:?}");
}

/// Marks who is down in the database, as the leader would.
fn follow(bed: &mut Bed, up: &BTreeSet<NodeId>) {
    for id in bed.db.nodes.keys().copied().collect::<Vec<_>>() {
        match (up.contains(&id), bed.db.nodes[&id].is_up()) {
            (true, false) => bed.up(id.0),
            (false, true) => bed.down(id.0),
            (true, true) | (false, false) => {}
        }
    }
}

#[test]
fn where_voters_come_to_rest() {
    /// Nodes, witness configured, dynamic, up, witness up, before, after.
    type Case<'a> = (u32, bool, bool, &'a [u32], bool, &'a [u64], &'a [u64]);
    let cases: &[Case<'_>] = &[
        (1, false, true, &[1], false, &[1], &[1]),
        (2, false, true, &[1, 2], false, &[1], &[1]),
        (2, false, true, &[1, 2], false, &[1, 2], &[1]),
        (2, false, true, &[1, 2], false, &[2], &[2]),
        (2, false, true, &[1], false, &[1], &[1]),
        (2, true, true, &[1, 2], true, &[1], &[1, 2, W]),
        (2, true, true, &[1, 2], false, &[1, 2, W], &[1]),
        (2, true, true, &[2], true, &[1, 2, W], &[2]),
        (3, false, true, &[1, 2, 3], false, &[1], &[1, 2, 3]),
        (3, true, true, &[1, 2, 3], true, &[1, 2, W], &[1, 2, 3]),
        (3, true, true, &[2, 3], true, &[1, 2, 3], &[2, 3, W]),
        (3, false, true, &[2, 3], false, &[1, 2, 3], &[2]),
        (4, false, true, &[1, 2, 3, 4], false, &[1, 2, 3], &[1, 2, 3]),
        (4, false, true, &[1, 2, 3, 4], false, &[2, 3, 4], &[2, 3, 4]),
        (4, false, true, &[1, 3, 4], false, &[1, 2, 3], &[1, 3, 4]),
        (5, false, true, &[1, 2, 3, 4, 5], false, &[1, 2, 3], &[1, 2, 3, 4, 5]),
        // Static: who is down keeps its vote.
        (3, false, false, &[1, 2], false, &[1, 2, 3], &[1, 2, 3]),
        (2, true, false, &[1, 2], false, &[1, 2, W], &[1, 2, W]),
        (4, false, false, &[1, 2, 3, 4], false, &[1, 2, 3], &[1, 2, 3, 4]),
        // Nothing can be changed without a majority.
        (3, false, true, &[1], false, &[1, 2, 3], &[1, 2, 3]),
        (2, true, true, &[1], false, &[1, 2, W], &[1, 2, W]),
    ];
    for case @ (nodes, witness, dynamic, ups, witness_up, before, after) in cases {
        let mut bed = bed(*nodes, *witness, *dynamic);
        let ups = up(ups);
        follow(&mut bed, &ups);
        let mut current = voters(before);
        settle(&bed, &ups, &mut current, *witness_up);
        assert_eq!(current, voters(after), "{case:?}");
    }
}

#[test]
fn the_dead_go_before_the_living_give_up() {
    let mut bed = bed(3, false, true);
    let ups = up(&[1, 3]);
    follow(&mut bed, &ups);
    let decision = target_voters(&bed.db, &ups, &voters(&[1, 2, 3]), false);
    assert_eq!(decision.voters, voters(&[1, 3]));
    assert_eq!(decision.reason, "n2 loses its vote: it is not heard");
}

#[test]
fn a_witness_that_is_not_wanted_any_more_goes_first() {
    // It may stop any moment: no set may come about that needs it.
    let bed = bed(2, false, true);
    let decision = target_voters(&bed.db, &up(&[1, 2]), &voters(&[1, 2, W]), true);
    assert_eq!(decision.voters, voters(&[1, 2]));
}

#[test]
fn a_leaving_node_hands_its_vote_over_while_it_runs() {
    let mut bed = bed(2, false, true);
    bed.ok(Command::NodeLeave { node: n(1), incarnation: 1 });
    let mut current = voters(&[1]);
    settle(&bed, &up(&[1, 2]), &mut current, false);
    assert_eq!(current, voters(&[2]));
    // Then it leaves for good, and the other one goes on.
    bed.ok(Command::NodePause { node: n(1), drain: true });
    let reason = "it leaves the cluster".to_owned();
    bed.ok(Command::NodeDown { node: n(1), incarnation: 1, reason, planned: true });
    bed.ok(Command::NodeEvict { node: n(1) });
    assert_eq!(settle(&bed, &up(&[2]), &mut current, false), 0);
    assert_eq!(current, voters(&[2]));
}

#[test]
fn one_that_cannot_leave_votes_again_when_it_is_resumed() {
    let mut bed = bed(2, false, true);
    bed.down(2);
    bed.ok(Command::NodeLeave { node: n(1), incarnation: 1 });
    let mut current = voters(&[1]);
    settle(&bed, &up(&[1]), &mut current, false);
    assert_eq!(current, voters(&[1]), "the last vote never goes");
    bed.ok(Command::NodeResume { node: n(1) });
    assert!(!bed.db.nodes[&n(1)].leaving);
    assert_eq!(bed.ok(Command::NodeResume { node: n(1) }), crate::db::Applied::Unchanged);
}

#[test]
fn configured_votes_eviction_and_joining() {
    let mut bed = bed(4, false, true);
    bed.ok(Command::NodeVote { node: n(1), vote: false });
    let mut current = voters(&[1, 2, 3]);
    settle(&bed, &up(&[1, 2, 3, 4]), &mut current, false);
    assert_eq!(current, voters(&[2, 3, 4]));
    bed.down(4);
    bed.ok(Command::NodeEvict { node: n(4) });
    settle(&bed, &up(&[1, 2, 3]), &mut current, false);
    assert_eq!(current, voters(&[2]));
    let token_sha256 = crate::db::tests::token();
    let node = crate::db::tests::new_node(5);
    bed.ok(Command::NodeAdd { node, token_sha256, expect_id: None });
    assert_eq!(settle(&bed, &up(&[1, 2, 3, 5]), &mut current, false), 0, "Joining has no vote");
    bed.up(5);
    settle(&bed, &up(&[1, 2, 3, 5]), &mut current, false);
    assert_eq!(current, voters(&[2, 3, 5]));
}

#[test]
fn a_change_that_would_stop_the_cluster_waits() {
    let mut bed = bed(3, false, false);
    bed.down(3);
    bed.ok(Command::NodeVote { node: n(2), vote: false });
    let decision = target_voters(&bed.db, &up(&[1, 2]), &voters(&[1, 2, 3]), false);
    assert_eq!(decision.voters, voters(&[1, 2, 3]), "n1 alone is no majority of n1 and n3");
    assert_eq!(decision.reason, "every change would cost the majority");
    bed.up(3);
    let decision = target_voters(&bed.db, &up(&[1, 2, 3]), &voters(&[1, 2, 3]), false);
    assert_eq!(decision.voters, voters(&[1, 3]));
}

#[test]
fn what_can_be_survived() {
    let five = voters(&[1, 2, 3, 4, 5]);
    assert_eq!(tolerates(&five, &five), Some(2));
    assert_eq!(tolerates(&five, &voters(&[1, 2, 3])), Some(0));
    assert_eq!(tolerates(&five, &voters(&[1, 2, 9])), None);
    assert!(has_quorum(&five, &voters(&[1, 2, 3, 9])));
    assert!(!has_quorum(&voters(&[]), &five), "nobody is no majority");
}

/// Every majority of one set meets every majority of the other.
fn majorities_meet(a: &BTreeSet<VoterId>, b: &BTreeSet<VoterId>) -> bool {
    let all: Vec<VoterId> = a.union(b).copied().collect();
    (0..1u32 << all.len()).all(|mask| {
        let side =
            |yes| all.iter().enumerate().filter(move |(i, _)| (mask >> i & 1 == 1) == yes).map(|(_, v)| *v);
        let (side, other): (BTreeSet<_>, BTreeSet<_>) = (side(true).collect(), side(false).collect());
        // A partition in two: not both sides may go on, one by the old set, one by the new.
        !(has_quorum(a, &side) && has_quorum(b, &other))
    })
}

proptest! {
    #![proptest_config(crate::db::tests::cases(300))]

    /// Random failures and returns, with or without time to adapt between them.
    #[test]
    fn any_history_of_failures_is_safe(
        nodes in 1..=6u32,
        witness: bool,
        dynamic: bool,
        changes in prop::collection::vec((1..=7u32, 0..3u8), 0..40),
    ) {
        let mut bed = bed(nodes, witness, dynamic);
        bed.setting("quarantine_failures", "0");
        let mut ups: BTreeSet<NodeId> = bed.db.nodes.keys().copied().collect();
        let (mut witness_up, mut current) = (true, voters(&[1]));
        settle(&bed, &ups, &mut current, witness && witness_up);
        for (who, steps) in changes {
            if who > nodes {
                witness_up = !witness_up;
            } else if !ups.remove(&n(who)) {
                ups.insert(n(who));
            }
            if !has_quorum(&current, &live(&ups, witness && witness_up)) {
                // Nobody can change the database either.
                let still = target_voters(&bed.db, &ups, &current, witness && witness_up).voters;
                prop_assert_eq!(&still, &current);
                continue;
            }
            follow(&mut bed, &ups);
            for _ in 0..steps {
                let next = target_voters(&bed.db, &ups, &current, witness && witness_up).voters;
                prop_assert!(!next.is_empty());
                prop_assert!(current.symmetric_difference(&next).count() <= 1);
                prop_assert!(majorities_meet(&current, &next), "{:?} -> {:?}", current, next);
                prop_assert!(has_quorum(&next, &live(&ups, witness && witness_up)));
                current = next;
            }
        }
        // With everybody back it comes to rest, and votes are odd unless static quorum is told otherwise.
        let everybody: BTreeSet<NodeId> = bed.db.nodes.keys().copied().collect();
        follow(&mut bed, &everybody);
        settle(&bed, &everybody, &mut current, witness);
        prop_assert!(current.len() % 2 == 1 || (!dynamic && !witness), "{:?}", current);
        prop_assert!(current.len() + 1 >= bed.db.nodes.len());
    }

    /// Nodes fail one after the other, the voters adapt in between: with a witness any node can be the last one standing;
    /// without, whoever still has the vote.
    #[test]
    fn last_man_standing(nodes in 2..=6u32, witness: bool, order in prop::collection::vec(any::<prop::sample::Index>(), 5)) {
        let mut bed = bed(nodes, witness, true);
        let mut ups: BTreeSet<NodeId> = bed.db.nodes.keys().copied().collect();
        let mut current = voters(&[1]);
        settle(&bed, &ups, &mut current, witness);
        for index in order {
            if ups.len() == 1 {
                break;
            }
            let mut mortal: Vec<NodeId> = ups.iter().copied().collect();
            if !witness && current.len() == 1 {
                mortal.retain(|node| !current.contains(&VoterId::from(*node)));
            }
            ups.remove(index.get(&mortal));
            prop_assert!(has_quorum(&current, &live(&ups, witness)), "{:?} of {:?}", ups, current);
            follow(&mut bed, &ups);
            settle(&bed, &ups, &mut current, witness);
        }
        prop_assert_eq!(ups.len(), 1);
        prop_assert_eq!(current, live(&ups, false), "the last one needs nobody, not even the witness");
    }
}

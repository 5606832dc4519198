//! Random histories of the model's world.

use super::*;
use proptest::prelude::*;
use proptest::test_runner::{Config, FileFailurePersistence, RngAlgorithm, TestError, TestRng, TestRunner};

#[derive(Debug, Clone)]
enum Action {
    Io { node: usize, file: usize, kind: Kind, blocks: ByteRange },
    EndIo { which: usize, ok: bool },
    Deliver { which: usize },
    Double { which: usize },
    LoseRecall { which: usize },
    AnswerMap { which: usize, how: u8 },
    CancelGet { which: usize },
    Guard { file: usize, blocks: ByteRange, to_end: bool, except: Option<usize>, keep_read: bool },
    Release { which: usize, truncate: bool },
    GiveBack { node: usize, file: usize, blocks: ByteRange },
    Advance { ms: u64 },
    Fence,
    LoseLease { node: usize },
    Rejoin { node: usize },
    FailOver,
}

/// A non-empty range of block numbers.
fn blocks() -> impl Strategy<Value = ByteRange> {
    (0..BLOCKS, 1..=3u64).prop_map(|(start, len)| ByteRange::new(start, (start + len).min(BLOCKS)))
}

fn action() -> impl Strategy<Value = Action> {
    let kind = prop_oneof![Just(Kind::Read), Just(Kind::Write), Just(Kind::Rmw)];
    let except = prop_oneof![3 => Just(None), 1 => (0..NODES).prop_map(Some)];
    let which = || any::<usize>();
    prop_oneof![
        20 => (0..NODES, 0..FILES, kind, blocks())
            .prop_map(|(node, file, kind, blocks)| Action::Io { node, file, kind, blocks }),
        10 => (which(), any::<bool>()).prop_map(|(which, ok)| Action::EndIo { which, ok }),
        40 => which().prop_map(|which| Action::Deliver { which }),
        4 => which().prop_map(|which| Action::Double { which }),
        2 => which().prop_map(|which| Action::LoseRecall { which }),
        14 => (which(), 0..4u8).prop_map(|(which, how)| Action::AnswerMap { which, how }),
        1 => which().prop_map(|which| Action::CancelGet { which }),
        5 => (0..FILES, blocks(), any::<bool>(), except, any::<bool>()).prop_map(
            |(file, blocks, to_end, except, keep_read)| Action::Guard { file, blocks, to_end, except, keep_read }
        ),
        5 => (which(), any::<bool>()).prop_map(|(which, truncate)| Action::Release { which, truncate }),
        2 => (0..NODES, 0..FILES, blocks())
            .prop_map(|(node, file, blocks)| Action::GiveBack { node, file, blocks }),
        5 => (1..400u64).prop_map(|ms| Action::Advance { ms }),
        1 => Just(Action::Fence),
        1 => (0..NODES).prop_map(|node| Action::LoseLease { node }),
        2 => (0..NODES).prop_map(|node| Action::Rejoin { node }),
        1 => Just(Action::FailOver),
    ]
}

/// The `which`-th of `count`, if there are any.
fn pick(which: usize, count: usize) -> Option<usize> {
    (count > 0).then(|| which % count)
}

impl World {
    fn act_on(&mut self, action: &Action) -> Result<(), String> {
        match *action {
            Action::Io { node, file, kind, blocks } => self.begin_io(node, file, kind, blocks)?,
            Action::EndIo { which, ok } => {
                let node = which % NODES;
                if let Some(which) = pick(which / NODES, self.clients[node].io.len()) {
                    self.end_io(node, which, ok)?;
                }
            }
            Action::Deliver { which } => {
                if let Some(which) = pick(which, self.net.len()) {
                    self.deliver_any(which);
                }
            }
            Action::Double { which } => {
                if let Some(which) = pick(which, self.net.len()) {
                    self.net.push(self.net[which].clone());
                }
            }
            Action::LoseRecall { which } => {
                if let Some(which) = pick(which, self.net.len())
                    && matches!(self.net[which].body, Body::Recall { .. })
                {
                    self.net.remove(which);
                }
            }
            Action::AnswerMap { which, how } => {
                let mapping: Vec<_> =
                    self.gets.iter().filter(|(_, get)| get.limit.is_some()).map(|(&id, _)| id).collect();
                if let Some(which) = pick(which, mapping.len()) {
                    self.answer_map(mapping[which], how);
                }
            }
            Action::CancelGet { which } => self.cancel_any(which),
            Action::Guard { file, blocks, to_end, except, keep_read } => {
                let end = if to_end { u64::MAX } else { blocks.end * BLOCK };
                self.guard(file, ByteRange::new(blocks.start * BLOCK, end), except, keep_read);
            }
            Action::Release { which, truncate } => self.release_any(which, truncate)?,
            Action::GiveBack { node, file, blocks } => {
                self.give_back(node, file, ByteRange::new(blocks.start * BLOCK, blocks.end * BLOCK));
            }
            Action::Advance { ms } => self.advance(ms),
            Action::Fence => {
                if let Some(&node) = self.fences.first() {
                    self.node_gone(node);
                }
            }
            Action::LoseLease { node } => self.node_gone(node),
            Action::Rejoin { node } => self.rejoin(node),
            Action::FailOver => self.fail_over(),
        }
        Ok(())
    }

    fn cancel_any(&mut self, which: usize) {
        if let Some(which) = pick(which, self.gets.len()) {
            let request = self.gets.keys().nth(which).copied().unwrap();
            self.step(Input::CancelGet { request });
        }
    }

    fn release_any(&mut self, which: usize, truncate: bool) -> Result<(), String> {
        match pick(which, self.guards.len()) {
            Some(which) => self.release(self.guards.keys().nth(which).copied().unwrap(), truncate),
            None => Ok(()),
        }
    }
}

fn run(actions: &[Action], mutant: Option<Mutant>) -> Result<(), TestCaseError> {
    let mut world = World::new(mutant);
    for (i, action) in actions.iter().enumerate() {
        let done = world.act_on(action).and_then(|()| world.check());
        done.map_err(|why| TestCaseError::fail(format!("step {i}, {action:?}: {why}")))?;
    }
    world.heal().map_err(TestCaseError::fail)
}

fn histories() -> impl Strategy<Value = Vec<Action>> {
    proptest::collection::vec(action(), 1..160)
}

/// A defect must be found within this many histories.
const MUTANT_CASES: u32 = 4000;

fn found(mutant: Mutant) {
    let config =
        Config { cases: MUTANT_CASES, failure_persistence: None, max_shrink_iters: 0, ..Config::default() };
    let rng = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
    let mut runner = TestRunner::new_with_rng(config, rng);
    match runner.run(&histories(), |actions| run(&actions, Some(mutant))) {
        Err(TestError::Fail(..)) => {}
        other => panic!("{mutant:?} broke nothing that the model checks: {other:?}"),
    }
}

#[test]
fn invariants_hold_in_every_history() {
    let persistence = FileFailurePersistence::WithSource("regressions");
    let config = Config {
        cases: Config::default().cases.max(1000),
        failure_persistence: Some(Box::new(persistence)),
        source_file: Some(file!()),
        ..Config::default()
    };
    let mut runner = TestRunner::new(config);
    if let Err(error) = runner.run(&histories(), |actions| run(&actions, None)) {
        panic!("{error}\n(the seed is kept in a .regressions file beside the source)\n{runner}");
    }
}

macro_rules! mutants {
    ($($name:ident: $mutant:ident,)*) => {
        $(#[test]
        fn $name() {
            found(Mutant::$mutant);
        })*
    };
}

mutants! {
    finds_cache_that_ignores_tombstones: CacheIgnoresTombstones,
    finds_cache_that_returns_early: CacheReturnsEarly,
    finds_cache_that_loses_the_size: CacheLosesSize,
    finds_table_that_maps_under_guards: TableMapsUnderGuard,
    finds_table_whose_guards_ignore_mapping: TableGuardIgnoresMapping,
    finds_table_whose_returns_ignore_seq: TableReturnIgnoresSeq,
    finds_table_whose_returns_ignore_keep_read: TableReturnIgnoresKeepRead,
}

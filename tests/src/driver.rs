//! Random operations from several nodes on the same few files, one after the other, each compared with the model.
//!
//! What a call returned on one node, any other must see at once: after a change the driver looks at the same bytes
//! from another node, and attributes are asked of every node and must agree. The operations depend on the seed
//! alone, so a failure repeats; the message carries the seed, the step and the operations before it.

use crate::model::Model;
use crate::ops::{Allocate, How, Op, Reply};
use crate::rng::Rng;
use anyhow::{Context as _, bail};
use std::collections::{BTreeMap, VecDeque};
use std::time::{SystemTime, UNIX_EPOCH};

/// Files may grow to about this size.
const FILE_BYTES_MAX: u64 = 1 << 20;
/// Longest single transfer.
const IO_BYTES_MAX: u64 = 128 << 10;
const NAMES: u64 = 5;
const SLOTS: u64 = 3;
/// How many operations a failure message shows.
const LOG_LEN: usize = 30;
/// A file system may stamp with the clock of its last tick.
const CLOCK_SLACK_NS: i64 = 50_000_000;

/// Something that does operations.
pub trait Node {
    /// Does one. An error here is a failure of the harness or of the node, not of the operation.
    ///
    /// # Errors
    /// The node is gone or does not answer.
    fn call(&mut self, op: &Op) -> anyhow::Result<Reply>;
}

impl Node for crate::agent::Agent {
    fn call(&mut self, op: &Op) -> anyhow::Result<Reply> {
        Ok(self.run(op))
    }
}

/// The driver.
#[derive(Debug)]
pub struct Driver<N> {
    nodes: Vec<N>,
    model: Model,
    rng: Rng,
    seed: u64,
    step: u64,
    /// How each slot was opened.
    opened: BTreeMap<(usize, u32), How>,
    /// Wall clock before the last write, per name.
    written_ns: BTreeMap<String, i64>,
    /// Names of open slots, for `written_ns`.
    slot_names: BTreeMap<(usize, u32), String>,
    log: VecDeque<String>,
    appends: bool,
}

impl<N: Node> Driver<N> {
    /// The nodes must be agents of one and the same empty directory.
    pub fn new(nodes: Vec<N>, model: Model, seed: u64) -> Self {
        Driver {
            nodes,
            model,
            rng: Rng::new(seed),
            seed,
            step: 0,
            opened: BTreeMap::new(),
            written_ns: BTreeMap::new(),
            slot_names: BTreeMap::new(),
            log: VecDeque::new(),
            appends: true,
        }
    }

    /// No file is opened for appending: an append whose coordinator dies under it may have been done or not, and
    /// then fails with EIO, which the model does not know.
    #[must_use]
    pub fn without_appends(mut self) -> Self {
        self.appends = false;
        self
    }

    /// Makes everything durable: every open file, and the names.
    ///
    /// # Errors
    /// A sync fails.
    pub fn sync_all(&mut self) -> anyhow::Result<()> {
        for (node, slot) in self.opened.keys().copied().collect::<Vec<_>>() {
            if slot != u32::MAX && self.model.slot_size(node, slot).is_some() {
                self.check(node, &Op::Sync { slot })?;
            }
        }
        self.check(0, &Op::SyncDir)
    }

    /// Gives the nodes back.
    #[must_use]
    pub fn into_nodes(self) -> Vec<N> {
        self.nodes
    }

    /// Does `steps` operations; `between` is called before each with its number.
    ///
    /// # Errors
    /// The first difference from the model, or between nodes.
    pub fn run(
        &mut self,
        steps: u64,
        mut between: impl FnMut(u64) -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        for _ in 0..steps {
            self.step += 1;
            between(self.step)?;
            let node = self.rng.index(self.nodes.len());
            let op = self.choose(node);
            self.check(node, &op)?;
            self.echo(node, &op)?;
        }
        // At the end every node must see the whole of every file.
        for node in 0..self.nodes.len() {
            self.check(node, &Op::List)?;
            for name in (0..NAMES).map(file_name) {
                let slot = u32::MAX;
                self.check(node, &Op::Open { slot, name, how: How::default() })?;
                if self.model.slot_size(node, slot).is_some() {
                    self.check(node, &Op::Read { slot, offset: 0, len: 2 * FILE_BYTES_MAX })?;
                    self.check(node, &Op::Close { slot })?;
                }
            }
        }
        Ok(())
    }

    fn choose(&mut self, node: usize) -> Op {
        let slot = u32::try_from(self.rng.below(SLOTS)).unwrap_or(0);
        let Some(size) = self.model.slot_size(node, slot) else { return self.choose_open(slot) };
        let direct = self.opened.get(&(node, slot)).is_some_and(|how| how.direct);
        let (offset, len) = self.choose_range(size, direct);
        let name = file_name(self.rng.below(NAMES));
        match self.rng.below(100) {
            0..7 => self.choose_open(slot),
            7..11 => Op::Close { slot },
            11..28 => Op::Read { slot, offset, len },
            28..36 if size > 0 => {
                let offset = offset % size;
                Op::MapRead { slot, offset, len: len.min(size - offset) }
            }
            28..62 => Op::Write { slot, offset, len, seed: self.rng.next_u64() },
            62..66 => Op::SetLen { slot, size: offset },
            66..69 => Op::Truncate { name, size: offset },
            69..78 => {
                let kinds = [Allocate::Extend, Allocate::KeepSize, Allocate::Punch, Allocate::Zero];
                Op::Allocate { slot, kind: kinds[self.rng.index(kinds.len())], offset, len }
            }
            78..81 => Op::Sync { slot },
            81..85 => Op::Rename { from: name, to: file_name(self.rng.below(NAMES)) },
            85..87 => Op::Link { from: name, to: file_name(self.rng.below(NAMES)) },
            87..90 => Op::Unlink { name },
            90..97 => Op::Stat { name },
            97..99 => Op::StatSlot { slot },
            _ => Op::List,
        }
    }

    fn choose_open(&mut self, slot: u32) -> Op {
        let how = How {
            create: !self.rng.one_in(8),
            exclusive: self.rng.one_in(8),
            truncate: self.rng.one_in(10),
            append: self.rng.one_in(5) && self.appends,
            direct: self.rng.one_in(4),
        };
        // Appending directly needs a size that is a multiple of the block; that is another test's matter.
        let how = How { direct: how.direct && !how.append, ..how };
        Op::Open { slot, name: file_name(self.rng.below(NAMES)), how }
    }

    /// Near the end of file, near block borders, or anywhere; whole blocks for O_DIRECT.
    fn choose_range(&mut self, size: u64, direct: bool) -> (u64, u64) {
        let offset = match self.rng.below(4) {
            0 => size.saturating_sub(self.rng.below(10_000)),
            1 => (self.rng.below(FILE_BYTES_MAX / 4096) * 4096 + self.rng.below(3)).saturating_sub(1),
            2 => self.rng.below(size.max(1)),
            _ => self.rng.below(FILE_BYTES_MAX),
        };
        let len = match self.rng.below(3) {
            0 => 1 + self.rng.below(200),
            1 => 4096 * (1 + self.rng.below(8)),
            _ => 1 + self.rng.below(IO_BYTES_MAX),
        };
        let offset = offset.min(FILE_BYTES_MAX);
        if direct { (offset / 4096 * 4096, len.div_ceil(4096) * 4096) } else { (offset, len) }
    }

    /// Looks at what `op` changed from another node that has the same file open.
    fn echo(&mut self, node: usize, op: &Op) -> anyhow::Result<()> {
        let (Op::Write { slot, offset, len, .. } | Op::Allocate { slot, offset, len, .. }) = *op else {
            return Ok(());
        };
        let Some((other, twin)) = self.model.twin(node, slot) else { return Ok(()) };
        let (mut offset, mut len) = (offset.saturating_sub(100), len + 200);
        if self.opened.get(&(other, twin)).is_some_and(|how| how.direct) {
            offset = offset / 4096 * 4096;
            len = len.div_ceil(4096) * 4096;
        }
        self.check(other, &Op::Read { slot: twin, offset, len })?;
        self.check(other, &Op::StatSlot { slot: twin })
    }

    fn check(&mut self, node: usize, op: &Op) -> anyhow::Result<()> {
        let before_ns = now_ns();
        let expected = self.model.run(node, op);
        self.log.push_back(format!("{} n{} {op:?} -> {}", self.step, node + 1, expected.brief()));
        if self.log.len() > LOG_LEN {
            self.log.pop_front();
        }
        let got = self.ask(node, op)?;
        self.compare(node, op, &expected, &got)?;
        self.remember(node, op, &expected, before_ns);
        if let (Op::Stat { name }, Reply::Stat { mtime_ns, .. }) = (op, &got) {
            self.compare_everywhere(node, name, &got, *mtime_ns)?;
        }
        Ok(())
    }

    fn ask(&mut self, node: usize, op: &Op) -> anyhow::Result<Reply> {
        let reply = self.nodes[node].call(op);
        reply.with_context(|| format!("seed {} step {}: n{} {op:?}", self.seed, self.step, node + 1))
    }

    fn compare(&self, node: usize, op: &Op, expected: &Reply, got: &Reply) -> anyhow::Result<()> {
        let mut plain = got.clone();
        if let Reply::Stat { ino, mtime_ns, .. } = &mut plain {
            (*ino, *mtime_ns) = (0, 0);
        }
        if plain == *expected {
            return Ok(());
        }
        let log = self.log.iter().cloned().collect::<Vec<_>>().join("\n  ");
        bail!(
            "seed {} step {}: n{} {op:?}\n expected {}\n got      {}{}\n last operations:\n  {log}",
            self.seed,
            self.step,
            node + 1,
            expected.brief(),
            plain.brief(),
            first_difference(expected, &plain)
        )
    }

    /// Every node must give the same attributes, and a time that is not older than the last write.
    fn compare_everywhere(
        &mut self,
        node: usize,
        name: &str,
        got: &Reply,
        mtime_ns: i64,
    ) -> anyhow::Result<()> {
        for other in 0..self.nodes.len() {
            let theirs = self.ask(other, &Op::Stat { name: name.to_owned() })?;
            if theirs != *got {
                bail!(
                    "seed {} step {}: attributes of {name} differ: n{} {got:?}, n{} {theirs:?}",
                    self.seed,
                    self.step,
                    node + 1,
                    other + 1
                );
            }
        }
        let written_ns = self.written_ns.get(name).copied().unwrap_or(i64::MIN);
        if mtime_ns < written_ns.saturating_sub(CLOCK_SLACK_NS) {
            bail!(
                "seed {} step {}: mtime of {name} is {} ms older than its last write",
                self.seed,
                self.step,
                (written_ns - mtime_ns) / 1_000_000
            );
        }
        Ok(())
    }

    fn remember(&mut self, node: usize, op: &Op, expected: &Reply, before_ns: i64) {
        if matches!(expected, Reply::Failed { .. }) {
            return;
        }
        match op {
            Op::Open { slot, name, how } => {
                self.opened.insert((node, *slot), *how);
                self.slot_names.insert((node, *slot), name.clone());
            }
            Op::Write { slot, .. } => {
                if let Some(name) = self.slot_names.get(&(node, *slot)) {
                    self.written_ns.insert(name.clone(), before_ns);
                }
            }
            // From here on the names may stand for other files.
            Op::Rename { .. } | Op::Unlink { .. } => {
                self.written_ns.clear();
                self.slot_names.clear();
            }
            Op::Close { .. }
            | Op::Read { .. }
            | Op::MapRead { .. }
            | Op::SetLen { .. }
            | Op::Truncate { .. }
            | Op::Allocate { .. }
            | Op::Sync { .. }
            | Op::Link { .. }
            | Op::Stat { .. }
            | Op::StatSlot { .. }
            | Op::List
            | Op::SyncDir
            | Op::Lock { .. } => {}
        }
    }
}

fn file_name(number: u64) -> String {
    format!("f{number}")
}

fn now_ns() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos());
    i64::try_from(since).unwrap_or(i64::MAX)
}

fn first_difference(expected: &Reply, got: &Reply) -> String {
    let (Reply::Data { hex: want }, Reply::Data { hex: have }) = (expected, got) else {
        return String::new();
    };
    let at =
        want.bytes().zip(have.bytes()).position(|(a, b)| a != b).map_or(want.len().min(have.len()), |at| at);
    let show = |hex: &str| hex.get(at / 2 * 2..(at / 2 * 2 + 32).min(hex.len())).unwrap_or("").to_owned();
    format!(
        "\n first difference at byte {} of the answer: expected {}, got {}",
        at / 2,
        show(want),
        show(have)
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::Agent;
    use crate::model::Broken;

    fn three_agents(broken: Option<Broken>, seed: u64, steps: u64) -> anyhow::Result<()> {
        let dir = tempfile::tempdir_in("/var/tmp")?;
        let nodes = (0..3).map(|_| Agent::new(dir.path().to_owned())).collect();
        Driver::new(nodes, Model::new(broken), seed).run(steps, |_| Ok(()))
    }

    #[test]
    fn a_local_directory_behaves_as_the_model() {
        for seed in 1..=3 {
            three_agents(None, seed, 3000).unwrap();
        }
    }

    #[test]
    fn every_known_fault_is_found() {
        for broken in [
            Broken::PunchForgets,
            Broken::RenameCopies,
            Broken::AppendStale,
            Broken::TruncateKeepsTail,
            Broken::UnlinkDrops,
        ] {
            let error = three_agents(Some(broken), 1, 3000).expect_err(&format!("{broken:?} went unnoticed"));
            assert!(error.to_string().contains("seed 1 step"), "{broken:?}: {error}");
        }
    }

    #[test]
    fn the_same_seed_gives_the_same_operations() {
        let messages: Vec<String> = (0..2)
            .map(|_| three_agents(Some(Broken::PunchForgets), 9, 3000).unwrap_err().to_string())
            .collect();
        assert_eq!(messages[0], messages[1]);
    }
}

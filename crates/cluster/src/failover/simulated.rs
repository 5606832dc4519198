//! The planner against obedient nodes: random clusters and faults, then quiet; everything that can be online must get there, and
//! then nothing moves any more.

use super::*;
use crate::db::tests::{Bed, n};
use crate::db::{Applied, MemberState};
use proptest::prelude::*;
use std::collections::BTreeSet;

const NAMES: [&str; 3] = ["A", "B", "C"];

/// What happens to the cluster.
#[derive(Debug, Clone)]
enum Fault {
    Crash(u32),
    Boot(u32),
    Path(u32, usize, PathState),
    Csvfs(u32, usize, bool),
    Hang(u32, bool),
    FailStarts(u32, bool),
    Pause(u32, bool),
    Resume(u32),
    Offline(usize),
    BringOnline(usize),
}

struct World {
    bed: Bed,
    alive: BTreeSet<NodeId>,
    hung: BTreeSet<NodeId>,
    bad_starts: BTreeSet<NodeId>,
    paths: BTreeMap<(NodeId, String), PathState>,
    no_csvfs: BTreeSet<(NodeId, String)>,
    roles: BTreeMap<(NodeId, String), u64>,
}

impl World {
    fn new(nodes: u32) -> Self {
        let mut bed = Bed::nodes(nodes);
        bed.setting("quarantine_failures", "0");
        bed.setting("failed_retry_ms", "10000");
        for (i, name) in NAMES.iter().enumerate() {
            let preferred = [u32::try_from(i).unwrap() % nodes + 1];
            bed.add_volume(name, &preferred[..i % 2]);
        }
        let alive = bed.db.nodes.keys().copied().collect();
        World {
            bed,
            alive,
            hung: BTreeSet::new(),
            bad_starts: BTreeSet::new(),
            paths: BTreeMap::new(),
            no_csvfs: BTreeSet::new(),
            roles: BTreeMap::new(),
        }
    }

    fn fault(&mut self, fault: &Fault) {
        let key = |node: u32, volume: usize| (n(node), NAMES[volume].to_owned());
        match *fault {
            Fault::Crash(node) => {
                self.alive.remove(&n(node));
                self.roles.retain(|(owner, _), _| *owner != n(node));
            }
            Fault::Boot(node) => {
                self.alive.insert(n(node));
            }
            Fault::Path(node, volume, path) => {
                self.paths.insert(key(node, volume), path);
            }
            Fault::Csvfs(node, volume, runs) => {
                if runs {
                    self.no_csvfs.remove(&key(node, volume));
                } else {
                    self.no_csvfs.insert(key(node, volume));
                    self.roles.remove(&key(node, volume));
                }
            }
            Fault::Hang(node, yes) => set(&mut self.hung, n(node), yes),
            Fault::FailStarts(node, yes) => set(&mut self.bad_starts, n(node), yes),
            Fault::Pause(node, drain) => drop(self.bed.apply(Command::NodePause { node: n(node), drain })),
            Fault::Resume(node) => drop(self.bed.apply(Command::NodeResume { node: n(node) })),
            Fault::Offline(volume) => {
                let (name, reason) = (NAMES[volume].into(), "test".into());
                drop(self.bed.apply(Command::VolumeOffline { name, reason }));
            }
            Fault::BringOnline(volume) => {
                drop(self.bed.apply(Command::VolumeBringOnline { name: NAMES[volume].into() }));
            }
        }
    }

    fn path(&self, node: NodeId, volume: &str) -> PathState {
        self.paths.get(&(node, volume.to_owned())).copied().unwrap_or(PathState::Good)
    }

    fn view(&self) -> View {
        let report = |&node: &NodeId| {
            let volume = |name: &&str| {
                let key = (node, (*name).to_owned());
                let role_epoch = self.roles.get(&key).copied().unwrap_or(0);
                let (path, csvfs) = (self.path(node, name), !self.no_csvfs.contains(&key));
                ((*name).to_owned(), VolumeReport { path, csvfs, role_epoch, problem: None })
            };
            let volumes = NAMES.iter().map(volume).collect();
            let incarnation = self.bed.db.nodes[&node].incarnation;
            (node, NodeReport { incarnation, volumes, ..NodeReport::default() })
        };
        View { now_unix_ms: self.bed.now, me: n(1), reports: self.alive.iter().map(report).collect() }
    }

    /// One second: the leader's verdicts, its plan, then each node does what the database says.
    fn round(&mut self) -> usize {
        self.bed.now += 1_000;
        for id in self.bed.db.nodes.keys().copied().collect::<Vec<_>>() {
            match (self.alive.contains(&id), self.bed.db.nodes[&id].is_up()) {
                (true, false) => self.bed.up(id.0),
                (false, true) => self.bed.down(id.0),
                (true, true) | (false, false) => {}
            }
        }
        let view = self.view();
        let commands = plan(&self.bed.db, &view);
        for command in &commands {
            let applied = self.bed.ok(command.clone());
            assert_ne!(applied, Applied::Unchanged, "{command:?} changed nothing");
        }
        assert_eq!(plan(&self.bed.db, &view), [], "not idempotent after {commands:?}");
        for name in NAMES {
            self.obey(name);
        }
        commands.len()
    }

    /// What the nodes do about a volume.
    fn obey(&mut self, name: &str) {
        let volume = self.bed.db.volumes[name].clone();
        self.roles.retain(|(node, role), _| role != name || Some(*node) == volume.owner);
        let awake: BTreeSet<NodeId> = self.alive.difference(&self.hung).copied().collect();
        let awake = |node: &NodeId| awake.contains(node);
        if let Some(owner) = volume.owner.filter(awake) {
            self.obey_owner(name, &volume, owner);
        }
        // Who is not to write any more, and not busy, withdraws by itself.
        for (&node, member) in &volume.members {
            let pending = member.state == MemberState::FencePending && volume.owner.is_none();
            if pending && awake(&node) {
                let (incarnation, generation) = (member.incarnation, member.generation);
                drop(self.bed.apply(Command::VolumeWithdraw {
                    name: name.into(),
                    node,
                    incarnation,
                    generation,
                }));
            }
        }
        // Nothing is left of what it had: it asks for a new key.
        for (node, member) in self.bed.db.volumes[name].members.clone() {
            let asks = member.state == MemberState::Fenced && self.bed.db.nodes[&node].is_up();
            if asks && awake(&node) && self.path(node, name) == PathState::Good {
                self.bed.admit(name, node.0);
            }
        }
    }

    fn obey_owner(&mut self, name: &str, volume: &Volume, owner: NodeId) {
        let (epoch, key) = (volume.epoch, (owner, name.to_owned()));
        let fenced = volume.to_fence();
        let works = self.path(owner, name) == PathState::Good && !self.no_csvfs.contains(&key);
        let name = name.to_owned();
        match &volume.state {
            VolumeState::Starting { .. } if works && self.bad_starts.contains(&owner) => {
                let why = "bad".into();
                self.bed.ok(Command::VolumeStartFailed { name, epoch, node: owner, why });
            }
            VolumeState::Starting { .. } if works => {
                self.bed.ok(Command::VolumeOnline { name, epoch, node: owner, fenced });
                self.roles.insert(key, epoch.0);
            }
            VolumeState::Releasing { .. } if works => {
                self.roles.remove(&key);
                self.bed.ok(Command::VolumeReleased { name, epoch, node: owner });
            }
            VolumeState::Online if !fenced.is_empty() && works => {
                self.bed.ok(Command::VolumeFenced { name, epoch, fenced });
            }
            VolumeState::Starting { .. }
            | VolumeState::Online
            | VolumeState::Releasing { .. }
            | VolumeState::Offline { .. }
            | VolumeState::Failed { .. } => {}
        }
    }

    /// Nodes that could serve the volume.
    fn capable(&self, name: &str) -> Vec<NodeId> {
        let fit = |node: &&NodeId| {
            let key = (**node, name.to_owned());
            let takes = self.bed.db.nodes[node].admin == AdminState::Active;
            takes && self.path(**node, name) == PathState::Good && !self.no_csvfs.contains(&key)
        };
        self.alive.iter().filter(fit).copied().collect()
    }
}

fn set(set: &mut BTreeSet<NodeId>, node: NodeId, yes: bool) {
    if yes {
        set.insert(node);
    } else {
        set.remove(&node);
    }
}

fn fault() -> impl Strategy<Value = Fault> {
    let (node, volume) = (1..=4u32, 0..3usize);
    let path = prop_oneof![Just(PathState::Good), Just(PathState::None), Just(PathState::Failed)];
    prop_oneof![
        3 => node.clone().prop_map(Fault::Crash),
        3 => node.clone().prop_map(Fault::Boot),
        3 => (node.clone(), volume.clone(), path).prop_map(|(node, volume, path)| Fault::Path(node, volume, path)),
        2 => (node.clone(), volume.clone(), any::<bool>()).prop_map(|(a, b, c)| Fault::Csvfs(a, b, c)),
        1 => (node.clone(), any::<bool>()).prop_map(|(node, yes)| Fault::Hang(node, yes)),
        2 => (node.clone(), any::<bool>()).prop_map(|(node, yes)| Fault::FailStarts(node, yes)),
        1 => (node.clone(), any::<bool>()).prop_map(|(node, drain)| Fault::Pause(node, drain)),
        2 => node.prop_map(Fault::Resume),
        1 => volume.clone().prop_map(Fault::Offline),
        2 => volume.prop_map(Fault::BringOnline),
    ]
}

proptest! {
    #![proptest_config(crate::db::tests::cases(150))]

    #[test]
    fn what_can_be_online_gets_online_and_stays(
        faults in prop::collection::vec((0..40usize, fault()), 0..25),
    ) {
        let mut world = World::new(4);
        for (rounds, fault) in faults {
            for _ in 0..rounds {
                world.round();
            }
            world.fault(&fault);
        }
        world.hung.clear();
        world.bad_starts.clear();
        for _ in 0..600 {
            world.round();
        }
        for name in NAMES {
            let (volume, capable) = (&world.bed.db.volumes[name], world.capable(name));
            let online = volume.state == VolumeState::Online;
            if !volume.want_online {
                prop_assert!(!volume.state.owned(), "{name} was to be closed: {volume:?}");
            } else if !capable.is_empty() {
                prop_assert!(online, "{name} is not online, {capable:?} could: {volume:?}");
                let owner = volume.owner.unwrap();
                let kept = world.bed.db.nodes[&owner].admin == AdminState::Paused;
                prop_assert!(capable.contains(&owner) || kept, "{owner} of {capable:?}: {volume:?}");
                prop_assert!(volume.to_fence().is_empty());
            }
        }
        let more: usize = (0..200).map(|_| world.round()).sum();
        prop_assert_eq!(more, 0, "it does not come to rest");
    }
}

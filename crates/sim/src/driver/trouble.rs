//! Faults happen, and end.

use super::{Event, Mend, Sim};
use crate::csvd::volume_name;
use crate::csvfs::Csvfs;
use crate::event::{Input, Process};
use crate::faults::Fault;
use crate::world::network::Network;
use csv_cluster::agent::Role;
use csv_cluster::db::Command;
use csv_types::NodeId;

impl Sim {
    fn mend_later(&mut self, in_ms: u64, mend: Mend) {
        self.schedule(in_ms, Event::Mend(mend));
    }

    fn cut(&mut self, pairs: Vec<(NodeId, NodeId)>, for_ms: u64) {
        self.network.cut.extend(pairs.iter().copied());
        self.mend_later(for_ms, Mend::Cut(pairs));
    }

    pub(super) fn fault(&mut self, fault: Fault) {
        if self.quiet.is_some() {
            return;
        }
        self.note(&format!("fault: {fault:?}"));
        match fault {
            Fault::Partition(side, ms) => {
                let (here, there): (Vec<NodeId>, Vec<NodeId>) =
                    self.nodes.keys().partition(|node| side.contains(node));
                let both = |(a, b): (NodeId, NodeId)| [(a, b), (b, a)];
                let pairs = here.iter().flat_map(|a| there.iter().map(|b| (*a, *b)));
                let pairs = pairs.flat_map(both).collect();
                self.cut(pairs, ms);
            }
            Fault::OneWay(a, b, ms) => self.cut(vec![(a, b)], ms),
            Fault::Pair(a, b, ms) => self.cut(vec![(a, b), (b, a)], ms),
            Fault::Crash(node, ms) => {
                self.with_node(node, |node, ctx| node.power_off(ctx));
                self.mend_later(ms, Mend::Boot(node));
            }
            Fault::Freeze(id, ms) => {
                let until_ms = self.now_ms + ms;
                if let Some(node) = self.nodes.get_mut(&id) {
                    node.frozen_until_ms = node.frozen_until_ms.max(until_ms);
                    self.schedule(ms, Event::Wake(id));
                }
            }
            Fault::KillCsvd(node, ms) => {
                self.with_node(node, |node, ctx| node.end_csvd(ctx));
                self.mend_later(ms, Mend::Csvd(node));
            }
            Fault::KillCsvfs(id, volume) => self.kill_csvfs(id, volume),
            Fault::Path(id, volume, ms) => {
                if let Some(node) = self.nodes.get_mut(&id) {
                    node.no_path.insert(volume);
                }
                self.give_up_io(id, volume);
                self.mend_later(ms, Mend::Path(id, volume));
            }
            Fault::Storage(volume) => self.restart_storage(volume),
            Fault::LateWrites(volume, late_ms, ms) => {
                self.late_ms[volume] = late_ms;
                self.mend_later(ms, Mend::Late(volume));
            }
            Fault::BadNetwork(loss, double, late, ms) => {
                self.network.loss_per_mille = loss;
                self.network.double_per_mille = double;
                self.network.late_per_mille = late;
                self.mend_later(ms, Mend::Network);
            }
            Fault::ClockJump(id, ms) => {
                if let Some(node) = self.nodes.get_mut(&id) {
                    node.clock.wall_offset_ms += ms;
                }
            }
            Fault::Move(volume, to) => self.move_volume(volume, to),
            Fault::Drain(node, ms) => {
                self.admin(&Command::NodePause { node, drain: true });
                self.mend_later(ms, Mend::Resume(node));
            }
            Fault::Witness(ms) => {
                self.witness.broken = true;
                self.mend_later(ms, Mend::Witness);
            }
        }
    }

    fn kill_csvfs(&mut self, id: NodeId, volume: usize) {
        let Some(node) = self.nodes.get_mut(&id) else { return };
        let Some(csvfs) = &mut node.csvfs[volume] else { return };
        csvfs.dead = true;
        let life = csvfs.life;
        if !node.io_under_way.contains_key(&life) {
            node.csvfs[volume] = None;
        }
    }

    /// Nothing protects a LUN without reservations from a node that is frozen, was just given up, or was fenced and has not
    /// stopped yet, so registrations are lost only when there is none.
    fn restart_storage(&mut self, volume: usize) {
        let now_ms = self.now_ms;
        let well = self.nodes.values().all(|node| {
            node.on
                && node.frozen_until_ms <= now_ms
                && node.csvd.as_ref().is_some_and(|csvd| csvd.cut_off.is_none() && csvd.db == self.oracle.db)
        });
        let fencing = self.oracle.db.volumes.values().any(|volume| !volume.to_fence().is_empty());
        let record = self.oracle.db.volumes.get(&volume_name(volume));
        let goes_on = self.nodes.values().any(|node| {
            let admitted = record.is_some_and(|record| record.admitted(node.id).is_some());
            let stopped = |csvfs: &Csvfs| csvfs.role() == Role::Nobody && csvfs.client.suspended;
            !admitted && node.csvfs[volume].as_ref().is_some_and(|csvfs| !stopped(csvfs))
        });
        if !self.luns[volume].aptpl && (!well || fencing || goes_on) {
            return;
        }
        let everybody: Vec<NodeId> = self.nodes.keys().copied().collect();
        self.luns[volume].restart(everybody.into_iter(), &mut self.rng);
    }

    fn move_volume(&mut self, volume: usize, to: NodeId) {
        let Some(epoch) = self.oracle.db.volumes.get(&volume_name(volume)).map(|volume| volume.epoch) else {
            return;
        };
        let (name, reason) = (volume_name(volume), "the administrator wants it".to_owned());
        self.admin(&Command::VolumeRelease { name, epoch, to: Some(to), reason });
    }

    /// An administrator gives a command to whoever leads.
    pub(super) fn admin(&mut self, command: &Command) {
        for id in self.nodes.keys().copied().collect::<Vec<_>>() {
            let command = command.clone();
            let awake = self.nodes.get(&id).is_some_and(|node| node.frozen_until_ms <= self.now_ms);
            if awake {
                self.with_node(id, |node, ctx| {
                    if let Some(csvd) = &mut node.csvd {
                        csvd.admin(ctx, command);
                    }
                });
            }
        }
    }

    pub(super) fn mend(&mut self, mend: Mend) {
        match mend {
            Mend::Cut(pairs) => {
                for pair in pairs {
                    self.network.cut.remove(&pair);
                }
            }
            Mend::Boot(id) => self.boot(id),
            Mend::Csvd(id) => self.start_csvd(id),
            Mend::Path(id, volume) => {
                if let Some(node) = self.nodes.get_mut(&id) {
                    node.no_path.remove(&volume);
                }
                // A login anew, as after a boot.
                self.luns[volume].abort(id, &mut self.rng);
            }
            Mend::Late(volume) => self.late_ms[volume] = 0,
            Mend::Network => {
                let cut = std::mem::take(&mut self.network.cut);
                self.network = Network { cut, ..Network::good() };
            }
            Mend::Resume(node) => self.admin(&Command::NodeResume { node }),
            Mend::Witness => self.witness.broken = false,
        }
    }

    pub(super) fn boot(&mut self, id: NodeId) {
        let Some(node) = self.nodes.get_mut(&id).filter(|node| !node.on) else { return };
        node.on = true;
        node.boots += 1;
        for lun in &mut self.luns {
            lun.abort(id, &mut self.rng);
        }
        self.note(&format!("{id} boots"));
        self.start_csvd(id);
    }

    pub(super) fn start_csvd(&mut self, id: NodeId) {
        let members = self.members.clone();
        let witness = self.plan.witness;
        let started = self.with_node(id, |node, ctx| {
            let starts = node.on && node.csvd.is_none();
            if starts {
                node.start_csvd(ctx, &members, witness);
            }
            starts
        });
        if started == Some(true) {
            self.after(id, 10, Process::Csvd, Input::Tick);
        }
    }
}

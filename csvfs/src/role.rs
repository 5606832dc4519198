//! What this node is for the volume: its coordinator, a data server of another node's, or (for a moment) neither.
//!
//! ```text
//!              Take                              Take
//!      ┌──────────────────► Owner ◄──────────────────────┐
//!   Nobody ◄─ HandOver, Suspend ─┘ └─ Follow (lost) ─► Follower
//!      └──────────────────── Follow ─────────────────────┘
//! ```
//!
//! The FUSE session, open files and held layouts stay whatever happens here: the client's link is swapped, and calls wait
//! meanwhile. Orders are carried out one at a time; each may come again and is then answered at once. Orders of an
//! earlier epoch than the last one are refused: they were overtaken. Two things do not wait for the order that is being
//! carried out: Suspend stops this node's direct I/O at once (its turn is for the rest), and the status is told.
//!
//! When the owner cannot let go of the file system in time (something hangs in the kernel), or a Suspend does not get its
//! turn in time, the process ends: that takes the mount with it.

use crate::app::App;
use crate::fuse::hidden::Open;
use crate::takeover::{Takeover, mark_unused, mount_note};
use crate::{export, link};
use anyhow::{Context, Result, anyhow, bail};
use csv_coordinator::Coordinator;
use csv_types::admin::{RoleKind, RoleOrder, RoleStatus, TakeOrder};
use csv_types::config::NodeConfig;
use csv_types::{Epoch, NodeId};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

/// Time for calls and block I/O that are under way at a hand-over.
const DRAIN_LIMIT: Duration = Duration::from_secs(3);
/// Time for the last users of the file system to let go of it.
const RELEASE_LIMIT: Duration = Duration::from_secs(10);
/// Between looks whether the kernel has let go of the device.
const RELEASE_STEP: Duration = Duration::from_millis(2);

/// See the module.
#[derive(Debug, Default)]
pub(crate) enum Role {
    #[default]
    Nobody,
    Owner(Owner),
    Follower {
        epoch: Epoch,
        owner: NodeId,
        task: tokio::task::JoinHandle<()>,
    },
}

/// What the owner has.
#[derive(Debug)]
pub(crate) struct Owner {
    pub(crate) coordinator: Arc<Coordinator>,
    open: Open,
    local: link::local::Local,
}

impl Role {
    fn kind(&self) -> RoleKind {
        match self {
            Role::Nobody => RoleKind::Nobody,
            Role::Owner(owner) => RoleKind::Owner { epoch: owner.coordinator.options().epoch },
            Role::Follower { epoch, owner, .. } => RoleKind::Follower { epoch: *epoch, owner: *owner },
        }
    }
}

/// How an ownership ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    /// Everything is written; the next coordinator goes on.
    HandOver,
    /// As after a power cut.
    Lost,
}

impl App {
    /// Carries an order out.
    pub(crate) fn role_order(self: &Arc<Self>, order: RoleOrder) -> Result<()> {
        if let RoleOrder::Suspend { reason } = order {
            return self.suspend(reason);
        }
        let mut role = self.role.lock();
        let done = self.carry_out(&mut role, order);
        *self.role_noted.lock() = role.kind();
        done
    }

    fn carry_out(self: &Arc<Self>, role: &mut Role, order: RoleOrder) -> Result<()> {
        match order {
            RoleOrder::Take(order) => self.take(role, &order),
            RoleOrder::HandOver { epoch } => self.hand_over(role, epoch),
            RoleOrder::Follow { epoch, owner, nodes, key, unregistered } => {
                self.set_key(key);
                self.client.modes.unregistered(unregistered);
                self.follow(role, epoch, &owner, nodes)
            }
            RoleOrder::Gone { epoch, nodes } => match role {
                Role::Owner(owner) if owner.coordinator.options().epoch == epoch => {
                    owner.coordinator.nodes_gone(&nodes);
                    Ok(())
                }
                Role::Owner(_) | Role::Nobody | Role::Follower { .. } => {
                    bail!("this node does not coordinate {} in epoch {epoch}", self.volume.name)
                }
            },
            RoleOrder::Nodes { nodes } => {
                if let Role::Owner(owner) = role {
                    let named = nodes.iter().map(|node| (node.id, node.name.clone())).collect();
                    owner.coordinator.set_nodes(named);
                }
                self.nodes.write().all = nodes;
                Ok(())
            }
            RoleOrder::Suspend { reason } => bail!("{reason}: not in its turn"),
        }
    }

    /// Another node may write soon: this node's I/O stops before anything else is waited for.
    fn suspend(&self, reason: String) -> Result<()> {
        let text = format!("direct I/O stops, and so does a coordinator here: {reason}");
        let before = self.client.is_suspended();
        let _stop = self.gate.close(|| self.client.suspend(reason));
        if !before {
            self.client.events.report("suspended", text);
        }
        let Some(mut role) = self.role.try_lock_for(RELEASE_LIMIT) else {
            let text = "an order does not end, and I/O has to stop; csvfs ends".into();
            self.client.events.report("order-stuck", text);
            self.end_now();
            bail!("csvfs ends");
        };
        let left = self.leave(&mut role, End::Lost);
        if left.is_ok() {
            self.wait_quiet();
        }
        *self.role_noted.lock() = role.kind();
        left
    }

    /// Direct I/O may go on; not so when it was stopped since the order came.
    fn resume(&self) -> Result<()> {
        if !self.gate.open(|| self.client.resume()) {
            bail!("I/O has to stop on this node");
        }
        Ok(())
    }

    fn take(self: &Arc<Self>, role: &mut Role, order: &TakeOrder) -> Result<()> {
        if let Role::Owner(owner) = &*role {
            let epoch = owner.coordinator.options().epoch;
            if epoch == order.epoch {
                owner.coordinator.nodes_gone(&order.gone);
                return Ok(());
            }
        }
        self.not_late(order.epoch)?;
        self.set_key(order.key);
        self.client.modes.unregistered(false);
        let lun = self.client.modes.lun().context("this node has no path to the volume's LUN")?;
        self.leave(role, End::Lost)?;
        self.set_nodes(order.nodes.clone(), Some(self.client.node));
        let takeover = Takeover {
            config: &self.config,
            volume: &self.volume,
            client: &self.client,
            lun: &lun,
            heartbeat: &self.heartbeat,
        };
        let coordinator = takeover.run(order)?;
        self.seen(order.epoch);
        let lost = !self.heartbeat.mounted(&coordinator);
        let resumed = if lost { Err(anyhow!("another node has taken the volume")) } else { self.resume() };
        if let Err(error) = resumed {
            self.forget_mount();
            coordinator.crash();
            self.unmount(coordinator);
            return Err(error);
        }
        self.client.set_coordinator(true);
        let open = self.hidden.open(coordinator.clone(), lun);
        let local = match link::local::connect(&self.client, &coordinator, self.hello()) {
            Ok(local) => local,
            Err(error) => {
                self.client.set_coordinator(false);
                self.hidden.close(&open, RELEASE_LIMIT);
                if coordinator.stop().is_err() {
                    self.forget_mount();
                }
                self.unmount(coordinator);
                return Err(error);
            }
        };
        self.place.set(&coordinator);
        *role = Role::Owner(Owner { coordinator, open, local });
        let text =
            format!("this node coordinates {} from now on, in epoch {}", self.volume.name, order.epoch);
        self.client.events.report("coordinator-here", text);
        Ok(())
    }

    fn hand_over(&self, role: &mut Role, epoch: Epoch) -> Result<()> {
        match &*role {
            Role::Owner(owner) if owner.coordinator.options().epoch == epoch => {
                self.leave(role, End::HandOver)
            }
            Role::Owner(owner) => {
                bail!(
                    "{} is coordinated here in epoch {}",
                    self.volume.name,
                    owner.coordinator.options().epoch
                )
            }
            // Done before, or never begun: the file system is not mounted here.
            Role::Nobody | Role::Follower { .. } => Ok(()),
        }
    }

    fn follow(
        self: &Arc<Self>,
        role: &mut Role,
        epoch: Epoch,
        owner: &NodeConfig,
        nodes: Vec<NodeConfig>,
    ) -> Result<()> {
        if let Role::Follower { epoch: now, owner: whom, .. } = &*role
            && (*now, *whom) == (epoch, owner.id)
        {
            self.resume()?;
            self.set_nodes(nodes, Some(owner.id));
            return Ok(());
        }
        if owner.id == self.client.node {
            bail!("a node cannot be its own data server");
        }
        self.not_late(epoch)?;
        self.leave(role, End::Lost)?;
        self.seen(epoch);
        self.resume()?;
        self.set_nodes(nodes, Some(owner.id));
        self.reach_smb(owner)?;
        let target = link::remote::Target {
            addr: self.config.control_addr(owner, &self.volume),
            name: owner.name.clone(),
            hello: self.hello(),
        };
        let tls = link::remote::tls(&self.config.local.secrets_dir, &owner.name)?;
        let task = self.runtime.spawn(link::remote::keep(self.client.clone(), target, tls));
        *role = Role::Follower { epoch, owner: owner.id, task };
        Ok(())
    }

    /// By the key the LUN's layer tells a fence from a path that failed.
    fn set_key(&self, key: Option<u64>) {
        if let Some(lun) = self.client.modes.lun() {
            lun.set_reservation_key(key);
        }
    }

    fn reach_smb(&self, owner: &NodeConfig) -> Result<()> {
        let mut smb = self.client.smb.write();
        match &*smb {
            Some(pool) => {
                let addr = self.config.smb_addr(owner, &self.volume);
                pool.retarget(addr.ip(), addr.port());
            }
            None => *smb = Some(export::pool(&self.config, owner, &self.volume)?),
        }
        Ok(())
    }

    /// The volume is another node's by now.
    pub(crate) fn lose(&self, role: &mut Role) {
        if let Err(error) = self.leave(role, End::Lost) {
            tracing::error!(%error, "leaving the volume");
        }
        *self.role_noted.lock() = role.kind();
    }

    /// Ends what the node is now.
    fn leave(&self, role: &mut Role, how: End) -> Result<()> {
        match std::mem::take(role) {
            Role::Nobody => Ok(()),
            Role::Follower { task, .. } => {
                task.abort();
                self.client.chan.unlinked();
                Ok(())
            }
            Role::Owner(owner) => self.let_go(owner, how),
        }
    }

    fn let_go(&self, owner: Owner, how: End) -> Result<()> {
        let Owner { coordinator, open, local } = owner;
        let epoch = coordinator.options().epoch;
        let began = Instant::now();
        self.place.clear();
        // Block I/O of other nodes first: what they repeat elsewhere must not happen here any more.
        if how == End::Lost {
            self.forget_mount();
            coordinator.crash();
        }
        if !self.hidden.close(&open, DRAIN_LIMIT) {
            self.client.events.report("hand-over", "I/O of other nodes is not over in time".into());
        }
        let mut clean = false;
        if how == End::HandOver {
            let went = coordinator.hand_over(DRAIN_LIMIT);
            clean = went.synced.is_ok();
            if went.unfinished > 0 {
                let text =
                    format!("{} calls are not over in time; they are asked about later", went.unfinished);
                self.client.events.report("hand-over", text);
            }
            if let Err(errno) = went.synced {
                self.forget_mount();
                self.client.events.report("hand-over", format!("the last sync failed: {errno}"));
            }
        }
        self.client.set_coordinator(false);
        local.end();
        self.client.chan.unlinked();
        self.unmount(coordinator);
        if clean && let Some(lun) = self.client.modes.lun() {
            mark_unused(&lun, epoch)?;
        }
        let text = match how {
            End::HandOver => format!("handed over after {} ms, epoch {epoch}", began.elapsed().as_millis()),
            End::Lost => format!("this node coordinates {} no more, epoch {epoch}", self.volume.name),
        };
        self.client.events.report("coordinator-left", text);
        Ok(())
    }

    /// The file system was shut down with data that is not on the LUN. After a power cut the boot is another one, which the
    /// next owner sees by the note; here it is not.
    pub(crate) fn forget_mount(&self) {
        let _ = std::fs::remove_file(mount_note(&self.config, &self.volume.name));
    }

    /// Waits until nothing is under way on the LUN. What never ends there ends with the process.
    fn wait_quiet(&self) {
        let deadline = Instant::now() + RELEASE_LIMIT;
        while !self.client.is_quiet() {
            if Instant::now() >= deadline {
                let text = "I/O on the LUN does not end; csvfs ends, which the kernel waits for".into();
                self.client.events.report("io-stuck", text);
                self.end_now();
            }
            std::thread::sleep(RELEASE_STEP);
        }
    }

    /// What this node is now, for csvd, without waiting. While an order is carried out: what it was before, and not suspended,
    /// because there may be a file system that is being mounted or unmounted.
    pub(crate) fn role_status(&self) -> RoleStatus {
        let (mode, _) = self.client.modes.current();
        let role = self.role.try_lock();
        RoleStatus {
            role: role.as_ref().map_or_else(|| *self.role_noted.lock(), |role| role.kind()),
            suspended: role.is_some() && self.client.is_suspended(),
            refused_by_lun: self.client.is_refused_by_lun(),
            unregistered: self.client.modes.is_unregistered(),
            mode,
        }
    }

    /// Gives the last reference up. The heartbeat ends when the file system is unmounted.
    fn unmount(&self, coordinator: Arc<Coordinator>) {
        let weak = Arc::downgrade(&coordinator);
        drop(coordinator);
        self.wait_unmounted(&weak);
        self.heartbeat.end();
    }

    /// Waits until nobody has the file system mounted. The kernel tells nobody when it is done, so it is asked.
    fn wait_unmounted(&self, coordinator: &Weak<Coordinator>) {
        let deadline = Instant::now() + RELEASE_LIMIT;
        let mounted = || match &self.volume.lun {
            Some(device) => !matches!(csv_lun::is_mounted(device), Ok(None)),
            None => false,
        };
        while coordinator.strong_count() > 0 || mounted() {
            if Instant::now() >= deadline {
                self.client.events.report(
                    "unmount-stuck",
                    "the file system cannot be unmounted in time; csvfs ends, which unmounts it".into(),
                );
                self.end_now();
            }
            std::thread::sleep(RELEASE_STEP);
        }
    }

    fn not_late(&self, epoch: Epoch) -> Result<()> {
        let last = *self.last_epoch.lock();
        if epoch < last {
            bail!("an order of epoch {epoch} comes too late, the volume is in epoch {last}");
        }
        Ok(())
    }

    fn seen(&self, epoch: Epoch) {
        *self.last_epoch.lock() = epoch;
    }
}

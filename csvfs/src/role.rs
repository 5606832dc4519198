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
//! earlier epoch than the last one are refused: they were overtaken.
//!
//! When the owner cannot let go of the file system in time (something hangs in the kernel), the process ends: that
//! takes the mount with it.

use crate::app::App;
use crate::fuse::hidden::Open;
use crate::takeover::{Takeover, mount_note};
use crate::{export, link};
use anyhow::{Context, Result, bail};
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
        let mut role = self.role.lock();
        match order {
            RoleOrder::Take(order) => self.take(&mut role, &order),
            RoleOrder::HandOver { epoch } => self.hand_over(&mut role, epoch),
            RoleOrder::Follow { epoch, owner, nodes } => self.follow(&mut role, epoch, &owner, nodes),
            RoleOrder::Gone { epoch, nodes } => match &*role {
                Role::Owner(owner) if owner.coordinator.options().epoch == epoch => {
                    owner.coordinator.nodes_gone(&nodes);
                    Ok(())
                }
                Role::Owner(_) | Role::Nobody | Role::Follower { .. } => {
                    bail!("this node does not coordinate {} in epoch {epoch}", self.volume.name)
                }
            },
            RoleOrder::Suspend { reason } => {
                if !self.client.is_suspended() {
                    let text = format!("direct I/O stops, and so does a coordinator here: {reason}");
                    self.client.events.report("suspended", text);
                }
                self.client.suspend(reason);
                self.leave(&mut role, End::Lost)?;
                self.wait_quiet();
                Ok(())
            }
        }
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
        let lun = self.client.modes.lun().context("this node has no path to the volume's LUN")?;
        self.leave(role, End::Lost)?;
        self.set_nodes(order.nodes.clone(), Some(self.client.node));
        let takeover =
            Takeover { config: &self.config, volume: &self.volume, client: &self.client, lun: &lun };
        let coordinator = takeover.run(order)?;
        self.seen(order.epoch);
        self.client.resume();
        self.client.set_coordinator(true);
        let open = self.hidden.open(coordinator.clone(), lun);
        let local = match link::local::connect(&self.client, &coordinator, self.hello()) {
            Ok(local) => local,
            Err(error) => {
                self.client.set_coordinator(false);
                self.hidden.close(&open, RELEASE_LIMIT);
                coordinator.stop();
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
            self.client.resume();
            self.set_nodes(nodes, Some(owner.id));
            return Ok(());
        }
        if owner.id == self.client.node {
            bail!("a node cannot be its own data server");
        }
        self.not_late(epoch)?;
        self.leave(role, End::Lost)?;
        self.seen(epoch);
        self.client.resume();
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
            // After a power cut the boot is another; here it is not.
            let _ = std::fs::remove_file(mount_note(&self.config, &self.volume.name));
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
                self.client.events.report("hand-over", format!("the last sync failed: {errno}"));
            }
        }
        self.client.set_coordinator(false);
        local.end();
        self.client.chan.unlinked();
        let weak = Arc::downgrade(&coordinator);
        drop(coordinator);
        self.wait_unmounted(&weak);
        if clean && let Some(lun) = self.client.modes.lun() {
            csv_lun::label::mark_unused(&lun, epoch)?;
        }
        let text = match how {
            End::HandOver => format!("handed over after {} ms, epoch {epoch}", began.elapsed().as_millis()),
            End::Lost => format!("this node coordinates {} no more, epoch {epoch}", self.volume.name),
        };
        self.client.events.report("coordinator-left", text);
        Ok(())
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

    /// What this node is now, for csvd. While an order is carried out: nobody yet.
    pub(crate) fn role_status(&self) -> RoleStatus {
        let (mode, _) = self.client.modes.current();
        RoleStatus {
            role: match &*self.role.lock() {
                Role::Nobody => RoleKind::Nobody,
                Role::Owner(owner) => RoleKind::Owner { epoch: owner.coordinator.options().epoch },
                Role::Follower { epoch, owner, .. } => RoleKind::Follower { epoch: *epoch, owner: *owner },
            },
            suspended: self.client.is_suspended(),
            refused_by_lun: self.client.is_refused_by_lun(),
            mode,
        }
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

//! What is asked of groups from outside the driver: by csvctl, and by a csvd that begins a new life.

use super::migrate::GroupRequest;
use super::properties;
use crate::engine::{Engine, unix_ms};
use anyhow::{Context, Result, anyhow, bail};
use chrono::{Local, Offset};
use csv_cluster::groups::balance::{Trigger, balance};
use csv_cluster::groups::candidates::{explain, verdicts};
use csv_cluster::groups::manager::{GroupView, waiting};
use csv_resource::api::{NodeInfo, TypeInfo};
use csv_resource::client::{Host, HostEvent};
use csv_resource::protocol::{FromHost, ToHost};
use csv_types::NodeId;
use csvd::groups::{Candidate, Moving, Waiting};
use serde_json::Value;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::sync_channel;
use std::time::Duration;

/// For what a resource does on request; csvctl waits a little longer.
const CONTROL_LIMIT: Duration = Duration::from_secs(150);
const ASK_LIMIT: Duration = Duration::from_secs(5);
/// For a host to end everything.
const END_LIMIT: Duration = Duration::from_secs(15);

impl Engine {
    /// What the manager of groups sees.
    pub(crate) fn group_view(&self) -> GroupView {
        let offset_s = Local::now().offset().fix().local_minus_utc();
        GroupView {
            now_unix_ms: unix_ms(),
            utc_offset_min: offset_s / 60,
            me: self.me(),
            reports: self.all_reports(),
        }
    }

    /// See `ClusterRequest::ResourceTypes`.
    pub(crate) fn resource_types(&self, kind: Option<&str>) -> Result<Vec<TypeInfo>> {
        let db = self.db.read().clone();
        properties::describe(&db, kind)
    }

    /// See `ClusterRequest::GroupsWaiting`.
    pub(crate) fn groups_waiting(&self) -> Waiting {
        waiting(&self.db.read(), &self.group_view())
    }

    /// See `ClusterRequest::Candidates`.
    pub(crate) fn candidates(&self, group: &str) -> Result<Vec<Candidate>> {
        let view = self.group_view();
        let db = self.db.read();
        if !db.groups.contains_key(group) {
            bail!("there is no group \"{group}\"; see `csvctl group list`");
        }
        let fit = verdicts(&db, &view, group);
        let is_fit = |node: NodeId| fit.iter().any(|(of, verdict)| *of == node && verdict.is_ok());
        let row =
            |(node, why): (NodeId, String)| Candidate { node: db.node_name(node), fit: is_fit(node), why };
        Ok(explain(&db, &view, group).into_iter().map(row).collect())
    }

    /// See `ClusterRequest::BalanceDryRun`.
    pub(crate) fn balance_dry_run(&self) -> csv_cluster::groups::balance::Balance {
        balance(&self.db.read(), &self.group_view(), Trigger::DryRun)
    }

    /// See `ClusterRequest::Control`.
    pub(crate) async fn control_resource(
        self: &Arc<Self>,
        resource: &str,
        verb: String,
        arguments: Value,
    ) -> Result<Value> {
        let owner = {
            let db = self.db.read();
            let of = db.resources.get(resource);
            let of = of.with_context(|| {
                format!("there is no resource \"{resource}\"; see `csvctl resource list`")
            })?;
            let group = db.groups.get(&of.group).context("its group is gone")?;
            group.owner.with_context(|| {
                format!(
                    "group {} is on no node now; start it with `csvctl group online {}`",
                    of.group, of.group
                )
            })?
        };
        let request = GroupRequest::Control { resource: resource.to_owned(), verb, arguments };
        self.ask_about_groups(owner, request, CONTROL_LIMIT).await.map_err(|why| anyhow!("{resource}: {why}"))
    }

    /// See `ClusterRequest::MoveProgress`.
    pub(crate) async fn move_progress(self: &Arc<Self>, group: &str) -> Result<Moving> {
        let owner = self.db.read().groups.get(group).and_then(|group| group.owner);
        let Some(owner) = owner else { return Ok(None) };
        let answer =
            self.ask_about_groups(owner, GroupRequest::Progress { name: group.to_owned() }, ASK_LIMIT).await;
        Ok(serde_json::from_value(answer.map_err(|why| anyhow!(why))?)?)
    }
}

/// Ends every resource host of this machine's former life, with what it has online. Before a new life begins under another name
/// or number: nobody would tell those hosts when they must end.
pub(crate) fn end_hosts_of_a_former_life(run_dir: &Path) {
    let nobody = NodeInfo {
        cluster: String::new(),
        cluster_id: String::new(),
        node: String::new(),
        node_id: 0,
        addr: String::new(),
        run_dir: run_dir.to_owned(),
        state_dir: run_dir.to_owned(),
        mount_dir: run_dir.to_owned(),
        secrets_dir: run_dir.to_owned(),
        luns: Default::default(),
    };
    for name in Host::list(run_dir) {
        let (tell, heard) = sync_channel(64);
        let hears = Box::new(move |event| drop(tell.try_send(event)));
        let Ok(Some(host)) = Host::adopt(run_dir, &name, nobody.clone(), hears) else { continue };
        let _told = host.say(&ToHost::Lease { for_ms: 0, at_boot_ms: None });
        let deadline = std::time::Instant::now() + END_LIMIT;
        loop {
            let left = deadline.saturating_duration_since(std::time::Instant::now());
            match heard.recv_timeout(left) {
                Ok(HostEvent::Said(FromHost::LeaseOver { left })) => {
                    for (resource, why) in left {
                        tracing::error!(resource, "could not be ended: {why}");
                    }
                    break;
                }
                Ok(HostEvent::Said(_)) => {}
                Ok(HostEvent::Gone { .. }) | Err(_) => break,
            }
        }
        let _told = host.say(&ToHost::End);
        if !host.wait_for_end(ASK_LIMIT) {
            host.kill();
        }
    }
}

//! Asking csvd, with errors that tell what to do next.

use crate::lab;
use anyhow::{Context, anyhow, bail};
use csv_cluster::db::{Applied, ClusterDb, Command};
use csv_types::admin::ClusterRequest;
use csv_types::admin::{Answer, Request};
use csv_types::config::{LocalConfig, NodeFile};
use csvd::client::{self, ClientError};
use serde::de::DeserializeOwned;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Longer than anything that csvd waits for.
const ASK_LIMIT: Duration = Duration::from_secs(180);

/// Which node's csvd is meant.
#[derive(Debug, Clone)]
pub(crate) struct Target {
    pub(crate) config: PathBuf,
    /// Lab named on the command line.
    pub(crate) lab: Option<String>,
    /// Node of the lab.
    pub(crate) on: String,
}

impl Target {
    /// Goes where the command is to act: into a lab's node if one is named, or if this host is no cluster node and
    /// one lab runs. Then reads the configuration there.
    pub(crate) fn enter(&self) -> anyhow::Result<LocalConfig> {
        let implied = || -> Option<String> {
            let here = std::env::var_os("CSV_NODE").is_some() || self.config.exists();
            match lab::names().ok()?.as_slice() {
                [only] if !here => Some(only.clone()),
                _ => None,
            }
        };
        if let Some(name) = self.lab.clone().or_else(implied) {
            lab::enter(&lab::Lab::load(&name)?, &self.on)?;
        }
        load_config(&self.config)
    }

    /// Goes into a lab's node only if a lab is named: for what concerns a machine that is no cluster node yet.
    pub(crate) fn enter_named(&self) -> anyhow::Result<()> {
        match &self.lab {
            Some(name) => lab::enter(&lab::Lab::load(name)?, &self.on),
            None => Ok(()),
        }
    }
}

fn load_config(path: &Path) -> anyhow::Result<LocalConfig> {
    let text = fs::read_to_string(path).map_err(|e| {
        if e.kind() != ErrorKind::NotFound {
            return anyhow!("cannot read {}: {e}; run csvctl as root", path.display());
        }
        let labs = lab::names().unwrap_or_default();
        let labs = match labs.as_slice() {
            [] => "or make a lab with `csvctl lab up`".to_owned(),
            names => format!("or choose one of the labs {} with --lab", names.join(", ")),
        };
        let path = path.display();
        anyhow!("{path} is not there: this host is no cluster node; give the file with --config, {labs}")
    })?;
    Ok(NodeFile::parse(&text).with_context(|| format!("in {}", path.display()))?.local)
}

/// Asks the csvd of this configuration.
pub(crate) fn ask(config: &LocalConfig, request: &Request) -> anyhow::Result<Answer> {
    ask_socket(&config.run_dir.join("csvd.sock"), request, ASK_LIMIT)
}

/// Asks the csvd of this configuration about the cluster.
pub(crate) fn ask_cluster(config: &LocalConfig, what: ClusterRequest) -> anyhow::Result<serde_json::Value> {
    let answer = ask(config, &Request::Cluster { what })?;
    let Answer::Cluster { data } = answer else {
        bail!("csvd answered {answer:?}; csvctl and csvd must be of one version")
    };
    Ok(data)
}

/// Asks about the cluster what has an answer of that type.
pub(crate) fn ask_typed<T: DeserializeOwned>(
    config: &LocalConfig,
    what: ClusterRequest,
) -> anyhow::Result<T> {
    serde_json::from_value(ask_cluster(config, what)?)
        .context("csvd's answer is not understood; csvctl and csvd must be of one version")
}

/// The cluster's database, without its secrets.
pub(crate) fn database(config: &LocalConfig) -> anyhow::Result<ClusterDb> {
    ask_typed(config, ClusterRequest::Db)
}

/// Gives the cluster a command; the answer says whether it changed anything.
pub(crate) fn give(config: &LocalConfig, command: &Command) -> anyhow::Result<Applied> {
    let command = serde_json::to_value(command)?;
    ask_typed(config, ClusterRequest::Command { command })
}

/// Gives the cluster a command.
pub(crate) fn command(config: &LocalConfig, command: &Command) -> anyhow::Result<()> {
    give(config, command).map(drop)
}

/// Asks the csvd behind a socket.
pub(crate) fn ask_socket(socket: &Path, request: &Request, limit: Duration) -> anyhow::Result<Answer> {
    client::call(socket, request, limit).map_err(advise)
}

/// Adds what to do next.
pub(crate) fn advise(error: ClientError) -> anyhow::Error {
    let advice = match &error {
        ClientError::Connect { source, .. } if source.kind() == ErrorKind::PermissionDenied => {
            "only root may ask csvd; run csvctl as root"
        }
        ClientError::Connect { .. } => {
            "csvd is not running; start it with `csvd --config FILE`, in a lab \
             with `csvctl lab restart NODE`"
        }
        ClientError::Unknown { .. } => {
            "the request may have been carried out; look with `csvctl volume state` or `csvctl group list`, and repeat it if \
             need be"
        }
        ClientError::Protocol { .. } | ClientError::Refused(_) => return error.into(),
    };
    anyhow!("{error}; {advice}")
}

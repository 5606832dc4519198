//! Asking csvd, with errors that tell what to do next.

use crate::lab;
use anyhow::{Context, anyhow};
use csv_types::admin::{Answer, Request};
use csv_types::config::Config;
use csvd::client::{self, ClientError};
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::Duration;

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
    pub(crate) fn enter(&self) -> anyhow::Result<Config> {
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
}

fn load_config(path: &Path) -> anyhow::Result<Config> {
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
    Config::parse(&text).with_context(|| format!("in {}", path.display()))
}

/// Asks the csvd of this configuration.
pub(crate) fn ask(config: &Config, request: &Request) -> anyhow::Result<Answer> {
    let limit = Duration::from_millis(config.cluster.op_timeout_ms) + Duration::from_secs(10);
    ask_socket(&config.local.run_dir.join("csvd.sock"), request, limit)
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
            "the request may have been carried out; look at `csvctl volume state` and repeat it if need be"
        }
        ClientError::Protocol { .. } | ClientError::Refused(_) => return error.into(),
    };
    anyhow!("{error}; {advice}")
}

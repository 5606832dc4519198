//! A double of the host for tests of resource types: keeps what a resource says, and a temporary node.

use crate::api::{
    Context, EventLevel, Failure, NodeInfo, Resource, ResourceType, Services, Spec, check_properties,
};
use crate::types::settings::Properties;
use parking_lot::{Condvar, Mutex};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tempfile::TempDir;

/// A node and what its host was told.
#[derive(Debug, Clone)]
pub(crate) struct Bed(Arc<Double>);

#[derive(Debug)]
struct Double {
    dir: TempDir,
    node: NodeInfo,
    cancelled: AtomicBool,
    told: Mutex<Told>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Told {
    reports: Vec<Result<(), String>>,
    events: Vec<(EventLevel, String)>,
    saved: Option<serde_json::Value>,
    /// Nothing can be saved.
    is_full: bool,
}

impl Bed {
    pub(crate) fn new() -> Bed {
        Bed::of_node(1)
    }

    /// A node by number, with directories of its own.
    pub(crate) fn of_node(node_id: u32) -> Bed {
        let dir = tempfile::Builder::new().prefix("rt").tempdir().unwrap();
        let sub = |name: &str| {
            let path = dir.path().join(name);
            std::fs::create_dir(&path).unwrap();
            path
        };
        let node = NodeInfo {
            cluster: "bed".into(),
            cluster_id: "11111111-2222-3333-4444-555555555555".into(),
            node: format!("n{node_id}"),
            node_id,
            addr: "127.0.0.1".into(),
            run_dir: sub("run"),
            state_dir: sub("state"),
            mount_dir: sub("mnt"),
            secrets_dir: sub("secrets"),
            luns: std::collections::BTreeMap::new(),
        };
        Bed::with(dir, node)
    }

    fn with(dir: TempDir, node: NodeInfo) -> Bed {
        Bed(Arc::new(Double {
            dir,
            node,
            cancelled: AtomicBool::new(false),
            told: Mutex::default(),
            changed: Condvar::new(),
        }))
    }

    /// As [`Bed::of_node`], with devices by name and the cluster's identity.
    pub(crate) fn changed(node_id: u32, change: impl FnOnce(&mut NodeInfo)) -> Bed {
        let Bed(double) = Bed::of_node(node_id);
        let double = Arc::into_inner(double).unwrap();
        let mut node = double.node;
        change(&mut node);
        Bed::with(double.dir, node)
    }

    pub(crate) fn node(&self) -> &NodeInfo {
        &self.0.node
    }

    pub(crate) fn dir(&self) -> &Path {
        self.0.dir.path()
    }

    pub(crate) fn context(&self) -> Context {
        Arc::clone(&self.0) as Context
    }

    pub(crate) fn cancel(&self) {
        self.0.cancelled.store(true, Ordering::SeqCst);
    }

    pub(crate) fn saved(&self) -> Option<serde_json::Value> {
        self.0.told.lock().saved.clone()
    }

    /// From now on nothing can be saved, or it can again.
    pub(crate) fn set_full(&self, is_full: bool) {
        self.0.told.lock().is_full = is_full;
    }

    pub(crate) fn events(&self) -> Vec<String> {
        self.0.told.lock().events.iter().map(|(_, text)| text.clone()).collect()
    }

    /// Waits for a report of failure.
    pub(crate) fn failure_reported(&self, patience: Duration) -> Option<String> {
        let mut told = self.0.told.lock();
        let failure = |told: &Told| told.reports.iter().find_map(|report| report.as_ref().err().cloned());
        self.0.changed.wait_while_for(&mut told, |told| failure(told).is_none(), patience);
        failure(&told)
    }

    /// Opens a resource as a host does, with its properties checked.
    pub(crate) fn open(&self, kind: &dyn ResourceType, spec: Spec) -> Box<dyn Resource> {
        check_properties(&kind.info(), &spec.properties).unwrap();
        kind.check(&spec.properties).unwrap();
        kind.open(spec, self.context()).unwrap()
    }
}

impl Services for Double {
    fn node(&self) -> &NodeInfo {
        &self.node
    }

    fn progress(&self, _text: &str) {}

    fn cancelled(&self) -> bool {
        self.cancelled.load(Ordering::SeqCst)
    }

    fn report(&self, alive: Result<(), String>) {
        self.told.lock().reports.push(alive);
        self.changed.notify_all();
    }

    fn event(&self, level: EventLevel, text: &str) {
        self.told.lock().events.push((level, text.to_owned()));
        self.changed.notify_all();
    }

    fn save(&self, state: Option<serde_json::Value>) -> Result<(), Failure> {
        let mut told = self.told.lock();
        if told.is_full && state.is_some() {
            return Err(Failure::new("could not be kept"));
        }
        told.saved = state;
        Ok(())
    }

    fn saved(&self) -> Option<serde_json::Value> {
        self.told.lock().saved.clone()
    }
}

/// Properties from pairs.
pub(crate) fn properties(pairs: &[(&str, &str)]) -> Properties {
    pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
}

/// A resource of the group `g`.
pub(crate) fn spec(kind: &str, pairs: &[(&str, &str)]) -> Spec {
    Spec {
        name: format!("{} of the test", kind.to_lowercase()),
        kind: kind.to_owned(),
        group: "g".to_owned(),
        properties: properties(pairs),
        depends_on: Vec::new(),
        looks_alive_ms: None,
        is_alive_ms: None,
        deadlock_timeout_ms: 300_000,
        pending_timeout_ms: 180_000,
        generation: 1,
        library: None,
    }
}

/// Runs a program that must succeed; its output.
pub(crate) fn sh(program: &str, args: &[&str]) -> String {
    let output = std::process::Command::new(program).args(args).output().unwrap();
    assert!(output.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

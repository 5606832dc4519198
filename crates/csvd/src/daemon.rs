//! What the daemon is at one moment: a node of a cluster, with its engine, or a machine that waits to become one.

use crate::engine::groups::end_hosts_of_a_former_life;
use crate::engine::identity::{self, Identity};
use crate::engine::witness::node::{self, WITNESS_NODE, WitnessNode};
use crate::engine::{Engine, backup, forced, lifecycle, unix_ms};
use crate::events::EventLog;
use crate::process::end_leftovers;
use anyhow::{Context, Result, bail};
use csv_types::config::LocalConfig;
use std::fs;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Duration;
use tokio::runtime::Runtime;
use uuid::Uuid;

/// Time for groups and volumes to move away before csvd stops: virtual machines take their time.
const GOODBYE_LIMIT: Duration = Duration::from_secs(100);
/// Time for what is still here to go offline in good order.
const OFFLINE_LIMIT: Duration = Duration::from_secs(30);

/// For what is said to the others at the end.
const SAY_LIMIT: Duration = Duration::from_secs(3);

/// See the module.
#[derive(Debug)]
pub(crate) struct Daemon {
    pub(crate) config: LocalConfig,
    pub(crate) events: Arc<Mutex<EventLog>>,
    runtime: Runtime,
    engine: RwLock<Option<Arc<Engine>>>,
    /// `csvd --witness`: this machine is to be a witness node, and no node.
    as_witness: bool,
    witness: Mutex<Option<Arc<WitnessNode>>>,
    /// Why there is no engine although there is an identity.
    broken: Mutex<Option<String>>,
    /// One change of membership at a time.
    changing: Mutex<()>,
}

impl Daemon {
    /// Starts the engine, if this machine is in a cluster. A database that cannot be used is told, not mended.
    pub(crate) fn start(config: LocalConfig, events: EventLog, as_witness: bool) -> Result<Arc<Daemon>> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .thread_name("csvd-net")
            .build()
            .context("cannot start the network threads")?;
        let daemon = Arc::new(Daemon {
            config,
            events: Arc::new(Mutex::new(events)),
            runtime,
            engine: RwLock::new(None),
            as_witness,
            witness: Mutex::new(None),
            broken: Mutex::new(None),
            changing: Mutex::new(()),
        });
        match Identity::load(&daemon.config.state_dir) {
            Ok(None) => {}
            Ok(Some(identity)) if daemon.as_witness => daemon.start_witness(identity),
            Ok(Some(identity)) if identity.node == WITNESS_NODE => {
                daemon.note_broken(&anyhow::anyhow!("it is a witness node: start csvd with --witness"));
            }
            Ok(Some(identity)) => daemon.start_engine(identity),
            Err(error) => daemon.note_broken(&error),
        }
        Ok(daemon)
    }

    fn start_engine(&self, identity: Identity) {
        let started =
            self.runtime.block_on(Engine::start(self.config.clone(), identity, self.events.clone()));
        match started {
            Ok(engine) => self.set(Some(engine)),
            Err(error) => self.note_broken(&error),
        }
    }

    /// Why this node is in a cluster and takes no part, if so.
    fn broken(&self) -> Option<String> {
        self.broken.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn start_witness(&self, identity: Identity) {
        match self.runtime.block_on(node::start(&self.config, identity)) {
            Ok(witness) => {
                *self.witness.lock().unwrap_or_else(PoisonError::into_inner) = Some(witness);
            }
            Err(error) => self.note_broken(&error),
        }
    }

    fn note_broken(&self, error: &anyhow::Error) {
        let text = format!("this node does not take part in its cluster: {error:#}");
        tracing::error!("{text}");
        self.event("cluster-not-started", text.clone());
        // Resources and a csvfs of an earlier csvd: nobody would tell them when this node is given up.
        end_hosts_of_a_former_life(&self.config.run_dir);
        end_leftovers(&self.config.run_dir);
        *self.broken.lock().unwrap_or_else(PoisonError::into_inner) = Some(text);
    }

    pub(crate) fn event(&self, kind: &str, message: String) {
        self.events.lock().unwrap_or_else(PoisonError::into_inner).add("", kind, message);
    }

    /// Does csvd do what it has to? Why not, if not.
    pub(crate) fn in_control(&self) -> Result<(), String> {
        self.engine
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .as_ref()
            .map_or(Ok(()), |engine| engine.in_control())
    }

    fn set(&self, engine: Option<Arc<Engine>>) {
        *self.engine.write().unwrap_or_else(PoisonError::into_inner) = engine;
    }

    /// The engine; the error says why there is none.
    pub(crate) fn engine(&self) -> Result<Arc<Engine>> {
        if let Some(engine) = &*self.engine.read().unwrap_or_else(PoisonError::into_inner) {
            return Ok(engine.clone());
        }
        if let Some(broken) = self.broken() {
            bail!("{broken}");
        }
        if let Some(witness) = &*self.witness.lock().unwrap_or_else(PoisonError::into_inner) {
            return Err(node::only_a_witness(witness));
        }
        if self.as_witness {
            bail!(
                "{} is no witness yet: name it with `csvctl quorum set --node` on a node of the cluster, and give the token to `csvctl cluster join` here",
                self.config.node
            );
        }
        bail!(
            "{} is in no cluster: make one with `csvctl cluster create NAME`, or join one with `csvctl cluster join TOKEN`",
            self.config.node
        )
    }

    /// Runs something of the engine's from a thread that may wait.
    pub(crate) fn block_on<T>(&self, work: impl Future<Output = T>) -> T {
        self.runtime.block_on(work)
    }

    fn not_in_cluster(&self) -> Result<()> {
        if let Ok(engine) = self.engine() {
            bail!(
                "{} is in cluster {} already; `csvctl cluster leave` takes it out",
                self.config.node,
                engine.identity.cluster_name
            );
        }
        if let Some(broken) = self.broken() {
            bail!("{broken}");
        }
        if let Some(witness) = &*self.witness.lock().unwrap_or_else(PoisonError::into_inner) {
            bail!(
                "this machine is the witness node of cluster {} already; `csvctl cluster leave` ends that",
                witness.identity.cluster_name
            );
        }
        Ok(())
    }

    /// `csvctl cluster create`.
    pub(crate) fn create(&self, name: &str, id: Option<Uuid>, settings: Vec<(String, String)>) -> Result<()> {
        let _one = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        self.not_in_cluster()?;
        if self.as_witness {
            bail!("this csvd runs as a witness; start it without --witness");
        }
        let made = lifecycle::create(&self.config, self.events.clone(), name, id, settings);
        let engine = self.runtime.block_on(made)?;
        self.event("cluster-created", format!("cluster {name} was created with this node as its first"));
        self.set(Some(engine));
        Ok(())
    }

    /// `csvctl cluster join`.
    pub(crate) fn join(&self, token: &str) -> Result<()> {
        let _one = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        self.not_in_cluster()?;
        if self.as_witness {
            let witness = self.runtime.block_on(node::join(&self.config, token))?;
            let text =
                format!("this machine is the witness node of cluster {}", witness.identity.cluster_name);
            self.event("cluster-joined", text);
            *self.witness.lock().unwrap_or_else(PoisonError::into_inner) = Some(witness);
            return Ok(());
        }
        let admitted = self.runtime.block_on(lifecycle::ask_to_join(&self.config, token, false))?;
        let settled = lifecycle::settle(&self.config, self.events.clone(), &admitted);
        let engine = self.runtime.block_on(settled)?;
        self.event("cluster-joined", format!("this node joined cluster {}", engine.identity.cluster_name));
        self.set(Some(engine));
        Ok(())
    }

    /// `csvctl cluster leave`.
    pub(crate) fn leave(&self) -> Result<()> {
        let _one = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(witness) = self.witness.lock().unwrap_or_else(PoisonError::into_inner).take() {
            // The cluster takes its vote away when it does not answer; its records are kept.
            self.runtime.block_on(witness.shutdown());
            return self.forget_cluster();
        }
        let engine = self.engine()?;
        self.runtime.block_on(engine.leave())?;
        self.forget(&engine)
    }

    /// `csvctl cluster destroy`.
    pub(crate) fn destroy(&self) -> Result<()> {
        let _one = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        let engine = self.engine()?;
        if engine.db.read().nodes.len() > 1 {
            bail!("the cluster has other nodes: let them leave first, or evict them");
        }
        self.runtime.block_on(engine.groups.stop_all(OFFLINE_LIMIT));
        engine.volumes.stop_all();
        // Nobody is left who would take them off, and another cluster could not write the LUNs.
        let back = engine.give_keys_back();
        tracing::info!(volumes = back.len(), "the keys of the cluster are off its LUNs");
        self.forget(&engine)
    }

    /// `csvctl cluster rejoin`: the cluster lets this machine in anew, under its name; then what it has is put aside.
    pub(crate) fn rejoin(&self, token: &str, discard: bool) -> Result<()> {
        let _one = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        let former = self.engine().ok();
        if let Some(engine) = former.as_ref().filter(|engine| !discard && engine.cut_off().is_none()) {
            bail!(
                "{} is in cluster {} and its database is in order; `csvctl cluster leave` takes it out. If that cluster was \
                 restored or forced elsewhere and this node goes on by itself, `--discard` gives up what it has",
                self.config.node,
                engine.identity.cluster_name
            );
        }
        let admitted = self.runtime.block_on(lifecycle::ask_to_join(&self.config, token, true))?;
        if let Some(engine) = former {
            self.runtime.block_on(engine.groups.stop_all(OFFLINE_LIMIT));
            engine.volumes.stop_all();
            self.runtime.block_on(engine.shutdown());
            self.set(None);
        }
        // The new life has another number and another key: nothing of the former one may use them.
        end_hosts_of_a_former_life(&self.config.run_dir);
        end_leftovers(&self.config.run_dir);
        let settled = lifecycle::settle(&self.config, self.events.clone(), &admitted);
        match self.runtime.block_on(settled) {
            Ok(engine) => self.take_part(engine, "cluster-rejoined", "joined again"),
            Err(error) => {
                self.note_broken(&error);
                return Err(error);
            }
        }
        Ok(())
    }

    /// `csvctl cluster restore`.
    pub(crate) fn restore(&self, path: &Path, others_are_down: bool) -> Result<()> {
        let _one = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        if self.broken().is_none() {
            self.not_in_cluster()?;
        }
        let db = backup::read(path)?;
        let made = backup::restore(&self.config, self.events.clone(), db, others_are_down);
        let engine = self.runtime.block_on(made)?;
        self.take_part(engine, "cluster-restored", "was restored as the only one of");
        Ok(())
    }

    fn take_part(&self, engine: Arc<Engine>, kind: &str, did: &str) {
        *self.broken.lock().unwrap_or_else(PoisonError::into_inner) = None;
        self.event(kind, format!("this node {did} cluster {}", engine.identity.cluster_name));
        self.set(Some(engine));
    }

    /// `csvctl cluster start --force`: this node alone becomes the cluster, whatever the others have. It is noted here and done
    /// when csvd has started anew.
    pub(crate) fn force_start(&self, name: &str) -> Result<()> {
        let _one = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        let engine = self.engine()?;
        if engine.identity.cluster_name != name {
            bail!("this node is in cluster {}, not in {name}", engine.identity.cluster_name);
        }
        if engine.cut_off().is_none() || engine.in_contact() {
            bail!("cluster {name} has quorum, as this node sees it: a forced start is not needed");
        }
        forced::note(&self.config.state_dir)?;
        self.event("start-forced", format!("cluster {name} is started by force on this node alone"));
        forced::start_anew();
        Ok(())
    }

    fn forget(&self, engine: &Arc<Engine>) -> Result<()> {
        self.runtime.block_on(engine.shutdown());
        self.set(None);
        self.forget_cluster()
    }

    fn forget_cluster(&self) -> Result<()> {
        let aside = identity::set_aside(&self.config.state_dir, unix_ms())?;
        let aside =
            aside.map_or_else(String::new, |aside| format!("; the old database is {}", aside.display()));
        self.event("cluster-left", format!("this node is in no cluster any more{aside}"));
        for secret in ["ca.pem", "node.pem", "node.key", "smb.password"] {
            // A next join writes new ones.
            let _gone = fs::remove_file(self.config.secrets_dir.join(secret));
        }
        Ok(())
    }

    /// A clean stop: groups and volumes move to other nodes, what is left goes offline, csvfs ends, the others know.
    pub(crate) fn stop(&self) {
        if let Some(witness) = self.witness.lock().unwrap_or_else(PoisonError::into_inner).take() {
            self.runtime.block_on(witness.shutdown());
        }
        let Ok(engine) = self.engine() else { return };
        let others = engine.is_up() && crate::engine::local::up_nodes(&engine.db.read()) > 1;
        if others {
            self.runtime.block_on(engine.give_away(GOODBYE_LIMIT));
        }
        // What runs from a volume ends before it.
        self.runtime.block_on(engine.groups.stop_all(OFFLINE_LIMIT));
        for agent in engine.volumes.all() {
            agent.volume.collect_events(&self.events);
        }
        engine.volumes.stop_all();
        if others {
            self.runtime.block_on(engine.say_goodbye(SAY_LIMIT));
        }
        self.runtime.block_on(engine.shutdown());
    }
}

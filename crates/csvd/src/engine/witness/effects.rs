//! Carries the effects of the arbitration out: operations on threads that may block, the voter's start and end.

use super::driver::{Message, Seat};
use super::lun::WitnessLun;
use super::voter::WitnessVoter;
use crate::engine::Engine;
use csv_cluster::db::Witness as Config;
use csv_cluster::witness::{Effect, Input, Op, Outcome};
use csv_raft::{BoxFuture, Gate, OpenStorage};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::Sender;
use std::time::Duration;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

/// Operations on the LUN at one time. Further ones fail: those before them hang.
const OPERATIONS_MAX: usize = 16;
/// For the end of the former voter, before the LUN is taken again.
const ENDING_LIMIT: Duration = Duration::from_secs(10);

/// Asks for a verify of the reservation before each answer.
struct VerifyGate(Sender<Message>);

impl Gate for VerifyGate {
    fn verify(&self) -> BoxFuture<'_, bool> {
        let (answer, answered) = oneshot::channel();
        let asked = self.0.send(Message::Request(answer)).is_ok();
        Box::pin(async move { asked && answered.await.unwrap_or(false) })
    }
}

/// What runs, or has just ended.
#[derive(Debug, Default)]
pub(super) struct Running {
    /// Read by the last `ReadState`, for the start that follows.
    pub(super) storage: Option<OpenStorage>,
    /// Number of the voter's start.
    pub(super) tenure: u64,
    /// The former voter's end.
    ending: Option<JoinHandle<()>>,
    operations: Arc<AtomicUsize>,
}

/// One at a time of those that are counted.
struct Counted(Arc<AtomicUsize>);

impl Counted {
    fn enter(count: &Arc<AtomicUsize>) -> Option<Counted> {
        let one = Counted(count.clone());
        (count.fetch_add(1, Ordering::AcqRel) < OPERATIONS_MAX).then_some(one)
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Seat {
    pub(super) fn carry_out(&mut self, engine: &Arc<Engine>, effects: Vec<Effect>) {
        for effect in effects {
            match effect {
                Effect::ReadSlot { op } | Effect::ReadKeys { op } => {
                    self.operate(engine, op, |lun| (lun.read_slot(), None));
                }
                Effect::Renew { op, counter } => {
                    self.operate(engine, op, move |lun| (lun.renew(counter), None));
                }
                Effect::Verify { op } => self.operate(engine, op, |lun| (lun.verify(), None)),
                Effect::ReadState { op } => self.operate(engine, op, |lun| match lun.read_state() {
                    Ok(storage) => (Outcome::Ok, Some(storage)),
                    Err(error) => (Outcome::Failed(format!("{error:#}")), None),
                }),
                Effect::TakeOver { op, victim } => self.take_over(engine, op, victim),
                Effect::StartVoter => self.start_voter(engine),
                Effect::StopVoter { reason } => {
                    self.stop_voter(engine);
                    engine.event("", "witness-lost", format!("the disk witness stops here: {reason}"));
                }
                Effect::Answer { id } => self.answer(id, true),
                Effect::Deny { id } => self.answer(id, false),
                Effect::Release => self.release(engine),
                Effect::Lost { reason } => self.lost(engine, &reason),
            }
        }
    }

    fn answer(&mut self, id: u64, may: bool) {
        if let Some(waiting) = self.requests.remove(&id) {
            // It may have given up.
            let _gone = waiting.send(may);
        }
    }

    /// Runs an operation where it may block; its end comes back as a message.
    fn operate(
        &mut self,
        engine: &Engine,
        op: Op,
        work: impl FnOnce(&WitnessLun) -> (Outcome, Option<OpenStorage>) + Send + 'static,
    ) {
        let (lun, messages) = (self.lun.clone(), self.messages.clone());
        let Some(counted) = Counted::enter(&self.running.operations) else {
            let outcome = Outcome::Failed("earlier operations hang".to_owned());
            let _ended = messages.send(Message::Done { op, outcome, storage: None });
            return;
        };
        engine.runtime.spawn_blocking(move || {
            let (outcome, storage) = work(&lun);
            drop(counted);
            let _ended = messages.send(Message::Done { op, outcome, storage: storage.map(Box::new) });
        });
    }

    /// Only when nothing of the former voter can write any more.
    fn take_over(&mut self, engine: &Engine, op: Op, victim: Option<u64>) {
        let Some(ending) = self.running.ending.take() else {
            self.operate(engine, op, move |lun| (lun.take_over(victim), None));
            return;
        };
        let runtime = engine.runtime.clone();
        self.operate(engine, op, move |lun| {
            if runtime.block_on(async { tokio::time::timeout(ENDING_LIMIT, ending).await }).is_err() {
                return (Outcome::Failed("the former voter does not end".to_owned()), None);
            }
            (lun.take_over(victim), None)
        });
    }

    fn start_voter(&mut self, engine: &Arc<Engine>) {
        let Some(storage) = self.running.storage.take() else {
            // Cannot be: the arbitration starts it after a reading only.
            self.feed(engine, Input::Yield);
            return;
        };
        for warning in &storage.warnings {
            tracing::warn!("{warning}");
        }
        self.running.tenure += 1;
        let tenure = self.running.tenure;
        let gate: Arc<dyn Gate> = Arc::new(VerifyGate(self.messages.clone()));
        let id = self.lun.id();
        let named = Arc::new(
            move |db: &csv_cluster::db::ClusterDb| matches!(&db.quorum.witness, Config::Disk { lun_id, .. } if *lun_id == id),
        );
        let started = engine.runtime.block_on(WitnessVoter::start(
            storage,
            Arc::new(engine.witness_net()),
            Some(gate),
            named,
        ));
        match started {
            Ok(voter) => {
                let (handle, messages) = (voter.handle().clone(), self.messages.clone());
                *engine.witness.lock() = Some(voter);
                engine.runtime.spawn(async move {
                    let stop = handle.fatal().await;
                    let _ended = messages.send(Message::VoterEnded { tenure, why: format!("{stop:?}") });
                });
                engine.event("", "witness-taken", "the disk witness runs here now".to_owned());
            }
            Err(error) => {
                self.failed(engine, &format!("the witness's voter cannot be started: {error}"));
            }
        }
    }

    /// From here on no answer goes out, and no write begins.
    pub(super) fn stop_voter(&mut self, engine: &Engine) {
        let voter = engine.witness.lock().take();
        self.lun.revoke();
        if let Some(voter) = voter {
            let ending = async move { voter.handle().shutdown().await };
            self.running.ending = Some(engine.runtime.spawn(ending));
        }
    }

    /// After the voter's end, so that nothing of it meets another holder.
    fn release(&mut self, engine: &Engine) {
        let (lun, ending) = (self.lun.clone(), self.running.ending.take());
        let runtime = engine.runtime.clone();
        self.running.ending = Some(engine.runtime.spawn_blocking(move || {
            if let Some(ending) = ending {
                let _late = runtime.block_on(async { tokio::time::timeout(ENDING_LIMIT, ending).await });
            }
            if let Err(error) = lun.release() {
                tracing::info!("the witness LUN was not given back: {error:#}");
            }
        }));
    }

    /// Waits for what has been begun.
    pub(super) fn end(&mut self, engine: &Engine) {
        if let Some(ending) = self.running.ending.take() {
            let _late = engine.runtime.block_on(async { tokio::time::timeout(ENDING_LIMIT, ending).await });
        }
    }
}

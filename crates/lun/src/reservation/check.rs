//! The storage part of `csvctl validate`: can this LUN do what csvfs needs of reservations?
//!
//! It works with two keys of its own and only on a LUN on which nobody has registered anything: registering here would
//! replace this very node's key otherwise. Its keys are gone when it returns.
//!
//! One node is one nexus, which can hold one registration at a time. So from one node it can show that commands are taken, that
//! what was done can be read back, and that a wrong key meets a conflict. It cannot show that a write of another node is
//! refused, that the commands of another node are aborted, or that the storage applies registrations to the LUN as
//! another node sees it. That takes two nodes: `fence` from one while the other writes.

use super::{Holder, ReservationError, ReservationType, Reservations};
use std::path::Path;

/// How a check went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// As it should be.
    Passed,
    /// It works, with a drawback.
    Warning,
    /// csvfs cannot fence on this LUN.
    Failed,
    /// Not tried.
    Skipped,
}

/// One check.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CheckResult {
    /// What was checked, in two or three words.
    pub name: &'static str,
    /// How it went.
    pub outcome: Outcome,
    /// What was found and what to do about it.
    pub text: String,
}

/// A check that begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Step {
    /// Its name.
    pub name: &'static str,
    /// Its number, from 1.
    pub number: u32,
    /// How many there are at most.
    pub of: u32,
}

/// Both keys begin with "CSVK".
const FIRST_KEY: u64 = 0x4353_564b_0000_0001;
const SECOND_KEY: u64 = 0x4353_564b_0000_0002;
const KIND: ReservationType = ReservationType::WriteExclusiveRegistrantsOnly;
const STEPS: u32 = 14;

struct Run<'a> {
    results: Vec<CheckResult>,
    progress: &'a mut dyn FnMut(Step),
    steps: u32,
}

impl Run<'_> {
    fn begin(&mut self, name: &'static str) {
        self.steps += 1;
        (self.progress)(Step { name, number: self.steps, of: STEPS });
    }

    fn end(&mut self, name: &'static str, outcome: Outcome, text: impl Into<String>) {
        self.results.push(CheckResult { name, outcome, text: text.into() });
    }

    /// A check that passes with `text` or fails with the error. Passed?
    fn check<T>(
        &mut self,
        name: &'static str,
        what: impl FnOnce() -> Result<T, ReservationError>,
        text: impl FnOnce(&T) -> (Outcome, String),
    ) -> Option<T> {
        self.begin(name);
        match what() {
            Ok(value) => {
                let (outcome, text) = text(&value);
                self.end(name, outcome, text);
                (outcome != Outcome::Failed).then_some(value)
            }
            Err(error) => {
                self.end(name, Outcome::Failed, error.to_string());
                None
            }
        }
    }

    /// A check that passes when it meets a conflict.
    fn conflict(&mut self, name: &'static str, what: impl FnOnce() -> Result<(), ReservationError>) {
        self.begin(name);
        match what() {
            Err(error) if error.is_conflict() => {
                self.end(name, Outcome::Passed, "a wrong key is refused with a reservation conflict");
            }
            Err(error) => self.end(name, Outcome::Failed, error.to_string()),
            Ok(()) => self.end(
                name,
                Outcome::Failed,
                "the storage took a wrong key; it does not check reservations, do not use it for csvfs",
            ),
        }
    }
}

fn passed(text: &str) -> (Outcome, String) {
    (Outcome::Passed, text.into())
}

/// Checks the LUN; `progress` is told each check that begins. Needs root. Blocks for as long as the storage does.
pub fn validate(path: &Path, progress: &mut dyn FnMut(Step)) -> Vec<CheckResult> {
    let mut run = Run { results: Vec::new(), progress, steps: 0 };
    let opened = run.check(
        "open",
        || Reservations::open(path),
        |lun| (Outcome::Passed, format!("reservations are made by {}", lun.kind())),
    );
    let Some(lun) = opened else { return run.results };
    check_capabilities(&mut run, &lun);
    let keys = run.check(
        "read keys",
        || lun.read_keys(),
        |found| {
            let count = found.keys.len();
            passed(&format!("keys can be read back; {count} registered now"))
        },
    );
    let Some(keys) = keys else {
        run.end(
            "reservations",
            Outcome::Skipped,
            "without reading keys nothing was tried: they may be in use",
        );
        return run.results;
    };
    if !keys.keys.is_empty() || !matches!(lun.read_reservation(), Ok(None)) {
        let list: Vec<_> = keys.keys.iter().map(|key| format!("{key:#x}")).collect();
        let text = format!(
            "the LUN is in use by reservations (keys {}), so nothing was changed; check it before it joins a cluster, or \
             after every node has left",
            if list.is_empty() { "none".into() } else { list.join(", ") }
        );
        run.end("reservations", Outcome::Skipped, text);
        return run.results;
    }
    if check_register(&mut run, &lun) {
        check_reservation(&mut run, &lun);
    }
    clean_up(&mut run, &lun);
    run.end(
        "second node",
        Outcome::Skipped,
        "that the storage refuses another node's writes shows only when two nodes check it together",
    );
    run.results
}

fn check_capabilities(run: &mut Run<'_>, lun: &Reservations) {
    let name = "capabilities";
    run.check(
        name,
        || lun.capabilities(),
        |found| {
            if found.types.as_ref().is_some_and(|types| !types.contains(&KIND)) {
                return (Outcome::Failed, format!("the storage has no reservation of the type {KIND}"));
            }
            if found.preempt_and_abort == Some(false) {
                let text =
                    "no PREEMPT AND ABORT: fencing takes longer, because writes under way have to run out";
                return (Outcome::Warning, text.into());
            }
            if !found.read_back {
                let text = "keys cannot be read on this device: a fence cannot be verified";
                return (Outcome::Warning, text.into());
            }
            passed("the storage says that it can do what is needed, or does not say")
        },
    );
}

/// Registered with the first key at the end?
fn check_register(run: &mut Run<'_>, lun: &Reservations) -> bool {
    let registered =
        run.check("register", || lun.register(None, SECOND_KEY), |_| passed("a key was registered"));
    if registered.is_none() {
        return false;
    }
    run.conflict("register conflict", || lun.register(Some(FIRST_KEY), FIRST_KEY).map(drop));
    let replaced = run.check("replace key", || lun.register_ignore(FIRST_KEY), |outcome| {
        if outcome.aptpl {
            passed("a key was replaced; registrations survive a power loss of the storage (APTPL)")
        } else {
            let text = "a key was replaced; registrations do not survive a power loss of the storage (no APTPL): \
                        the nodes register again afterwards";
            (Outcome::Warning, text.into())
        }
    });
    let seen = run.check(
        "read back",
        || lun.read_keys(),
        |found| match found.keys.as_slice() {
            keys if keys.contains(&FIRST_KEY) && keys.iter().all(|key| *key == FIRST_KEY) => {
                passed("the registered key is there")
            }
            _ => (Outcome::Failed, "the registered key is not there, or others came meanwhile".into()),
        },
    );
    replaced.is_some() && seen.is_some()
}

fn holds(lun: &Reservations) -> Result<bool, ReservationError> {
    Ok(lun.read_reservation()? == Some(Holder { key: FIRST_KEY, kind: KIND }))
}

fn check_reservation(run: &mut Run<'_>, lun: &Reservations) {
    let held = |text: &'static str| {
        move |held: &bool| {
            if *held {
                passed(text)
            } else {
                (Outcome::Failed, "the storage accepted it, but the reservation is not there".into())
            }
        }
    };
    let reserve = || {
        lun.reserve(FIRST_KEY, KIND)?;
        holds(lun)
    };
    if run.check("reserve", reserve, held("the LUN was reserved, and the reservation read back")).is_none() {
        return;
    }
    run.conflict("reserve conflict", || lun.reserve(SECOND_KEY, KIND));
    // One nexus has one registration, so the victim can only be oneself; the reservation is made anew by it.
    let mut aborted = false;
    let mut preempt = || {
        aborted = lun.preempt(FIRST_KEY, FIRST_KEY, KIND, true)?.aborted;
        holds(lun)
    };
    let name = "preempt";
    run.begin(name);
    match preempt() {
        Ok(true) if aborted => run.end(name, Outcome::Passed, "PREEMPT AND ABORT was carried out"),
        Ok(true) => run.end(
            name,
            Outcome::Warning,
            "only PREEMPT was carried out: after a fence, writes under way have to run out",
        ),
        Ok(false) => run.end(name, Outcome::Failed, "after a preemption the reservation is not there"),
        Err(error) => run.end(name, Outcome::Failed, error.to_string()),
    }
    run.conflict("preempt conflict", || lun.preempt(FIRST_KEY, SECOND_KEY, KIND, true).map(drop));
    let release = || {
        lun.release(FIRST_KEY, KIND)?;
        Ok(lun.read_reservation()?.is_none())
    };
    run.check("release", release, |gone| match gone {
        true => passed("the reservation was released"),
        false => (Outcome::Failed, "the reservation was released, but is still there".into()),
    });
}

/// Takes back whichever of the two keys is registered.
fn clean_up(run: &mut Run<'_>, lun: &Reservations) {
    let ours = |keys: &[u64]| keys.iter().copied().find(|key| [FIRST_KEY, SECOND_KEY].contains(key));
    let clean = || {
        while let Some(key) = ours(&lun.read_keys()?.keys) {
            lun.unregister(key)?;
        }
        Ok(())
    };
    run.check("unregister", clean, |()| passed("the keys of this check are gone"));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testutil::{LoopDevice, RegistryFile, lun_file};

    fn outcomes(results: &[CheckResult]) -> Vec<(&str, Outcome)> {
        results.iter().map(|one| (one.name, one.outcome)).collect()
    }

    fn all_pass(path: &Path) {
        let mut steps = Vec::new();
        let results = validate(path, &mut |step| steps.push(step));
        for one in &results {
            let want = if one.name == "second node" { Outcome::Skipped } else { Outcome::Passed };
            assert_eq!(one.outcome, want, "{one:?}");
        }
        assert_eq!(results.len(), 14, "{:?}", outcomes(&results));
        assert!(steps.iter().all(|step| step.number <= step.of), "{steps:?}");
        let lun = Reservations::open(path).unwrap();
        assert_eq!((lun.read_keys().unwrap().keys, lun.read_reservation().unwrap()), (vec![], None));
    }

    #[test]
    fn a_file_and_a_loop_device_pass_and_are_left_clean() {
        let file = lun_file(1 << 20);
        let _registry = RegistryFile::of(file.path());
        all_pass(file.path());
        let Some(device) = LoopDevice::new(1 << 20, 512) else { return };
        let _registry = RegistryFile::of(device.backing());
        all_pass(device.path());
    }

    #[test]
    fn foreign_keys_are_left_alone() {
        let file = lun_file(1 << 20);
        let _registry = RegistryFile::of(file.path());
        let lun = Reservations::open(file.path()).unwrap();
        lun.register_ignore(7).unwrap();
        lun.reserve(7, KIND).unwrap();
        let before = (lun.read_keys().unwrap(), lun.read_reservation().unwrap());
        let results = validate(file.path(), &mut |_| {});
        let last = results.last().unwrap();
        assert_eq!(last.outcome, Outcome::Skipped);
        assert!(last.text.contains("0x7"), "{last:?}");
        assert_eq!((lun.read_keys().unwrap(), lun.read_reservation().unwrap()), before);
    }

    #[test]
    fn what_is_no_lun_fails_with_words() {
        let results = validate(Path::new("/dev/null"), &mut |_| {});
        assert_eq!(outcomes(&results), [("open", Outcome::Failed)]);
    }
}

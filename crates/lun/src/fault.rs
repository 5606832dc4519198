//! Injected faults of the path to the LUN, for the lab and for tests.
//!
//! Without a fault an I/O costs one relaxed load. `ErrorAfter` counts in [`FaultState::admit`] only, so an I/O
//! that was let through is not failed afterwards by its own count.

use csv_types::admin::PathFault;
use parking_lot::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// Longest delay of one I/O, whatever was asked for, so that a typing error cannot hang a node.
const DELAY_MAX: Duration = Duration::from_secs(60);

/// The fault says that the I/O fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Faulty;

#[derive(Debug)]
pub(crate) struct FaultState {
    /// Is `fault` anything but `Heal`? Relaxed is enough: a fault set while an I/O starts may miss it, as a
    /// cable pulled at that moment may.
    active: AtomicBool,
    fault: Mutex<PathFault>,
}

impl FaultState {
    pub(crate) fn new() -> Self {
        FaultState { active: AtomicBool::new(false), fault: Mutex::new(PathFault::Heal) }
    }

    pub(crate) fn set(&self, fault: PathFault) {
        let mut slot = self.fault.lock();
        *slot = fault;
        self.active.store(fault != PathFault::Heal, Ordering::Relaxed);
    }

    /// Any fault in force? One relaxed load.
    pub(crate) fn is_active(&self) -> bool {
        self.active.load(Ordering::Relaxed)
    }

    pub(crate) fn get(&self) -> PathFault {
        *self.fault.lock()
    }

    /// Before an I/O: may it start, and after which delay?
    pub(crate) fn admit(&self) -> Result<Option<Duration>, Faulty> {
        if !self.active.load(Ordering::Relaxed) {
            return Ok(None);
        }
        let mut slot = self.fault.lock();
        match *slot {
            PathFault::Heal => Ok(None),
            PathFault::Fail | PathFault::ErrorAfter(0) => Err(Faulty),
            PathFault::DelayMs(ms) => Ok(Some(Duration::from_millis(ms).min(DELAY_MAX))),
            PathFault::ErrorAfter(left) => {
                *slot = PathFault::ErrorAfter(left - 1);
                Ok(None)
            }
        }
    }

    /// After an I/O: did the path fail while it was in flight?
    pub(crate) fn check_completed(&self) -> Result<(), Faulty> {
        if !self.active.load(Ordering::Relaxed) {
            return Ok(());
        }
        match *self.fault.lock() {
            PathFault::Fail => Err(Faulty),
            PathFault::Heal | PathFault::DelayMs(_) | PathFault::ErrorAfter(_) => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn error_after_lets_exactly_that_many_through() {
        let faults = FaultState::new();
        faults.set(PathFault::ErrorAfter(2));
        for _ in 0..2 {
            assert_eq!(faults.admit(), Ok(None));
            assert_eq!(faults.check_completed(), Ok(()));
        }
        assert_eq!(faults.admit(), Err(Faulty));
        assert_eq!(faults.admit(), Err(Faulty));
        faults.set(PathFault::Heal);
        assert_eq!(faults.admit(), Ok(None));
    }

    #[test]
    fn a_path_that_fails_in_flight_fails_the_completion() {
        let faults = FaultState::new();
        assert_eq!(faults.admit(), Ok(None));
        faults.set(PathFault::Fail);
        assert_eq!(faults.check_completed(), Err(Faulty));
    }

    #[test]
    fn delay_is_reported_and_bounded() {
        let faults = FaultState::new();
        faults.set(PathFault::DelayMs(7));
        assert_eq!(faults.admit(), Ok(Some(Duration::from_millis(7))));
        faults.set(PathFault::DelayMs(u64::MAX));
        assert_eq!(faults.admit(), Ok(Some(DELAY_MAX)));
    }
}

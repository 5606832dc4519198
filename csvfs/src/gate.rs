//! Orders are carried out one at a time, and some take long; the order to stop I/O must not wait behind them. It takes
//! effect at once, and while it waits for its turn no order that is under way, or comes before it, lets I/O begin again.

use parking_lot::Mutex;

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Gate {
    /// Orders to stop that are not carried out yet.
    stops: Mutex<u32>,
}

/// An order to stop that is being carried out.
#[derive(Debug)]
pub(crate) struct Stop<'a>(&'a Gate);

impl Gate {
    /// Stops I/O, by `stop`, at once. It stays stopped for as long as the result lives, at least.
    pub(crate) fn close(&self, stop: impl FnOnce()) -> Stop<'_> {
        let mut stops = self.stops.lock();
        *stops += 1;
        stop();
        Stop(self)
    }

    /// Lets I/O begin, by `resume`, unless somebody waits to have it stopped: false then.
    pub(crate) fn open(&self, resume: impl FnOnce()) -> bool {
        let stops = self.stops.lock();
        if *stops == 0 {
            resume();
        }
        *stops == 0
    }
}

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        *self.0.stops.lock() -= 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;

    #[test]
    fn nothing_begins_while_a_stop_waits_for_its_turn() {
        let (gate, running) = (Gate::default(), Cell::new(true));
        let first = gate.close(|| running.set(false));
        assert!(!running.get(), "it stops before its turn");
        let second = gate.close(|| running.set(false));
        drop(first);
        assert!(!gate.open(|| running.set(true)));
        assert!(!running.get());
        drop(second);
        assert!(gate.open(|| running.set(true)));
        assert!(running.get());
    }
}

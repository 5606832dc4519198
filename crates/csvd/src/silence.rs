//! A csvfs that does not answer cannot be told to stop its I/O. While this node must do none, such a one is watched, and is
//! ended after a while: what it has mounted and what it has open then end with it.

use std::time::{Duration, Instant};

/// Between looks at a csvfs that has to be still.
pub(crate) const LOOK_EVERY: Duration = Duration::from_secs(1);
/// How long it may fail to answer. (The other nodes wait longer before they take anything over from a node that
/// cannot be fenced; one that can be is fenced at once.)
pub(crate) const SILENT_LIMIT: Duration = Duration::from_secs(if cfg!(test) { 0 } else { 10 });

/// Why this node must do no I/O on a volume, if so.
pub(crate) struct MustStop(Box<dyn Fn() -> Option<String> + Send + Sync>);

impl MustStop {
    pub(crate) fn new(why: impl Fn() -> Option<String> + Send + Sync + 'static) -> MustStop {
        MustStop(Box::new(why))
    }

    pub(crate) fn why(&self) -> Option<String> {
        (self.0)()
    }
}

impl std::fmt::Debug for MustStop {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("MustStop")
    }
}

/// Since when one process does not answer although it must be still.
#[derive(Debug, Default)]
pub(crate) struct Silence {
    since: Option<Instant>,
    over: bool,
}

impl Silence {
    /// True once, when it was silent for longer than `limit`. `answers` is asked only where it matters.
    pub(crate) fn look(
        &mut self,
        now: Instant,
        limit: Duration,
        must_stop: bool,
        answers: impl FnOnce() -> bool,
    ) -> bool {
        if !must_stop || answers() {
            self.since = None;
            return false;
        }
        let since = *self.since.get_or_insert(now);
        now.duration_since(since) >= limit && !std::mem::replace(&mut self.over, true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_secs(10);

    #[test]
    fn only_silence_without_a_break_while_it_must_stop_counts() {
        let (start, mut silence) = (Instant::now(), Silence::default());
        let at = |s: u64| start + Duration::from_secs(s);
        assert!(!silence.look(at(0), LIMIT, true, || false));
        assert!(!silence.look(at(9), LIMIT, true, || true), "it answers");
        assert!(!silence.look(at(11), LIMIT, true, || false));
        assert!(!silence.look(at(20), LIMIT, false, || panic!("nobody need be asked")));
        assert!(!silence.look(at(22), LIMIT, true, || false));
        assert!(!silence.look(at(31), LIMIT, true, || false));
        assert!(silence.look(at(32), LIMIT, true, || false));
        assert!(!silence.look(at(50), LIMIT, true, || false), "it is killed once");
    }
}

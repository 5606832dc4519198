//! Bugs that can be put back, to see that the simulation finds them. All are in the drivers of the simulation, which stand for
//! what csvd and csvfs do; the state machines are the real ones.

/// See the module. All off by default.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Bugs {
    /// The coordinator grants a layout although a guard waits for, or holds, the range: past the table.
    pub grant_during_recall: bool,
    /// A fence takes keys away and does not abort what is under way (PREEMPT instead of PREEMPT AND ABORT, no wait).
    pub fence_without_abort: bool,
    /// A take-over does not fence at all.
    pub take_without_fence: bool,
    /// Messages of another epoch count, and late orders too.
    pub epoch_not_checked: bool,
    /// A lease that is over frees what the node held, although the LUN could fence it: a write may be under way.
    pub lease_instead_of_fence: bool,
    /// A node that lost its lease tells the next coordinator that it holds nothing while I/O is still under way.
    pub reclaim_done_too_early: bool,
    /// A session whose Welcome was lost counts as resumed when the client says Hello again: it never reclaims.
    pub resumed_too_early: bool,
    /// Who gets space in a hole keeps its read right over the hole: it sees zeros until its grant arrives, even when others
    /// have written by then.
    pub getter_keeps_hole: bool,
    /// A key that the LUN has thrown out is registered again.
    pub key_revived: bool,
    /// A node uses a key as soon as it has registered it, without asking the majority once more: it may have been fenced
    /// before the key was there, which no reservation shows.
    pub registration_not_confirmed: bool,
    /// An owner says that it has closed a volume although an I/O error leaves open whether a write still takes effect.
    pub closed_with_io_unknown: bool,
    /// A client that got an I/O error for a write gives the layout back, although the write may still take effect.
    pub returned_with_io_unknown: bool,
}

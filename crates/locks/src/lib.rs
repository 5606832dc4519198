//! Locks that applications take on the files of one volume, from all nodes: POSIX and OFD byte-range locks and
//! flock. The coordinator owns one [`LockTable`] per volume and answers the nodes with the effects it gives out.
//!
//! Pure: no I/O, no clock, no threads. A request goes in by [`LockTable::step`] (or the method of the same name),
//! effects come out in the order in which they have to be answered.
//!
//! Semantics are those of Linux `fs/locks.c`:
//! * A POSIX request replaces what its owner holds in the range; locks of one type that touch are merged, others
//!   are cut or split. An upgrade that has to wait keeps the old lock meanwhile.
//! * OFD locks are the same with other owner values; the kernel does not tell a FUSE file system which is which.
//!   So deadlock detection covers OFD owners as well, where Linux would let them hang.
//! * flock is a space of its own. A conversion gives the old lock up first; when the new one is refused or has to
//!   wait, the old one is gone.
//! * A new request looks at the locks that are held, not at those who wait. Waiters are served first come, first
//!   served whenever something is released.
//!
//! Invariants: the locks of one owner in one file never overlap, and no two of them with the same type touch;
//! two locks of different owners overlap only when both are read locks; no waiter could be granted right now,
//! and no waiters wait for each other in a circle (up to the bound of the search).
//!
//! Failure: the table lives in memory of the coordinator. After a change of coordinator it starts empty, and the
//! nodes enter again what they hold by [`LockTable::reclaim`] before the caller lets new requests in.

mod deadlock;
mod file;
mod posix;
mod table;
mod types;

#[cfg(test)]
mod model;
#[cfg(test)]
mod tests;

pub use table::{Limits, LockTable};
pub use types::{
    Effect, HeldLock, Input, Kind, LockRange, LockRequest, LockType, Owner, OwnerKey, Refusal, RequestId,
};

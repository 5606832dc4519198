//! The vote beside the nodes'. A **disk witness** runs on whichever node holds its LUN ([`driver`]: the thread; [`effects`]: what
//! it does; [`lun`]: the operations on the LUN); [`voter`]: the voter itself; [`setup`]: making one. A
//! **witness node** is a voter on a third machine ([`node`]).
//!
//! Invariants
//! * An answer of the disk witness goes out only after a look at the reservation that was begun after the request was processed.
//! * A stopped voter writes nothing more: its writes are cut off at once, by the storage and by a flag, and the LUN is
//!   not taken again before those under way have ended.
//! * A new witness starts empty and does not vote before it has the log; the former one is no member by then.

pub(crate) mod driver;
mod effects;
pub(crate) mod lun;
pub(crate) mod node;
pub(crate) mod setup;
pub(crate) mod voter;

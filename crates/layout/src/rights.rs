//! What one node holds on one stretch of a file: for each access the newest grant that gave it.
//!
//! A grant adds, a return takes away by sequence number. Keeping one number per access makes both exact: a `Read`
//! granted inside a held `Exclusive` does not weaken it, and a return of the older `Exclusive` leaves the newer
//! `Read` alone. Table and cache use the same arithmetic, so what a cache holds is always a part of what the
//! table believes: the cache takes rights away before it sends the return, the table after it received it.

use crate::Access;

/// Newest sequence number per access, 0 = none. A weaker access whose number is not newer than a stronger one's
/// says nothing and is kept at 0, so that equal rights compare equal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Rights {
    seqs: [u64; 3],
}

const ACCESSES: [Access; 3] = [Access::Read, Access::Write, Access::Exclusive];

impl Rights {
    /// Nothing held.
    pub(crate) const NONE: Rights = Rights { seqs: [0; 3] };

    /// A grant `seq` gives `access`.
    pub(crate) fn add(&mut self, access: Access, seq: u64) {
        let newest = &mut self.seqs[access as usize];
        *newest = seq.max(*newest);
        self.normalize();
    }

    /// Both; what either allows is allowed.
    pub(crate) fn merge(&mut self, other: Rights) {
        for (mine, theirs) in self.seqs.iter_mut().zip(other.seqs) {
            *mine = theirs.max(*mine);
        }
        self.normalize();
    }

    /// Grants up to and with `up_to_seq` are gone; with `keep_read` they shrink to `Read`.
    pub(crate) fn take(&mut self, up_to_seq: u64, keep_read: bool) {
        let mut kept = 0;
        for (level, seq) in self.seqs.iter_mut().enumerate() {
            if *seq <= up_to_seq && !(keep_read && level == Access::Read as usize) {
                kept = kept.max(*seq);
                *seq = 0;
            }
        }
        if keep_read {
            self.seqs[Access::Read as usize] = self.seqs[Access::Read as usize].max(kept);
        }
        self.normalize();
    }

    /// The strongest access held.
    pub(crate) fn access(&self) -> Option<Access> {
        (0..3).rev().find(|&level| self.seqs[level] != 0).map(|level| ACCESSES[level])
    }

    /// Is at least `need` held?
    pub(crate) fn allows(&self, need: Access) -> bool {
        self.seqs[need as usize..].iter().any(|&seq| seq != 0)
    }

    /// The newest grant held, 0 when none.
    pub(crate) fn seq(&self) -> u64 {
        self.seqs.into_iter().max().unwrap_or(0)
    }

    /// Oldest and newest grant that give `floor` or more.
    pub(crate) fn seqs_from(&self, floor: Access) -> Option<(u64, u64)> {
        let held = || self.seqs[floor as usize..].iter().copied().filter(|&seq| seq != 0);
        Some((held().min()?, held().max()?))
    }

    /// Nothing held?
    pub(crate) fn is_none(&self) -> bool {
        *self == Rights::NONE
    }

    fn normalize(&mut self) {
        for level in 0..2 {
            if self.seqs[level + 1..].iter().any(|&stronger| stronger >= self.seqs[level]) {
                self.seqs[level] = 0;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rights(grants: &[(Access, u64)]) -> Rights {
        let mut rights = Rights::NONE;
        for &(access, seq) in grants {
            rights.add(access, seq);
        }
        rights
    }

    #[test]
    fn weaker_grant_does_not_weaken() {
        let mut held = rights(&[(Access::Write, 3), (Access::Read, 5)]);
        assert_eq!(held.access(), Some(Access::Write));
        held.take(4, false);
        assert_eq!(held.access(), Some(Access::Read));
        assert_eq!(held.seq(), 5);
        held.take(5, false);
        assert!(held.is_none());
    }

    #[test]
    fn older_weaker_grant_says_nothing() {
        assert_eq!(rights(&[(Access::Read, 2), (Access::Exclusive, 4)]), rights(&[(Access::Exclusive, 4)]));
        assert_eq!(rights(&[(Access::Exclusive, 4), (Access::Read, 2)]), rights(&[(Access::Exclusive, 4)]));
    }

    #[test]
    fn keep_read_shrinks_only_what_it_names() {
        let mut held = rights(&[(Access::Exclusive, 4)]);
        held.take(4, true);
        assert_eq!(held, rights(&[(Access::Read, 4)]));
        let mut newer = rights(&[(Access::Exclusive, 6)]);
        newer.take(4, true);
        assert_eq!(newer, rights(&[(Access::Exclusive, 6)]));
        let mut mixed = rights(&[(Access::Exclusive, 3), (Access::Write, 6)]);
        mixed.take(4, true);
        assert_eq!(mixed, rights(&[(Access::Write, 6)]));
    }

    #[test]
    fn seqs_from_counts_only_what_conflicts() {
        let held = rights(&[(Access::Exclusive, 3), (Access::Read, 6)]);
        assert_eq!(held.seqs_from(Access::Read), Some((3, 6)));
        assert_eq!(held.seqs_from(Access::Exclusive), Some((3, 3)));
        assert_eq!(rights(&[(Access::Write, 3)]).seqs_from(Access::Exclusive), None);
    }
}

//! Deliberate defects, for the tests only: the model test turns each on and must then find a broken invariant.
//! Outside tests a `Mutation` has no size and `is` is constantly false.

/// A defect.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mutant {
    /// A grant that was overtaken by its own recall is taken up all the same.
    CacheIgnoresTombstones,
    /// A recall is answered while I/O under the grant is still in flight.
    CacheReturnsEarly,
    /// Gets pass guards.
    TableMapsUnderGuard,
    /// A guard passes gets that are being mapped.
    TableGuardIgnoresMapping,
    /// A return takes away newer grants too.
    TableReturnIgnoresSeq,
    /// The answer to a `keep_read` recall takes the read right away as well.
    TableReturnIgnoresKeepRead,
    /// The end-of-file right goes back before the writes that move the end are over.
    CacheLosesSize,
}

/// Which defect is on.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Mutation {
    #[cfg(test)]
    pub(crate) on: Option<Mutant>,
}

impl Mutation {
    /// Is this defect on?
    #[cfg(test)]
    pub(crate) fn is(self, mutant: Mutant) -> bool {
        self.on == Some(mutant)
    }

    /// No defect outside tests.
    #[cfg(not(test))]
    #[inline]
    #[expect(clippy::unused_self, reason = "same signature as under test")]
    pub(crate) fn is(self, _: Mutant) -> bool {
        false
    }
}

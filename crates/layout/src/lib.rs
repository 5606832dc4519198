//! What is lent of each file, to whom (coordinator side, [`table`]), and what this node holds (client side,
//! [`cache`]). Pure: time comes in as milliseconds of a monotonic clock, effects go out as values.

pub mod cache;
pub mod table;

mod mutation;
mod rights;

#[cfg(test)]
mod model;

use csv_types::LunOffset;

/// What a grant allows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Access {
    /// Read the LUN blocks of the range.
    Read,
    /// Read, and write whole LUN blocks; other nodes may hold the same.
    Write,
    /// Read and write any bytes; no other node holds anything that overlaps.
    Exclusive,
}

impl Access {
    /// May two different nodes hold these at once on a common byte?
    #[must_use]
    pub fn compatible(self, other: Access) -> bool {
        self != Access::Exclusive && other != Access::Exclusive
    }
}

/// Where a piece of a file lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Extent {
    /// Byte offset in the file.
    pub file_offset: u64,
    /// Bytes, never 0.
    pub len: u64,
    /// Place on the LUN, or `None` for a hole or unwritten space: reads as zeros, is never written under the grant.
    pub lun_offset: Option<LunOffset>,
}

impl Extent {
    /// One past the last byte in the file.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.file_offset.saturating_add(self.len)
    }
}

//! The raw system calls that csvfs needs and that neither rustix nor nix offers, behind safe functions.
//!
//! Every function borrows its descriptors, checks lengths before the kernel sees a pointer, and reports the
//! kernel's errno unchanged as [`std::io::Error`]; nothing is retried except `EINTR` where the call may return it.

mod clock;
mod fiemap;
mod fs;
mod handle;
pub(crate) mod raw;

pub use clock::{ClockStatus, clock_status};
pub use fiemap::{
    EXTENT_DATA_ENCRYPTED, EXTENT_DATA_INLINE, EXTENT_DATA_TAIL, EXTENT_DELALLOC, EXTENT_ENCODED,
    EXTENT_LAST, EXTENT_MERGED, EXTENT_NOT_ALIGNED, EXTENT_SHARED, EXTENT_UNKNOWN, EXTENT_UNWRITTEN,
    EXTENTS_MAX, RawExtent, fiemap,
};
pub use fs::{
    CacheStat, SHUTDOWN_DEFAULT, SHUTDOWN_LOGFLUSH, SHUTDOWN_NOLOGFLUSH, block_device_bytes, cachestat,
    drop_block_device_cache, fallocate_write_zeroes, fs_shutdown, inode_generation, take_write_back_error,
};
pub use handle::{HANDLE_BYTES_MAX, name_to_handle, open_by_handle};

//! The few FUSE requests that csvfs takes itself, before fuser sees them. Source: include/uapi/linux/fuse.h.
//!
//! These are the ones on the data path (READ, WRITE), those that fuser does not hand on whole (locks: it drops the
//! flag that tells flock from POSIX; INTERRUPT), and FORGET, which must never wait behind anything.

/// Bytes of `fuse_in_header`.
pub(crate) const IN_HEADER_BYTES: usize = 40;
/// Bytes of `fuse_in_header` and `fuse_write_in`: what stands before the data of a WRITE.
pub(crate) const WRITE_HEAD_BYTES: usize = 80;
/// Bytes of `fuse_out_header`.
pub(crate) const OUT_HEADER_BYTES: usize = 16;

pub(crate) const FORGET: u32 = 2;
pub(crate) const READ: u32 = 15;
pub(crate) const WRITE: u32 = 16;
pub(crate) const GETLK: u32 = 31;
pub(crate) const SETLK: u32 = 32;
pub(crate) const SETLKW: u32 = 33;
pub(crate) const INTERRUPT: u32 = 36;
pub(crate) const BATCH_FORGET: u32 = 42;

/// `FUSE_WRITE_CACHE`: writeback of pages; the process is not the writer.
pub(crate) const WRITE_CACHE: u32 = 1;
/// `FUSE_WRITE_KILL_SUIDGID`.
pub(crate) const WRITE_KILL_SUIDGID: u32 = 4;
/// `FUSE_LK_FLOCK`.
pub(crate) const LK_FLOCK: u32 = 1;

/// `fuse_in_header`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct InHeader {
    pub(crate) opcode: u32,
    pub(crate) unique: u64,
    pub(crate) nodeid: u64,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) pid: u32,
}

/// `fuse_read_in` and `fuse_write_in`, which have the same shape.
#[derive(Debug, Clone, Copy)]
pub(crate) struct IoIn {
    pub(crate) offset: u64,
    pub(crate) size: u32,
    /// `write_flags` of a WRITE.
    pub(crate) io_flags: u32,
    /// Open flags of the file.
    pub(crate) open_flags: u32,
}

/// `fuse_lk_in`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct LkIn {
    /// Open file through which the request came.
    pub(crate) handle: u64,
    pub(crate) owner: u64,
    pub(crate) start: u64,
    pub(crate) end: u64,
    pub(crate) kind: u32,
    pub(crate) pid: u32,
    pub(crate) flags: u32,
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..at + 4)?.try_into().ok().map(u32::from_ne_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    bytes.get(at..at + 8)?.try_into().ok().map(u64::from_ne_bytes)
}

impl InHeader {
    pub(crate) fn parse(bytes: &[u8]) -> Option<InHeader> {
        Some(InHeader {
            opcode: u32_at(bytes, 4)?,
            unique: u64_at(bytes, 8)?,
            nodeid: u64_at(bytes, 16)?,
            uid: u32_at(bytes, 24)?,
            gid: u32_at(bytes, 28)?,
            pid: u32_at(bytes, 32)?,
        })
    }
}

impl IoIn {
    /// From the bytes behind the header.
    pub(crate) fn parse(bytes: &[u8]) -> Option<IoIn> {
        Some(IoIn {
            offset: u64_at(bytes, 8)?,
            size: u32_at(bytes, 16)?,
            io_flags: u32_at(bytes, 20)?,
            open_flags: u32_at(bytes, 32)?,
        })
    }
}

impl LkIn {
    /// From the bytes behind the header.
    pub(crate) fn parse(bytes: &[u8]) -> Option<LkIn> {
        Some(LkIn {
            handle: u64_at(bytes, 0)?,
            owner: u64_at(bytes, 8)?,
            start: u64_at(bytes, 16)?,
            end: u64_at(bytes, 24)?,
            kind: u32_at(bytes, 32)?,
            pid: u32_at(bytes, 36)?,
            flags: u32_at(bytes, 40)?,
        })
    }
}

/// Number of an INTERRUPT's victim.
pub(crate) fn interrupted(bytes: &[u8]) -> Option<u64> {
    u64_at(bytes, 0)
}

/// `nlookup` of a FORGET.
pub(crate) fn forget_count(bytes: &[u8]) -> Option<u64> {
    u64_at(bytes, 0)
}

/// (node, nlookup) pairs of a BATCH_FORGET.
pub(crate) fn batch_forget(bytes: &[u8]) -> impl Iterator<Item = (u64, u64)> {
    let count = u32_at(bytes, 0).unwrap_or(0) as usize;
    (0..count).map_while(|i| Some((u64_at(bytes, 8 + i * 16)?, u64_at(bytes, 16 + i * 16)?)))
}

/// `fuse_out_header`; `errno` is positive or 0.
pub(crate) fn out_header(unique: u64, errno: i32, payload: usize) -> [u8; OUT_HEADER_BYTES] {
    let len = u32::try_from(OUT_HEADER_BYTES + payload).unwrap_or(u32::MAX);
    let mut bytes = [0; OUT_HEADER_BYTES];
    bytes[..4].copy_from_slice(&len.to_ne_bytes());
    bytes[4..8].copy_from_slice(&(-errno).to_ne_bytes());
    bytes[8..].copy_from_slice(&unique.to_ne_bytes());
    bytes
}

/// `FUSE_NOTIFY_INVAL_INODE` for all of a file: `fuse_out_header` with the code in `error` and no request number,
/// then `fuse_notify_inval_inode_out`.
pub(crate) fn inval_inode(nodeid: u64) -> [u8; OUT_HEADER_BYTES + 24] {
    const NOTIFY_INVAL_INODE: i32 = 2;
    let mut bytes = [0; OUT_HEADER_BYTES + 24];
    bytes[..OUT_HEADER_BYTES].copy_from_slice(&out_header(0, -NOTIFY_INVAL_INODE, 24));
    bytes[OUT_HEADER_BYTES..OUT_HEADER_BYTES + 8].copy_from_slice(&nodeid.to_ne_bytes());
    // Offset 0, and length 0 for "to the end".
    bytes
}

/// `fuse_write_out`.
pub(crate) fn write_out(written: u32) -> [u8; 8] {
    let mut bytes = [0; 8];
    bytes[..4].copy_from_slice(&written.to_ne_bytes());
    bytes
}

/// `fuse_lk_out`.
pub(crate) fn lk_out(start: u64, end: u64, kind: u32, pid: u32) -> [u8; 24] {
    let mut bytes = [0; 24];
    bytes[..8].copy_from_slice(&start.to_ne_bytes());
    bytes[8..16].copy_from_slice(&end.to_ne_bytes());
    bytes[16..20].copy_from_slice(&kind.to_ne_bytes());
    bytes[20..].copy_from_slice(&pid.to_ne_bytes());
    bytes
}

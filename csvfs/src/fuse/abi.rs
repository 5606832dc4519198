//! The few FUSE requests that csvfs takes itself, before fuser sees them. Source: include/uapi/linux/fuse.h.
//!
//! These are the ones on the data path (READ, WRITE), those that fuser does not hand on whole (locks: it drops the
//! flag that tells flock from POSIX; INTERRUPT), FORGET, which must never wait behind anything, and the metadata
//! requests that programs make most (see [`super::meta`]).

/// Bytes of `fuse_in_header`.
pub(crate) const IN_HEADER_BYTES: usize = 40;
/// Bytes of `fuse_in_header` and `fuse_write_in`: what stands before the data of a WRITE.
pub(crate) const WRITE_HEAD_BYTES: usize = 80;
/// Bytes of `fuse_out_header`.
pub(crate) const OUT_HEADER_BYTES: usize = 16;

pub(crate) const LOOKUP: u32 = 1;
pub(crate) const FORGET: u32 = 2;
pub(crate) const GETATTR: u32 = 3;
pub(crate) const UNLINK: u32 = 10;
pub(crate) const OPEN: u32 = 14;
pub(crate) const READ: u32 = 15;
pub(crate) const WRITE: u32 = 16;
pub(crate) const RELEASE: u32 = 18;
pub(crate) const FLUSH: u32 = 25;
pub(crate) const GETLK: u32 = 31;
pub(crate) const SETLK: u32 = 32;
pub(crate) const SETLKW: u32 = 33;
pub(crate) const CREATE: u32 = 35;
pub(crate) const INTERRUPT: u32 = 36;
pub(crate) const BATCH_FORGET: u32 = 42;

/// `FUSE_WRITE_CACHE`: writeback of pages; the process is not the writer.
pub(crate) const WRITE_CACHE: u32 = 1;
/// `FUSE_WRITE_KILL_SUIDGID`.
pub(crate) const WRITE_KILL_SUIDGID: u32 = 4;
/// `FUSE_RELEASE_FLOCK_UNLOCK`: the lock owner of a RELEASE is meant.
pub(crate) const RELEASE_FLOCK_UNLOCK: u32 = 2;
/// `FOPEN_DIRECT_IO | FOPEN_PARALLEL_DIRECT_WRITES`: direct I/O keeps the file's pages out of this node's cache;
/// parallel writes are ordered by layouts.
pub(crate) const OPEN_FLAGS: u32 = 1 | 1 << 6;
/// Bytes of the longest request that [`super::meta`] takes, without its header: `fuse_create_in` and a name.
pub(crate) const META_BODY_BYTES_MAX: usize = 16 + 256;
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

/// `fuse_release_in` and `fuse_flush_in`, which agree in what matters.
#[derive(Debug, Clone, Copy)]
pub(crate) struct CloseIn {
    pub(crate) handle: u64,
    /// Of a RELEASE.
    pub(crate) flags: u32,
    pub(crate) owner: u64,
}

impl CloseIn {
    /// From the bytes behind the header.
    pub(crate) fn parse(bytes: &[u8]) -> Option<CloseIn> {
        Some(CloseIn { handle: u64_at(bytes, 0)?, flags: u32_at(bytes, 12)?, owner: u64_at(bytes, 16)? })
    }
}

/// `fuse_create_in`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct CreateIn {
    pub(crate) flags: u32,
    pub(crate) mode: u32,
    pub(crate) umask: u32,
}

impl CreateIn {
    /// From the bytes behind the header; and where the name begins.
    pub(crate) fn parse(bytes: &[u8]) -> Option<(CreateIn, &[u8])> {
        let create = CreateIn { flags: u32_at(bytes, 0)?, mode: u32_at(bytes, 4)?, umask: u32_at(bytes, 8)? };
        Some((create, bytes.get(16..)?))
    }
}

/// Flags of `fuse_open_in`.
pub(crate) fn open_flags(bytes: &[u8]) -> Option<u32> {
    u32_at(bytes, 0)
}

/// A name that ends with a NUL byte.
pub(crate) fn name(bytes: &[u8]) -> Option<&[u8]> {
    bytes.iter().position(|byte| *byte == 0).map(|end| &bytes[..end])
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

/// What `fuse_attr` says about a file.
#[derive(Debug, Clone, Copy)]
pub(crate) struct AttrOut {
    /// `st_ino`, and the kernel's number where an entry is meant.
    pub(crate) ino: u64,
    pub(crate) generation: u32,
    pub(crate) attr: csv_proto::Attr,
}

/// Puts numbers one behind the other.
struct Fields<'a>(&'a mut Vec<u8>);

impl Fields<'_> {
    fn u64(&mut self, value: u64) {
        self.0.extend_from_slice(&value.to_ne_bytes());
    }
    fn u32(&mut self, value: u32) {
        self.0.extend_from_slice(&value.to_ne_bytes());
    }
}

fn put_attr(out: &mut Vec<u8>, of: &AttrOut) {
    let attr = &of.attr;
    let times = [attr.atime, attr.mtime, attr.ctime].map(Option::unwrap_or_default);
    let mut out = Fields(out);
    out.u64(of.ino);
    out.u64(attr.size);
    out.u64(attr.blocks);
    times.iter().for_each(|time| out.u64(time.s.cast_unsigned()));
    times.iter().for_each(|time| out.u32(time.ns));
    for field in [attr.mode, attr.nlink, attr.uid, attr.gid, attr.rdev, attr.blksize, 0] {
        out.u32(field);
    }
}

/// `fuse_entry_out`; name and attributes are not to be kept by the kernel.
pub(crate) fn entry_out(of: &AttrOut) -> Vec<u8> {
    let mut out = Vec::with_capacity(128 + 16);
    let mut fields = Fields(&mut out);
    fields.u64(of.ino);
    fields.u64(of.generation.into());
    // Both time-outs, seconds and nanoseconds.
    [0, 0, 0].into_iter().for_each(|zero| fields.u64(zero));
    put_attr(&mut out, of);
    out
}

/// `fuse_attr_out`; not to be kept by the kernel.
pub(crate) fn attr_out(of: &AttrOut) -> Vec<u8> {
    let mut out = Vec::with_capacity(104);
    let mut fields = Fields(&mut out);
    fields.u64(0);
    fields.u64(0);
    put_attr(&mut out, of);
    out
}

/// `fuse_open_out`.
pub(crate) fn open_out(handle: u64) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&handle.to_ne_bytes());
    bytes[8..12].copy_from_slice(&OPEN_FLAGS.to_ne_bytes());
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replies_have_the_sizes_of_the_kernel() {
        let of = AttrOut { ino: 7, generation: 3, attr: csv_proto::Attr::default() };
        assert_eq!((entry_out(&of).len(), attr_out(&of).len(), open_out(9).len()), (128, 104, 16));
    }

    #[test]
    fn fields_lie_where_the_kernel_looks_for_them() {
        let attr = csv_proto::Attr {
            size: 0x1122,
            mtime: Some(csv_proto::Time { s: -5, ns: 77 }),
            mode: 0o100_644,
            nlink: 2,
            ..csv_proto::Attr::default()
        };
        let entry = entry_out(&AttrOut { ino: 7, generation: 3, attr });
        assert_eq!((u64_at(&entry, 0), u64_at(&entry, 8)), (Some(7), Some(3)));
        // `fuse_attr` begins at 40: ino, size, blocks, atime, mtime, ctime, three times nsec, mode, nlink.
        assert_eq!((u64_at(&entry, 40), u64_at(&entry, 48)), (Some(7), Some(0x1122)));
        assert_eq!(u64_at(&entry, 40 + 32).map(u64::cast_signed), Some(-5));
        assert_eq!(u32_at(&entry, 40 + 52), Some(77));
        assert_eq!((u32_at(&entry, 40 + 60), u32_at(&entry, 40 + 64)), (Some(0o100_644), Some(2)));
    }

    #[test]
    fn a_name_ends_at_its_nul_and_nowhere_else() {
        assert_eq!(name(b"abc\0"), Some(&b"abc"[..]));
        assert_eq!(name(b"abc"), None);
        assert!(CloseIn::parse(&[0; 23]).is_none());
        assert!(CreateIn::parse(&[0; 15]).is_none());
    }
}

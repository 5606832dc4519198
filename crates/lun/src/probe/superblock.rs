//! Superblocks of the file systems that a volume can have: enough to know kind, size and identity. Pure.

use csv_ondisk::FsKind;
use uuid::Uuid;

/// What a superblock says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FsInfo {
    /// ext4 or XFS.
    pub kind: FsKind,
    /// Size of the file system in bytes.
    pub fs_bytes: u64,
    /// Size of its blocks in bytes.
    pub block_bytes: u32,
    /// Its UUID.
    pub uuid: Uuid,
}

const EXT_SUPERBLOCK_AT: usize = 1024;
const EXT_MAGIC: [u8; 2] = [0x53, 0xef];
const EXT_INCOMPAT_EXTENTS: u32 = 0x40;
const EXT_INCOMPAT_64BIT: u32 = 0x80;

fn bytes<const N: usize>(head: &[u8], at: usize) -> Option<[u8; N]> {
    head.get(at..at.checked_add(N)?)?.try_into().ok()
}

/// Any of ext2, ext3 and ext4?
pub(crate) fn has_ext_magic(head: &[u8]) -> bool {
    bytes(head, EXT_SUPERBLOCK_AT + 0x38) == Some(EXT_MAGIC)
}

/// Reads the superblock at the head of a device; `None` when there is neither ext4 nor XFS.
#[must_use]
pub fn parse_superblock(head: &[u8]) -> Option<FsInfo> {
    parse_xfs(head).or_else(|| parse_ext4(head))
}

fn parse_ext4(head: &[u8]) -> Option<FsInfo> {
    let sb = head.get(EXT_SUPERBLOCK_AT..)?;
    let u32_at = |at| bytes(sb, at).map(u32::from_le_bytes);
    if !has_ext_magic(head) {
        return None;
    }
    let incompat = u32_at(0x60)?;
    if incompat & EXT_INCOMPAT_EXTENTS == 0 {
        return None;
    }
    let block_bytes = 1024_u32.checked_shl(u32_at(0x18)?).filter(|b| (1024..=65536).contains(b))?;
    let high = if incompat & EXT_INCOMPAT_64BIT == 0 { 0 } else { u32_at(0x150)? };
    let blocks = (u64::from(high) << 32) | u64::from(u32_at(4)?);
    let fs_bytes = blocks.checked_mul(u64::from(block_bytes))?;
    Some(FsInfo { kind: FsKind::Ext4, fs_bytes, block_bytes, uuid: Uuid::from_bytes(bytes(sb, 0x68)?) })
}

fn parse_xfs(head: &[u8]) -> Option<FsInfo> {
    if head.get(..4)? != b"XFSB" {
        return None;
    }
    let block_bytes = bytes(head, 4).map(u32::from_be_bytes).filter(|b| (512..=65536).contains(b))?;
    let fs_bytes = bytes(head, 8).map(u64::from_be_bytes)?.checked_mul(u64::from(block_bytes))?;
    Some(FsInfo { kind: FsKind::Xfs, fs_bytes, block_bytes, uuid: Uuid::from_bytes(bytes(head, 32)?) })
}

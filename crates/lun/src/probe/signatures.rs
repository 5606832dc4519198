//! Signatures of what else may lie on a disk, so that it is not overwritten unseen. Pure.

use super::superblock::has_ext_magic;

/// Bytes at the head of the device that [`find`] wants to see (VMFS begins at 1 MiB).
pub(crate) const HEAD_BYTES: u64 = (1 << 20) + (64 << 10);
/// Bytes at its end: the label area, and mdraid 0.90 in the last 128 KiB.
pub(crate) const TAIL_BYTES: u64 = (1 << 20) + (128 << 10);

/// Byte offset from the start of the device, magic, name for people.
const AT_HEAD: &[(usize, &[u8], &str)] = &[
    (0, b"XFSB", "an XFS file system"),
    (0x10040, b"_BHRfS_M", "a btrfs file system"),
    (0, b"LUKS\xba\xbe", "a LUKS encrypted device"),
    (16384, b"SKUL\xba\xbe", "a LUKS encrypted device"),
    (4086, b"SWAPSPACE2", "swap space"),
    (4086, b"SWAP-SPACE", "swap space"),
    (3, b"NTFS    ", "an NTFS file system"),
    (3, b"ReFS\0\0\0\0", "a ReFS file system"),
    (3, b"EXFAT   ", "an exFAT file system"),
    (54, b"FAT1", "a FAT file system"),
    (82, b"FAT32   ", "a FAT file system"),
    (0, b"\xfc\x4e\x2b\xa9", "an mdraid member"),
    (4096, b"\xfc\x4e\x2b\xa9", "an mdraid member"),
    (512, b"EFI PART", "a GPT partition table"),
    (4096, b"EFI PART", "a GPT partition table"),
    (1024, b"\x10\x20\xf5\xf2", "an F2FS file system"),
    (65536, b"\x01\x16\x19\x70", "a GFS2 file system"),
    (1024, b"OCFSV2", "an OCFS2 file system"),
    (2048, b"OCFSV2", "an OCFS2 file system"),
    (4096, b"OCFSV2", "an OCFS2 file system"),
    (8192, b"OCFSV2", "an OCFS2 file system"),
    (1 << 20, b"\x0d\xd0\x01\xc0", "a VMFS volume"),
    (4120, b"\xc6\x85\x73\xf6\x4e\x1a\x45\xca\x82\x65\xf5\x7f\x48\xba\x6d\x81", "a bcache device"),
    (4120, b"\xc6\x85\x73\xf6\x66\xce\x90\xa9\xd9\x6a\x60\xcf\x80\x3d\xf7\xef", "a bcachefs file system"),
    (0, b"bluestore block device", "a Ceph BlueStore device"),
    (32, b"ORCLDISK", "an Oracle ASM disk"),
    (32769, b"CD001", "an ISO 9660 file system"),
    (32768, b"JFS1", "a JFS file system"),
    (65588, b"ReIsEr", "a ReiserFS file system"),
    (1030, b"\x34\x34", "a NILFS2 file system"),
    (1024, b"\xe2\xe1\xf5\xe0", "an EROFS file system"),
    (0, b"hsqs", "a SquashFS file system"),
    (0, &csv_ondisk::witness::MAGIC, "a disk witness of csvfs"),
];

/// Names of everything known that the head and the tail of a device of `capacity_bytes` show. `tail` ends at
/// the end of the device.
pub(crate) fn find(head: &[u8], tail: &[u8], capacity_bytes: u64) -> Vec<&'static str> {
    let mut found: Vec<&'static str> = Vec::new();
    let mut add = |name| {
        if !found.contains(&name) {
            found.push(name);
        }
    };
    if has_ext_magic(head) {
        add("an ext2, ext3 or ext4 file system");
    }
    for (at, magic, name) in AT_HEAD {
        if has(head, *at, magic) {
            add(*name);
        }
    }
    for sector in 0..4 {
        if has(head, sector * 512, b"LABELONE") && has(head, sector * 512 + 24, b"LVM2 001") {
            add("an LVM2 physical volume");
        }
    }
    if (128..256).any(|kib| is_zfs_uberblock(head, kib * 1024)) {
        add("a ZFS pool member");
    }
    for at in md_offsets(capacity_bytes) {
        if let Some(at) = in_tail(tail, capacity_bytes, at)
            && has(tail, at, b"\xfc\x4e\x2b\xa9")
        {
            add("an mdraid member");
        }
    }
    for sector_bytes in [512, 4096] {
        if let Some(at) = tail.len().checked_sub(sector_bytes)
            && has(tail, at, b"EFI PART")
        {
            add("a backup GPT partition table");
        }
    }
    // A boot sector of FAT or NTFS ends like an MBR and has been named already.
    if found.is_empty() && is_mbr(head) {
        found.push("an MBR partition table");
    }
    found
}

fn has(bytes: &[u8], at: usize, magic: &[u8]) -> bool {
    bytes.get(at..).is_some_and(|rest| rest.starts_with(magic))
}

fn is_zfs_uberblock(head: &[u8], at: usize) -> bool {
    has(head, at, b"\x0c\xb1\xba\0\0\0\0\0") || has(head, at, b"\0\0\0\0\0\xba\xb1\x0c")
}

/// Where mdraid 0.90 and 1.0 keep their superblocks.
fn md_offsets(capacity_bytes: u64) -> [Option<u64>; 2] {
    let v0 = (capacity_bytes & !0xffff).checked_sub(0x1_0000);
    let v1_0 = (capacity_bytes / 512).checked_sub(16).map(|sector| (sector & !7) * 512);
    [v0, v1_0]
}

fn in_tail(tail: &[u8], capacity_bytes: u64, at: Option<u64>) -> Option<usize> {
    let tail_at = capacity_bytes.checked_sub(u64::try_from(tail.len()).ok()?)?;
    usize::try_from(at?.checked_sub(tail_at)?).ok()
}

/// The end mark alone says little; every entry must look like one and at least one must be in use.
fn is_mbr(head: &[u8]) -> bool {
    let (true, Some(table)) = (has(head, 510, &[0x55, 0xaa]), head.get(446..510)) else { return false };
    let (entries, _) = table.as_chunks::<16>();
    entries.iter().all(|entry| entry[0] == 0 || entry[0] == 0x80) && entries.iter().any(|entry| entry[4] != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    const CAPACITY: usize = 8 << 20;

    type Writes<'a> = &'a [(usize, &'a [u8])];

    fn find_on(device: &[u8]) -> Vec<&'static str> {
        let head = &device[..usize::try_from(HEAD_BYTES).unwrap()];
        let tail = &device[CAPACITY - usize::try_from(TAIL_BYTES).unwrap()..];
        find(head, tail, CAPACITY as u64)
    }

    #[test]
    fn every_signature_of_the_table_is_found_alone() {
        for (at, magic, name) in AT_HEAD {
            let mut device = vec![0; CAPACITY];
            device[*at..*at + magic.len()].copy_from_slice(magic);
            assert_eq!(find_on(&device), [*name], "at {at}");
        }
        assert_eq!(find_on(&vec![0; CAPACITY]), [""; 0]);
    }

    #[test]
    fn signatures_that_need_a_look_around() {
        let cases: [(Writes<'_>, &str); 7] = [
            (&[(512, b"LABELONE"), (536, b"LVM2 001")], "an LVM2 physical volume"),
            (&[(132 * 1024, b"\x0c\xb1\xba\0\0\0\0\0")], "a ZFS pool member"),
            (&[(CAPACITY - 65536, b"\xfc\x4e\x2b\xa9")], "an mdraid member"),
            (&[(CAPACITY - 8192, b"\xfc\x4e\x2b\xa9")], "an mdraid member"),
            (&[(CAPACITY - 512, b"EFI PART")], "a backup GPT partition table"),
            (&[(510, &[0x55, 0xaa]), (450, &[0x83])], "an MBR partition table"),
            (&[(1080, &[0x53, 0xef])], "an ext2, ext3 or ext4 file system"),
        ];
        for (writes, name) in cases {
            let mut device = vec![0; CAPACITY];
            for (at, bytes) in writes {
                device[*at..*at + bytes.len()].copy_from_slice(bytes);
            }
            assert_eq!(find_on(&device), [name]);
        }
    }

    #[test]
    fn a_boot_sector_without_partitions_is_no_mbr() {
        let mut device = vec![0; CAPACITY];
        device[510..512].copy_from_slice(&[0x55, 0xaa]);
        assert_eq!(find_on(&device), [""; 0]);
    }
}

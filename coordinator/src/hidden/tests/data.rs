//! File data through the page cache and around it.

use super::{id, on_each_fs};
use rustix::io::Errno;

/// Bytes that differ from their neighbours and from those of other seeds.
pub(super) fn pattern(seed: u64, len: usize) -> Vec<u8> {
    (0..len as u64)
        .map(|i| (i.wrapping_mul(2_654_435_761).wrapping_add(seed * 97) >> 7).to_le_bytes()[0])
        .collect()
}

#[test]
fn what_is_written_is_read_both_ways_at_any_offset() {
    on_each_fs(|rig| {
        let fs = rig.fs();
        let file = rig.file(b"f");
        let data = pattern(1, 3_000_017);
        fs.write(file, 0, &data).unwrap();
        fs.fsync(file, false).unwrap();
        for (offset, len) in
            [(0, 3_000_017), (1, 1), (4095, 2), (4096, 4096), (1_234_567, 654_321), (3_000_000, 50)]
        {
            let end = (offset + len).min(data.len());
            let (at, asked) = (offset as u64, u32::try_from(len).unwrap());
            assert!(fs.read(file, at, asked).unwrap() == data[offset..end], "read {offset} {len}");
            assert!(fs.read_direct(file, at, asked).unwrap() == data[offset..end], "direct {offset} {len}");
        }
        assert!(fs.read(file, 3_000_017, 10).unwrap().is_empty());
        assert!(fs.read_direct(file, 3_000_017, 10).unwrap().is_empty());
        assert!(fs.read_direct(file, 9_000_000, 10).unwrap().is_empty());
        assert_eq!(fs.read(file, 0, (64 << 20) + 1).unwrap_err(), Errno::INVAL);
    });
}

#[test]
fn appends_of_many_threads_do_not_overlap() {
    on_each_fs(|rig| {
        let fs = rig.fs();
        let file = rig.file(b"log");
        let mut offsets: Vec<u64> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..4_u8)
                .map(|i| {
                    scope.spawn(move || {
                        (0..50).map(|_| fs.append(file, &[i; 100]).unwrap()).collect::<Vec<_>>()
                    })
                })
                .collect();
            threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
        });
        offsets.sort_unstable();
        assert_eq!(offsets, (0..200).map(|i| i * 100).collect::<Vec<u64>>());
        let data = fs.read(file, 0, 30_000).unwrap();
        assert_eq!(data.len(), 20_000);
        assert!(data.chunks(100).all(|record| record.iter().all(|byte| *byte == record[0])));
    });
}

#[test]
fn holes_are_punched_found_and_copied() {
    on_each_fs(|rig| {
        let fs = rig.fs();
        let (file, copy) = (rig.file(b"f"), rig.file(b"copy"));
        let data = pattern(2, 3 << 20);
        fs.write(file, 0, &data).unwrap();
        // FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
        fs.fallocate(file, 3, 1 << 20, 1 << 20).unwrap();
        assert_eq!(fs.seek(file, 0, 4).unwrap(), 1 << 20);
        assert_eq!(fs.seek(file, 1 << 20, 3).unwrap(), 2 << 20);
        assert_eq!(fs.seek(file, 3 << 20, 3).unwrap_err(), Errno::NXIO);
        assert_eq!(fs.seek(file, 0, 0).unwrap_err(), Errno::INVAL);
        assert_eq!(fs.copy_range(file, 0, copy, 10, 8 << 20).unwrap(), 3 << 20);
        let mut want = data;
        want[1 << 20..2 << 20].fill(0);
        assert!(fs.read(copy, 10, 3 << 20).unwrap() == want);
        assert_eq!(fs.copy_range(file, 0, file, 1, 100).unwrap_err(), Errno::INVAL);
        fs.fallocate(file, 0, 0, 5 << 20).unwrap();
        assert_eq!(fs.attr(file).unwrap().size, 5 << 20);
        fs.truncate(file, 7).unwrap();
        assert_eq!(fs.attr(file).unwrap().size, 7);
        assert_eq!(fs.fallocate(file, 0, 0, 0).unwrap_err(), Errno::INVAL);
    });
}

#[test]
fn data_of_what_is_no_regular_file_is_refused_without_opening_it() {
    on_each_fs(|rig| {
        let (fs, root) = (rig.fs(), rig.root());
        // Opening the FIFO for reading alone would wait for a writer for ever.
        let fifo = id(&fs.mknod(root, b"p", 0o010_644, 0).unwrap());
        let link = id(&fs.symlink(root, b"l", b"p").unwrap());
        let disk = id(&fs.mknod(root, b"d", 0o060_644, 0x700).unwrap());
        for node in [fifo, link, disk] {
            assert_eq!(fs.read(node, 0, 1).unwrap_err(), Errno::INVAL);
            assert_eq!(fs.truncate(node, 0).unwrap_err(), Errno::INVAL);
            assert_eq!(fs.readdir(node, 0, 4096, false).unwrap_err(), Errno::NOTDIR);
        }
        assert_eq!(fs.write(root, 0, b"x").unwrap_err(), Errno::ISDIR);
        assert_eq!(fs.truncate(root, 0).unwrap_err(), Errno::ISDIR);
    });
}

#[test]
fn more_files_than_cached_descriptors() {
    on_each_fs(|rig| {
        let fs = rig.fs();
        let files: Vec<_> = (0..1100_u32).map(|i| rig.file(format!("f{i}").as_bytes())).collect();
        for (i, file) in files.iter().enumerate() {
            fs.write(*file, 0, &(i as u64).to_le_bytes()).unwrap();
        }
        for (i, file) in files.iter().enumerate() {
            assert_eq!(fs.read(*file, 0, 8).unwrap(), (i as u64).to_le_bytes());
        }
    });
}

#[test]
fn everything_can_be_flushed() {
    on_each_fs(|rig| {
        let (fs, root) = (rig.fs(), rig.root());
        let file = rig.file(b"f");
        fs.write(file, 0, b"x").unwrap();
        fs.fsync(file, false).unwrap();
        fs.fsync(file, true).unwrap();
        fs.fsync_dir(root).unwrap();
        fs.syncfs().unwrap();
        assert_eq!(fs.fsync_dir(file).unwrap_err(), Errno::NOTDIR);
        let before = fs.statfs().unwrap();
        assert_eq!((before.bsize, before.namelen), (fs.block_bytes(), 255));
        fs.fallocate(file, 0, 1 << 20, 64 << 20).unwrap();
        assert!(fs.statfs().unwrap().bfree <= before.bfree - (64 << 20) / u64::from(before.frsize));
    });
}

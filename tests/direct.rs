//! Direct mode is direct: a gigabyte of reads and overwrites on n1 sends nothing but metadata over the network, and
//! the data stands on the LUN where the map says.

use anyhow::{Context as _, ensure};
use csv_tests::lab::{Lab, MOUNT};
use csv_types::admin::IoCounts;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::time::Duration;

const FILE_MIB: u64 = 512;
const MIB: u64 = 1 << 20;
const DEADLINE: Duration = Duration::from_secs(300);
/// What a gigabyte of data may cost in metadata: opens, layouts, status every second.
const METADATA_BYTES_MAX: u64 = 4 << 20;

/// fio's buffers and its check of them on reading.
fn fio(rw: &str, file: &str, verify: &str) -> Vec<String> {
    let size = format!("--size={FILE_MIB}m");
    let (filename, rw) = (format!("--filename={file}"), format!("--rw={rw}"));
    let fixed = ["fio", "--name=direct", "--ioengine=libaio", "--direct=1", "--bs=1m", "--iodepth=8"];
    let rest = [
        &filename,
        &rw,
        &size,
        "--fallocate=none",
        "--verify=crc32c",
        "--verify_fatal=1",
        "--verify_state_save=0",
        verify,
    ];
    fixed.iter().map(|word| (*word).to_owned()).chain(rest.iter().map(|word| (*word).to_owned())).collect()
}

fn data_bytes(io: &IoCounts) -> u64 {
    io.direct_read_bytes + io.direct_write_bytes
}

#[test]
fn data_does_not_cross_the_network() -> anyhow::Result<()> {
    let lab = Lab::up("direct")?;
    lab.wait_mode("n1", "direct")?;
    let file = format!("{MOUNT}/direct.img");
    // Allocation is the coordinator's work and not part of what is counted.
    lab.exec("n1", &fio("write", &file, "--do_verify=0"), DEADLINE)?.ok("laying the file out")?;

    let (before, wire_before) = (lab.state("n1")?.io, lab.network_bytes("n1")?);
    lab.exec("n1", &fio("write", &file, "--do_verify=1"), DEADLINE)?.ok("overwriting and reading")?;
    let (after, wire_after) = (lab.state("n1")?.io, lab.network_bytes("n1")?);

    let data = data_bytes(&after) - data_bytes(&before);
    let control = after.control_bytes - before.control_bytes;
    let smb = after.smb_bytes - before.smb_bytes;
    let wire = wire_after - wire_before;
    println!("direct: {data} bytes of data; {control} control, {smb} SMB, {wire} on the wire");
    ensure!(data >= 2 * FILE_MIB * MIB, "only {data} bytes went directly; {after:?}");
    ensure!(control < METADATA_BYTES_MAX, "{control} bytes by the control protocol");
    ensure!(smb < METADATA_BYTES_MAX, "{smb} bytes by SMB");
    ensure!(wire < METADATA_BYTES_MAX, "{wire} bytes on the wire");
    ensure!(after.fs_writes == before.fs_writes, "writes went through the coordinator's file system");
    lab.finish()
}

/// The same bytes by file name, by LUN offset on the backing file, and again after an overwrite.
#[test]
fn data_stands_where_the_map_says() -> anyhow::Result<()> {
    let lab = Lab::up("dirmap")?;
    lab.wait_mode("n1", "direct")?;
    let file = format!("{MOUNT}/mapped.img");
    for round in ["one", "two"] {
        // A recognisable stream: the round and a running number in every 16 bytes.
        let stream = format!(
            "seq -f '{round} %011.0f' 0 2097151 | dd of={file} bs=1M iflag=fullblock oflag=direct conv=notrunc,fsync status=none"
        );
        lab.sh("n1", &stream)?;
        let extents = lab.map("n1", "mapped.img")?;
        let mapped: u64 = extents.iter().map(|extent| extent.len).sum();
        ensure!(mapped >= 32 * MIB, "only {mapped} bytes are mapped: {extents:?}");
        let lun = std::fs::OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_DIRECT)
            .open(lab.lun_image())
            .context("opening the LUN's backing file")?;
        for extent in &extents {
            check_extent(
                &lun,
                round,
                extent.file_offset,
                extent.lun_offset,
                extent.len.min(32 * MIB - extent.file_offset),
            )?;
        }
        println!("direct: {} extents checked on the LUN, round {round}", extents.len());
    }
    lab.finish()
}

fn check_extent(
    lun: &std::fs::File,
    round: &str,
    file_offset: u64,
    lun_offset: u64,
    len: u64,
) -> anyhow::Result<()> {
    const PAGE: usize = 4096;
    let mut buffer = vec![0u8; 2 * PAGE];
    let start = buffer.as_ptr().align_offset(PAGE);
    for at in (0..len).step_by(PAGE) {
        let page = &mut buffer[start..start + PAGE];
        lun.read_exact_at(page, lun_offset + at).with_context(|| format!("LUN at {}", lun_offset + at))?;
        for (line, got) in page.chunks_exact(16).enumerate() {
            let number = (file_offset + at) / 16 + line as u64;
            let want = format!("{round} {number:011}\n");
            ensure!(
                got == want.as_bytes(),
                "LUN at {} should hold {want:?} but holds {:?}",
                lun_offset + at + line as u64 * 16,
                String::from_utf8_lossy(got)
            );
        }
    }
    Ok(())
}

//! Device ioctls of the reservation code: SG_IO, NVMe pass-through, `IOC_PR_*`, loop devices.
//!
//! Each function returns the kernel's answer as it is, a positive one too (a device status). Nothing is retried:
//! none of these calls returns `EINTR` unless the process is being killed.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// `SG_IO` of scsi/sg.h.
const SG_IO: libc::Ioctl = 0x2285;
const SG_DXFER_TO_DEV: i32 = -2;
const SG_DXFER_FROM_DEV: i32 = -3;
/// Longest sense data that SPC-4 knows, in bytes.
const SENSE_BYTES_MAX: u8 = 252;

/// Data of a SCSI command.
pub(crate) enum SgData<'a> {
    ToDevice(&'a [u8]),
    FromDevice(&'a mut [u8]),
}

/// The answer to a SCSI command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct SgReply {
    /// SCSI status byte.
    pub(crate) status: u8,
    /// The adapter's status (`DID_*`), 0 when the command reached the device.
    pub(crate) host_status: u16,
    pub(crate) sense: Vec<u8>,
    /// Bytes that really came or went.
    pub(crate) transferred: usize,
}

/// `struct sg_io_hdr`.
#[repr(C)]
struct SgIoHdr {
    interface_id: i32,
    dxfer_direction: i32,
    cmd_len: u8,
    mx_sb_len: u8,
    iovec_count: u16,
    dxfer_len: u32,
    dxferp: *mut u8,
    cmdp: *const u8,
    sbp: *mut u8,
    timeout_ms: u32,
    flags: u32,
    pack_id: i32,
    usr_ptr: *mut u8,
    status: u8,
    masked_status: u8,
    msg_status: u8,
    sb_len_wr: u8,
    host_status: u16,
    driver_status: u16,
    resid: i32,
    duration: u32,
    info: u32,
}

/// Sends one SCSI command and waits for its end.
///
/// # Errors
/// The errno of the ioctl: the command was not sent (`EPERM`, `ENOTTY`, `ENODEV`), or `EIO`.
pub(crate) fn scsi_command(
    device: BorrowedFd<'_>,
    cdb: &[u8],
    data: SgData<'_>,
    timeout_ms: u32,
) -> io::Result<SgReply> {
    let mut sense = [0_u8; SENSE_BYTES_MAX as usize];
    let (direction, pointer, len) = match data {
        SgData::ToDevice(bytes) => (SG_DXFER_TO_DEV, bytes.as_ptr().cast_mut(), bytes.len()),
        SgData::FromDevice(bytes) => (SG_DXFER_FROM_DEV, bytes.as_mut_ptr(), bytes.len()),
    };
    let mut header = SgIoHdr {
        interface_id: i32::from(b'S'),
        dxfer_direction: direction,
        cmd_len: u8::try_from(cdb.len()).map_err(io::Error::other)?,
        mx_sb_len: SENSE_BYTES_MAX,
        iovec_count: 0,
        dxfer_len: u32::try_from(len).map_err(io::Error::other)?,
        dxferp: pointer,
        cmdp: cdb.as_ptr(),
        sbp: sense.as_mut_ptr(),
        timeout_ms,
        flags: 0,
        pack_id: 0,
        usr_ptr: std::ptr::null_mut(),
        status: 0,
        masked_status: 0,
        msg_status: 0,
        sb_len_wr: 0,
        host_status: 0,
        driver_status: 0,
        resid: 0,
        duration: 0,
        info: 0,
    };
    // SAFETY: the header has the layout of `struct sg_io_hdr`; the three buffers that it points to outlive the call
    // and are as long as it says. With TO_DEV the kernel only reads the data, so the cast from const is sound.
    unsafe { ioctl(device, SG_IO, &raw mut header) }?;
    let left = usize::try_from(header.resid).unwrap_or(0);
    let sense_len = usize::from(header.sb_len_wr.min(SENSE_BYTES_MAX));
    Ok(SgReply {
        status: header.status,
        host_status: header.host_status,
        sense: sense[..sense_len].to_vec(),
        transferred: len.saturating_sub(left),
    })
}

/// `struct nvme_passthru_cmd`, which `struct nvme_admin_cmd` is too.
#[repr(C)]
#[derive(Default)]
struct NvmeCommand {
    opcode: u8,
    flags: u8,
    reserved1: u16,
    nsid: u32,
    cdw2: u32,
    cdw3: u32,
    metadata: u64,
    addr: u64,
    metadata_len: u32,
    data_len: u32,
    cdw10_to_15: [u32; 6],
    timeout_ms: u32,
    result: u32,
}
const _: () = assert!(size_of::<NvmeCommand>() == 72);

const NVME_IOCTL_ID: libc::Ioctl = 0x4e40;
const NVME_IOCTL_ADMIN_CMD: libc::Ioctl = 0xc048_4e41;
const NVME_IOCTL_IO_CMD: libc::Ioctl = 0xc048_4e43;

/// Which queue an NVMe command goes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum NvmeQueue {
    Admin,
    Io,
}

/// Number of the namespace that a block device stands for.
///
/// # Errors
/// The errno; `ENOTTY` when it is no NVMe device.
pub(crate) fn nvme_namespace(device: BorrowedFd<'_>) -> io::Result<u32> {
    // SAFETY: NVME_IOCTL_ID takes no argument.
    let id = unsafe { ioctl(device, NVME_IOCTL_ID, std::ptr::null_mut::<u8>()) }?;
    u32::try_from(id).map_err(io::Error::other)
}

/// Sends one NVMe command; `data` is read or filled as the opcode says. The NVMe status field (type and code, 0 is
/// success).
///
/// # Errors
/// The errno of the ioctl.
pub(crate) fn nvme_command(
    device: BorrowedFd<'_>,
    queue: NvmeQueue,
    opcode: u8,
    nsid: u32,
    cdw10_11: [u32; 2],
    data: &mut [u8],
    timeout_ms: u32,
) -> io::Result<u16> {
    let mut command = NvmeCommand {
        opcode,
        nsid,
        addr: data.as_mut_ptr().expose_provenance() as u64,
        data_len: u32::try_from(data.len()).map_err(io::Error::other)?,
        cdw10_to_15: [cdw10_11[0], cdw10_11[1], 0, 0, 0, 0],
        timeout_ms,
        ..NvmeCommand::default()
    };
    let request = match queue {
        NvmeQueue::Admin => NVME_IOCTL_ADMIN_CMD,
        NvmeQueue::Io => NVME_IOCTL_IO_CMD,
    };
    // SAFETY: `command` has the layout of `struct nvme_passthru_cmd`; `addr` is `data_len` bytes that are exclusively
    // ours for the call, whichever way they are transferred.
    let status = unsafe { ioctl(device, request, &raw mut command) }?;
    // Without the "do not retry" and "more" bits.
    Ok(u16::try_from(status & 0x7ff).unwrap_or(0x7ff))
}

/// The `IOC_PR_*` requests that change something.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum PrRequest {
    Register { old: u64, new: u64, ignore: bool },
    Reserve { key: u64, kind: u32 },
    Release { key: u64, kind: u32 },
    Preempt { own: u64, victim: u64, kind: u32, abort: bool },
    Clear { key: u64 },
}

const IOC_PR_REGISTER: libc::Ioctl = 0x4018_70c8;
const IOC_PR_RESERVE: libc::Ioctl = 0x4010_70c9;
const IOC_PR_RELEASE: libc::Ioctl = 0x4010_70ca;
const IOC_PR_PREEMPT: libc::Ioctl = 0x4018_70cb;
const IOC_PR_PREEMPT_ABORT: libc::Ioctl = 0x4018_70cc;
const IOC_PR_CLEAR: libc::Ioctl = 0x4010_70cd;
const IOC_PR_READ_KEYS: libc::Ioctl = 0xc010_70ce;
const IOC_PR_READ_RESERVATION: libc::Ioctl = 0x8010_70cf;
const PR_FL_IGNORE_KEY: u32 = 1;

/// `struct pr_registration`, `pr_preempt`: 24 bytes; `pr_reservation`, `pr_clear`: the first 8 and the last 8.
#[repr(C)]
struct PrLong {
    first: u64,
    second: u64,
    third: u32,
    fourth: u32,
}

#[repr(C)]
struct PrShort {
    key: u64,
    second: u32,
    third: u32,
}

/// Sends a request; the device's status, 0 for success.
///
/// # Errors
/// The errno: `EOPNOTSUPP` or `ENOTTY` without support, `EPERM`.
pub(crate) fn pr_request(device: BorrowedFd<'_>, request: PrRequest) -> io::Result<i32> {
    let (number, first, second, third) = match request {
        PrRequest::Register { old, new, ignore } => {
            (IOC_PR_REGISTER, old, Some(new), if ignore { PR_FL_IGNORE_KEY } else { 0 })
        }
        PrRequest::Preempt { own, victim, kind, abort } => {
            (if abort { IOC_PR_PREEMPT_ABORT } else { IOC_PR_PREEMPT }, own, Some(victim), kind)
        }
        PrRequest::Reserve { key, kind } => (IOC_PR_RESERVE, key, None, kind),
        PrRequest::Release { key, kind } => (IOC_PR_RELEASE, key, None, kind),
        PrRequest::Clear { key } => (IOC_PR_CLEAR, key, None, 0),
    };
    if let Some(second) = second {
        let mut arg = PrLong { first, second, third, fourth: 0 };
        // SAFETY: the requests with two keys take 24 bytes laid out as `PrLong`, and only read them.
        unsafe { ioctl(device, number, &raw mut arg) }
    } else {
        let mut arg = PrShort { key: first, second: third, third: 0 };
        // SAFETY: the requests with one key take 16 bytes laid out as `PrShort`, and only read them.
        unsafe { ioctl(device, number, &raw mut arg) }
    }
}

/// Generation and keys (Linux 6.19). The second is `None` when there are more keys than `max`.
///
/// # Errors
/// The errno: `ENOTTY` on older kernels.
pub(crate) fn pr_read_keys(device: BorrowedFd<'_>, max: u32) -> io::Result<(i32, u32, Option<Vec<u64>>)> {
    #[repr(C)]
    struct ReadKeys {
        generation: u32,
        num_keys: u32,
        keys: u64,
    }
    let mut keys = vec![0_u64; usize::try_from(max).map_err(io::Error::other)?];
    let mut arg =
        ReadKeys { generation: 0, num_keys: max, keys: keys.as_mut_ptr().expose_provenance() as u64 };
    // SAFETY: `arg` has the layout of `struct pr_read_keys`; `keys` has room for the `num_keys` keys it promises.
    let status = unsafe { ioctl(device, IOC_PR_READ_KEYS, &raw mut arg) }?;
    let count = usize::try_from(arg.num_keys).map_err(io::Error::other)?;
    if count > keys.len() {
        return Ok((status, arg.generation, None));
    }
    keys.truncate(count);
    Ok((status, arg.generation, Some(keys)))
}

/// Key and type (in the numbers of linux/pr.h, 0 for none) of the reservation (Linux 6.19).
///
/// # Errors
/// The errno: `ENOTTY` on older kernels.
pub(crate) fn pr_read_reservation(device: BorrowedFd<'_>) -> io::Result<(i32, u64, u32)> {
    let mut arg = PrShort { key: 0, second: 0, third: 0 };
    // SAFETY: `PrShort` has the layout of `struct pr_read_reservation`, which the kernel fills.
    let status = unsafe { ioctl(device, IOC_PR_READ_RESERVATION, &raw mut arg) }?;
    Ok((status, arg.key, arg.third))
}

const LOOP_SET_STATUS64: libc::Ioctl = 0x4c04;
const LOOP_GET_STATUS64: libc::Ioctl = 0x4c05;

/// `struct loop_info64`.
#[repr(C)]
#[derive(Debug, Clone)]
pub(crate) struct LoopInfo {
    /// `st_dev` and inode of the backing file.
    pub(crate) device: u64,
    pub(crate) inode: u64,
    rdevice: u64,
    /// First byte of the file that the device shows.
    pub(crate) offset: u64,
    /// Most bytes that it shows; 0 for all.
    pub(crate) size_limit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; 64],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}
const _: () = assert!(size_of::<LoopInfo>() == 232);

/// State of a loop device.
///
/// # Errors
/// The errno: `ENXIO` when nothing is attached.
pub(crate) fn loop_info(device: BorrowedFd<'_>) -> io::Result<LoopInfo> {
    let mut info = LoopInfo {
        device: 0,
        inode: 0,
        rdevice: 0,
        offset: 0,
        size_limit: 0,
        number: 0,
        encrypt_type: 0,
        encrypt_key_size: 0,
        flags: 0,
        file_name: [0; 64],
        crypt_name: [0; 64],
        encrypt_key: [0; 32],
        init: [0; 2],
    };
    // SAFETY: `LoopInfo` has the layout of `struct loop_info64`, which the kernel fills.
    unsafe { ioctl(device, LOOP_GET_STATUS64, &raw mut info) }?;
    Ok(info)
}

/// Changes offset and size limit of a loop device. The kernel writes the device's own dirty page cache first, and
/// waits for all I/O under way before the change.
///
/// # Errors
/// The errno: `EPERM`, `ENXIO` when nothing is attached.
pub(crate) fn set_loop_info(device: BorrowedFd<'_>, info: &LoopInfo) -> io::Result<()> {
    let mut info = info.clone();
    // SAFETY: `LoopInfo` has the layout of `struct loop_info64`, which the kernel only reads.
    unsafe { ioctl(device, LOOP_SET_STATUS64, &raw mut info) }?;
    Ok(())
}

/// # Safety
/// `arg` must be what `request` takes.
unsafe fn ioctl<T>(device: BorrowedFd<'_>, request: libc::Ioctl, arg: *mut T) -> io::Result<i32> {
    // SAFETY: the descriptor is open for as long as the borrow; the caller vouches for the argument.
    let rc = unsafe { libc::ioctl(device.as_raw_fd(), request, arg) };
    if rc < 0 { Err(io::Error::last_os_error()) } else { Ok(rc) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::ioctl::opcode;

    #[test]
    fn request_numbers_are_those_of_the_headers() {
        let pr = |number| opcode::write::<[u8; 24]>(b'p', number);
        let pr_short = |number| opcode::write::<[u8; 16]>(b'p', number);
        for (have, want) in [
            (IOC_PR_REGISTER, pr(200)),
            (IOC_PR_RESERVE, pr_short(201)),
            (IOC_PR_RELEASE, pr_short(202)),
            (IOC_PR_PREEMPT, pr(203)),
            (IOC_PR_PREEMPT_ABORT, pr(204)),
            (IOC_PR_CLEAR, pr_short(205)),
            (IOC_PR_READ_KEYS, opcode::read_write::<[u8; 16]>(b'p', 206)),
            (IOC_PR_READ_RESERVATION, opcode::read::<[u8; 16]>(b'p', 207)),
            (NVME_IOCTL_ID, opcode::none(b'N', 0x40)),
            (NVME_IOCTL_ADMIN_CMD, opcode::read_write::<NvmeCommand>(b'N', 0x41)),
            (NVME_IOCTL_IO_CMD, opcode::read_write::<NvmeCommand>(b'N', 0x43)),
        ] {
            assert_eq!(have, libc::Ioctl::from(want), "{want:#x}");
        }
        assert_eq!((size_of::<PrLong>(), size_of::<PrShort>()), (24, 16));
        #[cfg(target_pointer_width = "64")]
        assert_eq!(size_of::<SgIoHdr>(), 88);
    }
}

//! What runs inside a `csv-smbc` process: one connection to the server, files in slots, one request at a time.
//!
//! The process ends when the socket to the pool closes. It never repairs a connection: an error that may mean a
//! lost connection is answered with `FLAG_BROKEN`, and the pool replaces the process. Which errors are a plain
//! refusal by the server is decided in `is_refusal`; everything else counts as broken, because libsmbclient
//! gives EINVAL or EBADF for a lost connection as well, and Samba turns errors of a FUSE file system that
//! has gone into EACCES.

use crate::wire::{
    Connect, DATA_BYTES_MAX, FLAG_BROKEN, FLAG_WRITE, HEADER_BYTES, Op, Reply, Request, StatVfs,
};
use pavao::{SmbClient, SmbCredentials, SmbDialect, SmbEncryptionLevel, SmbFile, SmbOpenOptions, SmbOptions};
use std::collections::HashMap;
use std::fmt::Write as _;
use std::io::{self, IoSlice, Read, Seek, SeekFrom, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

/// Result of one operation: value, payload bytes at the front of the buffer.
type Done = Result<(u64, usize), Failed>;

/// Why an operation did not succeed.
struct Failed {
    errno: i32,
    broken: bool,
}

/// Serves `socket` until the other end closes it.
///
/// # Errors
/// The socket failed or carried damage; the process should end.
pub fn serve(mut socket: UnixStream) -> io::Result<()> {
    let mut buffer = Vec::new();
    let Some(request) = receive(&mut socket, &mut buffer)? else { return Ok(()) };
    if request.op != Op::Connect {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "first request is not a connect"));
    }
    let connect = Connect::decode(&buffer[..request.payload as usize])?;
    // The password lay in this buffer.
    buffer.fill(0);
    let client = match connect_to(&connect) {
        Ok(client) => client,
        Err(error) => {
            let failed = Failed { errno: errno_of(&error), broken: true };
            return answer(&mut socket, request.id, Err(failed), &buffer);
        }
    };
    answer(&mut socket, request.id, Ok((0, 0)), &buffer)?;
    let mut session = Session { client: &client, files: HashMap::new() };
    while let Some(request) = receive(&mut socket, &mut buffer)? {
        let done = session.perform(&request, &mut buffer);
        answer(&mut socket, request.id, done, &buffer)?;
    }
    Ok(())
}

/// The next request, its payload at the front of `buffer`; `None` at the end of the conversation.
fn receive(socket: &mut UnixStream, buffer: &mut Vec<u8>) -> io::Result<Option<Request>> {
    let mut header = [0; HEADER_BYTES];
    let room = buffer.len();
    // Header and a small payload arrive with one system call.
    let got = loop {
        let parts = &mut [io::IoSliceMut::new(&mut header), io::IoSliceMut::new(&mut buffer[..room])];
        match socket.read_vectored(parts) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            other => break other?,
        }
    };
    if got == 0 {
        return Ok(None);
    }
    if got < HEADER_BYTES {
        socket.read_exact(&mut header[got..])?;
    }
    let request = Request::decode(&header)?;
    let have = got.saturating_sub(HEADER_BYTES);
    let payload = request.payload as usize;
    let needed = payload.max(request.len as usize).max(StatVfs::BYTES);
    if buffer.len() < needed {
        buffer.resize(needed, 0);
    }
    if have < payload {
        socket.read_exact(&mut buffer[have..payload])?;
    }
    Ok(Some(request))
}

fn answer(socket: &mut UnixStream, id: u64, done: Done, buffer: &[u8]) -> io::Result<()> {
    let (value, len, errno, flags) = match done {
        Ok((value, len)) => (value, len, 0, 0),
        Err(failed) => (0, 0, failed.errno, if failed.broken { FLAG_BROKEN } else { 0 }),
    };
    let payload = u32::try_from(len).unwrap_or(u32::MAX);
    let header = Reply { id, value, errno, flags, payload }.encode();
    let data = &buffer[..len];
    let sent = loop {
        match socket.write_vectored(&[IoSlice::new(&header), IoSlice::new(data)]) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            other => break other?,
        }
    };
    if sent < HEADER_BYTES {
        socket.write_all(&header[sent..])?;
    }
    socket.write_all(&data[sent.saturating_sub(HEADER_BYTES)..])
}

fn connect_to(connect: &Connect) -> Result<SmbClient, pavao::SmbError> {
    let credentials = SmbCredentials::default()
        .server(format!("smb://{}", connect.server))
        .share(format!("/{}", url_path(&connect.share)))
        .username(&connect.user)
        .password(&connect.password)
        .workgroup("CSVFS");
    let level = if connect.encrypt { SmbEncryptionLevel::Require } else { SmbEncryptionLevel::None };
    let options = SmbOptions::default()
        .min_protocol(SmbDialect::Smb311)
        .max_protocol(SmbDialect::Smb311)
        .encryption_level(level)
        .case_sensitive(true)
        .no_auto_anonymous_login(true)
        .one_share_per_server(true);
    let client = SmbClient::new(credentials, options)?;
    client.set_timeout(Duration::from_millis(u64::from(connect.timeout_ms)))?;
    // libsmbclient connects at the first use; do it now, so that a refused password is told from the rest.
    client.stat("/")?;
    Ok(client)
}

/// Percent-encodes what libsmbclient would take for a part of the URL.
fn url_path(path: &str) -> String {
    let mut out = String::with_capacity(path.len() + 8);
    for byte in path.bytes() {
        if byte.is_ascii_alphanumeric() || b"/._-".contains(&byte) {
            out.push(char::from(byte));
        } else {
            // Writing to a String cannot fail.
            let _ = write!(out, "%{byte:02X}");
        }
    }
    out
}

fn errno_of(error: &pavao::SmbError) -> i32 {
    match error {
        pavao::SmbError::Io(error) => error.raw_os_error().unwrap_or(libc::EIO),
        pavao::SmbError::NulInPath(_) => libc::ENOENT,
        pavao::SmbError::BadFileDescriptor
        | pavao::SmbError::BadValue
        | pavao::SmbError::InvalidProtocolRange { .. }
        | pavao::SmbError::ProtocolConfiguration
        | pavao::SmbError::ProtocolConfigurationConflict
        | pavao::SmbError::Mutex => libc::EIO,
    }
}

/// Is this the server's word about the request, rather than a sign that the connection is gone?
fn is_refusal(op: Op, errno: i32) -> bool {
    const OF_DATA: [i32; 5] = [libc::ENOSPC, libc::EDQUOT, libc::EFBIG, libc::EROFS, libc::EISDIR];
    const OF_NAMES: [i32; 6] =
        [libc::ENOENT, libc::ENOTDIR, libc::EACCES, libc::EPERM, libc::ENAMETOOLONG, libc::ELOOP];
    match op {
        Op::ReadAt | Op::WriteAt | Op::Size => OF_DATA.contains(&errno),
        Op::Open | Op::StatVfs => OF_DATA.contains(&errno) || OF_NAMES.contains(&errno),
        Op::Connect | Op::Close | Op::Ping => false,
    }
}

struct Session<'a> {
    client: &'a SmbClient,
    files: HashMap<u32, SmbFile<'a>>,
}

impl<'a> Session<'a> {
    fn perform(&mut self, request: &Request, buffer: &mut [u8]) -> Done {
        self.try_perform(request, buffer)
            .map_err(|errno| Failed { errno, broken: !is_refusal(request.op, errno) })
    }

    fn try_perform(&mut self, request: &Request, buffer: &mut [u8]) -> Result<(u64, usize), i32> {
        let payload = request.payload as usize;
        match request.op {
            Op::Connect => Err(libc::EALREADY),
            Op::Open => self.open(request, &buffer[..payload]).map(|()| (0, 0)),
            Op::Close => {
                self.files.remove(&request.slot);
                Ok((0, 0))
            }
            Op::ReadAt => self.read(request, buffer).map(|len| (0, len)),
            Op::WriteAt => self.write(request, &buffer[..payload]).map(|()| (0, 0)),
            Op::Size => Ok((self.file(request.slot)?.seek(SeekFrom::End(0)).map_err(errno_of_io)?, 0)),
            Op::StatVfs => {
                let stat = self.client.statvfs(path_of(&buffer[..payload])?).map_err(|e| errno_of(&e))?;
                let encoded = StatVfs {
                    block_bytes: stat.frsize.max(1),
                    blocks: stat.blocks,
                    blocks_free: stat.bfree,
                    blocks_available: stat.bavail,
                }
                .encode();
                buffer[..encoded.len()].copy_from_slice(&encoded);
                Ok((0, encoded.len()))
            }
            Op::Ping => self.client.stat("/").map(|_| (0, 0)).map_err(|e| errno_of(&e)),
        }
    }

    fn open(&mut self, request: &Request, path: &[u8]) -> Result<(), i32> {
        self.files.remove(&request.slot);
        let options = SmbOpenOptions::default().read(true).write(request.flags & FLAG_WRITE != 0);
        let file = self.client.open_with(path_of(path)?, options).map_err(|e| errno_of(&e))?;
        self.files.insert(request.slot, file);
        Ok(())
    }

    fn file(&mut self, slot: u32) -> Result<&mut SmbFile<'a>, i32> {
        self.files.get_mut(&slot).ok_or(libc::EBADF)
    }

    /// Seeking is local to libsmbclient, so this is one round trip to the server.
    fn read(&mut self, request: &Request, buffer: &mut [u8]) -> Result<usize, i32> {
        let len = (request.len as usize).min(DATA_BYTES_MAX);
        let file = self.file(request.slot)?;
        file.seek(SeekFrom::Start(request.offset)).map_err(errno_of_io)?;
        file.read(&mut buffer[..len]).map_err(errno_of_io)
    }

    fn write(&mut self, request: &Request, data: &[u8]) -> Result<(), i32> {
        let file = self.file(request.slot)?;
        file.seek(SeekFrom::Start(request.offset)).map_err(errno_of_io)?;
        file.write_all(data).map_err(errno_of_io)
    }
}

fn errno_of_io(error: io::Error) -> i32 {
    error.raw_os_error().unwrap_or(libc::EIO)
}

/// Path on the share as part of the URL, with one slash before it.
fn path_of(bytes: &[u8]) -> Result<String, i32> {
    let path = std::str::from_utf8(bytes).map_err(|_| libc::ENOENT)?;
    Ok(format!("/{}", url_path(path.trim_start_matches('/'))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn url_characters_are_encoded() {
        assert_eq!(path_of("/a b/%41;#ü".as_bytes()), Ok("/a%20b/%2541%3B%23%C3%BC".to_owned()));
    }

    #[test]
    fn a_lost_handle_or_vanished_file_system_is_no_refusal() {
        for errno in [libc::EBADF, libc::EINVAL, libc::EIO, libc::EACCES, libc::ECONNRESET] {
            assert!(!is_refusal(Op::WriteAt, errno));
        }
        assert!(is_refusal(Op::WriteAt, libc::ENOSPC));
        assert!(is_refusal(Op::Open, libc::ENOENT));
    }
}

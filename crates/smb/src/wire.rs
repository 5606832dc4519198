//! What the pool and a `csv-smbc` process say to each other over a Unix stream socket: one request, one reply,
//! never two at a time. Header of 32 bytes, little endian, then the payload.
//!
//! ```text
//! request:  id u64 | offset u64 | op u8, flags u8, 0 u16 | slot u32 | len u32 | payload u32
//! reply:    id u64 | value u64  | errno i32 | flags u32  | payload u32 | 0 u32
//! ```
//!
//! A header that does not decode ends the conversation: both sides are of one build, so it means damage.

use std::io;

/// Bytes of a header.
pub const HEADER_BYTES: usize = 32;
/// Most data one request or reply carries, in bytes; the pool splits what is longer.
pub const DATA_BYTES_MAX: usize = 4 << 20;
/// Most files a worker keeps open.
pub const SLOTS_MAX: u32 = 256;
/// Request flag of `Open`: for writing too.
pub const FLAG_WRITE: u8 = 1;
/// Reply flag: the connection can be used no more and the outcome is not known; replace the worker.
pub const FLAG_BROKEN: u32 = 1;

/// Operations.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Op {
    /// First request: payload is a [`Connect`].
    Connect,
    /// Payload: path. Opens it in `slot`, closing what was there.
    Open,
    /// Closes `slot`.
    Close,
    /// Reads `len` bytes at `offset` of `slot`; a short payload means end of file.
    ReadAt,
    /// Writes the payload at `offset` of `slot`.
    WriteAt,
    /// Size of the file in `slot`, as `value`.
    Size,
    /// Payload: path. Reply payload: a [`StatVfs`].
    StatVfs,
    /// A round trip to the server.
    Ping,
}

impl Op {
    const ALL: [Op; 8] =
        [Op::Connect, Op::Open, Op::Close, Op::ReadAt, Op::WriteAt, Op::Size, Op::StatVfs, Op::Ping];

    /// For messages.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Op::Connect => "connect",
            Op::Open => "open",
            Op::Close => "close",
            Op::ReadAt => "read",
            Op::WriteAt => "write",
            Op::Size => "size",
            Op::StatVfs => "statvfs",
            Op::Ping => "ping",
        }
    }
}

/// Header of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    /// Echoed in the reply.
    pub id: u64,
    /// File offset in bytes.
    pub offset: u64,
    /// Operation.
    pub op: Op,
    /// `FLAG_WRITE`.
    pub flags: u8,
    /// File slot.
    pub slot: u32,
    /// Bytes to read.
    pub len: u32,
    /// Bytes of payload behind the header.
    pub payload: u32,
}

/// Header of a reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reply {
    /// Of the request.
    pub id: u64,
    /// Result of `Size`.
    pub value: u64,
    /// 0 or a Linux errno.
    pub errno: i32,
    /// `FLAG_BROKEN`.
    pub flags: u32,
    /// Bytes of payload behind the header.
    pub payload: u32,
}

fn damage(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("damaged worker message: {what}"))
}

/// Takes fixed-size fields off the front; the headers are arrays of known length, so it always fits.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn take<const N: usize>(&mut self) -> [u8; N] {
        let mut field = [0; N];
        let (head, rest) = self.0.split_at(N);
        field.copy_from_slice(head);
        self.0 = rest;
        field
    }
}

impl Request {
    /// As bytes.
    #[must_use]
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut out = [0; HEADER_BYTES];
        let op = Op::ALL.iter().position(|op| *op == self.op).and_then(|at| u8::try_from(at).ok());
        out[0..8].copy_from_slice(&self.id.to_le_bytes());
        out[8..16].copy_from_slice(&self.offset.to_le_bytes());
        out[16] = op.unwrap_or(u8::MAX);
        out[17] = self.flags;
        out[20..24].copy_from_slice(&self.slot.to_le_bytes());
        out[24..28].copy_from_slice(&self.len.to_le_bytes());
        out[28..32].copy_from_slice(&self.payload.to_le_bytes());
        out
    }

    /// From bytes.
    ///
    /// # Errors
    /// Unknown operation, or lengths and slots beyond the bounds.
    pub fn decode(bytes: &[u8; HEADER_BYTES]) -> io::Result<Self> {
        let mut fields = Fields(bytes);
        let id = u64::from_le_bytes(fields.take());
        let offset = u64::from_le_bytes(fields.take());
        let [op, flags, _, _] = fields.take();
        let slot = u32::from_le_bytes(fields.take());
        let len = u32::from_le_bytes(fields.take());
        let payload = u32::from_le_bytes(fields.take());
        let op = *Op::ALL.get(usize::from(op)).ok_or_else(|| damage("unknown operation"))?;
        if len as usize > DATA_BYTES_MAX || payload as usize > DATA_BYTES_MAX || slot >= SLOTS_MAX {
            return Err(damage("length or slot beyond the bound"));
        }
        Ok(Request { id, offset, op, flags, slot, len, payload })
    }
}

impl Reply {
    /// See [`FLAG_BROKEN`].
    #[must_use]
    pub fn is_broken(&self) -> bool {
        self.flags & FLAG_BROKEN != 0
    }

    /// As bytes.
    #[must_use]
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut out = [0; HEADER_BYTES];
        out[0..8].copy_from_slice(&self.id.to_le_bytes());
        out[8..16].copy_from_slice(&self.value.to_le_bytes());
        out[16..20].copy_from_slice(&self.errno.to_le_bytes());
        out[20..24].copy_from_slice(&self.flags.to_le_bytes());
        out[24..28].copy_from_slice(&self.payload.to_le_bytes());
        out
    }

    /// From bytes.
    ///
    /// # Errors
    /// A payload beyond the bound.
    pub fn decode(bytes: &[u8; HEADER_BYTES]) -> io::Result<Self> {
        let mut fields = Fields(bytes);
        let id = u64::from_le_bytes(fields.take());
        let value = u64::from_le_bytes(fields.take());
        let errno = i32::from_le_bytes(fields.take());
        let flags = u32::from_le_bytes(fields.take());
        let payload = u32::from_le_bytes(fields.take());
        if payload as usize > DATA_BYTES_MAX {
            return Err(damage("payload beyond the bound"));
        }
        Ok(Reply { id, value, errno, flags, payload })
    }
}

/// Payload of `Op::Connect`.
#[derive(Clone, PartialEq, Eq)]
pub struct Connect {
    /// Address and port, an IPv6 address in brackets.
    pub server: String,
    /// Share.
    pub share: String,
    /// User.
    pub user: String,
    /// Password.
    pub password: String,
    /// Require encryption.
    pub encrypt: bool,
    /// How long libsmbclient waits for an answer, in milliseconds.
    pub timeout_ms: u32,
}

impl std::fmt::Debug for Connect {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Connect")
            .field("server", &self.server)
            .field("share", &self.share)
            .finish_non_exhaustive()
    }
}

impl Connect {
    /// As bytes: flag, time-out, then four strings with a length of 32 bits before each.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = vec![u8::from(self.encrypt)];
        out.extend(self.timeout_ms.to_le_bytes());
        for text in [&self.server, &self.share, &self.user, &self.password] {
            out.extend(u32::try_from(text.len()).unwrap_or(u32::MAX).to_le_bytes());
            out.extend(text.as_bytes());
        }
        out
    }

    /// From bytes.
    ///
    /// # Errors
    /// Too short, or not UTF-8.
    pub fn decode(bytes: &[u8]) -> io::Result<Self> {
        let (flag, rest) = bytes.split_first().ok_or_else(|| damage("empty connect"))?;
        let (timeout, mut rest) = rest.split_first_chunk().ok_or_else(|| damage("short connect"))?;
        let mut text = || -> io::Result<String> {
            let (len, behind) = rest.split_first_chunk().ok_or_else(|| damage("short connect"))?;
            let len = u32::from_le_bytes(*len) as usize;
            let (text, behind) = behind.split_at_checked(len).ok_or_else(|| damage("short connect"))?;
            rest = behind;
            String::from_utf8(text.to_vec()).map_err(|_| damage("connect is not UTF-8"))
        };
        Ok(Connect {
            server: text()?,
            share: text()?,
            user: text()?,
            password: text()?,
            encrypt: *flag != 0,
            timeout_ms: u32::from_le_bytes(*timeout),
        })
    }
}

/// Space on the share, as statvfs tells it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StatVfs {
    /// Bytes of a block.
    pub block_bytes: u64,
    /// All blocks.
    pub blocks: u64,
    /// Free blocks.
    pub blocks_free: u64,
    /// Free blocks for ordinary users.
    pub blocks_available: u64,
}

impl StatVfs {
    /// Bytes of the encoding.
    pub const BYTES: usize = 32;

    /// As bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        [self.block_bytes, self.blocks, self.blocks_free, self.blocks_available]
            .iter()
            .flat_map(|value| value.to_le_bytes())
            .collect()
    }

    /// From bytes.
    #[must_use]
    pub fn decode(bytes: &[u8; Self::BYTES]) -> Self {
        let mut fields = Fields(bytes);
        let mut next = || u64::from_le_bytes(fields.take());
        StatVfs { block_bytes: next(), blocks: next(), blocks_free: next(), blocks_available: next() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn headers_round_trip(
            id: u64, offset: u64, op in 0..Op::ALL.len(), flags: u8, slot in 0..SLOTS_MAX,
            len in 0..=DATA_BYTES_MAX, payload in 0..=DATA_BYTES_MAX, errno: i32, bits: u32,
        ) {
            let (len, payload) = (u32::try_from(len).unwrap(), u32::try_from(payload).unwrap());
            let request = Request { id, offset, op: Op::ALL[op], flags, slot, len, payload };
            prop_assert_eq!(Request::decode(&request.encode()).unwrap(), request);
            let reply = Reply { id, value: offset, errno, flags: bits, payload };
            prop_assert_eq!(Reply::decode(&reply.encode()).unwrap(), reply);
        }

        #[test]
        fn damaged_messages_do_not_panic(
            header in any::<[u8; HEADER_BYTES]>(), connect in prop::collection::vec(any::<u8>(), 0..60),
        ) {
            if let Ok(request) = Request::decode(&header) {
                prop_assert!(request.payload as usize <= DATA_BYTES_MAX);
            }
            if let Ok(decoded) = Connect::decode(&connect) {
                prop_assert!(decoded.server.len() < connect.len());
            }
        }
    }

    #[test]
    fn connect_round_trips_and_hides_the_password() {
        let connect = Connect {
            server: "10.0.0.2:445".into(),
            share: "vol".into(),
            user: "u".into(),
            password: "geheim".into(),
            encrypt: true,
            timeout_ms: 7,
        };
        assert_eq!(Connect::decode(&connect.encode()).unwrap(), connect);
        assert!(!format!("{connect:?}").contains("geheim"));
    }
}

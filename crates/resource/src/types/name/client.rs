//! A DNS client for one server: questions, and updates (RFC 2136) signed with TSIG (RFC 8945).
//!
//! Updates go by TCP: one that is sent twice after a lost answer would meet its own result. Questions go by UDP, and by TCP
//! when the answer was cut. Messages and signatures are hickory-proto's.

use hickory_proto::op::{Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::rdata::tsig::TsigAlgorithm;
use hickory_proto::rr::{Name, RData, RecordType, TSigner};
use std::collections::BTreeSet;
use std::fmt;
use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// For one answer.
const ANSWER_LIMIT: Duration = Duration::from_secs(3);
/// How often a question is asked by UDP.
const TRIES: u32 = 3;
/// By how much the clocks of node and server may differ, in seconds (RFC 8945 10).
const FUDGE_S: u16 = 300;
/// Longest answer by UDP without EDNS is 512 bytes; some servers send more.
const UDP_BYTES_MAX: usize = 4096;

/// Why the server did not do what it was asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum DnsError {
    /// No answer: it may be down, or the network. Another try may work.
    #[error("the DNS server {server} does not answer: {why}")]
    Silent {
        /// The server.
        server: SocketAddr,
        /// In words.
        why: String,
    },
    /// Answered with this code.
    #[error("the DNS server {server} answers {code}")]
    Code {
        /// The server.
        server: SocketAddr,
        /// Its answer.
        code: ResponseCode,
    },
    /// The key or its secret is not the server's, or the clocks differ.
    #[error(
        "the DNS server {server} does not accept the TSIG key \"{key}\" ({why}); compare tsig_key, tsig_secret and \
         tsig_algorithm with the server's, and the clocks"
    )]
    Key {
        /// The server.
        server: SocketAddr,
        /// The key's name.
        key: String,
        /// In words.
        why: String,
    },
    /// An answer that cannot be believed or read.
    #[error("the DNS server {server} sends an answer that cannot be used: {why}")]
    Nonsense {
        /// The server.
        server: SocketAddr,
        /// In words.
        why: String,
    },
}

/// A server and the key for updates.
pub(super) struct Client {
    server: SocketAddr,
    signer: Option<TSigner>,
}

// The signer's own would show the secret.
impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client").field("server", &self.server).finish_non_exhaustive()
    }
}

/// Algorithms on offer, by their names in a server's configuration.
pub(super) const ALGORITHMS: [&str; 3] = ["hmac-sha256", "hmac-sha384", "hmac-sha512"];

/// A key for updates.
///
/// # Errors
/// What is wrong with it, in words.
pub(super) fn signer(key: &str, algorithm: &str, secret: Vec<u8>) -> Result<TSigner, String> {
    let name = Name::from_ascii(key).map_err(|error| format!("tsig_key \"{key}\" is no name: {error}"))?;
    let algorithm = match algorithm {
        "hmac-sha384" => TsigAlgorithm::HmacSha384,
        "hmac-sha512" => TsigAlgorithm::HmacSha512,
        _ => TsigAlgorithm::HmacSha256,
    };
    TSigner::new(secret, algorithm, name, FUDGE_S).map_err(|error| format!("tsig_algorithm: {error}"))
}

impl Client {
    pub(super) fn new(server: SocketAddr, signer: Option<TSigner>) -> Self {
        Client { server, signer }
    }

    pub(super) fn server(&self) -> SocketAddr {
        self.server
    }

    fn silent(&self, error: impl fmt::Display) -> DnsError {
        DnsError::Silent { server: self.server, why: error.to_string() }
    }

    fn nonsense(&self, error: impl fmt::Display) -> DnsError {
        DnsError::Nonsense { server: self.server, why: error.to_string() }
    }

    /// Sends an update.
    ///
    /// # Errors
    /// `Code` with the prerequisite that was not met, or another.
    pub(super) fn update(&self, mut message: Message) -> Result<(), DnsError> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs());
        let verifier = match &self.signer {
            Some(signer) => message.finalize(signer, now).map_err(|error| self.nonsense(error))?,
            None => None,
        };
        let request = message.to_vec().map_err(|error| self.nonsense(error))?;
        let bytes = self.by_tcp(&request).map_err(|error| self.silent(error))?;
        let answer = self.parse(&bytes, message.metadata.id)?;
        let code = answer.metadata.response_code;
        if let (Some(mut verifier), Some(signer)) = (verifier, &self.signer)
            && let Err(error) = verifier.verify(&bytes)
        {
            let why = if code == ResponseCode::NoError { error.to_string() } else { code.to_string() };
            return Err(DnsError::Key { server: self.server, key: signer.signer_name().to_string(), why });
        }
        if code == ResponseCode::NoError { Ok(()) } else { Err(self.code(code)) }
    }

    fn code(&self, code: ResponseCode) -> DnsError {
        DnsError::Code { server: self.server, code }
    }

    /// Addresses of a name; none when there is no such name.
    ///
    /// # Errors
    /// No answer or an answer of no use.
    pub(super) fn addresses(&self, name: &Name) -> Result<BTreeSet<IpAddr>, DnsError> {
        let mut found = BTreeSet::new();
        for kind in [RecordType::A, RecordType::AAAA] {
            let answer = self.ask(name, kind)?;
            found.extend(answer.answers.iter().filter(|record| record.name == *name).filter_map(|record| {
                if let RData::A(addr) = &record.data {
                    return Some(IpAddr::V4(addr.0));
                }
                if let RData::AAAA(addr) = &record.data { Some(IpAddr::V6(addr.0)) } else { None }
            }));
        }
        Ok(found)
    }

    /// The zone of this server in which a name lies, by its SOA record.
    ///
    /// # Errors
    /// As [`Client::addresses`].
    pub(super) fn zone_of(&self, name: &Name) -> Result<Option<Name>, DnsError> {
        let answer = self.ask(name, RecordType::SOA)?;
        let mut records = answer.answers.iter().chain(&answer.authorities);
        let authoritative = answer.metadata.authoritative;
        let soa = records.find(|record| record.record_type() == RecordType::SOA);
        Ok(soa.filter(|_| authoritative).map(|record| record.name.clone()))
    }

    fn ask(&self, name: &Name, kind: RecordType) -> Result<Message, DnsError> {
        let mut message = Message::query();
        message.metadata.op_code = OpCode::Query;
        message.metadata.recursion_desired = false;
        message.add_query(Query::query(name.clone(), kind));
        let request = message.to_vec().map_err(|error| self.nonsense(error))?;
        let id = message.metadata.id;
        let mut answer = self.by_udp(&request, id)?;
        if answer.metadata.truncation {
            let bytes = self.by_tcp(&request).map_err(|error| self.silent(error))?;
            answer = self.parse(&bytes, id)?;
        }
        if answer.queries.first().is_none_or(|query| query.name() != name || query.query_type() != kind) {
            return Err(self.nonsense("it answers another question"));
        }
        let code = answer.metadata.response_code;
        let is_answer = matches!(code, ResponseCode::NoError | ResponseCode::NXDomain);
        if is_answer { Ok(answer) } else { Err(self.code(code)) }
    }

    fn parse(&self, bytes: &[u8], id: u16) -> Result<Message, DnsError> {
        let message = Message::from_vec(bytes).map_err(|error| self.nonsense(error))?;
        if message.metadata.id != id || message.metadata.message_type != MessageType::Response {
            return Err(self.nonsense("it belongs to another question"));
        }
        Ok(message)
    }

    fn by_udp(&self, request: &[u8], id: u16) -> Result<Message, DnsError> {
        let mut last = None;
        for _ in 0..TRIES {
            match self.udp_once(request) {
                Ok(bytes) => match self.parse(&bytes, id) {
                    Ok(answer) => return Ok(answer),
                    Err(error) => last = Some(error),
                },
                Err(error) => last = Some(self.silent(error)),
            }
        }
        Err(last.unwrap_or_else(|| self.silent("it was not asked")))
    }

    fn udp_once(&self, request: &[u8]) -> io::Result<Vec<u8>> {
        let any: SocketAddr = if self.server.is_ipv4() { ([0; 4], 0).into() } else { ([0_u16; 8], 0).into() };
        let socket = UdpSocket::bind(any)?;
        socket.connect(self.server)?;
        socket.set_read_timeout(Some(ANSWER_LIMIT))?;
        socket.send(request)?;
        let mut answer = vec![0; UDP_BYTES_MAX];
        let len = socket.recv(&mut answer)?;
        answer.truncate(len);
        Ok(answer)
    }

    fn by_tcp(&self, request: &[u8]) -> io::Result<Vec<u8>> {
        let len = u16::try_from(request.len()).map_err(|_| io::Error::other("the message is too long"))?;
        let mut stream = TcpStream::connect_timeout(&self.server, ANSWER_LIMIT)?;
        stream.set_read_timeout(Some(ANSWER_LIMIT))?;
        stream.set_write_timeout(Some(ANSWER_LIMIT))?;
        stream.write_all(&[&len.to_be_bytes(), request].concat())?;
        let mut len = [0; 2];
        stream.read_exact(&mut len)?;
        let mut answer = vec![0; usize::from(u16::from_be_bytes(len))];
        stream.read_exact(&mut answer)?;
        Ok(answer)
    }
}

//! Join tokens: one line of text that an administrator carries from a member to the machine that shall join.
//!
//! ```text
//! csvj1-<base64url of:>
//!   cluster id 16 | expires 8 (Unix ms) | SHA-256 of the authority's certificate 32 | secret 32
//!   | length of cluster name 1, name | number of addresses 1, each: 4 or 6, the address, port 2
//!   | CRC-32 of everything before 4                                              (big-endian)
//! ```
//!
//! The hash tells the joiner which cluster it really talks to, the secret tells the cluster that the joiner was
//! invited. The database keeps the secret's hash only. The CRC is against typing errors, not against people.

use crate::pki::{PkiError, hex, random, sha256};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use csv_proto::cluster::SECRET_BYTES;
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use uuid::Uuid;

const PREFIX: &str = "csvj1-";
/// Beginning of every version's tokens.
const FAMILY: &str = "csvj";
const CRC_BYTES: usize = 4;
/// Longest text that is looked at.
const TEXT_BYTES_MAX: usize = 4096;
/// Most addresses in a token.
pub const ADDRS_MAX: usize = 16;

/// A token. Whoever has it may make one machine a node of the cluster, until it expires or is used up.
#[derive(Clone, PartialEq, Eq)]
pub struct Token {
    /// The cluster.
    pub cluster_id: Uuid,
    /// Its name.
    pub cluster_name: String,
    /// Members to ask, tried in this order.
    pub addrs: Vec<SocketAddr>,
    /// SHA-256 of the cluster's authority (DER).
    pub ca_sha256: [u8; 32],
    /// What proves the invitation.
    pub secret: [u8; SECRET_BYTES],
    /// Not to be used after this, Unix milliseconds.
    pub expires_unix_ms: u64,
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Without the secret.
        f.debug_struct("Token")
            .field("cluster_id", &self.cluster_id)
            .field("cluster_name", &self.cluster_name)
            .field("addrs", &self.addrs)
            .field("expires_unix_ms", &self.expires_unix_ms)
            .finish_non_exhaustive()
    }
}

/// Why a text is no token that can be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    /// Something else.
    #[error("this is no join token: one begins with csvj1-; get one with csvctl cluster token on a member")]
    WrongKind,
    /// Of a later version.
    #[error("this join token is of a newer version of csv than the one here; upgrade this node first")]
    Newer,
    /// Damaged on the way.
    #[error("the join token has a typing error, or a part of it is missing; copy it again as a whole")]
    Typo,
    /// Too late.
    #[error(
        "the join token has expired {ago} ago by this node's clock; get a new one with csvctl cluster token, or set \
         the clock if it is wrong"
    )]
    Expired {
        /// How long ago, for people.
        ago: String,
    },
    /// More than a token can carry.
    #[error("a token takes a cluster name of at most 255 bytes and 1 to 16 addresses")]
    TooLarge,
}

impl Token {
    /// Makes a token with a new secret.
    ///
    /// # Errors
    /// [`PkiError::Random`].
    pub fn create(
        cluster_id: Uuid,
        cluster_name: &str,
        addrs: Vec<SocketAddr>,
        ca_sha256: [u8; 32],
        expires_unix_ms: u64,
    ) -> Result<Token, PkiError> {
        let cluster_name = cluster_name.to_owned();
        Ok(Token { cluster_id, cluster_name, addrs, ca_sha256, secret: random()?, expires_unix_ms })
    }

    /// SHA-256 of the secret, lower-case hex: what the database keeps.
    #[must_use]
    pub fn sha256(&self) -> String {
        secret_sha256(&self.secret)
    }

    /// The text for people.
    ///
    /// # Errors
    /// [`TokenError::TooLarge`].
    pub fn encode(&self) -> Result<String, TokenError> {
        if self.addrs.is_empty() || self.addrs.len() > ADDRS_MAX {
            return Err(TokenError::TooLarge);
        }
        let mut bytes = Vec::new();
        bytes.extend_from_slice(self.cluster_id.as_bytes());
        bytes.extend_from_slice(&self.expires_unix_ms.to_be_bytes());
        bytes.extend_from_slice(&self.ca_sha256);
        bytes.extend_from_slice(&self.secret);
        bytes.push(u8::try_from(self.cluster_name.len()).map_err(|_| TokenError::TooLarge)?);
        bytes.extend_from_slice(self.cluster_name.as_bytes());
        bytes.push(u8::try_from(self.addrs.len()).map_err(|_| TokenError::TooLarge)?);
        for addr in &self.addrs {
            match addr.ip() {
                IpAddr::V4(ip) => {
                    bytes.push(4);
                    bytes.extend_from_slice(&ip.octets());
                }
                IpAddr::V6(ip) => {
                    bytes.push(6);
                    bytes.extend_from_slice(&ip.octets());
                }
            }
            bytes.extend_from_slice(&addr.port().to_be_bytes());
        }
        let crc = crc32fast::hash(&bytes);
        bytes.extend_from_slice(&crc.to_be_bytes());
        Ok(format!("{PREFIX}{}", URL_SAFE_NO_PAD.encode(bytes)))
    }

    /// Reads a token's text; white space in it (a wrapped line) does not matter. Whether it has expired is another
    /// question: [`Token::check_expiry`].
    ///
    /// # Errors
    /// [`TokenError::WrongKind`], [`TokenError::Newer`] or [`TokenError::Typo`].
    pub fn parse(text: &str) -> Result<Token, TokenError> {
        let text: String = text.chars().filter(|char| !char.is_whitespace()).collect();
        let Some(body) = text.strip_prefix(PREFIX) else {
            return Err(other_kind(&text));
        };
        if text.len() > TEXT_BYTES_MAX {
            return Err(TokenError::Typo);
        }
        let bytes = URL_SAFE_NO_PAD.decode(body).map_err(|_| TokenError::Typo)?;
        let (bytes, crc) = bytes.split_last_chunk::<CRC_BYTES>().ok_or(TokenError::Typo)?;
        if crc32fast::hash(bytes) != u32::from_be_bytes(*crc) {
            return Err(TokenError::Typo);
        }
        decode(bytes).ok_or(TokenError::Typo)
    }

    /// Is it still good at that time? The cluster asks this too, with its own clock.
    ///
    /// # Errors
    /// [`TokenError::Expired`].
    pub fn check_expiry(&self, now_unix_ms: u64) -> Result<(), TokenError> {
        if now_unix_ms <= self.expires_unix_ms {
            return Ok(());
        }
        Err(TokenError::Expired { ago: for_people(now_unix_ms - self.expires_unix_ms) })
    }
}

/// SHA-256 of a token's secret, lower-case hex.
#[must_use]
pub fn secret_sha256(secret: &[u8; SECRET_BYTES]) -> String {
    hex(&sha256(secret))
}

fn other_kind(text: &str) -> TokenError {
    let version = text.strip_prefix(FAMILY).and_then(|rest| rest.split_once('-')).map(|(version, _)| version);
    match version.and_then(|version| version.parse::<u32>().ok()) {
        Some(version) if version > 1 => TokenError::Newer,
        Some(_) | None => TokenError::WrongKind,
    }
}

fn decode(mut bytes: &[u8]) -> Option<Token> {
    let cluster_id = Uuid::from_bytes(take(&mut bytes)?);
    let expires_unix_ms = u64::from_be_bytes(take(&mut bytes)?);
    let ca_sha256 = take(&mut bytes)?;
    let secret = take(&mut bytes)?;
    let [length] = take(&mut bytes)?;
    let (name, rest) = bytes.split_at_checked(usize::from(length))?;
    bytes = rest;
    let cluster_name = std::str::from_utf8(name).ok()?.to_owned();
    let [count] = take(&mut bytes)?;
    let mut addrs = Vec::new();
    for _ in 0..count {
        let ip = match take(&mut bytes)? {
            [4] => IpAddr::from(take::<4>(&mut bytes)?),
            [6] => IpAddr::from(take::<16>(&mut bytes)?),
            _ => return None,
        };
        addrs.push(SocketAddr::new(ip, u16::from_be_bytes(take(&mut bytes)?)));
    }
    let whole = bytes.is_empty() && (1..=ADDRS_MAX).contains(&addrs.len());
    whole.then_some(Token { cluster_id, cluster_name, addrs, ca_sha256, secret, expires_unix_ms })
}

fn take<const N: usize>(bytes: &mut &[u8]) -> Option<[u8; N]> {
    let (taken, rest) = bytes.split_first_chunk::<N>()?;
    *bytes = rest;
    Some(*taken)
}

/// A length of time in the largest unit of which it is at least one.
pub(crate) fn for_people(ms: u64) -> String {
    let (count, unit) = match ms / 1000 {
        s @ 0..60 => (s, "second"),
        s @ 60..3600 => (s / 60, "minute"),
        s @ 3600..86_400 => (s / 3600, "hour"),
        s => (s / 86_400, "day"),
    };
    if count == 1 { format!("1 {unit}") } else { format!("{count} {unit}s") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn token() -> Token {
        let addrs = vec!["10.77.0.1:7450".parse().unwrap(), "[fd00::2]:7450".parse().unwrap()];
        Token::create(Uuid::from_u128(77), "lab", addrs, [9; 32], 1_000_000).unwrap()
    }

    #[test]
    fn text_and_back() {
        let token = token();
        let text = token.encode().unwrap();
        assert_eq!(Token::parse(&text).unwrap(), token);
        let wrapped = format!("  {}\n   {}\n", &text[..50], &text[50..]);
        assert_eq!(Token::parse(&wrapped).unwrap(), token);
        assert!(!format!("{token:?}").contains(&format!("{:?}", token.secret)));
        assert_ne!(token.secret, self::token().secret);
        assert_eq!(token.sha256().len(), 64);
    }

    #[test]
    fn other_texts_are_told_apart() {
        for text in ["", "hello", "csvj", "csvjx-AAAA", "csvj1", "6f1d6c38-6f0e-4b8a-9f0e-2f7b3c1d2e3f"] {
            assert_eq!(Token::parse(text), Err(TokenError::WrongKind), "{text}");
        }
        assert_eq!(Token::parse("csvj2-AAAA"), Err(TokenError::Newer));
        assert_eq!(Token::parse("csvj1-"), Err(TokenError::Typo));
        let text = token().encode().unwrap();
        assert_eq!(Token::parse(&text[..text.len() - 5]), Err(TokenError::Typo));
        assert_eq!(Token::parse(&format!("{text}A")), Err(TokenError::Typo));
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let mut token = token();
        token.addrs = vec!["10.0.0.1:1".parse().unwrap(); ADDRS_MAX + 1];
        assert_eq!(token.encode(), Err(TokenError::TooLarge));
        token.addrs.clear();
        assert_eq!(token.encode(), Err(TokenError::TooLarge));
    }

    #[test]
    fn expiry_is_told_in_words() {
        let token = token();
        token.check_expiry(1_000_000).unwrap();
        let error = token.check_expiry(1_000_000 + 2 * 3_600_000 + 5).unwrap_err();
        assert!(error.to_string().contains("2 hours ago"), "{error}");
        assert_eq!(for_people(86_400_000), "1 day");
    }

    proptest! {
        #[test]
        fn one_wrong_character_is_a_typo(at in 0_usize..1000, to in "[A-Za-z0-9_-]") {
            let text = token().encode().unwrap();
            let at = PREFIX.len() + at % (text.len() - PREFIX.len());
            let mut wrong = text.clone();
            wrong.replace_range(at..=at, &to);
            prop_assume!(wrong != text);
            prop_assert_eq!(Token::parse(&wrong), Err(TokenError::Typo));
        }

        #[test]
        fn no_text_makes_it_panic(text in "(csvj1-)?[A-Za-z0-9_-]{0,300}") {
            let _parsed = Token::parse(&text);
        }
    }
}

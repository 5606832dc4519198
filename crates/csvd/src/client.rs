//! Client of the admin protocol (`csv_types::admin`): one JSON object per line over a Unix stream socket.
//!
//! Used by `csvctl` towards csvd, by csvd towards csvfs, and by the lab. Every call has a time limit and every
//! line a bound, so a stuck or hostile server cannot hold the caller. A failure before the request is out is
//! `Connect`; after that nobody knows whether the request was carried out, which is `Unknown`.

use csv_types::admin::{ANSWER_BYTES_MAX, Answer, Request};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens there; nothing was asked.
    #[error("cannot connect to {}: {source}", path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// From the kernel.
        source: io::Error,
    },
    /// The request may have been carried out.
    #[error("no answer from {}: {source}", path.display())]
    Unknown {
        /// The socket.
        path: PathBuf,
        /// From the kernel.
        source: io::Error,
    },
    /// The other side answered with something else than the protocol says.
    #[error("answer from {} is not understood ({why}); csvctl, csvd and csvfs must be of one version", path.display())]
    Protocol {
        /// The socket.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// The other side refused.
    #[error("{0}")]
    Refused(String),
}

/// A connection that can be asked several times.
#[derive(Debug)]
pub struct Client {
    path: PathBuf,
    stream: BufReader<UnixStream>,
}

impl Client {
    /// Connects; `timeout` bounds each later wait for an answer.
    ///
    /// # Errors
    /// `Connect`.
    pub fn connect(path: &Path, timeout: Duration) -> Result<Client, ClientError> {
        let connect = |source| ClientError::Connect { path: path.to_owned(), source };
        let stream = UnixStream::connect(path).map_err(connect)?;
        stream.set_read_timeout(Some(timeout)).map_err(connect)?;
        stream.set_write_timeout(Some(timeout)).map_err(connect)?;
        Ok(Client { path: path.to_owned(), stream: BufReader::new(stream) })
    }

    /// Asks and waits. A refusal is `Err(Refused)`.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn call(&mut self, request: &Request) -> Result<Answer, ClientError> {
        let unknown = |path: &Path, source| ClientError::Unknown { path: path.to_owned(), source };
        let protocol = |path: &Path, why: String| ClientError::Protocol { path: path.to_owned(), why };
        let mut line = serde_json::to_vec(request).map_err(|e| protocol(&self.path, e.to_string()))?;
        line.push(b'\n');
        self.stream.get_mut().write_all(&line).map_err(|e| unknown(&self.path, e))?;
        let text = read_line(&mut self.stream, ANSWER_BYTES_MAX).map_err(|e| unknown(&self.path, e))?;
        let Some(text) = text else {
            return Err(unknown(&self.path, io::Error::from(io::ErrorKind::UnexpectedEof)));
        };
        match serde_json::from_str(&text) {
            Ok(Answer::Error { message }) => Err(ClientError::Refused(message)),
            Ok(answer) => Ok(answer),
            Err(e) => Err(protocol(&self.path, e.to_string())),
        }
    }
}

/// Connects, asks once and hangs up.
///
/// # Errors
/// See [`ClientError`].
pub fn call(path: &Path, request: &Request, timeout: Duration) -> Result<Answer, ClientError> {
    Client::connect(path, timeout)?.call(request)
}

/// One line without its end, or `None` at the end of the stream. Lines over `bytes_max` are an error.
///
/// # Errors
/// From the stream; `InvalidData` for a line too long or not UTF-8; `UnexpectedEof` for half a line.
pub fn read_line(stream: &mut impl BufRead, bytes_max: usize) -> io::Result<Option<String>> {
    let mut line = Vec::new();
    let limit = u64::try_from(bytes_max).unwrap_or(u64::MAX);
    stream.by_ref().take(limit).read_until(b'\n', &mut line)?;
    match line.pop() {
        None => Ok(None),
        Some(b'\n') => String::from_utf8(line)
            .map(Some)
            .map_err(|_| io::Error::new(io::ErrorKind::InvalidData, "line is not UTF-8")),
        Some(_) if line.len() + 1 == bytes_max => {
            Err(io::Error::new(io::ErrorKind::InvalidData, "line is too long"))
        }
        Some(_) => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Cursor;

    #[test]
    fn lines_are_bounded_and_whole() {
        let mut two = Cursor::new(b"a\nb\n".to_vec());
        assert_eq!(read_line(&mut two, 2).unwrap().as_deref(), Some("a"));
        assert_eq!(read_line(&mut two, 2).unwrap().as_deref(), Some("b"));
        assert_eq!(read_line(&mut two, 2).unwrap(), None);
        let half = read_line(&mut Cursor::new(b"abc".to_vec()), 9).unwrap_err();
        assert_eq!(half.kind(), io::ErrorKind::UnexpectedEof);
        let long = read_line(&mut Cursor::new(vec![b'x'; 99]), 90).unwrap_err();
        assert_eq!(long.kind(), io::ErrorKind::InvalidData);
    }

    #[test]
    fn refusal_and_hang_up_differ() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let server = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let answers = std::thread::spawn(move || {
            let (stream, _) = server.accept().unwrap();
            let mut stream = BufReader::new(stream);
            read_line(&mut stream, 99).unwrap();
            stream.get_mut().write_all(b"{\"answer\":\"error\",\"message\":\"no\"}\n").unwrap();
            read_line(&mut stream, 99).unwrap();
        });
        let mut client = Client::connect(&path, Duration::from_secs(5)).unwrap();
        assert!(matches!(client.call(&Request::Stop), Err(ClientError::Refused(message)) if message == "no"));
        assert!(matches!(client.call(&Request::Stop), Err(ClientError::Unknown { .. })));
        answers.join().unwrap();
        assert!(matches!(
            call(&dir.path().join("none"), &Request::Stop, Duration::from_secs(1)),
            Err(ClientError::Connect { .. })
        ));
    }
}

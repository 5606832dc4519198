//! What became of a call, and TLS errors in plain words.

use csv_proto::cluster::{Refusal, RefusalKind};
use std::error::Error;
use tokio_rustls::rustls::pki_types::UnixTime;
use tokio_rustls::rustls::{AlertDescription, CertificateError, Error as TlsError};
use tonic::{Code, Status};
use x509_parser::time::ASN1Time;

/// What became of a call that got no good answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CallError {
    /// It was not sent: no connection, or the peer is not known. Nothing happened.
    #[error("cannot be reached: {0}")]
    Unreachable(String),
    /// It was sent, and no answer came in time. It may have happened.
    #[error("no answer in time")]
    TimedOut,
    /// It was sent, then the connection broke. It may have happened.
    #[error("the connection broke in the midst: {0}")]
    Lost(String),
    /// The peer looked at it and refused. Nothing happened, except with [`RefusalKind::UnknownOutcome`].
    #[error("refused: {0}")]
    Refused(Refusal),
    /// The peer does not take calls from this node: evicted, of another cluster, speaking for another.
    #[error("not allowed: {0}")]
    NotAllowed(String),
    /// The answer was not understood, or a message was too large for the other side. It may have happened.
    #[error("protocol error: {0}")]
    Protocol(String),
}

impl CallError {
    /// Must the caller reckon with both: that it happened, and that it did not?
    #[must_use]
    pub fn may_have_happened(&self) -> bool {
        match self {
            CallError::TimedOut | CallError::Lost(_) | CallError::Protocol(_) => true,
            CallError::Refused(refusal) => refusal.kind == RefusalKind::UnknownOutcome,
            CallError::Unreachable(_) | CallError::NotAllowed(_) => false,
        }
    }

    pub(crate) fn from_status(status: &Status) -> CallError {
        let text = status.message().to_owned();
        match status.code() {
            Code::PermissionDenied | Code::Unauthenticated => CallError::NotAllowed(text),
            Code::OutOfRange | Code::DataLoss => CallError::Protocol(text),
            Code::ResourceExhausted => CallError::Refused(Refusal::new(RefusalKind::Busy, text)),
            // A message that the peer does not understand, or a call that it does not have: nothing happened.
            Code::InvalidArgument
            | Code::Unimplemented
            | Code::FailedPrecondition
            | Code::Aborted
            | Code::NotFound
            | Code::AlreadyExists => CallError::Refused(Refusal::new(RefusalKind::Failed, text)),
            Code::DeadlineExceeded => CallError::TimedOut,
            Code::Ok | Code::Cancelled | Code::Unknown | Code::Internal | Code::Unavailable => {
                broken(&with_sources(status))
            }
        }
    }
}

/// An error's text with its causes', each once.
pub(crate) fn with_sources(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        cause = error.source();
    }
    text
}

/// A connection that ended under a call. In TLS 1.3 a server tells only after the handshake that it refuses the
/// client's certificate; HTTP/2 passes it on as text.
fn broken(text: &str) -> CallError {
    if text.contains("received fatal alert") {
        return CallError::NotAllowed(format!(
            "the peer does not accept this node's certificate ({text}); it is of another cluster, or one of the \
             clocks is wrong"
        ));
    }
    CallError::Lost(text.to_owned())
}

/// An error of a TLS handshake in plain words: wrong clocks and other clusters are told apart from the rest.
#[must_use]
pub fn explain_tls(error: &std::io::Error) -> String {
    let tls = error.get_ref().and_then(|inner| inner.downcast_ref::<TlsError>());
    tls.map_or_else(|| error.to_string(), explain)
}

#[allow(clippy::wildcard_enum_match_arm, reason = "what is not told apart keeps the library's words")]
pub(crate) fn explain(error: &TlsError) -> String {
    match error {
        TlsError::InvalidCertificate(CertificateError::NotValidYetContext { time, not_before }) => format!(
            "its certificate holds from {} on, but this node's clock says {}; set the clock that is wrong",
            date(*not_before),
            date(*time)
        ),
        TlsError::InvalidCertificate(CertificateError::ExpiredContext { time, not_after }) => format!(
            "its certificate held until {}, but this node's clock says {}; set the clock if it is wrong, else let \
             the node join again",
            date(*not_after),
            date(*time)
        ),
        TlsError::InvalidCertificate(CertificateError::UnknownIssuer | CertificateError::BadSignature) => {
            "its certificate is not of this cluster's authority; it belongs to another cluster".to_owned()
        }
        TlsError::InvalidCertificate(
            CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
        ) => "its certificate is another node's; the address leads to the wrong node".to_owned(),
        TlsError::AlertReceived(AlertDescription::CertificateExpired) => {
            "it holds this node's certificate for expired or not yet valid; compare the clocks".to_owned()
        }
        TlsError::AlertReceived(
            AlertDescription::UnknownCA | AlertDescription::DecryptError | AlertDescription::BadCertificate,
        ) => "it does not accept this node's certificate; the two belong to different clusters".to_owned(),
        TlsError::General(text) => text.clone(),
        other => other.to_string(),
    }
}

fn date(time: UnixTime) -> String {
    let s = i64::try_from(time.as_secs()).ok();
    s.and_then(|s| ASN1Time::from_timestamp(s).ok())
        .map_or_else(|| format!("{} s after 1970", time.as_secs()), |time| time.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn wrong_clocks_are_told() {
        let at = |s| UnixTime::since_unix_epoch(Duration::from_secs(s));
        let early = TlsError::InvalidCertificate(CertificateError::NotValidYetContext {
            time: at(1_000_000),
            not_before: at(1_700_000_000),
        });
        let text = explain_tls(&std::io::Error::other(early));
        assert!(text.contains("1970") && text.contains("2023") && text.contains("clock"), "{text}");
    }

    #[test]
    fn an_unknown_outcome_is_never_a_failure() {
        for code in
            [Code::Unknown, Code::Internal, Code::Unavailable, Code::Cancelled, Code::DeadlineExceeded]
        {
            assert!(CallError::from_status(&Status::new(code, "x")).may_have_happened(), "{code}");
        }
        for code in [Code::PermissionDenied, Code::Unimplemented, Code::FailedPrecondition] {
            assert!(!CallError::from_status(&Status::new(code, "x")).may_have_happened(), "{code}");
        }
    }
}

//! The control service against real TLS: who gets in, and what ends a stream.

use super::*;
use crate::tests::rig::{N1, Rig, on};
use csv_proto::volume_client::VolumeClient;
use csv_proto::{Call, ClientMessage, Hello, ReadLink, ServerMessage, call::Op, server_message};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use std::net::SocketAddr;
use std::path::Path;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::transport::{Certificate, ClientTlsConfig, Endpoint, Identity};

struct Authority {
    pem: String,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    fn new() -> Authority {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let pem = params.self_signed(&key).unwrap().pem();
        Authority { pem, issuer: Issuer::new(params, key) }
    }

    fn node(&self, name: &str) -> (String, String) {
        let key = KeyPair::generate().unwrap();
        let params = CertificateParams::new(vec![name.to_owned()]).unwrap();
        (params.signed_by(&key, &self.issuer).unwrap().pem(), key.serialize_pem())
    }
}

struct Served {
    addr: SocketAddr,
    ca: Authority,
    runtime: tokio::runtime::Runtime,
    stop: watch::Sender<bool>,
    _dir: tempfile::TempDir,
}

fn served(rig: &Rig) -> Served {
    let ca = Authority::new();
    let (cert, key) = ca.node("n1");
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str, text: &str| {
        let path = Path::join(dir.path(), name);
        std::fs::write(&path, text).unwrap();
        path
    };
    let tls =
        TlsFiles { ca: file("ca.pem", &ca.pem), cert: file("node.pem", &cert), key: file("node.key", &key) };
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = listener.local_addr().unwrap();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let (stop, stopped) = watch::channel(false);
    let place = Place::default();
    place.set(rig.co());
    runtime.spawn(async move { serve(place, listener, tls, stopped).await.unwrap() });
    Served { addr, ca, runtime, stop, _dir: dir }
}

type Streams = (UnboundedSender<ClientMessage>, UnboundedReceiver<ServerMessage>);

impl Served {
    /// A session as `node`, with a certificate for `name` (or none).
    fn connect(&self, name: Option<&str>, node: u32) -> Result<Streams, String> {
        let mut tls =
            ClientTlsConfig::new().ca_certificate(Certificate::from_pem(&self.ca.pem)).domain_name("n1");
        if let Some(name) = name {
            let (cert, key) = self.ca.node(name);
            tls = tls.identity(Identity::from_pem(cert, key));
        }
        let hello = Hello {
            protocol_version: csv_proto::PROTOCOL_VERSION,
            node,
            volume: "vol".to_owned(),
            session: vec![5; 16].into(),
            last_epoch: 0,
        };
        let endpoint =
            Endpoint::from_shared(format!("https://{}", self.addr)).unwrap().tls_config(tls).unwrap();
        self.runtime.block_on(async move {
            let channel = endpoint.connect().await.map_err(|error| format!("{error:?}"))?;
            let (out, queue) = unbounded_channel();
            let first = ClientMessage { epoch: 0, body: Some(client_message::Body::Hello(hello)) };
            out.send(first).unwrap();
            let mut stub = VolumeClient::new(channel);
            let reply = stub.session(UnboundedReceiverStream::new(queue)).await;
            let mut stream = reply.map_err(|status| status.to_string())?.into_inner();
            let (seen, messages) = unbounded_channel();
            tokio::spawn(async move {
                while let Ok(Some(message)) = stream.message().await {
                    if seen.send(message).is_err() {
                        return;
                    }
                }
            });
            Ok((out, messages))
        })
    }

    fn next(&self, streams: &mut Streams) -> Option<ServerMessage> {
        let limit = std::time::Duration::from_secs(20);
        self.runtime.block_on(async { tokio::time::timeout(limit, streams.1.recv()).await.unwrap() })
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        let _stopped = self.stop.send(true);
    }
}

fn readlink(rig: &Rig, id: u64, padding: usize) -> ClientMessage {
    let file = Some(rig.co().fs().root().into());
    let op = if padding == 0 {
        Op::Readlink(ReadLink { file })
    } else {
        Op::Write(csv_proto::Write { file, data: vec![0; padding].into(), ..Default::default() })
    };
    let call = Call { id, op: Some(op), ..Call::default() };
    ClientMessage { epoch: rig.co().options().epoch.0, body: Some(client_message::Body::Call(call)) }
}

#[test]
fn a_node_with_its_certificate_is_served() {
    on(crate::FsKind::Ext4, |rig| {
        let served = served(rig);
        let mut streams = served.connect(Some("n2"), 2).unwrap();
        let welcome = served.next(&mut streams).unwrap();
        assert!(matches!(welcome.body, Some(server_message::Body::Welcome(_))), "{welcome:?}");
        streams.0.send(readlink(rig, 1, 0)).unwrap();
        let reply = served.next(&mut streams).unwrap();
        assert!(
            matches!(&reply.body, Some(server_message::Body::Reply(reply)) if reply.errno == libc::EINVAL),
            "{reply:?}"
        );
        drop(streams);
        rig.event("session-lost");
    });
}

#[test]
fn a_wrong_name_or_none_is_refused() {
    on(crate::FsKind::Ext4, |rig| {
        let served = served(rig);
        let foreign = served.connect(Some("stranger"), 2).unwrap_err();
        assert!(foreign.contains("no node's"), "{foreign}");
        let masked = served.connect(Some("n3"), 2).unwrap_err();
        assert!(masked.contains("certificate is n3's"), "{masked}");
        rig.event("peer-refused");
        rig.events.0.lock().clear();
        served.connect(None, 2).unwrap_err();
        assert!(rig.event("peer-refused").contains("handshake"));
        assert!(rig.co().core.lock().sessions.is_empty());
    });
}

#[test]
fn an_authority_of_ones_own_is_no_help() {
    on(crate::FsKind::Ext4, |rig| {
        let mut served = served(rig);
        let theirs = std::mem::replace(&mut served.ca, Authority::new());
        let (forged, forged_key) = served.ca.node("n2");
        let tls = ClientTlsConfig::new()
            .ca_certificate(Certificate::from_pem(&theirs.pem))
            .identity(Identity::from_pem(forged, forged_key))
            .domain_name("n1");
        let endpoint =
            Endpoint::from_shared(format!("https://{}", served.addr)).unwrap().tls_config(tls).unwrap();
        served.runtime.block_on(async {
            if let Ok(channel) = endpoint.connect().await {
                let mut stub = VolumeClient::new(channel);
                stub.session(tokio_stream::pending()).await.unwrap_err();
            }
        });
        assert!(rig.event("peer-refused").contains("handshake"));
    });
}

#[test]
fn a_message_that_is_too_large_ends_the_stream() {
    on(crate::FsKind::Ext4, |rig| {
        let served = served(rig);
        let mut streams = served.connect(Some("n1"), N1.0).unwrap();
        served.next(&mut streams).unwrap();
        streams.0.send(readlink(rig, 1, MESSAGE_BYTES_MAX + 1)).unwrap();
        assert!(served.next(&mut streams).is_none());
        assert!(rig.event("stream-broken").contains("n1"));
        rig.event("session-lost");
        assert!(rig.co().core.lock().sessions.contains_key(&N1), "its lease runs");
    });
}

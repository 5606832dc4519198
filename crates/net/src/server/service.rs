//! One connection's calls: who may call, for whom, and the way to the handler.

use super::{Handler, Joining};
use crate::pki::Peer;
use crate::token::secret_sha256;
use csv_proto::Malformed;
use csv_proto::cluster::wire::cluster_server::Cluster;
use csv_proto::cluster::{
    Beat, JoinRequest, RaftCall, admin_answer_into_wire, join_answer_into_wire, propose_answer_into_wire,
    raft_answer_into_wire, versioned, wire,
};
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use tokio_stream::{Stream, StreamExt};
use tonic::{Request, Response, Status, Streaming};

/// Serves the calls on one connection.
#[derive(Clone)]
pub(super) struct Service {
    handler: Arc<dyn Handler>,
    peer: Option<Peer>,
    from: SocketAddr,
}

impl Service {
    pub(super) fn new(handler: Arc<dyn Handler>, peer: Option<Peer>, from: SocketAddr) -> Service {
        Service { handler, peer, from }
    }

    /// The node that calls, if it may.
    fn node(&self) -> Result<&Peer, Status> {
        let Some(peer) = &self.peer else {
            let text = "a certificate of this cluster is needed for everything but joining";
            self.handler.refused(self.from, text);
            return Err(Status::unauthenticated(text));
        };
        if !self.handler.allowed(peer) {
            let text =
                format!("{peer} is not a node of this cluster any more; it can join again with a token");
            self.handler.refused(self.from, &text);
            return Err(Status::permission_denied(text));
        }
        Ok(peer)
    }

    /// The node that calls, if it may and says that it is itself.
    fn node_itself(&self, version: u32, says: u32) -> Result<&Peer, Status> {
        versioned(version).map_err(malformed)?;
        let peer = self.node()?;
        if peer.node_id.0 != says {
            return Err(self.other(peer, &format!("node {says}")));
        }
        Ok(peer)
    }

    fn other(&self, peer: &Peer, who: &str) -> Status {
        let text = format!("{peer} spoke for {who}; it was refused");
        self.handler.refused(self.from, &text);
        Status::permission_denied(text)
    }

    fn beat(&self, beat: wire::Beat) -> Result<(), Status> {
        let peer = self.node()?;
        let (node, beat) = Beat::from_wire(beat).map_err(malformed)?;
        if node != peer.node_id {
            return Err(self.other(peer, &format!("node {}", node.0)));
        }
        self.handler.beat(peer, beat);
        Ok(())
    }
}

fn malformed(error: Malformed) -> Status {
    Status::invalid_argument(error.to_string())
}

/// Runs to its end even when the caller goes away.
async fn to_the_end<T: Send + 'static>(work: impl Future<Output = T> + Send + 'static) -> Result<T, Status> {
    tokio::spawn(work).await.map_err(|error| Status::internal(format!("it may have happened: {error}")))
}

#[tonic::async_trait]
impl Cluster for Service {
    type BeatsStream = Pin<Box<dyn Stream<Item = Result<wire::Beat, Status>> + Send + 'static>>;

    async fn raft(&self, request: Request<wire::RaftCall>) -> Result<Response<wire::RaftAnswer>, Status> {
        let peer = self.node()?;
        let call = RaftCall::from_wire(request.into_inner()).map_err(malformed)?;
        if !self.handler.speaks_for(peer, call.from) {
            return Err(self.other(peer, &format!("voter {}", call.from)));
        }
        let answer = self.handler.raft(peer.clone(), call).await;
        Ok(Response::new(raft_answer_into_wire(answer)))
    }

    /// The answering stream drives the incoming one: no task besides the connection's own.
    async fn beats(
        &self,
        request: Request<Streaming<wire::Beat>>,
    ) -> Result<Response<Self::BeatsStream>, Status> {
        self.node()?;
        let service = self.clone();
        let answers = request.into_inner().filter_map(move |beat| match beat {
            Ok(beat) => service.beat(beat).err().map(Err),
            Err(status) => Some(Err(status)),
        });
        Ok(Response::new(Box::pin(answers)))
    }

    async fn propose(
        &self,
        request: Request<wire::ProposeCall>,
    ) -> Result<Response<wire::ProposeAnswer>, Status> {
        let call = request.into_inner();
        let peer = self.node_itself(call.version, call.from)?.clone();
        let handler = Arc::clone(&self.handler);
        let answer = to_the_end(async move { handler.propose(peer, call.envelope).await }).await?;
        Ok(Response::new(propose_answer_into_wire(answer)))
    }

    async fn admin(&self, request: Request<wire::AdminCall>) -> Result<Response<wire::AdminAnswer>, Status> {
        let call = request.into_inner();
        let peer = self.node_itself(call.version, call.from)?.clone();
        let handler = Arc::clone(&self.handler);
        let answer = to_the_end(async move { handler.admin(peer, call.request_json).await }).await?;
        Ok(Response::new(admin_answer_into_wire(answer)))
    }

    async fn join(&self, request: Request<wire::JoinCall>) -> Result<Response<wire::JoinAnswer>, Status> {
        let (request, secret) = JoinRequest::from_wire(request.into_inner()).map_err(malformed)?;
        let joining = Joining { request, token_sha256: secret_sha256(&secret), from: self.from };
        let handler = Arc::clone(&self.handler);
        let answer = to_the_end(async move { handler.join(joining).await }).await?;
        Ok(Response::new(join_answer_into_wire(answer)))
    }
}

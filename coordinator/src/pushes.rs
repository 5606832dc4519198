//! Questions of the coordinator to nodes that must be answered: which size and time a writer has, and that cached
//! metadata was dropped. They are kept until they are answered and sent again when a session resumes. A node that does
//! not answer within `recall_ms` is treated as one that does not return a layout.

use crate::coordinator::Coordinator;
use crate::state::{Core, Push};
use csv_proto::{CommitQuery, server_message};
use csv_types::{FileId, NodeId};
use std::collections::BTreeSet;
use std::time::{Duration, Instant};
use tokio::sync::oneshot;

/// A question under way.
#[derive(Debug)]
pub(crate) struct Wait {
    node: NodeId,
    /// Of the push.
    id: u64,
    answer: oneshot::Receiver<()>,
}

impl Coordinator {
    /// Sends a question; `None` when the node has no session (then it has nothing to answer for).
    pub(crate) fn push(
        &self,
        core: &mut Core,
        node: NodeId,
        body: impl FnOnce(u64) -> server_message::Body,
    ) -> Option<Wait> {
        if !core.sessions.contains_key(&node) {
            return None;
        }
        let id = core.number();
        let (tx, answer) = oneshot::channel();
        let body = body(id);
        core.send(node, body.clone());
        core.pushes.insert(id, Push { node, body, since: Instant::now(), answered: Some(tx) });
        Some(Wait { node, id, answer })
    }

    /// A node answered a question.
    pub(crate) fn push_answered(&self, core: &mut Core, node: NodeId, id: u64) {
        if core.pushes.get(&id).is_some_and(|push| push.node == node)
            && let Some(answered) = core.pushes.remove(&id).and_then(|push| push.answered)
        {
            // Nobody may wait any more.
            let _sent = answered.send(());
        }
    }

    /// Gives up nodes that leave questions open for which nobody waits (what a node's own call changed), so that
    /// these do not pile up.
    pub(crate) fn push_tick(&self, core: &mut Core) {
        let limit = Duration::from_millis(2 * self.options.recall_ms);
        // Numbers grow, so the oldest come first.
        let late = core.pushes.values().take_while(|push| push.since.elapsed() > limit);
        let nodes: BTreeSet<NodeId> = late.map(|push| push.node).collect();
        for node in nodes {
            self.give_up_locked(core, node, "it leaves questions of the coordinator unanswered");
        }
    }

    /// Waits for answers. After `recall_ms` the silent nodes are given up; then this waits until their sessions are
    /// over, which the lease bounds.
    pub(crate) async fn answered(&self, waits: Vec<Wait>, what: &str) {
        let until = Instant::now() + Duration::from_millis(self.options.recall_ms);
        for mut wait in waits {
            let left = until.saturating_duration_since(Instant::now());
            if self.pool.timeout(left, &mut wait.answer).await.is_some() {
                continue;
            }
            if self.core.lock().pushes.contains_key(&wait.id) {
                self.give_up(wait.node, &format!("it {what} within {} ms", self.options.recall_ms));
            }
            // An error means that the session is over, which is as good as an answer.
            let _over = wait.answer.await;
        }
    }

    /// Asks everybody but `except` who may have written the file for its size and time, and waits for the answers.
    pub(crate) async fn query_writers(&self, file: FileId, except: Option<NodeId>) {
        self.query_writers_that(file, |node| Some(node) != except).await;
    }

    /// As `query_writers`, only those that are `asked`.
    pub(crate) async fn query_writers_that(&self, file: FileId, asked: impl Fn(NodeId) -> bool) {
        let waits: Vec<Wait> = {
            let core = &mut *self.core.lock();
            let mut nodes: Vec<NodeId> = core
                .table
                .grants(file)
                .filter(|(_, _, access, _)| *access != csv_layout::Access::Read)
                .map(|(node, ..)| node)
                .chain(core.files.get(&file).and_then(|state| state.eof).map(|eof| eof.node))
                .filter(|node| asked(*node))
                .collect();
            nodes.sort_unstable();
            nodes.dedup();
            let query =
                |id| server_message::Body::CommitQuery(CommitQuery { query_id: id, file: Some(file.into()) });
            nodes.into_iter().filter_map(|node| self.push(core, node, query)).collect()
        };
        self.answered(waits, "did not tell a file's size").await;
    }
}

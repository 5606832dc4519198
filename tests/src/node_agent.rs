//! A `csv-test-agent` in a lab node, driven over its standard input and output.

use crate::driver::Node;
use crate::lab::Lab;
use crate::ops::{Op, Reply};
use anyhow::{Context as _, bail};
use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Child, ChildStdin, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::Duration;

/// Longer than every time-out inside the cluster, so that a late answer is a fault.
const ANSWER_DEADLINE: Duration = Duration::from_secs(150);

/// The process.
#[derive(Debug)]
pub struct NodeAgent {
    node: String,
    child: Child,
    input: ChildStdin,
    answers: Receiver<String>,
}

impl NodeAgent {
    /// Starts an agent for `dir` on `node`.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn start(lab: &Lab, node: &str, dir: &str) -> anyhow::Result<NodeAgent> {
        let program = crate::tools::agent()?;
        let mut command = lab.command(node);
        command.arg(program).args(["serve", dir]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().with_context(|| format!("starting the agent on {node}"))?;
        let input = child.stdin.take().context("agent without standard input")?;
        let output = child.stdout.take().context("agent without standard output")?;
        let (sender, answers) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    break;
                }
            }
        });
        Ok(NodeAgent { node: node.to_owned(), child, input, answers })
    }

    /// Sends an operation without waiting for its answer.
    ///
    /// # Errors
    /// The agent is gone.
    pub fn send(&mut self, op: &Op) -> anyhow::Result<()> {
        let line = serde_json::to_string(op)?;
        writeln!(self.input, "{line}").with_context(|| format!("the agent on {} is gone", self.node))
    }

    /// The answer to what was sent; `None` when there is none yet after `wait`.
    ///
    /// # Errors
    /// The agent is gone or answers nonsense.
    pub fn answer(&mut self, wait: Duration) -> anyhow::Result<Option<Reply>> {
        match self.answers.recv_timeout(wait) {
            Ok(line) => serde_json::from_str(&line).map(Some).with_context(|| format!("answer {line:?}")),
            Err(RecvTimeoutError::Timeout) => Ok(None),
            Err(RecvTimeoutError::Disconnected) => bail!("the agent on {} has ended", self.node),
        }
    }

    /// Process id of `csvctl lab exec`, which passes signals on.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Closes the agent's input, upon which it ends and its files are closed.
    ///
    /// # Errors
    /// It does not end.
    pub fn stop(mut self) -> anyhow::Result<()> {
        drop(self.input);
        match crate::wait::exit_within(&mut self.child, ANSWER_DEADLINE)? {
            Some(status) if status.success() => Ok(()),
            Some(status) => bail!("the agent on {}: {status}", self.node),
            None => bail!("the agent on {} did not end", self.node),
        }
    }
}

impl Node for NodeAgent {
    fn call(&mut self, op: &Op) -> anyhow::Result<Reply> {
        self.send(op)?;
        let answer = self.answer(ANSWER_DEADLINE)?;
        answer.with_context(|| format!("n{}: no answer within {} s", self.node, ANSWER_DEADLINE.as_secs()))
    }
}

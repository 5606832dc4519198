//! A state machine that remembers every command in order.

use crate::types::StateMachine;
use parking_lot::Mutex;
use std::sync::Arc;

/// The commands that were applied. Clones show the same list.
#[derive(Debug, Clone, Default)]
pub(crate) struct ListMachine(pub(crate) Arc<Mutex<Vec<Vec<u8>>>>);

impl ListMachine {
    pub(crate) fn list(&self) -> Vec<Vec<u8>> {
        self.0.lock().clone()
    }
}

impl StateMachine for ListMachine {
    fn apply(&mut self, _index: u64, command: &[u8]) -> Vec<u8> {
        let mut list = self.0.lock();
        list.push(command.to_vec());
        (list.len() as u64).to_le_bytes().to_vec()
    }

    fn snapshot(&self) -> Vec<u8> {
        let mut out = crate::codec::Encoder::default();
        for command in self.0.lock().iter() {
            out.bytes(command);
        }
        out.0
    }

    fn restore(&mut self, snapshot: &[u8]) -> Result<(), String> {
        let mut rest = snapshot;
        let mut list = Vec::new();
        while !rest.is_empty() {
            let command = crate::codec::Decoder::new(rest).bytes().map_err(|e| e.to_string())?;
            rest = &rest[4 + command.len()..];
            list.push(command.to_vec());
        }
        *self.0.lock() = list;
        Ok(())
    }
}

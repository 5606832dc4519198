//! A disk and a block region in memory that lose, tear, refuse and flip. What is live and what is durable are kept
//! apart: a crash keeps what is durable and a random part of the rest.

use super::blocks::BlockStore;
use super::disk::Disk;
use parking_lot::Mutex;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

const SECTOR: usize = 512;

/// What a call ends with, counted over all calls that write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// The power goes during this call.
    Crash,
    /// The call fails; a write may have written a part.
    Error(io::ErrorKind),
}

/// After how many writing calls the fault comes; calls after a crash fail too.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct Plan {
    pub(crate) at: Option<(u64, Fault)>,
    calls: u64,
    dead: bool,
}

impl Plan {
    fn step(&mut self) -> Option<Fault> {
        self.calls += 1;
        if self.dead {
            return Some(Fault::Crash);
        }
        let fault = self.at.filter(|(at, _)| *at == self.calls).map(|(_, fault)| fault);
        self.dead = fault == Some(Fault::Crash);
        fault
    }
}

fn error(fault: Fault) -> io::Error {
    match fault {
        Fault::Crash => io::Error::other("the power is gone"),
        Fault::Error(kind) => kind.into(),
    }
}

type Files = BTreeMap<String, u64>;

#[derive(Debug, Default)]
struct DiskState {
    /// Name to file number, as the kernel sees it and as the disk has it, and the changes between.
    live: Files,
    durable: Files,
    pending: Vec<(String, Option<u64>)>,
    /// File number to bytes, and how many of them are durable.
    bytes: BTreeMap<u64, (Vec<u8>, usize)>,
    next: u64,
    plan: Plan,
}

/// A directory in memory. Clones are the same one.
#[derive(Debug, Clone, Default)]
pub(crate) struct FaultyDisk(Arc<Mutex<DiskState>>);

impl DiskState {
    fn set(&mut self, name: &str, file: Option<u64>) {
        match file {
            Some(file) => self.live.insert(name.to_owned(), file),
            None => self.live.remove(name),
        };
        self.pending.push((name.to_owned(), file));
    }

    fn file(&mut self, name: &str) -> io::Result<&mut (Vec<u8>, usize)> {
        let number = *self.live.get(name).ok_or(io::ErrorKind::NotFound)?;
        self.bytes.get_mut(&number).ok_or(io::ErrorKind::NotFound.into())
    }
}

impl FaultyDisk {
    pub(crate) fn set_fault(&self, after_calls: u64, fault: Fault) {
        let mut state = self.0.lock();
        state.plan = Plan { at: Some((after_calls, fault)), ..Plan::default() };
    }

    /// The power goes: names change up to a random one of the pending changes, unsynced bytes are there sector by
    /// sector by chance, and the file ends anywhere.
    pub(crate) fn crash(&self, seed: u64) {
        let mut rng = StdRng::seed_from_u64(seed);
        let mut state = self.0.lock();
        let state = &mut *state;
        let kept = rng.random_range(0..=state.pending.len());
        let mut names = state.durable.clone();
        for (name, file) in state.pending.drain(..).take(kept) {
            match file {
                Some(file) => names.insert(name, file),
                None => names.remove(&name),
            };
        }
        for (bytes, durable) in state.bytes.values_mut() {
            if rng.random_bool(0.3) {
                bytes.truncate(rng.random_range(*durable..=bytes.len()));
            }
            let mut start = *durable;
            while start < bytes.len() {
                let end = ((start / SECTOR + 1) * SECTOR).min(bytes.len());
                if rng.random_bool(0.5) {
                    bytes[start..end].fill(0);
                }
                start = end;
            }
            *durable = bytes.len();
        }
        state.live = names.clone();
        state.durable = names;
        state.plan = Plan::default();
    }

    pub(crate) fn flip(&self, name: &str, bit: usize) {
        let mut state = self.0.lock();
        let (bytes, _) = state.file(name).unwrap();
        bytes[bit / 8] ^= 1 << (bit % 8);
    }

    pub(crate) fn delete(&self, name: &str) {
        let mut state = self.0.lock();
        state.live.remove(name);
        state.durable.remove(name);
    }

    /// The same bytes on a disk of its own.
    pub(crate) fn copy(&self) -> FaultyDisk {
        let state = self.0.lock();
        FaultyDisk(Arc::new(Mutex::new(DiskState {
            live: state.live.clone(),
            durable: state.live.clone(),
            pending: Vec::new(),
            bytes: state.bytes.iter().map(|(n, (b, _))| (*n, (b.clone(), b.len()))).collect(),
            next: state.next,
            plan: Plan::default(),
        })))
    }
}

impl Disk for FaultyDisk {
    fn place(&self) -> String {
        "/disk".to_owned()
    }

    fn list(&self) -> io::Result<Vec<String>> {
        Ok(self.0.lock().live.keys().cloned().collect())
    }

    fn read(&self, name: &str) -> io::Result<Vec<u8>> {
        Ok(self.0.lock().file(name)?.0.clone())
    }

    fn append(&mut self, name: &str, bytes: &[u8]) -> io::Result<()> {
        let mut state = self.0.lock();
        let fault = state.plan.step();
        if !state.live.contains_key(name) {
            let number = state.next;
            state.next += 1;
            state.bytes.insert(number, (Vec::new(), 0));
            state.set(name, Some(number));
        }
        let written = if fault.is_some() { bytes.len() / 2 } else { bytes.len() };
        state.file(name)?.0.extend_from_slice(&bytes[..written]);
        fault.map_or(Ok(()), |fault| Err(error(fault)))
    }

    fn sync(&mut self, name: &str) -> io::Result<()> {
        let mut state = self.0.lock();
        if let Some(fault) = state.plan.step() {
            return Err(error(fault));
        }
        let (bytes, durable) = state.file(name)?;
        *durable = bytes.len();
        Ok(())
    }

    fn truncate(&mut self, name: &str, len: u64) -> io::Result<()> {
        let mut state = self.0.lock();
        if let Some(fault) = state.plan.step() {
            return Err(error(fault));
        }
        let (bytes, durable) = state.file(name)?;
        bytes.truncate(usize::try_from(len).unwrap());
        *durable = (*durable).min(bytes.len());
        Ok(())
    }

    fn rename(&mut self, from: &str, to: &str) -> io::Result<()> {
        let mut state = self.0.lock();
        if let Some(fault) = state.plan.step() {
            return Err(error(fault));
        }
        let file = *state.live.get(from).ok_or(io::ErrorKind::NotFound)?;
        // One step: a crash keeps both or none.
        state.set(to, Some(file));
        state.live.remove(from);
        Ok(())
    }

    fn remove(&mut self, name: &str) -> io::Result<()> {
        let mut state = self.0.lock();
        if let Some(fault) = state.plan.step() {
            return Err(error(fault));
        }
        if !state.live.contains_key(name) {
            return Err(io::ErrorKind::NotFound.into());
        }
        state.set(name, None);
        Ok(())
    }

    fn sync_dir(&mut self) -> io::Result<()> {
        let mut state = self.0.lock();
        if let Some(fault) = state.plan.step() {
            return Err(error(fault));
        }
        state.durable = state.live.clone();
        state.pending.clear();
        Ok(())
    }
}

#[derive(Debug)]
struct BlocksState {
    bytes: Vec<u8>,
    /// The write during which the power went.
    torn: Option<(usize, Vec<u8>)>,
    plan: Plan,
}

/// A block region in memory. Clones are the same one.
#[derive(Debug, Clone)]
pub(crate) struct FaultyBlocks(Arc<Mutex<BlocksState>>);

impl FaultyBlocks {
    pub(crate) fn new(len: usize) -> Self {
        FaultyBlocks(Arc::new(Mutex::new(BlocksState {
            bytes: vec![0; len],
            torn: None,
            plan: Plan::default(),
        })))
    }

    pub(crate) fn set_fault(&self, after_calls: u64, fault: Fault) {
        self.0.lock().plan = Plan { at: Some((after_calls, fault)), ..Plan::default() };
    }

    /// Of the write that was under way each sector is there by chance.
    pub(crate) fn crash(&self, seed: u64) {
        let mut rng = StdRng::seed_from_u64(seed);
        let mut state = self.0.lock();
        if let Some((offset, data)) = state.torn.take() {
            for (i, sector) in data.chunks(SECTOR).enumerate() {
                if rng.random_bool(0.5) {
                    let at = offset + i * SECTOR;
                    state.bytes[at..at + sector.len()].copy_from_slice(sector);
                }
            }
        }
        state.plan = Plan::default();
    }

    pub(crate) fn flip(&self, bit: usize) {
        self.0.lock().bytes[bit / 8] ^= 1 << (bit % 8);
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        self.0.lock().bytes.clone()
    }

    pub(crate) fn copy(&self) -> FaultyBlocks {
        let copy = FaultyBlocks::new(0);
        copy.0.lock().bytes = self.bytes();
        copy
    }
}

impl BlockStore for FaultyBlocks {
    fn place(&self) -> String {
        "/region".to_owned()
    }

    fn len(&self) -> u64 {
        self.0.lock().bytes.len() as u64
    }

    fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        assert!(offset.is_multiple_of(4096) && buf.len().is_multiple_of(4096));
        let offset = usize::try_from(offset).unwrap();
        buf.copy_from_slice(&self.0.lock().bytes[offset..offset + buf.len()]);
        Ok(())
    }

    fn write_synced(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        assert!(offset.is_multiple_of(4096) && data.len().is_multiple_of(4096));
        let offset = usize::try_from(offset).unwrap();
        let mut state = self.0.lock();
        let was_dead = state.plan.dead;
        if let Some(fault) = state.plan.step() {
            if !was_dead {
                state.torn = Some((offset, data.to_vec()));
            }
            return Err(error(fault));
        }
        state.bytes[offset..offset + data.len()].copy_from_slice(data);
        Ok(())
    }
}

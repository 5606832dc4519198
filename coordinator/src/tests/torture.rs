//! Three nodes write and read one file, straight on the LUN under grants and through the coordinator, in random turns.
//! Each owns every third block and knows what must stand there: a stale page, a stale map, or a lost or misplaced write
//! shows up as a wrong byte.

use super::rig::*;
use csv_proto::{
    Access, Fallocate, LayoutGet, LayoutGrant, LayoutReturn, Reply, call::Op, client_message, reply,
};
use csv_types::FileId;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::collections::BTreeMap;
use std::sync::atomic::Ordering;

const BLOCK: usize = 4096;
const BLOCKS: u64 = 90;
const ROUNDS: usize = 250;

/// What a node has put into its blocks: one byte for each half.
type Model = BTreeMap<u64, [u8; 2]>;

struct Writer<'a> {
    rig: &'a Rig,
    node: &'a Node,
    file: FileId,
    rng: StdRng,
    model: Model,
    seed: u64,
}

fn block_of(halves: [u8; 2]) -> Vec<u8> {
    [vec![halves[0]; BLOCK / 2], vec![halves[1]; BLOCK / 2]].concat()
}

impl Writer<'_> {
    fn get(&self, block: u64, access: Access, extend: bool) -> Reply {
        let (file, len) = (Some(self.file.into()), BLOCK as u64);
        let offset = block * len;
        self.node.call(Op::LayoutGet(LayoutGet {
            file,
            offset,
            len,
            access: access.into(),
            extend,
            want_ahead_bytes: 0,
        }))
    }

    /// Everything of a grant goes back at once, so recalls need no answer.
    fn give_back(&self, grant: &LayoutGrant, size: Option<u64>) {
        self.node.send(client_message::Body::LayoutReturn(LayoutReturn {
            file: Some(self.file.into()),
            offset: grant.offset,
            end: grant.end,
            up_to_seq: grant.seq,
            recall_id: 0,
            size,
            mtime: None,
        }));
    }

    /// A grant for writing, behind the end with the right to move it.
    fn writable(&self, block: u64, access: Access) -> LayoutGrant {
        let reply = self.get(block, access, false);
        if reply.errno == libc::ENXIO {
            return grant(self.get(block, access, true));
        }
        assert_eq!(reply.errno, 0, "{}", reply.reason);
        grant(reply)
    }

    fn done(&self, grant: &LayoutGrant, block: u64) {
        let size = grant.eof.then(|| grant.size.max((block + 1) * BLOCK as u64));
        self.give_back(grant, size);
    }

    fn step(&mut self) {
        let third = u64::from(self.node.id.0 - 1);
        let block = self.rng.random_range(0..BLOCKS / 3) * 3 + third;
        let at = block * BLOCK as u64;
        let new = [self.rng.random(), self.rng.random()];
        match self.rng.random_range(0..7) {
            0 | 1 => {
                let grant = self.writable(block, Access::Write);
                self.rig.write_lun(place(&grant, at), &block_of(new));
                self.model.insert(block, new);
                self.done(&grant, block);
            }
            2 => {
                // Half a block: read, modify, write, alone.
                let grant = self.writable(block, Access::Exclusive);
                let mut bytes = self.rig.read_lun(place(&grant, at), BLOCK);
                let old = self.model.get(&block).copied().unwrap_or_default();
                assert_eq!(
                    bytes,
                    block_of(old),
                    "seed {}: block {block} under an exclusive grant",
                    self.seed
                );
                bytes[BLOCK / 2..].fill(new[1]);
                self.rig.write_lun(place(&grant, at), &bytes);
                self.model.insert(block, [old[0], new[1]]);
                self.done(&grant, block);
            }
            3 => {
                self.node.write(self.file, at, block_of(new));
                self.model.insert(block, new);
            }
            4 if self.model.contains_key(&block) => {
                let mode = (libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE).cast_unsigned();
                let file = Some(self.file.into());
                self.node.ok(Op::Fallocate(Fallocate { file, offset: at, len: BLOCK as u64, mode }));
                self.model.insert(block, [0; 2]);
            }
            _ => self.check(block),
        }
    }

    fn check(&self, block: u64) {
        let at = block * BLOCK as u64;
        let want = self.model.get(&block).map(|halves| block_of(*halves));
        let through = self.node.read(self.file, at, u32::try_from(BLOCK).unwrap());
        let whole = want.clone().unwrap_or_else(|| vec![0; through.len()]);
        assert!(
            through == whole,
            "seed {}: block {block} through the coordinator: {:?}",
            self.seed,
            through.first()
        );
        let reply = self.get(block, Access::Read, false);
        let Some(reply::Body::Grant(grant)) = reply.body else {
            assert!(want.is_none(), "seed {}: block {block}: {reply:?}", self.seed);
            return;
        };
        let extent =
            grant.extents.iter().find(|e| e.file_offset <= at && at < e.file_offset + e.len).unwrap();
        let bytes = if extent.zeros { vec![0; BLOCK] } else { self.rig.read_lun(place(&grant, at), BLOCK) };
        let whole = want.unwrap_or_else(|| vec![0; BLOCK]);
        assert!(bytes == whole, "seed {}: block {block} on the LUN: {:?}", self.seed, bytes.first());
        self.give_back(&grant, None);
    }
}

#[test]
fn every_byte_is_where_its_writer_put_it() {
    let seed = u64::from(rand::random::<u32>());
    on_each_fs(|rig| {
        let rig = &*rig;
        let nodes = [rig.node(N1), rig.node(N2), rig.node(N3)];
        let file = nodes[0].create("f", 1);
        std::thread::scope(|scope| {
            for node in &nodes {
                node.returns.store(false, Ordering::SeqCst);
                scope.spawn(move || {
                    let rng = StdRng::seed_from_u64(seed + u64::from(node.id.0));
                    let mut writer = Writer { rig, node, file, rng, model: Model::new(), seed };
                    for _ in 0..ROUNDS {
                        writer.step();
                    }
                    let blocks: Vec<u64> = writer.model.keys().copied().collect();
                    blocks.into_iter().for_each(|block| writer.check(block));
                });
            }
        });
        assert!(nodes.iter().all(|node| !node.was_revoked()), "seed {seed}");
    });
}

//! Three nodes at once on few files: nothing hangs, nothing is left behind, and the file system is sound afterwards.

use super::rig::*;
use csv_proto::{Access, Close, Create, LayoutCommit, LayoutGet, Open, Rename, call::Op};
use csv_types::FileId;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::collections::BTreeSet;
use std::sync::Arc;

const FILES: u32 = 6;
const ROUNDS: usize = 400;

fn name(rng: &mut StdRng) -> bytes::Bytes {
    format!("f{}", rng.random_range(0..FILES)).into()
}

/// Does something random; every answer is fine as long as there is one.
fn act(node: &Node, rng: &mut StdRng, opens: &mut BTreeSet<u64>) {
    let looked = node.call(Op::Lookup(csv_proto::Lookup { parent: node.root(), name: name(rng) }));
    let file = (looked.errno == 0).then(|| id(&attr(&looked)));
    let wire = file.map(csv_proto::FileId::from);
    let (offset, len) = (rng.random_range(0..300_000), rng.random_range(1..100_000));
    let handle = rng.random_range(0..20);
    let op = match rng.random_range(0..12) {
        0 | 1 => {
            opens.insert(handle);
            Op::Create(Create { parent: node.root(), name: name(rng), mode: 0o644, flags: 0, handle })
        }
        2 => Op::Unlink(csv_proto::Unlink { parent: node.root(), name: name(rng) }),
        3 => Op::Rename(Rename {
            parent: node.root(),
            name: name(rng),
            new_parent: node.root(),
            new_name: name(rng),
            ..Rename::default()
        }),
        4 => {
            opens.insert(handle);
            Op::Open(Open { file: wire, handle, ..Open::default() })
        }
        5 => Op::Close(Close { handle, file: wire }),
        6 => Op::Setattr(csv_proto::SetAttr { file: wire, size: Some(offset), ..Default::default() }),
        7 => Op::Write(csv_proto::Write {
            file: wire,
            offset,
            data: vec![1; 5000].into(),
            append: rng.random(),
            ..Default::default()
        }),
        8 => Op::Read(csv_proto::Read { file: wire, offset, len: 5000 }),
        9 => {
            let access = [Access::Read, Access::Write, Access::Exclusive][rng.random_range(0..3)].into();
            Op::LayoutGet(LayoutGet { file: wire, offset, len, access, ..LayoutGet::default() })
        }
        10 => Op::LayoutGet(LayoutGet { file: wire, offset, len, extend: true, ..LayoutGet::default() }),
        _ => Op::LayoutCommit(LayoutCommit { file: wire, size: Some(offset), ..LayoutCommit::default() }),
    };
    node.call(op);
}

#[test]
fn nothing_hangs_and_nothing_is_left_behind() {
    let seed: u64 = u64::from(rand::random::<u32>());
    on_each_fs(|rig| {
        let nodes = [rig.node(N1), rig.node(N2), rig.node(N3)];
        std::thread::scope(|scope| {
            for (i, node) in (0..).zip(nodes.iter().flat_map(|node| [Arc::clone(node), Arc::clone(node)])) {
                scope.spawn(move || {
                    let mut rng = StdRng::seed_from_u64(seed + i);
                    let mut opens = BTreeSet::new();
                    for _ in 0..ROUNDS {
                        act(&node, &mut rng, &mut opens);
                    }
                    for handle in opens {
                        node.call(Op::Close(Close { handle, file: Some(FileId::default().into()) }));
                    }
                });
            }
        });
        assert!(nodes.iter().all(|node| !node.was_revoked()), "seed {seed}");
        let deadline = std::time::Instant::now() + WAIT;
        while !rig.co().fs().orphans().is_empty() {
            assert!(std::time::Instant::now() < deadline, "seed {seed}: {:?}", rig.co().fs().orphans());
            std::thread::yield_now();
        }
        rig.co().stop().unwrap();
        let core = rig.co().core.lock();
        assert_eq!(core.table.files().count(), 0, "seed {seed}");
        let busy: Vec<_> =
            core.files.values().filter(|s| s.opens > 0 || s.eof.is_some() || s.mapping > 0).collect();
        assert!(busy.is_empty(), "seed {seed}: {busy:?}");
        drop(core);
        drop(nodes);
        rig.check_file_system();
    });
}

//! Grace that ends while nodes still reclaim.

use super::rig::*;
use csv_proto::{Access, LayoutReclaim, ReclaimDone, call::Op, client_message};
use csv_types::FileId;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// A short lease, a file of which n2 holds a piece, a crash, and n2 at the next coordinator.
fn crashed(rig: &mut Rig) -> (Arc<Node>, FileId, Op) {
    rig.coordinator.take().unwrap().crash();
    rig.lease_ms = 1000;
    rig.recall_ms = 500;
    rig.start();
    let b = rig.node(N2);
    let file = b.create("f", 1);
    b.write(file, 0, vec![1; 8192]);
    let grant = b.granted(file, 0, 8192, Access::Write);
    let epoch = rig.co().options().epoch.0;
    rig.co().fs().syncfs().unwrap();
    rig.coordinator.take().unwrap().crash();
    drop(b);
    rig.start();
    let b = Node::connect(rig.co(), N2, [2; 16], epoch);
    assert!(b.welcome().grace);
    (b, file, Op::LayoutReclaim(LayoutReclaim { file: Some(file.into()), grants: vec![grant] }))
}

#[test]
fn a_node_that_goes_on_reclaiming_is_waited_for() {
    on(crate::FsKind::Ext4, |rig| {
        let (b, file, reclaim) = crashed(rig);
        let begun = Instant::now();
        let a = rig.node(N1);
        let cut = a.start(a.truncate(file, 0));
        let time = rig.co().lease_over() + Duration::from_secs(1);
        while begun.elapsed() < time {
            a.ping();
            b.ok(reclaim.clone());
        }
        assert!(!rig.events.0.lock().iter().any(|(kind, _)| kind == "grace-end"));
        assert!(!a.answered(cut));
        b.send(client_message::Body::ReclaimDone(ReclaimDone {}));
        assert!(rig.event("grace-end").contains("every node"));
        assert_eq!(a.finish(cut).errno, 0);
        assert_eq!(csv_proto::file_id(b.wait_recall().file).unwrap(), file);
    });
}

#[test]
fn a_node_that_stops_reclaiming_is_given_up_and_ended_before_grace_ends() {
    on(crate::FsKind::Ext4, |rig| {
        rig.fences.store(false, Ordering::SeqCst);
        let (b, _file, reclaim) = crashed(rig);
        wait_until(|| {
            b.ping();
            rig.events.0.lock().iter().any(|(kind, _)| kind == "grace-end")
        });
        assert!(b.wait_revoked().contains("reclaim"));
        let events = rig.events.0.lock();
        let at = |what: &str| events.iter().rposition(|(kind, _)| kind == what);
        assert!(at("session-expired").is_some() && at("session-expired") < at("grace-end"), "{events:?}");
        drop(events);
        let back = Node::connect(rig.co(), N2, [2; 16], 2);
        assert_eq!(back.call(reclaim).errno, libc::ESTALE);
    });
}

//! On real networks: two network namespaces with a veth pair between them.

use super::*;
use crate::types::testbed::{Bed, properties, sh, spec};
use nix::sched::{CloneFlags, setns};
use std::fs::File;
use std::sync::atomic::AtomicU32;

static NETS: AtomicU32 = AtomicU32::new(0);

/// Namespaces `left` (10.77.0.1, fd77::1) and `right` (10.77.0.2, fd77::2); gone when dropped.
struct Net {
    left: String,
    right: String,
}

impl Net {
    /// `None` when not run as root.
    fn new() -> Option<Net> {
        if !rustix::process::geteuid().is_root() {
            return None;
        }
        let number = NETS.fetch_add(1, Ordering::Relaxed);
        let name = |side: &str| format!("csvip-{}-{number}{side}", std::process::id());
        let net = Net { left: name("l"), right: name("r") };
        for space in [&net.left, &net.right] {
            sh("ip", &["netns", "add", space]);
        }
        sh(
            "ip",
            &["-n", &net.left, "link", "add", "eth0", "type", "veth", "peer", "eth0", "netns", &net.right],
        );
        for (space, number) in [(&net.left, 1), (&net.right, 2)] {
            sh("ip", &["-n", space, "link", "set", "eth0", "up"]);
            sh("ip", &["-n", space, "address", "add", &format!("10.77.0.{number}/24"), "dev", "eth0"]);
            sh("ip", &["-n", space, "address", "add", &format!("fd77::{number}/64"), "dev", "eth0", "nodad"]);
        }
        // The link-local addresses: the far end answers solicitations only once they are there.
        for space in [&net.left, &net.right] {
            while sh("ip", &["-n", space, "address", "show", "tentative"]).contains("inet6") {
                std::thread::sleep(Duration::from_millis(20));
            }
        }
        Some(net)
    }

    fn mac(space: &str) -> String {
        let text = sh("ip", &["-n", space, "link", "show", "eth0"]);
        text.split_once("link/ether ").unwrap().1.split(' ').next().unwrap().to_owned()
    }

    /// Runs something in the left namespace.
    fn on_left<T: Send>(&self, run: impl FnOnce() -> T + Send) -> T {
        let space = File::open(format!("/run/netns/{}", self.left)).unwrap();
        std::thread::scope(|scope| {
            let thread = scope.spawn(move || {
                setns(space, CloneFlags::CLONE_NEWNET).unwrap();
                run()
            });
            thread.join().unwrap()
        })
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        for space in [&self.left, &self.right] {
            let _ = std::process::Command::new("ip").args(["netns", "delete", space]).status();
        }
    }
}

fn address(bed: &Bed, pairs: &[(&str, &str)]) -> Box<dyn Resource> {
    bed.open(&IpAddress, spec("IPAddress", pairs))
}

#[test]
fn contradictions_are_refused() {
    let bad = [
        ([("address", "224.0.0.1/24"), ("label", "x")], "cannot be the address of a host"),
        ([("address", "fd00::1/64"), ("label", "x")], "IPv4"),
        ([("address", "10.0.0.1/24"), ("label", "a-label-that-is-long")], "too long"),
        ([("address", "10.0.0.1/24"), ("interface", "-x")], "no name of an interface"),
        ([("address", "10.0.0.1"), ("interface", "eth0")], "with prefix"),
    ];
    for (pairs, expected) in bad {
        let error = IpAddress.check(&properties(&pairs)).unwrap_err();
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn an_address_comes_moves_the_neighbours_and_goes() {
    for (addr, with_prefix) in [("10.77.0.5", "10.77.0.5/24"), ("fd77::5", "fd77::5/64")] {
        let Some(net) = Net::new() else { return };
        let stale = ["neigh", "replace", addr, "lladdr", "02:00:00:00:00:99", "dev", "eth0", "nud", "stale"];
        sh("ip", &[&["-n", &net.right], stale.as_slice()].concat());
        let bed = Bed::new();
        net.on_left(|| {
            let mut resource = address(&bed, &[("address", with_prefix)]);
            assert!(resource.looks_alive().is_err());
            resource.online().unwrap();
            resource.looks_alive().unwrap();
            resource.is_alive().unwrap();
            resource.control("announce", &serde_json::Value::Null).unwrap();
        });
        let mac = Net::mac(&net.left);
        let patience = Instant::now() + Duration::from_secs(30);
        while !sh("ip", &["-n", &net.right, "neigh", "show", addr]).contains(&mac) {
            assert!(Instant::now() < patience, "the neighbour has not learnt {mac}");
            std::thread::sleep(Duration::from_millis(20));
        }
        net.on_left(|| {
            // A new host takes it over; another cluster's resource may not.
            let mut adopted = address(&bed, &[("address", with_prefix)]);
            adopted.adopt().unwrap();
            let error = address(&Bed::new(), &[("address", with_prefix)]).online().unwrap_err();
            assert!(error.to_string().contains("already"), "{error}");
            adopted.offline().unwrap();
            adopted.terminate().unwrap();
            assert!(bed.saved().is_none());
            assert!(adopted.looks_alive().is_err());
            assert!(!interfaces().unwrap().iter().any(|interface| interface.has(addr.parse().unwrap())));
        });
    }
}

#[test]
fn an_address_in_use_is_refused_with_its_mac_and_noticed_later() {
    for (addr, taken) in [("10.77.0.5/24", "10.77.0.2/24"), ("fd77::5/64", "fd77::2/64")] {
        let Some(net) = Net::new() else { return };
        let bed = Bed::new();
        let mac = Net::mac(&net.right);
        net.on_left(|| {
            let error = address(&bed, &[("address", taken)]).online().unwrap_err();
            assert!(error.to_string().contains(&mac), "{error}");
            assert!(bed.saved().is_none());
            let mut resource = address(&bed, &[("address", addr), ("interface", "eth0"), ("arp_count", "1")]);
            resource.online().unwrap();
            let add = ["-n", &net.right, "address", "add", addr, "dev", "eth0"];
            let nodad = if addr.contains(':') { vec!["nodad"] } else { Vec::new() };
            sh("ip", &[&add, nodad.as_slice()].concat());
            let error = resource.is_alive().unwrap_err();
            assert!(error.to_string().contains(&mac), "{error}");
            resource.terminate().unwrap();
        });
    }
}

#[test]
fn a_link_without_carrier_is_not_alive() {
    let Some(net) = Net::new() else { return };
    let bed = Bed::new();
    net.on_left(|| {
        let mut resource = address(&bed, &[("address", "10.77.0.5/24")]);
        resource.online().unwrap();
        sh("ip", &["-n", &net.right, "link", "set", "eth0", "down"]);
        let patience = Instant::now() + Duration::from_secs(30);
        let error = loop {
            match resource.looks_alive() {
                Err(error) => break error,
                Ok(()) => assert!(Instant::now() < patience),
            }
            std::thread::sleep(Duration::from_millis(20));
        };
        assert!(error.to_string().contains("no link"), "{error}");
        resource.terminate().unwrap();
        let error = address(&bed, &[("address", "10.77.0.6/24")]).online().unwrap_err();
        assert!(error.to_string().contains("no link"), "{error}");
        let error = address(&bed, &[("address", "192.168.9.9/24")]).online().unwrap_err();
        assert!(matches!(&error, Failure::NotHere(text) if text.contains("eth0")), "{error}");
    });
}

#[test]
fn addresses_of_one_subnet_come_and_go_by_themselves() {
    let Some(net) = Net::new() else { return };
    let (first_bed, second_bed) = (Bed::new(), Bed::new());
    net.on_left(|| {
        let pairs = [("address", "10.88.0.5/24"), ("interface", "eth0"), ("label", "web")];
        let mut first = address(&first_bed, &pairs);
        first.online().unwrap();
        // Found by the subnet of the first one.
        let mut second = address(&second_bed, &[("address", "10.88.0.6/24"), ("duplicate_check", "false")]);
        second.online().unwrap();
        assert!(sh("ip", &["address", "show", "label", "eth0:web"]).contains("10.88.0.5/24"));
        first.looks_alive().unwrap();
        first.offline().unwrap();
        second.is_alive().unwrap();
        sh("ip", &["address", "delete", "10.88.0.6/24", "dev", "eth0"]);
        let error = second.looks_alive().unwrap_err();
        assert!(error.to_string().contains("somebody has removed it"), "{error}");
        second.terminate().unwrap();
        assert!(second_bed.saved().is_none());
    });
    assert_eq!(first_bed.events(), Vec::<String>::new());
}

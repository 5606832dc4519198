//! `IPAddress`: an address that moves with its group.
//!
//! Online asks the network first: an address that another host answers for is refused, and the message names that
//! host's MAC address. Then the address is added, and the neighbours are told several times, since the first frames after a
//! link came up are easily lost. An address that was on the node already is not ours and is left alone.
//!
//! What outlives the host is the address itself. It is noted (`save`) before it is added, so after a crash at any moment
//! `terminate` removes what was added and nothing else. Addresses are added and removed by ip(8): an operation a day is
//! worth no netlink library of our own, and every administrator can do the same by hand. Looks start no program.

mod interfaces;
mod neighbours;
mod packet;
#[cfg(test)]
mod tests;

use super::keep;
use super::run::{Program, pause};
use super::settings::{flag, number, optional, required, text};
use crate::api::{
    Context, EventLevel, Failure, Form, Resource, ResourceType, Spec, TypeInfo, address_with_prefix,
};
use interfaces::{Detection, Interface};
use neighbours::Neighbours;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Longest label of an address (IFNAMSIZ less its NUL).
const LABEL_BYTES_MAX: usize = 15;
/// How long ip(8) may take.
const IP_LIMIT: Duration = Duration::from_secs(20);
/// How long the kernel's duplicate address detection may take; it needs about one second for each of its probes.
const DETECTION_LIMIT: Duration = Duration::from_secs(15);
/// Between two announcements in the background.
const ANNOUNCE_GAP: Duration = Duration::from_secs(1);
/// Announcements in the background.
const ANNOUNCE_AGAIN: u32 = 3;

/// The type.
#[derive(Debug, Clone, Copy, Default)]
pub struct IpAddress;

impl ResourceType for IpAddress {
    fn info(&self) -> TypeInfo {
        TypeInfo {
            name: "IPAddress".into(),
            help: "An IP address that moves with its group".into(),
            properties: vec![
                required(
                    "address",
                    Form::AddressWithPrefix,
                    "the address with its prefix, such as 10.0.0.5/24",
                ),
                optional(
                    "interface",
                    Form::Text,
                    Some("the interface whose subnet holds the address"),
                    "interface that gets the address",
                ),
                optional(
                    "label",
                    Form::Text,
                    None,
                    "label of an IPv4 address, shown as INTERFACE:LABEL by ifconfig",
                ),
                optional(
                    "duplicate_check",
                    Form::Bool,
                    Some("true"),
                    "refuse an address that another host answers for, and fail when one begins to",
                ),
                optional(
                    "arp_count",
                    Form::Number { min: 1, max: 20 },
                    Some("3"),
                    "how often the network is asked before, and told after, the address is added (300 ms apart)",
                ),
            ],
            verbs: vec![(
                "announce".into(),
                "tells the network again which MAC address has the address".into(),
            )],
            looks_alive: Duration::from_secs(5),
            is_alive: Duration::from_secs(60),
            shared: false,
        }
    }

    fn check(&self, properties: &BTreeMap<String, String>) -> Result<(), String> {
        let given = text(properties, "address").unwrap_or_default();
        let (addr, _) = address_with_prefix(given)
            .ok_or_else(|| format!("address \"{given}\" is no address with prefix, such as 10.0.0.5/24"))?;
        let broadcast = matches!(addr, IpAddr::V4(addr) if addr.is_broadcast());
        if addr.is_unspecified() || addr.is_multicast() || broadcast {
            return Err(format!("address {addr} cannot be the address of a host"));
        }
        let plain = |name: &str| name.chars().all(|c| c.is_ascii_graphic() && c != '/' && c != ':');
        let interface = text(properties, "interface").unwrap_or_default();
        if !plain(interface) || interface.starts_with('-') || interface.len() > LABEL_BYTES_MAX {
            return Err(format!("interface \"{interface}\" is no name of an interface"));
        }
        if let Some(label) = text(properties, "label") {
            if addr.is_ipv6() {
                return Err("label is for IPv4 addresses only; leave it out".into());
            }
            if !plain(label) || label.len() + interface.len() + 1 > LABEL_BYTES_MAX {
                return Err(format!(
                    "label \"{label}\" is too long or has odd characters: interface, colon and label have {LABEL_BYTES_MAX} characters at most"
                ));
            }
        }
        Ok(())
    }

    fn open(&self, spec: Spec, context: Context) -> Result<Box<dyn Resource>, Failure> {
        self.check(&spec.properties).map_err(Failure::Config)?;
        let (addr, prefix) = text(&spec.properties, "address")
            .and_then(address_with_prefix)
            .ok_or_else(|| Failure::Config("the property address is missing".into()))?;
        let owned = |name: &str| text(&spec.properties, name).map(str::to_owned);
        Ok(Box::new(Address {
            addr,
            prefix,
            interface: owned("interface"),
            label: owned("label"),
            duplicate_check: flag(&spec.properties, "duplicate_check", true),
            arp_count: number(&spec.properties, "arp_count", 3),
            announcing: Arc::default(),
            context,
        }))
    }
}

/// What a new host must know.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Saved {
    interface: String,
    addr: IpAddr,
    prefix: u8,
}

#[derive(Debug)]
struct Address {
    context: Context,
    addr: IpAddr,
    prefix: u8,
    interface: Option<String>,
    label: Option<String>,
    duplicate_check: bool,
    arp_count: u64,
    /// True while the thread that announces again may go on; every online has its own.
    announcing: Arc<AtomicBool>,
}

impl Drop for Address {
    fn drop(&mut self) {
        self.announcing.store(false, Ordering::Relaxed);
    }
}

fn interfaces() -> Result<Vec<Interface>, Failure> {
    interfaces::all()
        .map_err(|errno| Failure::new(format!("interfaces of this node cannot be read: {errno}")))
}

impl Address {
    fn saved(&self) -> Option<Saved> {
        let saved: Saved = serde_json::from_value(self.context.saved()?).ok()?;
        Some(saved)
    }

    /// The interface that has our address now.
    fn ours(&self) -> Result<Interface, Failure> {
        let saved = self.saved().ok_or_else(|| Failure::new(format!("{} was not added here", self.addr)))?;
        let all = interfaces()?;
        let found = all.into_iter().find(|interface| interface.name == saved.interface);
        let found =
            found.ok_or_else(|| Failure::new(format!("the interface {} has gone", saved.interface)))?;
        if !found.has(saved.addr) || saved.addr != self.addr {
            return Err(Failure::new(format!(
                "the address {} is not on {} any more; somebody has removed it",
                self.addr, found.name
            )));
        }
        if !found.is_up() {
            return Err(Failure::new(format!("the interface {} {}", found.name, found.why_down())));
        }
        Ok(found)
    }

    fn in_use(&self, what: impl std::fmt::Display) -> Failure {
        Failure::new(format!(
            "the address {} is in use on the network: {what}; find that host (ip neigh, the switch) or choose another \
             address",
            self.addr
        ))
    }

    fn refuse_duplicate(&self, interface: &Interface, count: u64, probes: bool) -> Result<(), Failure> {
        if !self.duplicate_check {
            return Ok(());
        }
        let Some(neighbours) = Neighbours::open(interface, self.addr)? else { return Ok(()) };
        match neighbours.who_has(&self.context, self.addr, count, probes)? {
            None => Ok(()),
            Some(mac) => {
                Err(self.in_use(format_args!("the host with MAC address {mac} on {} has it", interface.name)))
            }
        }
    }

    fn add(&self, interface: &str) -> Result<(), Failure> {
        if self.addr.is_ipv4() {
            // Else the kernel would remove other addresses of the subnet together with the first of them.
            let setting = format!("/proc/sys/net/ipv4/conf/{interface}/promote_secondaries");
            if let Err(error) = std::fs::write(&setting, "1") {
                let text = format!(
                    "{setting} cannot be set to 1: {error}; other addresses of the subnet may go with this one"
                );
                self.context.event(EventLevel::Warning, &text);
            }
        }
        let mut args = vec!["address".to_owned(), "add".into(), format!("{}/{}", self.addr, self.prefix)];
        if self.addr.is_ipv4() {
            args.extend(["broadcast".into(), "+".into()]);
        } else {
            // Deprecated: it serves, but the node's own connections do not go out from it.
            args.extend(["preferred_lft".into(), "0".into()]);
            if !self.duplicate_check {
                args.push("nodad".into());
            }
        }
        args.extend(["dev".into(), interface.to_owned()]);
        if let Some(label) = &self.label {
            args.extend(["label".into(), format!("{interface}:{label}")]);
        }
        let what = format!("the address {} could not be added to {interface}", self.addr);
        Program::new("ip", "iproute2", IP_LIMIT).args(args).succeed(&self.context, &what).map(drop)
    }

    fn await_detection(&self, interface: &Interface, addr: Ipv6Addr) -> Result<(), Failure> {
        let deadline = Instant::now() + DETECTION_LIMIT;
        loop {
            let state = interfaces::detection(&interface.name, addr)
                .map_err(|error| Failure::new(format!("/proc/net/if_inet6 cannot be read: {error}")))?;
            match state {
                Detection::Unique => return Ok(()),
                Detection::Duplicate => {
                    // The kernel does not say who; ask again by name.
                    self.refuse_duplicate(interface, self.arp_count, false)?;
                    return Err(
                        self.in_use("the kernel's duplicate address detection has found another host")
                    );
                }
                Detection::Absent => {
                    return Err(Failure::new(format!("the address {addr} went away while it was checked")));
                }
                Detection::Runs if Instant::now() >= deadline => {
                    return Err(Failure::new(format!(
                        "duplicate address detection for {addr} did not end within {} s",
                        DETECTION_LIMIT.as_secs()
                    )));
                }
                Detection::Runs => pause(&self.context, Duration::from_millis(50))?,
            }
        }
    }

    /// Announces at once, and again from a thread.
    fn announce(&mut self, interface: &Interface) -> Result<(), Failure> {
        self.announcing.store(false, Ordering::Relaxed);
        let Some(neighbours) = Neighbours::open(interface, self.addr)? else { return Ok(()) };
        for _ in 0..self.arp_count {
            neighbours.announce(self.addr)?;
        }
        let (addr, go_on) = (self.addr, Arc::new(AtomicBool::new(true)));
        self.announcing = Arc::clone(&go_on);
        let again = move || {
            for _ in 0..ANNOUNCE_AGAIN {
                std::thread::sleep(ANNOUNCE_GAP);
                if !go_on.load(Ordering::Relaxed) || neighbours.announce(addr).is_err() {
                    return;
                }
            }
        };
        if let Err(error) = std::thread::Builder::new().name("announce".into()).spawn(again) {
            let text = format!("the address {addr} was announced only once: {error}");
            self.context.event(EventLevel::Warning, &text);
        }
        Ok(())
    }

    /// Removes the address if it is ours.
    fn remove(&mut self) -> Result<(), Failure> {
        self.announcing.store(false, Ordering::Relaxed);
        let Some(saved) = self.saved() else { return Ok(()) };
        let there = |all: Vec<Interface>| {
            all.iter().any(|interface| interface.name == saved.interface && interface.has(saved.addr))
        };
        if there(interfaces()?) {
            let address = format!("{}/{}", saved.addr, saved.prefix);
            let output = Program::new("ip", "iproute2", IP_LIMIT)
                .args(["address", "delete", &address, "dev", &saved.interface])
                .run(&self.context)?;
            // It may have gone by itself with its interface.
            if !output.success() && there(interfaces()?) {
                return Err(Failure::new(format!(
                    "the address {address} could not be removed from {}: {}; remove it by hand before it is used elsewhere",
                    saved.interface,
                    output.said()
                )));
            }
        }
        self.context.forget();
        Ok(())
    }
}

impl Resource for Address {
    fn adopt(&mut self) -> Result<(), Failure> {
        self.ours().map(drop)
    }

    fn online(&mut self) -> Result<(), Failure> {
        let all = interfaces()?;
        let holder = all.iter().find(|interface| interface.has(self.addr));
        if let Some(holder) = holder {
            if self.saved().is_none_or(|saved| saved.addr != self.addr || saved.interface != holder.name) {
                return Err(Failure::new(format!(
                    "the address {} is on {} of this node already, and the cluster has not put it there; remove it \
                     (ip address delete, and the node's network configuration) or choose another address",
                    self.addr, holder.name
                )));
            }
            // An earlier online was cut short. From the start, as the network has to be asked first.
            self.remove()?;
        }
        let interface =
            interfaces::choose(&all, self.interface.as_deref(), self.addr).map_err(Failure::NotHere)?;
        if !interface.is_up() {
            let (name, why) = (&interface.name, interface.why_down());
            return Err(Failure::new(format!(
                "the interface {name} {why}; {} is not added to it",
                self.addr
            )));
        }
        self.refuse_duplicate(&interface, self.arp_count, true)?;
        let saved = Saved { interface: interface.name.clone(), addr: self.addr, prefix: self.prefix };
        keep(&self.context, &saved)?;
        self.add(&interface.name)?;
        if let (IpAddr::V6(addr), true) = (self.addr, self.duplicate_check)
            && let Err(error) = self.await_detection(&interface, addr)
        {
            self.remove()?;
            return Err(error);
        }
        self.announce(&interface)
    }

    fn offline(&mut self) -> Result<(), Failure> {
        self.remove()
    }

    fn terminate(&mut self) -> Result<(), Failure> {
        self.remove()
    }

    fn looks_alive(&mut self) -> Result<(), Failure> {
        self.ours().map(drop)
    }

    fn is_alive(&mut self) -> Result<(), Failure> {
        let interface = self.ours()?;
        if let IpAddr::V6(addr) = self.addr {
            let state = interfaces::detection(&interface.name, addr);
            if matches!(state, Ok(Detection::Duplicate)) {
                return Err(self.in_use("the kernel's duplicate address detection has found another host"));
            }
        }
        self.refuse_duplicate(&interface, 1, false)
    }

    fn control(&mut self, verb: &str, _arguments: &serde_json::Value) -> Result<serde_json::Value, Failure> {
        if verb != "announce" {
            return Err(Failure::Unsupported(format!("an IPAddress cannot \"{verb}\"; it can \"announce\"")));
        }
        let interface = self.ours()?;
        self.announce(&interface)?;
        Ok(serde_json::json!({ "announced": self.addr.to_string(), "interface": interface.name }))
    }
}

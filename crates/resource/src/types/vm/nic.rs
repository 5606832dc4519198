//! Network cards of a virtual machine.
//!
//! A tap device is made by QEMU itself and vanishes with it, so that nothing is left behind whatever ends QEMU; it is put
//! on its bridge before the guest starts.

use super::disk::split_commas;
use super::stable;
use crate::api::{Context, Failure};
use crate::types::run::Program;
use std::time::Duration;

/// For `ip`.
const IP_LIMIT: Duration = Duration::from_secs(10);
/// Longest name of an interface (IFNAMSIZ without its end).
const INTERFACE_NAME_MAX: usize = 15;

/// What a card is connected to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Link {
    /// A bridge of the node.
    Bridge(String),
    /// QEMU's own NAT: out, not in.
    User,
}

/// A card.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Nic {
    pub(crate) link: Link,
    pub(crate) mac: Option<String>,
}

impl Nic {
    /// Reads the property `name`; `None` for no card.
    pub(crate) fn parse(name: &str, text: &str) -> Result<Option<Nic>, String> {
        let takes =
            || format!("{name} takes tap,bridge=NAME[,mac=..], user[,mac=..] or none, not \"{text}\"");
        let mut parts = split_commas(text.trim()).into_iter();
        let kind = parts.next().unwrap_or_default();
        let (mut bridge, mut mac) = (None, None);
        for part in parts {
            match part.split_once('=') {
                Some(("bridge", value)) if kind == "tap" => bridge = Some(value.to_owned()),
                Some(("mac", value)) => mac = Some(checked_mac(name, value)?),
                _ => return Err(takes()),
            }
        }
        let link = match (kind.as_str(), bridge) {
            ("none", _) => return Ok(None),
            ("user", _) => Link::User,
            ("tap", Some(bridge)) if interface_name(&bridge) => Link::Bridge(bridge),
            ("tap", _) => {
                return Err(format!("{name}: a tap needs the name of a bridge, such as tap,bridge=br0"));
            }
            _ => return Err(takes()),
        };
        Ok(Some(Nic { link, mac }))
    }

    /// Its address: the one given, else one that is the same on every node and at every start.
    pub(crate) fn mac(&self, cluster: &str, vm: &str, index: usize) -> String {
        self.mac.clone().unwrap_or_else(|| {
            let [a, b, c, d, ..] = stable::hash(&[cluster, vm, "nic", &index.to_string()]).to_be_bytes();
            format!("52:54:{a:02x}:{b:02x}:{c:02x}:{d:02x}")
        })
    }
}

/// Name of the tap of a card on this node.
pub(crate) fn tap_name(cluster: &str, vm: &str, run_dir: &str, index: usize) -> String {
    let hash = stable::hash(&[cluster, vm, run_dir, "tap", &index.to_string()]);
    let mut name = format!("vm{hash:016x}");
    name.truncate(INTERFACE_NAME_MAX);
    name
}

/// Puts a tap on its bridge and up.
pub(crate) fn attach(context: &Context, tap: &str, bridge: &str) -> Result<(), Failure> {
    if !std::path::Path::new("/sys/class/net").join(bridge).join("bridge").exists() {
        return Err(Failure::NotHere(format!(
            "this node has no bridge \"{bridge}\" for the virtual machine's network card; make it (ip link add {bridge} type \
             bridge) or name another"
        )));
    }
    let what = format!("the network card could not be put on the bridge {bridge}");
    Program::new("ip", "iproute2", IP_LIMIT)
        .args(["link", "set", "dev", tap, "master", bridge, "up"])
        .succeed(context, &what)
        .map(drop)
}

fn interface_name(name: &str) -> bool {
    (1..=INTERFACE_NAME_MAX).contains(&name.len())
        && !matches!(name, "." | "..")
        && name.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'/')
}

fn checked_mac(name: &str, text: &str) -> Result<String, String> {
    let bytes: Vec<u8> = text
        .split(':')
        .filter_map(|part| (part.len() == 2).then(|| u8::from_str_radix(part, 16).ok()).flatten())
        .collect();
    match bytes.first() {
        Some(first) if bytes.len() == 6 && text.len() == 17 && first & 1 == 0 => {
            Ok(text.to_ascii_lowercase())
        }
        _ => Err(format!("{name}: \"{text}\" is no address of a network card, such as 52:54:00:12:34:56")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cards_are_read() {
        assert_eq!(Nic::parse("nic", "none"), Ok(None));
        assert_eq!(Nic::parse("nic", "user"), Ok(Some(Nic { link: Link::User, mac: None })));
        let tap = Nic::parse("nic", "tap,bridge=br0,mac=52:54:00:AA:00:01").unwrap().unwrap();
        assert_eq!(tap.link, Link::Bridge("br0".into()));
        assert_eq!(tap.mac("c", "vm", 0), "52:54:00:aa:00:01");
        for bad in ["tap", "tap,bridge=", "tap,bridge=a/b", "user,mac=01:00:00:00:00:00", "user,mac=1:2", "x"]
        {
            assert!(Nic::parse("nic", bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn addresses_are_stable_and_differ() {
        let nic = Nic { link: Link::User, mac: None };
        assert_eq!(nic.mac("c", "vm", 0), nic.mac("c", "vm", 0));
        assert_ne!(nic.mac("c", "vm", 0), nic.mac("c", "vm", 1));
        assert_ne!(nic.mac("c", "vm", 0), nic.mac("c2", "vm", 0));
        assert!(checked_mac("nic", &nic.mac("c", "vm", 0)).is_ok());
        assert_eq!(tap_name("c", "vm", "/run", 0).len(), INTERFACE_NAME_MAX);
    }
}

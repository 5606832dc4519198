//! The node's interfaces and addresses, by getifaddrs(3): no program is started.

use super::packet::Mac;
use nix::ifaddrs::getifaddrs;
use nix::net::if_::InterfaceFlags;
use nix::sys::socket::{LinkAddr, SockaddrStorage};
use std::net::{IpAddr, Ipv6Addr};

/// An interface.
#[derive(Debug, Clone)]
pub(super) struct Interface {
    pub(super) name: String,
    flags: InterfaceFlags,
    /// Its link, where it has one.
    pub(super) link: Option<LinkAddr>,
    /// Addresses with the lengths of their prefixes.
    pub(super) addresses: Vec<(IpAddr, u8)>,
}

impl Interface {
    /// Up, with a carrier?
    pub(super) fn is_up(&self) -> bool {
        self.flags.contains(InterfaceFlags::IFF_UP | InterfaceFlags::IFF_RUNNING)
    }

    /// What keeps it from being up, in words.
    pub(super) fn why_down(&self) -> &'static str {
        if self.flags.contains(InterfaceFlags::IFF_UP) {
            "has no link (cable, switch port)"
        } else {
            "is down (ip link set ... up)"
        }
    }

    /// Its link-layer address, where neighbours are found by ARP or neighbour discovery on Ethernet.
    pub(super) fn mac(&self) -> Option<Mac> {
        let silent =
            InterfaceFlags::IFF_LOOPBACK | InterfaceFlags::IFF_NOARP | InterfaceFlags::IFF_POINTOPOINT;
        if self.flags.intersects(silent) {
            return None;
        }
        // ARPHRD_ETHER.
        self.link.filter(|link| link.hatype() == 1).and_then(|link| link.addr()).map(Mac)
    }

    pub(super) fn has(&self, addr: IpAddr) -> bool {
        self.addresses.iter().any(|(own, _)| *own == addr)
    }

    fn subnet_of(&self, addr: IpAddr) -> Option<u8> {
        let holding =
            self.addresses.iter().filter(|(own, prefix)| *own != addr && holds(*own, *prefix, addr));
        holding.map(|(_, prefix)| *prefix).max()
    }

    fn describe(&self) -> String {
        let addresses: Vec<String> =
            self.addresses.iter().map(|(addr, prefix)| format!("{addr}/{prefix}")).collect();
        let addresses = if addresses.is_empty() { "no address".to_owned() } else { addresses.join(" ") };
        format!("{} ({addresses})", self.name)
    }
}

/// All interfaces of this node.
///
/// # Errors
/// When the kernel does not tell.
pub(super) fn all() -> nix::Result<Vec<Interface>> {
    let mut found: Vec<Interface> = Vec::new();
    for entry in getifaddrs()? {
        // A label makes an address appear under "eth0:label".
        let name = entry.interface_name.split(':').next().unwrap_or_default();
        let at = found.iter().position(|known| known.name == name).unwrap_or_else(|| {
            found.push(Interface {
                name: name.to_owned(),
                flags: entry.flags,
                link: None,
                addresses: Vec::new(),
            });
            found.len() - 1
        });
        let (Some(interface), Some(address)) = (found.get_mut(at), entry.address) else { continue };
        if let Some(link) = address.as_link_addr() {
            interface.link = Some(*link);
        } else if let Some(addr) = ip_of(&address) {
            let mask = entry.netmask.as_ref().and_then(ip_of);
            interface.addresses.push((addr, mask.map_or(host_prefix(addr), prefix_of)));
        }
    }
    Ok(found)
}

fn ip_of(storage: &SockaddrStorage) -> Option<IpAddr> {
    let v4 = storage.as_sockaddr_in().map(|addr| IpAddr::V4(addr.ip()));
    v4.or_else(|| storage.as_sockaddr_in6().map(|addr| IpAddr::V6(addr.ip())))
}

fn host_prefix(addr: IpAddr) -> u8 {
    if addr.is_ipv4() { 32 } else { 128 }
}

/// All 128 bits; an IPv4 address has its own in front.
fn bits(addr: IpAddr) -> u128 {
    match addr {
        IpAddr::V4(addr) => u128::from(addr.to_bits()) << 96,
        IpAddr::V6(addr) => addr.to_bits(),
    }
}

fn prefix_of(mask: IpAddr) -> u8 {
    u8::try_from(bits(mask).leading_ones()).unwrap_or(128)
}

fn holds(own: IpAddr, prefix: u8, addr: IpAddr) -> bool {
    if own.is_ipv4() != addr.is_ipv4() || prefix == 0 || prefix >= host_prefix(own) {
        return false;
    }
    (bits(own) ^ bits(addr)).leading_zeros() >= u32::from(prefix)
}

/// The interface by name, or the one whose subnet holds the address, the smallest subnet first.
///
/// # Errors
/// There is none; names what there is.
pub(super) fn choose(all: &[Interface], name: Option<&str>, addr: IpAddr) -> Result<Interface, String> {
    let there: Vec<String> = all.iter().map(Interface::describe).collect();
    let found = match name {
        Some(name) => all.iter().find(|interface| interface.name == name),
        None => all.iter().max_by_key(|interface| interface.subnet_of(addr).unwrap_or(0)),
    };
    match (found, name) {
        (Some(found), Some(_)) => Ok(found.clone()),
        (Some(found), None) if found.subnet_of(addr).is_some() => Ok(found.clone()),
        (_, Some(name)) => {
            Err(format!("there is no interface {name} on this node; it has {}", there.join(", ")))
        }
        (_, None) => Err(format!(
            "no interface of this node has a subnet with {addr}; it has {}; give the property interface",
            there.join(", ")
        )),
    }
}

/// What IPv6 has found out about an address (Linux: if_addr.h, `/proc/net/if_inet6`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Detection {
    /// Duplicate address detection runs.
    Runs,
    /// Another host has it.
    Duplicate,
    /// It may be used.
    Unique,
    /// The address is not there.
    Absent,
}

/// The result of the kernel's duplicate address detection.
pub(super) fn detection(interface: &str, addr: Ipv6Addr) -> std::io::Result<Detection> {
    const TENTATIVE: u32 = 0x40;
    const DADFAILED: u32 = 0x08;
    // Of the thread, whose network namespace may be another than the process's.
    let text = std::fs::read_to_string("/proc/thread-self/net/if_inet6")?;
    let wanted = format!("{:032x}", addr.to_bits());
    for line in text.lines() {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let [address, _, _, _, flags, name] = fields.as_slice() else { continue };
        if *address == wanted && *name == interface {
            let flags = u32::from_str_radix(flags, 16).unwrap_or(0);
            return Ok(match flags {
                _ if flags & DADFAILED != 0 => Detection::Duplicate,
                _ if flags & TENTATIVE != 0 => Detection::Runs,
                _ => Detection::Unique,
            });
        }
    }
    Ok(Detection::Absent)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn interface(name: &str, addresses: &[(&str, u8)]) -> Interface {
        Interface {
            name: name.into(),
            flags: InterfaceFlags::IFF_UP,
            link: None,
            addresses: addresses.iter().map(|(addr, prefix)| (addr.parse().unwrap(), *prefix)).collect(),
        }
    }

    #[test]
    fn the_smallest_subnet_that_holds_the_address_is_chosen() {
        let all = [
            interface("lo", &[("127.0.0.1", 8), ("::1", 128)]),
            interface("eth0", &[("10.0.0.1", 8), ("fd00::1", 64)]),
            interface("eth1", &[("10.1.2.3", 16)]),
        ];
        let chosen = |addr: &str| choose(&all, None, addr.parse().unwrap()).map(|found| found.name);
        assert_eq!(chosen("10.1.9.9").as_deref(), Ok("eth1"));
        assert_eq!(chosen("10.2.0.1").as_deref(), Ok("eth0"));
        assert_eq!(chosen("fd00::77").as_deref(), Ok("eth0"));
        let error = chosen("192.168.0.1").unwrap_err();
        assert!(error.contains("eth0 (10.0.0.1/8 fd00::1/64)"), "{error}");
        let error = choose(&all, Some("eth7"), "10.0.0.2".parse().unwrap()).unwrap_err();
        assert!(error.contains("eth7") && error.contains("eth1"), "{error}");
    }

    #[test]
    fn the_address_itself_makes_no_subnet() {
        let all = [interface("eth0", &[("10.0.0.5", 24)])];
        assert!(choose(&all, None, "10.0.0.5".parse().unwrap()).is_err());
    }
}

//! Frames of ARP (RFC 826, RFC 5227) and of IPv6 neighbour discovery (RFC 4861) on Ethernet. Pure.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

const ETHERTYPE_ARP: [u8; 2] = [0x08, 0x06];
const ETHERTYPE_IPV6: [u8; 2] = [0x86, 0xdd];
/// Ethernet, IPv4, lengths of their addresses.
const ARP_HEAD: [u8; 6] = [0, 1, 8, 0, 6, 4];
const ICMPV6: u8 = 58;
const NEIGHBOUR_SOLICITATION: u8 = 135;
const NEIGHBOUR_ADVERTISEMENT: u8 = 136;
/// NA flag "override": neighbours replace what they have cached (RFC 4861 4.4).
const OVERRIDE: u8 = 0x20;
const OPTION_TARGET_LINK_ADDRESS: u8 = 2;
/// Where the payload of an Ethernet frame begins.
const PAYLOAD_AT: usize = 14;
/// Where ICMPv6 begins in a frame without extension headers.
const ICMP_AT: usize = PAYLOAD_AT + 40;

/// A link-layer address.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Mac(pub(super) [u8; 6]);

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// What a frame says of an address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Claim {
    /// Its sender has the address.
    Has(Mac),
    /// Its sender is about to take the address (RFC 5227 2.1.1).
    Probes(Mac),
}

/// The question "who has it?", which tells nobody an address of the asker's own.
pub(super) fn probe(own: Mac, addr: IpAddr) -> Vec<u8> {
    match addr {
        IpAddr::V4(addr) => arp(own, 1, Ipv4Addr::UNSPECIFIED, [0; 6], addr),
        IpAddr::V6(addr) => solicitation(own, addr),
    }
}

/// "I have it", to everybody. For IPv4 in both forms, since some hosts and switches heed only one.
pub(super) fn announcements(own: Mac, addr: IpAddr) -> Vec<Vec<u8>> {
    match addr {
        IpAddr::V4(addr) => {
            vec![arp(own, 1, addr, [0; 6], addr), arp(own, 2, addr, [0xff; 6], addr)]
        }
        IpAddr::V6(addr) => vec![advertisement(own, addr)],
    }
}

/// What a frame from another host says of the address; `None` when nothing.
pub(super) fn claim(frame: &[u8], own: Mac, addr: IpAddr) -> Option<Claim> {
    match addr {
        IpAddr::V4(addr) => arp_claim(frame, own, addr),
        IpAddr::V6(addr) => neighbour_claim(frame, own, addr),
    }
}

fn ethernet(to: [u8; 6], from: Mac, kind: [u8; 2]) -> Vec<u8> {
    [to.as_slice(), &from.0, &kind].concat()
}

fn arp(own: Mac, operation: u8, sender: Ipv4Addr, target_mac: [u8; 6], target: Ipv4Addr) -> Vec<u8> {
    let mut frame = ethernet([0xff; 6], own, ETHERTYPE_ARP);
    frame.extend(ARP_HEAD);
    frame.extend([0, operation]);
    frame.extend(own.0);
    frame.extend(sender.octets());
    frame.extend(target_mac);
    frame.extend(target.octets());
    frame
}

fn bytes<const N: usize>(frame: &[u8], at: usize) -> Option<[u8; N]> {
    frame.get(at..at.checked_add(N)?)?.try_into().ok()
}

fn arp_claim(frame: &[u8], own: Mac, addr: Ipv4Addr) -> Option<Claim> {
    let at = PAYLOAD_AT;
    if bytes(frame, 12)? != ETHERTYPE_ARP || bytes(frame, at)? != ARP_HEAD {
        return None;
    }
    let operation: [u8; 2] = bytes(frame, at + 6)?;
    let mac = Mac(bytes(frame, at + 8)?);
    let sender = Ipv4Addr::from(bytes::<4>(frame, at + 14)?);
    let target = Ipv4Addr::from(bytes::<4>(frame, at + 24)?);
    if mac == own {
        return None;
    }
    if sender == addr {
        return Some(Claim::Has(mac));
    }
    (operation == [0, 1] && sender.is_unspecified() && target == addr).then_some(Claim::Probes(mac))
}

fn solicitation(own: Mac, addr: Ipv6Addr) -> Vec<u8> {
    let [.., x, y, z] = addr.octets();
    let to = Ipv6Addr::from([0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0xff, x, y, z]);
    let mut body = vec![NEIGHBOUR_SOLICITATION, 0, 0, 0, 0, 0, 0, 0];
    body.extend(addr.octets());
    icmp([0x33, 0x33, 0xff, x, y, z], own, Ipv6Addr::UNSPECIFIED, to, body)
}

fn advertisement(own: Mac, addr: Ipv6Addr) -> Vec<u8> {
    let to = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
    let mut body = vec![NEIGHBOUR_ADVERTISEMENT, 0, 0, 0, OVERRIDE, 0, 0, 0];
    body.extend(addr.octets());
    body.extend([OPTION_TARGET_LINK_ADDRESS, 1]);
    body.extend(own.0);
    icmp([0x33, 0x33, 0, 0, 0, 1], own, addr, to, body)
}

fn icmp(to_mac: [u8; 6], own: Mac, from: Ipv6Addr, to: Ipv6Addr, mut body: Vec<u8>) -> Vec<u8> {
    // A solicitation has 24 bytes, an advertisement 32.
    let len = u8::try_from(body.len()).unwrap_or(u8::MAX);
    let pseudo = [&from.octets()[..], &to.octets(), &[0, 0, 0, len, 0, 0, 0, ICMPV6], &body].concat();
    let sum = checksum(&pseudo);
    if let Some(field) = body.get_mut(2..4) {
        field.copy_from_slice(&sum);
    }
    let mut frame = ethernet(to_mac, own, ETHERTYPE_IPV6);
    // Version 6; hop limit 255, without which it is not heeded (RFC 4861 7.1).
    frame.extend([0x60, 0, 0, 0, 0, len, ICMPV6, 255]);
    frame.extend(from.octets());
    frame.extend(to.octets());
    frame.extend(body);
    frame
}

/// The checksum of the Internet (RFC 1071) over an even number of bytes.
fn checksum(data: &[u8]) -> [u8; 2] {
    let mut sum = 0_u32;
    for pair in data.chunks(2) {
        let high = pair.first().copied().unwrap_or(0);
        let low = pair.get(1).copied().unwrap_or(0);
        sum += u32::from(u16::from_be_bytes([high, low]));
    }
    while sum > 0xffff {
        sum = (sum >> 16) + (sum & 0xffff);
    }
    let [_, _, high, low] = sum.to_be_bytes();
    [!high, !low]
}

fn neighbour_claim(frame: &[u8], own: Mac, addr: Ipv6Addr) -> Option<Claim> {
    if bytes(frame, 12)? != ETHERTYPE_IPV6 || bytes(frame, PAYLOAD_AT + 6)? != [ICMPV6, 255] {
        return None;
    }
    let from = Ipv6Addr::from(bytes::<16>(frame, PAYLOAD_AT + 8)?);
    let mac = Mac(bytes(frame, 6)?);
    let [kind] = bytes(frame, ICMP_AT)?;
    let target = Ipv6Addr::from(bytes::<16>(frame, ICMP_AT + 8)?);
    if mac == own || target != addr {
        return None;
    }
    match kind {
        NEIGHBOUR_ADVERTISEMENT => Some(Claim::Has(mac)),
        // From nowhere: somebody else's duplicate address detection (RFC 4862 5.4.3).
        NEIGHBOUR_SOLICITATION if from.is_unspecified() => Some(Claim::Probes(mac)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWN: Mac = Mac([2, 0, 0, 0, 0, 1]);
    const OTHER: Mac = Mac([2, 0, 0, 0, 0, 2]);

    #[test]
    fn what_one_host_says_the_other_understands() {
        for (addr, else_) in [("10.0.0.5", "10.0.0.6"), ("fd00::5", "fd00::6")] {
            let (addr, else_): (IpAddr, IpAddr) = (addr.parse().unwrap(), else_.parse().unwrap());
            let probe = probe(OTHER, addr);
            assert_eq!(claim(&probe, OWN, addr), Some(Claim::Probes(OTHER)));
            assert_eq!(claim(&probe, OWN, else_), None);
            assert_eq!(claim(&probe, OTHER, addr), None, "one's own frame");
            for frame in announcements(OTHER, addr) {
                assert_eq!(claim(&frame, OWN, addr), Some(Claim::Has(OTHER)));
                assert_eq!(claim(&frame, OWN, else_), None);
                for len in 0..frame.len() {
                    // Cut frames are read without harm.
                    let _ = claim(&frame[..len], OWN, addr);
                }
            }
        }
    }

    #[test]
    fn an_ordinary_question_claims_only_for_its_sender() {
        let (asker, asked) = (Ipv4Addr::new(10, 0, 0, 7), Ipv4Addr::new(10, 0, 0, 5));
        let frame = arp(OTHER, 1, asker, [0; 6], asked);
        assert_eq!(claim(&frame, OWN, asked.into()), None);
        assert_eq!(claim(&frame, OWN, asker.into()), Some(Claim::Has(OTHER)));
    }

    #[test]
    fn checksum_of_a_frame_with_its_checksum_is_zero() {
        let frame = advertisement(OWN, "fd00::5".parse().unwrap());
        let addresses = &frame[PAYLOAD_AT + 8..ICMP_AT];
        let body = &frame[ICMP_AT..];
        let pseudo = [addresses, &[0, 0, 0, 32, 0, 0, 0, ICMPV6], body].concat();
        assert_eq!((body.len(), checksum(&pseudo)), (32, [0, 0]));
    }
}

//! Asking the network who has an address, and telling it that this node has it now.
//!
//! By a packet socket (packet(7)) on the interface, so that MAC addresses are seen and no address of the node's own is
//! needed. The time of a probe is shorter than RFC 5227 says (3 s and more), because services wait for it: a host that
//! is up answers an ARP probe within milliseconds.

use super::interfaces::Interface;
use super::packet::{Claim, Mac, announcements, claim, probe};
use crate::api::{Context, Failure};
use nix::sys::socket::bind;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, eth, recv, send, socket_with,
};
use std::net::IpAddr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

/// Between two probes, and how long answers to the last one are waited for.
pub(super) const PROBE_GAP: Duration = Duration::from_millis(300);
/// Longest frame looked at; what is behind is of no interest.
const FRAME_BYTES: usize = 1600;

/// A packet socket on one interface.
#[derive(Debug)]
pub(super) struct Neighbours {
    socket: OwnedFd,
    own: Mac,
    name: String,
}

impl Neighbours {
    /// Opens it; `None` for an interface without neighbours (loopback, point to point).
    ///
    /// # Errors
    /// The interface is gone, or this process may not (`CAP_NET_RAW`).
    pub(super) fn open(interface: &Interface, addr: IpAddr) -> Result<Option<Self>, Failure> {
        let (Some(own), Some(link)) = (interface.mac(), interface.link) else { return Ok(None) };
        let name = interface.name.clone();
        let failed = |error: std::io::Error| {
            Failure::new(format!(
                "no packet socket on {name}, which is needed to talk to neighbours: {error}"
            ))
        };
        let protocol = if addr.is_ipv4() { eth::ARP } else { eth::IPV6 };
        let socket =
            socket_with(AddressFamily::PACKET, SocketType::RAW, SocketFlags::CLOEXEC, Some(protocol))
                .map_err(|errno| failed(errno.into()))?;
        // Without a protocol in the address the socket keeps its own (packet_do_bind in the kernel).
        bind(socket.as_raw_fd(), &link).map_err(|errno| failed(errno.into()))?;
        Ok(Some(Neighbours { socket, own, name }))
    }

    fn send(&self, frame: &[u8]) -> Result<(), Failure> {
        send(&self.socket, frame, SendFlags::empty())
            .map(drop)
            .map_err(|errno| Failure::new(format!("nothing can be sent on {}: {errno}", self.name)))
    }

    /// Tells everybody on the link.
    ///
    /// # Errors
    /// The link is gone.
    pub(super) fn announce(&self, addr: IpAddr) -> Result<(), Failure> {
        announcements(self.own, addr).iter().try_for_each(|frame| self.send(frame))
    }

    /// Asks `count` times who has the address. The first other host that says so; with `probes` also one that is about to
    /// take it.
    ///
    /// # Errors
    /// The link is gone, or nobody waits any more.
    pub(super) fn who_has(
        &self,
        context: &Context,
        addr: IpAddr,
        count: u64,
        probes: bool,
    ) -> Result<Option<Mac>, Failure> {
        let question = probe(self.own, addr);
        for _ in 0..count {
            self.send(&question)?;
            let deadline = Instant::now() + PROBE_GAP;
            while let Some(frame) = self.receive(deadline)? {
                match claim(&frame, self.own, addr) {
                    Some(Claim::Has(mac)) => return Ok(Some(mac)),
                    Some(Claim::Probes(mac)) if probes => return Ok(Some(mac)),
                    Some(Claim::Probes(_)) | None => {}
                }
            }
            if context.cancelled() {
                return Err(Failure::Cancelled);
            }
        }
        Ok(None)
    }

    fn receive(&self, deadline: Instant) -> Result<Option<Vec<u8>>, Failure> {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let left = Timespec::try_from(left).unwrap_or(Timespec { tv_sec: 0, tv_nsec: 0 });
            match poll(&mut [PollFd::new(&self.socket, PollFlags::IN)], Some(&left)) {
                Ok(0) => return Ok(None),
                Ok(_) => {}
                Err(rustix::io::Errno::INTR) => continue,
                Err(errno) => return Err(self.lost(errno)),
            }
            let mut frame = vec![0; FRAME_BYTES];
            match recv(&self.socket, &mut frame, RecvFlags::DONTWAIT) {
                Ok((len, _)) => {
                    frame.truncate(len);
                    return Ok(Some(frame));
                }
                Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => {}
                Err(errno) => return Err(self.lost(errno)),
            }
        }
    }

    fn lost(&self, errno: rustix::io::Errno) -> Failure {
        Failure::new(format!("nothing can be received on {}: {errno}", self.name))
    }
}

//! The guests' network: a bridge in a namespace of the rig's own, a tap device per guest, and an address for QEMU's iSCSI
//! initiators, which run in that namespace too. A guest is cut off by taking its tap device from the bridge; its path to the
//! LUN, which does not go through that device, stays.

use crate::wait;
use anyhow::Context as _;
use std::process::Command;
use std::time::Duration;

const COMMAND_LIMIT: Duration = Duration::from_secs(20);
/// First three bytes of every address.
const SUBNET: &str = "10.91.7";

/// A namespace, removed when dropped.
#[derive(Debug)]
pub struct Network {
    namespace: String,
}

fn ip(args: &str) -> anyhow::Result<String> {
    let mut command = Command::new("ip");
    command.args(args.split_ascii_whitespace());
    wait::run(&mut command, COMMAND_LIMIT)?.ok(&format!("ip {args}"))
}

impl Network {
    /// Makes namespace and bridge.
    ///
    /// # Errors
    /// They cannot be made.
    pub fn create(namespace: &str) -> anyhow::Result<Network> {
        ip(&format!("netns add {namespace}")).context("network namespaces need root and iproute2")?;
        let network = Network { namespace: namespace.to_owned() };
        let ns = namespace;
        ip(&format!("-n {ns} link set lo up"))?;
        ip(&format!("-n {ns} link add br0 type bridge"))?;
        ip(&format!("-n {ns} addr add {SUBNET}.254/24 dev br0"))?;
        ip(&format!("-n {ns} link set br0 up"))?;
        Ok(network)
    }

    /// Its name.
    #[must_use]
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// Address of a guest.
    #[must_use]
    pub fn addr(number: u8) -> String {
        format!("{SUBNET}.{number}")
    }

    /// Makes a guest's tap device, if it is not there.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn plug(&self, guest: &str) -> anyhow::Result<()> {
        let ns = &self.namespace;
        if ip(&format!("-n {ns} link show {guest}")).is_err() {
            ip(&format!("-n {ns} tuntap add dev {guest} mode tap"))?;
        }
        ip(&format!("-n {ns} link set {guest} master br0 up")).map(drop)
    }

    /// Cuts a guest off.
    ///
    /// # Errors
    /// The tap device is not there.
    pub fn cut(&self, guest: &str) -> anyhow::Result<()> {
        ip(&format!("-n {} link set {guest} nomaster", self.namespace)).map(drop)
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        if let Err(error) = remove(&self.namespace) {
            println!("guests: {error:#}");
        }
    }
}

/// Removes a namespace, and with it what is in it.
///
/// # Errors
/// There is none of that name.
pub fn remove(namespace: &str) -> anyhow::Result<()> {
    ip(&format!("netns del {namespace}")).map(drop)
}

//! A machine on a lab's network that is in no cluster: an address of its own beside the nodes, and its own idea of who resolves
//! names. And a DNS server on it: Debian's named, with one zone that takes signed updates.
//!
//! Both live in the network namespace of the lab's bridge, so whatever is left of them goes with the lab.

use crate::lab::Lab;
use crate::wait::{self, Ended};
use anyhow::{Context as _, ensure};
use serde_json::Value;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

const DEADLINE: Duration = Duration::from_secs(60);
/// Last byte of the client's address; nodes have theirs from 1 on.
const CLIENT: u8 = 200;
/// The zone of [`Named`].
pub const ZONE: &str = "lab.test";
/// Name of the key that signs updates.
pub const KEY: &str = "csv-key";
/// Its secret.
pub const SECRET: &str = "c2VjcmV0LXNlY3JldC1zZWNyZXQtc2VjcmV0LXNlY3I=";

/// See the module's text.
#[derive(Debug)]
pub struct Client {
    namespace: String,
    subnet: [u8; 3],
    dir: PathBuf,
}

impl Client {
    /// Puts a machine on the lab's network.
    ///
    /// # Errors
    /// The lab's notes or its bridge are not as expected.
    pub fn new(lab: &Lab) -> anyhow::Result<Client> {
        let notes: Value = serde_json::from_slice(&std::fs::read(lab.dir().join("lab.json"))?)?;
        let subnet = serde_json::from_value(notes["subnet"].clone()).context("the lab's subnet")?;
        let dir = lab.dir().join("client");
        std::fs::create_dir_all(&dir)?;
        let client = Client { namespace: format!("csv-{}", lab.name()), subnet, dir };
        let addr = client.addr();
        std::fs::write(
            client.dir.join("resolv.conf"),
            format!("nameserver {addr}\noptions timeout:1 attempts:2\n"),
        )?;
        let addr = format!("{addr}/24");
        let mut command = Command::new("ip");
        command.args(["-n", &client.namespace, "addr", "add", &addr, "dev", "br0"]);
        wait::run(&mut command, DEADLINE)?.ok("giving the client an address")?;
        Ok(client)
    }

    /// Its own address.
    #[must_use]
    pub fn addr(&self) -> Ipv4Addr {
        self.on_network(CLIENT)
    }

    /// An address of the lab's network, by its last byte.
    #[must_use]
    pub fn on_network(&self, last: u8) -> Ipv4Addr {
        let [a, b, c] = self.subnet;
        Ipv4Addr::new(a, b, c, last)
    }

    /// A directory for its files.
    #[must_use]
    pub fn dir(&self) -> &PathBuf {
        &self.dir
    }

    /// A program on it, to which arguments are added.
    #[must_use]
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        let script =
            format!("mount --bind {}/resolv.conf /etc/resolv.conf && exec \"$@\"", self.dir.display());
        command
            .arg(format!("--net=/run/netns/{}", self.namespace))
            .args(["unshare", "--mount", "setpriv", "--pdeathsig", "KILL", "--"])
            .args(["sh", "-c", &script, "sh", program]);
        command
    }

    /// Runs a program on it to its end.
    ///
    /// # Errors
    /// It cannot be started, or does not end in time.
    pub fn run(&self, program: &str, args: &[&str], deadline: Duration) -> anyhow::Result<Ended> {
        wait::run(self.command(program).args(args), deadline)
    }
}

/// The DNS server of [`ZONE`] on a client; ends when dropped.
#[derive(Debug)]
pub struct Named {
    child: Child,
}

impl Named {
    /// Starts it and waits until it answers.
    ///
    /// # Errors
    /// It does not.
    pub fn start(client: &Client) -> anyhow::Result<Named> {
        let dir = client.dir().join("named");
        std::fs::create_dir_all(&dir)?;
        let (path, addr) = (dir.display(), client.addr());
        let conf = format!(
            "options {{ directory \"{path}\"; listen-on {{ {addr}; }}; listen-on-v6 {{ none; }}; pid-file \"{path}/pid\";
              session-keyfile \"{path}/session.key\"; managed-keys-directory \"{path}\"; recursion no; dnssec-validation no; }};
            controls {{ }};
            key \"{KEY}\" {{ algorithm hmac-sha256; secret \"{SECRET}\"; }};
            zone \"{ZONE}\" {{ type primary; file \"zone\"; allow-update {{ key {KEY}; }}; }};\n"
        );
        std::fs::write(dir.join("conf"), conf)?;
        let zone = format!(
            "$TTL 60\n@ IN SOA ns.{ZONE}. admin.{ZONE}. 1 60 60 60 60\n@ IN NS ns.{ZONE}.\nns IN A {addr}\n"
        );
        std::fs::write(dir.join("zone"), zone)?;
        let log = std::fs::File::create(dir.join("log"))?;
        let mut command = client.command("named");
        command.args(["-g", "-n", "1", "-c"]).arg(dir.join("conf"));
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        let mut named = Named { child: command.spawn().context("starting named")? };
        let answers = wait::until("named to answer", DEADLINE, || {
            ensure!(named.child.try_wait()?.is_none(), "named has ended");
            let at = format!("@{addr}");
            let ended = client.run(
                "dig",
                &[&at, "+short", "+time=1", "+tries=1", &format!("ns.{ZONE}")],
                DEADLINE,
            )?;
            Ok((ended.stdout.trim() == addr.to_string()).then_some(()))
        });
        answers.with_context(|| std::fs::read_to_string(dir.join("log")).unwrap_or_default())?;
        Ok(named)
    }

    /// Where it answers.
    #[must_use]
    pub fn server(client: &Client) -> SocketAddr {
        SocketAddr::new(client.addr().into(), 53)
    }
}

impl Drop for Named {
    fn drop(&mut self) {
        // It may have ended with the lab.
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

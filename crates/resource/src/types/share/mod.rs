//! `FileShare`: a Samba share for clients outside the cluster.
//!
//! All shares of a group are served by one smbd (`server`) on the addresses of the IPAddress resources that they depend on,
//! under the name of their NetworkName. What a share is stands in its properties, so in the cluster database. Passwords are
//! Samba's own (`passdb.tdb`): the group names `<state_dir>/fileserver/<group>/private/passdb.tdb` and `secrets.tdb`, which holds
//! the server's identity, as checkpoints, or the property `passdb_dir` keeps both on the group's disk. Users of Samba are
//! users of the system too, on every node.
//!
//! smbd outlives the host, which keeps nothing but the fact that the share is online. A share is served only while its path is
//! mounted: a directory under an empty mount point is never exported.

mod conf;
mod process;
mod server;
#[cfg(test)]
mod tests;

use super::run::{Bounded, Program};
use super::settings::{flag, number, of_dependencies, optional, path, required, text, words};
use super::{keep, mounts};
use crate::api::{
    Context, Failure, Form, Property, Resource, ResourceType, Spec, TypeInfo, address_with_prefix,
};
use conf::{Layout, Place, Settings, server_name};
use server::{Server, TOOL_LIMIT, escape};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Of SMB.
const PORT: u64 = 445;
/// How long a look into the directory, and one by smbclient, may take. A volume is paused while its coordinator changes.
const LISTING: Duration = Duration::from_secs(30);
/// When smbclient is given up.
const CLIENT_LIMIT: Duration = Duration::from_secs(40);
/// What a server that works says to somebody without a password.
const REFUSALS: [&str; 3] =
    ["NT_STATUS_ACCESS_DENIED", "NT_STATUS_LOGON_FAILURE", "NT_STATUS_ACCOUNT_RESTRICTION"];

/// The type.
#[derive(Debug, Clone, Copy, Default)]
pub struct FileShare;

fn properties() -> Vec<Property> {
    let users = |name: &str, help: &str| optional(name, Form::Text, None, help);
    let switch = |name: &str, help: &str| optional(name, Form::Bool, Some("false"), help);
    let port = Form::Number { min: 1, max: 65_535 };
    vec![
        required("share", Form::Text, "name of the share"),
        required(
            "path",
            Form::Path,
            "directory, on a volume of the cluster or on a PhysicalDisk that the share depends on",
        ),
        users(
            "read_users",
            "users and @groups that may read, with commas; with all three lists empty everyone who logs on may write",
        ),
        users("write_users", "users and @groups that may read and write"),
        users("full_users", "users and @groups with full control: they act as root in the share"),
        switch("guest", "also lets in who has no account, as the system's user nobody"),
        switch("read_only", "nobody writes"),
        switch("hidden", "not shown in the list of shares"),
        switch(
            "access_based_enumeration",
            "shows everyone only the shares, files and directories that he may read",
        ),
        switch("encrypt", "refuses connections without encryption (SMB 3)"),
        optional(
            "durable_handles",
            words(&["auto", "true", "false"]),
            Some("auto"),
            "clients keep open files over a short loss of the connection; auto: on a disk only, since programs of other nodes do not see \
             SMB locks then. Samba has no handles that survive a failover: clients open their files again",
        ),
        optional(
            "write_through",
            Form::Bool,
            Some("true"),
            "what a client was told to be written is on the disk, so that a failover loses nothing of it; false is faster, and loses \
             what clients have not flushed",
        ),
        optional("comment", Form::Text, None, "shown beside the share"),
        optional("port", port, Some("445"), "TCP port; the same for all shares of a group"),
        optional(
            "workgroup",
            Form::Text,
            Some("WORKGROUP"),
            "the server's workgroup; the same for all shares of a group",
        ),
        optional(
            "passdb_dir",
            Form::Path,
            Some("<state_dir>/fileserver/<group>/private, to be named in the group's checkpoints"),
            "directory of passdb.tdb and secrets.tdb, when they are to lie on the group's disk; the same for all shares of a group",
        ),
        optional(
            "monitor_user",
            Form::Text,
            None,
            "user that a thorough look logs on as; without one, being asked for a password counts as alive",
        ),
        optional("monitor_password_file", Form::Path, None, "file with that user's password, on every node"),
    ]
}

impl ResourceType for FileShare {
    fn info(&self) -> TypeInfo {
        let verb = |name: &str, help: &str| (name.to_owned(), help.to_owned());
        TypeInfo {
            name: "FileShare".into(),
            help: "A directory shared by SMB with clients outside the cluster".into(),
            properties: properties(),
            verbs: vec![
                verb("users", "names of the users that have a password for the group's server"),
                verb("set-user", "gives a user of the system a password: {\"user\": ..., \"password\": ...}"),
                verb("remove-user", "takes a user's password away: {\"user\": ...}"),
                verb("sessions", "who is connected, and which files are open"),
            ],
            looks_alive: Duration::from_secs(5),
            is_alive: Duration::from_secs(60),
            shared: false,
        }
    }

    fn check(&self, properties: &BTreeMap<String, String>) -> Result<(), String> {
        conf::check(properties)
    }

    fn open(&self, spec: Spec, context: Context) -> Result<Box<dyn Resource>, Failure> {
        self.check(&spec.properties).map_err(Failure::Config)?;
        let path: PathBuf = path(&spec.properties, "path").unwrap_or_default().components().collect();
        let place = place(&spec, &context, &path)?;
        Ok(Box::new(Share {
            server: server_of(&spec, &context)?,
            place,
            path,
            spec,
            calls: Bounded::default(),
            context,
        }))
    }
}

/// The place of the share; the configuration is wrong if it has none.
fn place(spec: &Spec, context: &Context, path: &Path) -> Result<Place, Failure> {
    let mut disks = of_dependencies(spec, "PhysicalDisk", "mount");
    if disks.any(|mount| path.starts_with(mount)) {
        return Ok(Place::Disk);
    }
    let volumes = &context.node().mount_dir;
    if path.starts_with(volumes) && path != volumes {
        return Ok(Place::Volume);
    }
    Err(Failure::Config(format!(
        "path {} is neither on a volume (below {}) nor on a PhysicalDisk that the share depends on",
        path.display(),
        volumes.display()
    )))
}

fn server_of(spec: &Spec, context: &Context) -> Result<Server, Failure> {
    let node = context.node();
    let addresses =
        of_dependencies(spec, "IPAddress", "address").filter(|text| address_with_prefix(text).is_some());
    let addresses: Vec<String> = addresses.map(str::to_owned).collect();
    if addresses.is_empty() {
        let text =
            format!("the share {} has no address to be served on: let it depend on an IPAddress", spec.name);
        return Err(Failure::Config(text));
    }
    let group = escape(&spec.group);
    let state = node.state_dir.join("fileserver").join(&group);
    let private = path(&spec.properties, "passdb_dir").unwrap_or_else(|| state.join("private"));
    let name = of_dependencies(spec, "NetworkName", "name").next();
    let settings = Settings {
        addresses,
        port: u16::try_from(number(&spec.properties, "port", PORT)).unwrap_or(445),
        // Without a name, that of the group.
        server: server_name(name.unwrap_or(&group.replace('+', "-"))),
        workgroup: text(&spec.properties, "workgroup").unwrap_or("WORKGROUP").to_owned(),
        private: private.clone(),
    };
    let layout = Layout { run: node.run_dir.join("fileserver").join(&group), state, private };
    Ok(Server::new(layout, settings, &spec.group))
}

#[derive(Debug)]
struct Share {
    context: Context,
    spec: Spec,
    server: Server,
    place: Place,
    path: PathBuf,
    calls: Bounded,
}

impl Share {
    fn name(&self) -> &str {
        text(&self.spec.properties, "share").unwrap_or_default()
    }

    /// Is the path on something mounted, and a directory?
    fn directory(&mut self) -> Result<(), Failure> {
        let volumes = self.context.node().mount_dir.clone();
        let shown = self.path.display().to_string();
        let mounts =
            mounts::all().map_err(|error| Failure::new(format!("mounts cannot be read: {error}")))?;
        let place = self.place;
        let disks: Vec<PathBuf> = of_dependencies(&self.spec, "PhysicalDisk", "mount")
            .map(|mount| Path::new(mount).components().collect())
            .collect();
        let mounted = mounts.iter().any(|mount| {
            let right = match place {
                Place::Volume => mount.point.starts_with(&volumes) && mount.point != volumes,
                Place::Disk => disks.contains(&mount.point),
            };
            right && self.path.starts_with(&mount.point)
        });
        if !mounted {
            return Err(Failure::new(format!(
                "nothing is mounted at {shown}: its volume or disk is not online"
            )));
        }
        let path = self.path.clone();
        self.calls.call(LISTING, &format!("listing {shown}"), move || match std::fs::read_dir(&path) {
            Ok(mut entries) => entries.next().transpose().map(drop).map_err(|error| error.to_string()),
            Err(error) => Err(format!("the directory {} cannot be shared: {error}; make it", path.display())),
        })
    }

    /// Opens the share as a client.
    fn by_client(&self) -> Result<(), Failure> {
        let monitor = text(&self.spec.properties, "monitor_user");
        let socket = self.server.sockets().into_iter().next();
        let socket = socket.ok_or_else(|| Failure::new("the share has no address"))?;
        let mut program = Program::new("smbclient", "smbclient", CLIENT_LIMIT)
            .args([format!("//{}/{}", self.server.settings.server, self.name())])
            .args(["--ip-address".to_owned(), socket.ip().to_string()])
            .args(["--port".to_owned(), socket.port().to_string()])
            .args([format!("--configfile={}", self.server.layout.conf().display())])
            .args(["--max-protocol=SMB3", "--command=ls", "--timeout=30"]);
        program = match (monitor, text(&self.spec.properties, "monitor_password_file")) {
            (Some(user), Some(file)) => program.args(["--user", user]).env("PASSWD_FILE", file),
            _ => program.args(["--no-pass", "--user=%"]),
        };
        let output = program.run(&self.context)?;
        if output.success() {
            return Ok(());
        }
        let said = format!("{}\n{}", output.stdout, output.stderr);
        // Who knows the share and asks for a password is alive; a guest should have come in.
        let may_refuse = monitor.is_none() && !flag(&self.spec.properties, "guest", false);
        if may_refuse && REFUSALS.iter().any(|refusal| said.contains(refusal)) {
            return Ok(());
        }
        Err(Failure::new(format!(
            "the share {} cannot be opened at {socket}: {}",
            self.name(),
            output.said()
        )))
    }

    fn tool(&self, name: &'static str, package: &'static str) -> Program<'static> {
        let conf = self.server.layout.conf();
        let option = if name == "smbpasswd" { "-c" } else { "-s" };
        Program::new(name, package, TOOL_LIMIT).args([option.to_owned(), conf.display().to_string()])
    }

    fn set_user(&self, arguments: &serde_json::Value) -> Result<serde_json::Value, Failure> {
        let user = user_of(arguments)?;
        let password = arguments["password"].as_str().unwrap_or_default();
        if password.is_empty() || password.contains(['\n', '\0']) {
            return Err(Failure::Config("set-user needs \"password\", without line breaks".into()));
        }
        let what = format!("the password of {user} could not be set (is there such a user on this node?)");
        self.tool("smbpasswd", "samba-common-bin")
            .args(["-s", "-a", user])
            .input(format!("{password}\n{password}\n"))
            .succeed(&self.context, &what)?;
        Ok(serde_json::json!({ "user": user }))
    }
}

fn user_of(arguments: &serde_json::Value) -> Result<&str, Failure> {
    let user = arguments["user"].as_str().unwrap_or_default();
    if user.is_empty() || user.starts_with('-') || user.contains(|c: char| c.is_control() || c == ':') {
        return Err(Failure::Config("\"user\" is missing or no name of a user".into()));
    }
    Ok(user)
}

impl Resource for Share {
    fn adopt(&mut self) -> Result<(), Failure> {
        self.looks_alive()
    }

    fn online(&mut self) -> Result<(), Failure> {
        self.directory()?;
        keep(&self.context, &serde_json::json!({ "share": self.name() }))?;
        let part = conf::share(&self.spec.properties, self.place);
        self.server.add(&self.context, &self.spec.name, self.name(), &part)
    }

    fn offline(&mut self) -> Result<(), Failure> {
        self.server.remove(&self.context, &self.spec.name, self.name())?;
        self.context.forget();
        Ok(())
    }

    fn terminate(&mut self) -> Result<(), Failure> {
        self.offline()
    }

    fn looks_alive(&mut self) -> Result<(), Failure> {
        self.server.looks_alive(&self.spec.name)
    }

    fn is_alive(&mut self) -> Result<(), Failure> {
        self.looks_alive()?;
        self.directory()?;
        self.by_client()
    }

    fn control(&mut self, verb: &str, arguments: &serde_json::Value) -> Result<serde_json::Value, Failure> {
        if !matches!(verb, "users" | "set-user" | "remove-user" | "sessions") {
            let text =
                format!("a FileShare cannot \"{verb}\"; it can users, set-user, remove-user, sessions");
            return Err(Failure::Unsupported(text));
        }
        self.looks_alive()?;
        match verb {
            "set-user" => self.set_user(arguments),
            "remove-user" => {
                let user = user_of(arguments)?;
                let what = format!("the password of {user} could not be removed");
                let tool = self.tool("smbpasswd", "samba-common-bin").args(["-x", user]);
                tool.succeed(&self.context, &what)?;
                Ok(serde_json::json!({ "user": user }))
            }
            "users" => {
                let output = self.tool("pdbedit", "samba-common-bin").args(["-L"]);
                let output = output.succeed(&self.context, "users could not be listed")?;
                let users: Vec<&str> =
                    output.stdout.lines().filter_map(|line| line.split(':').next()).collect();
                Ok(serde_json::json!(users))
            }
            _ => {
                let output = self.tool("smbstatus", "samba").args(["--json"]);
                let output = output.succeed(&self.context, "sessions could not be listed")?;
                serde_json::from_str(&output.stdout)
                    .map_err(|error| Failure::new(format!("smbstatus: {error}")))
            }
        }
    }
}

//! `NetworkName`: a name in the DNS that follows its group's addresses.
//!
//! Online registers the name at the server in one update (RFC 2136) that the server makes only if the name is free or
//! this cluster's; see `records`. It is registered again every `reregister_hours`, and whenever a thorough look finds that
//! the server says something else. Offline leaves it, because clients look it up while the group fails over;
//! `remove_on_offline` is for names that are given up.
//!
//! When the DNS server is down: with `require_dns` (the default) online fails and so does a thorough look; without it the
//! name comes online with a warning and is registered from later looks. Nothing of it runs on the node, so a new host has
//! only to know when it was registered last.

mod client;
mod config;
mod records;
#[cfg(test)]
mod tests;

use super::keep;
use super::settings::{flag, number, text};
use crate::api::{Context, EventLevel, Failure, Resource, ResourceType, Spec, TypeInfo};
use client::{Client, DnsError};
use config::{addresses, full_name, open_client, parse_name};
use hickory_proto::op::ResponseCode;
use hickory_proto::rr::Name;
use records::{Registration, When, reverse_name};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// The type.
#[derive(Debug, Clone, Copy, Default)]
pub struct NetworkName;

impl ResourceType for NetworkName {
    fn info(&self) -> TypeInfo {
        TypeInfo {
            name: "NetworkName".into(),
            help: "A name in the DNS for the group's IP addresses".into(),
            properties: config::properties(),
            verbs: vec![
                ("register".into(), "registers the name again now".into()),
                ("lookup".into(), "what the server says of the name".into()),
            ],
            looks_alive: Duration::from_secs(5),
            is_alive: Duration::from_secs(60),
            shared: false,
        }
    }

    fn check(&self, properties: &BTreeMap<String, String>) -> Result<(), String> {
        config::check(properties)
    }

    fn open(&self, spec: Spec, context: Context) -> Result<Box<dyn Resource>, Failure> {
        self.check(&spec.properties).map_err(Failure::Config)?;
        let properties = &spec.properties;
        let (name, zone) = full_name(properties).map_err(Failure::Config)?;
        let addresses = addresses(&spec).map_err(Failure::Config)?;
        let registration = Registration {
            name,
            zone,
            addresses,
            ttl: u32::try_from(number(properties, "ttl", 60)).unwrap_or(60),
            owner: format!("csvfs-owner={}", context.node().cluster_id),
        };
        let reverse_zone = text(properties, "reverse_zone").map(|zone| parse_name("reverse_zone", zone));
        Ok(Box::new(Registered {
            client: open_client(properties)?,
            registration,
            reverse: flag(properties, "reverse", false),
            reverse_zone: reverse_zone.transpose().map_err(Failure::Config)?,
            again_s: number(properties, "reregister_hours", 24) * 3600,
            require_dns: flag(properties, "require_dns", true),
            remove_on_offline: flag(properties, "remove_on_offline", false),
            replace_foreign: flag(properties, "replace_foreign", false),
            warned: None,
            context,
        }))
    }
}

/// What a new host must know.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Saved {
    /// When it was registered last, in seconds since 1970; `None` when it is not yet.
    registered_s: Option<u64>,
}

#[derive(Debug)]
struct Registered {
    context: Context,
    client: Client,
    registration: Registration,
    reverse: bool,
    reverse_zone: Option<Name>,
    again_s: u64,
    require_dns: bool,
    remove_on_offline: bool,
    replace_foreign: bool,
    /// The warning given last, so that it is not given with every look.
    warned: Option<String>,
}

fn now_s() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs())
}

/// Down or not itself, rather than saying no?
fn is_outage(error: &DnsError) -> bool {
    matches!(error, DnsError::Silent { .. } | DnsError::Code { code: ResponseCode::ServFail, .. })
}

impl Registered {
    fn saved(&self) -> Option<Saved> {
        serde_json::from_value(self.context.saved()?).ok()
    }

    fn keep(&self, registered_s: Option<u64>) -> Result<(), Failure> {
        keep(&self.context, &Saved { registered_s })
    }

    fn name(&self) -> &Name {
        &self.registration.name
    }

    fn warn(&mut self, text: String) {
        if self.warned.as_ref() != Some(&text) {
            self.context.event(EventLevel::Warning, &text);
            self.warned = Some(text);
        }
    }

    /// Registers the name if it is free or ours.
    fn update(&self) -> Result<(), DnsError> {
        // The second "ours" is for a name that another node of this cluster has registered in between.
        for when in [When::Ours, When::Free, When::Ours] {
            match self.client.update(self.registration.register(when)) {
                Err(DnsError::Code { code: ResponseCode::NXRRSet | ResponseCode::YXDomain, .. }) => {}
                other => return other,
            }
        }
        if self.replace_foreign {
            return self.client.update(self.registration.register(When::Always));
        }
        Err(DnsError::Code { server: self.client.server(), code: ResponseCode::YXDomain })
    }

    fn register(&mut self) -> Result<(), DnsError> {
        self.update()?;
        self.warned = None;
        if let Err(failure) = self.keep(Some(now_s())) {
            // That it is online is kept already; it is registered again sooner than it had to be.
            self.warn(failure.to_string());
        }
        if self.reverse {
            for addr in self.registration.addresses.clone() {
                if let Err(error) = self.register_reverse(addr) {
                    self.warn(format!("{addr} could not be registered as {} (PTR): {error}", self.name()));
                }
            }
        }
        Ok(())
    }

    fn register_reverse(&self, addr: IpAddr) -> Result<(), String> {
        let zone = self.reverse_zone_of(addr)?;
        self.client.update(self.registration.reverse(&zone, addr)).map_err(|error| error.to_string())
    }

    fn reverse_zone_of(&self, addr: IpAddr) -> Result<Name, String> {
        if let Some(zone) = &self.reverse_zone {
            return Ok(zone.clone());
        }
        let name = reverse_name(addr);
        let zone = self.client.zone_of(&name).map_err(|error| error.to_string())?;
        zone.ok_or_else(|| format!("{} has no zone for {name}", self.client.server()))
    }

    /// In words for an administrator.
    fn explain(&self, error: &DnsError) -> Failure {
        let (name, zone) = (self.name(), &self.registration.zone);
        let DnsError::Code { server, code } = error else {
            return Failure::new(format!("the name {name} could not be registered: {error}"));
        };
        let text = if *code == ResponseCode::YXDomain {
            let says = self.client.addresses(name).unwrap_or_default();
            let says: Vec<String> = says.iter().map(IpAddr::to_string).collect();
            let says = if says.is_empty() { "no address".to_owned() } else { says.join(", ") };
            format!(
                "the name {name} is held by somebody else: {server} has records for it ({says}) without this cluster's \
                 owner record; choose another name, remove those records, or set replace_foreign"
            )
        } else if matches!(code, ResponseCode::Refused | ResponseCode::NotAuth) {
            format!(
                "{server} answers {code} to the update of {name}: it is not the primary server of {zone}, or does not \
                 allow this key (or this node's address) to update it"
            )
        } else if *code == ResponseCode::NotZone {
            format!("{server} answers {code}: the name {name} is not in its zone {zone}")
        } else {
            format!("the name {name} could not be registered: {error}")
        };
        Failure::new(text)
    }

    /// Without `require_dns` an outage is only worth a warning.
    fn judge(&mut self, result: Result<(), DnsError>) -> Result<(), Failure> {
        let Err(error) = result else { return Ok(()) };
        let failure = self.explain(&error);
        if self.require_dns || !is_outage(&error) {
            return Err(failure);
        }
        self.warn(format!("{failure}; it is tried again with every thorough look"));
        Ok(())
    }

    fn is_due(&self, registered_s: u64) -> bool {
        let now = now_s();
        // A clock that was set back makes it due too.
        self.again_s != 0 && (now < registered_s || now - registered_s >= self.again_s)
    }

    fn compare(&mut self) -> Result<(), Failure> {
        let found = match self.client.addresses(&self.registration.name) {
            Ok(found) if found == self.registration.addresses => {
                self.warned = None;
                return Ok(());
            }
            Ok(found) => found,
            Err(error) => return self.judge(Err(error)),
        };
        let found: Vec<String> = found.iter().map(IpAddr::to_string).collect();
        let found = if found.is_empty() { "nothing".to_owned() } else { found.join(", ") };
        let result = self.register();
        if result.is_ok() {
            let text = format!("{} resolved to {found}; it has been registered again", self.name());
            self.context.event(EventLevel::Warning, &text);
        }
        self.judge(result)
    }

    fn unregister(&self) -> Result<(), Failure> {
        if self.reverse {
            for addr in &self.registration.addresses {
                if let Ok(zone) = self.reverse_zone_of(*addr) {
                    // A stale PTR record harms nobody.
                    let _ = self.client.update(Registration::remove_reverse(&zone, *addr));
                }
            }
        }
        match self.client.update(self.registration.remove()) {
            // Not ours any more: nothing to remove.
            Ok(()) | Err(DnsError::Code { code: ResponseCode::NXRRSet, .. }) => Ok(()),
            Err(error) => {
                Err(Failure::new(format!("the records of {} are still there: {error}", self.name())))
            }
        }
    }
}

impl Resource for Registered {
    fn adopt(&mut self) -> Result<(), Failure> {
        self.looks_alive()
    }

    fn online(&mut self) -> Result<(), Failure> {
        self.keep(None)?;
        let result = self.register();
        self.judge(result)
    }

    fn offline(&mut self) -> Result<(), Failure> {
        if self.remove_on_offline
            && let Err(failure) = self.unregister()
        {
            // The name has no part in whether the group may move.
            self.context.event(EventLevel::Warning, &failure.to_string());
        }
        self.context.forget();
        Ok(())
    }

    fn terminate(&mut self) -> Result<(), Failure> {
        self.context.forget();
        Ok(())
    }

    fn looks_alive(&mut self) -> Result<(), Failure> {
        self.saved().map(drop).ok_or_else(|| Failure::new(format!("the name {} is not online", self.name())))
    }

    fn is_alive(&mut self) -> Result<(), Failure> {
        self.looks_alive()?;
        match self.saved().and_then(|saved| saved.registered_s) {
            Some(registered_s) if !self.is_due(registered_s) => self.compare(),
            _ => {
                let result = self.register();
                self.judge(result)
            }
        }
    }

    fn control(&mut self, verb: &str, _arguments: &serde_json::Value) -> Result<serde_json::Value, Failure> {
        match verb {
            "register" => {
                self.looks_alive()?;
                self.register().map_err(|error| self.explain(&error))?;
            }
            "lookup" => {}
            _ => {
                let text = format!("a NetworkName cannot \"{verb}\"; it can \"register\" and \"lookup\"");
                return Err(Failure::Unsupported(text));
            }
        }
        let found = self.client.addresses(self.name()).map_err(Failure::new)?;
        Ok(serde_json::json!({
            "name": self.name().to_string(),
            "server": self.client.server().to_string(),
            "addresses": found,
            "as_wanted": found == self.registration.addresses,
        }))
    }
}

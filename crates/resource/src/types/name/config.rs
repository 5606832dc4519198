//! Properties of a network name: what they are, and what they say.

use super::client::{self, ALGORITHMS, Client};
use crate::api::{Failure, Form, Property, Spec, address_with_prefix};
use crate::types::settings::{
    Properties, flag, list, of_dependencies, optional, path, required, text, words,
};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use hickory_proto::rr::Name;
use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};

/// Of DNS.
const PORT: u16 = 53;

pub(super) fn properties() -> Vec<Property> {
    let mut properties = key_properties();
    properties.extend(record_properties());
    properties
}

fn key_properties() -> Vec<Property> {
    vec![
        required("name", Form::Text, "the name, alone or with its zone"),
        required("zone", Form::Text, "zone of the name; the server must take dynamic updates for it"),
        required("server", Form::Text, "the zone's primary server: IP address, with :port if it is not 53"),
        optional(
            "tsig_key",
            Form::Text,
            None,
            "name of the key that signs updates; without one they are not signed",
        ),
        optional("tsig_secret", Form::Text, None, "the key's secret in base64, kept in the cluster database"),
        optional("tsig_secret_file", Form::Path, None, "file with the secret in base64, on every node"),
        optional("tsig_algorithm", words(&ALGORITHMS), Some("hmac-sha256"), "algorithm of the key"),
    ]
}

fn record_properties() -> Vec<Property> {
    let number = |max| Form::Number { min: 0, max };
    vec![
        optional("ttl", number(604_800), Some("60"), "how long clients may keep the addresses, in seconds"),
        optional(
            "addresses",
            Form::Text,
            Some("those of the IPAddress resources that it depends on"),
            "IP addresses, with commas",
        ),
        optional(
            "reregister_hours",
            number(8760),
            Some("24"),
            "registered again so often, in hours; 0: never",
        ),
        optional("reverse", Form::Bool, Some("false"), "also registers the name for the addresses (PTR)"),
        optional(
            "reverse_zone",
            Form::Text,
            Some("the one that the server names"),
            "zone of the PTR records",
        ),
        optional(
            "require_dns",
            Form::Bool,
            Some("true"),
            "fails when the DNS server does not answer; else it warns and tries again",
        ),
        optional("remove_on_offline", Form::Bool, Some("false"), "removes the records when it goes offline"),
        optional(
            "replace_foreign",
            Form::Bool,
            Some("false"),
            "takes the name even when its records are not this cluster's",
        ),
    ]
}

/// What cannot be used, and what contradicts itself.
pub(super) fn check(properties: &Properties) -> Result<(), String> {
    full_name(properties)?;
    server(properties)?;
    listed_addresses(properties)?;
    let key = text(properties, "tsig_key");
    let (secret, file) = (text(properties, "tsig_secret"), text(properties, "tsig_secret_file"));
    match (key, secret, file) {
        (Some(_), None, None) => {
            return Err("tsig_key needs its secret: give tsig_secret or tsig_secret_file".into());
        }
        (None, Some(_), _) | (None, None, Some(_)) => {
            return Err("there is a TSIG secret, but tsig_key does not say whose; give the key's name".into());
        }
        (_, Some(_), Some(_)) => return Err("give tsig_secret or tsig_secret_file, not both".into()),
        (Some(key), Some(secret), None) => drop(client::signer(key, "", decode(secret)?)?),
        (Some(key), None, Some(_)) => drop(client::signer(key, "", vec![0])?),
        (None, None, None) => {}
    }
    if let Some(zone) = text(properties, "reverse_zone") {
        parse_name("reverse_zone", zone)?;
        if !flag(properties, "reverse", false) {
            return Err("reverse_zone is given, but reverse is false; set reverse to true".into());
        }
    }
    Ok(())
}

pub(super) fn parse_name(property: &str, value: &str) -> Result<Name, String> {
    let mut name =
        Name::from_ascii(value).map_err(|error| format!("{property} \"{value}\" is no DNS name: {error}"))?;
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_' | '/');
    if name.is_root() || !value.chars().all(plain) {
        return Err(format!("{property} \"{value}\" is no DNS name: letters, digits, hyphens and dots"));
    }
    name.set_fqdn(true);
    Ok(name.to_lowercase())
}

/// Name and zone.
pub(super) fn full_name(properties: &Properties) -> Result<(Name, Name), String> {
    let zone = parse_name("zone", text(properties, "zone").unwrap_or_default())?;
    let given = text(properties, "name").unwrap_or_default();
    let name = parse_name("name", given)?;
    if name == zone {
        return Err(format!("name \"{given}\" is the zone itself; choose a name in it"));
    }
    if zone.zone_of(&name) {
        return Ok((name, zone));
    }
    if given.ends_with('.') {
        return Err(format!("name \"{given}\" is not in the zone {zone}"));
    }
    let full = parse_name("name", &format!("{}.{zone}", given.trim_end_matches('.')))?;
    Ok((full, zone))
}

fn server(properties: &Properties) -> Result<SocketAddr, String> {
    let given = text(properties, "server").unwrap_or_default();
    let with_port = given.parse::<SocketAddr>().ok();
    let addr = given.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>().ok();
    with_port
        .or_else(|| addr.map(|addr| SocketAddr::new(addr, PORT)))
        .ok_or_else(|| format!("server \"{given}\" is no IP address, with or without :port"))
}

fn listed_addresses(properties: &Properties) -> Result<BTreeSet<IpAddr>, String> {
    let parse = |text: String| text.parse().map_err(|_| format!("addresses: \"{text}\" is no IP address"));
    list(properties, "addresses").into_iter().map(parse).collect()
}

pub(super) fn addresses(spec: &Spec) -> Result<BTreeSet<IpAddr>, String> {
    let mut addresses = listed_addresses(&spec.properties)?;
    if addresses.is_empty() {
        let given = of_dependencies(spec, "IPAddress", "address");
        addresses.extend(given.filter_map(address_with_prefix).map(|(addr, _)| addr));
    }
    if addresses.is_empty() {
        return Err(format!(
            "the name {} has no address: let it depend on an IPAddress, or give the property addresses",
            text(&spec.properties, "name").unwrap_or_default()
        ));
    }
    Ok(addresses)
}

fn decode(secret: &str) -> Result<Vec<u8>, String> {
    let bytes =
        STANDARD.decode(secret.trim()).map_err(|error| format!("the TSIG secret is no base64: {error}"))?;
    if bytes.is_empty() { Err("the TSIG secret is empty".into()) } else { Ok(bytes) }
}

pub(super) fn open_client(properties: &Properties) -> Result<Client, Failure> {
    let server = server(properties).map_err(Failure::Config)?;
    let Some(key) = text(properties, "tsig_key") else { return Ok(Client::new(server, None)) };
    let secret = match path(properties, "tsig_secret_file") {
        Some(file) => std::fs::read_to_string(&file).map_err(|error| {
            let file = file.display();
            Failure::NotHere(format!("tsig_secret_file {file} cannot be read: {error}; put it on this node"))
        })?,
        None => text(properties, "tsig_secret").unwrap_or_default().to_owned(),
    };
    let secret = decode(&secret).map_err(Failure::Config)?;
    let algorithm = text(properties, "tsig_algorithm").unwrap_or("hmac-sha256");
    let signer = client::signer(key, algorithm, secret).map_err(Failure::Config)?;
    Ok(Client::new(server, Some(signer)))
}

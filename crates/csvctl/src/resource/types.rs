//! `csvctl resource types`, `type-add` and `type-remove`: what resources can be.

use crate::admin;
use crate::output::table;
use anyhow::{Context, bail};
use csv_cluster::db::{Command, LibraryType};
use csv_resource::api::{Form, Property, TypeInfo};
use csv_types::admin::ClusterRequest;
use csv_types::config::LocalConfig;
use csvd::groups::Types;
use std::collections::BTreeMap;
use std::path::PathBuf;

/// Arguments of `csvctl resource type-add`.
#[derive(Debug, clap::Args)]
pub(crate) struct TypeAdd {
    /// Name of the type.
    #[arg(value_name = "NAME")]
    name: String,
    /// Shared library that has it, by the same absolute path on every node.
    #[arg(long, value_name = "PATH")]
    library: PathBuf,
    /// A property that it takes; may be repeated.
    #[arg(long = "property", value_name = "NAME")]
    properties: Vec<String>,
    /// A property that must be given; may be repeated.
    #[arg(long = "required", value_name = "NAME")]
    required: Vec<String>,
}

impl TypeAdd {
    fn into_type(self) -> anyhow::Result<LibraryType> {
        let library = std::path::absolute(&self.library)?;
        let library = library.to_str().context("the library's path is not UTF-8")?.to_owned();
        let optional = self.properties.into_iter().map(|name| (name, false));
        let required = self.required.into_iter().map(|name| (name, true));
        let mut properties = BTreeMap::new();
        for (name, required) in optional.chain(required) {
            if properties.insert(name.clone(), required).is_some() {
                bail!(
                    "property {name} is given twice; give it once, with --required if every resource must have it"
                );
            }
        }
        Ok(LibraryType { name: self.name, library, properties })
    }
}

/// `csvctl resource type-add`.
pub(super) fn add(config: &LocalConfig, args: TypeAdd) -> anyhow::Result<()> {
    let resource_type = args.into_type()?;
    admin::command(config, &Command::TypePut { resource_type })
}

/// What types say of themselves: all, or one.
pub(crate) fn ask(config: &LocalConfig, kind: Option<&str>) -> anyhow::Result<Types> {
    admin::ask_typed(config, ClusterRequest::ResourceTypes { kind: kind.map(str::to_owned) })
}

/// `csvctl resource types`.
pub(super) fn print(config: &LocalConfig, kind: Option<&str>, json: bool) -> anyhow::Result<()> {
    let types = ask(config, kind)?;
    if json {
        println!("{}", serde_json::to_string_pretty(&types)?);
        return Ok(());
    }
    match (kind, types.as_slice()) {
        (Some(_), [only]) => print!("{}", one(only)),
        _ => print!("{}", all(&types)),
    }
    Ok(())
}

fn all(types: &[TypeInfo]) -> String {
    let mut cells = vec![["TYPE", "WHAT"].map(str::to_owned).to_vec()];
    cells.extend(types.iter().map(|of| vec![of.name.clone(), of.help.clone()]));
    let more = [
        ("systemd:UNIT", "A unit of systemd, such as systemd:nginx"),
        (
            "ocf:PROVIDER:AGENT",
            "An OCF resource agent that is installed on the nodes, such as ocf:heartbeat:nginx",
        ),
    ];
    cells.extend(more.map(|(name, help)| vec![name.to_owned(), help.to_owned()]));
    table(&cells)
}

fn one(of: &TypeInfo) -> String {
    let mut text = format!("{}: {}\n", of.name, of.help);
    let (quick, thorough) = (of.looks_alive.as_millis(), of.is_alive.as_millis());
    let shown = |ms: u128| crate::args::duration_text(u64::try_from(ms).unwrap_or(u64::MAX));
    text += &format!("looked at every {}, thoroughly every {}\n", shown(quick), shown(thorough));
    if of.shared {
        text += "several nodes may have it online at once, so it goes along with a group that moves while it runs\n";
    }
    if of.properties.is_empty() {
        text += "\nit has no properties\n";
    } else {
        let mut cells = vec![["PROPERTY", "TAKES", "DEFAULT", "WHAT"].map(str::to_owned).to_vec()];
        cells.extend(of.properties.iter().map(property_row));
        text += &format!("\n{}", table(&cells));
    }
    if !of.verbs.is_empty() {
        let mut cells = vec![["VERB", "WHAT"].map(str::to_owned).to_vec()];
        cells.extend(of.verbs.iter().map(|(verb, help)| vec![verb.clone(), help.clone()]));
        text += &format!("\n`csvctl resource control R VERB [JSON]`:\n{}", table(&cells));
    }
    text
}

fn property_row(property: &Property) -> Vec<String> {
    let name = if property.numbered { format!("{}[N]", property.name) } else { property.name.clone() };
    let default = match (&property.default, property.required) {
        (_, true) => "(must be given)".to_owned(),
        (Some(default), false) => default.clone(),
        (None, false) => "-".to_owned(),
    };
    vec![name, takes(&property.form), default, property.help.clone()]
}

/// What a property takes, in few words.
fn takes(form: &Form) -> String {
    match form {
        Form::Text => "text".to_owned(),
        Form::Words(words) => words.join("|"),
        Form::Bool => "true|false".to_owned(),
        Form::Number { min, max } => format!("{min} to {max}"),
        Form::Path => "path".to_owned(),
        Form::Address => "address".to_owned(),
        Form::AddressWithPrefix => "address/prefix".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Debug, Parser)]
    struct Cli {
        #[command(flatten)]
        add: TypeAdd,
    }

    fn type_of(words: &[&str]) -> anyhow::Result<LibraryType> {
        Cli::try_parse_from([&["x"], words].concat()).unwrap().add.into_type()
    }

    #[test]
    fn a_library_type_knows_what_it_must_have() {
        let words = ["Db", "--library", "/usr/lib/db.so", "--property", "port", "--required", "dir"];
        let made = type_of(&words).unwrap();
        assert_eq!((made.name.as_str(), made.library.as_str()), ("Db", "/usr/lib/db.so"));
        assert_eq!(made.properties, BTreeMap::from([("dir".into(), true), ("port".into(), false)]));
        let twice = type_of(&["Db", "--library", "/x", "--property", "a", "--required", "a"]);
        assert!(twice.unwrap_err().to_string().contains("property a is given twice"));
        assert!(type_of(&["Db", "--library", "x.so"]).unwrap().library.starts_with('/'));
    }

    #[test]
    fn every_builtin_type_is_described_whole() {
        let types: Vec<TypeInfo> = csv_resource::types::builtin().iter().map(|of| of.info()).collect();
        let list = all(&types);
        for of in &types {
            assert!(list.lines().any(|line| line.starts_with(&of.name)), "{}", of.name);
            let text = one(of);
            for property in &of.properties {
                assert!(text.contains(&property.help), "{}: {}", of.name, property.name);
            }
            for (verb, _) in &of.verbs {
                assert!(text.lines().any(|line| line.starts_with(verb.as_str())), "{}: {verb}", of.name);
            }
        }
        let machine = types.iter().find(|of| of.name == "VirtualMachine").unwrap();
        let text = one(machine);
        assert!(
            text.contains("disk[N]") && text.contains("16 to 16777216") && text.contains("q35|pc"),
            "{text}"
        );
        assert!(one(types.iter().find(|of| of.name == "IPAddress").unwrap()).contains("(must be given)"));
    }
}

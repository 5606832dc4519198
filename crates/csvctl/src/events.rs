//! `csvctl events`: the cluster's log, or with `--local` what this node's csvd and csvfs decided or saw.

use crate::admin::{self, Target, advise};
use crate::output::rfc3339;
use anyhow::bail;
use csv_types::admin::{Answer, Event, Request};
use csv_types::config::LocalConfig;
use csvd::client::Client;
use std::io::{ErrorKind, Write, stdout};
use std::time::Duration;

/// How often new events are asked for with `--follow`.
const FOLLOW_EVERY: Duration = Duration::from_millis(500);

/// Arguments of `csvctl events`.
#[derive(Debug, clap::Args)]
pub(crate) struct EventsArgs {
    /// This node's own log, which has more of it and needs no quorum.
    #[arg(long)]
    local: bool,
    /// Go on with new events as they come.
    #[arg(long, short)]
    follow: bool,
    /// Only events with a greater number.
    #[arg(long, default_value_t = 0)]
    after: u64,
}

/// Prints events, oldest first; with `json` an array, or one object per line when following.
pub(crate) fn run(args: &EventsArgs, target: &Target, json: bool) -> anyhow::Result<()> {
    let config = target.enter()?;
    if !args.local {
        return run_cluster(args, &config, json);
    }
    if !args.follow {
        let events = events_of(admin::ask(&config, &Request::Events { after: args.after })?)?;
        if json {
            println!("{}", serde_json::to_string_pretty(&events)?);
            return Ok(());
        }
        return print(&events, false);
    }
    let socket = config.run_dir.join("csvd.sock");
    let mut client = Client::connect(&socket, Duration::from_secs(30)).map_err(advise)?;
    let mut after = args.after;
    loop {
        let events = events_of(client.call(&Request::Events { after }).map_err(advise)?)?;
        after = events.last().map_or(after, |event| event.seq);
        print(&events, json)?;
        std::thread::sleep(FOLLOW_EVERY);
    }
}

fn run_cluster(args: &EventsArgs, config: &LocalConfig, json: bool) -> anyhow::Result<()> {
    let mut after = args.after;
    loop {
        let db = admin::database(config)?;
        let news: Vec<&csv_cluster::db::Event> =
            db.events.ring.iter().filter(|event| event.number > after).collect();
        after = news.last().map_or(after, |event| event.number);
        if json && !args.follow {
            println!("{}", serde_json::to_string_pretty(&news)?);
            return Ok(());
        }
        let mut text = String::new();
        for event in news {
            text += &if json { serde_json::to_string(event)? } else { cluster_line(&db, event) };
            text.push('\n');
        }
        write_out(&text)?;
        if !args.follow {
            return Ok(());
        }
        std::thread::sleep(FOLLOW_EVERY);
    }
}

fn cluster_line(db: &csv_cluster::db::ClusterDb, event: &csv_cluster::db::Event) -> String {
    let node = event.node.map_or_else(|| "-".to_owned(), |node| db.node_name(node));
    let level = format!("{:?}", event.level).to_uppercase();
    format!(
        "{} {} {level} {} {node} {}: {}",
        event.number,
        rfc3339(event.at_unix_ms),
        event.id,
        event.subject,
        event.message
    )
}

fn events_of(answer: Answer) -> anyhow::Result<Vec<Event>> {
    let Answer::Events { events } = answer else {
        bail!("csvd answered something else than events; csvctl and csvd must be of one version");
    };
    Ok(events)
}

/// A reader that has gone (`| head`) is no error; it ends the command.
fn print(events: &[Event], json: bool) -> anyhow::Result<()> {
    let mut text = String::new();
    for event in events {
        text += &if json { serde_json::to_string(event)? } else { line(event) };
        text.push('\n');
    }
    write_out(&text)
}

fn write_out(text: &str) -> anyhow::Result<()> {
    match stdout().write_all(text.as_bytes()).and_then(|()| stdout().flush()) {
        Err(e) if e.kind() == ErrorKind::BrokenPipe => std::process::exit(0),
        other => Ok(other?),
    }
}

fn line(event: &Event) -> String {
    let volume = if event.volume.is_empty() { "-" } else { &event.volume };
    format!("{} {} {volume} {}: {}", rfc3339(event.unix_ms), event.node, event.kind, event.message)
}

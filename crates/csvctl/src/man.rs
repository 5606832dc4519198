//! `csvctl man`: manual pages of csvctl and of each of its commands.

use anyhow::Context;
use std::fs;
use std::path::Path;

/// Writes the pages into a directory, which is made if need be. Returns how many.
pub(crate) fn write(command: clap::Command, dir: &Path) -> anyhow::Result<usize> {
    fs::create_dir_all(dir).with_context(|| format!("cannot make the directory {}", dir.display()))?;
    let mut command = command;
    command.build();
    let mut count = 0;
    pages(&command, dir, &mut count)?;
    Ok(count)
}

fn pages(command: &clap::Command, dir: &Path, count: &mut usize) -> anyhow::Result<()> {
    let page = clap_mangen::Man::new(command.clone()).manual("csvfs");
    let file = page.get_filename();
    page.generate_to(dir).with_context(|| format!("cannot write {} in {}", file, dir.display()))?;
    *count += 1;
    let shown = |sub: &&clap::Command| !sub.is_hide_set() && sub.get_name() != "help";
    for sub in command.get_subcommands().filter(shown) {
        pages(sub, dir, count)?;
    }
    Ok(())
}

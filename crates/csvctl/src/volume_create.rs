//! `csvctl volume create`: makes a file system and a label on a LUN.
//!
//! Needs no running daemon. Refuses a LUN that is in use; refuses one with anything known on it without
//! `--force`. An interrupted create leaves no valid volume on the LUN.

use anyhow::Context;
use csv_lun::{CreateRequest, create_volume};
use csv_ondisk::{FsKind, Label};
use csv_types::config::NodeFile;
use indicatif::ProgressBar;
use serde_json::json;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;
use uuid::Uuid;

const CONFIG_DEFAULT: &str = "/etc/csv/csv.toml";

/// Make a volume on a LUN.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Block device of the LUN; a file serves in a lab. What is on it is lost.
    #[arg(long, value_name = "DEVICE")]
    lun: PathBuf,
    /// Name of the volume: its directory under /ClusterStorage.
    #[arg(long)]
    name: String,
    /// File system: ext4 or xfs.
    #[arg(long, value_name = "FS", default_value = "ext4")]
    fs: FsKind,
    /// Cluster that the volume belongs to; this node's when absent.
    #[arg(long, value_name = "UUID")]
    cluster_id: Option<Uuid>,
    /// Overwrite what is on the LUN. A LUN in use is refused all the same.
    #[arg(long)]
    force: bool,
    /// Configuration file of the node.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// Makes the volume and says what was made.
pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    let cluster_id = match args.cluster_id {
        Some(id) => id,
        None => own_cluster(args.config.as_deref().unwrap_or(Path::new(CONFIG_DEFAULT)))?,
    };
    let request =
        CreateRequest { lun: args.lun, name: args.name, fs: args.fs, cluster_id, force: args.force };
    let spinner = ProgressBar::new_spinner();
    spinner.enable_steady_tick(Duration::from_millis(100));
    let made = create_volume(&request, &mut |step| spinner.set_message(step.to_string()));
    spinner.finish_and_clear();
    let label = made?;
    println!("{}", if args.json { as_json(&label, &request.lun) } else { as_text(&label, &request.lun) });
    Ok(())
}

/// The cluster of the node that runs here.
fn own_cluster(path: &Path) -> anyhow::Result<Uuid> {
    let text = fs::read_to_string(path).with_context(|| {
        format!(
            "cannot read {}; name the cluster with --cluster-id or the file with --config",
            path.display()
        )
    })?;
    let config = NodeFile::parse(&text).with_context(|| format!("in {}", path.display()))?.local;
    Ok(crate::admin::database(&config).context("the cluster is not known; name it with --cluster-id")?.id)
}

fn as_json(label: &Label, lun: &Path) -> String {
    json!({
        "name": label.name,
        "volume_id": label.volume_id,
        "cluster_id": label.cluster_id,
        "fs": label.fs.as_str(),
        "fs_bytes": label.fs_bytes,
        "lun": lun,
        "created_unix_s": label.created_unix_s,
    })
    .to_string()
}

fn as_text(label: &Label, lun: &Path) -> String {
    format!(
        "Volume {0} ({1}) is on {2}: {3}, {4} MiB.\nNext: `csvctl volume add {0}` on a node of its cluster.",
        label.name,
        label.volume_id,
        lun.display(),
        label.fs,
        label.fs_bytes >> 20,
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Debug, Parser)]
    struct Cli {
        #[command(flatten)]
        args: Args,
    }

    fn parse(words: &[&str]) -> Result<Args, clap::Error> {
        Cli::try_parse_from([&["create"], words].concat()).map(|cli| cli.args)
    }

    #[test]
    fn without_a_node_the_cluster_must_be_named() {
        let dir = tempfile::tempdir().unwrap();
        let error = own_cluster(&dir.path().join("missing")).unwrap_err();
        assert!(error.to_string().contains("--cluster-id"), "{error}");
        let config = dir.path().join("csv.toml");
        fs::write(&config, format!("[local]\nnode = \"n1\"\nrun_dir = \"{}\"\n", dir.path().display()))
            .unwrap();
        assert!(format!("{:#}", own_cluster(&config).unwrap_err()).contains("--cluster-id"));
    }

    #[test]
    fn unknown_file_systems_are_refused_with_the_choice() {
        let args = parse(&["--lun", "/dev/x", "--name", "V"]).unwrap();
        assert_eq!((args.fs, args.force), (FsKind::Ext4, false));
        let error = parse(&["--lun", "/dev/x", "--name", "V", "--fs", "btrfs"]).unwrap_err().to_string();
        assert!(error.contains("choose ext4 or xfs"), "{error}");
    }

    #[test]
    fn a_volume_is_made_and_described() {
        let file = tempfile::NamedTempFile::new_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        file.as_file().set_len(64 << 20).unwrap();
        let lun = file.path().to_str().unwrap();
        let id = "6f1d6c38-6f0e-4b8a-9f0e-2f7b3c1d2e3f";
        let words = ["--lun", lun, "--name", "V", "--cluster-id", id, "--json"];
        run(parse(&words).unwrap()).unwrap();
        let opened = csv_lun::Lun::open(file.path(), csv_lun::LunOptions::default()).unwrap();
        let label = csv_lun::read_label(&opened).unwrap().unwrap();
        let value: serde_json::Value = serde_json::from_str(&as_json(&label, file.path())).unwrap();
        assert_eq!((&value["name"], &value["cluster_id"]), (&json!("V"), &json!(id)));
        assert_eq!(value["fs_bytes"], json!(63 << 20));
        let text = as_text(&label, file.path());
        assert!(
            text.contains("is on") && text.contains("ext4, 63 MiB") && text.contains("`csvctl volume add V`"),
            "{text}"
        );
        let error = run(parse(&words).unwrap()).unwrap_err().to_string();
        assert!(error.contains("--force"), "{error}");
    }
}

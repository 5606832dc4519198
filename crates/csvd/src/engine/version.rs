//! After an update of its software a node says so: the cluster's feature level can be raised only when every node's record
//! has one that knows it.

use super::Engine;
use super::lifecycle::{LIMIT, VERSION};
use super::propose::Failed;
use csv_cluster::db::{ClusterDb, Command, FEATURE_LEVEL};
use csv_types::NodeId;
use std::sync::Arc;
use std::time::Duration;

/// Between tries.
const AGAIN: Duration = Duration::from_secs(2);

/// What the database should be told of this software, if it does not know it yet. Nothing before the node is in it.
fn news(db: &ClusterDb, me: NodeId, feature_level: u32, version: &str) -> Option<Command> {
    let known = db.nodes.get(&me)?;
    let same = known.feature_level == feature_level && known.version == version;
    (!same).then(|| Command::NodeVersion { node: me, feature_level, version: version.to_owned() })
}

impl Engine {
    /// Runs until the database knows this node's software. It may see an old database first, so it does not end before the
    /// node has been in contact with the majority.
    pub(super) async fn tell_version(self: Arc<Self>) {
        while !self.is_stopping() {
            let contact = self.cut_off().is_none();
            let news = news(&self.db.read(), self.me(), FEATURE_LEVEL, VERSION);
            match news.filter(|_| contact) {
                Some(news) => match self.propose(news, LIMIT).await {
                    Ok(_) => return,
                    Err(Failed::Refused(why)) => {
                        let text = format!("the cluster does not take note of this node's software: {why}");
                        return self.event("", "version-refused", text);
                    }
                    Err(error) => tracing::debug!(%error, "this node's software is not known yet"),
                },
                None if contact && self.db.read().nodes.contains_key(&self.me()) => return,
                None => {}
            }
            tokio::time::sleep(AGAIN).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use csv_cluster::db::{Init, NewNode, Secrets};

    fn db() -> ClusterDb {
        let mut db = ClusterDb::default();
        let node = NewNode {
            name: "n1".into(),
            addr: std::net::Ipv4Addr::LOCALHOST.into(),
            feature_level: 1,
            version: "0.1.0".into(),
            cert_sha256: String::new(),
        };
        let id = uuid::Uuid::from_u128(7);
        let init = Init { name: "c".into(), id, node, secrets: Secrets::default(), settings: Vec::new() };
        db.apply(&Command::Init(Box::new(init)).by(NodeId(1), 1)).unwrap();
        db
    }

    #[test]
    fn a_node_tells_of_its_software_once_it_is_another() {
        let (mut db, me) = (db(), NodeId(1));
        assert_eq!(news(&ClusterDb::default(), me, 1, "0.1.0"), None);
        assert_eq!(news(&db, me, 1, "0.1.0"), None);
        assert!(news(&db, me, 1, "0.1.1").is_some());
        let raised = Command::RaiseFeatureLevel { level: 2 };
        assert!(db.apply(&raised.clone().by(me, 2)).is_err());
        let told = news(&db, me, 2, "0.2.0").unwrap();
        db.apply(&told.by(me, 2)).unwrap();
        assert_eq!(news(&db, me, 2, "0.2.0"), None);
        assert_eq!(db.nodes[&me].version, "0.2.0");
        // Another binary that is older again is told as well; the database refuses it when the level was raised.
        assert!(news(&db, me, 1, "0.1.0").is_some());
    }
}

//! A shard that is frozen by somebody who is gone takes nothing into its log meanwhile, and soon takes writes
//! again; a change of shards whose driver was lost in the middle is begun anew and comes to its end.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use shoal_actors::backup::BackupConfig;
use shoal_actors::bootstrap::Discovery;
use shoal_actors::embed::Embedders;
use shoal_actors::placement::PlacementLimits;
use shoal_actors::service::PeerService;
use shoal_actors::tls::PeerTls;
use shoal_actors::work::WorkConfig;
use shoal_actors::{Cluster, NodeConfig, ReadOptions, Running, start};
use shoal_engine::command::{Command, Point, Select};
use shoal_proto::{CollectionConfig, Distance, ErrorCode, PointId, RequestId, ShardId, VectorParams};
use shoal_raft::cluster::{self, Addresses, ClusterState};
use shoal_raft::{LogConfig, Peers, RaftConfig};

/// How long anything may take, on a machine that does other things as well.
const LIMIT: Duration = Duration::from_secs(60);
/// The pause of a client that was refused.
const RETRY_PAUSE: Duration = Duration::from_millis(5);
/// Entries that a log may gain between a freeze and the first write after it: the thaw and the write.
const ENTRIES: u64 = 2;

fn soon() -> Instant {
    Instant::now() + LIMIT
}

/// A node that is a cluster alone.
async fn node(data: &Path) -> Running {
    let tls = PeerTls::new("a secret", None).expect("certificates");
    let config = NodeConfig {
        data: data.to_owned(),
        discovery: Discovery {
            name: "n1".into(),
            zone: String::new(),
            addresses: Addresses::default(),
            join: Vec::new(),
            expect: 1,
        },
        raft: RaftConfig::default(),
        log: LogConfig::default(),
        secret: "a secret".into(),
        tls: tls.clone(),
        mesh: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
        disk_reserve_bytes: 0,
        blob_grace: Duration::from_secs(3600),
        work: WorkConfig {
            embedders: Embedders::new(BTreeMap::new(), None, 1 << 20, "not needed here"),
            parse_limits: Default::default(),
            parsers: 1,
            embedding: 1,
        },
        placement: PlacementLimits::default(),
        backup: BackupConfig { target: String::new(), keep: 0 },
    };
    start(config, Peers::new(tls.channels()), PeerService::new("n1")).await.expect("a node")
}

/// Makes a collection `c` of one shard.
async fn create(cluster: &Cluster) -> ShardId {
    let mut config = CollectionConfig::default();
    config.vectors.insert(String::new(), VectorParams::new(2, Distance::Dot));
    let command = cluster::Command::CreateCollection {
        request_id: RequestId([1; 16]),
        name: "c".into(),
        config,
        shard_count: Some(1),
        replication_factor: Some(1),
        created_at: 0,
    };
    cluster.control(command, soon()).await.expect("made");
    let state = cluster.wait_state(soon(), |state| state.collection("c").is_ok()).await.expect("known");
    state.collection("c").expect("known").1.shards[0]
}

fn upsert(id: u64) -> Command {
    let vectors = vec![(String::new(), vec![1.0, id as f32])];
    Command::Upsert(vec![Point { id: PointId::Num(id), vectors, payload: "{}".into() }])
}

fn request(id: u64) -> RequestId {
    RequestId::from_key("freeze", &id.to_string())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_frozen_shard_takes_nothing_into_its_log_and_thaws_when_its_driver_is_gone() {
    let dir = tempfile::tempdir().expect("a directory");
    let running = node(&dir.path().join("data")).await;
    let cluster = &running.cluster;
    let shard = create(cluster).await;
    cluster.write(shard, Some(request(0)), &upsert(0), soon()).await.expect("written");

    // Frozen for a change that the control group does not know, or not any more.
    let mut refusals = 0;
    for id in 1..=5u8 {
        let freeze = Command::Freeze { by: RequestId([id; 16]) };
        let (_, frozen_at) = cluster.write(shard, None, &freeze, soon()).await.expect("frozen");
        let (id, end) = (u64::from(id), soon());
        let written_at = loop {
            match cluster.write(shard, Some(request(id)), &upsert(id), end).await {
                Ok((_, index)) => break index,
                Err(error) if error.code == ErrorCode::Stale && Instant::now() < end => refusals += 1,
                Err(error) => panic!("{error}"),
            }
            tokio::time::sleep(RETRY_PAUSE).await;
        };
        let entries = written_at - frozen_at;
        assert!(
            entries <= ENTRIES,
            "{entries} entries came into the log, and {refusals} writes were refused"
        );
    }
    assert!(refusals > 0, "the shard was never seen frozen");

    // Frozen for a change that goes on, by a driver that knows nothing of it.
    cluster.split(shard, 2, soon()).await.expect("ordered");
    let begun = |state: &Arc<ClusterState>| !state.resharding.is_empty() || !state.is_in_use(shard);
    let state = cluster.wait_state(soon(), begun).await.expect("begun");
    if let Some(reshard) = state.resharding.get("c") {
        // The one that drives it now may have frozen the shard already, or be through.
        drop(cluster.write(shard, None, &Command::Freeze { by: reshard.id }, soon()).await);
    }
    let ended = |state: &Arc<ClusterState>| {
        state.resharding.is_empty() && state.collection("c").is_ok_and(|(_, known)| known.shards.len() == 2)
    };
    cluster.wait_state(soon(), ended).await.expect("split");
    let ids: Vec<PointId> = (0..=5).map(PointId::Num).collect();
    let options = ReadOptions::linearizable(soon());
    let (hits, _) =
        cluster.read_points("c", &ids, (&Select::Nothing, &Select::Nothing), &options).await.expect("read");
    assert_eq!(hits.len(), ids.len(), "{hits:?}");
    running.stop().await;
}

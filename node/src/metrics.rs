//! Names, units and labels of everything that is measured. The dashboard and the alert rules
//! in `deploy/` use these and no others; a test compares them.

use std::time::Duration;

use anyhow::Result;
use metrics::{Unit, describe_counter, describe_gauge, describe_histogram, gauge};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};
use shoal_engine::command::{Answer, Read};

use crate::app::App;

/// How often gauges are brought up to date.
const TICK: Duration = Duration::from_secs(2);
/// Bounds of latency histograms, in seconds.
const SECONDS: [f64; 14] =
    [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];
/// The roles of a group on a node, as the label `role`.
const ROLES: [&str; 5] = ["leader", "follower", "learner", "candidate", "stopped"];
/// The states of a document, as the label `state`, in the order of the engine's numbers.
const STATES: [&str; 4] = ["in_progress", "completed", "failed", "cancelled"];
/// The calls that go over the mesh, as the label `kind`.
const MESH_CALLS: [&str; 5] = ["read", "read_index", "parse", "embed", "other"];
/// What came of them, as the label `outcome`. After the last two the node is asked over gRPC.
const MESH_OUTCOMES: [&str; 4] = ["answered", "timed_out", "too_large", "unreachable"];
/// Bounds of batch sizes.
const BATCHES: [f64; 10] = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 1024.0];

/// Installs the recorder and names every metric, so that each is exported from the start.
///
/// # Errors
/// When a recorder is installed already.
pub fn install() -> Result<PrometheusHandle> {
    let handle = PrometheusBuilder::new()
        .set_buckets_for_metric(Matcher::Suffix("_seconds".into()), &SECONDS)?
        .set_buckets_for_metric(Matcher::Suffix("_operations".into()), &BATCHES)?
        .install_recorder()?;
    describe();
    Ok(handle)
}

fn describe() {
    describe_counter!("http_requests_total", "Requests by method, route and status");
    describe_histogram!("http_request_duration_seconds", Unit::Seconds, "Time to answer a request");
    describe_gauge!("shoal_http_in_flight", "Requests being served");
    describe_gauge!(
        "shoal_requests_waiting",
        "Requests that wait in line because the node has too much to do"
    );
    describe_counter!("document_operations_total", "Document operations by outcome");
    describe_histogram!("shoal_raft_log_sync_seconds", Unit::Seconds, "Time of one durable log write");
    describe_histogram!("shoal_raft_log_batch_operations", "Operations in one durable log write");
    describe_histogram!(
        "shoal_apply_seconds",
        Unit::Seconds,
        "Time of applying the committed entries that a shard takes at once"
    );
    describe_gauge!("shoal_raft_log_bytes", Unit::Bytes, "Bytes that the log uses");
    describe_counter!("shoal_raft_snapshots_installed_total", "Snapshots taken in from a leader");
    describe_counter!(
        "shoal_raft_snapshot_bytes_sent_total",
        Unit::Bytes,
        "Bytes of snapshots sent to members"
    );
    describe_counter!(
        "shoal_raft_snapshot_resumed_bytes_total",
        Unit::Bytes,
        "Bytes of snapshots that were not sent again after a break"
    );
    describe_gauge!("shoal_disk_free_bytes", Unit::Bytes, "Free bytes for the data directory");
    describe_gauge!("shoal_disk_writable", "1 while the disk's reserve is kept, 0 below it");
    describe_counter!("shoal_actor_restarts_total", "Parts of the node that failed and were started again");
    describe_gauge!("shoal_groups", "Raft groups on this node by role");
    describe_gauge!("shoal_groups_without_leader", "Raft groups on this node that know no leader");
    describe_gauge!(
        "shoal_shards_without_leader",
        "Shards that nobody who answers can lead, where the control group is led; 0 elsewhere"
    );
    describe_gauge!(
        "shoal_replica_lag_entries",
        "Entries by which the slowest member is behind, over the groups led here"
    );
    describe_gauge!("shoal_documents", "Documents by state, over the shards led here");
    describe_gauge!("shoal_points", "Points, over the shards led here");
    describe_gauge!("shoal_pending_vectors", "Vectors that no graph has taken in yet, on this node");
    describe_counter!("shoal_embedding_cache_requests_total", "Embeddings asked of the cache");
    describe_counter!("shoal_embedded_texts_total", "Texts embedded by a model");
    describe_histogram!("shoal_embed_seconds", Unit::Seconds, "Time of one embedding batch");
    describe_histogram!("shoal_parse_seconds", Unit::Seconds, "Time of one parse");
    describe_counter!("shoal_parse_failures_total", "Parses that failed");
    describe_counter!("shoal_hedged_reads_total", "Reads that were asked of a second replica as well");
    describe_counter!("shoal_reshards_total", "Splits and merges of shards, and attempts that failed");
    describe_histogram!(
        "shoal_reshard_frozen_seconds",
        Unit::Seconds,
        "Time for which a split or a merge kept writes waiting"
    );
    describe_gauge!("shoal_mesh_sessions", "Sessions of the actor mesh");
    describe_counter!(
        "shoal_mesh_calls_total",
        "Calls to other nodes for the actor mesh; what is too large or finds no session goes over gRPC"
    );
    describe_counter!("shoal_remote_work_total", "Work of this node that another node's idle workers did");
    describe_gauge!("shoal_nodes", "Members of the cluster");
    describe_counter!("shoal_backup_jobs_total", "Backups made, verified, restored, deleted, by outcome");
    describe_gauge!(
        "shoal_backup_last_success_timestamp_seconds",
        Unit::Seconds,
        "When the latest backup of everything was made, in Unix time; 0 when none is known"
    );
    describe_gauge!(
        "shoal_backup_missing_files",
        "Files that the latest backup of everything lacks the bytes of, because no replica had them"
    );
    describe_gauge!(
        "shoal_tls_certificate_expires_timestamp_seconds",
        Unit::Seconds,
        "When the certificate of HTTPS expires, in Unix time; 0 without TLS"
    );
    describe_gauge!("process_resident_memory_bytes", Unit::Bytes, "Memory of this process");
    describe_gauge!("process_start_time_seconds", Unit::Seconds, "When this process started");
    for (operation, status) in
        [("upload", "ok"), ("process", "completed"), ("process", "failed"), ("process", "retried")]
    {
        metrics::counter!("document_operations_total", "operation" => operation, "status" => status)
            .absolute(0);
    }
    for result in ["hit", "miss"] {
        metrics::counter!("shoal_embedding_cache_requests_total", "result" => result).absolute(0);
    }
    for result in ["ok", "failed"] {
        metrics::counter!("shoal_reshards_total", "result" => result).absolute(0);
    }
    for kind in MESH_CALLS {
        for outcome in MESH_OUTCOMES {
            metrics::counter!("shoal_mesh_calls_total", "kind" => kind, "outcome" => outcome).absolute(0);
        }
    }
    for kind in ["parse", "embed"] {
        metrics::counter!("shoal_remote_work_total", "kind" => kind).absolute(0);
    }
    for counter in [
        "shoal_actor_restarts_total",
        "shoal_raft_snapshots_installed_total",
        "shoal_raft_snapshot_bytes_sent_total",
        "shoal_raft_snapshot_resumed_bytes_total",
        "shoal_embedded_texts_total",
        "shoal_parse_failures_total",
        "shoal_hedged_reads_total",
    ] {
        metrics::counter!(counter).absolute(0);
    }
    gauge!("process_start_time_seconds").set(shoal_actors::cluster::unix_now() as f64);
    gauge!("shoal_raft_log_bytes").set(0.0);
    gauge!("shoal_mesh_sessions").set(0.0);
    for role in ROLES {
        gauge!("shoal_groups", "role" => role).set(0.0);
    }
    for state in STATES {
        gauge!("shoal_documents", "state" => state).set(0.0);
    }
    for empty in [
        "shoal_groups_without_leader",
        "shoal_shards_without_leader",
        "shoal_replica_lag_entries",
        "shoal_points",
        "shoal_pending_vectors",
        "shoal_nodes",
        "shoal_backup_last_success_timestamp_seconds",
        "shoal_backup_missing_files",
        "shoal_tls_certificate_expires_timestamp_seconds",
    ] {
        gauge!(empty).set(0.0);
    }
    gauge!("shoal_disk_writable").set(1.0);
    gauge!("shoal_http_in_flight").set(0.0);
    gauge!("shoal_requests_waiting").set(0.0);
}

/// HTTPS is served with a certificate that expires at this Unix time, in seconds.
pub fn set_certificate_expiry(expires_at: i64) {
    gauge!("shoal_tls_certificate_expires_timestamp_seconds").set(expires_at as f64);
}

/// Keeps the gauges up to date for as long as the node runs.
pub async fn observe(app: App) {
    loop {
        if let Some(bytes) = resident_bytes() {
            gauge!("process_resident_memory_bytes").set(bytes as f64);
        }
        if let Ok(running) = app.running() {
            observe_groups(&running.cluster);
            observe_shards(&running.cluster).await;
        }
        tokio::time::sleep(TICK).await;
    }
}

fn observe_groups(cluster: &shoal_actors::Cluster) {
    let statuses: Vec<_> = cluster.groups().all().iter().map(shoal_raft::Group::status).collect();
    for role in ROLES {
        let count = statuses.iter().filter(|status| status.role == role).count();
        gauge!("shoal_groups", "role" => role).set(count as f64);
    }
    gauge!("shoal_groups_without_leader")
        .set(statuses.iter().filter(|status| status.leader.is_none()).count() as f64);
    let lag = statuses
        .iter()
        .flat_map(|status| status.matched.values().map(|matched| status.last_index.saturating_sub(*matched)));
    gauge!("shoal_replica_lag_entries").set(lag.max().unwrap_or(0) as f64);
    gauge!("shoal_nodes").set(cluster.state().nodes.len() as f64);
    gauge!("shoal_disk_writable").set(if cluster.is_writable() { 1.0 } else { 0.0 });
}

async fn observe_shards(cluster: &shoal_actors::Cluster) {
    let (mut points, mut pending, mut documents) = (0, 0, [0u64; 4]);
    for local in cluster.local_shards().into_values() {
        let shard = local.shard.clone();
        let Ok(Ok((_, Answer::Stats(stats)))) =
            tokio::task::spawn_blocking(move || shard.read(&Read::Stats)).await
        else {
            continue;
        };
        pending += stats.pending_vectors;
        if local.group.is_leader() {
            points += stats.points;
            documents.iter_mut().zip(stats.documents).for_each(|(sum, count)| *sum += count);
        }
    }
    gauge!("shoal_points").set(points as f64);
    gauge!("shoal_pending_vectors").set(pending as f64);
    for (state, count) in STATES.into_iter().zip(documents) {
        gauge!("shoal_documents", "state" => state).set(count as f64);
    }
}

fn resident_bytes() -> Option<u64> {
    let statm = std::fs::read_to_string("/proc/self/statm").ok()?;
    let pages: u64 = statm.split_whitespace().nth(1)?.parse().ok()?;
    Some(pages * 4096)
}

//! Every setting, with unit, default and range: file (TOML) < environment < flags.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use serde::{Deserialize, Serialize};
use shoal_actors::Consistency;
use shoal_actors::embed::HttpModelConfig;
use shoal_actors::parse::ParseLimits;
use shoal_actors::placement::PlacementLimits;
use shoal_proto::collection::MAX_VECTOR_DIMENSIONS;
use shoal_raft::{LogConfig, RaftConfig};

/// A shorter secret is refused where strangers can reach the node: who can connect can try guesses
/// against its certificate.
const MIN_SECRET_CHARS: usize = 16;
/// About the address space of a parser before it has read anything, in bytes.
const MIN_PARSE_BYTES: u64 = 128 << 20;
/// A model that sees less of a text is not fit for chunks.
const MIN_MODEL_TOKENS: usize = 64;
/// A slower pace would take most of a minute for one piece of a snapshot.
const MIN_MOVE_BYTES_PER_SECOND: u64 = 64 << 10;

/// Flags of `shoal serve`; each can also come from the environment.
#[derive(Args, Clone, Debug, Default)]
pub struct ServeArgs {
    /// A TOML file with settings; flags and environment win over it.
    #[arg(long, env = "SHOAL_CONFIG")]
    pub config: Option<PathBuf>,
    /// The node's name; the host name when absent. Only a name, never an identity.
    #[arg(long, env = "SHOAL_NAME")]
    pub name: Option<String>,
    /// The data directory.
    #[arg(long, env = "SHOAL_DATA")]
    pub data: Option<PathBuf>,
    /// Where HTTP is served.
    #[arg(long, env = "SHOAL_HTTP")]
    pub http: Option<SocketAddr>,
    /// Where gRPC is served, for peers and clients.
    #[arg(long, env = "SHOAL_GRPC")]
    pub grpc: Option<SocketAddr>,
    /// Where the actor mesh listens, for peers.
    #[arg(long, env = "SHOAL_MESH")]
    pub mesh: Option<SocketAddr>,
    /// The host by which other nodes reach this one, when it is not the listening address.
    #[arg(long, env = "SHOAL_ADVERTISE")]
    pub advertise: Option<String>,
    /// gRPC addresses of other nodes: host:port, comma separated; a DNS name may stand for all.
    #[arg(long, env = "SHOAL_JOIN", value_delimiter = ',')]
    pub join: Option<Vec<String>>,
    /// How many nodes must agree before a cluster is created.
    #[arg(long, env = "SHOAL_EXPECT")]
    pub expect: Option<usize>,
    /// The key that clients must send.
    #[arg(long, env = "SHOAL_API_KEY", hide_env_values = true)]
    pub api_key: Option<String>,
    /// What peers prove to each other; derived from the API key when absent.
    #[arg(long, env = "SHOAL_CLUSTER_SECRET", hide_env_values = true)]
    pub cluster_secret: Option<String>,
    /// The failure domain of this node.
    #[arg(long, env = "SHOAL_ZONE")]
    pub zone: Option<String>,
    /// Serve on any address without key or TLS.
    #[arg(long, env = "SHOAL_INSECURE")]
    pub insecure: bool,
    /// The folder that holds model folders.
    #[arg(long, env = "SHOAL_MODELS")]
    pub models: Option<PathBuf>,
    /// Certificate chain for HTTPS (PEM).
    #[arg(long, env = "SHOAL_TLS_CERT")]
    pub tls_cert: Option<PathBuf>,
    /// Private key for HTTPS (PEM).
    #[arg(long, env = "SHOAL_TLS_KEY")]
    pub tls_key: Option<PathBuf>,
    /// `json` or `text`.
    #[arg(long, env = "SHOAL_LOG_FORMAT")]
    pub log_format: Option<LogFormat>,
    /// A level, or `tracing` directives.
    #[arg(long, env = "SHOAL_LOG_LEVEL")]
    pub log_level: Option<String>,
    /// Serve `/metrics` without a key.
    #[arg(long, env = "SHOAL_METRICS_OPEN")]
    pub metrics_open: bool,
    /// Entries after which a shard makes a checkpoint.
    #[arg(long, env = "SHOAL_RAFT_CHECKPOINT_ENTRIES")]
    pub raft_checkpoint_entries: Option<u64>,
    /// Entries kept in the log behind a checkpoint.
    #[arg(long, env = "SHOAL_RAFT_KEEP_ENTRIES")]
    pub raft_keep_entries: Option<u64>,
    /// Free bytes on the data directory's file system below which writes are refused.
    #[arg(long, env = "SHOAL_DISK_RESERVE")]
    pub disk_reserve: Option<u64>,
    /// Seconds that a blob is kept that no file names (any more, or yet).
    #[arg(long, env = "SHOAL_BLOB_GRACE_SECONDS")]
    pub blob_grace_seconds: Option<u64>,
    /// Requests in work at once; by the cores when zero.
    #[arg(long, env = "SHOAL_WORKING_REQUESTS")]
    pub working_requests: Option<usize>,
    /// Move everything to other nodes before stopping, as when a cluster gets smaller.
    #[arg(long, env = "SHOAL_DRAIN_ON_STOP")]
    pub drain_on_stop: bool,
    /// Seconds after which a silent node is replaced by others.
    #[arg(long, env = "SHOAL_REPAIR_AFTER")]
    pub repair_after: Option<u64>,
    /// Bytes of a shard's store above which it is split in two; never when zero.
    #[arg(long, env = "SHOAL_SPLIT_BYTES")]
    pub split_bytes: Option<u64>,
    /// Seconds between two looks at the sizes of shards.
    #[arg(long, env = "SHOAL_SIZES_SECONDS")]
    pub sizes_seconds: Option<u64>,
    /// Bytes a second that this node sends to others for moves; no limit when zero.
    #[arg(long, env = "SHOAL_MOVE_BYTES_PER_SECOND")]
    pub move_bytes_per_second: Option<u64>,
    /// Where backups are kept: a directory that every node sees, or s3://bucket/prefix.
    #[arg(long, env = "SHOAL_BACKUP_TARGET")]
    pub backup_target: Option<String>,
    /// How many backups are kept; all when zero.
    #[arg(long, env = "SHOAL_BACKUP_KEEP")]
    pub backup_keep: Option<usize>,
}

/// How log lines look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum LogFormat {
    /// One JSON object a line.
    Json,
    /// For people.
    #[default]
    Text,
}

/// The effective settings.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// The node's name; the host name when empty.
    pub name: String,
    /// The data directory.
    pub data: PathBuf,
    /// Where HTTP is served.
    pub http: SocketAddr,
    /// Where gRPC is served.
    pub grpc: SocketAddr,
    /// Where the actor mesh listens.
    pub mesh: SocketAddr,
    /// The host by which other nodes reach this one; the listening address when empty.
    pub advertise: String,
    /// gRPC addresses of other nodes.
    pub join: Vec<String>,
    /// How many nodes must agree before a cluster is created, from 1.
    pub expect: usize,
    /// The key that clients must send; none when empty.
    pub api_key: String,
    /// What peers prove to each other; derived from the API key when empty.
    pub cluster_secret: String,
    /// The failure domain of this node.
    pub zone: String,
    /// Serve on any address without key or TLS.
    pub insecure: bool,
    /// The folder that holds model folders.
    pub models: PathBuf,
    /// The model of vector stores that do not name one.
    pub default_model: String,
    /// Certificate chain for HTTPS (PEM); no TLS when empty.
    pub tls_cert: PathBuf,
    /// Private key for HTTPS (PEM).
    pub tls_key: PathBuf,
    /// How log lines look.
    pub log_format: LogFormat,
    /// A level, or `tracing` directives.
    pub log_level: String,
    /// Serve `/metrics` without a key.
    pub metrics_open: bool,
    /// Free bytes below which writes are refused.
    pub disk_reserve_bytes: u64,
    /// Seconds that a blob is kept that no file names (any more, or yet).
    pub blob_grace_seconds: u64,
    /// Raft timers and sizes.
    pub raft: RaftSettings,
    /// When what is moved between nodes.
    pub placement: PlacementSettings,
    /// Where backups go.
    pub backup: BackupSettings,
    /// Limits of the HTTP edge.
    pub limits: Limits,
    /// Limits of one parse.
    pub parse: ParseLimits,
    /// Parser children at once; the number of cores when zero.
    pub parsers: usize,
    /// Bytes of the embedding cache.
    pub embedding_cache_bytes: usize,
    /// Remote models.
    pub http_models: Vec<HttpModelConfig>,
}

/// Raft timers and sizes.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RaftSettings {
    /// Milliseconds between heartbeats.
    pub heartbeat_ms: u64,
    /// The shortest election time-out in milliseconds.
    pub election_min_ms: u64,
    /// The longest election time-out in milliseconds; also the leader's lease.
    pub election_max_ms: u64,
    /// Entries after which a shard makes a checkpoint.
    pub checkpoint_entries: u64,
    /// Entries kept in the log behind a checkpoint.
    pub keep_entries: u64,
    /// Size of one log file in bytes.
    pub log_file_bytes: u64,
    /// Size of all log files beyond which old ones are dropped or rewritten, in bytes.
    pub log_purge_bytes: u64,
}

/// When what is moved between nodes.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PlacementSettings {
    /// Seconds after which a silent node's replicas are made anew on others, from 5.
    pub repair_after_seconds: u64,
    /// Seconds of calm after which leaders are balanced.
    pub calm_before_leaders_seconds: u64,
    /// Whether everything is moved to other nodes before this one stops.
    pub drain_on_stop: bool,
    /// Seconds that this may take; then the node stops all the same.
    pub drain_seconds: u64,
    /// Bytes of a shard's store above which it is split in two; never when zero.
    pub split_bytes: u64,
    /// Seconds between two looks at the sizes of shards, from 1.
    pub sizes_seconds: u64,
    /// Bytes a second that this node sends to others for moves: snapshots of shards and copies of files, of all
    /// shards together; from 65536, or no limit when zero.
    pub move_bytes_per_second: u64,
}

/// Where backups go.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct BackupSettings {
    /// The absolute path of a directory that every node sees, or `s3://bucket/prefix`; nowhere when
    /// empty.
    pub target: String,
    /// How many of this cluster's backups are kept when a new one is made; all when zero.
    pub keep: usize,
}

/// Limits of the HTTP edge.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// The largest JSON body in bytes.
    pub body_bytes: usize,
    /// The largest uploaded file in bytes.
    pub upload_bytes: usize,
    /// The largest snapshot in bytes, uploaded or fetched.
    pub snapshot_bytes: usize,
    /// Requests that are on the node at once, in work or in line; beyond them 429.
    pub concurrent_requests: usize,
    /// Requests in work at once; the others wait in line. By the cores that this process may use when zero.
    pub working_requests: usize,
    /// Milliseconds that a request waits in line when the node has more to do than it can; then 429.
    pub queue_milliseconds: u64,
    /// Seconds that a request may take from its last byte on when the client does not say.
    pub request_seconds: u64,
    /// Seconds in which a client must have sent the headers of a connection's first request, and answered when it
    /// is asked whether it is still there; from 1.
    pub header_seconds: u64,
    /// Seconds that a connection may be idle between requests, with the headers of the next one; from
    /// `header_seconds`.
    pub idle_seconds: u64,
    /// The longest pause of a client in the middle of a body, in seconds, from 1.
    pub body_pause_seconds: u64,
    /// How fresh reads are when the client does not say: `linearizable`, `session`, `eventual`.
    pub default_consistency: ConsistencySetting,
}

/// How fresh reads are by default.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ConsistencySetting {
    /// See [`Consistency::Linearizable`].
    #[default]
    Linearizable,
    /// See [`Consistency::Session`].
    Session,
    /// See [`Consistency::Eventual`].
    Eventual,
}

impl From<ConsistencySetting> for Consistency {
    fn from(setting: ConsistencySetting) -> Consistency {
        match setting {
            ConsistencySetting::Linearizable => Consistency::Linearizable,
            ConsistencySetting::Session => Consistency::Session,
            ConsistencySetting::Eventual => Consistency::Eventual,
        }
    }
}

impl Default for Config {
    fn default() -> Self {
        let loopback = |port| SocketAddr::from(([127, 0, 0, 1], port));
        Config {
            name: String::new(),
            data: "data".into(),
            http: loopback(6333),
            grpc: loopback(6334),
            mesh: loopback(6335),
            advertise: String::new(),
            join: Vec::new(),
            expect: 1,
            api_key: String::new(),
            cluster_secret: String::new(),
            zone: String::new(),
            insecure: false,
            models: "models".into(),
            default_model: "multilingual-e5-small".into(),
            tls_cert: PathBuf::new(),
            tls_key: PathBuf::new(),
            log_format: LogFormat::default(),
            log_level: "info".into(),
            metrics_open: false,
            disk_reserve_bytes: 256 << 20,
            blob_grace_seconds: 3600,
            raft: RaftSettings::default(),
            placement: PlacementSettings::default(),
            backup: BackupSettings::default(),
            limits: Limits::default(),
            parse: ParseLimits::default(),
            parsers: 0,
            embedding_cache_bytes: 64 << 20,
            http_models: Vec::new(),
        }
    }
}

impl Default for RaftSettings {
    fn default() -> Self {
        let (raft, log) = (RaftConfig::default(), LogConfig::default());
        RaftSettings {
            heartbeat_ms: raft.heartbeat.as_millis() as u64,
            election_min_ms: raft.election_timeout.0.as_millis() as u64,
            election_max_ms: raft.election_timeout.1.as_millis() as u64,
            checkpoint_entries: raft.checkpoint_entries,
            keep_entries: raft.keep_entries,
            log_file_bytes: log.file_bytes,
            log_purge_bytes: log.purge_threshold_bytes,
        }
    }
}

impl Default for PlacementSettings {
    fn default() -> Self {
        let limits = PlacementLimits::default();
        PlacementSettings {
            repair_after_seconds: limits.repair_after.as_secs(),
            calm_before_leaders_seconds: limits.calm_before_leaders.as_secs(),
            drain_on_stop: false,
            drain_seconds: 300,
            split_bytes: limits.split_bytes,
            sizes_seconds: limits.sizes_every.as_secs(),
            move_bytes_per_second: RaftConfig::default().move_bytes_per_second,
        }
    }
}

impl PlacementSettings {
    /// What bounds placement, as the actors crate wants it.
    pub fn limits(&self) -> PlacementLimits {
        PlacementLimits {
            repair_after: Duration::from_secs(self.repair_after_seconds),
            calm_before_leaders: Duration::from_secs(self.calm_before_leaders_seconds),
            split_bytes: self.split_bytes,
            sizes_every: Duration::from_secs(self.sizes_seconds),
        }
    }
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            body_bytes: 32 << 20,
            upload_bytes: 256 << 20,
            snapshot_bytes: 16 << 30,
            concurrent_requests: 1024,
            working_requests: 0,
            queue_milliseconds: 1000,
            request_seconds: 10,
            header_seconds: 10,
            idle_seconds: 75,
            body_pause_seconds: 10,
            default_consistency: ConsistencySetting::default(),
        }
    }
}

impl RaftSettings {
    /// Sizes of the log.
    pub fn log(&self) -> LogConfig {
        LogConfig { file_bytes: self.log_file_bytes, purge_threshold_bytes: self.log_purge_bytes }
    }
}

impl Config {
    /// Timers, sizes and pace as the raft crate wants them.
    pub fn raft(&self) -> RaftConfig {
        let ms = Duration::from_millis;
        RaftConfig {
            heartbeat: ms(self.raft.heartbeat_ms),
            election_timeout: (ms(self.raft.election_min_ms), ms(self.raft.election_max_ms)),
            checkpoint_entries: self.raft.checkpoint_entries,
            keep_entries: self.raft.keep_entries,
            move_bytes_per_second: self.placement.move_bytes_per_second,
        }
    }

    /// The effective settings: file < environment < flags, all checked.
    ///
    /// # Errors
    /// Names the setting at fault.
    pub fn load(args: &ServeArgs) -> Result<Config> {
        let mut config = match &args.config {
            Some(path) => Config::read(path)?,
            None => Config::default(),
        };
        config.apply(args);
        if config.name.is_empty() {
            config.name = host_name();
        }
        config.check()?;
        Ok(config)
    }

    fn read(path: &Path) -> Result<Config> {
        let text =
            std::fs::read_to_string(path).with_context(|| format!("config file {}", path.display()))?;
        toml::from_str(&text).with_context(|| format!("config file {}", path.display()))
    }

    fn apply(&mut self, args: &ServeArgs) {
        fn set<T: Clone>(into: &mut T, from: &Option<T>) {
            if let Some(from) = from {
                into.clone_from(from);
            }
        }
        set(&mut self.name, &args.name);
        set(&mut self.data, &args.data);
        set(&mut self.http, &args.http);
        set(&mut self.grpc, &args.grpc);
        set(&mut self.mesh, &args.mesh);
        set(&mut self.advertise, &args.advertise);
        set(&mut self.join, &args.join);
        set(&mut self.expect, &args.expect);
        set(&mut self.api_key, &args.api_key);
        set(&mut self.cluster_secret, &args.cluster_secret);
        set(&mut self.zone, &args.zone);
        set(&mut self.models, &args.models);
        set(&mut self.tls_cert, &args.tls_cert);
        set(&mut self.tls_key, &args.tls_key);
        set(&mut self.log_format, &args.log_format);
        set(&mut self.log_level, &args.log_level);
        set(&mut self.raft.checkpoint_entries, &args.raft_checkpoint_entries);
        set(&mut self.raft.keep_entries, &args.raft_keep_entries);
        set(&mut self.disk_reserve_bytes, &args.disk_reserve);
        set(&mut self.blob_grace_seconds, &args.blob_grace_seconds);
        set(&mut self.limits.working_requests, &args.working_requests);
        set(&mut self.placement.repair_after_seconds, &args.repair_after);
        set(&mut self.placement.split_bytes, &args.split_bytes);
        set(&mut self.placement.sizes_seconds, &args.sizes_seconds);
        set(&mut self.placement.move_bytes_per_second, &args.move_bytes_per_second);
        set(&mut self.backup.target, &args.backup_target);
        set(&mut self.backup.keep, &args.backup_keep);
        self.placement.drain_on_stop |= args.drain_on_stop;
        self.insecure |= args.insecure;
        self.metrics_open |= args.metrics_open;
    }

    fn check(&self) -> Result<()> {
        let is_ascii = |text: &str| text.chars().all(|c| c.is_ascii_graphic());
        ensure!(is_ascii(&self.api_key), "api_key: only visible ASCII characters");
        ensure!(is_ascii(&self.cluster_secret), "cluster_secret: only visible ASCII characters");
        ensure!((1..=1000).contains(&self.expect), "expect: {} is not between 1 and 1000", self.expect);
        ensure!(
            self.expect == 1 || !self.join.is_empty(),
            "expect: {} nodes cannot be found without join",
            self.expect
        );
        let raft = &self.raft;
        ensure!(raft.heartbeat_ms >= 10, "raft.heartbeat_ms: {} is less than 10", raft.heartbeat_ms);
        ensure!(
            raft.election_min_ms > 2 * raft.heartbeat_ms,
            "raft.election_min_ms: must be more than two heartbeats"
        );
        ensure!(
            raft.election_max_ms > raft.election_min_ms,
            "raft.election_max_ms: must be more than election_min_ms"
        );
        ensure!(
            raft.checkpoint_entries >= 100,
            "raft.checkpoint_entries: {} is less than 100",
            raft.checkpoint_entries
        );
        ensure!(
            self.placement.repair_after_seconds >= 5,
            "placement.repair_after_seconds: {} is less than 5",
            self.placement.repair_after_seconds
        );
        ensure!(self.placement.sizes_seconds >= 1, "placement.sizes_seconds: less than 1");
        let pace = self.placement.move_bytes_per_second;
        ensure!(
            pace == 0 || pace >= MIN_MOVE_BYTES_PER_SECOND,
            "placement.move_bytes_per_second: {pace} is neither 0 nor at least {MIN_MOVE_BYTES_PER_SECOND}"
        );
        let target = &self.backup.target;
        ensure!(
            target.is_empty() || target.starts_with('/') || target.starts_with("s3://"),
            "backup.target: {target} is neither the absolute path of a directory nor s3://bucket/prefix"
        );
        ensure!(self.limits.body_bytes <= 60 << 20, "limits.body_bytes: at most 60 MiB fit into the log");
        ensure!(self.limits.header_seconds >= 1, "limits.header_seconds: less than 1");
        ensure!(
            self.limits.idle_seconds >= self.limits.header_seconds,
            "limits.idle_seconds: {} is less than limits.header_seconds",
            self.limits.idle_seconds
        );
        ensure!(self.limits.body_pause_seconds >= 1, "limits.body_pause_seconds: less than 1");
        ensure!(
            self.tls_cert.as_os_str().is_empty() == self.tls_key.as_os_str().is_empty(),
            "tls_cert and tls_key go together"
        );
        let parse = &self.parse;
        ensure!(
            parse.memory_bytes >= MIN_PARSE_BYTES,
            "parse.memory_bytes: {} is less than the {MIN_PARSE_BYTES} that the parser itself takes",
            parse.memory_bytes
        );
        ensure!(parse.cpu_seconds >= 1 && parse.wall_seconds >= 1, "parse: no time at all is left to it");
        self.check_models()?;
        self.check_exposure()
    }

    fn check_models(&self) -> Result<()> {
        for (at, model) in self.http_models.iter().enumerate() {
            let field = |name: &str| format!("http_models[{at}].{name}");
            let is_first = self.http_models[..at].iter().all(|other| other.name != model.name);
            ensure!(!model.name.is_empty() && is_first, "{}: is empty, or is there twice", field("name"));
            let ranges = [
                ("dimension", model.dimension, 1, MAX_VECTOR_DIMENSIONS),
                ("batch", model.batch, 1, 2048),
                ("concurrency", model.concurrency, 1, 1024),
                ("timeout_seconds", model.timeout_seconds as usize, 1, 600),
                ("max_tokens", model.max_tokens, MIN_MODEL_TOKENS, 1 << 20),
            ];
            for (name, value, least, most) in ranges {
                ensure!(
                    (least..=most).contains(&value),
                    "{}: {value} is not between {least} and {most}",
                    field(name)
                );
            }
        }
        Ok(())
    }

    /// Safe by default: an address that others can reach needs a key and TLS.
    fn check_exposure(&self) -> Result<()> {
        let is_open = |address: &SocketAddr| !address.ip().is_loopback();
        let exposed = [self.http, self.grpc, self.mesh].into_iter().find(is_open);
        let Some(address) = exposed.filter(|_| !self.insecure) else { return Ok(()) };
        if self.api_key.is_empty() {
            bail!(
                "refusing to listen on {address} without an API key: set --api-key (and TLS), or say --insecure"
            );
        }
        if is_open(&self.http) && !self.has_tls() {
            bail!(
                "refusing to listen on {address} without TLS: set --tls-cert and --tls-key, or say --insecure"
            );
        }
        let secret = if self.cluster_secret.is_empty() { &self.api_key } else { &self.cluster_secret };
        if secret.len() < MIN_SECRET_CHARS {
            bail!(
                "refusing to listen on {address}: what nodes prove to each other (cluster_secret, or else api_key) has fewer than {MIN_SECRET_CHARS} characters and could be guessed; set a longer one (openssl rand -hex 16), or say --insecure"
            );
        }
        Ok(())
    }

    /// The settings as they may be shown: of a secret only that there is one.
    pub fn masked(mut self) -> Config {
        let keys = self.http_models.iter_mut().map(|model| &mut model.api_key);
        for secret in keys.chain([&mut self.api_key, &mut self.cluster_secret]) {
            if !secret.is_empty() {
                *secret = "(set)".into();
            }
        }
        self
    }

    /// Whether HTTP is served with TLS.
    pub fn has_tls(&self) -> bool {
        !self.tls_cert.as_os_str().is_empty()
    }

    /// What peers prove to each other. Without any setting it is a constant: the node then
    /// listens on loopback only.
    pub fn secret(&self) -> String {
        if !self.cluster_secret.is_empty() {
            return self.cluster_secret.clone();
        }
        blake3::Hasher::new_derive_key("shoal 2026 cluster secret from API key")
            .update(self.api_key.as_bytes())
            .finalize()
            .to_hex()
            .to_string()
    }

    /// An address as other nodes and clients reach it.
    pub fn advertised(&self, address: SocketAddr) -> String {
        match (self.advertise.as_str(), address.ip().is_unspecified()) {
            ("", false) => address.to_string(),
            ("", true) => format!("{}:{}", host_name(), address.port()),
            (host, _) => format!("{host}:{}", address.port()),
        }
    }
}

fn host_name() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    match name.trim() {
        "" => "shoal".into(),
        name => name.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reference_file_is_the_default() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/shoal.toml");
        let reference = Config::read(&path).expect("deploy/shoal.toml loads");
        let text = |config: &Config| toml::to_string(config).expect("serialises");
        assert_eq!(text(&reference), text(&Config::default()), "every setting stands there with its default");
    }

    #[test]
    fn the_pace_of_moves_has_a_floor() {
        let load =
            |pace| Config::load(&ServeArgs { move_bytes_per_second: Some(pace), ..ServeArgs::default() });
        assert!(load(1000).is_err());
        assert_eq!(load(0).expect("no limit").raft().move_bytes_per_second, 0);
        assert_eq!(load(1 << 20).expect("slow").raft().move_bytes_per_second, 1 << 20);
    }

    #[test]
    fn sizes_are_looked_up_now_and_then() {
        let load =
            |seconds| Config::load(&ServeArgs { sizes_seconds: Some(seconds), ..ServeArgs::default() });
        assert!(load(0).is_err());
        assert_eq!(load(2).expect("often").placement.limits().sizes_every, Duration::from_secs(2));
    }

    #[test]
    fn no_secret_is_shown() {
        let settings = r#"
            api_key = "secret-1"
            cluster_secret = "secret-2"
            [[http_models]]
            name = "m"
            base_url = "http://127.0.0.1:1/v1"
            api_key = "secret-3"
            dimension = 2
            [[http_models]]
            name = "open"
            base_url = "http://127.0.0.1:1/v1"
            dimension = 2
        "#;
        let config: Config = toml::from_str(settings).expect("well formed");
        let shown = toml::to_string(&config.masked()).expect("serialises");
        assert!(!shown.contains("secret-"), "{shown}");
        assert_eq!(shown.matches("api_key = \"(set)\"").count(), 2);
        assert_eq!(shown.matches("api_key = \"\"").count(), 1, "what is not set is shown as such");
    }

    #[test]
    fn settings_of_remote_models_are_checked() {
        let refusal = |settings: &str| {
            let model = format!("[[http_models]]\nname = \"m\"\nbase_url = \"http://h\"\n{settings}\n");
            let config: Config = toml::from_str(&model).expect("well formed");
            config.check().err().map(|error| error.to_string()).unwrap_or_default()
        };
        assert_eq!(refusal("dimension = 2"), "");
        for (settings, field) in [
            ("dimension = 0", "dimension"),
            ("dimension = 2\nmax_tokens = 10", "max_tokens"),
            ("dimension = 2\ntimeout_seconds = 0", "timeout_seconds"),
        ] {
            assert!(refusal(settings).starts_with(&format!("http_models[0].{field}: ")), "{settings}");
        }
        let twice = "dimension = 2\n[[http_models]]\nname = \"m\"\nbase_url = \"http://h\"\ndimension = 2";
        assert!(refusal(twice).starts_with("http_models[1].name: "));
    }

    #[test]
    fn exposure_needs_key_and_tls_or_a_word() {
        let open: SocketAddr = "0.0.0.0:6333".parse().expect("an address");
        let args = |api_key: Option<&str>, insecure| ServeArgs {
            http: Some(open),
            api_key: api_key.map(str::to_owned),
            insecure,
            ..ServeArgs::default()
        };
        assert!(Config::load(&args(None, false)).is_err());
        assert!(Config::load(&args(Some("key"), false)).is_err());
        assert!(Config::load(&args(None, true)).is_ok());
        let peers = |api_key: &str| ServeArgs {
            mesh: Some(open),
            api_key: Some(api_key.to_owned()),
            ..ServeArgs::default()
        };
        assert!(Config::load(&peers("guessable")).is_err());
        assert!(Config::load(&peers("0123456789abcdef")).is_ok(), "peers bring their own TLS");
        assert!(Config::load(&ServeArgs::default()).is_ok());
    }
}

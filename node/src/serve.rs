//! `shoal serve`: start-up and shut-down, in order.
//!
//! ```text
//!  up:   log ─▶ config ─▶ models ─▶ gRPC and HTTP listen ─▶ the node finds its cluster and starts
//!  down: signal ─▶ no new connections ─▶ leadership handed over ─▶ requests finish ─▶ node stops
//! ```

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use axum_server::Handle;
use axum_server::accept::NoDelayAcceptor;
use axum_server::tls_rustls::{RustlsAcceptor, RustlsConfig};
use hyper_util::rt::{TokioExecutor, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use shoal_actors::backup::BackupConfig;
use shoal_actors::bootstrap::Discovery;
use shoal_actors::embed::{Embedders, HttpModel, LocalModel, Model};
use shoal_actors::service::PeerService;
use shoal_actors::tls::PeerTls;
use shoal_actors::work::WorkConfig;
use shoal_actors::{NodeConfig, Running, start};
use shoal_raft::Peers;
use shoal_raft::cluster::Addresses;
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::app::App;
use crate::config::{Config, Limits};
use crate::prompt::PromptAcceptor;
use crate::{certificate, grpc, http, log, metrics};

/// How long requests that are under way may go on after a stop was asked for.
const DRAIN: Duration = Duration::from_secs(5);

/// Runs a node until it is told to stop.
///
/// # Errors
/// What keeps it from starting, in words for the operator.
pub async fn run(config: Config) -> Result<()> {
    let mut stop = StopSignals::listen()?;
    let log_level = log::init(config.log_format, &config.log_level)?;
    let recorder = metrics::install()?;
    let app = App::new(config.clone(), recorder, log_level);
    let embedders = embedders(&config).await?;

    let tls = peer_tls(&config)?;
    let peer_service = PeerService::new(&config.name);
    grpc::serve(app.clone(), peer_service.clone(), tls.clone()).await?;
    let handle = Handle::new();
    let mut server = tokio::spawn(serve_http(app.clone(), handle.clone()));
    tokio::spawn(metrics::observe(app.clone()));
    tracing::info!(name = config.name, http = %config.http, grpc = %config.grpc, mesh = %config.mesh, "listening");

    let peers = Peers::new(tls.channels());
    let starting = start(node_config(&config, embedders, tls), peers, peer_service);
    tokio::select! {
        started = starting => app.set_running(started?),
        stopped = &mut server => return stopped.context("HTTP")?,
        () = stop.next() => return Ok(()),
    }
    tracing::info!("ready");
    tokio::select! {
        stopped = &mut server => stopped.context("HTTP")??,
        () = stop.next() => {}
    }
    if config.placement.drain_on_stop
        && let Ok(running) = app.running()
    {
        drain(running, Duration::from_secs(config.placement.drain_seconds), &mut stop).await;
    }
    tracing::info!("stopping: leadership is handed over, requests under way finish");
    handle.graceful_shutdown(Some(DRAIN));
    if let Ok(running) = app.running() {
        running.stop().await;
    }
    drop(tokio::time::timeout(DRAIN, server).await);
    tracing::info!("stopped");
    Ok(())
}

/// Moves everything to other nodes. Requests are served meanwhile; a second signal ends the wait.
async fn drain(running: &Running, patience: Duration, stop: &mut StopSignals) {
    tracing::info!("draining: everything moves to other nodes before this one stops");
    tokio::select! {
        drained = running.drain(Instant::now() + patience) => match drained {
            Ok(()) => tracing::info!("drained"),
            Err(error) => tracing::error!(%error, "this node stops before it is drained"),
        },
        () = stop.next() => tracing::warn!("this node stops before it is drained: it was told again to stop"),
    }
}

async fn serve_http(app: App, handle: Handle<std::net::SocketAddr>) -> Result<()> {
    let config = app.config().clone();
    let service = http::router(app).into_make_service();
    let listener =
        std::net::TcpListener::bind(config.http).with_context(|| format!("HTTP address {}", config.http))?;
    listener.set_nonblocking(true)?;
    let header_timeout = Duration::from_secs(config.limits.header_seconds);
    if config.has_tls() {
        let tls = RustlsConfig::from_pem_file(&config.tls_cert, &config.tls_key)
            .await
            .context("TLS certificate and key")?;
        metrics::set_certificate_expiry(certificate_expiry(&config.tls_cert).await?);
        let acceptor = RustlsAcceptor::new(tls).acceptor(NoDelayAcceptor::new());
        let acceptor = PromptAcceptor::new(acceptor, header_timeout);
        let mut server = axum_server::from_tcp(listener)?.acceptor(acceptor).handle(handle);
        limit_connections(server.http_builder(), &config.limits);
        return Ok(server.serve(service).await?);
    }
    let acceptor = PromptAcceptor::new(NoDelayAcceptor::new(), header_timeout);
    let mut server = axum_server::from_tcp(listener)?.acceptor(acceptor).handle(handle);
    limit_connections(server.http_builder(), &config.limits);
    Ok(server.serve(service).await?)
}

/// How long connections last on which nothing comes after their first words. The library's time for headers of
/// HTTP/1 runs from the end of the request before. With HTTP/2, whoever has been silent for so long is asked
/// whether it is still there.
fn limit_connections(builder: &mut Builder<TokioExecutor>, limits: &Limits) {
    let idle = Duration::from_secs(limits.idle_seconds);
    builder.http1().timer(TokioTimer::new()).header_read_timeout(idle);
    builder
        .http2()
        .timer(TokioTimer::new())
        .keep_alive_interval(idle)
        .keep_alive_timeout(Duration::from_secs(limits.header_seconds));
}

/// When the certificate expires that is served from now on. It is read once: a new one needs a new start.
async fn certificate_expiry(path: &Path) -> Result<i64> {
    let chain = tokio::fs::read(path).await;
    let expires_at = chain.map_err(anyhow::Error::from).and_then(|chain| certificate::expires_at(&chain));
    expires_at.with_context(|| format!("TLS file {}", path.display()))
}

/// SIGTERM and SIGINT from the first moment on: one that comes between two waits is not lost.
struct StopSignals {
    terminate: Signal,
    interrupt: Signal,
}

impl StopSignals {
    fn listen() -> Result<StopSignals> {
        let of = |kind| signal(kind).context("signals");
        Ok(StopSignals { terminate: of(SignalKind::terminate())?, interrupt: of(SignalKind::interrupt())? })
    }

    /// Resolves when the process is asked to stop, for the first time or again.
    async fn next(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}

/// What peers prove to each other; clients of the gRPC port see the certificate of HTTPS.
fn peer_tls(config: &Config) -> Result<PeerTls> {
    let read = |path: &Path| std::fs::read(path).with_context(|| format!("TLS file {}", path.display()));
    let public = match config.has_tls() {
        true => Some((read(&config.tls_cert)?, read(&config.tls_key)?)),
        false => None,
    };
    let public = public.as_ref().map(|(chain, key)| (chain.as_slice(), key.as_slice()));
    Ok(PeerTls::new(&config.secret(), public)?)
}

fn node_config(config: &Config, embedders: Embedders, tls: PeerTls) -> NodeConfig {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    NodeConfig {
        data: config.data.clone(),
        discovery: Discovery {
            name: config.name.clone(),
            zone: config.zone.clone(),
            addresses: Addresses {
                http: config.advertised(config.http),
                grpc: config.advertised(config.grpc),
                mesh: config.advertised(config.mesh),
            },
            join: config.join.clone(),
            expect: config.expect,
        },
        raft: config.raft(),
        log: config.raft.log(),
        secret: config.secret(),
        tls,
        mesh: config.mesh,
        disk_reserve_bytes: config.disk_reserve_bytes,
        blob_grace: Duration::from_secs(config.blob_grace_seconds),
        placement: config.placement.limits(),
        backup: BackupConfig { target: config.backup.target.clone(), keep: config.backup.keep },
        work: WorkConfig {
            embedders,
            parse_limits: config.parse,
            parsers: if config.parsers == 0 { cores } else { config.parsers },
            embedding: 2,
        },
    }
}

/// The models of this node. A missing default model is no reason not to start: points work
/// without it, and whoever needs it is told what to do.
async fn embedders(config: &Config) -> Result<Embedders> {
    let mut models = BTreeMap::new();
    let mut missing = String::new();
    let is_remote = config.http_models.iter().any(|model| model.name == config.default_model);
    if !is_remote {
        let dir = config.models.join(&config.default_model);
        let opened = tokio::task::spawn_blocking(move || LocalModel::open(&dir)).await?;
        match opened {
            Ok(model) => drop(models.insert(config.default_model.clone(), Model::Local(Arc::new(model)))),
            Err(error) => {
                tracing::warn!(
                    reason = error.message,
                    "the embedded model is not there: vector stores cannot be used"
                );
                missing = error.message;
            }
        }
    }
    for remote in &config.http_models {
        let model = HttpModel::new(remote.clone()).map_err(anyhow::Error::from)?;
        models.insert(remote.name.clone(), Model::Http(Arc::new(model)));
    }
    let default = models.contains_key(&config.default_model).then(|| config.default_model.clone());
    Ok(Embedders::new(models, default, config.embedding_cache_bytes, &missing))
}

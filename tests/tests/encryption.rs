//! Nodes talk to each other under TLS and only to those who know the secret.

use std::time::Duration;

use anyhow::{Result, ensure};
use shoal_actors::tls::PeerTls;
use shoal_proto::peer::HelloRequest;
use shoal_proto::peer::peer_client::PeerClient;
use shoal_raft::Peers;
use shoal_tests::{Cluster, Points, Request, point, wait_until};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tonic::Code;
use tonic::transport::{Certificate, ClientTlsConfig, Endpoint};

const SECRET: &str = "secret-of-the-encryption-test";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_nodes_with_the_secret_are_heard() -> Result<()> {
    let mut cluster = Cluster::of(3).env("SHOAL_CLUSTER_SECRET", SECRET).start().await?;
    let any = cluster.any();
    let points = Points::of(&any, "c");
    points.create(3, 3).await?;
    points.upsert(&[point(1, serde_json::json!({}))]).await?;
    let address = cluster.node(0).grpc_address();
    let hello = || HelloRequest { name: "stranger".into(), ..HelloRequest::default() };

    // With the secret; with another one; with TLS but no certificate; in the clear.
    let with = |secret: &str| -> Result<_> {
        let peers = Peers::new(PeerTls::new(secret, None)?.channels());
        peers.client_at(&address).map_err(anyhow::Error::msg)
    };
    ensure!(with(SECRET)?.hello(hello()).await.is_ok(), "a peer is refused");
    let refused = with("another secret of the same length")?.hello(hello()).await;
    ensure!(refused.is_err(), "another secret is accepted");
    let clear = PeerClient::new(Endpoint::from_shared(format!("http://{address}"))?.connect_lazy());
    let refused = { clear }.hello(hello()).await.map_err(|status| status.code());
    ensure!(refused.is_err_and(|code| code == Code::Unauthenticated), "a caller in the clear is heard");
    let nobody = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(""));
    let nobody = Endpoint::from_shared(format!("https://{address}"))?.tls_config(nobody)?.connect_lazy();
    ensure!(PeerClient::new(nobody).hello(hello()).await.is_err(), "a caller without a certificate is heard");

    // The mesh says nothing to who begins in the clear, and a silent stranger holds up nobody.
    let mesh = cluster.node(0).mesh_address();
    let mut silent = Vec::new();
    for _ in 0..8 {
        silent.push(TcpStream::connect(&mesh).await?);
    }
    let mut stranger = TcpStream::connect(&mesh).await?;
    stranger.write_all(&[0, 0, 0, 0, 0, 0, 0, 4, 1, 2, 3, 4]).await?;
    let mut answer = Vec::new();
    let heard = tokio::time::timeout(Duration::from_secs(10), stranger.read_to_end(&mut answer)).await;
    ensure!(heard.is_ok(), "the mesh keeps a stranger's connection open");
    // At most an alert (RFC 8446, section 6): record type 21, seven bytes.
    ensure!(answer.len() <= 7 && answer.first().is_none_or(|kind| *kind == 21), "it answers {answer:?}");
    ensure!(cluster.client(0).metric("shoal_tls_handshake_failures_total").await? > 0.0, "it is not counted");

    // A node of another secret does not get in, and the cluster goes on.
    let at = cluster.place_node()?;
    cluster.node_mut(at).set_env("SHOAL_CLUSTER_SECRET", "guessed");
    cluster.node_mut(at).start()?;
    tokio::time::sleep(Duration::from_secs(3)).await;
    let view = cluster.client(0).json(&Request::get("/admin/cluster")).await?;
    ensure!(
        view["nodes"].as_array().is_some_and(|nodes| nodes.len() == 3),
        "a stranger has joined: {view:#}"
    );
    cluster.node_mut(at).kill()?;

    // Sessions of the mesh stand again after a restart, over TLS as well.
    cluster.node_mut(2).kill()?;
    cluster.node_mut(2).start()?;
    cluster.node_mut(2).ready().await?;
    wait_until(Duration::from_secs(30), "sessions between all nodes", || async {
        let sessions = cluster.client(0).metric("shoal_mesh_sessions").await?;
        Ok((sessions == 2.0).then_some(()))
    })
    .await?;
    drop(silent);
    cluster.finish()
}

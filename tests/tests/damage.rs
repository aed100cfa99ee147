//! A node whose log is damaged must not vote with what is left of it: it gives up its identity,
//! joins as a new node by itself, and gets everything from the others.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use shoal_tests::{Cluster, Freshness, Points, Writers};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flipped_bit_in_the_newest_log_file_makes_it_a_new_node() -> Result<()> {
    let mut cluster = Cluster::of(3).start().await?;
    Points::of(&cluster.any(), "c").create(2, 3).await?;
    cluster.settled().await?;
    let writers = Writers::start(&cluster, "c", 2);
    writers.progress(300).await?;
    let victim = 1;
    cluster.node_mut(victim).kill()?;
    let file = newest_log_file(cluster.node(victim).data_dir())?;
    let mut bytes = fs::read(&file)?;
    let written = bytes.iter().rposition(|byte| *byte != 0).context("an empty log")?;
    bytes[written * 2 / 3] ^= 0x10;
    fs::write(&file, bytes)?;

    let old = cluster.node(0).view().await?.nodes.into_iter().find(|node| node.name == "n2").context("n2")?;
    cluster.restart(victim).await?;
    let log = cluster.node(victim).log();
    ensure!(log.contains("the Raft log is damaged") && log.contains("join as a new node"), "{log}");
    writers.progress(200).await?;
    cluster.settled().await?;
    let new = cluster.node(0).view().await?.nodes.into_iter().find(|node| node.name == "n2").context("n2")?;
    ensure!(new.id > old.id, "it came back as node {} after {}", new.id, old.id);
    ensure!(cluster.node(victim).data_dir().join("damaged/log").is_dir(), "the damaged log is not kept");
    let written = writers.stop().await?;
    written.report("a node gave up its damaged log and came back as a new one");
    for at in 0..cluster.len() {
        written.verify(cluster.client(at), "c", Freshness::Linearizable).await?;
    }
    cluster.converged().await?;
    written.verify(cluster.client(victim), "c", Freshness::Eventual).await?;
    cluster.finish()
}

fn newest_log_file(data: PathBuf) -> Result<PathBuf> {
    let files = fs::read_dir(data.join("log"))?.map(|entry| entry.map(|entry| entry.path()));
    let files = files.collect::<Result<Vec<_>, _>>()?;
    let logs = files.into_iter().filter(|path| path.extension().is_some_and(|end| end == "raftlog"));
    logs.max().context("there is no log file")
}

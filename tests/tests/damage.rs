//! A node whose log is damaged says so and does not start: it must not vote with what is left.
//! With an empty directory it comes back as a new node and gets everything from the others.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use shoal_tests::{Cluster, Freshness, Points, Writers};

/// How long the node may take to refuse.
const REFUSE_DEADLINE: Duration = Duration::from_secs(30);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flipped_bit_in_the_newest_log_file_keeps_the_node_out() -> Result<()> {
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

    cluster.node_mut(victim).start()?;
    let code = cluster.node_mut(victim).exited(REFUSE_DEADLINE).await?;
    let log = cluster.node(victim).log();
    ensure!(code == Some(1), "it ended with {code:?}, not 1:\n{log}");
    ensure!(log.contains("the Raft log is damaged") && log.contains("must not vote"), "{log}");
    writers.progress(200).await?;

    fs::remove_dir_all(cluster.node(victim).data_dir())?;
    cluster.restart(victim).await?;
    cluster.settled().await?;
    let written = writers.stop().await?;
    written.report("a node refused its damaged log and was replaced");
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

//! The power fails: all nodes die at once in the middle of writing, and everything that was
//! acknowledged is there when they are back, also when all of them have new addresses.

use anyhow::Result;
use shoal_tests::{Cluster, Freshness, Points, Writers, Written};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn acknowledged_writes_survive_the_death_of_all_nodes() -> Result<()> {
    let mut cluster = Cluster::of(3).start().await?;
    Points::of(&cluster.any(), "c").create(3, 3).await?;
    cluster.settled().await?;
    let writers = Writers::start(&cluster, "c", 4);
    for _ in 0..3 {
        writers.progress(200).await?;
        // What is in flight now is unknown to its writer, which repeats it until it is answered.
        cluster.kill_all()?;
        cluster.start_all().await?;
    }
    writers.progress(100).await?;
    let written = writers.stop().await?;
    written.report("all nodes killed three times");
    check_everywhere(&cluster, &written).await?;
    cluster.finish()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn all_nodes_return_under_new_addresses() -> Result<()> {
    let mut cluster = Cluster::of(3).start().await?;
    Points::of(&cluster.any(), "c").create(3, 3).await?;
    cluster.settled().await?;
    let writers = Writers::start(&cluster, "c", 4);
    writers.progress(200).await?;
    let before = writers.stop().await?;
    cluster.kill_all()?;
    // Every address in the cluster's state is out of date now; discovery knows the new ones.
    (0..cluster.len()).try_for_each(|at| cluster.node_mut(at).readdress())?;
    cluster.introduce();
    cluster.start_all().await?;
    check_everywhere(&cluster, &before).await?;
    cluster.finish()
}

async fn check_everywhere(cluster: &Cluster, written: &Written) -> Result<()> {
    cluster.settled().await?;
    for at in 0..cluster.len() {
        written.verify(cluster.client(at), "c", Freshness::Linearizable).await?;
    }
    cluster.converged().await?;
    for at in 0..cluster.len() {
        written.verify(cluster.client(at), "c", Freshness::Eventual).await?;
    }
    Ok(())
}

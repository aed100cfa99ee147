//! `make bench`: the numbers of this build on this machine. See [`shoal_tests::bench`].

use anyhow::Result;
use clap::Parser;
use shoal_tests::bench::{Args, run};

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() -> Result<()> {
    run(Args::parse()).await
}

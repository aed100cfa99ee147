//! `make bench`: the numbers of this build on this machine. See [`shoal_tests::bench`].

use anyhow::Result;
use clap::Parser;
use shoal_tests::bench::{Args, run};

fn main() -> Result<()> {
    #[expect(unsafe_code, reason = "see the function")]
    // SAFETY: no other thread runs yet.
    unsafe {
        shoal_actors::embed::use_one_candle_thread();
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(run(Args::parse()))
}

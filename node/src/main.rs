//! The `shoal` binary: one node of a document retrieval cluster, and the commands to use it.

mod admission;
mod app;
mod certificate;
mod cli;
mod config;
mod grpc;
mod http;
mod log;
mod metrics;
mod serve;

use std::process::ExitCode;

use clap::Parser;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    // The child that parses untrusted files must not start a runtime or read a setting.
    if std::env::args().nth(1).as_deref() == Some(shoal_actors::parse::CHILD_COMMAND) {
        return ExitCode::from(shoal_actors::parse::child::main() as u8);
    }
    #[expect(unsafe_code, reason = "see the function")]
    // SAFETY: no other thread runs yet.
    unsafe {
        shoal_actors::embed::use_one_candle_thread();
    }
    rustls::crypto::ring::default_provider().install_default().expect("no provider is installed before main");
    match cli::run(cli::Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("shoal: {error:#}");
            ExitCode::FAILURE
        }
    }
}

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
mod prompt;
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
    tell_of_panics_in_the_log_briefly();
    rustls::crypto::ring::default_provider().install_default().expect("no provider is installed before main");
    match cli::run(cli::Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("shoal: {error:#}");
            ExitCode::from(cli::exit_code(&error))
        }
    }
}

/// The thread that writes the log.
const LOG_THREAD: &str = "raft-log";

/// A failed sync is a panic in the log's writer, which then ends the process. A backtrace of a binary of this
/// size takes seconds, and was seen to take more than half a minute, in which the node would go on as if it
/// could keep a promise.
fn tell_of_panics_in_the_log_briefly() {
    let as_usual = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| match std::thread::current().name() {
        Some(LOG_THREAD) => eprintln!("thread '{LOG_THREAD}' {panic}"),
        _ => as_usual(panic),
    }));
}

//! The load tools behind `benches/compare`: an upstream that costs next to nothing, a bare hyper proxy as the floor to
//! measure against, and clients that measure what stands between them and that upstream.
//!
//! One binary with subcommands, each for a process of its own, so that the operating system tells their costs apart.

mod arguments;
mod client;
mod events;
mod pass_through;
mod pool;
mod process;
mod report;
mod requests;
mod upstream;

use std::process::ExitCode;

const HELP: &str = "\
load: measure what a proxy costs

  load upstream     --listen ADDR
      answers chat completions, JSON and streams, as cheaply as hyper can

  load pass-through --listen ADDR --upstream ADDR [--layout per-core|multi] [--accept reuseport|handoff]
                    [--threads N]
      a proxy that passes everything on and does nothing else

  load requests     --to ADDR [--connections N] [--seconds S | --requests N] [--rate R] [--warm-up S]
                    [--body-bytes N] [--pid PID]
      closed loop, or with --rate open loop: R requests a second, timed from when each was due

  load events       --to ADDR [--streams N] [--events N] [--interval-ms MS] [--body-bytes N] [--pid PID]
      concurrent streams of server-sent events

--pid names the proxy's process, whose CPU time and memory are then reported too (its children's included).
The two clients print one line of JSON: times in microseconds, sizes in bytes.
";

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("load: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), arguments::Failure> {
    let mut parser = lexopt::Parser::from_env();
    match arguments::subcommand(&mut parser)?.as_deref() {
        Some("upstream") => upstream::run(parser),
        Some("pass-through") => pass_through::run(parser),
        Some("requests") => requests::run(parser),
        Some("events") => events::run(parser),
        Some(other) => Err(format!("no subcommand {other:?}; --help lists them").into()),
        None => {
            print!("{HELP}");
            Ok(())
        }
    }
}

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
mod waiters;

use std::process::ExitCode;

const HELP: &str = "\
load: measure what a proxy costs

  load upstream     --listen ADDR
      answers chat completions, JSON and streams, as cheaply as hyper can

  load pass-through --listen ADDR --upstream ADDR [--layout per-core|multi] [--accept reuseport|handoff]
                    [--threads N]
      a proxy that passes everything on and does nothing else

  load requests     --to ADDR [--connections N] [--seconds S | --requests N] [--rate R] [--warm-up S]
                    [--body-bytes N] [--models N] [--clients N] [--pid PID]
      closed loop, or with --rate open loop: R requests a second, timed from when each was due;
      --models and --clients: model-0 and on, the usual key and sk-client-1 and on, in turn

  load events       --to ADDR [--streams N] [--events N] [--interval-ms MS] [--opening-ms MS]
                    [--body-bytes N] [--pid PID]
      concurrent streams of server-sent events, opened evenly over one interval or --opening-ms

  load waiters      --to ADDR --model NAME [--waiters N] [--seconds S] [--body-bytes N]
      takes one slot of the model with a stream that does not end, and sends so many requests behind it, over HTTP/2

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
        Some("waiters") => waiters::run(parser),
        Some(other) => Err(format!("no subcommand {other:?}; --help lists them").into()),
        None => {
            print!("{HELP}");
            Ok(())
        }
    }
}

//! The floor: a proxy on hyper that passes requests on and does nothing else, in each layout of threads that is worth
//! comparing. What weir costs above it is what weir's features cost.

use std::net::SocketAddr;
use std::sync::Arc;
use std::thread;

use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::runtime::{Builder, Runtime};
use tokio::sync::mpsc;

use crate::arguments::{self, Failure, required};
use crate::pool::Pool;

const BACKLOG: u32 = 1024;

#[derive(Clone, Copy)]
enum Layout {
    /// One multi-threaded runtime and one pool.
    Multi,
    /// A single-threaded runtime with its own pool per core; each accepts for itself, the kernel chooses whose.
    ReusePort,
    /// The same, but one thread accepts and deals the connections out in turn.
    Handoff,
}

#[derive(Clone, Copy)]
struct Options {
    listen: SocketAddr,
    upstream: SocketAddr,
    threads: usize,
}

pub fn run(parser: lexopt::Parser) -> Result<(), Failure> {
    let (mut listen, mut upstream) = (None, None);
    let (mut layout, mut accept) = ("per-core".to_owned(), "handoff".to_owned());
    let mut threads = thread::available_parallelism()?.get();
    arguments::options(parser, |name, parser| {
        match name {
            "listen" => listen = Some(arguments::value(parser)?),
            "upstream" => upstream = Some(arguments::value(parser)?),
            "layout" => layout = arguments::value(parser)?,
            "accept" => accept = arguments::value(parser)?,
            "threads" => threads = arguments::value::<usize>(parser)?.max(1),
            _ => return Ok(false),
        }
        Ok(true)
    })?;
    let layout = match (layout.as_str(), accept.as_str()) {
        ("multi", _) => Layout::Multi,
        ("per-core", "reuseport") => Layout::ReusePort,
        ("per-core", "handoff") => Layout::Handoff,
        _ => return Err("--layout is per-core or multi, --accept reuseport or handoff".into()),
    };
    let (listen, upstream) = (required(listen, "--listen")?, required(upstream, "--upstream")?);
    serve(layout, Options { listen, upstream, threads })
}

fn serve(layout: Layout, options: Options) -> Result<(), Failure> {
    match layout {
        Layout::Multi => {
            let runtime = Builder::new_multi_thread().worker_threads(options.threads).enable_all().build()?;
            runtime.block_on(runtime.spawn(accept_here(options)))?
        }
        Layout::ReusePort => {
            let workers: Vec<_> = (0..options.threads)
                .map(|_| thread::spawn(move || single_threaded()?.block_on(accept_here(options))))
                .collect();
            workers.into_iter().try_for_each(|worker| worker.join().expect("a worker does not panic"))
        }
        Layout::Handoff => hand_off(options),
    }
}

fn single_threaded() -> Result<Runtime, Failure> {
    Ok(Builder::new_current_thread().enable_all().build()?)
}

/// Accepts and serves on the runtime it runs on.
async fn accept_here(options: Options) -> Result<(), Failure> {
    let listener = listen(options.listen)?;
    let pool = Pool::new(options.upstream);
    loop {
        let (stream, _) = listener.accept().await?;
        serve_connection(stream, Arc::clone(&pool));
    }
}

fn listen(address: SocketAddr) -> Result<TcpListener, Failure> {
    let socket = TcpSocket::new_v4()?;
    socket.set_reuseaddr(true)?;
    socket.set_reuseport(true)?;
    socket.bind(address)?;
    Ok(socket.listen(BACKLOG)?)
}

/// Accepts on this thread and deals the connections to the workers in turn.
fn hand_off(options: Options) -> Result<(), Failure> {
    let listener = std::net::TcpListener::bind(options.listen)?;
    let workers: Vec<_> = (0..options.threads).map(|_| start_worker(options)).collect();
    for worker in workers.iter().cycle() {
        let (stream, _) = listener.accept()?;
        stream.set_nonblocking(true)?;
        worker.send(stream)?;
    }
    Ok(())
}

fn start_worker(options: Options) -> mpsc::UnboundedSender<std::net::TcpStream> {
    let (sender, mut accepted) = mpsc::unbounded_channel();
    thread::spawn(move || {
        single_threaded()?.block_on(async {
            let pool = Pool::new(options.upstream);
            while let Some(stream) = accepted.recv().await {
                serve_connection(TcpStream::from_std(stream)?, Arc::clone(&pool));
            }
            Ok::<_, Failure>(())
        })
    });
    sender
}

fn serve_connection(stream: TcpStream, pool: Arc<Pool>) {
    // Without it a small write may wait for an acknowledgement; a socket that refuses it is about to fail anyway.
    let _ = stream.set_nodelay(true);
    let service = service_fn(move |request| Arc::clone(&pool).send(request));
    tokio::spawn(async move {
        let _ = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
    });
}

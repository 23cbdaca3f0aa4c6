//! TLS towards clients, over pipes in memory: what is spoken, how slow a handshake may be, how it ends.

use std::io::ErrorKind;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, DuplexStream};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_rustls::rustls::pki_types::{CertificateDer, ServerName};
use tokio_rustls::rustls::{ClientConfig, ClientConnection, RootCertStore};
use weir::config;
use weir::server::{NewCertificate, Tls};

use crate::gateway::{Step, answer, chunk, completion, event, stream_head};
use crate::world::{Answer, CHAT, STREAM, World, chat, collect, over_http2};

const SECOND: Duration = Duration::from_secs(1);

const GET: &str = "GET /v1/models HTTP/1.1\r\nhost: weir.test\r\n\r\n";

const HTTP1: &[u8] = b"http/1.1";
const HTTP2: &[u8] = b"h2";

/// A certificate for weir.test that signed itself, in files.
struct Identity {
    files: config::Tls,
    certificate: CertificateDer<'static>,
}

impl Identity {
    fn new() -> Self {
        let own = rcgen::generate_simple_self_signed(vec!["weir.test".to_owned()]).expect("a certificate");
        let (cert, key) = (file(&own.cert.pem()), file(&own.signing_key.serialize_pem()));
        Self { files: config::Tls { cert, key }, certificate: own.cert.der().clone() }
    }

    fn load(&self) -> Tls {
        Tls::load(&self.files).unwrap_or_else(|error| panic!("{error}"))
    }

    /// A client's handshake on this connection, offering these protocols.
    async fn greet(&self, io: DuplexStream, protocols: &[&[u8]]) -> std::io::Result<TlsStream<DuplexStream>> {
        TlsConnector::from(self.client(protocols)).connect(name(), io).await
    }

    fn client(&self, protocols: &[&[u8]]) -> Arc<ClientConfig> {
        let mut roots = RootCertStore::empty();
        roots.add(self.certificate.clone()).expect("a certificate");
        let mut client = ClientConfig::builder().with_root_certificates(roots).with_no_client_auth();
        client.alpn_protocols = protocols.iter().map(|protocol| protocol.to_vec()).collect();
        Arc::new(client)
    }

    /// The first bytes of a handshake.
    fn hello(&self) -> Vec<u8> {
        let mut client = ClientConnection::new(self.client(&[]), name()).expect("a client");
        let mut hello = Vec::new();
        client.write_tls(&mut hello).expect("memory takes everything");
        hello
    }
}

fn name() -> ServerName<'static> {
    ServerName::try_from("weir.test").expect("a name")
}

/// A file of its own with this text.
fn file(text: &str) -> PathBuf {
    static NUMBER: AtomicUsize = AtomicUsize::new(0);
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    let file = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("tls-{}-{number}.pem", std::process::id()));
    std::fs::write(&file, text).expect("cargo gives tests a directory");
    file
}

/// Everything until the connection ends, and how it ends.
async fn read_all(io: &mut (impl AsyncRead + Unpin)) -> (String, std::io::Result<usize>) {
    let mut bytes = Vec::new();
    let ended = io.read_to_end(&mut bytes).await;
    (String::from_utf8_lossy(&bytes).into_owned(), ended)
}

fn failed_handshakes(world: &World) -> f64 {
    world.metric("weir_tls_handshake_failures_total")
}

async fn ask_http1(io: impl AsyncRead + AsyncWrite + Send + Unpin + 'static) -> Answer {
    let (mut sender, connection) = http1::handshake(TokioIo::new(io)).await.expect("weir speaks HTTP");
    tokio::spawn(connection);
    collect(sender.send_request(chat(CHAT)).await.expect("an answer")).await
}

#[tokio::test(start_paused = true)]
async fn what_is_spoken_is_what_both_agree_on() {
    let identity = Identity::new();
    let (world, tls) = (World::new("", |_| completion()), identity.load());
    for (offered, agreed) in
        [(&[HTTP2, HTTP1][..], Some(HTTP2)), (&[HTTP1, HTTP2], Some(HTTP2)), (&[HTTP1], Some(HTTP1)), (&[], None)]
    {
        let io = identity.greet(world.connect_to_tls(&tls), offered).await.expect("they agree");
        assert_eq!(io.get_ref().1.alpn_protocol(), agreed, "{offered:?}");
        let answer = if agreed == Some(HTTP2) {
            let builder = http2::Builder::new(TokioExecutor::new()).timer(TokioTimer::new()).clone();
            let (mut sender, connection) = builder.handshake(TokioIo::new(io)).await.expect("weir speaks HTTP/2");
            tokio::spawn(connection);
            collect(sender.send_request(over_http2(chat(CHAT))).await.expect("an answer")).await
        } else {
            ask_http1(io).await
        };
        assert_eq!((answer.status.as_u16(), answer.broken), (200, false));
    }
    identity.greet(world.connect_to_tls(&tls), &[b"spdy/3"]).await.expect_err("nothing to agree on");
    world.settle().await;
    assert_eq!(failed_handshakes(&world), 1.0);
    world.assert_nothing_held();
}

#[tokio::test(start_paused = true)]
async fn a_handshake_has_header_timeout_however_it_drips_and_the_head_has_it_again() {
    let identity = Identity::new();
    let (world, tls) = (World::new("[server]\nheader_timeout = \"10s\"\n", |_| completion()), identity.load());
    let mut silent = world.connect_to_tls(&tls);
    assert_eq!((read_all(&mut silent).await.0.as_str(), world.elapsed()), ("", 10_000));
    let mut dripping = world.connect_to_tls(&tls);
    for byte in identity.hello() {
        tokio::time::sleep(SECOND).await;
        if dripping.write_all(&[byte]).await.is_err() {
            break;
        }
    }
    assert!((20_000..=21_000).contains(&world.elapsed()), "{}", world.elapsed());
    assert_eq!(failed_handshakes(&world), 2.0);
    let mut agreed = identity.greet(world.connect_to_tls(&tls), &[HTTP1]).await.expect("they agree");
    let begun = world.elapsed();
    let (read, ended) = read_all(&mut agreed).await;
    assert_eq!((read.as_str(), world.elapsed() - begun), ("", 10_000));
    ended.expect("an orderly end");
    assert_eq!(failed_handshakes(&world), 2.0);
}

#[tokio::test(start_paused = true)]
async fn what_is_no_tls_gets_no_answer_and_reaches_nobody() {
    let identity = Identity::new();
    let (world, tls) = (World::new("", |_| completion()), identity.load());
    let garbage = [b"\x16\x03\x01\xff\xff".as_slice(), &[0xff; 20_000]].concat();
    for bytes in [b"\x80\x2e\x01\x00\x02".as_slice(), b"\r\n\r\n", b"\x16\x03\x01", &garbage] {
        let mut client = world.connect_to_tls(&tls);
        // It may be closed before it has taken everything.
        let _ = client.write_all(bytes).await;
        let _ = client.shutdown().await;
        let (answer, _) = read_all(&mut client).await;
        assert!(!answer.contains("HTTP"), "{answer}");
    }
    assert_eq!((failed_handshakes(&world), world.elapsed(), world.gateway.seen().len()), (4.0, 0, 0));
}

#[tokio::test(start_paused = true)]
async fn who_speaks_http_without_tls_is_told_so_and_reaches_nobody() {
    let identity = Identity::new();
    let (world, tls) = (World::new("[server]\nheader_timeout = \"10s\"\n", |_| completion()), identity.load());
    let long = format!("POST /v1/files HTTP/1.1\r\ncontent-length: 200000\r\n\r\n{}", "x".repeat(200_000));
    for bytes in [GET, "G", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", &long] {
        let mut client = world.connect_to_tls(&tls);
        client.write_all(bytes.as_bytes()).await.expect("it is read to its end");
        let (answer, ended) = read_all(&mut client).await;
        ended.expect("an orderly end");
        let (head, body) = answer.split_once("\r\n\r\n").expect("a head");
        assert!(head.starts_with("HTTP/1.1 400 Bad Request\r\nconnection: close\r\n"), "{head}");
        let error: serde_json::Value = serde_json::from_str(body).expect("an error is JSON");
        assert_eq!(error["error"]["code"], "bad_request");
        assert!(error["error"]["message"].as_str().expect("a message").contains("https://"), "{error}");
    }
    // Who goes on and on is cut off when a handshake would be.
    let (mut endless, begun) = (world.connect_to_tls(&tls), world.elapsed());
    while endless.write_all(GET.as_bytes()).await.is_ok() {
        tokio::time::sleep(SECOND).await;
    }
    assert!((10_000..=11_000).contains(&(world.elapsed() - begun)), "{}", world.elapsed() - begun);
    assert_eq!((failed_handshakes(&world), world.gateway.seen().len()), (5.0, 0));
    world.assert_nothing_held();
}

#[tokio::test(start_paused = true)]
async fn a_connection_ends_in_order_and_a_cut_answer_does_not() {
    let identity = Identity::new();
    let tls = identity.load();
    let world = World::new("[server]\nkeep_alive = \"75s\"\n", |seen| match seen.head.contains("models") {
        true => answer(200, &[], "{}"),
        false => vec![stream_head(), event("one"), Step::Close],
    });
    // Idle for too long, and asked to end.
    let mut idle = identity.greet(world.connect_to_tls(&tls), &[HTTP1]).await.expect("they agree");
    idle.write_all(GET.as_bytes()).await.expect("weir reads");
    read_all(&mut idle).await.1.expect("it ends in order");
    assert_eq!(world.elapsed(), 75_000);
    let mut ending = identity.greet(world.connect_to_tls(&tls), &[HTTP1]).await.expect("they agree");
    let last = GET.replace("\r\n\r\n", "\r\nconnection: close\r\n\r\n");
    ending.write_all(last.as_bytes()).await.expect("weir reads");
    read_all(&mut ending).await.1.expect("it ends in order");
    // HTTP/1.0 knows an answer's end by the connection's: this must not look like one.
    let mut cut = identity.greet(world.connect_to_tls(&tls), &[]).await.expect("they agree");
    let upload = "POST /v1/other HTTP/1.0\r\nhost: weir.test\r\ncontent-length: 2\r\n\r\n{}";
    cut.write_all(upload.as_bytes()).await.expect("weir reads");
    let (read, ended) = read_all(&mut cut).await;
    assert!(read.contains("200 OK") && read.contains("one"), "{read}");
    assert_eq!(ended.expect_err("it is cut").kind(), ErrorKind::UnexpectedEof);
    world.assert_nothing_held();
}

#[tokio::test(start_paused = true)]
async fn a_client_that_hangs_up_gives_everything_back_in_order_or_not() {
    let identity = Identity::new();
    let (world, tls) = (World::new("", |_| vec![Step::Stall]), identity.load());
    for (round, in_order) in [true, false].into_iter().enumerate() {
        let mut client = identity.greet(world.connect_to_tls(&tls), &[HTTP1]).await.expect("they agree");
        let request = format!(
            "POST /v1/chat/completions HTTP/1.1\r\nhost: weir.test\r\ncontent-length: {}\r\n\r\n{CHAT}",
            CHAT.len()
        );
        client.write_all(request.as_bytes()).await.expect("weir reads");
        client.flush().await.expect("weir reads");
        world.gateway.saw(round + 1).await;
        if in_order {
            client.shutdown().await.expect("weir reads");
        }
        drop(client);
        world.settle().await;
        world.assert_nothing_held();
    }
    // A body that is cut short is no whole request.
    let mut cut = identity.greet(world.connect_to_tls(&tls), &[HTTP1]).await.expect("they agree");
    let request =
        "POST /v1/chat/completions HTTP/1.1\r\nhost: weir.test\r\ntransfer-encoding: chunked\r\n\r\n2\r\n{}\r\n";
    cut.write_all(request.as_bytes()).await.expect("weir reads");
    cut.flush().await.expect("weir reads");
    drop(cut);
    world.settle().await;
    assert_eq!(world.gateway.seen().len(), 2);
    world.assert_nothing_held();
}

#[tokio::test(start_paused = true)]
async fn a_client_that_stops_reading_is_cut_after_write_timeout_over_tls_too() {
    let identity = Identity::new();
    let piece = chunk(&format!("data: {}\n\n", "x".repeat(16 << 10)));
    let endless: Vec<Step> =
        [stream_head(), event("one")].into_iter().chain(std::iter::repeat_n(piece, 1024)).collect();
    let (world, tls) = (World::new("[server]\nwrite_timeout = \"60s\"\n", move |_| endless.clone()), identity.load());
    let mut client = identity.greet(world.connect_to_tls(&tls), &[HTTP1]).await.expect("they agree");
    let request = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nhost: weir.test\r\ncontent-length: {}\r\n\r\n{STREAM}",
        STREAM.len()
    );
    client.write_all(request.as_bytes()).await.expect("weir reads");
    client.flush().await.expect("weir reads");
    tokio::time::sleep(59 * SECOND).await;
    assert!(world.gateway.sent() < 2 << 20, "{} bytes are held somewhere", world.gateway.sent());
    assert_eq!(world.in_flight_and_waiting(), (1.0, 0.0));
    tokio::time::sleep(2 * SECOND).await;
    world.assert_nothing_held();
}

#[tokio::test(start_paused = true)]
async fn a_new_certificate_is_for_new_handshakes_and_a_bad_one_changes_nothing() {
    let (old, new) = (Identity::new(), Identity::new());
    let (world, tls) = (World::new("", |_| completion()), old.load());
    let before = old.greet(world.connect_to_tls(&tls), &[HTTP1]).await.expect("they agree");
    let crossed = config::Tls { cert: old.files.cert.clone(), key: new.files.key.clone() };
    let refused = NewCertificate::read(&crossed).err().expect("the key is another's");
    assert!(refused.contains("is not that of the certificate"));
    old.greet(world.connect_to_tls(&tls), &[]).await.expect("it is the old one still");
    tls.show(NewCertificate::read(&new.files).expect("a good one"));
    new.greet(world.connect_to_tls(&tls), &[]).await.expect("it is the new one");
    old.greet(world.connect_to_tls(&tls), &[]).await.expect_err("not the old one");
    assert_eq!(ask_http1(before).await.status, 200, "what was agreed on before goes on");
}

#[test]
fn files_that_are_no_certificate_and_key_are_named() {
    let (good, other) = (Identity::new().files, Identity::new().files);
    let read = |file: &PathBuf| std::fs::read_to_string(file).expect("it was written");
    let encrypted = read(&good.key).replace("PRIVATE KEY", "ENCRYPTED PRIVATE KEY");
    let broken = "-----BEGIN PRIVATE KEY-----\n!!secret!!\n-----END PRIVATE KEY-----\n";
    let nonsense = "-----BEGIN PRIVATE KEY-----\nc2VjcmV0\n-----END PRIVATE KEY-----\n";
    let no_der = "-----BEGIN CERTIFICATE-----\nc2VjcmV0\n-----END CERTIFICATE-----\n";
    for (cert, key, what) in [
        (PathBuf::from("/nowhere/cert.pem"), good.key.clone(), "server.tls.cert: cannot read /nowhere/cert.pem"),
        (good.cert.clone(), PathBuf::from("/nowhere/key.pem"), "server.tls.key: cannot read /nowhere/key.pem"),
        (file(""), good.key.clone(), "server.tls.cert: there is no certificate in"),
        (good.key.clone(), good.key.clone(), "server.tls.cert: there is no certificate in"),
        (file(no_der), good.key.clone(), "server.tls.cert: the first certificate in"),
        (good.cert.clone(), good.cert.clone(), "server.tls.key: there is no key in"),
        (good.cert.clone(), file(&encrypted), "without a password"),
        (good.cert.clone(), file(broken), "is not PEM"),
        (good.cert.clone(), file(nonsense), "of a kind that weir does not know"),
        (good.cert.clone(), other.key.clone(), "is not that of the certificate"),
    ] {
        let message = Tls::load(&config::Tls { cert, key }).expect_err(what);
        assert!(message.contains(what) && !message.contains("secret"), "{what}: {message}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_handshake_that_crosses_the_drain_is_finished_and_its_request_answered() {
    let identity = Identity::new();
    let (world, tls) = (World::new("", |_| completion()), identity.load());
    let (crossing, mut silent) = (world.connect_to_tls(&tls), world.connect_to_tls(&tls));
    world.settle().await;
    world.drain();
    let io = identity.greet(crossing, &[HTTP1]).await.expect("they agree");
    let answer = ask_http1(io).await;
    assert_eq!((answer.status.as_u16(), answer.header("connection"), world.elapsed()), (200, "close", 0));
    assert_eq!((read_all(&mut silent).await.0.as_str(), world.elapsed()), ("", 1000));
    // weir was told to go, and the client did nothing wrong.
    assert_eq!(failed_handshakes(&world), 0.0);
}

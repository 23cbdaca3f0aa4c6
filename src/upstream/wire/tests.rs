use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use http::{HeaderMap, HeaderValue, Method, Uri};
use http_body::Body;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, BufStream, DuplexStream};
use tokio::sync::mpsc;
use tokio_rustls::rustls::pki_types::PrivatePkcs8KeyDer;
use tokio_rustls::rustls::{ClientConfig, RootCertStore, ServerConfig};
use tokio_rustls::server::TlsStream;
use tokio_rustls::{TlsAcceptor, TlsConnector};

use super::super::{BodyFault, Streamed};
use super::*;

/// A body, or a piece of one, longer than this is written from where it is.
const MAX_COPIED: usize = 16 << 10;

const FINE: &[u8] = b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nfine";

/// A connection, and the gateway's end of it.
fn connected() -> (Wire, DuplexStream) {
    let (ours, gateways) = tokio::io::duplex(1 << 20);
    (Wire::new(Box::new(ours)), gateways)
}

/// The same over a connection that takes and brings only a few bytes at once.
fn connected_narrowly(most_read: usize, most_written: usize) -> (Wire, DuplexStream) {
    let (io, gateways) = tokio::io::duplex(1 << 20);
    (Wire::new(Box::new(Narrow { io, most_read, most_written, rested: false })), gateways)
}

/// Reads and writes little at once, and writes only every other time that it is asked to.
struct Narrow {
    io: DuplexStream,
    most_read: usize,
    most_written: usize,
    rested: bool,
}

impl AsyncRead for Narrow {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let mut room = vec![0; self.most_read.min(buf.remaining())];
        let mut part = ReadBuf::new(&mut room);
        ready!(Pin::new(&mut self.io).poll_read(cx, &mut part))?;
        buf.put_slice(part.filled());
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Narrow {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.rested = !self.rested;
        if self.rested {
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        let most = self.most_written.min(bytes.len());
        Pin::new(&mut self.io).poll_write(cx, &bytes[..most])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let together: Vec<u8> = bufs.iter().flat_map(|buf| buf.iter().copied()).collect();
        self.poll_write(cx, &together)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

/// How the gateway's side of a connection ends.
type End = fn() -> io::Result<()>;

/// Takes nothing, and brings these bytes once it was written to; then it ends like this.
struct TakesNothing {
    brings: &'static [u8],
    end: End,
    refused: Arc<AtomicUsize>,
}

impl AsyncRead for TakesNothing {
    fn poll_read(mut self: Pin<&mut Self>, _: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.refused.load(Ordering::Relaxed) == 0 {
            return Poll::Pending;
        }
        let brings = std::mem::take(&mut self.brings);
        buf.put_slice(brings);
        Poll::Ready(if brings.is_empty() { (self.end)() } else { Ok(()) })
    }
}

impl AsyncWrite for TakesNothing {
    fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, _: &[u8]) -> Poll<io::Result<usize>> {
        self.refused.fetch_add(1, Ordering::Relaxed);
        Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

fn takes_nothing(brings: &'static [u8], end: End) -> Wire {
    Wire::new(Box::new(TakesNothing { brings, end, refused: Arc::default() }))
}

/// A connection with TLS, whose bytes wait in a small pipe, and the gateway's end of it.
async fn connected_with_tls() -> (Wire, TlsStream<DuplexStream>) {
    let own = rcgen::generate_simple_self_signed(vec!["gateway".to_owned()]).expect("a certificate");
    let certificate = own.cert.der().clone();
    let key = PrivatePkcs8KeyDer::from(own.signing_key.serialize_der()).into();
    let mut roots = RootCertStore::empty();
    roots.add(certificate.clone()).expect("it is one");
    let server = ServerConfig::builder().with_no_client_auth().with_single_cert(vec![certificate], key);
    let client = ClientConfig::builder().with_root_certificates(roots).with_no_client_auth();
    let (ours, gateways) = tokio::io::duplex(1000);
    let name = "gateway".try_into().expect("a name");
    let connector = TlsConnector::from(Arc::new(client));
    let acceptor = TlsAcceptor::from(Arc::new(server.expect("key and certificate match")));
    let (ours, gateways) = tokio::try_join!(connector.connect(name, ours), acceptor.accept(gateways)).expect("TLS");
    (Wire::new(Box::new(ours)), gateways)
}

/// A client's body, piece by piece.
struct Pieces {
    pieces: mpsc::UnboundedReceiver<Result<Bytes, BodyFault>>,
    length: Option<u64>,
}

impl Body for Pieces {
    type Data = Bytes;
    type Error = BodyFault;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyFault>>> {
        self.pieces.poll_recv(cx).map(|piece| piece.map(|piece| piece.map(Frame::data)))
    }

    fn size_hint(&self) -> SizeHint {
        self.length.map_or_else(SizeHint::default, SizeHint::with_exact)
    }
}

type Client = mpsc::UnboundedSender<Result<Bytes, BodyFault>>;

/// An upload whose length is known or not, and the client that sends it.
fn upload(length: Option<u64>) -> (Client, Payload) {
    let (client, pieces) = mpsc::unbounded_channel();
    (client, Payload::Streamed(Streamed::new(Bytes::new(), Pieces { pieces, length })))
}

fn give(client: &Client, piece: &[u8]) {
    client.send(Ok(Bytes::copy_from_slice(piece))).expect("the body is still there");
}

fn whole(body: &[u8]) -> Payload {
    Payload::Whole(Bytes::copy_from_slice(body))
}

fn ask(method: Method) -> Outgoing {
    let fields =
        [("host", "gateway")].map(|(name, value)| (name.parse().expect("a name"), HeaderValue::from_static(value)));
    Outgoing::new(method, &Uri::from_static("/v1/x"), &HeaderMap::from_iter(fields), |_| true)
}

/// What a POST begins with, but for what frames its body.
const POST: &[u8] = b"POST /v1/x HTTP/1.1\r\nhost: gateway\r\n";

/// A body of that length in which each byte tells its place.
fn body(length: usize) -> Vec<u8> {
    (0..length).map(|at| (at % 251) as u8).collect()
}

/// What a call of that body is in bytes.
fn posted(body: &[u8]) -> Vec<u8> {
    [POST, format!("content-length: {}\r\n\r\n", body.len()).as_bytes(), body].concat()
}

async fn rest(wire: &mut Wire, mut reader: Reader) -> Result<Vec<u8>, WireError> {
    let mut body = Vec::new();
    while let Some(frame) = poll_fn(|cx| reader.poll_frame(wire, cx)).await {
        body.extend(frame?.into_data().unwrap_or_default());
    }
    assert!(reader.is_done());
    Ok(body)
}

/// Asks for an answer's status and body.
async fn exchange(wire: &mut Wire, method: Method, payload: Payload) -> Result<(u16, Vec<u8>), WireError> {
    let (head, reader) = wire.exchange(&ask(method), payload).await.map_err(|unanswered| unanswered.error)?;
    Ok((head.status.as_u16(), rest(wire, reader).await?))
}

/// Lets everything else go on until it waits.
async fn settle() {
    for _ in 0..100 {
        tokio::task::yield_now().await;
    }
}

async fn expect(gateway: &mut (impl AsyncRead + Unpin), bytes: &[u8]) {
    let mut read = vec![0; bytes.len()];
    gateway.read_exact(&mut read).await.expect("it is sent");
    assert!(read == bytes, "{} is not {}", read.escape_ascii(), bytes.escape_ascii());
}

async fn send(gateway: &mut (impl AsyncWrite + Unpin), bytes: &[u8]) {
    gateway.write_all(bytes).await.expect("there is room");
    gateway.flush().await.expect("there is room");
}

#[tokio::test]
async fn a_connection_with_bytes_of_its_own_is_never_quiet_again() {
    let (mut wire, mut gateway) = connected();
    assert!(wire.is_quiet());
    send(&mut gateway, b"\r\n").await;
    for look in 0..4 {
        assert!(!wire.is_quiet(), "look {look}");
    }
    assert!(!wire.may_be_reused());
}

#[tokio::test]
async fn a_closed_connection_is_not_quiet_for_a_task_that_has_had_its_turn() {
    let (mut wire, gateway) = connected();
    drop(gateway);
    poll_fn(|cx| {
        while let Poll::Ready(progress) = tokio::task::coop::poll_proceed(cx) {
            progress.made_progress();
        }
        assert!(!wire.is_quiet());
        Poll::Ready(())
    })
    .await;
}

#[tokio::test]
async fn an_answer_is_the_same_however_it_is_cut_and_its_connection_carries_another() {
    let kept = [
        ("HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello", "hello"),
        ("HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n", ""),
        ("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nhe\r\n3;a\r\nllo\r\n0\r\n\r\n", "hello"),
        ("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\nx-sum: 1\r\n\r\n", "hello"),
        ("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n0\r\nx-sum: 1\r\n\r\n", ""),
        ("HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\nHTTP/1.1 204 No Content\r\n\r\n", ""),
        ("HTTP/1.0 200 OK\nconnection: keep-alive\ncontent-length: 5\n\nhello", "hello"),
    ];
    for (answer, expected) in kept {
        for most_read in [1, 2, 3, 7, READ_SIZE] {
            let (mut wire, mut gateway) = connected_narrowly(most_read, usize::MAX);
            for request in 0..2 {
                let (answered, ()) = tokio::join!(exchange(&mut wire, Method::POST, whole(b"{}")), async {
                    expect(&mut gateway, &posted(b"{}")).await;
                    send(&mut gateway, answer.as_bytes()).await;
                });
                let (_, body) = answered.unwrap_or_else(|error| panic!("{answer:?}, {most_read}, {request}: {error}"));
                assert_eq!(body, expected.as_bytes(), "{answer:?}, {most_read}");
                assert!(wire.may_be_reused() && wire.is_quiet(), "{answer:?}, {most_read}");
            }
        }
    }
}

#[tokio::test]
async fn bytes_behind_an_answer_end_its_connection() {
    let answers = [
        (Method::GET, "HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello!"),
        (Method::GET, "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n!"),
        (Method::GET, "HTTP/1.1 204 No Content\r\n\r\n!"),
        (Method::HEAD, "HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello"),
    ];
    for (method, answer) in answers {
        for most_read in [1, 4, answer.len() - 1, READ_SIZE] {
            let (mut wire, mut gateway) = connected_narrowly(most_read, usize::MAX);
            let sent = async {
                let mut asked = [0; 1000];
                let _asked = gateway.read(&mut asked).await.expect("it is sent");
                send(&mut gateway, answer.as_bytes()).await;
            };
            let (answered, ()) = tokio::join!(exchange(&mut wire, method.clone(), whole(b"")), sent);
            answered.expect("an answer");
            assert!(!wire.may_be_reused() || !wire.is_quiet(), "{answer:?}, {most_read}");
        }
    }
}

#[tokio::test]
async fn a_body_until_the_end_of_the_connection_ends_in_good_order_or_is_broken() {
    let ends: [(End, bool); 2] = [(|| Ok(()), true), (|| Err(io::ErrorKind::UnexpectedEof.into()), false)];
    for (end, in_good_order) in ends {
        let mut wire = takes_nothing(b"HTTP/1.1 200 OK\r\n\r\nhello", end);
        let answered = exchange(&mut wire, Method::GET, whole(b"")).await;
        assert_eq!(answered.is_ok(), in_good_order);
        assert!(!wire.may_be_reused());
    }
}

#[tokio::test]
async fn what_ends_too_early_is_an_error() {
    let cut = [
        "HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhell",
        "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n4\r\nhell\r\n0\r\n",
    ];
    for answer in cut {
        for end in 0..answer.len() {
            let (mut wire, mut gateway) = connected();
            let sent = async move {
                expect(&mut gateway, &posted(b"")).await;
                send(&mut gateway, &answer.as_bytes()[..end]).await;
            };
            let (answered, ()) = tokio::join!(exchange(&mut wire, Method::POST, whole(b"")), sent);
            match answered.expect_err("it is cut") {
                WireError::Closed => assert_eq!(end, 0),
                WireError::Truncated => assert_ne!(end, 0),
                error => panic!("{end}: {error}"),
            }
        }
    }
}

#[tokio::test]
async fn a_call_reaches_the_gateway_byte_for_byte_however_little_is_taken_at_once() {
    for length in [0, 1, MAX_COPIED, MAX_COPIED + 1, 100_000] {
        for most_written in [1, 1000, usize::MAX] {
            let (mut wire, mut gateway) = connected_narrowly(READ_SIZE, most_written);
            let body = body(length);
            let (answered, ()) = tokio::join!(exchange(&mut wire, Method::POST, whole(&body)), async {
                expect(&mut gateway, &posted(&body)).await;
                send(&mut gateway, FINE).await;
            });
            assert_eq!(answered.expect("an answer"), (200, b"fine".to_vec()));
            assert!(wire.may_be_reused(), "{length}, {most_written}");
        }
    }
}

#[tokio::test]
async fn an_upload_reaches_the_gateway_in_chunks_or_with_its_length() {
    let pieces = [body(5), vec![], body(MAX_COPIED), body(MAX_COPIED + 1), body(1), body(40_000)];
    let all = pieces.concat();
    let begun = Bytes::from_static(b"begun");
    let chunk = |piece: &[u8]| match piece {
        [] => Vec::new(),
        piece => [format!("{:x}\r\n", piece.len()).as_bytes(), piece, b"\r\n"].concat(),
    };
    let chunks: Vec<u8> = std::iter::once(&begun[..]).chain(pieces.iter().map(Vec::as_slice)).flat_map(chunk).collect();
    let in_chunks = [POST, b"transfer-encoding: chunked\r\n\r\n", &chunks, b"0\r\n\r\n"].concat();
    let with_length = posted(&[&begun[..], &all].concat());
    for (length, expected) in [(Some(all.len() as u64), with_length), (None, in_chunks)] {
        for most_written in [1, 1000, usize::MAX] {
            let (mut wire, mut gateway) = connected_narrowly(READ_SIZE, most_written);
            let (client, received) = mpsc::unbounded_channel();
            let payload = Payload::Streamed(Streamed::new(begun.clone(), Pieces { pieces: received, length }));
            pieces.iter().for_each(|piece| give(&client, piece));
            drop(client);
            let (answered, ()) = tokio::join!(exchange(&mut wire, Method::POST, payload), async {
                expect(&mut gateway, &expected).await;
                send(&mut gateway, FINE).await;
            });
            assert_eq!(answered.expect("an answer"), (200, b"fine".to_vec()));
            assert!(wire.may_be_reused() && wire.is_quiet(), "{length:?}, {most_written}");
        }
    }
}

#[tokio::test]
async fn an_upload_without_a_byte_ends_too() {
    let (mut wire, mut gateway) = connected();
    let (client, payload) = upload(None);
    drop(client);
    let (answered, ()) = tokio::join!(exchange(&mut wire, Method::POST, payload), async {
        expect(&mut gateway, &[POST, b"transfer-encoding: chunked\r\n\r\n0\r\n\r\n"].concat()).await;
        send(&mut gateway, FINE).await;
    });
    answered.expect("an answer");
    assert!(wire.may_be_reused());
}

#[tokio::test]
async fn what_came_of_an_upload_does_not_wait_for_the_rest() {
    // Nothing leaves this one before it is flushed.
    let (ours, mut gateway) = tokio::io::duplex(1 << 20);
    let mut wire = Wire::new(Box::new(BufStream::with_capacity(100, 1 << 20, ours)));
    let (client, payload) = upload(Some(10));
    let (answered, ()) = tokio::join!(exchange(&mut wire, Method::POST, payload), async {
        expect(&mut gateway, &[POST, b"content-length: 10\r\n\r\n"].concat()).await;
        give(&client, b"hello");
        expect(&mut gateway, b"hello").await;
        give(&client, b"again");
        drop(client);
        expect(&mut gateway, b"again").await;
        send(&mut gateway, FINE).await;
    });
    answered.expect("an answer");
    assert!(wire.may_be_reused());
}

#[tokio::test]
async fn an_upload_goes_on_while_its_answer_is_read_by_another_task() {
    let (mut wire, mut gateway) = connected();
    let (client, payload) = upload(None);
    let asked = ask(Method::POST);
    let (answered, ()) = tokio::join!(wire.exchange(&asked, payload), async {
        expect(&mut gateway, &[POST, b"transfer-encoding: chunked\r\n\r\n"].concat()).await;
        send(&mut gateway, b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n").await;
    });
    let Ok((_, reader)) = answered else { panic!("there is an answer") };
    let reading = tokio::spawn(async move {
        let body = rest(&mut wire, reader).await.expect("a body");
        (body, wire.may_be_reused())
    });
    settle().await;
    // Echoes each piece.
    for piece in [b"one", b"two"] {
        give(&client, piece);
        settle().await;
        let mut read = [0; 100];
        let length = gateway.read(&mut read).await.expect("it is sent");
        assert!(read[..length].ends_with(piece));
        send(&mut gateway, &[b"3\r\n", &piece[..], b"\r\n"].concat()).await;
        settle().await;
    }
    drop(client);
    expect(&mut gateway, b"\r\n0\r\n\r\n").await;
    send(&mut gateway, b"0\r\n\r\n").await;
    assert_eq!(reading.await.expect("no panic"), (b"onetwo".to_vec(), true));
}

#[tokio::test]
async fn an_answer_before_its_upload_is_through_ends_the_connection() {
    let (mut wire, mut gateway) = connected();
    let (_client, payload) = upload(Some(10));
    let (answered, ()) = tokio::join!(exchange(&mut wire, Method::POST, payload), async {
        expect(&mut gateway, &[POST, b"content-length: 10\r\n\r\n"].concat()).await;
        send(&mut gateway, b"HTTP/1.1 413 Too Large\r\ncontent-length: 0\r\n\r\n").await;
    });
    assert_eq!(answered.expect("an answer").0, 413);
    assert!(!wire.may_be_reused());
}

#[tokio::test]
async fn an_upload_that_breaks_off_is_the_clients_fault_before_the_answer_and_no_matter_behind_its_head() {
    let fault = || Err(BodyFault("it broke off".to_owned()));
    let (mut wire, _gateway) = connected();
    let (client, payload) = upload(Some(10));
    client.send(fault()).expect("the body is still there");
    assert!(matches!(exchange(&mut wire, Method::POST, payload).await, Err(WireError::Upload(_))));
    assert!(!wire.may_be_reused());

    let (mut wire, mut gateway) = connected();
    let (client, payload) = upload(Some(10));
    let asked = ask(Method::POST);
    let (answered, ()) = tokio::join!(wire.exchange(&asked, payload), async {
        expect(&mut gateway, &[POST, b"content-length: 10\r\n\r\n"].concat()).await;
        send(&mut gateway, FINE).await;
    });
    let Ok((_, reader)) = answered else { panic!("there is an answer") };
    client.send(fault()).expect("the body is still there");
    assert_eq!(rest(&mut wire, reader).await.expect("a body"), b"fine");
    assert!(!wire.may_be_reused());
}

#[tokio::test]
async fn a_gateway_that_takes_nothing_may_have_answered() {
    let mut wire = takes_nothing(FINE, || Ok(()));
    let answered = exchange(&mut wire, Method::POST, whole(&body(100_000))).await;
    assert_eq!(answered.expect("an answer").1, b"fine");
    assert!(!wire.may_be_reused());
}

#[tokio::test]
async fn an_attempt_without_an_answer_says_what_became_of_it() {
    let asked = ask(Method::POST);
    let failed = async |mut wire: Wire| {
        let answered = wire.exchange(&asked, whole(b"{}")).await;
        let Err(Unanswered { error, unsent, silent }) = answered else { panic!("there is no answer") };
        assert!(unsent.is_none_or(|unsent| unsent.size_hint().exact() == Some(2)));
        (error, silent)
    };
    // What cannot be written is told before the end that follows; what came is told before that.
    let (error, silent) = failed(takes_nothing(b"", || Ok(()))).await;
    assert!(silent && matches!(&error, WireError::Io(error) if error.kind() == io::ErrorKind::BrokenPipe), "{error:?}");
    let (error, silent) = failed(takes_nothing(b"HTTP/1.1 2", || Ok(()))).await;
    assert!(!silent && matches!(error, WireError::Io(_)), "{error:?}");
    for malformed in [&b"SSH-2.0-OpenSSH_9\r\n"[..], b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 x\r\n"] {
        let (error, silent) = failed(takes_nothing(malformed, || Ok(()))).await;
        assert!(!silent && matches!(error, WireError::Malformed(_)), "{error:?}");
    }
    let (mut wire, gateway) = connected();
    drop(gateway);
    let answered = wire.exchange(&asked, whole(b"{}")).await;
    assert!(matches!(answered, Err(Unanswered { unsent: Some(_), silent: true, .. })));
}

#[tokio::test]
async fn after_an_interim_answer_the_gateway_is_not_silent() {
    let (mut wire, mut gateway) = connected();
    let asked = ask(Method::POST);
    let (answered, ()) = tokio::join!(wire.exchange(&asked, whole(b"{}")), async move {
        expect(&mut gateway, &posted(b"{}")).await;
        send(&mut gateway, b"HTTP/1.1 100 Continue\r\n\r\n").await;
    });
    assert!(matches!(answered, Err(Unanswered { error: WireError::Truncated, unsent: None, silent: false })));
}

/// Where its end is looked for in all of it again and again, this takes most of a minute.
#[tokio::test]
async fn a_long_head_that_drips_in_costs_no_more_than_its_length() {
    let (mut wire, mut gateway) = connected_narrowly(1, usize::MAX);
    let head = format!("HTTP/1.1 200 OK\r\na: {}\r\ncontent-length: 0\r\n\r\n", "b".repeat(60_000));
    let (answered, ()) = tokio::join!(exchange(&mut wire, Method::GET, whole(b"")), async {
        expect(&mut gateway, b"GET /v1/x HTTP/1.1\r\nhost: gateway\r\n\r\n").await;
        send(&mut gateway, head.as_bytes()).await;
    });
    assert_eq!(answered.expect("an answer").0, 200);
}

#[tokio::test]
async fn a_connection_with_tls_carries_long_bodies_both_ways_and_again() {
    let (mut wire, mut gateway) = connected_with_tls().await;
    let long = body(100_000);
    for call in [&long[..], b"{}", &long] {
        assert!(wire.is_quiet());
        let (answered, ()) = tokio::join!(exchange(&mut wire, Method::POST, whole(call)), async {
            expect(&mut gateway, &posted(call)).await;
            send(&mut gateway, b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n186a0\r\n").await;
            send(&mut gateway, &long).await;
            send(&mut gateway, b"\r\n0\r\n\r\n").await;
        });
        assert!(answered.expect("an answer").1 == long);
        assert!(wire.may_be_reused());
    }
    gateway.shutdown().await.expect("there is room");
    assert!(!wire.is_quiet(), "the gateway has said that it closes");
}

#[tokio::test]
async fn with_tls_a_body_until_the_end_needs_the_gateways_word_that_it_is_the_end() {
    for says_so in [true, false] {
        let (mut wire, mut gateway) = connected_with_tls().await;
        let sent = async move {
            expect(&mut gateway, &posted(b"")).await;
            send(&mut gateway, b"HTTP/1.1 200 OK\r\n\r\nhello").await;
            if says_so {
                gateway.shutdown().await.expect("there is room");
            }
        };
        let (answered, ()) = tokio::join!(exchange(&mut wire, Method::POST, whole(b"")), sent);
        assert_eq!(answered.is_ok(), says_so, "{answered:?}");
    }
}

//! HTTP/2 clients that send far too much of what costs them little: weir stays there for others, and gives all back.

use crate::frames::{
    CONTINUATION, DATA, END_HEADERS, END_STREAM, Ended, HEADERS, Http2, PING, RST_STREAM, SETTINGS, WINDOW_UPDATE,
    block, frame, head,
};
use crate::upstream::{Act, FINE, ok, send};
use crate::world::World;

const MAX_CONCURRENT: usize = 256;

#[tokio::test]
async fn streams_that_are_reset_at_once_do_not_all_reach_the_gateway() {
    const STREAMS: u32 = 3000;
    for (method, flags) in [("GET", END_STREAM), ("POST", 0)] {
        let world = World::fine().await;
        let mut client = Http2::begin(world.socket().await, &[]).await;
        let request = block(&head(method, "/v1/files", &[]));
        let mut flood = Vec::new();
        for stream in (1..2 * STREAMS).step_by(2) {
            flood.extend(frame(HEADERS, flags | END_HEADERS, stream, &request));
            flood.extend(frame(RST_STREAM, 0, stream, 8_u32.to_be_bytes()));
        }
        client.flood(flood).await;
        world.is_well("rapid reset").await;
        let reached = world.upstream.received().matches(" /v1/files ").count();
        assert!(reached <= 2 * MAX_CONCURRENT, "{reached} of {STREAMS} reached the gateway");
        drop(client);
        world.holds_nothing("rapid reset").await;
    }
}

#[tokio::test]
async fn more_streams_than_allowed_are_refused_and_the_others_served() {
    let world = World::fine().await;
    let mut client = Http2::begin(world.socket().await, &[]).await;
    // They wait for bodies that never come.
    let request = block(&head("POST", "/v1/files", &[]));
    let open: Vec<u8> = (0..300).flat_map(|number| frame(HEADERS, END_HEADERS, 2 * number + 1, &request)).collect();
    client.flood(open).await;
    assert_eq!(client.answer(2 * 299 + 1).await.ended, Ended::Reset(7));
    client.write(frame(DATA, END_STREAM, 1, "hello")).await;
    assert_eq!(client.answer(1).await.text(), "fine");
    world.upstream.saw(1).await;
    drop(client);
    world.is_well("300 streams").await;
    assert_eq!(world.upstream.received().matches(" /v1/files ").count(), 1);
}

#[tokio::test]
async fn a_head_that_is_continued_without_an_end_ends_the_connection() {
    for (name, piece) in [("of fields", block(&[("x-a", "x".repeat(1000))])), ("of nothing", Vec::new())] {
        let world = World::fine().await;
        let mut client = Http2::begin(world.socket().await, &[]).await;
        client.write(frame(HEADERS, END_STREAM, 1, block(&head("GET", "/v1/models", &[])))).await;
        client.flood(frame(CONTINUATION, 0, 1, &piece).repeat(20_000)).await;
        let answer = client.answer(1).await;
        assert!(matches!(answer.ended, Ended::Connection(_)), "{name}: {answer:?}");
        world.is_well(name).await;
        assert!(!world.upstream.received().contains("/v1/models"), "{name}");
    }
}

#[tokio::test]
async fn pings_settings_and_windows_without_number_harm_nobody() {
    let ping = frame(PING, 0, 0, [7; 8]);
    let settings = frame(SETTINGS, 0, 0, [0, 4, 0, 0, 0xff, 0xff]);
    let window = frame(WINDOW_UPDATE, 0, 0, 1_u32.to_be_bytes());
    for (name, one) in [("pings", ping), ("settings", settings), ("windows", window)] {
        let world = World::fine().await;
        let mut client = Http2::begin(world.socket().await, &[]).await;
        client.flood(one.repeat(10_000)).await;
        client.headers(1, &head("GET", "/v1/models", &[]), END_STREAM).await;
        let answer = client.answer(1).await;
        let served = answer.text() == "fine" && answer.ended == Ended::Whole;
        assert!(served || matches!(answer.ended, Ended::Connection(_)), "{name}: {answer:?}");
        drop(client);
        world.is_well(name).await;
    }
}

#[tokio::test]
async fn frames_without_data_do_not_keep_a_request_for_ever() {
    let world = World::new("[timeouts]\ndeadline = \"500ms\"\n", |_| vec![send(FINE)]).await;
    let mut client = Http2::begin(world.socket().await, &[]).await;
    client.headers(1, &head("POST", "/v1/files", &[]), 0).await;
    client.flood(frame(DATA, 0, 1, []).repeat(20_000)).await;
    let answer = client.answer(1).await;
    assert!(answer.code() == "request_timeout" || answer.ended != Ended::Whole, "{answer:?}");
    assert!(!world.upstream.received().contains("/v1/files"));
    drop(client);
    world.is_well("frames without data").await;
}

#[tokio::test]
async fn a_client_that_sends_beyond_its_window_is_cut_off() {
    let world = World::new("", |_| vec![Act::Early, Act::Stall]).await;
    let mut client = Http2::begin(world.socket().await, &[]).await;
    client.headers(1, &head("POST", "/admin", &[]), 0).await;
    client.headers(3, &head("POST", "/v1/files", &[]), 0).await;
    client.flood(frame(DATA, 0, 3, vec![b'x'; 16_000]).repeat(1000)).await;
    let answer = client.answer(3).await;
    assert!(answer.ended != Ended::Whole, "{answer:?}");
    drop(client);
    world.holds_nothing("beyond the window").await;
}

#[tokio::test]
async fn a_client_that_never_opens_its_window_is_given_up() {
    let big = "x".repeat(1 << 20);
    let says = ok(&format!("content-length: {}", big.len()), &big);
    let script = move |number| vec![send(if number == 0 { &says } else { FINE })];
    let world = World::new("[server]\nwrite_timeout = \"200ms\"\n", script).await;
    // A window of nothing for each stream.
    let mut client = Http2::begin(world.socket().await, &[(4, 0)]).await;
    client.headers(1, &head("GET", "/v1/files", &[]), END_STREAM).await;
    world.upstream.saw(1).await;
    let answer = client.answer(1).await;
    assert!(answer.ended != Ended::Whole && answer.body.is_empty(), "{answer:?}");
    world.upstream.saw_closed(0).await;
    world.is_well("no window").await;
}

#[tokio::test]
async fn a_broken_answer_is_a_reset_stream_and_its_neighbour_goes_on() {
    for says in [ok("content-length: 10", "half"), ok("transfer-encoding: chunked", "4\r\nhalf\r\nzz\r\n")] {
        let first = vec![send(says), Act::Close];
        let world = World::new("", move |number| if number == 0 { first.clone() } else { vec![send(FINE)] }).await;
        let mut client = Http2::begin(world.socket().await, &[]).await;
        client.headers(1, &head("GET", "/v1/files", &[]), END_STREAM).await;
        let answer = client.answer(1).await;
        assert!(matches!(answer.ended, Ended::Reset(_)), "{answer:?}");
        client.headers(3, &head("GET", "/v1/files", &[]), END_STREAM).await;
        assert_eq!(client.answer(3).await.text(), "fine");
        world.is_well("broken").await;
    }
}

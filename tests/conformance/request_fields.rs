//! The fields of clients' requests: what is refused, what stays behind, what nobody can name away.

use crate::upstream::{FINE, send};
use crate::world::{World, are_refused, pass_as};

fn get(fields: &str) -> String {
    format!("GET /v1/files/b HTTP/1.1\r\nhost: weir.test\r\n{fields}\r\n\r\n")
}

#[tokio::test]
async fn a_malformed_field_is_refused() {
    are_refused(
        "",
        400,
        [
            ("no colon", get("x-a")),
            ("no name", get(": 1")),
            ("nothing but a colon", get(":")),
            ("a space in the name", get("x a: 1")),
            ("a space before the colon", get("x-a : 1")),
            ("a tab before the colon", get("x-a\t: 1")),
            ("a folded value", get("x-a: 1\r\n 2")),
            ("a folded value, by a tab", get("x-a: 1\r\n\t2")),
            ("NUL in a value", get("x-a: 1\x002")),
            ("CR in a value", get("x-a: 1\r2")),
            ("a request behind CR", get("x-a: 1\rGET /v1/hidden HTTP/1.1\r")),
            ("CR before a name", get("\rx-a: 1")),
            ("two CR", get("x-a: 1\r\r")),
            ("a bell in a value", get("x-a: 1\x072")),
            ("DEL in a value", get("x-a: 1\x7f2")),
            ("NUL in a name", get("x\0a: 1")),
            ("a name that is not ASCII", get("x-ä: 1")),
            ("a name in quotes", get("\"x\": 1")),
            ("a name in brackets", get("[x]: 1")),
            ("a slash in a name", get("x/a: 1")),
            ("a space before the first name", "GET /v1/files/b HTTP/1.1\r\n host: weir.test\r\n\r\n".to_owned()),
            ("a tab before the first name", "GET /v1/files/b HTTP/1.1\r\n\thost: weir.test\r\n\r\n".to_owned()),
        ],
    )
    .await;
}

#[tokio::test]
async fn a_host_that_is_missing_doubled_or_malformed_is_refused() {
    let with = |target: &str, fields: &str| format!("GET {target} HTTP/1.1\r\n{fields}\r\n");
    are_refused_and_closed([
        ("none", with("/v1/models", "")),
        ("none, with an absolute target", with("http://weir.test/v1/models", "")),
        ("two", with("/v1/models", "host: a\r\nhost: b\r\n")),
        ("the same twice", with("/v1/models", "host: a\r\nHost: a\r\n")),
        ("two, with an absolute target", with("http://a/v1/models", "host: a\r\nhost: b\r\n")),
        ("a list", with("/v1/models", "host: a, b\r\n")),
        ("a space", with("/v1/models", "host: a b\r\n")),
        ("a path", with("/v1/models", "host: a/b\r\n")),
        ("a name before it", with("/v1/models", "host: user@a\r\n")),
        ("a query", with("/v1/models", "host: a?b\r\n")),
        ("a fragment", with("/v1/models", "host: a#b\r\n")),
        ("an open bracket", with("/v1/models", "host: [::1\r\n")),
        ("eight bits", with("/v1/models", "host: ä\r\n")),
        ("a scheme", with("/v1/models", "host: http://a\r\n")),
    ])
    .await;
}

async fn are_refused_and_closed(cases: impl IntoIterator<Item = (&'static str, String)>) {
    let world = World::fine().await;
    for (name, sent) in cases {
        let answer = world.answer_to(sent).await;
        assert_eq!((answer.status, answer.code().as_str()), (400, "bad_request"), "{name}: {}", answer.text());
    }
    assert_eq!(world.upstream.received(), "");
    world.is_well("hosts").await;
}

#[tokio::test]
async fn host_is_the_gateways_whatever_the_client_wrote() {
    let asked = |version: &str| format!("GET /v1/models HTTP/1.1\r\nvia: {version} weir\r\nhost: gateway.test\r\n\r\n");
    let replaced = "GET /v1/models HTTP/1.1\r\nhost: gateway.test\r\nvia: 1.1 weir\r\n\r\n";
    let with = |host: &str| format!("GET /v1/models HTTP/1.1\r\nhost:{host}\r\n\r\n");
    pass_as(
        false,
        [
            ("a name", with(" elsewhere.test"), replaced.to_owned()),
            ("a port", with(" elsewhere.test:1"), replaced.to_owned()),
            ("an address", with(" [::1]:80"), replaced.to_owned()),
            ("nothing", with(""), replaced.to_owned()),
        ],
    )
    .await;
    let world = World::fine().await;
    assert_eq!(world.answer_to("GET /v1/models HTTP/1.0\r\n\r\n").await.status, 200);
    let received = world.upstream.received();
    assert!(received == asked("1.0") || received == replaced.replace("1.1 weir", "1.0 weir"), "{received}");
}

#[tokio::test]
async fn fields_of_one_connection_and_those_that_connection_names_stay_behind() {
    let bare = "GET /v1/files/b HTTP/1.1\r\nhost: gateway.test\r\nvia: 1.1 weir\r\n\r\n".to_owned();
    pass_as(
        false,
        [
            ("those of old", get("keep-alive: timeout=5\r\nproxy-connection: keep-alive\r\nte: trailers\r\nproxy-authorization: Basic x"), bare.clone()),
            ("an upgrade", get("connection: upgrade\r\nupgrade: websocket"), bare.clone()),
            ("an upgrade to HTTP/2", get("connection: upgrade, http2-settings\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABkAAQAAP__"), bare.clone()),
            ("named ones", get("connection: X-Secret,x-other , ,\r\nconnection:\tx-third\r\nx-secret: 1\r\nx-other: 1\r\nX-Third: 1\r\nx-secret: 2"), bare.clone()),
            ("what is no name", get("connection: \"x\", (, keep-alive"), bare.clone()),
            ("authorization", get("connection: authorization\r\nauthorization: Bearer mine"), bare.clone()),
            ("the host", get("connection: host"), bare.clone()),
            ("itself", get("connection: connection"), bare.clone()),
            ("via", get("connection: via\r\nvia: 1.1 cdn"), "GET /v1/files/b HTTP/1.1\r\nhost: gateway.test\r\nvia: 1.1 weir\r\n\r\n".to_owned()),
            ("what weir adds", get("connection: x-request-id, x-weir-attempts\r\nx-request-id: mine"), bare),
        ],
    )
    .await;
}

#[tokio::test]
async fn connection_cannot_name_away_what_delimits_a_request() {
    let post =
        |fields: &str, body: &str| format!("POST /v1/files HTTP/1.1\r\nhost: weir.test\r\n{fields}\r\n\r\n{body}");
    let posted =
        "POST /v1/files HTTP/1.1\r\nhost: gateway.test\r\nvia: 1.1 weir\r\ncontent-length: 5\r\n\r\nhello".to_owned();
    pass_as(
        false,
        [
            ("a length", post("connection: content-length\r\ncontent-length: 5", "hello"), posted.clone()),
            (
                "chunks",
                post("connection: transfer-encoding\r\ntransfer-encoding: chunked", "5\r\nhello\r\n0\r\n\r\n"),
                posted.clone(),
            ),
            ("an expectation", post("connection: expect\r\nexpect: x\r\ncontent-length: 5", "hello"), posted),
        ],
    )
    .await;
}

#[tokio::test]
async fn connection_cannot_name_away_a_key_or_its_check() {
    let config = "[upstream]\napi_key = \"sk-weir\"\n[clients.a]\nkey = \"sk-a\"\n";
    let world = World::new(config, |_| vec![send(FINE)]).await;
    let ask = |fields: &str| {
        format!("GET /v1/models HTTP/1.1\r\nhost: weir.test\r\nconnection: authorization, x-api-key\r\n{fields}\r\n")
    };
    assert_eq!(world.answer_to(ask("")).await.status, 401);
    assert_eq!(world.answer_to(ask("authorization: Bearer other\r\n")).await.status, 401);
    assert_eq!(world.upstream.received(), "");
    assert_eq!(world.answer_to(ask("authorization: Bearer sk-a\r\n")).await.status, 200);
    let received = world.upstream.received();
    assert!(received.contains("\r\nauthorization: Bearer sk-weir\r\n") && !received.contains("sk-a"), "{received}");
}

#[tokio::test]
async fn what_is_odd_in_a_field_and_means_nothing_to_weir_passes_as_it_came() {
    let odd = "x-odd: \"q\"; a=b\\, {}\r\nx-list: 1\r\nx-list: 2, 3\r\nx-empty: \r\nx_under: 1\r\nx-tab: a\tb\r\ncookie: a=1; b=2";
    let passed = format!("GET /v1/files/b HTTP/1.1\r\nhost: gateway.test\r\n{odd}\r\nvia: 1.1 weir\r\n\r\n");
    let bytes = [get("x-odd: ").trim_end().as_bytes(), b" \xe4\xff\r\n\r\n"].concat();
    pass_as(false, [("text", get(&odd.replace("x-odd: ", "X-Odd: \t ")), passed)]).await;
    let passed =
        "GET /v1/files/b HTTP/1.1\r\nhost: gateway.test\r\nx-odd: \\xe4\\xff\r\nvia: 1.1 weir\r\n\r\n".to_owned();
    pass_as(false, [("eight bits", bytes, passed)]).await;
}

#[tokio::test]
async fn a_via_of_before_stays_and_ones_own_comes_behind() {
    let asked =
        "GET /v1/files/b HTTP/1.1\r\nhost: gateway.test\r\nvia: 1.0 a, 1.1 b\r\nvia: 2 c\r\nvia: 1.1 weir\r\n\r\n";
    pass_as(false, [("via", get("via: 1.0 a, 1.1 b\r\nvia: 2 c"), asked.to_owned())]).await;
}

#[tokio::test]
async fn a_head_beyond_bounds_is_refused() {
    let many: String = (0..150).map(|number| format!("x-{number}: 1\r\n")).collect();
    are_refused(
        "",
        431,
        [
            ("a field of 100 KiB", get(&format!("x-bomb: {}", "x".repeat(100 << 10)))),
            ("150 fields", get(many.trim_end())),
            ("many long fields", get(&vec![format!("x-a: {}", "x".repeat(1000)); 70].join("\r\n"))),
        ],
    )
    .await;
}

#[tokio::test]
async fn a_head_that_drips_and_a_body_that_stops_are_not_waited_for() {
    let config = "[server]\nheader_timeout = \"150ms\"\nbody_timeout = \"150ms\"\nkeep_alive = \"150ms\"\n";
    let world = World::new(config, |_| vec![send(FINE)]).await;
    for (begun, drop_by_drop) in [
        ("", ""),
        ("GET /v1/models HT", ""),
        ("GET /v1/models HTTP/1.1\r\nx-a: ", "x"),
        ("\r\n", "\r\n"),
        ("PRI * HT", ""),
    ] {
        let mut client = world.client().await;
        client.write(begun).await;
        client.drip(drop_by_drop).await;
        client.is_closed(begun).await;
    }
    for framing in ["content-length: 100", "transfer-encoding: chunked"] {
        let sent = format!("POST /v1/files HTTP/1.1\r\nhost: weir.test\r\n{framing}\r\n\r\n5\r\nhel");
        let mut client = world.client().await;
        client.write(sent).await;
        let answer = client.answer().await.expect("an answer");
        assert_eq!((answer.status, answer.code().as_str()), (408, "request_timeout"));
        client.is_closed(framing).await;
    }
    assert_eq!(world.upstream.received(), "");
    world.is_well("drips").await;
}

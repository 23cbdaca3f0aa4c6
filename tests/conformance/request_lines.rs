//! Request lines: methods, targets in all their forms, versions.

use crate::world::{World, are_refused, pass_as};

fn head(line: &str) -> String {
    format!("{line}\r\nhost: weir.test\r\n\r\n")
}

fn asked(line: &str) -> String {
    format!("{line} HTTP/1.1\r\nhost: gateway.test\r\nvia: 1.1 weir\r\n\r\n")
}

#[tokio::test]
async fn a_malformed_request_line_is_refused() {
    are_refused(
        "",
        400,
        [
            ("a word", head("garbage")),
            ("no version", head("GET /v1/models")),
            ("no target", head("GET HTTP/1.1")),
            ("no method", head("/v1/models HTTP/1.1")),
            ("a space before", head(" GET /v1/models HTTP/1.1")),
            ("two spaces", head("GET  /v1/models HTTP/1.1")),
            ("two spaces before the version", head("GET /v1/models  HTTP/1.1")),
            ("a space behind", head("GET /v1/models HTTP/1.1 ")),
            ("tabs", head("GET\t/v1/models\tHTTP/1.1")),
            ("a space in the target", head("GET /v1/mod els HTTP/1.1")),
            ("a second request in the target", head("GET /v1/models HTTP/1.1 /v1/files HTTP/1.1")),
            ("HTTP/0.9", head("GET /v1/models HTTP/0.9")),
            ("HTTP/1.2", head("GET /v1/models HTTP/1.2")),
            ("HTTP/2.0", head("GET /v1/models HTTP/2.0")),
            ("HTTP/1.10", head("GET /v1/models HTTP/1.10")),
            ("HTTP/11", head("GET /v1/models HTTP/11")),
            ("HTTP/1", head("GET /v1/models HTTP/1")),
            ("lower-case http", head("GET /v1/models http/1.1")),
            ("another protocol", head("GET /v1/models ICAP/1.0")),
            ("a method that is no token", head("G(ET /v1/models HTTP/1.1")),
            ("NUL in the method", head("GE\0T /v1/models HTTP/1.1")),
            ("a method that is not ASCII", head("GËT /v1/models HTTP/1.1")),
            ("NUL in the target", head("GET /v1/mod\0els HTTP/1.1")),
            ("CR in the target", head("GET /v1/mod\rels HTTP/1.1")),
            ("DEL in the target", head("GET /v1/mod\x7fels HTTP/1.1")),
            ("a control byte in the target", head("GET /v1/mod\x01els HTTP/1.1")),
            ("CR before the version", head("GET /v1/models \rHTTP/1.1")),
            ("a target without a slash", head("GET v1/models HTTP/1.1")),
            ("a scheme without a host", head("GET http:///v1/models HTTP/1.1")),
            ("a beginning of the preface of HTTP/2", head("PRI * HTTP/2.0\r\n\r\nSN")),
        ],
    )
    .await;
}

#[tokio::test]
async fn the_target_goes_on_byte_for_byte() {
    let same = |name, target: &str| (name, head(&format!("GET {target} HTTP/1.1")), asked(&format!("GET {target}")));
    pass_as(
        false,
        [
            same("an encoded slash", "/v1/files/a%2Fb/c%2fd"),
            same("an encoded NUL and CRLF", "/v1/files/%00%0d%0aX:%20y"),
            same("twice encoded dots", "/v1/%252e%252e/admin"),
            same("dots that stay below", "/v1/files/./x/../y"),
            same("empty segments", "/v1//files///x/"),
            same("an empty query", "/v1/models?"),
            same("dots in the query", "/v1/models?/../../admin"),
            same("a malformed escape", "/v1/files/%zz%"),
            same("a backslash", "/v1/files/a\\b"),
            same("matrix parameters", "/v1/files;a=b/..;/x"),
            ("eight bits", head("GET /v1/files/ö HTTP/1.1"), asked("GET /v1/files/\\xc3\\xb6")),
            (
                "an absolute target, whose host is another",
                head("GET http://elsewhere.test:1/v1/models?a=1 HTTP/1.1"),
                asked("GET /v1/models?a=1"),
            ),
            ("a scheme of its own", head("GET https://elsewhere.test/v1/models HTTP/1.1"), asked("GET /v1/models")),
            (
                "a name before the host",
                head("GET http://a:b@elsewhere.test/v1/models HTTP/1.1"),
                asked("GET /v1/models"),
            ),
            // It is no part of a target, and nothing that a gateway could make sense of.
            ("a fragment", head("GET /v1/models#/../../admin HTTP/1.1"), asked("GET /v1/models")),
            ("a fragment behind a query", head("GET /v1/models?a#b HTTP/1.1"), asked("GET /v1/models?a")),
        ],
    )
    .await;
}

#[tokio::test]
async fn no_form_of_a_target_leads_out_of_v1() {
    let world = World::fine().await;
    for line in [
        "GET / HTTP/1.1",
        "GET /v1 HTTP/1.1",
        "GET /v1?/x HTTP/1.1",
        "GET /v1#/x HTTP/1.1",
        "GET /v10/models HTTP/1.1",
        "GET /V1/models HTTP/1.1",
        "GET //v1/models HTTP/1.1",
        "GET /%76%31/models HTTP/1.1",
        "GET /v1%2fmodels HTTP/1.1",
        "GET /v1\\models HTTP/1.1",
        "GET /v1/../admin HTTP/1.1",
        "GET /v1/.. HTTP/1.1",
        "GET /v1/%2e%2e/admin HTTP/1.1",
        "GET /v1/%2E./admin HTTP/1.1",
        "GET /v1/..%2fadmin HTTP/1.1",
        "GET /v1/%2e%2e%2fadmin HTTP/1.1",
        "GET /v1/..%5cadmin HTTP/1.1",
        "GET /v1/..\\admin HTTP/1.1",
        "GET /v1/a/../../admin HTTP/1.1",
        "GET /v1/./../v1/models HTTP/1.1",
        "GET /v1//../../admin HTTP/1.1",
        "GET http://weir.test/admin HTTP/1.1",
        "GET http://weir.test HTTP/1.1",
        "GET http://weir.test?/v1/models HTTP/1.1",
        "OPTIONS * HTTP/1.1",
        "GET * HTTP/1.1",
        "GET weir.test:80 HTTP/1.1",
        "CONNECT weir.test:80 HTTP/1.1",
        "CONNECT /v1/models HTTP/1.1",
        "CONNECT http://weir.test/v1/models HTTP/1.1",
    ] {
        let mut client = world.client().await;
        client.write(head(line)).await;
        let answer = client.answer().await.unwrap_or_else(|| panic!("{line}: no answer"));
        assert!(matches!(answer.status, 400 | 404), "{line}: {}", answer.head);
        assert_eq!(answer.values("content-type"), ["application/json"], "{line}");
    }
    assert_eq!(world.upstream.received(), "");
    world.is_well("no way out").await;
}

/// weir takes part in no tunnel: what a client sends behind CONNECT is a request as any other, or nothing.
#[tokio::test]
async fn what_comes_behind_connect_is_no_tunnel() {
    let world = World::fine().await;
    let mut client = world.client().await;
    client.write(head("CONNECT gateway.test:443 HTTP/1.1") + "\x16\x03\x01\x02\x00").await;
    let answer = client.answer().await.expect("an answer");
    assert_eq!((answer.status, answer.code().as_str()), (404, "unknown_path"));
    client.finish().await;
    let (rest, _) = client.rest().await;
    assert!(rest.is_empty() || rest.starts_with(b"HTTP/1.1 400 "));
    assert_eq!(world.upstream.received(), "");
}

/// Whoever writes a metered call oddly pays for it all the same: it reaches the gateway as one that was metered, which is to
/// be seen by its accept-encoding.
#[tokio::test]
async fn no_spelling_of_a_metered_call_escapes_its_limits() {
    let body = r#"{"model":"m"}"#;
    for line in [
        "POST /v1/chat/completions",
        "POST /v1//chat/completions",
        "POST /v1/chat/completions/",
        "POST /v1/./chat/x/../completions",
        "POST /v1/%63hat/completions?a=b",
        "POST /v1/chat%2Fcompletions",
        "POST http://weir.test/v1/chat/completions",
        "post /v1/chat/completions",
        "Post /v1/chat/completions",
    ] {
        let world = World::fine().await;
        let sent = format!("{line} HTTP/1.1\r\nhost: weir.test\r\ncontent-length: {}\r\n\r\n{body}", body.len());
        assert_eq!(world.answer_to(sent).await.status, 200, "{line}");
        let line = line.replace("http://weir.test", "");
        let head = format!("{line} HTTP/1.1\r\nhost: gateway.test\r\nvia: 1.1 weir\r\naccept-encoding: identity");
        assert_eq!(world.upstream.received(), format!("{head}\r\ncontent-length: {}\r\n\r\n{body}", body.len()));
        world.is_well(&line).await;
    }
}

#[tokio::test]
async fn a_method_goes_on_as_it_is_written() {
    let same = |name, method: &str| {
        let line = format!("{method} /v1/files/a");
        (name, head(&format!("{line} HTTP/1.1")), asked(&line))
    };
    pass_as(
        false,
        [
            same("lower case", "get"),
            same("OPTIONS", "OPTIONS"),
            same("TRACE", "TRACE"),
            same("any token", "!#$%&'*+-.^_`|~09aZ"),
        ],
    )
    .await;
}

#[tokio::test]
async fn max_forwards_ends_at_weir_or_is_counted_down() {
    let counted = |method: &str, hops: &str| {
        format!("{method} /v1/files/a HTTP/1.1\r\nhost: weir.test\r\nmax-forwards: {hops}\r\n\r\n")
    };
    let forwarded = |method: &str, hops: &str| {
        format!("{method} /v1/files/a HTTP/1.1\r\nhost: gateway.test\r\nmax-forwards: {hops}\r\nvia: 1.1 weir\r\n\r\n")
    };
    pass_as(
        false,
        [
            ("TRACE", counted("TRACE", "1"), forwarded("TRACE", "0")),
            ("OPTIONS", counted("OPTIONS", "010"), forwarded("OPTIONS", "9")),
            ("more than there are", counted("OPTIONS", "99999999999999999999"), forwarded("OPTIONS", "255")),
            ("another method", counted("GET", "0"), forwarded("GET", "0")),
            ("no number", counted("TRACE", "x"), forwarded("TRACE", "x")),
        ],
    )
    .await;
    let world = World::fine().await;
    for method in ["TRACE", "OPTIONS"] {
        let answer = world.answer_to(counted(method, "0")).await;
        assert_eq!((answer.status, answer.values("content-type")), (404, vec!["application/json"]));
    }
    assert_eq!(world.upstream.received(), "");
}

//! A request's head: whose it is, where it goes, and which of its fields go on.

use std::net::{IpAddr, Ipv4Addr};
use std::sync::LazyLock;

use http::header::{self, HeaderMap, HeaderName, HeaderValue};
use http::{Method, Request, Version, request};
use weir::clients::{Clients, KEY_FIELDS};
use weir::config::Config;
use weir::openai::call::Endpoint;
use weir::proxy::fields::{self, LentKey, Via};
use weir::proxy::route::route;

const CONFIG: &str = r#"
    [upstream]
    api_key = "sk-upstream"
    [clients.a]
    key = "sk-a"
    [clients.b]
    key = "sk-b"
"#;

static KNOWN: LazyLock<(Clients, LentKey)> = LazyLock::new(|| {
    let config = Config::parse(CONFIG, &|_| None).expect("it is right");
    let key = config.upstream.api_key.as_ref().expect("it has a key");
    (Clients::new(&config), LentKey::new(key))
});

const HOST: HeaderValue = HeaderValue::from_static("gateway.test");

const PEER: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

/// Fields that weir writes itself, whatever a client sends.
const WRITTEN: [HeaderName; 6] = [
    header::HOST,
    header::VIA,
    header::ACCEPT_ENCODING,
    header::AUTHORIZATION,
    HeaderName::from_static("x-api-key"),
    HeaderName::from_static("api-key"),
];

/// Fields that never go on.
const DROPPED: [&str; 10] = [
    "connection",
    "keep-alive",
    "proxy-connection",
    "proxy-authenticate",
    "proxy-authorization",
    "te",
    "transfer-encoding",
    "upgrade",
    "content-length",
    "expect",
];

/// A head as lines: a path, then `name: value`.
pub fn check(lines: &[u8]) {
    let mut lines = lines.split(|byte| *byte == b'\n');
    let path = lines.next().unwrap_or_default();
    if let Ok(path) = std::str::from_utf8(path) {
        goes_where_it_says(path);
    }
    for version in [Version::HTTP_10, Version::HTTP_11, Version::HTTP_2] {
        let head = head(version, lines.clone());
        is_known_by_its_key_alone(&head);
        goes_on_as_it_should(&head);
    }
}

fn head<'l>(version: Version, lines: impl Iterator<Item = &'l [u8]>) -> request::Parts {
    let (mut head, ()) = Request::new(()).into_parts();
    head.version = version;
    for line in lines.take(100) {
        let Some(colon) = line.iter().position(|byte| *byte == b':') else { continue };
        let name = HeaderName::from_bytes(&line[..colon]);
        let value = HeaderValue::from_bytes(line[colon + 1..].trim_ascii());
        if let (Ok(name), Ok(value)) = (name, value) {
            head.headers.append(name, value);
        }
    }
    head
}

/// What is behind `/v1` goes on as it is, and every spelling of a metered call is one.
fn goes_where_it_says(path: &str) {
    let Some(route) = route(&Method::POST, path) else {
        assert!(path.strip_prefix("/v1/").is_none_or(|below| slow_path(below).is_none()), "it is under /v1");
        return;
    };
    assert_eq!(path.strip_prefix("/v1"), Some(route.below_v1));
    assert_eq!(route.endpoint, slow_path(route.below_v1).and_then(|path| Endpoint::at(&path)));
}

/// The path that is meant; `None` where it leaves its root.
fn slow_path(path: &str) -> Option<String> {
    let (bytes, mut meant, mut at) = (path.as_bytes(), Vec::new(), 0);
    while at < bytes.len() {
        let escaped = path.get(at + 1..at + 3).filter(|_| bytes[at] == b'%');
        let byte = escaped.filter(|hex| !hex.starts_with('+')).and_then(|hex| u8::from_str_radix(hex, 16).ok());
        meant.push(byte.unwrap_or(bytes[at]));
        at += if byte.is_some() { 3 } else { 1 };
    }
    let meant = String::from_utf8_lossy(&meant).replace('\\', "/");
    let mut kept: Vec<&str> = Vec::new();
    for segment in meant.split('/') {
        match segment {
            "" | "." => {}
            ".." => _ = kept.pop()?,
            other => kept.push(other),
        }
    }
    Some(kept.iter().map(|segment| format!("/{segment}")).collect())
}

fn is_known_by_its_key_alone(head: &request::Parts) {
    let (clients, _) = &*KNOWN;
    let key_fields = head.headers.iter().filter(|(name, _)| KEY_FIELDS.contains(name));
    let keys_alone: HeaderMap = key_fields.map(|(name, value)| (name.clone(), value.clone())).collect();
    let (by_all, by_keys) = (clients.identify(&head.headers, Some(PEER)), clients.identify(&keys_alone, Some(PEER)));
    let name =
        |caller: &Result<weir::clients::Caller, _>| caller.as_ref().ok().map(|it| clients.name(it.client).clone());
    assert_eq!(name(&by_all), name(&by_keys), "no other field has a say");
    if let Some(name) = name(&by_all) {
        let key = format!("sk-{name}");
        let first = KEY_FIELDS.iter().find_map(|field| head.headers.get(field)).map(HeaderValue::as_bytes);
        assert!(first.is_some_and(|value| value.ends_with(key.as_bytes())), "the first key decides");
    }
}

fn goes_on_as_it_should(head: &request::Parts) {
    let via = Via::new("fuzz");
    let is_fine = fields::check(head, &via).is_ok();
    let hosts = head.headers.get_all(header::HOST).iter().count();
    assert!(!is_fine || hosts == 1 || hosts == 0 && head.version != Version::HTTP_11);
    for (key, metered) in [(Some(&KNOWN.1), true), (None, false)] {
        let mut sent = head.clone();
        fields::to_upstream(&mut sent, &HOST, &via, key, metered);
        let passed = sent.headers.iter().filter(|(name, _)| fields::goes_on(name));
        sent.headers = passed.map(|(name, value)| (name.clone(), value.clone())).collect();
        fields_are_right(&head.headers, &sent.headers, key.is_some());
        fields::check(&sent, &via).expect_err("it has been through this weir");
    }
    let mut answer = http::Response::new(()).into_parts().0;
    answer.headers = head.headers.clone();
    fields::to_client(&mut answer);
    let before = &head.headers;
    let named = named_by_connection(before);
    for name in answer.headers.keys() {
        assert!(!DROPPED[..8].contains(&name.as_str()) && !named.contains(&name.to_string()), "{name} goes on");
    }
    assert!(!(before.contains_key("transfer-encoding") && answer.headers.contains_key("content-length")));
}

fn fields_are_right(before: &HeaderMap, sent: &HeaderMap, lends_its_key: bool) {
    let all = |fields: &HeaderMap, name: &HeaderName| fields.get_all(name).iter().cloned().collect::<Vec<_>>();
    let named = named_by_connection(before);
    assert_eq!(all(sent, &header::HOST), [HOST]);
    assert!(all(sent, &header::VIA).last().is_some_and(|via| via.as_bytes().ends_with(b" weir-fuzz")));
    if lends_its_key {
        assert_eq!(all(sent, &header::AUTHORIZATION), ["Bearer sk-upstream"]);
        for name in &KEY_FIELDS[1..] {
            let key = all(sent, name);
            assert!(key.is_empty() || key == ["sk-upstream"], "{name} {key:?}");
        }
    }
    for name in sent.keys() {
        assert!(!DROPPED.contains(&name.as_str()), "{name} goes on");
        let is_written = WRITTEN.contains(name);
        assert!(is_written || !named.contains(&name.to_string()), "{name} is for this connection only");
        let is_joined = *name == header::COOKIE;
        assert!(is_written || is_joined || all(sent, name) == all(before, name), "{name} has changed");
    }
    for name in before.keys() {
        let gone = !sent.contains_key(name);
        assert!(!gone || DROPPED.contains(&name.as_str()) || named.contains(&name.to_string()), "{name} is lost");
    }
}

/// What `Connection` names, in small letters.
fn named_by_connection(fields: &HeaderMap) -> Vec<String> {
    let values = fields.get_all(header::CONNECTION).iter();
    let tokens = values.flat_map(|value| value.as_bytes().split(|byte| *byte == b','));
    tokens.filter_map(|token| Some(std::str::from_utf8(token.trim_ascii()).ok()?.to_ascii_lowercase())).collect()
}

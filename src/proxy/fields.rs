//! The header fields of an intermediary: what is checked, dropped, replaced and added (RFC 9110, section 7).

use std::collections::HashSet;

use bytes::Bytes;
use http::header::{self, Entry, HeaderMap, HeaderName, HeaderValue};
use http::uri::Authority;
use http::{Method, StatusCode, Version, request, response};
use zeroize::Zeroizing;

use crate::clients::KEY_FIELDS;
use crate::config::Secret;
use crate::error::{Cause, Failure};
use crate::upstream::head::Coding;

/// Fields that concern one connection only (RFC 9110, 7.6.1, and those of old that meant the same).
static HOP_BY_HOP: [HeaderName; 8] = [
    header::CONNECTION,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
    header::PROXY_AUTHENTICATE,
    header::PROXY_AUTHORIZATION,
    header::TE,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
];

/// The most bytes of names and values that a head may have; hyper itself refuses more than 100 fields.
const MAX_HEAD_BYTES: usize = 64 << 10;

/// What `Max-Forwards` is at most when weir has counted it down.
const MOST_FORWARDS: u64 = 255;

/// Refuses a head whose Host is missing, doubled or malformed, whose body has a transfer coding besides chunks, that is too
/// long, that goes no further, or that has been through this weir.
///
/// # Errors
/// What is wrong with it.
pub fn check(head: &request::Parts, via: &Via) -> Result<(), Failure> {
    let bytes: usize = head.headers.iter().map(|(name, value)| name.as_str().len() + value.len() + 4).sum();
    if bytes > MAX_HEAD_BYTES {
        let message = format!("the request's header fields take {bytes} bytes; weir reads {MAX_HEAD_BYTES} at most");
        return Err(Failure::new(Cause::HeadersTooLarge, message));
    }
    check_host(head).map_err(|message| Failure::new(Cause::BadRequest, message))?;
    // hyper takes chunks off and leaves what is below them, whose name weir must not pass on.
    if Coding::of(&head.headers) == Coding::Other {
        let message =
            "the request's body has a transfer coding that weir cannot take off; send it as it is, or in chunks";
        return Err(Failure::new(Cause::BadRequest, message));
    }
    if forwards_left(head) == Some(0) {
        let message =
            "Max-Forwards is 0, so this request goes no further than weir, which has nothing at this path itself";
        return Err(Failure::new(Cause::UnknownPath, message));
    }
    if head.method == Method::CONNECT {
        let message = "weir opens no tunnels: give it to your client as the base URL, not as a proxy";
        return Err(Failure::new(Cause::UnknownPath, message));
    }
    if via.is_in(&head.headers) {
        let message = "this request has been through this weir before: upstream.base_url leads back to weir itself";
        return Err(Failure::new(Cause::LoopDetected, message));
    }
    Ok(())
}

fn check_host(head: &request::Parts) -> Result<(), &'static str> {
    let mut hosts = head.headers.get_all(header::HOST).iter();
    let host = hosts.next();
    if hosts.next().is_some() {
        return Err("the request has more than one Host header");
    }
    if head.version == Version::HTTP_2
        && let Some(authority) = head.uri.authority()
    {
        check_authority(authority, host)?;
    }
    match host {
        Some(host)
            if host.is_empty()
                || Authority::try_from(host.as_bytes()).is_ok_and(|host| !host.as_str().contains('@')) =>
        {
            Ok(())
        }
        Some(_) => Err("the request's Host header is not a host"),
        None if head.version == Version::HTTP_11 => Err("the request has no Host header"),
        None => Ok(()),
    }
}

/// How many more intermediaries may pass on a request of the methods that count them (RFC 9110, 7.6.2).
fn forwards_left(head: &request::Parts) -> Option<u64> {
    if !matches!(head.method, Method::TRACE | Method::OPTIONS) {
        return None;
    }
    let hops = head.headers.get(header::MAX_FORWARDS)?.as_bytes();
    (!hops.is_empty() && hops.iter().all(u8::is_ascii_digit)).then(|| number(hops).unwrap_or(u64::MAX))
}

/// HTTP/2 tells the host in a field of its own, and may tell it in Host once more (RFC 9113, 8.3.1).
fn check_authority(authority: &Authority, host: Option<&HeaderValue>) -> Result<(), &'static str> {
    if authority.as_str().contains('@') {
        return Err("the request's :authority is not a host");
    }
    match host {
        Some(host) if !host.as_bytes().eq_ignore_ascii_case(authority.as_str().as_bytes()) => {
            Err("the request's Host header is not its :authority")
        }
        _ => Ok(()),
    }
}

/// Makes a client's fields those of the request to the gateway, but for what [`goes_on`] says of them: what is dropped is passed
/// over when they are written, since taking it out of the map would cost more, and the others their order.
pub fn to_upstream(head: &mut request::Parts, host: &HeaderValue, via: &Via, key: Option<&LentKey>, metered: bool) {
    if let Some(hops) = forwards_left(head) {
        let left = hops.saturating_sub(1).min(MOST_FORWARDS);
        head.headers.insert(header::MAX_FORWARDS, HeaderValue::from(left));
    }
    let fields = &mut head.headers;
    drop_named_by_connection(fields);
    fields.insert(header::HOST, host.clone());
    fields.append(header::VIA, via.field(head.version));
    if metered {
        // An encoded answer's usage could not be read.
        fields.insert(header::ACCEPT_ENCODING, HeaderValue::from_static("identity"));
    }
    if head.version == Version::HTTP_2 {
        join_cookies(fields);
    }
    match key {
        Some(key) => key.replace_others(fields),
        None => hide_keys(fields),
    }
}

/// Whether a field of a client's request is sent to the gateway.
pub fn goes_on(name: &HeaderName) -> bool {
    // The length is the body's own, and weir has answered the expectation already.
    let is_weirs = *name == header::CONTENT_LENGTH || *name == header::EXPECT;
    !is_weirs && !is_hop_by_hop(name)
}

/// Refuses an answer that nobody asked for, or that cannot be told on: a switch of protocols, and a transfer coding besides
/// chunks. weir takes off only those, and a client could not know of another, since the field that names it is for one
/// connection (RFC 9112, 6.1).
///
/// # Errors
/// What is wrong with it.
pub fn check_answer(head: &response::Parts) -> Result<(), Failure> {
    if head.status == StatusCode::SWITCHING_PROTOCOLS {
        let message = "the gateway switched protocols, which nobody asked it to";
        return Err(Failure::new(Cause::InvalidResponse, message));
    }
    if Coding::of(&head.headers) == Coding::Other {
        let message = "the gateway's answer has a transfer coding that weir did not ask for";
        return Err(Failure::new(Cause::InvalidResponse, message));
    }
    Ok(())
}

/// Makes the gateway's fields those of the answer to the client.
pub fn to_client(head: &mut response::Parts) {
    // With both, the length is a lie (RFC 9112, 6.3).
    if head.headers.contains_key(header::TRANSFER_ENCODING) {
        head.headers.remove(header::CONTENT_LENGTH);
    }
    put_length_right(&mut head.headers);
    drop_named_by_connection(&mut head.headers);
    drop_fields(&mut head.headers, is_hop_by_hop);
    head.version = Version::HTTP_11;
}

/// One length in plain digits. hyper reads `5, 5` and `005` as 5, and would pass them on as they came, for a client to make of
/// it what it will (RFC 9110, 8.6). What is no length, as can stand in the answer to a HEAD, is left out.
fn put_length_right(fields: &mut HeaderMap) {
    let lengths = || fields.get_all(header::CONTENT_LENGTH).iter().map(HeaderValue::as_bytes);
    let Some(first) = lengths().next() else { return };
    if lengths().nth(1).is_none() && is_plain_number(first) {
        return;
    }
    let mut items = lengths().flat_map(|value| value.split(|byte| *byte == b',')).map(number);
    let one = items.next().flatten().filter(|first| items.all(|other| other == Some(*first)));
    match one {
        Some(length) => drop(fields.insert(header::CONTENT_LENGTH, HeaderValue::from(length))),
        None => drop(fields.remove(header::CONTENT_LENGTH)),
    }
}

fn is_plain_number(text: &[u8]) -> bool {
    let leads_with_zero = text.len() > 1 && text[0] == b'0';
    !leads_with_zero && number(text).is_some()
}

/// What these digits say, and nothing but digits.
fn number(text: &[u8]) -> Option<u64> {
    let text = text.trim_ascii();
    if !text.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(text).ok()?.parse().ok()
}

fn is_hop_by_hop(name: &HeaderName) -> bool {
    HOP_BY_HOP.contains(name)
}

/// Drops the fields that `Connection` says are for this connection only.
fn drop_named_by_connection(fields: &mut HeaderMap) {
    let options =
        fields.get_all(header::CONNECTION).iter().flat_map(|value| value.as_bytes().split(|byte| *byte == b','));
    let names = options.filter_map(|name| HeaderName::from_bytes(name.trim_ascii()).ok());
    // Thousands can be named, most of them not there.
    let named: HashSet<HeaderName> = names.filter(|name| fields.contains_key(name)).collect();
    drop_fields(fields, |name| named.contains(name));
}

/// Drops these fields and keeps all others in their order, which `HeaderMap::remove` does not.
fn drop_fields(fields: &mut HeaderMap, is_dropped: impl Fn(&HeaderName) -> bool) {
    if !fields.keys().any(&is_dropped) {
        return;
    }
    // What room it had for more, it has still.
    let mut kept = HeaderMap::with_capacity(fields.capacity());
    for (name, value) in &*fields {
        if !is_dropped(name) {
            kept.append(name.clone(), value.clone());
        }
    }
    *fields = kept;
}

/// HTTP/2 may split the cookie into several fields, HTTP/1.1 may not (RFC 9113, 8.2.3).
fn join_cookies(fields: &mut HeaderMap) {
    let crumbs: Vec<&[u8]> = fields.get_all(header::COOKIE).iter().map(HeaderValue::as_bytes).collect();
    if crumbs.len() > 1
        && let Ok(cookie) = HeaderValue::from_bytes(&crumbs.join(&b"; "[..]))
    {
        fields.insert(header::COOKIE, cookie);
    }
}

/// Keeps clients' own keys out of whatever shows fields, such as `Debug`.
fn hide_keys(fields: &mut HeaderMap) {
    for name in &KEY_FIELDS {
        if let Entry::Occupied(mut keys) = fields.entry(name) {
            keys.iter_mut().for_each(|key| key.set_sensitive(true));
        }
    }
}

/// The upstream's key as it stands in the fields of requests to the gateway. All of them share its bytes, which are wiped
/// from memory with the last.
pub struct LentKey {
    bearer: HeaderValue,
    bare: HeaderValue,
}

impl LentKey {
    /// The fields' values for this key.
    pub fn new(key: &Secret) -> Self {
        let sensitive = |scheme: &str| {
            let text = Zeroizing::new([scheme, key.reveal()].concat().into_bytes());
            let value = HeaderValue::from_maybe_shared(Bytes::from_owner(text));
            let mut value = value.expect("a secret was checked to be visible ASCII");
            value.set_sensitive(true);
            value
        };
        Self { bearer: sensitive("Bearer "), bare: sensitive("") }
    }

    /// Puts the key where the client's own was, and into `Authorization` in any case.
    fn replace_others(&self, fields: &mut HeaderMap) {
        let [authorization, others @ ..] = &KEY_FIELDS;
        for name in others {
            if fields.contains_key(name) {
                fields.insert(name, self.bare.clone());
            }
        }
        fields.insert(authorization, self.bearer.clone());
    }
}

/// This weir's name in `Via`, by which it knows its own requests again.
#[derive(Debug, Clone)]
pub struct Via {
    name: String,
    http1_0: HeaderValue,
    http1: HeaderValue,
    http2: HeaderValue,
}

impl Via {
    /// A name that no other weir has.
    pub fn new(instance: &str) -> Self {
        let name = format!("weir-{instance}");
        let field = |version: &str| HeaderValue::from_str(&format!("{version} {name}")).expect("an instance is ASCII");
        Self { http1_0: field("1.0"), http1: field("1.1"), http2: field("2.0"), name }
    }

    fn field(&self, received: Version) -> HeaderValue {
        match received {
            Version::HTTP_10 => self.http1_0.clone(),
            Version::HTTP_2 => self.http2.clone(),
            _ => self.http1.clone(),
        }
    }

    fn is_in(&self, fields: &HeaderMap) -> bool {
        let values = fields.get_all(header::VIA).iter().filter_map(|value| value.to_str().ok());
        values.flat_map(|value| value.split(',')).any(|hop| hop.split_whitespace().nth(1) == Some(self.name.as_str()))
    }
}

#[cfg(test)]
mod tests {
    use http::Request;

    use super::*;

    fn head(lines: &[(&str, &str)]) -> request::Parts {
        let mut request = Request::builder().uri("/v1/models");
        for (name, value) in lines {
            request = request.header(*name, *value);
        }
        request.body(()).expect("a request").into_parts().0
    }

    /// The fields that go on to the gateway.
    fn sent(mut head: request::Parts, key: Option<&LentKey>, metered: bool) -> HeaderMap {
        to_upstream(&mut head, &HeaderValue::from_static("gateway"), &Via::new("a"), key, metered);
        let fields = head.headers.iter().filter(|(name, _)| goes_on(name));
        fields.map(|(name, value)| (name.clone(), value.clone())).collect()
    }

    fn names(fields: &HeaderMap) -> Vec<&str> {
        fields.keys().map(HeaderName::as_str).collect()
    }

    #[test]
    fn one_host_is_needed_and_no_more() {
        let via = Via::new("a");
        assert!(check(&head(&[("host", "localhost:8080")]), &via).is_ok());
        for lines in [&[][..], &[("host", "a"), ("host", "a")], &[("host", "a b")], &[("host", "user@a")]] {
            assert_eq!(check(&head(lines), &via).map_err(|failure| failure.cause), Err(Cause::BadRequest), "{lines:?}");
        }
    }

    #[test]
    fn a_request_that_comes_back_is_known() {
        let via = Via::new("7f");
        let came_back = head(&[("host", "a"), ("via", "1.1 cdn, 1.1 weir-7f (comment)")]);
        assert_eq!(check(&came_back, &via).map_err(|failure| failure.cause), Err(Cause::LoopDetected));
        assert!(check(&head(&[("host", "a"), ("via", "1.1 weir-80")]), &via).is_ok());
    }

    #[test]
    fn a_header_bomb_is_refused() {
        let bomb = "x".repeat(MAX_HEAD_BYTES);
        let refused = check(&head(&[("host", "a"), ("x-bomb", &bomb)]), &Via::new("a"));
        assert_eq!(refused.map_err(|failure| failure.cause), Err(Cause::HeadersTooLarge));
    }

    #[test]
    fn hop_by_hop_fields_and_those_that_connection_names_are_dropped() {
        let head = head(&[
            ("connection", "close, X-Secret"),
            ("x-secret", "1"),
            ("te", "trailers"),
            ("upgrade", "websocket"),
            ("keep-alive", "timeout=5"),
            ("x-kept", "2"),
            ("expect", "100-continue"),
            ("content-length", "5"),
        ]);
        let sent = sent(head, None, true);
        assert_eq!(names(&sent).len(), 4, "{sent:?}");
        assert_eq!(
            (&sent["host"], &sent["x-kept"]),
            (&HeaderValue::from_static("gateway"), &HeaderValue::from_static("2"))
        );
        assert_eq!(
            (&sent["via"], &sent["accept-encoding"]),
            (&HeaderValue::from_static("1.1 weir-a"), &HeaderValue::from_static("identity"))
        );
    }

    #[test]
    fn a_field_that_connection_names_is_weirs_own_where_weir_writes_it() {
        let head = head(&[("connection", "Host, Via, Accept-Encoding"), ("host", "weir"), ("via", "1.1 cdn")]);
        let sent = sent(head, None, true);
        assert_eq!(
            (&sent["host"], &sent["accept-encoding"]),
            (&HeaderValue::from_static("gateway"), &HeaderValue::from_static("identity"))
        );
        assert_eq!(sent.get_all("via").iter().collect::<Vec<_>>(), ["1.1 weir-a"]);
    }

    #[test]
    fn fields_that_go_on_keep_their_order() {
        let lines = [
            ("x-first", "1"),
            ("content-length", "5"),
            ("host", "weir"),
            ("connection", "x-named"),
            ("x-second", "2"),
            ("te", "trailers"),
            ("x-named", "3"),
            ("x-third", "4"),
            ("x-fourth", "5"),
            ("x-first", "6"),
        ];
        let to_gateway = sent(head(&lines), None, false);
        assert_eq!(names(&to_gateway), ["x-first", "host", "x-second", "x-third", "x-fourth", "via"]);
        assert_eq!(to_gateway.get_all("x-first").iter().collect::<Vec<_>>(), ["1", "6"]);
        let (mut answer, ()) = http::Response::new(()).into_parts();
        answer.headers = head(&lines).headers;
        to_client(&mut answer);
        assert_eq!(names(&answer.headers), ["x-first", "content-length", "host", "x-second", "x-third", "x-fourth"]);
    }

    #[test]
    fn an_answer_keeps_its_room_for_more_fields_where_some_are_dropped() {
        let (mut answer, ()) = http::Response::new(()).into_parts();
        answer.headers = HeaderMap::with_capacity(20);
        answer
            .headers
            .extend(head(&[("connection", "keep-alive, x-named"), ("x-named", "1"), ("x-kept", "2")]).headers);
        let room = answer.headers.capacity();
        to_client(&mut answer);
        assert_eq!((names(&answer.headers), answer.headers.capacity()), (vec!["x-kept"], room));
    }

    #[test]
    fn the_upstreams_key_stands_wherever_the_clients_own_did() {
        let key = LentKey::new(&Secret::resolve("sk-upstream", &|_| None).expect("a secret"));
        let head = head(&[("authorization", "Bearer mine"), ("x-api-key", "mine"), ("api-key", "mine")]);
        let sent = sent(head, Some(&key), true);
        assert!(!format!("{sent:?}").contains("mine") && !format!("{sent:?}").contains("sk-upstream"));
        assert_eq!(
            (&sent["authorization"], &sent["x-api-key"]),
            (&HeaderValue::from_static("Bearer sk-upstream"), &HeaderValue::from_static("sk-upstream"))
        );
    }

    #[test]
    fn clients_keys_that_go_through_are_hidden_from_debug_output() {
        let head = head(&[("authorization", "Bearer mine"), ("authorization", "mine"), ("x-api-key", "mine")]);
        let sent = sent(head, None, true);
        assert!(!format!("{sent:?}").contains("mine"));
        assert_eq!(sent.get_all("authorization").iter().count(), 2);
    }

    #[test]
    fn requests_share_the_bytes_of_the_upstreams_key() {
        let key = LentKey::new(&Secret::resolve("sk-upstream", &|_| None).expect("a secret"));
        let key_bytes = || {
            let sent = sent(head(&[("api-key", "mine"), ("api-key", "again")]), Some(&key), true);
            assert_eq!(sent.get_all("api-key").iter().count(), 1);
            ["authorization", "api-key"].map(|name| sent[name].as_bytes().as_ptr())
        };
        assert_eq!(key_bytes(), key_bytes());
    }

    #[test]
    fn connection_is_read_whatever_else_it_has_in_it() {
        let mut head = head(&[("x-secret", "1"), ("x-kept", "2")]);
        let value = HeaderValue::from_bytes(b"\xff, X-SECRET\t, a b").expect("a value that hyper lets pass");
        head.headers.append("connection", value);
        let sent = sent(head, None, false);
        assert!(!sent.contains_key("x-secret") && sent.contains_key("x-kept"));
    }

    #[test]
    fn crumbs_of_an_http2_cookie_are_joined() {
        let mut head = head(&[("cookie", "a=1"), ("cookie", "b=2")]);
        head.version = Version::HTTP_2;
        assert_eq!(sent(head, None, false)["cookie"], "a=1; b=2");
    }

    #[test]
    fn a_length_is_passed_on_once_and_in_plain_digits() {
        for (lines, length) in [
            (&["5"][..], Some("5")),
            (&["0"], Some("0")),
            (&["005"], Some("5")),
            (&["5", "5"], Some("5")),
            (&["5 ,5", "05"], Some("5")),
            (&["5", "6"], None),
            (&["5,"], None),
            (&["+5"], None),
            (&["5 5"], None),
            (&[""], None),
            (&["18446744073709551616"], None),
            (&[], None),
        ] {
            let response = lines.iter().fold(http::Response::builder(), |it, line| it.header("content-length", *line));
            let (mut head, ()) = response.body(()).expect("ok").into_parts();
            to_client(&mut head);
            let passed: Vec<_> = head.headers.get_all("content-length").iter().collect();
            assert_eq!(passed, Vec::from_iter(length), "{lines:?}");
        }
    }

    #[test]
    fn a_transfer_coding_besides_chunks_is_refused() {
        let check = |lines: &[&str]| {
            let response =
                lines.iter().fold(http::Response::builder(), |it, line| it.header("transfer-encoding", *line));
            check_answer(&response.body(()).expect("ok").into_parts().0).map_err(|failure| failure.cause)
        };
        for lines in [&[][..], &["chunked"], &["Chunked"]] {
            assert_eq!(check(lines), Ok(()), "{lines:?}");
        }
        for lines in [&["gzip, chunked"][..], &["gzip"], &["chunked", "chunked"], &["identity"], &[""]] {
            assert_eq!(check(lines), Err(Cause::InvalidResponse), "{lines:?}");
        }
    }

    #[test]
    fn a_length_beside_a_transfer_encoding_is_dropped() {
        let response = http::Response::builder().header("transfer-encoding", "chunked").header("content-length", "5");
        let (mut head, ()) =
            response.header("set-cookie", "a").header("set-cookie", "b").body(()).expect("ok").into_parts();
        to_client(&mut head);
        assert_eq!(head.headers.len(), 2);
        assert_eq!(head.headers.get_all("set-cookie").iter().count(), 2);
    }
}

//! Which call a path stands for.
//!
//! The decision is made on the path as the gateway will understand it (percent-decoded, dot segments removed, slashes merged);
//! what is forwarded is the client's own bytes. So no spelling of a path escapes the limits, or the gateway's base URL. Nor
//! does one of the method: some servers take `post` for POST.

use http::Method;

use crate::openai::call::Endpoint;

/// Where a request goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Route<'p> {
    /// The path behind `/v1`, byte for byte.
    pub below_v1: &'p str,
    /// The metered call it stands for, if it is one.
    pub endpoint: Option<Endpoint>,
}

/// The route of a request; `None` where its path is not under `/v1`.
pub fn route<'p>(method: &Method, path: &'p str) -> Option<Route<'p>> {
    let route = route_of(path)?;
    let endpoint = route.endpoint.filter(|_| method.as_str().eq_ignore_ascii_case("POST"));
    Some(Route { endpoint, ..route })
}

fn route_of(path: &str) -> Option<Route<'_>> {
    let below_v1 = path.strip_prefix("/v1")?;
    if !below_v1.starts_with('/') {
        return None;
    }
    // The usual case: nothing to decode, nothing to remove.
    if let Some(endpoint) = Endpoint::at(below_v1) {
        return Some(Route { below_v1, endpoint: Some(endpoint) });
    }
    let resolved = resolve(&decode(below_v1))?;
    Some(Route { below_v1, endpoint: Endpoint::at(&resolved) })
}

/// Undoes percent-encoding, once, as the gateway will.
fn decode(path: &str) -> Vec<u8> {
    let mut decoded = Vec::with_capacity(path.len());
    let mut rest = path.as_bytes();
    while let Some((byte, after)) = rest.split_first() {
        match (byte, after) {
            (b'%', [high, low, after @ ..]) if high.is_ascii_hexdigit() && low.is_ascii_hexdigit() => {
                decoded.push(16 * hex(*high) + hex(*low));
                rest = after;
            }
            _ => {
                decoded.push(*byte);
                rest = after;
            }
        }
    }
    decoded
}

fn hex(digit: u8) -> u8 {
    match digit {
        b'0'..=b'9' => digit - b'0',
        b'a'..=b'f' => digit - b'a' + 10,
        _ => digit - b'A' + 10,
    }
}

/// Removes empty and dot segments; `None` where the path climbs out of its root. Some servers take `\` for `/`.
fn resolve(path: &[u8]) -> Option<String> {
    let mut segments: Vec<&[u8]> = Vec::new();
    for segment in path.split(|byte| matches!(byte, b'/' | b'\\')) {
        match segment {
            b"" | b"." => {}
            b".." => drop(segments.pop()?),
            segment => segments.push(segment),
        }
    }
    let mut resolved = String::with_capacity(path.len());
    for segment in segments {
        resolved.push('/');
        resolved.push_str(&String::from_utf8_lossy(segment));
    }
    Some(resolved)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn route(path: &str) -> Option<Route<'_>> {
        super::route(&Method::POST, path)
    }

    #[test]
    fn only_a_post_is_a_metered_call_however_it_is_spelled() {
        for (method, metered) in [("POST", true), ("post", true), ("Post", true), ("GET", false), ("POSTS", false)] {
            let method = Method::from_bytes(method.as_bytes()).expect("a token");
            let route = super::route(&method, "/v1/chat/completions").expect("a route");
            assert_eq!(route.endpoint.is_some(), metered, "{method}");
        }
    }

    #[test]
    fn metered_calls_are_known_however_they_are_spelled() {
        for path in [
            "/v1/chat/completions",
            "/v1/chat/completions/",
            "/v1//chat/completions",
            "/v1/chat/./completions",
            "/v1/x/../chat/completions",
            "/v1/%63hat/completions",
            "/v1/chat%2Fcompletions",
        ] {
            assert_eq!(route(path).expect(path).endpoint, Some(Endpoint::ChatCompletions), "{path}");
        }
        assert_eq!(route("/v1/models").expect("opaque").endpoint, None);
    }

    #[test]
    fn nothing_outside_v1_is_reached() {
        for path in [
            "/",
            "/v1",
            "/v2/models",
            "/v10/models",
            "/admin",
            "/v1/../admin",
            "/v1/%2e%2e/admin",
            "/v1/..%2Fadmin",
            "/v1/a/../../admin",
            "/v1/..\\admin",
            "*",
        ] {
            assert_eq!(route(path), None, "{path}");
        }
    }

    #[test]
    fn the_path_is_kept_byte_for_byte() {
        assert_eq!(route("/v1/files/a%2Fb").expect("a route").below_v1, "/files/a%2Fb");
        assert_eq!(route("/v1/").expect("a route").below_v1, "/");
        assert_eq!(route("/v1/100%").expect("a stray percent sign is the gateway's to judge").below_v1, "/100%");
    }
}

//! Whether a request is a web page's that has no business here.
//!
//! A listener on loopback is safe from other machines, not from the pages that a browser on this one has open. Two ways lead
//! a page here: it sends a POST to any address it likes without seeing the answer (cross-site request forgery), or it has a
//! name of its own point here and then reads what it likes as if from its own server (DNS rebinding). A browser tells of
//! both. Where a token is asked for neither helps the page, and nothing is looked at.

use http::{HeaderMap, Method, Request, header};

/// What a request by a strange name is told.
pub const STRANGE_NAME: &str = "this listener is on loopback, asks for no token, and does not know the name in Host: a web page could \
                                have made it up. Ask for it as localhost or by its address, or set server.admin_token, with \
                                which every name will do\n";

/// What a page of elsewhere is told.
pub const STRANGE_PAGE: &str =
    "a web page of another site has sent this (Origin, Sec-Fetch-Site); send it with curl, or set server.admin_token\n";

/// Whether every name by which this is asked for is an address, or surely means this machine. A page cannot have such a name,
/// whatever its DNS says. Programs that name no host are no browsers.
pub fn is_of_this_machine<B>(request: &Request<B>) -> bool {
    let in_target = request.uri().authority().map(|authority| Some(authority.as_str()));
    let in_fields = request.headers().get_all(header::HOST).iter().map(|host| host.to_str().ok());
    in_target.into_iter().chain(in_fields).all(|host| host.is_some_and(is_address_or_localhost))
}

/// Whether this changes something and was sent by a page that did not come from here.
pub fn is_forged<B>(request: &Request<B>) -> bool {
    let fields = request.headers();
    !matches!(*request.method(), Method::GET | Method::HEAD) && (is_cross_site(fields) || has_other_origin(fields))
}

fn is_cross_site(fields: &HeaderMap) -> bool {
    fields.get_all("sec-fetch-site").iter().any(|site| !matches!(site.as_bytes(), b"same-origin" | b"none"))
}

/// Older browsers, and those that do not take this for a safe connection, tell no more than that.
fn has_other_origin(fields: &HeaderMap) -> bool {
    let host = fields.get(header::HOST).map(|host| host.as_bytes().to_ascii_lowercase());
    let is_own = |origin: &[u8]| {
        let authority = origin.strip_prefix(b"http://").or_else(|| origin.strip_prefix(b"https://"));
        authority.is_some_and(|authority| Some(authority.to_ascii_lowercase()) == host)
    };
    fields.get_all(header::ORIGIN).iter().any(|origin| !is_own(origin.as_bytes()))
}

fn is_address_or_localhost(host: &str) -> bool {
    if let Some(bracketed) = host.strip_prefix('[') {
        return bracketed.split_once(']').is_some_and(|(address, _)| address.parse::<std::net::Ipv6Addr>().is_ok());
    }
    let name = host.rsplit_once(':').map_or(host, |(name, _)| name).trim_end_matches('.').to_ascii_lowercase();
    // RFC 6761: what ends in localhost is never asked for in the DNS.
    name.is_empty() || name == "localhost" || name.ends_with(".localhost") || name.parse::<std::net::Ipv4Addr>().is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(method: Method, target: &str, fields: &[(&str, &str)]) -> Request<()> {
        let request = Request::builder().method(method).uri(target);
        let request = fields.iter().fold(request, |request, (name, value)| request.header(*name, *value));
        request.body(()).expect("a request")
    }

    #[test]
    fn a_page_cannot_have_the_name_of_this_machine() {
        let known = [
            "localhost",
            "LocalHost:9090",
            "weir.localhost:9090",
            "localhost.:1",
            "127.0.0.1:9090",
            "[::1]:9090",
            "[::1]",
            "",
        ];
        for host in known {
            assert!(is_of_this_machine(&request(Method::GET, "/metrics", &[("host", host)])), "{host}");
        }
        let strange =
            ["evil.example:9090", "localhost.evil.example", "127.0.0.1.evil.example:9090", "notlocalhost", "[evil]:1"];
        for host in strange {
            assert!(!is_of_this_machine(&request(Method::GET, "/metrics", &[("host", host)])), "{host}");
            let doubled = request(Method::GET, "/metrics", &[("host", "localhost"), ("host", host)]);
            assert!(!is_of_this_machine(&doubled), "{host}");
        }
        assert!(is_of_this_machine(&request(Method::GET, "/metrics", &[])), "HTTP/1.0");
        let absolute = request(Method::GET, "http://evil.example/metrics", &[("host", "localhost")]);
        assert!(!is_of_this_machine(&absolute));
    }

    #[test]
    fn a_post_of_another_page_is_told_from_one_of_a_program_or_of_a_page_from_here() {
        let post = |fields: &[(&str, &str)]| is_forged(&request(Method::POST, "/reload", fields));
        let host = ("host", "localhost:9090");
        for own in [&[][..], &[("origin", "http://localhost:9090"), ("sec-fetch-site", "same-origin")]] {
            assert!(!post(&[&[host], own].concat()), "{own:?}");
        }
        for foreign in [
            ("origin", "https://evil.example"),
            ("origin", "http://localhost:3000"),
            ("origin", "null"),
            ("sec-fetch-site", "cross-site"),
            ("sec-fetch-site", "same-site"),
        ] {
            assert!(post(&[host, foreign]), "{foreign:?}");
        }
        let read = request(Method::GET, "/metrics", &[host, ("origin", "https://evil.example")]);
        assert!(!is_forged(&read), "the browser keeps the answer from it");
    }
}

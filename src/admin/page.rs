//! The page at `/status`: one document, written by hand, that asks for /status.json and shows it.
//!
//! It has no data in it, so it goes out without a token; the token is asked for by the page, kept in the tab, and sent with
//! its requests, never in an address. Names in the data come from clients: the page may run its own script only, by a
//! nonce made for each answer, and load nothing else.

use bytes::Bytes;
use http::{HeaderValue, Response, StatusCode, header};
use http_body_util::Full;

/// The page; where its nonce belongs stands [`NONCE`].
const PAGE: &str = include_str!("status.html");

const NONCE: &str = "{{nonce}}";

/// The page.
pub fn page() -> Response<Full<Bytes>> {
    let nonce = format!("{:032x}", rand::random::<u128>());
    let policy = format!(
        "default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self'; img-src data:; \
         base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    );
    let mut response = Response::new(Full::new(PAGE.replace(NONCE, &nonce).into()));
    let fields = response.headers_mut();
    fields.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/html; charset=utf-8"));
    fields
        .insert(header::CONTENT_SECURITY_POLICY, HeaderValue::try_from(policy).expect("words and hexadecimal digits"));
    fields.insert(header::REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
    response
}

/// Where whoever asks for nothing in particular goes.
pub fn to_the_page() -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::default());
    *response.status_mut() = StatusCode::FOUND;
    response.headers_mut().insert(header::LOCATION, HeaderValue::from_static("/status"));
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_loads_nothing_and_every_script_and_style_of_it_has_the_nonce() {
        for (tag, with_nonce) in
            [("<script", "<script nonce=\"{{nonce}}\">"), ("<style", "<style nonce=\"{{nonce}}\">")]
        {
            assert_eq!(PAGE.matches(tag).count(), 1, "one {tag}>");
            assert_eq!(PAGE.matches(with_nonce).count(), 1, "{tag}> has the nonce");
        }
        for foreign in
            ["http://", "https://", " style=", "innerHTML", "outerHTML", "insertAdjacentHTML", "eval(", " on"]
        {
            let found = PAGE.match_indices(foreign).find(|(at, _)| {
                // `xmlns` names are no addresses, and words begin with "on" too.
                let rest = &PAGE[*at..PAGE.len().min(at + 40)];
                let is_handler = || rest[3..].starts_with(|c: char| c.is_ascii_lowercase()) && rest.contains("=\"");
                if foreign == " on" { is_handler() } else { !rest.starts_with("http://www.w3.org/2000/svg") }
            });
            assert_eq!(found.map(|(at, _)| &PAGE[at..PAGE.len().min(at + 60)]), None, "{foreign}");
        }
    }

    #[test]
    fn each_answer_has_a_nonce_of_its_own() {
        let policies: Vec<HeaderValue> =
            (0..2).map(|_| page().headers()[header::CONTENT_SECURITY_POLICY].clone()).collect();
        assert_ne!(policies[0], policies[1]);
    }
}

//! The token that operators send, where the configuration has one.

use http::{HeaderMap, HeaderValue, header};
use subtle::ConstantTimeEq as _;

use crate::config::Secret;

/// What a request without the token is told.
pub const HELP: &str = "this needs the token of the configuration (server.admin_token), as \"Authorization: Bearer TOKEN\"; \
                        the page at /status asks for it; /livez and /readyz go without\n";

/// `WWW-Authenticate` of a 401.
pub const CHALLENGE: HeaderValue = HeaderValue::from_static("Bearer realm=\"weir\"");

/// Whether a request with these fields may look; everyone may where there is no token. It takes as long for a token that is
/// nearly right as for any other of its length.
pub fn admits(token: Option<&Secret>, fields: &HeaderMap) -> bool {
    let Some(token) = token else { return true };
    let mut sent = fields.get_all(header::AUTHORIZATION).iter();
    // Of two, nobody could say which counts.
    let (Some(sent), None) = (sent.next(), sent.next()) else { return false };
    let scheme_and_token = sent.as_bytes().split_at_checked("bearer ".len());
    scheme_and_token.is_some_and(|(scheme, sent)| {
        scheme.eq_ignore_ascii_case(b"bearer ") && sent.trim_ascii().ct_eq(token.reveal().as_bytes()).into()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fields(values: &[&str]) -> HeaderMap {
        values.iter().map(|value| (header::AUTHORIZATION, HeaderValue::from_str(value).expect("a value"))).collect()
    }

    #[test]
    fn only_the_token_itself_is_let_through() {
        let token = Secret::resolve("s3cret", &|_| None).expect("a token");
        for good in ["Bearer s3cret", "bearer s3cret", "BEARER  s3cret "] {
            assert!(admits(Some(&token), &fields(&[good])), "{good}");
        }
        for bad in ["", "s3cret", "Bearer", "Bearer ", "Bearer s3cre", "Bearer s3cret1", "Basic s3cret", "Bearers3cret"]
        {
            assert!(!admits(Some(&token), &fields(&[bad])), "{bad}");
        }
        assert!(!admits(Some(&token), &HeaderMap::new()));
        assert!(!admits(Some(&token), &fields(&["Bearer s3cret", "Bearer s3cret"])), "doubled");
    }

    #[test]
    fn without_a_token_everyone_may_look() {
        assert!(admits(None, &HeaderMap::new()));
    }
}

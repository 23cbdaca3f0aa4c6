//! The gateway's base URL, taken apart once.

use std::fmt;
use std::path::{Path, PathBuf};

use http::uri::{Authority, Scheme, Uri};

use super::address::socket_path;

/// An `http` or `https` URL without query, or a unix socket and a path: where a client's `/v1` leads to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UpstreamUrl {
    scheme: Scheme,
    /// Of a unix socket: `localhost`.
    authority: Authority,
    /// Where there is `http` behind a unix socket.
    socket: Option<PathBuf>,
    /// The path before the client's own: `/v1`, without a slash at its end; empty for the root.
    path: String,
}

impl Default for UpstreamUrl {
    fn default() -> Self {
        Self::parse("https://api.holysheep.ai/v1").expect("the default URL is one")
    }
}

impl UpstreamUrl {
    /// Takes a base URL apart.
    ///
    /// # Errors
    /// Says what is wrong with it and shows one that would do.
    pub fn parse(text: &str) -> Result<Self, String> {
        if let Some(rest) = text.strip_prefix("unix:") {
            return Self::behind_socket(rest);
        }
        if let Some(rest) = text.strip_prefix("http://unix:") {
            return Err(format!("begins with http://; a unix socket is written without, as in \"unix:{rest}\""));
        }
        // A password may stand in it.
        let shown = if text.contains('@') { "the URL".to_owned() } else { format!("{text:?}") };
        let wrong = |what: &str| format!("{shown} {what}; write a base URL, as in \"https://api.holysheep.ai/v1\"");
        let uri: Uri = text.parse().map_err(|_| wrong("is not a URL"))?;
        let parts = uri.into_parts();
        let scheme = match parts.scheme {
            Some(scheme) if scheme == Scheme::HTTP || scheme == Scheme::HTTPS => scheme,
            _ => return Err(wrong("begins with neither http:// nor https://")),
        };
        let authority = parts.authority.ok_or_else(|| wrong("has no host"))?;
        if authority.as_str().contains('@') {
            return Err("has a user name or password in it; put the key into upstream.api_key".to_owned());
        }
        if authority.host().is_empty() || text.contains('#') {
            return Err(wrong("has no host, or a fragment"));
        }
        let path = parts.path_and_query.as_ref().map_or("", |path| path.path());
        if parts.path_and_query.as_ref().is_some_and(|path| path.query().is_some()) {
            return Err(wrong("has a query"));
        }
        Ok(Self { scheme, path: path.trim_end_matches('/').to_owned(), authority, socket: None })
    }

    /// Reads what stands behind `unix:`: the socket and, after a colon, the path of the URL (as nginx writes it).
    fn behind_socket(rest: &str) -> Result<Self, String> {
        let (socket, path) = rest.split_once(':').unwrap_or((rest, ""));
        let socket = socket_path(socket)?;
        let is_path = path.is_empty() || path.starts_with('/');
        match path_of(path).filter(|_| is_path) {
            Some(path) => Ok(Self {
                scheme: Scheme::HTTP,
                authority: Authority::from_static("localhost"),
                socket: Some(socket),
                path,
            }),
            None => Err(format!(
                "{path:?} is not a path without query; write a socket and a path, as in \"unix:/run/gateway.sock:/v1\""
            )),
        }
    }

    /// The unix socket behind which the gateway is.
    pub fn socket(&self) -> Option<&Path> {
        self.socket.as_deref()
    }

    /// Whether the gateway is reached over TLS.
    pub fn is_tls(&self) -> bool {
        self.scheme == Scheme::HTTPS
    }

    /// Host and, where written, port: the `Host` of every request to the gateway.
    pub fn authority(&self) -> &Authority {
        &self.authority
    }

    /// The host's name or address, without the brackets of an IPv6 address.
    pub fn host(&self) -> &str {
        self.authority.host().trim_start_matches('[').trim_end_matches(']')
    }

    /// The port, or the scheme's own.
    pub fn port(&self) -> u16 {
        self.authority.port_u16().unwrap_or(if self.is_tls() { 443 } else { 80 })
    }

    /// The path that the client's own is appended to; without a slash at its end.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// Scheme and authority, for the connector.
    pub fn origin(&self) -> Uri {
        let parts = Uri::builder().scheme(self.scheme.clone()).authority(self.authority.clone()).path_and_query("/");
        parts.build().expect("the parts of a URL make a URL")
    }
}

impl fmt::Display for UpstreamUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.socket {
            Some(socket) if self.path.is_empty() => write!(f, "unix:{}", socket.display()),
            Some(socket) => write!(f, "unix:{}:{}", socket.display(), self.path),
            None => write!(f, "{}://{}{}", self.scheme, self.authority, self.path),
        }
    }
}

/// A URL's path without a slash at its end; `None` where there is more than a path, or something that no URL has.
fn path_of(text: &str) -> Option<String> {
    let uri: Uri = if text.is_empty() { Uri::from_static("/") } else { text.parse().ok()? };
    let is_whole = uri.query().is_none() && uri.authority().is_none() && !text.contains('#');
    is_whole.then(|| uri.path().trim_end_matches('/').to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_base_url_is_taken_apart() {
        let url = UpstreamUrl::parse("http://[::1]:9999/v1/").expect("a URL");
        assert_eq!((url.host(), url.port(), url.path(), url.is_tls()), ("::1", 9999, "/v1", false));
        assert_eq!(url.to_string(), "http://[::1]:9999/v1");
        assert_eq!(UpstreamUrl::default().port(), 443);
        assert_eq!(UpstreamUrl::parse("https://gateway.example").expect("a URL").path(), "");
    }

    #[test]
    fn a_gateway_may_be_behind_a_unix_socket() {
        for (text, socket, path) in [
            ("unix:/run/gateway.sock:/v1", "/run/gateway.sock", "/v1"),
            ("unix:/run/gateway.sock:/", "/run/gateway.sock", ""),
            ("unix:/run/gateway.sock", "/run/gateway.sock", ""),
            ("unix:/a b:/api/openai/", "/a b", "/api/openai"),
        ] {
            let url = UpstreamUrl::parse(text).unwrap_or_else(|error| panic!("{error}"));
            assert_eq!((url.socket(), url.path(), url.is_tls()), (Some(Path::new(socket)), path, false));
            assert_eq!(
                (url.authority().as_str(), url.origin().to_string().as_str()),
                ("localhost", "http://localhost/")
            );
            assert_eq!(UpstreamUrl::parse(&url.to_string()), Ok(url));
        }
        for text in [
            "unix:",
            "unix:gateway.sock:/v1",
            "unix:/run/:/v1",
            "unix:/a:v1",
            "unix:/a:/v1?x",
            "unix:/a:/v1#x",
            "unix:/a:/v 1",
            "unix:/a:http://b/v1",
            "http://unix:/run/gateway.sock:/v1",
        ] {
            let message = UpstreamUrl::parse(text).expect_err(text);
            assert!(message.contains("unix:/"), "{message}");
        }
    }

    #[test]
    fn what_is_no_base_url_is_refused() {
        for text in [
            "",
            "api.holysheep.ai/v1",
            "ftp://a/v1",
            "https:///v1",
            "https://a/v1?x=1",
            "https://u:p@a/v1",
            "https://a/#b",
        ] {
            assert!(UpstreamUrl::parse(text).is_err(), "{text}");
        }
        for text in
            ["https://user:password@a/v1", "user:password@a", "ftp://user:password@a/", "https://user:password@a b"]
        {
            let message = UpstreamUrl::parse(text).expect_err("has a password");
            assert!(!message.contains("password@"), "{message}");
        }
    }
}

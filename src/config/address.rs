//! Where weir listens: an IP address and a port, or a unix socket.

use std::fmt;
use std::net::SocketAddr;
use std::os::unix::net::SocketAddr as UnixAddr;
use std::path::{Path, PathBuf};

use toml::de::DeValue;

use super::reader::FromToml;

/// The address of a listener.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    Tcp(SocketAddr),
    /// Absolute, and short enough for a unix socket (107 bytes on Linux).
    Unix(PathBuf),
}

impl Address {
    /// Reads `"127.0.0.1:8080"`, `"localhost:8080"` or `"unix:/run/weir/weir.sock"`.
    ///
    /// # Errors
    /// Says what is wrong with it and shows one that would do.
    pub fn parse(text: &str) -> Result<Self, String> {
        if let Some(path) = text.strip_prefix("unix:") {
            return socket_path(path).map(Self::Unix);
        }
        let numeric = text.strip_prefix("localhost:").map(|port| format!("127.0.0.1:{port}"));
        numeric.as_deref().unwrap_or(text).parse().map(Self::Tcp).map_err(|_| {
            format!(
                "{text:?} is not an address; write an IP address and a port, as in \"127.0.0.1:8080\" or \
                 \"[::]:8080\", or a unix socket, as in \"unix:/run/weir/weir.sock\""
            )
        })
    }

    /// The IP address and port; `None` for a unix socket.
    pub fn tcp(&self) -> Option<SocketAddr> {
        match self {
            Self::Tcp(address) => Some(*address),
            Self::Unix(_) => None,
        }
    }

    /// Whether only programs on this machine can connect.
    pub fn is_local(&self) -> bool {
        self.tcp().is_none_or(|address| address.ip().is_loopback())
    }

    /// Whether a listener at the other address would be in this one's way. A port of 0 is any that is free.
    pub fn clashes_with(&self, other: &Self) -> bool {
        self == other && self.tcp().is_none_or(|address| address.port() != 0)
    }
}

/// A path at which there can be a unix socket.
///
/// # Errors
/// Says what is wrong with it, and what to write.
pub fn socket_path(text: &str) -> Result<PathBuf, String> {
    let path = Path::new(text);
    if !path.is_absolute() || text.ends_with('/') {
        return Err(format!(
            "{text:?} is not the path of a socket; write one from the root, as in \"unix:/run/weir.sock\""
        ));
    }
    if UnixAddr::from_pathname(path).is_err() {
        return Err(format!("{text:?} is too long for a unix socket; write a path of at most 100 bytes"));
    }
    Ok(path.to_owned())
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

impl FromToml for Address {
    fn from_toml(value: &DeValue<'_>) -> Result<Self, String> {
        Self::parse(&String::from_toml(value)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_an_ip_address_with_a_port_or_a_unix_socket() {
        let local = [("127.0.0.1:1", true), ("localhost:1", true), ("[::1]:1", true), ("unix:/run/weir.sock", true)];
        for (text, is_local) in
            local.into_iter().chain([("0.0.0.0:1", false), ("[::]:1", false), ("10.0.0.1:0", false)])
        {
            let address = Address::parse(text).unwrap_or_else(|error| panic!("{error}"));
            assert_eq!(address.is_local(), is_local, "{text}");
            assert_eq!(address.to_string(), text.replace("localhost", "127.0.0.1"));
            assert_eq!(Address::parse(&address.to_string()), Ok(address));
        }
    }

    #[test]
    fn what_is_no_address_is_refused_with_one_that_would_do() {
        let long = format!("unix:/{}", "x".repeat(200));
        for text in ["", "8080", "weir:8080", "127.0.0.1", "unix:", "unix:weir.sock", "unix:/run/", "unix:/a\0b", &long]
        {
            let message = Address::parse(text).expect_err(text);
            assert!(message.contains("write "), "{message}");
        }
    }

    #[test]
    fn two_listeners_clash_on_the_same_address_but_not_on_ports_that_are_looked_for() {
        let address = |text| Address::parse(text).expect("an address");
        for (text, clash) in [("127.0.0.1:1", true), ("127.0.0.1:0", false), ("unix:/a", true)] {
            assert_eq!(address(text).clashes_with(&address(text)), clash, "{text}");
        }
        assert!(!address("127.0.0.1:1").clashes_with(&address("127.0.0.1:2")));
    }
}

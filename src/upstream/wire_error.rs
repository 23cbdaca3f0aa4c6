//! What can go wrong on a connection to the gateway, from its first byte to its last.

use std::fmt;
use std::io;

use super::payload::BodyFault;

/// Why a connection is of no more use.
#[derive(Debug)]
pub enum WireError {
    Io(io::Error),
    /// The gateway closed it before the answer began.
    Closed,
    /// The gateway closed it in the middle of an answer.
    Truncated,
    /// What came is not the HTTP that weir reads.
    Malformed(&'static str),
    /// The client's body broke off: not the gateway's fault.
    Upload(BodyFault),
}

impl From<io::Error> for WireError {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

impl fmt::Display for WireError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Io(error) => write!(f, "the connection broke: {error}"),
            Self::Closed => f.write_str("the connection was closed before an answer"),
            Self::Truncated => f.write_str("the connection was closed in the middle of the answer"),
            Self::Malformed(what) => write!(f, "the answer cannot be read: {what}"),
            Self::Upload(fault) => write!(f, "{fault}"),
        }
    }
}

impl std::error::Error for WireError {}

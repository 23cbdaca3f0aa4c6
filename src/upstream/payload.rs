//! The body of a request: in memory, or on its way from the client.

use std::fmt;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};

/// A request's body.
#[derive(Debug)]
pub enum Payload {
    /// In memory: it can be sent again.
    Whole(Bytes),
    /// On its way from the client: it can be sent once.
    Streamed(Streamed),
}

/// A body that is passed on as it comes from the client: what was read of it already, then the rest.
pub struct Streamed {
    pub begun: Option<Bytes>,
    pub rest: Pin<Box<dyn Body<Data = Bytes, Error = BodyFault> + Send + Sync>>,
}

/// The client's body broke off: not the gateway's fault.
#[derive(Debug)]
pub struct BodyFault(pub String);

impl fmt::Display for BodyFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for BodyFault {}

impl Body for Payload {
    type Data = Bytes;
    type Error = BodyFault;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyFault>>> {
        match self.get_mut() {
            Self::Whole(bytes) if bytes.is_empty() => Poll::Ready(None),
            Self::Whole(bytes) => Poll::Ready(Some(Ok(Frame::data(std::mem::take(bytes))))),
            Self::Streamed(streamed) => match streamed.begun.take() {
                Some(begun) => Poll::Ready(Some(Ok(Frame::data(begun)))),
                None => streamed.rest.as_mut().poll_frame(cx),
            },
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Whole(bytes) => bytes.is_empty(),
            Self::Streamed(streamed) => streamed.begun.is_none() && streamed.rest.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Whole(bytes) => SizeHint::with_exact(bytes.len() as u64),
            Self::Streamed(streamed) => {
                let begun = streamed.begun.as_ref().map_or(0, |begun| begun.len() as u64);
                match streamed.rest.size_hint().exact() {
                    Some(rest) => SizeHint::with_exact(begun + rest),
                    None => SizeHint::default(),
                }
            }
        }
    }
}

impl fmt::Debug for Streamed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Streamed").field("begun", &self.begun.as_ref().map_or(0, Bytes::len)).finish_non_exhaustive()
    }
}

impl Streamed {
    /// A body of which `begun` was read already.
    pub fn new(begun: Bytes, rest: impl Body<Data = Bytes, Error = BodyFault> + Send + Sync + 'static) -> Self {
        Self { begun: (!begun.is_empty()).then_some(begun), rest: Box::pin(rest) }
    }
}

//! Making a connection to the gateway: TCP, and TLS where the URL says so, or a unix socket.
//!
//! A [`Connector`] is a tower service from the gateway's URL to a byte stream; that is the seam at which a test plugs in
//! a gateway in memory.

use std::fmt;
use std::future::Future;
use std::io;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use http::Uri;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::pki_types::ServerName;
use tokio_rustls::rustls::{ClientConfig, RootCertStore};
use tower::util::BoxCloneSyncService;

use crate::config::UpstreamUrl;

/// Bytes in both directions.
pub trait Transport: AsyncRead + AsyncWrite + Send + Sync + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Sync + Unpin> Transport for T {}

/// A connection, whatever it is made of.
pub type Io = Box<dyn Transport>;

/// From the gateway's scheme and authority to a connection.
pub type Connector = BoxCloneSyncService<Uri, Io, ConnectError>;

/// Why there is no connection.
#[derive(Debug)]
pub struct ConnectError {
    what: String,
    cause: io::Error,
}

impl ConnectError {
    /// `what` was tried, and failed because of `cause`.
    pub fn new(what: impl Into<String>, cause: io::Error) -> Self {
        Self { what: what.into(), cause }
    }
}

impl fmt::Display for ConnectError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.what, self.cause)
    }
}

impl std::error::Error for ConnectError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.cause)
    }
}

/// Connects to the unix socket, where the URL has one; else over TCP, and over TLS for `https`, where the system's
/// certificate authorities are trusted (`SSL_CERT_FILE` and `SSL_CERT_DIR` name others).
///
/// # Errors
/// `https` is asked for, and no certificate authority was found.
pub fn network(url: &UpstreamUrl) -> Result<Connector, String> {
    if let Some(path) = url.socket() {
        let path: Arc<Path> = path.into();
        return Ok(BoxCloneSyncService::new(tower::service_fn(move |_: Uri| connect_unix(path.clone()))));
    }
    let tls = if url.is_tls() { Some(tls_connector()?) } else { None };
    Ok(BoxCloneSyncService::new(Network { tls }))
}

#[derive(Clone)]
struct Network {
    tls: Option<TlsConnector>,
}

impl tower::Service<Uri> for Network {
    type Response = Io;
    type Error = ConnectError;
    type Future = Pin<Box<dyn Future<Output = Result<Io, ConnectError>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), ConnectError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, origin: Uri) -> Self::Future {
        let tls = self.tls.clone();
        Box::pin(async move {
            let host = origin.host().unwrap_or_default().trim_matches(['[', ']']).to_owned();
            let port = origin.port_u16().unwrap_or(if tls.is_some() { 443 } else { 80 });
            let tcp = connect_tcp(&host, port).await?;
            match tls {
                Some(tls) => connect_tls(&tls, host, tcp).await,
                None => Ok(Box::new(tcp) as Io),
            }
        })
    }
}

async fn connect_unix(path: Arc<Path>) -> Result<Io, ConnectError> {
    let failed = |cause| ConnectError::new(format!("cannot connect to unix:{}", path.display()), cause);
    Ok(Box::new(UnixStream::connect(&path).await.map_err(failed)?))
}

/// Tries the host's addresses in turn.
async fn connect_tcp(host: &str, port: u16) -> Result<TcpStream, ConnectError> {
    let failed = |cause| ConnectError::new(format!("cannot connect to {host}:{port}"), cause);
    let tcp = TcpStream::connect((host, port)).await.map_err(failed)?;
    // An event must not wait for the acknowledgement of the one before.
    tcp.set_nodelay(true).map_err(failed)?;
    Ok(tcp)
}

async fn connect_tls(tls: &TlsConnector, host: String, tcp: TcpStream) -> Result<Io, ConnectError> {
    let failed = |cause| ConnectError::new("cannot agree on TLS with the gateway", cause);
    let name =
        ServerName::try_from(host).map_err(|error| failed(io::Error::new(io::ErrorKind::InvalidInput, error)))?;
    let stream = tls.connect(name, tcp).await.map_err(failed)?;
    Ok(Box::new(stream))
}

fn tls_connector() -> Result<TlsConnector, String> {
    let found = rustls_native_certs::load_native_certs();
    let mut roots = RootCertStore::empty();
    let (trusted, _) = roots.add_parsable_certificates(found.certs);
    if trusted == 0 {
        let errors: Vec<String> = found.errors.iter().map(ToString::to_string).collect();
        return Err(format!(
            "no certificate authority found to trust the gateway by: install the system's (ca-certificates), or name a file \
             with SSL_CERT_FILE {}",
            errors.join("; ")
        ));
    }
    let mut config = ClientConfig::builder().with_root_certificates(roots).with_no_client_auth();
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(TlsConnector::from(Arc::new(config)))
}

//! TLS towards clients: the certificate, which can be exchanged while weir runs, and the handshake.

use std::fmt;
use std::fs;
use std::io;
use std::path::Path;
use std::sync::{Arc, PoisonError, RwLock};

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::crypto::ring::{Ticketer, sign};
use tokio_rustls::rustls::pki_types::pem::{self, PemObject as _};
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::server::{ClientHello, ResolvesServerCert};
use tokio_rustls::rustls::sign::CertifiedKey;
use tokio_rustls::rustls::{Error, InconsistentKeys, ServerConfig, ServerConnection};
use zeroize::{Zeroize as _, Zeroizing};

use super::edge::{Protocol, serialize};
use crate::config;
use crate::error::{Cause, Failure};
use crate::upstream::connect::Io;

/// The protocols that weir offers, the one that it likes best first (RFC 7301).
const ALPN: [&[u8]; 2] = [b"h2", b"http/1.1"];

/// What is needed for handshakes. Clones share the certificate.
#[derive(Clone)]
pub struct Tls {
    acceptor: TlsAcceptor,
    certificate: Arc<Certificate>,
}

/// The certificate in force. The lock guards which one; a handshake holds it for as long as it takes to clone an `Arc`.
#[derive(Debug)]
struct Certificate(RwLock<Arc<CertifiedKey>>);

/// A certificate and its key that fit each other, to be shown in the place of another.
pub struct NewCertificate(Arc<CertifiedKey>);

impl NewCertificate {
    /// Reads the certificate and its key.
    ///
    /// # Errors
    /// As [`Tls::load`].
    pub fn read(files: &config::Tls) -> Result<Self, String> {
        read(files).map(|certified| Self(Arc::new(certified)))
    }
}

impl ResolvesServerCert for Certificate {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(&self.0.read().unwrap_or_else(PoisonError::into_inner)))
    }
}

impl Tls {
    /// Reads the certificate and its key.
    ///
    /// # Errors
    /// A file that can't be read or has not what it should, or a key that is another certificate's.
    pub fn load(files: &config::Tls) -> Result<Self, String> {
        let certificate = Arc::new(Certificate(RwLock::new(Arc::new(read(files)?))));
        let mut config = ServerConfig::builder().with_no_client_auth().with_cert_resolver(certificate.clone());
        config.alpn_protocols = ALPN.map(<[u8]>::to_vec).into();
        // A client that comes back saves the signature, and weir remembers nothing for it.
        config.ticketer = Ticketer::new().map_err(|error| format!("no random numbers for TLS: {error}"))?;
        Ok(Self { acceptor: TlsAcceptor::from(Arc::new(config)), certificate })
    }

    /// Shows this certificate in handshakes from now on; connections that there are go on as they are.
    pub fn show(&self, new: NewCertificate) {
        *self.certificate.0.write().unwrap_or_else(PoisonError::into_inner) = new.0;
    }

    /// Agrees on TLS with a client, and tells what was agreed to be spoken; `None` where the client left it open. One that
    /// speaks HTTP without TLS is told so.
    ///
    /// # Errors
    /// The client went away, or there is nothing to agree on.
    pub(super) async fn accept<I>(&self, mut io: I) -> io::Result<(Io, Option<Protocol>)>
    where
        I: AsyncRead + AsyncWrite + Send + Sync + Unpin + 'static,
    {
        let mut first = [0];
        io.read_exact(&mut first).await?;
        // A record of TLS begins with its kind, 20 to 24; a method with a letter.
        if first[0].is_ascii_alphabetic() {
            refuse_plain(io).await?;
            return Err(io::Error::other("it speaks HTTP without TLS"));
        }
        // One byte is no message yet, so there is nothing to be done about it before the next come.
        let put_back = |connection: &mut ServerConnection| drop(connection.read_tls(&mut &first[..]));
        let stream = self.acceptor.accept_with(io, put_back).await?;
        let is_http2 = stream.get_ref().1.alpn_protocol() == Some(b"h2");
        Ok((Box::new(stream), is_http2.then_some(Protocol::Http2)))
    }
}

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Tls")
    }
}

/// Tells a client that this is no port for HTTP without TLS, and reads what it still sends, until it ends: were that left
/// unread, the kernel would reset the connection, and the answer with it.
async fn refuse_plain(mut io: impl AsyncRead + AsyncWrite + Unpin) -> io::Result<()> {
    let failure = Failure::new(Cause::BadRequest, "this port speaks TLS: begin the base URL with https://");
    io.write_all(&serialize(&failure)).await?;
    io.shutdown().await?;
    tokio::io::copy(&mut io, &mut tokio::io::sink()).await.map(drop)
}

fn read(config::Tls { cert, key }: &config::Tls) -> Result<CertifiedKey, String> {
    let chain = read_chain(cert)?;
    let mut secret = read_key(key)?;
    let signing_key = sign::any_supported_type(&secret);
    secret.zeroize();
    let signing_key = signing_key
        .map_err(|_| format!("server.tls.key: the key in {} is of a kind that weir does not know", key.display()))?;
    let certified = CertifiedKey::new(chain, signing_key);
    match certified.keys_match() {
        // The kind of key that tells no public one.
        Ok(()) | Err(Error::InconsistentKeys(InconsistentKeys::Unknown)) => Ok(certified),
        Err(Error::InconsistentKeys(_)) => Err(format!(
            "server.tls: the key in {} is not that of the certificate in {}",
            key.display(),
            cert.display()
        )),
        Err(error) => Err(format!("server.tls.cert: the first certificate in {} is none: {error}", cert.display())),
    }
}

fn read_chain(file: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let text = fs::read(file).map_err(|error| format!("server.tls.cert: cannot read {}: {error}", file.display()))?;
    let chain: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&text).collect();
    match chain {
        Ok(chain) if !chain.is_empty() => Ok(chain),
        Ok(_) | Err(pem::Error::NoItemsFound) => {
            Err(format!("server.tls.cert: there is no certificate in {}; it has to be in PEM", file.display()))
        }
        Err(error) => Err(format!("server.tls.cert: {} is not PEM: {error}", file.display())),
    }
}

fn read_key(file: &Path) -> Result<PrivateKeyDer<'static>, String> {
    let text = fs::read(file).map_err(|error| format!("server.tls.key: cannot read {}: {error}", file.display()))?;
    PrivateKeyDer::from_pem_slice(&Zeroizing::new(text)).map_err(|error| match error {
        pem::Error::NoItemsFound => format!(
            "server.tls.key: there is no key in {} that weir can read; it has to be in PEM, without a password",
            file.display()
        ),
        // What stands in the file is not shown.
        _ => format!("server.tls.key: {} is not PEM", file.display()),
    })
}

//! Sockets that clients and operators connect to: bound here, or handed over by who has started weir; TCP, or unix.

use std::fs;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::task::{Context, Poll, Waker};

use tokio::net::{TcpListener, TcpSocket, TcpStream, UnixListener, UnixSocket, UnixStream};

use crate::config::Address;
use crate::upstream::connect::Io;

/// Connections that the kernel keeps until they are accepted; it has a bound of its own (`net.core.somaxconn`). With the
/// usual 128, a burst of some hundred clients gets a reset now and then.
const BACKLOG: u32 = 4096;

/// A socket that listens. Dropping it closes it, and removes the file of a unix socket that was bound here.
#[derive(Debug)]
pub struct Listener {
    // Before the socket: a weir that finds the file, but nobody behind it, takes the place.
    _file: Option<SocketFile>,
    socket: Socket,
    address: Address,
    is_inherited: bool,
}

#[derive(Debug)]
enum Socket {
    Tcp(TcpListener),
    Unix(UnixListener),
}

/// A listening socket that belongs to no runtime: at first that of who has started weir.
#[derive(Debug)]
pub enum Inherited {
    Tcp(std::net::TcpListener),
    Unix(std::os::unix::net::UnixListener),
}

/// A connection that was accepted.
#[derive(Debug)]
pub enum Connection {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Listener {
    /// Binds an address; `option` names it to the operator.
    ///
    /// # Errors
    /// That it is taken or not this machine's, with what to do about it.
    pub fn bind(address: &Address, option: &str) -> Result<Self, String> {
        match address {
            Address::Tcp(address) => Self::bind_tcp(*address).map_err(|error| explain_tcp(&error, *address, option)),
            Address::Unix(path) => Self::bind_unix(path).map_err(|error| explain_unix(&error, path, option)),
        }
    }

    /// Listens on a socket that is bound and listens already.
    ///
    /// # Errors
    /// The kernel's.
    pub fn inherit(socket: Inherited) -> io::Result<Self> {
        let address = socket.address()?;
        let socket = match socket {
            Inherited::Tcp(listener) => {
                listener.set_nonblocking(true)?;
                Socket::Tcp(TcpListener::from_std(listener)?)
            }
            Inherited::Unix(listener) => {
                listener.set_nonblocking(true)?;
                Socket::Unix(UnixListener::from_std(listener)?)
            }
        };
        Ok(Self { _file: None, socket, address, is_inherited: true })
    }

    fn bind_tcp(address: SocketAddr) -> io::Result<Self> {
        let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
        // A weir that starts again need not wait for the last one's connections to be forgotten.
        socket.set_reuseaddr(true)?;
        socket.bind(address)?;
        let listener = socket.listen(BACKLOG)?;
        let address = Address::Tcp(listener.local_addr()?);
        Ok(Self { _file: None, socket: Socket::Tcp(listener), address, is_inherited: false })
    }

    fn bind_unix(path: &Path) -> io::Result<Self> {
        remove_if_stale(path)?;
        let socket = UnixSocket::new_stream()?;
        socket.bind(path)?;
        let file = SocketFile::of(path)?;
        let listener = socket.listen(BACKLOG)?;
        let address = Address::Unix(path.to_owned());
        Ok(Self { _file: Some(file), socket: Socket::Unix(listener), address, is_inherited: false })
    }

    /// Where clients connect; a port given as 0 is the one that was found free.
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// Whether others may have the same socket, so that it goes on without weir.
    pub fn is_inherited(&self) -> bool {
        self.is_inherited
    }

    /// The next connection, and the address that it comes from, where it has one. Dropping the future loses none.
    ///
    /// # Errors
    /// The kernel's.
    pub async fn accept(&self) -> io::Result<(Connection, Option<IpAddr>)> {
        match &self.socket {
            Socket::Tcp(listener) => {
                let (stream, peer) = listener.accept().await?;
                Ok((Connection::Tcp(stream), Some(peer.ip())))
            }
            Socket::Unix(listener) => Ok((Connection::Unix(listener.accept().await?.0), None)),
        }
    }

    /// Closes it, and gives those who have connected and wait to be accepted: the kernel would reset them. It is closed when
    /// the iterator is dropped, which is to be at the first error that is not a connection's own. Of an inherited socket
    /// they are the next one's, and the iterator is empty.
    pub fn close(self) -> impl Iterator<Item = io::Result<(Connection, Option<IpAddr>)>> {
        let Self { _file: file, socket, is_inherited, .. } = self;
        // From here on nobody finds a unix socket.
        drop(file);
        let own = if is_inherited { None } else { socket.into_inherited().ok() };
        // Not the runtime's: it would have to look first who is there. Of TCP others may be coming all the time.
        std::iter::from_fn(move || own.as_ref().map(Inherited::accept)).take(BACKLOG as usize)
    }
}

impl Socket {
    fn into_inherited(self) -> io::Result<Inherited> {
        Ok(match self {
            Self::Tcp(listener) => Inherited::Tcp(listener.into_std()?),
            Self::Unix(listener) => Inherited::Unix(listener.into_std()?),
        })
    }
}

impl Inherited {
    /// Who has connected, if somebody has; it does not block.
    fn accept(&self) -> io::Result<(Connection, Option<IpAddr>)> {
        match self {
            Self::Tcp(listener) => {
                let (stream, peer) = listener.accept()?;
                stream.set_nonblocking(true)?;
                Ok((Connection::Tcp(TcpStream::from_std(stream)?), Some(peer.ip())))
            }
            Self::Unix(listener) => {
                let (stream, _) = listener.accept()?;
                stream.set_nonblocking(true)?;
                Ok((Connection::Unix(UnixStream::from_std(stream)?), None))
            }
        }
    }

    /// Where it listens.
    ///
    /// # Errors
    /// The kernel's, or that a unix socket has no path.
    pub fn address(&self) -> io::Result<Address> {
        match self {
            Self::Tcp(listener) => listener.local_addr().map(Address::Tcp),
            Self::Unix(listener) => {
                let address = listener.local_addr()?;
                let path = address.as_pathname().ok_or_else(|| io::Error::other("it has no path"))?;
                Ok(Address::Unix(path.to_owned()))
            }
        }
    }
}

impl Connection {
    /// The same connection, whatever it is made of.
    pub fn into_io(self) -> Io {
        match self {
            Self::Tcp(stream) => Box::new(stream),
            Self::Unix(stream) => Box::new(stream),
        }
    }
}

/// The file of a unix socket that weir has bound; removed when dropped, if it is still the same.
#[derive(Debug)]
struct SocketFile {
    path: PathBuf,
    /// Device and inode. The kernel gives no other file that inode while the socket is open.
    identity: (u64, u64),
}

impl SocketFile {
    fn of(path: &Path) -> io::Result<Self> {
        Ok(Self { path: path.to_owned(), identity: identity(path)? })
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if identity(&self.path).is_ok_and(|identity| identity == self.identity) {
            // Left behind, it is replaced by the next weir.
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    let metadata = fs::symlink_metadata(path)?;
    Ok((metadata.dev(), metadata.ino()))
}

/// Removes the file of a socket that nobody listens on any more: its program was killed. What is no socket, or has
/// somebody behind it, stays, and is in the way.
///
/// Two weirs that start at the same moment may both find the same stale file, and the later one then takes the place.
fn remove_if_stale(path: &Path) -> io::Result<()> {
    let Ok(found) = fs::symlink_metadata(path) else { return Ok(()) };
    if !found.file_type().is_socket() {
        return Err(io::ErrorKind::AlreadyExists.into());
    }
    if !is_refused(path)? {
        return Err(io::ErrorKind::AddrInUse.into());
    }
    // Somebody else may have been faster.
    let is_the_same = identity(path).is_ok_and(|identity| identity == (found.dev(), found.ino()));
    if is_the_same { fs::remove_file(path) } else { Ok(()) }
}

/// Whether nobody listens on a unix socket. Whoever is too busy to accept, or not for weir to talk to, does listen.
fn is_refused(path: &Path) -> io::Result<bool> {
    // The kernel answers at once; what would be waited for is a connection that there is.
    let connecting = pin!(UnixSocket::new_stream()?.connect(path));
    let answered = connecting.poll(&mut Context::from_waker(Waker::noop()));
    Ok(matches!(answered, Poll::Ready(Err(error)) if error.kind() == io::ErrorKind::ConnectionRefused))
}

fn explain_tcp(error: &io::Error, address: SocketAddr, option: &str) -> String {
    match error.kind() {
        io::ErrorKind::AddrInUse => {
            format!("cannot listen on {address}: another program does; stop it, or give {option} another port")
        }
        io::ErrorKind::PermissionDenied => {
            format!(
                "cannot listen on {address}: not allowed; ports below 1024 need a privilege, so give {option} another"
            )
        }
        _ => format!("cannot listen on {address} ({option}): {error}"),
    }
}

fn explain_unix(error: &io::Error, path: &Path, option: &str) -> String {
    let path = path.display();
    match error.kind() {
        io::ErrorKind::AddrInUse => {
            format!("cannot listen on unix:{path}: another program does; stop it, or give {option} another path")
        }
        io::ErrorKind::AlreadyExists => {
            format!("cannot listen on unix:{path}: there is a file that is no socket; give {option} another path")
        }
        io::ErrorKind::PermissionDenied => {
            format!("cannot listen on unix:{path} ({option}): weir may not create a file there")
        }
        io::ErrorKind::NotFound => format!("cannot listen on unix:{path} ({option}): its folder does not exist"),
        _ => format!("cannot listen on unix:{path} ({option}): {error}"),
    }
}

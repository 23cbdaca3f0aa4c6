//! What a service manager hands over, and what it wants to be told.
//!
//! *Socket activation* (`sd_listen_fds(3)`): sockets that listen already come with the process, from descriptor 3 on.
//! `LISTEN_FDS` says how many, `LISTEN_PID` to whom, `LISTEN_FDNAMES` what they are called. Such a socket outlives the
//! process: who connects while one weir ends and the next begins waits in the kernel, and two weirs can serve it at once.
//!
//! *Notification* (`sd_notify(3)`): a line to the socket that `NOTIFY_SOCKET` names.

use std::env;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

use listenfd::ListenFd;

use crate::config::{Address, Config};
use crate::server::{Inherited, Listener};

/// The names (`FileDescriptorName=` of a socket unit) that say who is to connect to a socket.
const FOR_CLIENTS: &str = "listen";
const FOR_OPERATORS: &str = "admin";

/// More sockets than this are a mistake.
const MAX_SOCKETS: usize = 64;

/// The sockets that were handed over.
#[derive(Debug, Default)]
pub struct Sockets(Vec<Socket>);

#[derive(Debug)]
struct Socket {
    /// Empty where it has none.
    name: String,
    address: Address,
    socket: Inherited,
}

/// Every listener that a configuration asks for.
#[derive(Debug)]
pub struct Listeners {
    /// At least one.
    pub clients: Vec<Listener>,
    pub admin: Listener,
}

impl Sockets {
    /// Takes the sockets that this process was started with, and forgets the variables that tell of them. To be called once,
    /// before there are other threads.
    ///
    /// # Errors
    /// One of them is not a stream socket that listens.
    pub fn from_env() -> Result<Self, String> {
        let names = env::var("LISTEN_FDNAMES").unwrap_or_default();
        if env::var("LISTEN_FDS").is_ok_and(|count| count.parse().is_ok_and(|count: usize| count > MAX_SOCKETS)) {
            return Err(format!("more than {MAX_SOCKETS} sockets are handed over (LISTEN_FDS)"));
        }
        let mut handed = ListenFd::from_env();
        let mut names = names.split(':').filter(|name| *name != "unknown");
        let sockets = (0..handed.len()).map(|index| {
            let name = names.next().unwrap_or_default().to_owned();
            take(&mut handed, index)
                .and_then(|socket| Ok(Socket { address: socket.address()?, name: name.clone(), socket }))
                .map_err(|error| {
                    format!("cannot listen on descriptor {} ({name:?}), which was handed over: {error}", 3 + index)
                })
        });
        sockets.collect::<Result<_, _>>().map(Self)
    }

    /// Puts each socket in the place of what the configuration names, and binds the rest.
    ///
    /// Those named `listen` stand for `server.listen` as a whole, the one named `admin` for `server.admin_listen`; any other
    /// for the option that has its address.
    ///
    /// # Errors
    /// A socket that stands for nothing, a second one for operators, one that would lend the gateway's key to strangers,
    /// or an address that can't be bound.
    pub fn listeners(self, config: &Config) -> Result<Listeners, String> {
        let settings = &config.server;
        let named = self.0.iter().any(|socket| socket.name == FOR_CLIENTS);
        let (mut clients, mut admin) = (Vec::new(), None);
        for Socket { name, address, socket } in self.0 {
            let place = Place::of(&name, &address, config)?;
            let listener = Listener::inherit(socket).map_err(|error| format!("cannot listen on {address}: {error}"))?;
            match place {
                Place::Clients => clients.push(listener),
                Place::Operators if admin.is_none() => admin = Some(listener),
                Place::Operators => {
                    return Err("two sockets for operators are handed over; there can be one".to_owned());
                }
            }
        }
        if !named {
            for address in &settings.listen {
                if !clients.iter().any(|listener| listener.address() == address) {
                    clients.push(Listener::bind(address, "server.listen")?);
                }
            }
        }
        let admin = match admin {
            Some(admin) => admin,
            None => Listener::bind(&settings.admin_listen, "server.admin_listen")?,
        };
        Ok(Listeners { clients, admin })
    }
}

/// Who connects to a socket.
#[derive(Debug, PartialEq, Eq)]
enum Place {
    Clients,
    Operators,
}

impl Place {
    fn of(name: &str, address: &Address, config: &Config) -> Result<Self, String> {
        match name {
            FOR_OPERATORS => Ok(Self::Operators),
            FOR_CLIENTS => config.may_listen(address).map(|()| Self::Clients),
            _ if *address == config.server.admin_listen => Ok(Self::Operators),
            _ if config.server.listen.contains(address) => Ok(Self::Clients),
            _ => Err(format!(
                "the socket at {address} (\"{}\") that was handed over is for nobody: name it with FileDescriptorName=listen \
                 (for clients) or FileDescriptorName=admin, or give server.listen or server.admin_listen its address",
                name.escape_default()
            )),
        }
    }
}

/// The socket at an index: TCP, or else unix.
fn take(handed: &mut ListenFd, index: usize) -> io::Result<Inherited> {
    let gone = || io::Error::other("it was taken before");
    let socket = match handed.take_tcp_listener(index) {
        Ok(listener) => Inherited::Tcp(not_connected(listener.ok_or_else(gone)?)?),
        Err(_) => Inherited::Unix(handed.take_unix_listener(index).map_err(|_| not_a_stream())?.ok_or_else(gone)?),
    };
    Ok(socket)
}

fn not_a_stream() -> io::Error {
    io::Error::other("it is no TCP or unix stream socket (ListenStream= makes one)")
}

/// With `Accept=yes` systemd hands over connections, one to each process.
fn not_connected(listener: std::net::TcpListener) -> io::Result<std::net::TcpListener> {
    let stream = std::net::TcpStream::from(OwnedFd::from(listener));
    match stream.peer_addr() {
        Ok(_) => Err(io::Error::other("it is a connection; the socket unit needs Accept=no")),
        Err(_) => Ok(OwnedFd::from(stream).into()),
    }
}

/// How long it is waited for a service manager to take a word that it needs.
const PATIENCE: Duration = Duration::from_secs(1);

/// Tells the service manager, where one wants to know: `READY=1`, `STOPPING=1`.
pub fn notify(state: &str) {
    tell(state, |socket| socket.set_write_timeout(Some(PATIENCE)));
}

/// Tells it how weir stands, in words. One that does not read what it is told holds up nobody.
pub fn say(words: &str) {
    tell(&format!("STATUS={words}"), |socket| socket.set_nonblocking(true));
}

fn tell(state: &str, patience: impl FnOnce(&UnixDatagram) -> io::Result<()>) {
    let Ok(path) = env::var("NOTIFY_SOCKET") else { return };
    let told = address_of(&path).and_then(|address| {
        let socket = UnixDatagram::unbound()?;
        patience(&socket)?;
        socket.send_to_addr(state.as_bytes(), &address)
    });
    if let Err(error) = told {
        tracing::warn!(%error, state, "the service manager cannot be told (NOTIFY_SOCKET)");
    }
}

/// A path, or on Linux a name in the abstract namespace behind an `@`.
fn address_of(path: &str) -> io::Result<SocketAddr> {
    #[cfg(target_os = "linux")]
    if let Some(name) = path.strip_prefix('@') {
        use std::os::linux::net::SocketAddrExt as _;
        return SocketAddr::from_abstract_name(name);
    }
    SocketAddr::from_pathname(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(text: &str) -> Config {
        Config::parse(text, &|_| Some("sk-test".to_owned())).unwrap_or_else(|complaints| panic!("{complaints}"))
    }

    fn place(name: &str, address: &str, config: &Config) -> Result<Place, String> {
        Place::of(name, &Address::parse(address).expect("an address"), config)
    }

    #[test]
    fn a_socket_is_for_whom_its_name_says_or_its_address() {
        let config =
            config("[server]\nlisten = [\"127.0.0.1:1\", \"unix:/run/weir.sock\"]\nadmin_listen = \"[::1]:2\"\n");
        for (name, address, expected) in [
            ("listen", "10.0.0.1:9", Place::Clients),
            ("admin", "10.0.0.1:9", Place::Operators),
            ("weir.socket", "127.0.0.1:1", Place::Clients),
            ("", "unix:/run/weir.sock", Place::Clients),
            ("", "[::1]:2", Place::Operators),
        ] {
            assert_eq!(place(name, address, &config), Ok(expected), "{name} {address}");
        }
        let nobody = place("weir.socket", "10.0.0.1:9", &config).expect_err("for nobody");
        assert!(nobody.contains("10.0.0.1:9") && nobody.contains("FileDescriptorName=listen"), "{nobody}");
    }

    #[test]
    fn a_socket_that_was_handed_over_lends_the_key_to_nobody_either() {
        let config = config("[upstream]\napi_key = \"env:KEY\"\n");
        assert!(place("listen", "0.0.0.0:80", &config).expect_err("open to all").contains("upstream.api_key"));
        assert_eq!(place("listen", "unix:/run/weir.sock", &config), Ok(Place::Clients));
        assert_eq!(place("admin", "0.0.0.0:80", &config), Ok(Place::Operators));
    }
}

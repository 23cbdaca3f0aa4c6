//! Whose request is it? The client, by the key it sends; who shares with whom when there is a queue; and whose quota at the
//! gateway it is.
//!
//! With `[clients]` a key of theirs is needed, and the client is known by name. Without, nobody is turned away, and what
//! tells clients apart is what they cannot mint at will: the address they come from where weir has a key of its own, or
//! else a key that the gateway has served. Whatever else a client sends has no say in it.
//!
//! Keys are found by a keyed hash, a *fingerprint*, that is worth nothing outside this process and leaves it nowhere.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::hash::{BuildHasher as _, RandomState};
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use http::header::{self, HeaderMap, HeaderName, HeaderValue};
use subtle::ConstantTimeEq as _;

use crate::config::{Client, Config, LimitTable, NOBODY, Secret, Weight};
use crate::error::{Cause, Failure};

/// Where clients put their keys: OpenAI's, Anthropic's and Azure's way. The first that is there decides.
pub static KEY_FIELDS: [HeaderName; 3] =
    [header::AUTHORIZATION, HeaderName::from_static("x-api-key"), HeaderName::from_static("api-key")];

/// How many keys that the gateway has served are remembered, at most.
const MAX_PROVEN: usize = 4096;

/// Names of clients that one process knows, those included that configurations do not name any more: each may have metrics.
pub const MAX_NAMES: usize = 10_000;

/// A client by name, or everyone else.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ClientId(u16);

impl ClientId {
    /// Everyone whom the configuration does not name. The label is `-`.
    pub const NONE: Self = Self(0);

    /// A small number, dense from 0, to index tables by.
    pub fn index(self) -> usize {
        usize::from(self.0)
    }

    /// All that there can be, [`ClientId::NONE`] before the others.
    pub fn all() -> impl Iterator<Item = Self> {
        (0..=u16::MAX).map(Self)
    }
}

/// Who gets a share of its own when there is a queue.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub enum Tenant {
    /// All who cannot be told apart by anything that they could not mint.
    Shared,
    /// A client of the configuration's.
    Named(ClientId),
    /// A key that the gateway has served, by its fingerprint.
    Key(u64),
    /// An address; of IPv6 its network, a /64, within which one host may take any address it likes.
    Peer(IpAddr),
}

/// Whose request it is.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Caller {
    pub client: ClientId,
    pub tenant: Tenant,
    /// Whose quota at the gateway it is: a fingerprint of the key that goes there, or 0 where that is weir's own, or none.
    pub credential: u64,
    /// There was one key, so an answer of the gateway's is an answer to that one.
    sole_key: bool,
}

/// Everyone who is known, and how, by one configuration.
pub struct Clients {
    /// By [`ClientId::index`].
    known: Vec<Known>,
    by_fingerprint: HashMap<u64, ClientId>,
    /// weir has a key of its own, which goes to the gateway in place of the clients'.
    lends_its_key: bool,
    keys: Arc<Keys>,
}

/// What is known of keys, whatever the configuration.
#[derive(Default)]
struct Keys {
    fingerprints: RandomState,
    /// Keys that the gateway has served. Locked for a look or an insertion.
    proven: Mutex<Proven>,
}

/// What is known of a client.
struct Known {
    name: Arc<str>,
    /// `None` for one that the configuration does not name any more.
    key: Option<Secret>,
    weight: Weight,
    max_wait: Option<Duration>,
    limits: LimitTable,
}

impl Clients {
    /// The clients of the configuration.
    pub fn new(config: &Config) -> Self {
        Self::of(config, Vec::new(), Arc::default()).expect("the configuration has few enough clients")
    }

    /// The clients of another configuration. Who has the same name keeps its id, whatever else has changed; ids of names that
    /// are gone are nobody else's. What keys the gateway has served is known to both.
    ///
    /// # Errors
    /// There have been too many names since the start.
    pub fn changed_to(&self, config: &Config) -> Result<Self, String> {
        let names = self.names().skip(1).cloned().collect();
        Self::of(config, names, self.keys.clone())
    }

    /// The configuration's clients, of which these are known by their ids already.
    fn of(config: &Config, names: Vec<Arc<str>>, keys: Arc<Keys>) -> Result<Self, String> {
        let known_names: HashSet<&str> = names.iter().map(|name| &**name).collect();
        let new = config.clients.keys().filter(|name| !known_names.contains(name.as_str()));
        let new: Vec<Arc<str>> = new.map(|name| name.as_str().into()).collect();
        if names.len() + new.len() > MAX_NAMES {
            return Err(format!("there have been more than {MAX_NAMES} names of clients since weir started"));
        }
        let (mut known, mut by_fingerprint) = (vec![Known::nobody()], HashMap::new());
        for name in names.into_iter().chain(new) {
            let id = ClientId(u16::try_from(known.len()).expect("there are fewer names than that"));
            let client = config.clients.get(&*name);
            if let Some(client) = client {
                by_fingerprint.insert(fingerprint(&keys.fingerprints, client.key.reveal().as_bytes()), id);
            }
            known.push(client.map_or_else(|| Known::gone(name.clone()), |client| Known::new(&name, client)));
        }
        Ok(Self { known, by_fingerprint, lends_its_key: config.upstream.api_key.is_some(), keys })
    }

    /// Whose request it is, by its header fields and the address that its connection comes from, where it has one.
    ///
    /// # Errors
    /// There are clients, and it is none of theirs.
    pub fn identify(&self, fields: &HeaderMap, peer: Option<IpAddr>) -> Result<Caller, Failure> {
        let key = client_key(fields);
        let fingerprint = key.map_or(0, |key| fingerprint(&self.keys.fingerprints, key));
        let client = if self.by_fingerprint.is_empty() { ClientId::NONE } else { self.find(key, fingerprint)? };
        let tenant = match client {
            ClientId::NONE => self.tenant_of_a_stranger(fingerprint, peer),
            named => Tenant::Named(named),
        };
        let credential = if self.lends_its_key { 0 } else { fingerprint };
        Ok(Caller { client, tenant, credential, sole_key: has_one_key(fields) })
    }

    /// The gateway has served a metered call of this caller's: its key is a tenant of its own from now on, where keys
    /// are what tells clients apart.
    pub fn accepted(&self, caller: &Caller) {
        if caller.tenant == Tenant::Shared && caller.credential != 0 && caller.sole_key {
            self.keys.proven.lock().unwrap_or_else(PoisonError::into_inner).insert(caller.credential);
        }
    }

    /// The name that stands for the client in labels.
    pub fn name(&self, id: ClientId) -> &Arc<str> {
        &self.known[id.index()].name
    }

    /// Every name, in the order of [`ClientId::index`]; the first stands for everyone whom the configuration does not name.
    pub fn names(&self) -> impl Iterator<Item = &Arc<str>> {
        self.known.iter().map(|known| &known.name)
    }

    /// Every client that the configuration names.
    pub fn ids(&self) -> impl Iterator<Item = ClientId> {
        self.present_and_gone().filter(|id| self.is_named(*id))
    }

    /// Every client that this configuration names, or one before it.
    pub fn present_and_gone(&self) -> impl Iterator<Item = ClientId> {
        ClientId::all().take(self.known.len()).skip(1)
    }

    /// Whether the configuration names this client.
    pub fn is_named(&self, id: ClientId) -> bool {
        self.known[id.index()].key.is_some()
    }

    /// The client of that name.
    pub fn find_by_name(&self, name: &str) -> Option<ClientId> {
        self.ids().find(|id| &**self.name(*id) == name)
    }

    /// Whose quota at the gateway a client's requests use: [`Caller::credential`] of what it sends.
    pub fn credential(&self, id: ClientId) -> u64 {
        let key = self.known[id.index()].key.as_ref().filter(|_| !self.lends_its_key);
        key.map_or(0, |key| fingerprint(&self.keys.fingerprints, key.reveal().as_bytes()))
    }

    /// The client's share when there is a queue.
    pub fn weight(&self, id: ClientId) -> Weight {
        self.known[id.index()].weight
    }

    /// How long a request of the client's may wait, where it has a time of its own.
    pub fn max_wait(&self, id: ClientId) -> Option<Duration> {
        self.known[id.index()].max_wait
    }

    /// The client's own limits; none for those whom the configuration does not name.
    pub fn limits(&self, id: ClientId) -> &LimitTable {
        &self.known[id.index()].limits
    }

    /// The client that has this key. It takes as long for a key that is like a client's as for any other.
    fn find(&self, key: Option<&[u8]>, fingerprint: u64) -> Result<ClientId, Failure> {
        let Some(key) = key else {
            let message = "weir asks for an API key, and this request has none; send one that weir's operator gave you, \
                           as \"Authorization: Bearer KEY\"";
            return Err(Failure::new(Cause::InvalidApiKey, message));
        };
        let found = self.by_fingerprint.get(&fingerprint).copied();
        let candidate = found.and_then(|id| self.known[id.index()].key.as_ref());
        // Without a candidate the key is compared with itself.
        let is_equal = key.ct_eq(candidate.map_or(key, |candidate| candidate.reveal().as_bytes()));
        found.filter(|_| is_equal.into()).ok_or_else(|| {
            let message = "weir does not know this API key; give your client one that weir's operator gave you, \
                           instead of the gateway's";
            Failure::new(Cause::InvalidApiKey, message)
        })
    }

    /// What tells those apart who are not known by name.
    fn tenant_of_a_stranger(&self, fingerprint: u64, peer: Option<IpAddr>) -> Tenant {
        if self.lends_its_key {
            return peer.map_or(Tenant::Shared, |peer| Tenant::Peer(network(peer)));
        }
        let is_proven = || self.keys.proven.lock().unwrap_or_else(PoisonError::into_inner).contains(fingerprint);
        if fingerprint != 0 && is_proven() { Tenant::Key(fingerprint) } else { Tenant::Shared }
    }
}

impl Known {
    fn nobody() -> Self {
        Self::gone(NOBODY.into())
    }

    /// Someone whom the configuration does not name.
    fn gone(name: Arc<str>) -> Self {
        Self { name, key: None, weight: Weight::ONE, max_wait: None, limits: LimitTable::default() }
    }

    fn new(name: &str, client: &Client) -> Self {
        let Client { key, weight, max_wait, limits } = client.clone();
        Self { name: name.into(), key: Some(key), weight, max_wait, limits }
    }
}

impl fmt::Debug for Tenant {
    /// Without the fingerprint.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Shared => f.write_str("Shared"),
            Self::Named(id) => write!(f, "Named({})", id.0),
            Self::Key(_) => f.write_str("Key(..)"),
            Self::Peer(address) => write!(f, "Peer({address})"),
        }
    }
}

impl fmt::Debug for Caller {
    /// Without the fingerprint.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Caller").field("client", &self.client).field("tenant", &self.tenant).finish_non_exhaustive()
    }
}

/// Fingerprints of keys that the gateway has served, in two generations: when the current one is full, it takes the place
/// of the previous one, in which those are forgotten that were not seen meanwhile.
#[derive(Default)]
struct Proven {
    current: HashSet<u64>,
    previous: HashSet<u64>,
}

impl Proven {
    const GENERATION: usize = MAX_PROVEN / 2;

    /// Whether it is remembered; if so, it will be for longer.
    fn contains(&mut self, fingerprint: u64) -> bool {
        if self.current.contains(&fingerprint) {
            return true;
        }
        let remembered = self.previous.remove(&fingerprint);
        if remembered {
            self.insert(fingerprint);
        }
        remembered
    }

    fn insert(&mut self, fingerprint: u64) {
        if self.current.len() >= Self::GENERATION {
            self.previous = std::mem::take(&mut self.current);
        }
        self.current.insert(fingerprint);
    }
}

/// The key that a client sent, wherever it put it.
fn client_key(fields: &HeaderMap) -> Option<&[u8]> {
    let value = KEY_FIELDS.iter().find_map(|name| fields.get(name)).map(HeaderValue::as_bytes)?;
    let key = value.split_at_checked(7).filter(|(scheme, _)| scheme.eq_ignore_ascii_case(b"bearer "));
    let key = key.map_or(value, |(_, key)| key).trim_ascii();
    (!key.is_empty()).then_some(key)
}

/// Whether there is one key only: of several, weir cannot know which the gateway goes by.
fn has_one_key(fields: &HeaderMap) -> bool {
    KEY_FIELDS.iter().map(|name| fields.get_all(name).iter().count()).sum::<usize>() == 1
}

/// A keyed hash; never 0, which stands for no key.
fn fingerprint(fingerprints: &RandomState, key: &[u8]) -> u64 {
    fingerprints.hash_one(key).max(1)
}

/// The part of an address that its owner cannot change at will.
fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(v6) => Ipv6Addr::from_bits(v6.to_bits() & !u128::from(u64::MAX)).into(),
        v4 => v4,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TWO_CLIENTS: &str =
        "[clients.a]\nkey = \"sk-a\"\n[clients.b]\nkey = \"sk-b\"\nweight = 3\nmax_wait = \"20s\"\nconcurrency = 4\n";

    fn clients(config: &str) -> Clients {
        Clients::new(&Config::parse(config, &|_| None).expect("a good configuration"))
    }

    fn fields(lines: &[(&'static str, &str)]) -> HeaderMap {
        lines.iter().map(|(name, value)| (HeaderName::from_static(name), value.parse().expect("a value"))).collect()
    }

    fn bearer(key: &str) -> HeaderMap {
        fields(&[("authorization", &format!("Bearer {key}"))])
    }

    /// Whose request this is, from nowhere in particular.
    #[track_caller]
    fn caller(clients: &Clients, fields: &HeaderMap) -> Caller {
        clients.identify(fields, None).expect("nobody is turned away")
    }

    fn tenant_from(clients: &Clients, peer: &str) -> Tenant {
        clients.identify(&HeaderMap::new(), Some(peer.parse().expect("an address"))).expect("served").tenant
    }

    #[test]
    fn a_client_is_known_by_its_key_wherever_it_puts_it() {
        let clients = clients(TWO_CLIENTS);
        for lines in [
            ("authorization", "Bearer sk-b"),
            ("authorization", "bearer  sk-b "),
            ("authorization", "BEARER sk-b"),
            ("authorization", "sk-b"),
            ("x-api-key", "sk-b"),
            ("api-key", "sk-b"),
        ] {
            let caller = caller(&clients, &fields(&[lines]));
            assert_eq!(&**clients.name(caller.client), "b", "{lines:?}");
            assert_eq!(caller.tenant, Tenant::Named(caller.client));
        }
    }

    #[test]
    fn what_the_configuration_says_of_a_client_is_found_by_its_id() {
        let clients = clients(TWO_CLIENTS);
        let b = caller(&clients, &bearer("sk-b")).client;
        assert_eq!((clients.weight(b).thousandths(), clients.max_wait(b)), (3000, Some(Duration::from_secs(20))));
        assert_eq!((clients.limits(b).concurrency, clients.limits(ClientId::NONE)), (Some(4), &LimitTable::default()));
        assert_eq!((clients.weight(ClientId::NONE), clients.max_wait(ClientId::NONE)), (Weight::ONE, None));
        assert_eq!(clients.names().map(|name| &**name).collect::<Vec<_>>(), ["-", "a", "b"]);
        assert_eq!(clients.ids().map(|id| &**clients.name(id)).collect::<Vec<_>>(), ["a", "b"]);
    }

    #[test]
    fn in_another_configuration_the_same_name_has_the_same_id() {
        let before = clients(TWO_CLIENTS);
        let [a, b] = ["sk-a", "sk-b"].map(|key| caller(&before, &bearer(key)).client);
        // The first is gone, the second has another key, and there is a third.
        let config = "[clients.b]\nkey = \"sk-a\"\n[clients.0]\nkey = \"sk-0\"\n";
        let after = before.changed_to(&Config::parse(config, &|_| None).expect("a good one")).expect("few names");
        assert_eq!(caller(&after, &bearer("sk-a")).client, b);
        assert!(after.identify(&bearer("sk-b"), None).is_err(), "nobody's key any more");
        let third = caller(&after, &bearer("sk-0")).client;
        assert!(third != a && third != b);
        assert_eq!(after.names().map(|name| &**name).collect::<Vec<_>>(), ["-", "a", "b", "0"]);
        assert_eq!(after.ids().collect::<Vec<_>>(), [b, third]);
        let back = after.changed_to(&Config::parse(TWO_CLIENTS, &|_| None).expect("a good one")).expect("few names");
        assert_eq!(caller(&back, &bearer("sk-a")).client, a);
    }

    #[test]
    fn what_the_gateway_has_served_is_known_in_another_configuration_too() {
        let before = clients("");
        let first = caller(&before, &bearer("sk-a"));
        let after = before.changed_to(&Config::default()).expect("few names");
        before.accepted(&first);
        let again = caller(&after, &bearer("sk-a"));
        assert!(matches!(again.tenant, Tenant::Key(_)) && again.credential == first.credential);
    }

    #[test]
    fn names_are_bounded_however_often_they_change() {
        let mut clients = clients("");
        let one = Config::parse("[clients.a]\nkey = \"k\"\n", &|_| None).expect("a good one");
        // Faster than reading them.
        let named = |round: usize| {
            let names = (0..1000).map(|number| format!("c{round}-{number}"));
            Config { clients: names.map(|name| (name, one.clients["a"].clone())).collect(), ..one.clone() }
        };
        for round in 0..10 {
            clients = clients.changed_to(&named(round)).expect("few enough");
        }
        let refused = clients.changed_to(&named(10)).map(|_| ()).expect_err("too many");
        assert!(refused.contains("10000"), "{refused}");
        assert!(clients.changed_to(&named(3)).is_ok(), "names that were there before");
    }

    #[test]
    fn who_has_no_key_or_an_unknown_one_is_refused_and_the_key_is_not_repeated() {
        let clients = clients(TWO_CLIENTS);
        for lines in [
            &[][..],
            &[("authorization", "")],
            &[("authorization", "Bearer ")],
            &[("authorization", "Bearer sk-strange")],
            &[("authorization", "Basic sk-a")],
            &[("authorization", "Bearer sk-a sk-strange")],
            &[("authorization", "sk-")],
            &[("x-api-key", "sk-aa")],
            &[("x-client", "a"), ("x-weir-client", "a"), ("cookie", "sk-a"), ("proxy-authorization", "Bearer sk-a")],
        ] {
            let failure = clients.identify(&fields(lines), None).expect_err("unknown");
            assert_eq!(failure.cause, Cause::InvalidApiKey, "{lines:?}");
            assert!(failure.message.contains("operator gave you") && !failure.message.contains("sk-"), "{failure}");
        }
    }

    #[test]
    fn of_several_keys_the_first_field_decides() {
        let clients = clients(TWO_CLIENTS);
        let both = fields(&[("api-key", "sk-b"), ("x-api-key", "sk-b"), ("authorization", "Bearer sk-a")]);
        assert_eq!(&**clients.name(caller(&clients, &both).client), "a");
        let hidden = fields(&[("authorization", "Bearer sk-strange"), ("x-api-key", "sk-a")]);
        assert!(clients.identify(&hidden, None).is_err());
    }

    #[test]
    fn the_quota_is_the_keys_that_goes_to_the_gateway() {
        let own = clients("[upstream]\napi_key = \"sk-up\"\n");
        assert_eq!(caller(&own, &bearer("sk-a")).credential, 0);
        assert_eq!(caller(&own, &bearer("sk-b")).credential, 0);
        for passing in [clients(""), clients(TWO_CLIENTS)] {
            let (a, b) = (caller(&passing, &bearer("sk-a")).credential, caller(&passing, &bearer("sk-b")).credential);
            assert!(a != 0 && b != 0 && a != b);
            assert_eq!(caller(&passing, &fields(&[("x-api-key", "sk-a")])).credential, a, "wherever the key stands");
        }
        assert_eq!(caller(&clients(""), &HeaderMap::new()).credential, 0);
    }

    #[test]
    fn where_weir_has_a_key_strangers_are_told_apart_by_their_address() {
        let clients = clients("[upstream]\napi_key = \"sk-up\"\n");
        assert_eq!(tenant_from(&clients, "10.0.0.1"), Tenant::Peer("10.0.0.1".parse().expect("an address")));
        assert_ne!(tenant_from(&clients, "10.0.0.1"), tenant_from(&clients, "10.0.0.2"));
        assert_eq!(tenant_from(&clients, "::ffff:10.0.0.1"), tenant_from(&clients, "10.0.0.1"));
        assert_eq!(tenant_from(&clients, "2001:db8::1"), tenant_from(&clients, "2001:db8::ffff:2:3"));
        assert_ne!(tenant_from(&clients, "2001:db8::1"), tenant_from(&clients, "2001:db8:0:1::1"));
        assert_eq!(caller(&clients, &bearer("sk-a")).tenant, Tenant::Shared, "a peer without an address");
        clients.accepted(&caller(&clients, &bearer("sk-a")));
        assert_eq!(
            caller(&clients, &bearer("sk-a")).tenant,
            Tenant::Shared,
            "keys say nothing where weir lends its own"
        );
    }

    #[test]
    fn a_key_is_a_tenant_of_its_own_once_the_gateway_has_served_it() {
        let clients = clients("");
        let first = caller(&clients, &bearer("sk-a"));
        assert_eq!(first.tenant, Tenant::Shared);
        clients.accepted(&first);
        assert_eq!(caller(&clients, &bearer("sk-a")).tenant, Tenant::Key(first.credential));
        assert_eq!(caller(&clients, &bearer("sk-b")).tenant, Tenant::Shared);
        clients.accepted(&caller(&clients, &HeaderMap::new()));
        assert_eq!(caller(&clients, &HeaderMap::new()).tenant, Tenant::Shared, "no key is nobody's");
    }

    #[test]
    fn a_key_beside_another_is_not_proven_by_a_success() {
        let clients = clients("");
        let minted = [
            fields(&[("authorization", "Bearer made-up"), ("x-api-key", "sk-a")]),
            fields(&[("authorization", "Bearer made-up"), ("authorization", "Bearer sk-a")]),
        ];
        for fields in minted {
            clients.accepted(&caller(&clients, &fields));
            assert_eq!(caller(&clients, &fields).tenant, Tenant::Shared);
        }
    }

    #[test]
    fn the_keys_remembered_are_bounded_and_those_in_use_stay() {
        let clients = clients("");
        let kept = caller(&clients, &bearer("sk-kept"));
        clients.accepted(&kept);
        for i in 0..3 * MAX_PROVEN {
            clients.accepted(&caller(&clients, &bearer(&format!("sk-{i}"))));
            if i % 1000 == 0 {
                assert_eq!(caller(&clients, &bearer("sk-kept")).tenant, Tenant::Key(kept.credential), "after {i}");
            }
        }
        let proven = clients.keys.proven.lock().expect("nothing panicked");
        assert!(proven.current.len() + proven.previous.len() <= MAX_PROVEN);
        drop(proven);
        assert_eq!(caller(&clients, &bearer("sk-0")).tenant, Tenant::Shared, "forgotten");
    }

    #[test]
    fn keys_that_the_gateway_never_served_leave_nothing_behind() {
        let clients = clients("");
        for i in 0..100 {
            caller(&clients, &bearer(&format!("sk-{i}")));
        }
        assert!(clients.keys.proven.lock().expect("nothing panicked").current.is_empty());
    }

    #[test]
    fn what_is_printed_of_a_caller_has_no_fingerprint() {
        let clients = clients("");
        clients.accepted(&caller(&clients, &bearer("sk-a")));
        let caller = caller(&clients, &bearer("sk-a"));
        let printed = format!("{caller:?}");
        assert!(printed.contains("Key(..)") && !printed.contains(&caller.credential.to_string()), "{printed}");
    }
}

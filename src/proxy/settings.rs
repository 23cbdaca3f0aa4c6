//! What a request is served by: the configuration in force, and what is made of it.
//!
//! A request takes one at its beginning and keeps it to its end, so that it sees one configuration only. Limits are the
//! exception: they are shared, and change for everyone at once ([`Gate::reload`](crate::admission::Gate::reload)).

use std::sync::Arc;

use http::HeaderValue;
use tokio::time::Instant;

use super::fields::LentKey;
use crate::clients::Clients;
use crate::config::Config;
use crate::retry::Policy;

/// One configuration, as requests need it.
pub(super) struct Settings {
    pub(super) config: Arc<Config>,
    pub(super) clients: Clients,
    pub(super) policy: Policy,
    pub(super) host: HeaderValue,
    /// `None` where the clients' own keys go through.
    pub(super) key: Option<LentKey>,
}

impl Settings {
    /// What is in force at the start.
    pub(super) fn new(config: Arc<Config>) -> Self {
        let (clients, policy) = (Clients::new(&config), Policy::new(&config.retry, Instant::now()));
        Self::of(config, clients, policy)
    }

    /// What another configuration makes of these: clients keep their ids, and retries are paid for from the same budget.
    ///
    /// # Errors
    /// There have been too many names of clients since the start.
    pub(super) fn changed_to(&self, config: Arc<Config>) -> Result<Self, String> {
        let (clients, policy) = (self.clients.changed_to(&config)?, self.policy.changed_to(&config.retry));
        Ok(Self::of(config, clients, policy))
    }

    fn of(config: Arc<Config>, clients: Clients, policy: Policy) -> Self {
        let authority = config.upstream.base_url.authority().as_str();
        let host = HeaderValue::from_str(authority).expect("an authority is visible ASCII");
        let key = config.upstream.api_key.as_ref().map(LentKey::new);
        Self { config, clients, policy, host, key }
    }
}

//! What is different in another configuration, and whether that can be put in force while weir runs.

use std::collections::BTreeMap;
use std::fmt;

use super::{Config, Secret};

/// Options that are put in force at the start only: sockets are bound and their number is fixed then, what was learned is of
/// one gateway, and the log is written in one format. Every other option can change live.
pub const NEEDS_RESTART: [&str; 5] =
    ["server.listen", "server.admin_listen", "server.max_connections", "upstream.base_url", "log.format"];

/// One option that is different.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// Its path: `limits.requests`.
    pub option: String,
    /// As [`Config`]'s `Display` writes it, secrets masked. `None` where it is absent; in both, a secret of the same name is
    /// another.
    pub from: Option<String>,
    pub to: Option<String>,
}

impl Change {
    /// Whether it has to wait until weir starts again.
    pub fn needs_restart(&self) -> bool {
        NEEDS_RESTART.contains(&self.option.as_str())
    }
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let option = &self.option;
        match (&self.from, &self.to) {
            (Some(from), Some(to)) => write!(f, "{option} = {to} (was {from})"),
            (None, Some(to)) => write!(f, "{option} = {to} (was absent)"),
            (Some(from), None) => write!(f, "{option} is absent (was {from})"),
            (None, None) => write!(f, "{option} is another secret"),
        }
    }
}

impl Config {
    /// Every option that is different in `other`, in the order of their paths.
    pub fn changes_to(&self, other: &Self) -> Vec<Change> {
        let (before, after) = (self.options(), other.options());
        let mut changes = BTreeMap::new();
        for (option, from) in &before {
            let to = after.get(option);
            if to != Some(from) {
                changes.insert(option, (Some(from.clone()), to.cloned()));
            }
        }
        let new = after.iter().filter(|(option, _)| !before.contains_key(*option));
        changes.extend(new.map(|(option, to)| (option, (None, Some(to.clone())))));
        // Where a secret is written has stayed, and what is found there has not.
        let (secrets, others) = (self.secrets(), other.secrets());
        let changed = secrets.iter().filter(|(option, secret)| others.get(*option).is_some_and(|it| it != *secret));
        for (option, _) in changed {
            changes.entry(option).or_insert((None, None));
        }
        changes.into_iter().map(|(option, (from, to))| Change { option: option.clone(), from, to }).collect()
    }

    /// Every option that is set, by its path, as `weir check` prints it.
    fn options(&self) -> BTreeMap<String, String> {
        let mut section = String::new();
        let mut options = BTreeMap::new();
        for line in self.to_string().lines() {
            if let Some(name) = line.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
                name.clone_into(&mut section);
            } else if let Some((key, value)) = line.split_once(" = ") {
                options.insert(format!("{section}.{key}"), value.to_owned());
            }
        }
        options
    }

    /// Every secret, by its option's path as in [`Config::options`].
    fn secrets(&self) -> BTreeMap<String, &Secret> {
        let lent = self.upstream.api_key.iter().map(|key| ("upstream.api_key".to_owned(), key));
        let of_clients = self.clients.iter().map(|(name, client)| {
            let path = format!("clients.{}.key", super::effective::quoted(name));
            (path, &client.key)
        });
        lent.chain(of_clients).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Options that can change while weir runs.
    const LIVE: [&str; 38] = [
        "breaker.give_up",
        "clients.NAME.concurrency",
        "clients.NAME.key",
        "clients.NAME.max_wait",
        "clients.NAME.mode",
        "clients.NAME.requests",
        "clients.NAME.tokens",
        "clients.NAME.weight",
        "limits.concurrency",
        "limits.mode",
        "limits.replicas",
        "limits.requests",
        "limits.tokens",
        "log.level",
        "models.NAME.concurrency",
        "models.NAME.mode",
        "models.NAME.requests",
        "models.NAME.tokens",
        "queue.max_bytes",
        "queue.max_wait",
        "queue.max_waiting",
        "retry.base_delay",
        "retry.budget",
        "retry.max_delay",
        "retry.max_retries",
        "server.allow_anonymous",
        "server.body_timeout",
        "server.drain",
        "server.header_timeout",
        "server.keep_alive",
        "server.max_body",
        "server.write_timeout",
        "timeouts.connect",
        "timeouts.deadline",
        "timeouts.first_event",
        "timeouts.idle",
        "timeouts.response",
        "upstream.api_key",
    ];

    fn parse(source: &str) -> Config {
        let env = |name: &str| name.strip_prefix("K_").map(str::to_owned);
        Config::parse(source, &env).expect("a good configuration")
    }

    fn changes(from: &str, to: &str) -> Vec<String> {
        parse(from).changes_to(&parse(to)).iter().map(ToString::to_string).collect()
    }

    #[test]
    fn of_every_option_it_is_known_whether_it_needs_a_restart() {
        for option in Config::option_paths() {
            let (live, restart) = (LIVE.contains(&&*option), NEEDS_RESTART.contains(&&*option));
            assert!(live != restart, "{option}: say in config/change.rs whether it can change while weir runs");
        }
    }

    #[test]
    fn what_is_different_is_told_with_what_it_was() {
        let from = "[limits]\nrequests = \"600/min\"\ntokens = \"100/s\"\n[models.m]\nconcurrency = 8\n";
        let to = "[server]\nlisten = \"127.0.0.1:1\"\n[limits]\nrequests = \"300/min\"\n[models.m]\nconcurrency = 8\n\
                  [clients.a]\nkey = \"env:K_a\"\n";
        assert_eq!(
            changes(from, to),
            [
                r#"clients."a".key = "env:K_a" (was absent)"#,
                r#"clients."a".mode = "enforce" (was absent)"#,
                r#"clients."a".weight = 1 (was absent)"#,
                r#"limits.requests = { rate = "300/min", burst = 30 } (was { rate = "600/min", burst = 60 })"#,
                r#"limits.tokens is absent (was { rate = "100/s", burst = 10 })"#,
                r#"server.listen = "127.0.0.1:1" (was "127.0.0.1:8080")"#,
            ]
        );
        assert!(changes(to, to).is_empty());
    }

    #[test]
    fn another_secret_is_a_change_and_is_not_shown() {
        let with = |key: &str, client: &str| {
            format!("[upstream]\napi_key = \"{key}\"\n[clients.\"a\\\"b\"]\nkey = \"{client}\"\n")
        };
        let told = changes(&with("sk-secret-1", "k-1"), &with("sk-secret-2", "k-2"));
        assert_eq!(told, [r#"clients."a\"b".key is another secret"#, "upstream.api_key is another secret"]);
        let told = changes(&with("sk-secret-1", "k"), &with("env:K_x", "k"));
        assert_eq!(told, [r#"upstream.api_key = "env:K_x" (was "***")"#]);
    }

    #[test]
    fn what_needs_a_restart_says_so() {
        let to =
            "[server]\nlisten = \"127.0.0.1:1\"\ndrain = \"1s\"\n[upstream]\nbase_url = \"https://other.test/v1\"\n";
        let changes = Config::default().changes_to(&parse(to));
        let told: Vec<(&str, bool)> = changes.iter().map(|it| (it.option.as_str(), it.needs_restart())).collect();
        assert_eq!(told, [("server.drain", false), ("server.listen", true), ("upstream.base_url", true)]);
    }
}

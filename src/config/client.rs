//! `[clients.NAME]`: who may come, how large a share each gets when there is a queue, and limits of their own.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use toml::de::DeValue;

use super::reader::{FromToml, Section, is_a};
use super::{LimitTable, Secret};

/// weir's own word for the clients that it does not know by name: no client can be called that.
pub const NOBODY: &str = "-";

/// Each client has metrics of its own for each model, so there is a bound.
const MAX_CLIENTS: usize = 1000;

/// A longer name is not worth a label.
const MAX_NAME_BYTES: usize = 200;

/// A client that is known by name.
#[derive(Debug, Clone, PartialEq)]
pub struct Client {
    /// By which it is known.
    pub key: Secret,
    pub weight: Weight,
    /// In place of `queue.max_wait`.
    pub max_wait: Option<Duration>,
    /// On top of the others.
    pub limits: LimitTable,
}

/// A client's share beside that of a client of weight 1, when there is a queue. From 0.01 to 1000.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Weight {
    thousandths: u32,
}

impl Client {
    /// Reads every client; those that lack a key are only complained of.
    pub(super) fn read_all(
        sections: &[(&str, Section<'_>)],
        env: &dyn Fn(&str) -> Option<String>,
    ) -> BTreeMap<String, Self> {
        if let Some((_, first_too_many)) = sections.get(MAX_CLIENTS) {
            first_too_many
                .complain_of_it(&format!("is one client more than {MAX_CLIENTS}; let several programs share a client"));
        }
        let mut clients = BTreeMap::new();
        for (name, section) in sections {
            check_name(name, section);
            if let Some(client) = Self::read(section, env) {
                clients.insert((*name).to_owned(), client);
            }
        }
        refuse_shared_keys(sections, &clients);
        clients
    }

    fn read(section: &Section<'_>, env: &dyn Fn(&str) -> Option<String>) -> Option<Self> {
        let key = Secret::read(section, "key", env);
        if key.is_none() && !section.has("key") {
            section.complain_of_it("has no key; write the key that the client sends: key = \"env:NAME\"");
        }
        let (weight, max_wait) = (section.get_or("weight", Weight::ONE), section.get("max_wait"));
        let limits = LimitTable::read(section);
        Some(Self { key: key?, weight, max_wait, limits })
    }
}

/// Two clients with one key could not be told apart.
fn refuse_shared_keys(sections: &[(&str, Section<'_>)], clients: &BTreeMap<String, Client>) {
    let mut by_key: BTreeMap<&str, &str> = BTreeMap::new();
    for (name, section) in sections {
        let Some(client) = clients.get(*name) else { continue };
        if let Some(other) = by_key.insert(client.key.reveal(), name) {
            let message = format!(
                "is the same key as that of the client {other:?}, so weir could not tell {name:?} from it; give each \
                 client a key of its own"
            );
            section.complain("key", message);
        }
    }
}

/// A name becomes a label and a word in messages.
fn check_name(name: &str, section: &Section<'_>) {
    let complaint = match name {
        "" => "is an empty name; write one that says whose requests they are, as in [clients.support-bot]".to_owned(),
        NOBODY => "is weir's own word for clients that it does not know by name; write another name".to_owned(),
        _ if name.len() > MAX_NAME_BYTES => format!("is longer than {MAX_NAME_BYTES} bytes; write a shorter name"),
        _ if name.chars().any(char::is_control) || name.trim() != name => {
            "has a control character in it, or a space at an end; write a name of visible characters".to_owned()
        }
        _ => return,
    };
    section.complain_of_it(&complaint);
}

impl Weight {
    /// What a client has that is given none.
    pub const ONE: Self = Self { thousandths: 1000 };

    /// The weight of that number, to a thousandth.
    ///
    /// # Errors
    /// It is too small, too large, or no number; says what to write.
    pub fn new(number: f64) -> Result<Self, String> {
        match number {
            0.01..=1000.0 => Ok(Self { thousandths: (number * 1000.0).round() as u32 }),
            _ => Err(format!("{number} is no weight; write a number from 0.01 to 1000, where 1 is the usual share")),
        }
    }

    /// The weight times 1000; never 0.
    pub fn thousandths(self) -> u32 {
        self.thousandths
    }
}

impl Default for Weight {
    fn default() -> Self {
        Self::ONE
    }
}

impl fmt::Display for Weight {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", f64::from(self.thousandths) / 1000.0)
    }
}

impl FromToml for Weight {
    fn from_toml(value: &DeValue<'_>) -> Result<Self, String> {
        let wrong = |_| format!("{}; write a number from 0.01 to 1000", is_a(value));
        Self::new(f64::from_toml(value).map_err(wrong)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_weight_is_written_as_it_is_read() {
        for text in ["0.01", "0.333", "1", "1.5", "3", "1000"] {
            assert_eq!(Weight::new(text.parse().expect("a number")).expect("a weight").to_string(), text);
        }
    }

    #[test]
    fn a_weight_without_sense_says_what_to_write() {
        for number in [0.0, -1.0, 0.001, 1000.1, f64::NAN, f64::INFINITY] {
            assert!(Weight::new(number).expect_err("no weight").contains("0.01 to 1000"), "{number}");
        }
    }
}

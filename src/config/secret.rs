//! A value that must not be shown: `"env:NAME"`, `"file:PATH"`, or the value itself.

use std::fmt;

use zeroize::Zeroizing;

/// A secret and where it came from. Neither `Debug` nor `Display` tells the value; memory is wiped on drop.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret {
    value: Zeroizing<String>,
    source: Source,
}

#[derive(Clone, PartialEq, Eq)]
enum Source {
    Environment(String),
    File(String),
    Inline,
}

impl Secret {
    /// Finds the value that `written` stands for; `env` looks an environment variable up.
    ///
    /// # Errors
    /// Says which variable or file is missing or empty, never what is in it.
    pub fn resolve(written: &str, env: &dyn Fn(&str) -> Option<String>) -> Result<Self, String> {
        // What was read is wiped as well as what is kept.
        let (value, source) = if let Some(name) = written.strip_prefix("env:") {
            let value =
                env(name).map(Zeroizing::new).ok_or_else(|| format!("the environment variable {name} is not set"))?;
            (value, Source::Environment(name.to_owned()))
        } else if let Some(path) = written.strip_prefix("file:") {
            let value =
                std::fs::read_to_string(path).map_err(|error| format!("cannot read the file {path}: {error}"))?;
            (Zeroizing::new(value), Source::File(path.to_owned()))
        } else {
            (Zeroizing::new(written.to_owned()), Source::Inline)
        };
        let secret = Self { value: Zeroizing::new(value.trim().to_owned()), source };
        match secret.value.as_str() {
            "" => Err(format!("{secret} is empty; write a key, \"env:NAME\" or \"file:PATH\"")),
            value if value.bytes().any(|byte| !(0x21..=0x7e).contains(&byte)) => Err(format!(
                "{secret} has a character that no HTTP header can carry; a key is visible ASCII without spaces"
            )),
            _ => Ok(secret),
        }
    }

    /// The value itself, for the header that needs it.
    pub fn reveal(&self) -> &str {
        &self.value
    }
}

impl fmt::Display for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.source {
            Source::Environment(name) => write!(f, "env:{name}"),
            Source::File(path) => write!(f, "file:{path}"),
            Source::Inline => f.write_str("***"),
        }
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Secret({self})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_is_never_shown() {
        let secret = Secret::resolve("sk-very-secret", &|_| None).expect("a plain secret");
        assert_eq!(secret.reveal(), "sk-very-secret");
        assert!(!format!("{secret} {secret:?}").contains("very"));
    }

    #[test]
    fn a_secret_comes_from_the_environment_or_a_file() {
        let env = |name: &str| (name == "KEY").then(|| "sk-1\n".to_owned());
        assert_eq!(Secret::resolve("env:KEY", &env).expect("set").reveal(), "sk-1");
        assert!(Secret::resolve("env:OTHER", &env).expect_err("not set").contains("OTHER"));
        assert!(Secret::resolve("file:/no/such/file", &env).expect_err("no file").contains("/no/such/file"));
    }

    #[test]
    fn a_secret_that_no_header_can_carry_is_refused_without_being_shown() {
        let message = Secret::resolve("sk-a\u{7f}b", &|_| None).expect_err("a control character");
        assert!(!message.contains("sk-a"), "{message}");
        assert!(Secret::resolve("  ", &|_| None).is_err());
    }
}

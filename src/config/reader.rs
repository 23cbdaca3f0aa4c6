//! Walks a TOML document and collects *every* complaint, each with its line and path, instead of stopping at the first.
//!
//! A [`Section`] is asked for the keys it knows. When it is dropped, what the file has besides is an unknown key. So the
//! list of known keys cannot drift from the code that reads them, and [`Document::known_keys`] tells it to the tests.

use std::cell::RefCell;
use std::fmt;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

/// One thing wrong with a configuration: where, what, and what to write instead.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Complaint {
    /// The line in the file, from 1; `None` where the file lacks something.
    pub line: Option<usize>,
    /// The path of the key: `server.max_body`. Empty for a syntax error.
    pub path: String,
    /// What is wrong and how to mend it.
    pub message: String,
}

impl fmt::Display for Complaint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(line) = self.line {
            write!(f, "line {line}: ")?;
        }
        if !self.path.is_empty() {
            write!(f, "{}: ", self.path)?;
        }
        f.write_str(&self.message)
    }
}

/// How the parser begins to complain of a number: here that is most likely an address, a rate or a duration without quotes.
const NUMBER_EXPECTED: [&str; 3] = ["invalid float", "invalid integer", "invalid datetime"];
const QUOTES: &str = "; text stands in quotes";

/// A value that one TOML value stands for.
pub trait FromToml: Sized {
    /// # Errors
    /// What is wrong with the value and what to write instead.
    fn from_toml(value: &DeValue<'_>) -> Result<Self, String>;
}

/// The document being read and what was found wrong with it so far.
pub struct Document<'d> {
    source: &'d str,
    complaints: RefCell<Vec<Complaint>>,
    known: RefCell<Vec<String>>,
}

impl<'d> Document<'d> {
    /// Starts a walk over `source`, with no complaint yet.
    pub fn new(source: &'d str) -> Self {
        Self { source, complaints: RefCell::default(), known: RefCell::default() }
    }

    /// Parses the source; `None` where it is no TOML, with a complaint for each syntax error. What could be read all the same
    /// is of no use: a table whose heading is broken has its keys elsewhere.
    pub fn parse(&self) -> Option<Spanned<DeTable<'d>>> {
        let (table, errors) = DeTable::parse_recoverable(self.source);
        for error in &errors {
            let line = error.span().map(|span| self.line_of(span.start));
            let message = error.message();
            let hint = if NUMBER_EXPECTED.iter().any(|start| message.starts_with(start)) { QUOTES } else { "" };
            self.complain(line, String::new(), format!("this is not TOML: {message}{hint}"));
        }
        errors.is_empty().then_some(table)
    }

    /// The section that stands for the whole document.
    pub fn root<'s>(&'s self, table: &'s DeTable<'s>) -> Section<'s> {
        let asked = RefCell::default();
        Section { document: self, path: String::new(), line: None, table: Some(table), asked, is_named: false }
    }

    /// Notes something wrong at `path`.
    pub fn complain(&self, line: Option<usize>, path: impl Into<String>, message: impl Into<String>) {
        self.complaints.borrow_mut().push(Complaint { line, path: path.into(), message: message.into() });
    }

    /// Every complaint, in the order of the lines.
    pub fn complaints(&self) -> Vec<Complaint> {
        let mut complaints = self.complaints.take();
        complaints.sort_by_key(|complaint| complaint.line.unwrap_or(usize::MAX));
        complaints
    }

    /// Every key that was asked for, as a path.
    pub fn known_keys(&self) -> Vec<String> {
        self.known.take()
    }

    fn line_of(&self, offset: usize) -> usize {
        1 + self.source.as_bytes()[..offset.min(self.source.len())].iter().filter(|byte| **byte == b'\n').count()
    }
}

/// One table of the document, or the place where it could be.
pub struct Section<'s> {
    document: &'s Document<'s>,
    path: String,
    line: Option<usize>,
    table: Option<&'s DeTable<'s>>,
    asked: RefCell<Vec<&'s str>>,
    /// Its last name is the operator's own: a model's or a client's.
    is_named: bool,
}

impl<'s> Section<'s> {
    /// The table `key`; where the file has none, every key in it is absent.
    pub fn section(&self, key: &'s str) -> Section<'s> {
        let (line, table) = match self.find(key) {
            Some((line, DeValue::Table(table))) => (Some(line), Some(table)),
            Some((line, other)) => {
                self.complain_at(line, key, format!("{}; write a table, [{}]", is_a(other), self.path_of(key)));
                (Some(line), None)
            }
            None => (None, None),
        };
        let asked = RefCell::default();
        Section { document: self.document, path: self.path_of(key), line, table, asked, is_named: false }
    }

    /// The tables in the table `key`, with their names: `[models."gpt-4.1-mini"]`.
    pub fn sections(&self, key: &'s str) -> Vec<(&'s str, Section<'s>)> {
        let parent = self.section(key);
        let Some(table) = parent.table else { return Vec::new() };
        let names = table.keys().map(|name| name.get_ref().as_ref());
        let named = |name| {
            let mut section = parent.section(name);
            section.is_named = true;
            (name, section)
        };
        names.map(named).collect()
    }

    /// The value at `key`; `None` where it is absent or wrong (which is a complaint).
    pub fn get<T: FromToml>(&self, key: &'s str) -> Option<T> {
        self.document.known.borrow_mut().push(self.path_of(key));
        let (line, value) = self.find(key)?;
        match T::from_toml(value) {
            Ok(value) => Some(value),
            Err(message) => {
                self.complain_at(line, key, message);
                None
            }
        }
    }

    /// The value at `key`, or the default.
    pub fn get_or<T: FromToml>(&self, key: &'s str, default: T) -> T {
        self.get(key).unwrap_or(default)
    }

    /// The value at `key`, or the default; `check` says what else it has to be.
    pub fn get_checked<T: FromToml>(&self, key: &'s str, default: T, check: impl Fn(&T) -> Result<(), String>) -> T {
        let Some(value) = self.get::<T>(key) else { return default };
        match check(&value) {
            Ok(()) => value,
            Err(message) => {
                self.complain(key, message);
                default
            }
        }
    }

    /// Whether the file has `key`, right or wrong.
    pub fn has(&self, key: &str) -> bool {
        self.peek(key).is_some()
    }

    /// Complains about the value at `key`.
    pub fn complain(&self, key: &str, message: impl Into<String>) {
        let line = self.peek(key).map(|(line, _)| line).or(self.line);
        self.document.complain(line, self.path_of(key), message);
    }

    /// Complains about the section itself.
    pub fn complain_of_it(&self, message: &str) {
        self.document.complain(self.line, self.path.clone(), message);
    }

    fn complain_at(&self, line: usize, key: &str, message: impl Into<String>) {
        self.document.complain(Some(line), self.path_of(key), message);
    }

    fn find(&self, key: &'s str) -> Option<(usize, &'s DeValue<'s>)> {
        self.asked.borrow_mut().push(key);
        self.peek(key)
    }

    fn peek(&self, key: &str) -> Option<(usize, &'s DeValue<'s>)> {
        let (name, value) = self.table?.iter().find(|(name, _)| name.get_ref() == key)?;
        Some((self.document.line_of(name.span().start), value.get_ref()))
    }

    /// The section whose option a key is that stands above all sections.
    fn at_home_in(&self, key: &str) -> Option<String> {
        let known = self.document.known.borrow();
        let mut paths = known.iter().filter_map(|path| path.split_once('.'));
        let (section, _) = paths.find(|(_, option)| self.path.is_empty() && *option == key)?;
        Some(section.to_owned())
    }

    fn path_of(&self, key: &str) -> String {
        let bare = !key.is_empty() && key.chars().all(|c| c.is_ascii_alphanumeric() || c == '_' || c == '-');
        let key = if bare { key.to_owned() } else { format!("{key:?}") };
        if self.path.is_empty() { key } else { format!("{}.{key}", self.path) }
    }
}

impl Drop for Section<'_> {
    /// Complains of the keys that nobody asked for.
    fn drop(&mut self) {
        let Some(table) = self.table else { return };
        let asked = self.asked.take();
        for (name, value) in table.iter().filter(|(name, _)| !asked.contains(&name.get_ref().as_ref())) {
            let line = self.document.line_of(name.span().start);
            let hint = if let Some(known) = nearest(name.get_ref(), &asked) {
                format!("did you mean {known:?}?")
            } else if self.is_named && value.get_ref().is_table() {
                let (kind, beginning) = self.path.split_once('.').unwrap_or_default();
                format!("a name with a dot stands in quotes: [{kind}.\"{beginning}.{}\"]", name.get_ref())
            } else if let Some(section) = self.at_home_in(name.get_ref()) {
                format!("it belongs below [{section}]")
            } else {
                format!("known here: {}", asked.join(", "))
            };
            self.complain_at(line, name.get_ref(), format!("is not an option; {hint}"));
        }
    }
}

/// The known key that `typed` was probably meant to be: at most two edits away.
fn nearest<'k>(typed: &str, known: &[&'k str]) -> Option<&'k str> {
    let (distance, key) = known.iter().map(|key| (edit_distance(typed, key), *key)).min()?;
    (distance <= 2).then_some(key)
}

/// Levenshtein's distance, row by row.
fn edit_distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, from) in a.chars().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, to) in b.iter().enumerate() {
            let substituted = diagonal + usize::from(from != *to);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

/// What a value is, to begin a complaint with.
pub fn is_a(value: &DeValue<'_>) -> String {
    let kind = value.type_str();
    let article = if kind.starts_with(['a', 'i']) { "an" } else { "a" };
    format!("is {article} {kind}")
}

impl FromToml for String {
    fn from_toml(value: &DeValue<'_>) -> Result<Self, String> {
        let wrong = || format!("{}; write text in quotes", is_a(value));
        value.as_str().map(str::to_owned).ok_or_else(wrong)
    }
}

impl FromToml for bool {
    fn from_toml(value: &DeValue<'_>) -> Result<Self, String> {
        value.as_bool().ok_or_else(|| format!("{}; write true or false", is_a(value)))
    }
}

impl FromToml for u32 {
    fn from_toml(value: &DeValue<'_>) -> Result<Self, String> {
        let Some(integer) = value.as_integer() else {
            return Err(format!("{}; write a whole number, without quotes", is_a(value)));
        };
        Self::from_str_radix(integer.as_str(), integer.radix())
            .map_err(|_| format!("{} is out of range; write a number from 0 to {}", integer.as_str(), Self::MAX))
    }
}

impl FromToml for f64 {
    fn from_toml(value: &DeValue<'_>) -> Result<Self, String> {
        let number = match value {
            DeValue::Float(float) => float.as_str().parse().ok(),
            DeValue::Integer(integer) => {
                i64::from_str_radix(integer.as_str(), integer.radix()).ok().map(|integer| integer as Self)
            }
            _ => None,
        };
        number.filter(|number: &f64| number.is_finite()).ok_or_else(|| "write a number, such as 0.2".to_owned())
    }
}

impl<T: FromToml> FromToml for Vec<T> {
    /// One value, or a list of them.
    fn from_toml(value: &DeValue<'_>) -> Result<Self, String> {
        match value {
            DeValue::Array(items) => items.iter().map(|item| T::from_toml(item.get_ref())).collect(),
            single => T::from_toml(single).map(|single| vec![single]),
        }
    }
}

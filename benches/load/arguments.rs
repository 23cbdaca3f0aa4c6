//! What every subcommand's arguments have in common.

use std::fmt::Display;
use std::str::FromStr;
use std::time::Duration;

use lexopt::{Arg, Parser, ValueExt};

/// Whatever went wrong: the tools only ever print it and end.
pub type Failure = Box<dyn std::error::Error + Send + Sync>;

/// The first argument, unless it asks for help. Cargo itself passes `--bench`, which says nothing.
pub fn subcommand(parser: &mut Parser) -> Result<Option<String>, Failure> {
    loop {
        match parser.next()? {
            Some(Arg::Long("bench")) => {}
            Some(Arg::Value(name)) => return Ok(Some(name.string()?)),
            Some(Arg::Long("help") | Arg::Short('h')) | None => return Ok(None),
            Some(other) => return Err(other.unexpected().into()),
        }
    }
}

/// Calls `take` with the name of each `--option`; it takes the value from the parser, or returns false where it has no
/// such option.
pub fn options(
    mut parser: Parser,
    mut take: impl FnMut(&str, &mut Parser) -> Result<bool, Failure>,
) -> Result<(), Failure> {
    while let Some(argument) = parser.next()? {
        let Arg::Long(name) = argument else { return Err(argument.unexpected().into()) };
        let name = name.to_owned();
        if name != "bench" && !take(&name, &mut parser)? {
            return Err(format!("no option --{name} here; --help lists them").into());
        }
    }
    Ok(())
}

pub fn value<T: FromStr<Err: Display>>(parser: &mut Parser) -> Result<T, Failure> {
    let text = parser.value()?.string()?;
    text.parse().map_err(|error| format!("{text:?}: {error}").into())
}

pub fn seconds(parser: &mut Parser) -> Result<Duration, Failure> {
    Ok(Duration::try_from_secs_f64(value(parser)?)?)
}

pub fn required<T>(value: Option<T>, option: &str) -> Result<T, Failure> {
    value.ok_or_else(|| format!("{option} is missing").into())
}

//! What `weir check` prints: the configuration in force, as a file that could be read back, secrets masked.

use std::fmt;

use super::units::{format_duration, format_size};
use super::{Concurrency, Config, LimitTable, LogFormat, LogLevel, Mode, Rate};

impl fmt::Display for Config {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.write_server(f)?;
        self.write_limits(f)?;
        self.write_flow(f)?;
        self.write_models(f)?;
        self.write_clients(f)
    }
}

impl Config {
    fn write_server(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let server = &self.server;
        writeln!(f, "[server]")?;
        match server.listen.as_slice() {
            [one] => writeln!(f, "listen = \"{one}\"")?,
            several => {
                let quoted: Vec<String> = several.iter().map(|address| format!("\"{address}\"")).collect();
                writeln!(f, "listen = [{}]", quoted.join(", "))?;
            }
        }
        writeln!(f, "admin_listen = \"{}\"", server.admin_listen)?;
        writeln!(f, "max_body = \"{}\"", format_size(server.max_body))?;
        writeln!(f, "max_connections = {}", server.max_connections)?;
        writeln!(f, "header_timeout = \"{}\"", format_duration(server.header_timeout))?;
        writeln!(f, "body_timeout = \"{}\"", format_duration(server.body_timeout))?;
        writeln!(f, "write_timeout = \"{}\"", format_duration(server.write_timeout))?;
        writeln!(f, "keep_alive = \"{}\"", format_duration(server.keep_alive))?;
        writeln!(f, "drain = \"{}\"", format_duration(server.drain))?;
        writeln!(f, "allow_anonymous = {}", server.allow_anonymous)?;
        writeln!(f, "\n[upstream]\nbase_url = {}", quoted(&self.upstream.base_url))?;
        self.upstream.api_key.as_ref().map_or(Ok(()), |key| writeln!(f, "api_key = {}", quoted(key)))
    }

    fn write_limits(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let limits = &self.limits;
        writeln!(f, "\n[limits]")?;
        write_rate(f, "requests", limits.requests)?;
        write_rate(f, "tokens", limits.tokens)?;
        match limits.concurrency {
            Concurrency::Adaptive => writeln!(f, "concurrency = \"adaptive\"")?,
            Concurrency::Fixed(number) => writeln!(f, "concurrency = {number}")?,
        }
        writeln!(f, "mode = \"{}\"", limits.mode)?;
        writeln!(f, "replicas = {}", limits.replicas)
    }

    fn write_flow(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (queue, retry, timeouts) = (&self.queue, &self.retry, &self.timeouts);
        writeln!(f, "\n[queue]\nmax_waiting = {}", queue.max_waiting)?;
        writeln!(f, "max_bytes = \"{}\"", format_size(queue.max_bytes))?;
        writeln!(f, "max_wait = \"{}\"", format_duration(queue.max_wait))?;
        writeln!(f, "\n[retry]\nmax_retries = {}", retry.max_retries)?;
        writeln!(f, "base_delay = \"{}\"", format_duration(retry.base_delay))?;
        writeln!(f, "max_delay = \"{}\"", format_duration(retry.max_delay))?;
        writeln!(f, "budget = {}", retry.budget)?;
        writeln!(f, "\n[breaker]\ngive_up = \"{}\"", format_duration(self.breaker.give_up))?;
        writeln!(f, "\n[timeouts]\nconnect = \"{}\"", format_duration(timeouts.connect))?;
        writeln!(f, "first_event = \"{}\"", format_duration(timeouts.first_event))?;
        writeln!(f, "response = \"{}\"", format_duration(timeouts.response))?;
        writeln!(f, "idle = \"{}\"", format_duration(timeouts.idle))?;
        writeln!(f, "deadline = \"{}\"", format_duration(timeouts.deadline))?;
        writeln!(f, "\n[log]\nformat = \"{}\"\nlevel = \"{}\"", self.log.format, self.log.level)
    }

    fn write_models(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, limits) in &self.models {
            writeln!(f, "\n[models.{}]", quoted(name))?;
            write_limit_table(f, limits)?;
        }
        Ok(())
    }

    fn write_clients(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, client) in &self.clients {
            writeln!(f, "\n[clients.{}]", quoted(name))?;
            writeln!(f, "key = {}\nweight = {}", quoted(&client.key), client.weight)?;
            if let Some(max_wait) = client.max_wait {
                writeln!(f, "max_wait = \"{}\"", format_duration(max_wait))?;
            }
            write_limit_table(f, &client.limits)?;
        }
        Ok(())
    }
}

fn write_limit_table(f: &mut fmt::Formatter<'_>, limits: &LimitTable) -> fmt::Result {
    write_rate(f, "requests", limits.requests)?;
    write_rate(f, "tokens", limits.tokens)?;
    if let Some(concurrency) = limits.concurrency {
        writeln!(f, "concurrency = {concurrency}")?;
    }
    writeln!(f, "mode = \"{}\"", limits.mode)
}

fn write_rate(f: &mut fmt::Formatter<'_>, key: &str, rate: Option<Rate>) -> fmt::Result {
    rate.map_or(Ok(()), |rate| writeln!(f, "{key} = {{ rate = \"{rate}\", burst = {} }}", rate.burst))
}

/// Text as TOML has it between quotes. (Rust's own way to escape is another: what it writes as `\u{301}` TOML cannot read.)
pub(super) fn quoted(text: &impl ToString) -> String {
    let mut quoted = String::from('"');
    for c in text.to_string().chars() {
        match c {
            '"' | '\\' => quoted.extend(['\\', c]),
            c if c.is_control() => quoted.push_str(&format!("\\u{:04X}", u32::from(c))),
            c => quoted.push(c),
        }
    }
    quoted.push('"');
    quoted
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Enforce => "enforce",
            Self::Observe => "observe",
        })
    }
}

impl fmt::Display for LogFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::Text => "text",
            Self::Json => "json",
        })
    }
}

impl fmt::Display for LogLevel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Error => "error",
            Self::Warn => "warn",
            Self::Info => "info",
            Self::Debug => "debug",
        })
    }
}

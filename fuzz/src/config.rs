//! The configuration's reader, and what `weir check` prints of what was read.

use weir::config::{Config, UpstreamUrl, units};

/// Any text is a configuration or complaints; and what is printed of one reads back as the same.
pub fn check(source: &[u8]) {
    let Ok(source) = std::str::from_utf8(source) else { return };
    units_read_back(source);
    // Some files never end.
    if source.contains("file:") {
        return;
    }
    match Config::parse(source, &environment) {
        Ok(config) => reads_back(&config),
        Err(complaints) => {
            let lines = 1 + source.bytes().filter(|byte| *byte == b'\n').count();
            assert!(!complaints.0.is_empty(), "it says why");
            assert!(
                complaints.0.iter().all(|it| it.line.is_none_or(|line| (1..=lines).contains(&line))),
                "{complaints}"
            );
            assert!(complaints.0.iter().all(|it| !it.message.is_empty()));
        }
    }
}

/// Every variable has a value of its own.
fn environment(name: &str) -> Option<String> {
    Some(format!("sk-{}", name.bytes().map(|byte| format!("{byte:02x}")).collect::<String>()))
}

fn reads_back(config: &Config) {
    let printed = config.to_string();
    let again = Config::parse(&unmasked(&printed), &environment);
    let again = again.unwrap_or_else(|complaints| panic!("what is printed cannot be read: {complaints}\n{printed}"));
    assert_eq!(again.to_string(), printed);
    if !printed.contains("\"***\"") {
        assert_eq!(again, *config, "{printed}");
    }
}

/// Keys that stand in the file itself are masked: each gets one of its own, or clients could not be told apart.
fn unmasked(printed: &str) -> String {
    let lines = printed.lines().enumerate().map(|(number, line)| match line {
        "api_key = \"***\"" | "key = \"***\"" => line.replace("***", &format!("sk-{number}")),
        _ => line.to_owned(),
    });
    lines.collect::<Vec<_>>().join("\n")
}

fn units_read_back(text: &str) {
    if let Ok(duration) = units::parse_duration(text) {
        assert_eq!(units::parse_duration(&units::format_duration(duration)), Ok(duration));
    }
    if let Ok(size) = units::parse_size(text) {
        assert_eq!(units::parse_size(&units::format_size(size)), Ok(size));
    }
    if let Ok(rate) = units::Rate::parse(text) {
        assert_eq!(units::Rate::parse(&rate.to_string()), Ok(rate));
        assert!(rate.count > 0 && rate.burst > 0 && !rate.interval().is_zero());
    }
    if let Ok(url) = UpstreamUrl::parse(text) {
        assert_eq!(UpstreamUrl::parse(&url.to_string()), Ok(url.clone()));
        let _ = (url.port(), url.host(), url.origin());
    }
}

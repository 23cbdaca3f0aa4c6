use super::*;

fn parse(source: &str) -> Result<Config, Complaints> {
    let env = |name: &str| match name {
        "KEY" => Some("sk-test".to_owned()),
        "OTHER_KEY" => Some("sk-test-of-another".to_owned()),
        _ => None,
    };
    Config::parse(source, &env)
}

#[track_caller]
fn complaints(source: &str) -> Vec<String> {
    parse(source).expect_err("this configuration is wrong").0.iter().map(ToString::to_string).collect()
}

#[test]
fn a_model_cannot_take_the_name_of_those_that_have_none() {
    for name in ["other", "-"] {
        let complaints = Config::parse(&format!("[models.{name}]\nconcurrency = 1"), &|_| None).expect_err("taken");
        assert!(complaints.to_string().starts_with(&format!("line 1: models.{name}: ")), "{complaints}");
    }
}

#[test]
fn an_empty_file_is_a_whole_configuration() {
    let config = parse("").expect("nothing is required");
    assert_eq!(config.upstream.base_url.to_string(), "https://api.holysheep.ai/v1");
    assert_eq!(config.retry.max_retries, 3);
    assert_eq!(config.limits.concurrency, Concurrency::Adaptive);
}

#[test]
fn the_shipped_config_toml_is_the_default() {
    assert_eq!(parse(include_str!("../../config.toml")).expect("the shipped file is good"), Config::default());
}

#[test]
fn the_shipped_config_toml_shows_every_option() {
    let shipped = include_str!("../../config.toml");
    for path in Config::option_paths() {
        let key = path.rsplit('.').next().expect("a path has a last part");
        let shown = shipped.lines().any(|line| {
            let line = line.trim_start_matches(['#', ' ']);
            line.strip_prefix(key).is_some_and(|rest| rest.trim_start().starts_with('='))
        });
        assert!(shown, "config.toml does not show {path}");
    }
}

#[test]
fn every_commented_example_in_the_shipped_config_toml_can_be_switched_on() {
    let switched_on: String = include_str!("../../config.toml")
        .lines()
        .map(|line| match line.strip_prefix("# ") {
            Some(example) if example.starts_with('[') || example.split(' ').nth(1) == Some("=") => example,
            _ => line,
        })
        .flat_map(|line| [line, "\n"])
        .collect();
    let config = Config::parse(&switched_on, &|_| Some("sk-test".to_owned()))
        .unwrap_or_else(|complaints| panic!("{complaints}"));
    assert!(config.limits.requests.is_some() && config.limits.tokens.is_some() && config.upstream.api_key.is_some());
    assert!(!config.models.is_empty() && !config.clients.is_empty());
}

#[test]
fn what_check_prints_reads_back_as_the_same_configuration() {
    let source = r#"
        [server]
        listen = ["127.0.0.1:1", "[::1]:2", 'unix:/run/weir "1".sock']
        admin_listen = "unix:/run/weir/admin.sock"
        header_timeout = "1.5s"
        lame_duck = "5s"
        tls = { cert = '/etc/"weir"/cert.pem', key = "/etc/weir/key.pem" }
        [upstream]
        api_key = "env:KEY"
        [limits]
        requests = { rate = "600/min", burst = 7 }
        tokens = "200000/min"
        concurrency = 12
        mode = "observe"
        [models."*"]
        requests = "5/s"
        [models."gpt-4.1-mini"]
        concurrency = 3
        tokens = { rate = "1000000/day", burst = 50000 }
        [clients.support-bot]
        key = "env:KEY"
        [clients."The \"batch\" of \\ números"]
        key = "env:OTHER_KEY"
        weight = 0.25
        max_wait = "20s"
        requests = "100/min"
        tokens = "10000/min"
        concurrency = 4
        mode = "observe"
    "#;
    let config = parse(source).expect("a good configuration");
    assert_eq!(config.clients.len(), 2);
    assert_eq!(parse(&config.to_string()).expect("what check prints is good"), config);
    assert!(!config.to_string().contains("sk-test") && !format!("{config:?}").contains("sk-test"));
}

#[test]
fn what_check_prints_reads_back_whatever_characters_it_has() {
    let source = r#"
        [upstream]
        base_url = 'http://gateway.test/a"b'
        api_key = 'env:A "KEY" \ \u'
        [retry]
        budget = 0xa
        [models."a\u0301\u007F\u0000\n\"\\\u200B"]
        requests = "1/s"
        [clients.quote]
        key = 'env:"'
    "#;
    let environment = |name: &str| Some(format!("sk-{}", name.len()));
    let config = Config::parse(source, &environment).expect("a good configuration");
    assert_eq!(config.retry.budget, 10.0);
    assert_eq!(Config::parse(&config.to_string(), &environment), Ok(config));
}

#[test]
fn ten_mistakes_are_ten_complaints_each_with_its_place() {
    let found = complaints(
        r#"[server]
listen = "nowhere"
max_body = 32
header_timeout = "soon"
[upstream]
base_url = "api.holysheep.ai"
api_key = "env:MISSING"
[limits]
requests = "0/min"
concurrency = 0
[queue]
max_waiting = "many"
[retry]
budget = -1
bugdet = 0.2
"#,
    );
    let expected = [
        ("line 2: server.listen:", "127.0.0.1:8080"),
        ("line 3: server.max_body:", r#""32B""#),
        ("line 4: server.header_timeout:", r#""30s""#),
        ("line 6: upstream.base_url:", "https://"),
        ("line 7: upstream.api_key:", "MISSING"),
        ("line 9: limits.requests:", "600/min"),
        ("line 10: limits.concurrency:", "at least 1"),
        ("line 12: queue.max_waiting:", "whole number"),
        ("line 14: retry.budget:", "0.2"),
        ("line 15: retry.bugdet:", r#"did you mean "budget"?"#),
    ];
    assert_eq!(found.len(), expected.len(), "{found:#?}");
    for (complaint, (place, mend)) in found.iter().zip(expected) {
        assert!(complaint.starts_with(place) && complaint.contains(mend), "{complaint}");
    }
}

#[test]
fn a_certificate_and_its_key_are_named_by_their_files() {
    let expected = Tls { cert: "a.pem".into(), key: "b.pem".into() };
    for source in
        ["[server]\ntls = { cert = \"a.pem\", key = \"b.pem\" }", "[server.tls]\nkey = \"b.pem\"\ncert = \"a.pem\""]
    {
        assert_eq!(parse(source).expect("good").server.tls.as_ref(), Some(&expected));
    }
    for (wrong, mend) in [
        ("true", "write { cert"),
        ("{ cert = \"a\" }", "both a certificate and its key"),
        ("{ cert = \"a\", key = \"b\", ca = \"c\" }", "\"ca\" is not part"),
        ("{ cert = 1, key = \"b\" }", "cert is an integer"),
        ("{ cert = \"a\", key = \"\" }", "key has to be the name of a file"),
        ("{ cert = \"a\", key = \"-----BEGIN PRIVATE KEY-----secret\" }", "key has to be the name of a file"),
    ] {
        let found = complaints(&format!("[server]\ntls = {wrong}"));
        assert!(
            found.len() == 1 && found[0].starts_with("line 2: server.tls: ") && found[0].contains(mend),
            "{found:?}"
        );
        assert!(!found[0].contains("secret"), "{found:?}");
    }
}

#[test]
fn the_access_log_goes_to_stderr_a_file_or_nowhere_and_no_misspelled_word_makes_a_file() {
    let target = |text: &str| parse(&format!("[log]\naccess = {text:?}")).map(|config| config.log.access);
    assert_eq!(target("stderr"), Ok(AccessTarget::Stderr));
    assert_eq!(target("off"), Ok(AccessTarget::Off));
    for path in ["/var/log/weir.log", "access.log", "./log", "/dev/stdout"] {
        assert_eq!(target(path), Ok(AccessTarget::File(path.into())));
    }
    for wrong in ["", "of", "stdout", "stderr ", "/var/log/"] {
        let found = complaints(&format!("[log]\naccess = {wrong:?}"));
        assert!(found.len() == 1 && found[0].contains("log.access") && found[0].contains("file's path"), "{found:?}");
    }
    assert!(complaints("[log]\naccess = false")[0].contains("\"off\""));
}

#[test]
fn every_limit_table_takes_tokens_and_a_mode() {
    let config = parse(
        "[limits]\ntokens = \"200000/min\"\nmode = \"observe\"\n[models.a]\ntokens = \"10/s\"\n\
         [clients.a]\nkey = \"env:KEY\"\ntokens = { rate = \"10/s\", burst = 3 }\nmode = \"enforce\"\n",
    )
    .expect("good");
    assert_eq!(config.limits.tokens.map(|rate| (rate.count, rate.burst)), Some((200_000, 20_000)));
    assert_eq!((config.limits.mode, config.models["a"].mode), (Mode::Observe, Mode::Enforce));
    assert_eq!(config.models["a"].tokens, Some(Rate::parse("10/s").expect("a rate")));
    let client = &config.clients["a"];
    assert_eq!(
        (client.limits.tokens.map(|rate| rate.burst), client.weight, client.max_wait),
        (Some(3), Weight::ONE, None)
    );
}

#[test]
fn what_is_wrong_with_clients_is_told_with_its_place_and_a_way_to_mend_it() {
    let found = complaints(
        r#"[clients.keyless]
weight = 2
[clients.a]
key = "env:KEY"
weight = 0
[clients.b]
key = "sk-test"
weight = "heavy"
[clients.c]
key = "env:MISSING"
weight = -1
concurrency = 0
[clients.-]
key = "sk-d"
tokens = "99999999999/s"
[clients.""]
key = "sk-e"
mode = "off"
[clients." f"]
key = "sk-f"
max_wait = 5
keys = 1
[models.m]
tokens = "0/min"
"#,
    );
    let expected = [
        ("line 1: clients.keyless:", r#"key = "env:NAME""#),
        ("line 5: clients.a.weight:", "0.01 to 1000"),
        ("line 7: clients.b.key:", "a key of its own"),
        ("line 8: clients.b.weight:", "0.01 to 1000"),
        ("line 10: clients.c.key:", "MISSING"),
        ("line 11: clients.c.weight:", "0.01 to 1000"),
        ("line 12: clients.c.concurrency:", "at least 1"),
        ("line 13: clients.-:", "another name"),
        ("line 15: clients.-.tokens:", "leave the limit out"),
        ("line 16: clients.\"\":", "[clients.support-bot]"),
        ("line 18: clients.\"\".mode:", "observe"),
        ("line 19: clients.\" f\":", "visible characters"),
        ("line 21: clients.\" f\".max_wait:", "5s"),
        ("line 22: clients.\" f\".keys:", "did you mean \"key\"?"),
        ("line 24: models.m.tokens:", "600/min"),
    ];
    assert_eq!(found.len(), expected.len(), "{found:#?}");
    for (complaint, (place, mend)) in found.iter().zip(expected) {
        assert!(complaint.starts_with(place) && complaint.contains(mend), "{complaint}");
    }
    assert!(found[2].contains("\"a\"") && found[2].contains("\"b\""), "both are named: {}", found[2]);
    assert!(!found.concat().contains("sk-"), "no key is shown: {found:#?}");
}

#[test]
fn a_name_that_is_too_long_and_a_client_too_many_are_refused() {
    let long = format!("[clients.{}]\nkey = \"k\"", "x".repeat(201));
    assert!(complaints(&long)[0].contains("a shorter name"));
    let many: String = (0..=1000).map(|i| format!("[clients.c{i:04}]\nkey = \"k{i}\"\n")).collect();
    let found = complaints(&many);
    assert!(found.len() == 1 && found[0].contains("more than 1000"), "{found:?}");
}

#[test]
fn a_syntax_error_has_its_line() {
    let found = complaints("[server]\nlisten = \n[queue]\nmax_wait = \"1s\"\n");
    assert!(found[0].starts_with("line 2: this is not TOML"), "{found:?}");
}

#[test]
fn behind_a_syntax_error_nothing_is_made_up() {
    for source in [
        "[limits\nconcurrency = 3\nrequests = \"600/min\"\n",
        "[clients.a]\nkey \"env:KEY\"\n",
        "[models.\"gpt-4.1-mini]\nconcurrency = 3\n",
        "[upstream]\napi_key = \"env:MISSING\n",
    ] {
        let found = complaints(source);
        assert!(found.iter().all(|complaint| complaint.contains("this is not TOML")), "{source}: {found:?}");
    }
}

#[test]
fn text_without_quotes_is_told_to_stand_in_some() {
    for text in ["127.0.0.1:8080", "600/min", "32MiB", "30s", "5min", "localhost:8080", "0.0.0.0:80", "https://a.b/v1"]
    {
        let found = complaints(&format!("[server]\nlisten = {text}\n"));
        assert!(
            found.len() == 1 && found[0].starts_with("line 2: ") && found[0].contains("quote"),
            "{text}: {found:?}"
        );
    }
}

#[test]
fn a_key_or_a_name_in_the_wrong_place_is_told_the_right_one() {
    for (source, mend) in [
        ("listen = \"127.0.0.1:1\"\n", "line 1: listen: is not an option; it belongs below [server]"),
        ("requests = \"1/s\"\n", "line 1: requests: is not an option; it belongs below [limits]"),
        ("[models.gpt-4.1-mini]\n", "a name with a dot stands in quotes: [models.\"gpt-4.1-mini\"]"),
        ("[clients.a]\nkey = \"k\"\nrequest = { rate = \"1/s\", burst = 2 }\n", "did you mean \"requests\"?"),
        ("[clients.a.b]\nkey = \"k\"\n", "a name with a dot stands in quotes: [clients.\"a.b\"]"),
        ("[queue]\nmax_waiting = \"7\"\n", "line 2: queue.max_waiting: is a string; "),
        ("[limits]\ntokens = 7\n", "line 2: limits.tokens: is an integer; "),
        ("limits = [7]\n", "line 1: limits: is an array; "),
    ] {
        let found = complaints(source);
        assert!(found.iter().any(|complaint| complaint.contains(mend)), "{source}: {found:?}");
    }
}

#[test]
fn weir_refuses_to_lend_its_key_to_strangers() {
    let open = "[server]\nlisten = \"0.0.0.0:8080\"\n[upstream]\napi_key = \"env:KEY\"\n";
    assert!(complaints(open)[0].contains("allow_anonymous"));
    assert!(complaints(open)[0].contains("[clients]"));
    assert!(parse(&format!("{open}[clients.a]\nkey = \"env:OTHER_KEY\"\n")).is_ok());
    assert!(parse(&open.replace("[upstream]", "allow_anonymous = true\n[upstream]")).is_ok());
    assert!(parse(&open.replace("0.0.0.0", "127.0.0.1")).is_ok());
    assert!(parse(&open.replace("0.0.0.0:8080", "unix:/run/weir.sock")).is_ok());
    // One open door is enough.
    let doors = r#"["unix:/run/weir.sock", "127.0.0.1:8080", "[::]:8080"]"#;
    assert!(complaints(&open.replace("\"0.0.0.0:8080\"", doors))[0].contains("[::]:8080"));
    assert!(parse(&open.replace("api_key", "# api_key")).is_ok());
}

#[test]
fn the_admin_token_is_a_secret_that_is_not_printed() {
    let config = parse("[server]\nadmin_token = \"tok-very-secret\"").expect("a good token");
    assert_eq!(config.server.admin_token.as_ref().map(Secret::reveal), Some("tok-very-secret"));
    let shown = format!("{config} {config:?}");
    assert!(shown.contains("admin_token = \"***\"") && !shown.contains("very"), "{shown}");
    assert!(complaints("[server]\nadmin_token = \"env:NO_SUCH_VARIABLE\"")[0].contains("server.admin_token"));
    assert_eq!(Config::default().server.admin_token, None);
}

#[test]
fn the_admin_listener_has_an_address_of_its_own() {
    assert!(complaints("[server]\nadmin_listen = \"127.0.0.1:8080\"")[0].contains("server.admin_listen"));
    let same = "[server]\nlisten = [\"127.0.0.1:1\", \"unix:/run/a\"]\nadmin_listen = \"unix:/run/a\"";
    assert!(complaints(same)[0].contains("server.admin_listen"));
    assert!(parse(&same.replace("admin_listen = \"unix:/run/a\"", "admin_listen = \"unix:/run/b\"")).is_ok());
}

#[test]
fn no_text_makes_the_parser_panic() {
    for source in [
        "[",
        "[[server]]",
        "server = 1",
        "models = []",
        "[models]\na = 1",
        "[server]\nlisten = []",
        "\u{0}",
        "a.b.c = 1",
    ] {
        assert!(parse(source).is_err(), "{source:?}");
    }
}

#[test]
fn a_socket_that_weir_is_handed_is_judged_like_one_of_its_own() {
    let open = Address::parse("0.0.0.0:80").expect("an address");
    let lending = parse("[upstream]\napi_key = \"env:KEY\"\n").expect("good");
    assert!(lending.may_listen(&open).expect_err("open to all").contains("0.0.0.0:80 can be reached"));
    assert_eq!(lending.may_listen(&Address::parse("unix:/run/weir.sock").expect("an address")), Ok(()));
    let knowing = parse("[upstream]\napi_key = \"env:KEY\"\n[clients.a]\nkey = \"env:OTHER_KEY\"\n").expect("good");
    assert_eq!(knowing.may_listen(&open), Ok(()));
    assert_eq!(Config::default().may_listen(&open), Ok(()));
}

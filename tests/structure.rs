//! The shape of the source, as ARCHITECTURE.md draws it: who may import whom, where each crate has its home, and that the
//! documents name only metrics, files and headings that exist. (Cargo runs tests in the package's folder, so paths are as in the repository.)

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

/// A crate and the only places (a file, or a folder with its `/`) that may use it.
const HOMES: [(&str, &[&str]); 9] = [
    ("governor", &["src/admission/bucket.rs"]),
    ("httparse", &["src/upstream/"]),
    ("listenfd", &["src/systemd.rs"]),
    ("prometheus", &["src/metrics/"]),
    // Jitter; the age of a connection; the name of a process, and the generator that jitter is given; a nonce.
    ("rand", &["src/retry/mod.rs", "src/upstream/pool.rs", "src/proxy/mod.rs", "src/admin/page.rs"]),
    // The wire format, and what operators' programs read.
    ("serde_json", &["src/openai/", "src/admin/", "src/explain.rs", "src/simulator/", "src/demo.rs", "src/demo/"]),
    // Keys are compared in one place, and the operators' token in another.
    ("subtle", &["src/clients.rs", "src/admin/token.rs"]),
    // Towards the gateway, and towards clients.
    ("tokio_rustls", &["src/upstream/connect.rs", "src/upstream/wire/", "src/server/tls.rs"]),
    ("toml", &["src/config/"]),
];

/// What the `prometheus` crate tells of the process by itself.
const PROCESS_METRICS: [&str; 7] = [
    "process_cpu_seconds_total",
    "process_max_fds",
    "process_open_fds",
    "process_resident_memory_bytes",
    "process_start_time_seconds",
    "process_threads",
    "process_virtual_memory_bytes",
];

/// A limit's line, its fair order and the limit know each other by their ids.
const IN_A_CIRCLE: [&str; 3] = ["src/admission/fair", "src/admission/limit", "src/admission/line"];

/// The simulator measures the proxy, so it shares no code with it but the units.
const SIMULATOR_MAY_IMPORT: [&str; 2] = ["config", "simulator"];

#[test]
fn a_module_imports_only_what_stands_above_it() {
    let lib = read("src/lib.rs");
    let order: Vec<&str> = lib.lines().filter_map(|line| line.strip_prefix("pub mod ")?.strip_suffix(';')).collect();
    let place = |name: &str| order.iter().position(|module| *module == name);
    let mut wrong = Vec::new();
    for source in sources() {
        let Some(module) = source.module() else { continue };
        let own = place(module).unwrap_or_else(|| panic!("{}: {module} is not in src/lib.rs", source.path));
        for (number, line) in source.production() {
            for path in line.split("crate::").skip(1) {
                let imported = first_word(path);
                let allowed = match place(imported) {
                    Some(_) if module == "simulator" => SIMULATOR_MAY_IMPORT.contains(&imported),
                    Some(above) => above <= own,
                    None => false,
                };
                if !allowed {
                    wrong.push(format!("{}:{number}: {module} may not import {imported:?}", source.path));
                }
            }
        }
    }
    assert_none(&wrong, "src/lib.rs lists the modules in the order of imports (write one `use` a module)");
}

#[test]
fn the_files_of_a_folder_import_each_other_in_no_circle() {
    let mut imports: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for source in sources().iter().filter(|source| source.path.matches('/').count() == 2) {
        let (folder, own) = source.path.trim_end_matches(".rs").rsplit_once('/').expect("it is in a folder");
        let siblings = source.production().flat_map(|(_, line)| line.split("super::").skip(1).flat_map(first_words));
        let paths = siblings.filter(|name| *name != own).map(|name| format!("{folder}/{name}"));
        imports.entry(format!("{folder}/{own}")).or_default().extend(paths);
    }
    imports.retain(|own, _| !IN_A_CIRCLE.contains(&own.as_str()));
    // Who imports nothing that is left is in no circle.
    while let Some(free) =
        imports.iter().find(|(_, of)| !of.iter().any(|it| imports.contains_key(it))).map(|(own, _)| own.clone())
    {
        imports.remove(&free);
    }
    let wrong: Vec<String> = imports.into_keys().collect();
    assert_none(&wrong, "give what both need a file of its own");
}

#[test]
fn every_crate_stays_in_its_home() {
    let mut wrong = Vec::new();
    for source in sources() {
        for (number, line) in source.production() {
            for (name, homes) in HOMES {
                if uses_crate(line, name) && !homes.iter().any(|home| source.path.starts_with(home)) {
                    wrong.push(format!("{}:{number}: {name} belongs to {}", source.path, homes.join(", ")));
                }
            }
        }
    }
    assert_none(&wrong, "crates have homes");
}

#[test]
fn nothing_is_printed_by_a_macro_that_panics_when_nobody_reads() {
    let mut wrong = Vec::new();
    for source in sources() {
        let prints = source.production().filter(|(_, line)| line.contains("println!(") || line.contains("print!("));
        wrong.extend(prints.map(|(number, line)| format!("{}:{number}: {}", source.path, line.trim())));
    }
    assert_none(&wrong, "say it with main's say and complain, or with write!");
}

#[test]
fn nothing_is_unwrapped_outside_tests() {
    let mut wrong = Vec::new();
    for source in sources() {
        let unwraps = source.production().filter(|(_, line)| line.contains(".unwrap()"));
        wrong.extend(unwraps.map(|(number, line)| format!("{}:{number}: {}", source.path, line.trim())));
    }
    assert_none(&wrong, "write expect(\"why it cannot happen\"), or handle it");
}

#[test]
fn the_documents_name_only_metrics_that_exist() {
    let mut exist = metric_names(&read("src/metrics/text.rs"));
    exist.extend(PROCESS_METRICS.map(str::to_owned));
    exist.extend(files("deploy", ".rules.yml").iter().flat_map(|path| recorded(&read(path))));
    let suffixes = ["_bucket", "_sum", "_count"];
    let is_known = |name: &str| {
        exist.contains(name) || suffixes.iter().filter_map(|it| name.strip_suffix(it)).any(|base| exist.contains(base))
    };
    let mut wrong = Vec::new();
    let documents = [".md", ".yml", ".yaml", ".json", ".service", ".toml"].iter().flat_map(|ending| files(".", ending));
    for path in documents {
        let unknown = metric_names(&read(&path)).into_iter().filter(|name| !is_known(name));
        wrong.extend(unknown.map(|name| format!("{path}: there is no metric {name}")));
    }
    assert_none(&wrong, "src/metrics/text.rs has every metric, deploy/prometheus every recording rule");
}

#[test]
fn a_metric_that_does_not_exist_is_seen_wherever_it_stands() {
    let names = |text| metric_names(text).into_iter().collect::<Vec<_>>();
    assert_eq!(names(r#""expr": "sum(rate(weir_a_total{job=\"x\"}[5m]))""#), ["weir_a_total"]);
    assert_eq!(names("expr: job:weir_a:rate5m / weir_b"), ["job:weir_a:rate5m", "weir_b"]);
    assert_eq!(
        names("process_open_fds: and `weir_c`: weir_ rightful weir_d_2."),
        ["process_open_fds", "weir_c", "weir_d_2"]
    );
    assert_eq!(names("my_weir_e post_process_f weir-g"), [""; 0]);
    assert_eq!(recorded("- record: job:weir_a:rate5m\n  expr: job:weir_b:rate5m"), ["job:weir_a:rate5m"]);
}

#[test]
fn the_documents_lead_only_to_files_and_headings_that_exist() {
    let mut wrong = Vec::new();
    let mut seen = 0;
    for path in files(".", ".md") {
        for link in links(&prose(&read(&path))) {
            seen += 1;
            let (file, heading) = link.split_once('#').unwrap_or((&link, ""));
            let target = match (file, path.rsplit_once('/')) {
                ("", _) => path.clone(),
                (file, Some((folder, _))) => format!("{folder}/{file}"),
                (file, None) => file.to_owned(),
            };
            if !Path::new(&target).exists() || !(heading.is_empty() || headings(&read(&target)).contains(heading)) {
                wrong.push(format!("{path}: {link} leads nowhere"));
            }
        }
    }
    assert!(seen > 20, "only {seen} links were seen");
    assert_none(&wrong, "links are relative to their document, headings as GitHub spells them");
}

#[test]
fn a_link_is_seen_and_a_heading_spelled_as_on_github() {
    let text = "# A `b`: c-d, e_f\n[x](a.md#b) ![y](c.svg) [z](https://d/)\n```\n# [no](e)\n```\n[t\nu](#f)";
    assert_eq!(links(&prose(text)), ["a.md#b", "c.svg", "#f"]);
    assert_eq!(headings(text).into_iter().collect::<Vec<_>>(), ["a-b-c-d-e_f"]);
}

/// A source file, by its path.
struct Source {
    path: String,
    text: String,
}

impl Source {
    /// The module of src/lib.rs that it belongs to; `None` for lib.rs and main.rs themselves, which come after all.
    fn module(&self) -> Option<&str> {
        let first = self.path.split('/').nth(1)?.trim_end_matches(".rs");
        (!matches!(first, "lib" | "main")).then_some(first)
    }

    /// The lines compiled into weir, numbered from 1: no comments, and nothing of `mod tests`, which ends a file.
    fn production(&self) -> impl Iterator<Item = (usize, &str)> {
        let numbered = self.text.lines().enumerate().map(|(index, line)| (index + 1, line));
        let until_tests = numbered.take_while(|(_, line)| *line != "mod tests {");
        until_tests.filter(|(_, line)| !line.trim_start().starts_with("//"))
    }
}

/// Every source file but those of tests.
fn sources() -> Vec<Source> {
    let paths = files("src", ".rs").into_iter().filter(|path| !path.ends_with("tests.rs"));
    paths.map(|path| Source { text: read(&path), path }).collect()
}

/// The name that a path begins with.
fn first_word(path: &str) -> &str {
    path.split(|c: char| !(c.is_alphanumeric() || c == '_')).next().unwrap_or_default()
}

/// The names that a path begins with: one, or each of a group in braces.
fn first_words(path: &str) -> impl Iterator<Item = &str> {
    let group = path.strip_prefix('{').map_or("", |group| group.split('}').next().unwrap_or_default());
    group.split(',').map(str::trim).chain([path]).map(first_word)
}

/// Whether a line has `name::` or `use name`, and not as a part of a longer path or word.
fn uses_crate(line: &str, name: &str) -> bool {
    line.match_indices(name).any(|(at, _)| {
        let (before, after) = (&line[..at], &line[at + name.len()..]);
        let is_whole = !before.ends_with(|c: char| c.is_alphanumeric() || matches!(c, '_' | ':' | '"'));
        is_whole && (after.starts_with("::") || (before.trim() == "use" && after.starts_with([';', ' '])))
    })
}

/// Every word that is spelled as a metric of weir's, of its process, or as a recording rule made of these
/// (`level:metric:operation`).
fn metric_names(text: &str) -> BTreeSet<String> {
    let words = text.split(|c: char| !(c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '_' | ':')));
    let is_metric = |word: &str| (word.starts_with("weir_") || word.starts_with("process_")) && !word.ends_with('_');
    let words = words.map(|word| word.trim_matches(':'));
    words.filter(|word| word.split(':').any(is_metric)).map(str::to_owned).collect()
}

/// The names that recording rules give.
fn recorded(rules: &str) -> Vec<String> {
    rules.lines().filter_map(|line| line.trim().strip_prefix("- record: ")).map(str::to_owned).collect()
}

/// A document without its blocks of code.
fn prose(text: &str) -> String {
    text.split("\n```").step_by(2).collect::<Vec<_>>().join("\n")
}

/// Where the links and pictures of a document lead, but for other sites.
fn links(prose: &str) -> Vec<String> {
    let targets = prose.split("](").skip(1).filter_map(|rest| Some(rest.split_once(')')?.0));
    targets.filter(|target| !target.contains("://")).map(str::to_owned).collect()
}

/// The headings of a document, as links name them.
fn headings(text: &str) -> BTreeSet<String> {
    let prose = prose(text);
    let titles = prose.lines().filter(|line| line.starts_with('#')).map(|line| line.trim_start_matches('#').trim());
    let anchor = |title: &str| -> String {
        let kept = title.chars().filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'));
        kept.map(|c| if c == ' ' { '-' } else { c.to_ascii_lowercase() }).collect()
    };
    titles.map(anchor).collect()
}

fn read(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// The files below a folder whose names end like this, as paths from the root; builds and hidden folders left out.
fn files(folder: &str, ending: &str) -> Vec<String> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).expect("a folder that can be read") {
        let entry = entry.expect("an entry that can be read");
        let name = entry.file_name().to_string_lossy().into_owned();
        let path = if folder == "." { name.clone() } else { format!("{folder}/{name}") };
        if entry.path().is_file() && name.ends_with(ending) {
            found.push(path);
        } else if entry.path().is_dir() && !name.starts_with('.') && !matches!(&*name, "target" | "node_modules") {
            found.extend(files(&path, ending));
        }
    }
    found
}

fn assert_none(wrong: &[String], rule: &str) {
    assert!(wrong.is_empty(), "{rule}:\n{}\n", wrong.join("\n"));
}

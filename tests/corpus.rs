//! Every file of the fuzz targets' corpora, through the properties that the targets check (fuzz/src): what was once found
//! stays found, without any fuzzer. docs/testing.md tells more.

#[path = "../fuzz/src/lib.rs"]
mod properties;

use std::fs;
use std::path::PathBuf;

/// The corpora are for people too: small ones, that say what they are by their names.
const MOST_BYTES: usize = 400 << 10;

#[test]
fn every_file_of_the_corpora_passes() {
    let mut bytes = 0;
    for (target, check) in properties::TARGETS {
        let files = files(&format!("fuzz/corpus/{target}"));
        assert!(!files.is_empty(), "{target} has no corpus");
        for file in files {
            let input = fs::read(&file).expect("a file that can be read");
            bytes += input.len();
            // What fails says only what; the file says where.
            println!("{}", file.display());
            check(&input);
        }
    }
    assert!(bytes <= MOST_BYTES, "the corpora have {bytes} bytes");
}

#[test]
fn every_property_has_a_target_and_every_target_a_property() {
    let mut targets: Vec<String> = Vec::new();
    for file in files("fuzz/fuzz_targets") {
        let name = file.file_stem().expect("a name").to_string_lossy().into_owned();
        let source = fs::read_to_string(&file).expect("a file that can be read");
        assert!(source.contains(&format!("weir_fuzz::{name}::check")), "{name} checks something else");
        targets.push(name);
    }
    assert_eq!(targets, properties::TARGETS.map(|(name, _)| name.to_owned()));
}

fn files(folder: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).unwrap_or_else(|error| panic!("{folder}: {error}"));
    let mut files: Vec<PathBuf> = entries.map(|entry| entry.expect("an entry that can be read").path()).collect();
    files.sort();
    files
}

//! The example `learning_rule_table`: its rows pass, a wrong answer is reported, and the pictures are drawn.

// All of the example, its `main` included, which nobody calls here.
#[allow(dead_code)]
#[path = "../examples/learning_rule_table/main.rs"]
mod example;

use clap::Parser;
use clap::error::ErrorKind;
use example::Arguments;
use example::table::{Answer, Row, Section, check};
use serde_json::Value;
use std::collections::HashSet;

/// The lines of `--json`, and the error that the program would end with.
fn json(table: &[Section]) -> (Vec<Value>, Option<String>) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("table.json");
    let error = example::run(table, Some(&path)).err().map(|e| e.to_string());
    (serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap(), error)
}

#[test]
fn every_row_passes() {
    let (rows, error) = json(&example::TABLE);
    assert_eq!(error, None);
    assert!(rows.len() >= 60, "{}", rows.len());
    for row in &rows {
        let number = |key: &str| row[key].as_f64().unwrap_or_else(|| panic!("no {key} in {row}"));
        assert_eq!(row["passed"], true, "{row}");
        assert_eq!(row["failure"], Value::Null, "{row}");
        let error = (number("ours") - number("exact")).abs() / number("exact").abs().max(1.0);
        assert_eq!(number("error"), error, "{row}");
        // Whatever a row claims, rounding is all that these problems leave.
        assert!(error <= number("tolerance") && number("tolerance") <= 1e-10 && number("compared") >= 1.0, "{row}");
    }
    let names: HashSet<&str> = rows.iter().filter_map(|r| r["name"].as_str()).collect();
    assert_eq!(names.len(), rows.len(), "two rows of one name");
}

#[test]
fn wrong_answers_fail() {
    const RIGHT: Row =
        Row::new(["right", "", "", ""], || Ok(Answer { exact: vec![1.0], ours: vec![1.0], tolerance: 0.0 }));
    const OFF: Row = Row::new(["off", "", "", ""], || {
        Ok(Answer { exact: vec![1.0, 200.0, 3.0], ours: vec![1.0, 201.0, 3.001], tolerance: 1e-3 })
    });
    const NAN: Row = Row::new(["nan", "", "", ""], || {
        Ok(Answer { exact: vec![1.0, 2.0], ours: vec![5.0, f64::NAN], tolerance: 9.0 })
    });
    const SHORT: Row =
        Row::new(["short", "", "", ""], || Ok(Answer { exact: vec![1.0, 2.0], ours: vec![1.0], tolerance: 9.0 }));
    const BROKEN: Row = Row::new(["broken", "", "", ""], || Err("no such luck".into()));
    assert!(check("", &RIGHT).passed);
    let (rows, error) = json(&[Section { title: "all", rows: &[RIGHT, OFF, NAN, SHORT, BROKEN] }]);
    assert_eq!(error.unwrap(), "4 of 5 rows failed: off, nan, short, broken");
    let passed: Vec<_> = rows.iter().map(|r| r["passed"].as_bool().unwrap()).collect();
    assert_eq!(passed, [true, false, false, false, false]);
    // The number shown is the one that is furthest off.
    assert_eq!((&rows[1]["exact"], &rows[1]["ours"], &rows[1]["error"]), (&200.0.into(), &201.0.into(), &0.005.into()));
    assert_eq!((&rows[2]["ours"], &rows[2]["compared"]), (&Value::Null, &2.into()));
    assert_eq!(rows[3]["failure"], "1 numbers: expected 2, at least one");
    assert_eq!(rows[4]["failure"], "no such luck");
}

#[test]
fn arguments() {
    let parse = |given: &[&str]| {
        let given = std::iter::once(&"learning_rule_table").chain(given);
        Arguments::try_parse_from(given).map(|a| a.json).map_err(|e| (e.kind(), e.to_string()))
    };
    let refused = |given: &[&str], kind, word: &str| {
        let (found, text) = parse(given).unwrap_err();
        assert!(found == kind && text.contains(word), "{found:?}: {text}");
    };
    assert_eq!(parse(&[]), Ok(None));
    assert_eq!(parse(&["--json", "a.json"]), Ok(Some("a.json".into())));
    refused(&["--json"], ErrorKind::InvalidValue, "--json <FILE>");
    refused(&["--jason"], ErrorKind::UnknownArgument, "'--json'");
    refused(&["--json", "a", "b"], ErrorKind::UnknownArgument, "'b'");
}

#[test]
fn pictures_are_drawn() {
    let folder = tempfile::tempdir().unwrap();
    let files = example::draw(folder.path()).unwrap();
    assert_eq!(files.len(), 3);
    for file in files {
        let svg = std::fs::read_to_string(&file).unwrap();
        assert!(svg.starts_with("<svg ") && svg.trim_end().ends_with("</svg>"), "{}", file.display());
        assert!(svg.matches("<polyline").count() > 20 && !svg.contains("NaN"), "{}", file.display());
    }
}

fn text(path: &str) -> String {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
    std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// docs/table.md names tests as `file::test` or `optim::row::tests::test`: all of them exist, and every row has some.
#[test]
fn the_documented_proofs_exist() {
    let table = text("docs/table.md");
    let names: Vec<&str> = table
        .split('`')
        .skip(1)
        .step_by(2)
        .filter(|code| {
            code.contains("::") && code.chars().all(|c| c.is_ascii_lowercase() || "_:0123456789".contains(c))
        })
        .collect();
    for name in &names {
        let parts: Vec<&str> = name.split("::").collect();
        let (file, test) = match parts[..] {
            [file, test] => (format!("tests/{file}.rs"), test),
            ["rows", row, "tests", test] => (format!("src/rows/{row}.rs"), test),
            _ => panic!("{name} is no name of a test"),
        };
        let source = text(&file);
        let lines: Vec<&str> = source.lines().map(str::trim).collect();
        let head = format!("fn {test}(");
        assert!(lines.windows(2).any(|l| l[0] == "#[test]" && l[1].starts_with(&head)), "{name} is not in {file}");
    }
    assert!(names.len() > 90, "{}", names.len());
    let sections: Vec<&str> =
        table.split("\n### <a name=").skip(1).map(|s| s.split("\n## ").next().unwrap_or(s)).collect();
    assert!(sections.len() >= 20, "{}", sections.len());
    for section in sections {
        assert!(section.contains("\nProof: `") && section.contains("\nSource: "), "no proof or source: {section}");
    }
}

/// Links into docs/table.md have their anchors.
#[test]
fn the_links_into_the_table_have_anchors() {
    let table = text("docs/table.md");
    let mut links = 0;
    for (page, prefix) in [("README.md", "docs/table.md#"), ("docs/design.md", "table.md#"), ("docs/table.md", "](#")] {
        for link in text(page).split(prefix).skip(1) {
            let anchor = link.split(')').next().unwrap_or_default();
            assert!(table.contains(&format!("<a name=\"{anchor}\"></a>")), "{page} links to #{anchor}");
            links += 1;
        }
    }
    assert!(links > 30, "{links}");
}

/// What `pub use rows::{..}` exports beside the rows.
const NOT_ROWS: [&str; 2] = ["AnyRow", "BuildOptions"];

/// Rows with a driver of their own, whose file of tests stands for the conformance suite.
const OTHER_DRIVERS: [(&str, &str); 2] =
    [("MixtureOfGaussians", "tests/mixture.rs"), ("MultiIvon", "tests/mixture.rs")];

fn words(text: &str) -> impl Iterator<Item = &str> {
    text.split(|c: char| !c.is_alphanumeric() && c != '_').filter(|w| !w.is_empty())
}

/// The text between each `from` and the `to` after it.
fn between<'a>(text: &'a str, from: &'a str, to: &'a str) -> impl Iterator<Item = &'a str> {
    text.split(from).skip(1).map(move |rest| rest.split(to).next().unwrap())
}

/// All files of a folder with this ending, one after the other.
fn folder(path: &str, ending: &str) -> String {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
    let mut names: Vec<String> =
        std::fs::read_dir(root).unwrap().map(|f| f.unwrap().file_name().into_string().unwrap()).collect();
    names.retain(|name| name.ends_with(ending));
    assert!(!names.is_empty(), "{path}/*{ending}");
    names.iter().map(|name| text(&format!("{path}/{name}"))).collect()
}

/// Somebody who adds a row finds here what else it needs: the conformance suite, its settings in docs/table.md, and a
/// problem with a known answer in the example.
#[test]
fn every_row_is_tested_documented_and_in_the_example() {
    let library = text("src/lib.rs");
    let exported: HashSet<&str> = between(&library, "pub use rows::", ";").flat_map(words).collect();
    for name in NOT_ROWS {
        assert!(exported.contains(name), "NOT_ROWS: {name} is not exported any more");
    }
    // `name: Row = ..` of the rows under test, whose lists the suite goes through; binary rows are listed in it.
    let configurations = text("crates/tch-blr-test-support/src/rows.rs");
    let suite = text("tests/conformance.rs");
    for list in ["rows_of_weights!(suite)", "rows_of_all_weights!(joint)"] {
        assert!(suite.contains(list), "{list}");
    }
    let lists = between(&configurations, "$all! {", "}").chain(between(&suite, "binary!(", "\n);"));
    let tested: HashSet<&str> = lists.flat_map(words).collect();
    let conforms = |row: &str| {
        configurations.lines().any(|line| {
            let mut w = words(line);
            w.next().is_some_and(|name| tested.contains(name)) && w.next() == Some(row)
        })
    };
    let table = text("docs/table.md");
    let example = folder("examples/learning_rule_table", ".rs");
    let uses = between(&example, "\nuse ", ";").fold(example.clone(), |text, used| text.replace(used, ""));
    let [documented, shown]: [HashSet<&str>; 2] = [words(&table).collect(), words(&uses).collect()];
    let rows: Vec<&str> = exported.into_iter().filter(|name| !NOT_ROWS.contains(name)).collect();
    assert!(rows.len() >= 20, "{rows:?}");
    for row in rows {
        match OTHER_DRIVERS.iter().find(|(name, _)| *name == row) {
            Some((_, tests)) => assert!(words(&text(tests)).any(|w| w == row), "{row} is not in {tests}"),
            None => assert!(conforms(row), "{row} is not in the conformance suite"),
        }
        assert!(documented.contains(row), "{row} is not in docs/table.md");
        assert!(shown.contains(row), "{row} is not in examples/learning_rule_table");
    }
}

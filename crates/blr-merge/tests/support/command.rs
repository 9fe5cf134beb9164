//! The command `blr-merge`, run in a folder.

use std::path::Path;
use std::process::{Command, Output};

/// With the words of a line; one in single quotes may have spaces.
pub fn run(folder: &Path, arguments: &str) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_blr-merge"));
    for (i, part) in arguments.split('\'').enumerate() {
        if i % 2 == 1 {
            command.arg(part)
        } else {
            command.args(part.split_whitespace())
        };
    }
    command.current_dir(folder).output().unwrap()
}

/// What it prints.
pub fn ok(folder: &Path, arguments: &str) -> String {
    let out = run(folder, arguments);
    assert!(out.status.success(), "{arguments}: {}", String::from_utf8_lossy(&out.stderr));
    // No progress where there is no terminal.
    assert!(out.stderr.is_empty(), "{}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8(out.stdout).unwrap()
}

/// The single line on stderr.
pub fn error(folder: &Path, arguments: &str) -> String {
    let out = run(folder, arguments);
    assert_eq!(out.status.code(), Some(2), "{arguments}");
    let text = String::from_utf8(out.stderr).unwrap();
    assert!(text.starts_with("error: ") && text.lines().count() == 1, "{text}");
    text
}

//! What the command prints: results on stdout, progress on stderr.

use crate::Outcome;
use blr_merge::Merged;
use indicatif::{ProgressBar, ProgressStyle};
use std::io::{self, Write};
use std::path::Path;

/// Shows a bar on stderr while `work` runs, if that is a terminal.
pub fn with_progress<T>(work: impl FnOnce(&mut dyn FnMut(u64, u64)) -> T) -> T {
    let style = ProgressStyle::with_template("{bar:40} {bytes}/{total_bytes} {bytes_per_sec} {eta}");
    let bar = ProgressBar::new(0).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    let done = work(&mut |written, total| {
        bar.set_length(total);
        bar.set_position(written);
    });
    bar.finish_and_clear();
    done
}

pub fn report(merged: &Merged, out: &Path) -> Outcome<()> {
    let what = if merged.posterior { "a posterior" } else { "weights" };
    let mut lines =
        vec![format!("{}: {what} of {} tensors, {} elements", out.display(), merged.tensors, merged.weights)];
    for (what, names) in [
        ("averaged, being statistics of batch normalization", &merged.averaged),
        ("copied from the base or the first model", &merged.copied),
    ] {
        if !names.is_empty() {
            lines.push(format!("{what}: {}", some(names)));
        }
    }
    print(&lines)
}

/// As many of the names as fit on a line or two.
fn some(names: &[String]) -> String {
    const MOST: usize = 10;
    let more = names.len().saturating_sub(MOST);
    let names = names[..names.len() - more].join(", ");
    if more > 0 { format!("{names} and {more} more") } else { names }
}

/// Prints lines in which names and texts of files may be, which may come from anyone.
pub fn print(lines: &[String]) -> Outcome<()> {
    write(&lines.iter().map(|line| visible(line) + "\n").collect::<String>())
}

/// Without the characters that a terminal takes for commands, or by which text looks different from what it is.
pub fn visible(text: &str) -> String {
    let hidden = |c: char| {
        c.is_control() || matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
    };
    let mut seen = String::new();
    for c in text.chars() {
        if hidden(c) { seen.extend(c.escape_default()) } else { seen.push(c) }
    }
    seen
}

/// Prints as it is.
pub fn write(text: &str) -> Outcome<()> {
    match io::stdout().lock().write_all(text.as_bytes()) {
        // The reader, `head` for example, has had enough.
        Err(e) if e.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        done => Ok(done?),
    }
}

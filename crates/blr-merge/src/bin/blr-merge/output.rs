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
    if !merged.copied.is_empty() {
        lines.push(format!("copied, since they are not floating-point numbers: {}", merged.copied.join(", ")));
    }
    print(&lines)
}

pub fn print(lines: &[String]) -> Outcome<()> {
    let text: String = lines.iter().flat_map(|line| [line.as_str(), "\n"]).collect();
    match io::stdout().lock().write_all(text.as_bytes()) {
        // The reader, `head` for example, has had enough.
        Err(e) if e.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        done => Ok(done?),
    }
}

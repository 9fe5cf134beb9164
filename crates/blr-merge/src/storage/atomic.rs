//! Replacing a file, or filling a new folder, so that no reader ever finds half of it.

use crate::Error;
use std::fs::{self, File};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

/// Drafts that this process has begun.
static DRAFTS: AtomicU64 = AtomicU64::new(0);

/// Writes a file by way of a draft: `write` makes the new file at the path that it is given, beside the old one; it is
/// then flushed to the disk and renamed to `path`. Whoever opens `path`, even after a crash at any moment, finds the
/// old file or the new one, and either is whole.
///
/// `write` may also make a folder, if there is none at `path` or an empty one; it then flushes the files in it.
///
/// # Errors
/// Those of `write`, and [`Error::File`] if the draft cannot be renamed. The old file is then still there, and no
/// draft.
pub fn replace<E: From<Error>>(path: &Path, write: impl FnOnce(&Path) -> Result<(), E>) -> Result<(), E> {
    let error = |problem: &dyn std::fmt::Display| Error::file(path, format!("cannot be written: {problem}"));
    let file_name = path.file_name().ok_or_else(|| error(&"the path names no file"))?;
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    // Two processes, or two threads of one, may write the same file: each has a draft under a name of its own.
    let (process, draft) = (std::process::id(), DRAFTS.fetch_add(1, Ordering::Relaxed));
    let draft = folder.join(format!(".{}.{process}-{draft}.tmp", file_name.to_string_lossy()));
    let rename = || -> std::io::Result<()> {
        // Before the rename: otherwise a crash could leave the new name with the old file gone and the new one empty.
        File::open(&draft)?.sync_all()?;
        fs::rename(&draft, path)?;
        // The rename itself is on the disk only once the folder is.
        File::open(folder)?.sync_all()
    };
    let clear = || fs::remove_file(&draft).or_else(|_| fs::remove_dir_all(&draft));
    write(&draft).and_then(|()| rename().map_err(|e| error(&e).into())).inspect_err(|_| _ = clear())
}

//! Files that are read: regular ones, for anything else may be read for ever, wait for a writer, or not be read twice.

use crate::{Error, Result};
use std::fs::{self, File, Metadata, OpenOptions};
use std::io::Read;
use std::path::Path;

/// Opens a regular file, or a link to one.
pub(crate) fn open(path: &Path) -> Result<File> {
    let unreadable = |e: std::io::Error| Error::file(path, format_args!("cannot be read: {e}"));
    let check = |found: &Metadata| {
        let problem = || Error::file(path, format_args!("is {}: expected a regular file", kind(found)));
        found.is_file().then_some(()).ok_or_else(problem)
    };
    // Before opening, which is an event for some devices; and again of what was opened, which may be something else.
    check(&fs::metadata(path).map_err(unreadable)?)?;
    let file = opened(path).map_err(unreadable)?;
    check(&file.metadata().map_err(unreadable)?)?;
    Ok(file)
}

/// Opens whatever is there, without waiting for the other end of a pipe.
pub(super) fn opened(path: &Path) -> std::io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::custom_flags(&mut options, libc::O_NONBLOCK);
    options.open(path)
}

/// All of a regular file of at most so many bytes.
pub(crate) fn read(path: &Path, most: u64) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let read = open(path)?.take(most + 1).read_to_end(&mut bytes);
    read.map_err(|e| Error::file(path, format_args!("cannot be read: {e}")))?;
    if bytes.len() as u64 > most {
        return Err(Error::file(path, format_args!("has more than {most} bytes")));
    }
    Ok(bytes)
}

/// What there is, with its article.
pub(super) fn kind(found: &Metadata) -> &'static str {
    #[cfg(unix)]
    {
        use std::os::unix::fs::FileTypeExt;
        let kind = found.file_type();
        if kind.is_fifo() {
            return "a pipe";
        }
        if kind.is_socket() {
            return "a socket";
        }
        if kind.is_block_device() || kind.is_char_device() {
            return "a device";
        }
    }
    match found {
        found if found.is_dir() => "a folder",
        found if found.is_symlink() => "a symbolic link",
        found if found.is_file() => "a file",
        _ => "neither a file nor a folder",
    }
}

//! Files that are read: regular ones, for anything else may be read for ever, wait for a writer, or not be read twice.

use crate::{Error, Result};
use std::fs::{self, File, Metadata};
use std::io::Read;
use std::path::Path;

/// Opens a regular file, or a link to one.
pub(crate) fn open(path: &Path) -> Result<File> {
    let unreadable = |e: std::io::Error| Error::file(path, format_args!("cannot be read: {e}"));
    // Before opening, which would wait for the other end of a pipe.
    let found = fs::metadata(path).map_err(unreadable)?;
    if !found.is_file() {
        return Err(Error::file(path, format_args!("is {}: expected a regular file", kind(&found))));
    }
    File::open(path).map_err(unreadable)
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

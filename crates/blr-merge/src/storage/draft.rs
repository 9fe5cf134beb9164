//! Replacing a file, or making a new folder, so that no reader ever finds half of it.

use super::regular::{self, kind};
use crate::{Error, Result};
use std::collections::hash_map::RandomState;
use std::ffi::OsStr;
use std::fmt::Display;
use std::fs::{self, File, OpenOptions, Permissions, TryLockError};
use std::hash::BuildHasher;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

/// Bytes of a file's name that the name of its draft begins with: file systems allow 143 to 255 in all.
const HEAD: usize = 64;
/// What tells our drafts from other hidden files, around the digits of a number that nobody can guess.
const MARK: &str = ".blr-";
const DIGITS: usize = 16;
const END: &str = ".tmp";
/// Links that are followed before they count as a circle, as in Linux.
const LINKS: usize = 40;

/// A new file, or a new folder, on its way to the place of an old one. It is written beside that, then flushed to the
/// disk and renamed. Whoever opens the path, even after a crash at any moment, finds the old file or the new one, and
/// either is whole.
///
/// Made before the work whose result it will hold, it says early what would not work late: a destination that is no
/// regular file, a folder where nothing can be written, a name that is too long. Dropped without [`Draft::commit`], it
/// is removed and nothing has changed.
///
/// A symbolic link stays, and what it points at is replaced or, if there is nothing, made. The new file has the
/// permissions of the old one. Other names (hard links) of the old file keep the old one.
///
/// A draft is locked as long as it lives. One that is not locked is that of a process that was killed, and the next
/// draft for the same path removes it.
#[derive(Debug)]
pub struct Draft {
    /// As it was given; for errors.
    given: PathBuf,
    /// Where its links end.
    target: PathBuf,
    folder: bool,
    path: PathBuf,
    /// Open, and locked.
    file: File,
    committed: bool,
}

impl Draft {
    /// Of a file, in place of a regular one or of none.
    ///
    /// # Errors
    /// [`Error::File`] if there is something else (a folder, device, pipe or socket), or no file can be made there.
    pub fn of_file(path: impl AsRef<Path>) -> Result<Self> {
        Self::new(path.as_ref(), false)
    }

    /// Of a folder, in place of an empty one or of none.
    ///
    /// # Errors
    /// [`Error::File`] if there is something else, or no folder can be made there.
    pub fn of_folder(path: impl AsRef<Path>) -> Result<Self> {
        Self::new(path.as_ref(), true)
    }

    fn new(path: &Path, folder: bool) -> Result<Self> {
        let error = |problem: &dyn Display| Error::file(path, format!("cannot be written: {problem}"));
        let target = followed(path).map_err(|e| error(&e))?;
        let name = target.file_name().ok_or_else(|| error(&"the path names no file"))?;
        let private = replaced(path, &target, folder)?.is_some();
        let head = head(name);
        let beside = beside(&target);
        sweep(beside, &head);
        let (draft, file) = begin(beside, &head, folder, private).map_err(|e| error(&e))?;
        Ok(Draft { given: path.to_owned(), target, folder, path: draft, file, committed: false })
    }

    /// Where it is written: the file itself, which [`Draft::output`] has open, or the folder that files are put into.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The new file, to be written to.
    pub fn output(&self) -> &File {
        &self.file
    }

    /// Puts it in its place. Files in a folder are the caller's to flush.
    ///
    /// # Errors
    /// [`Error::File`] if it cannot be flushed or renamed, or if there is now something that must not be replaced. The
    /// old file is then still there, and no draft.
    pub fn commit(mut self) -> Result<()> {
        // Again, for the work between may have taken hours.
        let permissions = replaced(&self.given, &self.target, self.folder)?;
        let rename = || -> io::Result<()> {
            permissions.map_or(Ok(()), |p| self.file.set_permissions(p))?;
            // Before the rename: otherwise a crash could leave the new name with the old file gone and the new one
            // empty.
            self.file.sync_all()?;
            fs::rename(&self.path, &self.target)
        };
        rename().map_err(|e| Error::file(&self.given, format_args!("cannot be written: {e}")))?;
        self.committed = true;
        // The rename itself is on the disk only once the folder is. But it is done: a folder that cannot be opened or
        // flushed must not make the new file look as if it were the old one.
        _ = File::open(beside(&self.target)).and_then(|folder| folder.sync_all());
        Ok(())
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        if !self.committed {
            // Still locked, so that nobody takes it for a stale one meanwhile.
            remove(&self.path, self.folder);
        }
    }
}

fn remove(draft: &Path, folder: bool) {
    // Nothing to be done if it fails: a later sweep tries again.
    _ = if folder { fs::remove_dir_all(draft) } else { fs::remove_file(draft) };
}

/// The folder that a file is in.
fn beside(target: &Path) -> &Path {
    target.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Where the links of a path end. There need not be anything.
fn followed(path: &Path) -> io::Result<PathBuf> {
    let mut path = path.to_owned();
    for _ in 0..LINKS {
        match fs::symlink_metadata(&path) {
            // Relative to the folder of the link; an absolute one replaces it.
            Ok(found) if found.is_symlink() => path = beside(&path).join(fs::read_link(&path)?),
            Err(e) if e.kind() != ErrorKind::NotFound => return Err(e),
            _ => return Ok(path),
        }
    }
    Err(io::Error::other("its symbolic links go in a circle"))
}

/// The permissions of what would be replaced, if there is anything.
fn replaced(path: &Path, target: &Path, folder: bool) -> Result<Option<Permissions>> {
    let old = match fs::symlink_metadata(target) {
        Ok(old) => old,
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(Error::file(path, format_args!("cannot be written: {e}"))),
    };
    let empty = || fs::read_dir(target).is_ok_and(|mut entries| entries.next().is_none());
    if folder && !(old.is_dir() && empty()) {
        return Err(Error::file(path, "is there already: shards go to a new or empty folder"));
    }
    if !folder && !old.is_file() {
        return Err(Error::file(
            path,
            format_args!("cannot be written: there is {}, and only a regular file is replaced", kind(&old)),
        ));
    }
    Ok(Some(plain(old.permissions())))
}

/// Who may read, write and run it; and not on whose behalf it runs, which is for the owner of the old file to say.
fn plain(mut permissions: Permissions) -> Permissions {
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        permissions.set_mode(permissions.mode() & 0o777);
    }
    permissions
}

/// What the names of a file's drafts begin with.
fn head(name: &OsStr) -> String {
    let name = name.to_string_lossy();
    let cut = (0..=HEAD.min(name.len())).rev().find(|end| name.is_char_boundary(*end));
    format!(".{}{MARK}", &name[..cut.unwrap_or(0)])
}

/// Removes the drafts that processes have left behind when they were killed.
fn sweep(beside: &Path, head: &str) {
    // A folder may be one that can be written and not read.
    let entries = fs::read_dir(beside).into_iter().flatten().flatten();
    for entry in entries {
        let name = entry.file_name();
        let digits = name.to_str().and_then(|name| name.strip_prefix(head)?.strip_suffix(END));
        let ours = digits.is_some_and(|d| d.len() == DIGITS && d.bytes().all(|b| b.is_ascii_hexdigit()));
        // Of the entry itself: somebody's link must not be followed, nor their pipe be waited for.
        let Some(kind) = entry.file_type().ok().filter(|kind| ours && (kind.is_file() || kind.is_dir())) else {
            continue;
        };
        let path = entry.path();
        // Locked while it is removed: see begin(). Without waiting, for it may have become a pipe since.
        if let Ok(file) = regular::opened(&path)
            && file.try_lock().is_ok()
        {
            remove(&path, kind.is_dir());
        }
    }
}

/// A new draft, locked.
fn begin(beside: &Path, head: &str, folder: bool, private: bool) -> io::Result<(PathBuf, File)> {
    loop {
        // Keys from the system's random numbers. A name that nobody can know beforehand, and that is opened only if it
        // is new, cannot be somebody's link to another file.
        let number = RandomState::new().hash_one(0);
        let draft = beside.join(format!("{head}{number:0DIGITS$x}{END}"));
        let made = if folder {
            create_dir(&draft, private).and_then(|()| File::open(&draft))
        } else {
            create(&draft, private)
        };
        let file = match made {
            Err(e) if e.kind() == ErrorKind::AlreadyExists => continue,
            made => made?,
        };
        let ours = match file.try_lock() {
            // Between making and locking, a sweep may have taken it for a stale one and removed it, or be about to.
            Ok(()) => fs::symlink_metadata(&draft).is_ok(),
            Err(TryLockError::WouldBlock) => false,
            // A file system without locks: nobody can lock it to sweep it either.
            Err(TryLockError::Error(_)) => true,
        };
        if ours {
            return Ok((draft, file));
        }
    }
}

/// A new folder, as private as [`create`] makes files.
fn create_dir(draft: &Path, private: bool) -> io::Result<()> {
    let mut builder = fs::DirBuilder::new();
    #[cfg(unix)]
    if private {
        std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    }
    #[cfg(not(unix))]
    let _ = (&mut builder, private);
    builder.create(draft)
}

/// A new file, and never one that is there. If there is an old one, it may have been private, and what replaces it must
/// at no moment be readable by others.
fn create(draft: &Path, private: bool) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.write(true).create_new(true);
    #[cfg(unix)]
    if private {
        std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    }
    #[cfg(not(unix))]
    let _ = private;
    options.open(draft)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn names(folder: &Path) -> Vec<String> {
        let mut names: Vec<String> =
            fs::read_dir(folder).unwrap().map(|f| f.unwrap().file_name().to_string_lossy().into_owned()).collect();
        names.sort();
        names
    }

    fn put(path: &Path, text: &str) -> Result<()> {
        let draft = Draft::of_file(path)?;
        draft.output().write_all(text.as_bytes()).unwrap();
        draft.commit()
    }

    /// Live ones of this process stay, whoever else saves; those without a lock go, be they files or folders.
    #[test]
    fn only_drafts_of_nobody_are_swept() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x");
        let live = Draft::of_file(&path).unwrap();
        let number = "0123456789abcdef";
        for stale in [".x.blr-0123456789abcdef.tmp".to_owned(), format!(".x.blr-{}.tmp", number.replace('0', "f"))] {
            fs::write(folder.path().join(stale), "half").unwrap();
        }
        let stale = folder.path().join(".x.blr-00000000000000ff.tmp");
        fs::create_dir(&stale).unwrap();
        fs::write(stale.join("shard"), "half").unwrap();
        // Not ours, though like it.
        let others = [".x.blr-0123.tmp", ".x.tmp", ".y.blr-0123456789abcdef.tmp", "x.blr-0123456789abcdef.tmp"];
        for other in others {
            fs::write(folder.path().join(other), "mine").unwrap();
        }
        put(&path, "first").unwrap();
        let draft = live.path().file_name().unwrap().to_string_lossy().into_owned();
        let mut expected: Vec<String> = others.map(str::to_owned).into();
        expected.extend([draft, "x".to_owned()]);
        expected.sort();
        assert_eq!(names(folder.path()), expected);
        live.output().write_all(b"second").unwrap();
        live.commit().unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"second");
    }

    /// Many at once, of which each sweeps: none takes another's draft away.
    #[test]
    fn threads_that_save_one_file_do_not_disturb_each_other() {
        let folder = tempfile::tempdir().unwrap();
        let path = &folder.path().join("x");
        std::thread::scope(|s| {
            for thread in 0..4 {
                s.spawn(move || {
                    for round in 0..50 {
                        put(path, &format!("{thread} {round}")).unwrap();
                    }
                });
            }
        });
        assert_eq!(names(folder.path()), ["x"]);
    }

    #[test]
    fn names_as_long_as_the_file_system_has_them() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["n".repeat(255), "é".repeat(127), format!("{}é", "n".repeat(63)), "🦀".repeat(63)] {
            put(&folder.path().join(&name), "new").unwrap();
            assert_eq!(names(folder.path()), [name.as_str()]);
            fs::remove_file(folder.path().join(&name)).unwrap();
        }
        let e = Draft::of_file(folder.path().join("n".repeat(256))).unwrap_err().to_string();
        assert!(e.contains("cannot be written"), "{e}");
        assert!(names(folder.path()).is_empty());
    }

    #[test]
    fn paths_that_name_no_file() {
        let folder = tempfile::tempdir().unwrap();
        let inside = |name: &str| folder.path().join(name).to_string_lossy().into_owned();
        fs::create_dir(inside("folder")).unwrap();
        for path in ["", "/", ".", "..", &inside("folder"), &inside("folder/."), &inside("none/x"), &inside("a\0b")] {
            let e = Draft::of_file(path).unwrap_err();
            assert!(matches!(e, Error::File { .. }), "{path:?}: {e}");
        }
        assert_eq!(names(folder.path()), ["folder"]);
    }
}

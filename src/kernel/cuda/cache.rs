//! Compiled kernels on disk, so that a program compiles each only the first time that it runs.
//!
//! A kernel's file is named by a hash of all that its code depends on, and is never changed. It says the hash of its
//! contents itself: the driver trusts what it is given to load, so a file that was cut short must not reach it. Nothing
//! here is an error: without a folder that can be written, kernels are compiled again.

use blr_merge::storage::Draft;
use std::ffi::OsString;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

/// What a file begins with; the hash of the image follows, then the image.
const MAGIC: &[u8; 16] = b"tch-blr kernel 1";
const HEAD: usize = MAGIC.len() + 16;

/// The folder, if there can be one.
#[derive(Debug, Clone)]
pub(super) struct Cache(Option<PathBuf>);

/// The name of a kernel's file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Key(String);

impl Key {
    /// Of all that the code depends on, in this order. Each part is counted with its length, so that no text can move
    /// from one to the next unnoticed.
    pub(super) fn new(parts: &[&str]) -> Key {
        let lengths = parts.iter().map(|part| part.len() as u64);
        let bytes = parts.iter().zip(lengths).flat_map(|(part, n)| n.to_le_bytes().into_iter().chain(part.bytes()));
        Key(format!("{:032x}", hash(bytes)))
    }
}

/// FNV-1a of 128 bits: the same in all programs, and nobody but the user writes what is hashed.
fn hash(bytes: impl IntoIterator<Item = u8>) -> u128 {
    const OFFSET: u128 = 0x6c62_272e_07bb_0142_62b8_2175_6295_c58d;
    const PRIME: u128 = 0x0000_0000_0100_0000_0000_0000_0000_013b;
    bytes.into_iter().fold(OFFSET, |h, byte| (h ^ u128::from(byte)).wrapping_mul(PRIME))
}

impl Cache {
    /// The user's: `kernels` in `TCH_BLR_CACHE`, or else in `tch-blr` in `XDG_CACHE_HOME`, or else in `~/.cache`.
    pub(super) fn of_user() -> Cache {
        Cache(folder(|name| std::env::var_os(name)))
    }

    /// The image that was put there, as it was.
    pub(super) fn get(&self, key: &Key) -> Option<Vec<u8>> {
        let mut bytes = fs::read(self.0.as_ref()?.join(&key.0)).ok()?;
        let head = bytes.get(..HEAD)?;
        let whole = head.starts_with(MAGIC) && head.ends_with(&hash(bytes[HEAD..].iter().copied()).to_le_bytes());
        (whole && bytes.len() > HEAD).then(|| bytes.split_off(HEAD))
    }

    /// Keeps an image, if it can be kept.
    pub(super) fn put(&self, key: &Key, image: &[u8]) {
        let write = |folder: &Path| -> Option<()> {
            fs::create_dir_all(folder).ok()?;
            let draft = Draft::of_file(folder.join(&key.0)).ok()?;
            let mut file = draft.output();
            let hash = hash(image.iter().copied()).to_le_bytes();
            [MAGIC, &hash, image].into_iter().try_for_each(|part| file.write_all(part)).ok()?;
            draft.commit().ok()
        };
        _ = self.0.as_deref().and_then(write);
    }
}

/// Where kernels are kept, of the environment's variables. A path that is not absolute would mean another folder in every
/// folder that the program is started in: it counts as none.
fn folder(variable: impl Fn(&str) -> Option<OsString>) -> Option<PathBuf> {
    let path = |name: &str| variable(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    path("TCH_BLR_CACHE")
        .or_else(|| path("XDG_CACHE_HOME").map(|p| p.join("tch-blr")))
        .or_else(|| path("HOME").map(|p| p.join(".cache/tch-blr")))
        .filter(|p| p.is_absolute())
        .map(|p| p.join("kernels"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cache() -> (tempfile::TempDir, Cache, Key) {
        let folder = tempfile::tempdir().expect("a folder");
        let cache = Cache(Some(folder.path().join("not/yet")));
        (folder, cache, Key::new(&["source", "sm_90"]))
    }

    fn file(cache: &Cache, key: &Key) -> PathBuf {
        cache.0.as_ref().expect("a folder").join(&key.0)
    }

    #[test]
    fn an_image_comes_back_as_it_was() {
        let (_folder, cache, key) = cache();
        assert_eq!(cache.get(&key), None);
        for image in [&[0, 255, 7][..], &vec![1; 100_000], b"\0"] {
            cache.put(&key, image);
            assert_eq!(cache.get(&key).as_deref(), Some(image));
        }
        assert_eq!(cache.get(&Key::new(&["source", "sm_80"])), None);
        assert_eq!(fs::read_dir(file(&cache, &key).parent().unwrap()).unwrap().count(), 1, "drafts are left");
    }

    #[test]
    fn a_file_that_is_not_whole_is_none() {
        let (_folder, cache, key) = cache();
        cache.put(&key, b"a kernel");
        let (path, whole) = (file(&cache, &key), fs::read(file(&cache, &key)).unwrap());
        for n in 0..whole.len() {
            fs::write(&path, &whole[..n]).unwrap();
            assert_eq!(cache.get(&key), None, "the first {n} bytes");
            let mut broken = whole.clone();
            broken[n] ^= 1;
            fs::write(&path, &broken).unwrap();
            assert_eq!(cache.get(&key), None, "byte {n}");
        }
        fs::write(&path, [&whole[..], b"more"].concat()).unwrap();
        assert_eq!(cache.get(&key), None);
        // What was broken is replaced.
        cache.put(&key, b"a kernel");
        assert_eq!(cache.get(&key).as_deref(), Some(&b"a kernel"[..]));
    }

    #[test]
    fn nowhere_to_write_is_no_error() {
        let (folder, _, key) = cache();
        fs::write(folder.path().join("file"), "").unwrap();
        for cache in [Cache(None), Cache(Some(folder.path().join("file"))), Cache(Some("/proc/nonexistent".into()))] {
            cache.put(&key, b"a kernel");
            assert_eq!(cache.get(&key), None);
        }
        // A folder where the file would be.
        let cache = Cache(Some(folder.path().to_owned()));
        fs::create_dir(file(&cache, &key)).unwrap();
        cache.put(&key, b"a kernel");
        assert_eq!(cache.get(&key), None);
    }

    #[test]
    fn the_key_is_of_every_part_and_of_its_place() {
        // Published vectors: of no bytes and of "foobar".
        assert_eq!(hash([]), 0x6c62_272e_07bb_0142_62b8_2175_6295_c58d);
        assert_eq!(hash(*b"foobar"), 0x343e_1662_793c_64bf_6f0d_3597_ba44_6f18);
        let keys = [&["ab", "c"][..], &["a", "bc"], &["abc"], &["abc", ""], &["c", "ab"], &["ab", "d"]].map(Key::new);
        for (i, key) in keys.iter().enumerate() {
            assert!(!keys[..i].contains(key), "{i}");
            assert!(key.0.len() == 32 && key.0.bytes().all(|b| b.is_ascii_hexdigit()));
        }
    }

    #[test]
    fn the_users_folder() {
        let of = |set: &'static [(&str, &str)]| {
            folder(move |name| set.iter().find(|(n, _)| *n == name).map(|(_, value)| OsString::from(value)))
        };
        let is = |path: &str| Some(PathBuf::from(path));
        let all = [("TCH_BLR_CACHE", "/c"), ("XDG_CACHE_HOME", "/x"), ("HOME", "/h")];
        assert_eq!(folder(|n| all.iter().find(|(k, _)| *k == n).map(|(_, v)| v.into())), is("/c/kernels"));
        assert_eq!(of(&[("XDG_CACHE_HOME", "/x"), ("HOME", "/h")]), is("/x/tch-blr/kernels"));
        assert_eq!(of(&[("TCH_BLR_CACHE", ""), ("HOME", "/h")]), is("/h/.cache/tch-blr/kernels"));
        assert_eq!(of(&[("TCH_BLR_CACHE", "here"), ("HOME", "/h")]), None);
        assert_eq!(of(&[]), None);
    }
}

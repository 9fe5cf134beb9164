//! Where the data sets are, and what a test does without one.

use crate::places::{skipped, this_test};
use std::env;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};

/// What a test that needs a data set does.
#[derive(Debug, PartialEq)]
enum Verdict {
    Run(PathBuf),
    Skip,
    Fail,
}

/// `root` is the value of `TCH_BLR_DATA`, `ci` that of `CI`; empty is as good as unset. Whoever runs the tests by hand may
/// have some of the data sets; a CI that is told where they are and lacks one has lost a test without a word.
fn decide(root: Option<&OsStr>, ci: Option<&OsStr>, exists: impl FnOnce(&Path) -> bool) -> Verdict {
    let set = |x: Option<&OsStr>| x.is_some_and(|x| !x.is_empty());
    match root {
        Some(root) if set(Some(root)) && exists(Path::new(root)) => Verdict::Run(root.into()),
        _ if set(root) && set(ci) => Verdict::Fail,
        _ => Verdict::Skip,
    }
}

/// The folder of all data sets, `TCH_BLR_DATA`, if it has the folder `name`. Otherwise the test says what it leaves out
/// and why, or fails, as [`decide`] has it.
#[track_caller]
fn data_or(name: &str, left_out: &str, why: &str) -> Option<PathBuf> {
    let [root, ci] = ["TCH_BLR_DATA", "CI"].map(env::var_os);
    match decide(root.as_deref(), ci.as_deref(), |root| root.join(name).is_dir()) {
        Verdict::Run(root) => Some(root),
        Verdict::Skip => {
            skipped(left_out, why);
            None
        }
        Verdict::Fail => {
            panic!("no folder {name} in TCH_BLR_DATA={}, and CI is set", root.unwrap_or_default().display())
        }
    }
}

/// The folder of all data sets if it has the folder `name`; otherwise the test is left out and says so, or fails where
/// `CI` is set and `TCH_BLR_DATA` is too.
#[track_caller]
pub fn data(name: &str) -> Option<PathBuf> {
    data_or(name, &this_test(), &format!("which needs $TCH_BLR_DATA/{name}"))
}

/// [`data`] for a test that has something to do without: it takes data that it draws itself.
#[track_caller]
pub fn data_or_drawn(name: &str) -> Option<PathBuf> {
    data_or(name, &format!("{} with $TCH_BLR_DATA/{name}", this_test()), "it draws its data instead")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_data_set_that_ci_should_have_is_not_skipped() {
        let with = |root: Option<&'static str>, ci: Option<&'static str>, exists: bool| {
            decide(root.map(OsStr::new), ci.map(OsStr::new), |_| exists)
        };
        for ci in [None, Some(""), Some("true")] {
            assert_eq!(with(Some("/data"), ci, true), Verdict::Run("/data".into()), "{ci:?}");
            assert_eq!(with(None, ci, true), Verdict::Skip, "{ci:?}");
            assert_eq!(with(Some(""), ci, true), Verdict::Skip, "{ci:?}: empty is not the working folder");
        }
        assert_eq!(with(Some("/data"), None, false), Verdict::Skip);
        assert_eq!(with(Some("/data"), Some(""), false), Verdict::Skip);
        assert_eq!(with(Some("/data"), Some("true"), false), Verdict::Fail);
    }
}

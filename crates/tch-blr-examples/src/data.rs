//! Where data sets are: in the folder that the environment variable `TCH_BLR_DATA` names.

use crate::Outcome;
use std::fs;
use std::path::{Path, PathBuf};

/// `$TCH_BLR_DATA`, if it is set.
pub fn folder() -> Option<PathBuf> {
    std::env::var_os("TCH_BLR_DATA").map(PathBuf::from)
}

/// `$TCH_BLR_DATA`, for an example that cannot do without its folder `set`.
///
/// # Errors
/// If the variable is not set, or has no such folder.
pub fn folder_with(set: &str) -> Outcome<PathBuf> {
    let found = folder().filter(|data| data.join(set).is_dir());
    found.ok_or_else(|| format!("set TCH_BLR_DATA to the folder that has {set}/").into())
}

/// A file of numbers, separated by white space.
///
/// # Errors
/// One line that names the file.
pub fn numbers(file: &Path) -> Outcome<Vec<f64>> {
    let text = fs::read_to_string(file).map_err(|e| format!("{}: {e}", file.display()))?;
    let numbers = text.split_ascii_whitespace().map(str::parse).collect::<Result<_, _>>();
    Ok(numbers.map_err(|e| format!("{}: {e}", file.display()))?)
}

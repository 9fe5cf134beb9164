//! Where an example writes: its folder, and the report with every number.

use crate::Outcome;
use serde_json::Value;
use std::fs;
use std::path::Path;

/// Creates the folder, and those above it.
///
/// # Errors
/// One line that names the folder.
pub fn create(folder: &Path) -> Outcome {
    Ok(fs::create_dir_all(folder).map_err(|e| format!("cannot create {}: {e}", folder.display()))?)
}

/// Writes `report.json` into the folder.
///
/// # Errors
/// One line that names the file.
pub fn report(folder: &Path, report: &Value) -> Outcome {
    write(&folder.join("report.json"), &(serde_json::to_string_pretty(report)? + "\n"))
}

/// Writes a file.
///
/// # Errors
/// One line that names the file.
pub fn write(path: &Path, text: &str) -> Outcome {
    Ok(fs::write(path, text).map_err(|e| format!("cannot write {}: {e}", path.display()))?)
}

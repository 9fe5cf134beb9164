//! Scores that a command of the user gives to models.

use crate::{Error, Result};
use std::path::Path;
use std::process::{Command, Stdio};

/// Runs a command with the path of a model as its last argument, and takes the one number that it prints on standard
/// output. The command is a line for the shell (`sh -c`, on Windows `cmd /C`), and reads nothing from standard input.
///
/// # Errors
/// [`Error::Evaluation`] if it cannot be run, fails (with what it wrote on standard error), or prints anything but one
/// finite number.
pub fn evaluate(command: &str, model: impl AsRef<Path>) -> Result<f64> {
    let model = model.as_ref();
    let error = |problem: String| Error::Evaluation { command: command.to_owned(), problem };
    let mut shell = if cfg!(windows) {
        let mut shell = Command::new("cmd");
        shell.arg("/C").arg(command).arg(model);
        shell
    } else {
        let mut shell = Command::new("sh");
        shell.arg("-c").arg(format!("{command} \"$1\"")).arg("sh").arg(model);
        shell
    };
    let done = shell.stdin(Stdio::null()).output().map_err(|e| error(format!("cannot be run: {e}")))?;
    if !done.status.success() {
        let said = end(&done.stderr);
        let said = if said.is_empty() { "it wrote nothing on stderr".to_owned() } else { said };
        return Err(error(format!("failed ({}): {said}", done.status)));
    }
    let printed = String::from_utf8_lossy(&done.stdout);
    match printed.trim().parse() {
        Ok(score) if f64::is_finite(score) => Ok(score),
        _ => Err(error(format!("printed `{}`: expected one finite number", end(&done.stdout)))),
    }
}

/// The end of a text, where programs say what went wrong.
fn end(text: &[u8]) -> String {
    const MOST: usize = 1000;
    let text = String::from_utf8_lossy(text);
    let text = text.trim();
    let cut = text.char_indices().map(|(i, _)| i).find(|i| text.len() - i <= MOST).unwrap_or(0);
    text[cut..].to_owned()
}

//! The command `blr-merge`: merges, compares and looks into weights in safetensors files.
//!
//! Exit codes: 0 if all is well, 1 if `diff` finds a difference, 2 with one line on stderr if something went wrong.

mod look;
mod merge;
mod options;
mod output;
mod request;
mod settings;
mod soup;
mod sweep;

use clap::{CommandFactory, Parser, Subcommand};
use clap_complete::Shell;
use merge::{Merge, Remove};
use soup::Soup;
use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use sweep::Sweep;

/// Merge, compare and look into weights in safetensors files.
///
/// A model is a safetensors file, an index of shards (model.safetensors.index.json) or a folder with either. Files are
/// streamed and may be larger than memory. Results are written under another name first and then renamed, so that an
/// error or a crash leaves an old file as it was.
#[derive(Parser)]
#[command(name = "blr-merge", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Merge models of one architecture into one.
    Merge(Box<Merge>),
    /// Merge by every weighting on a grid, and score the merges by a command.
    Sweep(Box<Sweep>),
    /// Average those models that make the average better by a command's score (greedy soup).
    Soup(Box<Soup>),
    /// Take one posterior's information out of another.
    Remove(Remove),
    /// List the tensors of a model.
    Inspect {
        /// The model.
        model: PathBuf,
    },
    /// List the tensors in which two models differ; exits with 0 if there are none and with 1 otherwise.
    Diff {
        /// One model.
        a: PathBuf,
        /// The other.
        b: PathBuf,
    },
    /// Print the completions of a shell.
    ///
    /// For example: blr-merge completions bash > ~/.local/share/bash-completion/completions/blr-merge
    Completions {
        /// The shell.
        shell: Shell,
    },
}

/// What a subcommand returns. Errors are printed, so all that matters of them is their text.
type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

fn main() -> ExitCode {
    let done = match Cli::parse().command {
        Command::Merge(merge) => merge.run().map(|()| false),
        Command::Sweep(sweep) => sweep.run().map(|()| false),
        Command::Soup(soup) => soup.run().map(|()| false),
        Command::Remove(remove) => remove.run().map(|()| false),
        Command::Inspect { model } => look::inspect(&model).map(|()| false),
        Command::Diff { a, b } => look::diff(&a, &b),
        Command::Completions { shell } => {
            let mut text = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "blr-merge", &mut text);
            output::write(&String::from_utf8_lossy(&text)).map(|()| false)
        }
    };
    match done {
        Ok(different) => ExitCode::from(u8::from(different)),
        Err(e) => {
            // Not eprintln!, which panics where stderr is closed.
            _ = writeln!(io::stderr(), "error: {}", output::visible(&e.to_string()));
            ExitCode::from(2)
        }
    }
}

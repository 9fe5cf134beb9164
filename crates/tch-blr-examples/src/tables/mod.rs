//! Tables of published or independent numbers beside ours: what a table is, where its runs are kept, how it is written.
//!
//! The tables below have exact answers and are tests as well. Those that train networks for hours stay with
//! `examples/reproduce`, which makes all of them.

pub mod d1;
pub mod d2;
pub mod d4;
pub mod d5;
pub mod d6;
pub mod previews;

use crate::Outcome;
use serde_json::{Value, json};
use std::fmt::Write as _;
use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};

/// A table to make, with the options of the command line.
#[derive(Debug)]
pub struct Job {
    name: &'static str,
    seeds: Option<u64>,
    epochs: Option<u64>,
    folder: PathBuf,
}

impl Job {
    /// The table of this name, with the options that were given.
    ///
    /// # Errors
    /// If `target/reproduce` cannot be created.
    pub fn new(name: &'static str, seeds: Option<u64>, epochs: Option<u64>) -> Outcome<Job> {
        let folder = PathBuf::from("target/reproduce");
        fs::create_dir_all(folder.join("runs"))?;
        Ok(Job { name, seeds, epochs, folder })
    }

    /// `--seeds`, or what the table takes by itself.
    pub fn seeds(&self, default: u64) -> u64 {
        self.seeds.unwrap_or(default)
    }

    /// `--epochs`, or what the table takes by itself.
    pub fn epochs(&self, default: u64) -> u64 {
        self.epochs.unwrap_or(default)
    }

    /// The command that makes this table.
    pub fn command(&self) -> String {
        let option = |name: &str, value: Option<u64>| value.map(|n| format!(" --{name} {n}")).unwrap_or_default();
        let (seeds, epochs) = (option("seeds", self.seeds), option("epochs", self.epochs));
        format!("cargo run --release --example reproduce -- {}{seeds}{epochs}", self.name)
    }

    /// The result of a run: from its file if it was run before. The key names all that it depends on.
    pub fn once(&self, key: &str, run: impl FnOnce() -> Outcome<Value>) -> Outcome<Value> {
        let tame = key.replace(|c: char| !c.is_ascii_alphanumeric() && c != '-' && c != '.', "_");
        let path = self.folder.join(format!("runs/{}-{tame}.json", self.name));
        if let Ok(text) = fs::read_to_string(&path) {
            return Ok(serde_json::from_str(&text)?);
        }
        let value = run()?;
        replace(&path, &value.to_string())?;
        Ok(value)
    }

    /// Writes the figures, and the section's part of the page of results.
    pub fn write(&self, section: &Section) -> Outcome<()> {
        let command = self.command();
        let figures: Vec<Value> = section
            .figures
            .iter()
            .map(|f| {
                json!({
                    "table": self.name, "row": f.row, "published": f.published, "ours": f.ours, "sd": f.sd,
                    "seeds": f.seeds, "seconds": f.seconds, "command": command,
                })
            })
            .collect();
        let json = self.folder.join(format!("{}.json", self.name));
        replace(&json, &(serde_json::to_string_pretty(&figures)? + "\n"))?;

        let path = Path::new("docs/results.md");
        let page = fs::read_to_string(path).unwrap_or_default();
        let page = if page.contains("<!-- begin ") { page } else { HEAD.to_owned() };
        let (begin, end) = (format!("<!-- begin {} -->\n", self.name), format!("<!-- end {} -->\n", self.name));
        let part = format!("{begin}{}\nCommand: `{command}`\n{end}", section.markdown());
        let page = match (page.find(&begin), page.find(&end)) {
            (Some(from), Some(to)) => format!("{}{part}{}", &page[..from], &page[to + end.len()..]),
            _ => format!("{page}\n{part}"),
        };
        replace(path, &page)
    }
}

const HEAD: &str = "# Results\n\nWritten by `make reproduce`; the command of each table stands below it.\n";

/// Writes a file by way of a temporary one, so that it is never half there.
fn replace(path: &Path, text: &str) -> Outcome<()> {
    let draft = path.with_extension("tmp");
    let mut file = fs::File::create(&draft)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    fs::rename(&draft, path)?;
    Ok(())
}

/// A number beside the published one.
#[derive(Debug)]
pub struct Figure {
    /// What it is.
    pub row: String,
    /// If there is one.
    pub published: Option<f64>,
    /// Mean over the seeds.
    pub ours: f64,
    /// Standard deviation (n - 1) over the seeds.
    pub sd: Option<f64>,
    /// Number of runs.
    pub seeds: u64,
    /// Mean time of a run.
    pub seconds: Option<f64>,
}

/// A rendered table and its figures.
#[derive(Debug)]
pub struct Section {
    /// Heading.
    pub title: String,
    /// What was done, and what to see in it.
    pub text: String,
    /// Of the columns.
    pub header: Vec<String>,
    /// Cells of each row.
    pub rows: Vec<Vec<String>>,
    /// The same as numbers.
    pub figures: Vec<Figure>,
}

impl Section {
    /// A heading, the text and the table.
    pub fn markdown(&self) -> String {
        let mut page = format!("## {}\n\n{}\n\n", self.title, self.text);
        let mut line = |cells: &[String]| writeln!(page, "| {} |", cells.join(" | ")).expect("memory");
        line(&self.header);
        line(&vec!["---".to_owned(); self.header.len()]);
        self.rows.iter().for_each(|row| line(row));
        page
    }
}

/// Mean and standard deviation (n - 1; none for one value).
pub fn mean_and_sd(values: &[f64]) -> (f64, Option<f64>) {
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    let squares = values.iter().map(|v| (v - mean).powi(2)).sum::<f64>();
    (mean, (values.len() > 1).then(|| (squares / (n - 1.0)).sqrt()))
}

/// `98.14 ± 0.08`, or the mean alone.
pub fn plus_minus((mean, sd): (f64, Option<f64>), digits: usize) -> String {
    sd.map_or_else(|| format!("{mean:.digits$}"), |sd| format!("{mean:.digits$} ± {sd:.digits$}"))
}

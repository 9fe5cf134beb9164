//! What a table is, where its runs are kept, and how it is written.

use serde_json::{Value, json};
use std::error::Error;
use std::fmt::Write as _;
use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};

pub type Outcome<T> = Result<T, Box<dyn Error>>;

/// A table to make, with the options of the command line.
pub struct Job {
    name: &'static str,
    seeds: Option<u64>,
    epochs: Option<u64>,
    folder: PathBuf,
}

impl Job {
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
pub struct Figure {
    pub row: String,
    pub published: Option<f64>,
    pub ours: f64,
    /// Standard deviation (n - 1) over the seeds.
    pub sd: Option<f64>,
    pub seeds: u64,
    /// Mean time of a run.
    pub seconds: Option<f64>,
}

/// A rendered table and its figures.
pub struct Section {
    pub title: String,
    /// What was done, and what to see in it.
    pub text: String,
    pub header: Vec<String>,
    pub rows: Vec<Vec<String>>,
    pub figures: Vec<Figure>,
}

impl Section {
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

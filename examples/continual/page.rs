//! What was drawn and measured, as one page and as one file of numbers.

use serde_json::{Map, Value};
use std::fmt::Write as _;
use std::path::Path;
use tch_blr_examples::{Outcome, output};

#[derive(Default)]
pub struct Page {
    html: String,
    numbers: Map<String, Value>,
}

impl Page {
    pub fn heading(&mut self, text: &str) {
        writeln!(self.html, "<h2>{text}</h2>").expect("memory");
    }

    pub fn text(&mut self, text: &str) {
        writeln!(self.html, "<p>{text}</p>").expect("memory");
    }

    pub fn picture(&mut self, file: &str, caption: &str) {
        writeln!(
            self.html,
            "<figure><img src=\"{file}\" alt=\"{caption}\"><figcaption>{caption}</figcaption></figure>"
        )
        .expect("memory");
    }

    /// A table, printed as well.
    pub fn table(&mut self, header: &[&str], rows: &[Vec<String>]) {
        let line = |tag: &str, cells: &mut dyn Iterator<Item = &str>| {
            cells.fold("<tr>".to_owned(), |line, cell| line + &format!("<{tag}>{cell}</{tag}>")) + "</tr>\n"
        };
        self.html += "<table>\n";
        self.html += &line("th", &mut header.iter().copied());
        for row in rows {
            self.html += &line("td", &mut row.iter().map(String::as_str));
        }
        self.html += "</table>\n";
        let widths: Vec<usize> = (0..header.len())
            .map(|i| rows.iter().map(|r| r[i].chars().count()).chain([header[i].chars().count()]).max().unwrap_or(0))
            .collect();
        let print = |cells: &mut dyn Iterator<Item = &str>| {
            let padded: Vec<String> = cells.zip(&widths).map(|(c, w)| format!("{c:<w$}")).collect();
            println!("  {}", padded.join("  "));
        };
        println!();
        print(&mut header.iter().copied());
        for row in rows {
            print(&mut row.iter().map(String::as_str));
        }
    }

    pub fn number(&mut self, name: &str, value: Value) {
        self.numbers.insert(name.to_owned(), value);
    }

    pub fn write(mut self, folder: &Path, seconds: f64) -> Outcome<()> {
        self.numbers.insert("seconds".to_owned(), seconds.into());
        let html = format!(
            "<!doctype html>\n<meta charset=\"utf-8\">\n<title>Continual learning</title>\n<style>body {{ font-family: \
             sans-serif; max-width: 1100px; margin: 2em auto; color: #222 }} img {{ max-width: 100% }} figure {{ \
             margin: 1em 0 }} figcaption {{ color: #555 }} td, th {{ padding: 0.2em 0.8em; text-align: left \
             }}</style>\n<h1>Continual learning</h1>\n{}",
            self.html
        );
        output::write(&folder.join("index.html"), &html)?;
        output::report(folder, &Value::Object(self.numbers))
    }
}

//! What a row of the table is, how it is checked, and how it is shown.

use serde::Serialize;

pub use tch_blr_examples::Outcome;

/// A part of the table, as in the published one.
pub struct Section {
    pub title: &'static str,
    pub rows: &'static [Row],
}

/// An algorithm, the choices that make it out of the rule, and a tiny problem with a known answer.
pub struct Row {
    pub name: &'static str,
    /// The family of q.
    pub posterior: &'static str,
    /// What is approximated in the natural gradient.
    pub approximation: &'static str,
    /// On what it is run, and for which numbers.
    pub problem: &'static str,
    /// Runs it.
    pub answer: fn() -> Outcome<Answer>,
}

impl Row {
    /// One entry of a section: name, posterior, approximation, problem and its answer.
    pub const fn new(texts: [&'static str; 4], answer: fn() -> Outcome<Answer>) -> Self {
        let [name, posterior, approximation, problem] = texts;
        Row { name, posterior, approximation, problem, answer }
    }
}

/// Numbers that should be equal. The exact ones never come from the code that computed ours: they are closed forms,
/// recurrences written out in plain numbers, or reference values in f64 from when the crate was designed.
pub struct Answer {
    pub exact: Vec<f64>,
    pub ours: Vec<f64>,
    /// Largest error |ours - exact| / max(1, |exact|) of a row that passes.
    pub tolerance: f64,
}

/// A row after its check: what `--json` writes.
#[derive(Debug, Serialize)]
pub struct Checked {
    pub section: &'static str,
    pub name: &'static str,
    pub posterior: &'static str,
    pub approximation: &'static str,
    pub problem: &'static str,
    /// How many numbers were compared.
    pub compared: usize,
    /// Of these, the exact one where the error is largest.
    pub exact: f64,
    /// Ours in that place.
    pub ours: f64,
    /// |ours - exact| / max(1, |exact|)
    pub error: f64,
    pub tolerance: f64,
    pub passed: bool,
    /// Why there are no numbers, if there are none.
    pub failure: Option<String>,
}

/// Runs one row. It passes if there are as many numbers as expected and all are within the tolerance; NaN never is.
pub fn check(section: &'static str, row: &Row) -> Checked {
    let Row { name, posterior, approximation, problem, answer } = *row;
    let (exact, ours, error) = (f64::NAN, f64::NAN, f64::NAN);
    let nothing = Checked {
        section,
        name,
        posterior,
        approximation,
        problem,
        compared: 0,
        exact,
        ours,
        error,
        tolerance: 0.0,
        passed: false,
        failure: None,
    };
    let Answer { exact, ours, tolerance } = match answer() {
        Ok(answer) => answer,
        Err(e) => return Checked { failure: Some(e.to_string()), ..nothing },
    };
    if exact.len() != ours.len() || exact.is_empty() {
        let failure = format!("{} numbers: expected {}, at least one", ours.len(), exact.len());
        return Checked { failure: Some(failure), ..nothing };
    }
    let error = |i: usize| (ours[i] - exact[i]).abs() / exact[i].abs().max(1.0);
    // Positive NaN is above all numbers in this order; the first of equals is shown.
    let worst = (0..exact.len()).rev().max_by(|&i, &j| error(i).abs().total_cmp(&error(j).abs())).unwrap_or(0);
    Checked {
        compared: exact.len(),
        exact: exact[worst],
        ours: ours[worst],
        error: error(worst),
        tolerance,
        passed: error(worst) <= tolerance,
        ..nothing
    }
}

/// The table as text, a line per row.
pub fn text(rows: &[Checked]) -> String {
    let heads = ["Learning algorithm", "Posterior approx.", "Natural-gradient approx.", "Problem"];
    let cells: Vec<[&str; 4]> = rows.iter().map(|r| [r.name, r.posterior, r.approximation, r.problem]).collect();
    let widths: [usize; 4] = std::array::from_fn(|c| {
        cells.iter().chain([&heads]).map(|row| row[c].chars().count()).max().unwrap_or_default()
    });
    let left = |cells: &[&str; 4]| {
        let padded = cells.iter().zip(widths).map(|(cell, width)| format!("{cell:<width$}  "));
        padded.collect::<String>()
    };
    let head = format!("{}{:>14} {:>15} {:>8}", left(&heads), "Exact", "Ours", "Error");
    let rule = "─".repeat(head.chars().count());
    let mut lines = vec![head, rule.clone()];
    let mut section = "";
    for (row, cells) in rows.iter().zip(&cells) {
        if row.section != section {
            section = row.section;
            lines.push(section.to_owned());
        }
        let numbers = match &row.failure {
            Some(failure) => format!("FAILED: {failure}"),
            None => format!(
                "{:>14.9} {:>15.9} {:>8.0e}{}",
                row.exact,
                row.ours,
                row.error,
                if row.passed { "" } else { "  FAILED" }
            ),
        };
        lines.push(left(cells) + &numbers);
    }
    lines.push(rule);
    lines.join("\n")
}

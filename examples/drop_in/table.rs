//! Runs, and the table of them.

use super::optimizer::Job;
use super::program::Program;
use super::scores::{Better, Measure, Scores};
use serde::Serialize;
use std::fmt::{self, Write as _};
use tch_blr_examples::Outcome;

/// What came of a job.
#[derive(Debug, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Ending {
    Scored(Scores),
    /// The error that ended the training, in its words.
    Failed(String),
    /// Why this optimizer cannot train this program.
    Impossible(&'static str),
}

/// A program trained by an optimizer from a seed.
#[derive(Debug, Serialize)]
pub(crate) struct Run {
    pub(crate) program: &'static str,
    pub(crate) optimizer: String,
    pub(crate) seed: u64,
    pub(crate) lr_scale: f64,
    pub(crate) ending: Ending,
}

impl Run {
    pub(crate) fn of(name: &'static str, program: &dyn Program, job: &Job) -> Self {
        let without = program.plan().without_vogn.filter(|_| job.optimizer.starts_with("vogn"));
        let ending = match without {
            Some(why) => Ending::Impossible(why),
            None => program.run(job).and_then(finite).map_or_else(|e| Ending::Failed(e.to_string()), Ending::Scored),
        };
        let Job { optimizer, seed, lr_scale, .. } = *job;
        Run { program: name, optimizer: optimizer.to_owned(), seed, lr_scale, ending }
    }

    /// Name of the file that it is written to.
    pub(crate) fn file(&self) -> String {
        format!("{}-{}-{}.json", self.program, self.label(), self.seed)
    }

    /// The optimizer, and the factor on its learning rate if there is one.
    pub(crate) fn label(&self) -> String {
        if self.lr_scale == 1.0 { self.optimizer.clone() } else { format!("{} x{}", self.optimizer, self.lr_scale) }
    }

    pub(crate) fn scores(&self) -> Option<&Scores> {
        if let Ending::Scored(scores) = &self.ending { Some(scores) } else { None }
    }
}

/// An optimizer notices a loss that is not finite; what the last step does to the weights shows here.
fn finite(scores: Scores) -> Outcome<Scores> {
    match scores.measures.iter().find(|m| !(m.at_mean.is_finite() && m.averaged.is_none_or(f64::is_finite))) {
        Some(Measure { name, at_mean, .. }) => Err(format!("{name} is {at_mean} after the last step").into()),
        None => Ok(scores),
    }
}

impl fmt::Display for Run {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:<8} {:<10} seed {}", self.program, self.label(), self.seed)?;
        match &self.ending {
            Ending::Failed(why) => write!(f, "  failed: {why}"),
            Ending::Impossible(why) => write!(f, "  impossible: {why}"),
            Ending::Scored(scores) => {
                for Measure { name, at_mean, averaged, .. } in &scores.measures {
                    write!(f, "  {name} {at_mean:.3}")?;
                    averaged.map_or(Ok(()), |averaged| write!(f, " / {averaged:.3}"))?;
                }
                write!(f, "  {:.1} ms a step", 1e3 * scores.seconds_per_step)
            }
        }
    }
}

/// Programs and their measures from top to bottom, optimizers from left to right.
pub(crate) fn markdown(runs: &[Run]) -> String {
    let optimizers = distinct(runs.iter().map(Run::label));
    let mut table = format!("| program | measure | {} |\n|---|---|", optimizers.join(" | "));
    table += &"---|".repeat(optimizers.len());
    table.push('\n');
    for program in distinct(runs.iter().map(|run| run.program)) {
        let of = |optimizer: &str| -> Vec<&Run> {
            runs.iter().filter(|run| run.program == program && run.label() == optimizer).collect()
        };
        let measures = runs.iter().filter(|run| run.program == program).find_map(Run::scores);
        let measures = measures.map_or_else(Vec::new, |s| s.measures.iter().map(|m| (m.name, m.better)).collect());
        for (row, (name, better)) in measures.iter().enumerate() {
            let arrow = if *better == Better::Higher { "↑" } else { "↓" };
            let cells = optimizers.iter().map(|optimizer| cell(&of(optimizer), row));
            line(&mut table, if row == 0 { program } else { "" }, &format!("{name} {arrow}"), cells);
        }
        let first = if measures.is_empty() { program } else { "" };
        line(&mut table, first, "ms a step", optimizers.iter().map(|optimizer| milliseconds(&of(optimizer))));
    }
    table + "\nAt the mean / averaged over samples of the posterior; ± is the standard deviation over the seeds.\n"
}

fn line(table: &mut String, program: &str, measure: &str, cells: impl Iterator<Item = String>) {
    let cells = cells.collect::<Vec<_>>().join(" | ");
    writeln!(table, "| {program} | {measure} | {cells} |").expect("a string");
}

/// One measure of the runs of a program and an optimizer, with what kept them from ending well.
fn cell(runs: &[&Run], row: usize) -> String {
    if let Some(why) =
        runs.iter().find_map(|run| if let Ending::Impossible(why) = run.ending { Some(why) } else { None })
    {
        return if row == 0 { format!("–, {why}") } else { "–".to_owned() };
    }
    let measures: Vec<&Measure> = runs.iter().filter_map(|run| Some(&run.scores()?.measures[row])).collect();
    let failed = runs.len() - measures.len();
    if measures.is_empty() {
        return "failed".to_owned();
    }
    let averaged: Vec<f64> = measures.iter().filter_map(|m| m.averaged).collect();
    let at_mean = spread(&measures.iter().map(|m| m.at_mean).collect::<Vec<_>>());
    let averaged = if averaged.is_empty() { String::new() } else { format!(" / {}", spread(&averaged)) };
    let failures = if failed == 0 { String::new() } else { format!(" ({failed} of {} failed)", runs.len()) };
    at_mean + &averaged + &failures
}

fn milliseconds(runs: &[&Run]) -> String {
    let all: Vec<f64> = runs.iter().filter_map(|run| Some(1e3 * run.scores()?.seconds_per_step)).collect();
    if all.is_empty() { "–".to_owned() } else { format!("{:.1}", mean(&all)) }
}

/// Mean ± standard deviation (n - 1), to four digits or thousandths.
fn spread(values: &[f64]) -> String {
    let m = mean(values);
    let digits = (3 - m.abs().max(1e-9).log10().floor() as i32).clamp(0, 3) as usize;
    // A training that went astray.
    let number = |x: f64| if m.abs() < 1e5 { format!("{x:.digits$}") } else { format!("{x:.0e}") };
    if values.len() < 2 {
        return number(m);
    }
    let variance = values.iter().map(|x| (x - m).powi(2)).sum::<f64>() / (values.len() - 1) as f64;
    format!("{} ± {}", number(m), number(variance.sqrt()))
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

/// Each once, in order of appearance.
pub(crate) fn distinct<T: PartialEq>(names: impl Iterator<Item = T>) -> Vec<T> {
    let mut all = Vec::new();
    for name in names {
        if !all.contains(&name) {
            all.push(name);
        }
    }
    all
}

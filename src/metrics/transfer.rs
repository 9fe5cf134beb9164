//! What learning one task does to the others: the matrix of accuracies and the numbers that the literature draws from
//! it.

use crate::{Error, Result};
use serde::{Deserialize, Serialize};

/// Accuracies `R[t, j]` on task j after training on task t, both from 0 to T-1, and what follows from them.
///
/// ```
/// use tch_blr::metrics::AccuracyMatrix;
/// # fn main() -> tch_blr::Result<()> {
/// let mut r = AccuracyMatrix::new(2);
/// r.record(0, 0, 0.98)?; // on the first task after the first
/// r.record(1, 0, 0.90)?;
/// r.record(1, 1, 0.96)?;
/// assert!((r.average()? - 0.93).abs() < 1e-12);
/// assert!((r.backward_transfer()? + 0.08).abs() < 1e-12);
/// # Ok(())
/// # }
/// ```
///
/// Each number names the measurement that it lacks, if it does: a task's own column from its row on for all but
/// [`forward_transfer`](Self::forward_transfer), which needs the row before it as well.
///
/// Sources: Lopez-Paz and Ranzato (2017) for average accuracy and transfer; Chaudhry et al. (2018) for forgetting and
/// intransigence; Riemer et al. (2019) for learning accuracy.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct AccuracyMatrix {
    rows: Vec<Vec<Option<f64>>>,
    untrained: Vec<Option<f64>>,
}

impl AccuracyMatrix {
    /// An empty matrix for this number of tasks.
    pub fn new(tasks: usize) -> Self {
        AccuracyMatrix { rows: vec![vec![None; tasks]; tasks], untrained: vec![None; tasks] }
    }

    /// T
    pub fn tasks(&self) -> usize {
        self.rows.len()
    }

    /// Notes the accuracy, in [0, 1], on task `on` after training on task `after`.
    ///
    /// # Errors
    /// A task that is not in the matrix, an accuracy outside of [0, 1].
    pub fn record(&mut self, after: usize, on: usize, accuracy: f64) -> Result<()> {
        // Both indices must be tasks; the larger decides.
        self.check(after.max(on), accuracy)?;
        self.rows[after][on] = Some(accuracy);
        Ok(())
    }

    /// Notes b, the accuracy on this task before any training, for [`forward_transfer`](Self::forward_transfer).
    ///
    /// # Errors
    /// As [`record`](Self::record).
    pub fn record_untrained(&mut self, on: usize, accuracy: f64) -> Result<()> {
        self.check(on, accuracy)?;
        self.untrained[on] = Some(accuracy);
        Ok(())
    }

    /// `R[after, on]`, if it was noted.
    pub fn get(&self, after: usize, on: usize) -> Option<f64> {
        *self.rows.get(after)?.get(on)?
    }

    /// Mean over all tasks after the last: (1/T) Σⱼ R\[T-1, j\].
    ///
    /// # Errors
    /// See the [type](Self).
    pub fn average(&self) -> Result<f64> {
        let last = self.last()?;
        self.mean(0..self.tasks(), |r, j| r.at(last, j))
    }

    /// What later tasks gave to earlier ones, negative if they took: the mean of R\[T-1, j\] - R\[j, j\] over j < T-1;
    /// 0 for one task.
    ///
    /// # Errors
    /// See the [type](Self).
    pub fn backward_transfer(&self) -> Result<f64> {
        let last = self.last()?;
        self.mean(0..last, |r, j| Ok(r.at(last, j)? - r.at(j, j)?))
    }

    /// What earlier tasks gave to later ones before those were trained: the mean of R\[j-1, j\] - bⱼ over j > 0; 0 for
    /// one task.
    ///
    /// # Errors
    /// See the [type](Self).
    pub fn forward_transfer(&self) -> Result<f64> {
        self.last()?;
        self.mean(1..self.tasks(), |r, j| {
            let untrained = r.untrained[j];
            let b = untrained.ok_or_else(|| Error::Metric(format!("no accuracy on task {j} before any training")))?;
            Ok(r.at(j - 1, j)? - b)
        })
    }

    /// The mean over j < T-1 of the best that task j ever had, minus what it has in the end:
    /// max over j ≤ t < T-1 of R\[t, j\], minus R\[T-1, j\] (Chaudhry et al. also count t < j). Not below
    /// [`forgetting_since_trained`](Self::forgetting_since_trained).
    ///
    /// # Errors
    /// See the [type](Self).
    pub fn forgetting(&self) -> Result<f64> {
        let last = self.last()?;
        self.mean(0..last, |r, j| {
            let mut best = f64::NEG_INFINITY;
            // From j on: accuracies before the task was trained are no achievement that could be forgotten.
            for t in j..last {
                best = best.max(r.at(t, j)?);
            }
            Ok(best - r.at(last, j)?)
        })
    }

    /// The other convention, which is minus the [`backward_transfer`](Self::backward_transfer): R\[j, j\] - R\[T-1,
    /// j\].
    ///
    /// # Errors
    /// See the [type](Self).
    pub fn forgetting_since_trained(&self) -> Result<f64> {
        Ok(-self.backward_transfer()?)
    }

    /// How well each task is learned when it is there: the mean of R\[j, j\].
    ///
    /// # Errors
    /// See the [type](Self).
    pub fn learning_accuracy(&self) -> Result<f64> {
        self.last()?;
        self.mean(0..self.tasks(), |r, j| r.at(j, j))
    }

    /// What remembering costs the new task: the mean of `joint[j]` - R\[j, j\], with `joint[j]` the accuracy on task j
    /// of a model trained on the tasks 0 to j together.
    ///
    /// # Errors
    /// See the [type](Self); another number of values than of tasks.
    pub fn intransigence(&self, joint: &[f64]) -> Result<f64> {
        if joint.len() != self.tasks() {
            return Err(Error::Metric(format!(
                "{} accuracies of joint training for {} tasks: expected one for each",
                joint.len(),
                self.tasks()
            )));
        }
        self.last()?;
        self.mean(0..self.tasks(), |r, j| Ok(joint[j] - r.at(j, j)?))
    }

    fn check(&self, task: usize, accuracy: f64) -> Result<()> {
        if task >= self.tasks() {
            return Err(Error::Metric(format!("task {task} of {}: expected less (tasks count from 0)", self.tasks())));
        }
        if !(0.0..=1.0).contains(&accuracy) {
            return Err(Error::Metric(format!(
                "an accuracy of {accuracy} on task {task}: expected a number in [0, 1]"
            )));
        }
        Ok(())
    }

    fn last(&self) -> Result<usize> {
        self.tasks().checked_sub(1).ok_or_else(|| Error::Metric("an accuracy matrix of no tasks".to_owned()))
    }

    fn at(&self, after: usize, on: usize) -> Result<f64> {
        self.rows[after][on].ok_or_else(|| {
            Error::Metric(format!("no accuracy on task {on} after task {after}: record({after}, {on}, ..)"))
        })
    }

    /// 0 over no tasks.
    fn mean(&self, tasks: std::ops::Range<usize>, f: impl Fn(&Self, usize) -> Result<f64>) -> Result<f64> {
        // One task has no earlier or later ones: 0 instead of 0/0.
        let count = tasks.len().max(1) as f64;
        Ok(tasks.map(|j| f(self, j)).sum::<Result<f64>>()? / count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn close(a: f64, b: f64) {
        assert!((a - b).abs() < 1e-12, "{a} {b}");
    }

    /// Three tasks, each number by hand.
    #[test]
    fn metrics_by_hand() {
        let mut r = AccuracyMatrix::new(3);
        for (t, row) in [[0.8, 0.3, 0.1], [0.9, 0.7, 0.4], [0.6, 0.5, 1.0]].iter().enumerate() {
            for (j, accuracy) in row.iter().enumerate() {
                r.record(t, j, *accuracy).unwrap();
            }
        }
        for (j, b) in [0.1, 0.1, 0.2].iter().enumerate() {
            r.record_untrained(j, *b).unwrap();
        }
        close(r.average().unwrap(), 0.7);
        close(r.backward_transfer().unwrap(), f64::midpoint(0.6 - 0.8, 0.5 - 0.7));
        close(r.forward_transfer().unwrap(), f64::midpoint(0.3 - 0.1, 0.4 - 0.2));
        // Task 0 was best after task 1.
        close(r.forgetting().unwrap(), f64::midpoint(0.9 - 0.6, 0.7 - 0.5));
        close(r.forgetting_since_trained().unwrap(), 0.2);
        close(r.learning_accuracy().unwrap(), 2.5 / 3.0);
        close(r.intransigence(&[0.8, 0.8, 0.9]).unwrap(), (0.0 + 0.1 - 0.1) / 3.0);
        let text = serde_json::to_string(&r).unwrap();
        assert_eq!(serde_json::from_str::<AccuracyMatrix>(&text).unwrap(), r);
    }

    #[test]
    fn what_is_missing_is_named() {
        let mut r = AccuracyMatrix::new(2);
        r.record(0, 0, 0.5).unwrap();
        for e in [r.average(), r.backward_transfer(), r.forgetting()] {
            assert!(e.unwrap_err().to_string().contains("task 0 after task 1"));
        }
        assert!(r.forward_transfer().unwrap_err().to_string().contains("task 1 before any training"));
        assert!(r.intransigence(&[1.0]).unwrap_err().to_string().contains("1 accuracies"));
        let before = r.clone();
        for bad in [r.record(2, 0, 0.5), r.record(0, 2, 0.5), r.record(0, 0, 98.0), r.record_untrained(0, f64::NAN)] {
            assert!(matches!(bad, Err(Error::Metric(_))));
        }
        assert_eq!(r, before);
        let mut one = AccuracyMatrix::new(1);
        one.record(0, 0, 0.9).unwrap();
        close(one.average().unwrap(), 0.9);
        close(one.backward_transfer().unwrap(), 0.0);
        close(one.forward_transfer().unwrap(), 0.0);
        assert!(AccuracyMatrix::new(0).average().is_err());
    }
}

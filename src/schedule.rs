//! Learning-rate schedules: functions of the step count that multiply the learning rate. They keep no state, so that
//! a checkpoint only has to hold the number of steps.

use crate::check;
use crate::{Error, Result};

/// A factor on the learning rate as a function of the number of steps taken, from 0.
#[derive(Debug, Clone, Copy, PartialEq, Default, serde::Serialize, serde::Deserialize)]
#[non_exhaustive]
pub enum Schedule {
    /// 1
    #[default]
    Constant,
    /// Linear from 1/w to 1 during the first w steps, then ½(1 + cos π(s-w)/(T-w)) down to 0 at T, and 0 from there,
    /// as in the IVON paper.
    WarmupCosine {
        /// w
        warmup: u64,
        /// T > w, warm-up included.
        total: u64,
    },
    /// Linear from 1/w to 1 during the first w steps, then linearly down to 0 at T.
    WarmupLinear {
        /// w
        warmup: u64,
        /// T > w, warm-up included.
        total: u64,
    },
    /// factor^⌊s/every⌋
    Step {
        /// Steps between two drops, at least 1.
        every: u64,
        /// What each drop multiplies by, > 0.
        factor: f64,
    },
}

impl Schedule {
    /// The factor for the step after `steps` steps.
    pub fn factor(&self, steps: u64) -> f64 {
        // +1, since a first step with the factor 0 would be lost.
        let warm = |warmup: u64| ((steps + 1) as f64 / warmup as f64).min(1.0);
        let progress = |warmup: u64, total: u64| {
            // The fields are public, so that total ≤ warmup can get here unvalidated: no underflow, and `f64::min`
            // turns the 0/0 into 1.
            (steps.saturating_sub(warmup) as f64 / total.saturating_sub(warmup) as f64).min(1.0)
        };
        match *self {
            Schedule::Constant => 1.0,
            Schedule::WarmupCosine { warmup, .. } | Schedule::WarmupLinear { warmup, .. } if steps < warmup => {
                warm(warmup)
            }
            Schedule::WarmupCosine { warmup, total } => {
                0.5 * (1.0 + (std::f64::consts::PI * progress(warmup, total)).cos())
            }
            Schedule::WarmupLinear { warmup, total } => 1.0 - progress(warmup, total),
            // powf, because powi takes an i32 and a u64 of drops may not fit.
            Schedule::Step { every, factor } => factor.powf((steps / every.max(1)) as f64),
        }
    }

    pub(crate) fn validate(&self) -> Result<()> {
        match *self {
            Schedule::Constant => Ok(()),
            Schedule::WarmupCosine { warmup, total } | Schedule::WarmupLinear { warmup, total } => {
                if total > warmup {
                    Ok(())
                } else {
                    let expected = "more steps in total than in the warm-up";
                    Err(Error::HyperParameter { name: "schedule total", value: total.to_string(), expected })
                }
            }
            Schedule::Step { every, factor } => {
                check::count("schedule every", every as usize)?;
                check::positive("schedule factor", factor)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Schedule;

    #[test]
    fn factors() {
        let factors = |s: Schedule, at: &[u64]| at.iter().map(|t| s.factor(*t)).collect::<Vec<_>>();
        let close = |a: Vec<f64>, b: &[f64]| a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-12);
        assert_eq!(factors(Schedule::Constant, &[0, 9]), [1.0, 1.0]);
        let cosine = Schedule::WarmupCosine { warmup: 4, total: 12 };
        assert!(close(factors(cosine, &[0, 1, 3, 4, 8, 12, 99]), &[0.25, 0.5, 1.0, 1.0, 0.5, 0.0, 0.0]));
        let linear = Schedule::WarmupLinear { warmup: 0, total: 4 };
        assert!(close(factors(linear, &[0, 1, 4, 5]), &[1.0, 0.75, 0.0, 0.0]));
        assert!(close(factors(Schedule::Step { every: 3, factor: 0.1 }, &[0, 2, 3, 6]), &[1.0, 1.0, 0.1, 0.01]));
    }

    #[test]
    fn invalid_schedules_are_named() {
        for bad in [
            Schedule::WarmupCosine { warmup: 4, total: 4 },
            Schedule::Step { every: 0, factor: 0.1 },
            Schedule::Step { every: 1, factor: f64::NAN },
        ] {
            assert!(bad.validate().unwrap_err().to_string().contains("schedule"));
        }
    }
}

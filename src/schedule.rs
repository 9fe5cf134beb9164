//! Learning-rate schedules: functions of the step count that multiply the learning rate. They keep no state, so that
//! a checkpoint only has to hold the number of steps.

use crate::check;
use crate::{Error, Result};

/// A factor on the learning rate as a function of the number s of steps taken, from 0.
///
/// All counts are of steps. A schedule that is planned in epochs says how long they are:
///
/// ```
/// use tch_blr::Schedule;
///
/// let (examples, batch) = (60_000_u64, 128);
/// let steps = examples.div_ceil(batch);
/// let schedule = Schedule::Cosine { warmup: 1, total: 10, end: 0.01 }.in_epochs_of(steps);
/// assert_eq!(schedule, Schedule::Cosine { warmup: 469, total: 4690, end: 0.01 });
/// assert_eq!(schedule.factor(10 * steps), 0.01);
/// ```
///
/// In a configuration file, `{"Cosine": {"total": 4690}}`; `warmup`, `stable` and `end` are 0 and `growth` is 1 where
/// they are left out.
#[derive(Debug, Clone, Copy, PartialEq, Default, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub enum Schedule {
    /// 1
    #[default]
    Constant,
    /// Linear from 1/w to 1 during the first w steps, then e + (1-e)·½(1 + cos π(s-w)/(T-w)) down to e at T, and e from
    /// there; with e = 0 that of the IVON paper.
    Cosine {
        /// w
        #[serde(default)]
        warmup: u64,
        /// T > w, warm-up included.
        total: u64,
        /// e ≥ 0, as a fraction of the learning rate.
        #[serde(default)]
        end: f64,
    },
    /// Linear from 1/w to 1 during the first w steps, 1 during the next `stable`, then linearly down to e at T, and e
    /// from there. With stable steps this is "warm-up, stable, decay" (WSD).
    Linear {
        /// w
        #[serde(default)]
        warmup: u64,
        /// Steps between warm-up and decay.
        #[serde(default)]
        stable: u64,
        /// T > w + stable, both included.
        total: u64,
        /// e ≥ 0, as a fraction of the learning rate.
        #[serde(default)]
        end: f64,
    },
    /// Linear from 1/w to 1 during the first w steps, then cosines that start again at 1: the i-th, from 0, goes down
    /// towards e in period·growthⁱ steps (SGDR: Loshchilov and Hutter, 2017).
    CosineRestarts {
        /// w
        #[serde(default)]
        warmup: u64,
        /// Steps of the first cosine, at least 1.
        period: u64,
        /// How much longer each cosine is than the one before, at least 1.
        #[serde(default = "one")]
        growth: u64,
        /// e ≥ 0, as a fraction of the learning rate.
        #[serde(default)]
        end: f64,
    },
    /// factor^⌊s/every⌋
    Step {
        /// Steps between two drops, at least 1.
        every: u64,
        /// What each drop multiplies by, > 0.
        factor: f64,
    },
}

fn one() -> u64 {
    1
}

impl Schedule {
    /// The factor for the step after `steps` steps.
    pub fn factor(&self, steps: u64) -> f64 {
        match *self {
            Schedule::Constant => 1.0,
            Schedule::Cosine { warmup, .. }
            | Schedule::Linear { warmup, .. }
            | Schedule::CosineRestarts { warmup, .. }
                if steps < warmup =>
            {
                // +1, since a first step with the factor 0 would be lost.
                (steps + 1) as f64 / warmup as f64
            }
            Schedule::Cosine { warmup, total, end } => above(end, cosine(progress(steps, warmup, total))),
            Schedule::Linear { warmup, stable, total, end } => {
                above(end, 1.0 - progress(steps, warmup.saturating_add(stable), total))
            }
            Schedule::CosineRestarts { warmup, period, growth, end } => {
                above(end, cosine(since_restart(steps - warmup, period.max(1), growth)))
            }
            // powf, because powi takes an i32 and a u64 of drops may not fit.
            Schedule::Step { every, factor } => factor.powf((steps / every.max(1)) as f64),
        }
    }

    /// This schedule with its counts taken as epochs of `steps` steps. It still changes with every step, and not once
    /// per epoch, but for [`Schedule::Step`].
    #[must_use]
    pub fn in_epochs_of(self, steps: u64) -> Self {
        // Saturating: a schedule that ends after the end of time is no error.
        let n = |epochs: u64| epochs.saturating_mul(steps);
        match self {
            Schedule::Constant => Schedule::Constant,
            Schedule::Cosine { warmup, total, end } => Schedule::Cosine { warmup: n(warmup), total: n(total), end },
            Schedule::Linear { warmup, stable, total, end } => {
                Schedule::Linear { warmup: n(warmup), stable: n(stable), total: n(total), end }
            }
            Schedule::CosineRestarts { warmup, period, growth, end } => {
                Schedule::CosineRestarts { warmup: n(warmup), period: n(period), growth, end }
            }
            Schedule::Step { every, factor } => Schedule::Step { every: n(every), factor },
        }
    }

    pub(crate) fn validate(&self) -> Result<()> {
        let ends_after = |start: u64, total: u64, end: f64| {
            if total <= start {
                let expected = "more steps in total than before the decay (in epochs: of at least one step)";
                return Err(Error::HyperParameter { name: "schedule total", value: total.to_string(), expected });
            }
            check::non_negative("schedule end", end)
        };
        match *self {
            Schedule::Constant => Ok(()),
            Schedule::Cosine { warmup, total, end } => ends_after(warmup, total, end),
            Schedule::Linear { warmup, stable, total, end } => ends_after(warmup.saturating_add(stable), total, end),
            Schedule::CosineRestarts { period, growth, end, .. } => {
                check::count("schedule period", period as usize)?;
                check::count("schedule growth", growth as usize)?;
                check::non_negative("schedule end", end)
            }
            Schedule::Step { every, factor } => {
                check::count("schedule every", every as usize)?;
                check::positive("schedule factor", factor)
            }
        }
    }
}

/// From 1 down to `end`, by a shape from 1 down to 0.
fn above(end: f64, shape: f64) -> f64 {
    end + (1.0 - end) * shape
}

/// From 1 at `progress` 0 down to 0 at 1.
fn cosine(progress: f64) -> f64 {
    0.5 * (1.0 + (std::f64::consts::PI * progress).cos())
}

/// From 0 at `start` to 1 at `total`, and 1 from there.
fn progress(steps: u64, start: u64, total: u64) -> f64 {
    // The fields are public, so that total ≤ start can get here unvalidated: no underflow, and `f64::min` turns the 0/0
    // into 1.
    (steps.saturating_sub(start) as f64 / total.saturating_sub(start) as f64).min(1.0)
}

/// From 0 at a restart towards 1 at the next one.
fn since_restart(mut steps: u64, mut period: u64, growth: u64) -> f64 {
    if growth <= 1 {
        return (steps % period) as f64 / period as f64;
    }
    while steps >= period {
        steps -= period;
        period = period.saturating_mul(growth);
    }
    steps as f64 / period as f64
}

#[cfg(test)]
mod tests {
    use super::Schedule;

    #[track_caller]
    fn assert_factors(schedule: Schedule, expected: &[(u64, f64)]) {
        for (steps, factor) in expected {
            let ours = schedule.factor(*steps);
            assert!((ours - factor).abs() < 1e-15, "{schedule:?} after {steps} steps: {ours} and not {factor}");
        }
    }

    #[test]
    fn factors() {
        assert_factors(Schedule::Constant, &[(0, 1.0), (9, 1.0)]);
        let cosine = |end| Schedule::Cosine { warmup: 4, total: 12, end };
        // cos π/4 = √½
        let eighth = 0.5 + 0.125f64.sqrt();
        let expected = [(0, 0.25), (1, 0.5), (3, 1.0), (4, 1.0), (6, eighth), (8, 0.5), (12, 0.0), (99, 0.0)];
        assert_factors(cosine(0.0), &expected);
        assert_factors(cosine(0.2), &[(0, 0.25), (3, 1.0), (4, 1.0), (8, 0.6), (12, 0.2), (99, 0.2)]);
        let linear = |stable, end| Schedule::Linear { warmup: 0, stable, total: 4, end };
        assert_factors(linear(0, 0.0), &[(0, 1.0), (1, 0.75), (3, 0.25), (4, 0.0), (5, 0.0)]);
        assert_factors(linear(0, 0.5), &[(0, 1.0), (1, 0.875), (4, 0.5), (5, 0.5)]);
        assert_factors(linear(2, 0.0), &[(0, 1.0), (2, 1.0), (3, 0.5), (4, 0.0)]);
        let wsd = Schedule::Linear { warmup: 2, stable: 3, total: 9, end: 0.2 };
        assert_factors(wsd, &[(0, 0.5), (1, 1.0), (4, 1.0), (5, 1.0), (6, 0.8), (7, 0.6), (8, 0.4), (9, 0.2)]);
        assert_factors(Schedule::Step { every: 3, factor: 0.1 }, &[(0, 1.0), (2, 1.0), (3, 0.1), (6, 0.01)]);
    }

    #[test]
    fn restarts() {
        let restarts = |growth, end| Schedule::CosineRestarts { warmup: 2, period: 4, growth, end };
        let same = [(0, 0.5), (1, 1.0), (2, 1.0), (4, 0.5), (6, 1.0), (8, 0.5), (10, 1.0)];
        assert_factors(restarts(1, 0.0), &same);
        // Cosines from 2, 6, 14 and 30 on, of 4, 8, 16 and 32 steps.
        let longer = [(2, 1.0), (4, 0.55), (6, 1.0), (10, 0.55), (14, 1.0), (22, 0.55), (30, 1.0), (46, 0.55)];
        assert_factors(restarts(2, 0.1), &longer);
        // It has an answer at any step, also where the period would overflow.
        let endless = Schedule::CosineRestarts { warmup: 0, period: 3, growth: u64::MAX, end: 0.0 };
        assert_factors(endless, &[(2, 0.25), (3, 1.0), (u64::MAX, 0.0)]);
    }

    #[test]
    fn epochs_are_so_many_steps() {
        let n = |n: u64| n * 10;
        for (epochs, steps) in [
            (Schedule::Constant, Schedule::Constant),
            (
                Schedule::Cosine { warmup: 1, total: 5, end: 0.1 },
                Schedule::Cosine { warmup: n(1), total: n(5), end: 0.1 },
            ),
            (
                Schedule::Linear { warmup: 1, stable: 2, total: 5, end: 0.1 },
                Schedule::Linear { warmup: n(1), stable: n(2), total: n(5), end: 0.1 },
            ),
            (
                Schedule::CosineRestarts { warmup: 1, period: 2, growth: 3, end: 0.1 },
                Schedule::CosineRestarts { warmup: n(1), period: n(2), growth: 3, end: 0.1 },
            ),
            (Schedule::Step { every: 2, factor: 0.5 }, Schedule::Step { every: n(2), factor: 0.5 }),
        ] {
            assert_eq!(epochs.in_epochs_of(10), steps);
        }
        assert!(Schedule::Cosine { warmup: 1, total: 5, end: 0.0 }.in_epochs_of(0).validate().is_err());
    }

    #[test]
    fn invalid_schedules_are_named() {
        for (bad, name) in [
            (Schedule::Cosine { warmup: 4, total: 4, end: 0.0 }, "total"),
            (Schedule::Cosine { warmup: 1, total: 4, end: -0.1 }, "end"),
            (Schedule::Linear { warmup: 2, stable: 2, total: 4, end: 0.0 }, "total"),
            (Schedule::Linear { warmup: u64::MAX, stable: 1, total: u64::MAX, end: 0.0 }, "total"),
            (Schedule::Linear { warmup: 0, stable: 0, total: 4, end: f64::INFINITY }, "end"),
            (Schedule::CosineRestarts { warmup: 0, period: 0, growth: 1, end: 0.0 }, "period"),
            (Schedule::CosineRestarts { warmup: 0, period: 1, growth: 0, end: 0.0 }, "growth"),
            (Schedule::CosineRestarts { warmup: 0, period: 1, growth: 1, end: f64::NAN }, "end"),
            (Schedule::Step { every: 0, factor: 0.1 }, "every"),
            (Schedule::Step { every: 1, factor: f64::NAN }, "factor"),
        ] {
            let error = bad.validate().unwrap_err().to_string();
            assert!(error.contains(&format!("schedule {name}")), "{error}");
            // Unvalidated it has some factor, and no panic.
            _ = [0, 1, u64::MAX].map(|steps| bad.factor(steps));
        }
    }

    #[test]
    fn a_file_may_leave_out_what_is_usual_and_nothing_else() {
        let read = |text: &str| serde_json::from_str::<Schedule>(text);
        let cosine = read(r#"{"Cosine": {"total": 9}}"#).unwrap();
        assert_eq!(cosine, Schedule::Cosine { warmup: 0, total: 9, end: 0.0 });
        let restarts = read(r#"{"CosineRestarts": {"period": 9, "end": 0.5}}"#).unwrap();
        assert_eq!(restarts, Schedule::CosineRestarts { warmup: 0, period: 9, growth: 1, end: 0.5 });
        assert!(read(r#"{"Cosine": {"warmup": 1}}"#).unwrap_err().to_string().contains("total"));
        assert!(read(r#"{"Cosine": {"total": 9, "warm_up": 1}}"#).unwrap_err().to_string().contains("warm_up"));
    }
}

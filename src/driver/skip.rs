//! Evaluations that are left out because their loss or gradient is not finite.

use super::Optimizer;
use super::row::Row;
use super::step::Ended;
use super::sums::Sums;
use crate::params::Perturbed;
use crate::{Error, Result};

/// As many as a loss scale of 2¹⁰⁰ takes to be halved to 1, and more than bad luck with the data does.
const LIMIT: u64 = 100;

/// Whether they are left out, and how many were.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct Skips {
    on: bool,
    total: u64,
    since_update: u64,
}

impl Skips {
    pub(super) fn new(on: bool) -> Self {
        Skips { on, ..Skips::default() }
    }

    /// What was found in so many evaluations, or nothing of any weight if it is to be left out: all of them, for the others
    /// are no sample of the step's noise without the one that is not finite.
    pub(super) fn or_left_out(&mut self, found: Result<Ended>, evaluations: u64) -> Result<Ended> {
        match found {
            Err(e) if self.takes(&e) && self.since_update < LIMIT => {
                self.total += 1;
                self.since_update += 1;
                Ok(Ended { sums: Sums::left_out(evaluations), at: Perturbed::none() })
            }
            found => found,
        }
    }

    /// Whether evaluations that end so are left out.
    pub(super) fn takes(&self, e: &Error) -> bool {
        self.on && matches!(e, Error::NonFiniteLoss { .. } | Error::NonFiniteGradient { .. })
    }

    pub(super) fn updated(&mut self) {
        self.since_update = 0;
    }
}

impl<R: Row> Optimizer<R> {
    /// Evaluations that were left out since the optimizer was built, because their loss or gradient was not finite
    /// ([`Builder::skip_non_finite`](crate::Builder::skip_non_finite)).
    pub fn skipped(&self) -> u64 {
        self.skips.total
    }
}

//! Range checks of hyper-parameters, each with one wording for the whole crate. Checks of tensors belong to the rooms
//! that know their shapes.

use crate::{Error, Result};

/// The general form, for ranges that have no check below.
pub(crate) fn that(name: &'static str, value: impl std::fmt::Debug, ok: bool, expected: &'static str) -> Result<()> {
    if ok { Ok(()) } else { Err(Error::HyperParameter { name, value: format!("{value:?}"), expected }) }
}
pub(crate) fn positive(name: &'static str, x: f64) -> Result<()> {
    // Written so that a NaN fails, which every comparison with it does.
    that(name, x, x.is_finite() && x > 0.0, "a finite number > 0")
}
pub(crate) fn non_negative(name: &'static str, x: f64) -> Result<()> {
    that(name, x, x.is_finite() && x >= 0.0, "a finite number ≥ 0")
}
/// For decay rates: [0, 1).
pub(crate) fn rate(name: &'static str, x: f64) -> Result<()> {
    that(name, x, (0.0..1.0).contains(&x), "a number in [0, 1)")
}
pub(crate) fn count(name: &'static str, n: usize) -> Result<()> {
    that(name, n, n >= 1, "at least 1")
}
/// The effective sample size of rows that need one.
pub(crate) fn ess(ess: Option<f64>) -> Result<f64> {
    // There is no default: a guessed N would scale every variance by a number that nobody chose.
    let ess = ess.ok_or_else(|| Error::HyperParameter {
        name: "ess",
        value: "not set".to_owned(),
        expected: "the effective sample size, usually the number of training examples: .ess(60_000.0)",
    })?;
    positive("ess", ess).map(|()| ess)
}

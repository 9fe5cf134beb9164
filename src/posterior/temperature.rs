//! The temperature of a posterior, chosen by a score.

use crate::{Error, Result};

/// Of these temperatures the one whose posterior has the lowest `score`, and that posterior.
pub(super) fn best<Q>(
    temperatures: impl IntoIterator<Item = f64>,
    temper: impl Fn(f64) -> Result<Q>,
    mut score: impl FnMut(&Q) -> Result<f64>,
) -> Result<(f64, Q)> {
    let mut best: Option<(f64, f64, Q)> = None;
    for tau in temperatures {
        let q = temper(tau)?;
        let found = score(&q)?;
        if best.as_ref().map_or(!found.is_nan(), |(lowest, ..)| found < *lowest) {
            best = Some((found, tau, q));
        }
    }
    let (_, tau, q) = best.ok_or_else(|| Error::Posterior("no temperature has a score".to_owned()))?;
    Ok((tau, q))
}

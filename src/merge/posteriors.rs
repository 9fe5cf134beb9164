//! Merging as sums of natural parameters: gradient matching, removal and federation, for every posterior whose
//! `combine` is exact.

use crate::posterior::{Limit, combine};
pub use crate::posterior::{NaturalSum, clamp_information};
use crate::{Error, Result, check};

/// Gradient matching of posteriors q_t that were learned with the prior q₀ = `base`, each of weight a_t:
///
/// ```text
/// combine( (1 - Σ a_t, q₀), (a_1, q_1), …, (a_T, q_T) )
/// ```
///
/// Its mean is θ₀ + Σ a_t H̄⁻¹(H₀+H_t)(θ_t-θ₀), see [`crate::merge`]. For quadratic losses it is exactly the posterior
/// of joint training on Σ a_t L_t. With all a_t = 1 it is the posterior of all data; a_t < 0 takes a task away.
///
/// A task may end with less precision than its prior in some elements, as IVON's do. With
/// [`clamp_information(q_t, q₀)`](clamp_information) in place of each q_t the result is that of H_t⁺ = max(H_t, 0), and
/// exists for all a_t ≥ 0.
///
/// # Errors
/// Those of [`combine`]: posteriors with different parameters, weights that are not finite,
/// [`KroneckerGaussian`](crate::KroneckerGaussian)s in different bases; [`Error::Combine`] if the precision is not
/// positive definite, whose factor is that of the negative terms of the sum above.
pub fn gradient_matching<Q: NaturalSum>(base: &Q, tasks: &[(f64, &Q)]) -> Result<Q> {
    let rest = 1.0 - tasks.iter().map(|(a, _)| a).sum::<f64>();
    let mut terms = vec![(rest, base)];
    terms.extend(tasks);
    combine(&terms)
}

/// Takes `weight` times `part` out of a posterior: the natural parameters of `q` less `weight` times those of `part`.
///
/// `part` should hold only what its data say, a likelihood's term. If it is itself a posterior, learned with a prior,
/// that prior is taken away as well; `combine(&[(1.0, &q), (-1.0, &part), (1.0, &prior)])` keeps it.
///
/// # Errors
/// A weight that is not finite and positive; different parameters; [`Error::Removal`], with the limit of the weights
/// that are possible, if `q` has less precision in some direction than is to be taken.
pub fn remove<Q: NaturalSum>(q: &Q, part: &Q, weight: f64) -> Result<Q> {
    check::positive("weight", weight)?;
    // A sum has no limit, so it fails only if the two do not fit together, with an error that says so.
    combine(&[(1.0, q), (1.0, part)])?;
    let Limit { largest, what, .. } = q.limit(part)?;
    // At the limit itself a direction would have no precision at all.
    if weight >= largest {
        return Err(Error::Removal { what, weight, largest });
    }
    combine(&[(1.0, q), (-weight, part)])
}

/// The supremum of the weights that [`remove`] can take: the smallest s/s' of all elements or, for matrices, the
/// smallest generalized eigenvalue of (S, S'). Infinite if there is no limit.
///
/// # Errors
/// Different parameters, or bases that differ.
pub fn largest_removal<Q: NaturalSum>(q: &Q, part: &Q) -> Result<f64> {
    combine(&[(1.0, q), (1.0, part)])?;
    Ok(q.limit(part)?.largest)
}

/// A round on the server: combines the posteriors of clients that all started from `prior`, and counts that prior once.
///
/// ```text
/// combine( (1 - K, prior), (1, q_1), …, (1, q_K) )
/// ```
///
/// This is exact if the clients' posteriors are, whatever the order and number of the clients. For new data, run
/// another round with this round's result as prior. To repeat rounds on the same data, each client's part has to be
/// remembered: [`crate::federated`] does.
///
/// # Errors
/// As [`gradient_matching`].
pub fn federated<Q: NaturalSum>(prior: &Q, clients: &[&Q]) -> Result<Q> {
    gradient_matching(prior, &clients.iter().map(|q| (1.0, *q)).collect::<Vec<_>>())
}

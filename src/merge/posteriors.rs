//! Merging as sums of natural parameters.

pub use crate::posterior::NaturalSum;
use crate::posterior::combine;
use crate::{Error, Result, check};

/// Gradient matching of posteriors q_t that were learned with the prior q₀ = `base`, each of weight a_t:
///
/// ```text
/// combine( (1 - Σ a_t, q₀), (a_1, q_1), …, (a_T, q_T) )
/// ```
///
/// Its mean is θ₀ + Σ a_t H̄⁻¹(H₀+H_t)(θ_t-θ₀), see [`crate::merge`]; for losses that are quadratic, it is the posterior of the
/// joint training on Σ a_t L_t, exactly. All a_t = 1: the posterior of all data. a_t < 0 takes a task away.
///
/// # Errors
/// Posteriors with other parameters, weights that are not finite, or so negative that the precision is not positive definite;
/// [`KroneckerGaussian`](crate::KroneckerGaussian)s in different bases.
pub fn gradient_matching<Q: NaturalSum>(base: &Q, tasks: &[(f64, &Q)]) -> Result<Q> {
    let rest = 1.0 - tasks.iter().map(|(a, _)| a).sum::<f64>();
    let mut terms = vec![(rest, base)];
    terms.extend(tasks);
    combine(&terms)
}

/// The posterior without `weight` of `part`: natural parameters of `q` less those of `part`, times the weight.
///
/// `part` holds what its data alone say: a likelihood's term. If it is a posterior itself, learned with a prior, its prior is
/// taken away as well; to keep it, `combine(&[(1.0, &q), (-1.0, &part), (1.0, &prior)])`.
///
/// # Errors
/// A weight that is not finite and positive; other parameters; [`Error::Removal`], with the largest weight that is possible,
/// if `q` does not hold as much precision in every direction.
pub fn remove<Q: NaturalSum>(q: &Q, part: &Q, weight: f64) -> Result<Q> {
    check::positive("weight", weight)?;
    // Says first whether the two fit together.
    combine(&[(1.0, q), (1.0, part)])?;
    let (largest, what) = q.limit(part)?;
    if weight >= largest {
        return Err(Error::Removal { what, weight, largest });
    }
    combine(&[(1.0, q), (-weight, part)])
}

/// The supremum of the weights that [`remove`] can take: the smallest s/s' of all elements, or for matrices the smallest
/// generalized eigenvalue of (S, S'). Infinite if there is no limit.
///
/// # Errors
/// Other parameters, or bases that differ.
pub fn largest_removal<Q: NaturalSum>(q: &Q, part: &Q) -> Result<f64> {
    combine(&[(1.0, q), (1.0, part)])?;
    q.limit(part).map(|(largest, _)| largest)
}

/// A server's round: the posteriors of clients who all started from `prior`, combined with that prior counted once.
///
/// ```text
/// combine( (1 - K, prior), (1, q_1), …, (1, q_K) )
/// ```
///
/// That is exact where the clients' posteriors are, whatever the order and number of the clients. New data are a round of their
/// own, with this round's result as prior. To repeat a round on the same data (partitioned variational inference), client k starts
/// from the server's posterior without its own factor, which [`remove`] takes out: the factor is its last posterior less its last
/// prior.
///
/// # Errors
/// As [`gradient_matching`].
pub fn federated<Q: NaturalSum>(prior: &Q, clients: &[&Q]) -> Result<Q> {
    gradient_matching(prior, &clients.iter().map(|q| (1.0, *q)).collect::<Vec<_>>())
}

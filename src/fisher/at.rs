//! Where and from what a Fisher information was computed: what all three structures share.

use super::Fisher;
use crate::prior::Family;
use crate::{Error, Params, Prior, Result, kernel};
use tch::Tensor;

/// Where and from what a Fisher information was computed.
#[derive(Debug)]
pub(super) struct At {
    /// θ, a copy.
    pub solution: Params,
    pub seen: Seen,
    pub fisher: Fisher,
}

/// What the passes over the data have seen beside the curvature.
#[derive(Debug)]
pub(crate) struct Seen {
    /// N
    pub examples: u64,
    /// How well the targets are fitted; `None` unless every batch had targets.
    pub fit: Option<Fit>,
}

/// The fit of targets at the solution.
#[derive(Debug)]
pub(crate) struct Fit {
    /// Σ -ln p(yᵢ | zᵢ), of a Gaussian without its normalizer: Σ‖yᵢ - zᵢ‖²/(2σ²).
    pub loss: f64,
    /// Number of outputs of all examples.
    pub outputs: f64,
    /// Its gradient with respect to each parameter, in f64; `None` for observed labels.
    pub gradient: Option<Vec<Tensor>>,
}

macro_rules! at {
    ($Type:ident) => {
        impl $Type {
            /// N, the number of examples that it is the sum over.
            pub fn examples(&self) -> u64 {
                self.at.seen.examples
            }

            /// Where its labels come from.
            pub fn labels(&self) -> $crate::Labels {
                self.at.fisher.labels
            }

            /// The p(y | z) that it is about.
            pub fn likelihood(&self) -> $crate::nn::Likelihood {
                self.at.fisher.likelihood
            }

            /// The active outputs, if they were named.
            pub fn active(&self) -> Option<&[i64]> {
                self.at.fisher.active.as_deref()
            }

            /// θ, in the order of the names.
            pub(crate) fn solution(&self) -> &$crate::Params {
                &self.at.solution
            }

            pub(crate) fn seen(&self) -> &$crate::fisher::Seen {
                &self.at.seen
            }

            /// Names of the parameters, in order.
            pub fn names(&self) -> impl Iterator<Item = &str> {
                self.at.solution.names()
            }
        }
    };
}
pub(super) use at;

impl At {
    /// P₀ of every parameter, in its shape.
    pub(super) fn precisions(&self, prior: &Prior) -> Result<Vec<Tensor>> {
        // The whole prior first: a name that the model lacks would otherwise be passed over, leaf by leaf.
        prior.check(&self.solution, "a diagonal Fisher information", Family::Diagonal)?;
        self.solution.leaves().iter().map(|leaf| prior.diagonal_of(leaf, self.seen.examples as f64)).collect()
    }

    pub(super) fn means(&self) -> Vec<(&str, Tensor)> {
        self.solution.leaves().iter().map(|l| (l.name(), l.tensor.shallow_clone())).collect()
    }
}

pub(super) fn parameter(name: &str) -> String {
    format!("parameter `{name}`")
}

/// Errors if the Fisher information of `what` is not finite.
pub(super) fn finite(what: &str, x: &Tensor, examples: u64) -> Result<()> {
    kernel::first_non_finite(x).map_or(Ok(()), |value| {
        Err(Error::Curvature(format!(
            "the Fisher information of {what} over {examples} examples is not finite ({value}); nothing \
             was changed (look at the weights and the inputs)"
        )))
    })
}

//! What an elementwise unit knows: the precision of its posterior, what of it was learned, and the posterior of all.

use super::arithmetic::{Step, Unit, delta};
use super::programs::{Pass, Precision};
use super::rule::{OfWeights, Rule};
use crate::kernel::{self, Field, Job, Pack};
use crate::params::{Leaf, Params};
use crate::prior::PriorOf;
use crate::{Error, Result, check};
use tch::{Kind, Tensor};

impl<R: Rule> Unit<R> {
    /// Precision of the posterior after the last update, t = steps. From the unit's own state, or from numbers in place
    /// of each.
    fn precision(&self, step: Step, state: Option<&dyn Fn(usize) -> f64>) -> Result<Tensor> {
        check::ess(self.row.effective_sample_size())?;
        let precision = self.kept.mean(self.leaf(step.params)).detach().empty_like();
        let numbers = |of: &dyn Fn(usize) -> f64| (0..R::STATE.len()).map(|i| Field::Number(of(i))).collect::<Vec<_>>();
        let inputs = match state {
            None => self.with_state([self.delta()]),
            Some(of) => std::iter::once(self.delta()).chain(numbers(of)).collect(),
        };
        let f = Precision(Pass::new(self.row.undamped(), self.when(0, step.lr_factor)));
        kernel::run([Job::new(f, inputs, [Some(&precision)])])?;
        Ok(precision)
    }

    /// λγ, what the noise has beside the posterior's precision.
    fn damping(&self, step: Step) -> f64 {
        let when = self.when(0, step.lr_factor);
        // Of no weight in particular: γ is the same for all of a parameter.
        let of = |row: R| row.precision(row.coefficients(when), 0.0, R::State::<f64>::from_fn(|_| 0.0));
        of(self.row) - of(self.row.undamped())
    }

    /// Precision of the posterior, and λγ.
    pub(super) fn known(&self, step: Step) -> Result<(Tensor, f64)> {
        let (s, damping) = (self.precision(step, None)?, self.damping(step));
        if damping == 0.0 {
            return Ok((s, damping));
        }
        // What a row keeps positive is h+δ+γ. Where h is of either sign, h+δ need not be, and then the prior is what is
        // left to be known. The same bits where h ≥ 0.
        Ok((s.maximum(&self.precision(step, Some(&|_| 0.0))?), damping))
    }

    /// P₀ + max(0, (S - β₂ᵗS₀)/(1-β₂ᵗ) - λδ): S is λ(h+δ) at the end, S₀ at the start, and λδ where h is 0.
    pub(super) fn learned_precision(&self, step: Step) -> Result<Tensor> {
        let Some(share) = self.row.initial_share(self.steps) else {
            let problem = format!("the precision of `{}` does not start from an initial Hessian", R::NAME);
            return Err(Error::Posterior(format!("{problem}: call posterior()")));
        };
        // In f64: what was learned may be a small part of it.
        let s = |state| Ok::<_, Error>(self.precision(step, state)?.to_kind(Kind::Double));
        let empty = s(Some(&|_| 0.0))?;
        let ess = check::ess(self.row.effective_sample_size())?;
        let prior: Tensor = match (&self.prior, self.prior.diagonal()) {
            (PriorOf::Isotropic(prior), _) => empty.full_like(ess * delta(*prior, &self.row)),
            (_, diagonal) => diagonal.map_or_else(|| empty.full_like(f64::NAN), |(_, p)| p.to_kind(Kind::Double)),
        };
        // Before the first update nothing is known but the prior, and the quotient is 0/0.
        let data = if share < 1.0 {
            (s(None)? - s(Some(&|i| self.initial(i)))? * share) / (1.0 - share) - empty
        } else {
            empty.zeros_like()
        };
        Ok((prior + data.clamp_min(0.0)).to_kind(self.leaf(step.params).state_kind()))
    }
}

/// The means of the trainable parameters with these precisions.
pub(super) fn posterior<R: Rule>(
    units: &[Unit<R>],
    params: &Params,
    known: impl Fn(&Unit<R>) -> Result<(Tensor, f64)>,
    learned: Option<f64>,
) -> Result<R::Posterior> {
    let _no_grad = tch::no_grad_guard();
    let trained: Vec<(&Unit<R>, &Leaf)> =
        units.iter().zip(params.leaves()).filter(|(_, leaf)| leaf.trainable()).collect();
    // Copies: a posterior must not move with the next step.
    let means = trained.iter().map(|(unit, leaf)| (leaf.name(), unit.weights_now(leaf).detach().copy()));
    R::Posterior::of_weights(means.collect(), &|i| known(trained[i].0), learned)
}

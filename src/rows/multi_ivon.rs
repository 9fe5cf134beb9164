//! Several runs of IVON as one mixture. Their training is that of [`Ivon`]; only building, stepping and joining are
//! here.

use super::ivon::Ivon;
use crate::gradient::IntoTensor;
use crate::{Error, Mixture, Optimizer, Params, Philox, Result};

/// Independent runs of [`Ivon`] over several copies of a model, whose posteriors make a [`Mixture`] of equal weights:
/// each run finds a mode of its own, and the mixture expresses where they disagree.
///
/// Each copy is a separate store with the same names and shapes but different initial weights; the noise of member i
/// has seed `seed` + i. The members share nothing while they are trained, so they may as well be trained one after the
/// other, by any row with a posterior: [`Mixture::equal`]. Each is a separate [`Optimizer`].
///
/// Source: the winning entry of the NeurIPS 2021 competition on approximate inference in Bayesian deep learning.
#[derive(Debug)]
pub struct MultiIvon {
    members: Vec<Optimizer<Ivon>>,
}

impl MultiIvon {
    /// A run for each copy of the model, all with this configuration.
    ///
    /// # Errors
    /// No copy, and as [`Builder::build`](crate::Builder::build).
    pub fn build<P: Into<Params>>(
        config: Ivon,
        copies: impl IntoIterator<Item = P>,
        lr: f64,
        seed: u64,
    ) -> Result<Self> {
        // A seed is a name and not a quantity, so it may wrap around.
        let build = |(i, copy): (usize, P)| config.noise(Philox { seed: seed.wrapping_add(i as u64) }).build(copy, lr);
        let members = copies.into_iter().enumerate().map(build).collect::<Result<Vec<_>>>()?;
        if members.is_empty() {
            return Err(Error::Parameters("there is no copy of the model: expected at least one".to_owned()));
        }
        Ok(MultiIvon { members })
    }

    /// A step of each member: `closure(i)` computes the loss of copy i. Returns the losses.
    ///
    /// # Errors
    /// As [`Optimizer::step`], for the member that fails; the members before it have taken their step.
    pub fn step<L: IntoTensor>(&mut self, mut closure: impl FnMut(usize) -> L) -> Result<Vec<f64>> {
        self.members.iter_mut().enumerate().map(|(i, member)| member.step(|| closure(i))).collect()
    }

    /// The runs, for all that an [`Optimizer`] can do: schedules, checkpoints, diagnostics.
    pub fn members(&mut self) -> &mut [Optimizer<Ivon>] {
        &mut self.members
    }

    /// The mixture of the members' posteriors.
    ///
    /// # Errors
    /// As [`Optimizer::posterior`], and if the copies do not have the same parameters.
    pub fn posterior(&self) -> Result<Mixture> {
        let posteriors = self.members.iter().map(Optimizer::<Ivon>::posterior).collect::<Result<Vec<_>>>()?;
        Mixture::equal(posteriors)
    }
}

//! The losses of merges at many weightings: what one chooses a weighting by.

use super::Tensors;
use super::diagnostics::enter;
use crate::gradient::IntoTensor;
use crate::params::Buffers;
use crate::{Error, Params, Result};
use tch::{Device, Kind};

/// A weighting that was looked at.
#[derive(Debug, Clone, PartialEq)]
pub struct Trial {
    /// α, as it was given.
    pub alpha: Vec<f64>,
    /// Of every task.
    pub losses: Vec<f64>,
    /// Whether it is a point of the Pareto front: all its losses are numbers, and no other trial has one that is
    /// smaller and none that is larger.
    pub efficient: bool,
}

/// The losses of the merge at each weighting: `merge` makes the weights, and `losses` is called with these in the
/// model's variables, without a graph. Afterwards the variables have their old values.
///
/// `losses` computes one loss, or one for each task as one tensor `[T]`. For posteriors `merge` is a
/// [`preview`](crate::merge::preview), and [`simplex`](crate::merge::simplex) lists weightings:
///
/// ```
/// # use tch::{Device, Kind, Tensor, nn};
/// use tch_blr::{DiagonalGaussian, merge};
/// # fn main() -> tch_blr::Result<()> {
/// let vs = nn::VarStore::new(Device::Cpu);
/// let w = vs.root().zeros("w", &[1]);
/// let q = |m: f32| DiagonalGaussian::new([("w", Tensor::from_slice(&[m]), Tensor::from_slice(&[4f32]))]);
/// let (prior, a, b) = (q(0.0)?, q(1.0)?, q(-1.0)?);
/// let trials = merge::sweep(
///     &vs,
///     merge::simplex(2, 2), // (0, 1), (½, ½), (1, 0)
///     |alpha| Ok(merge::preview(&prior, &[&a, &b], alpha)?.means()),
///     || Tensor::cat(&[(&w - 1.0).square(), (&w + 1.0).square()], 0),
/// )?;
/// assert_eq!(trials[1].losses, [1.0, 1.0]);
/// assert!(trials.iter().all(|trial| trial.efficient));
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// Those of `merge`; weights that do not belong to the model; losses that are neither one number nor one dimension of
/// the same length each time; an error of the closure.
pub fn sweep<L: IntoTensor>(
    params: impl Into<Params>,
    weightings: impl IntoIterator<Item = Vec<f64>>,
    mut merge: impl FnMut(&[f64]) -> Result<Tensors>,
    mut losses: impl FnMut() -> L,
) -> Result<Vec<Trial>> {
    let params = Params::separate(params)?;
    let mut trials: Vec<Trial> = Vec::new();
    for alpha in weightings {
        let _guard = enter(&params, &merge(&alpha)?)?;
        let _no_grad = tch::no_grad_guard();
        let found = Buffers::unmoved(&params, || losses().into_tensor())?;
        let tasks = trials.first().map(|trial| trial.losses.len());
        if !found.defined() || found.dim() > 1 || tasks.is_some_and(|tasks| found.numel() != tasks) {
            return Err(Error::Loss("expected one number, or one loss for each task as one dimension".to_owned()));
        }
        let losses = found.to_kind(Kind::Double).to_device(Device::Cpu).reshape([-1]).contiguous();
        trials.push(Trial { alpha, losses: Vec::try_from(losses)?, efficient: true });
    }
    for i in 0..trials.len() {
        let numbers = !trials[i].losses.iter().any(|loss| loss.is_nan());
        trials[i].efficient = numbers && !trials.iter().any(|other| dominates(&other.losses, &trials[i].losses));
    }
    Ok(trials)
}

/// A NaN dominates nothing.
fn dominates(a: &[f64], b: &[f64]) -> bool {
    a.iter().zip(b).all(|(a, b)| a <= b) && a.iter().zip(b).any(|(a, b)| a < b)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;
    use tch::{Tensor, nn};

    fn run(tasks: i64, weightings: Vec<Vec<f64>>) -> Result<(Vec<Trial>, f64)> {
        let vs = nn::VarStore::new(Device::Cpu);
        let mut w = vs.root().zeros("w", &[1]);
        let _ = tch::no_grad(|| w.fill_(7.0));
        let weights = |alpha: &[f64]| Ok(BTreeMap::from([("w".to_owned(), Tensor::from_slice(&[alpha[0] as f32]))]));
        // At w = α₀ the losses are |w| and |w - 1|: 2 is worse than 1 for both.
        let losses = || Tensor::cat(&[w.abs(), (&w - 1.0).abs(), w.abs()], 0).narrow(0, 0, tasks);
        let trials = sweep(&vs, weightings, weights, losses)?;
        Ok((trials, w.double_value(&[0])))
    }

    #[test]
    fn what_another_weighting_beats_is_not_efficient() {
        let (trials, after) = run(2, vec![vec![0.0], vec![0.25], vec![1.0], vec![2.0]]).unwrap();
        let losses: Vec<&[f64]> = trials.iter().map(|t| &t.losses[..]).collect();
        assert_eq!(losses, [[0.0, 1.0], [0.25, 0.75], [1.0, 0.0], [2.0, 1.0]]);
        assert_eq!(trials.iter().map(|t| t.efficient).collect::<Vec<_>>(), [true, true, true, false]);
        assert_eq!(after, 7.0);
        // A tie is no defeat.
        assert!(run(2, vec![vec![0.5]; 2]).unwrap().0.iter().all(|t| t.efficient));
        assert!(run(2, Vec::new()).unwrap().0.is_empty());
    }

    #[test]
    fn losses_that_are_none_are_refused() {
        let vs = nn::VarStore::new(Device::Cpu);
        let w = vs.root().zeros("w", &[1]);
        let weights = |_: &[f64]| Ok(BTreeMap::from([("w".to_owned(), Tensor::from_slice(&[1f32]))]));
        let mut calls = 0;
        let growing = || {
            calls += 1;
            Tensor::ones([calls], (Kind::Float, Device::Cpu))
        };
        assert!(matches!(sweep(&vs, [vec![1.0], vec![2.0]], weights, growing), Err(Error::Loss(_))));
        assert!(matches!(sweep(&vs, [vec![1.0]], weights, || w.ones_like().view([1, 1])), Err(Error::Loss(_))));
        // A merge that has diverged is nobody's choice.
        let mut first = true;
        let nan = sweep(&vs, [vec![1.0], vec![0.0]], weights, || {
            &w * if std::mem::take(&mut first) { f64::NAN } else { 1.0 }
        });
        let nan = nan.unwrap();
        assert!(nan[0].losses[0].is_nan() && !nan[0].efficient && nan[1].efficient);
        assert_eq!(w.double_value(&[0]), 0.0);
    }
}

//! The losses of every task at many weightings: what one chooses a weighting by.

use super::Tensors;
use super::diagnostics::enter;
use crate::gradient::IntoTensor;
use crate::params::Buffers;
use crate::{Error, Params, Posterior, Result};
use tch::Kind;

/// A weighting that was looked at.
#[derive(Debug, Clone, PartialEq)]
pub struct Trial {
    /// α, as it was given.
    pub alpha: Vec<f64>,
    /// Of every task, at the mean of the preview.
    pub losses: Vec<f64>,
    /// Whether no other trial has a loss that is smaller and none that is larger: a point of the Pareto front.
    pub efficient: bool,
}

/// Puts the mean of the preview of each weighting into a model, and asks for the losses of all tasks there. Afterwards
/// the model's variables have their old values.
///
/// `preview` is called with α, usually to return [`preview(&prior, &tasks, alpha)`](crate::merge::preview); `losses`
/// computes one loss for each task from the model's variables, as one tensor `[T]`, without a graph.
///
/// ```
/// # use tch::{Device, Kind, Tensor, nn};
/// use tch_blr::{DiagonalGaussian, merge};
/// # fn main() -> tch_blr::Result<()> {
/// let vs = nn::VarStore::new(Device::Cpu);
/// let w = vs.root().zeros("w", &[1]);
/// let q = |m: f32| DiagonalGaussian::new([("w", Tensor::from_slice(&[m]), Tensor::from_slice(&[4f32]))]);
/// let (prior, a, b) = (q(0.0)?, q(1.0)?, q(-1.0)?);
/// let front = merge::front(
///     &vs,
///     [vec![1.0, 0.0], vec![0.5, 0.5], vec![0.0, 1.0]],
///     |alpha| merge::preview(&prior, &[&a, &b], alpha),
///     || Tensor::cat(&[(&w - 1.0).square(), (&w + 1.0).square()], 0),
/// )?;
/// assert_eq!(front[1].losses, [1.0, 1.0]);
/// assert!(front.iter().all(|trial| trial.efficient));
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// Those of `preview`; a posterior that does not belong to the model; losses that are not one dimension of the same
/// length each time; an error of the closure.
pub fn front<Q: Posterior, L: IntoTensor>(
    params: impl Into<Params>,
    weightings: impl IntoIterator<Item = Vec<f64>>,
    mut preview: impl FnMut(&[f64]) -> Result<Q>,
    mut losses: impl FnMut() -> L,
) -> Result<Vec<Trial>> {
    let params = Params::separate(params)?;
    let mut trials: Vec<Trial> = Vec::new();
    for alpha in weightings {
        let q = preview(&alpha)?;
        let means: Tensors = q.names().filter_map(|name| Some((name.to_owned(), q.mean(name)?))).collect();
        let _guard = enter(&params, &means)?;
        let _no_grad = tch::no_grad_guard();
        let found = Buffers::unmoved(&params, || losses().into_tensor())?;
        let tasks = trials.first().map(|trial| trial.losses.len());
        if !found.defined() || found.dim() != 1 || tasks.is_some_and(|tasks| found.numel() != tasks) {
            return Err(Error::Loss("expected one loss for each task, as one dimension".to_owned()));
        }
        let losses = Vec::try_from(found.to_kind(Kind::Double).to_device(tch::Device::Cpu).contiguous())?;
        trials.push(Trial { alpha, losses, efficient: true });
    }
    for i in 0..trials.len() {
        trials[i].efficient = !trials.iter().any(|other| dominates(&other.losses, &trials[i].losses));
    }
    Ok(trials)
}

/// A NaN is not smaller than anything, and nothing is smaller than it.
fn dominates(a: &[f64], b: &[f64]) -> bool {
    a.iter().zip(b).all(|(a, b)| a <= b) && a.iter().zip(b).any(|(a, b)| a < b)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::DiagonalGaussian;
    use tch::{Device, Tensor, nn};

    fn run(tasks: i64, weightings: Vec<Vec<f64>>) -> Result<(Vec<Trial>, f64)> {
        let vs = nn::VarStore::new(Device::Cpu);
        let mut w = vs.root().zeros("w", &[1]);
        let _ = tch::no_grad(|| w.fill_(7.0));
        let q = |x: f64| DiagonalGaussian::new([("w", Tensor::from_slice(&[x as f32]), Tensor::from_slice(&[1f32]))]);
        // At w = α₀ the losses are |w| and |w - 1|: 2 is worse than 1 for both.
        let losses = || Tensor::cat(&[w.abs(), (&w - 1.0).abs(), w.abs()], 0).narrow(0, 0, tasks);
        let trials = front(&vs, weightings, |alpha| q(alpha[0]), losses)?;
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
        let q = || DiagonalGaussian::new([("w", Tensor::from_slice(&[1f32]), Tensor::from_slice(&[1f32]))]);
        let mut calls = 0;
        let growing = || {
            calls += 1;
            Tensor::ones([calls], (Kind::Float, Device::Cpu))
        };
        assert!(matches!(front(&vs, [vec![1.0], vec![2.0]], |_| q(), growing), Err(Error::Loss(_))));
        assert!(matches!(front(&vs, [vec![1.0]], |_| q(), || w.sum(Kind::Float)), Err(Error::Loss(_))));
        let nan = front(&vs, [vec![1.0], vec![0.0]], |_| q(), || &w * f64::NAN).unwrap();
        assert!(nan.iter().all(|t| t.losses[0].is_nan()));
        assert_eq!(w.double_value(&[0]), 0.0);
    }
}

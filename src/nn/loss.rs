//! Losses that say which likelihood they come from, so that the Hessian with respect to the model's output is known.

use super::tape::{self, Noted};
use crate::Result;
use crate::likelihood::{IGNORED, Likelihood, Outputs, rows};
use tch::{Reduction, Tensor};

/// Losses -ln softmax(z)ᵧ `[B]` of logits z `[B, C]` and classes y `[B]` (`i64`), as tch's `cross_entropy_for_logits`
/// before the mean is taken, but in the kind of the logits instead of f32. The label -100 leaves an example out, as in
/// libtorch: its loss is 0, in a mean over all B too.
///
/// The losses of this module are for rows with the generalized Gauss-Newton matrix
/// ([`Statistic::Fisher(Labels::Exact)`] and [`Statistic::Fisher(Labels::Sampled)`]) or its Kronecker factors
/// ([`NoisyKfac`]), which need the model's output beside the loss; any other row takes them as well.
///
/// # What counts for the curvature
/// The loss L that the closure returns, as far as it is made of these losses. Each example has the weight that L gives
/// to its loss, as it has in the gradient:
///
/// ```text
/// Σᵢ wᵢ JᵢᵀΛᵢJᵢ,    wᵢ = ∂L/∂ℓᵢ
/// ```
///
/// with Jᵢ the Jacobian of the output zᵢ and Λᵢ = ∂²ℓᵢ/∂zᵢ². So means, sums, factors, class weights, masks, several
/// calls (heads, tasks, a memory beside the batch, a batch in parts) count as they are, and what has no part in L (a loss
/// for a log, a detached one) not at all. Of a function that is not linear in the losses this is the linear part.
/// What else the closure adds to L, as an L2 term or a loss of tch, counts for the gradient and not for the curvature.
///
/// A negative weight is an error of the step, since the matrix must not become negative: subtract a loss of tch instead,
/// or detach it.
///
/// [`Statistic::Fisher(Labels::Exact)`]: crate::Statistic::Fisher(Labels::Exact)
/// [`Statistic::Fisher(Labels::Sampled)`]: crate::Statistic::Fisher(Labels::Sampled)
/// [`NoisyKfac`]: crate::NoisyKfac
///
/// # Errors
/// [`Error::Likelihood`](crate::Error::Likelihood) for other shapes or kinds, and for labels that are neither one of the
/// C classes nor -100.
pub fn cross_entropy(logits: &Tensor, targets: &Tensor) -> Result<Tensor> {
    let output = fitting(Likelihood::Categorical, logits, targets)?;
    let counted = output.counted(targets)?;
    // tch's `cross_entropy_for_logits` goes through f32 and takes the mean.
    let losses = logits.f_cross_entropy_loss(targets, None::<&Tensor>, Reduction::None, IGNORED, 0.0)?;
    // After the loss: an output whose loss failed must not be on the tape.
    Ok(tape::note(Noted { output, losses, counted }))
}

/// Losses Σ -ln p(y) `[B]` of logits z `[B]` or `[B, D]` and targets y in [0, 1] of the same shape, p = sigmoid(z),
/// summed over the columns. For the rest see [`cross_entropy`].
///
/// # Errors
/// [`Error::Likelihood`](crate::Error::Likelihood) for other shapes or kinds.
pub fn binary_cross_entropy(logits: &Tensor, targets: &Tensor) -> Result<Tensor> {
    let output = fitting(Likelihood::Bernoulli, logits, targets)?;
    let each = logits.f_binary_cross_entropy_with_logits(
        &targets.f_to_kind(logits.kind())?,
        None::<&Tensor>,
        None::<&Tensor>,
        Reduction::None,
    )?;
    Ok(tape::note(Noted { output, losses: rows(&each)?, counted: None }))
}

/// Losses |z - y|²/(2σ²) `[B]` of outputs z `[B]` or `[B, D]` and targets y of the same shape, with σ² = `variance` >
/// 0, the variance of the noise. For the rest see [`cross_entropy`].
///
/// # Errors
/// As [`cross_entropy`]; a variance that is not finite and positive.
pub fn squared_error(outputs: &Tensor, targets: &Tensor, variance: f64) -> Result<Tensor> {
    let output = fitting(Likelihood::Gaussian { variance }, outputs, targets)?;
    let each = (outputs - targets).f_square()?.f_mul_scalar(0.5 / variance)?;
    Ok(tape::note(Noted { output, losses: rows(&each)?, counted: None }))
}

/// The output, if the targets are targets for it.
fn fitting(likelihood: Likelihood, outputs: &Tensor, targets: &Tensor) -> Result<Outputs> {
    let output = Outputs::as_is(likelihood, outputs)?;
    output.check_targets(targets)?;
    Ok(output)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::tape::Tape;
    use tch::{Device, Kind};

    fn outputs() -> Vec<Outputs> {
        let z = |shape: &[i64]| {
            (Tensor::arange(shape.iter().product::<i64>(), (Kind::Double, Device::Cpu)) * 1.7).sin().reshape(shape)
        };
        let of = |likelihood, shape: &[i64]| Outputs::as_is(likelihood, &z(shape)).unwrap();
        vec![
            of(Likelihood::Categorical, &[3, 4]),
            of(Likelihood::Bernoulli, &[3, 2]),
            of(Likelihood::Bernoulli, &[3]),
            of(Likelihood::Gaussian { variance: 4.0 }, &[3, 2]),
            of(Likelihood::Gaussian { variance: 4.0 }, &[3]),
        ]
    }

    /// Hessian of each example's loss with respect to its output `[B, D, D]`, by differentiating the losses twice.
    fn hessian(output: &Outputs) -> Tensor {
        let z = output.z.copy().set_requires_grad(true);
        let losses = match output.likelihood {
            Likelihood::Categorical => cross_entropy(&z, &Tensor::from_slice(&[2i64, 0, 3])),
            Likelihood::Bernoulli => binary_cross_entropy(&z, &z.detach().ge(0.5)),
            Likelihood::Gaussian { variance } => squared_error(&z, &z.detach().cos(), variance),
        };
        let g = &Tensor::run_backward(&[losses.unwrap().sum(Kind::Double)], &[&z], true, true)[0];
        let g = g.reshape([3, -1]);
        let row = |c| Tensor::run_backward(&[g.select(1, c).sum(Kind::Double)], &[&z], true, false)[0].reshape([3, -1]);
        Tensor::stack(&(0..g.size()[1]).map(row).collect::<Vec<_>>(), 1)
    }

    fn outer(s: &Tensor) -> Tensor {
        let s = s.reshape([3, -1]);
        s.unsqueeze(2) * s.unsqueeze(1)
    }

    #[test]
    fn roots_make_the_hessian_of_the_output() {
        for output in outputs() {
            let sum = (0..output.columns()).map(|c| outer(&output.root(c).unwrap())).reduce(|a, b| a + b).unwrap();
            let error = (sum - hessian(&output)).abs().max().double_value(&[]);
            assert!(error < 1e-15, "{output:?}: {error}");
        }
    }

    /// Probabilities that underflow have no part in it, instead of making it NaN.
    #[test]
    fn roots_of_certain_predictions_are_zero() {
        let z = Tensor::from_slice(&[0.0f32, 3e4, -3e4, 9e4]).repeat([3, 1]);
        for order in [[0i64, 1, 2, 3], [3, 2, 1, 0], [1, 3, 0, 2]] {
            let z = z.index_select(1, &Tensor::from_slice(&order));
            let output = Outputs::as_is(Likelihood::Categorical, &z).unwrap();
            for c in 0..output.columns() {
                assert_eq!(output.root(c).unwrap().abs().max().double_value(&[]), 0.0);
            }
        }
    }

    /// 10⁴ draws; 4.5 standard errors for each of at most 48 elements (4e-4).
    #[test]
    fn sampled_roots_make_it_on_average() {
        for (i, output) in outputs().into_iter().enumerate() {
            tch::manual_seed(i as i64);
            let k = 10_000;
            let draw = |_| outer(&output.sampled(&output.z.randn_like()).unwrap());
            let all = Tensor::stack(&(0..k).map(draw).collect::<Vec<_>>(), 0);
            let error = all.std_dim(0, true, false) / f64::from(k).sqrt() + 1e-12;
            let z = ((all.mean_dim(0, false, None::<Kind>) - hessian(&output)) / error).abs().max().double_value(&[]);
            assert!(z < 4.5, "{output:?}: {z}");
        }
    }

    #[test]
    fn losses_are_those_of_libtorch_and_are_noted() {
        let z = outputs().remove(0).z.set_requires_grad(true);
        let y = Tensor::from_slice(&[2i64, 0, 3]);
        let (ours, tape) = Tape::record(|| cross_entropy(&z, &y).unwrap());
        assert_eq!(tape.noted().len(), 1);
        let error = |a: &Tensor, b: &Tensor| (a - b).abs().max().double_value(&[]);
        assert!(error(&ours.mean(Kind::Double), &z.log_softmax(-1, Kind::Double).nll_loss(&y)) < 1e-15);
        let half = (z.detach() + 1.0) * 0.5;
        let by_hand: Tensor = -(&half * z.sigmoid().log() + (&half - 1.0) * -(-z.sigmoid() + 1.0).log());
        let sum = |t: Tensor| t.sum_dim_intlist(1, false, None::<Kind>);
        assert!(error(&binary_cross_entropy(&z, &half).unwrap(), &sum(by_hand)) < 1e-14);
        assert!(error(&squared_error(&z, &half, 4.0).unwrap(), &sum((&z - &half).square() / 8.0)) < 1e-15);
    }

    /// As tch's own with `ignore_index`; and nothing else is handed out than what is on the tape.
    #[test]
    fn labels_to_ignore_have_no_loss() {
        let z = outputs().remove(0).z.set_requires_grad(true);
        let y = Tensor::from_slice(&[2i64, -100, 3]);
        let (mut losses, tape) = Tape::record(|| cross_entropy(&z, &y).unwrap());
        let kept = losses.sum(Kind::Double) / 2.0;
        let expected = z.cross_entropy_loss(&y, None::<&Tensor>, Reduction::Mean, -100, 0.0);
        assert!((kept - expected).abs().double_value(&[]) < 1e-15);
        assert_eq!(losses.double_value(&[1]), 0.0);
        let counted = tape.noted()[0].counted.as_ref().unwrap();
        assert_eq!(Vec::<bool>::try_from(counted).unwrap(), [true, false, true]);
        // In place: what was noted still stands for the losses as they were.
        let halved = losses.g_mul_scalar_(0.5).sum(Kind::Double);
        let w = &Tensor::run_backward(&[halved], &[&tape.noted()[0].losses], false, false)[0];
        assert_eq!(Vec::<f64>::try_from(w).unwrap(), [0.5; 3]);
        // A loss that has no graph is on no tape.
        let (_, tape) = Tape::record(|| {
            _ = tch::no_grad(|| cross_entropy(&z, &y));
            _ = cross_entropy(&z.detach(), &y);
            squared_error(&z.detach(), &z, 1.0).unwrap()
        });
        assert!(tape.noted().is_empty());
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let z = |shape: &[i64]| Tensor::zeros(shape, (Kind::Double, Device::Cpu));
        let y = Tensor::zeros([3], (Kind::Int64, Device::Cpu));
        assert!(cross_entropy(&z(&[3, 2]), &z(&[3])).unwrap_err().to_string().contains("Int64"));
        assert!(cross_entropy(&z(&[2, 2]), &y).unwrap_err().to_string().contains("[2, 2]"));
        assert!(cross_entropy(&z(&[3, 2, 2]), &y).is_err());
        for label in [-1i64, 2, -101, i64::MAX] {
            let y = Tensor::from_slice(&[0, -100, label]);
            let e = cross_entropy(&z(&[3, 2]), &y).unwrap_err().to_string();
            assert!(e.contains("example 2") && e.contains(&label.to_string()) && e.contains("0 to 1"), "{e}");
        }
        assert!(binary_cross_entropy(&z(&[3]), &z(&[3, 1])).unwrap_err().to_string().contains("[3, 1]"));
        assert!(squared_error(&z(&[3, 1]), &z(&[3]), 1.0).is_err());
        assert!(squared_error(&z(&[3]), &z(&[3]), 0.0).unwrap_err().to_string().contains("`variance`"));
        assert!(squared_error(&y, &y, 1.0).is_err());
    }
}

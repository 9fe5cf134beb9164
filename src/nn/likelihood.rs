//! Losses that say which likelihood they come from, so that the Hessian with respect to the model's output is known.

use super::tape::{self, Output};
use crate::{Error, Result};
use tch::{Kind, Reduction, Tensor};

/// p(y | z) of a model's output z, one row per example.
///
/// Its negative logarithm is the loss of [`cross_entropy`], [`binary_cross_entropy`] or [`squared_error`].
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub enum Likelihood {
    /// p(y) = softmax(z)ᵧ over the columns of logits `[B, C]`, C ≥ 2.
    Categorical,
    /// p(y=1) = sigmoid(z), each logit of `[B]` or `[B, D]` on its own.
    Bernoulli,
    /// y ~ N(z, variance·I), for outputs `[B]` or `[B, D]`.
    Gaussian {
        /// σ² > 0 of the noise, in the square of the output's unit.
        variance: f64,
    },
}

/// Losses -ln softmax(z)ᵧ `[B]` of logits z `[B, C]` and classes y `[B]` (`i64`), as tch's `cross_entropy_for_logits`
/// before the mean is taken, but in the kind of the logits instead of f32.
///
/// The losses of this module are for rows with the generalized Gauss-Newton matrix ([`VonCurvature::GgnExact`] and
/// [`VonCurvature::GgnMonteCarlo`]), which need the model's output beside the loss; any other row takes them as well.
/// What else the closure adds to the loss counts for the gradient and not for the curvature.
///
/// [`VonCurvature::GgnExact`]: crate::VonCurvature::GgnExact
/// [`VonCurvature::GgnMonteCarlo`]: crate::VonCurvature::GgnMonteCarlo
///
/// # Errors
/// Other shapes or kinds.
pub fn cross_entropy(logits: &Tensor, targets: &Tensor) -> Result<Tensor> {
    let fits = matches!(logits.size()[..], [b, _] if targets.size() == [b]) && targets.kind() == Kind::Int64;
    check(fits, logits, targets, "logits [B, C] and classes [B] of kind Int64")?;
    let losses = logits.f_cross_entropy_loss(targets, None::<&Tensor>, Reduction::None, -100, 0.0)?;
    tape::note_output(logits, Likelihood::Categorical);
    Ok(losses)
}

/// Losses Σ -ln p(y) `[B]` of logits z `[B]` or `[B, D]` and targets y in [0, 1] of the same shape, p = sigmoid(z), summed
/// over the columns. For the rest see [`cross_entropy`].
///
/// # Errors
/// Other shapes or kinds.
pub fn binary_cross_entropy(logits: &Tensor, targets: &Tensor) -> Result<Tensor> {
    check(same(logits, targets), logits, targets, "logits and targets of one shape, [B] or [B, D]")?;
    let each = logits.f_binary_cross_entropy_with_logits(
        &targets.f_to_kind(logits.kind())?,
        None::<&Tensor>,
        None::<&Tensor>,
        Reduction::None,
    )?;
    tape::note_output(logits, Likelihood::Bernoulli);
    rows(&each)
}

/// Losses |z - y|²/(2σ²) `[B]` of outputs z `[B]` or `[B, D]` and targets y of the same shape, with σ² = `variance` > 0,
/// the variance of the noise. For the rest see [`cross_entropy`].
///
/// # Errors
/// Other shapes or kinds, a variance that is not finite and positive.
pub fn squared_error(outputs: &Tensor, targets: &Tensor, variance: f64) -> Result<Tensor> {
    crate::check::positive("variance", variance)?;
    check(same(outputs, targets), outputs, targets, "outputs and targets of one shape, [B] or [B, D]")?;
    let each = (outputs - targets).f_square()?.f_mul_scalar(0.5 / variance)?;
    tape::note_output(outputs, Likelihood::Gaussian { variance });
    rows(&each)
}

fn check(fits: bool, outputs: &Tensor, targets: &Tensor, expected: &str) -> Result<()> {
    if fits && outputs.is_floating_point() {
        return Ok(());
    }
    let form = |t: &Tensor| format!("{:?} {:?}", t.kind(), t.size());
    Err(Error::Loss(format!(
        "the outputs are {} and the targets {}: expected {expected}",
        form(outputs),
        form(targets)
    )))
}

fn same(outputs: &Tensor, targets: &Tensor) -> bool {
    outputs.size() == targets.size() && matches!(outputs.dim(), 1 | 2)
}

/// `[B]`
fn rows(each: &Tensor) -> Result<Tensor> {
    Ok(each.f_reshape([each.size()[0], -1])?.f_sum_dim_intlist(1, false, None::<Kind>)?)
}

impl Output {
    /// Number of vectors s_c with Σ_c s_c s_cᵀ = Λ, the Hessian of an example's loss with respect to its output.
    pub(crate) fn columns(&self) -> i64 {
        let columns = self.z.size().get(1).copied().unwrap_or(1);
        // Adding a constant to all logits changes nothing, so that Λ of the softmax has one rank less.
        columns - i64::from(matches!(self.likelihood, Likelihood::Categorical))
    }

    /// s_c of every example, in the shape of z.
    ///
    /// Λ is diag(p(1-p)) of sigmoids and I/σ² of a Gaussian. For the softmax it is diag(p) - ppᵀ, and s_c a column of its
    /// Cholesky factor: class c against those after it, whose probabilities add up to q,
    ///
    /// ```text
    /// s_c = √(p_c q / (p_c + q)) (e_c - p_after/q)
    /// ```
    ///
    /// which subtracts no numbers that are close to each other.
    pub(crate) fn root(&self, c: i64) -> Result<Tensor> {
        let z = self.z.detach();
        let z = if z.dim() == 1 { z.f_unsqueeze(1)? } else { z };
        let unit = z.f_zeros_like()?;
        _ = unit.f_narrow(1, c, 1)?.f_fill_(1.0)?;
        let s = match self.likelihood {
            Likelihood::Categorical => {
                let p = z.f_softmax(1, None::<Kind>)?;
                let (one, after) = (p.f_narrow(1, c, 1)?, p.f_narrow(1, c + 1, p.size()[1] - c - 1)?);
                let q = after.f_sum_dim_intlist(1, true, None::<Kind>)?;
                // Classes of no probability at all have no part in it.
                let shares = (&after / &q).f_masked_fill(&q.f_eq(0.0)?, 0.0)?;
                let both = &one + &q;
                let size = (&one * &q / &both).f_masked_fill(&both.f_eq(0.0)?, 0.0)?.f_sqrt()?;
                unit.f_narrow(1, c + 1, after.size()[1])?.f_copy_(&-shares)?;
                unit * size
            }
            Likelihood::Bernoulli => unit * deviation(&z)?,
            Likelihood::Gaussian { variance } => unit / variance.sqrt(),
        };
        Ok(s.f_reshape(self.z.size())?)
    }

    /// ∂ℓᵢ/∂zᵢ for the labels of the data, as probabilities (the softmax; sigmoids) or values in the shape of z.
    pub(crate) fn residual(&self, targets: &Tensor) -> Result<Tensor> {
        let z = self.z.detach();
        Ok(match self.likelihood {
            Likelihood::Categorical => z.f_softmax(1, None::<Kind>)?.f_sub(targets)?,
            Likelihood::Bernoulli => z.f_sigmoid()?.f_sub(targets)?,
            Likelihood::Gaussian { variance } => z.f_sub(targets)?.f_div_scalar(variance)?,
        })
    }

    /// One random s of every example with E\[ssᵀ\] = Λ, from standard normals in the shape of z: p - e_ŷ with ŷ ~ p of the
    /// softmax, else the columns of Λ^½ with random signs.
    pub(crate) fn sampled(&self, normals: &Tensor) -> Result<Tensor> {
        let z = self.z.detach();
        let signs = || Ok::<_, Error>(normals.f_ge(0.0)?.f_to_kind(z.kind())? * 2.0 - 1.0);
        match self.likelihood {
            Likelihood::Categorical => {
                let p = z.f_softmax(1, None::<Kind>)?;
                // ŷ is the number of classes whose cumulated probability is below u = Φ(normal).
                let u = (normals.f_narrow(1, 0, 1)? / 2f64.sqrt()).f_erf()? * 0.5 + 0.5;
                let below = p.f_cumsum(1, Kind::Double)?.f_lt_tensor(&u)?;
                let label = below.f_sum_dim_intlist(1, true, Kind::Int64)?.f_clamp_max(p.size()[1] - 1)?;
                let one = p.f_zeros_like()?.f_scatter_value(1, &label, 1.0)?;
                Ok(p - one)
            }
            Likelihood::Bernoulli => Ok(signs()? * deviation(&z)?),
            Likelihood::Gaussian { variance } => Ok(signs()? / variance.sqrt()),
        }
    }
}

/// √(p(1-p))
fn deviation(z: &Tensor) -> Result<Tensor> {
    let p = z.f_sigmoid()?;
    Ok(p.f_mul(&p.f_neg()?.f_add_scalar(1.0)?)?.f_sqrt()?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::tape::Tape;
    use tch::Device;

    fn outputs() -> Vec<Output> {
        let z = |shape: &[i64]| {
            (Tensor::arange(shape.iter().product::<i64>(), (Kind::Double, Device::Cpu)) * 1.7).sin().reshape(shape)
        };
        let of = |likelihood, shape: &[i64]| Output { z: z(shape), likelihood };
        vec![
            of(Likelihood::Categorical, &[3, 4]),
            of(Likelihood::Bernoulli, &[3, 2]),
            of(Likelihood::Bernoulli, &[3]),
            of(Likelihood::Gaussian { variance: 4.0 }, &[3, 2]),
            of(Likelihood::Gaussian { variance: 4.0 }, &[3]),
        ]
    }

    /// Hessian of each example's loss with respect to its output `[B, D, D]`, by differentiating the losses twice.
    fn hessian(output: &Output) -> Tensor {
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
            let output = Output { z, likelihood: Likelihood::Categorical };
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
        assert_eq!(tape.outputs().len(), 1);
        let error = |a: &Tensor, b: &Tensor| (a - b).abs().max().double_value(&[]);
        assert!(error(&ours.mean(Kind::Double), &z.log_softmax(-1, Kind::Double).nll_loss(&y)) < 1e-15);
        let half = (z.detach() + 1.0) * 0.5;
        let by_hand: Tensor = -(&half * z.sigmoid().log() + (&half - 1.0) * -(-z.sigmoid() + 1.0).log());
        let sum = |t: Tensor| t.sum_dim_intlist(1, false, None::<Kind>);
        assert!(error(&binary_cross_entropy(&z, &half).unwrap(), &sum(by_hand)) < 1e-14);
        assert!(error(&squared_error(&z, &half, 4.0).unwrap(), &sum((&z - &half).square() / 8.0)) < 1e-15);
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let z = |shape: &[i64]| Tensor::zeros(shape, (Kind::Double, Device::Cpu));
        let y = Tensor::zeros([3], (Kind::Int64, Device::Cpu));
        assert!(cross_entropy(&z(&[3, 2]), &z(&[3])).unwrap_err().to_string().contains("Int64"));
        assert!(cross_entropy(&z(&[2, 2]), &y).unwrap_err().to_string().contains("[2, 2]"));
        assert!(cross_entropy(&z(&[3, 2, 2]), &y).is_err());
        assert!(binary_cross_entropy(&z(&[3]), &z(&[3, 1])).unwrap_err().to_string().contains("[3, 1]"));
        assert!(squared_error(&z(&[3, 1]), &z(&[3]), 1.0).is_err());
        assert!(squared_error(&z(&[3]), &z(&[3]), 0.0).unwrap_err().to_string().contains("`variance`"));
        assert!(squared_error(&y, &y, 1.0).is_err());
    }
}

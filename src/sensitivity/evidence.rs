//! What a dual view says about its fit as a whole: how likely the data are under its prior, and how far it is from the
//! optimum.

use super::DualView;
use super::dual::pull;
use super::site::number;
use crate::{Result, linalg};
use tch::{Device, Kind, Tensor};

impl DualView {
    /// ln p(y) of Laplace's approximation with the Gauss-Newton matrix, in nats, computed with the weights (P²NC):
    ///
    /// ```text
    /// -Σℓᵢ(fᵢ) - ½δ‖θ‖² - ½ ln det(S/δ)
    /// ```
    ///
    /// at the optimum, for any likelihood; the δ, σ² or features with the highest one are a good choice (MacKay 1992,
    /// *Bayesian Interpolation*; Khan et al. 2019, DNN2GP). Weights off the optimum are allowed: each loss counts as
    /// the parabola that it is to second order, and the integral over all weights is that of the parabolas, with the
    /// maximum m of the integrand
    ///
    /// ```text
    /// m = θ + S⁻¹(Σ Jᵢᵀαᵢ - δθ)     dᵢ = Jᵢ(m - θ)
    /// Σ (-ℓᵢ + αᵢᵀdᵢ - ½dᵢᵀΛᵢdᵢ) - ½δ‖m‖² - ½ ln det(S/δ)
    /// ```
    ///
    /// For a Gaussian the losses are parabolas, and it is ln p(y) for any θ. With one logit it is the density ln N(ỹ |
    /// 0, K + 1/β) of the process's targets ỹ = Jθ + α/β but for a term of each example, ½α²/β + ½ ln(2π/β) - ℓ; with
    /// Λ⁻¹, of which a softmax has none, that density would not be one.
    ///
    /// # Errors
    /// If libtorch fails.
    pub fn log_marginal_likelihood(&self) -> Result<f64> {
        let _no_grad = tch::no_grad_guard();
        let slope = pull(&self.jacobian, &self.sites.alpha)? - &self.weights * self.delta;
        let step = linalg::solve(&self.factor, &slope)?;
        let square = self.delta * number(&(&self.weights + &step).f_square()?)?;
        // ln det(S/δ) as a difference of logarithms: the determinants themselves over- and underflow.
        let volume = linalg::log_det(&self.factor) - step.numel() as f64 * self.delta.ln();
        self.evidence(&self.jacobian.f_matmul(&step)?, square, volume)
    }

    /// The same number by the kernel ((NC)³), without the weights: with K = JJᵀ/δ of all outputs of all examples, the
    /// block-diagonal Λ = RRᵀ, and f = Jθ
    ///
    /// ```text
    /// det(S/δ) = det(I + RᵀKR)     γ = α + R(I + RᵀKR)⁻¹Rᵀ(f - Kα)     d = Kγ - f     δ‖m‖² = γᵀKγ
    /// ```
    ///
    /// # Errors
    /// [`Error::Memory`](crate::Error::Memory) if K would be too large to be meant.
    pub fn log_marginal_likelihood_of_kernel(&self) -> Result<f64> {
        let _no_grad = tch::no_grad_guard();
        let (n, c) = (self.sites.len(), self.sites.columns());
        let rows = self.jacobian.f_flatten(0, 1)?;
        let k = self.gram(&rows, &rows)?;
        let root = &self.sites.root;
        let (rank, ranks) = (root.size()[2], n * root.size()[2]);
        // RᵀX for all examples at once, R being block-diagonal.
        let scaled = |x: &Tensor, columns: i64| {
            let each = root.f_transpose(1, 2)?.f_bmm(&x.f_reshape([n, c, columns])?)?;
            Ok::<_, crate::Error>(each.f_reshape([ranks, columns])?)
        };
        let both = scaled(&scaled(&k, n * c)?.f_tr()?, ranks)?;
        // I + RᵀKR is at least I, so this needs no jitter, even where K is singular.
        let noise = Tensor::f_eye(ranks, (Kind::Double, Device::Cpu))?;
        let factor = linalg::cholesky("the kernel with the noise", &linalg::symmetric(&(both + noise))?)?;
        let (f, alpha) = (self.jacobian.f_matmul(&self.weights)?.f_reshape([-1])?, self.sites.alpha.f_reshape([-1])?);
        let off = scaled(&(&f - k.f_mv(&alpha)?), 1)?.f_squeeze_dim(1)?;
        let correction = root.f_bmm(&linalg::solve(&factor, &off)?.f_reshape([n, rank, 1])?)?;
        let gamma = alpha + correction.f_reshape([-1])?;
        let best = k.f_mv(&gamma)?;
        let square = gamma.f_dot(&best)?.double_value(&[]);
        self.evidence(&(best - f), square, linalg::log_det(&factor))
    }

    /// Of the move d of the outputs to the maximum, δ‖m‖² there, and ln det(S/δ).
    fn evidence(&self, d: &Tensor, square: f64, volume: f64) -> Result<f64> {
        Ok(self.sites.gain(d)? - number(&self.sites.losses)? - 0.5 * (square + volume))
    }

    /// P(θ) - D(α) ≥ 0, in nats; 0 at the optimum only. With the conjugate ℓ* of each loss
    ///
    /// ```text
    /// P(θ) = Σℓᵢ(fᵢ) + ½δ‖θ‖²          D(α) = -Σℓᵢ*(-αᵢ) - ‖Σ Jᵢᵀαᵢ‖²/(2δ)
    /// ```
    ///
    /// where -ℓ*(-α) is the entropy of the prediction y - α for logistic losses and the softmax, and αᵀy - ½σ²‖α‖² for
    /// squares. So it bounds how far P(θ) is above its minimum. Both are of the model f = Jθ that is linear in its
    /// weights.
    ///
    /// # Errors
    /// If libtorch fails.
    pub fn duality_gap(&self) -> Result<f64> {
        let _no_grad = tch::no_grad_guard();
        let sum = self.sites.conjugate_sum(&self.jacobian.f_matmul(&self.weights)?)?;
        let primal = 0.5 * self.delta * number(&self.weights.f_square()?)?;
        let dual = number(&pull(&self.jacobian, &self.sites.alpha)?.f_square()?)? * 0.5 / self.delta;
        Ok(sum + primal + dual)
    }
}

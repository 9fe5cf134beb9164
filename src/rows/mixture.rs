//! A mixture of Gaussians, learned together: one variable's components move in one step, each by its own samples.
//!
//! Not a row of the driver, whose variables hold a single mean.

use crate::kernel::{self, Draw};
use crate::{DiagonalGaussian, Error, Expectation, Mixture, Result, check};
use tch::{Device, Kind, Tensor};

/// Natural-gradient variational inference with a mixture of K diagonal Gaussians, for functions of few weights.
///
/// Row of the table: mixture of Gaussians; with [`Expectation::Delta`] multimodal optimization. Each component follows
/// the derivatives of b = ℓ + ln q at its own samples, which push it downhill and away from the others:
///
/// ```text
/// q(θ) = Σ_c π_c N(θ | m_c, 1/s_c)           b(θ) = ℓ(θ) + ln q(θ),  ℓ = -ln p(data, θ): a sum, not a mean
/// G_c = E_c[∇²b],  g_c = E_c[∇b],  b_c = E_c[b]     over N(m_c, 1/s_c); of ∇² the diagonal
/// m_c ← m_c - ρ g_c/s_c
/// s_c ← s_c + ρ G_c + ½ ρ² G_c²/s_c          which stays above half of s_c
/// ln π_c ← ln π_c - ρ_π b_c + constant       so that Σ π_c = 1
/// ```
///
/// E_c is taken at m_c ([`Expectation::Delta`]), at samples of each component, or at nodes that the caller gives
/// ([`MixtureOfGaussians::step_at`]). A stationary point of exact expectations is one of E_q\[b\], the negative
/// evidence lower bound. The Hessian is exact, by one backward pass per weight.
///
/// ```
/// use tch::{Kind, Tensor};
/// use tch_blr::{Expectation, MixtureOfGaussians};
/// # fn main() -> tch_blr::Result<()> {
/// // (θ²-1)² has two minima, at -1 and 1; a row for each θ.
/// let well = |theta: &Tensor| (theta.square() - 1.0).square().sum_dim_intlist(1, false, None::<Kind>) * 10.0;
/// let start = Tensor::from_slice(&[-0.5, 0.5]).reshape([2, 1]);
/// let mut q = MixtureOfGaussians::new(&start, 10.0)?.expectation(Expectation::Delta);
/// for _ in 0..200 {
///     q.step(well)?;
/// }
/// let modes = q.means();
/// assert!((modes.double_value(&[0, 0]) + 1.0).abs() < 1e-6 && (modes.double_value(&[1, 0]) - 1.0).abs() < 1e-6);
/// # Ok(())
/// # }
/// ```
///
/// It is not driven by [`Optimizer`](crate::Optimizer), whose variables hold one mean: a step here evaluates the loss
/// around K means.
///
/// Sources: Lin, Khan and Schmidt, *Fast and Simple Natural-Gradient Variational Inference with Mixture of
/// Exponential-family Approximations* (ICML 2019), which samples from q, while this samples from each component (the
/// expectations are the same); Lin, Schmidt and Khan (ICML 2020) for the precision; Khan and Rue (2023), section 3.2.
#[derive(Debug)]
pub struct MixtureOfGaussians {
    lr: f64,
    weight_lr: f64,
    expectation: Expectation,
    seed: u64,
    steps: u64,
    /// `[K, d]`, f64
    mean: Tensor,
    /// `[K, d]`, f64
    precision: Tensor,
    /// `[K]`, f64
    log_weight: Tensor,
}

impl MixtureOfGaussians {
    /// Components at these means (`[K, d]`, copied), of one precision > 0 and equal weights. ρ = 0.1, ρ_π = 0.1, ten
    /// samples per component and step, seed 0.
    ///
    /// # Errors
    /// Means of another shape or not finite, a precision out of range.
    pub fn new(means: &Tensor, precision: f64) -> Result<Self> {
        check::positive("precision", precision)?;
        let size = means.size();
        if size.len() != 2 || means.numel() == 0 {
            return Err(Error::Posterior(format!("the means have shape {size:?}: expected [components, weights]")));
        }
        let mean = means.detach().to_device(Device::Cpu).to_kind(Kind::Double).copy();
        if let Some(value) = kernel::first_non_finite(&mean) {
            return Err(Error::Posterior(format!("a mean is not finite ({value})")));
        }
        let log_weight = Tensor::full([size[0]], -(size[0] as f64).ln(), (Kind::Double, Device::Cpu));
        let expectation = Expectation::MonteCarlo { samples: 10 };
        let precision = mean.full_like(precision);
        Ok(MixtureOfGaussians { lr: 0.1, weight_lr: 0.1, expectation, seed: 0, steps: 0, mean, precision, log_weight })
    }

    /// ρ ≥ 0, step size of means and precisions; default 0.1.
    #[must_use]
    pub fn lr(mut self, lr: f64) -> Self {
        self.lr = lr;
        self
    }

    /// ρ_π ≥ 0, step size of the weights; default 0.1. Zero keeps them.
    #[must_use]
    pub fn weight_lr(mut self, lr: f64) -> Self {
        self.weight_lr = lr;
        self
    }

    /// Where each component's expectations are taken; default ten samples.
    #[must_use]
    pub fn expectation(mut self, expectation: Expectation) -> Self {
        self.expectation = expectation;
        self
    }

    /// Seed of the samples; default 0.
    #[must_use]
    pub fn seed(mut self, seed: u64) -> Self {
        self.seed = seed;
        self
    }

    /// m_c, `[K, d]` in f64.
    pub fn means(&self) -> Tensor {
        self.mean.copy()
    }

    /// s_c, `[K, d]` in f64.
    pub fn precisions(&self) -> Tensor {
        self.precision.copy()
    }

    /// π_c, `[K]` in f64.
    pub fn weights(&self) -> Tensor {
        self.log_weight.exp()
    }

    /// The mixture over one parameter, named `name`, of shape `[d]`.
    ///
    /// # Errors
    /// A weight that has become zero.
    pub fn posterior(&self, name: &str) -> Result<Mixture> {
        let weights = Vec::<f64>::try_from(self.weights())?;
        let components = weights.into_iter().enumerate().map(|(c, weight)| {
            let row = |t: &Tensor| t.get(c as i64);
            Ok((weight, DiagonalGaussian::new([(name, row(&self.mean), row(&self.precision))])?))
        });
        Mixture::new(components.collect::<Result<Vec<_>>>()?)
    }

    /// ln q at points `[n, d]`.
    fn log_density(&self, theta: &Tensor) -> Tensor {
        let distance = (theta.unsqueeze(1) - &self.mean).square() * &self.precision;
        let normal = (self.precision.log() - std::f64::consts::TAU.ln() - distance) * 0.5;
        (normal.sum_dim_intlist(2, false, None::<Kind>) + &self.log_weight).logsumexp(1, false)
    }

    /// One step: `loss` maps points `[n, d]` (f64, on the CPU) to ℓ of each, `[n]`. Returns E_q\[b\] as estimated
    /// before the step: the negative evidence lower bound, in nats.
    ///
    /// # Errors
    /// A step size or expectation out of range (an adversarial one is: there is no ascent), a loss of another shape or
    /// without a graph, a loss or derivative that is not finite. Nothing has changed then.
    pub fn step(&mut self, loss: impl FnOnce(&Tensor) -> Tensor) -> Result<f64> {
        self.expectation.validate()?;
        let expected = "Delta, MonteCarlo or Antithetic: a mixture has no adversarial point";
        check::that("expectation", self.expectation, !self.expectation.is_adversarial(), expected)?;
        let size = self.mean.size();
        let one = Tensor::zeros([1, size[0], size[1]], (Kind::Double, Device::Cpu));
        let evaluations = self.expectation.evaluations();
        let nodes: Vec<Tensor> = (0..evaluations)
            .map(|k| match self.expectation.draw(k) {
                None => Ok(one.copy()),
                Some((sample, sign)) => {
                    let at = Draw { step: self.steps, sample, parameter: 0, group: 0 };
                    Ok(kernel::normals(self.seed, at, &one)? * sign)
                }
            })
            .collect::<Result<_>>()?;
        let share = Tensor::full([evaluations as i64], 1.0 / evaluations as f64, (Kind::Double, Device::Cpu));
        self.follow(loss, &Tensor::cat(&nodes, 0), &share)
    }

    /// As [`MixtureOfGaussians::step`] with expectations over N(0, 1)ᵈ by quadrature: nodes z `[n, d]` and their shares
    /// `[n]`, of sum 1.
    ///
    /// # Errors
    /// As [`MixtureOfGaussians::step`], and nodes of another shape.
    pub fn step_at(&mut self, loss: impl FnOnce(&Tensor) -> Tensor, z: &Tensor, share: &Tensor) -> Result<f64> {
        let size = self.mean.size();
        let (z, share) = (z.to_kind(Kind::Double), share.to_kind(Kind::Double));
        if z.dim() != 2 || z.size()[1] != size[1] || share.size() != z.size()[..1] {
            let (z, share, d) = (z.size(), share.size(), size[1]);
            return Err(Error::Posterior(format!("nodes {z:?} with shares {share:?}: expected [n, {d}] and [n]")));
        }
        self.follow(loss, &z.unsqueeze(1).expand([-1, size[0], -1], false), &share)
    }

    /// z `[n, K, d]`, share `[n]`
    fn follow(&mut self, loss: impl FnOnce(&Tensor) -> Tensor, z: &Tensor, share: &Tensor) -> Result<f64> {
        check::non_negative("lr", self.lr)?;
        check::non_negative("weight_lr", self.weight_lr)?;
        let (points, weights) = (z.size(), self.mean.size()[1]);
        let theta = (&self.mean + z / self.precision.sqrt()).reshape([-1, weights]).set_requires_grad(true);
        let l = loss(&theta);
        let n = theta.size()[0];
        if !l.defined() || l.size() != [n] || !l.requires_grad() {
            let form = if l.defined() { format!("{:?}", l.size()) } else { "undefined".to_owned() };
            return Err(Error::Loss(format!("it is {form} for {n} points: expected [{n}], with a graph")));
        }
        let b = l.to_kind(Kind::Double) + self.log_density(&theta);
        let backward = |y: &Tensor| -> Result<Tensor> {
            // Points do not interact, so one pass for their sum gives the derivatives at each.
            let total = y.sum(Kind::Double);
            if !total.requires_grad() {
                return Ok(theta.detach().zeros_like());
            }
            // Twice differentiable, and kept, because the Hessian takes another pass per weight.
            let found = Tensor::f_run_backward(&[&total], &[&theta], true, true)?;
            Ok(found.into_iter().next().filter(Tensor::defined).unwrap_or_else(|| theta.detach().zeros_like()))
        };
        let gradient = backward(&b)?;
        let hessian: Vec<Tensor> =
            (0..weights).map(|j| Ok(backward(&gradient.select(1, j))?.select(1, j).detach())).collect::<Result<_>>()?;
        let _no_grad = tch::no_grad_guard();
        // E_c, over the nodes of each component.
        let expect = |x: &Tensor| {
            let x = x.detach().reshape(points.as_slice());
            (x * share.reshape([-1, 1, 1])).sum_dim_intlist(0, false, None::<Kind>)
        };
        let (g, h) = (expect(&gradient), expect(&Tensor::stack(&hessian, 1)));
        let b =
            (b.detach().reshape([points[0], points[1]]) * share.unsqueeze(1)).sum_dim_intlist(0, false, None::<Kind>);
        let objective = (self.weights() * &b).sum(Kind::Double).double_value(&[]);
        if !objective.is_finite() {
            return Err(Error::NonFiniteLoss { value: objective, step: self.steps });
        }
        for (what, t) in [("gradient", &g), ("Hessian", &h)] {
            if let Some(value) = kernel::first_non_finite(t) {
                return Err(Error::NonFiniteGradient { what, name: "theta".to_owned(), value, step: self.steps });
            }
        }
        // Everything is checked by now. The old precision divides, as published, so the mean comes first.
        self.mean = &self.mean - &g / &self.precision * self.lr;
        let change = h * self.lr;
        self.precision = &self.precision + &change + change.square() / &self.precision * 0.5;
        // Normalized as logarithms: a weight may be tiny, and must not underflow on its way.
        self.log_weight = (&self.log_weight - b * self.weight_lr).log_softmax(0, Kind::Double);
        self.steps += 1;
        Ok(objective)
    }
}

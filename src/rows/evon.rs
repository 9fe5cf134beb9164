//! EVON: variational online Newton in an eigenbasis.

use super::auto::{self, StepLength};
use super::common::{clipped, config, fields, filled, retracted_share, samples};
use super::eigenbasis::{EIGENBASIS, Eigenbasis, merged, rows};
use crate::driver::{Block, BlockRule, Blocks, Displaced, Evaluated, Learned, Row, Start, When, rms};
use crate::posterior::KroneckerGaussian;
use crate::prior::{BlockPrior, Family};
use crate::{Builder, Error, Expectation, Result, Statistic, check, linalg};
use tch::Tensor;

config! {
    /// Variational online Newton in the eigenbasis of a Kronecker-factored second moment of the gradients.
    ///
    /// Row of the table: Gaussian whose precision is diagonal in a Kronecker-factored basis, one matrix W `[r, c]` per
    /// parameter; [`Ivon`](crate::Ivon) is the case of the identity. A prime is a rotation into the basis,
    /// X' = Q_Lᵀ X Q_R:
    ///
    /// ```text
    /// e' ~ N(0, 1/(λ(h+δ)))               λ = ess
    /// G = ∇L(M + Q_L e' Q_Rᵀ)             averaged over samples
    /// f = e' G' λ(h+δ), limited to ±κ(h+δ)
    /// b ← β₁ b + (1-β₁) G
    /// h ← h + r(f-h) + ½ r²(f-h)²/(h+δ)   r = 1-β₂
    /// M ← M - α Q_L clip( (b'/(1-β₁ᵗ) + δM') / (h+δ), ±ξ ) Q_Rᵀ
    /// L ← β L + (1-β) GGᵀ,  R ← β R + (1-β) GᵀG
    /// Q_L, Q_R ← eigenvectors of L, R     after the first step, and every `frequency` steps
    /// ```
    ///
    /// GGᵀ and GᵀG are averaged over samples; L and R start at 0. The first step takes place in the identity
    /// basis, and no step uses a basis that has seen its gradient. With `max_growth` x, h+δ is at most x times what it
    /// was; with [`StepLength::Adam`] d, of the rotated gradient, takes the place of h+δ in M's step. h is not rotated
    /// when the basis turns. A parameter of fewer than two dimensions, and a side of more than `max_dim` rows, is not
    /// rotated. The posterior is the [`KroneckerGaussian`] with precision λ(h+δ) in the basis.
    ///
    /// Options of the published code, all off here, so that a step remains a Newton step ([`Evon::published`] has
    /// them):
    ///
    /// * [`whiten`](Evon::whiten): Q_L U Q_Rᵀ with U the clipped quotient becomes whiten(Q_L U Q_Rᵀ), of singular
    ///   values near 1, so that α is the length of a step in each singular direction, and of a vector's whole step;
    /// * [`phased`](Evon::phased): updates 1, 3, … of a parameter are *clean*: e' = 0 there, they add to L and R and
    ///   leave h; the others are *noisy*: they add to h and leave L and R. All move M and b;
    /// * [`merge_dims`](Evon::merge_dims), [`rotate_vectors`](Evon::rotate_vectors): which matrix a parameter is.
    ///
    /// With [`Expectation::Delta`] it is the limit λ = ∞: no noise, and
    ///
    /// ```text
    /// f = (G')²                           limited to κ(h+δ)
    /// h ← β₂ h + (1-β₂) f
    /// ```
    ///
    /// which is SOAP without the root. h is then no Hessian, so there is no posterior, and `ess` need not be set.
    ///
    /// This limit needs δ > 0, because h falls towards 0 where there is no gradient.
    ///
    /// Sources: EVON (arXiv:2606.23357); Vyas et al., *SOAP* (ICLR 2025) for the basis; Lin, Schmidt and Khan (ICML
    /// 2020) for the precision that stays positive.
    ///
    /// With a posterior as prior, δM is Δ(M-M₀) with Δ = P₀/λ, δ is the diagonal of Δ in the basis, h starts at 0
    /// (with `relative_noise` at that all the same) and the basis at the prior's. The gradient of the prior is exact;
    /// its curvature is so where the bases agree.
    pub struct Evon {
        /// Effective sample size λ > 0, usually the number of training examples (`docs/scales.md`). Must be set, except
        /// with [`Expectation::Delta`].
        ess: Option<f64> = None, via f64;
        /// δ = prior precision/λ ≥ 0: the prior is N(0, 1/(λδ)); default 1e-6.
        weight_decay: f64 = 1e-6;
        /// Initial Hessian h₀ > 0; default 1.
        hess_init: f64 = 1.0;
        /// β₁ in [0, 1), decay of the gradient average; default 0.95.
        beta1: f64 = 0.95;
        /// β₂ in [0, 1), decay of the Hessian average; default 0.9999.
        beta2: f64 = 0.9999;
        /// β in [0, 1), decay of L and R; default 0.95.
        beta_basis: f64 = 0.95;
        /// Steps between two turns of the basis, at least 1; default 10.
        frequency: u64 = 10;
        /// Sides with more rows are not rotated; default 10000.
        max_dim: i64 = 10_000;
        /// Whether neighbouring dimensions are multiplied, from the first on, as long as the product is at most
        /// `max_dim`; the matrix is that of the first product against all others. `[64, 3, 3, 3]` is `[64, 27]` for a
        /// `max_dim` below 192, `[576, 3]` from 576 on, and a single row of 1728 from 1728 on, whose n weights then
        /// have a full covariance, for n² numbers twice and n³ operations a turn: lower `max_dim` with it. Default off:
        /// the matrix of the rows.
        merge_dims: bool = false;
        /// Whether vectors are rotated, as a matrix of one row: all n weights together then have a full covariance, for
        /// n at most `max_dim`. Default off.
        rotate_vectors: bool = false;
        /// Where the expectations are evaluated: with samples, or at the mean, which is the limit λ = ∞; default one
        /// Monte-Carlo sample.
        expectation: Expectation = Expectation::MonteCarlo { samples: 1 };
        /// κ > 0, limit on the Hessian's estimate in units of h+δ, the published code's price clip: with r(1+κ) ≤ 1 and
        /// h ≥ 0, one step changes h+δ by a factor between φ(-r(1+κ)) and φ(rκ), φ(x) = 1+x+½x²; for δ = 0 at most
        /// φ(r(κ-1)). Default: none.
        hess_clip: Option<f64> = None, via f64;
        /// Clip radius ξ > 0 on the preconditioned step; default: none.
        clip_radius: Option<f64> = None, via f64;
        /// Divide the gradient average by 1-β₁ᵗ; default on.
        debias: bool = true;
        /// r > 0, in place of h₀: for each parameter, h₀ such that the noise 1/√(λh₀) is r · rms(w), as in
        /// [`Ivon`](crate::Ivon). Default: off.
        relative_noise: Option<f64> = None, via f64;
        /// Largest factor > 1 by which one step may raise a precision; default: none.
        max_growth: Option<f64> = None, via f64;
        /// Whether clean and noisy steps take turns, so that the basis sees gradients at the mean only. Use one sample:
        /// a clean step would evaluate the mean as often as there are samples. Default off.
        phased: bool = false;
        /// Whether the step's singular values, as those of the matrix of its rows, are brought near 1 (0.7 to 1.2,
        /// however small the gradient is), by five Newton-Schulz steps with Muon's coefficients, in the kind of the
        /// state (published: bfloat16). The step of a vector gets the length 1. Default off.
        whiten: bool = false;
        /// What divides the step of the mean; default [`StepLength::Newton`]. [`StepLength::Adam`] keeps its squares in
        /// the basis.
        step_length: StepLength = StepLength::Newton;
    }
}

impl Evon {
    /// EVON where `lr` means what Adam's does and nothing else has to be found: [`Ivon::auto`](crate::Ivon::auto), in
    /// the eigenbasis. `ess` is the number of training examples, `steps` the number of updates planned.
    pub fn auto(ess: f64, steps: u64) -> Builder<Self> {
        auto::settings!(Evon::default(), ess, steps).max_growth(2.0).schedule(auto::schedule(steps))
    }
}

impl Evon {
    /// The settings of the language model of 768 units in the authors' code, but for `ess`, which is yours (theirs:
    /// 5.266e6): whitened, phased, κ = 1.5, β₁ = 0.943, β₂ = 1-9.12e-4, β = 0.995, h₀ = 0.582, δ = 1e-6; their learning
    /// rate was 0.01724, falling linearly to 0.
    ///
    /// Leave 1-D parameters, embedding and head to another optimizer, and give this one the matrices with
    /// [`Params::only`](crate::Params::only): whitening moves each vector, a bias as well as a norm's gain, by the
    /// length α in every step. What differs from that code: `docs/table.md`. Source: the code released
    /// with arXiv:2606.23357.
    pub fn published() -> Self {
        let averages = Evon::default().beta1(0.943).beta2(1.0 - 9.12e-4).beta_basis(0.995);
        averages.hess_init(0.582).weight_decay(1e-6).hess_clip(1.5).phased(true).whiten(true)
    }

    /// Errors unless there are samples with an ess, or neither and nothing that needs them, and a divisor.
    fn check_limit(&self) -> Result<()> {
        if let Some(ess) = self.ess {
            let finite = ess.is_finite() && ess > 0.0;
            check::that("ess", ess, finite, "a finite number > 0; the limit of ∞ is .expectation(Expectation::Delta)")?;
        }
        if !self.is_deterministic() {
            check::ess(self.ess)?;
            return self.expectation.check_sampled();
        }
        let delta = self.weight_decay;
        check::that("weight_decay", delta, delta > 0.0, "a number > 0 with Expectation::Delta, whose h may fall to 0")?;
        check::that("phased", self.phased, !self.phased, "false with Expectation::Delta, which has no noisy steps")?;
        let relative = self.relative_noise;
        check::that("relative_noise", relative, relative.is_none(), "none with Expectation::Delta, which has no noise")
    }
    /// Whether it is the limit λ = ∞.
    fn is_deterministic(&self) -> bool {
        self.expectation == Expectation::Delta
    }
    /// λ of a row that `validate` has let pass.
    fn lambda(&self) -> f64 {
        self.ess.unwrap_or(f64::INFINITY)
    }
    /// Whether the evaluations of update t are noisy, and h learns from them.
    fn is_noisy(&self, t: u64) -> bool {
        !self.phased || t.is_multiple_of(2)
    }
    /// Whether L and R learn from the evaluations of update t.
    fn turns(&self, t: u64) -> bool {
        !self.phased || !t.is_multiple_of(2)
    }
    /// The matrix that a parameter of this shape is rotated as.
    fn matrix(&self, shape: &[i64]) -> Option<[i64; 2]> {
        let row = Some([1, shape.iter().product()]);
        match rows(shape) {
            None => row.filter(|_| self.rotate_vectors),
            Some(_) if self.merge_dims => merged(shape, self.max_dim).or(row),
            matrix => matrix,
        }
    }
}

/// As the matrix of its rows, or as a vector, whatever it is rotated as.
fn whitened(step: &Tensor) -> Result<Tensor> {
    let size = step.size();
    let matrix = rows(&size).map_or_else(|| Ok(step.shallow_clone()), |sides| step.f_reshape(sides))?;
    Ok(linalg::whitened(&matrix)?.f_reshape(size)?)
}

/// Where the basis starts among the state tensors.
const BASIS: usize = 3;

samples!(Evon);

impl Row for Evon {
    const NAME: &'static str = "evon";
    const STATE: &'static [&'static str] =
        &["momentum", "hess", "square", EIGENBASIS[0], EIGENBASIS[1], EIGENBASIS[2], EIGENBASIS[3]];
    type Arithmetic = Blocks;
    type Posterior = KroneckerGaussian;
    fields!(weight_decay ess expectation);

    fn validate(&self) -> Result<()> {
        self.check_limit()?;
        check::non_negative("weight_decay", self.weight_decay)?;
        check::positive("hess_init", self.hess_init)?;
        check::rate("beta1", self.beta1)?;
        check::rate("beta2", self.beta2)?;
        check::rate("beta_basis", self.beta_basis)?;
        check::count("frequency", self.frequency as usize)?;
        check::that("max_dim", self.max_dim, self.max_dim >= 0, "a number ≥ 0")?;
        self.hess_clip.map_or(Ok(()), |kappa| check::positive("hess_clip", kappa))?;
        self.max_growth.map_or(Ok(()), auto::check_growth)?;
        auto::validate(self.relative_noise, self.step_length)?;
        self.clip_radius.map_or(Ok(()), |xi| check::positive("clip_radius", xi))
    }
    fn initial_share(&self, t: u64) -> Option<f64> {
        let noisy = if self.phased { t / 2 } else { t };
        self.has_posterior().then(|| retracted_share(self.beta2, noisy))
    }
    fn has_posterior(&self) -> bool {
        !self.is_deterministic()
    }
    fn statistic(&self) -> Statistic {
        if self.is_deterministic() { Statistic::Unused } else { Statistic::Price }
    }
}

impl BlockRule for Evon {
    const JOINT: bool = false;
    const PRIOR: Family = Family::Kronecker;

    fn initial(&self, shape: &[i64], mean: &Tensor, prior: &BlockPrior) -> Result<Vec<Tensor>> {
        // A NaN where a device has failed: the driver refuses a state that follows from it.
        let rms = rms(mean).unwrap_or(f64::NAN);
        let start = Start { posterior_prior: prior.delta().is_none(), rms };
        let h = auto::hess_init(self.hess_init, self.relative_noise, start, self.lambda());
        let squares = if self.step_length.has_squares() {
            mean.zeros_like()
        } else {
            mean.new_empty([0], (mean.kind(), mean.device()))
        };
        let mut state = vec![mean.zeros_like(), filled(mean, h), squares];
        state.extend(Eigenbasis::initial(mean, self.matrix(shape), self.max_dim, prior));
        Ok(state)
    }
    fn displacement(&self, t: u64, z: &Tensor, state: &[Tensor], prior: &BlockPrior) -> Result<Displaced> {
        if !self.is_noisy(t) {
            return Ok(z.f_zeros_like()?.into());
        }
        let basis = Eigenbasis::of(&state[BASIS..]);
        let precision = (&state[1] + basis.delta(prior, &z.size())?) * check::ess(self.ess)?;
        let rotated = z / precision.sqrt();
        Ok(Displaced { e: basis.back(&rotated)?, rotated: Some(rotated) })
    }
    /// e'G', which the limit does without, and GGᵀ, GᵀG; zeros for what a phase has no use for.
    fn statistics(&self, x: &Evaluated, state: &[Tensor]) -> Result<Vec<Tensor>> {
        let basis = Eigenbasis::of(&state[BASIS..]);
        let mut all = Vec::with_capacity(3);
        if !self.is_deterministic() {
            all.push(if self.is_noisy(x.t) {
                // As it was drawn: rotating e there and back would only add rounding.
                let rotated = x.rotated.map_or_else(|| basis.rotate(x.displacement), |e| Ok(e.shallow_clone()))?;
                rotated * basis.rotate(x.gradient)?
            } else {
                x.gradient.f_zeros_like()?
            });
        }
        if self.turns(x.t) {
            all.extend(basis.moments(x.gradient)?);
        } else {
            all.extend(state[BASIS..BASIS + 2].iter().map(Tensor::zeros_like));
        }
        Ok(all)
    }
    fn update(&self, when: When, x: &Block, state: &[Tensor]) -> Result<(Tensor, Vec<Tensor>)> {
        let (b, h, r) = (&state[0], &state[1], 1.0 - self.beta2);
        let basis = Eigenbasis::of(&state[BASIS..]);
        let delta = basis.delta(x.prior, &h.size())?;
        let s = h + &delta;
        let (price, moments) = x.statistics.split_at(x.statistics.len() - 2);
        let h = if self.is_deterministic() {
            let f = basis.rotate(x.gradient)?.square();
            let f = self.hess_clip.map_or_else(|| f.shallow_clone(), |kappa| f.minimum(&(&s * kappa)));
            h * self.beta2 + f * r
        } else if self.is_noisy(when.t) {
            let f = &price[0] * self.lambda();
            // Clipped in units of h+δ, which therefore comes last.
            let f = clipped(&f, self.hess_clip) * &s;
            // The second-order term keeps h+δ above half of its value, whatever the sign of f.
            let change = (f - h) * r;
            h + &change + change.square() * 0.5 / &s
        } else {
            h.shallow_clone()
        };
        let h = self.max_growth.map_or_else(|| h.shallow_clone(), |growth| h.minimum(&(s * growth - &delta)));
        let b = b * self.beta1 + x.gradient * (1.0 - self.beta1);
        let debias = if self.debias { 1.0 / (1.0 - self.beta1.powf(when.t as f64)) } else { 1.0 };
        let pull = x.prior.pull(x.mean)?;
        let (divisor, square) = match self.step_length {
            StepLength::Newton => (&h + delta, state[2].shallow_clone()),
            adam @ StepLength::Adam { .. } => {
                let u = basis.rotate(&(x.gradient + &pull))?;
                adam.divisor_of_block(when.t, &u, &(delta / self.lambda()), &state[2])
            }
        };
        // One rotation for both, since it is linear; and the new precision divides.
        let step = basis.rotate(&(&b * debias + pull))? / divisor;
        let step = clipped(&step, self.clip_radius);
        let step = basis.back(&step)?;
        let step = if self.whiten { whitened(&step)? } else { step };
        let mean = x.mean - step * when.lr;
        let mut state = vec![b, h, square];
        // Last: no step may use a basis that has seen its gradient.
        let moments = Some(moments).filter(|_| self.turns(when.t));
        state.extend(basis.updated(moments, self.beta_basis, when.t, self.frequency)?);
        Ok((mean, state))
    }
    fn posterior(blocks: Vec<Learned<Self>>) -> Result<KroneckerGaussian> {
        if !blocks.iter().all(|learned| learned.row.has_posterior()) {
            return Err(Error::Posterior(
                "evon with Expectation::Delta is the limit of an infinite ess, whose noise is none and whose `hess` \
                 averages squared gradients, which are no Hessian; train with samples and .ess(..) for a posterior"
                    .to_owned(),
            ));
        }
        Eigenbasis::posterior(blocks, BASIS, |learned, delta| {
            Ok((&learned.state[1] + delta) * check::ess(learned.row.ess)?)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::common::testing::refused;
    use super::*;

    /// One weight, which has no basis: h = δ = 1, λ = 2, r = ½, f = 2·1·2 = 4, so that h wants to grow by 3/2 +
    /// (3/2)²/4 and S from 2 to 4.0625, of which growth allows 3. And u = 3 + 1·2, d² = u² + ½, α = 0.1.
    #[test]
    fn one_step_by_hand() {
        let t = |x: f64| Tensor::from_slice(&[x]);
        let rule = Evon::default().ess(2.0).weight_decay(1.0).beta2(0.5).max_growth(1.5);
        let rule = rule.step_length(StepLength::Adam { beta: 0.9 });
        let prior = BlockPrior::isotropic(1.0);
        let state = rule.initial(&[1], &t(2.0), &prior).unwrap();
        let moments = [t(1.0), state[3].shallow_clone(), state[4].shallow_clone()];
        let (mean, gradient) = (t(2.0), t(3.0));
        let x = Block { mean: &mean, gradient: &gradient, statistics: &moments, prior: &prior };
        let (mean, state) = rule.update(When { t: 1, lr: 0.1 }, &x, &state).unwrap();
        let close = |x: &Tensor, expected: f64| assert!((x.double_value(&[0]) - expected).abs() < 1e-14, "{x:?}");
        close(&mean, 2.0 - 0.1 * (3.0 + 2.0) / 25.5_f64.sqrt());
        close(&state[1], 2.0);
        close(&state[2], 0.1 * 25.0);
    }

    /// The squares come and go with the setting, and the rest of the state stays.
    #[test]
    fn the_step_length_may_change_between_steps() {
        let vs = tch::nn::VarStore::new(tch::Device::Cpu);
        let w = vs.root().ones("w", &[3, 2]);
        let mut opt = Evon::default().ess(10.0).build(&vs, 0.01).unwrap();
        let loss = || w.square().sum(tch::Kind::Float);
        for row in [StepLength::Adam { beta: 0.9 }, StepLength::Newton, StepLength::Adam { beta: 0.9 }] {
            opt.step(loss).unwrap();
            let before = opt.state("w", "hess").unwrap().copy();
            opt.configure(|c| c.step_length(row)).unwrap();
            assert_eq!(opt.state("w", "hess").unwrap(), before);
            opt.step(loss).unwrap();
            let squares = opt.state("w", "square").unwrap().size();
            assert_eq!(squares, if row == StepLength::Newton { vec![0] } else { vec![3, 2] });
        }
    }

    #[test]
    fn values_out_of_range_are_named() {
        let rule = Evon::default().ess(10.0);
        rule.validate().unwrap();
        Evon::default().expectation(Expectation::Delta).validate().unwrap();
        Evon::published().ess(10.0).merge_dims(true).rotate_vectors(true).validate().unwrap();
        refused([
            (Evon::default(), "ess"),
            (rule.weight_decay(-1.0), "weight_decay"),
            (rule.hess_init(0.0), "hess_init"),
            (rule.beta1(1.0), "beta1"),
            (rule.beta2(1.0), "beta2"),
            (rule.beta_basis(1.0), "beta_basis"),
            (rule.frequency(0), "frequency"),
            (rule.max_dim(-1), "max_dim"),
            (rule.expectation(Expectation::Adversarial { sampled: false }), "expectation"),
            (rule.ess(f64::INFINITY), "ess"),
            (rule.ess(f64::INFINITY).expectation(Expectation::Delta), "ess"),
            (rule.ess(-1.0).expectation(Expectation::Delta), "ess"),
            (rule.expectation(Expectation::Delta).phased(true), "phased"),
            (rule.expectation(Expectation::Delta).weight_decay(0.0), "weight_decay"),
            (rule.expectation(Expectation::Delta).relative_noise(0.1), "relative_noise"),
            (rule.hess_clip(0.0), "hess_clip"),
            (rule.clip_radius(-1.0), "clip_radius"),
            (rule.relative_noise(0.0), "relative_noise"),
            (rule.max_growth(1.0), "max_growth"),
            (rule.step_length(StepLength::Adam { beta: 1.0 }), "step_length beta"),
        ]);
    }
}

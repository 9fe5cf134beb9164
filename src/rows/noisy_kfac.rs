//! Noisy K-FAC: a matrix-normal posterior by Kronecker factors of the Fisher information.

use super::common::{config, fields, filled, samples};
use crate::driver::{Block, BlockRule, Blocks, Displaced, Learned, Row, When};
use crate::linalg::{into_basis, matrix_shape, out_of_basis};
use crate::posterior::{KroneckerGaussian, KroneckerParameter};
use crate::prior::{BlockPrior, Family};
use crate::{Error, Expectation, Labels, Result, Statistic, check, linalg};
use tch::Tensor;

config! {
    /// Natural-gradient variational inference with a matrix normal per weight, for models of the layers
    /// [`nn::linear`](crate::nn::linear()) and [`nn::conv2d`](crate::nn::conv2d()).
    ///
    /// Row of the table: Gaussian with a Kronecker-factored precision; Hessian by the Fisher information, whose factors
    /// are averaged separately. With [`Expectation::Delta`] it is K-FAC.
    ///
    /// A layer computes z = W a. For its weight W `[out, in]`:
    ///
    /// ```text
    /// vec(W - M) ~ N(0, (λ Ĝ ⊗ Â)⁻¹)                               λ = ess; vec: row by row
    /// A ← β₂ A + (1-β₂) mean a aᵀ,  G ← β₂ G + (1-β₂) mean δ δᵀ     δ = ∂ℓᵢ/∂z, see `labels`
    /// B ← β₁ B + (1-β₁) ∇L(W)
    /// M ← M - α Ĝ_γ⁻¹ ( B/(1-β₁ᵗ) + δM ) Â_γ⁻¹                     δM: the prior's pull
    ///
    /// Ĝ = G + √δ/π I,  Â = A + π√δ I,  π² = (tr A/in) / (tr G/out)    with γ: √(δ+γ) in the place of √δ
    /// ```
    ///
    /// so that Ĝ ⊗ Â is G ⊗ A + δI and two terms in between. A and G start as √h₀ I, and the first step's evaluations
    /// replace them. The bases Q are their eigenvectors after the first step. Every `frequency` steps they follow by
    /// one step of the power method, Q ← orthogonalized A Q, with eigenvalues diag(Qᵀ A Q), before the mean moves.
    /// Samples are M + Q_G (z/√(λs)) Q_Aᵀ with s the products of eigenvalues; Q diag(1/√s) is one of the roots of the
    /// covariance.
    ///
    /// A bias has the input 1 and is a block of its own, independent of its weight under q; to have them jointly,
    /// append a column of ones to the input and leave the bias out. With several positions (a convolution's, or a
    /// sequence's) A is the sum over positions and G the mean, as in K-FAC for convolutions. Examples count with the
    /// weight that the returned loss gives to them, see [`nn::cross_entropy`](crate::nn::cross_entropy). Any other
    /// parameter that the loss depends on must be frozen. The layers' leading dimension must be the batch, as
    /// everywhere in [`crate::nn`].
    ///
    /// For a linear model with squared error and one output the Fisher information is A times 1/σ², so with
    /// `split_damping(false)` the posterior is exact.
    ///
    /// The published algorithm has β₁ = 0.
    ///
    /// Sources: Zhang, Sun, Duvenaud and Grosse, *Noisy Natural Gradient as Variational Inference* (ICML 2018),
    /// arXiv:1712.02390; Martens and Grosse (ICML 2015) for the factors and π; Grosse and Martens (ICML 2016) for
    /// convolutions.
    pub struct NoisyKfac {
        /// Effective sample size λ > 0, usually the number of training examples (`docs/scales.md`). Must be set, unless
        /// the expectation is [`Expectation::Delta`] and no posterior is wanted.
        ess: Option<f64> = None, via f64;
        /// δ = prior precision/λ ≥ 0: the prior is N(0, 1/(λδ)); default 1e-4.
        weight_decay: f64 = 1e-4;
        /// γ ≥ 0, added to δ in the divisor of the step but not in the posterior; default 0.
        damping: f64 = 0.0;
        /// h₀ > 0, the precision A ⊗ G that the first step's samples have; default 1.
        hess_init: f64 = 1.0;
        /// β₁ in [0, 1), decay of the gradient average; default 0.9.
        beta1: f64 = 0.9;
        /// β₂ in [0, 1), decay of the factors; default 0.99.
        beta2: f64 = 0.99;
        /// Steps between two decompositions of the factors, at least 1; default 10.
        frequency: u64 = 10;
        /// Whether δ + γ is split over the factors, as published; otherwise it is added to their product, which is
        /// exact but no longer a matrix normal. Default on.
        split_damping: bool = true;
        /// Labels in the Fisher information; default sampled from the model's prediction.
        labels: Labels = Labels::Sampled;
        /// Where the expectations are evaluated; default one Monte-Carlo sample.
        expectation: Expectation = Expectation::MonteCarlo { samples: 1 };
    }
}

/// A block's factors: of its rows, and of its columns.
struct Factors<'a> {
    bases: [&'a Tensor; 2],
    values: [&'a Tensor; 2],
}

/// Where a factor's basis goes.
#[derive(Clone, Copy)]
enum Turn {
    /// To its eigenvectors.
    Whole,
    /// A step towards them, after which the factor is nearly diagonal.
    Nearer,
    None,
}

/// Basis and eigenvalues of a factor, from the basis so far.
fn followed(factor: &Tensor, basis: &Tensor, turn: Turn) -> Result<(Tensor, Tensor)> {
    let (q, values) = match turn {
        Turn::Whole => {
            let (values, q) = linalg::eigen(factor)?;
            (q, values)
        }
        Turn::Nearer | Turn::None => {
            let nearer = matches!(turn, Turn::Nearer);
            let q = if nearer { linalg::nearer_eigenvectors(factor, basis)? } else { basis.shallow_clone() };
            // qᵀ A q of each column q.
            // Only the diagonal, without the second product of matrices.
            let values =
                (factor.f_matmul(&linalg::columns(&q)?)? * &q).f_sum_dim_intlist(0, false, None::<tch::Kind>)?;
            (q, values)
        }
    };
    // Second moments have no negative eigenvalues, except by rounding.
    Ok((q, values.f_clamp_min(0.0)?))
}

impl<'a> Factors<'a> {
    fn of(state: &'a [Tensor]) -> Self {
        Factors { bases: [&state[3], &state[4]], values: [&state[5], &state[6]] }
    }

    /// s `[r, c]`: the precision in the basis, with the prior and this damping γ.
    fn precision(&self, prior: &BlockPrior, damping: f64, split: bool) -> Result<Tensor> {
        let [rows, columns] = self.values;
        let s = if let Some(delta) = prior.delta().map(|delta| delta + damping).filter(|_| split) {
            let mean = |x: &Tensor| x.mean(None::<tch::Kind>).double_value(&[]);
            let pi = (mean(columns) / mean(rows)).sqrt();
            if pi.is_finite() && pi > 0.0 {
                (rows + delta.sqrt() / pi).f_outer(&(columns + delta.sqrt() * pi))?
            } else {
                // A factor without any curvature makes π zero or infinite, and in that limit only δ is left.
                rows.f_outer(columns)?.f_full_like(delta)?
            }
        } else {
            let [r, c] = [rows, columns].map(|x| x.numel() as i64);
            rows.f_outer(columns)? + prior.in_basis(Some(self.bases[0]), Some(self.bases[1]), &[r, c])? + damping
        };
        if s.numel() > 0 && s.min().double_value(&[]) <= 0.0 {
            let what = "the product of the Kronecker factors with the prior".to_owned();
            return Err(Error::NotPositiveDefinite { what, problem: "an eigenvalue is zero".to_owned() });
        }
        Ok(s)
    }

    /// Q_rᵀ X Q_c of X as a matrix.
    fn rotate(&self, x: &Tensor) -> Result<Tensor> {
        into_basis(&x.f_reshape(matrix_shape(&x.size()))?, Some(self.bases[0]), Some(self.bases[1]))
    }

    /// Q_r X Q_cᵀ, in the shape of `like`.
    fn back(&self, x: &Tensor, like: &Tensor) -> Result<Tensor> {
        Ok(out_of_basis(x, Some(self.bases[0]), Some(self.bases[1]))?.f_reshape(like.size())?)
    }
}

samples!(NoisyKfac);

impl Row for NoisyKfac {
    const NAME: &'static str = "noisy_kfac";
    const STATE: &'static [&'static str] = &[
        "momentum",
        "row_factor",
        "column_factor",
        "row_basis",
        "column_basis",
        "row_eigenvalues",
        "column_eigenvalues",
    ];
    type Arithmetic = Blocks;
    type Posterior = KroneckerGaussian;
    fields!(weight_decay ess expectation);

    fn validate(&self) -> Result<()> {
        // K-FAC draws nothing, so it needs no ess unless a posterior is wanted.
        if self.expectation != Expectation::Delta || self.ess.is_some() {
            check::ess(self.ess)?;
        }
        check::non_negative("weight_decay", self.weight_decay)?;
        check::non_negative("damping", self.damping)?;
        check::positive("hess_init", self.hess_init)?;
        check::rate("beta1", self.beta1)?;
        check::rate("beta2", self.beta2)?;
        check::count("frequency", self.frequency as usize)?;
        self.expectation.validate()
    }
    fn statistic(&self) -> Statistic {
        Statistic::KroneckerFisher(self.labels)
    }
}

impl BlockRule for NoisyKfac {
    const JOINT: bool = false;
    const PRIOR: Family = Family::Kronecker;

    fn initial(&self, _: &[i64], mean: &Tensor, prior: &BlockPrior) -> Result<Vec<Tensor>> {
        let like = (mean.kind(), mean.device());
        let sides = matrix_shape(&mean.size());
        // √h₀ in each, so that their product is h₀.
        let root = if prior.delta().is_some() { self.hess_init.sqrt() } else { 0.0 };
        if let Some(theirs) = prior.sides().filter(|theirs| *theirs != sides) {
            return Err(Error::Posterior(format!(
                "its prior has the bases of a matrix {theirs:?}, and its Kronecker factors are of {sides:?}: take the \
                 prior's diagonal(), or train it with a row of the same matrix"
            )));
        }
        let bases = prior.bases();
        let basis = |side: usize| bases[side].map_or_else(|| Tensor::eye(sides[side], like), Tensor::copy);
        let mut state = vec![mean.zeros_like()];
        state.extend(sides.map(|n| Tensor::eye(n, like) * root));
        state.extend([basis(0), basis(1)]);
        state.extend(sides.map(|n| filled(&mean.new_empty([n], like), root)));
        Ok(state)
    }
    fn displacement(&self, _: u64, z: &Tensor, state: &[Tensor], prior: &BlockPrior) -> Result<Displaced> {
        let factors = Factors::of(state);
        let s = factors.precision(prior, 0.0, self.split_damping)? * check::ess(self.ess)?;
        Ok(factors.back(&(z.f_reshape(s.size())? / s.sqrt()), z)?.into())
    }
    fn update(&self, when: When, x: &Block, state: &[Tensor]) -> Result<(Tensor, Vec<Tensor>)> {
        let first = when.t <= 1;
        let mut new = vec![state[0].f_lerp(x.gradient, 1.0 - self.beta1)?];
        for (old, fresh) in state[1..3].iter().zip(x.statistics) {
            new.push(if first { fresh.copy() } else { old.f_lerp(fresh, 1.0 - self.beta2)? });
        }
        if first || when.t.is_multiple_of(self.frequency) {
            // Without any curvature the bases stay: they may be those of a prior, which others would know only in part.
            let turn = match first {
                _ if linalg::is_zero(&new[1])? || linalg::is_zero(&new[2])? => Turn::None,
                true => Turn::Whole,
                false => Turn::Nearer,
            };
            let [rows, columns] = [0, 1].map(|side| followed(&new[1 + side], &state[3 + side], turn));
            let (rows, columns) = (rows?, columns?);
            new.extend([rows.0, columns.0, rows.1, columns.1]);
        } else {
            // The same tensors: nobody writes to a state, and the driver does not look again at one that it knows.
            new.extend(state[3..].iter().map(Tensor::shallow_clone));
        }
        let factors = Factors::of(&new);
        // γ divides the step but is not in the samples, which are those of the posterior.
        let s = factors.precision(x.prior, self.damping, self.split_damping)?;
        let debias = 1.0 / (1.0 - self.beta1.powf(when.t as f64));
        let pull = &new[0] * debias + x.prior.pull(x.mean)?;
        let step = factors.back(&(factors.rotate(&pull)? / s), x.mean)?;
        Ok((x.mean - step * when.lr, new))
    }
    fn posterior(blocks: Vec<Learned<Self>>) -> Result<KroneckerGaussian> {
        let mut parameters = Vec::new();
        for Learned { row, means, state, prior, .. } in blocks {
            let factors = Factors::of(state);
            let s = factors.precision(prior, 0.0, row.split_damping)? * check::ess(row.ess)?;
            for (name, mean) in means {
                let [left, right] = factors.bases.map(|q| Some(q.shallow_clone()));
                let precision = s.f_reshape(mean.size())?;
                parameters.push(KroneckerParameter { name, mean, left, right, precision });
            }
        }
        KroneckerGaussian::new(parameters)
    }
}

#[cfg(test)]
mod tests {
    use super::super::common::testing::{close, refused};
    use super::*;

    fn matrix(x: &[f64], shape: &[i64]) -> Tensor {
        Tensor::from_slice(x).reshape(shape)
    }

    /// A = diag(3, 5), G = 1, δ = ¼: π = √4, Ĝ = 1 + ¼, Â = diag(3, 5) + 1; u = (1, 2) + ¼(2, -2) = (1.5, 1.5). With
    /// γ = ¾, √(δ+γ) = 1. Second step, without decomposition: A ← ½A + ½·0 and B = ½·½(1, 2), corrected by 1/(1-¼).
    #[test]
    fn steps_by_hand() {
        let rule = NoisyKfac::default().ess(10.0).weight_decay(0.25).beta1(0.5).beta2(0.5).frequency(3);
        let (mean, gradient) = (matrix(&[2.0, -2.0], &[1, 2]), matrix(&[1.0, 2.0], &[1, 2]));
        let prior = &BlockPrior::isotropic(0.25);
        let statistics = [matrix(&[1.0], &[1, 1]), matrix(&[3.0, 0.0, 0.0, 5.0], &[2, 2])];
        for (rule, s, posterior) in [
            (rule, [1.25 * 4.0, 1.25 * 6.0], [50.0, 75.0]),
            (rule.split_damping(false), [3.25, 5.25], [32.5, 52.5]),
            (rule.damping(0.75), [1.5 * 5.0, 1.5 * 7.0], [50.0, 75.0]),
        ] {
            let x = Block { mean: &mean, gradient: &gradient, statistics: &statistics, prior };
            let (m, state) =
                rule.update(When { t: 1, lr: 0.25 }, &x, &rule.initial(&mean.size(), &mean, prior).unwrap()).unwrap();
            close(&m, &[2.0 - 0.25 * 1.5 / s[0], -2.0 - 0.25 * 1.5 / s[1]]);
            close(&state[0], &[0.5, 1.0]);
            let means = vec![("w".to_owned(), m.copy())];
            let when = When { t: 1, lr: 0.25 };
            let learned = vec![Learned { row: rule, when, means, state: &state, prior }];
            let q = NoisyKfac::posterior(learned).unwrap();
            close(&q.parameter("w").unwrap().precision, &posterior);

            let zeros = statistics.each_ref().map(Tensor::zeros_like);
            let x = Block { mean: &mean, gradient: &gradient.zeros_like(), statistics: &zeros, prior };
            let (m, state) = rule.update(When { t: 2, lr: 0.25 }, &x, &state).unwrap();
            close(&state[1], &[0.5]);
            close(&state[2], &[1.5, 0.0, 0.0, 2.5]);
            let u = [0.25 / 0.75 + 0.5, 0.5 / 0.75 - 0.5];
            close(&m, &[2.0 - 0.25 * u[0] / s[0], -2.0 - 0.25 * u[1] / s[1]]);
        }
    }

    #[test]
    fn a_precision_that_is_not_positive_is_an_error() {
        let rule = NoisyKfac::default().ess(10.0).weight_decay(0.0);
        let (mean, gradient) = (matrix(&[2.0, -2.0], &[1, 2]), matrix(&[1.0, 2.0], &[1, 2]));
        let prior = &BlockPrior::isotropic(0.0);
        let statistics = [matrix(&[1.0], &[1, 1]), matrix(&[1.0, 0.0, 0.0, 0.0], &[2, 2])];
        let x = Block { mean: &mean, gradient: &gradient, statistics: &statistics, prior };
        let e =
            rule.update(When { t: 1, lr: 0.25 }, &x, &rule.initial(&mean.size(), &mean, prior).unwrap()).unwrap_err();
        assert!(matches!(e, Error::NotPositiveDefinite { .. }), "{e}");
    }

    #[test]
    fn values_out_of_range_are_named() {
        let rule = NoisyKfac::default().ess(10.0);
        rule.validate().unwrap();
        NoisyKfac::default().expectation(Expectation::Delta).validate().unwrap();
        refused([
            (NoisyKfac::default(), "ess"),
            (rule.expectation(Expectation::Delta).ess(-1.0), "ess"),
            (rule.weight_decay(-1.0), "weight_decay"),
            (rule.damping(-1.0), "damping"),
            (rule.hess_init(0.0), "hess_init"),
            (rule.beta1(1.0), "beta1"),
            (rule.beta2(1.0), "beta2"),
            (rule.frequency(0), "frequency"),
            (rule.expectation(Expectation::MonteCarlo { samples: 0 }), "samples"),
        ]);
    }
}

//! SOAP: Adam in the eigenbasis of a Kronecker-factored second moment.

use super::common::{config, fields};
use super::eigenbasis::{EIGENBASIS, Eigenbasis, rows};
use crate::driver::{Block, BlockRule, Blocks, Learned, Row, When};
use crate::posterior::KroneckerGaussian;
use crate::prior::{BlockPrior, Family};
use crate::{Result, check};
use tch::Tensor;

config! {
    /// Adam in the eigenbasis of a Kronecker-factored second moment of the gradients.
    ///
    /// Row of the table: Gaussian whose precision is diagonal in a Kronecker-factored basis, one matrix W `[r, c]` per
    /// parameter; delta method, Hessian by the squared mini-batch gradient in the basis, square-root scaling,
    /// slow-moving scale vectors. [`Adam`](crate::Adam) is the case of the identity; [`Evon`](crate::Evon) evaluates at
    /// samples instead, and has Price's estimate of the Hessian in the place of the root. A prime is a rotation into
    /// the basis, X' = Q_Lᵀ X Q_R:
    ///
    /// ```text
    /// U = ∇L(M) + δM
    /// B ← β₁ B + (1-β₁) U
    /// v ← β₂ v + (1-β₂) U'²
    /// M ← M - α/(1-β₁ˢ) · Q_L ( B' / ( √v / √(1-β₂ˢ) + ε ) ) Q_Rᵀ      s = t-1
    /// M ← (1 - α η) M                     η: decoupled weight decay
    /// L ← β L + (1-β) UUᵀ,  R ← β R + (1-β) UᵀU
    /// Q_L, Q_R ← eigenvectors of L, R     after the first step, and every `frequency` steps
    /// ```
    ///
    /// L and R start at 0. The first step only adds to them and turns the basis, so that no step uses a basis that has
    /// seen its gradient; M, B and v stay as they are. v is not rotated when the basis turns, and the basis keeps the
    /// order of its vectors, so v is not permuted either. A parameter of fewer than two dimensions, and a side of more
    /// than `max_dim` rows, is not rotated.
    ///
    /// δ is a prior, as in [`Adam`](crate::Adam); η is not, as in [`AdamW`](crate::AdamW). The published code has η =
    /// 0.01 and no δ.
    ///
    /// The posterior, a [`KroneckerGaussian`] with precision λ(√(v/(1-β₂ˢ)) + δ) in the basis, is a heuristic for the
    /// reason given at [`Adam`](crate::Adam). It needs [`Soap::ess`].
    ///
    /// Source: Vyas et al., *SOAP: Improving and Stabilizing Shampoo using Adam* (ICLR 2025), arXiv:2409.11321.
    pub struct Soap {
        /// β₁ in [0, 1), decay of the gradient average; default 0.95.
        beta1: f64 = 0.95;
        /// β₂ in [0, 1), decay of the squared gradients; default 0.95.
        beta2: f64 = 0.95;
        /// β in [0, 1), decay of L and R; default 0.95.
        beta_basis: f64 = 0.95;
        /// ε > 0 beside the square root; default 1e-8.
        eps: f64 = 1e-8;
        /// δ ≥ 0, the L2 term δM added to the gradient; default 0.
        weight_decay: f64 = 0.0;
        /// Decoupled weight decay η ≥ 0; default 0.01.
        decoupled_decay: f64 = 0.01;
        /// Steps between two turns of the basis, at least 1; default 10.
        frequency: u64 = 10;
        /// Sides with more rows are not rotated; default 10000.
        max_dim: i64 = 10_000;
        /// Effective sample size λ > 0; only needed for a posterior, or for a prior. Default: none.
        ess: Option<f64> = None, via f64;
    }
}

/// Where the basis starts among the state tensors.
const BASIS: usize = 2;

impl Soap {
    /// √(v/(1-β₂ˢ)) after `t` steps; the first does not enter v.
    fn root(&self, v: &Tensor, t: u64) -> Tensor {
        (v / debias(self.beta2, t)).sqrt()
    }
}

/// 1-βˢ, s = t-1; 1 before there is anything to correct.
fn debias(beta: f64, t: u64) -> f64 {
    if t < 2 { 1.0 } else { 1.0 - beta.powf((t - 1) as f64) }
}

impl Row for Soap {
    const NAME: &'static str = "soap";
    const STATE: &'static [&'static str] =
        &["momentum", "square", EIGENBASIS[0], EIGENBASIS[1], EIGENBASIS[2], EIGENBASIS[3]];
    type Arithmetic = Blocks;
    type Posterior = KroneckerGaussian;
    fields!(weight_decay ess);

    fn validate(&self) -> Result<()> {
        check::rate("beta1", self.beta1)?;
        check::rate("beta2", self.beta2)?;
        check::rate("beta_basis", self.beta_basis)?;
        check::positive("eps", self.eps)?;
        check::non_negative("weight_decay", self.weight_decay)?;
        check::non_negative("decoupled_decay", self.decoupled_decay)?;
        check::count("frequency", self.frequency as usize)?;
        check::that("max_dim", self.max_dim, self.max_dim >= 0, "a number ≥ 0")?;
        self.ess.map_or(Ok(()), |ess| check::positive("ess", ess))
    }
}

impl BlockRule for Soap {
    const JOINT: bool = false;
    const PRIOR: Family = Family::Kronecker;

    fn initial(&self, shape: &[i64], mean: &Tensor, prior: &BlockPrior) -> Result<Vec<Tensor>> {
        let mut state = vec![mean.zeros_like(), mean.zeros_like()];
        state.extend(Eigenbasis::initial(mean, rows(shape), self.max_dim, prior));
        Ok(state)
    }
    fn update(&self, when: When, x: &Block, state: &[Tensor]) -> Result<(Tensor, Vec<Tensor>)> {
        let (b, v) = (&state[0], &state[1]);
        let basis = Eigenbasis::of(&state[BASIS..]);
        let u = x.gradient + x.prior.pull(x.mean)?;
        // Moments of U, which has the prior's pull in it, so they cannot be averaged over evaluations as Evon's are.
        let turned = basis.updated(Some(&basis.moments(&u)?), self.beta_basis, when.t, self.frequency)?;
        let (mean, mut new) = if when.t <= 1 {
            (x.mean.copy(), vec![b.copy(), v.copy()])
        } else {
            // b is kept in the weights' coordinates, so it needs no rotation when the basis turns.
            let b = b * self.beta1 + &u * (1.0 - self.beta1);
            let v = v * self.beta2 + basis.rotate(&u)?.square() * (1.0 - self.beta2);
            let step = basis.rotate(&b)? / (self.root(&v, when.t) + self.eps);
            let mean = x.mean - basis.back(&step)? * (when.lr / debias(self.beta1, when.t));
            // The published code decays after the step, unlike AdamW.
            (mean * (1.0 - when.lr * self.decoupled_decay), vec![b, v])
        };
        new.extend(turned);
        Ok((mean, new))
    }
    fn posterior(blocks: Vec<Learned<Self>>) -> Result<KroneckerGaussian> {
        Eigenbasis::posterior(blocks, BASIS, |learned, delta| {
            let root = learned.row.root(&learned.state[1], learned.when.t);
            Ok((root + delta) * check::ess(learned.row.ess)?)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::common::testing::{close, refused};
    use super::*;

    fn matrix(x: &[f64]) -> Tensor {
        Tensor::from_slice(x).reshape([1, 2])
    }

    /// A row, so that only its right side turns. First step: U = (2, 0) + ½(2, 2) = (3, 1), and R = UᵀU has the
    /// eigenvectors (3, 1)/√10 and (-1, 3)/√10. Second step: U = (0, -1) + ½(2, 2) = (1, 0), which is (3, -1)/√10 in
    /// the basis, v = ¼·(9, 1)/10 and B = ½U = ½(3, -1)'/√10; corrected, √v = (3, 1)/√10 and B' = (3, -1)/√10. With ε =
    /// 1/√10 the step is (¾, -½) in the basis, ((¾·3 + ½)/√10, (¾ - ½·3)/√10) = (2.75, -0.75)/√10.
    #[test]
    fn two_steps_by_hand() {
        let ten = 10f64.sqrt();
        let rule = Soap::default().beta1(0.5).beta2(0.75).beta_basis(0.5).weight_decay(0.5).eps(1.0 / ten);
        let rule = rule.decoupled_decay(0.2).ess(10.0);
        let (mean, prior) = (matrix(&[2.0, 2.0]), BlockPrior::isotropic(0.5));
        let step = |t, g: &[f64], state: &[Tensor]| {
            let x = Block { mean: &mean, gradient: &matrix(g), statistics: &[], prior: &prior };
            rule.update(When { t, lr: 0.25 }, &x, state).unwrap()
        };
        let (m, first) = step(1, &[2.0, 0.0], &rule.initial(&mean.size(), &mean, &prior).unwrap());
        close(&m, &[2.0, 2.0]);
        close(&first[0], &[0.0; 2]);
        close(&first[1], &[0.0; 2]);
        // ½UᵀU, since β = ½ and R starts at 0.
        close(&first[3], &[4.5, 1.5, 1.5, 0.5]);
        close(&first[5].abs(), &[3.0 / ten, 1.0 / ten, 1.0 / ten, 3.0 / ten]);

        let (m, second) = step(2, &[0.0, -1.0], &first);
        let by_hand = [2.75, -0.75].map(|x| (2.0 - 0.25 * x / ten) * (1.0 - 0.25 * 0.2));
        close(&m, &by_hand);
        close(&second[0], &[0.5, 0.0]);
        close(&second[1], &[0.225, 0.025]);
        // The tenth step is the next that turns the basis.
        close(&second[3], &[2.75, 0.75, 0.75, 0.25]);
        close(&second[5], &Vec::<f64>::try_from(first[5].reshape([-1])).unwrap());
        let means = vec![("w".to_owned(), m)];
        let when = When { t: 2, lr: 0.25 };
        let learned = vec![Learned { row: rule, when, means, state: &second, prior: &prior }];
        let q = Soap::posterior(learned).unwrap();
        close(&(&q.parameter("w").unwrap().precision / 10.0), &[3.0 / ten + 0.5, 1.0 / ten + 0.5]);
    }

    #[test]
    fn values_out_of_range_are_named() {
        let rule = Soap::default();
        rule.validate().unwrap();
        refused([
            (rule.beta1(1.0), "beta1"),
            (rule.beta2(1.0), "beta2"),
            (rule.beta_basis(-0.1), "beta_basis"),
            (rule.eps(0.0), "eps"),
            (rule.weight_decay(-1.0), "weight_decay"),
            (rule.decoupled_decay(-1.0), "decoupled_decay"),
            (rule.frequency(0), "frequency"),
            (rule.max_dim(-1), "max_dim"),
            (rule.ess(0.0), "ess"),
        ]);
    }
}

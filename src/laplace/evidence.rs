//! How likely the data are: the logarithm of the evidence, and its slope by the prior precisions and the noise.

use super::{Block, Laplace};
use crate::Result;
use crate::likelihood::Likelihood;

/// Slope of the log evidence with the weights m fixed, in nats; 0 at its maximum.
#[derive(Debug, Clone, PartialEq)]
pub struct EvidenceSlope {
    /// ∂/∂ ln p = ½(γ - p‖m - m₀‖²) of every block, in the order of [`Laplace::precisions`].
    pub log_precisions: Vec<f64>,
    /// ∂/∂ ln σ² = ½(SSE/σ² - NC + γ) of a Gaussian with C outputs; `None` for the other likelihoods and for observed
    /// labels.
    pub log_variance: Option<f64>,
}

impl Laplace {
    /// ln Z, in nats: how likely the data are under the prior, by Laplace's approximation of the integral over the
    /// weights,
    ///
    /// ```text
    /// ln Z = -Σ NLLᵢ(m) - ½ Σ_b p_b ‖m_b - m₀_b‖² + ½ Σ_j ln p_j - ½ ln det S
    /// ```
    ///
    /// with the normalizers of the likelihood in the NLL; the powers of 2π of prior and posterior cancel. Of a subset
    /// of the weights, P, p and S are the subset's, the NLL the whole net's; the prior of the others, a constant, is
    /// left out, so compare evidences of one subset. For a linear regression with its full curvature it is ln p(y).
    ///
    /// m should be the maximum of the integrand, which [`Laplace::off_mode`] measures.
    ///
    /// # Errors
    /// [`Error::Curvature`](crate::Error::Curvature) if a batch of the curvature had no targets, or a loss that is not
    /// finite.
    pub fn log_evidence(&self) -> Result<f64> {
        self.evidence(Block::log_det)
    }

    /// As [`Laplace::log_evidence`], with the determinant of (A + √p) ⊗ (G + √p) in place of that of A ⊗ G + p, as in
    /// implementations that damp the factors. The former is larger, so this is lower; it is for comparison with such
    /// numbers, and depends on how a factor is scaled against the other: here A is a mean and G a sum.
    ///
    /// # Errors
    /// As there.
    pub fn damped_log_evidence(&self) -> Result<f64> {
        self.evidence(Block::damped_log_det)
    }

    fn evidence(&self, log_det: impl Fn(&Block, f64) -> Result<f64>) -> Result<f64> {
        let (fit, scale) = (self.fit()?, self.scale());
        let mut sum = -fit.loss * scale;
        if let Likelihood::Gaussian { variance } = self.likelihood() {
            sum -= 0.5 * fit.outputs * (std::f64::consts::TAU * variance).ln();
        }
        for block in &self.blocks {
            sum -= 0.5 * (block.precision * block.scatter() + log_det(block, scale)?);
        }
        Ok(sum)
    }

    /// γ = Σ l/(l + p): how many of the weights the data determine, between 0 and P.
    ///
    /// # Errors
    /// If libtorch fails.
    pub fn effective_parameters(&self) -> Result<f64> {
        self.blocks.iter().map(|block| block.effective(self.scale())).sum()
    }

    /// The slope of the log evidence; for p itself divide by p.
    ///
    /// # Errors
    /// As [`Laplace::log_evidence`].
    pub fn slope(&self) -> Result<EvidenceSlope> {
        let (fit, scale) = (self.fit()?, self.scale());
        let gammas = self.blocks.iter().map(|block| block.effective(scale)).collect::<Result<Vec<f64>>>()?;
        let of = |(block, gamma): (&Block, &f64)| 0.5 * (gamma - block.precision * block.scatter());
        let residual = 2.0 * fit.loss * scale - fit.outputs + gammas.iter().sum::<f64>();
        Ok(EvidenceSlope {
            log_precisions: self.blocks.iter().zip(&gammas).map(of).collect(),
            log_variance: self.check_noise().is_ok().then_some(0.5 * residual),
        })
    }

    /// ½ gᵀS⁻¹g ≥ 0 with the gradient g of the negative log joint at m, in nats: how far the maximum is above m if the
    /// log joint is a parabola. 0 at the maximum; `None` if it is unknown, without targets or with observed labels.
    ///
    /// # Errors
    /// If libtorch fails.
    pub fn off_mode(&self) -> Result<Option<f64>> {
        let each = self.blocks.iter().map(|block| block.decrement(self.scale()));
        // Of options in results: the first error, else `None` if one is.
        Ok(each.collect::<Result<Vec<_>>>()?.into_iter().sum())
    }
}

//! What a merge computes, as a value.

use crate::check::{positive, that};
use crate::{Error, Result};

/// How models become one. θ_k are the models, w_k their weights, θ₀ the base; every tensor is merged on its own, element
/// by element unless said otherwise.
///
/// | method | θ | needs |
/// |---|---|---|
/// | [`Method::Linear`] | Σ w_k θ_k, over Σ w_k if normalized | |
/// | [`Method::Slerp`] | along the arc between two tensors | two models |
/// | [`Method::TaskVectors`] | θ₀ + λ Σ w_k d_k, d_k = θ_k - θ₀ made sparse | base |
/// | [`Method::Fisher`] | Σ w_k F_k θ_k / Σ w_k F_k | curvature F_k |
/// | [`Method::GradientMatching`] | θ₀ + Σ w_k H̄⁻¹(H₀+H_k)(θ_k-θ₀), H̄ = H₀ + Σ w_k H_k | base, curvature H₀ and H_k |
/// | [`Method::Combine`] | Σ w_k s_k θ_k / Σ w_k s_k | precisions s_k |
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub enum Method {
    /// Σ w_k θ_k, divided by Σ w_k if `normalize`.
    Linear {
        /// Whether the weights count relative to their sum.
        normalize: bool,
    },
    /// The way from the first model's tensor a to the second's, b, at constant angular speed (weights are not used):
    ///
    /// ```text
    /// cos Ω = ⟨a, b⟩ / (‖a‖ ‖b‖)        over the whole tensor
    /// θ = sin((1-t)Ω)/sin Ω · a + sin(tΩ)/sin Ω · b
    /// ```
    ///
    /// For |cos Ω| > 0.9995, and where a tensor is zero, (1-t) a + t b. Inputs of one norm keep it.
    Slerp {
        /// 0 is the first model, 1 the second.
        t: f64,
    },
    /// Sums of differences to the base: task arithmetic, TIES, DARE.
    TaskVectors(TaskVectors),
    /// The average weighted by curvature F_k ≥ 0, the Fisher diagonal (Matena and Raffel 2022). An element where every F_k is
    /// zero gets the limit of equal F_k, the plain weighted average. Weights > 0.
    Fisher,
    /// Gradient matching with uncertainty (Daheim et al. 2024): the merge whose gradients match those of training jointly on
    /// Σ w_k L_k with the prior N(θ₀, H₀⁻¹), to first order. H_k is the curvature of the loss of task k alone, on the scale of
    /// the summed loss. Negative weights remove a task.
    ///
    /// All H_k = 0 is task arithmetic; H₀ → 0 is Fisher averaging. A model that gives the posterior's precision
    /// s_k = H₀ + H_k instead ([`Model::precision`](super::Model::precision)) gives the same.
    GradientMatching {
        /// Added to H₀, default 10⁻¹²: elements of no curvature at all then follow task arithmetic.
        delta: f64,
    },
    /// Natural parameters of diagonal Gaussians added with weights, as [`combine`](crate::combine) does.
    Combine,
}

/// θ = θ₀ + λ Σ w_k d_k: what is kept of the d_k = θ_k - θ₀, and what is done about conflicts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TaskVectors {
    /// λ, a finite number; default 1.
    pub lambda: f64,
    /// Which elements of each d_k.
    pub keep: Keep,
    /// Whether an element keeps only those d_k that have the sign of Σ w_k d_k (zero counts as positive).
    pub elect_signs: bool,
    /// Whether the sum is divided by Σ w_k; with elected signs, by the w_k of those that agree. Weights ≥ 0 then.
    pub normalize: bool,
}

/// Which elements of a difference d are kept; the others become zero.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Keep {
    /// All.
    All,
    /// The max(1, ⌊density · n⌋) largest |d| of the tensor's n; of equal ones, the first.
    Largest {
        /// In (0, 1].
        density: f64,
    },
    /// Each with probability `density`, independently, and rescaled.
    Random {
        /// In (0, 1].
        density: f64,
        /// What makes up for those that are dropped.
        rescale: Rescale,
        /// With the names of the tensor and of the model, decides which are kept: neither the order of tensors nor that of
        /// models matters.
        seed: u64,
    },
}

/// What makes up for dropped elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rescale {
    /// 1/density: the expectation is d.
    Density,
    /// Σ|d| over the Σ|d| that is kept: the L1 norm is that of d.
    L1Norm,
}

impl Method {
    /// The average by weight.
    pub fn linear() -> Self {
        Method::Linear { normalize: true }
    }

    /// θ₀ + λ Σ w_k (θ_k - θ₀) (Ilharco et al. 2023).
    pub fn task_arithmetic(lambda: f64) -> Self {
        Method::TaskVectors(TaskVectors { lambda, keep: Keep::All, elect_signs: false, normalize: false })
    }

    /// TIES (Yadav et al. 2023): trims each difference to its largest elements, elects signs, and averages those that agree.
    pub fn ties(lambda: f64, density: f64) -> Self {
        Method::TaskVectors(TaskVectors { lambda, keep: Keep::Largest { density }, elect_signs: true, normalize: true })
    }

    /// DARE (Yu et al. 2024): task arithmetic with random elements of the differences, rescaled.
    pub fn dare(lambda: f64, density: f64, rescale: Rescale, seed: u64) -> Self {
        let keep = Keep::Random { density, rescale, seed };
        Method::TaskVectors(TaskVectors { lambda, keep, elect_signs: false, normalize: false })
    }

    /// DARE's differences, merged with elected signs as TIES does.
    pub fn dare_ties(lambda: f64, density: f64, rescale: Rescale, seed: u64) -> Self {
        let keep = Keep::Random { density, rescale, seed };
        Method::TaskVectors(TaskVectors { lambda, keep, elect_signs: true, normalize: true })
    }

    /// With the default δ.
    pub fn gradient_matching() -> Self {
        Method::GradientMatching { delta: 1e-12 }
    }

    /// Whether it starts from a base model.
    pub fn needs_base(&self) -> bool {
        matches!(self, Method::TaskVectors(_) | Method::GradientMatching { .. })
    }

    /// Whether each model comes with its curvature or precision; the base then too.
    pub fn needs_curvature(&self) -> bool {
        matches!(self, Method::Fisher | Method::GradientMatching { .. } | Method::Combine)
    }

    /// Everything about the settings and the models that no tensor has a say in.
    pub(crate) fn validate(&self, models: &[(&str, f64)]) -> Result<()> {
        let refuse = |problem: String| Err(Error::Merge(problem));
        if models.is_empty() {
            return refuse("there is no model".to_owned());
        }
        for (i, (name, weight)) in models.iter().enumerate() {
            if models[..i].iter().any(|(other, _)| other == name) {
                return refuse(format!("two models have the name `{name}`; give each its own"));
            }
            if !weight.is_finite() {
                return refuse(format!("model `{name}` has the weight {weight}: expected a finite number"));
            }
        }
        let non_negative = |method: &str| match models.iter().find(|(_, w)| *w < 0.0) {
            Some((name, w)) => {
                refuse(format!("model `{name}` has the weight {w}: {method} expects weights ≥ 0 (or do not normalize)"))
            }
            None => Ok(()),
        };
        let sum: f64 = models.iter().map(|(_, w)| w).sum();
        match self {
            Method::Linear { normalize: true } => {
                let size: f64 = models.iter().map(|(_, w)| w.abs()).sum();
                if sum.abs() <= 1e-8 * size || size == 0.0 {
                    return refuse(format!("the weights sum to {sum}, which cannot be divided by; do not normalize"));
                }
            }
            Method::Slerp { t } => {
                that("t", t, t.is_finite(), "a finite number, 0 for the first model and 1 for the second")?;
                if models.len() != 2 {
                    return refuse(format!("slerp goes between 2 models, not {}", models.len()));
                }
            }
            Method::TaskVectors(v) => {
                that("lambda", v.lambda, v.lambda.is_finite(), "a finite number")?;
                if let Keep::Largest { density } | Keep::Random { density, .. } = v.keep {
                    that("density", density, density > 0.0 && density <= 1.0, "a number in (0, 1]")?;
                }
                if v.normalize {
                    non_negative("a normalized sum of task vectors")?;
                    if sum == 0.0 {
                        return refuse("all weights are zero".to_owned());
                    }
                }
            }
            Method::Fisher => {
                if let Some((name, w)) = models.iter().find(|(_, w)| *w <= 0.0) {
                    return refuse(format!(
                        "model `{name}` has the weight {w}: expected a number > 0; removal is for combine"
                    ));
                }
            }
            Method::GradientMatching { delta } => {
                if *delta != 0.0 {
                    positive("delta", *delta)?;
                }
            }
            Method::Linear { normalize: false } | Method::Combine => {}
        }
        Ok(())
    }
}

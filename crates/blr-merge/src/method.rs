//! What a merge computes, as a value: the methods, their settings and the ranges of both. How it is computed is in
//! engine/.

use crate::{Error, Result};
use std::fmt::{Display, Formatter};

/// How several models become one. θ_k are the models, w_k their weights, θ₀ is the base. Every tensor is merged on its
/// own, element by element unless said otherwise.
///
/// | method | θ | needs |
/// |---|---|---|
/// | [`Method::Linear`] | Σ w_k θ_k, divided by Σ w_k if normalized | |
/// | [`Method::Slerp`] | along the arc between two tensors | two models |
/// | [`Method::Karcher`] | the mean on the sphere, times the mean norm | |
/// | [`Method::TaskVectors`] | θ₀ + λ Σ w_k d_k, d_k = θ_k - θ₀ made sparse | base |
/// | [`Method::ModelStock`] | θ₀ + t (mean of θ_k - θ₀), t from the angles between the d_k | base |
/// | [`Method::Sce`] | θ₀ + Σ η_k d_k, where the models differ most, η_k from Σ d_k² | base |
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
    /// From the first model's tensor a to the second's, b, at constant angular speed. Weights are not used.
    ///
    /// ```text
    /// cos Ω = ⟨a, b⟩ / (‖a‖ ‖b‖)        over the whole tensor
    /// θ = sin((1-t)Ω)/sin Ω · a + sin(tΩ)/sin Ω · b
    /// ```
    ///
    /// If |cos Ω| > 0.9995, or a tensor is zero, the result is (1-t) a + t b. If a and b have the same norm, so has the
    /// result.
    Slerp {
        /// 0 is the first model, 1 the second.
        t: f64,
    },
    /// The spherical (Karcher, Fréchet) mean of the tensors' directions u_k = θ_k / ‖θ_k‖, of length Σ w_k ‖θ_k‖; slerp
    /// for any number of models. Weights are relative to their sum, and must be ≥ 0.
    ///
    /// ```text
    /// θ = Σ w_k ‖θ_k‖ · u        u minimizes Σ w_k Ω(u, u_k)² on the sphere, Ω the angle
    /// u ← exp_u( Σ w_k log_u(u_k) ),    log_u(v) = Ω/sin Ω · (v - cos Ω · u),    Ω = Ω(u, v)
    /// ```
    ///
    /// from the normalized Σ w_k u_k on, in f64, until no coordinate of u (in the u_k) changes by 10⁻¹³. A tensor that
    /// is zero has no direction and counts in the length alone. Directions without a mean of their own (two opposite
    /// ones, for example two single numbers of either sign) are an error: leave that tensor out, or give it another
    /// method.
    Karcher,
    /// The base plus a sum of differences from it: task arithmetic, TIES, DARE, DELLA, Model Breadcrumbs.
    TaskVectors(TaskVectors),
    /// Model Stock (Jang, Yun and Han 2024): of N fine-tunes of one task, the point closest to the centre that their
    /// weights surround, by the angle between their differences to the base. Weights are not used.
    ///
    /// ```text
    /// t = N cos Ω / (1 + (N-1) cos Ω)      θ = t · mean of θ_k + (1-t) θ₀
    /// ```
    ///
    /// per tensor, as in the paper; of more than two, cos Ω is the mean of the cosines of all pairs (not the cosine of
    /// the mean angle, which others take: N cos Ω then never exceeds what the sum of N unit vectors allows). A pair
    /// with a difference of zero has cos Ω = 0. A negative cos Ω counts as 0, which is the base; one model is t = 1.
    ModelStock,
    /// SCE (Wan et al., *FuseChat*, 2024): *s*elects the elements in which the models differ most, *c*alculates a
    /// weight for each model's tensor, and *e*rases the d_k of the sign of the minority. Weights are not used.
    ///
    /// ```text
    /// S = the max(1, ⌊density·n⌋) elements of the largest variance of d_k over the models; of equal ones, the first
    /// η_k = Σ_S d_k² / Σ_j Σ_S d_j²       (equal, if all are zero)
    /// θ = θ₀ + Σ η_k d_k / Σ η_k           in S, over the k whose d_k has the sign of Σ_j d_j (zero is positive)
    /// ```
    ///
    /// Dividing by the η_k that are left is the average of TIES, as merge programs have it; where nothing is erased it
    /// makes no difference.
    Sce {
        /// In (0, 1].
        density: f64,
    },
    /// The average weighted by curvature F_k ≥ 0, the diagonal of the Fisher information (Matena and Raffel 2022).
    /// Where every F_k of an element is zero, the limit of equal F_k is taken, which is the weighted average. Weights
    /// must be > 0.
    Fisher,
    /// Gradient matching with uncertainty (Daheim et al. 2024): to first order, the minimum that training jointly on Σ
    /// w_k L_k with the prior N(θ₀, H₀⁻¹) would find. H_k is the curvature of the loss of task k alone, on the scale of
    /// the loss summed over its data. Negative weights remove a task.
    ///
    /// All H_k = 0 is task arithmetic; H₀ → 0 is Fisher averaging. Models that come with the precision of their
    /// posterior, s_k = H₀ + H_k, instead of H_k give the same.
    GradientMatching {
        /// Added to H₀; ≥ 0, by default 10⁻¹². Elements without any curvature then follow task arithmetic.
        delta: f64,
        /// Whether posteriors' H_k = s_k - H₀ is taken as max(H_k, 0); by default it is taken as it is. The precision
        /// of a posterior that was learned by an estimate of either sign may be below its prior's in some elements.
        /// Such an H_k is then 0: the element of that model weighs nothing, and moves as in task arithmetic.
        clamp: bool,
    },
    /// The weighted sum of the natural parameters of diagonal Gaussians, as `tch_blr::combine` computes it. Weights may
    /// be negative, as long as every merged precision is positive.
    Combine,
}

/// θ = θ₀ + λ Σ w_k d_k: what is kept of each difference d_k = θ_k - θ₀, and what is done where they conflict.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TaskVectors {
    /// λ, a finite number; default 1.
    pub lambda: f64,
    /// Which elements of each d_k.
    pub keep: Keep,
    /// Whether in each element only those d_k count whose w_k d_k has the sign of Σ w_k d_k; a sum of zero counts as
    /// positive.
    pub elect_signs: bool,
    /// Whether the sum is divided by Σ w_k; with elected signs, by the sum of those w_k that agree. Weights must then
    /// be ≥ 0.
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
    /// All but the ⌊smallest · n⌋ smallest and the ⌊largest · n⌋ largest |d| of the tensor's n (Davari and Belilovsky
    /// 2024); of equal ones, the first count as larger.
    Middle {
        /// β ≥ 0; β + γ < 1.
        smallest: f64,
        /// γ ≥ 0.
        largest: f64,
    },
    /// Each with a probability that rises with |d|, independently, and divided by it, so that the expectation is d:
    /// MAGPRUNE (Deep, Bhardwaj and Poria 2024).
    ///
    /// ```text
    /// p = density - ε/2 + ε (r - ½)/n        r = 1 for the smallest |d| of the tensor, n for the largest
    /// ```
    ///
    /// Ranked over the whole tensor, as everything here (the paper also ranks within rows), to the three digits of
    /// bf16; equal ones share their mean rank, so that the mean of all p is the density. ε = 0 is [`Keep::Random`].
    Ranked {
        /// In (0, 1].
        density: f64,
        /// ε ≥ 0, by how much the largest |d| are likelier than the smallest; density ± ε/2 must be in (0, 1].
        epsilon: f64,
        /// As of [`Keep::Random`].
        seed: u64,
    },
    /// Each with probability `density`, independently; those that are kept are rescaled.
    Random {
        /// In (0, 1].
        density: f64,
        /// What makes up for those that are dropped.
        rescale: Rescale,
        /// Decides, together with the names of tensor and model, which are kept. The order of tensors or models does
        /// not matter.
        seed: u64,
    },
}

/// What makes up for dropped elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rescale {
    /// Times 1/density: the expectation is d.
    Density,
    /// Times Σ|d| of all elements over Σ|d| of those that are kept: the L1 norm stays that of d.
    L1Norm,
}

impl Method {
    /// The weighted average.
    pub fn linear() -> Self {
        Method::Linear { normalize: true }
    }

    /// θ₀ + λ Σ w_k (θ_k - θ₀) (Ilharco et al. 2023).
    pub fn task_arithmetic(lambda: f64) -> Self {
        Method::TaskVectors(TaskVectors { lambda, keep: Keep::All, elect_signs: false, normalize: false })
    }

    /// TIES (Yadav et al. 2023): trims each difference to its largest elements, elects signs, and averages those that
    /// agree.
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

    /// DELLA (Deep, Bhardwaj and Poria 2024): drops by [`Keep::Ranked`], elects signs, and averages those that agree.
    pub fn della(lambda: f64, density: f64, epsilon: f64, seed: u64) -> Self {
        let keep = Keep::Ranked { density, epsilon, seed };
        Method::TaskVectors(TaskVectors { lambda, keep, elect_signs: true, normalize: true })
    }

    /// Model Breadcrumbs (Davari and Belilovsky 2024): task arithmetic without the β smallest and the γ largest
    /// elements of each difference.
    pub fn breadcrumbs(lambda: f64, beta: f64, gamma: f64) -> Self {
        let keep = Keep::Middle { smallest: beta, largest: gamma };
        Method::TaskVectors(TaskVectors { lambda, keep, elect_signs: false, normalize: false })
    }

    /// [`Method::GradientMatching`] with the default δ, exact in H_k of either sign.
    pub fn gradient_matching() -> Self {
        // Too small to count beside curvature that data gave an element, and in f64 safe to divide by.
        Method::GradientMatching { delta: 1e-12, clamp: false }
    }

    /// Whether it starts from a base model.
    pub fn needs_base(&self) -> bool {
        use Method::{GradientMatching, ModelStock, Sce, TaskVectors};
        matches!(self, TaskVectors(_) | ModelStock | Sce { .. } | GradientMatching { .. })
    }

    /// Whether each model, and the base if there is one, must come with its curvature or precision.
    pub fn needs_curvature(&self) -> bool {
        matches!(self, Method::Fisher | Method::GradientMatching { .. } | Method::Combine)
    }

    /// Checks all that can be checked before any tensor is read: the settings, and the name and weight of each model.
    ///
    /// # Errors
    /// [`Error::HyperParameter`] for a setting that is out of range; [`Error::Merge`] if there is no model, two have
    /// the same name, or the method cannot use their number or weights.
    pub fn validate(&self, models: &[(&str, f64)]) -> Result<()> {
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
        let some = || if sum == 0.0 { refuse("all weights are zero".to_owned()) } else { Ok(()) };
        match self {
            Method::Linear { normalize: true } => {
                let size: f64 = models.iter().map(|(_, w)| w.abs()).sum();
                // So small a sum, relative to its terms, may be what rounding left of zero.
                if sum.abs() <= 1e-8 * size || size == 0.0 {
                    return refuse(format!("the weights sum to {sum}, which cannot be divided by; do not normalize"));
                }
            }
            Method::Slerp { t } => {
                Error::unless(t.is_finite(), "t", t, "a finite number, 0 for the first model and 1 for the second")?;
                if models.len() != 2 {
                    return refuse(format!("slerp goes between 2 models, not {}", models.len()));
                }
            }
            Method::TaskVectors(v) => {
                Error::unless(v.lambda.is_finite(), "lambda", v.lambda, "a finite number")?;
                v.keep.validate()?;
                if v.normalize {
                    non_negative("a normalized sum of task vectors")?;
                    some()?;
                }
            }
            Method::Karcher => {
                non_negative("a mean on the sphere")?;
                some()?;
            }
            Method::Sce { density } => proper_density(*density)?,
            Method::Fisher => {
                if let Some((name, w)) = models.iter().find(|(_, w)| *w < 0.0) {
                    return refuse(format!(
                        "model `{name}` has the weight {w}: expected a number ≥ 0; to remove a model, use combine"
                    ));
                }
                some()?;
            }
            Method::GradientMatching { delta, .. } => {
                Error::unless(delta.is_finite() && *delta >= 0.0, "delta", delta, "a finite number ≥ 0")?;
            }
            Method::Linear { normalize: false } | Method::ModelStock | Method::Combine => {}
        }
        Ok(())
    }
}

fn proper_density(density: f64) -> Result<()> {
    Error::unless(density > 0.0 && density <= 1.0, "density", density, "a number in (0, 1]")
}

impl Keep {
    fn validate(self) -> Result<()> {
        match self {
            Keep::All => Ok(()),
            Keep::Largest { density } | Keep::Random { density, .. } => proper_density(density),
            Keep::Middle { smallest, largest } => {
                Error::unless((0.0..1.0).contains(&smallest), "beta", smallest, "a number in [0, 1)")?;
                let rest = (0.0..1.0 - smallest).contains(&largest);
                Error::unless(rest, "gamma", largest, "a number ≥ 0 that is less than 1 - beta")
            }
            Keep::Ranked { density, epsilon, .. } => {
                proper_density(density)?;
                let proper = epsilon >= 0.0 && density - epsilon / 2.0 > 0.0 && density + epsilon / 2.0 <= 1.0;
                Error::unless(proper, "epsilon", epsilon, "a number ≥ 0 for which density ± epsilon/2 are in (0, 1]")
            }
        }
    }
}

/// In words, with all settings: what `--dry-run` prints.
impl Display for Method {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        match self {
            Method::Linear { normalize: true } => write!(f, "average"),
            Method::Linear { normalize: false } => write!(f, "sum"),
            Method::Slerp { t } => write!(f, "slerp, t {t}"),
            Method::Karcher => write!(f, "Karcher mean"),
            Method::TaskVectors(v) => {
                write!(f, "task vectors, lambda {}, {}", v.lambda, v.keep)?;
                let signs = if v.elect_signs { ", signs elected" } else { "" };
                let normalized = if v.normalize { ", normalized" } else { "" };
                write!(f, "{signs}{normalized}")
            }
            Method::ModelStock => write!(f, "Model Stock"),
            Method::Sce { density } => write!(f, "SCE, density {density}"),
            Method::Fisher => write!(f, "Fisher average"),
            Method::GradientMatching { delta, clamp } => {
                write!(f, "gradient matching, delta {delta:e}{}", if *clamp { ", clamped" } else { "" })
            }
            Method::Combine => write!(f, "sum of natural parameters"),
        }
    }
}

impl Display for Keep {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        match self {
            Keep::All => write!(f, "whole"),
            Keep::Largest { density } => write!(f, "the largest {density}"),
            Keep::Middle { smallest, largest } => {
                write!(f, "without the smallest {smallest} and the largest {largest}")
            }
            Keep::Ranked { density, epsilon, seed } => {
                write!(f, "random {density}, by magnitude ± {}, seed {seed}", epsilon / 2.0)
            }
            Keep::Random { density, rescale, seed } => {
                let norm = if *rescale == Rescale::L1Norm { ", norm kept" } else { "" };
                write!(f, "random {density}{norm}, seed {seed}")
            }
        }
    }
}

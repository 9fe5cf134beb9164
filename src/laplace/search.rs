//! The prior precisions and the noise under which the data are most likely.

use super::Laplace;
use crate::{Error, Result, check};

/// How [`Laplace::optimize_prior`] searches.
///
/// With the weights m fixed, ln Z is concave in all ln p and ln σ² together: there is one maximum, and both ways lead
/// to it. They differ in the steps that they take, which matters where the weights are trained on between them.
#[derive(Debug, Clone, PartialEq)]
pub struct PriorSearch {
    way: Way,
    per_block: bool,
    noise: bool,
    steps: usize,
    bounds: (f64, f64),
}

#[derive(Debug, Clone, PartialEq)]
enum Way {
    MacKay,
    Adam { lr: f64 },
}

impl PriorSearch {
    /// MacKay's fixed point p = γ/‖m - m₀‖², σ² = SSE/(NC - γ). Every step of p goes half the way in the logarithm:
    /// whole steps go back and forth where the data say little. σ² takes the step of EM, (SSE + σ²γ)/(NC), which has
    /// the same fixed point and is positive also where a diagonal or Kronecker-factored curvature has γ > NC. At most
    /// 1000 steps, until a logarithm moves by less than 10⁻¹⁰.
    pub fn mackay() -> Self {
        PriorSearch { way: Way::MacKay, per_block: false, noise: false, steps: 1000, bounds: (1e-8, 1e8) }
    }

    /// Steps of Adam on ln p and ln σ² along the gradient of ln Z; lr > 0. Usual: lr 0.1, 100 steps for a search at the
    /// end of a training, 10 in between (Immer et al. 2021).
    pub fn gradient(lr: f64, steps: usize) -> Self {
        PriorSearch { way: Way::Adam { lr }, steps, ..Self::mackay() }
    }

    /// A precision for every block of [`Laplace`] instead of one for all, which starts at the geometric mean of the
    /// present ones.
    #[must_use]
    pub fn per_block(mut self) -> Self {
        self.per_block = true;
        self
    }

    /// The noise σ² of a Gaussian likelihood, too.
    #[must_use]
    pub fn noise(mut self) -> Self {
        self.noise = true;
        self
    }

    /// At most that many steps, ≥ 1.
    #[must_use]
    pub fn steps(mut self, n: usize) -> Self {
        self.steps = n;
        self
    }

    /// The least and the largest p and σ²; default 10⁻⁸ and 10⁸. Without them p would go to infinity where m is m₀ (a
    /// layer that the prior switches off), to zero where the data have no curvature, and σ² to zero where they are
    /// interpolated.
    #[must_use]
    pub fn bounds(mut self, least: f64, largest: f64) -> Self {
        self.bounds = (least, largest);
        self
    }

    fn validate(&self) -> Result<()> {
        check::count("steps", self.steps)?;
        if let Way::Adam { lr } = self.way {
            check::positive("lr", lr)?;
        }
        let (least, largest) = self.bounds;
        check::positive("bounds", least)?;
        check::positive("bounds", largest)?;
        check::that("bounds", self.bounds, least < largest, "the least below the largest")
    }
}

/// What a search has found; [`Laplace`] is left there.
#[derive(Debug, Clone, PartialEq)]
pub struct Tuned {
    /// ln Z there, in nats.
    pub log_evidence: f64,
    /// γ there.
    pub effective_parameters: f64,
    /// Steps taken.
    pub steps: usize,
    /// Whether ln Z has no slope of more than 10⁻³ nats by the logarithm of any number that is not capped; if not,
    /// allow more steps.
    pub converged: bool,
    /// What ended at one of [`PriorSearch::bounds`]: `p of` and the names of a block's parameters, or `variance`.
    pub capped: Vec<String>,
    /// [`Laplace::off_mode`] at the precisions found.
    pub off_mode: Option<f64>,
}

impl Tuned {
    /// A warning if the weights are not near the mode that the evidence is about: if [`Tuned::off_mode`] is more than a
    /// tenth of γ/2, what it would be were each of the γ directions that the data determine off by its posterior
    /// deviation. The scatter ‖m - m₀‖² then says more of where the training stopped than of the prior: train on with
    /// weight decay p/N, and search again.
    pub fn warning(&self) -> Option<String> {
        let near = |off: f64| off <= 0.05 * self.effective_parameters;
        let off = self.off_mode.filter(|off| !near(*off))?;
        Some(format!(
            "the log joint has its maximum {off:.3} nats above the present weights, by the curvature: they are not converged \
             under this prior; train on with weight decay p/N and search again"
        ))
    }
}

/// Steps of Adam in one number.
#[derive(Default, Clone)]
struct Moments {
    mean: f64,
    square: f64,
}

impl Moments {
    fn step(&mut self, slope: f64, lr: f64, t: usize) -> f64 {
        let (b1, b2) = (0.9f64, 0.999f64);
        self.mean = b1 * self.mean + (1.0 - b1) * slope;
        self.square = b2 * self.square + (1.0 - b2) * slope * slope;
        let unbiased = |m: f64, b: f64| m / (1.0 - b.powi(t as i32));
        lr * unbiased(self.mean, b1) / (unbiased(self.square, b2).sqrt() + 1e-8)
    }
}

/// The logarithm of a number between two bounds; a NaN is the upper one.
fn bounded(log: f64, (least, largest): (f64, f64)) -> f64 {
    // 0/0: no curvature and m at m₀, where ln Z does not depend on p at all.
    if log.is_nan() { largest.ln() } else { log.clamp(least.ln(), largest.ln()) }
}

impl Laplace {
    /// Moves the prior precisions, and with [`PriorSearch::noise`] σ², to where the data are most likely. No pass over
    /// the data; the weights stay, so that it is one half of a search for both (see `docs/laplace.md` for the other).
    ///
    /// # Errors
    /// As [`Laplace::log_evidence`]; settings out of range; a noise to be searched that there is not. Precisions and
    /// noise are then as they were.
    pub fn optimize_prior(&mut self, search: &PriorSearch) -> Result<Tuned> {
        search.validate()?;
        self.fit()?;
        if search.noise {
            self.check_noise()?;
        }
        let (precisions, variance): (Vec<f64>, f64) = (self.precisions().map(|(_, p)| p).collect(), self.variance);
        self.search(search).inspect_err(|_| {
            self.blocks.iter_mut().zip(precisions).for_each(|(block, p)| block.precision = p);
            self.variance = variance;
        })
    }

    fn search(&mut self, search: &PriorSearch) -> Result<Tuned> {
        // Numbers of blocks that share a precision.
        let all: Vec<usize> = (0..self.blocks.len()).collect();
        let groups = if search.per_block { all.iter().map(|b| vec![*b]).collect() } else { vec![all] };
        let start =
            |group: &Vec<usize>| group.iter().map(|b| self.blocks[*b].precision.ln()).sum::<f64>() / group.len() as f64;
        let mut logs: Vec<f64> = groups.iter().map(|group| bounded(start(group), search.bounds)).collect();
        let mut log_variance =
            if search.noise { bounded(self.variance.ln(), search.bounds) } else { self.variance.ln() };
        let mut moments = vec![Moments::default(); groups.len() + 1];
        let (mut steps, mut settled) = (0, false);
        self.put(&groups, &logs, search.noise.then_some(log_variance));
        while steps < search.steps && !settled {
            steps += 1;
            let (fit, scale) = (self.fit()?, self.scale());
            let gammas = self.blocks.iter().map(|block| block.effective(scale)).collect::<Result<Vec<f64>>>()?;
            let total: f64 = gammas.iter().sum();
            let mut change = 0.0f64;
            let mut next = |log: f64, moments: &mut Moments, share: f64, [has, wants]: [f64; 2]| {
                // `has` is what p‖m-m₀‖² (or NC) is, and `wants` what it is at the maximum.
                let to = bounded(
                    match search.way {
                        Way::MacKay => log + share * (wants / has).ln(),
                        Way::Adam { lr } => log + moments.step(0.5 * (wants - has), lr, steps),
                    },
                    search.bounds,
                );
                change = change.max((to - log).abs());
                to
            };
            for ((group, log), moments) in groups.iter().zip(&mut logs).zip(&mut moments) {
                let scatter: f64 = group.iter().map(|b| self.blocks[*b].scatter()).sum();
                *log = next(*log, moments, 0.5, [log.exp() * scatter, group.iter().map(|b| gammas[*b]).sum()]);
            }
            if search.noise {
                let last = moments.len() - 1;
                log_variance =
                    next(log_variance, &mut moments[last], 1.0, [fit.outputs, 2.0 * fit.loss * scale + total]);
            }
            settled = change < 1e-10;
            self.put(&groups, &logs, search.noise.then_some(log_variance));
        }
        let at_bound = |log: f64| log <= search.bounds.0.ln() || log >= search.bounds.1.ln();
        let mut capped: Vec<String> = Vec::new();
        for (group, _) in groups.iter().zip(&logs).filter(|(_, log)| at_bound(**log)) {
            let names: Vec<&str> = group.iter().flat_map(|b| &self.blocks[*b].names).map(String::as_str).collect();
            capped.push(format!("p of {}", names.join(", ")));
        }
        if search.noise && at_bound(log_variance) {
            capped.push("variance".to_owned());
        }
        let slope = self.slope()?;
        let of_group = |group: &Vec<usize>| group.iter().map(|b| slope.log_precisions[*b]).sum::<f64>();
        let free = groups.iter().zip(&logs).filter(|(_, log)| !at_bound(**log)).map(|(group, _)| of_group(group));
        let noise = slope.log_variance.filter(|_| search.noise && !at_bound(log_variance));
        let converged = free.chain(noise).all(|slope| slope.abs() <= 1e-3);
        let log_evidence = self.log_evidence()?;
        if !log_evidence.is_finite() {
            return Err(Error::Curvature(format!("the log evidence is {log_evidence} after {steps} steps")));
        }
        let (effective_parameters, off_mode) = (self.effective_parameters()?, self.off_mode()?);
        Ok(Tuned { log_evidence, effective_parameters, steps, converged, capped, off_mode })
    }

    fn put(&mut self, groups: &[Vec<usize>], logs: &[f64], log_variance: Option<f64>) {
        for (group, log) in groups.iter().zip(logs) {
            for b in group {
                self.blocks[*b].precision = log.exp();
            }
        }
        if let Some(log) = log_variance {
            self.variance = log.exp();
        }
    }
}

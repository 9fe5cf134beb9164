//! Previews: the model that training on a weighting of several tasks would find, from the posterior of each task alone.

use super::gradient_matching;
use crate::posterior::{NaturalSum, Posterior};
use crate::{DiagonalGaussian, Error, Mixture, Result, check};
use tch::{Kind, Tensor};

/// The posterior that training on Σ_t α_t l_t would find, from posteriors q_t that each learned its task alone under
/// the prior p₀ (Daheim et al. 2024, and *How to Weight Multitask Finetuning*, 2024): train every task once, then look
/// at any number of weightings α before one is trained.
///
/// A task's loss is seen through its posterior, l_t ≈ -ln q_t + ln p₀, so that the merge is
///
/// ```text
/// q_α ∝ p₀^(1 - Σα) Π_t q_t^(α_t)
/// ```
///
/// and the preview is its mode. What family the posteriors have decides how much of the losses they saw:
///
/// | posteriors | the preview | cost for P weights, T tasks, K components |
/// |---|---|---|
/// | isotropic of equal precision | with Σα = 1 the average Σ α_t θ_t | PT |
/// | diagonal, Kronecker-factored, full | one [`combine`](crate::combine): the optimum of quadratic losses of that form | PT; P²T + P³ for a full one |
/// | [`Mixture`] | the best of several fixed points: [`preview_from`] | PTK for each iteration |
///
/// For losses that are quadratic a preview of full posteriors is exact. α multiplies log-likelihoods, which are sums
/// over a task's examples: tasks of unequal size N_t enter with their N_t, unless α_t is divided by it.
/// [`sweep`](crate::merge::sweep) has the losses of every task at each weighting of a list.
///
/// ```
/// use tch::Tensor;
/// use tch_blr::{DiagonalGaussian, merge};
/// # fn main() -> tch_blr::Result<()> {
/// let q = |m: f64, s: f64| DiagonalGaussian::new([("w", Tensor::from_slice(&[m]), Tensor::from_slice(&[s]))]);
/// let (prior, a, b) = (q(0.0, 1.0)?, q(1.0, 5.0)?, q(-1.0, 3.0)?);
/// // In favour of a: precision 0.8·5 + 0.2·3, and the mean (0.8·5 - 0.2·3) over it.
/// let preview = merge::preview(&prior, &[&a, &b], &[0.8, 0.2])?;
/// assert!((preview.mean("w").unwrap().double_value(&[0]) - 3.4 / 4.6).abs() < 1e-15);
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// A weight that is not finite and ≥ 0, another number of weights than of tasks, mixtures whose iteration does not
/// settle, and as [`combine`](crate::combine): if
/// Σα > 1 the prior is taken away, and some precision may not be left.
pub fn preview<Q: Preview>(prior: &Q::Merged, tasks: &[&Q], alpha: &[f64]) -> Result<Q::Merged> {
    check_weighting(tasks.len(), alpha)?;
    let _no_grad = tch::no_grad_guard();
    Q::preview_of(prior, tasks, alpha)
}

/// Posteriors of tasks that [`preview`] takes: those whose natural parameters add, and mixtures. It cannot be
/// implemented elsewhere.
pub trait Preview: Posterior + Sized + sealed::Sealed {
    /// The family of the prior and of the preview.
    type Merged: Posterior;

    #[doc(hidden)]
    fn preview_of(prior: &Self::Merged, tasks: &[&Self], alpha: &[f64]) -> Result<Self::Merged>;
}

mod sealed {
    pub trait Sealed {}
    impl<Q: super::NaturalSum> Sealed for Q {}
    impl Sealed for super::Mixture {}
}

impl<Q: NaturalSum> Preview for Q {
    type Merged = Q;

    fn preview_of(prior: &Q, tasks: &[&Q], alpha: &[f64]) -> Result<Q> {
        gradient_matching(prior, &alpha.iter().copied().zip(tasks.iter().copied()).collect::<Vec<_>>())
    }
}

impl Preview for Mixture {
    type Merged = DiagonalGaussian;

    /// From each component of the task that weighs most, and from the average of all tasks' means.
    fn preview_of(prior: &DiagonalGaussian, tasks: &[&Mixture], alpha: &[f64]) -> Result<DiagonalGaussian> {
        let most = (0..tasks.len()).max_by(|a, b| alpha[*a].total_cmp(&alpha[*b]));
        let Some(most) = most.filter(|t| alpha[*t] > 0.0) else { return Ok(prior.shallow_clone()) };
        let problem = Problem::new(prior, tasks, alpha)?;
        let components = tasks[most].components().iter().map(|q| problem.means_of(q));
        let mut best: Result<Mode> = Err(Error::Posterior("no start has a preview".to_owned()));
        for start in components.chain([average(prior, tasks, alpha)]) {
            let found = problem.solve(start);
            // Where Σα > 1 some starts may lead to a precision that is none, and others not.
            if best.is_err() || matches!((&found, &best), (Ok(f), Ok(b)) if f.log_density > b.log_density) {
                best = found;
            }
        }
        let best = best?;
        if !best.converged {
            let problem = format!(
                "its mode moves after {MOST_ITERATIONS} iterations still; preview_from returns it all the same"
            );
            return Err(Error::Posterior(format!("the preview of the mixtures: {problem}")));
        }
        Ok(best.posterior)
    }
}

/// What [`preview_from`] found.
#[derive(Debug)]
pub struct Mode {
    /// Mean θ and precision S(r) at the end.
    pub posterior: DiagonalGaussian,
    /// (1 - Σα) ln p₀(θ) + Σ α_t ln q_t(θ), in nats: the higher, the better the mode.
    pub log_density: f64,
    /// How often θ was computed.
    pub iterations: usize,
    /// Whether the last iteration left θ where it was, to rounding.
    pub converged: bool,
}

/// A mode of the preview of mixtures, from a start. With components q_t = Σ_k π_tk N(θ_tk, S_tk⁻¹) iterate
///
/// ```text
/// r_tk ∝ π_tk N(θ; θ_tk, S_tk⁻¹),  Σ_k r_tk = 1
/// S    = (1 - Σα) S₀ + Σ_t α_t Σ_k r_tk S_tk
/// θ    ← S⁻¹ [ (1 - Σα) S₀ m₀ + Σ_t α_t Σ_k r_tk S_tk θ_tk ]
/// ```
///
/// until θ stays. It is an EM algorithm: the density rises as long as Σα ≤ 1, and steps that lower it are halved
/// otherwise. In many dimensions densities are so far apart that r is 0 or 1, and the iteration picks one component of
/// each task, near the start: try several. With one component each it is the preview of Gaussians, after one step.
///
/// # Errors
/// As [`preview`]; a start with other parameters than the prior's.
pub fn preview_from(
    prior: &DiagonalGaussian,
    tasks: &[&Mixture],
    alpha: &[f64],
    start: &DiagonalGaussian,
) -> Result<Mode> {
    check_weighting(tasks.len(), alpha)?;
    let _no_grad = tch::no_grad_guard();
    let problem = Problem::new(prior, tasks, alpha)?;
    prior.same_parameters(start)?;
    problem.solve(problem.means_of(start))
}

fn check_weighting(tasks: usize, alpha: &[f64]) -> Result<()> {
    check::that("alpha", alpha, alpha.len() == tasks, "one weight for each task")?;
    alpha.iter().try_for_each(|a| check::non_negative("alpha", *a))
}

/// θ, one tensor in f64 for each parameter, in the order of the prior's.
type Point = Vec<Tensor>;

/// Σ α_t E\[q_t\] / Σ α_t
fn average(prior: &DiagonalGaussian, tasks: &[&Mixture], alpha: &[f64]) -> Point {
    let total: f64 = alpha.iter().sum();
    let mean = |q: &Mixture, name| q.mean(name).expect("same_parameters() has seen to it").to_kind(Kind::Double);
    let of = |name| tasks.iter().zip(alpha).map(|(q, a)| mean(q, name) * (a / total)).reduce(|a, b| a + b);
    prior.names().filter_map(of).collect()
}

fn copies(point: &Point) -> Point {
    point.iter().map(Tensor::copy).collect()
}

/// By how much the parameters differ at most, relative to the largest weight of each.
fn far(a: &Point, b: &Point) -> f64 {
    let largest = |t: &Tensor| if t.numel() == 0 { 0.0 } else { t.abs().max().double_value(&[]) };
    let pairs = a.iter().zip(b).map(|(a, b)| (largest(&(a - b)), largest(b)));
    pairs.map(|(d, size)| if d == 0.0 { 0.0 } else { d / size }).fold(0.0, f64::max)
}

/// The components of all tasks under one prior, each with the log of what does not depend on θ in π N(θ; ..).
struct Problem<'a> {
    prior: Component<'a>,
    tasks: Vec<(f64, Vec<Component<'a>>)>,
}

struct Component<'a> {
    q: &'a DiagonalGaussian,
    /// ln π + ½ Σ ln s/2π
    log_scale: f64,
}

const MOST_ITERATIONS: usize = 1000;

impl<'a> Problem<'a> {
    fn new(prior: &'a DiagonalGaussian, tasks: &[&'a Mixture], alpha: &[f64]) -> Result<Self> {
        for q in tasks.iter().flat_map(|q| q.components()) {
            prior.same_parameters(q)?;
        }
        let component = |(log_weight, q): (f64, &'a DiagonalGaussian)| {
            let constant = -q.entropy() + 0.5 * q.len() as f64;
            Component { q, log_scale: log_weight + constant }
        };
        let of = |(alpha, q): (&f64, &&'a Mixture)| {
            let weights = q.mixing().iter().map(|w| w.ln());
            (*alpha, weights.zip(q.components()).map(component).collect())
        };
        Ok(Problem { prior: component((0.0, prior)), tasks: alpha.iter().zip(tasks).map(of).collect() })
    }

    /// 1 - Σα
    fn rest(&self) -> f64 {
        1.0 - self.tasks.iter().map(|(alpha, _)| alpha).sum::<f64>()
    }

    fn means_of(&self, q: &DiagonalGaussian) -> Point {
        let mean = |name| q.mean(name).expect("same_parameters() has seen to it").to_kind(Kind::Double);
        self.prior.q.names().map(mean).collect()
    }

    /// r of every component, and the log density.
    fn weigh(&self, at: &Point) -> (Vec<Vec<f64>>, f64) {
        let mut log_density = self.rest() * self.prior.log(at);
        let mut all = Vec::with_capacity(self.tasks.len());
        for (alpha, components) in &self.tasks {
            let logs: Vec<f64> = components.iter().map(|c| c.log(at)).collect();
            let largest = logs.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let sum: f64 = logs.iter().map(|log| (log - largest).exp()).sum();
            log_density += alpha * (largest + sum.ln());
            all.push(logs.iter().map(|log| (log - largest).exp() / sum).collect());
        }
        (all, log_density)
    }

    /// S(r), and the θ that it has.
    fn towards(&self, r: &[Vec<f64>]) -> Result<(Point, Point)> {
        let of_task = |((alpha, components), r): (&(f64, Vec<Component<'a>>), &Vec<f64>)| {
            components.iter().zip(r).map(|(c, r)| (alpha * r, c.q)).collect::<Vec<_>>()
        };
        let terms = self.tasks.iter().zip(r).flat_map(of_task).chain([(self.rest(), self.prior.q)]);
        let terms: Vec<(f64, &DiagonalGaussian)> = terms.filter(|(weight, _)| *weight != 0.0).collect();
        let (mut means, mut precisions) = (Vec::new(), Vec::new());
        for name in self.prior.q.names() {
            let like = self.prior.q.mean(name).expect("its own name").to_kind(Kind::Double);
            let (mut precision, mut scaled) = (like.zeros_like(), like.zeros_like());
            for (weight, q) in &terms {
                let e = q.entry(name).expect("same_parameters() has seen to it");
                let wide = |t: &Tensor| t.to_device(like.device()).to_kind(Kind::Double);
                let weighted = wide(&e.precision) * *weight;
                scaled += &weighted * wide(&e.mean);
                precision += weighted;
            }
            let least = if precision.numel() == 0 { f64::INFINITY } else { precision.min().double_value(&[]) };
            if least <= 0.0 || least.is_nan() {
                let what = format!("the precision of the preview of `{name}`");
                let problem = format!("an element becomes {least:e}; Σα > 1 takes the prior away, so lower it");
                return Err(Error::NotPositiveDefinite { what, problem });
            }
            means.push(scaled / &precision);
            precisions.push(precision);
        }
        Ok((means, precisions))
    }

    fn solve(&self, start: Point) -> Result<Mode> {
        let mut theta = start;
        let (mut r, mut log_density) = self.weigh(&theta);
        let (mut iterations, mut converged) = (0, false);
        // With what precision this r goes along.
        let mut precisions = self.towards(&r)?.1;
        while iterations < MOST_ITERATIONS && !converged {
            iterations += 1;
            let (target, precision) = self.towards(&r)?;
            let (next, found) = self.ascend(&theta, &target, log_density);
            converged = far(&theta, &next) <= 4.0 * f64::EPSILON;
            (theta, precisions) = (next, precision);
            (r, log_density) = found;
        }
        let kind = |t: Tensor, name: &str| t.to_kind(self.prior.q.mean(name).expect("its own name").kind());
        let names: Vec<&str> = self.prior.q.names().collect();
        let entries = names.iter().zip(theta).zip(precisions);
        let entries = entries.map(|((name, m), s)| (*name, kind(m, name), kind(s, name)));
        let posterior = DiagonalGaussian::sharing(entries)?.with_seed(self.prior.q.seed());
        Ok(Mode { posterior, log_density, iterations, converged })
    }

    /// The target, or a point so close to θ on the way to it that the density does not fall.
    fn ascend(&self, theta: &Point, target: &Point, log_density: f64) -> (Point, (Vec<Vec<f64>>, f64)) {
        let mut share = 1.0;
        loop {
            let part = || theta.iter().zip(target).map(|(a, b)| a.lerp(b, share)).collect();
            let next: Point = if share == 1.0 { copies(target) } else { part() };
            let found = self.weigh(&next);
            // A difference within rounding is no fall.
            if found.1 >= log_density - 1e-12 * log_density.abs() || share < 1e-8 {
                return (next, found);
            }
            share *= 0.5;
        }
    }
}

impl Component<'_> {
    /// ln π N(θ; ..)
    fn log(&self, at: &Point) -> f64 {
        let terms = self.q.names().zip(at).map(|(name, theta)| (self.q.entry(name).expect("its own name"), theta));
        let squares = terms.map(|(e, theta)| {
            let wide = |t: &Tensor| t.to_device(theta.device()).to_kind(Kind::Double);
            ((theta - wide(&e.mean)).square() * wide(&e.precision)).sum(Kind::Double).double_value(&[])
        });
        self.log_scale - 0.5 * squares.sum::<f64>()
    }
}

#[cfg(test)]
mod tests;

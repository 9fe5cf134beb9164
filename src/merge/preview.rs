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
/// For losses that are quadratic a preview of full posteriors is exact. α multiplies log-likelihoods, which are sums over
/// a task's examples: tasks of unequal size N_t enter with their N_t, unless α_t is divided by it.
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
mod tests {
    use super::*;
    use crate::{FullGaussian, combine};
    use tch::Device;

    const F64: (Kind, Device) = (Kind::Double, Device::Cpu);

    fn q(mean: f64, precision: f64) -> DiagonalGaussian {
        DiagonalGaussian::new([("w", Tensor::from_slice(&[mean]), Tensor::from_slice(&[precision]))]).unwrap()
    }

    fn numbers(t: &Tensor) -> Vec<f64> {
        Vec::try_from(t.to_kind(Kind::Double).contiguous().reshape([-1])).unwrap()
    }

    #[track_caller]
    fn close(ours: &Tensor, exact: &[f64], to: f64) {
        let ours = numbers(ours);
        assert!(ours.iter().zip(exact).all(|(a, b)| (a - b).abs() <= to), "{ours:?} and not {exact:?}");
    }

    /// Two quadratic losses ½(θ-c)ᵀH(θ-c), H not diagonal, under N(0, 10 I).
    struct Ridge {
        h: [Tensor; 2],
        c: [Tensor; 2],
        prior: FullGaussian,
    }

    impl Ridge {
        fn new() -> Self {
            let matrix = |x: [f64; 4]| Tensor::from_slice(&x).view([2, 2]);
            let prior = FullGaussian::new([("w", Tensor::zeros([2], F64))], &(Tensor::eye(2, F64) * 0.1)).unwrap();
            let h = [matrix([2.0, 0.5, 0.5, 1.0]), matrix([1.0, -0.3, -0.3, 3.0])];
            Ridge { h, c: [Tensor::from_slice(&[1.0, 0.0]), Tensor::from_slice(&[0.0, 1.0])], prior }
        }

        /// The posterior of Σ α_t l_t.
        fn posterior(&self, alpha: [f64; 2]) -> FullGaussian {
            let (mut s, mut b) = (self.prior.precision_matrix().copy(), Tensor::zeros([2], F64));
            for ((h, c), a) in self.h.iter().zip(&self.c).zip(alpha) {
                s += h * a;
                b += h.mv(c) * a;
            }
            FullGaussian::new([("w", s.inverse().mv(&b))], &s).unwrap()
        }

        fn tasks(&self) -> [FullGaussian; 2] {
            [self.posterior([1.0, 0.0]), self.posterior([0.0, 1.0])]
        }

        /// Σ α_t l_t(θ) + ½ 0.1 ‖θ‖²
        fn objective(&self, theta: &Tensor, alpha: [f64; 2]) -> f64 {
            let loss = |h: &Tensor, c: &Tensor| 0.5 * (theta - c).dot(&h.mv(&(theta - c))).double_value(&[]);
            let losses = (0..2).map(|t| alpha[t] * loss(&self.h[t], &self.c[t])).sum::<f64>();
            losses + 0.05 * theta.dot(theta).double_value(&[])
        }
    }

    #[test]
    fn the_more_of_the_curvature_a_family_has_the_better_it_previews() {
        let ridge = Ridge::new();
        let tasks = ridge.tasks();
        close(&tasks[0].mean_vector(), &[0.946601941747573, 0.024271844660194], 1e-15);
        close(&tasks[1].mean_vector(), &[-0.009036144578313, 0.966867469879518], 1e-15);

        let alpha = [0.3, 0.7];
        let full = preview(&ridge.prior, &[&tasks[0], &tasks[1]], &alpha).unwrap().mean_vector();
        let diagonal = |q: &FullGaussian| q.diagonal().unwrap();
        let diagonals = [diagonal(&tasks[0]), diagonal(&tasks[1])];
        let by = |tasks: [&DiagonalGaussian; 2]| preview(&diagonal(&ridge.prior), &tasks, &alpha).unwrap();
        let diagonal = by([&diagonals[0], &diagonals[1]]).mean("w").unwrap();
        // Any precision, the same in every direction and task.
        let isotropic =
            |q: &FullGaussian| DiagonalGaussian::new([("w", q.mean_vector(), Tensor::full([2], 3.0, F64))]).unwrap();
        let simple = by([&isotropic(&tasks[0]), &isotropic(&tasks[1])]).mean("w").unwrap();

        close(&full, &[0.317469397094154, 0.90761926553026], 1e-14);
        close(&ridge.posterior(alpha).mean_vector(), &numbers(&full), 1e-14);
        close(&diagonal, &[0.421000994268335, 0.842444847350567], 1e-14);
        close(&simple, &[0.277655281319453, 0.684088782313721], 1e-14);
        for (theta, objective) in [(full, 0.267021793845), (diagonal, 0.280239435652), (simple, 0.330054774562)] {
            assert!((ridge.objective(&theta, alpha) - objective).abs() < 1e-12);
        }
    }

    #[test]
    fn weights_beyond_1_take_the_prior_away() {
        let ridge = Ridge::new();
        let tasks = ridge.tasks();
        let tasks = [&tasks[0], &tasks[1]];
        let q = preview(&ridge.prior, &tasks, &[0.5, 0.8]).unwrap();
        close(&q.mean_vector(), &[0.39535781329497, 0.882015473955683], 1e-14);
        close(&q.mean_vector(), &numbers(&ridge.posterior([0.5, 0.8]).mean_vector()), 1e-14);
        // No weight at all is the prior.
        assert_eq!(preview(&ridge.prior, &tasks, &[0.0, 0.0]).unwrap().mean_vector(), Tensor::zeros([2], F64));
    }

    fn mixtures() -> [Mixture; 2] {
        let a = Mixture::new([(0.5, q(-1.0, 4.0)), (0.5, q(1.0, 4.0))]).unwrap();
        let b = Mixture::new([(0.7, q(0.8, 3.0)), (0.3, q(-0.5, 2.0))]).unwrap();
        [a, b]
    }

    #[test]
    fn mixtures_by_their_fixed_points() {
        let [a, b] = mixtures();
        let (tasks, prior) = ([&a, &b], q(0.0, 1.0));
        let from = |start: f64| preview_from(&prior, &tasks, &[0.5, 0.5], &q(start, 1.0)).unwrap();
        let best = from(0.5);
        close(&best.posterior.mean("w").unwrap(), &[0.896208237784574], 1e-14);
        assert!((best.log_density + 0.8153141949052332).abs() < 1e-14 && best.converged);
        assert!((11..=16).contains(&best.iterations), "{}", best.iterations);
        // ½ of each task's precision, by r at θ.
        close(&best.posterior.precision("w").unwrap(), &[3.4759583777531424], 1e-12);
        let local = from(-1.0);
        close(&local.posterior.mean("w").unwrap(), &[-0.7840782522839668], 1e-14);
        assert!((local.log_density + 1.3989764474716653).abs() < 1e-14);
        let found = preview(&prior, &tasks, &[0.5, 0.5]).unwrap();
        close(&found.mean("w").unwrap(), &[0.896208237784574], 1e-14);
    }

    #[test]
    fn the_first_iterates_of_a_mixture() {
        let [a, b] = mixtures();
        let prior = q(0.0, 1.0);
        let tasks = [&a, &b];
        let problem = Problem::new(&prior, &tasks, &[0.5, 0.5]).unwrap();
        let mut theta = vec![Tensor::from_slice(&[0.5])];
        for expected in [0.8468926475293449, 0.8936031483618018] {
            let (r, _) = problem.weigh(&theta);
            theta = problem.towards(&r).unwrap().0;
            close(&theta[0], &[expected], 1e-15);
        }
    }

    /// For any number of components: one, and several that are the same.
    #[test]
    fn equal_components_are_one_gaussian() {
        let (prior, a, b) = (q(0.3, 0.5), q(1.0, 4.0), q(-2.0, 3.0));
        for alpha in [[0.2, 0.5], [0.3, 0.7], [0.9, 0.8]] {
            let expected = preview(&prior, &[&a, &b], &alpha).unwrap();
            for k in [1, 3] {
                let of = |q: &DiagonalGaussian| Mixture::equal((0..k).map(|_| q.shallow_clone())).unwrap();
                let found = preview(&prior, &[&of(&a), &of(&b)], &alpha).unwrap();
                close(&found.mean("w").unwrap(), &numbers(&expected.mean("w").unwrap()), 1e-15);
                close(&found.precision("w").unwrap(), &numbers(&expected.precision("w").unwrap()), 1e-14);
            }
        }
    }

    /// Where Σα > 1, EM's guarantee is gone; the density must not fall all the same, and ends at a stationary point.
    #[test]
    fn beyond_1_the_density_of_a_mixture_still_rises() {
        let [a, b] = mixtures();
        let (tasks, prior) = ([&a, &b], q(0.5, 1.0));
        let alpha = [1.4, 1.2];
        let density = |x: f64| {
            let at = vec![Tensor::from_slice(&[x])];
            Problem::new(&prior, &tasks, &alpha).unwrap().weigh(&at).1
        };
        for start in [-2.0, -0.4, 0.1, 3.0] {
            let found = preview_from(&prior, &tasks, &alpha, &q(start, 1.0)).unwrap();
            let x = numbers(&found.posterior.mean("w").unwrap())[0];
            assert!(found.converged && found.log_density >= density(start), "{found:?}");
            let slope = (density(x + 1e-5) - density(x - 1e-5)) / 2e-5;
            assert!(slope.abs() < 1e-6, "{start}: {x} {slope}");
        }
        let e = preview(&q(0.0, 9.0), &tasks, &alpha).unwrap_err().to_string();
        assert!(e.contains("Σα > 1"), "{e}");
        // From the component of precision 0.3 there is no way, S = 3·0.3 - 2; from the other there is.
        let one = Mixture::new([(0.5, q(0.0, 0.3)), (0.5, q(1.0, 4.0))]).unwrap();
        assert!(preview_from(&q(0.0, 1.0), &[&one], &[3.0], &q(-9.0, 1.0)).is_err());
        assert!(preview(&q(0.0, 1.0), &[&one], &[3.0]).is_ok());
    }

    #[test]
    fn weightings_that_are_none() {
        let [a, b] = mixtures();
        let prior = q(0.0, 1.0);
        for alpha in [&[0.5][..], &[0.5, 0.5, 0.5], &[-0.1, 1.1], &[f64::NAN, 1.0], &[f64::INFINITY, 0.0]] {
            assert!(preview(&prior, &[&a, &b], alpha).unwrap_err().to_string().contains("`alpha`"), "{alpha:?}");
            assert!(preview(&prior, &[&q(0.0, 1.0), &q(1.0, 1.0)], alpha).is_err());
        }
        let one = || Tensor::ones([1], F64);
        let other = DiagonalGaussian::new([("v", one(), one())]).unwrap();
        assert!(preview_from(&prior, &[&a], &[1.0], &other).is_err());
        assert!(preview(&other, &[&a], &[1.0]).is_err());
        assert!(combine(&[(1.0, &other)]).is_ok());
    }
}

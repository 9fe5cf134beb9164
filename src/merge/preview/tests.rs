//! Golden values of two quadratic tasks and of two mixtures, and what is refused.

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
    close(&tasks[0].mean_vector(), &[0.946_601_941_747_573, 0.024_271_844_660_194], 1e-15);
    close(&tasks[1].mean_vector(), &[-0.009_036_144_578_313, 0.966_867_469_879_518], 1e-15);

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

    close(&full, &[0.317_469_397_094_154, 0.907_619_265_530_26], 1e-14);
    close(&ridge.posterior(alpha).mean_vector(), &numbers(&full), 1e-14);
    close(&diagonal, &[0.421_000_994_268_335, 0.842_444_847_350_567], 1e-14);
    close(&simple, &[0.277_655_281_319_453, 0.684_088_782_313_721], 1e-14);
    for (theta, objective) in [(full, 0.267_021_793_845), (diagonal, 0.280_239_435_652), (simple, 0.330_054_774_562)] {
        assert!((ridge.objective(&theta, alpha) - objective).abs() < 1e-12);
    }
}

#[test]
fn weights_beyond_1_take_the_prior_away() {
    let ridge = Ridge::new();
    let tasks = ridge.tasks();
    let tasks = [&tasks[0], &tasks[1]];
    let q = preview(&ridge.prior, &tasks, &[0.5, 0.8]).unwrap();
    close(&q.mean_vector(), &[0.395_357_813_294_97, 0.882_015_473_955_683], 1e-14);
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
    close(&best.posterior.mean("w").unwrap(), &[0.896_208_237_784_574], 1e-14);
    assert!((best.log_density + 0.815_314_194_905_233_2).abs() < 1e-14 && best.converged);
    assert!((11..=16).contains(&best.iterations), "{}", best.iterations);
    // ½ of each task's precision, by r at θ.
    close(&best.posterior.precision("w").unwrap(), &[3.475_958_377_753_142_4], 1e-12);
    let local = from(-1.0);
    close(&local.posterior.mean("w").unwrap(), &[-0.784_078_252_283_966_8], 1e-14);
    assert!((local.log_density + 1.398_976_447_471_665_3).abs() < 1e-14);
    let found = preview(&prior, &tasks, &[0.5, 0.5]).unwrap();
    close(&found.mean("w").unwrap(), &[0.896_208_237_784_574], 1e-14);
}

#[test]
fn the_first_iterates_of_a_mixture() {
    let [a, b] = mixtures();
    let prior = q(0.0, 1.0);
    let tasks = [&a, &b];
    let problem = Problem::new(&prior, &tasks, &[0.5, 0.5]).unwrap();
    let mut theta = vec![Tensor::from_slice(&[0.5])];
    for expected in [0.846_892_647_529_344_9, 0.893_603_148_361_801_8] {
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

//! SAM as an optimal relaxation of Bayes (Möllenhoff and Khan, ICLR 2023), for losses of one weight.
//!
//! With f(μ) = -E_q\[ℓ\] over the expectation parameters μ = (m, m²+σ²) of q = N(m, σ²), the Fenchel biconjugate f** is the
//! largest convex function below f, so -f** the smallest concave one above E_q\[ℓ\]. The supremum in the conjugate is reached
//! where q shrinks to a point, which puts a maximum over the weight in the place of the expectation:
//!
//! ```text
//! f*(λ)  = sup over μ of ⟨λ,μ⟩ + E_q[ℓ] = sup over θ of ℓ(θ) + λ₁θ + λ₂θ²
//! -f**(μ) = inf over λ of f*(λ) - ⟨λ,μ⟩
//!         = inf over m', τ of sup over ε of ℓ(m'+ε) - τε²  +  τ((m-m')² + σ²)             λ = (2τm', -τ)
//! ```
//!
//! At m' = m the inner supremum is SAM's, with a price on the radius in place of a limit.

use support::{close, params, values, weight};
use tch::Kind;
use tch_blr::Sam;
use tch_blr_examples::pictures;

/// Where distributions are looked for: far enough to both sides that nothing happens beyond.
const EDGE: f64 = 10.0;
const STEPS: usize = 1000;
/// Beyond any curvature of the losses here.
const HIGHEST: f64 = 32.0;

/// A sharp, deep valley at -1.5 and a flat one at 1.2, in a plain of height 1.2.
fn valleys(theta: f64) -> f64 {
    let valley = |depth: f64, at: f64, width: f64| depth * (-0.5 * ((theta - at) / width).powi(2)).exp();
    1.2 - valley(1.0, -1.5, 0.3) - valley(0.8, 1.2, 0.9)
}

/// A loss on the grid.
struct Loss {
    theta: Vec<f64>,
    value: Vec<f64>,
}

impl Loss {
    fn new(loss: impl Fn(f64) -> f64) -> Self {
        let theta: Vec<f64> = (0..=STEPS).map(|i| EDGE * (2.0 * i as f64 / STEPS as f64 - 1.0)).collect();
        let value = theta.iter().map(|t| loss(*t)).collect();
        Loss { theta, value }
    }

    fn points(&self) -> impl Iterator<Item = (f64, f64)> {
        self.theta.iter().copied().zip(self.value.iter().copied())
    }

    /// E_q\[ℓ\] for q = N(m, σ²): the trapezoid rule, which is exact to all digits for σ of a few grid steps.
    fn expected(&self, m: f64, sigma: f64) -> f64 {
        let q = |t: f64| (-0.5 * ((t - m) / sigma).powi(2)).exp();
        self.points().map(|(t, l)| q(t) * l).sum::<f64>() / self.points().map(|(t, _)| q(t)).sum::<f64>()
    }

    /// sup over ε of ℓ(m+ε) - τε², and |ε| and ℓ there: SAM with a price τ on the square of the radius.
    fn penalized(&self, m: f64, tau: f64) -> (f64, f64, f64) {
        let all = self.points().map(|(t, l)| (l - tau * (t - m).powi(2), (t - m).abs(), l));
        all.max_by(|a, b| a.0.total_cmp(&b.0)).unwrap()
    }

    /// sup over |ε| ≤ ρ of ℓ(m+ε): SAM's objective.
    fn sharp(&self, m: f64, rho: f64) -> f64 {
        let near = self.points().filter(|(t, _)| (t - m).abs() <= rho + 1e-9);
        near.map(|(_, l)| l).fold(f64::NEG_INFINITY, f64::max)
    }

    /// min over slopes λ₁ of sup over θ of ℓ(θ) - τθ² - λ₁(θ-m): the least concave function above ℓ - τθ², at m. Also the
    /// two ends of the chord, or corner, on which it lies there.
    fn envelope(&self, m: f64, tau: f64) -> (f64, [f64; 2]) {
        let mut hull: Vec<(f64, f64)> = Vec::new();
        for (t, l) in self.points() {
            let p = (t, l - tau * t * t);
            while let [.., a, b] = hull[..] {
                if (b.1 - a.1) * (p.0 - a.0) > (p.1 - a.1) * (b.0 - a.0) {
                    break;
                }
                hull.pop();
            }
            hull.push(p);
        }
        let right = hull.partition_point(|p| p.0 < m).clamp(1, hull.len() - 1);
        let (a, b) = (hull[right - 1], hull[right]);
        (a.1 + (b.1 - a.1) * (m - a.0) / (b.0 - a.0), [a.0, b.0])
    }

    /// The Fenchel biconjugate -f** of f(μ) = -E_q\[ℓ\] at μ = (m, m²+σ²).
    fn relaxed(&self, m: f64, sigma: f64) -> f64 {
        least(|tau| self.envelope(m, tau).0 + tau * (m * m + sigma * sigma)).1
    }

    /// A distribution of mean m and variance σ² that asks as much as the relaxation allows: points and probabilities.
    fn worst(&self, m: f64, sigma: f64) -> Vec<(f64, f64)> {
        // The two points with mean m at the ends of the chord have a variance that falls as τ rises; it may jump over σ².
        let ends = |tau: f64| self.envelope(m, tau).1;
        let variance = |[a, b]: [f64; 2]| (m - a) * (b - m);
        let (mut low, mut high) = (0.0, HIGHEST);
        for _ in 0..60 {
            let middle = 0.5 * (low + high);
            if variance(ends(middle)) > sigma * sigma { low = middle } else { high = middle }
        }
        let (wide, narrow) = (ends(low), ends(high));
        let (most, least) = (variance(wide), variance(narrow));
        let share = if most > least { (sigma * sigma - least) / (most - least) } else { 1.0 };
        let pair = |[a, b]: [f64; 2], p: f64| [(a, p * (b - m) / (b - a)), (b, p * (m - a) / (b - a))];
        [pair(wide, share), pair(narrow, 1.0 - share)].concat()
    }

    /// min over τ of sup over ε of ℓ(m+ε) - τ(ε²-σ²): the relaxation with λ₁ = -2τm held fixed, which is SAM with a radius
    /// that σ chooses.
    fn relaxed_at_mean(&self, m: f64, sigma: f64) -> f64 {
        least(|tau| self.penalized(m, tau).0 + tau * sigma * sigma).1
    }
}

/// Where a convex function of τ ∈ [0, `HIGHEST`] is least, and its value there.
fn least(f: impl Fn(f64) -> f64) -> (f64, f64) {
    let (mut low, mut high) = (0.0, HIGHEST);
    for _ in 0..60 {
        let (a, b) = (low + 0.382 * (high - low), high - 0.382 * (high - low));
        if f(a) <= f(b) { high = b } else { low = a }
    }
    (low, f(low))
}

const SIGMAS: [f64; 4] = [0.1, 0.3, 0.6, 1.0];

/// `n` means from -2.5 to 2.5.
fn means(n: usize) -> impl Iterator<Item = f64> {
    (0..n).map(move |i| -2.5 + 5.0 * i as f64 / (n - 1) as f64)
}

#[test]
fn expectations_are_exact() {
    let loss = Loss::new(valleys);
    let valley = |depth: f64, at: f64, width: f64, m: f64, sigma: f64| {
        let v = width * width + sigma * sigma;
        depth * width / v.sqrt() * (-0.5 * (m - at).powi(2) / v).exp()
    };
    for (m, sigma) in means(11).flat_map(|m| SIGMAS.map(|sigma| (m, sigma))) {
        let exact = 1.2 - valley(1.0, -1.5, 0.3, m, sigma) - valley(0.8, 1.2, 0.9, m, sigma);
        close(loss.expected(m, sigma), exact, 1e-9);
    }
}

/// E_q\[ℓ\] lies below the relaxation, strictly so where ℓ bends.
#[test]
fn the_relaxation_bounds_the_expected_loss() {
    let loss = Loss::new(valleys);
    for (m, sigma) in means(41).flat_map(|m| SIGMAS.map(|sigma| (m, sigma))) {
        let (expected, relaxed) = (loss.expected(m, sigma), loss.relaxed(m, sigma));
        // The gap is smallest where the loss is nearly a parabola within reach of σ.
        assert!(expected + 1e-5 < relaxed, "m = {m}, σ = {sigma}: {expected} and {relaxed}");
    }
}

/// A convex parabola has an expectation that is linear in μ, and there is nothing to relax.
#[test]
fn it_is_tight_for_parabolas() {
    let loss = Loss::new(|t| 0.7 * t * t - 0.4 * t + 0.2);
    for (m, sigma) in means(11).flat_map(|m| SIGMAS.map(|sigma| (m, sigma))) {
        let exact = 0.7 * (m * m + sigma * sigma) - 0.4 * m + 0.2;
        close(loss.expected(m, sigma), exact, 1e-9);
        close(loss.relaxed(m, sigma), exact, 1e-9);
    }
}

/// With K the largest second derivative, E_q\[ℓ\] ≤ -f** ≤ ℓ(m) + ½Kσ²: the gap closes with σ².
#[test]
fn it_is_tight_without_variance() {
    let loss = Loss::new(valleys);
    let step = 1e-3;
    let bend = |t: f64| (valleys(t - step) - 2.0 * valleys(t) + valleys(t + step)) / (step * step);
    let largest = means(5001).map(bend).fold(0.0, f64::max);
    for (m, sigma) in means(41).flat_map(|m| [0.05, 0.1, 0.2].map(|sigma| (m, sigma))) {
        let above = valleys(m) + 0.5 * largest * sigma * sigma;
        // The grid's own error is second order in its step, 0.02.
        assert!(loss.relaxed(m, sigma) <= above + largest * 1e-4, "m = {m}, σ = {sigma}");
    }
}

/// It is the least bound: mixtures of the Gaussians' limits, which every concave bound covers, reach it. So it is also
/// the largest expected loss of all distributions with this mean and variance.
#[test]
fn no_concave_bound_is_smaller() {
    let loss = Loss::new(valleys);
    for (m, sigma) in means(41).flat_map(|m| SIGMAS.map(|sigma| (m, sigma))) {
        let worst = loss.worst(m, sigma);
        let moment = |f: &dyn Fn(f64) -> f64| worst.iter().map(|(t, p)| p * f(*t)).sum::<f64>();
        assert!(worst.iter().all(|(_, p)| *p >= -1e-12), "{worst:?}");
        close(moment(&|_| 1.0), 1.0, 1e-12);
        close(moment(&|t| t), m, 1e-9);
        close(moment(&|t| (t - m).powi(2)), sigma * sigma, 1e-9);
        close(moment(&valleys), loss.relaxed(m, sigma), 1e-9);
    }
}

/// Over the mean, with the variance held fixed, the relaxation and SAM have one minimum; it moves from the sharp valley to
/// the flat one as σ grows, where that of the loss itself is in the sharp one.
#[test]
fn sam_minimizes_the_relaxation() {
    let loss = Loss::new(valleys);
    let minimum = |f: &dyn Fn(f64) -> f64| {
        let least =
            |all: &mut dyn Iterator<Item = f64>| all.map(|m| (f(m), m)).min_by(|a, b| a.0.total_cmp(&b.0)).unwrap();
        let coarse = least(&mut means(101));
        [0.05, 0.005].iter().fold(coarse, |(_, m), width| least(&mut means(41).map(|x| m + x / 2.5 * width)))
    };
    close(minimum(&valleys).1, -1.5, 0.02);
    for (sigma, valley) in [(0.1, -1.5), (0.3, 1.2), (0.6, 1.2), (1.0, 1.2)] {
        let (bound, at) = minimum(&|m| loss.relaxed(m, sigma));
        let (sam, sam_at) = minimum(&|m| loss.relaxed_at_mean(m, sigma));
        // The supremum over ε is on the grid, so off by up to an eighth of its step squared times the largest curvature.
        close(bound, sam, 6e-4);
        close(at, sam_at, 0.01);
        close(at, valley, 0.1);
    }
}

/// A price τ on the radius is a radius ρ(τ): where the best price for σ makes it σ, the relaxation at m' = m is SAM's
/// objective with ρ = σ, and that bounds the expected loss. Elsewhere SAM's objective is below the relaxation at m' = m.
#[test]
fn a_price_is_a_radius() {
    let loss = Loss::new(valleys);
    let (mut same, mut all) = (0, 0);
    for (m, sigma) in means(51).flat_map(|m| SIGMAS.map(|sigma| (m, sigma))) {
        for tau in [0.05, 0.2, 1.0, 5.0] {
            let (value, rho, at) = loss.penalized(m, tau);
            close(loss.sharp(m, rho), at, 1e-12);
            close(value, at - tau * rho * rho, 1e-12);
        }
        let (expected, relaxed) = (loss.expected(m, sigma), loss.relaxed(m, sigma));
        let (sharp, at_mean) = (loss.sharp(m, sigma), loss.relaxed_at_mean(m, sigma));
        assert!(relaxed <= at_mean + 1e-9 && sharp <= at_mean + 1e-9, "m = {m}, σ = {sigma}");
        all += 1;
        if at_mean - sharp < 1e-9 {
            same += 1;
            assert!(expected <= sharp, "m = {m}, σ = {sigma}: {expected} and {sharp}");
        }
    }
    assert!(2 * same > all, "{same} of {all}");
}

/// The loss that a step of [`Sam`] returns is SAM's objective, where the loss rises all the way to one side.
#[test]
fn the_optimizer_evaluates_the_objective() {
    let loss = Loss::new(valleys);
    let rho = 0.2;
    let mut monotone = 0;
    for m in means(51) {
        let w = weight(&[m]);
        let mut opt = Sam::default().rho(rho).build(params(&w), 0.0).unwrap();
        let valley = |depth: f64, at: f64, width: f64| (((&w - at) / width).square() * -0.5).exp() * depth;
        let valleys_of_w = || valley(1.0, -1.5, 0.3) + valley(0.8, 1.2, 0.9);
        let ours = opt.step(|| (valleys_of_w().sum(Kind::Double) - 1.2).neg());
        let (ours, slopes) = (ours.unwrap(), [-1.0, 1.0].map(|side| valleys(m + side * rho) - valleys(m)));
        assert_eq!(values(&w), [m], "the learning rate is 0");
        let within: Vec<f64> = (0..=400).map(|i| valleys(m + rho * (f64::from(i) / 200.0 - 1.0))).collect();
        if within.is_sorted() || within.is_sorted_by(|a, b| a >= b) {
            monotone += 1;
            close(ours, valleys(m) + slopes[0].max(slopes[1]), 1e-12);
            close(ours, loss.sharp(m, rho), 1e-12);
        }
    }
    assert!(monotone > 25, "{monotone}");
}

/// The picture of the talks: the loss, its expectation under N(m, σ²) over m, the relaxation, and SAM's objective with
/// ρ = σ. It is left in `target/tmp/relaxation.svg`.
#[test]
fn picture() {
    let path = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join("relaxation.svg");
    let loss = Loss::new(valleys);
    let panels = [0.1, 0.3, 0.6].map(|sigma| {
        let curve = |name: &str, f: &dyn Fn(f64) -> f64| (name.to_owned(), means(126).map(|m| (m, f(m))).collect());
        pictures::Curves {
            y_label: format!("σ = {sigma}"),
            series: vec![
                curve("loss", &valleys),
                curve("expected loss", &|m| loss.expected(m, sigma)),
                curve("relaxation", &|m| loss.relaxed(m, sigma)),
                curve("SAM", &|m| loss.sharp(m, sigma)),
            ],
        }
    });
    pictures::training_curves(&path, "m", &panels).unwrap();
    let svg = std::fs::read_to_string(path).unwrap();
    for word in ["loss", "expected loss", "relaxation", "SAM", "σ = 0.3"] {
        assert!(svg.contains(word), "no {word:?} in the picture");
    }
}

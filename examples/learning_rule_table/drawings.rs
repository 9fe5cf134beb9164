//! What is worth drawing.

use super::deep_learning::train;
use super::posteriors::sums;
use super::table::Outcome;
use std::path::{Path, PathBuf};
use tch::{Kind, Tensor};
use tch_blr::family::{ExponentialFamily, Gaussian, MeanFieldGaussian, rule_step};
use tch_blr::rule::Row;
use tch_blr::{
    Adam, BayesianSam, Expectation, Ivon, MixtureOfGaussians, Optimizer, Params, Philox, Posterior, Result, Sam, Sgd,
    Statistic, Von,
};
use tch_blr_examples::pictures::planes::{Panel, Point, ellipse, field, planes};

/// Draws all pictures into the folder and returns their files.
pub fn all(folder: &Path) -> Outcome<Vec<PathBuf>> {
    let draw = |name: &str, picture: fn(&Path) -> Outcome<()>| {
        let path = folder.join(name);
        picture(&path).map(|()| path)
    };
    [draw("trajectories.svg", trajectories), draw("natural_gradient.svg", natural_gradient), draw("fisher.svg", fisher)]
        .into_iter()
        .collect()
}

// Trajectories on a loss with a sharp and a flat minimum

/// How one way went, and the standard deviations of the posterior at its end.
#[derive(Clone)]
struct Way {
    points: Vec<Point>,
    deviations: Option<Point>,
}

/// Each may go several ways (the components of a mixture).
type Method = (&'static str, fn() -> Outcome<Vec<Way>>);

const POINTS: &[Method] = &[
    // The last one lies on top.
    ("Adam", || way(|w| Adam::default().build(w, 0.02))),
    ("SAM", || way(|w| Sam::default().rho(0.7).momentum(0.0).build(w, 0.2))),
    ("SGD", || way(|w| Sgd::default().build(w, 0.05))),
];

const GAUSSIANS: &[Method] = &[
    ("VON", || {
        let rule = Von::default().expectation(Expectation::Antithetic { pairs: 1 }).hessian(Statistic::Price);
        posterior_way(rule.ess(ESS).weight_decay(0.02).beta1(0.0).beta2(0.98), 0.03)
    }),
    ("IVON", || {
        let rule = Ivon::default().expectation(Expectation::Antithetic { pairs: 1 });
        posterior_way(rule.ess(ESS).weight_decay(0.02).beta2(0.98), 0.03)
    }),
    ("bSAM", || {
        let rule = BayesianSam::default().ess(ESS).rho(0.1).weight_decay(0.02).beta2(0.98);
        posterior_way(rule, 0.1)
    }),
];

const MIXTURES: &[Method] = &[("mixture", mixture)];

const START: Point = (-1.9, 0.9);
const STEPS: usize = 600;
const ESS: f64 = 12.0;
/// Holes in a flat bowl: centre, width and depth.
const HOLES: [(Point, f64, f64); 2] = [((-0.9, 0.35), 0.22, 0.9), ((0.7, -0.2), 0.85, 1.0)];
const BOWL: f64 = 0.02;

/// E[L] under N(θ, v), in closed form; L itself with v = 0.
fn expected_loss(x: f64, y: f64, v: f64) -> f64 {
    let holes = HOLES.map(|((a, b), width, depth)| {
        let total = width * width + v;
        depth * width * width / total * (-0.5 * ((x - a).powi(2) + (y - b).powi(2)) / total).exp()
    });
    BOWL * (x * x + y * y + 2.0 * v) - holes.iter().sum::<f64>()
}

/// L of each row of `[n, 2]`.
fn losses(w: &Tensor) -> Tensor {
    let holes = HOLES.map(|((a, b), width, depth)| {
        let apart = sums(&(w - Tensor::from_slice(&[a, b])).square());
        (apart * (-0.5 / (width * width))).exp() * depth
    });
    sums(&w.square()) * BOWL - holes.into_iter().sum::<Tensor>()
}

fn loss(w: &Tensor, _: usize) -> Tensor {
    losses(&w.unsqueeze(0)).sum(Kind::Double)
}

fn points(path: &[Vec<f64>]) -> Vec<Point> {
    path.iter().map(|p| (p[0], p[1])).collect()
}

fn way<R: Row>(build: impl FnOnce(Params) -> Result<Optimizer<R>>) -> Outcome<Vec<Way>> {
    let (path, _) = train(&[START.0, START.1], STEPS, build, loss)?;
    Ok(vec![Way { points: points(&path), deviations: None }])
}

fn posterior_way(rule: impl Row<Posterior: Posterior>, lr: f64) -> Outcome<Vec<Way>> {
    let build = |w: Params| rule.builder().noise(Philox { seed: 1 }).build(w, lr);
    let (path, opt) = train(&[START.0, START.1], STEPS, build, loss)?;
    let variance = opt.posterior()?.variance("w").expect("its name");
    let deviation = |i| variance.double_value(&[i]).sqrt();
    Ok(vec![Way { points: points(&path), deviations: Some((deviation(0), deviation(1))) }])
}

/// Two components that start beside each other: ln q pushes them apart, and each gets its own ring.
fn mixture() -> Outcome<Vec<Way>> {
    let starts = Tensor::from_slice(&[START.0, START.1, START.0 + 0.3, START.1 + 0.3]).reshape([2, 2]);
    let mut q = MixtureOfGaussians::new(&starts, ESS)?.lr(0.03).weight_lr(0.03).seed(1);
    let mut ways = vec![Way { points: Vec::new(), deviations: None }, Way { points: Vec::new(), deviations: None }];
    for _ in 0..=STEPS {
        let (means, variances) = (q.means(), q.precisions().reciprocal());
        for (c, way) in ways.iter_mut().enumerate() {
            let at = |t: &Tensor, i: i64| t.double_value(&[c as i64, i]);
            way.points.push((at(&means, 0), at(&means, 1)));
            way.deviations = Some((at(&variances, 0).sqrt(), at(&variances, 1).sqrt()));
        }
        q.step(|theta| losses(theta) * ESS)?;
    }
    Ok(ways)
}

/// Points on the loss, Gaussians on what an average over weights sees of it, at the standard deviation where IVON ends,
/// and the components of a mixture on the loss.
fn trajectories(path: &Path) -> Outcome<()> {
    let run = |methods: &[Method]| -> Outcome<Vec<(&'static str, Way)>> {
        let each = methods.iter().map(|(name, run)| Ok(run()?.into_iter().map(|way| (*name, way)).collect::<Vec<_>>()));
        Ok(each.collect::<Outcome<Vec<_>>>()?.concat())
    };
    let [points, gaussians, mixtures] = [run(POINTS)?, run(GAUSSIANS)?, run(MIXTURES)?];
    let ivon = gaussians.iter().find(|(name, _)| *name == "IVON").and_then(|(_, way)| way.deviations);
    let variance = ivon.map_or(0.0, |(a, b)| 0.5 * (a * a + b * b));
    let (sharp, smooth) = (|x, y| expected_loss(x, y, 0.0), |x, y| expected_loss(x, y, variance));
    let panel = |title: String, f, ways: &[(&str, Way)]| {
        let end = |w: &Way| w.points[w.points.len() - 1];
        let ring = |(name, w): &(&str, Way)| Some(((*name).to_owned(), ellipse(end(w), w.deviations?)));
        Panel {
            title,
            axes: ("θ₁", "θ₂"),
            extent: ((-2.4, 2.4), (-2.0, 2.0)),
            contours: Some((f, (1..16).map(|k| -1.0 + 0.075 * f64::from(k)).collect())),
            arrows: Vec::new(),
            paths: ways.iter().map(|(name, w)| ((*name).to_owned(), w.points.clone())).collect(),
            rings: ways.iter().filter_map(ring).collect(),
            points: Vec::new(),
        }
    };
    let smoothed = format!("Gaussians; E[L] under N(θ, {:.2}²)", variance.sqrt());
    planes(
        path,
        &[
            panel("points; loss L".into(), &sharp, &points),
            panel(smoothed, &smooth, &gaussians),
            panel("two Gaussians; loss L".into(), &sharp, &mixtures),
        ],
    )
}

// The natural gradient of a Gaussian

/// KL(N(m, σ²) ‖ N(0, 1)) in the plane of m and σ: its gradient, and the one after division by the Fisher matrix
/// diag(1, 2)/σ². Rings are equally far from their middle, by the distance between numbers and by that between
/// distributions.
fn natural_gradient(path: &Path) -> Outcome<()> {
    const STARTS: [Point; 3] = [(-1.4, 0.25), (1.4, 0.2), (1.3, 2.8)];
    let kl = |m: f64, sigma: f64| 0.5 * (sigma * sigma + m * m - 1.0) - sigma.ln();
    let gradient = |m: f64, sigma: f64| (m, sigma - 1.0 / sigma);
    let extent = ((-1.6, 1.6), (0.05, 3.25));
    let middles = || (0..3).flat_map(|i| [0.45, 1.5, 2.55].map(|sigma| (f64::from(i) - 1.0, sigma)));

    let descent = STARTS.map(|start| {
        let mut way = vec![start];
        for _ in 0..400 {
            let (m, sigma) = way[way.len() - 1];
            let (dm, ds) = gradient(m, sigma);
            way.push((m - 0.02 * dm, sigma - 0.02 * ds));
        }
        way
    });
    let mut rule = Vec::new();
    for (m, sigma) in STARTS {
        let one = |x: f64| Tensor::from_slice(&[x]);
        let mut q = MeanFieldGaussian::new(&one(m), &one(1.0 / (sigma * sigma)))?;
        let mut way = vec![(m, sigma)];
        for _ in 0..400 {
            // ℓ = ½θ², whose E[∇ℓ] is m and E[∇²ℓ] 1
            q = rule_step(&q, 0.02, &q.gradient_mu(q.mean(), &one(1.0))?)?;
            way.push((q.mean().double_value(&[0]), q.precision().double_value(&[0]).sqrt().recip()));
        }
        rule.push(way);
    }
    let panel =
        |title: &str, name: &str, velocity: &dyn Fn(f64, f64) -> Point, ways: &[Vec<Point>], ring: fn(f64) -> Point| {
            Panel {
                title: title.to_owned(),
                axes: ("mean m", "standard deviation σ"),
                extent,
                contours: Some((&kl, [0.05, 0.2, 0.5, 1.0, 1.7, 2.6, 3.7, 5.0].into())),
                arrows: field(extent, 14, velocity),
                paths: ways.iter().map(|way| (name.to_owned(), way.clone())).collect(),
                rings: middles().map(|at| (name.to_owned(), ellipse(at, ring(at.1)))).collect(),
                points: Vec::new(),
            }
        };
    let down = |m: f64, sigma: f64| (-gradient(m, sigma).0, -gradient(m, sigma).1);
    let natural = |m: f64, sigma: f64| (sigma * sigma * down(m, sigma).0, 0.5 * sigma * sigma * down(m, sigma).1);
    planes(
        path,
        &[
            panel("−∇ KL", "gradient descent", &down, &descent, |_| (0.15, 0.15)),
            panel("−F⁻¹ ∇ KL", "the rule (natural gradient)", &natural, &rule, |sigma| {
                (0.15 * sigma, 0.15 * sigma / 2f64.sqrt())
            }),
        ],
    )
}

// The Fisher matrix and the empirical one

/// Least squares on a line, after figure 1 of Kunstner, Balles and Hennig (2019): the gradient, divided by the Fisher
/// matrix Σφφᵀ/N and by the empirical one, Σr²φφᵀ/N, with φ = (x, 1) and residuals r.
fn fisher(path: &Path) -> Outcome<()> {
    const STARTS: [Point; 4] = [(-0.6, 0.2), (4.6, 0.6), (-0.4, 4.3), (4.4, 4.6)];
    let unit = Tensor::eye(2, (Kind::Double, tch::Device::Cpu));
    let z = Gaussian::new(&Tensor::from_slice(&[0.0, 0.0]), &unit)?.sample(120, 4);
    let data: Vec<Point> = (0..120)
        .map(|i| {
            let x = 0.8 + 0.7 * z.double_value(&[i, 0]);
            (x, 2.0 * x + 2.0 + 0.9 * z.double_value(&[i, 1]))
        })
        .collect();
    let mean = |f: &dyn Fn(f64, f64) -> f64| data.iter().map(|(x, y)| f(*x, *y)).sum::<f64>() / data.len() as f64;
    let loss = |a: f64, b: f64| mean(&|x, y| 0.5 * (a * x + b - y).powi(2));
    let gradient = |a: f64, b: f64| (mean(&|x, y| (a * x + b - y) * x), mean(&|x, y| a * x + b - y));
    // -(Σwφφᵀ/N)⁻¹g
    let divided = |(g, h): Point, weight: &dyn Fn(f64, f64) -> f64| {
        let [xx, x1, one] = [2, 1, 0].map(|p| mean(&|x, y| weight(x, y) * x.powi(p)));
        let det = xx * one - x1 * x1;
        ((x1 * h - one * g) / det, (x1 * g - xx * h) / det)
    };
    let plain = |a: f64, b: f64| (-gradient(a, b).0, -gradient(a, b).1);
    let natural = |a: f64, b: f64| divided(gradient(a, b), &|_, _| 1.0);
    let empirical = |a: f64, b: f64| divided(gradient(a, b), &|x, y| (a * x + b - y).powi(2));

    let extent = ((-2.0, 6.0), (-2.0, 6.0));
    let panel = |title: &str, name: &str, velocity: &dyn Fn(f64, f64) -> Point, rate: f64| {
        let way = |start: Point| {
            let mut way = vec![start];
            for _ in 0..1500 {
                let (a, b) = way[way.len() - 1];
                let (da, db) = velocity(a, b);
                way.push((a + rate * da, b + rate * db));
            }
            way
        };
        Panel {
            title: title.to_owned(),
            axes: ("slope", "intercept"),
            extent,
            contours: Some((&loss, [0.5, 0.8, 1.5, 3.0, 5.0, 8.0, 12.0, 17.0].into())),
            arrows: field(extent, 13, velocity),
            paths: STARTS.map(|start| (name.to_owned(), way(start))).into(),
            rings: Vec::new(),
            points: Vec::new(),
        }
    };
    let data_panel = Panel {
        title: "data".to_owned(),
        axes: ("x", "y"),
        extent: ((-1.2, 3.0), (-2.0, 9.0)),
        contours: None,
        arrows: Vec::new(),
        paths: Vec::new(),
        rings: Vec::new(),
        points: data.clone(),
    };
    planes(
        path,
        &[
            data_panel,
            panel("−∇L", "gradient", &plain, 0.02),
            panel("−F⁻¹ ∇L", "Fisher: natural gradient", &natural, 0.02),
            panel("−F̃⁻¹ ∇L", "empirical Fisher", &empirical, 0.02),
        ],
    )
}

//! Low-shot fine-tuning: known classes in a new domain, from one to five examples each, with a posterior as the prior.
//!
//! Features z(x) come from a network that was trained on upright digits, and is frozen; its head is a softmax on θz.
//! After other upright digits, Laplace's approximation of the head's posterior is
//!
//! ```text
//! q₁ = N(m₁, S₁⁻¹),     m₁ = argmin Σᵢ ℓᵢ(θ) + ½‖θ‖²,     S₁ = Σᵢ JᵢᵀΛᵢJᵢ + I
//! ```
//!
//! Then the digits come turned by 30°, and the head is learned again from a few of them, with one of three priors:
//!
//! ```text
//! N(0,  I/δ)          nothing is known
//! N(m₁, I/δ)          the mean is
//! q₁^γ · N(0, I/δ)    the posterior is: precision γS₁ + δI, mean (γS₁ + δI)⁻¹ γS₁m₁
//! ```
//!
//! The last is a power prior: γ < 1 counts the old data for less, for they are of another domain. δ and γ are chosen,
//! for each prior and number of examples, on other draws of the examples than those reported.
//!
//! On MNIST (`TCH_BLR_DATA=DIR cargo run --release --example systems low_shot`) one example of each digit gives 52.0,
//! 62.8 and 67.2 % of right answers with the three, and five give 69.7, 68.3 and 73.4 %.
//!
//! Sources: Khan and Rue (2023), *The Bayesian Learning Rule*, section 1.3 (Newton's method and Laplace's
//! approximation); Ibrahim and Chen (2000), *Power Prior Distributions for Regression Models*.

use super::{Finding, Setting, draw, mean_and_error};
use crate::Outcome;
use crate::batches::{Last, batches};
use crate::digits::SIDE;
use crate::pictures::{Curves, training_curves};
use crate::random::Rng;
use std::ops::Range;
use tch::nn::{self as plain, Module, VarStore};
use tch::{Device, Kind, Tensor};
use tch_blr::continual::{Memory, Past, Quadratic, Replay};
use tch_blr::fisher::Fisher;
use tch_blr::nn::{Likelihood, Linear};
use tch_blr::{Adam, FullGaussian, GaussianPosterior, Params, combine};

const DIGITS: [i64; 10] = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9];
/// Of the trunk, and a 1 for the bias.
pub const FEATURES: i64 = 33;
/// Of the new domain, counter-clockwise.
pub const DEGREES: f64 = -30.0;
const DOUBLE: (Kind, Device) = (Kind::Double, Device::Cpu);

/// Images `[N, 784]` turned about their middle.
pub fn turned(images: &Tensor, degrees: f64) -> Tensor {
    let (n, side) = (images.size()[0], SIDE as i64);
    let (sin, cos) = degrees.to_radians().sin_cos();
    let turn = Tensor::from_slice(&[cos, -sin, 0.0, sin, cos, 0.0]).to_kind(images.kind()).view([1, 2, 3]);
    let places = Tensor::affine_grid_generator(&turn.expand([n, 2, 3], false), [n, 1, side, side], false);
    images.view([n, 1, side, side]).grid_sampler(&places, 0, 0, false).view([n, -1])
}

/// Features (or images) and labels.
type Examples = (Tensor, Tensor);

/// A network 784-128-32-10, trained on upright digits, without its last layer: z `[N, 33]` in f64.
fn trunk((x, y): &Examples, steps: usize, seed: i64) -> Outcome<plain::Sequential> {
    tch::manual_seed(seed);
    let mut vs = VarStore::new(Device::Cpu);
    let linear = |name: &str, from, to| plain::linear(vs.root() / name, from, to, plain::LinearConfig::default());
    let layers = plain::seq().add(linear("a", 784, 128)).add_fn(Tensor::relu).add(linear("b", 128, FEATURES - 1));
    let (layers, head) = (layers.add_fn(Tensor::relu), linear("head", FEATURES - 1, 10));
    let mut opt = Adam::default().build(&vs, 1e-3)?;
    let epochs = (0..).flat_map(|epoch| batches(x, y, 64, epoch, Last::Drop));
    for (x, y) in epochs.take(steps) {
        opt.step(|| head.forward(&layers.forward(&x)).cross_entropy_for_logits(&y))?;
    }
    vs.freeze();
    Ok(layers.add_fn(|z| Tensor::cat(&[z, &z.narrow(1, 0, 1).ones_like()], 1).to_kind(Kind::Double)))
}

/// N(m, I/δ)
pub fn isotropic(mean: &Tensor, delta: f64) -> Outcome<FullGaussian> {
    let precision = Tensor::eye(mean.numel() as i64, DOUBLE) * delta;
    Ok(FullGaussian::new([("θ", mean.view([10, FEATURES]))], &precision)?)
}

/// The posterior of the head after a prior and examples: Newton's method to the mode, and S there.
pub fn learn((z, y): &Examples, prior: &FullGaussian) -> Outcome<FullGaussian> {
    let theta = prior.mean_vector().view([10, FEATURES]).set_requires_grad(true);
    let head = Linear { ws: theta.shallow_clone(), bs: None };
    let params = || Params::named([("θ", theta.shallow_clone())]);
    let losses = Replay::new(Memory::new(z, Likelihood::Categorical).targets(y))?;
    let objective = Past::new().with(losses).with(Quadratic::from(prior));
    let value = || objective.value(&params()?, |z| head.forward(z));
    for _ in 0..50 {
        // f is linear in θ, so that the Fisher information is the Hessian.
        let q = Fisher::exact().full(params()?, [z], |z| head.forward(z))?.laplace_after(prior)?;
        let loss = value()?;
        let gradient = Tensor::run_backward(&[&loss], &[&theta], false, false).remove(0);
        let mut step = q.solve(&[("θ".to_owned(), gradient.shallow_clone())])?.remove(0).1;
        if (gradient * &step).sum(Kind::Double).double_value(&[]) < 1e-6 {
            return Ok(q);
        }
        let _no_grad = tch::no_grad_guard();
        let (start, mut w) = (theta.copy(), theta.shallow_clone());
        w -= &step;
        // Far from the mode a whole step may be too long.
        while value()?.double_value(&[]) > loss.double_value(&[]) {
            step *= 0.5;
            w.copy_(&(&start - &step));
        }
    }
    Err("Newton's method has not converged".into())
}

fn accuracy(q: &FullGaussian, (z, y): &Examples) -> f64 {
    let logits = z.matmul(&q.mean_vector().view([10, FEATURES]).tr());
    logits.argmax(1, false).eq_tensor(y).to_kind(Kind::Double).mean(Kind::Double).double_value(&[])
}

/// What is known from the old domain, and the new one to try it on.
#[derive(Debug)]
pub struct Known {
    q: FullGaussian,
    /// Of the new domain, to draw examples from.
    pool: Examples,
    test: Examples,
    /// Accuracy of m₁ on upright test images, and on turned ones.
    pub at_first: [f64; 2],
}

impl Known {
    /// Learns trunk and head from different upright digits: of those it was trained on, the trunk is too sure.
    pub fn learn(setting: &Setting, steps: usize, seed: i64) -> Outcome<Self> {
        let (x, y) = setting.part(true, &DIGITS, 12_000);
        let (n, m) = (y.size()[0] / 2, 1000);
        let part = |from, len| (x.narrow(0, from, len), y.narrow(0, from, len));
        let trunk = trunk(&part(0, n), steps, seed)?;
        let upright = |(x, y): &Examples| (trunk.forward(x), y.shallow_clone());
        let turned = |(x, y): &Examples| (trunk.forward(&turned(x, DEGREES)), y.shallow_clone());
        let q = learn(&upright(&part(n, m)), &isotropic(&Tensor::zeros([10, FEATURES], DOUBLE), 1.0)?)?;
        let test = setting.part(false, &DIGITS, 2000);
        let at_first = [upright(&test), turned(&test)].map(|test| accuracy(&q, &test));
        Ok(Known { q, pool: turned(&part(n + m, n - m)), test: turned(&test), at_first })
    }

    /// q₁^γ · N(0, I/δ)
    pub fn power(&self, gamma: f64, delta: f64) -> Outcome<FullGaussian> {
        let nothing = isotropic(&self.q.mean_vector().zeros_like(), delta)?;
        Ok(combine(&[(gamma, &self.q), (1.0, &nothing)])?)
    }

    /// The three priors, with all δ and γ to choose from.
    fn priors(&self) -> Outcome<[(&'static str, Vec<FullGaussian>); 3]> {
        let with =
            |mean: &Tensor| [0.1, 1.0, 10.0, 30.0, 100.0].iter().map(|&d| isotropic(mean, d)).collect::<Outcome<_>>();
        let mean = self.q.mean_vector();
        let powers = [0.1, 0.3, 1.0].iter().flat_map(|&gamma| [1.0, 10.0].map(|delta| self.power(gamma, delta)));
        Ok([
            ("N(0, I/δ)", with(&mean.zeros_like())?),
            ("N(m₁, I/δ)", with(&mean)?),
            ("q₁^γ · N(0, I/δ)", powers.collect::<Outcome<_>>()?),
        ])
    }

    /// Accuracies in the new domain after `shots` examples of each digit, one a draw of them.
    pub fn few(&self, shots: usize, prior: &FullGaussian, draws: Range<u64>) -> Outcome<Vec<f64>> {
        let (z, y) = &self.pool;
        let accuracies = draws.map(|seed| {
            let rows = draw(y, &DIGITS, shots, &mut Rng::new(seed, 80));
            let q = learn(&(z.index_select(0, &rows), y.index_select(0, &rows)), prior)?;
            Ok(accuracy(&q, &self.test))
        });
        accuracies.collect()
    }
}

/// Checks what defines it, and shows what it does.
///
/// # Errors
/// If a step is refused, or a picture cannot be written.
pub fn run(setting: &Setting) -> Outcome<Vec<Finding>> {
    let known = Known::learn(setting, 1000, 0)?;
    let percent = |values: &[f64]| <[f64; 2]>::from(mean_and_error(values)).map(|v| 100.0 * v);
    let [upright, turned] = known.at_first.map(|a| 100.0 * a);
    let found = format!("{turned:.1} % on turned digits, {upright:.1} % on upright ones");
    let mut findings = vec![Finding::new("no example, accuracy of m₁", found, "less on turned ones", turned < upright)];
    let priors = known.priors()?;
    let mut curves = priors.each_ref().map(|(name, _)| ((*name).to_owned(), Vec::new()));
    for shots in [1, 2, 3, 5] {
        let mut reported = Vec::new();
        for ((_, candidates), (_, curve)) in priors.iter().zip(&mut curves) {
            let tried = candidates.iter().map(|p| Ok((mean_and_error(&known.few(shots, p, 100..106)?).0, p)));
            let tried = tried.collect::<Outcome<Vec<_>>>()?;
            let best = tried.iter().max_by(|a, b| a.0.total_cmp(&b.0)).expect("candidates").1;
            let accuracies = known.few(shots, best, 0..30)?;
            curve.push((shots as f64, percent(&accuracies)[0]));
            reported.push(accuracies);
        }
        let gain = |k: usize| percent(&reported[2].iter().zip(&reported[k]).map(|(p, o)| p - o).collect::<Vec<_>>());
        let [[a, _], [b, _], [c, error]] = [0, 1, 2].map(|k| percent(&reported[k]));
        let [[over_nothing, e], [over_mean, f]] = [gain(0), gain(1)];
        findings.push(Finding::new(
            &format!("{shots} of each turned digit, accuracy with the posterior"),
            format!("{c:.1} ± {error:.1} %; N(0, I/δ) {a:.1} %, difference ± {e:.1}; N(m₁, I/δ) {b:.1} %, ± {f:.1}"),
            "more than with either, by over 3 standard errors of 30 draws",
            over_nothing > 3.0 * e && over_mean > 3.0 * f,
        ));
    }
    let panel = Curves { y_label: "accuracy on turned digits (%)".to_owned(), series: curves.into() };
    training_curves(&setting.folder.join("low_shot.svg"), "examples of each digit", &[panel])?;
    Ok(findings)
}

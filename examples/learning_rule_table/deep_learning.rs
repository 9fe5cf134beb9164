//! Deep learning: the optimizers of this crate.

use super::table::{Answer, Outcome, Row};
use support::{given, params, state, values, weight, with_exact_expectations};
use tch::{Kind, Tensor};
use tch_blr::rule;
use tch_blr::{
    Adam, AdamW, DiagonalGaussian, Expectation, Ivon, Labels, Optimizer, Params, Result, RmsProp, Sgd, Statistic,
    Vadam, Von, nn,
};

pub const DIAGONAL: &str = "Gaussian (diagonal cov.)";
const SQUARES: &str = "delta method, stochastic, g² for the Hessian, √";
const GAUSS_NEWTON: &str = "stochastic, Gauss-Newton";
const SAMPLED_SQUARES: &str = "stochastic, g² for the Hessian";
const RETRACTION: &str = "stochastic (Price's theorem), S kept positive";

pub const ROWS: &[Row] = &[
    Row::new(["SGD", "Gaussian (fixed cov.)", "delta method, stochastic", "2 data in turn, 10 and 200 steps: m"], sgd),
    Row::new(
        ["SGD with momentum", "Gaussian (fixed cov.)", "delta method, stochastic", "quadratic, 30 steps: m"],
        sgd_with_momentum,
    ),
    Row::new(["RMSprop", DIAGONAL, SQUARES, "3 gradients; 6 equal ones: m"], rmsprop),
    Row::new(["Adam", DIAGONAL, SQUARES, "3 gradients; 6 equal ones: m"], adam),
    Row::new(["AdamW", DIAGONAL, SQUARES, "6 equal gradients: m"], adamw),
    Row::new(["Vadam", DIAGONAL, "stochastic, g² for the Hessian, √", "θ², 1 step, 8 steps: m"], vadam),
    Row::new(["Vprop", DIAGONAL, "stochastic, g² for the Hessian, √", "θ², 8 steps: m"], vprop),
    Row::new(["Noisy Adam", DIAGONAL, SAMPLED_SQUARES, "θ², 8 steps: m"], noisy_adam),
    Row::new(
        ["Online Gauss-Newton (OGN)", DIAGONAL, "delta method, Gauss-Newton, no √", "least squares, 300 steps: m, S"],
        ogn,
    ),
    Row::new(["VOGN as of ICML 2018", DIAGONAL, GAUSS_NEWTON, "least squares, 1 step: h, m"], vogn_2018),
    Row::new(["VOGN as of NeurIPS 2019", DIAGONAL, GAUSS_NEWTON, "least squares, 1 step: h, m"], vogn_2019),
    Row::new(["Variational OGN (VOGN)", DIAGONAL, GAUSS_NEWTON, "least squares, 300 steps: m, S"], vogn_end),
    Row::new(
        ["OGN, exact GGN", DIAGONAL, "delta method, Gauss-Newton matrix", "least squares, 300 steps: m, S"],
        || ggn(Expectation::Delta),
    ),
    Row::new(
        ["VOGN, exact GGN", DIAGONAL, "stochastic, Gauss-Newton matrix", "least squares, 300 steps: m, S"],
        || ggn(Expectation::Antithetic { pairs: 1 }),
    ),
    Row::new(
        ["Variational online Newton (VON)", DIAGONAL, RETRACTION, "least squares, 300 steps: m, S"],
        von_least_squares,
    ),
    Row::new(["VON: logistic", DIAGONAL, RETRACTION, "E_q by quadrature, 1500 steps: m, S"], || Ok(von_logistic())),
    Row::new(["Improved VON (IVON)", DIAGONAL, RETRACTION, "θ², 1 step: h, m"], ivon_step),
    Row::new(["IVON: least squares", DIAGONAL, RETRACTION, "300 steps: m, S"], ivon_least_squares),
    Row::new(["IVON: Poisson", DIAGONAL, RETRACTION, "E_q by quadrature, 1500 steps: m, S"], || Ok(ivon_poisson())),
];

/// The weights before the first and after each of `steps` steps on `loss(weights, step)`, and the optimizer.
pub fn train<R: rule::Row>(
    start: &[f64],
    steps: usize,
    build: impl FnOnce(Params) -> Result<Optimizer<R>>,
    loss: impl Fn(&Tensor, usize) -> Tensor,
) -> Outcome<(Vec<Vec<f64>>, Optimizer<R>)> {
    train_from(&weight(start), steps, build, loss)
}

/// The same with weights in the shape of `start`, which moves.
pub fn train_from<R: rule::Row>(
    start: &Tensor,
    steps: usize,
    build: impl FnOnce(Params) -> Result<Optimizer<R>>,
    loss: impl Fn(&Tensor, usize) -> Tensor,
) -> Outcome<(Vec<Vec<f64>>, Optimizer<R>)> {
    let mut opt = build(params(start))?;
    let mut path = vec![values(start)];
    for step in 0..steps {
        opt.step(|| loss(start, step))?;
        path.push(values(start));
    }
    Ok((path, opt))
}

/// The weight after each step from 0.5 with these gradients.
fn with_gradients(rule: impl rule::Row, lr: f64, gradients: &[f64]) -> Outcome<Vec<f64>> {
    let loss = |w: &Tensor, step: usize| (w * gradients[step]).sum(Kind::Double);
    let (path, _) = train(&[0.5], gradients.len(), |w| rule.builder().build(w, lr), loss)?;
    Ok(path[1..].concat())
}

/// Of the reference, from 0.5.
const GRADIENTS: [f64; 3] = [1.0, 0.5, -0.25];

/// Two points and one weight, x = (1, 2) and y = (1, 3), unit noise: with the prior N(0, 1) the posterior is N(7/6,
/// 1/6). For the optimizers ess = 2 and δ = ½.
const X: [f64; 2] = [1.0, 2.0];
const Y: [f64; 2] = [1.0, 3.0];
const MEAN: f64 = 7.0 / 6.0;

fn least_squares(w: &Tensor, _: usize) -> Tensor {
    0.5 * (Tensor::from_slice(&X) * w - Tensor::from_slice(&Y)).square()
}

/// Mean and precision after 300 steps of noise ±1, two points of equal weight that integrate up to the third degree.
fn settled(rule: impl rule::Row<Posterior = DiagonalGaussian>) -> Outcome<Vec<f64>> {
    settled_on(rule, least_squares)
}

fn settled_on(
    rule: impl rule::Row<Posterior = DiagonalGaussian>,
    loss: fn(&Tensor, usize) -> Tensor,
) -> Outcome<Vec<f64>> {
    let build = |w: Params| rule.builder().noise(given(300, &[&[1.0]])).build(w, 0.2);
    let (path, opt) = train(&[0.5], 300, build, loss)?;
    Ok(vec![path[300][0], opt.posterior()?.precision("w").expect("its name").double_value(&[0])])
}

fn vogn() -> Von {
    Von::vogn().ess(2.0).weight_decay(0.5).beta1(0.0).beta2(0.9)
}

/// A pass over both points takes m to pm + q: 10 steps, and the fixed point q/(1-p).
fn sgd() -> Outcome<Answer> {
    let (alpha, start) = (0.1, 0.5);
    let one = |w: &Tensor, step: usize| least_squares(w, step).get(step as i64 % 2);
    let (path, _) = train(&[start], 200, |w| Sgd::default().build(w, alpha), one)?;
    let keep = X.map(|x| 1.0 - alpha * x * x);
    let (p, q) = (keep[0] * keep[1], alpha * (keep[1] * X[0] * Y[0] + X[1] * Y[1]));
    let end = q / (1.0 - p);
    let exact = vec![end + (start - end) * p.powi(5), end];
    Ok(Answer { exact, ours: vec![path[10][0], path[200][0]], tolerance: 1e-13 })
}

/// On ½θ² the step is m₊ = (1+μ-α) m - μ m₋; √α = 1 - √μ makes √μ = 0.9 a double root: m = (1 + k/10) 0.9ᵏ from 1.
fn sgd_with_momentum() -> Outcome<Answer> {
    let loss = |w: &Tensor, _: usize| (w.square() * 0.5).sum(Kind::Double);
    let (path, _) = train(&[1.0], 30, |w| Sgd::default().momentum(0.81).build(w, 0.01), loss)?;
    let exact = (0..=30).map(|k| (1.0 + 0.1 * f64::from(k)) * 0.9f64.powi(k)).collect();
    Ok(Answer { exact, ours: path.concat(), tolerance: 1e-13 })
}

/// The reference's numbers; with equal gradients g, v = (1-aᵏ)g² and the steps are αg/(|g|√(1-aᵏ) + ε).
fn rmsprop() -> Outcome<Answer> {
    let (lr, a, g, eps) = (0.01, 0.9, -2.0, 0.1);
    let mut m = 0.5;
    let equal = (1..=6).map(|k| {
        m -= lr * g / (2.0 * (1.0 - f64::powi(a, k)).sqrt() + eps);
        m
    });
    let exact = [0.400_000_009_999_999, 0.355_098_688_525_563, 0.377_109_106_145_364_97].into_iter().chain(equal);
    let first = with_gradients(RmsProp::default(), lr, &GRADIENTS)?;
    let then = with_gradients(RmsProp::default().alpha(a).eps(eps), lr, &[g; 6])?;
    Ok(Answer { exact: exact.collect(), ours: [first, then].concat(), tolerance: 1e-14 })
}

/// The reference's numbers; with equal gradients g both averages are right at once and every step is αg/(|g| + ε).
fn adam() -> Outcome<Answer> {
    let equal = (1..=6).map(|k| 0.5 + f64::from(k) * 0.1 * 2.0 / 2.1);
    let exact = [0.400_000_001, 0.306_782_038_298_161_1, 0.250_415_901_496_329_64].into_iter().chain(equal);
    let first = with_gradients(Adam::default(), 0.1, &GRADIENTS)?;
    let then = with_gradients(Adam::default().eps(0.1), 0.1, &[-2.0; 6])?;
    Ok(Answer { exact: exact.collect(), ours: [first, then].concat(), tolerance: 1e-14 })
}

/// Adam's equal steps d and the decay: m ← (1-αη)m + d, a geometric series.
fn adamw() -> Outcome<Answer> {
    let (q, d) = (1.0 - 0.1 * 0.3, 0.1 * 2.0 / 2.1);
    let exact = (1..=6).map(|k| f64::powi(q, k) * 0.5 + d * (1.0 - f64::powi(q, k)) / (1.0 - q)).collect();
    let ours = with_gradients(AdamW::default().eps(0.1).weight_decay(0.3), 0.1, &[-2.0; 6])?;
    Ok(Answer { exact, ours, tolerance: 1e-14 })
}

/// On θ² with gradient 2θ, ten examples, prior and initial precision 1, from 0.5 with the noise 0.3 in each step.
fn vadam_path(rule: Vadam) -> Outcome<Vec<f64>> {
    let build = |w: Params| rule.noise(given(8, &[&[0.3]])).build(w, 0.01);
    let (path, _) = train(&[0.5], 8, build, |w, _| w.square().sum(Kind::Double))?;
    Ok(path[1..].concat())
}

/// The same with m ← m - step(t, b, s) written out.
fn vadam_by_hand(beta1: f64, step: impl Fn(i32, f64, f64) -> f64) -> Vec<f64> {
    let (delta, mut m, mut b, mut s) = (0.1, 0.5, 0.0, 0.0);
    let each = (1..=8).map(|t| {
        let g = 2.0 * (m + 0.3 / f64::sqrt(10.0 * (s + delta)));
        b = beta1 * b + (1.0 - beta1) * (g + delta * m);
        s = 0.999 * s + 0.001 * g * g;
        m -= step(t, b, s);
        m
    });
    each.collect()
}

/// The first mean is the reference's.
fn vadam() -> Outcome<Answer> {
    let ours = vadam_path(Vadam::default().ess(10.0).weight_decay(0.1))?;
    let mut exact =
        vadam_by_hand(0.9, |t, b, s| 0.01 * b / (1.0 - 0.9f64.powi(t)) / ((s / (1.0 - 0.999f64.powi(t))).sqrt() + 0.1));
    exact.push(0.490_294_117_647_058_8);
    let first = ours[0];
    Ok(Answer { exact, ours: [ours, vec![first]].concat(), tolerance: 1e-13 })
}

fn vprop() -> Outcome<Answer> {
    let ours = vadam_path(Vadam::vprop().ess(10.0).weight_decay(0.1))?;
    Ok(Answer { exact: vadam_by_hand(0.0, |_, b, s| 0.01 * b / (s.sqrt() + 0.1)), ours, tolerance: 1e-13 })
}

/// With a damping of 0.05.
fn noisy_adam() -> Outcome<Answer> {
    let ours = vadam_path(Vadam::noisy_adam().ess(10.0).weight_decay(0.1).damping(0.05))?;
    let exact = vadam_by_hand(0.9, |t, b, s| 0.01 * b / (1.0 - 0.9f64.powi(t)) / (s + 0.15));
    Ok(Answer { exact, ours, tolerance: 1e-13 })
}

/// The posterior: for a linear model the Gauss-Newton matrix is the Hessian, Σxᵢ² = 5.
fn ggn(expectation: Expectation) -> Outcome<Answer> {
    let loss = |w: &Tensor, _: usize| {
        nn::squared_error(&(Tensor::from_slice(&X) * w), &Tensor::from_slice(&Y), 1.0).expect("a row for each target")
    };
    let ours = settled_on(vogn().expectation(expectation).hessian(Statistic::Fisher(Labels::Exact)), loss)?;
    Ok(Answer { exact: vec![MEAN, 6.0], ours, tolerance: 1e-10 })
}

/// At m = 7/6 the gradients are 1/6 and -4/3: S = 1 + 65/36, and not the 6 of least squares (squares of gradients are
/// the empirical Fisher matrix).
fn ogn() -> Outcome<Answer> {
    let ours = settled(vogn().expectation(Expectation::Delta))?;
    Ok(Answer { exact: vec![MEAN, 101.0 / 36.0], ours, tolerance: 1e-10 })
}

/// The reference's numbers.
fn vogn_2018() -> Outcome<Answer> {
    let build = |w: Params| vogn().noise(given(1, &[&[0.3]])).build(w, 0.1);
    let (path, opt) = train(&[0.5], 1, build, least_squares)?;
    let exact = vec![1.452_211_616_751_135_2, 0.580_267_286_838_276_1];
    Ok(Answer { exact, ours: vec![state(&opt, "hess")[0], path[1][0]], tolerance: 1e-14 })
}

/// The first h is the first batch's; the heavy ball takes the prior's pull along.
fn vogn_2019() -> Outcome<Answer> {
    let (m, z, delta, damping) = (0.5, 0.3, 0.5, 0.01);
    let rule = Von::neurips2019().ess(2.0).weight_decay(delta).damping(damping);
    let build = |w: Params| rule.noise(given(1, &[&[z]])).build(w, 0.1);
    let (path, opt) = train(&[m], 1, build, least_squares)?;
    let theta = m + z / (2.0 * (1.0 + delta + damping)).sqrt();
    let g: [f64; 2] = std::array::from_fn(|i| X[i] * (X[i] * theta - Y[i]));
    let h = 0.5 * (g[0] * g[0] + g[1] * g[1]);
    let exact = vec![h, m - 0.1 * (0.5 * (g[0] + g[1]) + delta * m) / (h + delta + damping)];
    Ok(Answer { exact, ours: vec![state(&opt, "hess")[0], path[1][0]], tolerance: 1e-14 })
}

/// θ ~ N(7/6, 1/S) adds Σxᵢ⁴/S = 17/S to OGN's squares: S = 101/36 + 17/S.
fn vogn_end() -> Outcome<Answer> {
    let half = 101.0 / 72.0;
    let ours = settled(vogn().expectation(Expectation::Antithetic { pairs: 1 }))?;
    Ok(Answer { exact: vec![MEAN, half + f64::sqrt(half * half + 17.0)], ours, tolerance: 1e-10 })
}

/// The posterior.
fn von_least_squares() -> Outcome<Answer> {
    let rule = vogn().expectation(Expectation::Antithetic { pairs: 1 }).hessian(Statistic::Price);
    Ok(Answer { exact: vec![MEAN, 6.0], ours: settled(rule)?, tolerance: 1e-10 })
}

/// x = 1, y = 1 and the prior N(0, 1); the update is given expectations by Gauss-Hermite quadrature. The best Gaussian
/// is the reference's.
fn von_logistic() -> Answer {
    let rule = Von::default().ess(1.0).weight_decay(1.0).beta1(0.0).beta2(0.9).hessian(Statistic::Price);
    let (m, s) = with_exact_expectations(rule, 0.1, 1500, |theta| -1.0 / (1.0 + theta.exp()));
    Answer { exact: vec![0.413_126_805_979_680_6, 1.206_464_295_700_586_4], ours: vec![m, s], tolerance: 1e-10 }
}

/// The reference's numbers.
fn ivon_step() -> Outcome<Answer> {
    let rule = Ivon::default().ess(10.0).weight_decay(0.1).beta2(0.999);
    let build = |w: Params| rule.noise(given(1, &[&[0.3]])).build(w, 0.1);
    let (path, opt) = train(&[0.5], 1, build, |w, _| w.square().sum(Kind::Double))?;
    let exact = vec![1.000_175_001_355_562_6, 0.376_928_898_970_344];
    Ok(Answer { exact, ours: vec![state(&opt, "hess")[0], path[1][0]], tolerance: 1e-14 })
}

/// The posterior.
fn ivon_least_squares() -> Outcome<Answer> {
    let rule = Ivon::default().ess(2.0).weight_decay(0.5).beta1(0.0).beta2(0.9).rescale_lr(false);
    let rule = rule.expectation(Expectation::Antithetic { pairs: 1 });
    Ok(Answer { exact: vec![MEAN, 6.0], ours: settled(rule)?, tolerance: 1e-10 })
}

/// Rate e^θ, a count of 3 and the prior N(0, 1), as [`von_logistic`].
fn ivon_poisson() -> Answer {
    let rule = Ivon::default().ess(1.0).weight_decay(1.0).beta1(0.0).beta2(0.9).rescale_lr(false);
    let (m, s) = with_exact_expectations(rule, 0.1, 1500, |theta| theta.exp() - 3.0);
    Answer { exact: vec![0.687_422_729_064_258_6, 3.312_577_270_935_744], ours: vec![m, s], tolerance: 1e-10 }
}

//! The dual view of models with several outputs, against refits, one-output models and matrices written down here.

use support::{F64, all_close, close, largest, ripple, values};
use tch::nn::{Module, VarStore};
use tch::{Device, Kind, Tensor};
use tch_blr::fisher::Fisher;
use tch_blr::nn::{self, Likelihood};
use tch_blr::sensitivity::{self, DualView, Sensitivity};
use tch_blr::{Error, Prior};

const CATEGORICAL: Likelihood = Likelihood::Categorical;
const BERNOULLI: Likelihood = Likelihood::Bernoulli;

/// J of f_c = φᵀw_c for weights `[C, D]` in row-major order, `[N, C, CD]`.
fn separate(phi: &Tensor, c: i64) -> Tensor {
    let (n, d) = (phi.size()[0], phi.size()[1]);
    (Tensor::eye(c, F64).reshape([1, c, c, 1]) * phi.reshape([n, 1, 1, d])).reshape([n, c, c * d])
}

fn without(n: i64, gone: &[i64]) -> Tensor {
    Tensor::from_slice(&(0..n).filter(|i| !gone.contains(i)).collect::<Vec<i64>>())
}

/// Σwᵢℓᵢ + ½δ‖θ‖² of a softmax regression, and its optimum by Newton's method.
struct Softmax {
    jacobian: Tensor,
    y: Tensor,
    weights: Tensor,
    delta: f64,
}

impl Softmax {
    /// 40 examples of three classes, none of which the four features tell apart for sure; P = 12.
    fn example() -> Softmax {
        let x = Tensor::cat(&[Tensor::ones([40, 1], F64), ripple(&[40, 3], 2.3)], 1);
        let y = (x.narrow(1, 1, 3) + ripple(&[40, 3], 5.1) * 0.7).argmax(1, false);
        Softmax { jacobian: separate(&x, 3), y, weights: Tensor::ones([40], F64), delta: 0.4 }
    }

    fn objective(&self, theta: &Tensor) -> f64 {
        let each = -self.jacobian.matmul(theta).log_softmax(1, Kind::Double).gather(1, &self.y.unsqueeze(1), false);
        let penalty = theta.square().sum(Kind::Double) * (0.5 * self.delta);
        ((each.squeeze_dim(1) * &self.weights).sum(Kind::Double) + penalty).double_value(&[])
    }

    fn newton(&self, theta: &Tensor) -> Tensor {
        let j = &self.jacobian;
        let p = j.matmul(theta).softmax(1, Kind::Double);
        let e = (&p - self.y.one_hot(p.size()[1])) * self.weights.unsqueeze(1);
        let gradient = j.flatten(0, 1).tr().mv(&e.flatten(0, 1)) + theta * self.delta;
        let lambda = (p.diag_embed(0, 1, 2) - p.unsqueeze(2) * p.unsqueeze(1)) * self.weights.reshape([-1, 1, 1]);
        let hessian = j.transpose(1, 2).matmul(&lambda).matmul(j).sum_dim_intlist(0, false, Kind::Double)
            + Tensor::eye(theta.size()[0], F64) * self.delta;
        theta - hessian.inverse().mv(&gradient)
    }

    fn optimum(&self) -> Tensor {
        let start = Tensor::zeros([self.jacobian.size()[2]], F64);
        (0..30).fold(start, |theta, _| self.newton(&theta))
    }

    fn view(&self, theta: &Tensor) -> DualView {
        DualView::new(&self.jacobian, &self.y, theta, CATEGORICAL, self.delta).unwrap()
    }
}

/// A softmax of two logits with precision δ for each one's weights is a sigmoid of their difference with precision δ/2, also off
/// the optimum and with logits that have something in common.
#[test]
fn two_logits_are_one_of_half_the_precision() {
    let (x, delta) = (ripple(&[20, 3], 2.3), 0.8);
    let y = (x.select(1, 0) + ripple(&[20], 5.1) * 0.5).gt(0.0);
    let two = Softmax { jacobian: separate(&x, 2), y: y.to_kind(Kind::Int64), weights: Tensor::ones([20], F64), delta };
    let turn = Tensor::from_slice(&[-1.0, 1.0]);
    for (off, common) in [(0.0, 0.0), (0.7, 0.0), (0.7, 0.3)] {
        let parts = two.optimum().reshape([2, 3]);
        let difference = parts.get(1) - parts.get(0) + ripple(&[3], 1.0) * off;
        let pair = Tensor::stack(&[-&difference * 0.5 + common, &difference * 0.5 + common], 0).reshape([-1]);
        let two = two.view(&pair);
        let one = DualView::new(&x, &y.to_kind(Kind::Double), &difference, BERNOULLI, delta / 2.0).unwrap();
        all_close(&values(&two.alpha().select(1, 1)), &values(one.alpha()), 1e-14);
        all_close(&values(&two.lambda().select(1, 0).select(1, 1)), &values(&-one.lambda()), 1e-14);
        let of_difference = |v: &Tensor| v.matmul(&turn).matmul(&turn);
        all_close(&values(&of_difference(&two.variance().unwrap())), &values(&one.variance().unwrap()), 1e-12);
        all_close(&values(&two.leverage().unwrap()), &values(&one.leverage().unwrap()), 1e-13);
        let left_out = two.leave_one_out().unwrap().matmul(&turn);
        all_close(&values(&left_out), &values(&one.leave_one_out().unwrap()), 1e-12);
        close(two.log_marginal_likelihood().unwrap(), one.log_marginal_likelihood().unwrap(), 1e-11);
        // The common part costs the primal ½δ·2Σs², and has no part in the dual.
        let common = delta * 3.0 * common * common;
        close(two.duality_gap().unwrap() - common, one.duality_gap().unwrap(), 1e-11);
        let fewer = (two.without(&[4, 9]).unwrap(), one.without(&[4, 9]).unwrap());
        let parts = fewer.0.weights().reshape([2, 3]);
        all_close(&values(&(parts.get(1) - parts.get(0))), &values(fewer.1.weights()), 1e-12);
        let new = ripple(&[5, 3], 0.77);
        let (p, q) = (two.predict(&separate(&new, 2)).unwrap(), one.predict(&new).unwrap());
        all_close(&values(&p.mean.select(1, 1)), &values(&q.mean), 1e-14);
        all_close(&values(&p.epistemic.select(1, 1).select(1, 1)), &values(&q.epistemic), 1e-13);
        all_close(&values(&p.epistemic.select(1, 0).select(1, 1)), &values(&-&q.epistemic), 1e-13);
        all_close(&values(&p.aleatoric.select(1, 1).select(1, 1)), &values(&q.aleatoric), 1e-14);
        let [k, of_two] = [one.kernel(&new, &x), two.kernel(&separate(&new, 2), &separate(&x, 2))].map(Result::unwrap);
        assert!(largest(&(of_difference(&of_two) - k)) < 1e-13);
    }
}

/// Softmax regression: primal and dual, the gap, derivatives of the optimum, what happens without an example.
#[test]
fn softmax_regression_has_a_dual() {
    let fit = Softmax::example();
    let theta = fit.optimum();
    let view = fit.view(&theta);
    let p = fit.jacobian.matmul(&theta).softmax(1, Kind::Double);
    assert!(largest(&(view.alpha() - (fit.y.one_hot(3) - &p))) < 1e-15);
    let lambda = p.diag_embed(0, 1, 2) - p.unsqueeze(2) * p.unsqueeze(1);
    assert!(largest(&(view.lambda() - &lambda)) < 1e-15);
    all_close(&values(&view.representer().unwrap()), &values(&theta), 1e-8);

    // From the start to the optimum the gap bounds what is left to gain, and vanishes.
    let (best, mut at, mut gaps) = (fit.objective(&theta), Tensor::zeros([12], F64), Vec::new());
    for _ in 0..10 {
        let gap = fit.view(&at).duality_gap().unwrap();
        let left = fit.objective(&at) - best;
        assert!(gap >= left - 1e-12 && left >= -1e-12, "{gap} {left}");
        gaps.push(gap);
        at = fit.newton(&at);
    }
    assert!(gaps[0] > 1.0 && gaps[2] > 1e-6, "{gaps:?}");
    close(gaps[9], 0.0, 1e-12);

    let (n, p) = (40, 12);
    let covariance = {
        let s = fit.jacobian.transpose(1, 2).matmul(&lambda).matmul(&fit.jacobian);
        (s.sum_dim_intlist(0, false, Kind::Double) + Tensor::eye(p, F64) * fit.delta).inverse()
    };
    let v = fit.jacobian.matmul(&covariance).matmul(&fit.jacobian.transpose(1, 2));
    assert!(largest(&(view.variance().unwrap() - &v)) < 1e-12);
    let leverage = lambda.matmul(&v).diagonal(0, 1, 2).sum_dim_intlist(1, false, Kind::Double);
    all_close(&values(&view.leverage().unwrap()), &values(&leverage), 1e-13);
    let effective = view.effective_parameters().unwrap();
    close(effective, p as f64 - fit.delta * covariance.trace().double_value(&[]), 1e-11);
    assert!(effective > 0.0 && effective < p as f64 && leverage.max().double_value(&[]) < 2.0);

    let derivatives = view.sensitivity().unwrap();
    let weighted = |i: i64, w: f64| {
        let weights = fit.weights.copy();
        let _ = weights.get(i).fill_(w);
        Softmax { weights, jacobian: fit.jacobian.copy(), y: fit.y.copy(), ..fit }.optimum()
    };
    let left_out = view.leave_one_out().unwrap();
    let (mut corrected, mut simple) = (0.0, 0.0);
    for i in 0..n {
        if i % 13 == 0 {
            let numerical = (weighted(i, 1.0 + 1e-4) - weighted(i, 1.0 - 1e-4)) / 2e-4;
            all_close(&values(&derivatives.get(i)), &values(&numerical), 1e-7);
        }
        // The posterior divided by the example's part predicts (I - vΛ)⁻¹vα.
        let j = fit.jacobian.get(i);
        let divided = view.without(&[i]).unwrap();
        all_close(&values(&left_out.get(i)), &values(&j.mv(divided.weights())), 1e-12);
        let truth = weighted(i, 0.0);
        let error = |theta: &Tensor| (theta - &truth).norm().double_value(&[]);
        corrected += error(divided.weights());
        simple += error(&(&theta - derivatives.get(i)));
        assert!(error(divided.weights()) < 0.3 * error(&theta), "example {i}");
    }
    println!("errors of the weights without an example: {corrected:.4} by division, {simple:.4} to first order");
    assert!(corrected < simple);
}

/// Laplace's evidence from its definition, with the root diag(√p) - p√pᵀ of Λ and no inverse of it, by weights and by kernel; on
/// and off the optimum.
#[test]
fn the_evidence_of_a_softmax_needs_no_inverse_curvature() {
    let fit = Softmax::example();
    let theta = fit.optimum();
    let view = fit.view(&theta);
    let p = fit.jacobian.matmul(&theta).softmax(1, Kind::Double);
    let root = p.sqrt().diag_embed(0, 1, 2) - p.unsqueeze(2) * p.sqrt().unsqueeze(1);
    let white = root.transpose(1, 2).matmul(&fit.jacobian).flatten(0, 1);
    let by_kernel = (white.matmul(&white.tr()) / fit.delta + Tensor::eye(120, F64)).logdet().double_value(&[]);
    let expected = -fit.objective(&theta) - 0.5 * by_kernel;
    close(view.log_marginal_likelihood().unwrap(), expected, 1e-10);
    close(view.log_marginal_likelihood_of_kernel().unwrap(), expected, 1e-10);

    // Off the optimum: the Gaussian integral of the parabolas, ½gᵀS⁻¹g more with the slope g.
    for off in [0.1, 1.0, 30.0] {
        let at = &theta + ripple(&[12], 1.0) * off;
        let view = fit.view(&at);
        let (a, b) = (view.log_marginal_likelihood().unwrap(), view.log_marginal_likelihood_of_kernel().unwrap());
        close(a, b, 1e-10 * a.abs().max(1.0));
        let s = fit.jacobian.transpose(1, 2).matmul(view.lambda()).matmul(&fit.jacobian);
        let s = s.sum_dim_intlist(0, false, Kind::Double) + Tensor::eye(12, F64) * fit.delta;
        let g = view.representer().unwrap() * fit.delta - &at * fit.delta;
        let gain = 0.5 * g.dot(&s.inverse().mv(&g)).double_value(&[]);
        let volume = s.logdet().double_value(&[]) - 12.0 * fit.delta.ln();
        close(a, gain - fit.objective(&at) - 0.5 * volume, 1e-9 * a.abs().max(1.0));
    }
    // Predictions that are certain in f64 have no curvature at all, and an evidence nevertheless.
    let certain = fit.view(&(&theta * 1e4));
    assert!(largest(&certain.lambda().get(0)) == 0.0);
    let (a, b) = (certain.log_marginal_likelihood().unwrap(), certain.log_marginal_likelihood_of_kernel().unwrap());
    close(a, b, 1e-9 * a.abs());
}

/// One logit: the process's density of its targets, which Λ⁻¹ defines, has the same evidence but for each example's constant.
#[test]
fn the_evidence_of_a_logit_is_that_of_the_process() {
    let (x, delta) = (ripple(&[15, 4], 2.3), 0.5);
    let y = (x.select(1, 0) + ripple(&[15], 5.1) * 0.5).gt(0.0).to_kind(Kind::Double);
    for theta in [Tensor::zeros([4], F64), ripple(&[4], 1.7)] {
        let view = DualView::new(&x, &y, &theta, BERNOULLI, delta).unwrap();
        let (f, alpha, beta) = (x.mv(&theta), view.alpha(), view.lambda());
        let targets = &f + alpha / beta;
        let covariance = x.matmul(&x.tr()) / delta + beta.reciprocal().diag(0);
        let quadratic = targets.dot(&covariance.inverse().mv(&targets)).double_value(&[]);
        let density = -0.5 * ((covariance * std::f64::consts::TAU).logdet().double_value(&[]) + quadratic);
        let losses = -(&f * (&y * 2.0 - 1.0)).log_sigmoid();
        let constant: Tensor = alpha.square() / beta * 0.5 - (beta.reciprocal() * std::f64::consts::TAU).log() * -0.5;
        let constant = (constant - losses).sum(Kind::Double).double_value(&[]);
        close(view.log_marginal_likelihood().unwrap(), density + constant, 1e-11);
        close(view.log_marginal_likelihood_of_kernel().unwrap(), density + constant, 1e-11);
    }
}

/// Regression with three outputs that share their weights: everything is exact, from any weights.
#[test]
fn linear_regression_with_several_outputs_is_exact() {
    let (j, y) = (ripple(&[9, 3, 4], 1.9), ripple(&[9, 3], 3.7));
    let (noise, delta) = (Likelihood::Gaussian { variance: 0.3 }, 0.8);
    let view = DualView::fitted(&j, &y, noise, delta).unwrap();
    let refit = |gone: &[i64]| {
        let at = without(9, gone);
        DualView::fitted(&j.index_select(0, &at), &y.index_select(0, &at), noise, delta).unwrap()
    };
    let left_out = view.leave_one_out().unwrap();
    for gone in [vec![0], vec![5], vec![8], vec![1, 7, 4], (0..8).collect()] {
        let (divided, refit) = (view.without(&gone).unwrap(), refit(&gone));
        all_close(&values(divided.weights()), &values(refit.weights()), 1e-11);
        all_close(&values(divided.alpha()), &values(refit.alpha()), 1e-11);
        close(divided.log_marginal_likelihood().unwrap(), refit.log_marginal_likelihood().unwrap(), 1e-10);
        close(divided.duality_gap().unwrap(), 0.0, 1e-11);
        if let [i] = gone[..] {
            all_close(&values(&left_out.get(i)), &values(&j.get(i).mv(refit.weights())), 1e-11);
        }
    }
    all_close(&values(view.without(&(0..9).collect::<Vec<_>>()).unwrap().weights()), &[0.0; 4], 1e-11);
    close(view.duality_gap().unwrap(), 0.0, 1e-12);
    all_close(&values(&view.representer().unwrap()), &values(view.weights()), 1e-12);

    // ln p(y) and predictions from the 27 × 27 covariance of all outputs.
    let rows = j.flatten(0, 1);
    let covariance = rows.matmul(&rows.tr()) / delta + Tensor::eye(27, F64) * 0.3;
    let flat = y.flatten(0, 1);
    let quadratic = flat.dot(&covariance.inverse().mv(&flat)).double_value(&[]);
    let expected = -0.5 * (27.0 * std::f64::consts::TAU.ln() + covariance.logdet().double_value(&[]) + quadratic);
    for view in [&view, &DualView::new(&j, &y, &ripple(&[4], 0.9), noise, delta).unwrap()] {
        close(view.log_marginal_likelihood().unwrap(), expected, 1e-10);
        close(view.log_marginal_likelihood_of_kernel().unwrap(), expected, 1e-10);
    }
    let new = ripple(&[1, 3, 4], 0.77);
    let p = view.predict(&new).unwrap();
    let k = new.flatten(0, 1).matmul(&rows.tr()) / delta;
    let mean = k.matmul(&covariance.inverse()).mv(&flat);
    all_close(&values(&p.mean), &values(&mean), 1e-11);
    let prior = new.flatten(0, 1).matmul(&new.flatten(0, 1).tr()) / delta;
    let variance = prior - k.matmul(&covariance.inverse()).matmul(&k.tr());
    assert_eq!((p.mean.size(), p.epistemic.size()), (vec![1, 3], vec![1, 3, 3]));
    assert!(largest(&(p.epistemic.get(0) - &variance)) < 1e-11 && largest(&(p.variance.get(0) - variance)) < 1e-11);
    assert!(largest(&(p.aleatoric.get(0) - Tensor::eye(3, F64) * 0.3)) < 1e-15);

    // The kernel of two inputs is J(x)J(x')ᵀ/δ, which is not symmetric.
    let all = view.kernel(&new, &j).unwrap();
    assert_eq!(all.size(), [1, 9, 3, 3]);
    let own = all.get(0).get(7);
    assert!(largest(&(&own - own.tr())) > 0.1);
    assert!(largest(&(own - new.get(0).matmul(&j.get(7).tr()) / delta)) < 1e-14);
}

/// Outputs that share no weight are as many models, whatever the likelihood; and one output is the case C = 1.
#[test]
fn separate_outputs_are_separate_models() {
    let (x, theta, delta) = (ripple(&[12, 3], 1.9), ripple(&[2, 3], 0.9), 0.6);
    let values_of = ripple(&[12, 2], 3.7);
    for (likelihood, y) in [
        (Likelihood::Gaussian { variance: 0.2 }, values_of.copy()),
        (BERNOULLI, values_of.gt(0.0).to_kind(Kind::Double)),
    ] {
        let both = DualView::new(&separate(&x, 2), &y, &theta.reshape([-1]), likelihood, delta).unwrap();
        let each = [0, 1].map(|c| DualView::new(&x, &y.select(1, c), &theta.get(c), likelihood, delta).unwrap());
        let sum = |f: &dyn Fn(&DualView) -> tch_blr::Result<f64>| f(&each[0]).unwrap() + f(&each[1]).unwrap();
        for f in [
            &|v: &DualView| v.log_marginal_likelihood() as tch_blr::Result<f64>,
            &|v: &DualView| v.log_marginal_likelihood_of_kernel(),
            &|v: &DualView| v.duality_gap(),
            &|v: &DualView| v.effective_parameters(),
        ] as [&dyn Fn(&DualView) -> tch_blr::Result<f64>; 4]
        {
            close(f(&both).unwrap(), sum(f), 1e-11);
        }
        let (left_out, variance) = (both.leave_one_out().unwrap(), both.variance().unwrap());
        for (c, one) in (0..2).zip(&each) {
            all_close(&values(&left_out.select(1, c)), &values(&one.leave_one_out().unwrap()), 1e-12);
            all_close(&values(&variance.select(1, c).select(1, c)), &values(&one.variance().unwrap()), 1e-12);
            all_close(&values(&variance.select(1, c).select(1, 1 - c)), &[0.0; 12], 1e-13);
        }
        // The same numbers in the shapes of C = 1.
        let column = DualView::new(&x.unsqueeze(1), &y.narrow(1, 0, 1), &theta.get(0), likelihood, delta).unwrap();
        assert_eq!(
            (column.alpha().size(), column.lambda().size(), each[0].alpha().size(), each[0].lambda().size()),
            (vec![12, 1], vec![12, 1, 1], vec![12], vec![12])
        );
        all_close(&values(&column.leave_one_out().unwrap()), &values(&each[0].leave_one_out().unwrap()), 0.0);
        let (a, b) = (column.predict(&x.unsqueeze(1)).unwrap(), each[0].predict(&x).unwrap());
        all_close(&values(&a.epistemic), &values(&b.epistemic), 0.0);
    }
}

/// A network with trained-like weights in f64.
fn network() -> (VarStore, tch::nn::Sequential) {
    let mut vs = VarStore::new(Device::Cpu);
    let layer = |name: &str, i, o| nn::linear(vs.root() / name, i, o, tch::nn::LinearConfig::default());
    let net = tch::nn::seq().add(layer("a", 4, 5)).add_fn(Tensor::tanh).add(layer("b", 5, 3));
    vs.set_kind(Kind::Double);
    let mut all: Vec<_> = vs.variables().into_iter().collect();
    all.sort_by(|a, b| a.0.cmp(&b.0));
    for (i, (_, mut t)) in all.into_iter().enumerate() {
        tch::no_grad(|| t.copy_(&(ripple(&t.size(), 1.3 + i as f64) * 0.8)));
    }
    (vs, net)
}

/// A regression of one output may have targets `[N, 1]`, as its outputs and `nn::squared_error` do, or `[N]`.
#[test]
fn targets_of_one_output() {
    let (vs, net) = network();
    let (x, y) = (ripple(&[11, 4], 2.1), ripple(&[11, 1], 0.7));
    let noise = Likelihood::Gaussian { variance: 0.5 };
    let first = || net.forward(&x).narrow(1, 0, 1);
    let _ = tch_blr::nn::squared_error(&first(), &y, 0.5).unwrap();
    let alphas = [&y, &y.squeeze()].map(|y| {
        let j = sensitivity::jacobian(&vs, first).unwrap();
        let fitted = DualView::fitted(&j, y, noise, 1.0).unwrap();
        let linearized = DualView::linearized(&vs, first, y, noise, 1.0).unwrap();
        (values(fitted.alpha()), values(linearized.alpha()))
    });
    assert_eq!(alphas[0], alphas[1]);
    assert_eq!(alphas[0].1, values(&((y.squeeze() - first().squeeze()) / 0.5)));
    for wrong in [y.tr(), y.repeat([1, 2])] {
        assert!(DualView::linearized(&vs, first, &wrong, noise, 1.0).is_err());
    }
}

/// A softmax network in its Jacobian is Laplace's approximation with the Gauss-Newton matrix.
#[test]
fn a_softmax_network_is_a_process_of_its_jacobian() {
    let (vs, net) = network();
    let (x, y) = (ripple(&[11, 4], 2.1), Tensor::from_slice(&[0i64, 1, 2, 1, 1, 0, 2, 0, 1, 2, 2]));
    let j = sensitivity::jacobian(&vs, || net.forward(&x)).unwrap();
    let f = net.forward(&x);
    let leaves = vs.trainable_variables();
    let row = |i: i64, c: i64| {
        let g = Tensor::run_backward(&[f.get(i).get(c)], &leaves, true, false);
        Tensor::cat(&g.iter().map(|g| g.reshape([-1])).collect::<Vec<_>>(), 0)
    };
    let by_loop: Vec<Tensor> = (0..11).flat_map(|i| (0..3).map(move |c| (i, c))).map(|(i, c)| row(i, c)).collect();
    assert_eq!(j.size(), [11, 3, 43]);
    assert!(largest(&(&j - Tensor::stack(&by_loop, 0).reshape([11, 3, 43]))) < 1e-13);
    // One column of outputs has features [N, P].
    let first = sensitivity::jacobian(&vs, || net.forward(&x).narrow(1, 0, 1)).unwrap();
    assert!(first.size() == [11, 43] && largest(&(first - j.select(1, 0))) < 1e-13);

    let view = DualView::linearized(&vs, || net.forward(&x), &y, CATEGORICAL, 0.5).unwrap();
    let q = Fisher::exact().full(&vs, [&x], |x| net.forward(x)).unwrap().laplace(Prior::isotropic(0.5)).unwrap();
    let s = Sensitivity::of(&q, &vs, [(&x, &y)], CATEGORICAL, |x| net.forward(x)).unwrap();
    assert!(largest(&(view.alpha() + s.errors())) < 1e-14);
    all_close(&values(&view.leverage().unwrap()), &values(&s.leverage().unwrap()), 1e-11);
    let expected = q.output_covariance(&vs, || net.forward(&x)).unwrap();
    assert!(largest(&(view.variance().unwrap() - &expected)) < 1e-11);
    // The network's own outputs move, not those of its linear continuation from zero.
    let left_out = s.outputs() + s.leave_one_out_shift().unwrap();
    assert!(largest(&(view.leave_one_out().unwrap() - left_out)) < 1e-10);
    let (a, b) = (view.log_marginal_likelihood().unwrap(), view.log_marginal_likelihood_of_kernel().unwrap());
    close(a, b, 1e-9);

    // DNN2GP in probability space, at the network's outputs.
    let new = ripple(&[6, 4], 0.77);
    let (z, features) = (net.forward(&new).detach(), sensitivity::jacobian(&vs, || net.forward(&new)).unwrap());
    let p = view.predict_at(&z, &features).unwrap();
    let mean = z.softmax(1, Kind::Double);
    let lambda = mean.diag_embed(0, 1, 2) - mean.unsqueeze(2) * mean.unsqueeze(1);
    let v = q.output_covariance(&vs, || net.forward(&new)).unwrap();
    assert!(largest(&(&p.mean - &mean)) < 1e-15 && largest(&(&p.aleatoric - &lambda)) < 1e-14);
    assert!(largest(&(&p.variance - &v)) < 1e-11);
    assert!(largest(&(&p.epistemic - lambda.matmul(&v).matmul(&lambda))) < 1e-11);
    let linear = view.predict(&features).unwrap();
    assert!(largest(&(&linear.output - features.matmul(view.weights()))) < 1e-13);
    assert!(largest(&(linear.variance - p.variance)) < 1e-15);

    // The kernel of all pairs of outputs, and what it adds up to.
    let k = view.kernel(&features, &j).unwrap();
    assert_eq!(k.size(), [6, 11, 3, 3]);
    let own = features.get(4).matmul(&j.get(7).tr()) / 0.5;
    assert!(largest(&(k.get(4).get(7) - own)) < 1e-12);
    let trace = k.diagonal(0, 2, 3).sum_dim_intlist(2, false, Kind::Double);
    assert!(largest(&(view.kernel_trace(&features, &j).unwrap() - trace)) < 1e-11);
    let total = k.sum_dim_intlist([2i64, 3].as_slice(), false, Kind::Double);
    assert!(largest(&(view.kernel_sum(&features, &j).unwrap() - total)) < 1e-11);
}

#[test]
fn what_does_not_fit_is_refused() {
    let (j, w) = (ripple(&[4, 3, 2], 1.0), ripple(&[2], 2.0));
    let y = Tensor::from_slice(&[0i64, 2, 1, 1]);
    let new = |j: &Tensor, y: &Tensor, of| DualView::new(j, y, &w, of, 1.0).map(|_| ()).unwrap_err();
    let says = |e: Error, what: &str| {
        assert!(matches!(&e, Error::Memory(p) | Error::Likelihood(p) if p.contains(what)), "{e}");
    };
    says(new(&j, &(&y + 1), CATEGORICAL), "class 3");
    says(new(&j, &y.narrow(0, 0, 3), CATEGORICAL), "[3]");
    says(new(&j, &y.to_kind(Kind::Double), CATEGORICAL), "Int64");
    says(new(&j.select(1, 0), &y, CATEGORICAL), "Likelihood::Bernoulli");
    says(new(&j, &y.to_kind(Kind::Double), BERNOULLI), "[4, 3]");
    says(new(&j.narrow(2, 0, 1), &y, CATEGORICAL), "expected [1]");
    says(new(&j.get(0).get(0), &y, CATEGORICAL), "[N, C, P]");
    says(new(&(&j * f64::NAN), &y, CATEGORICAL), "not finite");
    says(new(&j.narrow(0, 0, 0), &y.narrow(0, 0, 0), CATEGORICAL), "empty");
    let view = DualView::new(&j, &y, &w, CATEGORICAL, 1.0).unwrap();
    says(view.predict(&j.select(1, 0)).unwrap_err(), "expected [M, 3, 2]");
    says(view.predict_at(&ripple(&[4, 2], 1.0), &j).unwrap_err(), "expected [4, 3]");
    says(view.kernel(&j, &j.narrow(1, 0, 2)).unwrap_err(), "expected [M, 3, 2]");
    says(view.without(&[4]).unwrap_err(), "position 4");
    // A Newton step too far: y - α, which is p + Λd, is no probability any more.
    let (three, no) = (Tensor::full([3, 1], 3.0, F64), Tensor::zeros([3], F64));
    let view = DualView::new(&three, &no, &Tensor::zeros([1], F64), BERNOULLI, 0.01).unwrap();
    assert!(view.duality_gap().unwrap().is_finite());
    assert_eq!(view.without(&[0, 1]).unwrap().duality_gap().unwrap(), f64::INFINITY);
}

/// A Jacobian of 64 × 1000 × 1,001,000 numbers would be 500 GB; nothing of it is begun.
#[test]
fn a_jacobian_that_cannot_be_meant_is_refused() {
    let vs = VarStore::new(Device::Cpu);
    let net = nn::linear(vs.root(), 1000, 1000, tch::nn::LinearConfig::default());
    let x = Tensor::zeros([64, 1000], (Kind::Float, Device::Cpu));
    let e = sensitivity::jacobian(&vs, || net.forward(&x)).unwrap_err();
    assert!(matches!(&e, Error::Memory(p) if p.contains("[64000, 1001000]") && p.contains("last layer")), "{e}");
    // P² counts as well: 2 × 10⁵ features have a precision of 4 × 10¹⁰ numbers.
    let (wide, w) = (Tensor::zeros([2, 200_000], F64), Tensor::zeros([200_000], F64));
    let e = DualView::new(&wide, &Tensor::zeros([2], F64), &w, BERNOULLI, 1.0).unwrap_err();
    assert!(matches!(&e, Error::Memory(p) if p.contains("precision of the weights")), "{e}");
}

//! The memory-perturbation equation and the dual view, against refits, finite differences and matrices written down here.

use support::{all_close, close, largest, ripple, values};
use tch::nn::{Module, VarStore};
use tch::{Device, Kind, Tensor};
use tch_blr::fisher::Fisher;
use tch_blr::nn::{self, Likelihood};
use tch_blr::selection;
use tch_blr::sensitivity::{self, DualView, Removal, Sensitivity};
use tch_blr::{DiagonalGaussian, FullGaussian, GaussianPosterior, Ivon, Params, Philox, Prior, combine};

const BERNOULLI: Likelihood = Likelihood::Bernoulli;

/// Optimum of Σ wᵢℓᵢ + ½δ‖θ‖² of a logistic regression, by Newton's method.
fn logistic(x: &Tensor, y: &Tensor, weights: &Tensor, delta: f64) -> Tensor {
    let mut theta = Tensor::zeros([x.size()[1]], (Kind::Double, Device::Cpu));
    for _ in 0..30 {
        let p = x.mv(&theta).sigmoid();
        let gradient = x.tr().mv(&((&p - y) * weights)) + &theta * delta;
        let beta = (&p - p.square()) * weights;
        let eye = Tensor::eye(theta.size()[0], (Kind::Double, Device::Cpu));
        let hessian = x.tr().matmul(&(x * beta.unsqueeze(1))) + eye * delta;
        theta -= gradient.unsqueeze(1).cholesky_solve(&hessian.linalg_cholesky(false), false).squeeze_dim(1);
    }
    theta
}

/// A network with trained-like weights in f64.
fn network(sizes: &[i64]) -> (VarStore, tch::nn::Sequential) {
    let mut vs = VarStore::new(Device::Cpu);
    let mut net = tch::nn::seq();
    for (i, pair) in sizes.windows(2).enumerate() {
        if i > 0 {
            net = net.add_fn(Tensor::tanh);
        }
        net = net.add(nn::linear(vs.root() / format!("layer{i}"), pair[0], pair[1], tch::nn::LinearConfig::default()));
    }
    vs.set_kind(Kind::Double);
    for (i, (_, mut t)) in sorted(&vs).into_iter().enumerate() {
        tch::no_grad(|| t.copy_(&(ripple(&t.size(), 1.3 + i as f64) * 0.8)));
    }
    (vs, net)
}

fn sorted(vs: &VarStore) -> Vec<(String, Tensor)> {
    let mut all: Vec<_> = vs.variables().into_iter().collect();
    all.sort_by(|a, b| a.0.cmp(&b.0));
    all
}

/// J `[N, C, P]` by one backward pass for each number.
fn jacobian(params: &[Tensor], f: &Tensor) -> Tensor {
    let (n, c) = (f.size()[0], f.size()[1]);
    let row = |i: i64, k: i64| {
        let g = Tensor::run_backward(&[f.select(0, i).select(0, k)], params, true, false);
        Tensor::cat(&g.iter().map(|g| g.reshape([-1])).collect::<Vec<_>>(), 0)
    };
    let each: Vec<Tensor> = (0..n).flat_map(|i| (0..c).map(move |k| (i, k))).map(|(i, k)| row(i, k)).collect();
    Tensor::stack(&each, 0).reshape([n, c, -1])
}

/// Every number of [`Sensitivity`] for a softmax network, by loops over the definitions; full and diagonal posteriors, cut
/// into batches.
#[test]
fn definitions_of_a_softmax_network() {
    let (vs, net) = network(&[4, 5, 3]);
    let (x, y) = (ripple(&[11, 4], 2.1), Tensor::from_slice(&[0i64, 1, 2, 1, 1, 0, 2, 0, 1, 2, 2]));
    let params = Params::from(&vs);
    let f = Fisher::exact().full(&vs, [&x], |x| net.forward(x)).unwrap();
    let full = f.laplace(Prior::isotropic(0.7)).unwrap();
    let diagonal = Fisher::exact().diagonal(&vs, [&x], |x| net.forward(x)).unwrap();
    // A diagonal precision holds an example's whole curvature only if there is enough of the prior.
    let diagonal = diagonal.laplace(Prior::isotropic(20.0)).unwrap();
    let leaves: Vec<Tensor> = vs.trainable_variables();
    let z = net.forward(&x);
    let j = jacobian(&leaves, &z);
    let p = z.detach().softmax(1, Kind::Double);
    let e = &p - y.one_hot(3);
    let lambda = p.diag_embed(0, 1, 2) - p.unsqueeze(2) * p.unsqueeze(1);
    let batches = || x.split(4, 0).into_iter().zip(y.split(4, 0));
    let flat = |q: &DiagonalGaussian| {
        let parts = params.names().map(|n| q.variance(n).unwrap().reshape([-1]));
        Tensor::cat(&parts.collect::<Vec<_>>(), 0).diag(0)
    };
    let check = |q: &dyn Fn() -> Sensitivity, covariance: &Tensor| {
        let s = q();
        let v = j.matmul(covariance).matmul(&j.transpose(1, 2));
        let shift = v.matmul(&e.unsqueeze(2)).squeeze_dim(2);
        assert!(largest(&(s.outputs() - &z)) < 1e-14 && largest(&(s.errors() - &e)) < 1e-14);
        assert!(largest(&(s.variance().unwrap() - v.diagonal(0, 1, 2))) < 1e-12);
        assert!(largest(&(s.shift().unwrap() - &shift)) < 1e-12);
        assert!(
            largest(&(s.shift_size().unwrap() - shift.square().sum_dim_intlist(1, false, Kind::Double).sqrt())) < 1e-12
        );
        let moved = lambda.matmul(&shift.unsqueeze(2)).squeeze_dim(2);
        assert!(largest(&(s.shift_of_predictions().unwrap() - moved)) < 1e-12);
        let leverage = lambda.matmul(&v).diagonal(0, 1, 2).sum_dim_intlist(1, false, Kind::Double);
        assert!(largest(&(s.leverage().unwrap() - &leverage)) < 1e-12);
        close(s.effective_parameters().unwrap(), leverage.sum(Kind::Double).double_value(&[]), 1e-11);
        let score = (&e * lambda.diagonal(0, 1, 2) * v.diagonal(0, 1, 2)).abs().sum_dim_intlist(1, false, Kind::Double);
        assert!(largest(&(s.score().unwrap() - score)) < 1e-12);
        let eye = Tensor::eye(3, (Kind::Double, Device::Cpu));
        let corrected = (eye - v.matmul(&lambda)).inverse().matmul(&shift.unsqueeze(2)).squeeze_dim(2);
        assert!(largest(&(s.leave_one_out_shift().unwrap() - &corrected)) < 1e-11);
        let nll = -(&z + &corrected).log_softmax(1, Kind::Double).gather(1, &y.unsqueeze(1), false).mean(Kind::Double);
        close(s.nll(&corrected).unwrap(), nll.double_value(&[]), 1e-12);
    };
    let of = Likelihood::Categorical;
    check(
        &|| Sensitivity::of(&full, &vs, batches(), of, |x| net.forward(x)).unwrap(),
        &full.covariance_matrix().unwrap(),
    );
    check(&|| Sensitivity::of(&diagonal, &vs, batches(), of, |x| net.forward(x)).unwrap(), &flat(&diagonal));

    // The effective number of parameters is P - δ tr S⁻¹, and so at most P.
    let s = Sensitivity::of(&full, &vs, batches(), of, |x| net.forward(x)).unwrap();
    let trace = full.covariance_matrix().unwrap().trace().double_value(&[]);
    close(s.effective_parameters().unwrap(), full.len() as f64 - 0.7 * trace, 1e-10);

    // With the diagonals of v alone, and the scores that a memory has.
    let s = Sensitivity::diagonal(&diagonal, &vs, batches(), of, |x| net.forward(x)).unwrap();
    let v = diagonal.output_variance(&vs, || net.forward(&x)).unwrap();
    assert!(largest(&(s.shift().unwrap() - &v * &e)) < 1e-12);
    let eye = Tensor::eye(3, (Kind::Double, Device::Cpu));
    let m = eye - v.diag_embed(0, 1, 2).matmul(&lambda);
    let corrected = m.inverse().matmul(&(&v * &e).unsqueeze(2)).squeeze_dim(2);
    assert!(largest(&(s.leave_one_out_shift().unwrap() - corrected)) < 1e-11);
    let past = tch_blr::continual::Memory::new(&x, of).targets(&y);
    let score = past.sensitivity(&diagonal, &vs, |x| net.forward(x)).unwrap();
    assert!(largest(&(s.score().unwrap() - score)) < 1e-12);
    let s = Sensitivity::of(&diagonal, &vs, batches(), of, |x| net.forward(x)).unwrap();
    let with_empty = [(x.narrow(0, 0, 0), y.narrow(0, 0, 0)), (x.copy(), y.copy())];
    let whole = Sensitivity::of(&diagonal, &vs, with_empty, of, |x| net.forward(x)).unwrap();
    assert!(largest(&(whole.shift().unwrap() - s.shift().unwrap())) < 1e-13);
    let leverage = past.leverage(&diagonal, &vs, |x| net.forward(x)).unwrap();
    assert!(largest(&(s.leverage().unwrap() - leverage)) < 1e-12);
}

/// Linear regression: the corrected shift is retraining, and so is the posterior divided by the example's part.
#[test]
fn linear_regression_is_exact() {
    let (x, y) = (ripple(&[12, 4], 1.9), ripple(&[12], 3.7));
    let (noise, delta) = (Likelihood::Gaussian { variance: 0.3 }, 0.8);
    let view = DualView::fitted(&x, &y, noise, delta).unwrap();
    let f = x.mv(view.weights());
    let v = view.variance().unwrap().unsqueeze(1);
    let s = Sensitivity::new(noise, &f, &y, &v).unwrap();
    let shifted = &f + s.leave_one_out_shift().unwrap();
    all_close(&values(&shifted), &values(&view.leave_one_out().unwrap()), 1e-13);
    for i in 0..12 {
        let others = Tensor::from_slice(&(0..12).filter(|j| *j != i).collect::<Vec<i64>>());
        let refit = DualView::fitted(&x.index_select(0, &others), &y.index_select(0, &others), noise, delta).unwrap();
        close(shifted.double_value(&[i]), x.get(i).dot(refit.weights()).double_value(&[]), 1e-12);
        let divided = view.without(&[i]).unwrap();
        all_close(&values(divided.weights()), &values(refit.weights()), 1e-12);
        all_close(&values(divided.alpha()), &values(refit.alpha()), 1e-12);
        close(divided.log_marginal_likelihood().unwrap(), refit.log_marginal_likelihood().unwrap(), 1e-11);
    }
    let (three, rest) = (view.without(&[1, 7, 4]).unwrap(), Tensor::from_slice(&[0i64, 2, 3, 5, 6, 8, 9, 10, 11]));
    let refit = DualView::fitted(&x.index_select(0, &rest), &y.index_select(0, &rest), noise, delta).unwrap();
    all_close(&values(three.weights()), &values(refit.weights()), 1e-12);
    close(view.duality_gap().unwrap(), 0.0, 1e-12);

    // ln p(y) from its definition.
    let covariance = x.matmul(&x.tr()) / delta + Tensor::eye(12, (Kind::Double, Device::Cpu)) * 0.3;
    let quadratic = y.dot(&covariance.inverse().mv(&y)).double_value(&[]);
    let expected = -0.5 * (12.0 * std::f64::consts::TAU.ln() + covariance.logdet().double_value(&[]) + quadratic);
    close(view.log_marginal_likelihood().unwrap(), expected, 1e-11);
    close(view.log_marginal_likelihood_of_kernel().unwrap(), expected, 1e-11);

    // Predictions by the kernel.
    let new = ripple(&[5, 4], 0.77);
    let p = view.predict(&new).unwrap();
    let k = view.kernel(&new, &x).unwrap();
    let by_kernel = k.matmul(&covariance.inverse()).mv(&y);
    all_close(&values(&p.mean), &values(&by_kernel), 1e-12);
    let variance = view.kernel(&new, &new).unwrap() - k.matmul(&covariance.inverse()).matmul(&k.tr());
    all_close(&values(&p.epistemic), &values(&variance.diagonal(0, 0, 1)), 1e-12);
    all_close(&values(&p.aleatoric), &[0.3; 5], 0.0);
}

/// Logistic regression: the representer theorem, α = y - p, the duality gap, and derivatives of the optimum by weights of the
/// examples.
#[test]
fn logistic_regression_has_a_dual() {
    let (x, delta) = (ripple(&[20, 3], 2.3), 0.4);
    let y = (x.select(1, 0) + ripple(&[20], 5.1) * 0.5).gt(0.0).to_kind(Kind::Double);
    let ones = Tensor::ones([20], (Kind::Double, Device::Cpu));
    let theta = logistic(&x, &y, &ones, delta);
    let view = DualView::new(&x, &y, &theta, BERNOULLI, delta).unwrap();
    let p = x.mv(&theta).sigmoid();
    all_close(&values(view.alpha()), &values(&(&y - &p)), 1e-15);
    all_close(&values(view.lambda()), &values(&(&p - p.square())), 1e-15);
    all_close(&values(&view.representer().unwrap()), &values(&theta), 1e-8);
    close(view.duality_gap().unwrap(), 0.0, 1e-12);
    let mut before = 0.0;
    for off in [0.01, 0.1, 1.0] {
        let gap = DualView::new(&x, &y, &(&theta + off), BERNOULLI, delta).unwrap().duality_gap().unwrap();
        let objective = |w: &Tensor| {
            let z = x.mv(w) * (&y * 2.0 - 1.0);
            (-z.log_sigmoid().sum(Kind::Double) + w.square().sum(Kind::Double) * (0.5 * delta)).double_value(&[])
        };
        // It bounds how far the objective is from its minimum.
        assert!(gap > before && gap >= objective(&(&theta + off)) - objective(&theta), "{off}: {gap}");
        before = gap;
    }
    let derivatives = view.sensitivity().unwrap();
    for i in [0i64, 7, 19] {
        let at = |h: f64| {
            let mut weights: Vec<f64> = vec![1.0; 20];
            weights[i as usize] += h;
            logistic(&x, &y, &Tensor::from_slice(&weights), delta)
        };
        let numerical = (at(1e-4) - at(-1e-4)) / 2e-4;
        all_close(&values(&derivatives.get(i)), &values(&numerical), 1e-7);
    }
    // One Newton step towards the fit without example 3 leaves an error that is small beside the change itself.
    let mut weights = [1.0; 20];
    weights[3] = 0.0;
    let truth = logistic(&x, &y, &Tensor::from_slice(&weights), delta);
    let divided = view.without(&[3]).unwrap();
    let error = (divided.weights() - &truth).norm().double_value(&[]) / (&theta - &truth).norm().double_value(&[]);
    let simple =
        (&theta - derivatives.get(3) - &truth).norm().double_value(&[]) / (&theta - &truth).norm().double_value(&[]);
    assert!(error < 0.1 && error < simple, "{error} {simple}");
}

/// The conditions of an optimum of hinge losses, and that only support vectors are missed.
#[test]
fn support_vectors_carry_the_machine() {
    let x = Tensor::cat(&[ripple(&[40, 2], 2.3), Tensor::ones([40, 1], (Kind::Double, Device::Cpu))], 1);
    // A few labels on the wrong side.
    let y = (x.select(1, 0) + x.select(1, 1) * 0.7 + ripple(&[40], 9.1) * 0.2).gt(0.0).to_kind(Kind::Double);
    let fit = |x: &Tensor, y: &Tensor| sensitivity::SupportVectors::fit(x, y, 0.2, 1e-11, 100_000).unwrap();
    let machine = fit(&x, &y);
    let theta = machine.weights().unwrap();
    let margins = values(&(x.mv(&theta) * (&y * 2.0 - 1.0)));
    for (alpha, margin) in values(machine.alpha()).into_iter().zip(&margins) {
        // α = 0 outside of the margin, 1 inside of it.
        assert!((alpha == 0.0 || *margin < 1.0 + 1e-5) && (alpha == 1.0 || *margin > 1.0 - 1e-5), "{alpha} {margin}");
    }
    let support = machine.support().unwrap();
    assert!(support.len() > 2 && support.len() < 30, "{}", support.len());
    // The same machine from its support vectors alone.
    let at = Tensor::from_slice(&support);
    let alone = fit(&x.index_select(0, &at), &y.index_select(0, &at));
    all_close(&values(&alone.weights().unwrap()), &values(&theta), 1e-4);
    // A support vector inside of the margin is missed.
    let inside = support.iter().copied().find(|i| margins[*i as usize] < 0.9).unwrap();
    let others = Tensor::from_slice(&(0..40).filter(|j| *j != inside).collect::<Vec<i64>>());
    let without = fit(&x.index_select(0, &others), &y.index_select(0, &others)).weights().unwrap();
    assert!(largest(&(without - theta)) > 1e-2);
    let error = sensitivity::SupportVectors::fit(&x, &y, 0.2, 1e-11, 1).unwrap_err().to_string();
    assert!(error.contains("after 1 rounds"), "{error}");
    assert!(
        sensitivity::SupportVectors::fit(&x, &(&y * 2.0), 0.2, 1e-9, 9).unwrap_err().to_string().contains("label 2")
    );
    assert!(sensitivity::SupportVectors::fit(&x, &y, 0.0, 1e-9, 9).unwrap_err().to_string().contains("delta"));
}

/// A network with one output: features are its Jacobian, and the dual view agrees with Laplace's approximation.
#[test]
fn a_network_as_a_gaussian_process() {
    let (vs, net) = network(&[2, 6, 1]);
    let (x, y) = (ripple(&[15, 2], 1.7), ripple(&[15], 2.9).gt(0.0).to_kind(Kind::Double));
    let forward = |x: &Tensor| net.forward(x).squeeze_dim(1);
    let view = DualView::linearized(&vs, || forward(&x), &y, BERNOULLI, 0.5).unwrap();
    let fisher = Fisher::exact().likelihood(BERNOULLI).full(&vs, [&x], forward).unwrap();
    let q = fisher.laplace(Prior::isotropic(0.5)).unwrap();
    let s = Sensitivity::of(&q, &vs, [(&x, &y)], BERNOULLI, forward).unwrap();
    all_close(&values(&view.variance().unwrap()), &values(&s.variance().unwrap()), 1e-11);
    all_close(&values(view.alpha()), &values(&-s.errors()), 1e-14);
    all_close(&values(&view.leverage().unwrap()), &values(&s.leverage().unwrap()), 1e-11);
    let (a, b) = (view.log_marginal_likelihood().unwrap(), view.log_marginal_likelihood_of_kernel().unwrap());
    close(a, b, 1e-8);
    let features = sensitivity::jacobian(&vs, || net.forward(&x)).unwrap();
    all_close(&values(&features), &values(&jacobian(&vs.trainable_variables(), &net.forward(&x))), 1e-13);
    let p = view.predict(&features).unwrap();
    all_close(&values(&p.variance), &values(&view.variance().unwrap()), 1e-14);
    all_close(&values(&p.epistemic), &values(&(&p.variance * p.aleatoric.square())), 1e-14);
}

/// Weights: S⁻¹ Σ∇ℓ of a group, and the division of a diagonal posterior.
#[test]
fn removal_moves_the_weights() {
    let (vs, net) = network(&[4, 5, 3]);
    let (x, y) = (ripple(&[9, 4], 2.1), Tensor::from_slice(&[0i64, 1, 2, 1, 1, 0, 2, 0, 1]));
    let forward = |x: &Tensor| net.forward(x);
    let of = Likelihood::Categorical;
    let fisher = Fisher::exact();
    let q = fisher.diagonal(&vs, [&x], forward).unwrap().laplace(Prior::isotropic(0.3)).unwrap();
    let full = fisher.full(&vs, [&x], forward).unwrap().laplace(Prior::isotropic(0.3)).unwrap();
    let (gx, gy) = (x.narrow(0, 2, 4), y.narrow(0, 2, 4));
    let removal = Removal::of(&vs, gx.split(3, 0).into_iter().zip(gy.split(3, 0)), of, forward).unwrap();
    let loss = net.forward(&gx).log_softmax(1, Kind::Double).nll_loss(&gy) * 4.0;
    let leaves = vs.trainable_variables();
    let g = Tensor::run_backward(&[loss], &leaves, false, false);
    let flat = |all: &[Tensor]| Tensor::cat(&all.iter().map(|g| g.reshape([-1])).collect::<Vec<_>>(), 0);
    let joined = |shift: &[(String, Tensor)]| flat(&shift.iter().map(|(_, t)| t.shallow_clone()).collect::<Vec<_>>());
    let expected = full.covariance_matrix().unwrap().mv(&flat(&g));
    assert!(largest(&(joined(&removal.shift(&full).unwrap()) - expected)) < 1e-11);
    let s = Tensor::cat(&q.names().map(|n| q.precision(n).unwrap().reshape([-1])).collect::<Vec<_>>(), 0);
    assert!(largest(&(joined(&removal.shift(&q).unwrap()) - flat(&g) / &s)) < 1e-12);

    // The precision is that of the others; the mean has moved by (S - F_R)⁻¹ g.
    let without = removal.posterior_without(&q).unwrap();
    let rest = [x.narrow(0, 0, 2), x.narrow(0, 6, 3)];
    let others = fisher.diagonal(&vs, rest, forward).unwrap().laplace(Prior::isotropic(0.3)).unwrap();
    for (name, g) in Params::from(&vs).names().zip(&g) {
        let (s, expected) = (without.precision(name).unwrap(), others.precision(name).unwrap());
        assert!(largest(&(&s - expected)) < 1e-12);
        assert!(largest(&(without.mean(name).unwrap() - q.mean(name).unwrap() - g / s)) < 1e-12);
    }
    // A posterior without their curvature cannot lose it.
    let thin = combine(&[(0.01, &q)]).unwrap();
    assert!(removal.posterior_without(&thin).unwrap_err().to_string().contains("smallest precision"));
}

/// Two weights used outside of the layers, by a backward pass for each example; and what is not in the posterior, or frozen.
#[test]
fn weights_outside_of_layers_count_too() {
    let (mut vs, net) = network(&[3, 4, 2]);
    let scale = vs.root().var("scale", &[2], tch::nn::Init::Const(1.0));
    vs.set_kind(Kind::Double);
    let x = ripple(&[6, 3], 1.1);
    let forward = |x: &Tensor| net.forward(x) * &scale;
    let q = Fisher::exact().full(&vs, [&x], forward).unwrap().laplace(Prior::isotropic(1.0)).unwrap();
    let j = jacobian(&vs.trainable_variables(), &forward(&x));
    let expected = j.matmul(&q.covariance_matrix().unwrap()).matmul(&j.transpose(1, 2));
    assert!(largest(&(q.output_covariance(&vs, || forward(&x)).unwrap() - expected)) < 1e-12);
    vs.freeze();
    let mut first = vs.trainable_variables().remove(0);
    let _ = first.requires_grad_(true);
    assert!(q.output_covariance(&vs, || forward(&x)).unwrap_err().to_string().contains("frozen"));
    let other =
        FullGaussian::new([("nobody", ripple(&[2], 1.0))], &Tensor::eye(2, (Kind::Double, Device::Cpu))).unwrap();
    assert!(other.output_covariance(&vs, || forward(&x)).unwrap_err().to_string().contains("nobody"));
}

/// S⁻¹g of the two posteriors agree where the full one is diagonal.
#[test]
fn posteriors_agree_where_they_are_the_same() {
    let (vs, net) = network(&[3, 4, 2]);
    let x = ripple(&[6, 3], 1.1);
    let q = Fisher::exact().diagonal(&vs, [&x], |x| net.forward(x)).unwrap().laplace(Prior::isotropic(1.0)).unwrap();
    let full = q.full().unwrap();
    let params = Params::from(&vs);
    let v = |q: &dyn Fn() -> Tensor| q();
    let a = v(&|| q.covariance_of_outputs(&params, &mut || Ok(net.forward(&x))).unwrap());
    let b = v(&|| full.covariance_of_outputs(&params, &mut || Ok(net.forward(&x))).unwrap());
    assert!(largest(&(&a - b)) < 1e-13);
    let b = full.variance_of_outputs(&params, &mut || Ok(net.forward(&x))).unwrap();
    assert!(largest(&(a.diagonal(0, 1, 2) - b)) < 1e-13);
    // In another order than the model's.
    let names: Vec<String> = q.names().map(str::to_owned).collect();
    let turned = names.iter().rev().map(|n| (n.clone(), q.mean(n).unwrap().copy(), q.precision(n).unwrap().copy()));
    let turned = DiagonalGaussian::new(turned).unwrap().full().unwrap();
    assert!(largest(&(turned.output_covariance(&vs, || net.forward(&x)).unwrap() - &a)) < 1e-13);
    // A part of the parameters.
    let some = q.select(|name| name.contains("layer1")).unwrap().full().unwrap();
    let c = some.output_covariance(&vs, || net.forward(&x)).unwrap();
    let expected =
        q.select(|name| name.contains("layer1")).unwrap().output_covariance(&vs, || net.forward(&x)).unwrap();
    assert!(largest(&(c - expected)) < 1e-13);
}

#[test]
fn what_does_not_fit_is_refused() {
    let (vs, net) = network(&[3, 4, 2]);
    let (x, y) = (ripple(&[6, 3], 1.1), Tensor::from_slice(&[0i64, 1, 0, 1, 1, 0]));
    let q = Fisher::exact().diagonal(&vs, [&x], |x| net.forward(x)).unwrap().laplace(Prior::isotropic(1.0)).unwrap();
    let of = |batches: Vec<(Tensor, Tensor)>| {
        let s = Sensitivity::of(&q, &vs, batches, Likelihood::Categorical, |x| net.forward(x));
        s.map(|_| ()).unwrap_err().to_string()
    };
    assert!(of(Vec::new()).contains("no examples"));
    assert!(of(vec![(x.copy(), &y + 1)]).contains("class 2"));
    assert!(of(vec![(x.copy(), y.narrow(0, 0, 5))]).contains("[5]"));
    let none = Sensitivity::of(&q, &vs, [&x], Likelihood::Categorical, |x| net.forward(x));
    assert!(none.unwrap_err().to_string().contains("no targets"));

    // A leverage beyond 1 has no leave-one-out model.
    let (f, t) = (Tensor::from_slice(&[0.0, 0.1]), Tensor::from_slice(&[1.0, 0.0]));
    let s = Sensitivity::new(BERNOULLI, &f, &t, &Tensor::from_slice(&[1.0, 4.5]).unsqueeze(1)).unwrap();
    let e = s.leave_one_out_shift().unwrap_err().to_string();
    assert!(e.contains("example 1") && e.contains("1.12"), "{e}");
    assert!(s.nll(&t.narrow(0, 0, 1)).is_err());
    assert!(Sensitivity::new(BERNOULLI, &f, &t, &f).unwrap_err().to_string().contains("[2, 1, 1]"));
    let nan = Tensor::from_slice(&[1.0, f64::NAN]).unsqueeze(1);
    assert!(Sensitivity::new(BERNOULLI, &f, &t, &nan).is_err());

    let phi = ripple(&[2, 3], 1.0);
    let w = ripple(&[3], 2.0);
    assert!(DualView::new(&phi, &t, &w.narrow(0, 0, 2), BERNOULLI, 1.0).unwrap_err().to_string().contains("[2]"));
    assert!(DualView::new(&phi, &w, &w, BERNOULLI, 1.0).unwrap_err().to_string().contains("[3]"));
    assert!(DualView::new(&phi, &t, &w, BERNOULLI, 0.0).unwrap_err().to_string().contains("delta"));
    assert!(DualView::new(&f, &t, &w, BERNOULLI, 1.0).is_err());
    assert!(DualView::fitted(&phi, &t, BERNOULLI, 1.0).is_err());
    let view = DualView::new(&phi, &t, &w, BERNOULLI, 1.0).unwrap();
    assert!(view.predict(&ripple(&[2, 4], 1.0)).unwrap_err().to_string().contains("[M, 3]"));
    assert!(view.without(&[0, 0]).is_err() && view.without(&[2]).is_err());
}

/// Moves a network to a minimum of Σℓ + ½δ‖θ‖² by Newton steps (Gauss-Newton where the Hessian is not positive), halved until
/// they descend.
fn fit(vs: &VarStore, forward: &dyn Fn(&Tensor) -> Tensor, x: &Tensor, y: &Tensor, delta: f64) {
    let leaves = vs.trainable_variables();
    let flat = |all: &[Tensor]| Tensor::cat(&all.iter().map(|t| t.reshape([-1])).collect::<Vec<_>>(), 0);
    let objective = || {
        let penalty = flat(&leaves).square().sum(Kind::Double) * (0.5 * delta);
        nn::binary_cross_entropy(&forward(x), y).unwrap().sum(Kind::Double) + penalty
    };
    for _ in 0..500 {
        let loss = objective();
        let gradient = flat(&Tensor::run_backward(&[&loss], &leaves, true, true));
        if largest(&gradient) < 1e-8 {
            return;
        }
        let row = |i: i64| flat(&Tensor::run_backward(&[gradient.get(i)], &leaves, true, false));
        let hessian = Tensor::stack(&(0..gradient.size()[0]).map(row).collect::<Vec<_>>(), 0);
        let fisher = Fisher::exact().likelihood(BERNOULLI).full(vs, [x], forward).unwrap();
        let _no_grad = tch::no_grad_guard();
        let (factor, info) = ((&hessian + hessian.tr()) * 0.5).linalg_cholesky_ex(false, false);
        let factor = match info.int64_value(&[]) {
            0 => factor,
            _ => fisher.laplace(Prior::isotropic(delta)).unwrap().precision_matrix().linalg_cholesky(false),
        };
        let step = gradient.detach().unsqueeze(1).cholesky_solve(&factor, false).squeeze_dim(1);
        let start = flat(&leaves);
        let to = |theta: Tensor| {
            let mut first = 0;
            for leaf in &leaves {
                let n = leaf.numel() as i64;
                leaf.shallow_clone().copy_(&theta.narrow(0, first, n).reshape(leaf.size()));
                first += n;
            }
        };
        let mut rate = 1.0;
        to(&start - &step);
        while objective().double_value(&[]) > loss.double_value(&[]) + 1e-12 && rate > 1e-9 {
            rate *= 0.5;
            to(&start - &step * rate);
        }
    }
    panic!("no minimum was found");
}

/// Two moons with a tenth of the labels wrong, and a network trained to its minimum: what the equation predicts of leaving out
/// each of 50 examples, against training without it.
#[test]
fn predictions_for_a_network_are_those_of_retraining() {
    let (vs, net) = network(&[2, 8, 1]);
    let forward = |x: &Tensor| net.forward(x).squeeze_dim(1);
    let angle = Tensor::arange(60, (Kind::Double, Device::Cpu)) * (std::f64::consts::PI / 59.0);
    let half = |sign: f64, at: (f64, f64)| Tensor::stack(&[angle.cos() * sign + at.0, angle.sin() * sign + at.1], 1);
    let x = Tensor::cat(&[half(1.0, (0.0, 0.0)), half(-1.0, (1.0, 0.5))], 0) + ripple(&[120, 2], 17.3) * 0.25;
    let clean = Tensor::arange(120, (Kind::Int64, Device::Cpu)).ge(60).to_kind(Kind::Double);
    let flip = (Tensor::arange(120, (Kind::Int64, Device::Cpu)) * 7).remainder(10).eq(3).to_kind(Kind::Double);
    let y = (&clean - &flip).abs();
    // With much less of a prior a network that loses an example may go to another minimum, which no derivative knows of.
    let delta = 0.2;
    fit(&vs, &forward, &x, &y, delta);
    let q = Fisher::exact()
        .likelihood(BERNOULLI)
        .full(&vs, [&x], forward)
        .unwrap()
        .laplace(Prior::isotropic(delta))
        .unwrap();
    let s = Sensitivity::of(&q, &vs, [(&x, &y)], BERNOULLI, forward).unwrap();
    let start: Vec<Tensor> = vs.trainable_variables().iter().map(|t| t.detach().copy()).collect();
    let (mut truth, mut chosen) = (Vec::new(), Vec::new());
    for i in (0..120).step_by(12).flat_map(|i| i..i + 5) {
        let others = Tensor::from_slice(&(0..120).filter(|j| *j != i).collect::<Vec<i64>>());
        fit(&vs, &forward, &x.index_select(0, &others), &y.index_select(0, &others), delta);
        truth.push(forward(&x.narrow(0, i, 1)).double_value(&[0]) - s.outputs().double_value(&[i]));
        chosen.push(i);
        for (t, start) in vs.trainable_variables().iter_mut().zip(&start) {
            tch::no_grad(|| t.copy_(start));
        }
    }
    let at = Tensor::from_slice(&chosen);
    let correlation = |shift: Tensor| {
        Tensor::stack(&[shift.index_select(0, &at), Tensor::from_slice(&truth)], 0).corrcoef().double_value(&[0, 1])
    };
    let (plain, corrected) = (correlation(s.shift().unwrap()), correlation(s.leave_one_out_shift().unwrap()));
    println!("correlation over {} examples: {plain:.4}, corrected {corrected:.4}", truth.len());
    assert!(plain >= 0.9 && corrected >= 0.9, "{plain} {corrected}");
    // The wrong labels are the ones that the logits move for.
    let suspects = selection::top(&s.shift_size().unwrap(), 12).unwrap();
    let found = suspects.iter().filter(|i| flip.double_value(&[**i]) == 1.0).count();
    assert!(found >= 10, "{found} of 12");
}

/// ∫ f(z) N(z; 0, 1) dz, by the trapezoidal rule: for smooth f exact to rounding.
fn normal_average(f: impl Fn(f64) -> f64) -> f64 {
    let (n, end) = (4000, 12.0);
    let at = |k: usize| end * (2.0 * k as f64 / n as f64 - 1.0);
    let weight = |z: f64| (-0.5 * z * z).exp() / std::f64::consts::TAU.sqrt();
    (0..=n).map(|k| f(at(k)) * weight(at(k))).sum::<f64>() * (2.0 * end / n as f64)
}

fn sigmoid(z: f64) -> f64 {
    1.0 / (1.0 + (-z).exp())
}

/// Σ of n squared standardized errors of averages over so many samples is χ²(n) if each is its integral: a normal deviate of it
/// (Wilson and Hilferty 1931).
fn deviate(found: &[f64], expected: &[(f64, f64)], samples: usize) -> f64 {
    let squares =
        found.iter().zip(expected).map(|(p, (mean, variance))| (p - mean).powi(2) * samples as f64 / variance);
    let (n, total) = (found.len() as f64, squares.sum::<f64>());
    ((total / n).cbrt() - 1.0 + 2.0 / (9.0 * n)) / (2.0 / (9.0 * n)).sqrt()
}

/// Predictions averaged over N(f, v) against quadrature, for one logit, and for softmaxes whose v has one direction (rank 1).
#[test]
fn averaged_predictions_are_integrals() {
    let n = 100;
    let f = ripple(&[n], 2.7) * 3.0;
    let v = (ripple(&[n, 1], 1.1).square() + 0.05) * 4.0;
    let y = ripple(&[n], 9.1).gt(0.0).to_kind(Kind::Double);
    let moments = |p: &dyn Fn(f64) -> f64| {
        let mean = normal_average(p);
        (mean, normal_average(|z| (p(z) - mean).powi(2)))
    };
    let of_one = |i: usize| {
        let (f, v) = (f.double_value(&[i as i64]), v.double_value(&[i as i64, 0]));
        moments(&|z| sigmoid(f + v.sqrt() * z))
    };
    let expected: Vec<_> = (0..n as usize).map(of_one).collect();
    let s = Sensitivity::new(BERNOULLI, &f, &y, &v).unwrap();
    let average = |samples, seed| values(&(s.averaged(samples, seed).unwrap().errors() + &y));
    // Two sides of 3·10⁻⁷ each; the error falls as it should, over four orders of the number of samples.
    for (samples, seed) in [(1, 0), (150, 1), (150, 2), (10_000, 3)] {
        let z = deviate(&average(samples, seed), &expected, samples);
        assert!(z.abs() < 5.0, "{samples} samples: {z}");
    }
    // By the seed, and by nothing else.
    assert_eq!(average(150, 1), average(150, 1));
    assert_ne!(average(150, 1), average(150, 2));

    // v = aaᵀ: all logits of an example move together, and without the covariances the averages would be others.
    let (f, a) = (ripple(&[n, 3], 1.7) * 2.0, ripple(&[n, 3], 3.3) * 2.0);
    let y = Tensor::arange(n, (Kind::Int64, Device::Cpu)).remainder(3);
    let full = a.unsqueeze(2) * a.unsqueeze(1);
    let (rows, directions) = (values(&f), values(&a));
    let softmax = |i: usize, z: f64| {
        let e: [f64; 3] = std::array::from_fn(|c| (rows[3 * i + c] + directions[3 * i + c] * z).exp());
        e.map(|x| x / e.iter().sum::<f64>())
    };
    for class in 0..3 {
        let expected: Vec<_> = (0..n as usize).map(|i| moments(&|z| softmax(i, z)[class])).collect();
        let found = |v: &Tensor| {
            let s = Sensitivity::new(Likelihood::Categorical, &f, &y, v).unwrap();
            let p = s.averaged(1000, 7).unwrap().errors() + y.one_hot(3);
            values(&p.select(1, class as i64))
        };
        let z = deviate(&found(&full), &expected, 1000);
        assert!(z.abs() < 5.0, "class {class}: {z}");
        assert!(deviate(&found(&full.diagonal(0, 1, 2)), &expected, 1000) > 20.0);
    }
}

/// What follows from averaged predictions, and where averaging changes nothing.
#[test]
fn averaging_replaces_predictions_and_nothing_else() {
    let (f, y) = (ripple(&[6, 3], 1.7) * 3.0, Tensor::from_slice(&[0i64, 1, 2, 1, 1, 0]));
    let v = ripple(&[6, 3], 0.9).square() + 0.1;
    let all = |s: &Sensitivity| {
        let each = [s.errors().copy(), s.shift().unwrap(), s.score().unwrap(), s.leverage().unwrap()];
        let more = [s.shift_of_predictions().unwrap(), s.leave_one_out_shift().unwrap(), s.shift_size().unwrap()];
        each.iter().chain(&more).flat_map(values).collect::<Vec<f64>>()
    };
    let of = |f: &Tensor, v: &Tensor| Sensitivity::new(Likelihood::Categorical, f, &y, v).unwrap();
    let s = of(&f, &v);
    let averaged = s.averaged(50, 3).unwrap();
    // As if the outputs were those that predict p̄.
    let p = averaged.errors() + y.one_hot(3);
    assert!(
        largest(&(p.sum_dim_intlist(1, false, Kind::Double) - 1.0)) < 1e-14
            && largest(&(&p - f.softmax(1, Kind::Double))) > 0.01
    );
    all_close(&all(&averaged), &all(&of(&p.log(), &v)), 1e-12);
    // Outputs, variances and losses of shifts are those of the mean.
    all_close(&values(averaged.outputs()), &values(&f), 0.0);
    all_close(&values(&averaged.variance().unwrap()), &values(&v), 0.0);
    close(averaged.nll(&f.zeros_like()).unwrap(), s.nll(&f.zeros_like()).unwrap(), 0.0);

    // No variance, nothing to average; v as matrices or as diagonals.
    for none in [v.zeros_like(), v.zeros_like().diag_embed(0, 1, 2)] {
        let s = of(&f, &none);
        all_close(&all(&s.averaged(7, 0).unwrap()), &all(&s), 1e-14);
    }
    // Both ends of a sigmoid keep their digits.
    let f = Tensor::from_slice(&[-40.0, 0.0, 40.0]);
    let (y, v) = (Tensor::from_slice(&[0.0, 1.0, 1.0]), Tensor::from_slice(&[0.3; 3]).unsqueeze(1));
    let e = values(Sensitivity::new(BERNOULLI, &f, &y, &v).unwrap().averaged(20, 5).unwrap().errors());
    assert!(e[0] > 1e-18 && e[0] < 1e-16 && (e[2] <= 0.0) && e[2].abs() < 1e-15, "{e:?}");
    // A Gaussian's predictions are f.
    let s = Sensitivity::new(Likelihood::Gaussian { variance: 0.5 }, &f, &y, &v).unwrap();
    all_close(&all(&s.averaged(3, 0).unwrap()), &all(&s), 0.0);

    let error = s.averaged(0, 0).unwrap_err().to_string();
    assert!(error.contains("samples") && error.contains("at least 1"), "{error}");
    let bad = Tensor::from_slice(&[1.0, 2.0, 2.0, 1.0]).reshape([1, 2, 2]);
    let two = Tensor::zeros([1, 2], (Kind::Double, Device::Cpu));
    let s = Sensitivity::new(Likelihood::Categorical, &two, &Tensor::from_slice(&[0i64]), &bad).unwrap();
    let error = s.averaged(5, 0).unwrap_err().to_string();
    assert!(error.contains("v of example 0 is not a covariance matrix"), "{error}");
}

/// The draws of averaged predictions are not those of an optimizer of the same seed.
#[test]
fn averaged_predictions_have_noise_of_their_own() {
    let one = |x: f64| Tensor::from_slice(&[x]);
    let s = Sensitivity::new(BERNOULLI, &one(0.0), &one(0.0), &one(1.0).unsqueeze(1)).unwrap();
    for seed in [0, 7] {
        // One draw f + z, as its logit.
        let p = values(s.averaged(1, seed).unwrap().errors())[0];
        let z = (p / (1.0 - p)).ln();
        let w = support::weight(&[0.0]);
        let ivon = Ivon::default().ess(1.0).weight_decay(0.0).hess_init(1.0).noise(Philox { seed });
        let mut opt = ivon.build(support::params(&w), 0.0).unwrap();
        for step in 0..3 {
            let mut noise = 0.0;
            opt.step(|| {
                noise = values(&w)[0];
                w.sum(Kind::Double)
            })
            .unwrap();
            assert!((noise - z).abs() > 1e-6, "seed {seed}, step {step}: {noise} {z}");
        }
    }
}

/// What an example owes to the model is looked at, not trained.
#[test]
fn removal_leaves_batch_normalization_alone() {
    let vs = VarStore::new(Device::Cpu);
    let norm = tch::nn::batch_norm1d(vs.root() / "norm", 3, tch::nn::BatchNormConfig::default());
    let x = ripple(&[4, 3], 0.3).to_kind(Kind::Float);
    let y = Tensor::from_slice(&[0.0f32, 1.0, 1.0, 0.0]);
    let of = |train: bool| {
        let batches = [(x.shallow_clone(), y.shallow_clone())];
        Removal::of(&vs, batches, BERNOULLI, |x| tch::nn::ModuleT::forward_t(&norm, x, train).select(1, 0))
    };
    let before = values(&vs.variables()["norm.running_mean"]);
    support::refused(of(true).map(|_| ()), &["`norm.running_", "train = false"]);
    assert_eq!(values(&vs.variables()["norm.running_mean"]), before);
    of(false).unwrap();
}

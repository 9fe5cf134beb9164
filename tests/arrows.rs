//! The arrows of the table: what one row lacks of another, taken away, leaves that other row. Those that are not here are
//! listed with their tests in docs/table.md.

use support::{F64, Net, assert_close, bits};
use support::{all_close, close, given, params, state, values, weight};
use tch::{Kind, Tensor};
use tch_blr::family::{
    BayesianMixture, ConjugatePrior, Dirichlet, ExponentialFamily, NormalGamma, rule_step, vmp_step,
};
use tch_blr::rows::PrecisionInStep;
use tch_blr::{Adam, Expectation, FullVon, Given, Ivon, RmsProp, Statistic, Von};

/// Noise of zeros for the parameters of [`Net`].
fn no_noise(net: &Net, steps: usize) -> Given {
    let zeros = || net.weights.iter().map(Tensor::zeros_like).map(|z| z.detach()).collect();
    Given((0..steps).map(|_| vec![zeros()]).collect())
}

/// VOGN at samples without noise is OGN, in every bit; with noise it is not.
#[test]
fn vogn_without_noise_is_ogn() {
    let path = |rule: Von, noise: bool| {
        let net = Net::new(F64);
        let rule = rule.ess(40.0).beta2(0.9).hess_init(0.3).weight_decay(0.05);
        let builder = if noise { rule.noise(no_noise(&net, 8)) } else { rule.builder() };
        let mut opt = builder.build(&net.vs, 0.05).unwrap();
        for _ in 0..8 {
            opt.step(|| net.losses()).unwrap();
        }
        let hess = opt.params().names().map(|n| opt.state(n, "hess").unwrap()).collect::<Vec<_>>();
        net.weights.iter().chain(&hess).map(bits).collect::<Vec<_>>()
    };
    let ogn = path(Von::ogn(), false);
    assert!(path(Von::vogn(), true) == ogn);
    assert!(path(Von::vogn(), false) != ogn, "the noise has no effect");
}

/// For batches of one example the squared gradient is the sum of per-example squares: OGN's h, from h₀ = 0, and RMSprop's
/// v are one scale vector. For two examples v is smaller, as the square of a mean is below the mean of squares.
#[test]
fn ogn_has_the_scale_vector_of_rmsprop_for_single_examples() {
    for (size, same) in [(1, true), (2, false)] {
        let (net, other) = (Net::new(F64), Net::new(F64));
        // Both stay where they are, so that they see the same gradients.
        let ogn = Von::ogn().ess(12.0).hess_init(0.0).beta2(0.75).weight_decay(0.5);
        let mut ogn = ogn.build(&net.vs, 0.0).unwrap();
        let mut rmsprop = RmsProp::default().alpha(0.75).build(&other.vs, 0.0).unwrap();
        for first in [0, 3, 7, 9, 10] {
            ogn.step(|| net.losses_of(first, size)).unwrap();
            rmsprop.step(|| other.losses_of(first, size)).unwrap();
        }
        let largest = |name: &str| {
            let (h, v) = (ogn.state(name, "hess").unwrap(), rmsprop.state(name, "square").unwrap());
            (&h - &v).abs().max().double_value(&[]) / h.abs().max().double_value(&[])
        };
        let names: Vec<String> = ogn.params().names().map(str::to_owned).collect();
        let error = names.iter().map(|n| largest(n)).fold(0.0, f64::max);
        assert_eq!(error < 1e-13, same, "{size} examples: {error:e}");
    }
}

/// RMSprop's step α u/(√v + ε) becomes Adam's in two changes. Bias correction: with c = 1-aᵗ, α√c and ε√c divide v by c.
/// Averaging: u gives way to b/(1-β₁ᵗ); v stays what it is.
#[test]
fn rmsprop_with_averages_and_debias_is_adam() {
    let (lr, eps, a, beta1) = (0.02, 1e-3, 0.9, 0.8);
    let (net, other, plain) = (Net::new(F64), Net::new(F64), Net::new(F64));
    let mut adam = Adam::default().beta1(0.0).beta2(a).eps(eps).build(&net.vs, lr).unwrap();
    let mut rmsprop = RmsProp::default().alpha(a).eps(eps).build(&other.vs, lr).unwrap();
    let mut without = RmsProp::default().alpha(a).eps(eps).build(&plain.vs, lr).unwrap();
    for t in 1..=6 {
        let root = (1.0 - f64::powi(a, t)).sqrt();
        rmsprop.set_lr(lr * root).unwrap();
        rmsprop.configure(|c| c.eps(eps * root)).unwrap();
        adam.step(|| net.losses()).unwrap();
        rmsprop.step(|| other.losses()).unwrap();
        without.step(|| plain.losses()).unwrap();
        for (x, y) in net.weights.iter().zip(&other.weights) {
            assert_close(x, y, 1e-12);
        }
    }
    let apart = (&net.weights[0] - &plain.weights[0]).abs().max().double_value(&[]);
    assert!(apart > 1e-3, "the bias correction has no effect: {apart:e}");

    // One weight with gradients that do not depend on it.
    let gradients = [1.0, -0.5, 2.0, 0.25, -1.5];
    let (w, v) = (weight(&[0.5]), weight(&[0.5]));
    let mut adam = Adam::default().beta1(beta1).beta2(a).eps(eps).build(params(&w), lr).unwrap();
    let mut rmsprop = RmsProp::default().alpha(a).eps(eps).build(params(&v), lr).unwrap();
    let (mut b, mut m) = (0.0, 0.5);
    for (t, g) in (1..).zip(gradients) {
        let root = (1.0 - f64::powi(a, t)).sqrt();
        rmsprop.set_lr(lr * root).unwrap();
        rmsprop.configure(|c| c.eps(eps * root)).unwrap();
        let before = values(&v)[0];
        adam.step(|| (&w * g).sum(Kind::Double)).unwrap();
        rmsprop.step(|| (&v * g).sum(Kind::Double)).unwrap();
        b = beta1 * b + (1.0 - beta1) * g;
        m += (values(&v)[0] - before) / g * (b / (1.0 - beta1.powi(t)));
        close(values(&w)[0], m, 1e-14);
        assert_eq!(state(&adam, "square"), state(&rmsprop, "square"));
    }
}

/// IVON without the rescaled learning rate and bias correction is VON with Price's estimate. Both keep the precision
/// positive by the same term.
#[test]
fn ivon_without_rescaling_and_debias_is_von() {
    let (net, other) = (Net::new(F64), Net::new(F64));
    let ivon = Ivon::default().ess(60.0).hess_init(0.7).beta2(0.95).weight_decay(0.03).debias(false).rescale_lr(false);
    let von = Von::default().ess(60.0).hess_init(0.7).beta2(0.95).weight_decay(0.03).debias(false);
    let von = von.hessian(Statistic::Price);
    let noise = || tch_blr::Philox { seed: 8 };
    let mut ivon = ivon.noise(noise()).build(&net.vs, 0.1).unwrap();
    let mut von = von.noise(noise()).build(&other.vs, 0.1).unwrap();
    for _ in 0..10 {
        ivon.step(|| net.losses()).unwrap();
        von.step(|| other.losses()).unwrap();
        for (a, b) in net.weights.iter().zip(&other.weights) {
            assert_close(a, b, 1e-13);
        }
    }
    let [p, q] = [ivon.posterior().unwrap(), von.posterior().unwrap()];
    assert!(p.kl(&q).unwrap().abs() < 1e-20);
}

/// Without that term too, h ← h + r(f-h) + 0: the plain rule of [`FullVon`] for one weight, h and the mean, with either
/// precision in the step. IVON's h exceeds it by ½r²(f-h)²/(h+δ), which is also all that the two differ by where the old
/// precision divides.
#[test]
fn ivon_without_retraction_is_the_plain_rule() {
    let (ess, h0, delta, r, lr) = (20.0, 0.8, 0.2, 0.25, 0.1);
    let loss = |w: &Tensor| (w.square().square() * 0.25 + w * 0.3).sum(Kind::Double);
    for z in [-1.7, -0.4, 0.5, 1.1] {
        let noise = || given(1, &[&[z]]);
        let start = || weight(&[0.6]);
        let (w, u) = (start(), start());
        let ivon = Ivon::default().ess(ess).hess_init(h0).weight_decay(delta).beta1(0.0).beta2(1.0 - r);
        let mut ivon = ivon.debias(false).rescale_lr(false).noise(noise()).build(params(&w), lr).unwrap();
        ivon.step(|| loss(&w)).unwrap();
        let plain = FullVon::default().ess(ess).hess_init(h0).weight_decay(delta).beta2(1.0 - r).improved(false);
        let mut plain_new = plain.noise(noise()).build(params(&u), lr).unwrap();
        plain_new.step(|| loss(&u)).unwrap();

        // The same estimate in both: f from the plain rule's h.
        let h = values(&plain_new.state("w", "hess").unwrap())[0];
        let f = h0 + (h - h0) / r;
        let retraction = 0.5 * r * r * (f - h0).powi(2) / (h0 + delta);
        let improved = state(&ivon, "hess")[0];
        close(improved - retraction, h, 1e-13);
        assert!(retraction > 1e-4, "{retraction:e}");
        // Steps are to each other as the precisions.
        let steps = [&w, &u].map(|t| values(t)[0] - 0.6);
        close(steps[0] * (improved + delta), steps[1] * (h + delta), 1e-14);

        // By the old precision, the retraction does not enter the step at all.
        let (w, u) = (start(), start());
        let von = Von::default().ess(ess).hess_init(h0).weight_decay(delta).beta1(0.0).beta2(1.0 - r).debias(false);
        let von = von.hessian(Statistic::Price).precision_in_step(PrecisionInStep::Old);
        von.noise(noise()).build(params(&w), lr).unwrap().step(|| loss(&w)).unwrap();
        let old = plain.precision_in_step(PrecisionInStep::Old).expectation(Expectation::MonteCarlo { samples: 1 });
        old.noise(noise()).build(params(&u), lr).unwrap().step(|| loss(&u)).unwrap();
        close(values(&w)[0], values(&u)[0], 1e-14);
    }
}

/// With all data and ρ = 1 a step of stochastic VI is one of variational message passing: each factor by [`vmp_step`] from
/// E\[ℓ\] written as a function of its μ. With ρ < 1 it is the rule's step along the same messages.
#[test]
fn stochastic_vi_in_one_batch_is_message_passing() {
    let y = Tensor::from_slice(&[-1.2, -0.4, 0.1, 0.9, 1.6, 2.3]);
    let weights = |a: f64| Dirichlet::new(&Tensor::from_slice(&[a, a + 0.5])).unwrap();
    let mixture = |a: f64, means: [f64; 2]| {
        let components = means.map(|m| NormalGamma::new(m, 0.5, 2.0, 1.5).unwrap());
        BayesianMixture::new(weights(a), components.into()).unwrap()
    };
    let (prior, mut q) = (mixture(1.0, [0.0, 0.0]), mixture(2.0, [-1.0, 1.0]));
    let rows = prior.components()[0].likelihood(&y).unwrap();
    for _ in 0..5 {
        let r = q.responsibilities(&rows).unwrap();
        let (messages, counts) = (r.tr().matmul(&rows), r.sum_dim_intlist(0, false, None::<Kind>));
        let next = q.step(&prior, &rows, 1.0, 1.0).unwrap();
        let damped = q.step(&prior, &rows, 1.0, 0.3).unwrap();
        for k in 0..2 {
            let old = &q.components()[k];
            let natural = prior.components()[k].natural() + messages.get(k as i64);
            let vmp = vmp_step(old, 1.0, |mu| -natural.dot(mu)).unwrap();
            all_close(&values(&next.components()[k].natural()), &values(&vmp.natural()), 1e-13);
            let partly = rule_step(old, 0.3, &-&natural).unwrap();
            all_close(&values(&damped.components()[k].natural()), &values(&partly.natural()), 1e-13);
        }
        let natural = prior.weights().natural() + counts;
        let vmp = vmp_step(q.weights(), 1.0, |mu| -natural.dot(mu)).unwrap();
        all_close(&values(&next.weights().natural()), &values(&vmp.natural()), 1e-13);
        q = next;
    }
}

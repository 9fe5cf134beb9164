//! The generalized Gauss-Newton matrix as the curvature of VON.

use support::{all_close, close, mean_and_error, params, state, values, weight};
use tch::nn::{Module, VarStore};
use tch::{Device, Kind, Tensor};
use tch_blr::{Error, Expectation, Given, Labels, Philox, Sgd, Statistic, Von, nn};

const BOTH: [Statistic; 2] = [Statistic::Fisher(Labels::Exact), Statistic::Fisher(Labels::Sampled)];

/// x = (1, 2), y = (1, 3), unit noise, prior precision 1: the exact posterior is N(7/6, 1/6), which per-example squares miss
/// on either side (`tests/exact.rs`). For a linear model the Gauss-Newton matrix is the Hessian, and with one output its
/// estimate from random signs has no variance.
#[test]
fn ogn_and_vogn_with_the_gauss_newton_matrix_find_the_precision_of_least_squares() {
    let (x, y) = (Tensor::from_slice(&[1.0, 2.0]), Tensor::from_slice(&[1.0, 3.0]));
    for curvature in BOTH {
        for expectation in [Expectation::Delta, Expectation::Antithetic { pairs: 1 }] {
            let w = weight(&[0.5]);
            let rule = Von::default().ess(2.0).weight_decay(0.5).beta1(0.0).beta2(0.9);
            let noise = Given((0..300).map(|_| vec![vec![Tensor::from_slice(&[1.0])]]).collect());
            let rule = rule.hessian(curvature).expectation(expectation).noise(noise);
            let mut opt = rule.build(params(&w), 0.2).unwrap();
            for _ in 0..300 {
                opt.step(|| nn::squared_error(&(&x * &w), &y, 1.0)).unwrap();
            }
            close(values(&w)[0], 7.0 / 6.0, 1e-12);
            close(values(&opt.posterior().unwrap().precision("w").unwrap())[0], 6.0, 1e-12);
        }
    }
}

/// A tapped network of two layers in f64, and its inputs.
fn network(outputs: i64) -> (VarStore, impl Fn() -> Tensor, Tensor) {
    let mut vs = VarStore::new(Device::Cpu);
    let [first, second] = [("first", 3, 4), ("second", 4, outputs)]
        .map(|(name, from, to)| nn::linear(vs.root() / name, from, to, tch::nn::LinearConfig::default()));
    vs.set_kind(Kind::Double);
    for (i, mut w) in vs.trainable_variables().into_iter().enumerate() {
        let wave = (Tensor::arange(w.numel() as i64, (Kind::Double, Device::Cpu)) * 1.7 + i as f64).sin();
        tch::no_grad(|| w.copy_(&wave.reshape(w.size())));
    }
    let x = (Tensor::arange(15, (Kind::Double, Device::Cpu)) * 0.9).cos().reshape([5, 3]);
    let y = Tensor::from_slice(&[0i64, 1, 2, 1, 0]);
    (vs, move || second.forward(&first.forward(&x).tanh()), y)
}

/// diag (1/B) Σᵢ JᵢᵀΛᵢJᵢ of every parameter, one Jacobian row after the other; Λ `[B, D, D]`.
fn written_out(vs: &VarStore, z: &Tensor, lambda: &Tensor) -> Vec<Vec<f64>> {
    let variables = vs.trainable_variables();
    let [b, d] = z.size()[..] else { unreachable!() };
    let each = variables.iter().map(|w| {
        let mut sum = w.zeros_like();
        for i in 0..b {
            let row = |c| Tensor::run_backward(&[z.get(i).get(c)], &[w], true, false)[0].shallow_clone();
            let j = Tensor::stack(&(0..d).map(row).collect::<Vec<_>>(), 0).reshape([d, -1]);
            sum += (lambda.get(i).matmul(&j) * &j).sum_dim_intlist(0, false, None::<Kind>).reshape(w.size());
        }
        values(&(sum / b as f64))
    });
    each.collect()
}

/// f of one step at the mean.
fn diagonals<L: tch_blr::IntoTensor>(
    vs: &VarStore,
    curvature: Statistic,
    seed: u64,
    closure: impl FnMut() -> L,
) -> Vec<Vec<f64>> {
    let rule = Von::ogn().ess(10.0).beta2(0.0).hessian(curvature).noise(Philox { seed });
    let mut opt = rule.build(vs, 0.0).unwrap();
    opt.step(closure).unwrap();
    let names: Vec<String> = opt.params().names().map(str::to_owned).collect();
    names.iter().map(|name| values(&opt.state(name, "hess").unwrap())).collect()
}

#[test]
fn the_diagonal_is_that_of_the_matrix_written_out() {
    let eye = |d| Tensor::eye(d, (Kind::Double, Device::Cpu)).unsqueeze(0).expand([5, d, d], false);
    let (vs, net, y) = network(3);
    let z = net();
    let p = z.detach().softmax(-1, Kind::Double);
    let softmax = p.diag_embed(0, -2, -1) - p.unsqueeze(2) * p.unsqueeze(1);
    let p = z.detach().sigmoid();
    let sigmoid = (&p * (-&p + 1.0)).diag_embed(0, -2, -1);
    let target = z.detach().cos();
    let cross_entropy = || nn::cross_entropy(&net(), &y).unwrap();
    let binary = || nn::binary_cross_entropy(&net(), &p).unwrap();
    let squared = || nn::squared_error(&net(), &target, 4.0).unwrap();
    let cases: [(&dyn Fn() -> Tensor, Tensor); 3] =
        [(&cross_entropy, softmax), (&binary, sigmoid), (&squared, eye(3) * 0.25)];
    for (loss, lambda) in cases {
        let exact = written_out(&vs, &net(), &lambda);
        // Per-example losses and their mean.
        for found in [
            diagonals(&vs, Statistic::Fisher(Labels::Exact), 0, loss),
            diagonals(&vs, Statistic::Fisher(Labels::Exact), 0, || loss().mean(Kind::Double)),
        ] {
            for (ours, exact) in found.iter().zip(&exact) {
                all_close(ours, exact, 1e-12);
            }
        }
        // The estimate, at 5 standard errors for each of 31 elements of 3 losses (5e-5), has a variance of its own.
        let draws: Vec<_> =
            (0..300).map(|seed| diagonals(&vs, Statistic::Fisher(Labels::Sampled), seed, loss)).collect();
        for (w, exact) in exact.iter().enumerate() {
            for (i, expected) in exact.iter().enumerate() {
                let (mean, error) = mean_and_error(&draws.iter().map(|d| d[w][i]).collect::<Vec<_>>());
                close(mean, *expected, 5.0 * error + 1e-12);
            }
        }
        assert!(draws[0] != draws[1]);
    }
}

/// Untapped layers take a backward pass per example instead, with the same result.
#[test]
fn layers_of_tch_will_do() {
    let (vs, net, y) = network(3);
    let tapped = diagonals(&vs, Statistic::Fisher(Labels::Exact), 0, || nn::cross_entropy(&net(), &y));
    let by_hand = || {
        let [b1, w1, b2, w2] = &vs.trainable_variables()[..] else { unreachable!() };
        let x = (Tensor::arange(15, (Kind::Double, Device::Cpu)) * 0.9).cos().reshape([5, 3]);
        (x.matmul(&w1.tr()) + b1).tanh().matmul(&w2.tr()) + b2
    };
    let untapped = diagonals(&vs, Statistic::Fisher(Labels::Exact), 0, || nn::cross_entropy(&by_hand(), &y));
    for (a, b) in tapped.iter().zip(&untapped) {
        all_close(a, b, 1e-14);
    }
}

/// Two outputs of one model add their matrices.
#[test]
fn outputs_add_up() {
    let w = weight(&[0.3]);
    let x = Tensor::from_slice(&[1.0, 2.0]);
    let loss = || {
        let a = nn::squared_error(&(&x * &w), &x, 1.0).unwrap();
        a + nn::squared_error(&(&x * &w * 3.0), &x, 2.0).unwrap()
    };
    for curvature in BOTH {
        let mut opt = Von::ogn().ess(10.0).beta2(0.0).hessian(curvature).build(params(&w), 0.0).unwrap();
        opt.step(loss).unwrap();
        // Mean of x² is 2.5.
        all_close(&state(&opt, "hess"), &[2.5 + 2.5 * 9.0 / 2.0], 1e-14);
    }
}

#[test]
fn a_loss_without_its_output_is_refused() {
    let (vs, net, y) = network(3);
    for curvature in BOTH {
        let mut opt = Von::vogn().ess(10.0).hessian(curvature).build(&vs, 0.1).unwrap();
        let before: Vec<_> = vs.trainable_variables().iter().map(values).collect();
        let e = opt.step(|| net().cross_entropy_for_logits(&y)).unwrap_err();
        assert!(matches!(e, Error::Likelihood(_)) && e.to_string().contains("squared_error"), "{e}");
        let e = opt.step(|| nn::cross_entropy(&net(), &y.to_kind(Kind::Float))).unwrap_err();
        assert!(matches!(e, Error::Closure(_)), "{e}");
        assert_eq!((before, opt.steps()), (vs.trainable_variables().iter().map(values).collect(), 0));
        opt.step(|| nn::cross_entropy(&net(), &y)).unwrap();
    }
}

/// Every other row takes the losses that note their output.
#[test]
fn other_rows_take_the_same_losses() {
    let (vs, net, y) = network(3);
    let (other, same, _) = network(3);
    Sgd::default().build(&vs, 0.1).unwrap().step(|| nn::cross_entropy(&net(), &y)).unwrap();
    Sgd::default().build(&other, 0.1).unwrap().step(|| same().log_softmax(-1, Kind::Double).nll_loss(&y)).unwrap();
    for (a, b) in vs.trainable_variables().iter().zip(other.trainable_variables()) {
        all_close(&values(a), &values(&b), 1e-15);
    }
}

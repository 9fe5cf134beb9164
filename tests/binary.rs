//! Binary weights: the straight-through estimator, BayesBiNN and its posterior, against exact answers.

// Digits as the reference has them.
#![allow(clippy::unreadable_literal)]

use support::{all_close, close, params, values, weight};
use tch::nn::{Module, VarStore};
use tch::{Device, Kind, Tensor, nn};
use tch_blr::rule::Rule;
use tch_blr::{BayesBiNN, Expectation, Given, MeanFieldBernoulli, Optimizer, Params, Philox, Ste, metrics};
use tch_blr_examples::batches::{Last, batches};
use tch_blr_examples::digits::Digits;

/// Φ⁻¹(u) by bisection.
fn normal_quantile(u: f64) -> f64 {
    let (mut low, mut high) = (-8.0, 8.0);
    for _ in 0..200 {
        let z = 0.5 * (low + high);
        let below = values(&Tensor::from_slice(&[z]).special_ndtr())[0] < u;
        *(if below { &mut low } else { &mut high }) = z;
    }
    low
}

/// λ = 0.2, u = 0.6, τ = 1, N = 10, α = 0.1, ∇L = -0.5 (reference).
#[test]
fn bayesbinn_takes_the_reference_step() {
    let w = weight(&[0.2f64.tanh()]);
    let z = normal_quantile(0.6);
    let rule = BayesBiNN::default().ess(10.0);
    let mut opt = rule.noise(Given(vec![vec![vec![Tensor::from_slice(&[z])]]])).build(params(&w), 0.1).unwrap();
    let mut sample = 0.0;
    opt.step(|| {
        sample = values(&w)[0];
        (&w * -0.5).sum(Kind::Double)
    })
    .unwrap();
    close(sample, 0.38228461073281544, 1e-14);
    close(values(opt.posterior().unwrap().natural("w").unwrap())[0], 0.6242353211781981, 1e-14);
    close(values(&w)[0], 0.6242353211781981f64.tanh(), 1e-14);
}

/// At λ = 0 and τ = 1, w = 2u-1, so E\[1-w²\] = 2/3: the scale s is biased by a third (reference). Midpoints of u in 3000
/// cells integrate w² to (1 - 1/3000²)/3.
#[test]
fn the_relaxation_is_biased() {
    const CELLS: usize = 3000;
    let w = weight(&vec![0.0; CELLS]);
    let z: Vec<f64> = (0..CELLS).map(|i| normal_quantile((i as f64 + 0.5) / CELLS as f64)).collect();
    // Without decay, from λ = 0 and with ∇L = 1, a step of α = 1 makes λ = -N s.
    let rule = BayesBiNN::default().ess(1.0).kl_weight(0.0);
    let mut opt = rule.noise(Given(vec![vec![vec![Tensor::from_slice(&z)]]])).build(params(&w), 1.0).unwrap();
    opt.step(|| w.sum(Kind::Double)).unwrap();
    let s = opt.posterior().unwrap().natural("w").unwrap().mean(Kind::Double).double_value(&[]);
    close(-s, 1.0 - (1.0 - 1.0 / (CELLS as f64).powi(2)) / 3.0, 1e-9);
}

/// Takes steps of α on gradients with respect to μ that are exact, which the optimizer gets as if w = μ and τ = 1: then
/// s = 1. Returns λ.
fn with_exact_gradients<const K: usize>(
    rule: BayesBiNN,
    lr: f64,
    steps: u64,
    gradient: impl Fn([f64; K]) -> [f64; K],
) -> [f64; K] {
    use tch_blr::rule::{Site, When};
    let mut lambda = [0.0; K];
    for t in 1..=steps {
        let k = rule.coefficients(When { t, lr });
        let mu = lambda.map(f64::tanh);
        let g = gradient(mu);
        lambda = std::array::from_fn(|i| {
            let curvature = (1.0 - mu[i] * mu[i]) * g[i];
            let site = Site { mean: lambda[i], gradient: g[i], curvature, prior_mean: 0.0, delta: rule.kl_weight };
            rule.update(k, site, [0.0]).0
        });
    }
    lambda
}

fn exact(n: f64) -> BayesBiNN {
    BayesBiNN::default().ess(n).beta1(0.0)
}

/// E\[L\] = -J μ₁μ₂ - h·μ, J = 0.5, h = (0.2, -0.1) (reference).
#[test]
fn the_ising_model_has_the_mean_field_of_the_reference() {
    let lambda = with_exact_gradients(exact(1.0), 0.3, 400, |[a, b]| [-0.5 * b - 0.2, -0.5 * a + 0.1]);
    all_close(&lambda, &[0.1991362768046015, -0.00172744810907427], 1e-12);
}

/// L = -a·w is conjugate: α = 1 finds the exact posterior λ₀ + Na in one step from anywhere, as all 2³ states say.
#[test]
fn a_linear_loss_is_solved_in_one_step() {
    let (a, n, prior) = ([0.3, -0.05, 0.12], 4.0, 0.25);
    let lambda = with_exact_gradients(exact(n).prior_natural(prior), 1.0, 1, |_| a.map(|a| -a));
    all_close(&lambda, &a.map(|a| prior + n * a), 1e-15);
    let (mut total, mut mean, mut entropy) = (0.0, [0.0; 3], 0.0);
    let states: Vec<([f64; 3], f64)> = (0..8)
        .map(|bits| {
            let w = std::array::from_fn(|i| if bits >> i & 1 == 1 { 1.0 } else { -1.0 });
            (w, (0..3).map(|i| (prior + n * a[i]) * w[i]).sum::<f64>().exp())
        })
        .collect();
    for (_, p) in &states {
        total += p;
    }
    for (w, p) in &states {
        let p = p / total;
        entropy -= p * p.ln();
        (0..3).for_each(|i| mean[i] += p * w[i]);
    }
    let q = MeanFieldBernoulli::new([("w", Tensor::from_slice(&lambda))]).unwrap();
    all_close(&values(&q.mean("w").unwrap()), &mean, 1e-14);
    close(q.entropy(), entropy, 1e-14);
    let uniform = MeanFieldBernoulli::new([("w", Tensor::from_slice(&[0.0; 3]))]).unwrap();
    close(q.kl(&uniform).unwrap(), 3.0 * 2f64.ln() - entropy, 1e-14);
    assert!(q.kl(&q).unwrap().abs() < 1e-15);
}

/// The optimizer itself on that loss: τ → 0 makes the expectation of N s ĝ exact (here τ = 0.1), so λ fluctuates around
/// λ₀ + N a. 512 copies of the problem, averaged over time; within four standard errors and the bias of τ, E\[s\] - 1.
#[test]
fn bayesbinn_settles_at_the_exact_posterior() {
    const COPIES: usize = 512;
    let w = weight(&[0.0; COPIES]);
    let rule = BayesBiNN::default().ess(2.0).relaxation(0.1).expectation(Expectation::Antithetic { pairs: 1 });
    let mut opt = rule.noise(Philox { seed: 5 }).build(params(&w), 0.01).unwrap();
    let mut total = Tensor::zeros([COPIES as i64], (Kind::Double, Device::Cpu));
    for step in 0..800 {
        opt.step(|| (&w * -0.2).sum(Kind::Double)).unwrap();
        if step >= 400 {
            total += opt.posterior().unwrap().natural("w").unwrap();
        }
    }
    let (mean, error) = support::mean_and_error(&values(&(total / 400.0)));
    assert!(error < 0.01, "{error}");
    close(mean, 0.4, 4.0 * error + 0.01);
}

/// sign λ, and λ ← clip(λ - αĝ) at the gradient there.
#[test]
fn straight_through_by_hand() {
    let w = weight(&[0.3, -0.05, 0.95]);
    let mut opt = Ste::default().build(params(&w), 0.1).unwrap();
    assert_eq!(values(&w), [1.0, -1.0, 1.0]);
    let target = Tensor::from_slice(&[3.0, 3.0, 3.0]);
    // ∇ ½(w-t)² = w-t = (-2, -4, -2) at the signs.
    opt.step(|| ((&w - &target).square() * 0.5).sum(Kind::Double)).unwrap();
    assert_eq!(values(&w), [1.0, 1.0, 1.0]);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("ste.safetensors");
    opt.save(&path).unwrap();
    let bytes = std::fs::read(&path).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let lambda: Vec<f64> =
        tensors.tensor("mean.w").unwrap().data().as_chunks::<8>().0.iter().map(|b| f64::from_le_bytes(*b)).collect();
    all_close(&lambda, &[0.5, 0.35, 1.0], 1e-15);
}

/// Weights that were set by hand are read; those that the optimizer left there keep their λ, even where tanh λ rounds to 1.
#[test]
fn weights_from_outside_give_the_natural_parameters() {
    let w = weight(&[1.0, -1.0, 0.5, 0.0]);
    let mut opt = BayesBiNN::default().ess(1.0).natural_init(30.0).build(params(&w), 0.0).unwrap();
    let natural = |opt: &Optimizer<BayesBiNN>| values(opt.posterior().unwrap().natural("w").unwrap());
    let half = 0.5f64.atanh();
    all_close(&natural(&opt), &[30.0, -30.0, half, 0.0], 1e-15);
    opt.step(|| w.sum(Kind::Double)).unwrap();
    all_close(&natural(&opt), &[30.0, -30.0, half, 0.0], 1e-15);
    tch::no_grad(|| w.narrow(0, 2, 2).copy_(&Tensor::from_slice(&[0.0, 0.9])));
    all_close(&natural(&opt), &[30.0, -30.0, 0.0, 0.9f64.atanh()], 1e-15);
    opt.step(|| w.sum(Kind::Double)).unwrap();
    all_close(&natural(&opt), &[30.0, -30.0, 0.0, 0.9f64.atanh()], 1e-15);
    all_close(&values(&w), &[1.0, -1.0, 0.0, 0.9], 1e-15);
}

/// 10⁵ samples: frequencies of w = 1 within four standard deviations of 1/(1+exp(-2λ)).
#[test]
fn samples_have_their_probabilities() {
    const N: i64 = 100_000;
    for lambda in [-1.0, 0.0, 0.3, 2.0] {
        let q = MeanFieldBernoulli::new([("w", Tensor::full([N], lambda, (Kind::Float, Device::Cpu)))]).unwrap();
        let (_, w) = q.sample(3).unwrap().remove(0);
        assert_eq!(values(&w.square().to_kind(Kind::Double)), vec![1.0; N as usize]);
        let p = 1.0 / (1.0 + (-2.0 * lambda).exp());
        let found = w.eq(1.0).mean(Kind::Double).double_value(&[]);
        close(found, p, 4.0 * (p * (1.0 - p) / N as f64).sqrt());
        assert_eq!(values(&q.sample(3).unwrap().remove(0).1.to_kind(Kind::Double)), values(&w.to_kind(Kind::Double)));
        assert_ne!(values(&q.sample(4).unwrap().remove(0).1.to_kind(Kind::Double)), values(&w.to_kind(Kind::Double)));
    }
}

#[test]
fn posterior_round_trip_and_guards() {
    let vs = VarStore::new(Device::Cpu);
    let w = vs.root().var_copy("w", &Tensor::from_slice(&[0.5f32, 0.25]));
    let q = MeanFieldBernoulli::new([("w", Tensor::from_slice(&[-0.5f32, 0.0]))]).unwrap().with_seed(7);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("q.safetensors");
    q.save(&path).unwrap();
    let again = MeanFieldBernoulli::load(&path).unwrap();
    let numbers = |t: &Tensor| values(&t.to_kind(Kind::Double));
    assert_eq!(numbers(again.natural("w").unwrap()), [-0.5, 0.0]);
    assert_eq!(numbers(&again.sample(0).unwrap()[0].1), numbers(&q.sample(0).unwrap()[0].1));
    assert!(tch_blr::DiagonalGaussian::load(&path).unwrap_err().to_string().contains("mean-field Bernoulli"));

    let mode = q.perturb_to_mode(&vs).unwrap();
    assert_eq!(numbers(&w), [-1.0, 1.0]);
    drop(mode);
    let sample = q.perturb(&vs, 2).unwrap();
    assert_eq!(numbers(&w), numbers(&q.sample(2).unwrap()[0].1));
    drop(sample);
    assert_eq!(numbers(&w), [0.5, 0.25]);
    q.copy_mode_to(&vs).unwrap();
    assert_eq!(numbers(&w), [-1.0, 1.0]);
    q.copy_mean_to(&vs).unwrap();
    all_close(&numbers(&w), &[(-0.5f64).tanh(), 0.0], 1e-7);

    // Half of the samples of a weight with λ = 0 are 1.
    let outputs = q.predict_samples(&vs, 64, || w.shallow_clone()).unwrap();
    assert_eq!(outputs.size(), [64, 2]);
    let p = q.predict(&vs, 64, || (Tensor::stack(&[&w, &-&w], 1) + 1.0) * 0.5).unwrap();
    close(p.mean.double_value(&[1, 0]), 0.5, 4.0 * 0.5 / 8.0);
    assert!(p.mutual_information.double_value(&[1]) > 0.5, "{:?}", p.mutual_information);

    for bad in [
        MeanFieldBernoulli::new([("w", Tensor::from_slice(&[f64::NAN]))]),
        MeanFieldBernoulli::new([("w", Tensor::from_slice(&[1i64]))]),
        MeanFieldBernoulli::new([("w", Tensor::new())]),
        MeanFieldBernoulli::new([("w", Tensor::from_slice(&[1.0])), ("w", Tensor::from_slice(&[1.0]))]),
    ] {
        assert!(bad.unwrap_err().to_string().contains("`w`"));
    }
    MeanFieldBernoulli::new::<String>([]).unwrap_err();
    let other = MeanFieldBernoulli::new([("w", Tensor::from_slice(&[1.0]))]).unwrap();
    assert!(q.kl(&other).unwrap_err().to_string().contains("shapes"));
    assert!(q.predict(&vs, 0, || w.shallow_clone()).is_err());
}

/// 784-64-10 with binary weights and no biases; batches are normalised without parameters of their own.
struct Net {
    vs: VarStore,
    layers: [nn::Linear; 2],
}

impl Net {
    fn new() -> Net {
        tch::manual_seed(1);
        let vs = VarStore::new(Device::Cpu);
        let config = nn::LinearConfig { bias: false, ..Default::default() };
        let layers = [("a", 784, 64), ("b", 64, 10)].map(|(name, n, m)| nn::linear(vs.root() / name, n, m, config));
        Net { vs, layers }
    }

    fn logits(&self, x: &Tensor) -> Tensor {
        let normal = |t: Tensor| t.batch_norm::<Tensor>(None, None, None, None, true, 0.1, 1e-5, false);
        let hidden = normal(self.layers[0].forward(&(x - 0.1))).tanh();
        normal(self.layers[1].forward(&hidden)) * 2.0
    }

    fn train<R: Rule>(&self, opt: &mut Optimizer<R>, digits: &Digits, epochs: u64) {
        for epoch in 0..epochs {
            for (x, y) in batches(&digits.train_images, &digits.train_labels, 50, epoch, Last::Drop) {
                opt.step(|| self.logits(&x).cross_entropy_for_logits(&y)).unwrap();
            }
        }
    }

    fn probabilities(&self, digits: &Digits) -> Tensor {
        self.logits(&digits.test_images).softmax(-1, Kind::Float)
    }
}

/// Binary networks learn drawn digits: of 500 test images 75 to 81 % with the binary weights of the straight-through
/// estimator, and with mode and samples of BayesBiNN (chance: 10 %). The bound is five standard deviations (2 %) of such
/// a count below, for other roundings of the training take other paths.
#[test]
fn binary_networks_learn_digits() {
    let digits = Digits::synthetic(2000, 500, 0);
    let net = Net::new();
    let mut opt = Ste::default().build(&net.vs, 1.0).unwrap();
    net.train(&mut opt, &digits, 4);
    let binary = net.vs.trainable_variables().iter().all(|w| w.abs().eq(1.0).all().int64_value(&[]) == 1);
    assert!(binary);
    let accuracy = |p: &Tensor| metrics::accuracy(p, &digits.test_labels).unwrap();
    let straight_through = tch::no_grad(|| accuracy(&net.probabilities(&digits)));

    let net = Net::new();
    let rule = BayesBiNN::default().ess(2000.0);
    let mut opt = rule.noise(Philox { seed: 2 }).build(&net.vs, 1e-2).unwrap();
    net.train(&mut opt, &digits, 4);
    let q = opt.posterior().unwrap();
    let predictive = q.predict(&net.vs, 16, || net.probabilities(&digits)).unwrap();
    let mode = {
        let _mode = q.perturb_to_mode(&net.vs).unwrap();
        tch::no_grad(|| accuracy(&net.probabilities(&digits)))
    };
    let samples = accuracy(&predictive.mean);
    println!("accuracy: Ste {straight_through}, BayesBiNN mode {mode}, 16 samples {samples}");
    for accuracy in [straight_through, mode, samples] {
        assert!(accuracy > 0.65, "{straight_through} {mode} {samples}");
    }
}

/// A frozen variable keeps what it holds, binary or not, through steps and checkpoints; trained again, its λ starts there.
#[test]
fn frozen_weights_are_left_alone() {
    let (w, frozen) = (weight(&[0.2, -0.4]), weight(&[0.3, 3.0]));
    _ = frozen.set_requires_grad(false);
    let named = || Params::named([("w", w.shallow_clone()), ("frozen", frozen.shallow_clone())]).unwrap();
    let mut opt = Ste::default().build(named(), 0.25).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("ste.safetensors");
    let loss = || (&w + &frozen).sum(Kind::Double);
    opt.step(loss).unwrap();
    assert_eq!((values(&w), values(&frozen)), (vec![-1.0, -1.0], vec![0.3, 3.0]));
    opt.save(&path).unwrap();
    opt.load(&path).unwrap();
    assert_eq!((values(&w), values(&frozen)), (vec![-1.0, -1.0], vec![0.3, 3.0]));
    _ = frozen.set_requires_grad(true);
    // λ: 0.3 - ¼ > 0 and 3 - ¼, clipped to 1; the next step takes both down by ¼.
    opt.step(|| {
        assert_eq!(values(&frozen), [1.0, 1.0], "binary from the first evaluation on");
        loss()
    })
    .unwrap();
    assert_eq!(values(&frozen), [1.0, 1.0]);
    opt.step(loss).unwrap();
    assert_eq!(values(&frozen), [-1.0, 1.0]);
}

/// Binary weights by name, real ones by another optimizer: [`Params::named`] separates them.
#[test]
fn real_weights_stay_with_another_optimizer() {
    let (w, scale) = (weight(&[0.2, -0.4]), weight(&[3.0]));
    let mut binary = Ste::default().build(Params::named([("w", w.shallow_clone())]).unwrap(), 0.1).unwrap();
    let mut real =
        tch_blr::Sgd::default().build(Params::named([("scale", scale.shallow_clone())]).unwrap(), 0.1).unwrap();
    let loss = || ((&w * &scale) - 2.0).square().sum(Kind::Double);
    real.step(loss).unwrap();
    binary.step(loss).unwrap();
    assert!(values(&w).iter().all(|w| w.abs() == 1.0));
    // ∇ = 2Σ(w s - 2)w = 2((3-2) - (-3-2)) = 12
    close(values(&scale)[0], 3.0 - 0.1 * 12.0, 1e-15);
}

//! Pruned weights stay zero, and the others train as in a network that never had them.

use support::{all_close, params, values, weight};
use tch::{Device, Kind, Tensor, nn::Module, nn::VarStore};
use tch_blr::fisher::Fisher;
use tch_blr::nn::{self, Likelihood};
use tch_blr::pruning::{self, Mask};
use tch_blr::rule::Rule;
use tch_blr::{
    Adam, AdamW, BayesBiNN, BayesianSam, DiagonalGaussian, Ivon, Philox, Posterior, Prior, PrunedGaussian, RmsProp,
    Sam, SamRmsProp, Sgd, Ste, Vadam, Von,
};

fn vector(x: &[f64]) -> Tensor {
    Tensor::from_slice(x)
}

#[test]
fn importances_are_their_definitions() {
    let q = DiagonalGaussian::new([("w", vector(&[1.0, -2.0, 0.5]), vector(&[4.0, 0.25, 100.0]))]).unwrap();
    all_close(&values(&q.signal_to_noise()[0].1), &[2.0, 1.0, 5.0], 1e-15);
    all_close(&values(&pruning::precision(&q)[0].1), &[4.0, 0.25, 100.0], 0.0);
    let w = weight(&[1.0, -2.0, 0.5]);
    all_close(&values(&pruning::magnitude(params(&w))[0].1), &[1.0, 2.0, 0.5], 0.0);
    let x = vector(&[1.0, 0.0, 2.0, 0.0, 3.0, 1.0]).reshape([2, 3]);
    let fisher = Fisher::exact().likelihood(Likelihood::Gaussian { variance: 1.0 });
    let f = fisher.diagonal(params(&w), [&x], |x| x.mv(&w)).unwrap();
    all_close(&values(&pruning::saliency(&f, params(&w)).unwrap()[0].1), &[0.5, 18.0, 0.625], 1e-14);
}

#[test]
fn the_least_important_go() {
    let scores =
        vec![("a".to_owned(), vector(&[3.0, 1.0, 2.0])), ("b".to_owned(), vector(&[1.0, 9.0]).reshape([2, 1]))];
    let mask = |sparsity| pruning::prune(&scores, sparsity).unwrap();
    let of = |m: &Mask| (values(m.get("a").unwrap()), values(m.get("b").unwrap()));
    assert_eq!(of(&mask(0.0)), (vec![1.0; 3], vec![1.0; 2]));
    // Of equals the earlier.
    assert_eq!(of(&mask(0.2)), (vec![1.0, 0.0, 1.0], vec![1.0, 1.0]));
    assert_eq!(of(&mask(0.59)), (vec![1.0, 0.0, 1.0], vec![0.0, 1.0]));
    assert_eq!(of(&mask(0.8)), (vec![0.0; 3], vec![0.0, 1.0]));
    assert_eq!((mask(0.8).pruned(), mask(1.0).pruned()), (4, 5));
    assert_eq!(mask(0.5).get("b").unwrap().size(), [2, 1]);
    assert!(mask(0.5).get("c").is_none());

    let error = |scores: &[(String, Tensor)], sparsity| pruning::prune(scores, sparsity).unwrap_err().to_string();
    assert!(error(&scores, 1.1).contains("sparsity") && error(&scores, f64::NAN).contains("sparsity"));
    assert!(error(&[], 0.5).contains("no weights"));
    assert!(error(&[("a".to_owned(), vector(&[f64::NAN]))], 0.5).contains("`a`"));
    assert!(error(&[scores[0].clone_pair(), scores[0].clone_pair()], 0.5).contains("twice"));

    // A model that does not fit is left as it was.
    let w = weight(&[1.0, 2.0]);
    assert!(mask(0.5).apply(params(&w)).is_err());
    assert_eq!(values(&w), [1.0, 2.0]);
}

trait ClonePair {
    fn clone_pair(&self) -> Self;
}

impl ClonePair for (String, Tensor) {
    fn clone_pair(&self) -> Self {
        (self.0.clone(), self.1.shallow_clone())
    }
}

/// A small network, trained for a few steps and then pruned: in every evaluation and after every step its pruned
/// weights are exactly zero, and the others move.
fn stay_zero<R: Rule>(rule: R, lr: f64) {
    let mut vs = VarStore::new(Device::Cpu);
    tch::manual_seed(1);
    let net = tch::nn::seq()
        .add(nn::linear(vs.root() / "a", 5, 8, tch::nn::LinearConfig::default()))
        .add_fn(Tensor::tanh)
        .add(nn::linear(vs.root() / "b", 8, 3, tch::nn::LinearConfig::default()));
    vs.set_kind(Kind::Double);
    let x = Tensor::randn([30, 5], (Kind::Double, Device::Cpu));
    let y = x.narrow(1, 0, 3).argmax(1, false);
    let mut opt = rule.builder().noise(Philox { seed: 3 }).build(&vs, lr).unwrap();
    let per_example = rule.statistic() == tch_blr::Statistic::Fisher(tch_blr::Labels::Observed);
    let loss = || {
        let losses = nn::cross_entropy(&net.forward(&x), &y).unwrap();
        if per_example { losses } else { losses.mean(Kind::Double) }
    };
    for _ in 0..3 {
        opt.step(loss).unwrap();
    }
    let mask = pruning::prune(&pruning::magnitude(&vs), 0.6).unwrap();
    assert_eq!(mask.pruned(), 45);
    let zeros = || {
        let each = vs.variables().into_iter().map(|(name, t)| {
            let kept = mask.get(&name).unwrap();
            assert!(t.detach().masked_select(&kept.eq(0.0)).eq(0.0).all().int64_value(&[]) == 1, "{name}");
            let left = t.detach().masked_select(&kept.eq(1.0));
            // Binary ones change in their signs only.
            left.dot(&Tensor::arange(left.numel() as i64, (Kind::Double, Device::Cpu)).cos()).double_value(&[])
        });
        each.sum::<f64>()
    };
    mask.apply(&vs).unwrap();
    let mut before = zeros();
    for _ in 0..5 {
        let during = || {
            zeros();
            loss()
        };
        mask.step(&mut opt, during).unwrap();
        let now = zeros();
        assert!(now != before && now.is_finite());
        before = now;
    }
}

#[test]
fn pruned_weights_stay_zero_in_every_row() {
    stay_zero(Sgd::default().momentum(0.9), 0.1);
    stay_zero(RmsProp::default(), 0.01);
    stay_zero(Adam::default(), 0.01);
    stay_zero(AdamW::default(), 0.01);
    stay_zero(Vadam::default().ess(30.0), 0.01);
    stay_zero(Von::ogn().ess(30.0), 0.01);
    stay_zero(Von::vogn().ess(30.0), 0.01);
    stay_zero(Ivon::default().ess(30.0), 0.1);
    stay_zero(Sam::default(), 0.1);
    stay_zero(SamRmsProp::default(), 0.01);
    stay_zero(BayesianSam::iclr2023().ess(30.0), 0.1);
    stay_zero(Ste::default().momentum(0.9), 10.0);
    stay_zero(BayesBiNN::default().ess(30.0), 0.01);
}

/// Two weights, of which one is pruned, against a model with the other one only.
#[test]
fn the_rest_trains_as_if_they_had_never_been_there() {
    fn train<R: Rule>(rule: R) {
        let (both, alone) = (weight(&[0.7, 0.0]), weight(&[0.7]));
        let q = DiagonalGaussian::new([("w", vector(&[1.0, 0.0]), vector(&[1.0, 1.0]))]).unwrap();
        let mask = pruning::prune(&q.signal_to_noise(), 0.5).unwrap();
        // The same draws: a weight's noise depends on its position.
        let mut opt = rule.builder().noise(Philox { seed: 5 }).build(params(&both), 0.05).unwrap();
        let mut only = rule.builder().noise(Philox { seed: 5 }).build(params(&alone), 0.05).unwrap();
        for _ in 0..20 {
            mask.step(&mut opt, || (both.get(0) * 2.0 + both.get(1) * 3.0 - 1.0).square()).unwrap();
            only.step(|| (alone.get(0) * 2.0 - 1.0).square()).unwrap();
            all_close(&values(&both), &[values(&alone)[0], 0.0], 1e-15);
        }
    }
    train(Sgd::default().momentum(0.9));
    train(Adam::default());
    train(Vadam::default().ess(10.0));
    train(Ivon::default().ess(10.0));
    train(Ste::default().momentum(0.9));
    train(BayesBiNN::default().ess(10.0));
}

/// Pruned binary weights are neither -1 nor 1, and their natural parameter says so.
#[test]
fn pruned_binary_weights_have_no_preference() {
    let w = weight(&[0.5, -0.9, 0.1]);
    let mut opt = BayesBiNN::default().ess(10.0).noise(Philox { seed: 2 }).build(params(&w), 0.05).unwrap();
    let mask = pruning::prune(&pruning::magnitude(params(&w)), 0.34).unwrap();
    for _ in 0..5 {
        mask.step(&mut opt, || (&w - 1.0).square().mean(Kind::Double)).unwrap();
    }
    let natural = values(opt.posterior().unwrap().natural("w").unwrap());
    assert!(natural[2] == 0.0 && natural[0] != 0.0 && natural[1] != 0.0, "{natural:?}");
}

/// Half-precision weights have their mean in f32 beside them: it is pruned as well.
#[test]
fn the_mean_of_half_precision_weights_is_pruned() {
    let w = Tensor::from_slice(&[0.5f32, 2.0, -1.0]).to_kind(Kind::BFloat16).set_requires_grad(true);
    let mut opt = Ivon::default().ess(10.0).noise(Philox { seed: 1 }).build(params(&w), 0.1).unwrap();
    let loss = || (w.to_kind(Kind::Float) - 3.0).square().mean(Kind::Float);
    opt.step(loss).unwrap();
    let mask = pruning::prune(&pruning::magnitude(params(&w)), 0.34).unwrap();
    for _ in 0..3 {
        mask.step(&mut opt, loss).unwrap();
        let mean = values(&opt.posterior().unwrap().mean("w").unwrap());
        assert_eq!((values(&w)[0], mean[0]), (0.0, 0.0));
        assert!(mean[1] != 0.0 && mean[2] != 0.0);
    }
}

/// The norm of all gradients, which limits a step or a perturbation, is that of the network without the pruned weights.
#[test]
fn pruned_weights_are_in_no_norm() {
    fn train<R: Rule>(rule: R, clip: Option<f64>) {
        let (both, alone) = (weight(&[0.7, -0.4, 0.0]), weight(&[0.7, -0.4]));
        let q = DiagonalGaussian::new([("w", vector(&[1.0, 1.0, 0.0]), vector(&[1.0; 3]))]).unwrap();
        let mask = pruning::prune(&q.signal_to_noise(), 0.34).unwrap();
        let build = |w: &Tensor| {
            let builder = rule.builder().noise(Philox { seed: 5 });
            let builder = if let Some(max) = clip { builder.clip_grad_norm(max) } else { builder };
            builder.build(params(w), 0.05).unwrap()
        };
        let (mut opt, mut only) = (build(&both), build(&alone));
        for _ in 0..5 {
            let loss = |rest: Tensor| (rest - 1.0).square();
            mask.step(&mut opt, || loss(both.get(0) * 2.0 - both.get(1) + both.get(2) * 9.0)).unwrap();
            only.step(|| loss(alone.get(0) * 2.0 - alone.get(1))).unwrap();
            let found = values(&both);
            all_close(&found[..2], &values(&alone), 1e-15);
            assert_eq!(found[2], 0.0);
        }
        // And the next step that is none of the mask's counts it again.
        opt.step(|| (both.get(0) * 2.0 - both.get(1) + both.get(2) * 9.0 - 1.0).square()).unwrap();
        assert_ne!(values(&both)[2], 0.0);
    }
    train(Sam::default().momentum(0.9), None);
    train(SamRmsProp::default(), None);
    train(BayesianSam::default().ess(10.0), None);
    train(BayesianSam::default().ess(10.0), Some(0.1));
    for clip in [0.1, 2.0] {
        train(Sgd::default().momentum(0.9), Some(clip));
        train(Ivon::default().ess(10.0), Some(clip));
        train(Sam::default(), Some(clip));
        train(Adam::default(), Some(clip));
    }
}

/// A panic in the closure ends the pruning with it.
#[test]
fn a_panic_ends_the_pruning() {
    let w = weight(&[0.7, 0.5]);
    let q = DiagonalGaussian::new([("w", vector(&[1.0, 0.0]), vector(&[1.0, 1.0]))]).unwrap();
    let mask = pruning::prune(&q.signal_to_noise(), 0.5).unwrap();
    let mut opt = Sgd::default().build(params(&w), 0.1).unwrap();
    let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        mask.step(&mut opt, || -> Tensor { panic!("of the closure") })
    }));
    assert!(panicked.is_err());
    opt.step(|| w.sum(Kind::Double)).unwrap();
    all_close(&values(&w), &[0.6, -0.1], 1e-15);
}

/// Two parameters whose least certain weights, by |m|√s, are pruned: those of a 0 and 2, that of b 1.
fn pruned() -> (DiagonalGaussian, Mask, PrunedGaussian) {
    let a = (vector(&[0.5, 8.0, 0.25]), vector(&[4.0, 1.0, 4.0]));
    let b = (vector(&[3.0, -0.5]).reshape([2, 1]), vector(&[9.0, 1.0]).reshape([2, 1]));
    let q = DiagonalGaussian::new([("a", a.0, a.1), ("b", b.0, b.1)]).unwrap().with_seed(4);
    let mask = pruning::prune(&q.signal_to_noise(), 0.6).unwrap();
    let without = mask.posterior(&q).unwrap();
    (q, mask, without)
}

#[test]
fn pruned_weights_do_not_come_back_as_noise() {
    let (q, _, without) = pruned();
    assert_eq!((without.pruned(), without.len(), without.is_empty()), (3, 5, false));
    let of = |f: &dyn Fn(&str) -> Option<Tensor>| ["a", "b"].map(|name| values(&f(name).unwrap())).concat();
    assert_eq!(of(&|name| without.mean(name)), [0.0, 8.0, 0.0, 3.0, 0.0]);
    assert_eq!(of(&|name| without.variance(name)), [0.0, 1.0, 0.0, 1.0 / 9.0, 0.0]);
    for k in 0..20 {
        let all = |q: &dyn Posterior| q.sample(k).unwrap().iter().flat_map(|(_, t)| values(t)).collect::<Vec<f64>>();
        let (before, after) = (all(&q), all(&without));
        // The others draw what they drew before.
        assert_eq!(after, [0.0, before[1], 0.0, before[3], 0.0]);
        assert!(before.iter().all(|w| *w != 0.0));
    }
    // The Gaussian that it comes from has kept everything.
    assert_eq!(values(&q.mean("a").unwrap()), [0.5, 8.0, 0.25]);
}

#[test]
fn a_pruned_posterior_predicts_and_is_a_file() {
    let (q, mask, without) = pruned();
    let (a, b) = (weight(&[1.0; 3]), Tensor::ones([2, 1], (Kind::Double, Device::Cpu)).set_requires_grad(true));
    let model = || tch_blr::Params::named([("a", a.shallow_clone()), ("b", b.shallow_clone())]).unwrap();
    let outputs =
        |q: &PrunedGaussian| q.predict_samples(model(), 5, || a.sum(Kind::Double) + b.sum(Kind::Double)).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("q.safetensors");
    without.save(&path).unwrap();
    let loaded = PrunedGaussian::load(&path).unwrap();
    assert_eq!((outputs(&loaded), loaded.pruned()), (outputs(&without), 3));
    let other = outputs(&without.with_seed(5));
    assert_ne!(outputs(&loaded), other);
    assert_eq!(values(&a), [1.0; 3]);
    loaded.copy_mean_to(model()).unwrap();
    assert_eq!([values(&a), values(&b)].concat(), [0.0, 8.0, 0.0, 3.0, 0.0]);

    // It is no other posterior, nor the other way round, and no prior.
    let e = DiagonalGaussian::load(&path).unwrap_err().to_string();
    assert!(e.contains("holds `pruned Gaussian posterior`"), "{e}");
    q.save(&path).unwrap();
    assert!(PrunedGaussian::load(&path).unwrap_err().to_string().contains("diagonal Gaussian posterior"));
    assert!(Prior::try_from(&loaded as &dyn Posterior).unwrap_err().to_string().contains("a prior must be"));

    // A mask that prunes nothing, or everything.
    let all = |share| pruning::prune(&q.signal_to_noise(), share).unwrap().posterior(&q).unwrap();
    assert_eq!(all(0.0).sample(1).unwrap(), q.sample(1).unwrap());
    assert!(all(1.0).sample(1).unwrap().iter().all(|(_, t)| t.count_nonzero(None).int64_value(&[]) == 0));

    // A mask of another model.
    let e = mask.posterior(&q.select(|name| name == "a").unwrap()).unwrap_err().to_string();
    assert!(e.contains("`b`") && e.contains("the posterior does not"), "{e}");
    let wider = DiagonalGaussian::new(["a", "b"].map(|n| (n, vector(&[1.0; 4]), vector(&[1.0; 4])))).unwrap();
    let e = mask.posterior(&wider).unwrap_err().to_string();
    assert!(e.contains("`a`") && e.contains("[3]") && e.contains("[4]"), "{e}");
}

/// The noise that a row with a damping trains with is that of the weights that are left.
#[test]
fn a_damping_stays_with_the_weights_that_are_left() {
    let w = weight(&[0.7, 0.001]);
    let mut opt = Von::vogn().ess(10.0).damping(0.5).noise(Philox { seed: 3 }).build(params(&w), 0.01).unwrap();
    opt.step(|| (&w - 1.0).square()).unwrap();
    let q = opt.posterior().unwrap();
    let without = pruning::prune(&pruning::magnitude(params(&w)), 0.5).unwrap().posterior(&q).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("q.safetensors");
    without.save(&path).unwrap();
    let of = |q: &dyn Posterior| values(&q.sample(2).unwrap()[0].1);
    let kept = of(&q)[0];
    assert_ne!(kept, of(&q.shallow_clone().undamped())[0]);
    for q in [without, PrunedGaussian::load(&path).unwrap()] {
        assert_eq!(of(&q), [kept, 0.0]);
    }
}

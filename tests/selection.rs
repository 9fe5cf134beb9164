//! Which examples a memory keeps: scores by explicit Jacobians, selections by their definitions.

use proptest::prelude::*;
use std::collections::BTreeMap;
use support::{all_close, close, says, values, wave};
use tch::nn::{Module, VarStore};
use tch::{Device, Kind, Tensor};
use tch_blr::continual::Memory;
use tch_blr::fisher::Fisher;
use tch_blr::nn::{self, Likelihood};
use tch_blr::selection::{Reservoir, Ring, TopK, class_balanced, herding, k_centre, random_scores, top};
use tch_blr::{DiagonalGaussian, Params, Prior};

/// tanh(x W₁) W₂ in f64, 3 outputs or one as `[B]`.
struct Net {
    weights: [Tensor; 2],
    x: Tensor,
    single: bool,
}

const N: i64 = 6;

impl Net {
    fn new(single: bool) -> Self {
        let w = |shape: &[i64], p| wave(shape, p).set_requires_grad(true);
        Net { weights: [w(&[2, 4], 0.1), w(&[4, if single { 1 } else { 3 }], 0.3)], x: wave(&[N, 2], 0.6), single }
    }

    fn params(&self) -> Params {
        Params::named(["w1", "w2"].into_iter().zip(self.weights.iter().map(Tensor::shallow_clone))).unwrap()
    }

    fn forward(&self, x: &Tensor) -> Tensor {
        let f = x.matmul(&self.weights[0]).tanh().matmul(&self.weights[1]);
        if self.single { f.squeeze_dim(1) } else { f }
    }

    /// J `[B, C, P]`
    fn jacobian(&self) -> Tensor {
        let z = self.forward(&self.x).reshape([N, -1]);
        let row = |i, c| {
            let found = Tensor::run_backward(&[z.get(i).get(c)], &self.weights, true, false);
            Tensor::cat(&found.iter().map(|g| g.reshape([-1])).collect::<Vec<_>>(), 0)
        };
        let rows = |i| Tensor::stack(&(0..z.size()[1]).map(|c| row(i, c)).collect::<Vec<_>>(), 0);
        Tensor::stack(&(0..N).map(rows).collect::<Vec<_>>(), 0)
    }

    fn posterior(&self) -> DiagonalGaussian {
        let entry = |(name, w): (&str, &Tensor)| {
            (name.to_owned(), w.detach().copy(), wave(&w.size(), 2.0).square() * 4.0 + 0.5)
        };
        DiagonalGaussian::new(["w1", "w2"].into_iter().zip(&self.weights).map(entry)).unwrap()
    }
}

/// p, Λ `[B, C, C]` and the targets (e = p - y, over σ² for a Gaussian), by the textbook.
fn truth(net: &Net, likelihood: Likelihood) -> (Tensor, Tensor, Tensor) {
    let z = net.forward(&net.x).detach().reshape([N, -1]);
    match likelihood {
        Likelihood::Categorical => {
            let p = z.softmax(-1, Kind::Double);
            let y = Tensor::from_slice(&[0i64, 2, 1, 1, 0, 2]);
            let lambda = p.diag_embed(0, -2, -1) - p.unsqueeze(2) * p.unsqueeze(1);
            (&p - y.one_hot(3).to_kind(Kind::Double), lambda, y)
        }
        Likelihood::Bernoulli => {
            let (p, y) = (z.sigmoid(), wave(&z.size(), 5.0).gt(0.0).to_kind(Kind::Double));
            (&p - &y, (&p - p.square()).diag_embed(0, -2, -1), y)
        }
        Likelihood::Gaussian { variance } => {
            let y = wave(&z.size(), 5.0);
            ((&z - &y) / variance, (z.ones_like() / variance).diag_embed(0, -2, -1), y)
        }
        _ => unreachable!(),
    }
}

#[test]
fn scores_are_those_of_explicit_jacobians() {
    for likelihood in [Likelihood::Categorical, Likelihood::Bernoulli, Likelihood::Gaussian { variance: 0.4 }] {
        for single in [false, true] {
            if single && likelihood == Likelihood::Categorical {
                continue;
            }
            let net = Net::new(single);
            let forward = |x: &Tensor| net.forward(x);
            let (e, lambda, y) = truth(&net, likelihood);
            let y = if single { y.squeeze_dim(1) } else { y };
            let memory = Memory::new(&net.x, likelihood).targets(&y);
            let trace = |m: &Tensor| values(&m.diagonal(0, 1, 2).sum_dim_intlist(1, false, Kind::Double));
            all_close(&values(&memory.lambda(forward).unwrap()), &trace(&lambda), 1e-14);
            let norm = e.square().sum_dim_intlist(1, false, Kind::Double).sqrt();
            all_close(&values(&memory.gradient_norm(forward).unwrap()), &values(&norm), 1e-14);
            let q = net.posterior();
            let gradients = net.jacobian().transpose(1, 2).matmul(&e.unsqueeze(2)).squeeze_dim(2);
            let norm = gradients.square().sum_dim_intlist(1, false, Kind::Double).sqrt();
            let grand = memory.weight_gradient_norm(net.params(), forward).unwrap();
            all_close(&values(&grand), &values(&norm), 1e-13);
            let variance =
                Tensor::cat(&[q.variance("w1").unwrap().reshape([-1]), q.variance("w2").unwrap().reshape([-1])], 0);
            let j = net.jacobian();
            let v = (&j * &variance).matmul(&j.transpose(1, 2));
            let leverage = memory.leverage(&q, net.params(), forward).unwrap();
            all_close(&values(&leverage), &trace(&lambda.matmul(&v)), 1e-12);
            let own = v.diagonal(0, 1, 2);
            let moved = match likelihood {
                Likelihood::Gaussian { .. } => e.shallow_clone(),
                _ => &e * lambda.diagonal(0, 1, 2),
            };
            let expected = (moved * own).abs().sum_dim_intlist(1, false, Kind::Double);
            all_close(&values(&memory.sensitivity(&q, net.params(), forward).unwrap()), &values(&expected), 1e-12);
        }
    }
}

/// Layers that are tapped (one of them used twice) and a weight that is not, against one backward pass for every example.
#[test]
fn grand_is_that_of_a_loop() {
    let mut vs = VarStore::new(Device::Cpu);
    let root = vs.root();
    let config = tch::nn::ConvConfig { padding: 1, ..Default::default() };
    let conv = nn::conv2d(&root / "conv", 1, 3, 3, config);
    let twice = nn::linear(&root / "twice", 12, 12, tch::nn::LinearConfig::default());
    let last = nn::linear(&root / "last", 12, 3, tch::nn::LinearConfig::default());
    let outside = root.randn_standard("outside", &[12]);
    let frozen = root.randn_standard("frozen", &[12]).set_requires_grad(false);
    vs.double();
    let x = wave(&[5, 1, 2, 2], 0.4);
    let forward = |x: &Tensor| {
        let h = conv.forward(x).tanh().flatten(1, -1) * &outside + &frozen;
        last.forward(&twice.forward(&twice.forward(&h).tanh()).tanh())
    };
    let y = Tensor::from_slice(&[2i64, 0, 1, 1, 2]);
    let memory = Memory::new(&x, Likelihood::Categorical).targets(&y);
    let scores = memory.weight_gradient_norm(&vs, forward).unwrap();
    let trained: Vec<Tensor> = vs.trainable_variables().into_iter().filter(Tensor::requires_grad).collect();
    assert_eq!(trained.len(), 7);
    assert!(trained.iter().all(|w| !w.grad().defined()));
    let one = |i: i64| {
        // tch's cross_entropy_for_logits is in f32.
        let loss = -forward(&x.narrow(0, i, 1)).log_softmax(1, Kind::Double).get(0).get(y.int64_value(&[i]));
        let gradients = Tensor::run_backward(&[loss], &trained, false, false);
        gradients.iter().map(|g| g.square().sum(Kind::Double).double_value(&[])).sum::<f64>().sqrt()
    };
    all_close(&values(&scores), &(0..5).map(one).collect::<Vec<_>>(), 1e-12);
}

/// Σ tr(Λᵢvᵢ) = Σ_j F_jj/(F_jj + δ), whatever the model: the effective number of parameters of the diagonal approximation.
#[test]
fn leverages_add_up_to_the_effective_number_of_parameters() {
    let net = Net::new(false);
    let forward = |x: &Tensor| net.forward(x);
    let f = Fisher::exact().diagonal(net.params(), [&net.x], forward).unwrap();
    let q = f.laplace(Prior::isotropic(0.3)).unwrap();
    let memory = Memory::new(&net.x, Likelihood::Categorical);
    let total = memory.leverage(&q, net.params(), forward).unwrap().sum(Kind::Double).double_value(&[]);
    let effective: f64 = ["w1", "w2"].iter().flat_map(|n| values(f.get(n).unwrap())).map(|f| f / (f + 0.3)).sum();
    close(total, effective, 1e-12);
    assert!(effective < 20.0);
}

#[test]
fn a_heads_scores_are_over_its_labels() {
    let net = Net::new(false);
    let two = Tensor::from_slice(&[0i64, 2]);
    let whole = Memory::new(&net.x, Likelihood::Categorical).targets(&Tensor::from_slice(&[0i64, 2, 2, 0, 0, 2]));
    let head = Memory::new(&net.x, Likelihood::Categorical).targets(&Tensor::from_slice(&[0i64, 1, 1, 0, 0, 1]));
    let whole = whole.active(&[0, 2]);
    let (all, some) = (|x: &Tensor| net.forward(x), |x: &Tensor| net.forward(x).index_select(1, &two));
    let (q, p) = (net.posterior(), || net.params());
    let pairs = [
        (whole.lambda(all), head.lambda(some)),
        (whole.gradient_norm(all), head.gradient_norm(some)),
        (whole.leverage(&q, p(), all), head.leverage(&q, p(), some)),
    ];
    for (a, b) in pairs {
        all_close(&values(&a.unwrap()), &values(&b.unwrap()), 1e-13);
    }
}

/// What `class_balanced` promises, by sorting and by giving away one place at a time.
fn expected(scores: &[f64], classes: &[i64], k: usize) -> Vec<i64> {
    let mut groups: BTreeMap<i64, Vec<i64>> = BTreeMap::new();
    for (i, class) in (0..).zip(classes) {
        groups.entry(*class).or_default().push(i);
    }
    for group in groups.values_mut() {
        group.sort_by(|a, b| scores[*b as usize].total_cmp(&scores[*a as usize]).then(a.cmp(b)));
    }
    let mut share: BTreeMap<i64, usize> = groups.keys().map(|c| (*c, 0)).collect();
    for _ in 0..k {
        let open = groups.iter().filter(|(c, group)| share[c] < group.len());
        let Some((class, _)) = open.min_by_key(|(c, _)| (share[c], **c)) else { break };
        *share.get_mut(class).unwrap() += 1;
    }
    groups.iter().flat_map(|(c, group)| group[..share[c]].to_vec()).collect()
}

/// Scores of few values, so that ties are common, and classes.
fn examples() -> impl Strategy<Value = (Vec<f64>, Vec<i64>)> {
    prop::collection::vec((-3..3_i32, 0..4_i64), 1..40)
        .prop_map(|all| all.into_iter().map(|(s, c)| (f64::from(s), c - 1)).unzip())
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn selections_by_score((scores, classes) in examples(), k in 1..50_usize) {
        let (s, c) = (Tensor::from_slice(&scores), Tensor::from_slice(&classes));
        prop_assert_eq!(class_balanced(&s, &c, k).unwrap(), expected(&scores, &classes, k));
        prop_assert_eq!(top(&s, k).unwrap(), expected(&scores, &vec![0; scores.len()], k));
        // A stream: at any time what would be kept of all so far.
        let mut stream = TopK::new(k).unwrap();
        let mut gone = Vec::new();
        for (i, (score, class)) in scores.iter().zip(&classes).enumerate() {
            gone.extend(stream.offer(*class, *score, i as i64).unwrap());
            prop_assert_eq!(stream.len(), (i + 1).min(k));
        }
        let mut all = stream.into_items();
        prop_assert_eq!(&all, &expected(&scores, &classes, k));
        all.extend(gone);
        all.sort_unstable();
        prop_assert_eq!(all, (0..scores.len() as i64).collect::<Vec<_>>());
    }

    /// Greedy centres cover at least half as well as any others, here the best of all subsets.
    #[test]
    fn centres_cover_the_features(points in prop::collection::vec((-9..9_i32, -9..9_i32), 1..9), k in 1..4_usize) {
        let n = points.len();
        let flat: Vec<f64> = points.iter().flat_map(|(a, b)| [f64::from(*a), f64::from(*b)]).collect();
        let x = Tensor::from_slice(&flat).reshape([n as i64, 2]);
        let chosen = k_centre(&x, k, 0).unwrap();
        prop_assert_eq!(chosen.len(), k.min(n));
        let mut distinct = chosen.clone();
        distinct.sort_unstable();
        distinct.dedup();
        prop_assert_eq!(distinct.len(), chosen.len());
        let distance = |a: usize, b: usize| {
            (f64::from(points[a].0 - points[b].0)).hypot(f64::from(points[a].1 - points[b].1))
        };
        let radius = |of: &[usize]| {
            (0..n).map(|i| of.iter().map(|c| distance(i, *c)).fold(f64::INFINITY, f64::min)).fold(0.0, f64::max)
        };
        let best = (0..1_usize << n).filter(|set| set.count_ones() as usize == k.min(n)).map(|set| {
            radius(&(0..n).filter(|i| set >> i & 1 == 1).collect::<Vec<_>>())
        }).fold(f64::INFINITY, f64::min);
        let ours = radius(&chosen.iter().map(|i| *i as usize).collect::<Vec<_>>());
        prop_assert!(ours <= 2.0 * best + 1e-12, "{} {}", ours, best);
        // Each is the furthest of all from those before it.
        for (at, next) in chosen.iter().enumerate().skip(1) {
            let before: Vec<usize> = chosen[..at].iter().map(|i| *i as usize).collect();
            let off = before.iter().map(|c| distance(*next as usize, *c)).fold(f64::INFINITY, f64::min);
            prop_assert!((off - radius(&before)).abs() < 1e-12);
        }
    }
}

#[test]
fn herding_follows_the_mean() {
    let x = wave(&[40, 3], 0.2) + wave(&[40, 3], 1.1).square();
    let mean = x.mean_dim(0, false, Kind::Double);
    let all = herding(&x, 100).unwrap();
    assert_eq!(all.len(), 40);
    let mut sorted = all.clone();
    sorted.sort_unstable();
    assert_eq!(sorted, (0..40).collect::<Vec<_>>());
    let off = |of: &[i64]| {
        let m = x.index_select(0, &Tensor::from_slice(of)).mean_dim(0, false, Kind::Double);
        (m - &mean).square().sum(Kind::Double).double_value(&[]).sqrt()
    };
    // Prefixes are the choices for a smaller k, and each step is the best one.
    assert_eq!(herding(&x, 7).unwrap(), all[..7]);
    for k in 1..8 {
        let ours = off(&all[..k]);
        let others = (0..40).filter(|i| !all[..k - 1].contains(i)).map(|i| off(&[&all[..k - 1], &[i]].concat()));
        close(ours, others.fold(f64::INFINITY, f64::min), 1e-14);
    }
    let chance: f64 = (0..20).map(|seed| off(&top(&random_scores(40, seed), 7).unwrap())).sum::<f64>() / 20.0;
    assert!(off(&all[..7]) < 0.5 * chance, "{} {chance}", off(&all[..7]));
}

#[test]
fn a_ring_keeps_the_last_of_each_class() {
    let classes: Vec<i64> = (0..100).map(|i| (i * i + i / 7) % 5 - 2).collect();
    for k in [1, 3, 50] {
        let mut ring = Ring::new(k).unwrap();
        assert!(ring.is_empty());
        for (i, class) in classes.iter().enumerate() {
            let of_class = |until: usize| (0..until).filter(|j| classes[*j] == *class).collect::<Vec<_>>();
            let before = of_class(i);
            let oldest = before.len().checked_sub(k).map(|at| before[at]);
            assert_eq!(ring.offer(*class, i), oldest);
        }
        let last = |class: i64| {
            let of_class: Vec<usize> = (0..100).filter(|i| classes[*i] == class).collect();
            of_class[of_class.len().saturating_sub(k)..].to_vec()
        };
        let expected: Vec<usize> = (-2..3).flat_map(last).collect();
        assert!(ring.items().eq(&expected) && ring.len() == expected.len());
        assert_eq!(ring.into_items(), expected);
    }
}

/// Every position is kept equally often: 4000 seeds, 5 of 40. Kept counts have variance 4000·⅛·⅞; χ² over 40 positions with
/// one constraint, normalised for sampling without replacement, is below its 1 - 10⁻⁶ quantile (89.6 at 39 degrees).
#[test]
fn a_reservoir_keeps_all_with_the_same_probability() {
    let (n, k, seeds) = (40_usize, 5, 4000_u64);
    for random_scores_too in [false, true] {
        let mut counts = vec![0.0; n];
        for seed in 0..seeds {
            let kept: Vec<usize> = if random_scores_too {
                top(&random_scores(n, seed), k).unwrap().iter().map(|i| *i as usize).collect()
            } else {
                let mut reservoir = Reservoir::new(k, seed).unwrap();
                let gone = (0..n).filter_map(|i| reservoir.offer(i)).count();
                assert_eq!((reservoir.items().len(), gone, reservoir.offered()), (k, n - k, n as u64));
                reservoir.items().to_vec()
            };
            for i in kept {
                counts[i] += 1.0;
            }
        }
        let share = k as f64 / n as f64;
        let variance = seeds as f64 * share * (1.0 - share);
        let squares = counts.iter().map(|c| (c - seeds as f64 * share).powi(2)).sum::<f64>();
        let chi = squares / variance * (n as f64 - 1.0) / n as f64;
        assert!(chi < 89.6, "{chi}");
    }
}

#[test]
fn chance_is_a_function_of_the_seed() {
    assert_eq!(values(&random_scores(20, 3)), values(&random_scores(30, 3))[..20]);
    assert_ne!(values(&random_scores(20, 3)), values(&random_scores(20, 4)));
    let of = |seed| {
        let mut reservoir = Reservoir::new(3, seed).unwrap();
        (0..50).for_each(|i| _ = reservoir.offer(i));
        reservoir.items().to_vec()
    };
    assert_eq!(of(1), of(1));
    assert_ne!(of(1), of(2));
}

#[track_caller]
#[test]
fn what_cannot_be_selected_is_refused_by_name() {
    let s = Tensor::from_slice(&[0.5, f64::NAN, 0.1]);
    let c = Tensor::from_slice(&[0i64, 1, 0]);
    says(top(&s, 2), "example 1 is NaN");
    says(top(&wave(&[2, 2], 0.1), 2), "[2, 2]");
    says(top(&wave(&[3], 0.1), 0), "`k`");
    says(class_balanced(&s, &c, 2), "example 1");
    says(class_balanced(&wave(&[4], 0.1), &c, 2), "Int64 [4]");
    says(class_balanced(&wave(&[3], 0.1), &wave(&[3], 0.1), 2), "Double");
    says(TopK::<u8>::new(0), "`k`");
    says(Reservoir::<u8>::new(0, 1), "`k`");
    says(Ring::<u8>::new(0), "`k`");
    let mut kept = TopK::new(1).unwrap();
    says(kept.offer(0, f64::NAN, 1), "NaN");
    assert!(kept.is_empty());
    says(k_centre(&wave(&[3, 2], 0.1), 2, 3), "first = 3");
    says(k_centre(&wave(&[3], 0.1), 2, 0), "[3]");
    says(k_centre(&(wave(&[3, 2], 0.1) * f64::NAN), 2, 0), "not finite");
    says(herding(&wave(&[0, 2], 0.1), 2), "no examples");
    says(herding(&wave(&[3, 2], 0.1), 0), "`k`");

    let net = Net::new(false);
    let forward = |x: &Tensor| net.forward(x);
    let memory = || Memory::new(&net.x, Likelihood::Categorical);
    says(memory().gradient_norm(forward), "no targets");
    says(memory().weight_gradient_norm(net.params(), forward), "no targets");
    let other = memory().targets(&Tensor::from_slice(&[0i64, 1, 2, 3, 0, 1]));
    says(other.weight_gradient_norm(net.params(), forward), "example 3 has class 3");
    says(memory().sensitivity(&net.posterior(), net.params(), forward), "no targets");
    says(Memory::new(&net.x.narrow(0, 0, 0), Likelihood::Categorical).lambda(forward), "empty");
    says(Memory::new(&(&net.x * f64::NAN), Likelihood::Categorical).lambda(forward), "not finite");
    let other = DiagonalGaussian::new([("v", wave(&[2], 0.1), wave(&[2], 0.1).square())]).unwrap();
    says(memory().leverage(&other, net.params(), forward), "`v`");
}

/// Which examples a reservoir keeps has nothing to do with their random scores under the same seed.
#[test]
fn streams_of_one_seed_are_apart() {
    // An offer that is taken has a low number among all; the mean of a uniform score is ½, and its sd over these √(1/12n).
    let (mut scores, mut count) = (0.0, 0.0);
    for seed in 0..200 {
        let score = values(&random_scores(101, seed));
        let mut reservoir = Reservoir::new(10, seed).unwrap();
        for i in 0..100 {
            let taken = reservoir.offer(i) != Some(i);
            if i >= 10 && taken {
                // The number that decides offer i is drawn at i + 1.
                scores += score[i + 1];
                count += 1.0;
            }
        }
    }
    let z = (scores / count - 0.5) * (12.0_f64 * count).sqrt();
    assert!(count > 2000.0 && z.abs() < 4.5, "{z} standard errors");
}

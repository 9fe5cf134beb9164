//! Online Gauss-Newton steps do not depend on how the per-example gradients are had.

use support::{chirp, refused, values};
use tch::nn::{BatchNormConfig, LinearConfig, Module, ModuleT, VarStore};
use tch::{Device, Kind, Tensor};
use tch_blr::{Error, Expectation, Ivon, Labels, NoisyKfac, Philox, Statistic, Von, nn};

/// Means and Hessians after each of three steps on y = W a + sin(W a)/5, with `first` for the first W a.
fn trajectory(first: impl Fn(&nn::Linear, &Tensor) -> Tensor) -> Vec<Tensor> {
    let mut vs = VarStore::new(Device::Cpu);
    let layer = nn::linear(vs.root(), 3, 2, LinearConfig { bias: false, ..Default::default() });
    vs.double();
    let values = |n: i64| Tensor::arange(n, (Kind::Double, Device::Cpu)).sin();
    tch::no_grad(|| layer.ws.shallow_clone().copy_(&values(6).view([2, 3])));
    let x = values(15).view([5, 3]) + 0.3;
    let mut opt = Von::ogn().ess(5.0).beta2(0.5).build(&vs, 0.1).unwrap();
    let mut states = Vec::new();
    for _ in 0..3 {
        let losses = || {
            let y: Tensor = first(&layer, &x) + x.matmul(&layer.ws.tr()).sin() * 0.2;
            (y - 1.0).square().sum_dim_intlist(1, false, None::<Kind>)
        };
        opt.step(losses).unwrap();
        states.extend([layer.ws.detach().copy(), opt.state("weight", "hess").unwrap().copy()]);
    }
    states
}

#[test]
fn a_weight_used_in_a_layer_and_by_hand_is_right_in_every_step() {
    let mixed = trajectory(Module::forward);
    let by_hand = trajectory(|layer, x| x.matmul(&layer.ws.tr()));
    for (step, (a, b)) in mixed.iter().zip(&by_hand).enumerate() {
        assert!(a.allclose(b, 1e-12, 1e-14, false), "{step}: {a} {b}");
    }
}

#[test]
fn the_guard_records_the_taps_as_the_closure_does() {
    let vs = VarStore::new(Device::Cpu);
    let layer = nn::linear(vs.root(), 3, 2, LinearConfig::default());
    let x = Tensor::arange(15, (Kind::Float, Device::Cpu)).sin().view([5, 3]);
    // A mean loss: without the taps there would be no per-example gradients.
    let loss = || (layer.forward(&x) - 1.0).square().mean(Kind::Float);
    let row = || Von::vogn().ess(5.0).noise(Philox { seed: 1 }).build(&vs, 0.0).unwrap();
    let (mut closure, mut guarded) = (row(), row());
    closure.step(loss).unwrap();
    drop(guarded.perturbed().unwrap());
    let evaluation = guarded.perturbed().unwrap();
    let value = loss();
    evaluation.backward(value).unwrap();
    guarded.update().unwrap();
    for name in ["weight", "bias"] {
        assert_eq!(closure.state(name, "hess"), guarded.state(name, "hess"));
    }
}

#[test]
fn batch_normalization_in_training_mode_is_refused_and_changes_nothing() {
    let vs = VarStore::new(Device::Cpu);
    let layer = nn::linear(vs.root() / "fc", 3, 2, LinearConfig::default());
    let norm = tch::nn::batch_norm1d(vs.root() / "norm", 2, BatchNormConfig::default());
    let x = Tensor::arange(15, (Kind::Float, Device::Cpu)).sin().view([5, 3]);
    let losses = |train| {
        let y: Tensor = norm.forward_t(&layer.forward(&x), train) - 1.0;
        y.square().sum_dim_intlist(1, false, None::<Kind>)
    };
    let held = || -> Vec<(String, Vec<f64>)> {
        let read = |t: &Tensor| Vec::try_from(t.detach().flatten(0, -1).to_kind(Kind::Double)).unwrap();
        let mut all: Vec<_> = vs.variables().iter().map(|(name, t)| (name.clone(), read(t))).collect();
        all.sort_by(|a, b| a.0.cmp(&b.0));
        all
    };
    let before = held();
    let mut opt = Von::vogn().ess(5.0).build(&vs, 0.1).unwrap();
    let error = opt.step(|| losses(true)).unwrap_err();
    assert!(matches!(error, Error::PerExample(_)), "{error}");
    assert!(error.to_string().contains("norm.running_"), "{error}");
    assert_eq!((held(), opt.steps()), (before.clone(), 0));
    let evaluation = opt.perturbed().unwrap();
    let tried = losses(true);
    assert!(matches!(evaluation.backward(tried), Err(Error::PerExample(_))));
    assert_eq!((held(), opt.steps()), (before.clone(), 0));
    opt.step(|| losses(false)).unwrap();
    assert_ne!(held(), before);
    // Rows without per-example gradients take it.
    Ivon::default().ess(5.0).build(&vs, 0.1).unwrap().step(|| losses(true)).unwrap();
}

/// A buffer that is NaN from the start was not changed.
#[test]
fn buffers_of_nan_are_no_batch_normalization() {
    let vs = VarStore::new(Device::Cpu);
    let layer = nn::linear(vs.root(), 3, 2, LinearConfig::default());
    let _ = vs.root().zeros_no_train("buffer", &[2]).fill_(f64::NAN);
    let x = Tensor::ones([4, 3], (Kind::Float, Device::Cpu));
    let mut opt = Von::vogn().ess(100.0).build(&vs, 0.1).unwrap();
    opt.step(|| layer.forward(&x).square().mean(None::<Kind>)).unwrap();
}

/// A hidden layer and a head, in f64.
struct Net {
    vs: VarStore,
    first: nn::Linear,
    second: nn::Linear,
}

impl Net {
    fn new() -> Self {
        let mut vs = VarStore::new(Device::Cpu);
        let first = nn::linear(vs.root() / "first", 3, 4, LinearConfig::default());
        let second = nn::linear(vs.root() / "second", 4, 2, LinearConfig::default());
        vs.double();
        for (i, mut w) in vs.trainable_variables().into_iter().enumerate() {
            let value = chirp(&w.size(), i as f64);
            tch::no_grad(|| w.copy_(&value));
        }
        Net { vs, first, second }
    }

    fn forward(&self, x: &Tensor) -> Tensor {
        self.second.forward(&self.first.forward(x).tanh())
    }

    /// h of every weight after one step at the mean.
    fn squares(&self, by: Labels, loss: impl Fn() -> Tensor) -> tch_blr::Result<Vec<f64>> {
        let mut opt = Von::ogn().ess(5.0).beta2(0.0).hessian(Statistic::Fisher(by)).build(&self.vs, 0.0)?;
        opt.step(loss)?;
        Ok(opt.params().names().flat_map(|name| values(&opt.state(name, "hess").unwrap())).collect())
    }

    /// The diagonals of G ⊗ A.
    fn products(&self, by: Labels, loss: impl Fn() -> Tensor) -> tch_blr::Result<Vec<f64>> {
        let row = NoisyKfac::default().labels(by).expectation(Expectation::Delta);
        let mut opt = row.build(&self.vs, 0.0)?;
        opt.step(loss)?;
        let factor = |name, state| opt.state(name, state).unwrap().diagonal(0, 0, 1);
        let of = |name| values(&factor(name, "row_factor").outer(&factor(name, "column_factor")));
        Ok(opt.params().names().flat_map(of).collect())
    }
}

fn assert_ratio(a: &[f64], b: &[f64], ratio: f64) {
    assert!(b.iter().any(|b| *b > 1e-4), "nothing to compare");
    for (a, b) in a.iter().zip(b) {
        assert!((a - ratio * b).abs() < 1e-12 * (1.0 + b.abs()), "{a} {b} {ratio}");
    }
}

/// Sequences of T positions: with a mean over positions in every layer, squares are those of the mean of a sequence's
/// gradients; 1/T² of those of its sum. What the layers see as [B·T, D], or the closure returns as [B·T] losses, has each
/// position for an example, as the Gauss-Newton matrix always has.
#[test]
fn squares_of_sequences_are_of_sums_over_their_positions() {
    let net = Net::new();
    let (b, t) = (5i64, 4i64);
    let x = chirp(&[b, t, 3], 0.3);
    let y = Tensor::arange(b * t, (Kind::Int64, Device::Cpu)).remainder(3).clamp_max(1);
    let tokens = || nn::cross_entropy(&net.forward(&x).reshape([b * t, 2]), &y).unwrap();
    let flat = || nn::cross_entropy(&net.forward(&x.reshape([b * t, 3])), &y).unwrap();
    let mean = |t: Tensor| t.mean(Kind::Double);
    let sums = || tokens().reshape([b, t]).sum_dim_intlist(1, false, None::<Kind>);

    let observed = |loss: &dyn Fn() -> Tensor| net.squares(Labels::Observed, loss).unwrap();
    let of_flat = observed(&|| mean(flat()));
    let of_means = observed(&|| mean(tokens()));
    // From the definition, with a backward pass for each sequence.
    let variables = net.vs.trainable_variables();
    let each = |i| Tensor::run_backward(&[sums().get(i)], &variables, false, false);
    let squared = |g: Vec<Tensor>| g.iter().flat_map(|g| values(&g.square())).collect::<Vec<f64>>();
    let by_hand = (0..b).map(|i| squared(each(i))).reduce(|a, g| a.iter().zip(&g).map(|(a, g)| a + g).collect());
    let by_hand: Vec<f64> = by_hand.unwrap().iter().map(|c| c / b as f64).collect();
    assert_ratio(&observed(&|| mean(sums())), &by_hand, 1.0);
    assert_ratio(&of_means, &by_hand, 1.0 / (t * t) as f64);
    assert_ratio(&observed(&tokens), &of_flat, 1.0);
    assert_ratio(&observed(&flat), &of_flat, 1.0);
    // Not the same number times a factor: the squares of a sum are no sum of squares.
    assert!(of_means.iter().zip(&of_flat).any(|(a, b)| (a * t as f64 / b - 1.0).abs() > 0.1));

    let exact = |loss: &dyn Fn() -> Tensor| net.squares(Labels::Exact, loss).unwrap();
    assert_ratio(&exact(&|| mean(tokens())), &exact(&|| mean(flat())), 1.0);
    // Factors take positions for uncorrelated, so that here the ratio is T exactly.
    for (by, ratio) in [(Labels::Exact, 1.0), (Labels::Observed, 1.0 / t as f64)] {
        let whole = net.products(by, || mean(flat())).unwrap();
        assert_ratio(&net.products(by, || mean(tokens())).unwrap(), &whole, ratio);
        assert_ratio(&net.products(by, tokens).unwrap(), &whole, 1.0);
    }
}

/// Padding of sequences has no part in curvature and inputs: it is that of the tokens that are left.
#[test]
fn tokens_to_ignore_leave_the_others() {
    let net = Net::new();
    let x = chirp(&[5, 4, 3], 0.3);
    let y = Tensor::arange(20, (Kind::Int64, Device::Cpu)).remainder(2);
    let padding = chirp(&[20], 0.8).ge(0.2);
    let kept = padding.logical_not().nonzero().reshape([-1]);
    let n = kept.size()[0];
    assert!((5..15).contains(&n));
    let labels = y.masked_fill(&padding, -100);
    let masked = || nn::cross_entropy(&net.forward(&x).reshape([20, 2]), &labels).unwrap().sum(Kind::Double) / n;
    let chosen = || {
        let x = x.reshape([20, 3]).index_select(0, &kept);
        nn::cross_entropy(&net.forward(&x), &y.index_select(0, &kept)).unwrap().mean(Kind::Double)
    };
    assert_ratio(&net.squares(Labels::Exact, masked).unwrap(), &net.squares(Labels::Exact, chosen).unwrap(), 1.0);
    assert_ratio(&net.products(Labels::Exact, masked).unwrap(), &net.products(Labels::Exact, chosen).unwrap(), 1.0);
}

/// A memory in the closure, of the batch's size or another, from the first step or later: no part of its examples' squares
/// may be added to those of the batch.
#[test]
fn a_memory_beside_the_batch_is_refused() {
    let net = Net::new();
    let x = chirp(&[6, 3], 0.3);
    let y = Tensor::from_slice(&[0i64, 1, 1, 0, 1, 0]);
    let soft = |x: &Tensor| {
        let t = chirp(&[x.size()[0], 2], 0.7).softmax(-1, Kind::Double);
        -(net.forward(x).log_softmax(-1, Kind::Double) * t).sum(Kind::Double) / 10.0
    };
    let new = || nn::cross_entropy(&net.forward(&x), &y).unwrap().mean(Kind::Double);
    let before: Vec<f64> = net.vs.trainable_variables().iter().flat_map(values).collect();
    let refused = |e: Error, words: &str| {
        assert!(matches!(e, Error::PerExample(_)) && e.to_string().contains(words), "{e}");
        assert_eq!(net.vs.trainable_variables().iter().flat_map(values).collect::<Vec<_>>(), before);
    };
    for (n, words) in [(6, "two sets of examples"), (4, "saw 6 examples and that of")] {
        let memory = chirp(&[n, 3], 2.0);
        let both = || new() + soft(&memory);
        refused(net.squares(Labels::Observed, both).unwrap_err(), words);
        refused(net.products(Labels::Observed, both).unwrap_err(), words);
        // The Gauss-Newton matrix is that of what was noted.
        assert_ratio(&net.squares(Labels::Exact, both).unwrap(), &net.squares(Labels::Exact, new).unwrap(), 1.0);
        // Losses say what belongs to an example: here the whole memory, a sixth of its gradient squared and so on.
        let losses = || nn::cross_entropy(&net.forward(&x), &y).unwrap() + soft(&memory);
        let variables = net.vs.trainable_variables();
        let each = |i| Tensor::run_backward(&[losses().get(i)], &variables, false, false);
        let squared = |i| each(i).iter().flat_map(|g| values(&(g.square() / 6.0))).collect::<Vec<f64>>();
        let by_hand = (0..6).map(squared).reduce(|a, g| a.iter().zip(&g).map(|(a, g)| a + g).collect()).unwrap();
        assert_ratio(&net.squares(Labels::Observed, losses).unwrap(), &by_hand, 1.0);
    }
    let memory = chirp(&[6, 3], 2.0);
    let mut opt = Von::ogn().ess(5.0).beta2(0.5).build(&net.vs, 0.0).unwrap();
    opt.step(new).unwrap();
    refused(opt.step(|| new() + soft(&memory)).unwrap_err(), "two sets of examples");
    opt.step(new).unwrap();
    assert_eq!(opt.steps(), 2);
}

/// Outputs that depend on the rows of two examples are found out for any number of them, and go example by example.
#[test]
fn outputs_of_neighbours_have_the_curvature_of_both() {
    let net = Net::new();
    let plain = |x: &Tensor| {
        let h = x.linear(&net.first.ws, net.first.bs.as_ref()).tanh();
        h.linear(&net.second.ws, net.second.bs.as_ref())
    };
    for n in [2i64, 6, 20] {
        let x = chirp(&[n, 3], 0.3);
        let y = Tensor::arange(n, (Kind::Int64, Device::Cpu)).remainder(2);
        let loss = |z: Tensor| nn::cross_entropy(&(&z + z.roll([1], [0]).sin()), &y).unwrap();
        let expected = net.squares(Labels::Exact, || loss(plain(&x))).unwrap();
        assert_ratio(&net.squares(Labels::Exact, || loss(net.forward(&x))).unwrap(), &expected, 1.0);
        let expected = net.squares(Labels::Observed, || loss(plain(&x))).unwrap();
        assert_ratio(&net.squares(Labels::Observed, || loss(net.forward(&x))).unwrap(), &expected, 1.0);
    }
}

/// One number for several rows may be their mean or one example of several positions. Two dimensions are a mean, and where
/// no squares are asked for nothing is.
#[test]
fn one_loss_for_several_rows_says_what_it_is() {
    let net = Net::new();
    let x = chirp(&[6, 3], 0.3);
    let y = Tensor::from_slice(&[0i64, 1, 1, 0, 1, 0]);
    let losses = || nn::cross_entropy(&net.forward(&x), &y).unwrap();
    let forms: [fn(Tensor) -> Tensor; 3] = [
        |losses| losses.mean(Kind::Double),
        |losses| losses.mean_dim(0i64, true, None::<Kind>),
        |losses| losses.unsqueeze(0).mean_dim(1i64, true, None::<Kind>),
    ];
    let [mean, kept, matrix] = forms.map(|form| move || form(losses()));
    assert_eq!([mean().size(), kept().size(), matrix().size()], [vec![], vec![1], vec![1, 1]]);
    for refused in [net.squares(Labels::Observed, kept), net.products(Labels::Observed, kept)] {
        let e = refused.unwrap_err();
        assert!(matches!(e, Error::Loss(_)) && e.to_string().contains("saw 6 rows: "), "{e}");
    }
    for by in [Labels::Observed, Labels::Exact] {
        let expected = net.squares(by, mean).unwrap();
        assert_ratio(&net.squares(by, matrix).unwrap(), &expected, 1.0);
        assert_ratio(&net.products(by, matrix).unwrap(), &net.products(by, mean).unwrap(), 1.0);
    }
    assert_ratio(&net.squares(Labels::Exact, kept).unwrap(), &net.squares(Labels::Exact, mean).unwrap(), 1.0);
    assert_ratio(&net.products(Labels::Exact, kept).unwrap(), &net.products(Labels::Exact, mean).unwrap(), 1.0);
    // One example is one, and its sequence with the batch in front.
    let one = || nn::cross_entropy(&net.forward(&x.narrow(0, 0, 1)), &y.narrow(0, 0, 1)).unwrap();
    let scalar = || one().squeeze();
    assert_ratio(&net.squares(Labels::Observed, one).unwrap(), &net.squares(Labels::Observed, scalar).unwrap(), 1.0);
    let sequence = || nn::cross_entropy(&net.forward(&x.unsqueeze(0)).squeeze_dim(0), &y).unwrap().mean(Kind::Double);
    let expected = net.squares(Labels::Observed, sequence).unwrap();
    assert_ratio(&net.squares(Labels::Observed, || sequence().reshape([1])).unwrap(), &expected, 1.0);
    // Means of one element count alike in micro-batches, 0-dim or not.
    let [a, b, c] = forms.map(|form| {
        let net = Net::new();
        let loss = || form(nn::cross_entropy(&net.forward(&x), &y).unwrap());
        let mut opt = Ivon::default().ess(5.0).noise(Philox { seed: 1 }).build(&net.vs, 0.1).unwrap();
        opt.accumulate(loss).unwrap();
        opt.step(|| loss() * 3.0).unwrap();
        net.vs.trainable_variables().iter().flat_map(values).collect::<Vec<f64>>()
    });
    assert!(a == b && b == c);
}

/// A sparse embedding does not record; the message says so, and does not send its user to the layer that it is.
#[test]
fn a_sparse_embedding_is_named_as_one() {
    for sparse in [true, false] {
        let vs = VarStore::new(Device::Cpu);
        let table = nn::embedding(vs.root(), 5, 3, tch::nn::EmbeddingConfig { sparse, ..Default::default() });
        let tokens = Tensor::from_slice(&[0i64, 2, 2, 4]);
        let mut opt = Von::vogn().ess(5.0).build(&vs, 0.1).unwrap();
        let losses = || table.forward(&tokens).square().sum_dim_intlist(1, false, Kind::Float);
        let of_mean = opt.step(|| losses().mean(Kind::Float));
        if sparse {
            refused(of_mean, &["`weight`", "sparse: false"]);
        } else {
            of_mean.unwrap();
        }
        opt.step(losses).unwrap();
    }
}

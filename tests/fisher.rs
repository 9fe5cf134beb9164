//! The Fisher information at a solution: closed forms, explicit Jacobians, and the mistakes that it must not make.

use support::{all_close, close, largest, mean_and_error, values, wave};
use tch::nn::{ConvConfig, Module, Path, VarStore};
use tch::{Device, Kind, Tensor};
use tch_blr::fisher::{Batch, DiagonalFisher, Fisher};
use tch_blr::nn::Likelihood;
use tch_blr::{DiagonalGaussian, Error, Labels, Params, Prior, nn};

const GAUSSIAN: Likelihood = Likelihood::Gaussian { variance: 1.0 };

fn store(make: impl FnOnce(&VarStore)) -> VarStore {
    let mut vs = VarStore::new(Device::Cpu);
    make(&vs);
    vs.set_kind(Kind::Double);
    for (i, mut w) in vs.trainable_variables().into_iter().enumerate() {
        let value = wave(&w.size(), i as f64) * 0.7;
        tch::no_grad(|| w.copy_(&value));
    }
    vs
}

/// A model, its inputs, and what it is called in messages.
struct Case {
    name: &'static str,
    vs: VarStore,
    net: Box<dyn Fn(&Tensor) -> Tensor>,
    x: Tensor,
}

fn perceptron(outputs: i64) -> Case {
    let mut layers = Vec::new();
    let vs = store(|vs| {
        for (name, i, o) in [("first", 3, 4), ("second", 4, outputs)] {
            layers.push(linear(vs.root() / name, i, o));
        }
    });
    let net = move |x: &Tensor| layers[1].forward(&layers[0].forward(x).tanh());
    Case { name: "perceptron", vs, net: Box::new(net), x: wave(&[7, 3], 0.4) }
}

fn linear(path: Path, i: i64, o: i64) -> nn::Linear {
    nn::linear(path, i, o, tch::nn::LinearConfig::default())
}

/// Networks with every kind of layer and of use; 3 outputs.
fn cases() -> Vec<Case> {
    let mut all = vec![perceptron(3)];

    let mut layers = None;
    let vs = store(|vs| {
        let r = vs.root();
        let config = |groups| ConvConfig { padding: 1, stride: 2, groups, ..Default::default() };
        let conv = [nn::conv2d(&r / "c1", 1, 4, 3, config(1)), nn::conv2d(&r / "c2", 4, 2, 3, config(2))];
        let norm = nn::group_norm(&r / "norm", 2, 4, tch::nn::GroupNormConfig::default());
        layers = Some((conv, norm, linear(&r / "out", 8, 3)));
    });
    let ([c1, c2], norm, out) = layers.unwrap();
    let net = move |x: &Tensor| {
        let h = norm.forward(&c1.forward(x)).tanh();
        out.forward(&c2.forward(&h).tanh().flatten(1, -1))
    };
    all.push(Case { name: "convolutions", vs, net: Box::new(net), x: wave(&[5, 1, 8, 8], 0.1) });

    let mut layers = None;
    let vs = store(|vs| {
        let r = vs.root();
        let table = nn::embedding(&r / "table", 6, 3, tch::nn::EmbeddingConfig::default());
        layers = Some((table, linear(&r / "twice", 3, 3), linear(&r / "other head", 3, 2)));
    });
    let (table, twice, other) = layers.unwrap();
    let net = move |tokens: &Tensor| {
        let h = twice.forward(&table.forward(tokens)).tanh();
        let _ignored = other.forward(&h);
        let h = twice.forward(&h).tanh().mean_dim(1, false, None::<Kind>);
        // Tied to the table's rows by hand, for which there is no tap.
        h.matmul(&table.ws.narrow(0, 0, 3).tr())
    };
    let tokens = Tensor::from_slice(&[1i64, 3, 1, 0, 4, 3, 5, 5, 2, 0, 1, 2]).reshape([4, 3]);
    all.push(Case { name: "tied, positions, unused", vs, net: Box::new(net), x: tokens });

    let vs = store(|vs| {
        let _ = vs.root().zeros("w", &[3, 2]);
        let _ = vs.root().zeros("scale", &[]);
    });
    let [w, scale] = [vs.trainable_variables().remove(0), vs.trainable_variables().remove(1)];
    let net = move |x: &Tensor| x.matmul(&w.tr()).tanh() * (&scale + 1.5);
    all.push(Case { name: "no layers", vs, net: Box::new(net), x: wave(&[4, 2], 0.9) });
    all
}

/// J `[B, C, P]`, one backward pass per row; parameters in the order of their names in `Params`.
fn jacobian(vs: &VarStore, z: &Tensor) -> Tensor {
    let variables = vs.trainable_variables();
    let z = z.reshape([z.size()[0], -1]);
    let row = |i, c| {
        let found = Tensor::run_backward(&[z.get(i).get(c)], &variables, true, false);
        let flat = found.iter().zip(&variables).map(|(g, w)| {
            if g.defined() { g.reshape([-1]) } else { Tensor::zeros([w.numel() as i64], (Kind::Double, Device::Cpu)) }
        });
        Tensor::cat(&flat.collect::<Vec<_>>(), 0)
    };
    let rows = |i| Tensor::stack(&(0..z.size()[1]).map(|c| row(i, c)).collect::<Vec<_>>(), 0);
    Tensor::stack(&(0..z.size()[0]).map(rows).collect::<Vec<_>>(), 0)
}

/// Λ `[B, C, C]`, the textbook's formulas.
fn lambda(z: &Tensor, likelihood: Likelihood) -> Tensor {
    let z = z.detach().reshape([z.size()[0], -1]);
    match likelihood {
        Likelihood::Categorical => {
            let p = z.softmax(-1, Kind::Double);
            p.diag_embed(0, -2, -1) - p.unsqueeze(2) * p.unsqueeze(1)
        }
        Likelihood::Bernoulli => (z.sigmoid() * (-z.sigmoid() + 1.0)).diag_embed(0, -2, -1),
        Likelihood::Gaussian { variance } => (z.ones_like() / variance).diag_embed(0, -2, -1),
        other => unreachable!("{other:?}"),
    }
}

/// Σᵢ JᵢᵀΛᵢJᵢ `[P, P]`
fn gauss_newton(vs: &VarStore, z: &Tensor, likelihood: Likelihood) -> Tensor {
    let j = jacobian(vs, z);
    j.transpose(1, 2).matmul(&lambda(z, likelihood)).matmul(&j).sum_dim_intlist(0, false, None::<Kind>)
}

/// The parts of a diagonal, in order, as one vector.
fn flat(f: &DiagonalFisher) -> Vec<f64> {
    f.names().flat_map(|name| values(f.get(name).unwrap())).collect()
}

fn diagonal(case: &Case, fisher: &Fisher, size: i64) -> Vec<f64> {
    flat(&fisher.diagonal(&case.vs, case.x.split(size, 0), &case.net).unwrap())
}

#[test]
fn the_exact_diagonal_is_that_of_the_matrix_written_out_for_any_batch_size() {
    for case in cases() {
        for likelihood in [Likelihood::Categorical, Likelihood::Bernoulli, Likelihood::Gaussian { variance: 4.0 }] {
            let expected = gauss_newton(&case.vs, &(case.net)(&case.x), likelihood).diagonal(0, 0, 1);
            assert!(largest(&expected) > 1e-3, "{} tests nothing", case.name);
            for size in [1, 3, 100] {
                let found = diagonal(&case, &Fisher::exact().likelihood(likelihood), size);
                all_close(&found, &values(&expected), 1e-12 * largest(&expected));
            }
        }
    }
}

/// F = Σ βᵢ xᵢxᵢᵀ with βᵢ = pᵢ(1-pᵢ); as one logit or as the difference of two.
#[test]
fn logistic_regression_in_closed_form() {
    let vs = store(|vs| {
        let _ = linear(vs.root(), 3, 1);
    });
    let [w, b] = ["weight", "bias"].map(|n| vs.variables()[n].shallow_clone());
    let layer = nn::Linear { ws: w, bs: Some(b) };
    let x = wave(&[9, 3], 0.2);
    let p = layer.forward(&x).detach().sigmoid();
    let beta: Tensor = &p * (-&p + 1.0);
    let weight = values(&(&beta * x.square()).sum_dim_intlist(0, false, None::<Kind>));
    let bias = values(&beta.sum(Kind::Double));
    let bernoulli = Fisher::exact().likelihood(Likelihood::Bernoulli);
    let two = |x: &Tensor| Tensor::cat(&[layer.forward(x), layer.forward(x).zeros_like()], 1);
    for f in [
        bernoulli.diagonal(&vs, [&x], |x| layer.forward(x)).unwrap(),
        bernoulli.diagonal(&vs, [&x], |x| layer.forward(x).squeeze_dim(1)).unwrap(),
        Fisher::exact().diagonal(&vs, [&x], two).unwrap(),
    ] {
        all_close(&values(f.get("weight").unwrap()), &weight, 1e-14);
        all_close(&values(f.get("bias").unwrap()), &bias, 1e-14);
        assert_eq!((f.examples(), f.labels()), (9, Labels::Exact));
    }
}

#[test]
fn evaluation_changes_nothing() {
    let case = perceptron(3);
    let y = Tensor::from_slice(&[0i64, 1, 2, 1, 0, 2, 2]);
    (case.net)(&case.x).cross_entropy_for_logits(&y).backward();
    let all =
        || -> Vec<_> { case.vs.trainable_variables().iter().flat_map(|w| [values(w), values(&w.grad())]).collect() };
    let before = all();
    for fisher in [Fisher::exact(), Fisher::sampled(3), Fisher::observed()] {
        fisher.diagonal(&case.vs, [(&case.x, &y)], &case.net).unwrap();
        // The same from within no_grad, which is still in force afterwards.
        tch::no_grad(|| {
            fisher.diagonal(&case.vs, [(&case.x, &y)], &case.net).unwrap();
            assert!(!(case.net)(&case.x).requires_grad());
        });
    }
    assert_eq!(before, all());
}

/// Laplace's approximation is N(θ, (F + P₀)⁻¹), and a copy.
#[test]
fn laplace_adds_the_prior_precision_once() {
    let case = perceptron(3);
    let f = Fisher::exact().diagonal(&case.vs, [&case.x], &case.net).unwrap();
    let q = f.laplace(Prior::isotropic(2.5)).unwrap();
    let next = f.laplace(&q).unwrap();
    for (name, w) in case.vs.variables() {
        let fisher = values(f.get(&name).unwrap());
        assert_eq!(values(&q.mean(&name).unwrap()), values(&w));
        let sum = |times: f64| fisher.iter().map(|f| times * f + 2.5).collect::<Vec<_>>();
        all_close(&values(&q.precision(&name).unwrap()), &sum(1.0), 1e-14);
        all_close(&values(&next.precision(&name).unwrap()), &sum(2.0), 1e-14);
    }
    let _ = tch::no_grad(|| case.vs.trainable_variables()[0].fill_(9.0));
    assert!(largest(&q.mean("first.bias").unwrap()) < 1.0);

    // A prior that knows one layer only; N = 7 examples.
    let first = q.select(|name| name.starts_with("first")).unwrap();
    let e = f.laplace(&first).unwrap_err().to_string();
    assert!(e.contains("second") && e.contains("elsewhere"), "{e}");
    let q = f.laplace(Prior::from(&first).elsewhere(0.5)).unwrap();
    let expected: Vec<f64> = values(f.get("second.bias").unwrap()).iter().map(|f| f + 3.5).collect();
    all_close(&values(&q.precision("second.bias").unwrap()), &expected, 1e-14);
    let e = f.laplace(Prior::isotropic(-1.0)).unwrap_err().to_string();
    assert!(e.contains("prior precision"), "{e}");
}

/// Each of n draws is unbiased: |mean - F| < 4.5 standard errors for each of 31 weights (2e-4 for a right sampler), the
/// spread of the n-sample estimate is that of one over √n, and `samples(n)` is the mean of n estimates of its own.
#[test]
fn monte_carlo_converges_to_the_exact_diagonal() {
    let case = perceptron(3);
    for likelihood in [Likelihood::Categorical, Likelihood::Bernoulli, GAUSSIAN] {
        let exact = diagonal(&case, &Fisher::exact().likelihood(likelihood), 100);
        let estimates = |samples, seeds: std::ops::Range<u64>| -> Vec<Vec<f64>> {
            let of = |seed| Fisher::sampled(seed).samples(samples).likelihood(likelihood);
            seeds.map(|seed| diagonal(&case, &of(seed), 100)).collect()
        };
        let spread = |draws: &[Vec<f64>]| {
            let mut variance = 0.0;
            for (i, expected) in exact.iter().enumerate() {
                let (mean, error) = mean_and_error(&draws.iter().map(|d| d[i]).collect::<Vec<_>>());
                close(mean, *expected, 4.5 * error + 1e-12);
                variance += error.powi(2) * draws.len() as f64;
            }
            variance
        };
        let (one, many) = (spread(&estimates(1, 0..400)), spread(&estimates(16, 1000..1400)));
        // Variances from 400 draws are known within 7 % (one standard error, were they normal): 4 errors of a ratio of two.
        assert!((one / many / 16.0 - 1.0).abs() < 0.4, "{}", one / many);
    }
}

#[test]
fn monte_carlo_labels_depend_on_the_seed_and_the_example_alone() {
    for likelihood in [Likelihood::Categorical, Likelihood::Bernoulli, GAUSSIAN] {
        let case = perceptron(3);
        let of = |seed, size| diagonal(&case, &Fisher::sampled(seed).samples(2).likelihood(likelihood), size);
        let whole = of(5, 100);
        for size in [1, 2, 3] {
            all_close(&of(5, size), &whole, 1e-13);
        }
        assert!(of(6, 100) != whole);
        // Two examples that are the same have labels of their own.
        let twin = Case { x: case.x.narrow(0, 0, 1).expand([7, 3], false).copy(), ..perceptron(3) };
        let each = |i: i64| {
            let one = Fisher::sampled(5).likelihood(likelihood);
            Tensor::from_slice(&flat(&one.diagonal(&twin.vs, twin.x.narrow(0, 0, i).split(1, 0), &twin.net).unwrap()))
        };
        let increments: Vec<Tensor> = (1..7).map(|i| each(i + 1) - each(i)).collect();
        assert!(increments.iter().any(|d| largest(&(d - &increments[0])) > 1e-3), "{likelihood:?}");
    }
}

/// Adding a constant to all logits changes no probability: no curvature that way, whatever the estimator.
#[test]
fn the_softmax_has_no_curvature_along_a_common_shift() {
    let case = perceptron(3);
    let shift = Tensor::from(0.3f64).set_requires_grad(true);
    let params = || Params::named([("shift", shift.shallow_clone())]).unwrap();
    let y = Tensor::from_slice(&[0i64, 1, 2, 1, 0, 2, 2]);
    for fisher in [Fisher::exact(), Fisher::sampled(1), Fisher::observed()] {
        let f = fisher.diagonal(params(), [(&case.x, &y)], |x| (case.net)(x) + &shift).unwrap();
        assert!(values(f.get("shift").unwrap())[0] < 1e-28);
        // Along one logit there is.
        let one = |x: &Tensor| (case.net)(x) + &shift * Tensor::from_slice(&[1.0, 0.0, 0.0]);
        let f = fisher.diagonal(params(), [(&case.x, &y)], one).unwrap();
        assert!(values(f.get("shift").unwrap())[0] > 1e-3);
    }
}

/// y = 3 + noise of variance 4 where the model says θx with unit noise: the empirical Fisher is Σ xᵢ²rᵢ² and not Σ xᵢ².
#[test]
fn the_empirical_fisher_is_another_number() {
    let theta = Tensor::from_slice(&[0.5f64]).set_requires_grad(true);
    let params = || Params::named([("θ", theta.shallow_clone())]).unwrap();
    let x = wave(&[50], 0.3);
    let y: Tensor = wave(&[50], 2.0) * 2.0 * 2f64.sqrt() + 3.0;
    let of = |fisher: Fisher| {
        let f = fisher.likelihood(GAUSSIAN).diagonal(params(), [(&x, &y)], |x| x * &theta).unwrap();
        values(f.get("θ").unwrap())[0]
    };
    let (exact, empirical) = (of(Fisher::exact()), of(Fisher::observed()));
    close(exact, values(&x.square().sum(Kind::Double))[0], 1e-12);
    let r: Tensor = &x * 0.5 - &y;
    close(empirical, values(&(x.square() * r.square()).sum(Kind::Double))[0], 1e-11);
    assert!(empirical > 5.0 * exact, "{empirical} {exact}");
    // With one output, a random sign is exact.
    close(of(Fisher::sampled(0)), exact, 1e-12);
    // Fitted data have none of the one and all of the other.
    let fitted = Fisher::observed().likelihood(GAUSSIAN);
    let f = fitted.diagonal(params(), [(&x, &(&x * 0.5))], |x| x * &theta).unwrap();
    assert!(values(f.get("θ").unwrap())[0] < 1e-28);
}

/// The labels of the data through autograd, for every likelihood.
#[test]
fn the_empirical_fisher_is_the_sum_of_squared_gradients_of_the_losses() {
    let case = perceptron(3);
    let classes = Tensor::from_slice(&[0i64, 1, 2, 1, 0, 2, 2]);
    let numbers: Tensor = (wave(&[7, 3], 5.0) + 1.0) * 0.5;
    let z = (case.net)(&case.x);
    let gaussian = Likelihood::Gaussian { variance: 4.0 };
    for (likelihood, y, losses) in [
        (Likelihood::Categorical, &classes, nn::cross_entropy(&z, &classes)),
        (Likelihood::Bernoulli, &numbers, nn::binary_cross_entropy(&z, &numbers)),
        (gaussian, &numbers, nn::squared_error(&z, &numbers, 4.0)),
    ] {
        let j = jacobian(&case.vs, &losses.unwrap());
        let expected = values(&j.square().sum_dim_intlist([0, 1].as_slice(), false, None::<Kind>));
        for size in [2, 7] {
            let batches = case.x.split(size, 0).into_iter().zip(y.split(size, 0));
            let f = Fisher::observed().likelihood(likelihood).diagonal(&case.vs, batches, &case.net).unwrap();
            all_close(&flat(&f), &expected, 1e-13);
        }
    }
}

/// The mistake of several libraries: the squared gradient of a batch's mean loss, averaged over batches, has the expectation
/// (1/B) E[g²] + (1-1/B) (E g)² over draws with replacement. All batches of two out of N give it exactly.
#[test]
fn the_squared_gradient_of_a_batch_is_not_what_is_computed() {
    let case = perceptron(3);
    let y = Tensor::from_slice(&[0i64, 1, 2, 1, 0, 2, 2]);
    let n = 7.0;
    let losses = nn::cross_entropy(&(case.net)(&case.x), &y).unwrap();
    let g = jacobian(&case.vs, &losses).squeeze_dim(1);
    let pairs: Tensor = (g.unsqueeze(0) + g.unsqueeze(1)) * 0.5;
    let batched = pairs.square().mean_dim([0, 1].as_slice(), false, None::<Kind>);
    let mean = |t: &Tensor| t.mean_dim(0, false, None::<Kind>);
    let (squares, square) = (mean(&g.square()), mean(&g).square());
    all_close(&values(&batched), &values(&(&squares * 0.5 + square * 0.5)), 1e-15);
    // Ours is N E[g²] for any batches: twice as much as the batches of two are worth where E g = 0.
    let f =
        Fisher::observed().diagonal(&case.vs, case.x.split(2, 0).into_iter().zip(y.split(2, 0)), &case.net).unwrap();
    all_close(&flat(&f), &values(&(squares * n)), 1e-13);
    assert!(largest(&(batched * n - Tensor::from_slice(&flat(&f)))) > 0.1);
}

#[test]
fn the_active_labels_are_part_of_the_model() {
    let case = perceptron(5);
    let all = diagonal(&case, &Fisher::exact(), 3);
    let two = diagonal(&case, &Fisher::exact().active(&[3, 1]), 3);
    let columns = Tensor::from_slice(&[3i64, 1]);
    let net = |x: &Tensor| (case.net)(x).index_select(1, &columns);
    let expected = gauss_newton(&case.vs, &net(&case.x), Likelihood::Categorical).diagonal(0, 0, 1);
    all_close(&two, &values(&expected), 1e-13);
    assert!(largest(&(Tensor::from_slice(&all) - Tensor::from_slice(&two))) > 0.1);
    // The order of the labels does not count; heads that are not active have no curvature.
    all_close(&two, &diagonal(&case, &Fisher::exact().active(&[1, 3]), 7), 1e-13);
    let f = Fisher::exact().active(&[3, 1]).diagonal(&case.vs, [&case.x], &case.net).unwrap();
    let bias = values(f.get("second.bias").unwrap());
    assert!(bias[0] == 0.0 && bias[2] == 0.0 && bias[4] == 0.0 && bias[1] > 0.0);
    close(bias[1], bias[3], 1e-14);
    assert_eq!(f.active(), Some(&[3, 1][..]));

    // Targets keep their numbers.
    let y = Tensor::from_slice(&[3i64, 1, 3, 3, 1, 1, 3]);
    let f = Fisher::observed().active(&[3, 1]).diagonal(&case.vs, [(&case.x, &y)], &case.net).unwrap();
    let losses = nn::cross_entropy(&net(&case.x), &y.eq(1).to_kind(Kind::Int64)).unwrap();
    let expected = jacobian(&case.vs, &losses).square().sum_dim_intlist([0, 1].as_slice(), false, None::<Kind>);
    all_close(&flat(&f), &values(&expected), 1e-13);
}

#[test]
fn what_cannot_be_is_refused_by_name() {
    let case = perceptron(3);
    let before: Vec<_> = case.vs.trainable_variables().iter().map(values).collect();
    let y = Tensor::from_slice(&[0i64, 1, 2, 1, 0, 2, 2]);
    let message = |fisher: Fisher, batch: Batch| {
        let e = fisher.diagonal(&case.vs, [batch], &case.net).unwrap_err();
        assert!(matches!(e, Error::Curvature(_) | Error::Likelihood(_) | Error::HyperParameter { .. }), "{e:?}");
        e.to_string()
    };
    let says = |fisher, batch: Batch, what: &str| {
        let e = message(fisher, batch);
        assert!(e.contains(what), "{e}");
    };
    let x = || Batch::from(&case.x);
    says(Fisher::exact(), case.x.narrow(0, 0, 0).into(), "no examples");
    let none = Fisher::exact().diagonal(&case.vs, Vec::<Tensor>::new(), &case.net).unwrap_err();
    assert!(none.to_string().contains("no examples"));
    says(Fisher::observed(), x(), "no targets");
    says(Fisher::observed().active(&[0, 1]), (&case.x, &y).into(), "class 2");
    says(Fisher::observed(), (&case.x, &(&y + 1)).into(), "class 3");
    says(Fisher::observed(), (&case.x, &y.narrow(0, 0, 3)).into(), "Int64 [7]");
    says(Fisher::observed().likelihood(GAUSSIAN), (&case.x, &y).into(), "[7, 3]");
    says(Fisher::exact().active(&[1, 7]), x(), "label 7");
    says(Fisher::exact().active(&[1]), x(), "`active`");
    says(Fisher::exact().active(&[1, 1]), x(), "`active`");
    says(Fisher::exact().active(&[1, 2]).likelihood(GAUSSIAN), x(), "`active`");
    says(Fisher::sampled(0).samples(0), x(), "`samples`");
    says(Fisher::exact().likelihood(Likelihood::Gaussian { variance: 0.0 }), x(), "`variance`");
    says(Fisher::exact(), (&case.x * f64::NAN).into(), "not finite");
    let refused =
        |net: &dyn Fn(&Tensor) -> Tensor| Fisher::exact().diagonal(&case.vs, [&case.x], net).unwrap_err().to_string();
    assert!(refused(&|x| (case.net)(x).detach()).contains("no graph"));
    assert!(refused(&|x| (case.net)(x).narrow(1, 0, 1)).contains("Likelihood::Bernoulli"));
    assert!(refused(&|x| (case.net)(x).sum(Kind::Double)).contains("[B, C]"));
    let fails = |_: &Tensor| Err::<Tensor, _>("on purpose");
    let e = Fisher::exact().diagonal(&case.vs, [&case.x], fails).unwrap_err();
    assert!(matches!(e, Error::Closure(_)), "{e}");
    assert_eq!(before, case.vs.trainable_variables().iter().map(values).collect::<Vec<_>>());

    // Finite outputs of weights whose squared gradients overflow.
    let w = Tensor::from_slice(&[1e-200f64]).set_requires_grad(true);
    let params = Params::named([("w", w.shallow_clone())]).unwrap();
    let huge = Tensor::from_slice(&[1e200f64]);
    let e = Fisher::exact().likelihood(GAUSSIAN).diagonal(params, [&huge], |x| x * &w).unwrap_err();
    assert!(e.to_string().contains("`w`") && e.to_string().contains("not finite"), "{e}");
}

#[test]
fn batch_normalization_in_training_mode_is_refused_and_undone() {
    let vs = store(|_| {});
    let norm = tch::nn::batch_norm1d(vs.root() / "norm", 3, tch::nn::BatchNormConfig::default());
    let mut vs = vs;
    vs.set_kind(Kind::Double);
    let x: Tensor = wave(&[6, 3], 0.4) + 2.0;
    let statistics = || values(&norm.running_mean);
    let before = statistics();
    let run = |train| Fisher::exact().diagonal(&vs, [&x], |x| x.apply_t(&norm, train));
    let e = run(true).unwrap_err();
    assert!(matches!(e, Error::PerExample(_)) && e.to_string().contains("norm.running_"), "{e}");
    assert_eq!(before, statistics());
    let expected = gauss_newton(&vs, &x.apply_t(&norm, false), Likelihood::Categorical).diagonal(0, 0, 1);
    all_close(&flat(&run(false).unwrap()), &values(&expected), 1e-13);
}

/// f32, and bf16 weights with sums in f32; frozen parameters are left out.
#[test]
fn kinds_and_frozen_parameters() {
    let mut case = perceptron(3);
    let exact = diagonal(&case, &Fisher::exact(), 3);
    for (kind, tolerance) in [(Kind::Float, 1e-5), (Kind::BFloat16, 0.05)] {
        case.vs.set_kind(kind);
        case.x = case.x.to_kind(kind);
        let f = Fisher::exact().diagonal(&case.vs, case.x.split(3, 0), &case.net).unwrap();
        assert!(f.names().all(|name| f.get(name).unwrap().kind() == Kind::Float));
        all_close(&flat(&f), &exact, tolerance * exact.iter().copied().fold(0.0, f64::max));
        assert_eq!(f.laplace(Prior::isotropic(1.0)).unwrap().mean("first.bias").unwrap().kind(), Kind::Float);
    }
    case.vs.set_kind(Kind::Double);
    let _ = case.vs.variables()["first.weight"].set_requires_grad(false);
    let f = Fisher::exact().diagonal(&case.vs, [case.x.to_kind(Kind::Double)], &case.net).unwrap();
    assert_eq!(f.names().count(), 3);
    assert!(f.get("first.weight").is_none());
}

/// diag(F) is the diagonal, for any estimator and batch size.
#[test]
fn the_full_matrix_is_the_one_written_out() {
    for case in cases() {
        let y = Tensor::arange(case.x.size()[0], (Kind::Int64, Device::Cpu)).remainder(3);
        let f = Fisher::exact().full(&case.vs, [&case.x], &case.net).unwrap();
        let expected = gauss_newton(&case.vs, &(case.net)(&case.x), Likelihood::Categorical);
        let scale = largest(&expected);
        assert!(largest(&(f.matrix() - &expected)) < 1e-13 * scale, "{}", case.name);
        for fisher in [Fisher::exact(), Fisher::sampled(4).samples(2), Fisher::observed()] {
            let batches = || case.x.split(2, 0).into_iter().zip(y.split(2, 0));
            let full = fisher.full(&case.vs, batches(), &case.net).unwrap();
            let diagonal = fisher.diagonal(&case.vs, batches(), &case.net).unwrap();
            all_close(&values(&full.matrix().diagonal(0, 0, 1)), &flat(&diagonal), 1e-13 * scale);
            assert_eq!((full.examples(), full.labels()), (case.x.size()[0] as u64, diagonal.labels()));
            assert!(full.names().eq(diagonal.names()));
        }
        let e = Fisher::exact().max_weights(5).full(&case.vs, [&case.x], &case.net).unwrap_err();
        assert!(matches!(e, Error::Curvature(_)) && e.to_string().contains("max_weights"), "{e}");
    }
}

/// y = Xw + noise of variance σ²: the Laplace approximation at the ridge solution is the posterior, with precision
/// XᵀX/σ² + P₀, all at once or in two parts, in either order, with the first's posterior as the second's prior.
#[test]
fn linear_regression_is_exact_at_once_and_in_parts() {
    let (x, y) = (wave(&[12, 3], 0.3), wave(&[12], 1.9) * 2.0);
    let (variance, p0) = (0.25, 0.7);
    let eye = Tensor::eye(3, (Kind::Double, Device::Cpu));
    let precision = x.tr().matmul(&x) / variance + &eye * p0;
    let mean = precision.inverse().matmul(&(x.tr().mv(&y) / variance).unsqueeze(1)).squeeze_dim(1);
    let w = Tensor::zeros([3], (Kind::Double, Device::Cpu)).set_requires_grad(true);
    let set = |value: &Tensor| tch::no_grad(|| w.shallow_clone().copy_(value));
    let fisher = |rows: &Tensor| {
        let params = Params::named([("w", w.shallow_clone())]).unwrap();
        let gaussian = Fisher::exact().likelihood(Likelihood::Gaussian { variance });
        gaussian.full(params, rows.split(5, 0), |x| x.mv(&w)).unwrap()
    };
    set(&mean);
    let q = fisher(&x).laplace(Prior::isotropic(p0)).unwrap();
    assert!(largest(&(q.precision_matrix() - &precision)) < 1e-12 && largest(&(q.mean_vector() - &mean)) == 0.0);
    // The second part's mode, with the first part's posterior as the prior.
    for parts in [[0..4, 4..12], [4..12, 0..4]] {
        let rows = |t: &Tensor, k: usize| t.narrow(0, parts[k].start, parts[k].end - parts[k].start);
        let mode = |p: &Tensor, m: &Tensor, k: usize| {
            let x = rows(&x, k);
            let full = x.tr().matmul(&x) / variance + p;
            let rhs = x.tr().mv(&rows(&y, k)) / variance + p.mv(m);
            full.inverse().mv(&rhs)
        };
        set(&mode(&(&eye * p0), &Tensor::zeros([3], (Kind::Double, Device::Cpu)), 0));
        let first = fisher(&rows(&x, 0)).laplace(Prior::isotropic(p0)).unwrap();
        set(&mode(first.precision_matrix(), &first.mean_vector(), 1));
        let second = fisher(&rows(&x, 1)).laplace_after(&first).unwrap();
        assert!(largest(&(second.precision_matrix() - &precision)) < 1e-11);
        assert!(largest(&(second.mean_vector() - &mean)) < 1e-12);
    }
    let other = DiagonalGaussian::new([("w", mean.copy(), mean.ones_like())]).unwrap();
    assert!(largest(&(fisher(&x).laplace(&other).unwrap().precision_matrix() - (precision - &eye * p0 + eye))) < 1e-12);
    let stranger = tch_blr::FullGaussian::new([("v", mean.copy())], q.precision_matrix()).unwrap();
    assert!(fisher(&x).laplace_after(&stranger).unwrap_err().to_string().contains("`w`"));
}

/// The weights of one layer, `[W b]` row by row, among all weights.
fn places(vs: &VarStore, weight: &str, bias: Option<&str>) -> Tensor {
    let mut start = 0;
    let mut of = std::collections::HashMap::new();
    for w in vs.trainable_variables() {
        let (name, _) = vs.variables().into_iter().find(|(_, t)| t.is_set_to(&w)).unwrap();
        let n = w.numel() as i64;
        of.insert(name, Tensor::arange_start(start, start + n, (Kind::Int64, Device::Cpu)).reshape(w.size()));
        start += n;
    }
    let w = of[weight].reshape([of[weight].size()[0], -1]);
    let all = bias.map_or_else(|| w.copy(), |b| Tensor::cat(&[&w, &of[b].unsqueeze(1)], 1));
    all.flatten(0, -1)
}

/// With one example, G ⊗ A is the layer's block of the full matrix; without a correlation between a and g it is on average.
#[test]
fn the_kronecker_factors_of_one_example_are_the_full_block() {
    for likelihood in [Likelihood::Categorical, Likelihood::Bernoulli, Likelihood::Gaussian { variance: 4.0 }] {
        let case = perceptron(3);
        let one = case.x.narrow(0, 2, 1);
        let fisher = Fisher::exact().likelihood(likelihood);
        let f = fisher.kronecker(&case.vs, [&one], &case.net).unwrap();
        let full = fisher.full(&case.vs, [&one], &case.net).unwrap();
        assert_eq!(f.layers().len(), 2);
        for layer in f.layers() {
            let at = places(&case.vs, &layer.weight, layer.bias.as_deref());
            let block = full.matrix().index_select(0, &at).index_select(1, &at);
            assert!(largest(&block) > 1e-4 && largest(&(layer.outputs.kron(&layer.inputs) - block)) < 1e-15);
        }
    }
}

/// A = (1/N) Σ aaᵀ and G = Σ ggᵀ, whatever the batches are; for two layers, and a convolution whose positions count as
/// examples.
#[test]
fn factors_are_a_mean_of_inputs_and_a_sum_of_gradients() {
    let case = perceptron(3);
    for size in [1, 3, 7] {
        let f = Fisher::exact().kronecker(&case.vs, case.x.split(size, 0), &case.net).unwrap();
        let [first, second] = f.layers() else { unreachable!() };
        let a = Tensor::cat(&[&case.x, &Tensor::ones([7, 1], (Kind::Double, Device::Cpu))], 1);
        assert!(largest(&(&first.inputs - a.tr().matmul(&a) / 7.0)) < 1e-15);
        // The last layer's outputs are the logits themselves.
        let expected = lambda(&(case.net)(&case.x), Likelihood::Categorical).sum_dim_intlist(0, false, None::<Kind>);
        assert!(largest(&(&second.outputs - expected)) < 1e-14);
    }

    // One convolution and the mean over its 9 positions: every position has the gradient s/9.
    let mut conv = None;
    let config = ConvConfig { padding: 1, ..Default::default() };
    let vs = store(|vs| conv = Some(nn::conv2d(vs.root(), 2, 3, 3, config)));
    let conv = conv.unwrap();
    let x = wave(&[4, 2, 3, 3], 0.8);
    let net = |x: &Tensor| conv.forward(x).mean_dim([2, 3].as_slice(), false, None::<Kind>);
    let f = Fisher::exact().kronecker(&vs, x.split(3, 0), net).unwrap();
    let [layer] = f.layers() else { unreachable!() };
    let patches = x.im2col([3, 3], [1, 1], [1, 1], [1, 1]);
    let ones = Tensor::ones([4, 1, 9], (Kind::Double, Device::Cpu));
    let a = Tensor::cat(&[&patches, &ones], 1).transpose(1, 2).flatten(0, 1);
    assert!(largest(&(&layer.inputs - a.tr().matmul(&a) / 36.0)) < 1e-15);
    let expected = lambda(&net(&x), Likelihood::Categorical).sum_dim_intlist(0, false, None::<Kind>) / 9.0;
    assert!(largest(&(&layer.outputs - expected)) < 1e-15);
}

/// The posterior of every weight is (G ⊗ A + P₀)⁻¹ with A without the appended 1, that of its bias (G + P₀)⁻¹.
#[test]
fn laplace_with_kronecker_factors() {
    let case = perceptron(3);
    let f = Fisher::exact().kronecker(&case.vs, case.x.split(4, 0), &case.net).unwrap();
    let q = f.laplace(Prior::isotropic(0.3)).unwrap();
    let full = q.full().unwrap();
    for layer in f.layers() {
        let width = layer.inputs.size()[0] - 1;
        let a = layer.inputs.narrow(0, 0, width).narrow(1, 0, width);
        let bias = layer.bias.as_deref().unwrap();
        for (name, expected) in [(layer.weight.as_str(), layer.outputs.kron(&a)), (bias, layer.outputs.copy())] {
            let at = places(&case.vs, name, None);
            let block = full.precision_matrix().index_select(0, &at).index_select(1, &at);
            let prior = Tensor::eye(expected.size()[0], (Kind::Double, Device::Cpu)) * 0.3;
            assert!(largest(&(block - expected - prior)) < 1e-13, "{name}");
            assert_eq!(values(&q.mean(name).unwrap()), values(&case.vs.variables()[name]));
        }
    }
    let diagonal = Fisher::exact().diagonal(&case.vs, [&case.x], &case.net).unwrap();
    let e = f.laplace(diagonal.laplace(Prior::isotropic(1.0)).unwrap()).unwrap_err().to_string();
    assert!(e.contains("Prior::isotropic"), "{e}");
    // In f32, with weights of no influence.
    let mut vs = VarStore::new(Device::Cpu);
    let [used, unused] = ["used", "unused"].map(|n| linear(vs.root() / n, 20, 5));
    vs.set_kind(Kind::Float);
    let x = wave(&[40, 20], 0.1).to_kind(Kind::Float);
    let f = Fisher::exact().kronecker(&vs, x.split(7, 0), |x| used.forward(x)).unwrap();
    let q = f.laplace(Prior::isotropic(2.0)).unwrap();
    assert_eq!(values(&q.variance("unused.weight").unwrap()), vec![0.5; 100]);
    assert!(values(&q.variance("used.weight").unwrap()).iter().all(|v| *v < 0.5));
    drop(unused);
    // Without any, a prior is needed.
    assert!(f.laplace(Prior::isotropic(0.0)).unwrap_err().to_string().contains("used."));
}

/// What has no factors has its exact diagonal; weights are never left out.
#[test]
fn parameters_without_factors_have_their_diagonal() {
    for case in cases() {
        let f = Fisher::exact().kronecker(&case.vs, case.x.split(3, 0), &case.net).unwrap();
        let d = Fisher::exact().diagonal(&case.vs, [&case.x], &case.net).unwrap();
        let with_factors: Vec<&str> =
            f.layers().iter().flat_map(|l| [Some(l.weight.as_str()), l.bias.as_deref()]).flatten().collect();
        for name in f.names() {
            assert_eq!(f.diagonal(name).is_none(), with_factors.contains(&name), "{} {name}", case.name);
            if let Some(found) = f.diagonal(name) {
                all_close(&values(found), &values(d.get(name).unwrap()), 1e-13);
            }
        }
        let expected: &[&str] = match case.name {
            "perceptron" => &["first.weight", "first.bias", "second.weight", "second.bias"],
            // c2 has groups.
            "convolutions" => &["c1.weight", "c1.bias", "out.weight", "out.bias"],
            "tied, positions, unused" => &["other head.weight", "other head.bias"],
            _ => &[],
        };
        let sorted = |mut names: Vec<&str>| {
            names.sort_unstable();
            names.join(" ")
        };
        assert_eq!(sorted(with_factors), sorted(expected.to_vec()), "{}", case.name);
        f.laplace(Prior::isotropic(1.0)).unwrap();
    }
}

/// A weight that a layer uses, and the model by hand too, for more examples than a look at the model takes.
#[test]
fn a_weight_used_by_a_layer_and_by_hand() {
    let mut layers = Vec::new();
    let vs = store(|vs| layers.extend(["a", "b"].map(|n| linear(vs.root() / n, 3, 3))));
    let x = wave(&[40, 3], 0.2);
    for by_hand in [0.0, 0.1] {
        let net = |x: &Tensor| {
            let h = layers[0].forward(x).tanh();
            layers[1].forward(&h) + by_hand * h.matmul(&layers[1].ws.tr()).sin()
        };
        let expected = values(&gauss_newton(&vs, &net(&x), Likelihood::Categorical).diagonal(0, 0, 1));
        for size in [7, 18, 40] {
            let f = Fisher::exact().diagonal(&vs, x.split(size, 0), net).unwrap();
            all_close(&flat(&f), &expected, 1e-12);
        }
    }
}

/// A weight that a later batch uses by hand has an exact diagonal all the same, and no factors.
#[test]
fn a_model_that_changes_between_batches() {
    let mut layer = None;
    let vs = store(|vs| layer = Some(linear(vs.root() / "l", 3, 3)));
    let layer = layer.unwrap();
    let x = wave(&[6, 3], 0.2);
    // The last batch has two rows.
    let net = |x: &Tensor| {
        if x.size()[0] == 4 { layer.forward(x) } else { x.matmul(&layer.ws.tr()) + layer.bs.as_ref().unwrap() }
    };
    let f = Fisher::exact().diagonal(&vs, x.split(4, 0), net).unwrap();
    let expected = Fisher::exact().diagonal(&vs, [&x], |x| layer.forward(x)).unwrap();
    all_close(&flat(&f), &flat(&expected), 1e-14);
    let e = Fisher::exact().kronecker(&vs, x.split(4, 0), net).unwrap_err();
    assert!(matches!(e, Error::Parameter { .. }) && e.to_string().contains("another way"), "{e}");
}

/// J S⁻¹ Jᵀ of explicit Jacobians, and its diagonal.
#[test]
fn variances_of_the_outputs_are_those_of_explicit_jacobians() {
    for case in cases() {
        let net = || (case.net)(&case.x);
        let named: Vec<_> = Params::from(&case.vs).names().map(str::to_owned).collect();
        let entries = named.iter().enumerate().map(|(i, name)| {
            let mean = case.vs.variables()[name].shallow_clone();
            (name.clone(), mean.copy(), wave(&mean.size(), 0.7 * i as f64) + 1.5)
        });
        let q = DiagonalGaussian::new(entries).unwrap();
        let check = |q: &DiagonalGaussian| {
            let j = jacobian(&case.vs, &net());
            let v = named.iter().map(|name| {
                let zeros = || case.vs.variables()[name].detach().zeros_like();
                q.variance(name).unwrap_or_else(zeros).reshape([-1])
            });
            let v = Tensor::cat(&v.collect::<Vec<_>>(), 0);
            let expected = (&j * &v).matmul(&j.transpose(1, 2));
            let scale = largest(&expected);
            assert!(scale > 1e-3);
            let covariance = q.output_covariance(&case.vs, net).unwrap();
            assert!(largest(&(covariance - &expected)) < 1e-13 * scale, "{}", case.name);
            let variance = q.output_variance(&case.vs, net).unwrap();
            assert!(largest(&(&variance - expected.diagonal(0, 1, 2))) < 1e-13 * scale, "{}", case.name);
            assert!(!variance.requires_grad() && variance.size() == net().size());
        };
        check(&q);
        check(&q.select(|name| name != named[0]).unwrap());
    }
}

/// σ² xᵀx for a linear model; outputs `[B]` have variances `[B]`; what does not fit is refused by name.
#[test]
fn variances_of_the_outputs_of_one_weight_vector_and_of_none() {
    let w = Tensor::from_slice(&[1.0, 2.0]).set_requires_grad(true);
    let params = || Params::named([("w", w.shallow_clone())]).unwrap();
    let x = wave(&[5, 2], 0.2);
    let q = |name: &str, s: [f64; 2]| DiagonalGaussian::new([(name, w.detach(), Tensor::from_slice(&s))]).unwrap();
    let expected = values(&x.square().mv(&Tensor::from_slice(&[0.5, 0.25])));
    let variance = q("w", [2.0, 4.0]).output_variance(params(), || x.mv(&w)).unwrap();
    assert_eq!(variance.size(), [5]);
    all_close(&values(&variance), &expected, 1e-15);
    assert_eq!(q("w", [2.0, 4.0]).output_covariance(params(), || x.mv(&w)).unwrap().size(), [5, 1, 1]);
    assert!(!w.grad().defined());

    let e = q("v", [1.0, 1.0]).output_variance(params(), || x.mv(&w)).unwrap_err().to_string();
    assert!(e.contains("`v`"), "{e}");
    let e = q("w", [1.0, 1.0]).output_variance(params(), || x.mv(&w) * f64::NAN).unwrap_err();
    assert!(matches!(e, Error::Curvature(_) | Error::Likelihood(_)), "{e}");
    let e = q("w", [1e-300, 1.0]).output_variance(params(), || x.mv(&w) * 1e100).unwrap_err();
    assert!(matches!(e, Error::Curvature(_)) && e.to_string().contains("variance"), "{e}");
    let other = Tensor::from_slice(&[1.0]).set_requires_grad(true);
    let _ = w.shallow_clone().set_requires_grad(false);
    let both = Params::named([("w", w.shallow_clone()), ("other", other.shallow_clone())]).unwrap();
    let e = q("w", [1.0, 1.0]).output_variance(both, || x.mv(&w) * &other).unwrap_err().to_string();
    assert!(e.contains("`w`") && e.contains("frozen"), "{e}");
}

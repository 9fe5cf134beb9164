//! Gauss-Newton curvature is that of the loss that the closure returns, whatever it makes of the losses of `nn`.

use support::{F64, all_close, chirp, close, mean_and_error, params, state, values, weight};
use tch::nn::{LinearConfig, Module, VarStore};
use tch::{Device, Kind, Tensor};
use tch_blr::{Error, Expectation, Labels, NoisyKfac, Philox, Statistic, Von, nn};

/// Outputs of a head for inputs.
type Net<'a> = &'a dyn Fn(&Tensor, &str) -> Tensor;
/// From a net to the loss.
type Closure<'a> = &'a dyn Fn(Net) -> Tensor;
type Named<'a> = (&'static str, Box<dyn Fn(Net) -> Tensor + 'a>);

/// Two heads, of three and two classes, on one hidden layer; or each by itself on the inputs.
struct Model {
    vs: VarStore,
    layers: Vec<nn::Linear>,
    hidden: bool,
}

impl Model {
    fn new(hidden: bool) -> Self {
        let mut vs = VarStore::new(Device::Cpu);
        let width = if hidden { 4 } else { 3 };
        let layers = [("hidden", 3, 4), ("three", width, 3), ("two", width, 2)]
            .map(|(name, from, to)| nn::linear(vs.root() / name, from, to, LinearConfig::default()));
        vs.set_kind(Kind::Double);
        for (i, mut w) in vs.trainable_variables().into_iter().enumerate() {
            let value = chirp(&w.size(), i as f64);
            tch::no_grad(|| w.copy_(&value));
        }
        Model { vs, layers: layers.into(), hidden }
    }

    fn net(&self, x: &Tensor, head: &str) -> Tensor {
        let head = &self.layers[if head == "three" { 1 } else { 2 }];
        if self.hidden { head.forward(&self.layers[0].forward(x).tanh()) } else { head.forward(x) }
    }

    /// diag ∇²L of every variable for the model's linearization at its weights, of which the Gauss-Newton matrix is the
    /// Hessian; for a loss that is linear in those of `nn`.
    fn written_out(&self, closure: Closure) -> Vec<Vec<f64>> {
        let variables = self.vs.trainable_variables();
        let flat = |of: &[Tensor]| {
            let one = |(t, w): (&Tensor, &Tensor)| if t.defined() { t.shallow_clone() } else { w.zeros_like() };
            let all: Vec<_> = of.iter().zip(&variables).map(|x| one(x).reshape([-1])).collect();
            Tensor::cat(&all, 0)
        };
        let at = flat(&variables).detach();
        let moved = at.copy().set_requires_grad(true);
        let linear = |x: &Tensor, head: &str| {
            let z = self.net(x, head);
            let elements = z.reshape([-1]);
            let row = |i| flat(&Tensor::run_backward(&[elements.get(i)], &variables, true, false));
            let jacobian = Tensor::stack(&(0..elements.size()[0]).map(row).collect::<Vec<_>>(), 0);
            z.detach() + jacobian.matmul(&(&moved - &at)).reshape(z.size())
        };
        let loss = closure(&linear);
        let loss = if loss.dim() == 1 { loss.mean(Kind::Double) } else { loss };
        let g = &Tensor::run_backward(&[loss], &[&moved], true, true)[0];
        let second = |i| Tensor::run_backward(&[g.get(i)], &[&moved], true, false)[0].get(i);
        let all = Tensor::stack(&(0..at.size()[0]).map(second).collect::<Vec<_>>(), 0);
        let sizes: Vec<i64> = variables.iter().map(|w| w.numel() as i64).collect();
        all.split_with_sizes(&sizes, 0).iter().map(values).collect()
    }

    /// h of every variable after one step at the mean.
    fn diagonal(&self, labels: Labels, seed: u64, closure: Closure) -> tch_blr::Result<Vec<Vec<f64>>> {
        let rule =
            Von::ogn().ess(10.0).beta2(0.0).hess_init(0.0).hessian(Statistic::Fisher(labels)).noise(Philox { seed });
        let mut opt = rule.build(&self.vs, 0.0)?;
        opt.step(|| closure(&|x, head| self.net(x, head)))?;
        let names: Vec<String> = opt.params().names().map(str::to_owned).collect();
        Ok(names.iter().map(|name| values(&opt.state(name, "hess").unwrap())).collect())
    }

    /// G and A of the weights but that of the head of two classes, after one step at the mean.
    fn factors(&self, labels: Labels, closure: Closure) -> tch_blr::Result<Vec<(String, [Tensor; 2])>> {
        let rule = NoisyKfac::default().labels(labels).expectation(Expectation::Delta).noise(Philox { seed: 1 });
        let mut opt = rule.build(&self.vs, 0.0)?;
        opt.step(|| closure(&|x, head| self.net(x, head)))?;
        let names: Vec<String> =
            opt.params().names().filter(|n| ["hidden.weight", "three.weight"].contains(n)).map(str::to_owned).collect();
        let of = |name: &str| ["row_factor", "column_factor"].map(|state| opt.state(name, state).unwrap().copy());
        Ok(names.into_iter().map(|name| (name.clone(), of(&name))).collect())
    }
}

fn same(found: &[Vec<f64>], expected: &[Vec<f64>], what: &str) {
    assert!(expected.iter().flatten().any(|x| *x > 1e-3), "{what} tests nothing");
    for (a, b) in found.iter().zip(expected) {
        for (a, b) in a.iter().zip(b) {
            assert!((a - b).abs() < 1e-12, "{what}: {a} {b}");
        }
    }
}

struct Data {
    x: Tensor,
    y: Tensor,
    memory: Tensor,
    old: Tensor,
}

/// Six examples, and a memory of as many as half of them.
fn data() -> Data {
    Data {
        x: chirp(&[6, 3], 0.3),
        y: Tensor::from_slice(&[0i64, 1, 2, 1, 0, 2]),
        memory: chirp(&[3, 3], 2.3),
        old: Tensor::from_slice(&[1i64, 1, 2]),
    }
}

fn ce(z: &Tensor, y: &Tensor) -> Tensor {
    nn::cross_entropy(z, y).unwrap()
}

fn mean(t: &Tensor) -> Tensor {
    t.mean(Kind::Double)
}

fn sum(t: &Tensor) -> Tensor {
    t.sum(Kind::Double)
}

/// What closures do with losses, with names.
fn closures(d: &Data) -> Vec<Named<'_>> {
    let whole = |net: Net| ce(&net(&d.x, "three"), &d.y);
    let part = |net: Net, from, n| ce(&net(&d.x.narrow(0, from, n), "three"), &d.y.narrow(0, from, n));
    let of_memory = |net: Net| ce(&net(&d.memory, "three"), &d.old);
    let other = |net: Net| nn::squared_error(&net(&d.memory, "two"), &chirp(&[3, 2], 0.9), 0.5).unwrap();
    let class = Tensor::from_slice(&[0.2, 1.0, 7.0]);
    let w = class.index_select(0, &d.y);
    let mask = Tensor::from_slice(&[1.0, 0.0, 0.0, 1.0, 1.0, 0.0]);
    let kept = Tensor::from_slice(&[5i64, 0, 0, 3]);
    let ignoring = d.y.masked_fill(&mask.eq(0.0), -100);
    vec![
        ("a mean", Box::new(move |net| mean(&whole(net)))),
        ("losses", Box::new(whole)),
        ("half", Box::new(move |net| mean(&whole(net)) * 0.5)),
        ("ten times", Box::new(move |net| mean(&whole(net)) * 10.0)),
        ("a sum", Box::new(move |net| sum(&whole(net)))),
        ("class weights", Box::new(move |net| sum(&(&w * whole(net))) / sum(&w))),
        ("a mask", Box::new(move |net| sum(&(&mask * whole(net))) / 3.0)),
        ("a choice", Box::new(move |net| mean(&whole(net).index_select(0, &kept)))),
        ("labels to ignore", Box::new(move |net| sum(&ce(&net(&d.x, "three"), &ignoring)) / 3.0)),
        ("halves", Box::new(move |net| mean(&Tensor::cat(&[part(net, 0, 3), part(net, 3, 3)], 0)))),
        ("parts", Box::new(move |net| Tensor::cat(&[part(net, 0, 4), part(net, 4, 2)], 0))),
        (
            "outputs in parts",
            Box::new(move |net| {
                let z = [net(&d.x.narrow(0, 0, 4), "three"), net(&d.x.narrow(0, 4, 2), "three")];
                mean(&ce(&Tensor::cat(&z, 0), &d.y))
            }),
        ),
        ("two tasks", Box::new(move |net| mean(&whole(net)) * 0.1 + mean(&other(net)) * 3.0)),
        ("a memory", Box::new(move |net| mean(&whole(net)) + sum(&of_memory(net)) / 17.0)),
        ("a memory of one size", Box::new(move |net| mean(&part(net, 2, 3)) + sum(&of_memory(net)) / 17.0)),
        (
            "again for a log",
            Box::new(move |net| {
                _ = mean(&whole(net)).double_value(&[]);
                let z = net(&d.x, "three");
                _ = tch::no_grad(|| ce(&z, &d.y));
                mean(&whole(net))
            }),
        ),
        (
            "another head for a log",
            Box::new(move |net| {
                _ = mean(&other(net));
                mean(&whole(net))
            }),
        ),
        ("a detached term", Box::new(move |net| mean(&whole(net)) + mean(&of_memory(net)).detach())),
        ("in place", Box::new(move |net| mean(&whole(net).g_mul_scalar_(0.25)))),
        ("twice", Box::new(move |net| mean(&whole(net)) + mean(&whole(net)))),
        (
            "binary",
            Box::new(move |net| {
                let y = Tensor::from_slice(&[0.0, 1.0, 0.3, 1.0, 1.0, 0.0]).reshape([3, 2]);
                sum(&(nn::binary_cross_entropy(&net(&d.memory, "two"), &y).unwrap() * chirp(&[3], 0.0).square()))
            }),
        ),
    ]
}

#[test]
fn whatever_the_closure_makes_of_the_losses() {
    let d = data();
    for hidden in [false, true] {
        let model = Model::new(hidden);
        for (what, closure) in closures(&d) {
            let expected = model.written_out(&*closure);
            same(&model.diagonal(Labels::Exact, 0, &*closure).unwrap(), &expected, what);
        }
    }
}

/// Without a hidden layer that is the Hessian itself.
#[test]
fn the_written_out_matrix_is_the_hessian_of_a_linear_model() {
    let d = data();
    let model = Model::new(false);
    let closure = |net: Net| sum(&(ce(&net(&d.x, "three"), &d.y) * chirp(&[6], 0.4).square()));
    let expected = model.written_out(&closure);
    for (w, expected) in model.vs.trainable_variables().iter().zip(&expected) {
        let g = &Tensor::run_backward(&[closure(&|x, head| model.net(x, head))], &[w], true, true)[0];
        if !g.defined() {
            continue;
        }
        let g = g.reshape([-1]);
        for (i, expected) in expected.iter().enumerate() {
            let row = &Tensor::run_backward(&[g.get(i as i64)], &[w], true, false)[0];
            close(row.reshape([-1]).double_value(&[i as i64]), *expected, 1e-13);
        }
    }
}

/// At 5 standard errors for each of 51 weights of 4 closures (1e-4).
#[test]
fn sampled_labels_estimate_it() {
    let d = data();
    let model = Model::new(true);
    for (what, closure) in closures(&d) {
        if !["class weights", "labels to ignore", "two tasks", "a memory"].contains(&what) {
            continue;
        }
        let expected = model.written_out(&*closure);
        let draws: Vec<_> = (0..300).map(|s| model.diagonal(Labels::Sampled, s, &*closure).unwrap().concat()).collect();
        for (i, expected) in expected.concat().iter().enumerate() {
            let (mean, error) = mean_and_error(&draws.iter().map(|d| d[i]).collect::<Vec<_>>());
            assert!((mean - expected).abs() < 5.0 * error + 1e-12, "{what}: {mean} ± {error}, {expected}");
        }
    }
}

/// A loss for a log costs no draw of labels either.
#[test]
fn what_has_no_part_in_the_loss_changes_no_draw() {
    let d = data();
    let model = Model::new(true);
    let loss = |net: Net| mean(&ce(&net(&d.x, "three"), &d.y));
    let logged = |net: Net| {
        _ = ce(&net(&d.memory, "three"), &d.old);
        _ = nn::squared_error(&net(&d.memory, "two"), &chirp(&[3, 2], 0.9), 0.5);
        loss(net)
    };
    let [a, b] = [&loss as Closure, &logged].map(|closure| model.diagonal(Labels::Sampled, 3, closure).unwrap());
    assert_eq!(a, b);
}

/// L2 terms and losses of tch count for the gradient alone.
#[test]
fn what_is_not_noted_has_no_curvature() {
    let d = data();
    let model = Model::new(true);
    let noted = |net: Net| mean(&ce(&net(&d.x, "three"), &d.y)) * 2.0;
    let mixed = |net: Net| {
        let plain =
            net(&d.memory, "three").cross_entropy_loss(&d.old, None::<&Tensor>, tch::Reduction::Mean, -100, 0.0);
        noted(net) + plain + sum(&model.layers[0].ws.square())
    };
    same(&model.diagonal(Labels::Exact, 0, &mixed).unwrap(), &model.written_out(&noted), "noted");
}

/// Samples and micro-batches are means of what each of them gives; those of losses `[B]` count by their examples.
#[test]
fn micro_batches_and_samples_add_up() {
    let d = data();
    let model = Model::new(false);
    let part = |from, n| ce(&model.net(&d.x.narrow(0, from, n), "three"), &d.y.narrow(0, from, n));
    let rule = Von::ogn().ess(10.0).beta2(0.0).hess_init(0.0).hessian(Statistic::Fisher(Labels::Exact));
    let mut opt = rule.build(&model.vs, 0.0).unwrap();
    opt.accumulate(|| part(0, 4) * 0.5).unwrap();
    opt.accumulate(|| part(4, 1) * 3.0).unwrap();
    opt.step(|| part(5, 1)).unwrap();
    let weights = Tensor::from_slice(&[0.5, 0.5, 0.5, 0.5, 3.0, 1.0]);
    let whole = |net: Net| mean(&(ce(&net(&d.x, "three"), &d.y) * &weights));
    let expected = model.written_out(&whole);
    for (name, expected) in opt.params().names().zip(&expected) {
        all_close(&values(&opt.state(name, "hess").unwrap()), expected, 1e-13);
    }

    // A linear model with a squared error has the same curvature at every sample.
    let w = weight(&[0.5, -0.2]);
    let x = chirp(&[5, 2], 0.3);
    let v = chirp(&[5], 0.9).square();
    let rule = Von::ogn().ess(10.0).beta2(0.0).hess_init(0.0).hessian(Statistic::Fisher(Labels::Exact));
    let rule = rule.expectation(Expectation::MonteCarlo { samples: 3 }).noise(Philox { seed: 2 });
    let mut opt = rule.build(params(&w), 0.0).unwrap();
    opt.step(|| sum(&(nn::squared_error(&x.mv(&w), &chirp(&[5], 0.1), 0.25).unwrap() * &v))).unwrap();
    let expected = (x.square() * v.unsqueeze(1)).sum_dim_intlist(0, false, None::<Kind>) / 0.25;
    all_close(&state(&opt, "hess"), &values(&expected), 1e-13);
}

/// Each closure has the factors of another, and G a multiple of them.
#[test]
fn kronecker_factors_follow_the_weights() {
    let d = data();
    let model = Model::new(true);
    let rows = |at: &[i64], net: Net| {
        let at = Tensor::from_slice(at);
        ce(&net(&d.x.index_select(0, &at), "three"), &d.y.index_select(0, &at))
    };
    let with = |what: &str| closures(&d).into_iter().find(|(name, _)| *name == what).unwrap().1;
    let joined = |net: Net| {
        let (x, y) = (Tensor::cat(&[&d.x, &d.memory], 0), Tensor::cat(&[&d.y, &d.old], 0));
        let w = Tensor::cat(&[Tensor::full([6], 1.0 / 6.0, F64), Tensor::full([3], 1.0 / 17.0, F64)], 0);
        sum(&(ce(&net(&x, "three"), &y) * w))
    };
    let three = |net: Net| mean(&rows(&[0, 3, 4], net));
    let whole = with("a mean");
    let cases: [(&str, Closure, f64); 13] = [
        ("losses", &whole, 1.0),
        ("half", &whole, 0.5),
        ("ten times", &whole, 10.0),
        ("a sum", &whole, 6.0),
        ("a mask", &three, 1.0),
        ("labels to ignore", &three, 1.0),
        ("a choice", &|net| mean(&rows(&[5, 0, 0, 3], net)), 1.0),
        ("halves", &whole, 1.0),
        ("parts", &whole, 1.0),
        ("again for a log", &whole, 1.0),
        ("another head for a log", &whole, 1.0),
        ("a detached term", &whole, 1.0),
        ("a memory", &joined, 1.0),
    ];
    for (what, other, factor) in cases {
        let found = model.factors(Labels::Exact, &*with(what)).unwrap();
        let expected = model.factors(Labels::Exact, other).unwrap();
        for ((name, [g, a]), (_, [g_other, a_other])) in found.iter().zip(&expected) {
            let error = (g - g_other * factor).abs().max().double_value(&[]);
            assert!(error < 1e-13, "{what}, G of {name}: {error}");
            let error = (a - a_other).abs().max().double_value(&[]);
            assert!(error < 1e-13, "{what}, A of {name}: {error}");
        }
    }
    // With drawn labels too: the same draws.
    let half = model.factors(Labels::Sampled, &*with("half")).unwrap();
    for ((_, [g, _]), (_, [g_whole, _])) in half.iter().zip(&model.factors(Labels::Sampled, &whole).unwrap()) {
        all_close(&values(&(g * 2.0)), &values(g_whole), 1e-13);
    }
}

/// G ⊗ A is the Hessian of a weighted squared error, of which ∂²ℓ/∂z² is the same for all examples.
#[test]
fn kronecker_factors_of_weighted_least_squares_are_exact() {
    let mut vs = VarStore::new(Device::Cpu);
    let layer = nn::linear(vs.root(), 3, 2, LinearConfig { bias: false, ..LinearConfig::default() });
    vs.set_kind(Kind::Double);
    let [x, more] = [chirp(&[5, 3], 0.3), chirp(&[4, 3], 1.3)];
    let [v, u] = [chirp(&[5], 0.9).square(), chirp(&[4], 0.4).square()];
    let rule = NoisyKfac::default().labels(Labels::Exact).expectation(Expectation::Delta);
    let mut opt = rule.build(&vs, 0.0).unwrap();
    let loss = |x: &Tensor, v: &Tensor| {
        let z = layer.forward(x);
        sum(&(nn::squared_error(&z, &z.detach().cos(), 0.25).unwrap() * v))
    };
    opt.step(|| loss(&x, &v) + loss(&more, &u)).unwrap();
    let [g, a] = ["row_factor", "column_factor"].map(|name| opt.state("weight", name).unwrap());
    let moment = |x: &Tensor, v: &Tensor| x.tr().matmul(&(x * v.unsqueeze(1)));
    let expected = Tensor::eye(2, F64).kron(&((moment(&x, &v) + moment(&more, &u)) / 0.25));
    all_close(&values(&g.kron(&a)), &values(&expected), 1e-13);
}

/// A step in which all examples are masked has no curvature, and takes nothing away from A.
#[test]
fn no_weights_have_no_curvature() {
    let d = data();
    let model = Model::new(true);
    let none = |net: Net| sum(&(ce(&net(&d.x, "three"), &d.y) * Tensor::zeros([6], F64)));
    assert!(model.diagonal(Labels::Exact, 0, &none).unwrap().concat().iter().all(|h| *h == 0.0));
    let whole = |net: Net| mean(&ce(&net(&d.x, "three"), &d.y));
    let [masked, whole] = [&none as Closure, &whole].map(|closure| model.factors(Labels::Exact, closure).unwrap());
    for ((name, [g, a]), (_, [_, a_whole])) in masked.iter().zip(&whole) {
        assert_eq!(g.abs().max().double_value(&[]), 0.0, "{name}");
        all_close(&values(a), &values(a_whole), 1e-13);
    }
}

#[test]
fn what_has_no_curvature_is_refused() {
    let d = data();
    let model = Model::new(true);
    let before: Vec<_> = model.vs.trainable_variables().iter().map(values).collect();
    let of_memory = |net: Net| mean(&ce(&net(&d.memory, "three"), &d.old));
    let whole = |net: Net| ce(&net(&d.x, "three"), &d.y);
    let subtracted = |net: Net| mean(&whole(net)) - of_memory(net) * 0.1;
    let one = |net: Net| sum(&(whole(net) * Tensor::from_slice(&[1.0, 1.0, 1.0, 1.0, -0.5, 1.0])));
    let detached = |net: Net| mean(&whole(net)).detach() + sum(&net(&d.x, "three").square());
    let cases: [(Closure, &[&str]); 3] = [
        (&subtracted, &["example 0", "call 2", "cross_entropy", "-3.333e-2", "detach"]),
        (&one, &["example 4", "call 1", "-5.000e-1"]),
        (&detached, &["no loss", "cross_entropy", "detach"]),
    ];
    for (closure, words) in cases {
        let factors = |labels| model.factors(labels, closure).map(|_| ());
        for result in [
            model.diagonal(Labels::Exact, 0, closure).map(|_| ()),
            model.diagonal(Labels::Sampled, 0, closure).map(|_| ()),
            factors(Labels::Exact),
            factors(Labels::Sampled),
        ] {
            let e = result.unwrap_err();
            let text = e.to_string();
            assert!(matches!(e, Error::Likelihood(_)) && words.iter().all(|w| text.contains(w)), "{text}");
        }
    }
    assert_eq!(model.vs.trainable_variables().iter().map(values).collect::<Vec<_>>(), before);
}

//! What stands for past data: identities that hold exactly, and what is refused.

use support::{F64, all_close, close, says, values, wave};
use tch::nn::{ConvConfig, LinearConfig, Module, VarStore};
use tch::{Device, Kind, Tensor};
use tch_blr::continual::{
    LabelNoise, Memory, Model, Past, Quadratic, Regularizer, Replay, SoftLabels, SynapticIntelligence,
};
use tch_blr::fisher::{Fisher, KroneckerFisher, LayerFactors};
use tch_blr::nn::Likelihood;
use tch_blr::selection::class_balanced;
use tch_blr::{DiagonalGaussian, FullGaussian, KroneckerGaussian, KroneckerParameter, Newton, Params, Sgd, combine};

fn leaf(value: &Tensor) -> Tensor {
    value.detach().copy().set_requires_grad(true)
}

fn set(w: &Tensor, value: &Tensor) {
    tch::no_grad(|| w.shallow_clone().copy_(value));
}

fn number(t: &Tensor) -> f64 {
    t.double_value(&[])
}

/// Two parameters, `w` `[3, 2]` and `b` `[2]`.
struct Pair {
    w: Tensor,
    b: Tensor,
}

impl Pair {
    fn new(phase: f64) -> Self {
        Pair { w: leaf(&wave(&[3, 2], phase)), b: leaf(&wave(&[2], phase + 1.0)) }
    }

    fn params(&self) -> Params {
        Params::named([("w", self.w.shallow_clone()), ("b", self.b.shallow_clone())]).unwrap()
    }

    fn set(&self, theta: &[f64]) {
        set(&self.w, &Tensor::from_slice(&theta[..6]).reshape([3, 2]));
        set(&self.b, &Tensor::from_slice(&theta[6..]));
    }

    fn flat(&self) -> Vec<f64> {
        [values(&self.w), values(&self.b)].concat()
    }

    fn value(&self, k: &dyn Regularizer) -> f64 {
        number(&self.graph(k))
    }

    fn graph(&self, k: &dyn Regularizer) -> Tensor {
        k.value(&Model { params: &self.params(), forward: &|x| Ok(x.matmul(&self.w) + &self.b) }).unwrap()
    }

    fn gradient(&self, k: &dyn Regularizer) -> Vec<f64> {
        let found = Tensor::run_backward(&[self.graph(k)], &[&self.w, &self.b], false, false);
        let or_zero = |g: &Tensor, n: usize| if g.defined() { values(g) } else { vec![0.0; n] };
        [or_zero(&found[0], 6), or_zero(&found[1], 2)].concat()
    }
}

/// A symmetric positive definite matrix.
fn spd(n: i64, phase: f64) -> Tensor {
    let a = wave(&[n, n], phase);
    a.matmul(&a.tr()) + Tensor::eye(n, F64) * 0.3
}

fn diagonal(phase: f64) -> DiagonalGaussian {
    let entry = |name: &str, shape: &[i64], p| (name.to_owned(), wave(shape, p), wave(shape, p + 2.0).square() + 0.1);
    DiagonalGaussian::new([entry("w", &[3, 2], phase), entry("b", &[2], phase + 0.5)]).unwrap()
}

fn kronecker(phase: f64) -> KroneckerGaussian {
    let factors = |name: &str, shape: &[i64], (r, c)| {
        KroneckerParameter::from_factors(name, wave(shape, phase), &spd(r, phase), &spd(c, phase + 0.4)).unwrap()
    };
    KroneckerGaussian::new([factors("w", &[3, 2], (3, 2)), factors("b", &[2], (1, 2))]).unwrap()
}

fn full(phase: f64) -> FullGaussian {
    FullGaussian::new([("w", wave(&[3, 2], phase)), ("b", wave(&[2], phase + 0.5))], &spd(8, phase)).unwrap()
}

/// S(θ-m), and finite differences of the value, for all three forms.
#[test]
fn a_quadratic_is_the_posterior_without_its_constant() {
    let model = Pair::new(0.7);
    let (d, k, f) = (diagonal(0.1), kronecker(0.2), full(0.3));
    let at = |log_prob: &dyn Fn() -> f64, mean: &dyn Fn()| {
        let (theta, here) = (model.flat(), log_prob());
        mean();
        let top = log_prob();
        model.set(&theta);
        top - here
    };
    let cases = [
        (
            Quadratic::from(&d),
            d.full().unwrap(),
            at(&|| d.log_prob(model.params()).unwrap(), &|| d.copy_mean_to(model.params()).unwrap()),
        ),
        (
            Quadratic::from(&k),
            k.full().unwrap(),
            at(&|| k.log_prob(model.params()).unwrap(), &|| k.copy_mean_to(model.params()).unwrap()),
        ),
        (
            Quadratic::from(&f),
            combine(&[(1.0, &f)]).unwrap(),
            at(&|| f.log_prob(model.params()).unwrap(), &|| f.copy_mean_to(model.params()).unwrap()),
        ),
    ];
    for (quadratic, same, expected) in cases {
        close(model.value(&quadratic), expected, 1e-11);
        let theta = Tensor::from_slice(&model.flat());
        let gradient = model.gradient(&quadratic);
        all_close(&gradient, &values(&same.precision_matrix().mv(&(&theta - same.mean_vector()))), 1e-11);
        let start = model.flat();
        for (i, g) in gradient.iter().enumerate() {
            // A central difference of a quadratic has no error but rounding.
            let side = |step: f64| {
                let mut theta = start.clone();
                theta[i] += step;
                model.set(&theta);
                model.value(&quadratic)
            };
            close((side(0.1) - side(-0.1)) / 0.2, *g, 1e-11);
        }
        model.set(&start);
    }
}

/// ∂KL(N(m, ·) ‖ p)/∂m is the gradient of p's quadratic at m, for diagonal and full.
#[test]
fn the_gradient_of_the_kl_is_that_of_the_quadratic() {
    let model = Pair::new(0.7);
    let (s, wide) = (diagonal(0.9), spd(8, 0.8));
    let (d, f) = (diagonal(0.1), full(0.3));
    let kl = |of: usize| -> f64 {
        let entry = |name: &str, w: &Tensor| (name.to_owned(), w.detach().copy(), s.precision(name).unwrap().copy());
        if of == 0 {
            DiagonalGaussian::new([entry("w", &model.w), entry("b", &model.b)]).unwrap().kl(&d).unwrap()
        } else {
            FullGaussian::new([("w", model.w.detach().copy()), ("b", model.b.detach().copy())], &wide)
                .unwrap()
                .kl(&f)
                .unwrap()
        }
    };
    for (of, quadratic) in [Quadratic::from(&d), Quadratic::from(&f)].iter().enumerate() {
        let (start, gradient) = (model.flat(), model.gradient(quadratic));
        for (i, g) in gradient.iter().enumerate() {
            let side = |step: f64| {
                let mut theta = start.clone();
                theta[i] += step;
                model.set(&theta);
                kl(of)
            };
            close((side(0.1) - side(-0.1)) / 0.2, *g, 1e-10);
        }
        model.set(&start);
    }
}

#[test]
fn quadratics_add_and_scale_with_their_constants() {
    let model = Pair::new(0.7);
    let quadratics = || {
        let zero = Quadratic::new([("w", wave(&[3, 2], 5.0), wave(&[3, 2], 0.0).zeros_like())]).unwrap();
        // Precisions that vanish in places, in both.
        let holes = |p: f64| Quadratic::new([("w", wave(&[3, 2], p), wave(&[3, 2], p).clamp_min(0.0))]).unwrap();
        let (d, k, f) = (diagonal(0.1), kronecker(0.2), full(0.3));
        [zero, holes(0.3), holes(1.1), (&d).into(), (&diagonal(1.4)).into(), (&k).into(), (&f).into()]
    };
    let all = quadratics();
    for a in &all {
        for b in &all {
            let (sum, w) = (a.plus(b).unwrap(), 2.5);
            close(model.value(&sum), model.value(a) + model.value(b), 1e-11);
            let expected: Vec<f64> =
                model.gradient(a).iter().zip(model.gradient(b)).map(|(a, b)| w * (a + b)).collect();
            all_close(&model.gradient(&sum.scaled(w).unwrap()), &expected, 1e-11);
            close(model.value(&sum.scaled(w).unwrap()), w * model.value(&sum), 1e-11);
            assert_eq!(model.value(&sum.scaled(0.0).unwrap()), 0.0);
        }
        // Around the present weights: nothing there, and the same curvature.
        let here = a.recentred(model.params()).unwrap();
        assert_eq!(model.value(&here), 0.0);
        let start = model.flat();
        let moved = |k: &Quadratic, step: f64| {
            model.set(&start.iter().enumerate().map(|(i, t)| t + step * (i as f64 + 0.5).cos()).collect::<Vec<_>>());
            let value = model.value(k);
            model.set(&start);
            value
        };
        let second = |k| moved(k, 0.5) + moved(k, -0.5) - 2.0 * moved(k, 0.0);
        close(second(&here), second(a), 1e-11);
        close(moved(&here, 0.5), moved(&here, -0.5), 1e-11);
    }
}

/// K penalties of separate EWC are one, with two tensors, the constant included; and they are not Bayes' (Huszár).
#[test]
fn separate_ewc_is_one_quadratic() {
    let model = Pair::new(0.7);
    let x = wave(&[9, 3], 0.4);
    let (mut sum, mut parts) = (Quadratic::towards_zero(model.params(), 0.0).unwrap(), Vec::new());
    for task in 0..3 {
        let solution = Pair::new(f64::from(task));
        model.set(&solution.flat());
        let likelihood = Fisher::exact().likelihood(Likelihood::Categorical);
        let f = likelihood.diagonal(model.params(), [&x], |x| x.matmul(&model.w) + &model.b).unwrap();
        let one = Quadratic::from(&f).scaled(30.0).unwrap();
        all_close(&values(&one.precision("w").unwrap()), &values(&(f.get("w").unwrap() * 30.0)), 1e-12);
        assert_eq!(values(&one.mean("b").unwrap()), values(&model.b));
        sum = sum.plus(&one).unwrap();
        parts.push(one);
    }
    model.set(&Pair::new(0.7).flat());
    close(model.value(&sum), parts.iter().map(|p| model.value(p)).sum(), 1e-10);
    let precision = parts.iter().map(|p| p.precision("w").unwrap()).reduce(|a, b| a + b).unwrap();
    let moment = parts.iter().map(|p| p.precision("w").unwrap() * p.mean("w").unwrap()).reduce(|a, b| a + b).unwrap();
    all_close(&values(&sum.precision("w").unwrap()), &values(&precision), 1e-12);
    all_close(&values(&sum.mean("w").unwrap()), &values(&(moment / precision)), 1e-12);
}

/// Moves the weights to the minimum of a convex loss.
fn minimize(params: Params, loss: impl Fn() -> Tensor) {
    let mut opt = Newton::default().build(params, 1.0).unwrap();
    for _ in 0..20 {
        opt.step(&loss).unwrap();
    }
}

const ORDERS: [[usize; 3]; 6] = [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]];

/// Linear regression with noise of variance ½, three tasks of different sizes.
struct Regression {
    w: Tensor,
    tasks: Vec<(Tensor, Tensor)>,
}

const VARIANCE: f64 = 0.5;
const DELTA: f64 = 0.3;

impl Regression {
    fn new(orthogonal: bool) -> Self {
        let task = |t: i64| {
            let x = wave(&[7 + t, 4], t as f64);
            let x = if orthogonal { Tensor::linalg_qr(&x, "reduced").0 * wave(&[4], 0.5 + t as f64) * 3.0 } else { x };
            (x, wave(&[7 + t], 3.0 + t as f64) * 2.0)
        };
        Regression { w: leaf(&wave(&[4], 0.1)), tasks: (0..3).map(task).collect() }
    }

    fn params(&self) -> Params {
        Params::named([("w", self.w.shallow_clone())]).unwrap()
    }

    fn loss(&self, task: usize) -> Tensor {
        let (x, y) = &self.tasks[task];
        (x.matmul(&self.w) - y).square().sum(Kind::Double) * (0.5 / VARIANCE)
    }

    fn precision(&self, task: usize) -> Tensor {
        let x = &self.tasks[task].0;
        x.tr().matmul(x) / VARIANCE
    }

    fn prior(&self) -> FullGaussian {
        FullGaussian::new([("w", self.w.detach().zeros_like())], &(Tensor::eye(4, F64) * DELTA)).unwrap()
    }

    /// S and m of all tasks together.
    fn joint(&self) -> (Tensor, Tensor) {
        let s = (0..3).fold(Tensor::eye(4, F64) * DELTA, |s, t| s + self.precision(t));
        let moment = self.tasks.iter().map(|(x, y)| x.tr().mv(y) / VARIANCE).reduce(|a, b| a + b).unwrap();
        let mean = s.inverse().mv(&moment);
        (s, mean)
    }
}

#[test]
fn one_after_the_other_is_all_at_once_in_any_order() {
    let all = Regression::new(false);
    let (s, m) = all.joint();
    let after = |prior: &FullGaussian, task: usize| {
        let past = Quadratic::from(prior);
        let model = Model { params: &all.params(), forward: &|x| Ok(x.matmul(&all.w)) };
        minimize(all.params(), || all.loss(task) + past.value(&model).unwrap());
        FullGaussian::new([("w", all.w.detach().copy())], &(prior.precision_matrix() + all.precision(task))).unwrap()
    };
    for order in ORDERS {
        let q = order.iter().fold(all.prior(), |q, task| after(&q, *task));
        all_close(&values(&q.mean_vector()), &values(&m), 1e-12);
        all_close(&values(q.precision_matrix()), &values(&s), 1e-11);
    }
    // Each from the prior, merged: the prior counts once.
    let prior = all.prior();
    let each: Vec<_> = (0..3).map(|t| after(&prior, t)).collect();
    let q = combine(&[(1.0, &each[0]), (1.0, &each[1]), (1.0, &each[2]), (-2.0, &prior)]).unwrap();
    all_close(&values(&q.mean_vector()), &values(&m), 1e-12);
}

#[test]
fn the_diagonal_is_exact_where_features_are_orthogonal() {
    let run = |all: &Regression, order: [usize; 3]| {
        let zero = all.w.detach().zeros_like();
        let mut q = DiagonalGaussian::new([("w", zero.copy(), zero.full_like(DELTA))]).unwrap();
        for task in order {
            let past = Quadratic::from(&q);
            let forward = |x: &Tensor| x.matmul(&all.w);
            let model = Model { params: &all.params(), forward: &|x| Ok(forward(x)) };
            minimize(all.params(), || all.loss(task) + past.value(&model).unwrap());
            let f = Fisher::exact().likelihood(Likelihood::Gaussian { variance: VARIANCE });
            q = f.diagonal(all.params(), [&all.tasks[task].0], forward).unwrap().laplace(&q).unwrap();
        }
        q
    };
    let all = Regression::new(true);
    let (s, m) = all.joint();
    for order in ORDERS {
        let q = run(&all, order);
        all_close(&values(&q.mean("w").unwrap()), &values(&m), 1e-12);
        all_close(&values(&q.precision("w").unwrap()), &values(&s.diagonal(0, 0, 1)), 1e-11);
    }
    // And not elsewhere.
    let all = Regression::new(false);
    let off = number(&(run(&all, ORDERS[0]).mean("w").unwrap() - all.joint().1).abs().max());
    assert!(off > 0.01, "{off}");
}

/// Layers of [`tch_blr::nn`] in f64, with weights without a pattern: `first` with a bias, `second` without, and `scale`, which is
/// no layer's.
struct Layered {
    vs: VarStore,
    layers: Vec<tch_blr::nn::Linear>,
    scale: Option<Tensor>,
}

impl Layered {
    fn new(deep: bool) -> Self {
        let mut vs = VarStore::new(Device::Cpu);
        vs.set_kind(Kind::Double);
        let layer = |name, from, to, bias| {
            let config = LinearConfig { bias, ..LinearConfig::default() };
            tch_blr::nn::linear(vs.root() / name, from, to, config)
        };
        let mut layers = vec![layer("first", 3, 2, true)];
        layers.extend(deep.then(|| layer("second", 2, 4, false)));
        let scale = deep.then(|| vs.root().zeros("scale", &[4]));
        let net = Layered { vs, layers, scale };
        net.set(0.1);
        net
    }

    fn set(&self, phase: f64) {
        for (i, w) in self.variables().iter().enumerate() {
            set(w, &wave(&w.size(), phase + i as f64));
        }
    }

    fn variables(&self) -> Vec<Tensor> {
        let layers = self.layers.iter().flat_map(|l| [Some(&l.ws), l.bs.as_ref()]);
        layers.chain([self.scale.as_ref()]).flatten().map(Tensor::shallow_clone).collect()
    }

    fn params(&self) -> Params {
        Params::from(&self.vs)
    }

    fn forward(&self, x: &Tensor) -> Tensor {
        let z = self.layers[0].forward(x);
        let Some(scale) = &self.scale else { return z };
        self.layers[1].forward(&z.tanh()) * scale
    }

    fn value(&self, k: &Quadratic) -> Tensor {
        k.value(&Model { params: &self.params(), forward: &|x| Ok(self.forward(x)) }).unwrap()
    }

    fn gradient(&self, k: &Quadratic) -> Vec<Vec<f64>> {
        let found = Tensor::run_backward(&[self.value(k)], &self.variables(), false, false);
        found.iter().map(|g| if g.defined() { values(g) } else { vec![] }).collect()
    }

    fn kronecker(&self, x: &Tensor, likelihood: Likelihood) -> KroneckerFisher {
        let fisher = Fisher::exact().likelihood(likelihood);
        fisher.kronecker(&self.vs, x.split(4, 0), |x| self.forward(x)).unwrap()
    }

    fn full(&self, x: &Tensor, likelihood: Likelihood) -> Quadratic {
        let fisher = Fisher::exact().likelihood(likelihood);
        Quadratic::from(&fisher.full(&self.vs, [x], |x| self.forward(x)).unwrap())
    }

    fn diagonal(&self, x: &Tensor, likelihood: Likelihood) -> Quadratic {
        let fisher = Fisher::exact().likelihood(likelihood);
        Quadratic::from(&fisher.diagonal(&self.vs, [x], |x| self.forward(x)).unwrap())
    }
}

/// ½ tr(G ΔV A ΔVᵀ) with V = [W b], and the exact diagonal of what has no factors; two tasks are a list.
#[test]
fn kronecker_factors_as_a_quadratic() {
    let net = Layered::new(true);
    let x = wave(&[9, 3], 0.6);
    let f = net.kronecker(&x, Likelihood::Categorical);
    let [first, second] = f.layers() else { unreachable!() };
    let (then, k) = (net.variables().iter().map(|w| w.detach().copy()).collect::<Vec<_>>(), Quadratic::from(&f));
    assert_eq!(number(&net.value(&k)), 0.0);
    net.set(2.3);

    let d: Vec<Tensor> = net.variables().iter().zip(then).map(|(w, then)| w.detach() - then).collect();
    let [w1, b1, w2, scale] = &d[..] else { unreachable!() };
    let v1 = Tensor::cat(&[w1, &b1.unsqueeze(1)], 1);
    let product = |f: &LayerFactors, v: &Tensor| f.outputs.matmul(v).matmul(&f.inputs);
    let (g1, g2, g3) = (product(first, &v1), product(second, w2), f.diagonal("scale").unwrap() * scale);
    let trace = |g: &Tensor, v: &Tensor| number(&g.matmul(&v.tr()).trace());
    let expected = 0.5 * (trace(&g1, &v1) + trace(&g2, w2) + number(&g3.dot(scale)));
    assert!(expected > 0.1 && first.bias.as_deref() == Some("first.bias") && second.bias.is_none());
    close(number(&net.value(&k)), expected, 1e-12);
    let expected = [values(&g1.narrow(1, 0, 3)), values(&g1.select(1, 3)), values(&g2), values(&g3)];
    for (ours, expected) in net.gradient(&k).iter().zip(&expected) {
        all_close(ours, expected, 1e-12);
    }

    // Another task at other weights: value by value, which sums of the factors have not.
    let other = net.kronecker(&(x * 1.5), Likelihood::Categorical);
    let second_task = Quadratic::from(&other);
    let both = k.plus(&second_task).unwrap();
    net.set(1.1);
    close(number(&net.value(&both)), number(&(net.value(&k) + net.value(&second_task))), 1e-12);
    close(number(&net.value(&both.scaled(3.0).unwrap())), 3.0 * number(&net.value(&both)), 1e-12);
    let here = both.recentred(net.params()).unwrap();
    assert_eq!(number(&net.value(&here)), 0.0);
    let before = net.layers[0].ws.detach().copy();
    let step = wave(&[2, 3], 4.0);
    set(&net.layers[0].ws, &(before + &step));
    let no_bias = |f: &LayerFactors| f.inputs.narrow(0, 0, 3).narrow(1, 0, 3);
    let list: f64 = [&f, &other]
        .map(|f| 0.5 * trace(&f.layers()[0].outputs.matmul(&step).matmul(&no_bias(&f.layers()[0])), &step))
        .iter()
        .sum();
    close(number(&net.value(&here)), list, 1e-12);
    let [a, g] = [|f: &LayerFactors| f.inputs.copy(), |f: &LayerFactors| f.outputs.copy()]
        .map(|of| of(&f.layers()[0]) + of(&other.layers()[0]));
    let mixed = 0.5 * trace(&g.matmul(&step).matmul(&a.narrow(0, 0, 3).narrow(1, 0, 3)), &step);
    assert!(mixed > 1.5 * list, "{mixed} {list}");
}

/// A filter `[out, in, 3, 3]` is the matrix of its rows, beside the bias.
#[test]
fn kronecker_factors_of_a_convolution_as_a_quadratic() {
    let mut vs = VarStore::new(Device::Cpu);
    vs.set_kind(Kind::Double);
    let conv = tch_blr::nn::conv2d(vs.root(), 2, 4, 3, ConvConfig { padding: 1, ..ConvConfig::default() });
    let bias = conv.bs.as_ref().unwrap();
    let forward = |x: &Tensor| conv.forward(x).mean_dim([2, 3].as_slice(), false, None::<Kind>);
    let f = Fisher::exact().kronecker(&vs, [wave(&[3, 2, 5, 5], 0.2)], forward).unwrap();
    let (dw, db) = (wave(&[4, 2, 3, 3], 1.0), wave(&[4], 2.0));
    set(&conv.ws, &(conv.ws.detach() + &dw));
    set(bias, &(bias.detach() + &db));
    let [layer] = f.layers() else { unreachable!() };
    let v = Tensor::cat(&[dw.reshape([4, 18]), db.unsqueeze(1)], 1);
    let expected = 0.5 * number(&layer.outputs.matmul(&v).matmul(&layer.inputs).matmul(&v.tr()).trace());
    let params = Params::from(&vs);
    close(
        number(&Quadratic::from(&f).value(&Model { params: &params, forward: &|x| Ok(forward(x)) }).unwrap()),
        expected,
        1e-12,
    );
}

/// One example per task: G ⊗ A is the layer's block, bias and all, and a list of them the sum of the full matrices.
#[test]
fn the_structures_agree_where_they_are_exact() {
    let net = Layered::new(false);
    let x = wave(&[3, 3], 0.6);
    let zero = || Quadratic::towards_zero(net.params(), 0.7).unwrap();
    let (mut kronecker, mut full) = (zero(), zero());
    for task in 0..3 {
        net.set(0.4 * task as f64);
        let one = x.narrow(0, task, 1);
        let after = |past: Quadratic, f: Quadratic| past.recentred(net.params()).unwrap().plus(&f).unwrap();
        kronecker = after(kronecker, (&net.kronecker(&one, Likelihood::Categorical)).into());
        full = after(full, net.full(&one, Likelihood::Categorical));
    }
    let same = |a: &Quadratic, b: &Quadratic| {
        net.set(5.0);
        assert!(number(&net.value(a)) > 0.1);
        close(number(&net.value(a)), number(&net.value(b)), 1e-12);
        for (a, b) in net.gradient(a).iter().zip(net.gradient(b)) {
            all_close(a, &b, 1e-12);
        }
    };
    same(&kronecker, &full);

    // Inputs one at a time and independent outputs: nothing off the diagonal but between a weight and the bias.
    let hot = Tensor::eye(3, F64).repeat([2, 1]) * wave(&[6, 1], 0.9);
    let gaussian = Likelihood::Gaussian { variance: 0.3 };
    net.set(1.0);
    let frozen = net.layers[0].bs.as_ref().unwrap().shallow_clone().set_requires_grad(false);
    let three =
        [net.diagonal(&hot, gaussian), Quadratic::from(&net.kronecker(&hot, gaussian)), net.full(&hot, gaussian)];
    let _ = frozen.set_requires_grad(true);
    same(&three[0], &three[1]);
    same(&three[0], &three[2]);
}

/// Linear regression with two outputs has F = I/σ² ⊗ XᵀX, which Kronecker factors hold with the bias, and a full matrix too: one
/// task after the other ends at the optimum of all at once, in any order. The diagonal does not.
#[test]
fn online_laplace_is_exact_where_its_structure_is() {
    let net = Layered::new(false);
    let tasks: Vec<_> =
        (0..3).map(|t| (wave(&[7 + t, 3], t as f64), wave(&[7 + t, 2], 3.0 + t as f64) * 2.0)).collect();
    let gaussian = Likelihood::Gaussian { variance: VARIANCE };
    let loss = |task: usize| {
        let (x, y) = &tasks[task];
        (net.forward(x) - y).square().sum(Kind::Double) * (0.5 / VARIANCE)
    };
    let start = || Quadratic::towards_zero(net.params(), DELTA).unwrap();
    let weights = || net.variables().iter().flat_map(values).collect::<Vec<_>>();
    let past = start();
    minimize(net.params(), || loss(0) + loss(1) + loss(2) + net.value(&past));
    let joint = weights();
    let learn = |order: [usize; 3], fisher: &dyn Fn(&Tensor) -> Quadratic| {
        let mut past = start();
        for task in order {
            net.set(0.8);
            minimize(net.params(), || loss(task) + net.value(&past));
            past = past.recentred(net.params()).unwrap().plus(&fisher(&tasks[task].0)).unwrap();
        }
        weights()
    };
    for order in ORDERS {
        all_close(&learn(order, &|x| net.full(x, gaussian)), &joint, 1e-11);
        all_close(&learn(order, &|x| Quadratic::from(&net.kronecker(x, gaussian))), &joint, 1e-11);
        let diagonal = learn(order, &|x| net.diagonal(x, gaussian));
        assert!(diagonal.iter().zip(&joint).any(|(a, b)| (a - b).abs() > 0.01));
    }
}

/// A network of one hidden layer, in f64.
struct Net {
    weights: [Tensor; 4],
    x: Tensor,
}

impl Net {
    fn new(outputs: i64) -> Self {
        let w = |shape: &[i64], p| leaf(&wave(shape, p));
        Net {
            weights: [w(&[3, 4], 0.1), w(&[4], 0.2), w(&[4, outputs], 0.3), w(&[outputs], 0.4)],
            x: wave(&[8, 3], 0.6),
        }
    }

    fn params(&self) -> Params {
        let names = ["w1", "b1", "w2", "b2"];
        Params::named(names.into_iter().zip(self.weights.iter().map(Tensor::shallow_clone))).unwrap()
    }

    fn forward(&self, x: &Tensor) -> Tensor {
        let [w1, b1, w2, b2] = &self.weights;
        (x.matmul(w1) + b1).tanh().matmul(w2) + b2
    }

    fn move_by(&self, step: f64) {
        for (i, w) in self.weights.iter().enumerate() {
            set(w, &(w.detach() + wave(&w.size(), 9.0 + i as f64) * step));
        }
    }

    fn value(&self, k: &dyn Regularizer) -> Tensor {
        k.value(&Model { params: &self.params(), forward: &|x| Ok(self.forward(x)) }).unwrap()
    }

    fn gradient(&self, loss: &Tensor) -> Vec<f64> {
        let found = Tensor::run_backward(&[loss], &self.weights, false, false);
        found.iter().flat_map(values).collect()
    }
}

const LIKELIHOODS: [Likelihood; 3] =
    [Likelihood::Categorical, Likelihood::Bernoulli, Likelihood::Gaussian { variance: 0.4 }];

fn targets(likelihood: Likelihood) -> Tensor {
    match likelihood {
        Likelihood::Categorical => Tensor::from_slice(&[0i64, 1, 2, 1, 0, 2, 2, 1]),
        Likelihood::Bernoulli => wave(&[8, 3], 5.0).gt(0.0).to_kind(Kind::Double),
        _ => wave(&[8, 3], 5.0),
    }
}

/// The two parts of the reconstruction are the gradient of the past data, far from where they were made.
#[test]
fn soft_labels_and_label_noise_are_replay() {
    for likelihood in LIKELIHOODS {
        let net = Net::new(3);
        let memory =
            || Memory::new(&net.x, likelihood).targets(&targets(likelihood)).weights(&(wave(&[8], 2.0).square() + 0.5));
        let soft = SoftLabels::of(memory(), |x| net.forward(x)).unwrap();
        let noise = LabelNoise::of(memory(), |x| net.forward(x)).unwrap();
        let replay = Replay::new(memory()).unwrap();
        net.move_by(0.4);
        let parts: Vec<f64> =
            net.gradient(&net.value(&soft)).iter().zip(net.gradient(&net.value(&noise))).map(|(a, b)| a + b).collect();
        let whole = net.gradient(&net.value(&replay));
        all_close(&parts, &whole, 1e-12);
        // The noise is no small part of it.
        assert!(net.gradient(&net.value(&noise)).iter().any(|g| g.abs() > 0.1));
        // The value too, up to a constant that soft labels have: its difference between two points.
        let difference = || number(&(net.value(&soft) + net.value(&noise) - net.value(&replay)));
        let before = difference();
        net.move_by(-0.9);
        close(difference(), before, 1e-11);
    }
}

/// EWC + FR + Replay: replay on a part M₂ of the memory M₁ and soft labels on the rest are soft labels on all of it and the
/// label noise of M₂, beside the curvature of what is in no memory.
#[test]
fn ewc_functional_regularization_and_replay_are_one_past() {
    for likelihood in LIKELIHOODS {
        let net = Net::new(3);
        let forward = |x: &Tensor| net.forward(x);
        let all = || Memory::new(&net.x, likelihood).targets(&targets(likelihood));
        let (rest, second) = (|| all().select(&[0, 3, 4, 6]).unwrap(), || all().select(&[1, 2, 5, 7]).unwrap());
        let left_out = Fisher::exact().likelihood(likelihood);
        let left_out = left_out.diagonal(net.params(), [wave(&[20, 3], 0.9)], forward).unwrap();
        let weights = || Quadratic::isotropic(net.params(), 0.3).unwrap().plus(&Quadratic::from(&left_out)).unwrap();
        let recipe = Past::new()
            .with(weights())
            .with(SoftLabels::of(rest(), forward).unwrap())
            .with(Replay::new(second()).unwrap());
        let theory = Past::new()
            .with(weights())
            .with(SoftLabels::of(all(), forward).unwrap())
            .with(LabelNoise::of(second(), forward).unwrap());
        let functions = Past::new().with(weights()).with(SoftLabels::of(all(), forward).unwrap());
        net.move_by(0.4);
        let gradient = |past: &Past| net.gradient(&net.value(past));
        all_close(&gradient(&recipe), &gradient(&theory), 1e-12);
        assert!(gradient(&recipe).iter().zip(gradient(&functions)).any(|(a, b)| (a - b).abs() > 0.1));
        let difference = || number(&(net.value(&recipe) - net.value(&theory)));
        let before = difference();
        net.move_by(-0.9);
        close(difference(), before, 1e-11);
    }
}

#[test]
fn the_losses_of_replay_are_the_likelihoods() {
    let net = Net::new(3);
    for likelihood in LIKELIHOODS {
        let y = targets(likelihood);
        let losses = || {
            let z = net.forward(&net.x);
            let losses = match likelihood {
                Likelihood::Categorical => tch_blr::nn::cross_entropy(&z, &y),
                Likelihood::Bernoulli => tch_blr::nn::binary_cross_entropy(&z, &y),
                _ => tch_blr::nn::squared_error(&z, &y, 0.4),
            };
            losses.unwrap().sum(Kind::Double)
        };
        let expected = net.gradient(&losses());
        for w in [1.0, -2.0] {
            let replay = Replay::weighted(Memory::new(&net.x, likelihood).targets(&y), w).unwrap();
            let ours: Vec<f64> = net.gradient(&net.value(&replay)).iter().map(|g| g / w).collect();
            all_close(&ours, &expected, 1e-12);
        }
    }
}

/// Certain and right: a loss of e⁻ᶠ and not of 0, nor a gradient of 0. (On all data of a problem that is nearly separable, that
/// is the difference between 1e-6 and 1e-13.)
#[test]
fn the_losses_of_certain_predictions_are_exact() {
    for size in [5.0f64, 25.0, 300.0] {
        let f = leaf(&Tensor::from_slice(&[size, -size]));
        let y = Tensor::from_slice(&[1.0, 0.0]);
        let replay = Replay::new(Memory::new(&y, Likelihood::Bernoulli).targets(&y)).unwrap();
        let params = Params::named([("f", f.shallow_clone())]).unwrap();
        let loss = replay.value(&Model { params: &params, forward: &|_| Ok(f.shallow_clone()) }).unwrap();
        let expected = (-size).exp().ln_1p();
        assert!((number(&loss) / (2.0 * expected) - 1.0).abs() < 1e-12, "{size}: {}", number(&loss));
        let gradient = values(&Tensor::run_backward(&[&loss], &[&f], false, false)[0]);
        let expected = (-size).exp() / (1.0 + (-size).exp());
        for (ours, sign) in gradient.iter().zip([-1.0, 1.0]) {
            assert!((ours / (sign * expected) - 1.0).abs() < 1e-12, "{size}: {ours}");
        }
    }
}

/// A temperature divides both sides' logits; the gradient is T Σ Jᵀ(p(f/T) - p(f_old/T)).
#[test]
fn distillation_softens_both_sides() {
    let net = Net::new(3);
    let t = 2.5;
    let soft = SoftLabels::at_temperature(Memory::new(&net.x, Likelihood::Categorical), t, |x| net.forward(x)).unwrap();
    let softened = || (net.forward(&net.x) / t).softmax(-1, Kind::Double);
    let old = softened().detach();
    all_close(&values(soft.predictions()), &values(&old), 1e-15);
    net.move_by(0.4);
    let expected = (net.forward(&net.x) * (softened().detach() - old)).sum(Kind::Double) * t;
    all_close(&net.gradient(&net.value(&soft)), &net.gradient(&expected), 1e-12);
}

/// The outputs of one task: the softmax is over these, others have no gradient, classes keep their numbers.
#[test]
fn a_memory_knows_which_outputs_are_its_tasks() {
    let net = Net::new(5);
    let y = Tensor::from_slice(&[3i64, 1, 3, 3, 1, 1, 3, 1]);
    let memory = || Memory::new(&net.x, Likelihood::Categorical).targets(&y).active(&[3, 1]);
    let replay = net.value(&Replay::new(memory()).unwrap());
    let columns = net.forward(&net.x).index_select(1, &Tensor::from_slice(&[1i64, 3]));
    let expected = tch_blr::nn::cross_entropy(&columns, &y.eq(3).to_kind(Kind::Int64)).unwrap().sum(Kind::Double);
    close(number(&replay), number(&expected), 1e-12);
    let gradient = Tensor::run_backward(&[&replay], &[&net.weights[3]], true, false);
    assert_eq!(values(&gradient[0].index_select(0, &Tensor::from_slice(&[0i64, 2, 4]))), [0.0; 3]);
    // A selection has its own examples, with all that belongs to them.
    let some = memory().weights(&wave(&[8], 0.1)).select(&[6, 0, 6]).unwrap();
    let again = Memory::new(&net.x.index_select(0, &Tensor::from_slice(&[6i64, 0, 6])), Likelihood::Categorical)
        .targets(&Tensor::from_slice(&[3i64, 3, 3]))
        .weights(&wave(&[8], 0.1).index_select(0, &Tensor::from_slice(&[6i64, 0, 6])))
        .active(&[3, 1]);
    assert_eq!(some.len(), 3);
    let value = |m| number(&net.value(&Replay::new(m).unwrap()));
    assert_eq!(value(some), value(again));
}

/// ω of gradient descent on ½hθ² is h/(2-lr·h) of the squared way: h/2 up to 0.25 % here.
#[test]
fn synaptic_intelligence_finds_the_curvature_of_a_quadratic() {
    let h = Tensor::from_slice(&[2.0, 3.0, 5.0]);
    let theta = leaf(&Tensor::from_slice(&[1.0, -0.8, 0.6]));
    let params = || Params::named([("w", theta.shallow_clone())]).unwrap();
    let loss = || (&h * theta.square()).sum(Kind::Double) * 0.5;
    let mut si = SynapticIntelligence::new(params(), 1e-6).unwrap();
    let mut opt = Sgd::default().build(params(), 1e-3).unwrap();
    let n = 50.0;
    for _ in 0..4000 {
        si.before(params(), &loss()).unwrap();
        opt.step(loss).unwrap();
        si.after(params()).unwrap();
    }
    si.end_task(params()).unwrap();
    let importance = values(si.importance("w").unwrap());
    for (ours, h) in importance.iter().zip(values(&h)) {
        close(*ours, h / 2.0, 0.01 * h / 2.0);
    }
    // c = 1 puts back the loss, as a sum over N examples.
    let penalty = si.penalty(1.0, n).unwrap();
    set(&theta, &Tensor::from_slice(&[0.5, 0.7, -0.2]));
    let value = |k: &Quadratic| number(&k.value(&Model { params: &params(), forward: &|x| Ok(x.copy()) }).unwrap());
    close(value(&penalty), n * number(&loss()), 0.01 * n * number(&loss()));
    close(value(&si.penalty(0.1, n).unwrap()), 0.1 * value(&penalty), 1e-12);

    // A second task adds; where its loss went up along the way, importance goes down, but not below zero.
    let mut si = SynapticIntelligence::new(params(), 0.1).unwrap();
    let mut importance = [0.0; 3];
    for (sign, size) in [(1.0, 1.0), (-1.0, 0.25), (-1.0, 5.0)] {
        let g = values(&(&h * size));
        si.before(params(), &((&h * size * &theta).sum(Kind::Double) * sign)).unwrap();
        set(&theta, &(theta.detach() - 0.3));
        si.after(params()).unwrap();
        si.end_task(params()).unwrap();
        for (i, g) in importance.iter_mut().zip(g) {
            *i = (*i + sign * g * 0.3 / (0.09 + 0.1)).max(0.0);
        }
        all_close(&values(si.importance("w").unwrap()), &importance, 1e-12);
    }
    assert_eq!(importance, [0.0; 3]);
}

/// Logistic regression with one logit on features of `x` `[N, 2]`: 1, x₁, x₂ and for degree 2 their products too.
struct Logistic {
    w: Tensor,
    degree: u8,
}

impl Logistic {
    fn new(degree: u8) -> Self {
        Logistic { w: leaf(&Tensor::zeros([if degree == 1 { 3 } else { 6 }], F64)), degree }
    }

    fn params(&self) -> Params {
        Params::named([("w", self.w.shallow_clone())]).unwrap()
    }

    fn forward(&self, x: &Tensor) -> Tensor {
        let (a, b) = (x.select(1, 0), x.select(1, 1));
        let mut features = vec![a.ones_like(), a.shallow_clone(), b.shallow_clone()];
        if self.degree == 2 {
            features.extend([&a * &a, &a * &b, &b * &b]);
        }
        Tensor::stack(&features, 1).mv(&self.w)
    }

    fn value(&self, past: &Past) -> Tensor {
        past.value(self.params(), |x| self.forward(x)).unwrap()
    }

    /// Trains; w.
    fn fit(&self, past: &Past) -> Vec<f64> {
        set(&self.w, &self.w.zeros_like());
        minimize(self.params(), || self.value(past));
        values(&self.w)
    }
}

/// Inputs and labels that no line separates.
fn xor(n: i64, phase: f64) -> (Tensor, Tensor) {
    let x = wave(&[n, 2], phase) * 2.0;
    let noisy: Tensor = x.prod_dim_int(1, false, Kind::Double) + x.select(1, 0) * 0.5 + wave(&[n], phase + 1.0);
    (x, noisy.gt(0.0).to_kind(Kind::Double))
}

fn memory((x, y): &(Tensor, Tensor)) -> Memory {
    Memory::new(x, Likelihood::Bernoulli).targets(y)
}

fn first((x, y): &(Tensor, Tensor), n: i64) -> (Tensor, Tensor) {
    (x.narrow(0, 0, n), y.narrow(0, 0, n))
}

fn last((x, y): &(Tensor, Tensor), n: i64) -> (Tensor, Tensor) {
    let from = x.size()[0] - n;
    (x.narrow(0, from, n), y.narrow(0, from, n))
}

fn loss(data: &(Tensor, Tensor)) -> Replay {
    Replay::new(memory(data)).unwrap()
}

fn decay(model: &Logistic, delta: f64) -> Quadratic {
    Quadratic::towards_zero(model.params(), delta).unwrap()
}

/// The K-prior of a trained model, on these inputs.
fn k_prior(model: &Logistic, x: &Tensor, delta: f64) -> Past {
    Past::new()
        .with(Quadratic::isotropic(model.params(), delta).unwrap())
        .with(SoftLabels::of(Memory::new(x, Likelihood::Bernoulli), |x| model.forward(x)).unwrap())
}

/// With all past inputs, each adaptation of a generalized linear model is the batch's optimum, without the past's labels.
#[test]
fn k_priors_on_all_data_adapt_exactly() {
    let model = Logistic::new(2);
    let (old, new, delta) = (xor(40, 0.3), xor(15, 2.3), 0.7);
    let base = || model.fit(&Past::new().with(decay(&model, delta)).with(loss(&old)));

    let start = base();
    let adapted = model.fit(&k_prior(&model, &old.0, delta).with(loss(&new)));
    let batch = model.fit(&Past::new().with(decay(&model, delta)).with(loss(&old)).with(loss(&new)));
    all_close(&adapted, &batch, 1e-9);
    assert!(batch.iter().zip(&start).any(|(a, b)| (a - b).abs() > 0.05));

    base();
    let removed = last(&old, 10);
    let minus = Replay::weighted(memory(&removed), -1.0).unwrap();
    let adapted = model.fit(&k_prior(&model, &old.0, delta).with(minus));
    let batch = model.fit(&Past::new().with(decay(&model, delta)).with(loss(&first(&old, 30))));
    all_close(&adapted, &batch, 1e-9);
    assert!(batch.iter().zip(&start).any(|(a, b)| (a - b).abs() > 0.05));

    for other in [0.1, 5.0] {
        base();
        let prior = Quadratic::change_of_regularizer(model.params(), delta, other).unwrap();
        let soft = SoftLabels::of(memory(&old), |x| model.forward(x)).unwrap();
        let adapted = model.fit(&Past::new().with(prior).with(soft));
        let batch = model.fit(&Past::new().with(decay(&model, other)).with(loss(&old)));
        all_close(&adapted, &batch, 1e-9);
        assert!(batch.iter().zip(&start).any(|(a, b)| (a - b).abs() > 0.05));
    }

    // A model with fewer features, from the predictions of the old one and its coefficients of those that both have.
    base();
    let soft = SoftLabels::of(memory(&old), |x| model.forward(x)).unwrap();
    let small = Logistic::new(1);
    set(&small.w, &model.w.narrow(0, 0, 3));
    let adapted = small.fit(&Past::new().with(Quadratic::isotropic(small.params(), delta).unwrap()).with(soft));
    let batch = small.fit(&Past::new().with(decay(&small, delta)).with(loss(&old)));
    all_close(&adapted, &batch, 1e-9);
    assert!(batch.iter().zip(&start).any(|(a, b)| (a - b).abs() > 0.05));
}

/// The diagnostic: zero for what is exact, and not else.
#[test]
fn the_error_of_the_reconstructed_gradient() {
    let model = Logistic::new(2);
    let (old, delta) = (xor(40, 0.3), 0.7);
    let batch = || Past::new().with(decay(&model, delta)).with(loss(&old));
    model.fit(&batch());
    let all = k_prior(&model, &old.0, delta);
    let some = k_prior(&model, &old.0.narrow(0, 0, 20), delta);
    let weights = Past::new().with(Quadratic::isotropic(model.params(), delta).unwrap());
    set(&model.w, &(model.w.detach() + wave(&[6], 0.8)));
    let error = |past: &Past| {
        let truth = batch();
        past.reconstruction_error(model.params(), |x| model.forward(x), || model.value(&truth)).unwrap()
    };
    let (all, some, weights) = (error(&all), error(&some), error(&weights));
    assert!(all < 1e-12 && (0.01..0.8).contains(&some) && some < weights && weights < 1.0, "{all} {some} {weights}");

    // A network's labels are part of it.
    let net = Net::new(3);
    let y = targets(Likelihood::Categorical);
    let memory = || Memory::new(&net.x, Likelihood::Categorical).targets(&y);
    let forward = |x: &Tensor| net.forward(x);
    let functions = Past::new().with(SoftLabels::of(memory(), forward).unwrap());
    let both =
        Past::new().with(SoftLabels::of(memory(), forward).unwrap()).with(LabelNoise::of(memory(), forward).unwrap());
    net.move_by(0.4);
    let truth = Replay::new(memory()).unwrap();
    let error = |past: &Past| past.reconstruction_error(net.params(), forward, || net.value(&truth)).unwrap();
    assert!(error(&both) < 1e-13 && error(&functions) > 0.1, "{} {}", error(&both), error(&functions));
}

/// Where the model is quadratic, examples on memory and the curvature of those left out are all there is to know.
#[test]
fn the_curvature_of_left_out_examples_completes_a_memory() {
    let all = Regression::new(false);
    let (x, _) = &all.tasks[0];
    let forward = |x: &Tensor| x.matmul(&all.w);
    minimize(all.params(), || all.loss(0) + (all.w.square().sum(Kind::Double) * (0.5 * DELTA)));
    let gaussian = Likelihood::Gaussian { variance: VARIANCE };
    let left_out = Fisher::exact().likelihood(gaussian).full(all.params(), [x.narrow(0, 2, 5)], forward).unwrap();
    let q = left_out.laplace(tch_blr::Prior::isotropic(DELTA)).unwrap();
    let soft = SoftLabels::of(Memory::new(&x.narrow(0, 0, 2), gaussian), forward).unwrap();
    let past = Past::new().with(Quadratic::from(&q)).with(soft);
    minimize(all.params(), || all.loss(1) + past.value(all.params(), forward).unwrap());
    let s = all.precision(0) + all.precision(1) + Tensor::eye(4, F64) * DELTA;
    let moment = (0..2).map(|t| all.tasks[t].0.tr().mv(&all.tasks[t].1) / VARIANCE).reduce(|a, b| a + b).unwrap();
    all_close(&values(&all.w), &values(&s.inverse().mv(&moment)), 1e-12);
}

/// Where it is not: logistic regression with 2 % of the past, the memorable of each class. With the curvature of the other 98 % it
/// is nearly the joint optimum, without it is not.
#[test]
fn a_small_memory_of_a_generalized_linear_model_needs_the_curvature_of_the_rest() {
    let model = Logistic::new(2);
    let (old, new, delta) = (xor(1000, 0.3), xor(100, 2.3), 0.7);
    model.fit(&Past::new().with(decay(&model, delta)).with(loss(&old)));
    let scores = memory(&old).lambda(|x| model.forward(x)).unwrap();
    let kept = class_balanced(&scores, &old.1.to_kind(Kind::Int64), 20).unwrap();
    let rest: Vec<i64> = (0..1000).filter(|i| !kept.contains(i)).collect();
    let [kept, rest] = [kept, rest].map(|rows| old.0.index_select(0, &Tensor::from_slice(&rows)));

    let plain = k_prior(&model, &kept, delta).with(loss(&new));
    let bernoulli = Fisher::exact().likelihood(Likelihood::Bernoulli);
    let curvature = bernoulli.full(model.params(), [rest], |x| model.forward(x)).unwrap();
    let full = k_prior(&model, &kept, delta).with(Quadratic::from(&curvature)).with(loss(&new));
    let batch = model.fit(&Past::new().with(decay(&model, delta)).with(loss(&old)).with(loss(&new)));
    let size = batch.iter().map(|b| b.powi(2)).sum::<f64>().sqrt();
    let off = |w: Vec<f64>| w.iter().zip(&batch).map(|(a, b)| (a - b).powi(2)).sum::<f64>().sqrt() / size;
    let (plain, full) = (off(model.fit(&plain)), off(model.fit(&full)));
    println!("relative error: {full} with the curvature, {plain} without");
    assert!(full < 0.05 && full < 0.1 * plain, "{full} {plain}");
}

#[track_caller]
#[test]
fn a_memory_that_does_not_fit_is_refused_by_name() {
    let net = Net::new(3);
    let y = targets(Likelihood::Categorical);
    let with = |x: &Tensor| Memory::new(x, Likelihood::Categorical);
    let whole = || with(&net.x).targets(&y);
    let soft = |m: Memory| SoftLabels::of(m, |x| net.forward(x));
    let noise = |m: Memory| LabelNoise::of(m, |x| net.forward(x));
    let value = |k: &dyn Regularizer| k.value(&Model { params: &net.params(), forward: &|x| Ok(net.forward(x)) });
    let replay = |m: Memory| Replay::new(m).and_then(|r| value(&r));

    let empty = || with(&net.x.narrow(0, 0, 0)).targets(&y.narrow(0, 0, 0));
    assert!(empty().is_empty());
    says(soft(empty()), "empty");
    says(noise(empty()), "empty");
    says(Replay::new(empty()), "empty");
    says(noise(with(&net.x)), "no targets");
    says(Replay::new(with(&net.x)), "no targets");
    says(soft(whole().active(&[1, 3])), "label 3 is active, but the model has the outputs 0 to 2");
    says(soft(whole().active(&[])), "at least 2");
    says(soft(whole().active(&[1])), "at least 2");
    says(soft(whole().active(&[1, 2, 1])), "each of them once");
    says(replay(whole().active(&[0, 1])), "example 2 has class 2");
    says(noise(with(&net.x).targets(&(&y + 1))), "class 3");
    says(replay(with(&net.x).targets(&y.narrow(0, 0, 5))), "Int64 [8]");
    says(replay(with(&net.x).targets(&y.to_kind(Kind::Double))), "Int64 [8]");
    says(replay(Memory::new(&net.x, Likelihood::Bernoulli).targets(&y)), "[8, 3]");
    says(soft(whole().weights(&wave(&[3], 0.1))), "weights are [3]");
    says(Replay::new(whole().weights(&(wave(&[8], 0.1) * f64::NAN))), "not finite");
    says(whole().select(&[0, 8]), "position 8");
    says(whole().select(&[-1]), "position -1");
    says(soft(with(&(&net.x * f64::INFINITY))), "not finite");
    says(noise(with(&(&net.x * f64::NAN)).targets(&y)), "not finite");
    let one = |m: Memory| SoftLabels::of(m, |x| net.forward(x).select(1, 0));
    says(one(with(&net.x)), "Likelihood::Bernoulli");
    says(one(Memory::new(&net.x, Likelihood::Bernoulli).active(&[0])), "columns");
    says(SoftLabels::of(whole(), |x| net.forward(x).narrow(0, 0, 3)), "a row for each");
    says(SoftLabels::of(whole(), |x| net.forward(x).argmax(-1, false)), "Int64");
    says(soft(Memory::new(&net.x, Likelihood::Gaussian { variance: 0.0 })), "`variance`");
    let soften = |t, m| SoftLabels::at_temperature(m, t, |x| net.forward(x));
    says(soften(0.0, whole()), "`temperature`");
    says(soften(2.0, Memory::new(&net.x, Likelihood::Gaussian { variance: 1.0 })), "Gaussian");
    says(Replay::weighted(whole(), f64::NAN), "`w`");

    // Made for a model with other outputs.
    let other = Net::new(4);
    let forward = |x: &Tensor| other.forward(x);
    let model = Model { params: &other.params(), forward: &|x| Ok(forward(x)) };
    says(soft(whole()).unwrap().value(&model), "[8, 3]");
    says(noise(whole()).unwrap().value(&model), "[8, 3]");
}

#[test]
fn a_prior_that_does_not_fit_is_refused_by_name() {
    let model = Pair::new(0.7);
    let start = model.flat();
    let value = |k: &Quadratic| k.value(&Model { params: &model.params(), forward: &|x| Ok(x.shallow_clone()) });
    let one = |name: &str, m: Tensor, s: Tensor| Quadratic::new([(name, m, s)]);
    let w = || wave(&[3, 2], 0.1);
    says(value(&one("other", w(), w().square()).unwrap()), "another model");
    says(value(&one("w", wave(&[2], 0.1), wave(&[2], 0.1).square()).unwrap()), "shape [2]");
    says(one("other", w(), w().square()).unwrap().recentred(model.params()), "another model");
    let diverged = Params::named([("w", w() * f64::NAN)]).unwrap();
    says(one("w", w(), w().square()).unwrap().recentred(&diverged), "not finite");
    says(one("w", w(), w() * f64::NAN), "not finite");
    says(one("w", w() * f64::INFINITY, w().square()), "not finite");
    says(one("w", w(), w()), "≥ 0");
    says(one("w", w(), wave(&[2], 0.1)), "one shape");
    says(Quadratic::new([("w", w(), w().square()), ("w", w(), w().square())]), "twice");
    says(
        one("w", w(), w().square()).unwrap().plus(&one("w", wave(&[2], 0.1), wave(&[2], 0.1).square()).unwrap()),
        "differ",
    );
    says(Quadratic::isotropic(model.params(), -1.0), "`delta`");
    says(Quadratic::change_of_regularizer(model.params(), 1.0, 0.0), "`delta_b`");
    says(one("w", w(), w().square()).unwrap().scaled(f64::NAN), "`w`");
    says(value(&Quadratic::new(Vec::<(String, Tensor, Tensor)>::new()).unwrap()), "no parameters");
    let f = full(0.3);
    let layers = Layered::new(false);
    let factors = Quadratic::from(&layers.kronecker(&wave(&[4, 3], 0.1), Likelihood::Categorical));
    says(value(&factors), "`first.weight`");
    let other = Params::named([("first.weight", w()), ("first.bias", wave(&[2], 0.1))]).unwrap();
    says(factors.recentred(&other), "shape [2, 3] and the model [3, 2]");
    let single = Params::named([("w", model.w.shallow_clone())]).unwrap();
    says(Quadratic::from(&f).value(&Model { params: &single, forward: &|x| Ok(x.shallow_clone()) }), "`b`");
    assert_eq!(model.flat(), start);

    let zero = || (&model.w * 0.0).sum(Kind::Double);
    let none = Past::new().reconstruction_error(model.params(), tch::Tensor::shallow_clone, zero);
    says(none, "zero");
    // Nothing is a past too.
    assert_eq!(number(&Past::new().value(model.params(), tch::Tensor::shallow_clone).unwrap()), 0.0);
}

#[test]
fn synaptic_intelligence_keeps_its_state_when_it_refuses() {
    let theta = leaf(&Tensor::from_slice(&[1.0, -0.8]));
    let params = || Params::named([("w", theta.shallow_clone())]).unwrap();
    says(SynapticIntelligence::new(params(), 0.0), "`xi`");
    let mut si = SynapticIntelligence::new(params(), 0.5).unwrap();
    says(si.after(params()), "before()");
    says(si.before(params(), &(&theta * 2.0)), "0-dim");
    says(si.before(params(), &(&theta * f64::NAN).sum(Kind::Double)), "not finite");
    says(si.before(Pair::new(0.1).params(), &theta.sum(Kind::Double)), "2 are trained");
    let other = leaf(&wave(&[2], 0.1));
    let renamed = Params::named([("v", other.shallow_clone())]).unwrap();
    says(si.end_task(&renamed), "another model");
    says(si.penalty(-1.0, 1.0), "`c`");
    says(si.penalty(1.0, 0.0), "`examples`");
    // As if nothing had been: one step of -1 along a gradient of 2.
    si.before(params(), &(&theta * 2.0).sum(Kind::Double)).unwrap();
    says(si.before(params(), &(&theta * f64::NAN).sum(Kind::Double)), "not finite");
    set(&theta, &(theta.detach() - 1.0));
    si.after(params()).unwrap();
    says(si.after(params()), "before()");
    si.end_task(params()).unwrap();
    all_close(&values(si.importance("w").unwrap()), &[2.0 / 1.5; 2], 1e-12);
}

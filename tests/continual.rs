//! What stands for past data: identities that hold exactly, and what is refused.

mod support;

use support::{all_close, close, values};
use tch::nn::VarStore;
use tch::{Device, Kind, Tensor};
use tch_blr::continual::{
    LabelNoise, Memory, Model, Past, Quadratic, Regularizer, Replay, SoftLabels, SynapticIntelligence,
};
use tch_blr::nn::Likelihood;
use tch_blr::{
    DiagonalGaussian, Error, Fisher, FullGaussian, KroneckerGaussian, KroneckerParameter, Newton, Params, Rule, Sgd,
    StructuredRule,
};

const F64: (Kind, Device) = (Kind::Double, Device::Cpu);

/// Numbers without a pattern.
fn wave(shape: &[i64], phase: f64) -> Tensor {
    let n = shape.iter().product::<i64>();
    (Tensor::arange(n, F64) * 1.7 + phase).sin().reshape(shape)
}

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
        k.value(&Model { params: &self.params(), forward: &|x| x.matmul(&self.w) + &self.b }).unwrap()
    }

    fn gradient(&self, k: &dyn Regularizer) -> Vec<f64> {
        let found = Tensor::run_backward(&[self.graph(k)], &[&self.w, &self.b], false, false);
        [values(&found[0]), values(&found[1])].concat()
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
            FullGaussian::from(&d),
            at(&|| d.log_prob(model.params()).unwrap(), &|| d.copy_mean_to(model.params()).unwrap()),
        ),
        (
            Quadratic::from(&k),
            k.to_full().unwrap(),
            at(&|| k.log_prob(model.params()).unwrap(), &|| k.copy_mean_to(model.params()).unwrap()),
        ),
        (
            Quadratic::from(&f),
            FullGaussian::combine(&[(1.0, &f)]).unwrap(),
            at(&|| f.log_prob(model.params()).unwrap(), &|| f.copy_mean_to(model.params()).unwrap()),
        ),
    ];
    for (quadratic, same, expected) in cases {
        close(model.value(&quadratic), expected, 1e-11);
        let theta = Tensor::from_slice(&model.flat());
        let gradient = model.gradient(&quadratic);
        all_close(&gradient, &values(&same.precision().mv(&(&theta - same.mean_vector()))), 1e-11);
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
        let here = a.recentred(&model.params()).unwrap();
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
    let (mut sum, mut parts) = (Quadratic::towards_zero(&model.params(), 0.0).unwrap(), Vec::new());
    for task in 0..3 {
        let solution = Pair::new(f64::from(task));
        model.set(&solution.flat());
        let likelihood = Fisher::exact().likelihood(Likelihood::Categorical);
        let f = likelihood.diagonal(model.params(), [&x], |x| x.matmul(&model.w) + &model.b).unwrap();
        let entry = |name: &str, w: &Tensor| (name.to_owned(), w.detach().copy(), f.get(name).unwrap().copy());
        let one = Quadratic::new([entry("w", &model.w), entry("b", &model.b)]).unwrap().scaled(30.0).unwrap();
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

/// The minimum of a sum of losses over these weights.
fn minimize(params: &Params, loss: impl Fn() -> Tensor) {
    let mut opt = Newton::default().build(params.at(), 1.0).unwrap();
    for _ in 0..30 {
        opt.step(&loss).unwrap();
    }
}

/// So that `minimize` can take them by reference.
trait At {
    fn at(&self) -> Params;
}

impl At for Params {
    fn at(&self) -> Params {
        self.clone()
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
            let x = if orthogonal { x.linalg_qr("reduced").0 * wave(&[4], 0.5 + t as f64) * 3.0 } else { x };
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
        let params = all.params();
        minimize(&params, || {
            all.loss(task) + past.value(&Model { params: &params, forward: &|x| x.matmul(&all.w) }).unwrap()
        });
        FullGaussian::new([("w", all.w.detach().copy())], &(prior.precision() + all.precision(task))).unwrap()
    };
    for order in ORDERS {
        let q = order.iter().fold(all.prior(), |q, task| after(&q, *task));
        all_close(&values(&q.mean_vector()), &values(&m), 1e-12);
        all_close(&values(q.precision()), &values(&s), 1e-11);
    }
    // Each from the prior, merged: the prior counts once.
    let prior = all.prior();
    let each: Vec<_> = (0..3).map(|t| after(&prior, t)).collect();
    let q = FullGaussian::combine(&[(1.0, &each[0]), (1.0, &each[1]), (1.0, &each[2]), (-2.0, &prior)]).unwrap();
    all_close(&values(&q.mean_vector()), &values(&m), 1e-12);
}

#[test]
fn the_diagonal_is_exact_where_features_are_orthogonal() {
    let run = |all: &Regression, order: [usize; 3]| {
        let params = all.params();
        let zero = all.w.detach().zeros_like();
        let mut q = DiagonalGaussian::new([("w", zero.copy(), zero.full_like(DELTA))]).unwrap();
        for task in order {
            let past = Quadratic::from(&q);
            let forward = |x: &Tensor| x.matmul(&all.w);
            minimize(&params, || all.loss(task) + past.value(&Model { params: &params, forward: &forward }).unwrap());
            let f = Fisher::exact().likelihood(Likelihood::Gaussian { variance: VARIANCE });
            q = f.diagonal(all.params(), [&all.tasks[task].0], forward).unwrap().laplace(&q).unwrap();
        }
        q
    };
    let all = Regression::new(true);
    let (s, m) = all.joint();
    for order in ORDERS {
        let q = run(&all, order);
        all_close(&values(q.mean("w").unwrap()), &values(&m), 1e-12);
        all_close(&values(q.precision("w").unwrap()), &values(&s.diagonal(0, 0, 1)), 1e-11);
    }
    // And not elsewhere.
    let all = Regression::new(false);
    let off = number(&(run(&all, ORDERS[0]).mean("w").unwrap() - all.joint().1).abs().max());
    assert!(off > 0.01, "{off}");
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
        k.value(&Model { params: &self.params(), forward: &|x| self.forward(x) }).unwrap()
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
        let memory = || {
            Memory::new(&net.x, likelihood)
                .targets(&targets(likelihood))
                .weights(&(wave(&[8], 2.0).square() + 0.5))
        };
        let soft = SoftLabels::of(memory(), |x| net.forward(x)).unwrap();
        let noise = LabelNoise::of(memory(), |x| net.forward(x)).unwrap();
        let replay = Replay::new(memory()).unwrap();
        net.move_by(0.4);
        let parts: Vec<f64> = net
            .gradient(&net.value(&soft))
            .iter()
            .zip(net.gradient(&net.value(&noise)))
            .map(|(a, b)| a + b)
            .collect();
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

#[test]
fn the_losses_of_replay_are_the_likelihoods() {
    let net = Net::new(3);
    let z = net.forward(&net.x);
    for likelihood in LIKELIHOODS {
        let y = targets(likelihood);
        let expected = match likelihood {
            Likelihood::Categorical => tch_blr::nn::cross_entropy(&z, &y),
            Likelihood::Bernoulli => tch_blr::nn::binary_cross_entropy(&z, &y),
            _ => tch_blr::nn::squared_error(&z, &y, 0.4),
        };
        let expected = expected.unwrap().sum(Kind::Double);
        for w in [1.0, -2.0] {
            let replay = Replay::weighted(Memory::new(&net.x, likelihood).targets(&y), w).unwrap();
            let ours = net.value(&replay);
            let off: Vec<f64> = net.gradient(&ours).iter().map(|g| g / w).collect();
            all_close(&off, &net.gradient(&(&expected * 1.0).copy_graph(&net, likelihood, &y)), 1e-12);
        }
    }
}

/// A loss again, with a graph of its own.
trait CopyGraph {
    fn copy_graph(&self, net: &Net, likelihood: Likelihood, y: &Tensor) -> Tensor;
}

impl CopyGraph for Tensor {
    fn copy_graph(&self, net: &Net, likelihood: Likelihood, y: &Tensor) -> Tensor {
        let z = net.forward(&net.x);
        let losses = match likelihood {
            Likelihood::Categorical => tch_blr::nn::cross_entropy(&z, y),
            Likelihood::Bernoulli => tch_blr::nn::binary_cross_entropy(&z, y),
            _ => tch_blr::nn::squared_error(&z, y, 0.4),
        };
        losses.unwrap().sum(Kind::Double)
    }
}

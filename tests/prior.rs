//! Yesterday's posterior as today's prior in the rows over blocks: exact on linear regression, task after task.
//!
//! The model is Y = X Wᵀ with W `[2, 2]` and the loss ½ |Y - X Wᵀ|² summed over a task's N examples, so ess = N makes the
//! posterior's precision P₀ + I ⊗ XᵀX.

use support::{F64, all_close, close, values};
use tch::nn::Module;
use tch::{Kind, Tensor};
use tch_blr::rule::Row;
use tch_blr::{
    Evon, Expectation, FullGaussian, FullVon, Given, Ivon, KroneckerGaussian, Labels, Newton, NoisyKfac, Optimizer,
    Params, Posterior, Prior, Soap, Statistic, nn,
};

/// Precision of the first prior.
const P0: f64 = 0.5;

fn matrix(x: &[f64]) -> Tensor {
    Tensor::from_slice(x).reshape([-1, 2])
}

/// A rotation, whose columns are the eigenvectors of every XᵀX here.
fn basis() -> Tensor {
    let (sin, cos) = 0.6f64.sin_cos();
    matrix(&[cos, -sin, sin, cos])
}

/// A task of `N` = 4 examples.
struct Task {
    x: Tensor,
    y: Tensor,
}

const N: f64 = 4.0;

impl Task {
    /// XᵀX = Q diag(eigenvalues) Qᵀ, and the least squares at diag(solution) Qᵀ: in the basis everything is diagonal.
    fn aligned(eigenvalues: [f64; 2], solution: [f64; 2]) -> Task {
        let orthonormal = matrix(&[0.5, 0.5, 0.5, -0.5, 0.5, 0.5, 0.5, -0.5]);
        let q = basis();
        let x = orthonormal.matmul(&Tensor::from_slice(&eigenvalues).sqrt().diag(0)).matmul(&q.tr());
        let w = Tensor::from_slice(&solution).diag(0).matmul(&q.tr());
        Task { y: x.matmul(&w.tr()), x }
    }

    /// In no basis in particular.
    fn other() -> Task {
        Task {
            x: matrix(&[1.0, 0.3, -0.4, 2.0, 0.7, 0.7, 0.2, -1.5]),
            y: matrix(&[1.0, 2.0, -1.0, 0.5, 0.0, 1.0, 2.0, -0.5]),
        }
    }

    /// Mean over the examples, by a layer that records.
    fn loss(&self, w: &Tensor) -> Tensor {
        let layer = nn::Linear { ws: w.shallow_clone(), bs: None };
        nn::squared_error(&layer.forward(&self.x), &self.y, 1.0).unwrap().mean(Kind::Double)
    }

    /// I ⊗ XᵀX, what its likelihood adds to the precision of the rows of W.
    fn precision(&self) -> Tensor {
        Tensor::eye(2, F64).kron(&self.x.tr().matmul(&self.x))
    }

    /// What it adds to precision · mean.
    fn moment(&self) -> Tensor {
        self.y.tr().matmul(&self.x).reshape([-1])
    }
}

fn tasks() -> [Task; 2] {
    [Task::aligned([3.0, 0.5], [1.0, -2.0]), Task::aligned([0.25, 4.0], [2.0, 0.5])]
}

/// Precision and mean of the first prior with the likelihoods of these tasks.
fn exact(tasks: &[&Task]) -> (Tensor, Vec<f64>) {
    let precision = tasks.iter().fold(Tensor::eye(4, F64) * P0, |p, task| p + task.precision());
    let moment = tasks.iter().fold(Tensor::zeros([4], F64), |m, task| m + task.moment());
    let mean = Tensor::linalg_solve(&precision, &moment, true);
    (precision, values(&mean))
}

/// Weights whose distance from every solution above is diagonal in the basis.
fn weights() -> (Tensor, Params) {
    let w = Tensor::from_slice(&[0.3, 0.1]).diag(0).matmul(&basis().tr()).copy().set_requires_grad(true);
    let params = Params::named([("w", w.shallow_clone())]).unwrap();
    (w, params)
}

/// Signs z of four samples, for a number of steps: z² = 1, and the sums of zzᵀ and zᵀz over the samples are diagonal, so
/// that antithetic pairs give the exact Hessian of a quadratic and moments that are diagonal where the mean is.
fn signs(steps: usize) -> Given {
    let sample = |k: usize| {
        let (row, column) = (if k < 2 { 1.0 } else { -1.0 }, if k.is_multiple_of(2) { 1.0 } else { -1.0 });
        vec![matrix(&[1.0, column, row, row * column])]
    };
    Given((0..steps).map(|_| (0..4).map(sample).collect()).collect())
}

#[track_caller]
fn is(q: &FullGaussian, tasks: &[&Task], tolerance: f64) {
    let (precision, mean) = exact(tasks);
    all_close(&values(q.precision_matrix()), &values(&precision), tolerance);
    all_close(&values(&q.mean_vector()), &mean, tolerance);
}

/// Learns a task from a prior: many steps, with exact expectations.
fn learn<R: Row>(rule: R, lr: f64, steps: usize, task: &Task, prior: Prior) -> Optimizer<R> {
    let (w, params) = weights();
    let mut opt = rule.builder().prior(prior).noise(signs(steps)).build(params, lr).unwrap();
    for _ in 0..steps {
        opt.step(|| task.loss(&w)).unwrap();
    }
    opt
}

#[test]
fn full_von_in_sequence_is_joint() {
    let rule = FullVon::default().ess(N).beta2(0.0).improved(false).hessian(Statistic::Hessian);
    let rule = rule.expectation(Expectation::Antithetic { pairs: 4 });
    let others = [Task::other(), Task::aligned([0.25, 4.0], [2.0, 0.5])];
    for [first, second] in [[&others[0], &others[1]], [&others[1], &others[0]]] {
        // One step is exact.
        let q = learn(rule, 1.0, 1, first, Prior::isotropic(P0)).posterior().unwrap();
        is(&q, &[first], 1e-12);
        is(&learn(rule, 1.0, 1, second, Prior::from(&q)).posterior().unwrap(), &[first, second], 1e-12);
        let newton = Newton::default().ess(N);
        is(&learn(newton, 1.0, 1, second, Prior::from(&q)).posterior().unwrap(), &[first, second], 1e-12);
    }
}

fn evon() -> Evon {
    Evon::default().ess(N).beta1(0.0).beta2(0.9).expectation(Expectation::Antithetic { pairs: 4 })
}

fn kfac() -> NoisyKfac {
    let rule = NoisyKfac::default().ess(N).beta1(0.0).beta2(0.0).frequency(1).labels(Labels::Exact);
    rule.split_damping(false).expectation(Expectation::Delta)
}

/// With a prior and data that are diagonal in one basis, in either order.
#[test]
fn rows_in_a_basis_in_sequence_are_joint() {
    fn check<R: Row<Posterior = KroneckerGaussian>>(rule: R, lr: f64, steps: usize, tolerance: f64) {
        let tasks = tasks();
        for [first, second] in [[&tasks[0], &tasks[1]], [&tasks[1], &tasks[0]]] {
            let q = learn(rule, lr, steps, first, Prior::isotropic(P0)).posterior().unwrap();
            is(&q.full().unwrap(), &[first], tolerance);
            let q = learn(rule, lr, steps, second, Prior::from(&q)).posterior().unwrap();
            is(&q.full().unwrap(), &[first, second], tolerance);
        }
    }
    check(evon(), 0.2, 600, 1e-9);
    check(kfac(), 1.0, 2, 1e-12);
}

/// Where the bases do not agree, the mean still goes to the minimum of loss and prior together.
#[test]
fn the_gradient_of_a_prior_in_another_basis_is_exact() {
    fn check<R: Row>(rule: R, lr: f64, steps: usize, prior: &KroneckerGaussian) {
        let task = Task::other();
        let (w, params) = weights();
        let mut opt = rule.builder().prior(prior).noise(signs(steps)).build(params, lr).unwrap();
        for _ in 0..steps {
            opt.step(|| task.loss(&w)).unwrap();
        }
        let full = prior.full().unwrap();
        let precision = full.precision_matrix() + task.precision();
        let moment = full.precision_matrix().mv(&full.mean_vector()) + task.moment();
        all_close(&values(&w), &values(&Tensor::linalg_solve(&precision, &moment, true)), 1e-8);
    }
    let q = learn(evon(), 0.2, 300, &tasks()[0], Prior::isotropic(P0)).posterior().unwrap();
    check(evon(), 0.1, 2000, &q);
    check(kfac().frequency(1), 0.5, 200, &q);
    let diagonal = q.diagonal().unwrap();
    // Diagonal ones are in the identity's basis, which is another one as well.
    let (w, params) = weights();
    let task = &tasks()[1];
    let mut opt = evon().prior(&diagonal).noise(signs(2000)).build(params, 0.1).unwrap();
    for _ in 0..2000 {
        opt.step(|| task.loss(&w)).unwrap();
    }
    let precision = diagonal.full().unwrap().precision_matrix() + task.precision();
    let moment =
        diagonal.full().unwrap().precision_matrix().mv(&diagonal.full().unwrap().mean_vector()) + task.moment();
    all_close(&values(&w), &values(&Tensor::linalg_solve(&precision, &moment, true)), 1e-8);
}

/// Before any data, q is the prior: at the weights, with its precision.
#[test]
fn without_data_the_posterior_is_the_prior() {
    let q = learn(evon(), 0.2, 100, &tasks()[0], Prior::isotropic(P0)).posterior().unwrap();
    let (full, diagonal) = (q.full().unwrap(), q.diagonal().unwrap());
    let dense = |q: &FullGaussian| values(q.precision_matrix());
    let kronecker = |opt: &Optimizer<Evon>| dense(&opt.posterior().unwrap().full().unwrap());
    all_close(&kronecker(&evon().prior(&q).build(weights().1, 0.1).unwrap()), &dense(&full), 1e-12);
    all_close(
        &kronecker(&evon().prior(&diagonal).build(weights().1, 0.1).unwrap()),
        &dense(&diagonal.full().unwrap()),
        1e-12,
    );
    let opt = kfac().prior(&q).build(weights().1, 0.1).unwrap();
    all_close(&dense(&opt.posterior().unwrap().full().unwrap()), &dense(&full), 1e-12);
    let von = FullVon::default().ess(N);
    for (prior, expected) in
        [(Prior::from(&full), &full), (Prior::from(&q), &full), (Prior::from(&diagonal), &diagonal.full().unwrap())]
    {
        let opt = von.prior(prior).build(weights().1, 0.1).unwrap();
        all_close(&dense(&opt.posterior().unwrap()), &dense(expected), 1e-12);
    }
}

#[test]
fn a_prior_of_a_family_chosen_at_run_time() {
    let q = learn(evon(), 0.2, 50, &tasks()[0], Prior::isotropic(P0)).posterior().unwrap();
    let expected = values(&q.precision("w").unwrap());
    let any: Box<dyn Posterior> = Box::new(q);
    let opt = evon().prior(Prior::try_from(&*any).unwrap()).build(weights().1, 0.1).unwrap();
    all_close(&values(&opt.posterior().unwrap().precision("w").unwrap()), &expected, 1e-12);
    let binary = tch_blr::MeanFieldBernoulli::new([("w", matrix(&[0.1, 0.2, 0.3, 0.4]))]).unwrap();
    let e = Prior::try_from(&binary as &dyn Posterior).unwrap_err().to_string();
    assert!(e.contains("must be a diagonal, Kronecker-factored or full Gaussian"), "{e}");
}

/// A checkpoint holds the prior, in the family it has.
#[test]
fn training_under_a_prior_with_a_basis_resumes_bit_by_bit() {
    let q = learn(evon(), 0.2, 50, &tasks()[0], Prior::isotropic(P0)).posterior().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x");
    let task = &tasks()[1];
    let (w, params) = weights();
    let mut opt = evon().prior(&q).noise(tch_blr::Philox { seed: 1 }).build(params, 0.1).unwrap();
    opt.step(|| task.loss(&w)).unwrap();
    opt.save(&path).unwrap();
    let (again, params) = weights();
    let mut resumed = evon().noise(tch_blr::Philox { seed: 2 }).build(params, 0.3).unwrap();
    resumed.load(&path).unwrap();
    for _ in 0..3 {
        let losses = [opt.step(|| task.loss(&w)).unwrap(), resumed.step(|| task.loss(&again)).unwrap()];
        assert_eq!(losses[0], losses[1]);
    }
    assert_eq!(values(&w), values(&again));
}

/// SOAP's posterior is a heuristic, but its prior pulls as any other: with a learning rate that goes to zero it ends at the
/// minimum of loss and prior.
#[test]
fn soap_follows_the_prior_too() {
    let q = learn(evon(), 0.2, 300, &tasks()[0], Prior::isotropic(P0)).posterior().unwrap();
    let (w, params) = weights();
    let task = &tasks()[1];
    let rule = Soap::default().ess(N).decoupled_decay(0.0);
    let mut opt = rule.prior(&q).build(params, 0.0).unwrap();
    for t in 0..4000 {
        opt.set_lr(0.05 * 0.997f64.powi(t)).unwrap();
        opt.step(|| task.loss(&w)).unwrap();
    }
    let (_, mean) = exact(&[&tasks()[0], task]);
    all_close(&values(&w), &mean, 1e-4);
}

#[test]
fn what_a_row_cannot_take_is_said_with_the_way_out() {
    let q = learn(evon(), 0.2, 5, &tasks()[0], Prior::isotropic(P0)).posterior().unwrap();
    let refused = |e: tch_blr::Error, row: &str| {
        let text = e.to_string();
        assert!(text.contains(row) && text.contains(".diagonal()"), "{text}");
    };
    refused(Ivon::default().ess(N).prior(&q).build(weights().1, 0.1).unwrap_err(), "ivon");
    refused(evon().prior(q.full().unwrap()).build(weights().1, 0.1).unwrap_err(), "evon");
    let opt = Ivon::default().ess(N).prior(q.diagonal().unwrap()).build(weights().1, 0.1).unwrap();
    let ours = opt.posterior().unwrap().precision("w").unwrap();
    let theirs = q.full().unwrap().precision_matrix().diag(0);
    for (a, b) in values(&ours).into_iter().zip(values(&theirs)) {
        close(a, b, 1e-12);
    }
}

/// A posterior has nothing to say to frozen parameters, and need not, until they are trained.
#[test]
fn frozen_parameters_need_no_prior() {
    let vs = support::store(F64);
    let [trunk, head] = ["trunk", "head"].map(|name| support::variable(&vs, name, 0, &Tensor::from_slice(&[1.0, 2.0])));
    let trunk = trunk.set_requires_grad(false);
    let loss = || (&trunk * &head).square().sum(Kind::Double);
    let row = Ivon::default().ess(20.0).beta2(0.9);
    let mut opt = row.build(&vs, 0.1).unwrap();
    opt.step(loss).unwrap();
    let q = opt.posterior().unwrap();
    assert_eq!(q.names().collect::<Vec<_>>(), ["head"]);
    let mut next = row.prior(&q).build(&vs, 0.1).unwrap();
    next.step(loss).unwrap();
    all_close(&values(&trunk), &[1.0, 2.0], 0.0);
    assert_eq!(next.posterior().unwrap().names().count(), 1);
    // Also in rows over blocks, and after a round through a file.
    Evon::default().ess(20.0).prior(&q).build(&vs, 0.1).unwrap().step(loss).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("run");
    next.save(&path).unwrap();
    next.load(&path).unwrap();
    next.step(loss).unwrap();

    let before = values(&head);
    let trunk = trunk.set_requires_grad(true);
    support::refused(next.step(|| (&trunk * &head).square().sum(Kind::Double)), &["`trunk`", "elsewhere"]);
    assert_eq!(values(&head), before);
    // One that is told what to do there has it from the beginning.
    let trunk = trunk.set_requires_grad(false);
    let mut told = row.prior(Prior::from(&q).elsewhere(0.25)).build(&vs, 0.1).unwrap();
    let trunk = trunk.set_requires_grad(true);
    told.step(|| (&trunk * &head).square().sum(Kind::Double)).unwrap();
    assert_eq!(told.posterior().unwrap().names().count(), 2);
}

//! Federated learning: three clients of one linear regression, whose joint posterior is known.

use std::path::Path;
use support::{F64, assert_close, bits, close, largest, refused, store};
use tch::nn::VarStore;
use tch::{Device, Kind, Tensor};
use tch_blr::federated::{
    Admm, BayesAdmm, Dual, FedAvg, FedLap, FisherMerge, Gaussian, Local, Method, PosteriorMerge, Pvi, Server,
};
use tch_blr::parallel::{Collective, Threads, gather};
use tch_blr::{
    DiagonalGaussian, Error, Expectation, FullGaussian, FullVon, Ivon, Params, Statistic, clamp_information,
};

/// Precision of the prior.
const DELTA: f64 = 0.5;

/// Clients of a regression y = xᵀθ + noise of variance 1, x = (1, ·): names, inputs, targets.
const DATA: [(&str, &[f64], &[f64]); 3] =
    [("one", &[0.0, 1.0], &[1.0, 2.0]), ("two", &[2.0, 3.0, 4.0], &[2.0, 2.5, 5.0]), ("three", &[-1.0], &[0.0])];

fn t(x: &[f64]) -> Tensor {
    Tensor::from_slice(x)
}

fn matrix(x: [f64; 4]) -> Tensor {
    t(&x).reshape([2, 2])
}

/// x `[n, 2]` and y `[n]` of one client.
fn data(k: usize) -> (Tensor, Tensor) {
    let x = t(DATA[k].1);
    (Tensor::stack(&[x.ones_like(), x], 1), t(DATA[k].2))
}

/// The summed loss ½θᵀHθ - bᵀθ of one client.
fn quadratic(k: usize) -> (Tensor, Tensor) {
    let (x, y) = data(k);
    (x.tr().matmul(&x), x.tr().mv(&y))
}

fn joint() -> (Tensor, Tensor) {
    (t(&[0.745_454_545_455, 0.850_505_050_505]), matrix([6.5, 9.0, 9.0, 31.5]))
}

fn clients() -> impl Iterator<Item = (&'static str, f64)> {
    DATA.iter().map(|(name, x, _)| (*name, x.len() as f64))
}

/// What the tests need of both families: a mean `[2]` and a precision `[2, 2]` over the parameters `intercept` and
/// `slope`.
trait Two: Gaussian {
    fn of(mean: &Tensor, precision: &Tensor) -> Self;
    fn matrix(&self) -> Tensor;
    fn vector(&self) -> Tensor {
        Tensor::cat(&[self.mean("intercept").unwrap(), self.mean("slope").unwrap()], 0)
    }
}

fn named(x: &Tensor) -> [(&'static str, Tensor); 2] {
    [("intercept", x.narrow(0, 0, 1)), ("slope", x.narrow(0, 1, 1))]
}

impl Two for FullGaussian {
    fn of(mean: &Tensor, precision: &Tensor) -> Self {
        FullGaussian::new(named(mean), precision).unwrap()
    }
    fn matrix(&self) -> Tensor {
        self.precision_matrix().copy()
    }
}

/// Of a precision it keeps the diagonal, as the best diagonal Gaussian does.
impl Two for DiagonalGaussian {
    fn of(mean: &Tensor, precision: &Tensor) -> Self {
        let s = named(&precision.diagonal(0, 0, 1));
        DiagonalGaussian::new(named(mean).into_iter().zip(s).map(|((name, m), (_, s))| (name, m, s))).unwrap()
    }
    fn matrix(&self) -> Tensor {
        let s = |name| self.precision(name).unwrap();
        Tensor::cat(&[s("intercept"), s("slope")], 0).diag(0)
    }
}

fn prior<Q: Two>() -> Q {
    Q::of(&Tensor::zeros([2], F64), &(Tensor::eye(2, F64) * DELTA))
}

fn server<Q: Two>(method: impl Into<Method>) -> Server<Q> {
    Server::new(method, &prior(), clients()).unwrap()
}

fn square(v: &Tensor) -> Tensor {
    if v.dim() == 1 { v.diag(0) } else { v.copy() }
}

/// The minimum of ess E[L_k + c] + KL(q ‖ prior) in closed form, by what a client is told.
fn exact<Q: Two>(local: &Local<Q>, k: usize) -> Q {
    let (h, b) = quadratic(k);
    let (s, scale) = (local.prior().matrix(), local.ess() / DATA[k].1.len() as f64);
    let share = local.share();
    let linear = s.mv(&local.prior().vector()) - share.linear_vector() + b * scale;
    let precision = &s - square(&share.precision_matrix()) + h * scale;
    let mean = Tensor::linalg_solve(&precision, &linear.unsqueeze(1), true).squeeze_dim(1);
    Q::of(&mean, &precision)
}

fn answers<Q: Two>(server: &Server<Q>) -> Vec<(&'static str, Q)> {
    (0..3).map(|k| (DATA[k].0, exact(&server.client(DATA[k].0).unwrap(), k))).collect()
}

fn round<Q: Two>(server: &mut Server<Q>) {
    let all = answers(server);
    server.update(all.iter().map(|(name, q)| (*name, q))).unwrap();
}

fn rounds<Q: Two>(server: &mut Server<Q>, n: usize) {
    (0..n).for_each(|_| round(server));
}

fn norm(x: &Tensor) -> f64 {
    x.square().sum(Kind::Double).double_value(&[]).sqrt()
}

/// ‖m - m*‖ against the exact mean.
fn mean_error<Q: Two>(server: &Server<Q>) -> f64 {
    let (h, b) = (0..3).map(quadratic).reduce(|(h, b), (h2, b2)| (h + h2, b + b2)).unwrap();
    let h = h + Tensor::eye(2, F64) * DELTA;
    norm(&(server.posterior().vector() - Tensor::linalg_solve(&h, &b.unsqueeze(1), true).squeeze_dim(1)))
}

/// ‖S - S*‖_F
fn precision_error<Q: Two>(server: &Server<Q>) -> f64 {
    norm(&(server.posterior().matrix() - joint().1))
}

fn admm(rho: f64, damping: f64) -> BayesAdmm {
    BayesAdmm { rho, damping, temperature: 1.0 }
}

/// The exact answer to how many digits the reference has.
#[track_caller]
fn printed(ours: f64, digits: f64) {
    close(ours, digits, 0.005 * 10f64.powf(digits.log10().floor()) * 10.0);
}

#[test]
fn every_method_that_is_exact_in_one_round_is() {
    let third = BayesAdmm { rho: 1.0 / 3.0, ..admm(1.0, 1.0) };
    for method in [Method::from(third), PosteriorMerge.into(), FisherMerge.into(), Pvi { damping: 1.0 }.into()] {
        let mut server = server::<FullGaussian>(method);
        round(&mut server);
        assert_close(&server.posterior().vector(), &joint().0, 1e-12);
        assert_close(&server.posterior().matrix(), &joint().1, 1e-15);
    }
}

/// Clients have 2, 3 and 1 of the six examples. Nothing learned is nothing changed, where a product adds three steps
/// up; what was learned counts by its precision.
#[test]
fn fisher_merging_averages_by_precision() {
    let here = t(&[1.0, -2.0]);
    let q = |mean: &Tensor, s: [f64; 2]| DiagonalGaussian::of(mean, &t(&s).diag(0));
    for (method, times) in [(Method::from(FisherMerge), 1.0), (PosteriorMerge.into(), 3.0)] {
        let mut server = server::<DiagonalGaussian>(method).starting_at(&q(&here, [DELTA; 2])).unwrap();
        assert_eq!(server.client("two").unwrap().ess(), if times > 1.0 { 3.0 } else { 6.0 });
        let idle = q(&here, [DELTA; 2]);
        server.update(DATA.map(|(name, ..)| (name, &idle))).unwrap();
        assert_close(&server.posterior().vector(), &(&here * times), 1e-15);
    }
    let mut server = server::<DiagonalGaussian>(FisherMerge);
    let [one, two, three] =
        [([1.0, 2.0], [3.0, 6.0]), ([2.0, 0.0], [1.0, 0.5]), ([-1.0, 4.0], [9.0, 0.5])].map(|(m, s)| q(&t(&m), s));
    server.update([("one", &one), ("two", &two), ("three", &three)]).unwrap();
    // S = (2·3 + 3·1 + 1·9)/6 and (2·6 + 3·0.5 + 1·0.5)/6; S m = (2·3·1 + 3·1·2 - 9)/6 and (2·6·2 + 0.5·4)/6.
    assert_close(&server.posterior().matrix(), &t(&[3.0, 14.0 / 6.0]).diag(0), 1e-15);
    assert_close(&server.posterior().vector(), &t(&[3.0 / 18.0, 26.0 / 14.0]), 1e-15);
}

/// With η = 1 the dual of a quadratic loss is the loss, after one round and for any ρ.
#[test]
fn duals_are_the_losses() {
    for rho in [0.1, 1.0 / 3.0, 1.0, 7.0] {
        let mut server = server::<FullGaussian>(admm(rho, 1.0));
        for _ in 0..2 {
            round(&mut server);
            for (k, (name, ..)) in DATA.iter().enumerate() {
                let (dual, (h, b)) = (server.dual(name).unwrap(), quadratic(k));
                assert!(largest(&(dual.precision_matrix() - h)) < 1e-13);
                assert!(largest(&(dual.linear_vector() - b)) < 1e-13);
            }
        }
    }
}

#[test]
fn the_error_of_bayes_admm_shrinks_by_one_minus_a() {
    // Half of S* - S₀ from elsewhere, in every round.
    let start = FullGaussian::of(&Tensor::zeros([2], F64), &Tensor::eye(2, F64));
    let mut halves = server(admm(1.0 / 3.0, 1.0)).starting_at(&start).unwrap();
    let errors: Vec<f64> = (0..8)
        .map(|_| {
            round(&mut halves);
            precision_error(&halves)
        })
        .collect();
    for (ours, reference) in errors.iter().zip([0.354, 0.177, 0.0884]) {
        printed(*ours, reference);
    }
    for pair in errors.windows(2) {
        close(pair[1] / pair[0], 0.5, 1e-10);
    }
    let mut server = server::<FullGaussian>(admm(1.0, 1.0));
    round(&mut server);
    for _ in 0..8 {
        let before = (mean_error(&server), precision_error(&server));
        round(&mut server);
        close(precision_error(&server) / before.1, 0.75, 1e-12);
    }
}

#[test]
fn damped_sites_converge() {
    let mut server = server::<FullGaussian>(Pvi { damping: 1.0 / 3.0 });
    rounds(&mut server, 30);
    println!("PVI, 30 rounds: {:e}", mean_error(&server));
    printed(mean_error(&server), 3.3e-7);
}

/// The best diagonal Gaussian of a quadratic has the exact mean, and the diagonal of the precision.
#[test]
fn diagonal_posteriors_find_the_exact_mean() {
    for method in [Method::from(admm(1.0, 0.5)), Pvi { damping: 0.25 }.into()] {
        let mut server = server::<DiagonalGaussian>(method);
        rounds(&mut server, 400);
        assert!(mean_error(&server) < 1e-13, "{:e}", mean_error(&server));
        assert_close(&server.posterior().matrix(), &matrix([6.5, 0.0, 0.0, 31.5]), 1e-14);
    }
}

#[test]
fn federated_admm_converges_linearly() {
    let mut server = server::<DiagonalGaussian>(Admm { rho: 3.0 });
    rounds(&mut server, 20);
    println!("ADMM, 20 rounds: {:e}", mean_error(&server));
    printed(mean_error(&server), 2.2e-4);
    rounds(&mut server, 80);
    println!("ADMM, 100 rounds: {:e}", mean_error(&server));
    assert!(mean_error(&server) < 1e-15);
    // The covariance is an assumption, and stays.
    assert_eq!(server.posterior().matrix(), Tensor::eye(2, F64) * DELTA);
}

/// BayesADMM with precisions that are held at the prior's, ρ in its units; computed here in plain numbers.
#[test]
fn federated_admm_is_bayes_admm_of_fixed_precision() {
    let rho = 3.0;
    let mut server = server::<DiagonalGaussian>(Admm { rho });
    let (mut w, mut v) = (Tensor::zeros([2], F64), [(); 3].map(|()| Tensor::zeros([2], F64)));
    let relative = rho / DELTA;
    for _ in 0..10 {
        round(&mut server);
        let mut sum = Tensor::zeros([2], F64);
        for (k, v) in v.iter_mut().enumerate() {
            let (h, b) = quadratic(k);
            let precision = h / relative + Tensor::eye(2, F64) * DELTA;
            let linear = (b - &*v) / relative + &w * DELTA;
            let theta = Tensor::linalg_solve(&precision, &linear.unsqueeze(1), true).squeeze_dim(1);
            *v += (&theta - &w) * (DELTA * relative);
            sum += theta * DELTA;
        }
        let a = 1.0 / (1.0 + 3.0 * relative);
        w = (sum * ((1.0 - a) / 3.0) + v.iter().fold(Tensor::zeros([2], F64), |s, v| s + v) * a) / DELTA;
        assert_close(&server.posterior().vector(), &w, 1e-13);
    }
}

#[test]
fn fed_lap_converges_if_damped_and_diverges_if_not() {
    let mut damped = server::<DiagonalGaussian>(FedLap { damping: 1.0 / 3.0 });
    let mut done = 0;
    for (n, error) in [(5, 0.151), (50, 9.8e-3), (500, 1.1e-9)] {
        rounds(&mut damped, n - done);
        done = n;
        println!("FedLap, {n} rounds: {:e}", mean_error(&damped));
        printed(mean_error(&damped), error);
    }
    let mut server = server::<DiagonalGaussian>(FedLap { damping: 1.0 });
    rounds(&mut server, 1000);
    println!("FedLap, undamped, 1000 rounds: {:e}", mean_error(&server));
    assert!(mean_error(&server) > 1e3);
}

/// FedLap-Cov in its own equations: Laplace's approximation at the minimum of the client's loss, full and diagonal.
#[test]
fn fed_lap_cov_is_partitioned_inference_with_laplace() {
    fn check<Q: Two>(keep: fn(&Tensor) -> Tensor, dual: fn(&Tensor) -> Dual) {
        let eta = 1.0 / 3.0;
        let mut server = server::<Q>(Pvi { damping: eta });
        let zero = Tensor::zeros([2], F64);
        let (mut v, mut big) = ([(); 3].map(|()| zero.copy()), [(); 3].map(|()| zero.diag(0)));
        let (mut w, mut s) = (zero.copy(), Tensor::eye(2, F64) * DELTA);
        for _ in 0..40 {
            let model = Regression::new();
            let mut all = Vec::new();
            for k in 0..3 {
                let (h, b) = quadratic(k);
                let local = server.client(DATA[k].0).unwrap();
                let minimum = exact(&local, k).vector();
                model.set(&minimum);
                all.push((DATA[k].0, local.laplace(&model.vs, &dual(&h)).unwrap()));
                // By the equations of the paper.
                let (sum, linear) = (&h - &big[k] + &s, b - &v[k] + s.mv(&w));
                let wk = Tensor::linalg_solve(&sum, &linear.unsqueeze(1), true).squeeze_dim(1);
                let sk = keep(&h) - &big[k] + &s;
                v[k] += (sk.mv(&wk) - s.mv(&w)) * eta;
                big[k] = &big[k] * (1.0 - eta) + keep(&h) * eta;
            }
            server.update(all.iter().map(|(name, q)| (*name, q))).unwrap();
            s = big.iter().fold(Tensor::eye(2, F64) * DELTA, |s, v| s + v);
            let linear = v.iter().fold(zero.copy(), |s, v| s + v);
            w = Tensor::linalg_solve(&s, &linear.unsqueeze(1), true).squeeze_dim(1);
            assert_close(&server.posterior().vector(), &w, 1e-11);
            assert_close(&server.posterior().matrix(), &s, 1e-13);
        }
        assert!(mean_error(&server) < 1e-6, "{:e}", mean_error(&server));
    }
    check::<FullGaussian>(Tensor::copy, |h| Dual::full(named(&Tensor::zeros([2], F64)), h).unwrap());
    check::<DiagonalGaussian>(
        |h| h.diagonal(0, 0, 1).diag(0),
        |h| {
            let h = named(&h.diagonal(0, 0, 1));
            Dual::diagonal(h.map(|(name, h)| (name, h.zeros_like(), h))).unwrap()
        },
    );
}

/// A model of one client, and its mean loss.
struct Regression {
    vs: VarStore,
    theta: [Tensor; 2],
    params: Params,
}

impl Regression {
    fn new() -> Self {
        let vs = store(F64);
        let theta = ["intercept", "slope"].map(|name| vs.root().zeros(name, &[1]));
        let params = Params::from(&vs);
        Regression { vs, theta, params }
    }

    fn set(&self, theta: &Tensor) {
        tch::no_grad(|| self.theta.iter().zip(0..).for_each(|(p, i)| p.shallow_clone().copy_(&theta.narrow(0, i, 1))));
    }

    fn loss(&self, k: usize) -> Tensor {
        let (x, y) = data(k);
        (x.mv(&Tensor::cat(&self.theta, 0)) - y).square().mean(Kind::Double) * 0.5
    }
}

/// An optimizer is the client: one Newton step on the mean loss with the correction, and one from the cavity without.
#[test]
fn an_optimizer_answers_as_the_closed_form_does() {
    for method in [Method::from(admm(1.5, 0.7)), Pvi { damping: 0.3 }.into()] {
        let mut server = server::<FullGaussian>(method);
        for _ in 0..4 {
            let mut all = Vec::new();
            for (k, (name, ..)) in DATA.iter().enumerate() {
                let local = server.client(name).unwrap();
                let newton = FullVon::default().ess(local.ess()).beta2(0.0).improved(false);
                let newton = newton.hessian(Statistic::Hessian).expectation(Expectation::Delta);
                let step = |prior: &FullGaussian, corrected: bool| {
                    let model = Regression::new();
                    local.start(&model.vs).unwrap();
                    let mut opt = newton.prior(prior).build(&model.vs, 1.0).unwrap();
                    let loss = || {
                        let c = if corrected { local.correction(&model.params)? } else { Tensor::from(0.0) };
                        Ok::<_, Error>(model.loss(k) + c)
                    };
                    opt.step(loss).unwrap();
                    opt.posterior().unwrap()
                };
                let expected = exact(&local, k);
                let corrected = step(local.prior(), true);
                // Without a mean over duals in the server's posterior, there is always a cavity.
                let cavity = matches!(method, Method::Pvi(_)).then(|| step(&local.cavity().unwrap(), false));
                for q in [&corrected].into_iter().chain(&cavity) {
                    assert_close(&q.vector(), &expected.vector(), 1e-12);
                    assert_close(&q.matrix(), &expected.matrix(), 1e-12);
                }
                all.push((*name, corrected));
            }
            server.update(all.iter().map(|(name, q)| (*name, q))).unwrap();
        }
    }
}

/// Rows that take no prior minimize the mean loss and the penalty: where the closed form is, its gradient is zero.
#[test]
fn the_penalty_is_the_prior_and_the_correction() {
    for method in
        [Method::from(FedAvg), FedLap { damping: 0.3 }.into(), Admm { rho: 2.0 }.into(), admm(0.5, 0.5).into()]
    {
        let mut server = server::<DiagonalGaussian>(method);
        rounds(&mut server, 3);
        for (k, (name, ..)) in DATA.iter().enumerate() {
            let (local, model) = (server.client(name).unwrap(), Regression::new());
            let q = exact(&local, k);
            model.set(&q.vector());
            let loss = model.loss(k) + local.penalty(&model.params).unwrap();
            for g in Tensor::run_backward(&[loss], &model.theta, false, false) {
                assert!(largest(&g) < 1e-12, "{method:?}: {g}");
            }
            assert_close(&local.at(&model.vs).unwrap().vector(), &q.vector(), 1e-15);
        }
    }
}

/// The correction is a control variate: at the fixed point it cancels the loss at every sample, so IVON stands still,
/// though its samples are noisy. With inputs that are orthogonal, where a diagonal V is all of the Hessian.
#[test]
fn ivon_stands_still_at_the_fixed_point() {
    let (x, y) = (t(&[1.0, 1.0, 1.0, -1.0]).reshape([2, 2]), t(&[1.0, 2.0]));
    let mut server = Server::new(admm(0.5, 1.0), &prior::<DiagonalGaussian>(), [("a", 2.0), ("b", 2.0)]).unwrap();
    let answer = |local: &Local<DiagonalGaussian>| {
        let precision =
            local.prior().matrix() - square(&local.share().precision_matrix()) + Tensor::eye(2, F64) * local.ess();
        let linear = local.prior().matrix().mv(&local.prior().vector()) - local.share().linear_vector()
            + x.tr().mv(&y) * (local.ess() / 2.0);
        DiagonalGaussian::of(&(linear / precision.diagonal(0, 0, 1)), &precision)
    };
    for _ in 0..80 {
        let all = ["a", "b"].map(|name| (name, answer(&server.client(name).unwrap())));
        server.update(all.iter().map(|(name, q)| (*name, q))).unwrap();
    }
    let local = server.client("a").unwrap();
    let model = Regression::new();
    local.start(&model.vs).unwrap();
    let mut opt = Ivon::default()
        .ess(local.ess())
        .beta2(0.5)
        .prior(local.prior())
        .noise(tch_blr::Philox { seed: 1 })
        .build(&model.vs, 0.1)
        .unwrap();
    for _ in 0..10 {
        let loss = || {
            let loss = (x.mv(&Tensor::cat(&model.theta, 0)) - &y).square().mean(Kind::Double) * 0.5;
            Ok::<_, Error>(loss + local.correction(&model.params)?)
        };
        opt.step(loss).unwrap();
    }
    let q = opt.posterior().unwrap();
    assert_close(&q.vector(), &server.posterior().vector(), 1e-9);
    assert_close(&q.matrix(), &server.posterior().matrix(), 1e-9);
}

/// The temperature divides the losses, and ess says so: the fixed point is the posterior of l/τ.
#[test]
fn temperature_divides_the_losses() {
    let mut server = server::<FullGaussian>(BayesAdmm { rho: 0.5, damping: 1.0, temperature: 0.1 });
    assert_eq!(server.client("two").unwrap().ess(), 3.0 / (0.1 * 0.5));
    rounds(&mut server, 60);
    let h = (0..3).fold(Tensor::eye(2, F64) * DELTA, |sum, k| sum + quadratic(k).0 / 0.1);
    assert_close(&server.posterior().matrix(), &h, 1e-12);
}

#[test]
fn fed_avg_averages_by_examples_and_divides_the_prior() {
    let mut server = server::<DiagonalGaussian>(FedAvg);
    let local = server.client("two").unwrap();
    assert_eq!(local.ess(), 3.0);
    assert_close(&local.prior().matrix(), &(Tensor::eye(2, F64) * (DELTA * 0.5)), 1e-15);
    let q = |a: f64| DiagonalGaussian::of(&t(&[a, -a]), &Tensor::eye(2, F64));
    server.update([("two", &q(1.0)), ("one", &q(2.0)), ("three", &q(5.0))]).unwrap();
    assert_close(&server.posterior().vector(), &t(&[2.0, -2.0]), 1e-15);
    // Of the clients that answer.
    server.update([("two", &q(1.0)), ("three", &q(5.0))]).unwrap();
    assert_close(&server.posterior().vector(), &t(&[2.0, -2.0]), 1e-15);
    assert_eq!(server.posterior().matrix(), Tensor::eye(2, F64) * DELTA);
}

/// One client after the other, or two of three at a time: the fixed point is the same, and nobody is forgotten.
#[test]
fn some_clients_may_be_away() {
    for method in [Method::from(admm(0.5, 1.0)), Pvi { damping: 0.5 }.into(), PosteriorMerge.into(), FisherMerge.into()]
    {
        let mut server = server::<FullGaussian>(method);
        for i in 0..120 {
            let away = i % 3;
            let mut all = answers(&server);
            all.remove(away);
            server.update(all.iter().map(|(name, q)| (*name, q))).unwrap();
        }
        assert_close(&server.posterior().vector(), &joint().0, 1e-11);
        assert_close(&server.posterior().matrix(), &joint().1, 1e-11);
    }
    // Sequential partitioned inference is exact once everybody has been asked.
    let mut server = server::<FullGaussian>(Pvi { damping: 1.0 });
    for (k, (name, ..)) in DATA.iter().enumerate() {
        let q = exact(&server.client(name).unwrap(), k);
        server.update([(name, &q)]).unwrap();
    }
    assert_close(&server.posterior().vector(), &joint().0, 1e-11);
    assert_close(&server.posterior().matrix(), &joint().1, 1e-14);
}

/// Answers in another order, and parameters of a diagonal answer in another order: the same bits.
#[test]
fn order_makes_no_difference() {
    let (mut a, mut b) = (server::<DiagonalGaussian>(admm(1.0, 0.5)), server::<DiagonalGaussian>(admm(1.0, 0.5)));
    for _ in 0..3 {
        round(&mut a);
        let mut all = answers(&b);
        all.reverse();
        let turned = |q: &DiagonalGaussian| {
            let part = |name: &str| (name.to_owned(), q.mean(name).unwrap(), q.precision(name).unwrap());
            DiagonalGaussian::new([part("slope"), part("intercept")]).unwrap()
        };
        let all: Vec<_> = all.iter().map(|(name, q)| (*name, turned(q))).collect();
        b.update(all.iter().map(|(name, q)| (*name, q))).unwrap();
    }
    assert_eq!(bits(&a.posterior().vector()), bits(&b.posterior().vector()));
    assert_eq!(bits(&a.posterior().matrix()), bits(&b.posterior().matrix()));
}

fn same<Q: Two>(a: &Server<Q>, b: &Server<Q>) {
    assert_eq!((a.method(), a.round()), (b.method(), b.round()));
    assert_eq!(a.clients().collect::<Vec<_>>(), b.clients().collect::<Vec<_>>());
    for (p, q) in [(a.prior(), b.prior()), (a.posterior(), b.posterior())] {
        assert_eq!((bits(&p.vector()), bits(&p.matrix())), (bits(&q.vector()), bits(&q.matrix())));
    }
    for name in a.clients() {
        let (a, b) = (a.dual(name).unwrap(), b.dual(name).unwrap());
        assert_eq!(bits(&a.linear_vector()), bits(&b.linear_vector()));
        assert_eq!(bits(&a.precision_matrix()), bits(&b.precision_matrix()));
    }
}

/// Server and clients as files, as two programs would: the same bits as in one.
#[test]
fn files_carry_a_federation() {
    fn check<Q: Two>(method: impl Into<Method>, load: fn(&Path) -> tch_blr::Result<Q>) {
        let method = method.into();
        let folder = tempfile::tempdir().unwrap();
        let file = |name: &str| folder.path().join(name);
        let (mut here, there) = (server::<Q>(method), server::<Q>(method));
        there.save(file("server")).unwrap();
        for _ in 0..3 {
            round(&mut here);
            let mut there = Server::<Q>::load(file("server")).unwrap();
            for name in ["one", "two", "three"] {
                there.client(name).unwrap().save(file(&format!("{name}.task"))).unwrap();
            }
            for (k, (name, ..)) in DATA.iter().enumerate() {
                let local = Local::<Q>::load(file(&format!("{name}.task"))).unwrap();
                assert_eq!((local.client(), local.round()), (*name, there.round()));
                exact(&local, k).save_to(&file(name)).unwrap();
            }
            let answers = DATA.map(|(name, ..)| (name, load(&file(name)).unwrap()));
            there.update(answers.iter().map(|(name, q)| (*name, q))).unwrap();
            there.save(file("server")).unwrap();
            same(&here, &there);
            same(&here, &Server::load(file("server")).unwrap());
        }
    }
    check::<FullGaussian>(admm(0.7, 0.5), |path| FullGaussian::load(path));
    check::<DiagonalGaussian>(admm(0.7, 0.5), |path| DiagonalGaussian::load(path));
    check::<DiagonalGaussian>(FedAvg, |path| DiagonalGaussian::load(path));
    check::<DiagonalGaussian>(Admm { rho: 2.0 }, |path| DiagonalGaussian::load(path));
}

/// Every client is a rank that has the server too, and the bytes of its answer go to all: the same bits everywhere, and
/// as in one process.
#[test]
fn clients_may_be_ranks() {
    fn check<Q: Two>(method: Method, load: fn(&Path) -> tch_blr::Result<Q>) {
        let contents = |server: &Server<Q>| {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("server");
            server.save(&path).unwrap();
            std::fs::read(&path).unwrap()
        };
        let mut alone = server::<Q>(method);
        rounds(&mut alone, 3);
        let found = Threads::run(3, |rank| {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("answer");
            let mut server = server::<Q>(method);
            for _ in 0..3 {
                let own = server.client(DATA[rank.rank()].0).unwrap();
                exact(&own, rank.rank()).save_to(&path).unwrap();
                let answers = gather(&rank, &std::fs::read(&path).unwrap()).unwrap().into_iter().map(|bytes| {
                    std::fs::write(&path, bytes).unwrap();
                    load(&path).unwrap()
                });
                let answers: Vec<Q> = answers.collect();
                server.update(clients().map(|(name, _)| name).zip(&answers)).unwrap();
            }
            contents(&server)
        });
        assert_eq!(found.unwrap(), vec![contents(&alone); 3]);
    }
    check::<DiagonalGaussian>(admm(0.7, 0.5).into(), |path| DiagonalGaussian::load(path));
    check::<FullGaussian>(Pvi { damping: 0.3 }.into(), |path| FullGaussian::load(path));
}

/// Weights of f32 with shapes, on both sides of a file.
#[test]
fn kinds_and_shapes_survive_a_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("server");
    let entry = |name: &str, x: Tensor| (name.to_owned(), x.shallow_clone(), x.square() + 0.1);
    let random = |shape: &[i64], kind| support::wave(shape, 0.3).to_kind(kind);
    let q = DiagonalGaussian::new([
        entry("b", random(&[3, 2], Kind::Float)),
        entry("a", random(&[2], Kind::Double)),
        entry("none", random(&[0, 4], Kind::Float)),
    ])
    .unwrap();
    let server = Server::new(Pvi { damping: 0.5 }, &q, [("x", 1.0)]).unwrap();
    server.save(&path).unwrap();
    let back = Server::<DiagonalGaussian>::load(&path).unwrap();
    assert_eq!(back.posterior().names().collect::<Vec<_>>(), ["b", "a", "none"]);
    for name in ["b", "a", "none"] {
        let (p, q) = (back.posterior().mean(name).unwrap(), q.mean(name).unwrap());
        assert_eq!((p.kind(), p.size(), bits(&p)), (q.kind(), q.size(), bits(&q)));
    }
    let e = Server::<FullGaussian>::load(&path);
    refused(e.map(drop), &["holds `federated server, diagonal`", "expected `federated server, full`"]);
}

#[test]
fn bad_settings_and_clients_are_refused() {
    fn new(method: impl Into<Method>) -> tch_blr::Result<()> {
        Server::new(method, &prior::<DiagonalGaussian>(), clients()).map(drop)
    }
    for rho in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        refused(new(admm(rho, 1.0)), &["`rho`"]);
        refused(new(Admm { rho }), &["`rho`"]);
        refused(new(BayesAdmm { temperature: rho, ..admm(1.0, 1.0) }), &["`temperature`"]);
    }
    for damping in [0.0, -0.5, 1.01, f64::NAN] {
        refused(new(admm(1.0, damping)), &["`damping`", "(0, 1]"]);
        refused(new(Pvi { damping }), &["`damping`"]);
        refused(new(FedLap { damping }), &["`damping`"]);
    }
    let with = |clients: &[(&str, f64)]| Server::new(FedAvg, &prior::<DiagonalGaussian>(), clients.to_vec()).map(drop);
    refused(with(&[]), &["at least one client"]);
    refused(with(&[("a", 1.0), ("a", 2.0)]), &["`a`", "twice"]);
    refused(with(&[("a", 1.0), ("b", 0.0)]), &["`b`", "0 examples"]);
    refused(with(&[("a", f64::NAN)]), &["`a`", "NaN"]);
}

#[test]
fn bad_answers_leave_the_server_as_it_was() {
    let mut server = server::<DiagonalGaussian>(Pvi { damping: 1.0 / 3.0 });
    round(&mut server);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("server");
    server.save(&path).unwrap();
    let before = std::fs::read(&path).unwrap();
    let good = exact(&server.client("one").unwrap(), 0);
    let entry = |name: &str, n: i64| (name.to_owned(), Tensor::zeros([n], F64), Tensor::ones([n], F64));
    let fewer = DiagonalGaussian::new([entry("slope", 1)]).unwrap();
    let more = DiagonalGaussian::new([entry("slope", 1), entry("intercept", 1), entry("extra", 1)]).unwrap();
    let longer = DiagonalGaussian::new([entry("slope", 2), entry("intercept", 1)]).unwrap();
    let mut bad = |answers: &[(&str, &DiagonalGaussian)], parts: &[&str]| {
        let error = refused(server.update(answers.iter().copied()), parts);
        server.save(&path).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), before);
        error
    };
    bad(&[], &["round 1", "no client answers"]);
    bad(&[("one", &good), ("four", &good)], &["`four`", "`one`, `three`, `two`"]);
    bad(&[("one", &good), ("two", &good), ("one", &good)], &["`one`", "twice"]);
    bad(&[("one", &good), ("two", &fewer)], &["`intercept`", "client `two`"]);
    bad(&[("two", &more)], &["`extra`", "client `two`"]);
    bad(&[("two", &longer)], &["`slope`", "[1]", "[2]"]);
    refused(server.client("four").map(drop), &["`four`"]);
    refused(server.starting_at(&fewer).map(drop), &["`intercept`", "the start"]);
}

/// A client that is less certain than the prior takes more away than there is.
#[test]
fn a_precision_that_would_not_be_positive_is_refused() {
    let mut server = server::<DiagonalGaussian>(PosteriorMerge);
    let vague = DiagonalGaussian::of(&t(&[1.0, 1.0]), &matrix([0.6, 0.0, 0.0, 0.1]));
    let all = [("one", &vague), ("two", &vague), ("three", &vague)];
    let error = refused(server.update(all), &["`slope`", "-7", "damping"]);
    assert!(matches!(error, Error::NotPositiveDefinite { .. }));
    assert_eq!((server.round(), largest(&server.posterior().vector())), (0, 0.0));
    let clamped = clamp_information(&vague, server.prior()).unwrap();
    server.update(all.map(|(name, _)| (name, &clamped))).unwrap();
    close(server.posterior().matrix().double_value(&[1, 1]), DELTA, 1e-15);

    let mut server = server_full();
    let vague = FullGaussian::of(&t(&[1.0, 1.0]), &(Tensor::eye(2, F64) * 0.1));
    let error = server.update([("one", &vague), ("two", &vague)]).unwrap_err();
    assert!(matches!(error, Error::NotPositiveDefinite { .. }), "{error}");
    assert_eq!(server.round(), 0);
}

fn server_full() -> Server<FullGaussian> {
    server(PosteriorMerge)
}

/// A dual that is larger than what the server holds leaves no cavity; the limit is in the error.
#[test]
fn a_cavity_that_does_not_exist_is_refused() {
    fn check<Q: Two>() {
        let mut server = server::<Q>(admm(0.25, 1.0));
        rounds(&mut server, 2);
        let local = server.client("two").unwrap();
        match local.cavity() {
            Err(Error::Removal { weight: 1.0, largest, .. }) => {
                let s = local.prior().matrix() - square(&local.share().precision_matrix()) * largest;
                let smallest = s.linalg_eigvalsh("L").min().double_value(&[]);
                assert!(smallest.abs() < 1e-12, "{smallest:e}");
            }
            other => panic!("{other:?}"),
        }
        // The correction needs none.
        assert_eq!(local.correction(&Regression::new().params).unwrap().dim(), 0);
    }
    check::<FullGaussian>();
    check::<DiagonalGaussian>();
}

#[test]
fn a_model_that_does_not_fit_is_named() {
    let server = server::<DiagonalGaussian>(Pvi { damping: 0.5 });
    let local = server.client("one").unwrap();
    let vs = VarStore::new(Device::Cpu);
    let _ = vs.root().zeros("intercept", &[1]);
    refused(local.start(&vs), &["`slope`"]);
    refused(local.correction(&Params::from(&vs)).map(drop), &["`slope`"]);
    refused(local.at(&vs).map(drop), &["`slope`"]);
    let _ = vs.root().zeros("slope", &[2]);
    refused(local.correction(&Params::from(&vs)).map(drop), &["`slope`", "[1]", "[2]"]);
    let model = Regression::new();
    let full = Dual::full(named(&Tensor::zeros([2], F64)), &Tensor::eye(2, F64)).unwrap();
    refused(local.laplace(&model.vs, &full).map(drop), &["curvature", "[2, 2]"]);
    let other = Dual::diagonal([("w", Tensor::zeros([1], F64), Tensor::zeros([1], F64))]).unwrap();
    refused(local.laplace(&model.vs, &other).map(drop), &["`w`", "the curvature"]);
}

#[test]
fn duals_are_checked() {
    let z = |n: i64| Tensor::zeros([n], F64);
    refused(Dual::diagonal(Vec::<(&str, Tensor, Tensor)>::new()).map(drop), &["no parameter"]);
    refused(Dual::diagonal([("w", z(2), z(3))]).map(drop), &["`w`", "[2]", "[3]"]);
    refused(Dual::diagonal([("w", z(2), z(2)), ("w", z(2), z(2))]).map(drop), &["twice"]);
    refused(Dual::diagonal([("a", z(1), z(1)), ("w", z(2), t(&[1.0, f64::NAN]))]).map(drop), &["`w`", "precision"]);
    refused(Dual::full([("w", z(2))], &z(2)).map(drop), &["[2]", "[2, 2]"]);
    refused(Dual::full([("w", z(2))], &matrix([1.0, 2.0, 3.0, 4.0])).map(drop), &["transpose"]);
    let bad = Dual::full([("a", z(1)), ("w", z(1))], &matrix([1.0, f64::INFINITY, 0.0, 1.0]));
    refused(bad.map(drop), &["not finite"]);
}

/// Files of anyone: cut off, with values that no server has, with other tensors or fields.
#[test]
fn broken_files_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let (path, task) = (folder.path().join("server"), folder.path().join("task"));
    let mut server = server::<DiagonalGaussian>(admm(0.5, 0.5));
    round(&mut server);
    server.save(&path).unwrap();
    server.client("one").unwrap().save(&task).unwrap();
    let whole = std::fs::read(&path).unwrap();
    let read = |bytes: &[u8]| {
        std::fs::write(&path, bytes).unwrap();
        Server::<DiagonalGaussian>::load(&path).map(drop)
    };
    for n in (0..whole.len()).step_by(7) {
        assert!(matches!(read(&whole[..n]), Err(Error::File { .. })), "{n} bytes");
    }
    // The header has a length of its own, so a value is exchanged for one of as many characters.
    let exchange = |from: &str, to: &str| {
        assert_eq!(from.len(), to.len());
        let at = whole.windows(from.len()).position(|w| w == from.as_bytes()).unwrap_or_else(|| panic!("no {from}"));
        let mut bytes = whole.clone();
        bytes[at..at + from.len()].copy_from_slice(to.as_bytes());
        bytes
    };
    for (from, to, what) in [
        (r#"\"rho\":0.5"#, r#"\"rho\":0.0"#, "`rho`"),
        (r#"\"rho\":0.5"#, r#"\"rgo\":0.5"#, "rgo"),
        (r#"\"round\":1"#, r#"\"ruond\":1"#, "ruond"),
        (r#"\"examples\":1.0"#, r#"\"examples\":0.0"#, "`three` has 0 examples"),
        (r#"\"shape\":[1]"#, r#"\"shape\":[9]"#, "expected f64 [10]"),
        (r#"\"name\":\"two\""#, r#"\"name\":\"one\""#, "`one` is given twice"),
        ("dual.2.linear", "dual.7.linear", "dual.2.linear"),
        ("bayes_admm", "bayes_adnm", "bayes_adnm"),
    ] {
        refused(read(&exchange(from, to)), &[what, "server"]);
    }
    // Every number in turn is not finite, or a precision is not positive.
    let numbers = whole.len() - 8 * 2 * 10;
    for i in 0..20 {
        let mut bytes = whole.clone();
        bytes[numbers + 8 * i..][..8].copy_from_slice(&f64::NAN.to_le_bytes());
        assert!(matches!(read(&bytes), Err(Error::File { .. })), "number {i}");
    }
    let cut = std::fs::read(&task).unwrap();
    for n in (0..cut.len()).step_by(7) {
        std::fs::write(&task, &cut[..n]).unwrap();
        assert!(matches!(Local::<DiagonalGaussian>::load(&task), Err(Error::File { .. })), "{n} bytes");
    }
    refused(Local::<DiagonalGaussian>::load(folder.path().join("server")).map(drop), &["server"]);
}

/// A method is a value of a configuration.
#[test]
fn methods_are_values_of_serde() {
    for (method, json) in [
        (Method::from(admm(0.5, 0.25)), r#"{"bayes_admm":{"rho":0.5,"damping":0.25,"temperature":1.0}}"#),
        (PosteriorMerge.into(), r#"{"posterior_merge":null}"#),
        (FisherMerge.into(), r#"{"fisher_merge":null}"#),
        (FedAvg.into(), r#"{"fed_avg":null}"#),
        (Pvi { damping: 0.1 }.into(), r#"{"pvi":{"damping":0.1}}"#),
    ] {
        assert_eq!(serde_json::to_string(&method).unwrap(), json);
        assert_eq!(serde_json::from_str::<Method>(json).unwrap(), method);
    }
    assert!(serde_json::from_str::<Method>(r#"{"pvi":{"damping":0.1,"rho":1.0}}"#).is_err());
}

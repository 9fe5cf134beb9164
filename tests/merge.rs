//! Merging: algebra of posteriors, methods on named tensors, diagnostics.

use std::collections::BTreeMap;
use support::{F64, randn, values};
use tch::{Device, Kind, Tensor, nn};
use tch_blr::merge::{
    Keep, Method, Model, NaturalSum, Recipe, Rescale, TaskVectors, Tensors, barrier, federated, gradient_matching,
    gradient_mismatch, largest_removal, merge, remove, sweep,
};
use tch_blr::{
    DiagonalGaussian, Error, FullGaussian, KroneckerGaussian, KroneckerParameter, clamp_information, combine,
};

/// A model of two tensors in f64.
fn model(seed: i64) -> Tensors {
    BTreeMap::from([("a".to_owned(), randn(&[3, 4], 2 * seed)), ("b".to_owned(), randn(&[5], 2 * seed + 1))])
}

fn map(t: &Tensors, f: impl Fn(&Tensor) -> Tensor) -> Tensors {
    t.iter().map(|(name, t)| (name.clone(), f(t))).collect()
}

/// Curvature: squares of normals, with zeros.
fn curvature(seed: i64) -> Tensors {
    map(&model(100 + seed), |t| t.relu().square())
}

fn one(x: &[f64]) -> Tensors {
    BTreeMap::from([("w".to_owned(), Tensor::from_slice(x))])
}

fn difference(a: &Tensor, b: &Tensor) -> f64 {
    (a.to_kind(Kind::Double) - b.to_kind(Kind::Double)).abs().max().double_value(&[])
}

fn close(a: &Tensors, b: &Tensors, tolerance: f64) {
    assert_eq!(a.keys().collect::<Vec<_>>(), b.keys().collect::<Vec<_>>());
    for (name, t) in a {
        let d = difference(t, &b[name]);
        assert!(d <= tolerance, "{name}: {d:e}");
    }
}

fn weighted<'a>(models: &'a [Tensors], weights: &[f64]) -> Vec<Model<'a>> {
    let names = ["m0", "m1", "m2", "m3"];
    models.iter().zip(names).zip(weights).map(|((m, name), w)| Model::new(name, m).weight(*w)).collect()
}

fn posterior(mean: &Tensors, precision: &Tensors) -> DiagonalGaussian {
    let entries = mean.iter().map(|(name, m)| (name.clone(), m.copy(), precision[name].copy()));
    DiagonalGaussian::new(entries).unwrap()
}

fn means(q: &DiagonalGaussian) -> Tensors {
    q.names().map(|n| (n.to_owned(), q.mean(n).unwrap().copy())).collect()
}

// Gradient matching

#[test]
fn gradient_matching_is_a_sum_of_natural_parameters() {
    let weights = [0.7, 1.3, -0.1];
    let (base, models) = (model(0), [model(1), model(2), model(3)]);
    let h0 = map(&curvature(0), |h| h + 0.5);
    let h = [curvature(1), curvature(2), map(&curvature(3), |h| h.clamp_max(1.0))];
    let given: Vec<Model> = weighted(&models, &weights).into_iter().zip(&h).map(|(m, h)| m.curvature(h)).collect();
    let method = Method::GradientMatching { delta: 0.0, clamp: false };
    let merged = merge(method, Some(&Model::new("base", &base).curvature(&h0)), &given).unwrap();

    // The formula, written with tensors.
    let formula: Tensors = base
        .iter()
        .map(|(n, theta)| {
            let terms = || weights.iter().zip(&h).zip(&models);
            let total = terms().fold(h0[n].copy(), |sum, ((a, h), _)| sum + &h[n] * *a);
            let step =
                terms().fold(theta.zeros_like(), |sum, ((a, h), m)| sum + (&h0[n] + &h[n]) * (&m[n] - theta) * *a);
            (n.clone(), theta + step / total)
        })
        .collect();
    close(&merged, &formula, 1e-12);

    // The same of posteriors, by the algebra and through the precisions.
    let precision: Vec<Tensors> = h.iter().map(|h| h.iter().map(|(n, h)| (n.clone(), h + &h0[n])).collect()).collect();
    let q0 = posterior(&base, &h0);
    let q: Vec<DiagonalGaussian> = models.iter().zip(&precision).map(|(m, s)| posterior(m, s)).collect();
    let tasks: Vec<_> = weights.iter().copied().zip(&q).collect();
    let by_posteriors = gradient_matching(&q0, &tasks).unwrap();
    close(&merged, &means(&by_posteriors), 1e-12);
    let expected = combine(&[(1.0 - weights.iter().sum::<f64>(), &q0), (0.7, &q[0]), (1.3, &q[1]), (-0.1, &q[2])]);
    assert!(by_posteriors.kl(&expected.unwrap()).unwrap().abs() < 1e-12);
    let given: Vec<Model> =
        weighted(&models, &weights).into_iter().zip(&precision).map(|(m, s)| m.precision(s)).collect();
    let by_precision = merge(method, Some(&Model::new("base", &base).precision(&h0)), &given).unwrap();
    close(&merged, &by_precision, 1e-12);
    let terms = [(Model::new("q0", &base).precision(&h0), 1.0 - weights.iter().sum::<f64>())];
    let terms: Vec<Model> = terms.into_iter().map(|(m, w)| m.weight(w)).chain(given).collect();
    close(&merged, &merge(Method::Combine, None, &terms).unwrap(), 1e-12);
}

#[test]
fn without_curvature_of_the_tasks_it_is_task_arithmetic() {
    let (base, models, zero) = (model(0), [model(1), model(2)], map(&model(0), Tensor::zeros_like));
    let weights = [0.4, 1.1];
    let given: Vec<Model> = weighted(&models, &weights).into_iter().map(|m| m.curvature(&zero)).collect();
    let arithmetic = merge(Method::task_arithmetic(1.0), Some(&Model::new("base", &base)), &given).unwrap();
    // With a curvature of the base, and with none at all, where only δ is left.
    for h0 in [&map(&curvature(0), |h| h + 0.1), &zero] {
        let base = Model::new("base", &base).curvature(h0);
        close(&merge(Method::gradient_matching(), Some(&base), &given).unwrap(), &arithmetic, 1e-12);
    }
}

#[test]
fn without_curvature_of_the_base_it_is_fisher_averaging() {
    let (base, models) = (model(0), [model(1), model(2)]);
    let h = [map(&curvature(1), |h| h + 0.1), map(&curvature(2), |h| h + 0.1)];
    let small = map(&base, |t| t.ones_like() * 1e-13);
    let given: Vec<Model> = weighted(&models, &[0.3, 0.9]).into_iter().zip(&h).map(|(m, h)| m.curvature(h)).collect();
    let base = Model::new("base", &base).curvature(&small);
    let matched = merge(Method::GradientMatching { delta: 0.0, clamp: false }, Some(&base), &given).unwrap();
    close(&matched, &merge(Method::Fisher, None, &given).unwrap(), 1e-10);
}

#[test]
fn fisher_averaging_by_hand() {
    let (a, b) = (one(&[1.0, 2.0, 5.0]), one(&[3.0, 6.0, 9.0]));
    let (fa, fb) = (one(&[1.0, 3.0, 0.0]), one(&[1.0, 1.0, 0.0]));
    let models = [Model::new("a", &a).curvature(&fa), Model::new("b", &b).curvature(&fb)];
    // (1+3)/2, (6+6)/4, and the plain average where nothing is known.
    assert_eq!(values(&merge(Method::Fisher, None, &models).unwrap()["w"]), [2.0, 3.0, 7.0]);
    // A corner of a sweep is the model itself, and no weight at all is no average.
    let corner = |w: [f64; 2]| merge(Method::Fisher, None, &[models[0].weight(w[0]), models[1].weight(w[1])]);
    assert_eq!(values(&corner([0.0, 1.0]).unwrap()["w"]), [3.0, 6.0, 9.0]);
    assert!(corner([0.0, 0.0]).unwrap_err().to_string().contains("all weights are zero"));
}

/// Posterior of θ for y = Xθ + noise of variance 1 under a prior, and that prior.
fn regression(data: &[(f64, &(Tensor, Tensor))], prior: &FullGaussian) -> FullGaussian {
    let mut precision = prior.precision_matrix().copy();
    let mut b = precision.mv(&prior.mean_vector());
    for (a, (x, y)) in data {
        precision += x.tr().matmul(x) * *a;
        b += x.tr().mv(y) * *a;
    }
    let mean = precision.inverse().mv(&b);
    FullGaussian::new([("w", mean)], &precision).unwrap()
}

fn tasks() -> (FullGaussian, Vec<(Tensor, Tensor)>) {
    let prior = FullGaussian::new([("w", randn(&[4], 50))], &(Tensor::eye(4, F64) * 0.7)).unwrap();
    (prior, (0..3).map(|t| (randn(&[9, 4], 60 + t), randn(&[9], 70 + t))).collect())
}

fn far(p: &FullGaussian, q: &FullGaussian) -> f64 {
    difference(&p.mean_vector(), &q.mean_vector()).max(difference(p.precision_matrix(), q.precision_matrix()))
}

/// A family of posteriors, and quadratic losses whose posteriors it has: ½(w - c)ᵀH(w - c) of twelve weights.
struct Family<Q> {
    prior: FullGaussian,
    /// H and Hc
    losses: Vec<(Tensor, Tensor)>,
    of: Box<dyn Fn(&FullGaussian) -> Q>,
    dense: Box<dyn Fn(&Q) -> FullGaussian>,
}

impl<Q: NaturalSum> Family<Q> {
    /// The posterior of Σ a L, by matrices.
    fn fit(&self, a: [f64; 3]) -> FullGaussian {
        let mut precision = self.prior.precision_matrix().copy();
        let mut b = precision.mv(&self.prior.mean_vector());
        for (a, (h, hc)) in a.into_iter().zip(&self.losses) {
            precision += h * a;
            b += hc * a;
        }
        FullGaussian::new([("w", precision.inverse().mv(&b).reshape([3, 4]))], &precision).unwrap()
    }

    fn far(&self, q: &Q, expected: &FullGaussian) -> f64 {
        far(&(self.dense)(q), expected)
    }

    /// Everything that a merge of this family should do.
    fn check(&self, name: &str) {
        let q0 = (self.of)(&self.prior);
        let q = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]].map(|a| (self.of)(&self.fit(a)));
        let [s0, m0] = [self.prior.precision_matrix().copy(), self.prior.mean_vector()];
        for a in [[1.0, 1.0, 1.0], [0.2, 0.3, 0.5], [2.0, 0.0, 0.7], [1.5, 1.0, -0.05], [0.0, 0.0, 0.0]] {
            let parts: Vec<_> = a.into_iter().zip(&q).collect();
            let merged = gradient_matching(&q0, &parts).unwrap();
            // The joint fit, for every weight.
            let joint = self.fit(a);
            assert!(self.far(&merged, &joint) < 1e-12, "{name} {a:?}: {:e}", self.far(&merged, &joint));
            // θ₀ + Σ a H̄⁻¹(H₀+H)(θ-θ₀)
            let total = a.iter().zip(&self.losses).fold(s0.copy(), |sum, (a, (h, _))| sum + h * *a);
            let steps = a.iter().zip(&self.losses).zip(&q).fold(m0.zeros_like(), |sum, ((a, (h, _)), q)| {
                sum + (&s0 + h).mv(&((self.dense)(q).mean_vector() - &m0)) * *a
            });
            let formula = &m0 + total.inverse().mv(&steps);
            assert!(difference(&(self.dense)(&merged).mean_vector(), &formula) < 1e-12, "{name} {a:?}");
            // In any order, and with the prior as a term of its own.
            let mut terms: Vec<_> = parts.iter().copied().chain([(1.0 - a.iter().sum::<f64>(), &q0)]).collect();
            for _ in 0..4 {
                terms.rotate_left(1);
                assert!(self.far(&combine(&terms).unwrap(), &joint) < 1e-12, "{name} {a:?}");
                terms.swap(0, 2);
                assert!(self.far(&combine(&terms).unwrap(), &joint) < 1e-12, "{name} {a:?}");
            }
        }
        // Addition in two steps is one in one, and removal inverts it, in any order.
        let dense = self.dense.as_ref();
        let sum = combine(&[(1.0, &combine(&[(1.0, &q0), (0.8, &q[0])]).unwrap()), (1.7, &q[1])]).unwrap();
        let at_once = combine(&[(1.0, &q0), (0.8, &q[0]), (1.7, &q[1])]).unwrap();
        assert!(self.far(&sum, &dense(&at_once)) < 1e-12, "{name}");
        for [(i, w), (j, v)] in [[(0, 0.8), (1, 1.7)], [(1, 1.7), (0, 0.8)]] {
            let less = remove(&sum, &q[i], w).unwrap();
            let expected = combine(&[(1.0, &q0), (v, &q[j])]).unwrap();
            assert!(self.far(&less, &dense(&expected)) < 1e-12, "{name}");
            assert!(self.far(&less, &dense(&sum)) > 0.1, "{name}: nothing was removed");
            assert!(self.far(&remove(&less, &q[j], v).unwrap(), &self.prior) < 1e-12, "{name}");
        }
        // Equal posteriors on the simplex; one task of weight 1; no task at all.
        let same = gradient_matching(&q0, &[(0.25, &q[2]), (0.5, &q[2]), (0.25, &q[2])]).unwrap();
        assert!(self.far(&same, &dense(&q[2])) < 1e-12, "{name}");
        assert!(self.far(&gradient_matching(&q0, &[(1.0, &q[1])]).unwrap(), &dense(&q[1])) < 1e-12, "{name}");
        assert!(self.far(&gradient_matching(&q0, &[]).unwrap(), &self.prior) < 1e-12, "{name}");
        assert!(self.far(&federated(&q0, &[&q[2], &q[0], &q[1]]).unwrap(), &self.fit([1.0; 3])) < 1e-12, "{name}");
    }
}

/// Regressions of the weights `[3, 4]`, whose posteriors each family has: with orthogonal features the diagonal one,
/// and with several outputs whose noise and features have axes in common the Kronecker-factored one.
#[test]
fn merged_regressions_are_the_joint_fit() {
    let prior = |scale: &Tensor| {
        let mean = randn(&[3, 4], 50);
        FullGaussian::new([("w", mean)], scale).unwrap()
    };
    let target = |h: &Tensor, t: i64| h.mv(&randn(&[12], 70 + t));
    let eye = Tensor::eye(12, F64);

    let full = Family {
        prior: prior(&(&eye * 0.7)),
        losses: (0..3)
            .map(|t| (randn(&[9, 12], 60 + t), randn(&[9], 70 + t)))
            .map(|(x, y)| (x.tr().matmul(&x), x.tr().mv(&y)))
            .collect(),
        of: Box::new(|q: &FullGaussian| {
            FullGaussian::new([("w", q.mean("w").unwrap())], q.precision_matrix()).unwrap()
        }),
        dense: Box::new(|q: &FullGaussian| {
            FullGaussian::new([("w", q.mean("w").unwrap())], q.precision_matrix()).unwrap()
        }),
    };
    full.check("full");

    let orthogonal = |t: i64| {
        let x = Tensor::linalg_qr(&randn(&[20, 12], 60 + t), "reduced").0 * (randn(&[12], 80 + t).abs() + 0.1);
        (x.tr().matmul(&x), x.tr().mv(&randn(&[20], 70 + t)))
    };
    let diagonal = Family {
        prior: prior(&(randn(&[12], 90).square() + 0.3).diag(0)),
        losses: (0..3).map(orthogonal).collect(),
        of: Box::new(|q: &FullGaussian| {
            let precision = q.precision_matrix();
            let s = precision.diag(0);
            assert!(difference(precision, &s.diag(0)) < 1e-12, "not diagonal");
            DiagonalGaussian::new([("w", q.mean("w").unwrap(), s.reshape([3, 4]))]).unwrap()
        }),
        dense: Box::new(|q: &DiagonalGaussian| q.full().unwrap()),
    };
    diagonal.check("diagonal");

    // H = G ⊗ XᵀX of y = Wx + noise of precision G.
    let basis = |n, seed| Tensor::linalg_qr(&randn(&[n, n], seed), "reduced").0;
    let (u, v) = (basis(3, 7), basis(4, 8));
    let axes = u.kron(&v);
    let shared = |t: i64| {
        let of = |basis: &Tensor, n: i64, seed: i64| {
            basis.matmul(&(randn(&[n], seed).square() + 0.2).diag(0)).matmul(&basis.tr())
        };
        of(&u, 3, 60 + t).kron(&of(&v, 4, 80 + t))
    };
    let axes_of = axes.copy();
    let kronecker = Family {
        prior: prior(&(&eye * 0.7)),
        losses: (0..3).map(|t| (shared(t), target(&shared(t), t))).collect(),
        of: Box::new(move |q: &FullGaussian| {
            let inside = axes_of.tr().matmul(q.precision_matrix()).matmul(&axes_of);
            let precision = inside.diag(0);
            assert!(difference(&inside, &precision.diag(0)) < 1e-12, "other axes");
            let (left, right) = (Some(u.copy()), Some(v.copy()));
            let (name, mean, precision) = ("w".to_owned(), q.mean("w").unwrap(), precision.reshape([3, 4]));
            KroneckerGaussian::new([KroneckerParameter { name, mean, left, right, precision }]).unwrap()
        }),
        dense: Box::new(|q: &KroneckerGaussian| q.full().unwrap()),
    };
    kronecker.check("Kronecker");
}

#[test]
fn rounds_of_a_federation_are_the_fit_to_all_data() {
    let (prior, data) = tasks();
    // Two clients see the first two parts; in the next round a third one starts from the server's posterior.
    let clients: Vec<FullGaussian> = data[..2].iter().map(|d| regression(&[(1.0, d)], &prior)).collect();
    let server = federated(&prior, &[&clients[0], &clients[1]]).unwrap();
    let late = regression(&[(1.0, &data[2])], &server);
    let server = federated(&server, &[&late]).unwrap();
    let all = regression(&data.iter().map(|d| (1.0, d)).collect::<Vec<_>>(), &prior);
    assert!(far(&server, &all) < 1e-12);
    // Without clients, the prior.
    assert!(far(&federated(&prior, &[]).unwrap(), &prior) < 1e-15);
}

#[test]
fn equal_posteriors_on_the_simplex_merge_to_themselves() {
    let (base, q) = (posterior(&model(0), &map(&curvature(0), |h| h + 0.2)), model(1));
    let q = posterior(&q, &map(&curvature(1), |h| h + 0.4));
    let merged = gradient_matching(&base, &[(0.25, &q), (0.5, &q), (0.25, &q)]).unwrap();
    close(&means(&merged), &means(&q), 1e-14);
    assert!(merged.kl(&q).unwrap().abs() < 1e-13);
}

fn kronecker(seed: i64) -> KroneckerGaussian {
    let basis = |n, s| Some(Tensor::linalg_qr(&randn(&[n, n], s), "reduced").0);
    let (mean, precision) = (randn(&[3, 4], seed), randn(&[3, 4], seed + 1).square() + 0.5);
    let p = KroneckerParameter { name: "w".to_owned(), mean, left: basis(3, 7), right: basis(4, 8), precision };
    KroneckerGaussian::new([p]).unwrap()
}

/// In another basis than [`kronecker`].
fn elsewhere() -> KroneckerGaussian {
    let (mean, precision) = (randn(&[3, 4], 1), Tensor::ones([3, 4], F64));
    let p = KroneckerParameter { name: "w".to_owned(), mean, left: None, right: None, precision };
    KroneckerGaussian::new([p]).unwrap()
}

#[test]
fn kronecker_posteriors_in_one_basis_add() {
    let (a, b, c) = (kronecker(10), kronecker(20), kronecker(30));
    let merged = gradient_matching(&a, &[(0.6, &b), (0.3, &c)]).unwrap().full().unwrap();
    let [fa, fb, fc] = [&a, &b, &c].map(|q| q.full().unwrap());
    let expected = gradient_matching(&fa, &[(0.6, &fb), (0.3, &fc)]).unwrap();
    assert!(far(&merged, &expected) < 1e-12);
    let sum = combine(&[(1.0, &a), (2.0, &b)]).unwrap();
    let back = remove(&sum, &b, 2.0).unwrap();
    assert!(far(&back.full().unwrap(), &fa) < 1e-12);

    let e = gradient_matching(&a, &[(1.0, &elsewhere())]).unwrap_err();
    assert!(matches!(&e, Error::Parameter { name, problem } if name == "w" && problem.contains("bases")), "{e}");
}

// Tasks that end with less precision than their prior

/// Rounding cancels in none of these: all numbers are sums of few powers of two.
#[test]
fn clamped_information_by_hand() {
    let q = |m: &[f64], s: &[f64]| posterior(&one(m), &one(s));
    let q0 = q(&[0.5; 4], &[2.0; 4]);
    let [a, b] = [q(&[1.0, 2.0, -1.0, 3.0], &[4.0, 1.5, 1.0, 2.0]), q(&[0.0, 1.0, 0.0, 0.25], &[6.0, 4.0, 0.5, 8.0])];
    match combine(&[(1.0, &a), (1.0, &b), (-1.0, &q0)]) {
        // The third element: 1 + 0.5 - 2.
        Err(Error::Combine { what, short: 1, of: 4, largest: 0.75 }) => assert_eq!(what, "parameter `w`"),
        other => panic!("{other:?}"),
    }
    assert!(combine(&[(1.0, &a), (1.0, &b), (-0.75, &q0)]).is_err());
    assert!(combine(&[(1.0, &a), (1.0, &b), (-0.75 * (1.0 - 1e-9), &q0)]).is_ok());

    let [ca, cb] = [&a, &b].map(|q| clamp_information(&q.shallow_clone().with_seed(7), &q0).unwrap());
    assert_eq!(values(&ca.precision("w").unwrap()), [4.0, 2.0, 2.0, 2.0]);
    let expected = q(&[1.0, 2.0, -1.0, 3.0], &[4.0, 2.0, 2.0, 2.0]).with_seed(7);
    assert_eq!(ca.sample(0).unwrap(), expected.sample(0).unwrap());
    let merged = gradient_matching(&q0, &[(1.0, &ca), (1.0, &cb)]).unwrap();
    assert_eq!(values(&merged.precision("w").unwrap()), [8.0, 4.0, 2.0, 8.0]);
    // (4·1 + 6·0 - 1)/8; (2·2 + 4·1 - 1)/4; where neither task has information θ₀ + Σ d; and where one is at its
    // prior's.
    assert_eq!(values(&merged.mean("w").unwrap()), [3.0 / 8.0, 7.0 / 4.0, -2.0 + 0.5, (6.0 + 2.0 - 1.0) / 8.0]);
    // A single task keeps its mean, and half of it goes half the way where it weighs nothing.
    let alone = gradient_matching(&q0, &[(1.0, &cb)]).unwrap();
    assert_eq!(values(&alone.mean("w").unwrap()), values(&b.mean("w").unwrap()));
    let half = gradient_matching(&q0, &[(0.5, &ca)]).unwrap();
    assert_eq!(values(&half.mean("w").unwrap())[2], 0.5 + 0.5 * (-1.0 - 0.5));
    // A posterior with information everywhere is left alone.
    let more = q(&[1.0; 4], &[2.0, 3.0, 4.0, 5.0]);
    assert_eq!(clamp_information(&more, &q0).unwrap().kl(&more).unwrap(), 0.0);
}

/// Posteriors are gradient matching with H⁺ of named tensors, which takes H ≥ 0 only; and of precisions with `clamp`.
#[test]
fn clamped_posteriors_and_tensors_merge_alike() {
    let (m, s) = ([model(0), model(1), model(2)], [0, 1, 2].map(|i| map(&curvature(i), |h| h + 0.2)));
    let [q0, q1, q2] = [0, 1, 2].map(|i| posterior(&m[i], &s[i]));
    // 1.7 posteriors less 0.7 priors: here and there the prior has more.
    let few = gradient_matching(&q0, &[(1.0, &q1), (0.7, &q2)]).unwrap_err();
    assert!(matches!(few, Error::Combine { of: 17, .. }), "{few}");
    let [c1, c2] = [&q1, &q2].map(|q| clamp_information(q, &q0).unwrap());
    let expected = means(&gradient_matching(&q0, &[(1.0, &c1), (0.7, &c2)]).unwrap());

    let h = [1, 2].map(|i| s[i].iter().map(|(n, s_i)| (n.clone(), (s_i - &s[0][n]).relu())).collect::<Tensors>());
    let base = Model::new("base", &m[0]);
    let by_curvature = [Model::new("a", &m[1]).curvature(&h[0]), Model::new("b", &m[2]).curvature(&h[1]).weight(0.7)];
    let method = |clamp| Method::GradientMatching { delta: 0.0, clamp };
    close(&merge(method(false), Some(&base.curvature(&s[0])), &by_curvature).unwrap(), &expected, 1e-13);
    let by_precision = [Model::new("a", &m[1]).precision(&s[1]), Model::new("b", &m[2]).precision(&s[2]).weight(0.7)];
    close(&merge(method(true), Some(&base.precision(&s[0])), &by_precision).unwrap(), &expected, 1e-13);

    let e = merge(method(false), Some(&base.precision(&s[0])), &by_precision).unwrap_err();
    let taken = |n: &str| (&s[1][n] + &s[2][n] * 0.7) / (&s[0][n] * 0.7);
    let short = taken("a").le(1.0).sum(Kind::Int64).int64_value(&[]);
    let says =
        format!("`a`: merging leaves {short} of its 12 precisions not positive: with all negative weights times");
    assert!(short > 0 && e.to_string().contains(&says) && e.to_string().contains("`clamp`"), "{says} {e}");
    let factor: f64 = e.to_string().split("below ").nth(1).unwrap().split(' ').next().unwrap().parse().unwrap();
    assert!((factor / taken("a").min().double_value(&[]) - 1.0).abs() < 1e-12, "{factor}");
}

/// In whatever coordinates: with S₀ = I and S = diag(1 + λ) a matrix is clamped element by element.
#[test]
fn information_of_matrices_is_clamped_along_its_own_axes() {
    let t = randn(&[4, 4], 3) + Tensor::eye(4, F64) * 2.0;
    let in_coordinates = |m: &[f64; 4], s: [f64; 4]| {
        let mean = t.inverse().mv(&Tensor::from_slice(m));
        FullGaussian::new([("w", mean)], &t.tr().matmul(&Tensor::from_slice(&s).diag(0)).matmul(&t)).unwrap()
    };
    let m = [0.3, -1.0, 2.0, 0.7];
    let q0 = in_coordinates(&[0.0; 4], [1.0; 4]);
    let clamped = clamp_information(&in_coordinates(&m, [3.0, 0.25, 1.5, 0.9]), &q0).unwrap();
    assert!(far(&clamped, &in_coordinates(&m, [3.0, 1.0, 1.5, 1.0])) < 1e-12);
    // And the sum of two such tasks exists where without it there is none, in two of four directions.
    let [a, b] = [in_coordinates(&m, [3.0, 0.25, 0.5, 0.9]), in_coordinates(&m, [2.0, 0.5, 0.25, 0.9])];
    match combine(&[(1.0, &a), (1.0, &b), (-1.0, &q0)]) {
        Err(Error::Combine { short: 2, of: 4, largest, .. }) => assert!((largest - 0.75).abs() < 1e-12, "{largest}"),
        other => panic!("{other:?}"),
    }
    let [a, b] = [a, b].map(|q| clamp_information(&q, &q0).unwrap());
    let merged = combine(&[(1.0, &a), (1.0, &b), (-1.0, &q0)]).unwrap();
    let twice = [0.3 * 5.0 / 4.0, -2.0, 4.0, 1.4];
    assert!(far(&merged, &in_coordinates(&twice, [4.0, 1.0, 1.0, 1.0])) < 1e-12);
    // Where nothing is negative, every bit stays.
    let more = in_coordinates(&m, [3.0, 1.25, 1.5, 1.9]);
    assert_eq!(far(&clamp_information(&more, &q0).unwrap(), &more), 0.0);

    // A diagonal matrix, and a Kronecker basis written out.
    let (p, q) = (
        posterior(&model(0), &map(&curvature(0), |h| h + 0.3)),
        posterior(&model(1), &map(&curvature(1), |h| h + 0.3)),
    );
    let whole = clamp_information(&q.full().unwrap(), &p.full().unwrap()).unwrap();
    assert!(far(&whole, &clamp_information(&q, &p).unwrap().full().unwrap()) < 1e-12);
    let (p, q) = (kronecker(10), kronecker(20));
    let whole = clamp_information(&q.full().unwrap(), &p.full().unwrap()).unwrap();
    let ours = clamp_information(&q, &p).unwrap().full().unwrap();
    assert!(far(&whole, &ours) < 1e-12 && far(&ours, &q.full().unwrap()) > 0.1);
    let e = clamp_information(&q, &elsewhere()).unwrap_err();
    assert!(matches!(&e, Error::Parameter { name, problem } if name == "w" && problem.contains("bases")), "{e}");
    let other = FullGaussian::new([("v", Tensor::zeros([4], F64))], &Tensor::eye(4, F64)).unwrap();
    assert!(matches!(clamp_information(&more, &other), Err(Error::Posterior(_))));
}

// Removal

#[test]
fn removal_inverts_addition() {
    let (a, b) = (posterior(&model(0), &map(&curvature(0), |h| h + 0.2)), model(1));
    let b = posterior(&b, &map(&curvature(1), |h| h + 0.2));
    let back = remove(&combine(&[(1.0, &a), (0.8, &b)]).unwrap(), &b, 0.8).unwrap();
    close(&means(&back), &means(&a), 1e-12);
    assert!(back.kl(&a).unwrap().abs() < 1e-12);

    let (prior, data) = tasks();
    let q = regression(&[(1.0, &data[0]), (1.0, &data[1])], &prior);
    let site = regression(
        &[(1.0, &data[1])],
        &FullGaussian::new([("w", Tensor::zeros([4], F64))], &(Tensor::eye(4, F64) * 1e-9)).unwrap(),
    );
    let without = regression(&[(1.0, &data[0])], &prior);
    assert!(far(&remove(&q, &site, 1.0).unwrap(), &without) < 1e-7);
}

/// Just below the largest weight there is a posterior and at it there is none.
fn limit_is_sharp<Q: NaturalSum>(q: &Q, part: &Q, expected: f64, place: &str) {
    let largest = largest_removal(q, part).unwrap();
    assert!((largest / expected - 1.0).abs() < 1e-12, "{largest} instead of {expected}");
    assert!(remove(q, part, largest * (1.0 - 1e-9)).is_ok());
    for weight in [largest, largest * (1.0 + 1e-9), 1e6] {
        match remove(q, part, weight).err() {
            Some(Error::Removal { what, weight: w, largest: l }) => {
                assert!(what.contains(place) && (w, l) == (weight, largest), "{what} {w} {l}");
            }
            other => panic!("{other:?}"),
        }
    }
    assert!(combine(&[(1.0, q), (-largest * (1.0 + 1e-9), part)]).is_err());
}

#[test]
fn too_large_a_removal_says_what_would_do() {
    let q = |s: &[f64]| posterior(&one(&[0.0; 3]), &one(s));
    limit_is_sharp(&q(&[4.0, 3.0, 8.0]), &q(&[1.0, 2.0, 1.0]), 1.5, "`w`");
    let full = |s: &[f64]| {
        FullGaussian::new([("w", Tensor::zeros([2], F64))], &Tensor::from_slice(s).reshape([2, 2])).unwrap()
    };
    // det(S - wS') = (2-w)² - (1-w/2)² vanishes at w = 2 only, twice; and with S' = diag(1, 2): (2-w)(2-2w) = 1.
    limit_is_sharp(&full(&[2.0, 1.0, 1.0, 2.0]), &full(&[1.0, 0.0, 0.0, 2.0]), (3.0 - 3f64.sqrt()) / 2.0, "matrix");
    let (a, b) = (kronecker(10), kronecker(20));
    let precision = |q: &KroneckerGaussian| q.parameter("w").unwrap().precision.copy();
    let expected = (precision(&a) / precision(&b)).min().double_value(&[]);
    limit_is_sharp(&a, &b, expected, "`w`");
    assert!(matches!(remove(&q(&[1.0; 3]), &q(&[1.0; 3]), -0.5), Err(Error::HyperParameter { name: "weight", .. })));
}

// Without curvature

#[test]
fn averages() {
    let models = [model(1), model(2), model(3)];
    let average = merge(Method::linear(), None, &weighted(&models, &[1.0; 3])).unwrap();
    let by_hand: Tensors =
        models[0].iter().map(|(n, t)| (n.clone(), (t + &models[1][n] + &models[2][n]) / 3.0)).collect();
    close(&average, &by_hand, 1e-15);
    let sum = merge(Method::Linear { normalize: false }, None, &weighted(&models, &[1.0, -2.0, 0.5])).unwrap();
    let by_hand: Tensors =
        models[0].iter().map(|(n, t)| (n.clone(), t - &models[1][n] * 2.0 + &models[2][n] * 0.5)).collect();
    close(&sum, &by_hand, 1e-14);
}

#[test]
fn task_arithmetic_by_hand() {
    let (base, a, b) = (one(&[1.0, 1.0]), one(&[2.0, 1.0]), one(&[1.0, 5.0]));
    let models = [Model::new("a", &a).weight(0.5), Model::new("b", &b).weight(-1.0)];
    let merged = merge(Method::task_arithmetic(2.0), Some(&Model::new("base", &base)), &models).unwrap();
    assert_eq!(values(&merged["w"]), [2.0, -7.0]);
}

#[test]
fn every_method_is_invariant_to_the_order_of_models() {
    let (base, h0) = (model(0), map(&curvature(0), |h| h + 0.1));
    let base = Model::new("base", &base).curvature(&h0);
    let (models, h) = ([model(1), model(2), model(3)], [curvature(1), curvature(2), curvature(3)]);
    // Precisions must be positive.
    let s = h.each_ref().map(|h| map(h, |h| h + 0.1));
    for method in [
        Method::linear(),
        Method::task_arithmetic(0.8),
        Method::ties(1.0, 0.6),
        Method::dare(1.0, 0.5, Rescale::Density, 3),
        Method::dare(1.0, 0.5, Rescale::L1Norm, 3),
        Method::dare_ties(1.0, 0.5, Rescale::Density, 3),
        Method::Fisher,
        Method::gradient_matching(),
        Method::Combine,
    ] {
        let given = weighted(&models, &[0.5, 1.0, 0.7]).into_iter().zip(&h);
        let mut given: Vec<Model> = match method {
            Method::Combine => given.zip(&s).map(|((m, _), s)| m.precision(s)).collect(),
            _ => given.map(|(m, h)| m.curvature(h)).collect(),
        };
        let merged = merge(method, Some(&base), &given).unwrap();
        for _ in 0..3 {
            given.rotate_left(1);
            close(&merged, &merge(method, Some(&base), &given).unwrap(), 1e-13);
            given.swap(0, 1);
            close(&merged, &merge(method, Some(&base), &given).unwrap(), 1e-13);
        }
        assert!(difference(&merged["a"], &models[0]["a"]) > 0.01);
    }
}

#[test]
fn slerp_is_an_arc() {
    let (a, b) = (model(1), model(2));
    let models = [Model::new("a", &a), Model::new("b", &b)];
    let at = |t| merge(Method::Slerp { t }, None, &models).unwrap();
    close(&at(0.0), &a, 0.0);
    close(&at(1.0), &b, 0.0);
    // The same arc from the other end.
    let back = |t| merge(Method::Slerp { t }, None, &[Model::new("b", &b), Model::new("a", &a)]).unwrap();
    for t in [0.0, 0.2, 0.5, 0.9] {
        close(&back(1.0 - t), &at(t), 1e-14);
    }
    // Half the way between orthogonal vectors of norm 1, and a third.
    let (x, y) = (one(&[1.0, 0.0]), one(&[0.0, 1.0]));
    let arc = |t| merge(Method::Slerp { t }, None, &[Model::new("x", &x), Model::new("y", &y)]).unwrap();
    assert!(difference(&arc(0.5)["w"], &Tensor::from_slice(&[0.5f64.sqrt(); 2])) < 1e-15);
    assert!(difference(&arc(1.0 / 3.0)["w"], &Tensor::from_slice(&[0.75f64.sqrt(), 0.5])) < 1e-15);
    // Vectors of one norm keep it.
    let unit = |t: &Tensors| map(t, |t| t / t.norm());
    let (a, b) = (unit(&a), unit(&b));
    for t in [0.1, 0.5, 0.8] {
        let merged = merge(Method::Slerp { t }, None, &[Model::new("a", &a), Model::new("b", &b)]).unwrap();
        for t in merged.values() {
            assert!((t.norm().double_value(&[]) - 1.0).abs() < 1e-14);
        }
    }
    // On one line, and from zero, it is the line.
    for end in [map(&a, |t| t * 3.0), map(&a, |t| t * -2.0), map(&a, Tensor::zeros_like)] {
        let models = [Model::new("a", &a), Model::new("end", &end)];
        let line: Tensors = a.iter().map(|(n, t)| (n.clone(), t * 0.7 + &end[n] * 0.3)).collect();
        close(&merge(Method::Slerp { t: 0.3 }, None, &models).unwrap(), &line, 1e-15);
    }
    assert!(matches!(merge(Method::Slerp { t: 0.5 }, None, &models[..1]), Err(Error::Merge(_))));
}

#[test]
fn ties_by_hand() {
    let base = one(&[10.0; 6]);
    let with = |d: [f64; 6]| one(&d.map(|d| 10.0 + d));
    // The largest three each: of a (5, -4, 3), of b (-6, 4, 2), the last two tied with an earlier 2 that is kept first.
    let a = with([5.0, -4.0, 3.0, 1.0, 0.5, 0.25]);
    let b = with([-6.0, -1.0, 4.0, 2.0, 2.0, 2.0]);
    let models = [Model::new("a", &a), Model::new("b", &b)];
    let ties =
        |method, models: &[Model]| values(&merge(method, Some(&Model::new("base", &base)), models).unwrap()["w"]);
    // Sums -1, -4, 7, 2, 0, 0: the negative 6 alone, the 4 alone, the mean of 3 and 4, the 2 alone.
    assert_eq!(ties(Method::ties(1.0, 0.5), &models), [4.0, 6.0, 13.5, 12.0, 10.0, 10.0]);
    assert_eq!(ties(Method::ties(0.5, 0.5), &models), [7.0, 8.0, 11.75, 11.0, 10.0, 10.0]);
    // Weights 3 and 1: sums 9, -12, 13, 2; (3·3 + 1·4)/4 where both agree.
    let models = [Model::new("a", &a).weight(3.0), Model::new("b", &b)];
    assert_eq!(ties(Method::ties(1.0, 0.5), &models), [15.0, 6.0, 13.25, 12.0, 10.0, 10.0]);
    // Without normalization the agreeing ones are added.
    let added = TaskVectors { lambda: 1.0, keep: Keep::Largest { density: 0.5 }, elect_signs: true, normalize: false };
    assert_eq!(ties(Method::TaskVectors(added), &models), [25.0, -2.0, 23.0, 12.0, 10.0, 10.0]);
    // A sum of zero counts as positive.
    let (up, down) = (one(&[11.0; 6]), one(&[9.0; 6]));
    assert_eq!(ties(Method::ties(1.0, 1.0), &[Model::new("up", &up), Model::new("down", &down)]), [11.0; 6]);
}

#[test]
fn ties_of_equal_signs_is_the_mean() {
    let base = map(&model(0), |t| t * 0.1);
    let models: Vec<Tensors> =
        (1..4).map(|i| model(i).iter().map(|(n, t)| (n.clone(), &base[n] + t.abs())).collect()).collect();
    let given = weighted(&models, &[0.5, 2.0, 1.0]);
    let ties = merge(Method::ties(1.0, 1.0), Some(&Model::new("base", &base)), &given).unwrap();
    close(&ties, &merge(Method::linear(), None, &given).unwrap(), 1e-14);
}

/// Against sorting, on a tensor of several chunks with many ties, in f32 and f64.
#[test]
fn the_largest_are_those_that_sorting_finds() {
    let n = (1 << 20) + 4321;
    for kind in [Kind::Float, Kind::Double] {
        // Two decimals: hundreds of equal magnitudes; scaled so that every digit of the threshold counts.
        let d = ((randn(&[n], 5).to_kind(kind) * 100.0).round() * 0.013).to_kind(kind);
        let base = BTreeMap::from([("w".to_owned(), d.zeros_like())]);
        let theta = BTreeMap::from([("w".to_owned(), d.copy())]);
        for density in [1e-7, 0.01, 0.37, 0.999] {
            let keep =
                TaskVectors { lambda: 1.0, keep: Keep::Largest { density }, elect_signs: false, normalize: false };
            let models = [Model::new("m", &theta)];
            let merged = merge(Method::TaskVectors(keep), Some(&Model::new("base", &base)), &models).unwrap();
            let kept = ((density * n as f64) as i64).max(1);
            let order = d.abs().argsort_stable(true, 0, true).narrow(0, 0, kept);
            let expected = d.zeros_like().index_copy(0, &order, &d.index_select(0, &order));
            assert_eq!(difference(&merged["w"], &expected), 0.0, "{kind:?} {density}");
        }
    }
}

#[test]
fn dare_of_density_1_is_task_arithmetic() {
    let (base, models) = (model(0), [model(1), model(2)]);
    let given = weighted(&models, &[0.3, 1.4]);
    let base = Model::new("base", &base);
    let arithmetic = merge(Method::task_arithmetic(0.9), Some(&base), &given).unwrap();
    for rescale in [Rescale::Density, Rescale::L1Norm] {
        close(&merge(Method::dare(0.9, 1.0, rescale, 0), Some(&base), &given).unwrap(), &arithmetic, 0.0);
    }
    let elected = merge(Method::dare_ties(0.9, 1.0, Rescale::Density, 0), Some(&base), &given).unwrap();
    close(&elected, &merge(Method::ties(0.9, 1.0), Some(&base), &given).unwrap(), 0.0);
}

/// TIES of one model is that model where all is kept; DARE with elected signs is DARE of each model alone, then TIES of
/// all.
#[test]
fn elected_signs_compose() {
    let (base, models) = (model(0), [model(1), model(2), model(3)]);
    let given = weighted(&models, &[0.3, 1.4, 0.8]);
    let base = Model::new("base", &base);
    close(&merge(Method::ties(1.0, 1.0), Some(&base), &given[1..2]).unwrap(), &models[1], 1e-14);
    for rescale in [Rescale::Density, Rescale::L1Norm] {
        let alone = |m: &Model| merge(Method::dare(1.0, 0.5, rescale, 4), Some(&base), &[m.weight(1.0)]).unwrap();
        let sparse: Vec<Tensors> = given.iter().map(alone).collect();
        assert!(sparse.iter().zip(&models).all(|(s, m)| difference(&s["a"], &m["a"]) > 0.01));
        let elected = merge(Method::ties(0.9, 1.0), Some(&base), &weighted(&sparse, &[0.3, 1.4, 0.8])).unwrap();
        let at_once = merge(Method::dare_ties(0.9, 0.5, rescale, 4), Some(&base), &given).unwrap();
        close(&at_once, &elected, 1e-13);
    }
}

#[test]
fn dare_keeps_the_l1_norm() {
    let (base, model) = (one(&[0.0; 1000]), BTreeMap::from([("w".to_owned(), randn(&[1000], 3))]));
    for density in [0.1, 0.5] {
        let method = Method::dare(1.0, density, Rescale::L1Norm, 1);
        let merged = merge(method, Some(&Model::new("base", &base)), &[Model::new("m", &model)]).unwrap();
        let l1 = |t: &Tensor| t.abs().sum(Kind::Double).double_value(&[]);
        assert!((l1(&merged["w"]) / l1(&model["w"]) - 1.0).abs() < 1e-12);
        assert!(merged["w"].count_nonzero(None::<i64>).int64_value(&[]) < 1000 * 6 / 10);
    }
}

/// The kept fraction and the mean over elements and seeds, each within 5 standard deviations: false alarms 6e-7 per
/// comparison.
#[test]
fn dare_is_unbiased() {
    let (n, seeds) = (50_000, 20);
    let base = BTreeMap::from([("w".to_owned(), Tensor::zeros([n], F64))]);
    let ones = BTreeMap::from([("w".to_owned(), Tensor::ones([n], F64))]);
    for density in [0.1, 0.53] {
        let mut total = 0.0;
        let mut by_element = Tensor::zeros([n], F64);
        for seed in 0..seeds {
            let method = Method::dare(1.0, density, Rescale::Density, seed);
            let merged = merge(method, Some(&Model::new("base", &base)), &[Model::new("m", &ones)]).unwrap();
            total += merged["w"].sum(Kind::Double).double_value(&[]);
            by_element += &merged["w"];
        }
        // Each element is 1/density with probability density: variance (1-density)/density.
        let variance = (1.0 - density) / density;
        let draws = n as f64 * seeds as f64;
        assert!((total / draws - 1.0).abs() < 5.0 * (variance / draws).sqrt(), "density {density}");
        // Seeds are independent: the variance over elements of their sum, whose own relative deviation is √(2/n).
        let spread = by_element.var(true).double_value(&[]) / (variance * seeds as f64);
        assert!((spread - 1.0).abs() < 5.0 * (2.0 / n as f64).sqrt() * 1.2, "density {density}: {spread}");
    }
}

#[test]
fn random_choices_depend_on_names_alone() {
    let n = 10_000;
    let weights = |names: &[&str], x: f64| -> Tensors {
        names.iter().map(|name| ((*name).to_owned(), Tensor::full([n], x, F64))).collect()
    };
    let method = Method::dare(1.0, 0.5, Rescale::Density, 7);
    let run = |names: &[&str], model: &str| {
        let (base, theta) = (weights(names, 0.0), weights(names, 1.0));
        merge(method, Some(&Model::new("base", &base)), &[Model::new(model, &theta)]).unwrap()
    };
    let both = run(&["x", "y"], "m");
    assert_eq!(difference(&both["y"], &run(&["a", "y"], "m")["y"]), 0.0);
    // Another tensor, another model: agreement on half of the elements, ± 5 deviations of 0.5/√n.
    for other in [&both["x"], &run(&["y"], "other")["y"]] {
        let agree = both["y"].eq_tensor(other).to_kind(Kind::Double).mean(Kind::Double).double_value(&[]);
        assert!((agree - 0.5).abs() < 2.5 / (n as f64).sqrt(), "{agree}");
    }
}

// Kinds, ties, errors

#[test]
fn results_have_the_kind_of_the_widest() {
    let x = Tensor::from_slice(&[1.0f32, 2.5, -3.0]);
    for (kind, with, expected) in [
        (Kind::BFloat16, Kind::Float, Kind::Float),
        (Kind::BFloat16, Kind::Half, Kind::Float),
        (Kind::Half, Kind::Half, Kind::Half),
        (Kind::Float, Kind::BFloat16, Kind::Float),
        (Kind::Double, Kind::Float, Kind::Double),
        (Kind::Half, Kind::Double, Kind::Double),
    ] {
        let base =
            BTreeMap::from([("count".to_owned(), Tensor::from_slice(&[3i64])), ("w".to_owned(), x.to_kind(kind))]);
        let other = BTreeMap::from([
            ("count".to_owned(), Tensor::from_slice(&[5i64])),
            ("w".to_owned(), (&x + 1.0).to_kind(with)),
        ]);
        let models = [Model::new("a", &base), Model::new("b", &other)];
        let merged = merge(Method::linear(), None, &models).unwrap();
        assert_eq!((merged["w"].kind(), merged["count"].int64_value(&[0])), (expected, 3));
        assert_eq!(values(&merged["w"]), [1.5, 3.0, -2.5]);
    }
}

/// As for files: statistics are averaged, counts and what is left out copied, factors refused.
#[test]
fn tensors_are_merged_as_what_they_are_for() {
    let model = |x: f64, head: i64| {
        let t = |x: f64| Tensor::from_slice(&[x]);
        BTreeMap::from([
            ("bn.num_batches_tracked".to_owned(), t(10.0 * x)),
            ("bn.running_var".to_owned(), t(x)),
            ("bn.weight".to_owned(), t(x)),
            ("head".to_owned(), Tensor::full([head], x, F64)),
        ])
    };
    let (base, a, b) = (model(1.0, 1), model(0.5, 2), model(0.1, 3));
    let models = [Model::new("a", &a), Model::new("b", &b).weight(3.0)];
    let recipe = || Recipe::new(Method::task_arithmetic(1.0)).exclude("head");
    let merged = merge(recipe(), Some(&Model::new("base", &base)), &models).unwrap();
    assert_eq!(values(&merged["bn.running_var"]), [(0.5 + 3.0 * 0.1) / 4.0]);
    assert!((merged["bn.weight"].double_value(&[0]) - (1.0 - 0.5 - 2.7)).abs() < 1e-15);
    assert_eq!((values(&merged["bn.num_batches_tracked"]), values(&merged["head"])), (vec![10.0], vec![1.0]));
    assert_eq!(values(&base["head"]), [1.0]);
    // Nobody has the curvature of a buffer.
    let f = BTreeMap::from([("bn.weight".to_owned(), Tensor::from_slice(&[2.0]))]);
    let weighted = [Model::new("a", &a).curvature(&f), Model::new("b", &b).curvature(&f)];
    let merged = merge(Recipe::new(Method::Fisher).exclude("head"), None, &weighted).unwrap();
    assert_eq!((values(&merged["bn.running_var"]), values(&merged["bn.weight"])), (vec![0.3], vec![0.3]));
    assert!(merge(Method::task_arithmetic(1.0), Some(&Model::new("base", &base)), &models).is_err());
    let e = merge(recipe().exclude("heads"), Some(&Model::new("base", &base)), &models).unwrap_err();
    assert!(e.to_string().contains("`heads`"), "{e}");

    let adapter = BTreeMap::from([("q.lora_A.weight".to_owned(), Tensor::from_slice(&[1.0]))]);
    let adapter = [Model::new("a", &adapter)];
    let e = merge(Method::linear(), None, &adapter).unwrap_err();
    assert!(e.to_string().contains("`q.lora_A.weight`: it is a factor"), "{e}");
    merge(Recipe::new(Method::linear()).factors(true), None, &adapter).unwrap();
}

#[test]
fn tied_weights_stay_tied() {
    let tie = |x: f64| {
        let t = Tensor::full([100], x, F64);
        BTreeMap::from([("embed".to_owned(), t.shallow_clone()), ("head".to_owned(), t)])
    };
    let (base, a) = (tie(0.0), tie(1.0));
    let method = Method::dare(1.0, 0.5, Rescale::Density, 0);
    let merged = merge(method, Some(&Model::new("base", &base)), &[Model::new("a", &a)]).unwrap();
    assert!(merged["embed"].is_set_to(&merged["head"]));
}

#[test]
fn what_does_not_fit_is_named() {
    let (base, a) = (model(0), model(1));
    let mut missing = model(2);
    missing.remove("b");
    let mut reshaped = model(2);
    reshaped.insert("a".to_owned(), randn(&[4, 3], 0));
    let mut broken = model(2);
    broken.insert("b".to_owned(), Tensor::from_slice(&[1.0, 2.0, f64::NAN, 0.0, 0.0]));
    let mut counted = model(2);
    counted.insert("b".to_owned(), Tensor::zeros([5], (Kind::Int64, Device::Cpu)));
    for (other, tensor, says) in [
        (&missing, "b", "model `bad` does not"),
        (&reshaped, "a", "[3, 4] in model `good` and [4, 3] in model `bad`"),
        (&broken, "b", "model `bad` has NaN in element 2"),
        (&counted, "b", "Int64"),
    ] {
        match merge(Method::linear(), None, &[Model::new("good", &a), Model::new("bad", other)]) {
            Err(Error::Parameter { name, problem }) => assert!(name == tensor && problem.contains(says), "{problem}"),
            other => panic!("{other:?}"),
        }
    }
    let positive = map(&curvature(0), |h| h + 1.0);
    let mut negative = map(&curvature(0), |h| h + 1.0);
    negative.insert("a".to_owned(), Tensor::full([3, 4], -1.0, F64));
    let fisher = |h: &Tensors| merge(Method::Fisher, None, &[Model::new("a", &a).curvature(h)]).unwrap_err();
    assert!(fisher(&negative).to_string().contains("`a`: the curvature of model `a` has -1 in element 0"));
    assert!(fisher(&missing).to_string().contains("parameter `b`: its curvature of model `a` is missing"));
    // So much taken away that nothing is left.
    let models = [Model::new("a", &a).curvature(&positive).weight(-3.0)];
    let zero = map(&base, Tensor::zeros_like);
    let e = merge(Method::gradient_matching(), Some(&Model::new("base", &base).curvature(&zero)), &models).unwrap_err();
    assert!(e.to_string().contains("not positive"), "{e}");

    let refused = |method, base: Option<&Model>, models: &[Model]| match merge(method, base, models).unwrap_err() {
        e @ (Error::Merge(_) | Error::HyperParameter { .. }) => e.to_string(),
        e => panic!("{e}"),
    };
    let (a, base) = (Model::new("a", &a), Model::new("base", &base));
    assert!(refused(Method::linear(), None, &[]).contains("no model"));
    assert!(refused(Method::linear(), None, &[a, a]).contains("two models have the name `a`"));
    assert!(refused(Method::linear(), None, &[a.weight(0.0)]).contains("sum to 0"));
    assert!(refused(Method::linear(), None, &[a.weight(f64::NAN)]).contains("NaN"));
    assert!(refused(Method::ties(1.0, 0.0), Some(&base), &[a]).contains("`density` = 0"));
    assert!(refused(Method::dare(1.0, 1.5, Rescale::Density, 0), Some(&base), &[a]).contains("`density` = 1.5"));
    assert!(refused(Method::ties(1.0, 0.5), Some(&base), &[a.weight(-1.0)]).contains("weights ≥ 0"));
    assert!(refused(Method::task_arithmetic(1.0), None, &[a]).contains("needs the base"));
    assert!(refused(Method::Fisher, None, &[a]).contains("neither curvature nor precision"));
}

#[test]
fn half_precision_does_not_overflow_silently() {
    let big = BTreeMap::from([("w".to_owned(), Tensor::full([2], 60_000.0, (Kind::Half, Device::Cpu)))]);
    let e = merge(Method::Linear { normalize: false }, None, &[Model::new("a", &big).weight(2.0)]).unwrap_err();
    assert!(e.to_string().contains("`w`") && e.to_string().contains("too large for Half"), "{e}");
}

// Diagnostics

/// L_t = ½ (w-c)ᵀ diag(h) (w-c) of a model with one parameter.
fn quadratic(w: &Tensor, h: &[f64], c: &[f64]) -> Tensor {
    ((w - Tensor::from_slice(c)).square() * Tensor::from_slice(h)).sum(Kind::Double) * 0.5
}

fn store() -> (nn::VarStore, Tensor) {
    let mut vs = nn::VarStore::new(Device::Cpu);
    vs.double();
    let mut w = vs.root().zeros("w", &[2]);
    vs.double();
    let _no_grad = tch::no_grad_guard();
    w.copy_(&Tensor::from_slice(&[7.0, 8.0]));
    (vs, w)
}

#[test]
fn gradient_mismatch_of_quadratics() {
    let (vs, _) = store();
    let w = &vs.variables()["w"];
    let (h, c) = ([[1.0, 2.0], [3.0, 1.0]], [[1.0, 0.0], [0.0, 2.0]]);
    let (merged, a, b) = (one(&[1.0, 1.0]), one(&[2.0, 0.0]), one(&[0.5, 1.0]));
    let mut first = || quadratic(w, &h[0], &c[0]);
    let mut second = || quadratic(w, &h[1], &c[1]);
    let models: &mut [(&Tensors, &mut dyn FnMut() -> Tensor)] = &mut [(&a, &mut first), (&b, &mut second)];
    let mismatch = gradient_mismatch(&vs, &merged, models).unwrap();
    // h·(merged - own): (1·-1, 2·1) and (3·0.5, 0).
    assert!((mismatch[0] - 5f64.sqrt()).abs() < 1e-15 && (mismatch[1] - 1.5).abs() < 1e-15, "{mismatch:?}");
    assert_eq!(values(w), [7.0, 8.0]);
}

/// A model of one head has no gradient for the other's: it is zero there.
#[test]
fn gradient_mismatch_of_two_heads() {
    let mut vs = nn::VarStore::new(Device::Cpu);
    let [a, b] = ["a", "b"].map(|name| vs.root().zeros(name, &[1]));
    vs.double();
    let both = |x: f64, y: f64| {
        Tensors::from([("a".to_owned(), Tensor::from_slice(&[x])), ("b".to_owned(), Tensor::from_slice(&[y]))])
    };
    let (merged, one, other) = (both(1.0, 2.0), both(3.0, 0.0), both(0.0, 5.0));
    let (mut of_a, mut of_b) = (|| a.square().sum(Kind::Double), || b.square().sum(Kind::Double) * 0.5);
    let models: &mut [(&Tensors, &mut dyn FnMut() -> Tensor)] = &mut [(&one, &mut of_a), (&other, &mut of_b)];
    assert_eq!(gradient_mismatch(&vs, &merged, models).unwrap(), [4.0, 3.0]);
}

/// The identity that gradient matching starts from, on losses that are not quadratic.
#[test]
fn the_error_of_task_arithmetic_is_the_mismatch() {
    let (x, y) = (randn(&[40, 2], 1), randn(&[40], 2).gt(0.0).to_kind(Kind::Double));
    let losses = [0, 20].map(|from| {
        let (x, y) = (x.narrow(0, from, 20), y.narrow(0, from, 20));
        move |w: &Tensor| (x.mv(w).softplus() - &y * x.mv(w)).sum(Kind::Double)
    });
    let (theta0, h0) = (Tensor::from_slice(&[0.3, -0.2]), 2.0);
    let gradient = |t: usize, w: &Tensor| {
        let w = w.detach().copy().set_requires_grad(true);
        Tensor::run_backward(&[losses[t](&w)], &[&w], false, false).remove(0)
    };
    // Gradient descent to the minimum of Σ a L + ½ h₀‖θ-θ₀‖².
    let fit = |a: [f64; 2]| {
        let mut w = theta0.copy();
        for _ in 0..3000 {
            let slope = gradient(0, &w) * a[0] + gradient(1, &w) * a[1] + (&w - &theta0) * h0;
            w -= slope * 0.03;
        }
        w
    };
    let (own, a) = ([fit([1.0, 0.0]), fit([0.0, 1.0])], [0.8, 1.1]);
    let joint = fit(a);
    let sum = &theta0 + (&own[0] - &theta0) * a[0] + (&own[1] - &theta0) * a[1];
    let mismatch = |t: usize| gradient(t, &joint) - gradient(t, &own[t]);
    let right = (mismatch(0) * a[0] + mismatch(1) * a[1]) / -h0;
    assert!(difference(&(&joint - &sum), &right) < 1e-10);
    assert!((&joint - &sum).norm().double_value(&[]) > 0.05);
}

#[test]
fn barriers_and_sweeps() {
    let (vs, _) = store();
    let w = &vs.variables()["w"];
    // A double well in the first weight, flat in the other: a barrier of 1 between (-1, 0) and (1, 0).
    let well = || ((w.square() - 1.0).square() * Tensor::from_slice(&[1.0, 0.0])).sum(Kind::Double);
    let (a, b) = (one(&[-1.0, 0.0]), one(&[1.0, 0.0]));
    let found = barrier(&vs, &a, &b, 5, well).unwrap();
    assert_eq!(found.t, [0.0, 0.25, 0.5, 0.75, 1.0]);
    assert_eq!(found.loss, [0.0, 0.5625, 1.0, 0.5625, 0.0]);
    assert_eq!(found.height, 1.0);
    // A bowl has none, also between unequal ends.
    let bowl = || w.square().sum(Kind::Double);
    assert_eq!(barrier(&vs, &a, &one(&[3.0, 1.0]), 9, bowl).unwrap().height, 0.0);
    assert!(matches!(barrier(&vs, &a, &b, 1, bowl), Err(Error::HyperParameter { name: "points", .. })));
    let foreign = BTreeMap::from([("v".to_owned(), Tensor::zeros([2], F64))]);
    assert!(matches!(barrier(&vs, &foreign, &b, 3, bowl), Err(Error::Parameter { name, .. }) if name == "w"));

    let base = one(&[0.0, 0.0]);
    let merged = |x: &[f64]| {
        let models = [Model::new("a", &a).weight(x[0]), Model::new("b", &b).weight(x[1])];
        merge(Method::task_arithmetic(1.0), Some(&Model::new("base", &base)), &models)
    };
    let grid = [vec![0.0, 0.0], vec![1.0, 0.0], vec![0.5, 2.0]];
    let losses: Vec<f64> = sweep(&vs, grid, merged, bowl).unwrap().into_iter().flat_map(|t| t.losses).collect();
    assert_eq!(losses, [0.0, 1.0, 2.25]);
    assert_eq!(values(w), [7.0, 8.0]);
}

/// What f32 has lost cannot be given back, and the error says that this is why.
#[test]
fn information_below_the_rounding_of_its_prior_is_named() {
    let q = |s: f64, kind| {
        let of = |x: f64| Tensor::from_slice(&[x]).to_kind(kind);
        DiagonalGaussian::new([("w", of(0.5), of(s))]).unwrap()
    };
    let (prior, posterior) = (q(1e6, Kind::Float), q(1e6 + 0.01, Kind::Float));
    for e in [
        combine(&[(1.0, &posterior), (-1.0, &prior)]).unwrap_err().to_string(),
        remove(&posterior, &prior, 1.0).unwrap_err().to_string(),
    ] {
        assert!(e.contains("lost in rounding") && e.contains("f64"), "{e}");
    }
    let (prior, posterior) = (q(1e6, Kind::Double), q(1e6 + 0.01, Kind::Double));
    let task = combine(&[(1.0, &posterior), (-1.0, &prior)]).unwrap();
    let found = values(&task.precision("w").unwrap())[0];
    assert!((found - 0.01).abs() < 1e-9, "{found}");
    // Nothing of the kind where more is taken than there is.
    let e = combine(&[(1.0, &q(1.0, Kind::Float)), (-1.0, &q(2.0, Kind::Float))]).unwrap_err().to_string();
    assert!(!e.contains("rounding"), "{e}");
}

/// Losses along a line and gradients at its ends only look at the model.
#[test]
fn batch_normalization_in_training_mode_is_refused_and_undone() {
    let vs = tch::nn::VarStore::new(Device::Cpu);
    let norm = tch::nn::batch_norm1d(vs.root() / "norm", 3, tch::nn::BatchNormConfig::default());
    let x = Tensor::arange(12, (Kind::Float, Device::Cpu)).reshape([4, 3]);
    let weights: Tensors = vs.variables().into_iter().map(|(name, t)| (name, t.detach().copy())).collect();
    let buffers = || ["norm.running_mean", "norm.running_var"].map(|name| values(&vs.variables()[name]));
    let before = buffers();
    let loss = |train: bool| tch::nn::ModuleT::forward_t(&norm, &x, train).square().mean(Kind::Float);
    for e in [
        barrier(&vs, &weights, &weights, 3, || loss(true)).unwrap_err(),
        sweep(&vs, [vec![1.0]], |_| Ok(weights.iter().map(|(n, t)| (n.clone(), t.copy())).collect()), || loss(true))
            .unwrap_err(),
        gradient_mismatch(&vs, &weights, &mut [(&weights, &mut || loss(true))]).unwrap_err(),
    ] {
        let e = e.to_string();
        assert!(e.contains("`norm.running_") && e.contains("train = false"), "{e}");
        assert_eq!(buffers(), before);
    }
    barrier(&vs, &weights, &weights, 3, || loss(false)).unwrap();
}

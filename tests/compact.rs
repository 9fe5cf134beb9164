//! Compact memory: pseudo-examples with the curvature of all examples.

use support::{F64, values};
use tch::{Kind, Tensor};
use tch_blr::continual::{Memory, Past, Quadratic, Replay, SoftLabels};
use tch_blr::nn::Likelihood;
use tch_blr::selection::{compact, random_scores, top};
use tch_blr::{Error, Params, family};

const BERNOULLI: Likelihood = Likelihood::Bernoulli;
const D: i64 = 8;

/// Numbers without a pattern, with unequal variances of the features.
fn inputs(n: i64, seed: u64) -> Tensor {
    let u = random_scores((n * D) as usize, seed).reshape([n, D]);
    (u - 0.5) * Tensor::linspace(1.0, 8.0, D, F64)
}

fn theta() -> Tensor {
    (Tensor::arange(D, F64) * 2.3).sin()
}

/// Σ wᵢ β(xᵢ) xᵢxᵢᵀ
fn curvature(x: &Tensor, w: &Tensor, theta: &Tensor) -> Tensor {
    let p = x.mv(theta).sigmoid();
    x.tr().matmul(&(x * (w * (&p - p.square())).unsqueeze(1)))
}

fn apart(a: &Tensor, b: &Tensor) -> f64 {
    ((a - b).norm() / b.norm()).double_value(&[])
}

/// Σ wᵢ β(xᵢ) xᵢxᵢᵀ of a memory, whose weights are its own: the Hessian of soft labels.
fn gram(memory: &Memory, theta: &Tensor) -> Tensor {
    let theta = theta.copy().set_requires_grad(true);
    let params = Params::named([("w", theta.shallow_clone())]).unwrap();
    let forward = |x: &Tensor| x.mv(&theta);
    let loss = SoftLabels::of(memory.shallow_clone(), forward).map(|k| Past::new().with(k).value(&params, forward));
    let gradient = Tensor::run_backward(&[loss.unwrap().unwrap()], &[&theta], true, true).remove(0);
    let row = |i| Tensor::run_backward(&[gradient.get(i)], &[&theta], true, false).remove(0);
    Tensor::stack(&(0..D).map(row).collect::<Vec<_>>(), 0)
}

#[test]
fn the_curvature_is_reproduced_where_k_is_the_rank() {
    let (x, theta) = (inputs(60, 0), theta());
    let weights = random_scores(60, 7);
    let past = Memory::new(&x, BERNOULLI).weights(&weights);
    let full = curvature(&x, &weights, &theta);
    for k in [8, 11, 60, 100] {
        let kept = compact(&[&past], k, 1, |x| x.mv(&theta)).unwrap();
        assert_eq!(kept.len(), k.min(60));
        assert!(apart(&gram(&kept, &theta), &full) < 1e-12, "{k}");
    }
    // Of rank 3 three are enough, and below the rank the rest is what the smaller eigenvalues leave.
    let flat = x.narrow(1, 0, 3).matmul(&inputs(3, 4));
    let past = Memory::new(&flat, BERNOULLI);
    let ones = Tensor::ones([60], F64);
    let kept = compact(&[&past], 3, 1, |x| x.mv(&theta)).unwrap();
    assert!(apart(&gram(&kept, &theta), &curvature(&flat, &ones, &theta)) < 1e-12);
    let eigenvalues = values(&full.linalg_eigvalsh("L"));
    for k in 1..8 {
        let kept = compact(&[&Memory::new(&x, BERNOULLI).weights(&weights)], k, 1, |x| x.mv(&theta)).unwrap();
        let left = (gram(&kept, &theta) - &full).norm().double_value(&[]);
        let smallest = eigenvalues[..8 - k].iter().map(|v| v * v).sum::<f64>().sqrt();
        assert!((left - smallest).abs() < 1e-11, "{k}: {left} {smallest}");
    }
}

/// What was compact before goes on with its weights.
#[test]
fn task_after_task() {
    let theta = theta();
    let tasks: Vec<Tensor> = (0..3).map(|t| inputs(40, t)).collect();
    let mut past: Option<Memory> = None;
    for x in &tasks {
        let new = Memory::new(x, BERNOULLI);
        let parts: Vec<&Memory> = past.iter().chain([&new]).collect();
        past = Some(compact(&parts, 8, 3, |x| x.mv(&theta)).unwrap());
    }
    let all = Tensor::cat(&tasks, 0);
    assert!(apart(&gram(&past.unwrap(), &theta), &curvature(&all, &Tensor::ones([120], F64), &theta)) < 1e-12);
}

/// For a linear regression the K-prior is then the past itself: with new data the joint optimum, exactly.
#[test]
fn regression_with_new_data_is_joint_regression() {
    let likelihood = Likelihood::Gaussian { variance: 0.3 };
    let (x, y) = (inputs(90, 5), random_scores(90, 6));
    let solve = |x: &Tensor, y: &Tensor| {
        let precision = x.tr().matmul(x) / 0.3 + Tensor::eye(D, F64) * 2.0;
        Tensor::linalg_inv(&precision).mv(&(x.tr().mv(y) / 0.3))
    };
    let (old, joint) = (solve(&x.narrow(0, 0, 60), &y.narrow(0, 0, 60)), solve(&x, &y));
    let kept = compact(&[&Memory::new(&x.narrow(0, 0, 60), likelihood)], 8, 0, |x| x.mv(&old)).unwrap();
    let new = Memory::new(&x.narrow(0, 60, 30), likelihood).targets(&y.narrow(0, 60, 30));
    let found = adapted(kept, &old, 2.0, &new);
    assert!(apart(&found, &joint) < 1e-11, "{}", apart(&found, &joint));
}

/// argmin of the new data's loss and the K-prior around θ_old.
fn adapted(kept: Memory, old: &Tensor, delta: f64, new: &Memory) -> Tensor {
    let past = Past::new().with(SoftLabels::of(kept, |x| x.mv(old)).unwrap());
    let start = Params::named([("w", old.shallow_clone())]).unwrap();
    let past = past.with(Quadratic::isotropic(&start, delta).unwrap());
    let objective = past.with(Replay::new(new.shallow_clone()).unwrap());
    minimum(old, |theta| {
        let params = Params::named([("w", theta.shallow_clone())]).unwrap();
        objective.value(&params, |x| x.mv(theta)).unwrap()
    })
}

fn minimum(start: &Tensor, loss: impl Fn(&Tensor) -> Tensor) -> Tensor {
    family::laplace(start, 1.0, 60, loss).unwrap().mean().copy()
}

/// Over 10 draws, against as many random examples that count for all; δ = 1. From the rank of 8 on there is nothing left out but
/// the change of the curvature; with half of it both are worse than nothing.
#[test]
fn a_k_prior_with_it_is_nearer_to_the_joint_optimum_than_with_random_examples() {
    let (x, truth) = (inputs(600, 8), theta());
    let y = random_scores(600, 9).less_tensor(&x.mv(&truth).sigmoid()).to_kind(Kind::Double);
    let task = |from, n| Memory::new(&x.narrow(0, from, n), BERNOULLI).targets(&y.narrow(0, from, n));
    let trained = |on: &Memory| {
        let replay = Past::new().with(Replay::new(on.shallow_clone()).unwrap());
        minimum(&truth.zeros_like(), |theta| {
            let params = Params::named([("w", theta.shallow_clone())]).unwrap();
            replay.value(&params, |x| x.mv(theta)).unwrap() + theta.square().sum(Kind::Double) * 0.5
        })
    };
    let (first, new) = (task(0, 500), task(500, 100));
    let (old, joint) = (trained(&first), trained(&task(0, 600)));
    for (k, bar) in [(4, 0.9), (6, 0.5), (8, 0.05), (16, 0.05)] {
        let mut off = [0.0; 2];
        for seed in 0..10 {
            let pseudo = compact(&[&first], k, seed, |x| x.mv(&old)).unwrap();
            let at = top(&random_scores(500, 100 + seed), k).unwrap();
            let random = first.select(&at).unwrap().weights(&Tensor::full([k as i64], 500.0 / k as f64, F64));
            for (off, kept) in off.iter_mut().zip([pseudo, random]) {
                *off += apart(&adapted(kept, &old, 1.0, &new), &joint) / 10.0;
            }
        }
        assert!(off[0] < bar * off[1], "{k}: {off:?}");
        assert!(k < 8 || off[0] < 0.1 * apart(&old, &joint), "{k}: {off:?}");
    }
}

#[test]
fn what_cannot_be_made_compact_is_refused_by_name() {
    let (x, theta) = (inputs(10, 0), theta());
    let past = || Memory::new(&x, BERNOULLI);
    let forward = |x: &Tensor| x.mv(&theta);
    let says = |result: Result<Memory, Error>, what: &str| {
        let e = result.unwrap_err();
        assert!(
            matches!(e, Error::Memory(_) | Error::Likelihood(_) | Error::HyperParameter { .. })
                && e.to_string().contains(what),
            "{e}"
        );
    };
    says(compact(&[], 2, 0, forward), "no part");
    says(compact(&[&past()], 0, 0, forward), "`k`");
    says(compact(&[&past()], 2, 0, |x| forward(x) + 1.0), "feature of 1");
    says(compact(&[&past()], 2, 0, |x| forward(x) * f64::NAN), "not finite");
    says(compact(&[&past()], 2, 0, |x| x.narrow(1, 0, 2)), "one logit");
    says(compact(&[&Memory::new(&x, Likelihood::Categorical)], 2, 0, |x| x.narrow(1, 0, 2)), "categorical");
    says(compact(&[&past(), &Memory::new(&x, Likelihood::Gaussian { variance: 1.0 })], 2, 0, forward), "part 1");
    says(compact(&[&past(), &Memory::new(&x.narrow(1, 0, 3), BERNOULLI)], 2, 0, forward), "[M, 8]");
    says(compact(&[&Memory::new(&x.get(0), BERNOULLI)], 2, 0, forward), "features");
    says(compact(&[&Memory::new(&(&x * f64::NAN), BERNOULLI)], 2, 0, forward), "inputs of part 0");
    says(compact(&[&past().active(&[0])], 2, 0, forward), "names its active outputs");
    says(compact(&[&past().weights(&x.get(0))], 2, 0, forward), "weights");
    says(compact(&[&past().weights(&-Tensor::ones([10], F64))], 2, 0, forward), "negative");
    says(compact(&[&Memory::new(&x.narrow(0, 0, 0), BERNOULLI)], 2, 0, forward), "empty");
}

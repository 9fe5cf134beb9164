//! Gradients that raise the loss of no past task.

use proptest::prelude::*;
use support::{all_close, close, says, values};
use tch::{Device, Kind, Tensor};
use tch_blr::continual::{Memory, Model, Regularizer, StoredOutputs, gem};
use tch_blr::nn::Likelihood;
use tch_blr::rule::Rule;
use tch_blr::{Derivatives, Params, Sgd};

type Gradients = Vec<Option<Tensor>>;

/// A gradient of two parameters.
fn gradient(x: &[f64]) -> Gradients {
    vec![Some(Tensor::from_slice(&x[..2])), Some(Tensor::from_slice(&x[2..]).unsqueeze(0))]
}

fn flat(g: &Gradients) -> Vec<f64> {
    g.iter().flatten().flat_map(values).collect()
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// Small integers, so that dependent, equal and vanishing gradients come up.
fn vectors(n: usize) -> impl Strategy<Value = Vec<Vec<f64>>> {
    let one = prop::collection::vec((-3..4_i32).prop_map(f64::from), 4);
    prop::collection::vec(one, 1..=n)
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, cases: 400, ..ProptestConfig::default() })]

    /// The conditions that only the projection on the cone satisfies: feasible; g̃ - g is a sum of g_k with weights ≥ 0, and
    /// stands on g̃, so that no feasible point is closer.
    #[test]
    fn gem_is_the_nearest_feasible_gradient(all in vectors(9)) {
        let (g, past) = (&all[0], &all[1..]);
        let memories: Vec<Gradients> = past.iter().map(|m| gradient(m)).collect();
        let projected = flat(&gem::project(&gradient(g), &memories, 0.0).unwrap());
        for m in past {
            prop_assert!(dot(&projected, m) >= -1e-8);
        }
        let change: Vec<f64> = projected.iter().zip(g).map(|(a, b)| a - b).collect();
        prop_assert!(dot(&change, &projected).abs() < 1e-9, "{:?}", projected);
        // For every z with ⟨z, g_k⟩ ≥ 0, ⟨g̃ - g, z⟩ ≥ 0: here all small integer z.
        for code in 0..625 {
            let z: Vec<f64> = (0..4).map(|d| f64::from(code / 5_i32.pow(d) % 5 - 2)).collect();
            if past.iter().all(|m| dot(&z, m) >= 0.0) {
                prop_assert!(dot(&change, &z) >= -1e-9);
            }
        }
        if past.iter().all(|m| dot(g, m) >= 0.0) {
            prop_assert_eq!(&projected, g);
        }
        // Sizes of gradients do not count.
        let scaled: Vec<Gradients> = past.iter().map(|m| gradient(&m.iter().map(|x| x * 1e-6).collect::<Vec<_>>())).collect();
        all_close(&flat(&gem::project(&gradient(g), &scaled, 0.0).unwrap()), &projected, 1e-8);
    }

    #[test]
    fn a_margin_keeps_every_weight_above_it(all in vectors(4), gamma in 0.1..2.0_f64) {
        let (g, past) = (&all[0], &all[1..]);
        let memories: Vec<Gradients> = past.iter().map(|m| gradient(m)).collect();
        let projected = flat(&gem::project(&gradient(g), &memories, gamma).unwrap());
        if past.iter().all(|m| dot(g, m) >= 0.0) {
            prop_assert_eq!(&projected, g);
        } else {
            // Inner products go up with the margin: g̃ = (g + γΣg_k) projected.
            let biased: Vec<f64> = (0..4).map(|i| g[i] + gamma * past.iter().map(|m| m[i]).sum::<f64>()).collect();
            let expected = flat(&gem::project(&gradient(&biased), &memories, 0.0).unwrap());
            all_close(&projected, &expected, 1e-8);
        }
    }

    #[test]
    fn one_task_of_gem_is_a_gem(all in vectors(2)) {
        let (g, r) = (&all[0], gradient(all.last().unwrap()));
        let one = flat(&gem::project(&gradient(g), &[r.iter().map(|t| t.as_ref().map(Tensor::copy)).collect()], 0.0).unwrap());
        let average = flat(&gem::project_average(&gradient(g), &r).unwrap());
        all_close(&average, &one, 1e-12);
        prop_assert!(dot(&average, &flat(&r)) >= -1e-8);
    }
}

/// Many tasks in many dimensions, nearly dependent.
#[test]
fn gem_with_many_tasks() {
    let wave = |n: i64, phase: f64| (Tensor::arange(n, (Kind::Double, Device::Cpu)) * 1.7 + phase).sin();
    let common = wave(1000, 0.0);
    let past: Vec<Gradients> = (0..20).map(|k| vec![Some(&common + wave(1000, f64::from(k * k)) * 1e-3)]).collect();
    let g = vec![Some(wave(1000, 2.0) - &common)];
    let projected = flat(&gem::project(&g, &past, 0.0).unwrap());
    for m in &past {
        assert!(dot(&projected, &flat(m)) >= -1e-8);
    }
    let change: Vec<f64> = projected.iter().zip(flat(&g)).map(|(a, b)| a - b).collect();
    close(dot(&change, &projected), 0.0, 1e-8);
}

#[test]
fn parameters_without_a_part_in_a_loss() {
    let t = |x: &[f64]| Some(Tensor::from_slice(x));
    // The new head has no gradient in the past, an old head none now.
    let g = vec![t(&[1.0, -2.0]), t(&[3.0]), None, None];
    let m = vec![t(&[0.0, 1.0]), None, t(&[2.0]), None];
    let projected = gem::project(&g, &[m], 0.0).unwrap();
    assert!(projected[3].is_none());
    // v = 2/5
    all_close(&flat(&projected), &[1.0, -1.6, 3.0, 0.8], 1e-12);
    let f32s = |g: &Gradients| g.iter().map(|t| t.as_ref().map(|t| t.to_kind(Kind::Float))).collect::<Vec<_>>();
    let average = gem::project_average(&f32s(&g), &f32s(&vec![t(&[0.0, 1.0]), None, t(&[2.0]), None])).unwrap();
    assert!(average.iter().flatten().all(|t| t.kind() == Kind::Float));
    all_close(&flat(&average), &[1.0, -1.6, 3.0, 0.8], 1e-6);
}

/// Through an optimizer: a quadratic task that pulls against a past one, whose loss does not go up.
#[test]
fn an_optimizer_takes_the_projected_gradient() {
    fn run<R: Rule>(rule: R, project: bool) -> (f64, f64) {
        let w = Tensor::from_slice(&[0.0, 0.0]).set_requires_grad(true);
        let frozen = Tensor::from_slice(&[1.0]);
        let params = || Params::named([("frozen", frozen.shallow_clone()), ("w", w.shallow_clone())]).unwrap();
        let (new, past) = (Tensor::from_slice(&[1.0, 1.0]), Tensor::from_slice(&[-2.0, 0.0]));
        let loss = |to: &Tensor| (&w * &frozen - to).square().sum(Kind::Double) * 0.5;
        let start = loss(&past).double_value(&[]);
        let mut opt = rule.builder().build(params(), 0.01).unwrap();
        for _ in 0..300 {
            let step = opt.perturbed().unwrap();
            let now = loss(&new);
            let mut gradients = gem::gradients(&now, params()).unwrap();
            if project {
                gradients = gem::project(&gradients, &[gem::gradients(&loss(&past), params()).unwrap()], 0.0).unwrap();
            }
            let loss = now.double_value(&[]);
            step.step(Derivatives { loss, examples: None, gradients, squares: vec![] }).unwrap();
        }
        (loss(&past).double_value(&[]) - start, loss(&new).double_value(&[]))
    }
    let (free, _) = run(Sgd::default(), false);
    let (held, new) = run(Sgd::default(), true);
    // The nearest point to (1, 1) no further from (-2, 0) than 0 is.
    let nearest = 0.5 * (10f64.sqrt() - 2.0).powi(2);
    assert!(free > 1.0 && held < 0.01, "{free} {held}");
    close(new, nearest, 0.01);
    let (held, new) = run(Sgd::default().momentum(0.5), true);
    assert!(held < 0.01, "{held}");
    close(new, nearest, 0.01);
}

#[track_caller]
#[test]
fn gradients_that_do_not_fit_are_refused_by_name() {
    let g = || gradient(&[1.0, 2.0, 3.0, 4.0]);
    let one = vec![Some(Tensor::from_slice(&[1.0]))];
    says(gem::project(&g(), &[g(), one], 0.0), "1 tensors");
    let turned = vec![g()[1].as_ref().map(Tensor::copy), None];
    says(gem::project(&g(), &[turned], 0.0), "gradient 0");
    says(gem::project(&g(), &[gradient(&[1.0, 2.0, f64::NAN, 4.0])], 0.0), "gradient 1 on the memory is not finite");
    says(gem::project_average(&gradient(&[f64::INFINITY, 0.0, 0.0, 0.0]), &g()), "gradient 0 of the loss");
    says(gem::project(&g(), &[g()], -1.0), "`gamma`");
    let w = support::weight(&[1.0, 2.0]);
    says(gem::gradients(&(&w * 2.0), support::params(&w)), "0-dim");
}

/// α Σ w‖f - f_old‖² and its gradient; the mean of entries that others take is one coefficient away.
#[test]
fn stored_outputs() {
    let w = support::weight(&[0.5, -1.0, 2.0, 0.3]);
    let wave = |shape: [i64; 2], p: f64| {
        (Tensor::arange(shape[0] * shape[1], (Kind::Double, Device::Cpu)) * 1.7 + p).sin().reshape(shape)
    };
    let x = wave([5, 2], 0.1);
    let forward = |x: &Tensor| x.matmul(&w.reshape([2, 2])).tanh();
    let weights = Tensor::from_slice(&[1.0, 2.0, 0.5, 1.0, 3.0]);
    let memory = || Memory::new(&x, Likelihood::Categorical).weights(&weights);
    let (old, alpha) = (wave([5, 2], 0.7), 0.3);
    let params = support::params(&w);
    let model = Model { params: &params, forward: &|x| Ok(forward(x)) };
    let ours = StoredOutputs::new(memory(), &old, alpha).unwrap().value(&model).unwrap();
    let expected =
        ((forward(&x) - &old).square().sum_dim_intlist(1, false, Kind::Double) * &weights).sum(Kind::Double) * alpha;
    close(ours.double_value(&[]), expected.double_value(&[]), 1e-13);
    let of = |loss: &Tensor| values(&Tensor::run_backward(&[loss], &[&w], false, false)[0]);
    all_close(&of(&ours), &of(&expected), 1e-13);

    // Beside the task's mean loss over N = 40: α' MSE is α/N times the sum with α = α'N/(MC).
    let plain = || Memory::new(&x, Likelihood::Categorical);
    let ours = StoredOutputs::new(plain(), &old, 0.1 * 40.0 / 10.0).unwrap().value(&model).unwrap() / 40.0;
    let mse = (forward(&x) - &old).square().mean(Kind::Double) * 0.1;
    close(ours.double_value(&[]), mse.double_value(&[]), 1e-14);

    // Nothing pulls where nothing has changed.
    let now = StoredOutputs::of(plain(), 1.0, forward).unwrap().value(&model).unwrap();
    assert_eq!((now.double_value(&[]), of(&now)), (0.0, vec![0.0; 4]));
    says(StoredOutputs::new(plain(), &old, -0.1), "`alpha`");
    says(StoredOutputs::new(plain(), &old.narrow(0, 0, 3), 1.0), "[3, 2] outputs for 5 examples");
    says(StoredOutputs::new(plain(), &(&old * f64::NAN), 1.0), "not finite");
    let wide = StoredOutputs::new(plain(), &wave([5, 3], 0.1), 1.0).unwrap();
    says(wide.value(&model), "[5, 3]");
}

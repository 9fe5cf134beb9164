//! The example `systems`: each system has the properties that define it, and does what it is for.

use std::path::PathBuf;
use tch::{Kind, Tensor};
use tch_blr::{Adam, Sgd};
use tch_blr_examples::digits::{Digits, rotate90};
use tch_blr_examples::random::Rng;
use tch_blr_examples::systems::{Setting, low_shot, maml, matching, mean_and_error, progressive, superposition};

/// Drawn digits; no pictures.
fn setting(train: usize) -> Setting {
    Setting { data: Digits::synthetic(train, 600, 0), folder: PathBuf::new() }
}

fn uniform(shape: &[i64], rng: &mut Rng) -> Tensor {
    let values: Vec<f64> = (0..shape.iter().product()).map(|_| rng.between(-1.0, 1.0)).collect();
    Tensor::from_slice(&values).reshape(shape)
}

fn norm(t: &Tensor) -> f64 {
    t.square().sum(Kind::Double).sqrt().double_value(&[])
}

mod progressive_networks {
    use super::*;
    use progressive::{Progressive, SecondTask, TARGET, WIDTHS, formula, second_task, steps_to};

    #[test]
    fn new_columns_leave_old_ones_alone_and_start_as_if_alone() {
        let x = uniform(&[7, 6], &mut Rng::new(0, 0)).to_kind(Kind::Float);
        let y = Tensor::from_slice(&[0_i64, 1, 2, 0, 1, 2, 0]);
        let mut net = Progressive::new(&[6, 5, 4, 3]);
        net.add_column(0);
        let first = net.logits(0, &x);
        for task in 1..3 {
            net.add_column(task as i64);
            let mut alone = Progressive::new(&[6, 5, 4, 3]);
            alone.add_column(task as i64);
            assert!(net.logits(task, &x).equal(&alone.logits(0, &x)));
            let before: Vec<Tensor> = (0..task).map(|k| net.logits(k, &x)).collect();
            let start = net.logits(task, &x);
            // The whole network's loss; only the new column may move.
            let mut opt = Adam::default().build(net.variables(task), 0.05).unwrap();
            for _ in 0..3 {
                opt.step(|| net.logits(task, &x).cross_entropy_for_logits(&y)).unwrap();
            }
            assert!(!net.logits(task, &x).equal(&start));
            // The lateral weights are learned, from every column before and for every layer but the first.
            let lateral: Vec<Tensor> = net
                .variables(task)
                .variables()
                .into_iter()
                .filter(|(n, _)| n.starts_with("lateral"))
                .map(|p| p.1)
                .collect();
            assert_eq!(lateral.len(), 2 * task);
            assert!(lateral.iter().all(|u| norm(u) > 0.0));
            for (k, before) in before.iter().enumerate() {
                assert!(net.logits(k, &x).equal(before), "column {k} after task {task}");
            }
        }
        assert!(net.logits(0, &x).equal(&first));
    }

    /// Column k of 2-3-4-2: 3·3 + 4·4 + 2·5 = 35 weights of its own, and 4·3 + 2·4 = 20 from each column before.
    #[test]
    fn number_of_weights() {
        let mut net = Progressive::new(&[2, 3, 4, 2]);
        for (columns, weights) in [(1, 35), (2, 35 + 55), (3, 35 + 55 + 75), (4, 35 + 55 + 75 + 95)] {
            net.add_column(0);
            assert_eq!((net.weights(), formula(columns, &[2, 3, 4, 2])), (weights, weights));
        }
    }

    #[test]
    fn a_related_task_is_learned_in_fewer_steps() {
        const STEPS: usize = 220;
        let setting = setting(4000);
        let steps = |losses: &[f64]| steps_to(TARGET, losses).unwrap_or(STEPS) as f64;
        let mut total = [0.0; 3];
        for seed in 0..2 {
            let SecondTask { progressive, untrained, scratch, unchanged, weights } =
                second_task(&setting, 400, STEPS, seed).unwrap();
            assert!(unchanged);
            assert_eq!(weights, formula(2, &WIDTHS));
            let [p, u, s] = [&progressive, &untrained, &scratch].map(|losses| steps(losses));
            assert!(p < u && p < s, "seed {seed}: {p} steps; {u} beside an untrained column, {s} from scratch");
            total = [total[0] + p, total[1] + u, total[2] + s];
        }
        assert!(total[0] < 0.8 * total[1] && total[0] < 0.8 * total[2], "{total:?}");
    }
}

mod superposition_of_models {
    use super::*;
    use superposition::{key, noise, permuted_digits, retrieve, store};

    #[test]
    fn retrieval_is_exact_but_for_the_others() {
        let mut rng = Rng::new(0, 0);
        let keys: Vec<Tensor> = (0..3).map(|_| key(50, &mut rng).to_kind(Kind::Double)).collect();
        let weights: Vec<Tensor> = (0..3).map(|_| uniform(&[4, 50], &mut rng)).collect();
        for c in &keys {
            assert!((c * c).equal(&c.ones_like()));
            // Random: 50 signs are all equal with probability 2⁻⁴⁹.
            assert!(c.sum(Kind::Double).double_value(&[]).abs() < 50.0);
        }
        assert!(retrieve(&store(&weights[..1], &keys[..1]), &keys[0]).equal(&weights[0]));
        let back = retrieve(&store(&weights, &keys), &keys[1]);
        let others = &weights[0] * &keys[0] * &keys[1] + &weights[2] * &keys[2] * &keys[1];
        assert!(norm(&(back - &weights[1] - others)) < 1e-13);
    }

    /// Each statistic is within 4.5 standard errors: a right implementation fails in 1 of 10⁴ seeds.
    #[test]
    fn noise_has_mean_zero_and_the_variance_of_the_formula() {
        for k in [2, 3, 9, 33] {
            let (mean, variance) = noise(k, 4000, k as u64);
            assert!(mean.abs() < 4.5 && variance.abs() < 4.5, "{k}: {mean} {variance}");
        }
    }

    #[test]
    fn keys_keep_permuted_digits_apart() {
        let setting = setting(2000);
        let run = |keys| permuted_digits(&setting, 256, keys, (8, 2, 2000), 0).unwrap();
        let (with, without) = (run(true), run(false));
        let [a, b] = [&with, &without].map(|s| s.accuracies.average().unwrap());
        assert!(a > b + 0.15, "{a} with keys, {b} without");
        // Of 10 classes, each answered some of the time.
        assert!((with.wrong_keys - 0.1).abs() < 0.06, "{}", with.wrong_keys);
    }
}

mod model_agnostic_meta_learning {
    use super::*;
    use maml::{ALPHA, Net, Sinusoids, adapt, after_steps, train};

    fn outer_gradient(net: &Net, train: &(Tensor, Tensor), test: &(Tensor, Tensor)) -> Tensor {
        let weights = net.vs.trainable_variables();
        let gradient = Tensor::run_backward(&[net.outer_loss(train, test).unwrap()], &weights, false, false);
        Tensor::cat(&gradient.iter().map(|g| g.reshape([-1])).collect::<Vec<_>>(), 0)
    }

    /// For L = ½θᵀAθ - bᵀθ the outer gradient after n steps is (I - αA)ⁿ ∇L_test(θ′).
    #[test]
    fn on_a_quadratic_the_outer_gradient_is_known() {
        let mut rng = Rng::new(0, 0);
        let root = uniform(&[4, 4], &mut rng);
        let (a, b) = (root.matmul(&root.tr()), uniform(&[4], &mut rng));
        let (c, d) = (uniform(&[4, 4], &mut rng), uniform(&[4], &mut rng));
        let c = &c + c.tr();
        let theta = uniform(&[4], &mut rng).set_requires_grad(true);
        let loss = |w: &[Tensor], a: &Tensor, b: &Tensor| a.mv(&w[0]).dot(&w[0]) * 0.5 - b.dot(&w[0]);
        for steps in 0..4 {
            let adapted = adapt(&[theta.shallow_clone()], |w| loss(w, &a, &b), 0.3, steps).unwrap();
            let gradient = Tensor::run_backward(&[loss(&adapted, &c, &d)], &[&theta], false, false);
            let mut exact = c.mv(&adapted[0]) - &d;
            for _ in 0..steps {
                exact = &exact - a.mv(&exact) * 0.3;
            }
            assert!(norm(&(&gradient[0] - &exact)) < 1e-13 * norm(&exact).max(1.0), "{steps} steps");
        }
    }

    /// Central differences of step 10⁻⁵ have errors near 10⁻¹⁰; without the graph through the inner step, the gradient
    /// is off by more than a percent.
    #[test]
    fn outer_gradient_by_finite_differences() {
        let net = Net::new(Kind::Double, Tensor::tanh, 1);
        let mut rng = Rng::new(0, 1);
        let tasks = Sinusoids::draw(3, Kind::Double, &mut rng);
        let (train, test) = (tasks.examples(10, &mut rng), tasks.examples(10, &mut rng));
        let gradient = outer_gradient(&net, &train, &test);

        let value = || net.outer_loss(&train, &test).unwrap().double_value(&[]);
        let mut differences = Vec::new();
        for w in net.vs.trainable_variables() {
            let flat = w.detach().view([-1]);
            for i in 0..flat.size()[0] {
                let mut at = flat.get(i);
                let middle = at.double_value(&[]);
                let mut side = |h: f64| {
                    let _ = at.fill_(middle + h);
                    value()
                };
                differences.push((side(1e-5) - side(-1e-5)) / 2e-5);
                side(0.0);
            }
        }
        let differences = Tensor::from_slice(&differences);
        let error = |g: &Tensor| norm(&(g - &differences)) / norm(&differences);
        assert!(error(&gradient) < 1e-7, "{:e}", error(&gradient));

        let adapted: Vec<Tensor> =
            net.adapted(&train, 1).unwrap().iter().map(|w| w.detach().set_requires_grad(true)).collect();
        let loss = net.errors(&adapted, &test).mean(None);
        let first_order = Tensor::run_backward(&[loss], &adapted, false, false);
        let first_order: Vec<Tensor> =
            first_order.iter().map(|g| g.sum_dim_intlist([0].as_slice(), false, None).reshape([-1])).collect();
        assert!(error(&Tensor::cat(&first_order, 0)) > 1e-2);
    }

    #[test]
    fn an_optimizer_of_the_crate_takes_the_outer_gradient() {
        let net = Net::new(Kind::Double, Tensor::tanh, 1);
        let mut rng = Rng::new(0, 2);
        let tasks = Sinusoids::draw(3, Kind::Double, &mut rng);
        let (train, test) = (tasks.examples(10, &mut rng), tasks.examples(10, &mut rng));
        let flat = || {
            let weights = net.vs.trainable_variables();
            Tensor::cat(&weights.iter().map(|w| w.detach().reshape([-1])).collect::<Vec<_>>(), 0)
        };
        let expected = flat() - outer_gradient(&net, &train, &test) * 0.1;
        let mut opt = Sgd::default().build(&net.vs, 0.1).unwrap();
        opt.step(|| net.outer_loss(&train, &test)).unwrap();
        assert!(norm(&(flat() - expected)) < 1e-12);
    }

    #[test]
    fn sinusoids_are_learned_in_few_steps() {
        let trained = |inner: bool| {
            let net = Net::new(Kind::Float, Tensor::relu, 0);
            train(&net, &mut Adam::default().build(&net.vs, 3e-3).unwrap(), 1000, inner, 0).unwrap();
            after_steps(&net, 5, 1).unwrap()
        };
        let (maml, joint) = (trained(true), trained(false));
        for n in 1..=5 {
            assert!(maml[n] < 0.5 * joint[n], "{n} steps of {ALPHA}: {maml:?} against {joint:?}");
        }
    }
}

mod matching_examples {
    use super::*;
    use matching::{Siamese, class, euclidean, nearest, oriented, tell, vote};

    #[test]
    fn siamese_distance_is_symmetric_and_vanishes_for_identical_images() {
        let images = Digits::synthetic(20, 10, 3);
        let (a, b) = (&images.train_images, &images.test_images);
        for seed in 0..3 {
            let net = Siamese::new(seed);
            let d = net.distances(a, b);
            assert!(d.equal(&net.distances(b, a).tr()));
            assert_eq!(d.size(), [20, 10]);
            assert!(d.min().double_value(&[]) > 0.0);
            let own = net.distances(a, a).diagonal(0, 0, 1);
            assert!(own.equal(&own.zeros_like()));
        }
    }

    /// All eight of a generic image differ; of one that neither a mirror nor half a turn changes, like 0 and 1, those
    /// of equal class are the same.
    #[test]
    fn the_orientations_are_those_of_a_square() {
        let x = uniform(&[1, 784], &mut Rng::new(0, 5));
        let twice = |x: &Tensor, k| oriented(&oriented(x, k), k);
        assert!(oriented(&x, 0).equal(&x) && twice(&x, 2).equal(&x) && (4..8).all(|k| twice(&x, k).equal(&x)));
        let flipped = x.view([1, 28, 28]).flip([1]).view([1, 784]);
        let symmetric = &x + oriented(&x, 4) + &flipped + oriented(&flipped, 4);
        for (a, b) in (0..8).flat_map(|a| (0..8).map(move |b| (a, b))) {
            let near = norm(&(oriented(&symmetric, a) - oriented(&symmetric, b))) < 1e-12;
            assert_eq!((near, oriented(&x, a).equal(&oriented(&x, b))), (class(1, a) == class(1, b), a == b));
            assert_eq!((class(2, a) == class(2, b), class(2, a) == class(3, b)), (a == b, false));
        }
    }

    #[test]
    fn nearest_neighbours_are_those_of_brute_force() {
        let mut rng = Rng::new(0, 0);
        let (queries, stored) = (uniform(&[30, 5], &mut rng), uniform(&[40, 5], &mut rng));
        let labels = Tensor::from_slice(&(0..40).map(|i| i % 3).collect::<Vec<i64>>());
        let distances = euclidean(&queries, &stored);
        let (found, votes) = (nearest(&distances, 5), vote(&distances, &labels, 5));
        for q in 0..30 {
            let apart = |i: i64| {
                (0..5).map(|j| (queries.double_value(&[q, j]) - stored.double_value(&[i, j])).powi(2)).sum::<f64>()
            };
            let mut order: Vec<i64> = (0..40).collect();
            order.sort_by(|&i, &j| apart(i).total_cmp(&apart(j)));
            assert_eq!(Vec::<i64>::try_from(found.get(q)).unwrap(), order[..5]);
            let mut counts = [0; 3];
            order[..5].iter().for_each(|i| counts[(i % 3) as usize] += 1);
            let winner = (0..3).rev().max_by_key(|&c: &usize| counts[c]).unwrap();
            assert_eq!(votes.int64_value(&[q]), winner as i64);
        }
    }

    #[test]
    fn stored_examples_are_their_own_nearest_neighbours() {
        let data = setting(500).data;
        let distances = euclidean(&data.train_images, &data.train_images);
        assert!(vote(&distances, &data.train_labels, 1).equal(&data.train_labels));
    }

    #[test]
    fn siamese_network_tells_unseen_digits_apart_better_than_pixels() {
        // A third of the steps that it gains from, and trials enough that three standard errors are less than the gain.
        let setting = setting(4_000);
        let net = Siamese::new(0);
        net.train(&setting, 700, 0).unwrap();
        let siamese = tell(&setting, |a, b| net.distances(a, b), 100).unwrap();
        let pixels = tell(&setting, euclidean, 100).unwrap();
        assert!(siamese.auc > pixels.auc + 0.03, "{} {}", siamese.auc, pixels.auc);
        let gains: Vec<f64> = siamese.one_shot.iter().zip(&pixels.one_shot).map(|(s, p)| s - p).collect();
        let (gain, error) = mean_and_error(&gains);
        assert!(gain > 3.0 * error, "{gain} ± {error}");
    }
}

mod low_shot_fine_tuning {
    use super::*;
    use low_shot::{DEGREES, FEATURES, Known, isotropic, learn, turned};
    use tch_blr::FullGaussian;

    /// Interpolation is exact where pixels fall on pixels, up to the rounding of places in f32.
    #[test]
    fn a_quarter_turn_is_exact_and_others_are_undone() {
        let images = Digits::synthetic(20, 10, 3).train_images;
        let apart = |a: &Tensor, b: &Tensor| norm(&(a - b)) / norm(b);
        assert!(apart(&turned(&images, 90.0), &rotate90(&images)) < 1e-4);
        assert!(apart(&turned(&images, 0.0), &images) < 1e-4);
        // Twice blurred.
        assert!(apart(&turned(&turned(&images, DEGREES), -DEGREES), &images) < 0.4);
        assert!(apart(&turned(&images, DEGREES), &images) > 0.7);
    }

    /// At the mode Σ (pᵢ - yᵢ)zᵢᵀ + S₀(θ - m₀) = 0, up to the square root of Newton's last decrement; and
    /// S = Σ Λᵢ ⊗ zᵢzᵢᵀ + S₀.
    #[test]
    fn the_posterior_of_the_head_is_laplaces() {
        let mut rng = Rng::new(0, 0);
        let n = 40;
        let z = uniform(&[n, FEATURES], &mut rng) * 3.0;
        let y = Tensor::from_slice(&(0..n).map(|i| (i * i) % 10).collect::<Vec<_>>());
        let root = uniform(&[10 * FEATURES; 2], &mut rng);
        let s0 = root.matmul(&root.tr()) * 0.01 + Tensor::eye(10 * FEATURES, (Kind::Double, tch::Device::Cpu)) * 0.1;
        let m0 = uniform(&[10, FEATURES], &mut rng);
        for prior in [FullGaussian::new([("θ", m0.shallow_clone())], &s0).unwrap(), isotropic(&m0, 1e-3).unwrap()] {
            let q = learn(&(z.shallow_clone(), y.shallow_clone()), &prior).unwrap();
            let theta = q.mean_vector();
            let p = z.matmul(&theta.view([10, FEATURES]).tr()).softmax(1, Kind::Double);
            let errors = &p - y.one_hot(10).to_kind(Kind::Double);
            let pull = prior.precision_matrix().mv(&(&theta - prior.mean_vector()));
            let gradient = errors.tr().matmul(&z).view([-1]) + pull;
            // gᵀS⁻¹g is the decrement.
            let left = gradient.dot(&q.covariance_matrix().unwrap().mv(&gradient)).double_value(&[]);
            assert!(left < 1e-6, "{left:e}");
            let mut hessian = prior.precision_matrix().copy();
            for i in 0..n {
                let (p, z) = (p.get(i), z.get(i));
                hessian += (p.diag(0) - p.outer(&p)).kron(&z.outer(&z));
            }
            assert!(norm(&(q.precision_matrix() - &hessian)) < 1e-12 * norm(&hessian));
        }
    }

    /// With fixed γ and δ against the δ that is best on the very draws that count.
    #[test]
    fn the_posterior_is_a_better_prior_than_an_isotropic_one() {
        let known = Known::learn(&setting(8000), 800, 0).unwrap();
        let posterior = known.power(0.3, 10.0).unwrap();
        let zero = posterior.mean_vector().zeros_like();
        for shots in [1, 5] {
            let with = known.few(shots, &posterior, 0..16).unwrap();
            for delta in [1.0, 10.0, 30.0] {
                let without = known.few(shots, &isotropic(&zero, delta).unwrap(), 0..16).unwrap();
                let gains: Vec<f64> = with.iter().zip(&without).map(|(p, q)| p - q).collect();
                let (gain, error) = mean_and_error(&gains);
                assert!(gain > 3.0 * error, "{shots} examples, δ = {delta}: {gain} ± {error}");
            }
        }
    }
}

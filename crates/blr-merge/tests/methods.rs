//! Numbers of the methods that look at whole tensors or drop elements: from their definitions, by hand or by another
//! route in f64.

mod support;

use blr_merge::engine::{Input, Inputs, Number, Output, Plan, merge};
use blr_merge::{Destination, Error, FileModel, Keep, Method, Rescale, Result, TaskVectors, merge_files};
use safetensors::Dtype;
use support::{Model, Stored, load, model, random, save};

/// The base, and models.
struct Slices(Vec<f64>, Vec<Vec<f64>>);

impl<T: Number> Inputs<T> for Slices {
    fn read(&mut self, input: Input, at: usize, x: &mut [T]) -> Result<()> {
        let from = match input {
            Input::Base => &self.0,
            Input::Model(k) => &self.1[k],
            _ => unreachable!("these methods need no curvature"),
        };
        x.iter_mut().zip(&from[at..]).for_each(|(x, y)| *x = T::from(*y).unwrap());
        Ok(())
    }
}

struct Collect(Vec<f64>);

impl<T: Number> Output<T> for Collect {
    fn values(&mut self, _: usize, x: &[T]) -> Result<()> {
        self.0.extend(x.iter().map(|x| x.to_f64().unwrap()));
        Ok(())
    }
}

fn run<T: Number>(method: Method, weights: &[f64], base: &[f64], models: &[Vec<f64>]) -> Result<Vec<f64>> {
    let names: Vec<String> = (0..models.len()).map(|k| format!("m{k}")).collect();
    let models_ = names.iter().zip(weights).map(|(name, w)| (name.as_str(), *w)).collect();
    let plan = Plan { method, models: models_, posteriors: false };
    plan.method.validate(&plan.models)?;
    let mut out = Collect(Vec::new());
    merge::<T, Error>(&plan, "w", base.len(), &mut Slices(base.to_vec(), models.to_vec()), &mut out)?;
    Ok(out.0)
}

fn close(found: &[f64], expected: &[f64], tolerance: f64) {
    let far = found.iter().zip(expected).map(|(x, y)| (x - y).abs()).fold(0.0, f64::max);
    assert!(found.len() == expected.len() && far <= tolerance, "{found:?} instead of {expected:?}");
}

/// Without weights, in f64, from a base of zeros.
fn golden(method: Method, models: &[Vec<f64>], expected: &[f64]) {
    let found = run::<f64>(method, &vec![1.0; models.len()], &vec![0.0; expected.len()], models).unwrap();
    close(&found, expected, 1e-14);
}

#[test]
fn breadcrumbs_drop_both_tails() {
    let d: Vec<f64> = (1..=10).map(|i| if i % 2 == 0 { f64::from(-i) } else { f64::from(i) }).collect();
    // Without 1, 2, 3 and 9, 10; halved.
    let half = [0.0, 0.0, 0.0, -2.0, 2.5, -3.0, 3.5, -4.0, 0.0, 0.0];
    golden(Method::breadcrumbs(0.5, 0.3, 0.2), std::slice::from_ref(&d), &half);
    golden(Method::breadcrumbs(0.5, 0.3, 0.2), &[d.clone(), d.clone()], &half.map(|x| 2.0 * x));
    // Of equal ones the first are the larger; less than a whole element is none.
    golden(Method::breadcrumbs(1.0, 0.25, 0.25), &[vec![1.0; 4]], &[0.0, 1.0, 1.0, 0.0]);
    golden(Method::breadcrumbs(1.0, 0.24, 0.5), &[vec![3.0, 1.0, 2.0, 4.0]], &[0.0, 1.0, 2.0, 0.0]);
    golden(Method::breadcrumbs(1.0, 0.9, 0.09), &[vec![5.0]], &[5.0]);
    // No tail: task arithmetic; one tail: the largest, as of TIES.
    golden(Method::breadcrumbs(1.0, 0.0, 0.0), std::slice::from_ref(&d), &d);
    let keep = Keep::Largest { density: 0.7 };
    let largest = Method::TaskVectors(TaskVectors { lambda: 1.0, keep, elect_signs: false, normalize: false });
    let x: Vec<f64> = random(3, 1000).into_iter().map(f64::from).collect();
    let trimmed = run::<f64>(largest, &[1.0], &[0.0; 1000], std::slice::from_ref(&x)).unwrap();
    golden(Method::breadcrumbs(1.0, 0.3, 0.0), &[x], &trimmed);
}

#[test]
fn model_stock_goes_as_far_as_the_angle_says() {
    // cos = 24/25, t = 48/49 of the mean 7/2.
    golden(Method::ModelStock, &[vec![3.0, 4.0], vec![4.0, 3.0]], &[24.0 / 7.0; 2]);
    // The lengths do not matter for t: cos = 1/√2, t = 2(√2 - 1).
    let t = 2.0 * (2f64.sqrt() - 1.0);
    golden(Method::ModelStock, &[vec![10.0, 0.0], vec![0.5, 0.5]], &[t * 5.25, t * 0.25]);
    // The mean c of 1/√2, 1/√3 and √(2/3) is 0.7003178771012998.
    let three = [vec![1.0, 0.0, 0.0], vec![1.0, 1.0, 0.0], vec![1.0, 1.0, 1.0]];
    let t = 0.875_165_517_145_168_5; // 3c/(1+2c)
    let found = run::<f64>(Method::ModelStock, &[1.0; 3], &[0.0; 3], &three).unwrap();
    close(&found, &[t, t * 2.0 / 3.0, t / 3.0], 1e-12);
    // Orthogonal, opposite, or beside nothing: the base. Alone: the model.
    for other in [vec![0.0, 7.0], vec![-1.0, 0.0], vec![0.0, 0.0]] {
        golden(Method::ModelStock, &[vec![2.0, 0.0], other], &[0.0, 0.0]);
    }
    golden(Method::ModelStock, &[vec![2.0, 3.0]], &[2.0, 3.0]);
}

/// In the plane the mean of directions is the direction of the mean angle.
#[test]
fn karcher_is_the_mean_angle_in_the_plane() {
    let at = |degrees: f64, norm: f64| vec![norm * degrees.to_radians().cos(), norm * degrees.to_radians().sin()];
    let models = [at(10.0, 1.0), at(50.0, 2.0), at(100.0, 0.5)];
    let found = run::<f64>(Method::Karcher, &[1.0, 2.0, 3.0], &[0.0; 2], &models).unwrap();
    // (10 + 2·50 + 3·100)/6 degrees, (1 + 4 + 1.5)/6 long.
    close(&found, &at(410.0 / 6.0, 6.5 / 6.0), 1e-12);
    // Of two of one length: slerp.
    let two = [vec![3.0, 4.0, 0.0], vec![0.0, 3.0, 4.0]];
    for t in [0.0, 0.3, 0.5, 1.0] {
        let slerp = run::<f64>(Method::Slerp { t }, &[1.0; 2], &[0.0; 3], &two).unwrap();
        close(&run::<f64>(Method::Karcher, &[1.0 - t, t], &[0.0; 3], &two).unwrap(), &slerp, 1e-12);
    }
    // Of axes: the diagonal.
    let axes = [vec![1.0, 0.0, 0.0], vec![0.0, 2.0, 0.0], vec![0.0, 0.0, 3.0]];
    golden(Method::Karcher, &axes, &[2.0 / 3f64.sqrt(); 3]);
    // What is zero has no direction, but a length.
    golden(Method::Karcher, &[vec![0.0, 0.0], vec![0.0, 2.0]], &[0.0, 1.0]);
    golden(Method::Karcher, &[vec![0.0; 2], vec![0.0; 2]], &[0.0; 2]);
    for models in [[vec![1.0, 0.0], vec![-2.0, 0.0]], [vec![1.0, 1e-9], vec![-1.0, 1e-9]]] {
        let e = run::<f64>(Method::Karcher, &[1.0; 2], &[0.0; 2], &models).unwrap_err().to_string();
        assert!(e.contains("`w`") && e.contains("no mean on the sphere") && e.contains("exclude"), "{e}");
    }
    // Three at 120°: every point of the plane is as good.
    let e = run::<f64>(Method::Karcher, &[1.0; 3], &[0.0; 2], &[at(0.0, 1.0), at(120.0, 1.0), at(240.0, 1.0)]);
    assert!(e.is_err());
}

/// What is minimal has no slope: Σ w log_u(u_k) = 0, with angles from sums and differences of unit vectors.
#[test]
fn karcher_means_have_no_slope() {
    let n = 50;
    let models: Vec<Vec<f64>> = (0..4).map(|k| random(k, n).into_iter().map(f64::from).collect()).collect();
    let weights = [1.0, 0.2, 3.0, 0.7];
    let norm = |x: &[f64]| x.iter().map(|x| x * x).sum::<f64>().sqrt();
    let unit = |x: &[f64]| x.iter().map(|y| y / norm(x)).collect::<Vec<f64>>();
    let mean = run::<f64>(Method::Karcher, &weights, &vec![0.0; n], &models).unwrap();
    let length = weights.iter().zip(&models).map(|(w, x)| w * norm(x)).sum::<f64>() / 4.9;
    assert!((norm(&mean) - length).abs() < 1e-12);
    let u = unit(&mean);
    let mut slope = vec![0.0; n];
    for (w, x) in weights.iter().zip(&models) {
        let v = unit(x);
        let [sum, difference] =
            [1.0, -1.0].map(|sign| norm(&u.iter().zip(&v).map(|(u, v)| u + sign * v).collect::<Vec<f64>>()));
        let angle = 2.0 * difference.atan2(sum);
        let along: Vec<f64> = u.iter().zip(&v).map(|(u, v)| v - angle.cos() * u).collect();
        let length = norm(&along);
        slope.iter_mut().zip(along).for_each(|(slope, along)| *slope += w * angle * along / length);
    }
    assert!(norm(&slope) < 1e-11, "{}", norm(&slope));
}

#[test]
fn sce_selects_calculates_and_erases() {
    // Variances 0, 9, 1, 0. The squares of what is selected: 16 + 1 and 4 + 9.
    let models = [vec![1.0, 4.0, 1.0, 2.0], vec![1.0, -2.0, 3.0, 2.0]];
    golden(Method::Sce { density: 0.5 }, &models, &[0.0, 4.0, (17.0 + 3.0 * 13.0) / 30.0, 0.0]);
    // All: 22 and 18 of 40.
    golden(Method::Sce { density: 1.0 }, &models, &[1.0, 4.0, (22.0 + 3.0 * 18.0) / 40.0, 2.0]);
    // A sum of zero is positive. Of equal variances the first is selected, and at least one.
    golden(Method::Sce { density: 1.0 }, &[vec![1.0, 0.0], vec![-1.0, 0.0]], &[1.0, 0.0]);
    golden(Method::Sce { density: 0.1 }, &[vec![1.0, 1.0], vec![3.0, 3.0]], &[0.1 + 0.9 * 3.0, 0.0]);
    // Variances that f32 has no place for are told apart all the same.
    let tiny = [vec![0.0; 3], vec![1e-24, 3e-24, 2e-24]];
    let found = run::<f32>(Method::Sce { density: 0.34 }, &[1.0; 2], &[0.0; 3], &tiny).unwrap();
    assert!(found[0] == 0.0 && found[1] > 0.0 && found[2] == 0.0, "{found:?}");
}

/// Element by element and seed by seed: 0 or d/p with p by the rank, and kept as often as p says.
#[test]
fn della_keeps_by_rank() {
    let d = [0.5, -8.0, 1.0, 4.0, -0.25, 16.0, 2.0, -32.0];
    let (density, epsilon) = (0.5, 0.4);
    let mut order: Vec<f64> = d.iter().map(|d: &f64| d.abs()).collect();
    order.sort_by(f64::total_cmp);
    let p = d.map(|d| {
        let rank = order.iter().position(|other| *other == d.abs()).unwrap() as f64 + 1.0;
        density - epsilon / 2.0 + epsilon * (rank - 0.5) / 8.0
    });
    assert!((p.iter().sum::<f64>() / 8.0 - density).abs() < 1e-15);
    let seeds = 4000;
    let mut kept = [0.0; 8];
    for seed in 0..seeds {
        let found = run::<f64>(Method::della(1.0, density, epsilon, seed), &[1.0], &[0.0; 8], &[d.to_vec()]).unwrap();
        for i in 0..8 {
            assert!(found[i] == 0.0 || (found[i] - d[i] / p[i]).abs() < 1e-12, "{found:?}");
            kept[i] += f64::from(u8::from(found[i] != 0.0));
        }
    }
    for (kept, p) in kept.iter().zip(p) {
        // Five standard deviations.
        let spread = (p * (1.0 - p) / seeds as f64).sqrt();
        assert!((kept / seeds as f64 - p).abs() < 5.0 * spread, "{kept} of {seeds}: {p}");
    }
    // Equal ones share their rank, and without epsilon there are no ranks: DARE.
    let dare = |x: &Vec<f64>| {
        run::<f64>(
            Method::dare_ties(1.0, 0.5, Rescale::Density, 7),
            &[1.0],
            &vec![0.0; x.len()],
            std::slice::from_ref(x),
        )
        .unwrap()
    };
    let della = |x: &Vec<f64>, epsilon| {
        run::<f64>(Method::della(1.0, 0.5, epsilon, 7), &[1.0], &vec![0.0; x.len()], std::slice::from_ref(x)).unwrap()
    };
    let x: Vec<f64> = random(1, 1000).into_iter().map(f64::from).collect();
    assert_eq!(della(&x, 0.0), dare(&x));
    assert_eq!(della(&vec![3.0; 100], 0.4), dare(&vec![3.0; 100]));
    assert_ne!(della(&x, 0.4), dare(&x));
    // Signs are elected, and those that agree averaged: with everything kept it is TIES.
    let models = [vec![1.0, -2.0, 3.0], vec![3.0, 1.0, 1.0]];
    golden(Method::della(2.0, 1.0, 0.0, 0), &models, &[4.0, -4.0, 4.0]);
}

#[test]
fn settings_out_of_range_are_named() {
    for (method, says) in [
        (Method::breadcrumbs(1.0, 1.0, 0.0), "`beta` = 1.0"),
        (Method::breadcrumbs(1.0, -0.1, 0.0), "`beta` = -0.1"),
        (Method::breadcrumbs(1.0, 0.5, 0.5), "`gamma` = 0.5"),
        (Method::breadcrumbs(1.0, 0.5, f64::NAN), "`gamma` = NaN"),
        (Method::breadcrumbs(f64::INFINITY, 0.5, 0.1), "`lambda` = inf"),
        (Method::della(1.0, 0.9, 0.21, 0), "`epsilon` = 0.21"),
        (Method::della(1.0, 0.1, 0.2, 0), "`epsilon` = 0.2"),
        (Method::della(1.0, 0.5, -0.1, 0), "`epsilon` = -0.1"),
        (Method::della(1.0, 0.0, 0.0, 0), "`density` = 0.0"),
        (Method::Sce { density: 1.5 }, "`density` = 1.5"),
        (Method::Sce { density: f64::NAN }, "`density` = NaN"),
    ] {
        let e = method.validate(&[("a", 1.0)]).unwrap_err().to_string();
        assert!(e.contains(says), "{e}");
    }
    for (weights, says) in [([1.0, -1.0], "weights ≥ 0"), ([0.0, 0.0], "all weights are zero")] {
        let models = [("a", weights[0]), ("b", weights[1])];
        let e = Method::Karcher.validate(&models).unwrap_err().to_string();
        assert!(e.contains(says), "{e}");
    }
}

/// Every method, with settings under which it should give back a model that all agree on.
fn neutral() -> Vec<Method> {
    let mean = |keep| Method::TaskVectors(TaskVectors { lambda: 1.0, keep, elect_signs: false, normalize: true });
    vec![
        Method::linear(),
        Method::Slerp { t: 0.3 },
        Method::Karcher,
        mean(Keep::All),
        mean(Keep::Middle { smallest: 0.0, largest: 0.0 }),
        Method::ties(1.0, 1.0),
        Method::dare_ties(1.0, 1.0, Rescale::L1Norm, 1),
        Method::della(1.0, 1.0, 0.0, 1),
        Method::ModelStock,
        Method::Sce { density: 1.0 },
    ]
}

fn narrow(dtype: Dtype, x: &[f32]) -> Stored {
    let bytes = |x: &f32| match dtype {
        Dtype::BF16 => half::bf16::from_f32(*x).to_le_bytes().to_vec(),
        Dtype::F16 => half::f16::from_f32(*x).to_le_bytes().to_vec(),
        Dtype::F64 => f64::from(*x).to_le_bytes().to_vec(),
        _ => x.to_le_bytes().to_vec(),
    };
    Stored { dtype, shape: vec![x.len()], bytes: x.iter().flat_map(bytes).collect() }
}

#[test]
fn a_model_that_all_agree_on_comes_back() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let numbers = |t: &Stored| -> Vec<f64> {
        let width = t.bytes.len() / t.shape[0];
        let number = |b: &[u8]| match t.dtype {
            Dtype::BF16 => half::bf16::from_le_bytes([b[0], b[1]]).to_f64(),
            Dtype::F16 => half::f16::from_le_bytes([b[0], b[1]]).to_f64(),
            Dtype::F64 => f64::from_le_bytes(b.try_into().unwrap()),
            _ => f64::from(f32::from_le_bytes(b.try_into().unwrap())),
        };
        t.bytes.chunks(width).map(number).collect()
    };
    for (case, dtype) in [Dtype::BF16, Dtype::F16, Dtype::F32, Dtype::F64].into_iter().enumerate() {
        let of = |seed: u64| -> Model {
            model([("one", narrow(dtype, &random(seed, 1))), ("w", narrow(dtype, &random(seed + 100, 333)))])
        };
        save(&at("base"), &of(case as u64));
        let tuned = of(case as u64 + 10);
        for name in ["a", "b", "c"] {
            save(&at(name), &tuned);
        }
        for method in neutral() {
            for count in [1, 2, 3] {
                if matches!(method, Method::Slerp { .. }) && count != 2 {
                    continue;
                }
                let models: Vec<FileModel> =
                    ["a", "b", "c"][..count].iter().map(|name| FileModel::new(at(name))).collect();
                let base = FileModel::new(at("base"));
                merge_files(method, Some(&base), &models, at("out"), &mut |_, _| ()).unwrap();
                let out = load(&at("out"));
                for (name, t) in &tuned {
                    assert_eq!(out[name].dtype, dtype);
                    // The sum θ₀ + d is rounded to f32, whatever the file's kind.
                    let tolerance = if dtype == Dtype::F64 { 1e-15 } else { 3e-7 };
                    let far =
                        numbers(t).iter().zip(numbers(&out[name])).map(|(x, y)| (x - y).abs()).fold(0.0, f64::max);
                    assert!(far <= tolerance, "{method} of {count} {dtype:?} `{name}`: {far:e}");
                }
            }
        }
        // Computed in f32, and written in another kind.
        let out = Destination::from(at("wide")).dtype(Dtype::F64);
        let models = [FileModel::new(at("a")), FileModel::new(at("b"))];
        merge_files(Method::ModelStock, Some(&FileModel::new(at("base"))), &models, out, &mut |_, _| ()).unwrap();
        assert_eq!(load(&at("wide"))["w"].dtype, Dtype::F64);
    }
}

#[test]
fn numbers_that_are_none_are_refused_by_every_method() {
    for method in neutral().into_iter().chain([Method::breadcrumbs(1.0, 0.3, 0.1), Method::Sce { density: 0.3 }]) {
        for bad in [f64::NAN, f64::INFINITY] {
            let good = vec![1.0, 2.0, 3.0];
            let e =
                run::<f32>(method, &[1.0; 2], &[0.0; 3], &[good.clone(), vec![1.0, bad, 3.0]]).unwrap_err().to_string();
            assert!(e.contains("`w`: model `m1` has") && e.contains("element 1: expected finite"), "{method}: {e}");
            if method.needs_base() {
                let e = run::<f32>(method, &[1.0; 2], &[0.0, 0.0, bad], &[good.clone(), good]).unwrap_err().to_string();
                assert!(e.contains("the base has"), "{method}: {e}");
            }
        }
        assert!(run::<f32>(method, &[], &[0.0], &[]).unwrap_err().to_string().contains("there is no model"));
        if !matches!(method, Method::Slerp { .. }) {
            assert_eq!(run::<f32>(method, &[1.0], &[], &[vec![]]).unwrap(), vec![0.0; 0]);
        }
    }
}

/// More than one chunk, any number of threads, and numbers that are those of sorting everything.
#[test]
fn large_tensors_are_those_of_one_piece() {
    let n = (1 << 20) + 1234;
    let [base, a, b] = [1, 2, 3].map(|seed| random(seed, n).into_iter().map(f64::from).collect::<Vec<f64>>());
    let models = [a, b];
    let pool = |threads: usize| rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
    let on = |threads: usize, method| pool(threads).install(|| run::<f32>(method, &[1.0; 2], &base, &models).unwrap());
    // In f32, as it is computed.
    let d: Vec<Vec<f32>> =
        models.iter().map(|x| x.iter().zip(&base).map(|(x, b)| *x as f32 - *b as f32).collect()).collect();
    let order = |key: &dyn Fn(usize) -> f32| {
        let mut order: Vec<usize> = (0..n).collect();
        // Stable: of equal ones, the first.
        order.sort_by(|i, j| key(*j).total_cmp(&key(*i)));
        order
    };
    let breadcrumbs = on(3, Method::breadcrumbs(1.0, 0.5, 0.01));
    let mut expected: Vec<f32> = vec![0.0; n];
    for d in &d {
        let order = order(&|i| d[i].abs());
        order[n / 100..n - n / 2].iter().for_each(|i| expected[*i] += d[*i]);
    }
    let far = |found: &[f64], sum: &[f32]| {
        found.iter().zip(sum.iter().zip(&base)).map(|(x, (d, b))| (x - b - f64::from(*d)).abs()).fold(0.0, f64::max)
    };
    assert!(far(&breadcrumbs, &expected) < 1e-6);
    assert_eq!(breadcrumbs, on(1, Method::breadcrumbs(1.0, 0.5, 0.01)));

    let sce = on(3, Method::Sce { density: 0.1 });
    let order = order(&|i| ((models[0][i] - models[1][i]) / 2.0).abs() as f32);
    let selected = &order[..n / 10];
    let square = |k: usize| selected.iter().map(|i| f64::from(d[k][*i]).powi(2)).sum::<f64>();
    let eta = [0, 1].map(|k| square(k) / (square(0) + square(1)));
    let mut expected = vec![0.0; n];
    for i in selected {
        let d = [d[0][*i], d[1][*i]];
        let positive = d[0] + d[1] >= 0.0;
        let agreeing = || (0..2).filter(|k| d[*k] != 0.0 && (d[*k] > 0.0) == positive);
        let sum = |of: &dyn Fn(usize) -> f64| agreeing().map(of).sum::<f64>();
        expected[*i] = (sum(&|k| eta[k] * f64::from(d[k])) / sum(&|k| eta[k])) as f32;
    }
    assert!(far(&sce, &expected) < 1e-6);
    for method in [Method::Sce { density: 0.1 }, Method::Karcher, Method::ModelStock, Method::della(1.0, 0.5, 0.2, 3)] {
        assert_eq!(on(1, method), on(3, method), "{method}");
    }
}

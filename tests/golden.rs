//! Every number of trajectories that public implementations took, replayed with their own noise.
//!
//! `tests/data/trajectories.json` says where they come from; `tests/golden_regenerate.py` makes the part of PyTorch and
//! ivon-opt anew.

use serde_json::Value;
use support::{places, values};
use tch::nn::VarStore;
use tch::{Device, Kind, Reduction, Tensor};
use tch_blr::rows::{Momentum, PrecisionInStep};
use tch_blr::rule::Rule;
use tch_blr::{
    Adam, AdamW, BayesianSam, Builder, Expectation, Given, Ivon, Optimizer, RmsProp, Sam, Sgd, Statistic, Von,
};

/// Everything here is f64; what differs is the order of operations.
const TOLERANCE: f64 = 1e-10;

struct Problem {
    vs: VarStore,
    parameters: Vec<(String, Tensor)>,
    inputs: Tensor,
    targets: Tensor,
}

fn floats(v: &Value) -> Vec<f64> {
    v.as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect()
}

fn data() -> Value {
    serde_json::from_str(include_str!("data/trajectories.json")).unwrap()
}

/// The two-layer tanh network of the file.
fn problem(file: &Value, device: Device) -> Problem {
    let p = &file["problem"];
    let inputs: Vec<f64> = p["inputs"].as_array().unwrap().iter().flat_map(floats).collect();
    let targets: Vec<i64> = p["targets"].as_array().unwrap().iter().map(|x| x.as_i64().unwrap()).collect();
    let n = targets.len() as i64;
    let mut vs = VarStore::new(device);
    let mut parameters = Vec::new();
    for parameter in p["parameters"].as_array().unwrap() {
        let name = parameter["name"].as_str().unwrap();
        let (layer, what) = name.split_once('.').unwrap();
        let shape: Vec<i64> = parameter["shape"].as_array().unwrap().iter().map(|x| x.as_i64().unwrap()).collect();
        parameters.push((name.to_owned(), vs.root().sub(layer).zeros(what, &shape)));
    }
    vs.double();
    for ((_, w), values) in parameters.iter().zip(split(&floats(&p["initial"]), &parameters)) {
        tch::no_grad(|| w.shallow_clone().copy_(&values));
    }
    Problem {
        vs,
        parameters,
        inputs: Tensor::from_slice(&inputs).reshape([n, -1]).to_device(device),
        targets: Tensor::from_slice(&targets).to_device(device),
    }
}

/// A flat vector cut into the parameters' shapes.
fn split(flat: &[f64], parameters: &[(String, Tensor)]) -> Vec<Tensor> {
    let mut at = 0;
    let cut = |(_, w): &(String, Tensor)| {
        let n = w.numel();
        at += n;
        Tensor::from_slice(&flat[at - n..at]).reshape(w.size())
    };
    let pieces = parameters.iter().map(cut).collect();
    assert_eq!(at, flat.len());
    pieces
}

fn flat(tensors: impl Iterator<Item = Tensor>) -> Vec<f64> {
    tensors.flat_map(|t| values(&t.to_device(Device::Cpu))).collect()
}

impl Problem {
    /// Loss of one of `chunks` equal parts, in order, of the data.
    fn loss(&self, chunk: usize, chunks: usize, reduction: Reduction) -> Tensor {
        let n = self.targets.size()[0] / chunks as i64;
        let part = |t: &Tensor| t.narrow(0, chunk as i64 * n, n);
        let w = |i: usize| &self.parameters[i].1;
        let hidden = (part(&self.inputs).matmul(&w(0).tr()) + w(1)).tanh();
        let logits = hidden.matmul(&w(2).tr()) + w(3);
        logits.cross_entropy_loss::<Tensor>(&part(&self.targets), None, reduction, -100, 0.0)
    }

    fn state<R: Rule>(&self, opt: &Optimizer<R>, name: &str) -> Vec<f64> {
        flat(self.parameters.iter().map(|(p, _)| opt.state(p, name).unwrap()))
    }
}

fn compare(run: &str, step: usize, what: &str, ours: &[f64], expected: &Value) {
    let expected = if expected.is_array() { floats(expected) } else { vec![expected.as_f64().unwrap()] };
    assert_eq!(ours.len(), expected.len(), "{run}: {what}");
    for (i, (a, b)) in ours.iter().zip(&expected).enumerate() {
        assert!((a - b).abs() <= TOLERANCE, "{run}, step {step}, {what}[{i}]: {a} and not {b}");
    }
}

/// Takes the run's steps, on a GPU too where there is one; `also` lists further numbers of a step, by their name in the file.
fn replay<R: Rule>(
    file: &Value,
    name: &str,
    make: impl Fn(&Value) -> (Builder<R>, f64),
    reduction: Reduction,
    also: impl Fn(&Value, &Problem, &Optimizer<R>) -> Vec<(&'static str, Vec<f64>)>,
) {
    let run = file["runs"].as_array().unwrap().iter().find(|r| r["name"] == name).unwrap();
    for (_, device) in places().into_iter().filter(|(kind, _)| *kind == Kind::Double) {
        let problem = problem(file, device);
        let (mut builder, lr) = make(&run["hyper"]);
        if let Some(noise) = run["noise"].as_array() {
            let sample = |z: &Value| split(&floats(z), &problem.parameters);
            let step = |s: &Value| s.as_array().unwrap().iter().map(sample).collect();
            builder = builder.noise(Given(noise.iter().map(step).collect()));
        }
        let mut opt = builder.build(&problem.vs, lr).unwrap();
        let chunks = run["hyper"].get("m_sharpness").map_or(1, |m| m.as_u64().unwrap() as usize);
        let trajectory = run["trajectory"].as_array().unwrap();
        assert_eq!(trajectory.len(), 20);
        for (t, expected) in trajectory.iter().enumerate() {
            let loss = opt.step_chunks(chunks, |k| problem.loss(k, chunks, reduction)).unwrap();
            compare(name, t, "loss", &[loss], &expected["loss"]);
            let means = flat(problem.parameters.iter().map(|(_, w)| w.shallow_clone()));
            compare(name, t, "mean", &means, &expected["mean"]);
            let checked = also(&run["hyper"], &problem, &opt);
            assert_eq!(expected.as_object().unwrap().len(), 2 + checked.len(), "{name}: a number is not looked at");
            for (what, ours) in checked {
                compare(name, t, what, &ours, &expected[what]);
            }
        }
    }
}

fn number(hyper: &Value, key: &str, default: f64) -> f64 {
    hyper.get(key).map_or(default, |v| v.as_f64().unwrap())
}

fn flag(hyper: &Value, key: &str, default: bool) -> bool {
    hyper.get(key).map_or(default, |v| v.as_bool().unwrap())
}

fn nothing<R: Rule>(_: &Value, _: &Problem, _: &Optimizer<R>) -> Vec<(&'static str, Vec<f64>)> {
    Vec::new()
}

#[test]
fn sgd() {
    let file = data();
    let make = |h: &Value| {
        let c = Sgd::default().momentum(number(h, "momentum", 0.0)).weight_decay(number(h, "weight_decay", 0.0));
        (c.builder(), number(h, "lr", f64::NAN))
    };
    for name in ["sgd", "sgd_momentum_wd"] {
        replay(&file, name, make, Reduction::Mean, nothing);
    }
}

#[test]
fn rmsprop() {
    let file = data();
    let make = |h: &Value| {
        let c = RmsProp::default().alpha(number(h, "alpha", f64::NAN)).eps(number(h, "eps", f64::NAN));
        let c = c.momentum(number(h, "momentum", 0.0)).centered(flag(h, "centered", false));
        (c.weight_decay(number(h, "weight_decay", 0.0)).builder(), number(h, "lr", f64::NAN))
    };
    for name in ["rmsprop", "rmsprop_momentum_centered"] {
        replay(&file, name, make, Reduction::Mean, nothing);
    }
}

#[test]
fn adam() {
    let file = data();
    let make = |h: &Value| {
        let c = Adam::default().beta1(number(h, "beta1", f64::NAN)).beta2(number(h, "beta2", f64::NAN));
        let c = c.eps(number(h, "eps", f64::NAN)).amsgrad(flag(h, "amsgrad", false));
        (c.weight_decay(number(h, "weight_decay", 0.0)).builder(), number(h, "lr", f64::NAN))
    };
    for name in ["adam", "adam_l2_amsgrad"] {
        replay(&file, name, make, Reduction::Mean, nothing);
    }
}

#[test]
fn adamw() {
    let make = |h: &Value| {
        let c = AdamW::default().beta1(number(h, "beta1", f64::NAN)).beta2(number(h, "beta2", f64::NAN));
        let c = c.eps(number(h, "eps", f64::NAN)).weight_decay(number(h, "weight_decay", f64::NAN));
        (c.builder(), number(h, "lr", f64::NAN))
    };
    replay(&data(), "adamw", make, Reduction::Mean, nothing);
}

#[test]
fn ivon() {
    let file = data();
    let make = |h: &Value| {
        let ess = number(h, "ess", f64::NAN);
        let c = Ivon::default().ess(ess).hess_init(number(h, "hess_init", f64::NAN));
        let c = c.beta1(number(h, "beta1", f64::NAN)).beta2(number(h, "beta2", f64::NAN));
        let c = c.weight_decay(number(h, "weight_decay", f64::NAN));
        let mut c = c.samples(h["mc_samples"].as_u64().unwrap() as usize);
        if h.get("hess_approx").is_some_and(|v| v == "gradsq") {
            // This implementation scales the squared gradient by the effective sample size.
            c = c.hessian(Statistic::SquaredGradient).square_scale(ess);
        }
        if let Some(radius) = h.get("clip_radius") {
            c = c.clip_radius(radius.as_f64().unwrap());
        }
        let c = c.debias(flag(h, "debias", true)).rescale_lr(flag(h, "rescale_lr", true));
        (c.builder(), number(h, "lr", f64::NAN))
    };
    for name in ["ivon", "ivon_mc3", "ivon_gradsq", "ivon_clip_nodebias_norescale"] {
        replay(&file, name, make, Reduction::Mean, |_, p, opt| {
            vec![("hess", p.state(opt, "hess")), ("momentum", p.state(opt, "momentum"))]
        });
    }
}

/// That code stores v = T/S with a temperature T that divides the prior too: the same trajectory with
/// ess = N/T, 1-β₂ and α times T, and precision/N = S/T.
#[test]
fn vogn() {
    let file = data();
    let scales = |h: &Value| {
        let n = number(h, "data_size", f64::NAN);
        (n, number(h, "temperature", 1.0), number(h, "prior_precision", f64::NAN) / n, number(h, "dampening", f64::NAN))
    };
    let make = |h: &Value| {
        let (n, t, delta, gamma) = scales(h);
        let h0 = t / number(h, "std_init", 1.0).powi(2) - delta - gamma;
        let c = Von::vogn().ess(n / t).weight_decay(delta).damping(gamma).hess_init(h0);
        let c = c.beta1(number(h, "momentum_grad", f64::NAN));
        let c = c.beta2(1.0 - (1.0 - number(h, "momentum_hess", f64::NAN)) * t);
        let c = c.expectation(Expectation::MonteCarlo { samples: h["mc_samples"].as_u64().unwrap() as usize });
        let c = c.momentum(Momentum::Average).debias(false).prior_in_momentum(true);
        (c.precision_in_step(PrecisionInStep::Old).builder(), number(h, "lr", f64::NAN) * t)
    };
    for name in ["vogn", "vogn_mc2_damped_tempered"] {
        replay(&file, name, make, Reduction::None, |h, p, opt| {
            let (_, t, delta, gamma) = scales(h);
            let precision = p.state(opt, "hess").iter().map(|h| (h + delta + gamma) / t).collect();
            vec![("precision_over_n", precision), ("momentum", p.state(opt, "momentum"))]
        });
    }
}

#[test]
fn sam() {
    let file = data();
    let make = |h: &Value| {
        let c = Sam::default().rho(number(h, "rho", f64::NAN)).momentum(number(h, "momentum", f64::NAN));
        (c.weight_decay(number(h, "weight_decay", f64::NAN)).builder(), number(h, "lr", f64::NAN))
    };
    for name in ["sam", "sam_msharp2"] {
        replay(&file, name, make, Reduction::Mean, |_, p, opt| vec![("momentum", p.state(opt, "momentum"))]);
    }
}

/// That code keeps s = h+δ+γ.
#[test]
fn bsam() {
    let file = data();
    let prior = |h: &Value| number(h, "weight_decay", f64::NAN) + number(h, "damping", f64::NAN);
    let make = |h: &Value| {
        let c = BayesianSam::released().ess(number(h, "n_data", f64::NAN)).rho(number(h, "rho", f64::NAN));
        let c = c.beta1(number(h, "beta1", f64::NAN)).beta2(number(h, "beta2", f64::NAN));
        let c = c.weight_decay(number(h, "weight_decay", f64::NAN)).damping(number(h, "damping", f64::NAN));
        (c.hess_init(number(h, "s_init", f64::NAN) - prior(h)).builder(), number(h, "lr", f64::NAN))
    };
    for name in ["bsam", "bsam_msharp3"] {
        replay(&file, name, make, Reduction::Mean, |h, p, opt| {
            let scale = p.state(opt, "hess").iter().map(|x| x + prior(h)).collect();
            vec![("scale", scale), ("momentum", p.state(opt, "momentum"))]
        });
    }
}

#[test]
fn every_run_of_the_file_is_replayed() {
    let names: Vec<String> = data()["runs"].as_array().unwrap().iter().map(|r| r["name"].to_string()).collect();
    assert_eq!(names.len(), 17, "{names:?}: add a replay for each new run");
    assert_eq!(problem(&data(), Device::Cpu).parameters.len(), 4);
}

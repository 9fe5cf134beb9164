//! Online Gauss-Newton steps do not depend on how the per-example gradients are had.

use tch::nn::{BatchNormConfig, LinearConfig, Module, ModuleT, VarStore};
use tch::{Device, Kind, Tensor};
use tch_blr::{Error, Ivon, Philox, Von, nn};

/// Means and Hessians after each of three steps on y = W a + sin(W a)/5, with `first` for the first W a.
fn trajectory(first: impl Fn(&nn::Linear, &Tensor) -> Tensor) -> Vec<Tensor> {
    let mut vs = VarStore::new(Device::Cpu);
    let layer = nn::linear(vs.root(), 3, 2, LinearConfig { bias: false, ..Default::default() });
    vs.double();
    let values = |n: i64| Tensor::arange(n, (Kind::Double, Device::Cpu)).sin();
    tch::no_grad(|| layer.ws.shallow_clone().copy_(&values(6).view([2, 3])));
    let x = values(15).view([5, 3]) + 0.3;
    let mut opt = Von::ogn().ess(5.0).beta2(0.5).build(&vs, 0.1).unwrap();
    let mut states = Vec::new();
    for _ in 0..3 {
        let losses = || {
            let y: Tensor = first(&layer, &x) + x.matmul(&layer.ws.tr()).sin() * 0.2;
            (y - 1.0).square().sum_dim_intlist(1, false, None::<Kind>)
        };
        opt.step(losses).unwrap();
        states.extend([layer.ws.detach().copy(), opt.state("weight", "hess").unwrap().copy()]);
    }
    states
}

#[test]
fn a_weight_used_in_a_layer_and_by_hand_is_right_in_every_step() {
    let mixed = trajectory(Module::forward);
    let by_hand = trajectory(|layer, x| x.matmul(&layer.ws.tr()));
    for (step, (a, b)) in mixed.iter().zip(&by_hand).enumerate() {
        assert!(a.allclose(b, 1e-12, 1e-14, false), "{step}: {a} {b}");
    }
}

#[test]
fn the_guard_records_the_taps_as_the_closure_does() {
    let vs = VarStore::new(Device::Cpu);
    let layer = nn::linear(vs.root(), 3, 2, LinearConfig::default());
    let x = Tensor::arange(15, (Kind::Float, Device::Cpu)).sin().view([5, 3]);
    // A mean loss: without the taps there would be no per-example gradients.
    let loss = || (layer.forward(&x) - 1.0).square().mean(Kind::Float);
    let row = || Von::vogn().ess(5.0).noise(Philox { seed: 1 }).build(&vs, 0.0).unwrap();
    let (mut closure, mut guarded) = (row(), row());
    closure.step(loss).unwrap();
    drop(guarded.perturbed().unwrap());
    let evaluation = guarded.perturbed().unwrap();
    let value = loss();
    evaluation.backward(value).unwrap();
    guarded.update().unwrap();
    for name in ["weight", "bias"] {
        assert_eq!(closure.state(name, "hess"), guarded.state(name, "hess"));
    }
}

#[test]
fn batch_normalization_in_training_mode_is_refused_and_changes_nothing() {
    let vs = VarStore::new(Device::Cpu);
    let layer = nn::linear(vs.root() / "fc", 3, 2, LinearConfig::default());
    let norm = tch::nn::batch_norm1d(vs.root() / "norm", 2, BatchNormConfig::default());
    let x = Tensor::arange(15, (Kind::Float, Device::Cpu)).sin().view([5, 3]);
    let losses = |train| {
        let y: Tensor = norm.forward_t(&layer.forward(&x), train) - 1.0;
        y.square().sum_dim_intlist(1, false, None::<Kind>)
    };
    let held = || -> Vec<(String, Vec<f64>)> {
        let read = |t: &Tensor| Vec::try_from(t.detach().flatten(0, -1).to_kind(Kind::Double)).unwrap();
        let mut all: Vec<_> = vs.variables().iter().map(|(name, t)| (name.clone(), read(t))).collect();
        all.sort_by(|a, b| a.0.cmp(&b.0));
        all
    };
    let before = held();
    let mut opt = Von::vogn().ess(5.0).build(&vs, 0.1).unwrap();
    let error = opt.step(|| losses(true)).unwrap_err();
    assert!(matches!(error, Error::PerExample(_)), "{error}");
    assert!(error.to_string().contains("norm.running_"), "{error}");
    assert_eq!((held(), opt.steps()), (before.clone(), 0));
    let evaluation = opt.perturbed().unwrap();
    let tried = losses(true);
    assert!(matches!(evaluation.backward(tried), Err(Error::PerExample(_))));
    assert_eq!((held(), opt.steps()), (before.clone(), 0));
    opt.step(|| losses(false)).unwrap();
    assert_ne!(held(), before);
    // Rows without per-example gradients take it.
    Ivon::default().ess(5.0).build(&vs, 0.1).unwrap().step(|| losses(true)).unwrap();
}

/// A buffer that is NaN from the start was not changed.
#[test]
fn buffers_of_nan_are_no_batch_normalization() {
    let vs = VarStore::new(Device::Cpu);
    let layer = nn::linear(vs.root(), 3, 2, LinearConfig::default());
    let _ = vs.root().zeros_no_train("buffer", &[2]).fill_(f64::NAN);
    let x = Tensor::ones([4, 3], (Kind::Float, Device::Cpu));
    let mut opt = Von::vogn().ess(100.0).build(&vs, 0.1).unwrap();
    opt.step(|| layer.forward(&x).square().mean(None::<Kind>)).unwrap();
}

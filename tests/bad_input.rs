//! Whatever is wrong is refused by an error that says what, where and what was expected, and nothing has changed.

use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt::Debug;
use std::fs;
use std::path::Path;
use support::{F32, F64, Form, Net, Separable, Snapshot, bits, refused, rows::posterior, wave_at};
use tch::nn::VarStore;
use tch::{Device, Kind, Tensor};
use tch_blr::continual::{LabelNoise, Memory, Past, Replay};
use tch_blr::fisher::Fisher;
use tch_blr::nn::Likelihood;
use tch_blr::rows::{Momentum, StepLength};
use tch_blr::rule::{Row, Rule};
use tch_blr::sensitivity::{DualView, Removal, Sensitivity};
use tch_blr::{
    Adam, AdamW, BayesBiNN, BayesianSam, Derivatives, DiagonalGaussian, Error, Evon, Expectation, FullVon, Ivon,
    NoisyKfac, Optimizer, Params, Philox, Prior, RmsProp, Sam, SamRmsProp, Schedule, Sgd, Statistic, Ste, Vadam, Von,
};

/// The error's text; it has to contain all of `parts`.
#[track_caller]
/// Refuses each configuration at every place where one can come in, and names field and value.
fn refuses<R: Row>(good: R, bad: Vec<(R, &str, &str)>) {
    let net = Net::new(F64);
    let weights = || net.weights.iter().map(bits).collect::<Vec<_>>();
    let start = weights();
    let mut opt = good.builder().noise(Philox { seed: 1 }).build(&net.vs, 0.1).unwrap();
    opt.step(|| net.losses()).unwrap();
    let trained = Snapshot::of(&opt, &net.vs);
    assert_ne!(trained.weights, start);
    for (lr, value) in range::NON_NEGATIVE {
        for result in [
            good.builder().build(&net.vs, lr).map(|_| ()),
            good.builder().group_lr(1, lr).build(&net.vs, 0.1).map(|_| ()),
            opt.set_lr(lr),
            opt.set_lr_group(1, lr),
        ] {
            refused(result, &["lr", value]);
        }
    }
    assert_eq!(Snapshot::of(&opt, &net.vs), trained);
    for (config, field, value) in bad {
        let at = [
            config.builder().build(&net.vs, 0.1).map(|_| ()),
            good.builder().group(1, move |_| config).build(&net.vs, 0.1).map(|_| ()),
            opt.configure(|_| config),
            opt.configure_group(1, |_| config),
        ];
        for result in at {
            let error = refused(result, &[field, value]);
            let named = matches!(&error, Error::HyperParameter { name, value: v, .. } if *name == field && v == value);
            assert!(named, "{field} = {value}: {error:?}");
        }
        assert_eq!(Snapshot::of(&opt, &net.vs), trained, "{field} = {value}");
    }
}

/// Values that a number is refused for, by its range.
mod range {
    pub const RATE: [(f64, &str); 4] = [(f64::NAN, "NaN"), (-0.1, "-0.1"), (1.0, "1.0"), (f64::INFINITY, "inf")];
    pub const NON_NEGATIVE: [(f64, &str); 3] = [(f64::NAN, "NaN"), (-1.0, "-1.0"), (f64::INFINITY, "inf")];
    pub const POSITIVE: [(f64, &str); 4] = [(f64::NAN, "NaN"), (-1.0, "-1.0"), (0.0, "0.0"), (f64::INFINITY, "inf")];
}

/// A configuration that is refused, the hyper-parameter that is named and the value that is shown.
type Bad<R> = (R, &'static str, &'static str);

/// `good` with each value that the field's range leaves out.
macro_rules! bad_values {
    ($good:expr, $field:ident, ANY) => {
        Vec::<Bad<_>>::new()
    };
    ($good:expr, $field:ident, BELOW) => {
        Vec::<Bad<_>>::new()
    };
    ($good:expr, $field:ident, $range:ident) => {
        range::$range.map(|(x, text)| ($good.$field(x), stringify!($field), text)).to_vec()
    };
}

/// One test for each row: its whole configuration, field by field with the range that it has; then what a range does
/// not say. `ANY` value of a field is right, or what is wrong with it stands `BELOW`.
macro_rules! rows {
    ($($row:ident: $type:ty = $good:expr, { $($field:ident: $range:ident,)* } |$g:pat_param| $below:expr;)*) => {
        $(#[test]
        fn $row() {
            let good: $type = $good;
            let below: Vec<Bad<$type>> = {
                let $g = good;
                $below
            };
            let mut bad: Vec<Bad<$type>> = Vec::new();
            $(bad.extend(bad_values!(good, $field, $range));)*
            every_field_is_here(&good, &[$((stringify!($field), stringify!($range))),*], &below);
            bad.extend(below);
            refuses(good, bad);
        })*
    };
}

/// A hyper-parameter that somebody adds has its range in these tests.
fn every_field_is_here<R: Row>(config: &R, listed: &[(&str, &str)], below: &[Bad<R>]) {
    let fields = serde_json::to_value(config).unwrap();
    let fields = fields.as_object().unwrap();
    assert_eq!(
        listed.iter().map(|(field, _)| *field).collect::<BTreeSet<_>>(),
        fields.keys().map(String::as_str).collect::<BTreeSet<_>>(),
        "listed here, and those of the configuration"
    );
    for (field, range) in listed {
        match *range {
            // No floating-point number can be anything: there is NaN. (`null` is one that is not set.)
            "ANY" => assert!(!fields[*field].is_f64() && !fields[*field].is_null(), "{field} has no range"),
            "BELOW" => assert!(below.iter().any(|(_, name, _)| name.starts_with(field)), "{field} is not below"),
            _ => (),
        }
    }
}

rows! {
    sgd: Sgd = Sgd::default(), {
        momentum: RATE,
        dampening: NON_NEGATIVE,
        nesterov: BELOW,
        weight_decay: NON_NEGATIVE,
        ess: POSITIVE,
    } |good| vec![
        (good.dampening(1.5), "dampening", "1.5"),
        (good.nesterov(true), "nesterov", "true"),
        (good.nesterov(true).momentum(0.9).dampening(0.1), "nesterov", "true"),
    ];

    rmsprop: RmsProp = RmsProp::default(), {
        alpha: RATE,
        eps: POSITIVE,
        momentum: RATE,
        centered: ANY,
        weight_decay: NON_NEGATIVE,
        ess: POSITIVE,
    } |_| Vec::new();

    adam: Adam = Adam::default(), {
        beta1: RATE,
        beta2: RATE,
        eps: POSITIVE,
        amsgrad: ANY,
        weight_decay: NON_NEGATIVE,
        ess: POSITIVE,
    } |_| Vec::new();

    adamw: AdamW = AdamW::default(), {
        beta1: RATE,
        beta2: RATE,
        eps: POSITIVE,
        amsgrad: ANY,
        weight_decay: NON_NEGATIVE,
        ess: POSITIVE,
    } |_| Vec::new();

    vadam: Vadam = Vadam::default().ess(100.0), {
        ess: POSITIVE,
        square_init: NON_NEGATIVE,
        beta1: RATE,
        beta2: RATE,
        weight_decay: NON_NEGATIVE,
        damping: NON_NEGATIVE,
        expectation: BELOW,
        debias: ANY,
        debias_square: ANY,
        square_root: ANY,
    } |good| {
        let flat = good.weight_decay(0.0);
        vec![
            (Vadam::default(), "ess", "not set"),
            (good.expectation(Expectation::Delta), "expectation", "Delta"),
            (good.samples(0), "samples", "0"),
            (flat, "square_init + weight_decay", "0.0"),
            // It forgets the square it starts with in a step.
            (flat.square_init(1.0).beta2(0.0), "square_init + weight_decay", "0.0"),
        ]
    };

    ste: Ste = Ste::default(), {
        momentum: RATE,
        clip_radius: BELOW,
        weight_decay: NON_NEGATIVE,
    } |good| vec![
        // Infinity clips nothing.
        (good.clip_radius(0.0), "clip_radius", "0.0"),
        (good.clip_radius(f64::NAN), "clip_radius", "NaN"),
    ];

    bayesbinn: BayesBiNN = good_bayesbinn(), {
        ess: POSITIVE,
        relaxation: POSITIVE,
        natural_init: POSITIVE,
        prior_natural: BELOW,
        kl_weight: NON_NEGATIVE,
        beta1: RATE,
        debias: ANY,
        eps: POSITIVE,
        expectation: BELOW,
    } |good| vec![
        (BayesBiNN::default(), "ess", "not set"),
        (good.expectation(Expectation::Delta), "expectation", "Delta"),
        (good.samples(0), "samples", "0"),
        // Of either sign.
        (good.prior_natural(f64::INFINITY), "prior_natural", "inf"),
        (good.prior_natural(f64::NAN), "prior_natural", "NaN"),
    ];

    von: Von = good_von(), {
        ess: POSITIVE,
        weight_decay: NON_NEGATIVE,
        hess_init: NON_NEGATIVE,
        relative_noise: POSITIVE,
        hess_from_first_batch: ANY,
        beta1: RATE,
        beta2: RATE,
        damping: NON_NEGATIVE,
        expectation: BELOW,
        hessian: BELOW,
        momentum: ANY,
        debias: BELOW,
        prior_in_momentum: ANY,
        precision_in_step: ANY,
        step_length: BELOW,
        temperature: POSITIVE,
        warmup_from: POSITIVE,
        warmup_steps: ANY,
        augmentation: POSITIVE,
    } |good| {
        let flat = good.weight_decay(0.0);
        let adversarial = Expectation::Adversarial { sampled: true };
        vec![
            (good.warmup_from(1.5), "warmup_from", "1.5"),
            (good.step_length(StepLength::Adam { beta: -0.1 }), "step_length beta", "-0.1"),
            (Von::vogn(), "ess", "not set"),
            (Von::ogn(), "ess", "not set"),
            (good.expectation(Expectation::MonteCarlo { samples: 0 }), "samples", "0"),
            (good.expectation(Expectation::Antithetic { pairs: 0 }), "pairs", "0"),
            (good.expectation(adversarial), "expectation", "Adversarial { sampled: true }"),
            (Von::ogn().ess(9.0).hessian(Statistic::Price), "hessian", "Price"),
            (good.hessian(Statistic::Unused), "hessian", "Unused"),
            (good.momentum(Momentum::HeavyBall), "debias", "true"),
            // A precision that can be zero.
            (flat.hess_init(0.0), "hess_init + weight_decay + damping", "0.0"),
            (flat.hess_from_first_batch(true), "weight_decay + damping", "0.0"),
            (flat.beta2(0.0), "weight_decay + damping", "0.0"),
        ]
    };

    ivon: Ivon = good_ivon(), {
        ess: POSITIVE,
        hess_init: POSITIVE,
        relative_noise: POSITIVE,
        beta1: RATE,
        beta2: RATE,
        weight_decay: NON_NEGATIVE,
        expectation: BELOW,
        hessian: BELOW,
        square_scale: POSITIVE,
        clip_radius: POSITIVE,
        debias: ANY,
        rescale_lr: ANY,
        max_growth: POSITIVE,
        step_length: BELOW,
        prior_pull: ANY,
    } |good| {
        vec![
            (Ivon::default(), "ess", "not set"),
            (good.hessian(Statistic::Hessian), "hessian", "Hessian"),
            (good.expectation(Expectation::Delta), "expectation", "Delta"),
            (good.samples(0), "samples", "0"),
            (good.expectation(Expectation::Antithetic { pairs: 0 }), "pairs", "0"),
            (good.max_growth(1.0), "max_growth", "1.0"),
            (good.step_length(StepLength::Adam { beta: 1.0 }), "step_length beta", "1.0"),
        ]
    };

    evon: Evon = Evon::default().ess(100.0), {
        ess: POSITIVE,
        weight_decay: NON_NEGATIVE,
        hess_init: POSITIVE,
        beta1: RATE,
        beta2: RATE,
        beta_basis: RATE,
        frequency: BELOW,
        max_dim: BELOW,
        merge_dims: ANY,
        rotate_vectors: ANY,
        expectation: BELOW,
        hess_clip: POSITIVE,
        clip_radius: POSITIVE,
        debias: ANY,
        relative_noise: POSITIVE,
        max_growth: POSITIVE,
        phased: BELOW,
        whiten: ANY,
        step_length: BELOW,
    } |good| {
        let limit = good.expectation(Expectation::Delta);
        let adversarial = Expectation::Adversarial { sampled: true };
        vec![
            (Evon::published(), "ess", "not set"),
            // The message says how the limit is asked for.
            (good.ess(f64::INFINITY), "ess", "inf"),
            (limit.ess(f64::INFINITY), "ess", "inf"),
            (limit.ess(-1.0), "ess", "-1.0"),
            (limit.phased(true), "phased", "true"),
            (limit.relative_noise(0.1), "relative_noise", "Some(0.1)"),
            (good.expectation(adversarial), "expectation", "Adversarial { sampled: true }"),
            (good.frequency(0), "frequency", "0"),
            (good.max_dim(-1), "max_dim", "-1"),
            (good.expectation(Expectation::MonteCarlo { samples: 0 }), "samples", "0"),
            (good.expectation(Expectation::Antithetic { pairs: 0 }), "pairs", "0"),
            (good.max_growth(1.0), "max_growth", "1.0"),
            (good.step_length(StepLength::Adam { beta: 1.0 }), "step_length beta", "1.0"),
        ]
    };

    sam: Sam = Sam::default(), {
        rho: NON_NEGATIVE,
        momentum: RATE,
        weight_decay: NON_NEGATIVE,
        ess: POSITIVE,
    } |_| Vec::new();

    sam_rmsprop: SamRmsProp = SamRmsProp::default(), {
        rho: NON_NEGATIVE,
        alpha: RATE,
        eps: POSITIVE,
        weight_decay: NON_NEGATIVE,
        ess: POSITIVE,
    } |_| Vec::new();

    bsam: BayesianSam = good_bsam(), {
        ess: POSITIVE,
        rho: NON_NEGATIVE,
        hess_init: NON_NEGATIVE,
        relative_noise: POSITIVE,
        beta1: RATE,
        beta2: RATE,
        weight_decay: NON_NEGATIVE,
        damping: NON_NEGATIVE,
        precision_in_step: ANY,
        step_length: BELOW,
    } |good| vec![
        (good.step_length(StepLength::Adam { beta: f64::NAN }), "step_length beta", "NaN"),
        (BayesianSam::iclr2023(), "ess", "not set"),
        (BayesianSam::released(), "ess", "not set"),
        (good.weight_decay(0.0).damping(0.0), "weight_decay + damping", "0.0"),
    ];
}

fn good_bayesbinn() -> BayesBiNN {
    BayesBiNN::default().ess(100.0)
}

fn good_von() -> Von {
    Von::vogn().ess(100.0)
}

fn good_ivon() -> Ivon {
    Ivon::default().ess(100.0)
}

fn good_bsam() -> BayesianSam {
    BayesianSam::default().ess(100.0)
}

#[test]
fn priors_of_another_family() {
    let net = Net::new(F64);
    let gaussian = posterior(&net.vs);
    refused(good_bayesbinn().prior(&gaussian).build(&net.vs, 0.1), &["Gaussian prior", "bayesbinn"]);
    refused(Ste::default().prior(Prior::isotropic(1.0)).build(&net.vs, 0.1), &["Gaussian prior", "ste"]);
}

/// Losses at the wrong one of two points, and chunks that are none.
#[test]
fn pairs_of_points() {
    let net = Net::new(F64);
    let mut opt = Sam::default().build(&net.vs, 0.1).unwrap();
    let mut adam = Adam::default().build(&net.vs, 0.1).unwrap();
    let before = Snapshot::of(&opt, &net.vs);
    let first = ["loss", "two points", "Evaluation::ascend"];
    refused(opt.perturbed().unwrap().step(net.losses()), &first);
    refused(opt.perturbed().unwrap().backward(net.losses()), &first);
    let none = || Derivatives { loss: 1.0, examples: None, gradients: Vec::new(), squares: Vec::new() };
    refused(opt.perturbed().unwrap().step(none()), &first);
    refused(opt.perturbed().unwrap().backward(none()), &first);
    refused(opt.perturbed().unwrap().ascend(none()), &["0 gradients", "expected 4"]);
    let second = opt.perturbed().unwrap().ascend(net.losses()).unwrap();
    refused(second.ascend(net.losses()), &["loss", "not at the first of two points", "Evaluation::step"]);
    refused(
        adam.perturbed().unwrap().ascend(net.losses()),
        &["loss", "not at the first of two points", "Evaluation::step"],
    );
    refused(opt.step_chunks(0, |_| net.losses()), &["chunks", "0", "at least 1"]);
    assert_eq!(Snapshot::of(&opt, &net.vs), before);
    opt.step(|| net.losses()).unwrap();
}

#[test]
fn builder() {
    let net = Net::new(F64);
    let with = || Adam::default().ess(10.0).builder();
    for x in [f64::NAN, 0.0, -1.0, f64::INFINITY] {
        let value = format!("{x:?}");
        refused(with().clip_grad_value(x).build(&net.vs, 0.1), &["clip_grad_value", &value]);
        refused(with().clip_grad_norm(x).build(&net.vs, 0.1), &["clip_grad_norm", &value]);
    }
    for (schedule, parts) in [
        (Schedule::Cosine { warmup: 5, total: 5, end: 0.0 }, ["schedule total", "5"]),
        (Schedule::Linear { warmup: 2, stable: 3, total: 5, end: 0.0 }, ["schedule total", "5"]),
        (Schedule::Cosine { warmup: 0, total: 5, end: -1.0 }, ["schedule end", "-1.0"]),
        (Schedule::Cosine { warmup: 1, total: 5, end: 0.0 }.in_epochs_of(0), ["schedule total", "epochs"]),
        (Schedule::CosineRestarts { warmup: 0, period: 0, growth: 1, end: 0.0 }, ["schedule period", "0"]),
        (Schedule::Step { every: 0, factor: 0.5 }, ["schedule every", "0"]),
        (Schedule::Step { every: 2, factor: 0.0 }, ["schedule factor", "0.0"]),
        (Schedule::Step { every: 2, factor: f64::NAN }, ["schedule factor", "NaN"]),
    ] {
        refused(with().schedule(schedule).build(&net.vs, 0.1), &parts);
    }
    // Beyond f32: as a limit it is none, as a state it cannot be.
    let single = Net::new(F32);
    let mut opt = with().clip_grad_value(f64::MAX).build(&single.vs, 0.1).unwrap();
    opt.step(|| single.losses()).unwrap();
    refused(good_ivon().hess_init(1e300).build(&single.vs, 0.1), &["`first.weight`", "hess", "1e300", "f32"]);
    good_ivon().hess_init(1e300).build(&net.vs, 0.1).unwrap();
    // Not in an override: the evaluations of a step are common to all parameters.
    let samples = good_ivon().builder().group(1, |c| c.samples(3)).build(&net.vs, 0.1);
    refused(samples, &["second.weight", "override"]);
    let mut opt = good_ivon().build(&net.vs, 0.1).unwrap();
    let before = Snapshot::of(&opt, &net.vs);
    refused(
        opt.configure(|c| c.expectation(Expectation::Antithetic { pairs: 1 })),
        &["fixed when the optimizer is built"],
    );
    let sgd = Sgd::default().build(&net.vs, 0.1).unwrap();
    assert_eq!(sgd.steps(), 0);
    assert_eq!(Snapshot::of(&opt, &net.vs), before);
}

#[test]
fn parameters() {
    let adam = Adam::default();
    refused(adam.build(&VarStore::new(Device::Cpu), 0.1), &["parameters", "none", "create"]);

    let mut net = Net::new(F32);
    net.vs.freeze();
    refused(adam.build(&net.vs, 0.1), &["none of the 4 requires gradients", "unfreeze"]);
    net.vs.unfreeze();

    let w = wave_at(&[2], 0.0, F64).set_requires_grad(true);
    let integers = Tensor::from_slice(&[1_i64, 2]);
    let named = |name: &str, t: &Tensor| (name.to_owned(), t.shallow_clone());
    let params = Params::named([named("w", &w), named("counts", &integers)]).unwrap();
    refused(adam.build(params, 0.1), &["`counts`", "Int64", "f32, f64, bf16 or f16"]);
    refused(Params::named([named("w", &w), named("w", &integers)]), &["`w`", "name"]);
    refused(Params::named([("nothing", Tensor::new())]), &["`nothing`", "undefined"]);
    refused(Params::named([named("twice_w", &(&w * 2))]), &["`twice_w`", "leaf"]);

    // Converted after the optimizer was built.
    let mut opt = adam.build(&net.vs, 0.1).unwrap();
    opt.step(|| net.losses()).unwrap();
    let before = Snapshot::of(&opt, &net.vs).file;
    net.vs.double();
    let changed = |result| refused(result, &["`first.weight`", "Float", "Double", "build the optimizer afterwards"]);
    changed(opt.step(|| net.losses()));
    changed(opt.accumulate(|| net.losses()));
    net.vs.float();
    assert_eq!(Snapshot::of(&opt, &net.vs).file, before);
    opt.step(|| net.losses()).unwrap();

    // Of another shape.
    let before = Snapshot::of(&opt, &net.vs);
    let weight = &mut net.weights[1];
    let original = weight.detach();
    weight.set_data(&wave_at(&[7], 0.0, F32));
    let loss = || weight.square().sum(Kind::Float);
    refused(opt.step(loss), &["`first.bias`", "[5]", "[7]", "build the optimizer afterwards"]);
    weight.set_data(&original);
    assert_eq!(Snapshot::of(&opt, &net.vs), before);

    // Frozen as a whole, then trained again.
    net.vs.freeze();
    refused(opt.step(|| net.losses()), &["none of the 4 requires gradients"]);
    net.vs.unfreeze();
    assert_eq!(Snapshot::of(&opt, &net.vs), before);
}

#[test]
fn parameters_on_two_devices() {
    if !tch::Cuda::is_available() {
        support::skipped_on_cuda();
        return;
    }
    let [here, there] =
        [Device::Cpu, Device::Cuda(0)].map(|device| wave_at(&[2], 0.0, (Kind::Float, device)).set_requires_grad(true));
    let params = Params::named([("here", here), ("there", there)]).unwrap();
    refused(Sgd::default().build(params, 0.1), &["`here`", "Cpu", "`there`", "Cuda(0)"]);
}

#[test]
fn losses() {
    let net = Net::new(F32);
    let mut opt = good_ivon().noise(Philox { seed: 1 }).build(&net.vs, 0.1).unwrap();
    opt.step(|| net.losses()).unwrap();
    let before = Snapshot::of(&opt, &net.vs);
    let nothing = Tensor::zeros([], (Kind::Int64, Device::Cpu));
    for (loss, parts) in [
        (net.losses().unsqueeze(1), &["loss", "[12, 1]", "0-dim", "1-D"][..]),
        (net.losses().narrow(0, 0, 0), &["loss", "[0]"]),
        (nothing, &["loss", "Int64", "floating-point"]),
        (net.losses().detach(), &["loss", "no graph", "no_grad"]),
        (net.losses() * f64::NAN, &["loss", "NaN", "step 1", "nothing was changed"]),
        (net.losses() * f64::INFINITY, &["loss", "inf", "step 1"]),
        (Tensor::new(), &["loss", "undefined"]),
    ] {
        refused(opt.step(|| loss.shallow_clone()), parts);
        assert_eq!(Snapshot::of(&opt, &net.vs), before, "{parts:?}");
    }
    refused(opt.update(), &["loss", "none was evaluated", "accumulate"]);

    // A graph that is gone.
    let mut adam = Adam::default().build(&net.vs, 0.1).unwrap();
    let loss = net.losses();
    adam.backward_step(&loss).unwrap();
    let before = Snapshot::of(&adam, &net.vs);
    refused(adam.backward_step(&loss), &["libtorch", "backward"]);
    refused(adam.backward_step_clip(&net.losses(), -1.0), &["clip_grad_value", "-1.0"]);
    assert_eq!(Snapshot::of(&adam, &net.vs), before);

    // Only the mean of the losses, and layers that are not tapped.
    let mut vogn = good_von().noise(Philox { seed: 1 }).build(&net.vs, 0.1).unwrap();
    let before = Snapshot::of(&vogn, &net.vs);
    refused(vogn.step(|| net.losses().mean(None::<Kind>)), &["per-example", "`first.weight`", "tch_blr::nn", "[B]"]);
    assert_eq!(Snapshot::of(&vogn, &net.vs), before);
}

/// A tap check that has passed for one form of the loss says nothing about another one.
#[test]
fn untapped_use_is_found_after_per_example_losses() {
    let vs = support::store(F64);
    let layer = tch_blr::nn::linear(vs.root(), 3, 2, tch::nn::LinearConfig::default());
    let x = wave_at(&[5, 3], 0.2, F64);
    let losses = || {
        let z = tch::nn::Module::forward(&layer, &x);
        // The weight is used outside of the layer too.
        z.square().sum_dim_intlist(1, false, None::<Kind>) + layer.ws.square().sum(Kind::Double)
    };
    let mut opt = Von::ogn().ess(100.0).build(&vs, 0.1).unwrap();
    let evaluation = opt.perturbed().unwrap();
    let per_example = losses();
    evaluation.backward(per_example).unwrap();
    opt.update().unwrap();
    let before = Snapshot::of(&opt, &vs);
    refused(opt.step(|| losses().mean(None::<Kind>)), &["`weight`", "outside"]);
    assert_eq!(Snapshot::of(&opt, &vs), before);
}

/// Pixels that are always black give gradients that are always zero; others here are constant.
#[test]
fn weights_without_gradient_stay_finite() {
    fn run<R: Rule>(config: R) {
        let problem = Separable::new(F32);
        let a = problem.get("a");
        let mut opt = config.builder().noise(Philox { seed: 2 }).build(&problem.vs, 1e-3).unwrap();
        for step in 0..300 {
            let losses = || (&a * Tensor::from_slice(&[0.0_f32, 0.9, 9.0])).sum_dim_intlist(0, false, None::<Kind>);
            opt.step(losses).unwrap_or_else(|e| panic!("{config:?}, step {step}: {e}"));
            assert!(a.isfinite().all().int64_value(&[]) == 1, "{config:?}, step {step}");
        }
    }
    // The estimated variance of a constant gradient is zero up to rounding.
    for alpha in [0.7, 0.8, 0.95] {
        run(RmsProp::default().alpha(alpha).centered(true));
    }
    run(Adam::default());
    run(AdamW::default());
    run(Von::ogn().ess(1e4));
    run(Von::neurips2019().ess(1e4));
    run(Von::vogn().ess(1e4).weight_decay(0.0).beta2(0.5).damping(1e-3));
    run(good_ivon());
    run(Sam::default());
    run(SamRmsProp::default());
    run(good_bsam().weight_decay(0.0).beta2(0.5).damping(1e-3));
}

#[test]
fn priors() {
    let net = Net::new(F32);
    let q = posterior(&net.vs);
    let build = |prior: Prior| good_ivon().prior(prior).build(&net.vs, 0.1);
    build(Prior::from(&q)).unwrap();

    let unknown = |name: &str| name != "second.bias";
    refused(build(q.select(unknown).unwrap().into()), &["`second.bias`", "prior", "elsewhere"]);
    build(Prior::from(q.select(unknown).unwrap()).elsewhere(0.1)).unwrap();

    let replaced = |name: &str, shape: &[i64]| {
        let entry = |n: &str| {
            let [m, s] = [q.mean(n).unwrap(), q.precision(n).unwrap()];
            (n.to_owned(), m, s)
        };
        let mut entries: Vec<_> = q.names().filter(|n| *n != name).map(entry).collect();
        entries.push((name.to_owned(), wave_at(shape, 0.0, F32), wave_at(shape, 0.0, F32) + 2.0));
        DiagonalGaussian::new(entries).unwrap()
    };
    refused(build(replaced("third.bias", &[2]).into()), &["`third.bias`", "model does not", "select"]);
    refused(build(replaced("second.bias", &[3]).into()), &["`second.bias`", "[3]", "[2]"]);

    for x in [f64::NAN, -1.0, f64::INFINITY] {
        refused(build(Prior::isotropic(x)), &["prior precision", &format!("{x:?}")]);
        refused(build(Prior::from(&q).elsewhere(x)), &["elsewhere", &format!("{x:?}")]);
    }
    refused(Adam::default().prior(&q).build(&net.vs, 0.1), &["`ess` = not set", ".ess("]);
    refused(Sgd::default().prior(Prior::isotropic(1.0)).build(&net.vs, 0.1), &["`ess` = not set", ".ess("]);
    let opt = Adam::default().build(&net.vs, 0.1).unwrap();
    refused(opt.posterior(), &["`ess` = not set", ".ess("]);
    refused(
        Adam::default().ess(10.0).build(&net.vs, 0.1).unwrap().posterior(),
        &["`first.weight`", "precision", "step"],
    );

    // A configuration that the prior does not fit, later.
    let mut opt = Adam::default().ess(10.0).prior(&q).build(&net.vs, 0.1).unwrap();
    let before = Snapshot::of(&opt, &net.vs);
    refused(opt.configure(|_| Adam::default()), &["`ess` = not set", ".ess("]);
    assert_eq!(Snapshot::of(&opt, &net.vs), before);
    // Where the prior alone keeps the precision from zero.
    let flat = Prior::from(q.select(unknown).unwrap()).elsewhere(0.0);
    refused(good_von().hess_from_first_batch(true).prior(flat).build(&net.vs, 0.1), &["weight_decay + damping", "0.0"]);

    // A late variable that the prior does not know.
    let mut opt = build(Prior::from(&q)).unwrap();
    opt.step(|| net.losses()).unwrap();
    let before = Snapshot::of(&opt, &net.vs);
    let late = support::variable(&net.vs, "late", 0, &wave_at(&[2], 0.0, F32));
    refused(opt.step(|| net.losses()), &["`late`", "prior", "elsewhere"]);
    assert_eq!(Snapshot::of(&opt, &net.vs).file, before.file);
    assert_eq!(bits(&late), bits(&wave_at(&[2], 0.0, F32)));
}

#[test]
fn posteriors() {
    let mean = || wave_at(&[2], 0.0, F32);
    let precision = || mean() + 2.0;
    let make = |m: Tensor, s: Tensor| DiagonalGaussian::new([("w", m, s)]);
    let from = |x: &[f32]| Tensor::from_slice(x);
    refused(DiagonalGaussian::new(Vec::<(&str, Tensor, Tensor)>::new()), &["posterior", "no parameter"]);
    refused(DiagonalGaussian::new([("w", mean(), precision()), ("w", mean(), precision())]), &["`w`", "twice"]);
    refused(make(Tensor::from_slice(&[1_i64, 2]), precision()), &["`w`", "mean", "Int64", "f32 or f64"]);
    refused(make(Tensor::new(), precision()), &["`w`", "mean"]);
    refused(make(mean(), precision().to_kind(Kind::BFloat16)), &["`w`", "precision", "BFloat16"]);
    refused(make(mean(), precision().to_kind(Kind::Double)), &["`w`", "Double", "same"]);
    refused(make(mean(), precision().reshape([2, 1])), &["`w`", "[2, 1]", "same"]);
    refused(make(from(&[1.0, f32::NAN]), precision()), &["`w`", "mean", "NaN"]);
    refused(make(mean(), from(&[1.0, f32::INFINITY])), &["`w`", "precision", "inf"]);
    refused(make(mean(), from(&[1.0, 0.0])), &["`w`", "precision", "0e0"]);
    refused(make(mean(), from(&[1.0, -2.0])), &["`w`", "precision", "-2e0"]);

    let net = Net::new(F32);
    let q = make(mean(), precision()).unwrap();
    refused(q.perturb(&net.vs, 0), &["`w`", "model does not"]);
    refused(q.copy_mean_to(&net.vs), &["`w`", "model does not"]);
    let other_shape = DiagonalGaussian::new([("first.bias", mean(), precision())]).unwrap();
    let before: Vec<_> = net.weights.iter().map(bits).collect();
    refused(other_shape.copy_mean_to(&net.vs), &["`first.bias`", "[2]", "[5]"]);
    let known = posterior(&net.vs);
    refused(known.predict(&net.vs, 2, Tensor::new), &["posterior", "undefined"]);
    refused(known.predict_samples(&net.vs, 2, Tensor::new), &["posterior", "undefined"]);
    let mut examples = 3;
    let growing = || {
        examples += 1;
        Tensor::full([examples, 2], 0.5, (Kind::Float, Device::Cpu))
    };
    refused(known.predict(&net.vs, 2, growing), &["posterior", "[5, 2]", "[4, 2]"]);
    refused(q.temper(0.0), &["tau", "0.0"]);
    refused(q.temper(1e300), &["`w`", "precision", "0e0"]);
    refused(q.kl(&other_shape), &["`w`", "select"]);
    refused(tch_blr::combine::<tch_blr::DiagonalGaussian>(&[]), &["at least one"]);
    refused(tch_blr::combine(&[(1.0, &q), (f64::NAN, &q)]), &["weight", "NaN"]);
    refused(tch_blr::combine(&[(1.0, &q), (-2.0, &q)]), &["`w`", "2 of 2", "below 5e-1", "clamp_information"]);
    refused(tch_blr::combine(&[(0.0, &q), (-2.0, &q)]), &["a weight > 0"]);
    refused(tch_blr::clamp_information(&q, &other_shape), &["`w`", "select"]);
    assert_eq!(net.weights.iter().map(bits).collect::<Vec<_>>(), before);
}

/// A safetensors file taken apart.
struct File {
    tensors: BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>,
    description: Value,
}

impl File {
    fn read(path: &Path) -> Self {
        let bytes = fs::read(path).unwrap();
        let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
        let description = serde_json::from_str(&header.metadata().as_ref().unwrap()["tch_blr"]).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let tensors = file.iter().map(|(n, t)| (n.to_owned(), (t.dtype(), t.shape().to_vec(), t.data().to_vec())));
        File { tensors: tensors.collect(), description }
    }

    fn write(&self, path: &Path) {
        let views = self
            .tensors
            .iter()
            .map(|(name, (dtype, shape, data))| (name.clone(), TensorView::new(*dtype, shape.clone(), data).unwrap()));
        let metadata = HashMap::from([("tch_blr".to_owned(), self.description.to_string())]);
        fs::write(path, safetensors::serialize(views, Some(metadata)).unwrap()).unwrap();
    }
}

/// The bytes of a safetensors file with this header and `data` bytes behind it.
fn raw(header: &Value, data: usize) -> Vec<u8> {
    let header = header.to_string();
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.resize(bytes.len() + data, 0);
    bytes
}

type Change = Box<dyn Fn(&mut File)>;

fn change(f: impl Fn(&mut File) + 'static) -> Change {
    Box::new(f)
}

/// Breaks a file in every way that does not depend on what it is for. `load` must fail, name the file, and say what is
/// listed in `changes`.
fn refuses_files<T: Debug>(
    good: &Path,
    tensor: &'static str,
    changes: Vec<(Change, &[&str])>,
    mut load: impl FnMut(&Path) -> Result<T, Error>,
) {
    let path = good.with_file_name("broken.safetensors");
    let mut refuse = |what: &str, parts: &[&str]| {
        let bytes = fs::read(&path).ok();
        let named = ["broken.safetensors"].iter().chain(parts).copied().collect::<Vec<_>>();
        println!("{what}:");
        refused(load(&path), &named);
        assert_eq!(fs::read(&path).ok(), bytes, "{what}: the file was changed");
    };
    refuse("no file", &["cannot be read"]);
    fs::create_dir(&path).unwrap();
    refuse("a directory", &["is a folder"]);
    fs::remove_dir(&path).unwrap();

    let whole = fs::read(good).unwrap();
    let header = 8 + u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    for n in [
        0,
        1,
        7,
        8,
        9,
        header / 2,
        header - 1,
        header,
        header + 1,
        usize::midpoint(header, whole.len()),
        whole.len() - 1,
    ] {
        fs::write(&path, &whole[..n]).unwrap();
        refuse(&format!("cut off after {n} bytes"), &["not a whole safetensors file"]);
    }
    let mut longer = whole.clone();
    longer.push(0);
    let mut huge_header = whole.clone();
    huge_header[..8].copy_from_slice(&(1u64 << 62).to_le_bytes());
    let mut full_header = whole.clone();
    full_header[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    let mut flipped = whole.clone();
    flipped[8] ^= 0x55;
    for (what, bytes) in [
        ("a byte too many", longer),
        ("a header of 2^62 bytes", huge_header),
        ("a header of 2^64-1 bytes", full_header),
        ("a header that is no JSON", flipped),
        ("text", b"a line of text, longer than eight bytes\n".to_vec()),
        ("zeros", vec![0; 4096]),
    ] {
        fs::write(&path, bytes).unwrap();
        refuse(what, &["not a whole safetensors file"]);
    }
    let entry = |shape: Value, offsets: [u64; 2]| json!({"dtype": "F32", "shape": shape, "data_offsets": offsets});
    for (what, a, b, data) in [
        ("overlapping tensors", entry(json!([2]), [0, 8]), entry(json!([2]), [4, 12]), 12),
        ("a hole", entry(json!([1]), [0, 4]), entry(json!([1]), [8, 12]), 12),
        ("offsets backwards", entry(json!([1]), [4, 0]), entry(json!([1]), [4, 8]), 8),
        ("offsets outside", entry(json!([1]), [0, 4]), entry(json!([1_u64 << 40]), [4, 4 + (1 << 42)]), 8),
        ("a huge shape", entry(json!([1_000_000_000_000_000_000_u64]), [0, 4]), entry(json!([1]), [4, 8]), 8),
        ("a shape that overflows", entry(json!([1_u64 << 62, 4]), [0, 4]), entry(json!([1]), [4, 8]), 8),
        ("a negative shape", entry(json!([-1]), [0, 4]), entry(json!([1]), [4, 8]), 8),
    ] {
        let description = File::read(good).description.to_string();
        let header = json!({"__metadata__": {"tch_blr": description}, tensor: a, "other": b});
        fs::write(&path, raw(&header, data)).unwrap();
        refuse(what, &["not a whole safetensors file"]);
    }
    // Nothing in it, but with a size that no tensor can have.
    let description = File::read(good).description.to_string();
    let empty = entry(json!([0, u64::MAX / 2 + 2]), [0, 0]);
    fs::write(&path, raw(&json!({"__metadata__": {"tch_blr": description}, tensor: empty}), 0)).unwrap();
    refuse("an impossible empty tensor", &[tensor, "cannot be made"]);

    let [missing, kind] = [["no tensor", tensor, ""], [tensor, "I32", "F32 or F64"]];
    let usual: Vec<(Change, &[&str])> = vec![
        (change(move |f| _ = f.tensors.remove(tensor)), &missing),
        (change(|f| _ = f.tensors.insert("surplus".to_owned(), (Dtype::F32, vec![1], vec![0; 4]))), &["surplus"]),
        (change(move |f| f.tensors.get_mut(tensor).unwrap().0 = Dtype::I32), &kind),
        (change(|f| f.description = json!("words")), &["description that cannot be read"]),
        (change(|f| f.description["content"]["unheard"] = json!(1)), &["description that cannot be read", "unheard"]),
        (change(|f| f.description["version"] = json!(99)), &["version 99", "version 1"]),
        (change(|f| _ = f.description.as_object_mut().unwrap().remove("version")), &["version"]),
    ];
    for (i, (change, parts)) in usual.into_iter().chain(changes).enumerate() {
        let mut file = File::read(good);
        change(&mut file);
        file.write(&path);
        refuse(&format!("change {i}"), parts);
    }
    // Somebody else's safetensors file.
    let foreign = entry(json!([1]), [0, 4]);
    fs::write(&path, raw(&json!({tensor: foreign}), 4)).unwrap();
    refuse("a foreign file", &["no description"]);
    fs::remove_file(&path).unwrap();
}

/// IVON whose checkpoint has every kind of entry: a prior with a mean for some parameters, and what was accumulated.
fn ivon_with_prior(net: &Net) -> Optimizer<Ivon> {
    let prior = Prior::from(posterior(&net.vs).select(|name| name != "first.bias").unwrap()).elsewhere(0.1);
    good_ivon().prior(prior).noise(Philox { seed: 1 }).build(&net.vs, 0.1).unwrap()
}

fn save_midway(net: &Net, path: &Path) -> Optimizer<Ivon> {
    let mut saved = ivon_with_prior(net);
    saved.step(|| net.losses()).unwrap();
    saved.accumulate(|| net.losses_of(0, 4)).unwrap();
    saved.save(path).unwrap();
    saved
}

#[test]
fn checkpoint_files() {
    let dir = tempfile::tempdir().unwrap();
    let good = dir.path().join("good.safetensors");
    let net = Net::new(F32);
    let saved = save_midway(&net, &good);

    let other = Net::starting_at(F32, 1.0);
    let mut opt = ivon_with_prior(&other);
    opt.step(|| other.losses()).unwrap();
    opt.accumulate(|| other.losses_of(3, 2)).unwrap();
    let before = Snapshot::of(&opt, &other.vs);
    let load = |opt: &mut Optimizer<Ivon>, path: &Path| {
        let result = opt.load(path);
        if result.is_err() {
            assert_eq!(Snapshot::of(opt, &other.vs), before);
        }
        result
    };

    let reshape = |name: &'static str, shape: &'static [usize]| {
        change(move |f| f.tensors.get_mut(name).unwrap().1 = shape.to_vec())
    };
    let widen = |name: &'static str| {
        change(move |f| {
            let t = f.tensors.get_mut(name).unwrap();
            *t = (Dtype::F64, t.1.clone(), vec![0; 2 * t.2.len()]);
        })
    };
    let parameter = |i: usize, key: &'static str, value: Value| {
        change(move |f| f.description["content"]["units"][i][key] = value.clone())
    };
    let content = |key: &'static str, value: Value| change(move |f| f.description["content"][key] = value.clone());
    let config =
        |key: &'static str, value: Value| change(move |f| f.description["content"]["config"][key] = value.clone());
    let remove = |name: &'static str| change(move |f| _ = f.tensors.remove(name));
    let changes: Vec<(Change, &[&str])> = vec![
        (reshape("mean.first.weight", &[5, 3]), &["mean.first.weight", "[5, 3]", "[3, 5]"]),
        (reshape("state.hess.second.bias", &[2, 1]), &["state.hess.second.bias", "[2, 1]", "[2]"]),
        (reshape("prior.precision.second.bias", &[1, 2]), &["prior.precision.second.bias", "[1, 2]", "[2]"]),
        (reshape("accumulated.gradient.second.bias", &[1, 2]), &["accumulated.gradient.second.bias", "[1, 2]"]),
        (widen("mean.second.bias"), &["mean.second.bias", "Double", "Float"]),
        (widen("accumulated.statistic.0.second.bias"), &["accumulated.statistic.0.second.bias", "Double", "Float"]),
        (remove("state.momentum.first.bias"), &["no tensor", "state.momentum.first.bias"]),
        (remove("prior.mean.second.bias"), &["no tensor", "prior.mean.second.bias"]),
        (remove("accumulated.statistic.0.first.bias"), &["no tensor", "accumulated.statistic.0.first.bias"]),
        (change(|f| f.description["form"] = json!("adam optimizer")), &["adam optimizer", "ivon optimizer"]),
        (content("lr", json!(-1.0)), &["`lr` = -1.0"]),
        (parameter(1, "lr", json!(-1.0)), &["`lr` = -1.0"]),
        (content("lr", json!("fast")), &["description that cannot be read", "fast"]),
        (config("ess", json!("many")), &["configuration", "many"]),
        (config("lr", json!(0.1)), &["configuration", "`lr`"]),
        (config("ess", Value::Null), &["`ess` = not set"]),
        (content("schedule", json!({"Step": {"every": 0, "factor": 0.5}})), &["schedule every"]),
        (content("clip", json!({"Norm": -1.0})), &["clip_grad_norm"]),
        (change(|f| f.description["content"]["accumulated"]["weight"] = json!(-1.0)), &["accumulated"]),
        (
            change(|f| _ = f.description["content"]["units"].as_array_mut().unwrap().pop()),
            &["no parameter `second.bias`"],
        ),
        (parameter(1, "parameters", json!(["first.offset"])), &["`first.offset`", "`first.bias`", "same model"]),
        (parameter(1, "prior", json!({"Isotropic": {"Delta": -1.0}})), &["elsewhere", "-1.0"]),
        (content("steps", json!(u64::MAX)), &["18446744073709551615 steps"]),
        (parameter(1, "statistics", json!(2)), &["first.bias", "2 statistics", "expected 1"]),
        (
            change(|f| f.description["content"]["accumulated"]["gradients"] = json!(["first.bias"])),
            &["belongs to nothing", "accumulated.gradient"],
        ),
        (parameter(1, "steps", json!(u64::MAX)), &["18446744073709551615 steps"]),
        (content("positions", json!({"first.bias": 1_u64 << 50})), &["position", "`first.bias`"]),
        (content("buffers", json!(["norm.running_mean"])), &["buffer `norm.running_mean`", "does not have"]),
        (change(|f| f.description["content"]["units"][1]["config"]["beta1"] = json!(1.0)), &["`beta1` = 1.0"]),
        (
            change(|f| {
                f.description["content"]["units"][1]["config"]["expectation"] = json!({"MonteCarlo": {"samples": 3}});
            }),
            &["first.bias", "evaluated"],
        ),
        (
            change(|f| {
                let all = f.description["content"]["units"].as_array_mut().unwrap();
                let mut fifth = all[0].clone();
                fifth["parameters"] = json!(["third.weight"]);
                all.push(fifth);
            }),
            &["`third.weight`", "model does not have"],
        ),
    ];
    refuses_files(&good, "mean.first.weight", changes, |path| load(&mut opt, path));

    opt.load(&good).unwrap();
    let [a, b] = [Snapshot::of(&opt, &other.vs), Snapshot::of(&saved, &net.vs)].map(Snapshot::values);
    assert_eq!(a, b);
}

/// Another row, another model, a posterior, another kind of weights.
#[test]
fn checkpoints_of_something_else() {
    let dir = tempfile::tempdir().unwrap();
    let good = dir.path().join("good.safetensors");
    let mut saved = save_midway(&Net::new(F32), &good);

    let other = Net::starting_at(F32, 1.0);
    let mut adam = Adam::default().build(&other.vs, 0.1).unwrap();
    let adam_before = Snapshot::of(&adam, &other.vs);
    refused(adam.load(&good), &["good.safetensors", "`ivon optimizer`", "`adam optimizer`"]);
    assert_eq!(Snapshot::of(&adam, &other.vs), adam_before);
    let problem = Separable::new(F32);
    let mut elsewhere = good_ivon().build(&problem.vs, 0.1).unwrap();
    let elsewhere_before = Snapshot::of(&elsewhere, &problem.vs);
    refused(elsewhere.load(&good), &["good.safetensors", "`first.weight`", "`a`"]);
    assert_eq!(Snapshot::of(&elsewhere, &problem.vs), elsewhere_before);
    let wide = Net::new(F64);
    refused(good_ivon().build(&wide.vs, 0.1).unwrap().load(&good), &["mean.first.weight", "Float", "Double"]);
    let posterior = dir.path().join("posterior.safetensors");
    saved.posterior().unwrap().save(&posterior).unwrap();
    refused(
        saved.load(&posterior),
        &["posterior.safetensors", "diagonal Gaussian posterior", "expected `ivon optimizer`"],
    );
}

#[test]
fn posterior_files() {
    let dir = tempfile::tempdir().unwrap();
    let good = dir.path().join("good.safetensors");
    let net = Net::new(F32);
    let q = posterior(&net.vs);
    q.save(&good).unwrap();
    let floats = |name: &'static str, x: f32| {
        change(move |f| f.tensors.get_mut(name).unwrap().2[..4].copy_from_slice(&x.to_le_bytes()))
    };
    let changes: Vec<(Change, &[&str])> = vec![
        (
            change(|f| f.description["form"] = json!("full gaussian")),
            &["`full gaussian`", "`diagonal Gaussian posterior`"],
        ),
        (change(|f| _ = f.tensors.remove("first.bias.precision")), &["no tensor", "first.bias.precision"]),
        (change(|f| f.tensors.get_mut("first.bias").unwrap().1 = vec![5, 1]), &["`first.bias`", "[5, 1]", "[5]"]),
        (change(|f| f.description["content"]["names"] = json!([])), &["first.bias"]),
        (change(|f| f.description["content"]["names"] = json!(["first.bias", "first.bias"])), &["first.bias"]),
        (floats("first.bias", f32::NAN), &["`first.bias`", "mean", "NaN"]),
        (floats("first.bias.precision", -1.0), &["`first.bias`", "precision", "-1e0"]),
        (floats("first.bias.precision", f32::INFINITY), &["`first.bias`", "precision", "inf"]),
    ];
    refuses_files(&good, "first.weight", changes, |path| DiagonalGaussian::load(path));

    let checkpoint = dir.path().join("checkpoint.safetensors");
    good_ivon().build(&net.vs, 0.1).unwrap().save(&checkpoint).unwrap();
    refused(
        DiagonalGaussian::load(&checkpoint),
        &["checkpoint.safetensors", "ivon optimizer", "expected `diagonal Gaussian posterior`"],
    );
    let loaded = DiagonalGaussian::load(&good).unwrap();
    assert!(loaded.names().eq(q.names()));
    for name in q.names() {
        assert_eq!(bits(&loaded.mean(name).unwrap()), bits(&q.mean(name).unwrap()));
        assert_eq!(bits(&loaded.precision(name).unwrap()), bits(&q.precision(name).unwrap()));
    }
}

#[test]
fn places_that_cannot_be_written() {
    let dir = tempfile::tempdir().unwrap();
    let net = Net::new(F32);
    let opt = good_ivon().build(&net.vs, 0.1).unwrap();
    let q = opt.posterior().unwrap();
    let folder = dir.path().join("folder");
    fs::create_dir(&folder).unwrap();
    for (path, parts) in [
        (folder.clone(), ["folder", "cannot be written"]),
        (dir.path().join("missing/run"), ["missing/run", "cannot be written"]),
        (Path::new("/").to_owned(), ["/", "names no file"]),
    ] {
        refused(opt.save(&path), &parts);
        refused(q.save(&path), &parts);
    }
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "a draft was left behind");
    assert_eq!(fs::read_dir(&folder).unwrap().count(), 0);
}

/// A graph that was recorded at other weights would give a wrong gradient without a word.
#[test]
fn graphs_recorded_at_other_weights() {
    for kind in [Kind::Float, Kind::BFloat16] {
        let net = Net::new((kind, Device::Cpu));
        let (here, there) = (net.losses(), net.losses());
        let mut adam = Adam::default().build(&net.vs, 0.1).unwrap();
        adam.backward_step(&here).unwrap();
        let before = Snapshot::of(&adam, &net.vs);
        refused(adam.backward_step(&there), &["libtorch", "modified by an inplace operation"]);
        assert_eq!(Snapshot::of(&adam, &net.vs), before);
    }
    let net = Net::new(F32);
    let mut ivon = good_ivon().build(&net.vs, 0.1).unwrap();
    let before = Snapshot::of(&ivon, &net.vs);
    // At the mean, handed to a row that needs it at a sample.
    let loss = net.losses();
    refused(ivon.step(|| loss.shallow_clone()), &["libtorch", "modified by an inplace operation"]);
    assert_eq!(Snapshot::of(&ivon, &net.vs), before);
    // At a sample that is gone.
    let evaluation = ivon.perturbed().unwrap();
    let loss = net.losses().mean(None::<Kind>);
    drop(evaluation);
    let weights: Vec<&Tensor> = net.weights.iter().collect();
    refused(
        Tensor::f_run_backward(&[&loss], &weights, false, false).map_err(Error::from),
        &["modified by an inplace operation"],
    );
}

/// The closure itself makes the weights such that they cannot be updated.
#[test]
fn closures_that_convert_the_model() {
    let mut net = Net::new(F32);
    let mut opt = Sgd::default().build(&net.vs, 0.1).unwrap();
    opt.accumulate(|| net.losses()).unwrap();
    let before = Snapshot::of(&opt, &net.vs).file;
    let loss = net.losses();
    let mut convert = |kind| net.vs.set_kind(kind);
    refused(
        opt.step(|| {
            convert(Kind::Double);
            loss.shallow_clone()
        }),
        &["`first.weight`", "Double", "build the optimizer afterwards"],
    );
    convert(Kind::Float);
    assert_eq!(Snapshot::of(&opt, &net.vs).file, before);
}

/// Also of variables that come after building: none is stepped twice, and nothing has changed.
#[test]
fn parameters_that_share_memory() {
    let vs = VarStore::new(Device::Cpu);
    let w = vs.root().randn_standard("w", &[3, 2]);
    let mut opt = Ivon::default().ess(10.0).build(&vs, 0.1).unwrap();
    opt.step(|| w.square().sum(Kind::Float)).unwrap();
    let before = w.copy();
    let tied = w.tr().detach().set_requires_grad(true);
    // A variable of another store, which tch cannot make otherwise.
    let other = VarStore::new(Device::Cpu);
    _ = other.root().zeros("other", &[1]);
    let mut variable = other.variables_.lock().unwrap().trainable_variables.pop().unwrap();
    variable.tensor = tied.shallow_clone();
    {
        let mut variables = vs.variables_.lock().unwrap();
        variables.named_variables.insert("tied".to_owned(), tied.shallow_clone());
        variables.trainable_variables.push(variable);
    }
    for _ in 0..2 {
        refused(opt.step(|| w.matmul(&tied).square().sum(Kind::Float)), &["`w`", "`tied`", "in the forward pass"]);
    }
    assert!(w.equal(&before) && opt.steps() == 1);
    refused(Adam::default().build(&vs, 0.1), &["`w`", "`tied`"]);
    let row = Tensor::ones([1, 2], (Kind::Float, Device::Cpu)).expand([3, 2], false).set_requires_grad(true);
    refused(Params::named([("row", row)]), &["`row`", "expand"]);
}

/// A row that has no adversarial point refuses one on every way in: at its mean, Price's statistic would be zero and
/// the precision that of the prior.
#[test]
fn an_expectation_that_a_row_cannot_have() {
    fn check<R: Row>(good: R, to: impl Fn(R, Expectation) -> R + Send + Copy + 'static) {
        println!("{}", R::NAME);
        let net = Net::of(Form::Tapped, F64, 0.0);
        for bad in [Expectation::Adversarial { sampled: false }, Expectation::Adversarial { sampled: true }] {
            let build = |row: R| row.builder().noise(Philox { seed: 1 }).build(&net.vs, 0.1);
            refused(build(to(good, bad)), &["expectation"]);
            let named = good.builder().named(|name| name == "first.bias", move |c| to(c, bad));
            refused(named.build(&net.vs, 0.1), &[]);
            let mut opt = build(good).unwrap();
            opt.step(|| net.losses()).unwrap();
            refused(opt.configure(|c| to(c, bad)), &[]);
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("run");
            opt.save(&path).unwrap();
            let mut file = File::read(&path);
            let row = serde_json::to_value(to(good, bad)).unwrap();
            let content = &mut file.description["content"];
            content["config"] = row.clone();
            content["units"].as_array_mut().unwrap().iter_mut().for_each(|unit| unit["config"] = row.clone());
            file.write(&path);
            let before = Snapshot::of(&opt, &net.vs);
            refused(opt.load(&path), &["run", "expectation"]);
            assert_eq!(Snapshot::of(&opt, &net.vs), before);
            opt.step(|| net.losses()).unwrap();
        }
    }
    check(good_ivon(), Ivon::expectation);
    check(good_von().hessian(Statistic::Price), Von::expectation);
    check(good_von(), Von::expectation);
    check(Vadam::default().ess(10.0), Vadam::expectation);
    check(Evon::default().ess(10.0), Evon::expectation);
    check(FullVon::default().ess(10.0), FullVon::expectation);
    check(FullVon::default().ess(10.0).hessian(Statistic::Hessian), FullVon::expectation);
    check(NoisyKfac::default().ess(10.0), NoisyKfac::expectation);
    check(BayesBiNN::default().ess(10.0), BayesBiNN::expectation);
}

/// Labels of -1 and 1 are no probabilities, wherever a Bernoulli likelihood takes targets.
#[test]
fn targets_outside_of_zero_and_one() {
    const BERNOULLI: Likelihood = Likelihood::Bernoulli;
    let vs = support::store(F64);
    let w = support::variable(&vs, "w", 0, &wave_at(&[2], 0.4, F64));
    let x = wave_at(&[4, 2], 0.7, F64);
    let forward = |x: &Tensor| x.mv(&w);
    let q = DiagonalGaussian::new([("w", w.detach(), w.detach().ones_like())]).unwrap();
    let params = Params::from(&vs);
    let all = |y: &Tensor| -> Vec<Result<(), Error>> {
        let memory = || Memory::new(&x, BERNOULLI).targets(y);
        let batches = || [(x.shallow_clone(), y.shallow_clone())];
        let ones = Tensor::ones([4, 1], (Kind::Double, Device::Cpu));
        let fisher = Fisher::observed().likelihood(BERNOULLI);
        vec![
            tch_blr::nn::binary_cross_entropy(&forward(&x), y).map(|_| ()),
            Replay::new(memory()).and_then(|r| Past::new().with(r).value(&params, forward)).map(|_| ()),
            LabelNoise::of(memory(), forward).map(|_| ()),
            memory().gradient_norm(forward).map(|_| ()),
            memory().weight_gradient_norm(&vs, forward).map(|_| ()),
            memory().sensitivity(&q, &vs, forward).map(|_| ()),
            Sensitivity::new(BERNOULLI, &forward(&x), y, &ones).map(|_| ()),
            Sensitivity::of(&q, &vs, batches(), BERNOULLI, forward).map(|_| ()),
            Removal::of(&vs, batches(), BERNOULLI, forward).map(|_| ()),
            DualView::new(&x, y, &w.detach(), BERNOULLI, 1.0).map(|_| ()),
            fisher.diagonal(&vs, batches(), forward).map(|_| ()),
        ]
    };
    for bad in [[-1.0, 1.0, 1.0, -1.0], [0.0, 1.0, 1.5, 0.5], [0.0, f64::NAN, 1.0, 0.0]] {
        for (i, result) in all(&Tensor::from_slice(&bad)).into_iter().enumerate() {
            println!("{i}");
            refused(result, &["from 0 to 1"]);
        }
    }
    for good in [[0.0, 1.0, 1.0, 0.0], [0.3, 1.0, 0.0, 0.9]] {
        for result in all(&Tensor::from_slice(&good)) {
            result.unwrap();
        }
    }
}

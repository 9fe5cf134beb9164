//! What adapters of low rank promise, and what is done with a posterior over them: at another scale, under the prior
//! that is closest to it.

use support::{F32, F64, all_close, assert_close, bits, close, largest, randn, refused, store, values, wave};
use tch::nn::{LinearConfig, Module, VarStore};
use tch::{Kind, Tensor};
use tch_blr::merge::{FileModel, Method, merge_files};
use tch_blr::nn::{self, LoraConfig, LoraLinear, lora_linear};
use tch_blr::{DiagonalGaussian, Ivon, Philox, Prior, Von, metrics};

const CONFIG: LoraConfig = LoraConfig { rank: 2, alpha: 6.0 };

/// A linear layer `[3, 5]` at numbers that are always the same, an adapter of it, and the two stores.
struct Adapted {
    base: VarStore,
    layer: nn::Linear,
    adapters: VarStore,
    lora: LoraLinear,
}

impl Adapted {
    fn new((base, adapters): (support::Place, support::Place)) -> Adapted {
        let (base, adapters) = (store(base), store(adapters));
        let layer = nn::linear(base.root() / "layer", 5, 3, LinearConfig::default());
        put(&layer.ws, &wave(&[3, 5], 0.1));
        put(layer.bs.as_ref().unwrap(), &wave(&[3], 0.7));
        let adapted = lora_linear(adapters.root() / "layer", &layer, CONFIG).unwrap();
        put(&adapted.a.ws, &wave(&[2, 5], 1.3));
        Adapted { base, layer, adapters, lora: adapted }
    }

    /// With a B that is not zero.
    fn moved() -> Adapted {
        let all = Adapted::new((F64, F64));
        put(&all.lora.b.ws, &wave(&[3, 2], 2.1));
        all
    }

    fn posterior(&self, precision: f64) -> DiagonalGaussian {
        let [a, b] = [&self.lora.a, &self.lora.b].map(|factor| factor.ws.detach());
        let (sa, sb) = (a.full_like(precision), b.full_like(2.0 * precision));
        DiagonalGaussian::new([("layer.lora_A.weight", a, sa), ("layer.lora_B.weight", b, sb)]).unwrap()
    }
}

fn put(variable: &Tensor, value: &Tensor) {
    tch::no_grad(|| variable.shallow_clone().copy_(value));
}

fn inputs() -> Tensor {
    wave(&[7, 5], 0.4)
}

#[test]
fn an_adapted_layer_is_its_base_until_b_moves() {
    let Adapted { layer, lora: adapted, .. } = Adapted::new((F64, F64));
    let x = inputs();
    assert_eq!(bits(&adapted.forward(&x)), bits(&layer.forward(&x)));
    put(&adapted.b.ws, &wave(&[3, 2], 2.1));
    let low = x.matmul(&adapted.a.ws.tr()).matmul(&adapted.b.ws.tr());
    assert_close(&adapted.forward(&x), &(layer.forward(&x) + low * 3.0), 1e-14);
    assert_close(&adapted.forward(&x.get(0)), &adapted.forward(&x).get(0), 1e-14);
    assert_eq!(adapted.scale(), 3.0);
}

#[test]
fn a_merged_layer_is_a_copy_of_the_adapted_one() {
    let Adapted { layer, lora: adapted, .. } = Adapted::moved();
    let merged = adapted.merged().unwrap();
    assert_close(&merged.forward(&inputs()), &adapted.forward(&inputs()), 1e-14);
    assert_close(&(&merged.ws - &layer.ws), &adapted.delta().unwrap(), 1e-14);
    let before = bits(&merged.forward(&inputs()));
    for t in [&layer.ws, layer.bs.as_ref().unwrap(), &adapted.b.ws] {
        put(t, &t.zeros_like());
    }
    assert_eq!(bits(&merged.forward(&inputs())), before);
    assert!(!merged.ws.requires_grad());
}

#[test]
fn both_crates_layers_are_bases_with_bias_or_without() {
    let (base, adapters) = (store(F64), store(F64));
    let c = LinearConfig { bias: false, ..Default::default() };
    let theirs = tch::nn::linear(base.root() / "tch", 5, 3, c);
    let adapted = lora_linear(adapters.root() / "tch", &theirs, CONFIG).unwrap();
    assert_eq!(adapted.forward(&inputs()), theirs.forward(&inputs()));
    let owned = nn::Linear { ws: wave(&[3, 5], 0.0), bs: None };
    assert_eq!(lora_linear(adapters.root() / "own", owned, CONFIG).unwrap().merged().unwrap().ws, wave(&[3, 5], 0.0));
}

#[test]
fn a_starts_uniform_within_the_root_of_the_inputs() {
    let _turn = support::seeded(3);
    let (base, adapters) = (store(F32), store(F32));
    let layer = nn::linear(base.root(), 400, 100, LinearConfig::default());
    let a = lora_linear(adapters.root(), &layer, LoraConfig { rank: 50, alpha: 1.0 }).unwrap().a.ws;
    let bound = 1.0 / 20.0;
    assert!(largest(&a) <= bound);
    // 20,000 draws: the standard error of their mean square is that of (uniform)², √(4/45)/√20000 of a third.
    let square = a.square().mean(Kind::Double).double_value(&[]) / (bound * bound / 3.0);
    close(square, 1.0, 5.0 * 3.0 * (4.0f64 / 45.0 / 20000.0).sqrt());
}

/// Trains the factors and nothing else, whether the base was frozen or not.
#[test]
fn the_base_is_bit_identical_after_training() {
    for frozen in [true, false] {
        let Adapted { mut base, layer, adapters, lora: adapted } = Adapted::new((F32, F32));
        if frozen {
            base.freeze();
        }
        let all = || [&layer.ws, layer.bs.as_ref().unwrap()].map(bits);
        let before = all();
        let x = inputs().to_kind(Kind::Float);
        let y = x.argmax(1, false).clamp_max(2);
        let loss = || adapted.forward(&x).cross_entropy_for_logits(&y);
        let ivon = Ivon::default().ess(50.0).hess_init(0.5).noise(Philox { seed: 1 });
        let mut opt = ivon.build(&adapters, 0.1).unwrap();
        let first = loss().double_value(&[]);
        for _ in 0..100 {
            opt.step(loss).unwrap();
        }
        assert!(loss().double_value(&[]) < 0.8 * first);
        assert_eq!(all(), before);
        assert!(!layer.ws.grad().defined(), "a gradient of the base was computed");

        // r·(in + out) weights, and neither the posterior nor its file knows the base.
        let q = opt.posterior().unwrap();
        assert_eq!(q.names().collect::<Vec<_>>(), ["layer.lora_A.weight", "layer.lora_B.weight"]);
        assert_eq!(q.len(), 2 * (5 + 3));
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("q.safetensors");
        q.save(&path).unwrap();
        let file = Tensor::read_safetensors(&path).unwrap();
        assert!(file.iter().all(|(name, _)| name.contains("lora_")), "{file:?}");
    }
}

#[test]
fn a_base_of_bfloat16_has_factors_of_f32() {
    let half = (Kind::BFloat16, tch::Device::Cpu);
    let Adapted { adapters, lora: adapted, .. } = Adapted::new((half, F32));
    put(&adapted.b.ws, &wave(&[3, 2], 2.1));
    let x = inputs().to_kind(Kind::BFloat16);
    let z = adapted.forward(&x);
    assert_eq!((z.kind(), adapted.a.ws.kind()), (Kind::BFloat16, Kind::Float));
    // Each of base, product and sum is rounded to 8 binary digits.
    let exact = Adapted::moved();
    assert_close(&z, &exact.lora.forward(&inputs()), 3.0 / 256.0);
    let merged = adapted.merged().unwrap();
    assert_eq!(merged.ws.kind(), Kind::BFloat16);
    assert_close(&merged.ws, &exact.lora.merged().unwrap().ws, 1.0 / 128.0);
    let mut opt = Ivon::default().ess(50.0).noise(Philox { seed: 1 }).build(&adapters, 0.1).unwrap();
    opt.step(|| adapted.forward(&x).to_kind(Kind::Float).square().mean(Kind::Float)).unwrap();
    assert_eq!(opt.posterior().unwrap().mean("layer.lora_B.weight").unwrap().kind(), Kind::Float);
}

/// The factors are layers that record, so that per-example squares are those of a layer written out by hand, whose
/// parameters take a backward pass for every example.
#[test]
fn per_example_curvature_reaches_the_factors() {
    let of = |by_hand: bool| {
        let all = Adapted::moved();
        let (x, y) = (inputs(), inputs().argmax(1, false).clamp_max(2));
        let mut opt = Von::ogn().ess(7.0).build(&all.adapters, 0.1).unwrap();
        let hand = || {
            let low = x.matmul(&all.lora.a.ws.tr()).matmul(&all.lora.b.ws.tr());
            x.linear(&all.layer.ws.detach(), all.layer.bs.as_ref().map(Tensor::detach).as_ref()) + low * 3.0
        };
        for _ in 0..3 {
            opt.step(|| {
                let z = if by_hand { hand() } else { all.lora.forward(&x) };
                nn::cross_entropy(&z, &y).unwrap()
            })
            .unwrap();
        }
        let q = opt.posterior().unwrap();
        ["layer.lora_A.weight", "layer.lora_B.weight"].map(|name| (q.mean(name).unwrap(), q.precision(name).unwrap()))
    };
    for ((m, s), (hand_m, hand_s)) in of(false).iter().zip(&of(true)) {
        assert_close(m, hand_m, 1e-12);
        assert_close(s, hand_s, 1e-12);
    }
}

/// A moves only through B: at the mean of the start its gradient is zero, and a noisy row does not wait for B.
#[test]
fn at_the_start_only_samples_have_a_gradient_of_a() {
    let all = Adapted::new((F64, F64));
    let gradient = || {
        let loss = all.lora.forward(&inputs()).square().mean(Kind::Double);
        let found = Tensor::run_backward(&[loss], &[&all.lora.a.ws, &all.lora.b.ws], false, false);
        (largest(&found[0]), largest(&found[1]))
    };
    let (a, b) = gradient();
    assert!(a == 0.0 && b > 0.1, "{a} {b}");
    let guard = all.posterior(1e4).perturb(&all.adapters, 0).unwrap();
    assert!(gradient().0 > 1e-3);
    drop(guard);
    assert_eq!(gradient(), (a, b));
}

/// Mean and variance of ΔW = (α/r) B A for independent factors, against 4,000 samples: every one of the 15 elements
/// within five standard errors, those of the variance from the fourth moment of the samples.
#[test]
fn noise_of_the_factors_is_noise_of_the_weight() {
    const SAMPLES: u64 = 4000;
    for moved in [true, false] {
        let all = if moved { Adapted::moved() } else { Adapted::new((F64, F64)) };
        let q = all.posterior(10.0);
        let (a, b) = (all.lora.a.ws.detach(), all.lora.b.ws.detach());
        let (va, vb) = (a.full_like(1.0 / 10.0), b.full_like(1.0 / 20.0));
        let expected = (vb.matmul(&(a.square() + &va)) + b.square().matmul(&va)) * 9.0;

        let change = |k| {
            let _guard = q.perturb(&all.adapters, k).unwrap();
            all.lora.delta().unwrap()
        };
        let samples = Tensor::stack(&(0..SAMPLES).map(change).collect::<Vec<_>>(), 0);
        let mean = samples.mean_dim(0, false, Kind::Double);
        let centred = samples - &mean;
        let variance = centred.square().mean_dim(0, false, Kind::Double);
        let n = SAMPLES as f64;
        let standard = |x: Tensor, error: Tensor| largest(&(x / (error / n).sqrt()));
        assert!(standard(mean - all.lora.delta().unwrap(), variance.shallow_clone()) < 5.0);
        let fourth = centred.square().square().mean_dim(0, false, Kind::Double) - variance.square();
        assert!(standard(variance - expected, fourth) < 5.0);
    }
}

/// The scale between the factors is no part of the function, but the diagonal posterior has it: neither a density nor
/// an average survives its change.
#[test]
fn factors_on_another_scale_are_the_same_layer_at_another_point() {
    let all = Adapted::moved();
    let q = all.posterior(10.0);
    let (a, b) = (all.lora.a.ws.copy(), all.lora.b.ws.copy());
    let (z, delta) = (all.lora.forward(&inputs()), all.lora.delta().unwrap());
    let density = q.log_prob(&all.adapters).unwrap();
    put(&all.lora.a.ws, &(&a * 2.0));
    put(&all.lora.b.ws, &(&b / 2.0));
    assert_eq!(all.lora.delta().unwrap(), delta);
    assert_close(&all.lora.forward(&inputs()), &z, 1e-15);
    assert!(q.log_prob(&all.adapters).unwrap() < density - 10.0);
    // The average of two equal layers, by factors: (1 + 2)/2 · (1 + ½)/2.
    put(&all.lora.a.ws, &(&a * 1.5));
    put(&all.lora.b.ws, &(&b * 0.75));
    assert_close(&all.lora.delta().unwrap(), &(delta * 1.125), 1e-15);
}

#[test]
fn what_cannot_be_adapted_is_refused_and_nothing_is_created() {
    let adapters = store(F64);
    let ws = || wave(&[3, 5], 0.0);
    let base = |ws, bs| nn::Linear { ws, bs };
    let make = |base: nn::Linear, rank, alpha| lora_linear(adapters.root() / "q", base, LoraConfig { rank, alpha });
    for rank in [0, -1, 4] {
        refused(make(base(ws(), None), rank, 1.0), &["`rank`", &rank.to_string(), "[3, 5]", "1 to the smaller"]);
    }
    for alpha in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        refused(make(base(ws(), None), 1, alpha), &["`alpha`", "a finite number > 0"]);
    }
    refused(make(base(wave(&[3, 5, 1], 0.0), None), 1, 1.0), &["`q`", "[3, 5, 1]", "a matrix"]);
    refused(make(base(wave(&[3], 0.0), None), 1, 1.0), &["`q`", "a matrix"]);
    refused(make(base(ws().to_kind(Kind::Int8), None), 1, 1.0), &["`q`", "Int8", "floats"]);
    refused(make(base(ws(), Some(wave(&[5], 0.0))), 1, 1.0), &["`q`", "[5]", "expected [3]"]);
    refused(make(base(wave(&[0, 5], 0.0), None), 1, 1.0), &["`rank`", "[0, 5]"]);
    refused(lora_linear(adapters.root(), base(wave(&[3], 0.0), None), CONFIG), &["`weight`"]);
    refused(make(base(ws(), Some(wave(&[3], 0.0).to_kind(Kind::Float))), 1, 1.0), &["`q`", "Float", "Double"]);
    assert!(adapters.is_empty());
    // Factors of one path twice: the second would be `lora_A.weight__2` for everybody.
    make(base(ws(), None), 1, 1.0).unwrap();
    refused(make(base(ws(), None), 1, 1.0), &["`q`", "already"]);
    assert_eq!(adapters.len(), 2);
}

/// What the store saves is an adapter for programs that merge files, and the merged file is the merged layer.
#[test]
fn a_saved_store_is_an_adapter_for_files() {
    let all = Adapted::moved();
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    all.base.save(at("base.safetensors")).unwrap();
    all.adapters.save(at("adapter_model.safetensors")).unwrap();
    let model = FileModel::new(at("base.safetensors"));
    let model = model.adapter(at("adapter_model.safetensors")).alpha(CONFIG.alpha);
    merge_files(Method::linear(), None, &[model], at("merged.safetensors"), &mut |_, _| ()).unwrap();
    let mut other = store(F64);
    let layer = nn::linear(other.root() / "layer", 5, 3, LinearConfig::default());
    other.load(at("merged.safetensors")).unwrap();
    let merged = all.lora.merged().unwrap();
    assert_close(&layer.ws, &merged.ws, 1e-15);
    assert_eq!(bits(layer.bs.as_ref().unwrap()), bits(merged.bs.as_ref().unwrap()));
}

/// Samples at t times the ess: the same noise, 1/√t of its size; in the limit the mean, and its predictions.
#[test]
fn at_a_large_test_time_scale_predictions_are_those_of_the_mean() {
    let all = Adapted::moved();
    let q = all.posterior(10.0);
    let off = |t: f64| {
        let at = q.temper(1.0 / t).unwrap().sample(3).unwrap();
        let each = at.into_iter().map(|(name, w)| (w - q.mean(&name).unwrap()).flatten(0, -1));
        Tensor::cat(&each.collect::<Vec<_>>(), 0)
    };
    assert_close(&off(4.0), &(off(1.0) * 0.5), 1e-13);
    assert_close(&off(0.25), &(off(1.0) * 2.0), 1e-13);
    let probabilities = || all.lora.forward(&inputs()).softmax(-1, Kind::Double);
    let mean = tch::no_grad(probabilities);
    let difference = |t: f64| {
        let p = q.temper(1.0 / t).unwrap().predict(&all.adapters, 8, probabilities).unwrap().mean;
        largest(&(p - &mean))
    };
    // σ is 0.3 at t = 1; what it does to probabilities is of its order.
    assert!(difference(1.0) > 1e-2 && difference(1e20) < 1e-9);
    refused(q.temper(1.0 / f64::INFINITY), &["`tau`"]);
}

/// KL(q ‖ N(0, 1/p)) in u = ln p has the slope ½(c eᵘ - P), so that its central difference over ±ε is P ε²/6 of
/// relative order ε² at the minimum.
#[test]
fn the_closest_prior_has_the_least_divergence() {
    let (m, s) = (wave(&[4, 3], 0.2), wave(&[4, 3], 1.0).exp() * 3.0);
    let bias = (randn(&[5], 1) * 0.1, randn(&[5], 2).exp() * 50.0);
    let q = DiagonalGaussian::new([("w", m, s), ("b", bias.0, bias.1)]).unwrap();
    let [w, b] = [12.0, 5.0];
    let [(_, of_w), (_, of_b)] = &q.prior_precisions(None).unwrap()[..] else { panic!() };
    close(q.prior_precision(None).unwrap(), (w + b) / (w / of_w + b / of_b), 1e-12);
    for (name, p) in q.prior_precisions(None).unwrap() {
        let q = q.select(|n| n == name).unwrap();
        let mean = q.mean(&name).unwrap();
        let kl = |p: f64| {
            let prior = DiagonalGaussian::new([(name.as_str(), mean.zeros_like(), mean.full_like(p))]).unwrap();
            q.kl(&prior).unwrap()
        };
        let epsilon: f64 = 1e-3;
        let slope = (kl(p * epsilon.exp()) - kl(p * (-epsilon).exp())) / (2.0 * epsilon);
        close(slope, 0.0, 1e-6 * q.len() as f64);
        assert!(kl(p) < kl(p * 1.1) && kl(p) < kl(p / 1.1));
        // MacKay's fixed point.
        let gamma = q.len() as f64 - p * q.variance(&name).unwrap().sum(Kind::Double).double_value(&[]);
        close(gamma / mean.square().sum(Kind::Double).double_value(&[]) / p, 1.0, 1e-12);
    }
}

#[test]
fn a_block_without_data_agrees_with_whatever_it_is_up_to_the_bound() {
    let flat = |s: f64| DiagonalGaussian::new([("w", Tensor::zeros([6], F64), Tensor::full([6], s, F64))]).unwrap();
    let precision = |q: &DiagonalGaussian, largest: Option<f64>| q.prior_precisions(largest).unwrap()[0].1;
    close(precision(&flat(7.0), None), 7.0, 1e-14);
    close(precision(&flat(1e12), None), 1e8, 0.0);
    close(precision(&flat(7.0), Some(2.0)), 2.0, 0.0);
    for bad in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        refused(flat(7.0).prior_precisions(bad), &["`largest`", "> 0"]);
        refused(Prior::closest_to(&flat(7.0), bad), &["`largest`"]);
    }
    let empty = DiagonalGaussian::new([("none", Tensor::zeros([0], F64), Tensor::zeros([0], F64))]).unwrap();
    close(precision(&empty, None), 1e8, 0.0);
}

/// As the prior of an optimizer it is the isotropic one of each parameter.
#[test]
fn the_closest_prior_is_a_prior_of_each_parameter() {
    let all = Adapted::moved();
    let q = all.posterior(10.0);
    let prior = Prior::closest_to(&q, None).unwrap();
    let opt = Ivon::default().ess(5.0).prior(prior).build(&all.adapters, 0.1).unwrap();
    let start = opt.posterior().unwrap();
    for (name, p) in q.prior_precisions(None).unwrap() {
        // Without a step, the posterior of IVON has the precision of its prior.
        let s = values(&start.precision(&name).unwrap());
        all_close(&s, &vec![p; s.len()], 1e-12 * p);
    }
}

/// A whole use: adapted, narrowed, and scored.
#[test]
fn an_adapted_network_learns_what_its_base_does_not_know() {
    let _turn = support::seeded(5);
    let (base, adapters) = (store(F32), store(F32));
    let c = LinearConfig::default();
    let [hidden, out] = [("hidden", 4, 16), ("out", 16, 3)].map(|(name, i, o)| nn::linear(base.root() / name, i, o, c));
    let adapt = |name: &str, layer: &nn::Linear| lora_linear(adapters.root() / name, layer, CONFIG).unwrap();
    let (first, second) = (adapt("hidden", &hidden), adapt("out", &out));
    let net = |x: &Tensor| second.forward(&first.forward(x).tanh());
    let x = Tensor::randn([200, 4], F32);
    let y = x.narrow(1, 0, 3).argmax(1, false);
    let mut opt = Ivon::auto(200.0, 300).noise(Philox { seed: 2 }).build(&adapters, 0.03).unwrap();
    for _ in 0..300 {
        opt.step(|| net(&x).cross_entropy_for_logits(&y)).unwrap();
    }
    let q = opt.posterior().unwrap();
    assert_eq!(q.len(), 2 * (4 + 16) + 2 * (16 + 3));
    let p = q.predict(&adapters, 16, || net(&x).softmax(-1, Kind::Float)).unwrap();
    assert!(metrics::accuracy(&p.mean, &y).unwrap() > 0.85);
}

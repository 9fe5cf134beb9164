//! Networks with a head for each task, and with classes of one head that a task does not use: what the posterior and the
//! prior of IVON are there.

use support::values;
use tch::nn::{LinearConfig, Module, VarStore};
use tch::{Device, Kind, Tensor};
use tch_blr::nn::{self, Linear};
use tch_blr::{Ivon, Optimizer, Philox, Prior};

const N: f64 = 200.0;
const H0: f64 = 0.1;
const BETA2: f64 = 0.99;
const DELTA: f64 = 1e-2;
const STEPS: u32 = 40;

struct Net {
    vs: VarStore,
    trunk: Linear,
    heads: Vec<Linear>,
}

impl Net {
    fn new(heads: i64, outputs: i64) -> Net {
        let vs = VarStore::new(Device::Cpu);
        tch::manual_seed(1);
        let layer = |name: String, from, to| nn::linear(vs.root() / name, from, to, LinearConfig::default());
        let trunk = layer("trunk".to_owned(), 3, 4);
        let heads = (0..heads).map(|t| layer(format!("head{t}"), 4, outputs)).collect();
        Net { vs, trunk, heads }
    }

    fn logits(&self, t: usize, x: &Tensor) -> Tensor {
        self.heads[t].forward(&self.trunk.forward(x).relu())
    }
}

fn data(seed: i64) -> (Tensor, Tensor) {
    tch::manual_seed(seed);
    let x = Tensor::randn([N as i64, 3], (Kind::Float, Device::Cpu));
    let y = x.select(1, 0).ge(0.0).to_kind(Kind::Int64);
    (x, y)
}

fn rule() -> Ivon {
    Ivon::default().ess(N).hess_init(H0).beta2(BETA2).weight_decay(DELTA)
}

fn train(opt: &mut Optimizer<Ivon>, loss: impl Fn() -> Tensor) {
    for _ in 0..STEPS {
        opt.step(&loss).unwrap();
    }
}

/// Two tasks with three heads. In the second task the first head is unused and known to the prior, the second is used and
/// new, the third unused and new.
#[test]
fn heads_have_their_own_priors() {
    let net = Net::new(3, 2);
    let mut first = rule().builder().noise(Philox { seed: 0 }).build(&net.vs, 0.1).unwrap();
    let (x, y) = data(2);
    train(&mut first, || net.logits(0, &x).cross_entropy_for_logits(&y));
    let q = first.posterior().unwrap();
    // No loss has depended on the other heads: they have what they started with.
    for name in ["head1.weight", "head2.bias"] {
        assert!(values(&q.precision(name).unwrap()).iter().all(|s| *s as f32 == (N * (H0 + DELTA)) as f32), "{name}");
    }
    assert!(values(&q.precision("head0.weight").unwrap()).iter().all(|s| *s as f32 != (N * (H0 + DELTA)) as f32));
    let seen = q.select(|name| name.starts_with("trunk.") || name.starts_with("head0.")).unwrap();

    // All of them have to have a prior.
    let refused = rule().builder().prior(&seen).build(&net.vs, 0.1).unwrap_err().to_string();
    assert!(refused.contains("head1") && refused.contains("elsewhere"), "{refused}");
    let prior = Prior::from(&seen).elsewhere(DELTA);
    let mut second = rule().builder().prior(prior).noise(Philox { seed: 1 }).build(&net.vs, 0.1).unwrap();

    // Before the first step q is the prior where that came from a posterior (h starts at 0); to a rounding of f32, for N
    // divides it and multiplies it again.
    let near = |a: &[f64], b: &[f64]| a.iter().zip(b).all(|(a, b)| (a - b).abs() <= 2e-7 * b.abs());
    let start = second.posterior().unwrap();
    for name in seen.names() {
        assert!(near(&values(&start.precision(name).unwrap()), &values(&q.precision(name).unwrap())), "{name}");
    }
    let (x, y) = data(3);
    train(&mut second, || net.logits(1, &x).cross_entropy_for_logits(&y));
    let end = second.posterior().unwrap();
    for name in ["head0.weight", "head0.bias"] {
        // Through the whole task the unused head is its prior: not a bit moved.
        assert_eq!(values(&end.precision(name).unwrap()), values(&start.precision(name).unwrap()), "{name}");
        assert_eq!(values(&end.mean(name).unwrap()), values(&q.mean(name).unwrap()), "{name}");
    }
    for name in ["head2.weight", "head2.bias"] {
        // Not used yet: the start, whose part h₀ is not of the prior. It is left out of what is handed on.
        assert_eq!(values(&end.precision(name).unwrap()), values(&start.precision(name).unwrap()), "{name}");
    }
    for name in ["trunk.weight", "head1.weight"] {
        assert_ne!(values(&end.precision(name).unwrap()), values(&start.precision(name).unwrap()), "{name}");
    }
    let seen = end.select(|name| !name.starts_with("head2.")).unwrap();
    let third = rule().builder().prior(Prior::from(&seen).elsewhere(DELTA)).build(&net.vs, 0.1).unwrap();
    // h₀ again, around the isotropic prior Nδ: nothing of two tasks is left in the head that they did not use.
    let fresh = third.posterior().unwrap();
    assert!(values(&fresh.precision("head2.weight").unwrap()).iter().all(|s| *s as f32 == (N * (H0 + DELTA)) as f32));
}

/// One head with the softmax over two of its four classes. The rows of the others have gradients that are zero, not
/// absent: IVON takes f = 0 for a measurement, and h decays from h₀ as h ← h - rh + ½r²h²/(h+δ). What it hands on as prior
/// for those rows is neither h₀ nor the prior, and their weights are pulled to zero.
#[test]
fn masked_classes_of_one_head_decay() {
    let net = Net::new(1, 4);
    let before = values(&net.heads[0].ws);
    let mut opt = rule().builder().noise(Philox { seed: 0 }).build(&net.vs, 0.1).unwrap();
    let (x, y) = data(2);
    train(&mut opt, || net.logits(0, &x).narrow(1, 0, 2).cross_entropy_for_logits(&y));
    let r = 1.0 - BETA2;
    let h = (0..STEPS).fold(H0, |h, _| h - r * h + 0.5 * r * r * h * h / (h + DELTA));
    let q = opt.posterior().unwrap();
    let unused = values(&q.precision("head0.weight").unwrap().narrow(0, 2, 2));
    for s in &unused {
        // h is f32 and its rounding adds up over the steps.
        assert!((s / (N * (h + DELTA)) - 1.0).abs() < 1e-5, "{s}");
        let h = s / N - DELTA;
        assert!(h < 0.7 * H0 && h > DELTA, "{h}");
    }
    let after = values(&net.heads[0].ws);
    for (after, before) in after[8..].iter().zip(&before[8..]) {
        assert!(after.abs() < before.abs() && after * before > 0.0);
    }
}

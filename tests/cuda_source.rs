//! Every pass over weights, printed as CUDA C++ and compiled for the CPU, gives the bits that it has there: of every row
//! with every setting, in every kind of number, at lengths that fill no block.
//!
//! With `TCH_BLR_CUDA_SOURCES` set to a folder, the sources are written there for `scripts/check_cuda_source.py`.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::Path;
use support::rows::{self, Case};
use support::{F32, F64, Form, Place, store, variable, wave_at};
use tch::nn::VarStore;
use tch::{Device, Kind, Tensor};
use tch_blr::rule::{DeltaRule, MaybePosterior, NoPosterior, Real, Row, Rule, Site, Start, Weights, When};
use tch_blr::{
    Adam, Expectation, Ivon, Optimizer, Sam, Sgd, Train, Von, clamp_information, combine, emulation, fisher, nn,
};

const BF16: Place = (Kind::BFloat16, Device::Cpu);
const F16: Place = (Kind::Half, Device::Cpu);

/// Losses ℓᵢ = ½ Σ mean (w - tᵢ)² over variables of lengths around those of groups, blocks and pieces.
struct Ragged {
    vs: VarStore,
    weights: Vec<Tensor>,
}

const SHAPES: [&[i64]; 9] = [&[1], &[63], &[8, 8], &[5, 13], &[0], &[17, 241], &[70_000], &[64], &[31]];

impl Ragged {
    /// The last variable is frozen, the last but one in another group.
    fn new(place: Place) -> Self {
        let vs = store(place);
        let make = |(i, shape): (usize, &&[i64])| {
            variable(&vs, &format!("w{i}"), i / 7 % 2, &(wave_at(shape, i as f64, place) * 0.7))
        };
        let weights: Vec<Tensor> = SHAPES.iter().enumerate().map(make).collect();
        _ = weights[SHAPES.len() - 1].set_requires_grad(false);
        Ragged { vs, weights }
    }

    fn losses(&self) -> Tensor {
        let one = |w: &Tensor, i: i64| {
            let kind = if w.kind() == Kind::Double { Kind::Double } else { Kind::Float };
            let target = wave_at(&w.size(), i as f64, (kind, Device::Cpu)) * 1.5;
            (w.to_kind(kind) - target).square().mean(None::<Kind>) * 0.5
        };
        let example =
            |i| self.weights.iter().filter(|w| w.numel() > 0).map(|w| one(w, i)).reduce(|a, b| a + b).unwrap();
        Tensor::stack(&[example(0), example(1), example(2)], 0)
    }
}

/// Runs `f` with every pass computed twice. It must have some; or, if `blocks`, sums of squares.
fn compared(name: &str, blocks: bool, f: impl FnOnce()) {
    let before = emulation::compared();
    emulation::compare(f);
    let after = emulation::compared();
    assert!(after.0 > before.0 || (blocks && after.1 > before.1), "{name}: no pass was compared");
    if let Some(folder) = std::env::var_os("TCH_BLR_CUDA_SOURCES") {
        let folder = Path::new(&folder);
        std::fs::write(folder.join("options"), emulation::options().join(" ") + "\n").unwrap();
        for source in emulation::sources() {
            let mut hasher = DefaultHasher::new();
            source.hash(&mut hasher);
            std::fs::write(folder.join(format!("{name}-{:016x}.cu", hasher.finish())), source).unwrap();
        }
    }
}

fn rows_passes<R: Row>(name: &str, case: &Case<R>) {
    let lr = case.lr;
    for place in [F64, F32, BF16, F16] {
        if case.form == Form::Tapped {
            // Precisions of whole blocks: not of 70,000 weights.
            let net = case.net(place);
            let opt = case.builder(&net.vs).build(&net.vs, lr).unwrap();
            compared(name, true, || after_steps(opt, || net.losses()));
        } else {
            let model = Ragged::new(place);
            let opt = case.builder(&model.vs).build(&model.vs, lr).unwrap();
            compared(name, false, || after_steps(opt, || model.losses()));
        }
    }
}

/// Steps, and whatever else has a pass: a posterior and its samples.
fn after_steps<R: Row>(mut opt: Optimizer<R>, losses: impl Fn() -> Tensor) {
    for _ in 0..3 {
        opt.step(&losses).unwrap();
    }
    // In two parts, so that sums of gradients are formed.
    opt.accumulate(&losses).unwrap();
    opt.accumulate(&losses).unwrap();
    opt.update().unwrap();
    opt.diagnostics().unwrap();
    if R::Posterior::EXISTS && opt.config().effective_sample_size().is_some() {
        Train::posterior(&opt).unwrap().sample(3).unwrap();
    }
}

macro_rules! every {
    ($($row:ident)*) => {
        $(#[test]
        fn $row() {
            rows_passes(stringify!($row), &rows::$row());
        })*
    };
}
support::rows_of_weights!(every);
support::rows_of_all_weights!(every);
support::rows_of_binary_weights!(every);

/// What rows can be set to beside their cases: other expectations, numbers and tensors for priors.
#[test]
fn settings() {
    for place in [F64, F32] {
        let model = Ragged::new(place);
        let steps = |builder: tch_blr::Builder<Ivon>| {
            after_steps(builder.noise(tch_blr::Philox { seed: 5 }).build(&model.vs, 0.05).unwrap(), || model.losses());
        };
        compared("settings", false, || {
            let ivon = || Ivon::default().ess(1e3).hess_init(0.5).weight_decay(0.1);
            steps(ivon().samples(3).builder());
            steps(ivon().expectation(Expectation::Antithetic { pairs: 2 }).builder());
            steps(ivon().builder().prior(tch_blr::Prior::isotropic(30.0)));
            steps(ivon().builder().prior(rows::posterior(&model.vs)).clip_grad_value(0.1).clip_grad_norm(0.1));
            steps(ivon().builder().check_finite(false));
            let sam = Sam::default().rho(0.1).momentum(0.9).builder().build(&model.vs, 0.1).unwrap();
            after_steps(sam, || model.losses());
            let von = Von::vogn().ess(1e3).builder().prior(rows::posterior(&model.vs)).build(&model.vs, 0.1).unwrap();
            after_steps(von, || model.losses());
            let sgd = Sgd::default().builder().named(|n| n == "w1", |c: Sgd| c.momentum(0.5)).build(&model.vs, 0.1);
            after_steps(sgd.unwrap(), || model.losses());
        });
    }
}

#[test]
fn posteriors_and_curvature() {
    for place in [F64, F32, BF16] {
        let model = Ragged::new(place);
        compared("posterior", false, || {
            let mut opt = Ivon::default().ess(1e3).hess_init(0.5).build(&model.vs, 0.05).unwrap();
            opt.step(|| model.losses()).unwrap();
            let q = opt.posterior().unwrap();
            q.predict(&model.vs, 4, || model.losses().softmax(-1, Kind::Float).reshape([1, 3])).unwrap();
            drop(q.perturb(&model.vs, 2).unwrap());
            q.copy_mean_to(&model.vs).unwrap();
            let prior = rows::posterior(&model.vs);
            let names: Vec<&str> = q.names().collect();
            assert!(!names.is_empty());
            combine(&[(1.0, &q), (0.5, &q)]).unwrap();
            _ = clamp_information(&q, &prior);
        });
    }
    compared("fisher", false, || {
        let vs = store(F32);
        let layer = nn::Linear {
            ws: variable(&vs, "w", 0, &wave_at(&[3, 70], 0.1, F32)),
            bs: Some(variable(&vs, "b", 0, &wave_at(&[3], 0.2, F32))),
        };
        let x = wave_at(&[9, 70], 0.3, F32);
        fisher::Fisher::sampled(7).diagonal(&vs, [&x], |x| tch::nn::Module::forward(&layer, x)).unwrap();
    });
}

/// A row of a user's, as in the documentation of [`Rule`].
#[derive(Debug, Clone, Copy, serde::Serialize, serde::Deserialize)]
struct Limited {
    largest: f64,
}

impl Row for Limited {
    const NAME: &'static str = "limited";
    const STATE: &'static [&'static str] = &["distance"];
    type Arithmetic = Weights;
    type Posterior = NoPosterior;
    fn validate(&self) -> tch_blr::Result<()> {
        Ok(())
    }
}

impl Rule for Limited {
    type State<T: Real> = [T; 1];
    type Coefficients<T: Real> = [T; 2];

    fn initial(&self, _: Start) -> [f64; 1] {
        [0.0]
    }
    fn coefficients(&self, when: When) -> [f64; 2] {
        [when.lr, self.largest]
    }
    fn update<T: Real>(&self, [lr, largest]: [T; 2], x: Site<T>, [d]: [T; 1]) -> (T, [T; 1]) {
        let step = lr * x.gradient.min(largest).max(-largest);
        (x.mean - step.tanh() * T::real(1.0 / 3.0), [d + step.abs().sqrt()])
    }
}
impl DeltaRule for Limited {}

#[test]
fn a_users_rule() {
    for place in [F64, F32, BF16, F16] {
        let model = Ragged::new(place);
        compared("limited", false, || {
            after_steps(Limited { largest: 1e-4 }.builder().build(&model.vs, 0.5).unwrap(), || model.losses());
        });
    }
}

/// A pass takes one launch, whatever the number of tensors.
#[test]
fn launches_do_not_grow_with_the_number_of_tensors() {
    let launches = |tensors: usize, place: Place| {
        let vs = store(place);
        let all: Vec<Tensor> = (0..tensors)
            .map(|i| variable(&vs, &format!("w{i}"), 0, &wave_at(&[1 + i as i64 % 7], i as f64, place)))
            .collect();
        let loss = || Tensor::cat(&all, 0).square().mean(Kind::Float);
        emulation::emulate(|| {
            let mut opt = Ivon::default().ess(1e3).build(&vs, 0.1).unwrap();
            opt.step(loss).unwrap();
            let before = emulation::launches();
            opt.step(loss).unwrap();
            emulation::launches() - before
        })
    };
    // Perturbation, two of the check, update.
    for place in [F32, BF16] {
        assert_eq!([launches(62, place), launches(1000, place)], [4, 4], "{place:?}");
    }
}

/// All that may happen between steps. Each time: mean and state, bit by bit.
fn eventful(expectation: Expectation, place: Place) -> Vec<Vec<u8>> {
    let file = tempfile::NamedTempFile::new().unwrap();
    let model = Ragged::new(place);
    let mut opt = (Ivon::default().ess(1e3).hess_init(0.5).weight_decay(0.1).expectation(expectation).builder())
        .noise(tch_blr::Philox { seed: 5 })
        .build(&model.vs, 0.05)
        .unwrap();
    let mut path = Vec::new();
    for event in 0..8 {
        let mut w = model.weights[5].shallow_clone();
        match event {
            1 => opt.set_lr(0.02).unwrap(),
            2 => opt.configure(|row| row.ess(500.0)).unwrap(),
            3 => _ = tch::no_grad(|| w.fill_(0.25)),
            4 => _ = w.set_requires_grad(false),
            5 => opt.save(file.path()).unwrap(),
            6 => {
                _ = w.set_requires_grad(true);
                opt.accumulate(|| model.losses()).unwrap();
            }
            7 => opt.load(file.path()).unwrap(),
            _ => {}
        }
        opt.step(|| model.losses()).unwrap();
        path.extend(model.weights.iter().map(support::bits));
        path.extend((0..8).filter_map(|i| Some(support::bits(&opt.state(&format!("w{i}"), "hess")?))));
    }
    path
}

#[test]
fn whatever_happens_between_steps_gives_the_same_bits() {
    for (place, expectation) in [F64, F32, BF16].into_iter().flat_map(|place| {
        [Expectation::MonteCarlo { samples: 2 }, Expectation::Antithetic { pairs: 1 }].map(|e| (place, e))
    }) {
        let lanes = eventful(expectation, place);
        assert_eq!(lanes.len(), 8 * (9 + 8), "{place:?}");
        assert!(lanes == emulation::emulate(|| eventful(expectation, place)), "{place:?} {expectation:?}");
    }
}

/// By kernels alone a row goes where it goes by lanes.
#[test]
fn a_run_by_kernels_is_the_run_by_lanes() {
    let run = || {
        let model = Ragged::new(F32);
        let mut opt = Adam::default().weight_decay(1e-3).build(&model.vs, 0.02).unwrap();
        for _ in 0..5 {
            opt.step(|| model.losses()).unwrap();
        }
        model.weights.iter().map(support::bits).collect::<Vec<_>>()
    };
    let before = emulation::launches();
    assert_eq!(run(), emulation::emulate(run));
    assert!(emulation::launches() > before);
}

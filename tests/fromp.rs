//! FROMP: kernels, penalties and what is refused.

use support::{F64, all_close, chirp, close, values};
use tch::nn::{LinearConfig, Module, VarStore};
use tch::{Device, Kind, Tensor};
use tch_blr::continual::{Fromp, Kernel, Memory, Model, Past, Quadratic, Regularizer};
use tch_blr::fisher::Fisher;
use tch_blr::nn::{self, Likelihood};
use tch_blr::{DiagonalGaussian, Error, Params, Prior};

const JITTER: f64 = 1e-3;

fn set(vs: &VarStore, phase: f64) {
    for (i, mut w) in vs.trainable_variables().into_iter().enumerate() {
        tch::no_grad(|| w.copy_(&chirp(&w.size(), i as f64 + phase)));
    }
}

/// A network in f64 whose weights are tapped where `tapped`, and used directly for a scale of its hidden units.
struct Net {
    vs: VarStore,
    layers: [Box<dyn Module>; 2],
    scale: Tensor,
}

impl Net {
    fn new(outputs: i64, tapped: bool) -> Net {
        let mut vs = VarStore::new(Device::Cpu);
        let layers = [("first", 3, 5), ("second", 5, outputs)].map(|(name, from, to)| -> Box<dyn Module> {
            let at = vs.root() / name;
            if tapped {
                Box::new(nn::linear(at, from, to, LinearConfig::default()))
            } else {
                Box::new(tch::nn::linear(at, from, to, LinearConfig::default()))
            }
        });
        let scale = vs.root().ones("scale", &[5]);
        vs.set_kind(Kind::Double);
        set(&vs, 0.0);
        Net { vs, layers, scale }
    }

    fn forward(&self, x: &Tensor) -> Tensor {
        let hidden = self.layers[0].forward(x).tanh() * &self.scale;
        self.layers[1].forward(&hidden)
    }

    fn params(&self) -> Params {
        Params::from(&self.vs)
    }

    /// Precisions of every size.
    fn posterior(&self) -> DiagonalGaussian {
        let params = self.vs.variables().into_iter();
        let entry = |(name, w): (String, Tensor)| {
            let s = chirp(&w.size(), name.len() as f64).exp() * 3.0;
            (name, w.detach().copy(), s)
        };
        DiagonalGaussian::new(params.map(entry)).unwrap()
    }

    fn memory(likelihood: Likelihood) -> Memory {
        Memory::new(&chirp(&[6, 3], 0.4), likelihood)
    }
}

/// P `[M, C]` by the definitions.
fn probabilities(f: &Tensor, likelihood: Likelihood) -> Tensor {
    match likelihood {
        Likelihood::Categorical => f.softmax(1, Kind::Double),
        Likelihood::Bernoulli => f.sigmoid(),
        _ => f.shallow_clone(),
    }
}

/// J_c diag(v) J_cᵀ with the Jacobian of P_c by one backward pass per example and class, in f64.
fn explicit(net: &Net, q: &DiagonalGaussian, p: &Tensor) -> Vec<Tensor> {
    let [m, classes] = p.size()[..] else { panic!("{p:?}") };
    let row = |i, c| {
        let mut parts = Vec::new();
        for name in q.names() {
            let w = &net.vs.variables()[name];
            let g = &Tensor::run_backward(&[p.get(i).get(c)], &[w], true, false)[0];
            parts.push((g * q.variance(name).unwrap().sqrt()).reshape([-1]));
        }
        Tensor::cat(&parts, 0)
    };
    let kernel = |c| {
        let j = Tensor::stack(&(0..m).map(|i| row(i, c)).collect::<Vec<_>>(), 0);
        j.matmul(&j.tr())
    };
    (0..classes).map(kernel).collect()
}

fn cases() -> Vec<(Likelihood, i64, Option<Vec<i64>>)> {
    vec![
        (Likelihood::Categorical, 4, None),
        (Likelihood::Categorical, 4, Some(vec![3, 1])),
        (Likelihood::Bernoulli, 1, None),
        (Likelihood::Bernoulli, 2, None),
        (Likelihood::Gaussian { variance: 0.5 }, 2, None),
    ]
}

#[test]
fn kernels_are_those_of_explicit_jacobians() {
    for (likelihood, outputs, labels) in cases() {
        for tapped in [true, false] {
            let net = Net::new(outputs, tapped);
            let (q, params) = (net.posterior(), net.params());
            let mut memory = Net::memory(likelihood);
            let mut f = net.forward(memory.inputs());
            if let Some(labels) = &labels {
                memory = memory.active(labels);
                f = f.index_select(1, &Tensor::from_slice(labels));
            }
            let expected = explicit(&net, &q, &probabilities(&f, likelihood));
            let of = |kernel: Kernel| Fromp::kernel(&params, &kernel, &memory, |x| net.forward(x)).unwrap();
            let full = of(Kernel::Full { q: &q, jitter: JITTER });
            let diagonal = of(Kernel::Diagonal { q: &q, jitter: JITTER });
            for (c, k) in expected.iter().enumerate() {
                let k = k + Tensor::eye(6, F64) * JITTER;
                all_close(&values(&full.get(c as i64)), &values(&k), 1e-14);
                all_close(&values(&diagonal.get(c as i64)), &values(&k.diag(0)), 1e-14);
            }
            assert_eq!(full.size()[0], expected.len() as i64);
        }
    }
}

/// K(θ) by its definition at other weights than those of the kernels, and its gradient by central differences.
#[test]
fn values_and_gradients_are_those_of_the_definition() {
    for (likelihood, outputs, labels) in cases() {
        let net = Net::new(outputs, true);
        let (q, params) = (net.posterior(), net.params());
        let mut memories = vec![Net::memory(likelihood), Memory::new(&chirp(&[4, 3], 0.9), likelihood)];
        if let Some(labels) = &labels {
            memories[0] = memories[0].shallow_clone().active(labels);
        }
        let predict = |s: usize| {
            let f = net.forward(memories[s].inputs());
            let labels = labels.as_ref().filter(|_| s == 0);
            let f = labels.map_or_else(|| f.shallow_clone(), |l| f.index_select(1, &Tensor::from_slice(l)));
            probabilities(&f, likelihood)
        };
        let old = [predict(0), predict(1)].map(|p| p.detach());
        let all = [explicit(&net, &q, &predict(0)), explicit(&net, &q, &predict(1))];
        for form in 0..3 {
            let kernel =
                [Kernel::Full { q: &q, jitter: JITTER }, Kernel::Diagonal { q: &q, jitter: JITTER }, Kernel::Identity]
                    [form];
            set(&net.vs, 0.0);
            let past = Fromp::new(&params, &kernel, &memories, |x| net.forward(x)).unwrap().scaled(3.0).unwrap();
            let value = || past.value(&Model { params: &params, forward: &|x| Ok(net.forward(x)) }).unwrap();
            assert_eq!(value().double_value(&[]), 0.0);
            set(&net.vs, 0.1);
            let mut expected = 0.0;
            for s in 0..2 {
                let d = predict(s) - &old[s];
                for (c, k) in all[s].iter().enumerate() {
                    let d = d.select(1, c as i64);
                    let k = k + Tensor::eye(d.size()[0], F64) * JITTER;
                    let inverse = [k.inverse(), k.diag(0).reciprocal().diag(0), Tensor::eye(d.size()[0], F64)];
                    expected += 1.5 * d.dot(&inverse[form].mv(&d)).double_value(&[]);
                }
            }
            close(value().double_value(&[]), expected, 1e-11 * expected);

            let leaves = net.vs.trainable_variables();
            let gradients = Tensor::run_backward(&[value()], &leaves, false, false);
            for (w, g) in leaves.iter().zip(gradients) {
                let flat = w.detach().reshape([-1]);
                for j in [0, w.numel() as i64 - 1] {
                    let mut at = flat.get(j);
                    let mut moved = |by: f64| {
                        at += by;
                        let moved = value().double_value(&[]);
                        at -= by;
                        moved
                    };
                    let h = 1e-6;
                    let slope = (moved(h) - moved(-h)) / (2.0 * h);
                    close(g.reshape([-1]).double_value(&[j]), slope, 1e-6 * expected);
                }
            }
        }
    }
}

/// f = Xw with a Gaussian likelihood and a memory that determines w: Xᵀ(XVXᵀ + εI)⁻¹X = (V + ε(XᵀX)⁻¹)⁻¹, which without ε
/// is the precision F + δ of the posterior.
#[test]
fn on_a_linear_model_it_is_the_quadratic_of_the_posterior() {
    let mut vs = VarStore::new(Device::Cpu);
    let net = nn::linear(vs.root(), 3, 1, LinearConfig { bias: false, ..Default::default() });
    vs.set_kind(Kind::Double);
    set(&vs, 0.0);
    let params = Params::from(&vs);
    let (x, likelihood) = (chirp(&[7, 3], 0.4), Likelihood::Gaussian { variance: 1.0 });
    let fisher = Fisher::exact().likelihood(likelihood).diagonal(&vs, [&x], |x| net.forward(x)).unwrap();
    let q = fisher.laplace(Prior::isotropic(0.5)).unwrap();
    let jitter = 1e-9;
    let memory = Memory::new(&x, likelihood);
    let fromp = Fromp::new(&params, &Kernel::Full { q: &q, jitter }, [&memory], |x| net.forward(x)).unwrap();
    let quadratic = Quadratic::from(&q);
    for phase in [0.3, 1.0, 2.0] {
        set(&vs, phase);
        let model = Model { params: &params, forward: &|x| Ok(net.forward(x)) };
        let [ours, weights] = [&fromp as &dyn Regularizer, &quadratic].map(|r| r.value(&model).unwrap());
        let expected = weights.double_value(&[]);
        close(ours.double_value(&[]), expected, 1e-6 * expected);
        let gradient = |k: &Tensor| values(&Tensor::run_backward(&[k], &vs.trainable_variables(), false, false)[0]);
        all_close(&gradient(&ours), &gradient(&weights), 1e-5 * expected);
        // With a jitter that is not small, the precision is that of V + ε(XᵀX)⁻¹.
        let jitter = 0.3;
        let v = q.variance("weight").unwrap().reshape([-1]).diag(0);
        let d = (&net.ws - q.mean("weight").unwrap()).reshape([-1]);
        let precision = (v + x.tr().matmul(&x).inverse() * jitter).inverse();
        let expected = 0.5 * d.dot(&precision.mv(&d)).double_value(&[]);
        set(&vs, 0.0);
        let fromp = Fromp::new(&params, &Kernel::Full { q: &q, jitter }, [&memory], |x| net.forward(x)).unwrap();
        set(&vs, phase);
        close(fromp.value(&model).unwrap().double_value(&[]), expected, 1e-12 * expected);
    }
}

/// In f32, with variances of 1e5 and a jitter 1e-11 of the largest eigenvalue, as in the published settings.
#[test]
fn kernels_of_f32_networks_stay_positive_definite() {
    let vs = VarStore::new(Device::Cpu);
    tch::manual_seed(0);
    let net = nn::linear(vs.root(), 4, 3, LinearConfig::default());
    let params = Params::from(&vs);
    let q = DiagonalGaussian::new(
        vs.variables().into_iter().map(|(name, w)| (name, w.detach().copy(), w.detach().full_like(1e-5))),
    )
    .unwrap();
    // Forty examples, of which only five directions of the weights see anything: K has rank 5.
    let memory = Memory::new(&Tensor::randn([40, 4], (Kind::Float, Device::Cpu)), Likelihood::Categorical);
    let past = Past::new()
        .with(Fromp::new(&params, &Kernel::Full { q: &q, jitter: 1e-6 }, [&memory], |x| net.forward(x)).unwrap());
    tch::no_grad(|| _ = net.ws.shallow_clone().g_add_scalar_(1e-3));
    assert!(past.value(&params, |x| net.forward(x)).unwrap().isfinite().int64_value(&[]) == 1);
}

#[test]
fn what_does_not_fit_is_refused() {
    let net = Net::new(4, true);
    let (q, params) = (net.posterior(), net.params());
    let full = Kernel::Full { q: &q, jitter: JITTER };
    let memory = || Net::memory(Likelihood::Categorical);
    let with = |kernel: &Kernel, memory: &Memory| Fromp::new(&params, kernel, [memory], |x| net.forward(x));
    let says = |e: Error, part: &str| assert!(e.to_string().contains(part), "{e}");

    let none: [&Memory; 0] = [];
    let zero = Fromp::new(&params, &full, none, |x| net.forward(x)).unwrap();
    assert_eq!(Past::new().with(zero).value(&params, |x| net.forward(x)).unwrap().double_value(&[]), 0.0);

    let empty = memory().select(&[]).unwrap();
    for (e, part) in [
        (with(&full, &empty).unwrap_err(), "empty"),
        (with(&Kernel::Identity, &empty).unwrap_err(), "empty"),
        (with(&full, &memory().active(&[1, 4])).unwrap_err(), "label 4"),
        (
            with(&full, &Memory::new(&(chirp(&[6, 3], 0.4) * f64::NAN), Likelihood::Categorical)).unwrap_err(),
            "not finite",
        ),
        (Fromp::kernel(&params, &Kernel::Identity, &memory(), |x| net.forward(x)).unwrap_err(), "identity"),
    ] {
        assert!(matches!(e, Error::Memory(_) | Error::Likelihood(_)), "{e:?}");
        says(e, part);
    }
    for jitter in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        for kernel in [Kernel::Full { q: &q, jitter }, Kernel::Diagonal { q: &q, jitter }] {
            assert!(matches!(with(&kernel, &memory()), Err(Error::HyperParameter { name: "jitter", .. })));
        }
    }
    for w in [-1.0, f64::NAN] {
        assert!(with(&full, &memory()).unwrap().scaled(w).is_err());
    }

    // A posterior without a parameter that has a part in the outputs, or with another shape of it.
    let lacking = q.select(|name| name != "first.weight").unwrap();
    let e = with(&Kernel::Full { q: &lacking, jitter: JITTER }, &memory()).unwrap_err();
    assert!(matches!(&e, Error::Parameter { name, .. } if name == "first.weight"), "{e}");
    let other = Net::new(3, true).posterior();
    let e = with(&Kernel::Diagonal { q: &other, jitter: JITTER }, &memory()).unwrap_err();
    says(e, "shape");
    // Variances that overflow.
    let wide = DiagonalGaussian::new(q.names().map(|name| {
        let m = q.mean(name).unwrap();
        (name.to_owned(), m.copy(), m.full_like(1e-308))
    }));
    let wide = wide.unwrap();
    for kernel in [Kernel::Full { q: &wide, jitter: JITTER }, Kernel::Diagonal { q: &wide, jitter: JITTER }] {
        if let Err(e) = with(&kernel, &memory()) {
            assert!(matches!(e, Error::NotPositiveDefinite { .. }), "{e}");
        }
    }

    // Another network than that of the kernels.
    let past = with(&full, &memory()).unwrap();
    let wider = Net::new(5, true);
    let e = past.value(&Model { params: &wider.params(), forward: &|x| Ok(wider.forward(x)) }).unwrap_err();
    assert!(matches!(e, Error::Memory(_)), "{e:?}");
    says(e, "[6, 5]");
    // Heads that the memory's labels leave out may be unknown to the posterior only if they have no part in its outputs.
    let head = net.vs.root().ones("head", &[2]).to_kind(Kind::Double);
    assert!(with(&full, &memory()).is_ok(), "{head:?}");
}

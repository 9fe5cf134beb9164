//! MAML: an initialization from which a gradient step or two learn a new task.
//!
//! ```text
//! inner   θ′ = θ - α ∇L_train(θ)                       once for each task, from a few examples
//! outer   min over θ of the mean over tasks of L_test(θ′),      ∇ = (I - α ∇²L_train(θ)) ∇L_test(θ′)
//! ```
//!
//! The outer loss is an ordinary loss with a graph through the inner step (`create_graph`), so every optimizer of this
//! crate takes it; with a variational one, here IVON, θ is a distribution over initializations.
//!
//! Source: Finn, Abbeel and Levine (2017), *Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks*, section
//! 2.2 and the sinusoids of section 5.1.

use super::{Finding, Setting};
use crate::Outcome;
use crate::pictures::{Curves, training_curves};
use crate::random::Rng;
use std::f64::consts::PI;
use tch::nn::{Init, VarStore};
use tch::{Device, Kind, Tensor};
use tch_blr::rule::Row;
use tch_blr::{Adam, Ivon, Optimizer};

/// θ′ after so many gradient steps of size α on a loss; the graph goes through them.
pub fn adapt(
    weights: &[Tensor],
    loss: impl Fn(&[Tensor]) -> Tensor,
    alpha: f64,
    steps: usize,
) -> Result<Vec<Tensor>, tch::TchError> {
    let mut adapted: Vec<Tensor> = weights.iter().map(Tensor::shallow_clone).collect();
    for _ in 0..steps {
        let gradients = Tensor::f_run_backward(&[loss(&adapted)], &adapted, true, true)?;
        adapted = adapted.iter().zip(gradients).map(|(w, g)| w - g * alpha).collect();
    }
    Ok(adapted)
}

/// Functions y = a sin(x + φ), a in [0.1, 5], φ in [0, π], x in [-5, 5].
#[derive(Debug)]
pub struct Sinusoids {
    /// a and φ `[T, 1, 1]`
    amplitude: Tensor,
    phase: Tensor,
}

impl Sinusoids {
    /// This many of them, at random.
    pub fn draw(tasks: usize, kind: Kind, rng: &mut Rng) -> Self {
        let mut uniform = |low, high| {
            let values: Vec<f64> = (0..tasks).map(|_| rng.between(low, high)).collect();
            Tensor::from_slice(&values).to_kind(kind).view([-1, 1, 1])
        };
        Sinusoids { amplitude: uniform(0.1, 5.0), phase: uniform(0.0, PI) }
    }

    /// `points` examples of every task: x and y, `[T, points, 1]`.
    pub fn examples(&self, points: usize, rng: &mut Rng) -> (Tensor, Tensor) {
        let tasks = self.phase.size()[0];
        let x: Vec<f64> = (0..tasks as usize * points).map(|_| rng.between(-5.0, 5.0)).collect();
        let x = Tensor::from_slice(&x).to_kind(self.phase.kind()).view([tasks, -1, 1]);
        let y = self.at(&x);
        (x, y)
    }

    /// y `[T, N, 1]` at x `[T, N, 1]`.
    pub fn at(&self, x: &Tensor) -> Tensor {
        (x + &self.phase).sin() * &self.amplitude
    }
}

/// A network 1-40-40-1.
#[derive(Debug)]
pub struct Net {
    /// `w0`, `b0`, `w1`, ..
    pub vs: VarStore,
    weights: Vec<Tensor>,
    activation: fn(&Tensor) -> Tensor,
}

impl Net {
    /// Random weights, by the seed.
    pub fn new(kind: Kind, activation: fn(&Tensor) -> Tensor, seed: i64) -> Self {
        tch::manual_seed(seed);
        let mut vs = VarStore::new(Device::Cpu);
        let widths: [i64; 4] = [1, 40, 40, 1];
        for (l, n) in widths.windows(2).enumerate() {
            let stdev = (1.0 / n[0] as f64).sqrt();
            let _ = vs.root().var(&format!("w{l}"), &[n[0], n[1]], Init::Randn { mean: 0.0, stdev });
            let _ = vs.root().var(&format!("b{l}"), &[1, n[1]], Init::Const(0.0));
        }
        vs.set_kind(kind);
        let weights = vs.trainable_variables();
        Net { vs, weights, activation }
    }

    /// The weights once for each of T tasks, `[T, …]`: one batched product then serves all tasks, and the gradient of
    /// the sum of their losses is every task's own.
    pub fn copies(&self, tasks: i64) -> Vec<Tensor> {
        self.weights.iter().map(|w| w.unsqueeze(0).expand([tasks, -1, -1], false)).collect()
    }

    /// Outputs `[T, N, 1]` of the tasks' weights.
    pub fn outputs(&self, weights: &[Tensor], x: &Tensor) -> Tensor {
        let layer = |h: &Tensor, l: usize| h.matmul(&weights[2 * l]) + &weights[2 * l + 1];
        let h = (self.activation)(&layer(x, 0));
        layer(&(self.activation)(&layer(&h, 1)), 2)
    }

    /// Mean squared error of every task, `[T]`.
    pub fn errors(&self, weights: &[Tensor], (x, y): &(Tensor, Tensor)) -> Tensor {
        (self.outputs(weights, x) - y).square().mean_dim([1, 2].as_slice(), false, None)
    }

    /// The tasks' weights after `steps` gradient steps of each on its own examples.
    pub fn adapted(&self, train: &(Tensor, Tensor), steps: usize) -> Result<Vec<Tensor>, tch::TchError> {
        let own = |w: &[Tensor]| self.errors(w, train).sum(None);
        adapt(&self.copies(train.0.size()[0]), own, ALPHA, steps)
    }

    /// The outer loss: after one inner step, on other examples.
    pub fn outer_loss(&self, train: &(Tensor, Tensor), test: &(Tensor, Tensor)) -> Result<Tensor, tch::TchError> {
        Ok(self.errors(&self.adapted(train, 1)?, test).mean(None))
    }
}

/// Size α of the inner steps.
pub const ALPHA: f64 = 0.01;
/// Examples of a task.
pub const SHOTS: usize = 10;
const TASKS: usize = 25;

/// Steps of an outer optimizer, each on fresh tasks: with the inner step, or without (one network for all tasks).
pub fn train<R: Row>(net: &Net, opt: &mut Optimizer<R>, steps: usize, inner: bool, seed: u64) -> Outcome<()> {
    let mut rng = Rng::new(seed, 70);
    for _ in 0..steps {
        let tasks = Sinusoids::draw(TASKS, Kind::Float, &mut rng);
        let (train, test) = (tasks.examples(SHOTS, &mut rng), tasks.examples(SHOTS, &mut rng));
        if inner {
            opt.step(|| net.outer_loss(&train, &test))?;
        } else {
            opt.step(|| net.errors(&net.copies(TASKS as i64), &train).mean(None))?;
        }
    }
    Ok(())
}

/// Mean squared error over new tasks after 0, 1, … `steps` steps on ten examples of each.
pub fn after_steps(net: &Net, steps: usize, seed: u64) -> Outcome<Vec<f64>> {
    let mut rng = Rng::new(seed, 71);
    let tasks = Sinusoids::draw(600, Kind::Float, &mut rng);
    let (train, test) = (tasks.examples(SHOTS, &mut rng), tasks.examples(100, &mut rng));
    let error = |n| Ok(net.errors(&net.adapted(&train, n)?, &test).mean(None).double_value(&[]));
    (0..=steps).map(error).collect()
}

/// Checks what defines it, and shows what it does.
///
/// # Errors
/// If a step is refused, or a picture cannot be written.
pub fn run(setting: &Setting) -> Outcome<Vec<Finding>> {
    const STEPS: usize = 8000;
    let adam = |inner: bool| -> Outcome<Net> {
        let net = Net::new(Kind::Float, Tensor::relu, 0);
        train(&net, &mut Adam::default().build(&net.vs, 1e-3)?, STEPS, inner, 0)?;
        Ok(net)
    };
    let (maml, joint) = (adam(true)?, adam(false)?);
    let variational = Net::new(Kind::Float, Tensor::relu, 0);
    let ivon = Ivon::default().ess(1e5).hess_init(0.3).beta2(0.9995);
    train(&variational, &mut ivon.build(&variational.vs, 0.03)?, STEPS, true, 0)?;
    draw(setting, &maml, &joint)?;

    let [maml, joint, variational] = [&maml, &joint, &variational].map(|net| after_steps(net, 5, 1));
    let (maml, joint, variational) = (maml?, joint?, variational?);
    let line = |what: &str, mse: &[f64], expected: &str, holds: bool| {
        let found = format!("{:.2}, {:.2}, {:.2}", mse[0], mse[1], mse[5]);
        Finding::new(&format!("{what}: squared error on new sinusoids after 0, 1, 5 steps"), found, expected, holds)
    };
    let better = |mse: &[f64]| mse[1] < 0.5 * joint[1] && mse[5] < 0.5 * joint[5];
    Ok(vec![
        line("one network for all", &joint, "little help from the steps", true),
        line("MAML by Adam", &maml, "< half of that after 1 and 5", better(&maml)),
        line("MAML by IVON, at the mean", &variational, "< half of that after 1 and 5", better(&variational)),
    ])
}

/// One new sinusoid, and what the two networks make of it after 0, 1 and 5 steps.
fn draw(setting: &Setting, maml: &Net, joint: &Net) -> Outcome<()> {
    let mut rng = Rng::new(3, 72);
    let task = Sinusoids::draw(1, Kind::Float, &mut rng);
    let train = task.examples(SHOTS, &mut rng);
    let grid = Tensor::linspace(-5.0, 5.0, 200, (Kind::Float, Device::Cpu)).view([1, -1, 1]);
    let points = |y: &Tensor| -> Outcome<Vec<(f64, f64)>> {
        let values = |t: &Tensor| Vec::<f64>::try_from(t.detach().to_kind(Kind::Double).view([-1]));
        Ok(values(&grid)?.into_iter().zip(values(y)?).collect())
    };
    let panel = |name: &str, net: &Net| -> Outcome<Curves> {
        let mut series = vec![("the sinusoid".to_owned(), points(&task.at(&grid))?)];
        for steps in [0, 1, 5] {
            let weights = net.adapted(&train, steps)?;
            series.push((format!("after {steps} steps"), points(&net.outputs(&weights, &grid))?));
        }
        Ok(Curves { y_label: name.to_owned(), series })
    };
    let panels = [panel("MAML", maml)?, panel("one network for all", joint)?];
    training_curves(&setting.folder.join("maml.svg"), "x", &panels)
}

//! The base, its fine-tunes and their merges.

use tch::Tensor;
use tch_blr::fisher::{DiagonalFisher, Fisher};
use tch_blr::merge::{Method, Model, Rescale, Tensors, merge};
use tch_blr::{Builder, DiagonalGaussian, Ivon, Schedule, Statistic};
use tch_blr_examples::Outcome;
use tch_blr_examples::batches::subset;
use tch_blr_examples::digits::{Digits, SIDE};
use tch_blr_examples::model::{Mlp, train};

/// Images and labels.
pub type Examples = (Tensor, Tensor);

const BATCH: usize = 128;
pub const BASE: Training = Training { steps: 700, lr: 0.5, beta2: 0.99 };
const FINE_TUNE: Training = Training { steps: 200, lr: 0.2, beta2: 0.98 };
/// δ of the base's prior for each example.
const DECAY: f64 = 1e-4;
/// Images of a fine-tune, at most.
const IMAGES: i64 = 5000;
/// Pixels to the right and down.
const SHIFT: i64 = 2;
const HALVES: [(&str, [i64; 5]); 2] = [("0-4", [0, 1, 2, 3, 4]), ("5-9", [5, 6, 7, 8, 9])];

pub struct Training {
    pub steps: u64,
    pub lr: f64,
    /// With β₂^steps ≪ 1 the precision is that of the data, and not what it was started with: merging weighs by it.
    pub beta2: f64,
}

impl Training {
    fn run(
        &self,
        what: &str,
        net: &Mlp,
        (x, y): &Examples,
        prior: Option<&DiagonalGaussian>,
        seed: u64,
    ) -> Outcome<DiagonalGaussian> {
        let per_epoch = (y.numel() as u64).div_ceil(BATCH as u64);
        let epochs = self.steps.div_ceil(per_epoch);
        let total = epochs * per_epoch;
        let mut opt = self.ivon(y.numel()).schedule(Schedule::Cosine { warmup: total / 10, total, end: 0.0 });
        if let Some(q) = prior {
            q.copy_mean_to(&net.vs)?;
            opt = opt.prior(q);
        }
        let mut opt = opt.build(&net.vs, self.lr)?;
        train(&format!("{seed}: {what}"), net, &mut opt, (x, y), (epochs, BATCH), 1000 * seed)?;
        Ok(opt.posterior()?)
    }

    /// Squared gradients of mini-batches, times their size, estimate the Fisher information: never negative, so that a
    /// fine-tune only adds precision to its prior, and every merge with weights ≥ 0 has a positive one. Price's
    /// estimate, of either sign, need not: here some merges of the sweep would have none.
    fn ivon(&self, examples: usize) -> Builder<Ivon> {
        let ivon = Ivon::default().ess(examples as f64).hess_init(0.03).beta2(self.beta2).weight_decay(DECAY);
        ivon.hessian(Statistic::SquaredGradient).square_scale(BATCH as f64).builder()
    }
}

fn shifted(images: &Tensor) -> Tensor {
    let side = SIDE as i64;
    images.view([-1, side, side]).roll([SHIFT, SHIFT], [1, 2]).reshape([-1, side * side])
}

/// Those of `digits`, the first `most`.
fn only((x, y): &Examples, digits: &[i64], most: i64) -> Examples {
    let chosen = subset(y, digits);
    let chosen = chosen.narrow(0, 0, most.min(chosen.size()[0]));
    (x.index_select(0, &chosen), y.index_select(0, &chosen))
}

/// One tensor a parameter, of what `part` says about it.
fn tensors(q: &DiagonalGaussian, part: impl Fn(&str) -> Option<Tensor>) -> Tensors {
    q.names().filter_map(|name| Some((name.to_owned(), part(name)?))).collect()
}

pub fn mean(q: &DiagonalGaussian) -> Tensors {
    tensors(q, |name| q.mean(name))
}

/// What is learned, and where it is measured.
pub struct Task {
    centred: Examples,
    pub halves: [Examples; 2],
    /// For the choice of weights.
    pub validation: Examples,
    pub test: Examples,
    pub tests: [Examples; 2],
}

impl Task {
    pub fn new(data: &Digits) -> Task {
        let half = data.train_labels.size()[0] / 2;
        let part = |x: &Tensor, y: &Tensor, start, n| (x.narrow(0, start, n), y.narrow(0, start, n));
        let (x, y) = part(&data.train_images, &data.train_labels, half, half);
        let (moved, kept) = (shifted(&x), half - half / 6);
        let (seen, validation) = (part(&moved, &y, 0, kept), part(&moved, &y, kept, half - kept));
        let test = (shifted(&data.test_images), data.test_labels.shallow_clone());
        Task {
            centred: part(&data.train_images, &data.train_labels, 0, half),
            halves: HALVES.map(|(_, digits)| only(&seen, &digits, IMAGES)),
            validation,
            tests: HALVES.map(|(_, digits)| only(&test, &digits, i64::MAX)),
            test,
        }
    }
}

/// H₀ with the prior's part, and H_t of the fine-tunes' losses, on the scale of the sums over their data.
pub struct Curvatures {
    pub base: Tensors,
    halves: [Tensors; 2],
}

/// The base, its two fine-tunes and the joint one.
pub struct Networks {
    base: DiagonalGaussian,
    pub halves: [DiagonalGaussian; 2],
    joint: DiagonalGaussian,
    /// IVON's own precisions, and those of a pass over all data with the networks as they are.
    pub own: Curvatures,
    pub exact: Curvatures,
    seed: u64,
}

impl Networks {
    pub fn train(net: &Mlp, task: &Task, base: &Training, seed: u64) -> Outcome<Networks> {
        let [(x0, y0), (x1, y1)] = &task.halves;
        let both = (Tensor::cat(&[x0, x1], 0), Tensor::cat(&[y0, y1], 0));
        let base = base.run("base on centred digits", net, &task.centred, None, seed)?;
        let fine_tune = |what: &str, data: &Examples| FINE_TUNE.run(what, net, data, Some(&base), seed);
        let halves = [
            fine_tune("fine-tune on shifted 0-4", &task.halves[0])?,
            fine_tune("fine-tune on shifted 5-9", &task.halves[1])?,
        ];
        let joint = fine_tune("fine-tune on both", &both)?;

        // Rounding may make a zero negative.
        let added = |q: &DiagonalGaussian| tensors(q, |n| Some((q.precision(n)? - base.precision(n)?).clamp_min(0.0)));
        let own = Curvatures { base: tensors(&base, |n| base.precision(n)), halves: halves.each_ref().map(added) };
        let fisher = |q: &DiagonalGaussian, (x, _): &Examples| -> Outcome<DiagonalFisher> {
            q.copy_mean_to(&net.vs)?;
            Ok(Fisher::exact().diagonal(&net.vs, x.split(1000, 0), |x| net.logits(x))?)
        };
        let delta = DECAY * task.centred.1.numel() as f64;
        let prior = fisher(&base, &task.centred)?;
        let [low, high] = [fisher(&halves[0], &task.halves[0])?, fisher(&halves[1], &task.halves[1])?];
        let exact = Curvatures {
            base: tensors(&base, |n| Some(prior.get(n)? + delta)),
            halves: [low, high].map(|f| tensors(&base, |n| f.get(n).map(Tensor::shallow_clone))),
        };
        Ok(Networks { base, halves, joint, own, exact, seed })
    }

    /// With one weight for both fine-tunes.
    fn merge(&self, method: Method, curvatures: &Curvatures, weight: f64) -> tch_blr::Result<Tensors> {
        let base = mean(&self.base);
        let weights = self.halves.each_ref().map(mean);
        let model = |t: usize| Model::new(HALVES[t].0, &weights[t]).curvature(&curvatures.halves[t]).weight(weight);
        merge(method, Some(&Model::new("base", &base).curvature(&curvatures.base)), &[model(0), model(1)])
    }

    /// The merges that a weight changes.
    pub fn weighted(&self, way: Weighted, weight: f64) -> tch_blr::Result<Tensors> {
        let plain = |method| self.merge(method, &self.own, 1.0);
        match way {
            Weighted::TaskArithmetic => plain(Method::task_arithmetic(weight)),
            Weighted::Ties => plain(Method::ties(weight, 0.2)),
            Weighted::Dare => plain(Method::dare(weight, 0.5, Rescale::Density, self.seed)),
            Weighted::Own => self.merge(Method::gradient_matching(), &self.own, weight),
            Weighted::Exact => self.merge(Method::gradient_matching(), &self.exact, weight),
        }
    }

    pub fn all(&self) -> tch_blr::Result<Vec<(String, Tensors)>> {
        let fixed = [
            ("base", mean(&self.base)),
            ("fine-tune on 0-4", mean(&self.halves[0])),
            ("fine-tune on 5-9", mean(&self.halves[1])),
            ("joint fine-tune", mean(&self.joint)),
            ("average", self.merge(Method::linear(), &self.own, 1.0)?),
            ("slerp, t = 1/2", self.merge(Method::Slerp { t: 0.5 }, &self.own, 1.0)?),
            ("Fisher average (IVON)", self.merge(Method::Fisher, &self.own, 1.0)?),
            ("Fisher average (exact)", self.merge(Method::Fisher, &self.exact, 1.0)?),
        ];
        let fixed = fixed.into_iter().map(|(name, weights)| Ok((name.to_owned(), weights)));
        fixed.chain(WEIGHTED.iter().map(|(name, way)| Ok(((*name).to_owned(), self.weighted(*way, 1.0)?)))).collect()
    }
}

/// A merge that takes a weight.
#[derive(Debug, Clone, Copy)]
pub enum Weighted {
    TaskArithmetic,
    Ties,
    Dare,
    Own,
    Exact,
}

pub const WEIGHTED: [(&str, Weighted); 5] = [
    ("task arithmetic", Weighted::TaskArithmetic),
    ("TIES, density 0.2", Weighted::Ties),
    ("DARE, density 0.5", Weighted::Dare),
    ("gradient matching (IVON)", Weighted::Own),
    ("gradient matching (exact)", Weighted::Exact),
];

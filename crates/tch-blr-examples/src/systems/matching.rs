//! Matching: classes that were never learned are told apart by a distance to examples of them.
//!
//! The nearest neighbour of a query z among stored z₁ … z_N is argminᵢ d(zᵢ, z). In a Siamese network one trunk f
//! serves both images, and the distance is learned from pairs:
//!
//! ```text
//! d(x, x′) = Σⱼ aⱼ |fⱼ(x) - fⱼ(x′)|,      aⱼ ≥ 0, fⱼ in (0, 1)
//! p(same class | x, x′) = σ(b - d(x, x′))
//! ```
//!
//! d is symmetric and 0 for identical images whatever the weights. It is trained on digits 0 to 5 and asked about
//! digits 6 to 9. So few classes say little about others, so there are more: turned by quarters and mirrored the digits
//! are classes of their own. And each image is turned, stretched, slanted and shifted a little, which makes no other
//! class. On MNIST (`TCH_BLR_DATA=DIR cargo run --release --example systems matching`) one example of each of 6 to 9
//! gives 64.2 % of right answers, and 51.0 % by pixels.
//!
//! Sources: Bromley et al. (1993), *Signature Verification using a "Siamese" Time Delay Neural Network*; Koch, Zemel
//! and Salakhutdinov (2015), *Siamese Neural Networks for One-shot Image Recognition*, section 3 (the weighted L1
//! distance).

use super::{Finding, NEW, OLD, Setting, draw, mean_and_error};
use crate::Outcome;
use crate::digits::{SIDE, rotate90};
use crate::random::Rng;
use tch::nn::{self, Module, VarStore};
use tch::{Device, Kind, Tensor};
use tch_blr::{Adam, metrics};

/// Positions of the stored examples that are nearest to each query, the nearest first, `[Q, k]`; distances `[Q, N]`.
pub fn nearest(distances: &Tensor, k: i64) -> Tensor {
    distances.topk(k, 1, false, true).1
}

/// The label that most of the k nearest have, `[Q]`; of equally frequent ones the smallest.
pub fn vote(distances: &Tensor, labels: &Tensor, k: i64) -> Tensor {
    let of_nearest = labels.index_select(0, &nearest(distances, k).view([-1])).view([-1, k]);
    let counts = of_nearest.one_hot(labels.max().int64_value(&[]) + 1).sum_dim_intlist([1].as_slice(), false, None);
    counts.argmax(1, false)
}

/// Euclidean distances between rows, `[Q, N]`.
pub fn euclidean(queries: &Tensor, stored: &Tensor) -> Tensor {
    Tensor::cdist(queries, stored, 2.0, 2) // 2: differences, whose squares vanish where they should
}

/// Each image `[N, 784]` turned, stretched, slanted and shifted a little.
fn distorted(images: &Tensor, rng: &mut Rng) -> Tensor {
    let (n, side) = (images.size()[0], SIDE as i64);
    let maps = (0..n).flat_map(|_| {
        let [turn, wide, high, slant, right, down] = [0.2, 0.12, 0.12, 0.2, 0.07, 0.07].map(|size| size * rng.normal());
        let (sin, cos) = turn.sin_cos();
        let (wide, high) = (1.0 + wide, 1.0 + high);
        [cos * wide, (cos * slant - sin) * high, right, sin * wide, (sin * slant + cos) * high, down].map(|v| v as f32)
    });
    let maps = Tensor::from_slice(&maps.collect::<Vec<f32>>()).view([n, 2, 3]);
    let places = Tensor::affine_grid_generator(&maps, [n, 1, side, side], false);
    images.view([n, 1, side, side]).grid_sampler(&places, 0, 0, false).view([n, -1])
}

/// Images in one of the eight orientations of a square: from 4 on mirrored, and then turned by k quarters (modulo 4).
pub fn oriented(images: &Tensor, k: i64) -> Tensor {
    let side = SIDE as i64;
    let first =
        if k < 4 { images.shallow_clone() } else { images.view([-1, side, side]).flip([2]).view([-1, side * side]) };
    (0..k % 4).fold(first, |image, _| rotate90(&image))
}

/// A number for what a digit looks like in that orientation: 0 and 1 do not change by a mirror or half a turn.
pub fn class(digit: i64, k: i64) -> i64 {
    8 * digit + if digit < 2 { k % 2 } else { k }
}

/// The two images of a pair go through the same layers.
#[derive(Debug)]
pub struct Siamese {
    /// Of the embedding.
    pub vs: VarStore,
    trunk: nn::Sequential,
    /// aⱼ = softplus of this
    scale: Tensor,
    bias: Tensor,
}

impl Siamese {
    /// Two convolutions and one linear layer, to 32 features.
    pub fn new(seed: i64) -> Self {
        tch::manual_seed(seed);
        let vs = VarStore::new(Device::Cpu);
        let root = vs.root();
        let stride = nn::ConvConfig { stride: 2, padding: 1, ..Default::default() };
        let trunk = nn::seq()
            .add_fn(|x| x.view([-1, 1, SIDE as i64, SIDE as i64]))
            .add(nn::conv2d(&root / "conv1", 1, 12, 5, stride)) // [12, 13, 13]
            .add_fn(Tensor::relu)
            .add(nn::conv2d(&root / "conv2", 12, 24, 3, stride)) // [24, 7, 7]
            .add_fn(|x| x.relu().flatten(1, -1))
            .add(nn::linear(&root / "linear", 24 * 7 * 7, 32, nn::LinearConfig::default()))
            .add_fn(Tensor::sigmoid);
        let (scale, bias) = (root.zeros("scale", &[32]), root.zeros("bias", &[1]));
        Siamese { vs, trunk, scale, bias }
    }

    /// aⱼ fⱼ(x), `[N, 32]`, whose L1 distances are d.
    pub fn embedding(&self, x: &Tensor) -> Tensor {
        self.trunk.forward(x) * self.scale.softplus()
    }

    /// d between all images of one set and all of another, `[N, M]`.
    pub fn distances(&self, a: &Tensor, b: &Tensor) -> Tensor {
        Tensor::cdist(&self.embedding(a), &self.embedding(b), 1.0, None)
    }

    /// Trains on pairs of the old classes: all pairs of a batch, as much weight on those of one class as on the others.
    pub fn train(&self, setting: &Setting, steps: usize, seed: u64) -> Outcome<()> {
        let (x, y) = setting.part(true, &OLD, 60_000);
        let mut opt = Adam::default().build(&self.vs, 3e-3)?;
        let mut rng = Rng::new(seed, 90);
        for _ in 0..steps {
            let rows: Vec<i64> = (0..96).map(|_| rng.below(x.size()[0] as usize) as i64).collect();
            let rows = Tensor::from_slice(&rows);
            let parts = distorted(&x.index_select(0, &rows), &mut rng).chunk(8, 0).into_iter().zip(0..);
            let images: Vec<Tensor> = parts.map(|(part, orientation)| oriented(&part, orientation)).collect();
            let digits = Vec::<i64>::try_from(y.index_select(0, &rows))?.into_iter().zip(0..);
            let class: Vec<i64> = digits.map(|(digit, i)| class(digit, i / 12)).collect();
            let class = Tensor::from_slice(&class);
            let same = class.unsqueeze(0).eq_tensor(&class.unsqueeze(1)).to_kind(Kind::Float);
            let same = &same - Tensor::eye(96, (Kind::Float, Device::Cpu));
            let other = class.unsqueeze(0).ne_tensor(&class.unsqueeze(1)).to_kind(Kind::Float);
            let mean = |losses: Tensor, which: &Tensor| (losses * which).sum(None) / which.sum(None).clamp_min(1.0);
            opt.step(|| {
                let z = self.embedding(&Tensor::cat(&images, 0));
                let d = (z.unsqueeze(0) - z.unsqueeze(1)).abs().sum_dim_intlist([2].as_slice(), false, None);
                let logits = &self.bias - d;
                (mean((-&logits).softplus(), &same) + mean(logits.softplus(), &other)) * 0.5
            })?;
        }
        Ok(())
    }
}

/// How well distances of one kind tell digits 6 to 9 apart.
#[derive(Debug)]
pub struct Told {
    /// AUC of "a larger distance means another class", over all pairs of some test images.
    pub auc: f64,
    /// Accuracies with one example of each class, one a draw of the examples.
    pub one_shot: Vec<f64>,
}

/// How well distances between images tell pairs and new classes, over so many draws of stored examples.
///
/// # Errors
/// If shapes do not agree.
pub fn tell(setting: &Setting, distances: impl Fn(&Tensor, &Tensor) -> Tensor, draws: u64) -> Outcome<Told> {
    let _no_grad = tch::no_grad_guard();
    let (x, y) = setting.part(false, &NEW, 600);
    let d = distances(&x, &x);
    let n = y.size()[0];
    let pairs = |same: bool| {
        let equal = y.unsqueeze(0).eq_tensor(&y.unsqueeze(1));
        let wanted = if same { equal } else { equal.logical_not() };
        d.masked_select(&wanted.logical_and(&Tensor::ones([n, n], (Kind::Bool, Device::Cpu)).triu(1)))
    };
    let auc = metrics::auroc(&pairs(true), &pairs(false))?;
    let (pool, labels) = setting.part(true, &NEW, 4000);
    let one_shot = (0..draws).map(|seed| {
        let rows = draw(&labels, &NEW, 1, &mut Rng::new(seed, 91));
        let answers = vote(&distances(&x, &pool.index_select(0, &rows)), &labels.index_select(0, &rows), 1);
        answers.eq_tensor(&y).to_kind(Kind::Double).mean(Kind::Double).double_value(&[])
    });
    Ok(Told { auc, one_shot: one_shot.collect() })
}

/// Checks what defines it, and shows what it does.
///
/// # Errors
/// If a step is refused, or a picture cannot be written.
pub fn run(setting: &Setting) -> Outcome<Vec<Finding>> {
    const DRAWS: u64 = 30;
    let net = Siamese::new(0);
    net.train(setting, 4000, 0)?;
    let siamese = tell(setting, |a, b| net.distances(a, b), DRAWS)?;
    let pixels = tell(setting, euclidean, DRAWS)?;
    let gains: Vec<f64> = siamese.one_shot.iter().zip(&pixels.one_shot).map(|(s, p)| s - p).collect();
    let (gain, error) = mean_and_error(&gains);
    let percent = |told: &Told| 100.0 * mean_and_error(&told.one_shot).0;

    let (x, y) = setting.part(true, &NEW, 1000);
    let itself = vote(&euclidean(&x, &x), &y, 1).eq_tensor(&y).all().int64_value(&[]) == 1;
    Ok(vec![
        Finding::new(
            "verification of unseen digits 6-9, AUC",
            format!("Siamese {:.3}, pixels {:.3}", siamese.auc, pixels.auc),
            "0.05 above pixels",
            siamese.auc > pixels.auc + 0.05,
        ),
        Finding::new(
            "one example of each of 6-9, accuracy",
            format!(
                "Siamese {:.1} %, pixels {:.1} %, difference ± {:.1}",
                percent(&siamese),
                percent(&pixels),
                100.0 * error
            ),
            "more than pixels, by over 3 standard errors of 30 draws",
            gain > 3.0 * error,
        ),
        Finding::new(
            "nearest neighbour of stored examples",
            if itself { "themselves" } else { "others" },
            "themselves",
            itself,
        ),
    ])
}

//! Merging fine-tunes of a logistic regression on USPS, by schemes that know more and more of the curvature.
//!
//! Odd digits against even ones; pixels from -1…1 to 0…1, with a 1 in front (257 weights w); ℓ = Σ softplus(xᵀw) - y xᵀw. The base θ₀
//! is fitted to the digits 0-3 under the penalty ½δ‖w‖², δ = 25, and H₀ is its Hessian with δ. The tasks {4,5}, {6,7}, {8,9} are
//! fine-tuned on their own, each with the prior N(θ₀, H₀⁻¹); the target is the fine-tune on all three. Everything is the exact
//! optimum, by Newton's method in f64.

use flate2::read::GzDecoder;
use std::collections::BTreeMap;
use std::error::Error;
use std::fs::File;
use std::io::Read;
use std::path::Path;
use tch::{Device, Kind, Tensor};
use tch_blr::FullGaussian;
use tch_blr::merge::{Method, Model, Tensors, gradient_matching, merge};

type Outcome<T> = Result<T, Box<dyn Error>>;

/// Penalty of every weight, the constant's too.
const DELTA: f64 = 25.0;
const TASKS: [[f64; 2]; 3] = [[4.0, 5.0], [6.0, 7.0], [8.0, 9.0]];

/// One line of the table.
#[derive(Debug, Clone)]
pub struct Row {
    pub scheme: String,
    /// Of all ten digits of the test set, in %.
    pub accuracy: f64,
    /// ‖w - w*‖/‖w*‖ with the target w*.
    pub distance: f64,
    /// Joint loss beyond the target's, in nats.
    pub gap: f64,
}

/// Examples in rows.
struct Data {
    /// `[n, 257]`
    x: Tensor,
    /// 1 for odd digits, `[n]`
    y: Tensor,
    digits: Tensor,
}

impl Data {
    fn read(path: &Path) -> Outcome<Self> {
        let mut text = String::new();
        let file = File::open(path).map_err(|e| format!("{}: {e}", path.display()))?;
        GzDecoder::new(file).read_to_string(&mut text).map_err(|e| format!("{}: {e}", path.display()))?;
        let numbers = text.split_whitespace().map(str::parse::<f64>).collect::<Result<Vec<_>, _>>();
        let numbers = numbers.map_err(|e| format!("{}: {e}", path.display()))?;
        if numbers.is_empty() || numbers.len() % 257 != 0 {
            return Err(format!("{}: expected lines of a digit and 256 pixels", path.display()).into());
        }
        let rows = Tensor::from_slice(&numbers).reshape([-1, 257]);
        let digits = rows.select(1, 0);
        let pixels = (rows.narrow(1, 1, 256) + 1.0) / 2.0;
        let x = Tensor::cat(&[pixels.narrow(1, 0, 1).ones_like(), pixels], 1);
        Ok(Data { x, y: digits.remainder(2.0), digits })
    }

    fn of(&self, digits: &[f64]) -> Data {
        let chosen = digits.iter().map(|d| self.digits.eq(*d)).reduce(|a, b| a.logical_or(&b)).expect("some digits");
        let chosen = chosen.nonzero().squeeze_dim(1);
        let pick = |t: &Tensor| t.index_select(0, &chosen);
        Data { x: pick(&self.x), y: pick(&self.y), digits: pick(&self.digits) }
    }

    fn loss(&self, w: &Tensor) -> f64 {
        let f = self.x.mv(w);
        (f.softplus() - &self.y * f).sum(Kind::Double).double_value(&[])
    }

    fn gradient(&self, w: &Tensor) -> Tensor {
        self.x.tr().mv(&(self.x.mv(w).sigmoid() - &self.y))
    }

    fn hessian(&self, w: &Tensor) -> Tensor {
        let p = self.x.mv(w).sigmoid();
        let variance: Tensor = &p * (1.0 - &p);
        let weighted = &self.x * variance.unsqueeze(1);
        self.x.tr().matmul(&weighted)
    }

    fn accuracy(&self, w: &Tensor) -> f64 {
        let right = self.x.mv(w).gt(0.0).to_kind(Kind::Double).eq_tensor(&self.y);
        100.0 * right.to_kind(Kind::Double).mean(Kind::Double).double_value(&[])
    }

    /// The minimum of the loss plus ½(w-m)ᵀP(w-m), by Newton's method from m on; steps are halved until they descend.
    fn fit(&self, m: &Tensor, p: &Tensor) -> Outcome<Tensor> {
        let mut w = m.copy();
        let value = |w: &Tensor| {
            let d = w - m;
            self.loss(w) + 0.5 * d.dot(&p.mv(&d)).double_value(&[])
        };
        for _ in 0..100 {
            let gradient = self.gradient(&w) + p.mv(&(&w - m));
            let hessian = self.hessian(&w) + p;
            let step = gradient.unsqueeze(1).cholesky_solve(&hessian.linalg_cholesky(false), false).squeeze_dim(1);
            let size = step.norm().double_value(&[]) / (1.0 + w.norm().double_value(&[]));
            let mut rate = 1.0;
            while value(&(&w - &step * rate)) > value(&w) && size * rate > 1e-13 {
                rate *= 0.5;
            }
            w -= step * rate;
            if size < 1e-12 {
                return Ok(w);
            }
        }
        Err("Newton's method did not converge".into())
    }
}

fn named(w: &Tensor) -> Tensors {
    BTreeMap::from([("w".to_owned(), w.shallow_clone())])
}

/// The table from USPS's files `zip.train.gz` and `zip.test.gz` in a folder.
pub fn run(usps: &Path) -> Outcome<Vec<Row>> {
    let _no_grad = tch::no_grad_guard();
    let (train, test) = (Data::read(&usps.join("zip.train.gz"))?, Data::read(&usps.join("zip.test.gz"))?);
    let first = train.of(&[0.0, 1.0, 2.0, 3.0]);
    let options = (Kind::Double, Device::Cpu);
    let penalty = Tensor::eye(257, options) * DELTA;
    let base = first.fit(&Tensor::zeros([257], options), &penalty)?;
    let h0 = first.hessian(&base) + penalty;
    let tasks = TASKS.map(|digits| train.of(&digits));
    let joint = train.of(&TASKS.concat());
    let target = joint.fit(&base, &h0)?;
    let own = tasks.iter().map(|task| task.fit(&base, &h0)).collect::<Outcome<Vec<_>>>()?;
    let h: Vec<Tensor> = tasks.iter().zip(&own).map(|(task, w)| task.hessian(w)).collect();

    let diagonal = |h: &Tensor| named(&h.diagonal(0, 0, 1).copy());
    let (weights, base_weights): (Vec<Tensors>, _) = (own.iter().map(named).collect(), named(&base));
    let (curvature, base_curvature): (Vec<Tensors>, _) = (h.iter().map(diagonal).collect(), diagonal(&h0));
    let names = ["4, 5", "6, 7", "8, 9"];
    let models: Vec<Model> =
        names.iter().zip(&weights).zip(&curvature).map(|((n, w), h)| Model::new(n, w).curvature(h)).collect();
    let base_model = Model::new("0-3", &base_weights).curvature(&base_curvature);
    let by = |method| -> Outcome<Tensor> { Ok(merge(method, Some(&base_model), &models)?["w"].copy()) };
    let prior = FullGaussian::new([("w", base.copy())], &h0)?;
    let posteriors = own.iter().zip(&h).map(|(w, h)| FullGaussian::new([("w", w.copy())], &(&h0 + h)));
    let posteriors = posteriors.collect::<Result<Vec<_>, _>>()?;
    let full = gradient_matching(&prior, &posteriors.iter().map(|q| (1.0, q)).collect::<Vec<_>>())?;

    let mut schemes: Vec<(String, Tensor)> =
        names.iter().zip(own).map(|(name, w)| (format!("fine-tune on {name}"), w)).collect();
    schemes.extend([
        ("average".to_owned(), by(Method::linear())?),
        ("task arithmetic".to_owned(), by(Method::task_arithmetic(1.0))?),
        ("Fisher average".to_owned(), by(Method::Fisher)?),
        ("gradient matching, diagonal".to_owned(), by(Method::GradientMatching { delta: 0.0 })?),
        ("gradient matching, full".to_owned(), full.mean_vector()),
        ("target".to_owned(), target.copy()),
    ]);
    let objective = |w: &Tensor| {
        let d = w - &base;
        joint.loss(w) + 0.5 * d.dot(&h0.mv(&d)).double_value(&[])
    };
    let (best, size) = (objective(&target), target.norm().double_value(&[]));
    let rows = schemes.into_iter().map(|(scheme, w)| Row {
        scheme,
        accuracy: test.accuracy(&w),
        distance: (&w - &target).norm().double_value(&[]) / size,
        gap: objective(&w) - best,
    });
    Ok(rows.collect())
}

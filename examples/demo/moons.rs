//! Predictive entropy over the plane: a point estimate is sure far from any data, a posterior is not.

use serde_json::{Value, json};
use std::path::Path;
use tch::{Kind, Tensor};
use tch_blr::rule::Row;
use tch_blr::{Adam, Ivon, Optimizer, Posterior, Result, Von, metrics};
use tch_blr_examples::model::{Mlp, train};
use tch_blr_examples::moons::moons;
use tch_blr_examples::{Outcome, pictures};

const POINTS: usize = 200;
const EXTENT: ((f64, f64), (f64, f64)) = ((-3.0, 4.0), (-2.5, 3.0));
const GRID: (usize, usize) = (70, 55);
const SAMPLES: usize = 64;

pub fn run(folder: &Path) -> Outcome<Value> {
    let (x, y) = moons(POINTS, 0.1, 0);
    let grid = grid();
    let n = POINTS as f64;

    let (net, _) = fit("Adam", &x, &y, |net| Adam::default().build(&net.vs, 5e-3))?;
    let adam = net.probabilities(&grid);
    let vogn = Von::vogn().ess(n).hess_init(0.5).weight_decay(1.0 / n).beta2(0.99);
    let vogn = averaged(fit("VOGN", &x, &y, |net| vogn.build(&net.vs, 0.02))?, &grid)?;
    let ivon = Ivon::default().ess(n).hess_init(0.5).weight_decay(1.0 / n).beta2(0.999);
    let ivon = averaged(fit("IVON", &x, &y, |net| ivon.build(&net.vs, 0.2))?, &grid)?;

    let mut planes = Vec::new();
    let mut report = serde_json::Map::new();
    for (name, p) in [("Adam", adam), ("VOGN", vogn), ("IVON", ivon)] {
        let entropy = metrics::entropy(&p)?;
        let mean = entropy.mean(Kind::Double).double_value(&[]);
        println!("  {name:<5} mean predictive entropy over the plane {mean:.3} nats of at most 0.693");
        report.insert(name.to_owned(), json!({"mean_entropy": mean}));
        planes.push((name.to_owned(), Vec::try_from(entropy.to_kind(Kind::Double))?, GRID.0, GRID.1));
    }
    let points: Vec<_> = (0..POINTS as i64)
        .map(|i| (x.double_value(&[i, 0]), x.double_value(&[i, 1]), y.int64_value(&[i]) as usize))
        .collect();
    pictures::entropy_planes(&folder.join("moons.svg"), &planes, EXTENT, &points)?;
    Ok(Value::Object(report))
}

fn fit<R: Row>(
    name: &str,
    x: &Tensor,
    y: &Tensor,
    build: impl Fn(&Mlp) -> Result<Optimizer<R>>,
) -> Outcome<(Mlp, Optimizer<R>)> {
    tch::manual_seed(0);
    let net = Mlp::new(&[2, 50, 50, 2]);
    let mut opt = build(&net)?;
    train(&format!("two moons, {name}"), &net, &mut opt, (x, y), (1500, POINTS), 0)?;
    Ok((net, opt))
}

fn averaged<R: Row<Posterior: Posterior>>((net, opt): (Mlp, Optimizer<R>), grid: &Tensor) -> Outcome<Tensor> {
    let q: &dyn Posterior = &opt.posterior()?;
    Ok(q.predict(&net.vs, SAMPLES, || net.probabilities(grid))?.mean)
}

/// The centres of the plane's cells, row by row.
fn grid() -> Tensor {
    let ((x0, x1), (y0, y1)) = EXTENT;
    let centre = |low: f64, high: f64, i: usize, n: usize| low + (high - low) * (i as f64 + 0.5) / n as f64;
    let points: Vec<f64> = (0..GRID.1)
        .flat_map(|j| (0..GRID.0).flat_map(move |i| [centre(x0, x1, i, GRID.0), centre(y0, y1, j, GRID.1)]))
        .collect();
    Tensor::from_slice(&points).to_kind(Kind::Float).reshape([-1, 2])
}

//! Two networks against each other: one draws points of the plane, the other tells them from those of eight clusters.

use super::optimizer::{Job, Own};
use super::program::{Plan, Program};
use super::scores::{Better, Measure, Scores};
use std::f64::consts::PI;
use tch::nn::{self, LinearConfig, Module, OptimizerConfig, Path as Names, Sequential};
use tch::{Kind, Tensor};
use tch_blr::nn::linear;
use tch_blr_examples::Outcome;
use tch_blr_examples::random::Rng;

const POINTS: usize = 4000;
const CLUSTERS: usize = 8;
const SD: f64 = 0.2;
const CODE: i64 = 8;
const BATCH: i64 = 128;

struct Gan {
    points: Tensor,
    centres: Tensor,
}

pub(crate) fn program() -> Box<dyn Program> {
    let angle = |k: usize| 2.0 * PI * k as f64 / CLUSTERS as f64;
    let centre = |k: usize| [2.0 * angle(k).cos(), 2.0 * angle(k).sin()];
    let mut rng = Rng::new(0, 3);
    let points: Vec<[f64; 2]> = (0..POINTS).map(|i| centre(i % CLUSTERS).map(|x| x + SD * rng.normal())).collect();
    Box::new(Gan {
        points: Tensor::from_slice2(&points).to_kind(Kind::Float),
        centres: Tensor::from_slice2(&(0..CLUSTERS).map(centre).collect::<Vec<_>>()).to_kind(Kind::Float),
    })
}

fn network(p: &Names, from: i64, to: i64) -> Sequential {
    let dense = |name, from, to| linear(p / name, from, to, LinearConfig::default());
    let leaky = |x: &Tensor| x.maximum(&(x * 0.2));
    nn::seq()
        .add(dense("fc1", from, 64))
        .add_fn(leaky)
        .add(dense("fc2", 64, 64))
        .add_fn(leaky)
        .add(dense("out", 64, to))
}

fn codes(n: i64) -> Tensor {
    Tensor::randn([n, CODE], (Kind::Float, tch::Device::Cpu))
}

/// -ln σ of how much more the first of each pair looks like data than the second (Jolicoeur-Martineau 2018). Where each
/// point is judged by itself, clusters are given up more often.
fn more_real(z: &Tensor, than: &Tensor) -> Tensor {
    -(z - than).log_sigmoid().mean(Kind::Float)
}

fn mean_distance(a: &Tensor, b: &Tensor) -> f64 {
    Tensor::cdist(a, b, 2.0, None).mean(Kind::Double).double_value(&[])
}

impl Gan {
    /// Energy distance to the data, 2 E|a-b| - E|a-a'| - E|b-b'| (Székely and Rizzo 2013); the share of good points,
    /// those within three standard deviations of a centre; and how many clusters have a quarter of their share or more.
    fn scores(&self, drawn: &Tensor) -> [Measure; 3] {
        let data = &self.points;
        let energy = 2.0 * mean_distance(drawn, data) - mean_distance(drawn, drawn) - mean_distance(data, data);
        let (distance, nearest) = Tensor::cdist(drawn, &self.centres, 2.0, None).min_dim(1, false);
        let good = nearest.masked_select(&distance.le(3.0 * SD));
        let fair = drawn.size()[0] / (4 * CLUSTERS as i64);
        let covered = (0..CLUSTERS as i64).filter(|&k| good.eq(k).sum(Kind::Int64).int64_value(&[]) >= fair).count();
        let share = 100.0 * good.size()[0] as f64 / drawn.size()[0] as f64;
        [
            Measure::of_point("energy distance", Better::Lower, energy),
            Measure::of_point("good points, %", Better::Higher, share),
            Measure::of_point("clusters of 8", Better::Higher, covered as f64),
        ]
    }
}

impl Program for Gan {
    fn plan(&self) -> Plan {
        Plan {
            examples: POINTS,
            steps: 3000,
            own: Own { build: |vs, lr| nn::adam(0.5, 0.999, 0.0).build(vs, lr), lr: 1e-3, scheduled: false },
            adam_lr: 3e-2,
            without_vogn: None,
        }
    }

    fn run(&self, job: &Job) -> Outcome<Scores> {
        let plan = self.plan();
        let (vs, critics) = (job.store(), nn::VarStore::new(tch::Device::Cpu));
        let generator = network(&vs.root(), CODE, 2);
        let critic = network(&critics.root(), 2, 1);
        let (mut g, mut d) = (job.optimizer(&plan, &vs)?, job.optimizer(&plan, &critics)?);
        for _ in 0..job.steps(&plan) {
            let real =
                self.points.index_select(0, &Tensor::randint(POINTS as i64, [BATCH], (Kind::Int64, tch::Device::Cpu)));
            let fake = tch::no_grad(|| generator.forward(&codes(BATCH)));
            d.step(|| more_real(&critic.forward(&real), &critic.forward(&fake)))?;
            let codes = codes(BATCH);
            g.step(|| more_real(&critic.forward(&generator.forward(&codes)), &critic.forward(&real)))?;
        }
        let drawn = tch::no_grad(|| generator.forward(&codes(POINTS as i64)));
        Ok(Scores::new(self.scores(&drawn), &[&g, &d]))
    }
}

//! A variational autoencoder of binary digits.

use super::optimizer::{Job, Own};
use super::program::{DIGITS, Examples, HeldOut, Plan, Program, digits, mini_batches};
use super::scores::{Better, Measure, Scores};
use std::path::Path;
use tch::nn::{LinearConfig, Module, OptimizerConfig, Path as Names};
use tch::{Kind, Reduction, Tensor};
use tch_blr::nn::{Linear, linear};
use tch_blr_examples::Outcome;
use tch_blr_examples::digits::PIXELS;

const HIDDEN: i64 = 200;
const LATENT: i64 = 20;

struct Vae {
    /// With labels, which it does not use.
    train: Examples,
    held_out: HeldOut<Examples>,
}

pub(crate) fn load(data: Option<&Path>) -> Outcome<Box<dyn Program>> {
    let (train, held_out) = digits(data, |images| images.ge(0.5).to_kind(Kind::Float))?;
    Ok(Box::new(Vae { train, held_out }))
}

struct Network {
    encoder: Linear,
    mean: Linear,
    log_variance: Linear,
    decoder: Linear,
    pixels: Linear,
}

impl Network {
    fn new(p: &Names) -> Self {
        let dense = |name, from, to| linear(p / name, from, to, LinearConfig::default());
        Network {
            encoder: dense("encoder", PIXELS as i64, HIDDEN),
            mean: dense("mean", HIDDEN, LATENT),
            log_variance: dense("log_variance", HIDDEN, LATENT),
            decoder: dense("decoder", LATENT, HIDDEN),
            pixels: dense("pixels", HIDDEN, PIXELS as i64),
        }
    }

    /// -ELBO per image, in nats, with one draw of the code.
    fn loss(&self, x: &Tensor) -> Tensor {
        let hidden = self.encoder.forward(x).relu();
        let (m, log_v) = (self.mean.forward(&hidden), self.log_variance.forward(&hidden));
        let code = &m + m.randn_like() * (&log_v * 0.5).exp();
        let logits = self.pixels.forward(&self.decoder.forward(&code).relu());
        let misfit = logits.binary_cross_entropy_with_logits::<Tensor>(x, None, None, Reduction::Sum);
        let divergence: Tensor = (log_v.exp() + m.square() - 1.0 - log_v) * 0.5;
        (misfit + divergence.sum(Kind::Float)) / x.size()[0] as f64
    }
}

impl Program for Vae {
    fn plan(&self) -> Plan {
        Plan {
            examples: DIGITS as usize,
            steps: 1000,
            own: Own { build: |vs, lr| tch::nn::Adam::default().build(vs, lr), lr: 1e-3, scheduled: false },
            adam_lr: 3e-2,
            without_vogn: None,
        }
    }

    fn run(&self, job: &Job) -> Outcome<Scores> {
        let vs = job.store();
        let net = Network::new(&vs.root());
        let plan = self.plan();
        let mut opt = job.optimizer(&plan, &vs)?;
        for (x, _) in mini_batches((&self.train.0, &self.train.1), 100, job, &plan) {
            opt.step(|| net.loss(&x))?;
        }
        let loss = tch::no_grad(|| net.loss(&self.held_out.of(job).0)).double_value(&[]);
        Ok(Scores::new([Measure::of_point("-ELBO", Better::Lower, loss)], &[&opt]))
    }
}

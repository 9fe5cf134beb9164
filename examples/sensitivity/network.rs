//! The network, how IVON trains it, and the sensitivities of its examples.

use tch::{Kind, Tensor};
use tch_blr::nn::Likelihood;
use tch_blr::sensitivity::Sensitivity;
use tch_blr::{Ivon, Optimizer, Schedule};
use tch_blr_examples::Outcome;
use tch_blr_examples::model::Mlp;

const SIZES: [i64; 4] = [784, 32, 16, 10];
pub const BATCH: usize = 50;
/// Sensitivities are looked at after these epochs and the last, with predictions averaged over so many draws.
const CHECKPOINTS: [u64; 6] = [1, 2, 3, 5, 10, 20];
pub const DRAWS: usize = 150;
/// The start of h and the rate at which it is learned set the size of v, and with it that of the estimate. Over the
/// whole training h forgets its start to e⁻³: much faster, and weights of no importance lose all precision and their
/// noise is in v.
pub fn ivon(n: usize, steps: u64, hess_init: f64) -> Ivon {
    Ivon::default().ess(n as f64).hess_init(hess_init).beta2(1.0 - 3.0 / steps.max(1000) as f64).weight_decay(1e-4)
}

pub fn network(n: usize, epochs: u64, hess_init: f64) -> Outcome<(Mlp, Optimizer<Ivon>)> {
    tch::manual_seed(0);
    let net = Mlp::new(&SIZES);
    let total = epochs * n.div_ceil(BATCH) as u64;
    let schedule = Schedule::Cosine { warmup: 100, total, end: 0.0 };
    let opt = ivon(n, total, hess_init).schedule(schedule).build(&net.vs, 0.2)?;
    Ok((net, opt))
}

/// e and v of all training examples under the optimizer's own posterior.
pub fn sensitivities(net: &Mlp, opt: &Optimizer<Ivon>, x: &Tensor, y: &Tensor) -> Outcome<Sensitivity> {
    let batches = x.split(1000, 0).into_iter().zip(y.split(1000, 0));
    Ok(Sensitivity::diagonal(&opt.posterior()?, &net.vs, batches, Likelihood::Categorical, |x| net.logits(x))?)
}

/// Whether sensitivities are looked at after so many epochs.
pub fn checkpoint(epoch: u64, epochs: u64) -> bool {
    CHECKPOINTS.contains(&epoch) || epoch == epochs
}

/// Sensitivities Σ|e Λ v| of all examples after so many epochs, and the mean of tr v.
pub type Evolution = Vec<(u64, Tensor, f64)>;

/// With averaged predictions.
pub fn look(epoch: u64, s: &Sensitivity) -> Outcome<(u64, Tensor, f64)> {
    let variance = s.variance()?.sum(Kind::Double).double_value(&[]) / s.outputs().size()[0] as f64;
    Ok((epoch, s.averaged(DRAWS, epoch)?.score()?, variance))
}

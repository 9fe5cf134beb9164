//! Sentences from the numbers of [`Diagnostics`]: what usually goes wrong, and what to change.
//!
//! A rule belongs here if a run can be made that it speaks about (`tests/advice.rs` has one for each), and another like
//! it that it is silent about.

use super::{Diagnostics, Fallback, Spread};
use std::fmt;

/// Something that the numbers of a training say should be looked at; printed, it is a sentence.
///
/// ```
/// # use tch::{nn, nn::Module, Device, Kind, Tensor};
/// # use tch_blr::Ivon;
/// # fn main() -> tch_blr::Result<()> {
/// # let (x, y) = (Tensor::randn([8, 4], (Kind::Float, Device::Cpu)), Tensor::zeros([8], (Kind::Int64, Device::Cpu)));
/// # let vs = nn::VarStore::new(Device::Cpu);
/// # let net = nn::linear(vs.root(), 4, 3, Default::default());
/// # let mut opt = Ivon::default().ess(1000.0).build(&vs, 0.1)?;
/// # opt.step(|| net.forward(&x).cross_entropy_for_logits(&y))?;
/// for advice in opt.diagnostics()?.advice() {
///     eprintln!("{advice}");
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum Advice {
    /// Less than a tenth of the precision was learned.
    NotLearned {
        /// Share of the data in the precision's average, 1-β₂ᵗ.
        learned: f64,
    },
    /// σ of a parameter is more than three tenths of its weights.
    NoiseDominates {
        /// The parameter with the largest ratio.
        name: String,
        /// Root mean squares, σ over weights.
        ratio: f64,
    },
    /// Without a prior, the noise of single weights has grown beyond their parameter's weights.
    Unbounded {
        /// The parameter with the largest such noise.
        name: String,
        /// The largest σ.
        sigma: f64,
        /// Root mean square of the parameter's weights.
        weights: f64,
    },
    /// σ is less than a thousandth of the weights, for every parameter.
    NoNoise {
        /// The largest ratio.
        ratio: f64,
    },
    /// More than nine tenths of the posterior's precision are the prior's.
    PriorDominates {
        /// Mean of σ²P₀ over the weights.
        share: f64,
    },
    /// More than nine tenths of the gradients were cut to the limit of their norm.
    Clipped {
        /// Share of the updates.
        share: f64,
    },
    /// The learning rate is 0.
    Stopped,
    /// Passes over some parameters are many operations.
    Slow(Fallback),
    /// Steps were left out because loss or gradient was not finite.
    Skipped {
        /// How many.
        skipped: u64,
    },
}

/// Share of the precision that has to be learned.
const LEARNED: f64 = 0.1;
/// Share of the precision that may be the prior's.
const PRIOR: f64 = 0.9;
/// Share of the updates that may be clipped.
const CLIPPED: f64 = 0.9;
/// σ over weights: healthy runs of image and language models lie between 0.003 and 0.03, and from 0.3 on the noise is
/// all that the loss sees.
const NOISE: [f64; 2] = [1e-3, 0.3];

impl Diagnostics {
    /// What stands out in these numbers; nothing if all is well.
    pub fn advice(&self) -> Vec<Advice> {
        let mut all = Vec::new();
        if let Some(learned) = self.learned.filter(|share| *share < LEARNED) {
            all.push(Advice::NotLearned { learned });
        }
        // Of matrices and the like: vectors start at zero more often than not, and grow out of their noise.
        let matrices = self.spreads.iter().filter(|spread| spread.dimensions > 1);
        let unbounded = matrices.clone().filter(|spread| !spread.bounded && spread.largest > spread.weights);
        let unbounded = unbounded.max_by(|a, b| a.largest.total_cmp(&b.largest));
        if let Some(Spread { name, largest, weights, .. }) = unbounded {
            all.push(Advice::Unbounded { name: name.clone(), sigma: *largest, weights: *weights });
        } else if let Some(widest) = matrices.max_by(|a, b| a.ratio().total_cmp(&b.ratio())) {
            let ratio = widest.ratio();
            if ratio > NOISE[1] {
                all.push(Advice::NoiseDominates { name: widest.name.clone(), ratio });
            } else if ratio < NOISE[0] {
                all.push(Advice::NoNoise { ratio });
            }
        }
        if let Some(share) = self.prior_share.filter(|share| *share > PRIOR) {
            all.push(Advice::PriorDominates { share });
        }
        if let Some(share) = self.clipped.filter(|share| *share > CLIPPED) {
            all.push(Advice::Clipped { share });
        }
        if self.lr == 0.0 {
            all.push(Advice::Stopped);
        }
        all.extend(self.fallback.clone().map(Advice::Slow));
        if self.skipped > 0 {
            all.push(Advice::Skipped { skipped: self.skipped });
        }
        all
    }
}

impl fmt::Display for Advice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Advice::NotLearned { learned } => write!(
                f,
                "only {:.1} % of the precision was learned so far, the rest is its start: uncertainties are what was \
                 typed in. Train on, or lower β₂ to about 1-1/steps, which is `auto`'s",
                100.0 * learned
            ),
            Advice::NoiseDominates { name, ratio } => write!(
                f,
                "the noise of `{name}` is {:.0} % of its weights: the loss at samples says little about the mean. Raise \
                 hess_init or ess, or use `auto(ess, steps)`, whose noise is relative to the weights",
                100.0 * ratio
            ),
            Advice::Unbounded { name, sigma, weights } => write!(
                f,
                "weight_decay is 0 and the curvature of some weights of `{name}` vanishes, so that nothing bounds \
                 their noise: σ is {sigma:.1e} by now, the weights {weights:.1e}. Set a weight_decay (1/ess is the \
                 prior N(0, 1)), or leave weights without any gradient alone: skip_unseen()"
            ),
            Advice::NoNoise { ratio } => write!(
                f,
                "σ is at most {ratio:.1e} of the weights, so that samples are as good as the mean: no uncertainty will \
                 be seen. Lower ess to the number of training examples, or hess_init"
            ),
            Advice::PriorDominates { share } => write!(
                f,
                "{:.0} % of the precision is the prior's: the data have said little. Lower weight_decay, temper the \
                 prior if it is a posterior, raise ess if there are more examples than that, or train longer",
                100.0 * share
            ),
            Advice::Clipped { share } => write!(
                f,
                "{:.0} % of the gradients were cut by clip_grad_norm: their size no longer counts, and the effective \
                 learning rate is not the one that was set. Raise the limit to a few times the usual gradient_norm",
                100.0 * share
            ),
            Advice::Stopped => {
                f.write_str("the learning rate is 0, so nothing moves: is the schedule shorter than the training?")
            }
            Advice::Slow(Fallback { name, parameters, reason }) => write!(
                f,
                "{parameters} parameters, first `{name}`, are updated by many operations of libtorch in place of one pass: \
                 {reason}"
            ),
            Advice::Skipped { skipped } => write!(
                f,
                "{skipped} steps were left out, because loss or gradient was not finite: lower the learning rate, or \
                 the factor of a scaled loss"
            ),
        }
    }
}

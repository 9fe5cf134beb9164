//! Which weights a model can do without, and training without them.
//!
//! An importance is a number for every weight; a [`Mask`] keeps the weights of highest importance, ranked over the
//! whole model together. Ways to rank weights belong here, and holding weights at zero; what is made of the smaller
//! model does not.
//!
//! | importance | | |
//! |---|---|---|
//! | [`magnitude`] | \|m\| | no curvature at all |
//! | [`DiagonalGaussian::signal_to_noise`] | \|m\|√s | how many standard deviations from zero (Graves 2011) |
//! | [`saliency`] | ½ m² F | the loss, to second order, of setting it to zero (LeCun et al. 1990) |
//! | [`precision`] | s | how well the data determine it, whatever its size |
//!
//! Sources: Blundell et al. 2015, *Weight Uncertainty in Neural Networks*, for the signal-to-noise ratio; LeCun et al.
//! 1990, *Optimal Brain Damage*. With s = F + δ of Laplace's approximation, ½(|m|√s)² is the saliency with the prior's
//! part in it, and ranks the weights alike where F is large.
//!
//! ```
//! # use tch::{Device, Kind, Tensor, nn::Module, nn::VarStore};
//! use tch_blr::{Ivon, pruning};
//! # fn main() -> tch_blr::Result<()> {
//! # let vs = VarStore::new(Device::Cpu);
//! # let net = tch::nn::linear(vs.root(), 4, 3, Default::default());
//! # let x = Tensor::randn([20, 4], (Kind::Float, Device::Cpu));
//! # let y = Tensor::randint(3, [20], (Kind::Int64, Device::Cpu));
//! # let mut opt = Ivon::default().ess(20.0).build(&vs, 0.1)?;
//! # opt.step(|| net.forward(&x).cross_entropy_for_logits(&y))?;
//! let q = opt.posterior()?;
//! let mask = pruning::prune(&q.signal_to_noise(), 0.8)?; // 80 % of the weights
//! let p = mask.posterior(&q)?.predict(&vs, 32, || net.forward(&x).softmax(-1, Kind::Float))?; // zero in every sample
//! mask.apply(&vs)?;
//! mask.step(&mut opt, || net.forward(&x).cross_entropy_for_logits(&y))?; // they stay zero
//! # assert_eq!((mask.pruned(), p.samples), (12, 32));
//! # assert_eq!((net.ws.count_nonzero(None) + net.bs.as_ref().unwrap().count_nonzero(None)).int64_value(&[]), 3);
//! # Ok(())
//! # }
//! ```

use crate::driver::Rule;
use crate::fisher::DiagonalFisher;
use crate::posterior::in_model;
use crate::{DiagonalGaussian, Error, IntoTensor, Optimizer, Params, Perturbed, PrunedGaussian, Result, check};
use blr_merge::engine::part_of;
use std::collections::HashSet;
use tch::{Device, Kind, Tensor};

/// A number for each weight of each parameter, by its name and in its shape. Leave out what is not to be pruned
/// (biases, say): `importance.retain(|(name, _)| !name.ends_with("bias"))`.
pub type Importance = Vec<(String, Tensor)>;

impl DiagonalGaussian {
    /// |m|√s of every weight: its distance from zero in standard deviations.
    pub fn signal_to_noise(&self) -> Importance {
        of(self, |m, s| m.abs() * s.sqrt())
    }
}

/// s of every weight.
pub fn precision(q: &DiagonalGaussian) -> Importance {
    of(q, |_, s| s.copy())
}

fn of(q: &DiagonalGaussian, f: impl Fn(&Tensor, &Tensor) -> Tensor) -> Importance {
    let _no_grad = tch::no_grad_guard();
    let each = q.names().filter_map(|name| Some((name.to_owned(), f(&q.mean(name)?, &q.precision(name)?))));
    each.collect()
}

/// |θ| of every trainable weight.
pub fn magnitude(params: impl Into<Params>) -> Importance {
    let _no_grad = tch::no_grad_guard();
    let params = params.into();
    let trained = params.leaves().iter().filter(|l| l.trainable());
    trained.map(|l| (l.name().to_owned(), l.tensor.detach().to_kind(l.state_kind()).abs())).collect()
}

/// ½θ²F of every weight, at the model's present weights: Optimal Brain Damage with the Fisher information in place of
/// the Hessian.
///
/// # Errors
/// A parameter that the model lacks, or has in another shape.
pub fn saliency(fisher: &DiagonalFisher, params: impl Into<Params>) -> Result<Importance> {
    let _no_grad = tch::no_grad_guard();
    let params = params.into();
    let each =
        fisher.names().map(|name| (name.to_owned(), fisher.get(name).map_or_else(Tensor::new, Tensor::shallow_clone)));
    let each: Importance = each.collect();
    let pairs = in_model(&params, each.iter().map(|(name, f)| (name.clone(), f.shallow_clone())))?;
    Ok(each.into_iter().zip(pairs).map(|((name, f), (theta, _))| (name, f * theta.detach().square() * 0.5)).collect())
}

/// Keeps all weights but the share `sparsity` in \[0, 1\] of lowest importance: ⌊sparsity·n⌋ of the n weights of
/// all these parameters together; among equals the earlier ones are pruned.
///
/// # Errors
/// A sparsity out of range, no weights, importances that are NaN, a name twice.
pub fn prune(importance: &[(String, Tensor)], sparsity: f64) -> Result<Mask> {
    let _no_grad = tch::no_grad_guard();
    check::that("sparsity", sparsity, (0.0..=1.0).contains(&sparsity), "a share of the weights, 0 to 1")?;
    let mut names = HashSet::new();
    for (name, t) in importance {
        if !names.insert(name) {
            return Err(Error::parameter(name, "its importance is given twice"));
        }
        // A NaN sorts last, so that it would silently count as the most important weight.
        if t.isnan().any().int64_value(&[]) != 0 {
            return Err(Error::parameter(
                name,
                "its importance is not a number; look at the posterior and the weights",
            ));
        }
    }
    // On the CPU in f64: parameters of different kinds and devices are ranked together.
    let flat = importance.iter().map(|(_, t)| t.f_to_device(Device::Cpu)?.f_to_kind(Kind::Double)?.f_reshape([-1]));
    let flat = flat.collect::<std::result::Result<Vec<_>, _>>()?;
    if flat.iter().all(|t| t.numel() == 0) {
        return Err(Error::Parameters("there are no weights to prune".to_owned()));
    }
    let all = Tensor::f_cat(&flat, 0)?;
    let pruned = part_of(sparsity, all.numel()) as i64;
    // Stable, so that equal importances (zeros, say) give the same mask on every run.
    let lowest = all.f_argsort_stable(true, 0, false)?.f_narrow(0, 0, pruned)?;
    let keep = Tensor::f_ones(all.size(), (Kind::Float, Device::Cpu))?.f_index_fill(0, &lowest, 0.0)?;
    let mut first = 0;
    let masks = importance.iter().map(|(name, t)| {
        let n = t.numel() as i64;
        let mask = keep.f_narrow(0, first, n)?.f_reshape(t.size())?;
        first += n;
        Ok((name.clone(), mask.f_to_device(t.device())?))
    });
    Ok(Mask { masks: masks.collect::<Result<_>>()? })
}

/// Which weights are kept. Parameters that it does not know are kept entirely.
#[derive(Debug)]
pub struct Mask {
    /// 1 where a weight is kept, otherwise 0.
    masks: Vec<(String, Tensor)>,
}

impl Mask {
    /// 1 for each weight of a parameter that is kept and 0 for the others, in its shape (f32).
    pub fn get(&self, name: &str) -> Option<&Tensor> {
        self.masks.iter().find_map(|(n, mask)| (n == name).then_some(mask))
    }

    /// How many weights are pruned.
    pub fn pruned(&self) -> usize {
        let kept: f64 = self.masks.iter().map(|(_, mask)| mask.sum(Kind::Double).double_value(&[])).sum();
        // The sums are exact: whole numbers in f64.
        self.masks.iter().map(|(_, mask)| mask.numel()).sum::<usize>() - kept as usize
    }

    /// Sets the pruned weights of a model to zero.
    ///
    /// # Errors
    /// A parameter that the model lacks, or has in another shape; nothing is changed then.
    pub fn apply(&self, params: impl Into<Params>) -> Result<()> {
        clear(&self.of_model(&Params::separate(params)?)?);
        Ok(())
    }

    /// A posterior without the pruned weights: they are 0 with σ = 0, so that they do not come back as noise in its
    /// samples, and the others are as they were. That of an optimizer has a σ for every weight, also after
    /// [`Mask::step`].
    ///
    /// # Errors
    /// A parameter that the posterior lacks, or has in another shape.
    pub fn posterior(&self, q: &DiagonalGaussian) -> Result<PrunedGaussian> {
        PrunedGaussian::new(q, self.masks.iter().map(|(name, mask)| (name.clone(), mask.eq(0.0))).collect())
    }

    /// A step of an optimizer in which pruned weights are zero before, during and after: where the loss is evaluated
    /// (samples and adversarial points too), and in the new mean; the other weights move as in a network without the
    /// pruned ones, whose gradients are in no norm either (`clip_grad_norm`, the ascent of SAM). A pruned binary weight
    /// is 0 as well, and has λ = 0. A training loop that cannot use this comes near it by [`Mask::apply`] at the
    /// beginning of the closure and after the step; norms then count all gradients.
    ///
    /// Only for elementwise rows. A row over blocks steps by S⁻¹g with an S that ties weights together, so the others
    /// would move with pruned ones that stay where they are, away from their own optimum.
    ///
    /// ```compile_fail,E0277
    /// # use tch::nn::VarStore;
    /// # use tch_blr::{Newton, pruning::Mask};
    /// # fn f(vs: &VarStore, mask: &Mask, loss: impl FnMut() -> tch::Tensor) -> tch_blr::Result<()> {
    /// mask.step(&mut Newton::default().build(vs, 1.0)?, loss)?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// As [`Mask::apply`] and [`Optimizer::step`].
    pub fn step<R: Rule, L: IntoTensor>(&self, opt: &mut Optimizer<R>, mut closure: impl FnMut() -> L) -> Result<f64> {
        // Before the step, so that a mask of another model changes nothing.
        let pruned = opt.told(self.of_model(opt.params()))?;
        clear(&pruned);
        let masks = opt.params().leaves().iter().map(|leaf| {
            let own = pruned.iter().find(|(variable, _)| variable.is_set_to(&leaf.tensor));
            own.map(|(_, mask)| mask.eq(0.0))
        });
        let masks = masks.collect();
        // Inside the closure the variables are at a sample, after which the mean comes back.
        let loss = opt.step_without(masks, || {
            clear(&pruned);
            closure()
        })?;
        clear(&pruned);
        Ok(loss)
    }

    /// Variables and masks.
    fn of_model(&self, params: &Params) -> Result<Vec<(Tensor, Tensor)>> {
        in_model(params, self.masks.iter().map(|(name, mask)| (name.clone(), mask.shallow_clone())))
    }
}

fn clear(pruned: &[(Tensor, Tensor)]) {
    let _no_grad = tch::no_grad_guard();
    for (variable, mask) in pruned {
        // Not a product: 0·NaN is a NaN, and a negative weight would become -0.
        let _ = Perturbed::write(variable, || variable.shallow_clone().masked_fill_(&mask.eq(0.0), 0.0));
    }
}

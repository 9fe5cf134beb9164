//! One model's weights a step towards another's: the target networks of reinforcement learning.

use crate::params::{Leaf, Params};
use crate::{Error, Result, check};

/// Moves every variable of `target` a step towards the variable of the same name in `source`:
/// θ' ← θ' + τ (θ - θ'), 0 < τ ≤ 1, in place.
///
/// The target may be frozen and on another device. What `source` has beyond it, and buffers of either, are left alone.
/// Half-precision targets lose steps that are smaller than their last digit.
///
/// ```
/// # use tch::{Device, nn};
/// # fn main() -> tch_blr::Result<()> {
/// # let (online, mut target) = (nn::VarStore::new(Device::Cpu), nn::VarStore::new(Device::Cpu));
/// # let _nets = [&online, &target].map(|vs| nn::linear(vs.root(), 4, 2, Default::default()));
/// target.copy(&online)?;
/// target.freeze();
/// // … after each step of the optimizer over `online`:
/// tch_blr::soft_update(&target, &online, 0.005)?;
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// τ out of range; a variable of the target that the source does not have, or has in another shape. Nothing has changed
/// then.
pub fn soft_update(target: impl Into<Params>, source: impl Into<Params>, tau: f64) -> Result<()> {
    check::that("tau", tau, tau > 0.0 && tau <= 1.0, "a number in (0, 1]")?;
    let (target, source) = (Params::separate(target)?, Params::separate(source)?);
    source.check_free()?;
    let _claim = target.claim()?;
    let pair = |ours: &Leaf| {
        let theirs = ours.names.iter().find_map(|name| source.find(name));
        let theirs =
            theirs.ok_or_else(|| Error::parameter(ours.name(), "the target has it and the source does not"))?;
        let sizes = (ours.tensor.size(), theirs.tensor.size());
        if sizes.0 != sizes.1 {
            return Err(Error::parameter(
                ours.name(),
                format!("the target has shape {:?} and the source {:?}", sizes.0, sizes.1),
            ));
        }
        Ok((ours.tensor.shallow_clone(), theirs.tensor.shallow_clone()))
    };
    let pairs = target.leaves().iter().map(pair).collect::<Result<Vec<_>>>()?;
    let _no_grad = tch::no_grad_guard();
    for (ours, theirs) in &pairs {
        let theirs = theirs.detach().to_device(ours.device()).to_kind(ours.kind());
        _ = ours.shallow_clone().lerp_(&theirs, tau);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::iterates::testing::{set, values};
    use tch::nn::VarStore;
    use tch::{Device, Kind, Tensor};

    #[test]
    fn targets_follow() {
        let store = |x: [f64; 2]| {
            let vs = VarStore::new(Device::Cpu);
            let w = vs.root().sub("net").zeros("w", &[2]);
            set(&w, &x);
            (vs, w)
        };
        let ((mut target, w), (source, v)) = (store([0.0, 4.0]), store([8.0, 4.0]));
        let _more = source.root().zeros("head", &[1]);
        target.freeze();
        soft_update(&target, &source, 0.25).unwrap();
        soft_update(&target, &source, 0.25).unwrap();
        assert_eq!((values(&w), values(&v)), (vec![3.5, 4.0], vec![8.0, 4.0]));
        soft_update(&target, &source, 1.0).unwrap();
        assert_eq!(values(&w), [8.0, 4.0]);

        let e = soft_update(&source, &target, 0.5).unwrap_err().to_string();
        assert!(e.contains("`head`"), "{e}");
        for tau in [0.0, -0.1, 1.5, f64::NAN] {
            assert!(soft_update(&target, &source, tau).unwrap_err().to_string().contains("tau"));
        }
        let other = Params::named([("net.w", Tensor::zeros([3], (Kind::Float, Device::Cpu)))]).unwrap();
        assert!(soft_update(&target, other, 0.5).unwrap_err().to_string().contains("[3]"));
        assert_eq!(values(&w), [8.0, 4.0]);
    }
}

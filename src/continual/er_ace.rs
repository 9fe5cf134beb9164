//! The asymmetric loss of replay: new examples compete with each other's classes only.

use crate::likelihood::IGNORED;
use crate::{Result, nn};
use tch::{Kind, Tensor};

/// Losses `[B]` of new examples in ER-ACE (Caccia et al. 2022, *New Insights on Reducing Abrupt Representation Change
/// in Online Continual Learning*): -ln softmax(z)ᵧ over the classes that are present in y, from logits z `[B, C]` and
/// classes y `[B]`.
///
/// A plain cross entropy of new examples pushes down the logits of all old classes, and with them the features that
/// these share. Here the logits of classes that the batch does not have get no gradient. The examples of the memory are
/// learned over all classes, so that old and new ones are told apart there:
///
/// ```
/// # use tch::{Device, Kind, Tensor, nn::Module, nn::VarStore};
/// use tch_blr::continual::{Memory, Past, Replay, er_ace};
/// use tch_blr::nn::{self, Likelihood};
/// # fn main() -> tch_blr::Result<()> {
/// # let vs = VarStore::new(Device::Cpu);
/// # let net = nn::linear(vs.root(), 4, 6, Default::default());
/// # let data = |n: i64, c: i64| {
/// #     (Tensor::randn([n, 4], (Kind::Float, Device::Cpu)), Tensor::randint(2, [n], (Kind::Int64, Device::Cpu)) + c)
/// # };
/// # let ((x, y), (old_x, old_y)) = (data(8, 2), data(8, 0));
/// // In every step: a batch of the new task, and as many examples of the past.
/// let memory = Memory::new(&old_x, Likelihood::Categorical).targets(&old_y);
/// let past = Past::new().with(Replay::new(memory)?);
/// let new = er_ace(&net.forward(&x), &y)?;
/// let loss = past.beside(new.mean(None::<Kind>), 8.0, &vs, |x| net.forward(x))?; // the sum of two means
/// # assert!(loss.requires_grad());
/// # Ok(())
/// # }
/// ```
///
/// Where all C classes are present this is [`nn::cross_entropy`]. A batch of one class has nothing to tell apart: its
/// loss is 0, without a gradient. The label -100 leaves an example out, as there.
///
/// # Errors
/// Those of [`nn::cross_entropy`].
pub fn er_ace(logits: &Tensor, targets: &Tensor) -> Result<Tensor> {
    // For the checks of shapes and labels, which the columns below could no longer say in the caller's numbers.
    let whole = tch::no_grad(|| nn::cross_entropy(logits, targets))?;
    let classes = Tensor::f_arange(logits.size()[1], (Kind::Int64, targets.device()))?;
    // A label to leave out is none of them.
    let present = targets.f_unsqueeze(1)?.f_eq_tensor(&classes)?.f_any_dim(0, false)?;
    let columns = present.f_nonzero()?.f_squeeze_dim(1)?;
    if columns.numel() < 2 {
        // With a graph, so that a step of it alone is not an error.
        return Ok(logits.f_narrow(1, 0, 1)?.f_squeeze_dim(1)?.f_mul_scalar(0.0)?.f_to_kind(whole.kind())?);
    }
    let columns = logits.f_index_select(1, &columns.f_to_device(logits.device())?)?;
    // Where each class is among those that are present.
    let places = present.f_cumsum(0, Kind::Int64)? - 1;
    let place = places.f_index_select(0, &targets.f_clamp_min(0)?)?.f_masked_fill(&targets.f_eq(IGNORED)?, IGNORED)?;
    nn::cross_entropy(&columns, &place)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Device;

    fn logits() -> Tensor {
        let z = (Tensor::arange(20, (Kind::Double, Device::Cpu)) * 1.7).sin().reshape([5, 4]) * 3.0;
        z.set_requires_grad(true)
    }

    fn gradient(loss: &Tensor, z: &Tensor) -> Tensor {
        Tensor::run_backward(&[loss.sum(Kind::Double)], &[z], false, false).remove(0)
    }

    #[test]
    fn classes_that_are_absent_take_no_part() {
        let (z, y) = (logits(), Tensor::from_slice(&[1i64, 3, 3, 1, 3]));
        let losses = er_ace(&z, &y).unwrap();
        let by_hand: Vec<f64> = (0..5)
            .map(|i| {
                let [a, b] = [1, 3].map(|c| z.double_value(&[i, c]));
                let own = z.double_value(&[i, y.int64_value(&[i])]);
                (a.exp() + b.exp()).ln() - own
            })
            .collect();
        assert!((&losses - Tensor::from_slice(&by_hand)).abs().max().double_value(&[]) < 1e-14);
        let g = gradient(&losses, &z);
        assert_eq!(g.index_select(1, &Tensor::from_slice(&[0i64, 2])).abs().max().double_value(&[]), 0.0);
        assert!(g.select(1, 1).abs().min().double_value(&[]) > 1e-4);
    }

    #[test]
    fn all_classes_are_a_cross_entropy_and_an_ignored_example_has_none() {
        let (z, y) = (logits(), Tensor::from_slice(&[0i64, 3, 2, 1, 3]));
        assert_eq!(er_ace(&z, &y).unwrap(), nn::cross_entropy(&z, &y).unwrap());
        let left_out = er_ace(&z, &Tensor::from_slice(&[1i64, IGNORED, 3, 1, 3])).unwrap();
        let without = er_ace(&z, &Tensor::from_slice(&[1i64, 1, 3, 1, 3])).unwrap();
        assert_eq!(left_out.double_value(&[1]), 0.0);
        assert_eq!(left_out.narrow(0, 2, 3), without.narrow(0, 2, 3));
    }

    #[test]
    fn one_class_has_nothing_to_tell_apart() {
        for y in [[2i64; 5], [IGNORED; 5]] {
            let z = logits();
            let losses = er_ace(&z, &Tensor::from_slice(&y)).unwrap();
            assert_eq!((losses.size(), losses.abs().max().double_value(&[])), (vec![5], 0.0));
            assert_eq!(gradient(&losses, &z).abs().max().double_value(&[]), 0.0);
        }
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let e = er_ace(&logits(), &Tensor::from_slice(&[1i64, 3, 7, 1, 3])).unwrap_err().to_string();
        assert!(e.contains("example 2 has class 7"), "{e}");
        assert!(er_ace(&logits(), &Tensor::from_slice(&[1i64, 3])).is_err());
        assert!(er_ace(&logits(), &Tensor::from_slice(&[1.0, 3.0, 1.0, 1.0, 1.0])).is_err());
    }
}

//! From the parameter that a row learns to the weight. A new kind of weight (quantized, positive) is a variant here.

use tch::{Kind, Tensor};

/// What the weight of the model is to the parameter that a row learns, and what noise moves it in an evaluation.
///
/// The variables of a model hold weights: outside of a step the mean of the posterior. A Gaussian row learns that mean
/// itself. A row with binary weights learns the natural parameter λ of
///
/// ```text
/// q(w) ∝ exp(λw),  w ∈ {-1, 1};      P(w = 1) = 1/(1 + exp(-2λ)),  E_q[w] = tanh λ
/// ```
///
/// The optimizer keeps λ beside the variables. A weight that is not the one it left there (when the optimizer is
/// built, or after the variables were loaded or set again) gives λ by the inverse; the variable is then moved to the
/// weight that this λ has. Frozen variables are left alone, and [`Optimizer::load`](crate::Optimizer::load) leaves
/// them as they are.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub enum Link {
    /// The weight is the parameter; standard normal noise.
    Identity,
    /// w = tanh λ, the mean; half a standard logistic for noise, ½ ln(u/(1-u)) with u uniform.
    Tanh {
        /// Largest |λ| that a weight is read as: that of the weights ±1, whose λ would be infinite.
        largest: f64,
    },
    /// w = sign λ (1 for λ = 0), the mode, and read back as λ = w; no noise.
    Sign,
}

impl Link {
    /// The weights of λ.
    pub(crate) fn weight(self, learned: &Tensor) -> Tensor {
        match self {
            Link::Identity => learned.shallow_clone(),
            Link::Tanh { .. } => learned.to_kind(Kind::Double).tanh().to_kind(learned.kind()),
            Link::Sign => sign(learned),
        }
    }

    /// λ of the weights; of binary ones in memory of its own.
    pub(crate) fn learned(self, weight: &Tensor) -> Tensor {
        match self {
            Link::Identity => weight.detach(),
            // A copy, because λ is written to by the row and the variable by the link.
            Link::Sign => weight.detach().copy(),
            Link::Tanh { largest } => {
                // In f64, where a weight next to ±1 keeps the digits of its λ. One beyond ±1 would give a NaN.
                let w = weight.detach().to_kind(Kind::Double).clamp(-1.0, 1.0);
                // After the inverse: atanh(±1) is infinite, and the limit is one on λ.
                w.atanh().clamp(-largest, largest).to_kind(weight.kind())
            }
        }
    }

    /// The noise of an evaluation from standard normals.
    pub(crate) fn noise(self, z: Tensor) -> Tensor {
        match self {
            Link::Identity | Link::Sign => z,
            Link::Tanh { .. } => half_logistic(&z),
        }
    }
}

/// 1 where x ≥ 0, otherwise -1.
pub(crate) fn sign(x: &Tensor) -> Tensor {
    // Not libtorch's sign, which is 0 at 0: a binary weight has no third value.
    x.ge(0.0).to_kind(x.kind()) * 2.0 - 1.0
}

/// ½ ln(u/(1-u)) with u = Φ(z): standard normals to half a standard logistic, exactly, one for one, and odd in z. So it
/// has the counter, the antithetic pairs and the given tensors of the normals. The logarithm of the smaller of Φ(z) and
/// 1-Φ(z) keeps its digits in the tails, where the larger one would round to 1.
pub(crate) fn half_logistic(z: &Tensor) -> Tensor {
    let tail = (-z.abs()).special_log_ndtr();
    ((-tail.exp()).log1p() - tail) * z.sign() * 0.5
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(t: &Tensor) -> Vec<f64> {
        Vec::<f64>::try_from(t.to_kind(Kind::Double)).unwrap()
    }

    /// tanh d = 2u-1 = erf(z/√2), and P(d ≤ x) = 1/(1 + exp(-2x)) = Φ(z).
    #[test]
    fn normals_become_logistic() {
        let z = Tensor::from_slice(&[-6.8, -3.0, -0.3, 0.0, 0.7, 2.0, 6.8]);
        let d = half_logistic(&z);
        for (tanh, erf) in values(&d.tanh()).into_iter().zip(values(&(&z / 2f64.sqrt()).erf())) {
            assert!((tanh - erf).abs() < 1e-15, "{tanh} {erf}");
        }
        assert_eq!(values(&half_logistic(&-&z)), values(&-&d));
        // In the tail ½ ln((1-Φ(-6.8))/Φ(-6.8)), by erfc, which has all its digits there.
        let tail = values(&(Tensor::from_slice(&[6.8 / 2f64.sqrt()]).erfc() * 0.5))[0];
        for (kind, tolerance) in [(Kind::Double, 1e-13), (Kind::Float, 1e-5)] {
            let d = values(&half_logistic(&z.to_kind(kind)))[6];
            assert!((d - 0.5 * ((1.0 - tail) / tail).ln()).abs() < tolerance, "{d}");
        }
    }

    #[test]
    fn a_weight_that_was_read_stays() {
        let link = Link::Tanh { largest: 10.0 };
        for kind in [Kind::Float, Kind::Double] {
            let w = Tensor::from_slice(&[-1.0, -0.999_999, -0.7, -0.0, 1e-5, 0.45, 1.0, 3.0]).to_kind(kind);
            let learned = link.learned(&w);
            assert_eq!(values(&learned)[7], 10.0);
            let error = (link.weight(&learned) - w.clamp(-1.0, 1.0)).abs().max().double_value(&[]);
            assert!(error < 1e-8 || kind == Kind::Float && error < 6e-8, "{error}");
            assert_eq!(values(&Link::Sign.weight(&w)), [-1.0, -1.0, -1.0, 1.0, 1.0, 1.0, 1.0, 1.0]);
            assert_eq!(values(&Link::Sign.learned(&w)), values(&w));
        }
    }
}

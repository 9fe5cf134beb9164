//! Quadratic forms of posteriors and of Fisher informations: conversions into [`Quadratic`], and nothing else.

use super::quadratic::{Quadratic, Shared, Term};
use crate::fisher::{DiagonalFisher, FullFisher, KroneckerFisher, LayerFactors};
use crate::linalg::matrix_shape;
use crate::params::Leaf;
use crate::{DiagonalGaussian, FullGaussian, KroneckerGaussian};
use tch::{Kind, Tensor};

impl From<&DiagonalGaussian> for Quadratic {
    fn from(q: &DiagonalGaussian) -> Self {
        let of = |name: &str| {
            let (mean, precision) = (q.mean(name).expect("its name"), q.precision(name).expect("its name"));
            // Copied, because a term shares its tensors with clones and must own them.
            Term::diagonal(name, &mean.copy(), &precision.copy())
        };
        Quadratic { terms: q.names().map(of).collect(), constant: 0.0 }
    }
}

impl From<&KroneckerGaussian> for Quadratic {
    fn from(q: &KroneckerGaussian) -> Self {
        let of = |name: &str| {
            let p = q.parameter(name).expect("its name");
            let basis = [&p.left, &p.right].map(|q| q.as_ref().map(|q| Shared(q.copy())));
            let (mean, precision) = (Shared(p.mean.copy()), Shared(p.precision.copy()));
            Term::Diagonal { name: name.to_owned(), mean, precision, basis }
        };
        Quadratic { terms: q.names().map(of).collect(), constant: 0.0 }
    }
}

impl From<&FullGaussian> for Quadratic {
    fn from(q: &FullGaussian) -> Self {
        let shape = |name: &str| (name.to_owned(), q.mean(name).expect("its name").size());
        let term = Term::Full {
            parameters: q.names().map(shape).collect(),
            mean: Shared(q.mean_vector()),
            precision: Shared(q.precision_matrix().copy()),
        };
        Quadratic { terms: vec![term], constant: 0.0 }
    }
}

/// ½ (θ-m)ᵀ diag(F) (θ-m) around the weights m at which F was computed, without a prior.
impl From<&DiagonalFisher> for Quadratic {
    fn from(f: &DiagonalFisher) -> Self {
        let of = |l: &Leaf| Term::diagonal(l.name(), &l.tensor, f.get(l.name()).expect("its name"));
        Quadratic { terms: f.solution().leaves().iter().map(of).collect(), constant: 0.0 }
    }
}

/// ½ tr(G ΔV A ΔVᵀ) for every layer, with V = `[W b]`: a weight and its bias together, as they are in A. What has no
/// factors has its diagonal. Around the weights at which F was computed, without a prior.
impl From<&KroneckerFisher> for Quadratic {
    fn from(f: &KroneckerFisher) -> Self {
        let _no_grad = tch::no_grad_guard();
        let at = |name: &str| &f.solution().find(name).expect("its name").tensor;
        let shaped = |name: &str| (name.to_owned(), at(name).size());
        let layer = |l: &LayerFactors| {
            let w = at(&l.weight).reshape(matrix_shape(&at(&l.weight).size()));
            let mean =
                // The bias is the weight of one more input, which is always 1: A has its row last.
                l.bias.as_ref().map_or_else(|| w.shallow_clone(), |b| Tensor::cat(&[&w, &at(b).unsqueeze(1)], 1));
            Term::Layer {
                weight: shaped(&l.weight),
                bias: l.bias.as_deref().map(shaped),
                // In the kind of the weights: a training in f32 must not take its products in f64.
                inputs: Shared(l.inputs.to_kind(mean.kind())),
                outputs: Shared(l.outputs.to_kind(mean.kind())),
                mean: Shared(mean),
            }
        };
        let layers = f.layers().iter().map(layer);
        let rest = f.names().filter_map(|name| Some(Term::diagonal(name, at(name), f.diagonal(name)?)));
        Quadratic { terms: layers.chain(rest).collect(), constant: 0.0 }
    }
}

/// ½ (θ-m)ᵀ F (θ-m) around the weights m at which F was computed, without a prior.
impl From<&FullFisher> for Quadratic {
    fn from(f: &FullFisher) -> Self {
        let leaves = f.solution().leaves();
        let flat: Vec<Tensor> = leaves.iter().map(|l| l.tensor.to_kind(Kind::Double).reshape([-1])).collect();
        let term = Term::Full {
            parameters: leaves.iter().map(|l| (l.name().to_owned(), l.tensor.size())).collect(),
            mean: Shared(Tensor::cat(&flat, 0)),
            precision: Shared(f.matrix().shallow_clone()),
        };
        Quadratic { terms: vec![term], constant: 0.0 }
    }
}

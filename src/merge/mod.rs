//! Several models into one.
//!
//! Fine-tunes θ_t of a pretrained θ₀ each minimize L_t + ½‖θ-θ₀‖²_{H₀}; wanted is the minimum of Σ a_t L_t + ½‖θ-θ₀‖²_{H₀},
//! which training jointly would find. Stationarity of both gives, exactly,
//!
//! ```text
//! θ_a - [θ₀ + Σ a_t (θ_t-θ₀)] = - H₀⁻¹ Σ a_t [ ∇L_t(θ_a) - ∇L_t(θ_t) ]
//! ```
//!
//! so that task arithmetic, the bracket on the left, errs by a mismatch of gradients ([`gradient_mismatch`]). With
//! ∇L_t(θ_a) ≈ ∇L_t(θ_t) + H_t(θ_a-θ_t) the mismatch is gone to first order (Daheim et al., *Model Merging by Uncertainty-Based
//! Gradient Matching*, 2024):
//!
//! ```text
//! θ_a = θ₀ + Σ a_t H̄⁻¹(H₀+H_t)(θ_t-θ₀)          H̄ = H₀ + Σ a_t H_t
//! ```
//!
//! For posteriors q_t = N(θ_t, (H₀+H_t)⁻¹) learned with the prior q₀ = N(θ₀, H₀⁻¹) that is a sum of natural parameters, (1-Σa_t) of
//! q₀ and a_t of q_t: [`gradient_matching`]. Without posteriors, [`merge`] does it on named tensors, and so it does the methods
//! that know no curvature: [`Method`]. [`merge_files`] streams the same through safetensors files that need not fit into memory; the
//! command `tch-blr` (feature `cli`) calls it.
//!
//! ```
//! use std::collections::BTreeMap;
//! use tch::Tensor;
//! use tch_blr::merge::{Method, Model, merge};
//! # fn main() -> tch_blr::Result<()> {
//! let model = |w: [f32; 2]| BTreeMap::from([("w".to_owned(), Tensor::from_slice(&w))]);
//! let (base, a, b) = (model([1.0, 1.0]), model([2.0, 1.0]), model([1.0, 4.0]));
//! let models = [Model::new("a", &a), Model::new("b", &b)];
//! let average = merge(Method::linear(), None, &models)?;
//! assert_eq!(average["w"], Tensor::from_slice(&[1.5f32, 2.5]));
//! let both = merge(Method::task_arithmetic(1.0), Some(&Model::new("base", &base)), &models)?;
//! assert_eq!(both["w"], Tensor::from_slice(&[2.0f32, 4.0]));
//! # Ok(())
//! # }
//! ```

mod diagnostics;
mod diff;
mod draft;
mod engine;
mod files;
mod header;
mod method;
mod posteriors;
mod tensors;
mod weight_file;

pub use diagnostics::{Barrier, barrier, gradient_mismatch, sweep};
pub use diff::{Difference, diff_files};
pub use files::{Destination, FileModel, Merged, merge_files, remove_files};
pub use method::{Keep, Method, Rescale, TaskVectors};
pub use posteriors::{NaturalSum, federated, gradient_matching, largest_removal, remove};
pub use tensors::{Model, Tensors, merge};
pub use weight_file::{StoredTensor, WeightFile};

use crate::{Error, Result};
use std::collections::BTreeMap;

/// Whether two models have the same tensors: names with shapes.
fn same_tensors<D: PartialEq + std::fmt::Debug>(
    first: (&str, &BTreeMap<&str, D>),
    other: (&str, &BTreeMap<&str, D>),
) -> Result<()> {
    let missing = |(a, shapes): (&str, &BTreeMap<&str, D>), (b, others): (&str, &BTreeMap<&str, D>)| {
        shapes.keys().find(|name| !others.contains_key(*name)).map_or(Ok(()), |name| {
            Err(Error::parameter(
                name,
                format!("model `{a}` has it and model `{b}` has not; models of one architecture merge"),
            ))
        })
    };
    missing(first, other)?;
    missing(other, first)?;
    for (name, shape) in first.1 {
        let theirs = &other.1[name];
        if shape != theirs {
            let problem =
                format!("its shape is {shape:?} in model `{}` and {theirs:?} in model `{}`", first.0, other.0);
            return Err(Error::parameter(name, problem));
        }
    }
    Ok(())
}

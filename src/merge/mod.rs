//! Several models into one.
//!
//! Fine-tunes θ_t of a pretrained θ₀ each minimize L_t + ½‖θ-θ₀‖²_{H₀}. We want the minimum of Σ a_t L_t +
//! ½‖θ-θ₀‖²_{H₀}, which training jointly would find. Stationarity of both gives, exactly,
//!
//! ```text
//! θ_a - [θ₀ + Σ a_t (θ_t-θ₀)] = - H₀⁻¹ Σ a_t [ ∇L_t(θ_a) - ∇L_t(θ_t) ]
//! ```
//!
//! so that the error of task arithmetic, the bracket on the left, is a mismatch of gradients ([`gradient_mismatch`]).
//! With ∇L_t(θ_a) ≈ ∇L_t(θ_t) + H_t(θ_a-θ_t) it vanishes to first order (Daheim et al., *Model Merging by
//! Uncertainty-Based Gradient Matching*, 2024):
//!
//! ```text
//! θ_a = θ₀ + Σ a_t H̄⁻¹(H₀+H_t)(θ_t-θ₀)          H̄ = H₀ + Σ a_t H_t
//! ```
//!
//! For posteriors q_t = N(θ_t, (H₀+H_t)⁻¹) learned with the prior q₀ = N(θ₀, H₀⁻¹) that is a sum of natural parameters,
//! (1-Σa_t) of q₀ and a_t of q_t: [`gradient_matching`]. [`merge`] does the same for named tensors without posteriors,
//! and also runs the methods that need no curvature: [`Method`]. [`merge_files`] streams it through safetensors files
//! that need not fit into memory.
//!
//! Which weights a_t to train with is a question that many merges can answer before anything is trained: [`preview`]
//! and [`sweep`].
//!
//! Methods, arithmetic and files are those of the crate [`blr_merge`], which needs no libtorch and whose command
//! `blr-merge` merges files; its names are here too, and its functions return its [`blr_merge::Error`], which `?` turns
//! into [`Error`](crate::Error). What belongs in this module is what needs tensors, posteriors or a loss.
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
mod posteriors;
mod preview;
mod sweep;
mod tensors;

pub use blr_merge::{
    Better, Destination, Difference, FileModel, Keep, Merged, Method, Planned, Recipe, Rescale, Role, Soup,
    StoredTensor, TaskVectors, WeightFile, diff_files, evaluate, merge_files, plan_files, remove_files, simplex,
    soup_files,
};
pub use diagnostics::{Barrier, barrier, gradient_mismatch};
pub use posteriors::{NaturalSum, clamp_information, federated, gradient_matching, largest_removal, remove};
pub use preview::{Mode, Preview, preview, preview_from};
pub use sweep::{Trial, sweep};
pub use tensors::{Model, Tensors, merge};

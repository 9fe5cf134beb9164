//! What the tests of tch-blr share, under the name `support`: tensors to start from, small models, comparisons, exact
//! integrals, and where the data sets are.
//!
//! A helper belongs here when a second test file needs it; what one file needs stays in that file.
#![allow(missing_docs)] // Where the name says it all.

mod compare;
mod data;
mod models;
mod numbers;
mod one_weight;
mod places;
mod quadrature;
pub mod rows;
mod snapshot;

pub use compare::{all_close, assert_close, bits, close, largest, refused, says, values};
pub use data::{data, data_or_drawn};
pub use models::{EXAMPLES, Form, Net, Separable};
pub use numbers::{kolmogorov_smirnov, mean_and_error};
pub use one_weight::{exact_expectations, given, params, retracted, state, weight, with_exact_expectations};
pub use places::{
    F32, F64, Place, chirp, orthogonal, places, randn, ripple, seeded, skipped, skipped_on_cuda, store, variable, wave,
    wave_at,
};
pub use quadrature::Quadrature;
pub use snapshot::Snapshot;

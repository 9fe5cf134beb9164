//! [`Collective`](tch_blr::parallel::Collective) over MPI: the processes of an MPI job train one model together.
//!
//! Everything is behind the feature `mpi`, which needs an MPI library and libclang to build.

#[cfg(feature = "mpi")]
mod world;

#[cfg(feature = "mpi")]
pub use world::Mpi;

//! The functions of an optimizer whose code is large, as pointers: they are compiled where its builder was made.
//!
//! A generic function is compiled in the crate that uses it, with that crate's settings, and again after each of its
//! changes. The rows of this crate make their builders in functions that are not generic (`fields!` of `rows`), and so
//! the code behind these pointers is compiled once, here. A row of another crate has it compiled there. Nothing is lost
//! by a call through a pointer: there are a few in a step, and none in the loops over weights.
//!
//! Only what takes part in one of the stations belongs here; what reads or sets a field is as well off in either crate.

use super::arithmetic::{Arithmetic, Step};
use super::builder::Builder;
use super::row::Row;
use super::step::{Begun, Outcome, step_of};
use super::{Diagnostics, LrRange, Optimizer};
use crate::{Error, Params, Result, check};
use std::fmt;
use std::ops::RangeInclusive;
use std::path::Path;
use tch::Tensor;

/// Gives the loss of chunk number k.
pub type Closure<'a> = dyn FnMut(usize) -> Result<Tensor> + 'a;

/// The functions of [`Builder`], [`Optimizer`] and [`Evaluation`](super::Evaluation) of the same names.
pub struct Compiled<R: Row> {
    pub build: fn(Builder<R>, Params, f64) -> Result<Optimizer<R>>,
    pub step_chunks: fn(&mut Optimizer<R>, usize, &mut Closure) -> Result<f64>,
    pub accumulate: fn(&mut Optimizer<R>, &mut Closure) -> Result<f64>,
    pub update: fn(&mut Optimizer<R>) -> Result<f64>,
    pub perturbed: fn(&mut Optimizer<R>) -> Result<Begun>,
    pub ascend: fn(&mut Optimizer<R>, Begun, Outcome) -> Result<Begun>,
    pub step: fn(&mut Optimizer<R>, Begun, Outcome) -> Result<f64>,
    pub backward: fn(&mut Optimizer<R>, Begun, Outcome) -> Result<f64>,
    pub posterior: fn(&Optimizer<R>) -> Result<R::Posterior>,
    pub learned_posterior: fn(&Optimizer<R>) -> Result<R::Posterior>,
    pub lr_find: fn(&mut Optimizer<R>, RangeInclusive<f64>, usize, &mut Closure) -> Result<LrRange>,
    pub diagnostics: fn(&Optimizer<R>) -> Result<Diagnostics>,
    pub save: fn(&Optimizer<R>, &Path) -> Result<()>,
    pub load: fn(&mut Optimizer<R>, &Path) -> Result<()>,
}

// Derived, it would ask the same of `R::Posterior`.
impl<R: Row> fmt::Debug for Compiled<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Compiled")
    }
}

fn now<R: Row>(optimizer: &Optimizer<R>) -> Step<'_> {
    step_of(&optimizer.params, &optimizer.schedule, optimizer.steps)
}

impl<R: Row> Compiled<R> {
    /// In the crate that asks for it.
    pub const HERE: &'static Self = &Compiled {
        build: Builder::built,
        step_chunks: |optimizer, chunks, closure| {
            check::count("chunks", chunks)?;
            optimizer.prepare()?;
            let ended = optimizer.evaluate(chunks, closure)?;
            optimizer.finish(ended)
        },
        accumulate: |optimizer, closure| {
            optimizer.prepare()?;
            let ended = optimizer.evaluate(1, closure)?;
            optimizer.keep(ended)
        },
        update: |optimizer| {
            if optimizer.sums.weight == 0.0 {
                if optimizer.sums.evaluations > 0 {
                    return Ok(f64::NAN);
                }
                let problem = "none was evaluated since the last update; call step or accumulate";
                return Err(Error::Loss(problem.to_owned()));
            }
            optimizer.params.check()?;
            optimizer.params.check_free()?;
            optimizer.apply_kept()
        },
        perturbed: |optimizer| {
            optimizer.prepare()?;
            optimizer.begin(optimizer.sums.evaluations)
        },
        ascend: Optimizer::ascend,
        step: |optimizer, begun, outcome| {
            let ended = optimizer.end(begun, outcome)?;
            optimizer.finish(ended)
        },
        backward: |optimizer, begun, outcome| {
            let ended = optimizer.end(begun, outcome)?;
            optimizer.keep(ended)
        },
        posterior: |optimizer| {
            let _claim = optimizer.params.claim()?;
            R::Arithmetic::posterior(&optimizer.units, now(optimizer))
        },
        learned_posterior: |optimizer| {
            if optimizer.skip_unseen {
                let problem = "with skip_unseen nobody has counted how often each weight was updated, and so how much \
                               of its initial Hessian is left";
                return Err(Error::Posterior(format!("{problem}: call posterior()")));
            }
            let _claim = optimizer.params.claim()?;
            R::Arithmetic::learned_posterior(&optimizer.units, now(optimizer))
        },
        lr_find: Optimizer::lr_found,
        diagnostics: Optimizer::diagnosed,
        save: |optimizer, path| {
            let _claim = optimizer.params.claim()?;
            optimizer.write(path)
        },
        load: |optimizer, path| {
            let _claim = optimizer.params.claim()?;
            optimizer.read(path)
        },
    };
}

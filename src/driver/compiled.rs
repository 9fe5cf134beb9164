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
use super::sums::Sums;
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

pub(super) fn nothing_to_update() -> Error {
    Error::Loss("none was evaluated since the last update; call step or accumulate".to_owned())
}

fn now<R: Row>(optimizer: &Optimizer<R>) -> Step<'_> {
    step_of(&optimizer.params, &optimizer.schedule, optimizer.steps)
}

impl<R: Row> Compiled<R> {
    /// In the crate that asks for it.
    pub const HERE: &'static Self = &Compiled {
        build: Builder::built,
        step_chunks: |optimizer, chunks, closure| {
            optimizer.welcome()?;
            let found = optimizer.here(|optimizer| {
                check::count("chunks", chunks)?;
                optimizer.prepare()?;
                optimizer.evaluate(chunks, closure)
            });
            optimizer.finish(found, optimizer.evaluations(chunks))
        },
        accumulate: |optimizer, closure| {
            optimizer.welcome()?;
            let found = optimizer.here(|optimizer| {
                optimizer.prepare()?;
                optimizer.evaluate(1, closure)
            });
            optimizer.keep(found, optimizer.evaluations(1))
        },
        update: |optimizer| {
            if optimizer.ranks.is_some() {
                let checked = optimizer.params.check().and_then(|()| optimizer.params.check_free());
                return optimizer.finish_together(checked.map(|()| Sums::default()), 0);
            }
            if optimizer.sums.weight == 0.0 {
                return if optimizer.sums.evaluations > 0 { Ok(f64::NAN) } else { Err(nothing_to_update()) };
            }
            optimizer.params.check()?;
            optimizer.params.check_free()?;
            optimizer.apply_kept()
        },
        perturbed: |optimizer| {
            optimizer.welcome()?;
            let begun = optimizer.prepare().and_then(|()| optimizer.begin(optimizer.sums.evaluations));
            optimizer.told(begun)
        },
        ascend: |optimizer, begun, outcome| {
            let begun = optimizer.ascend_or_leave_out(begun, outcome);
            optimizer.told(begun)
        },
        step: |optimizer, begun, outcome| {
            let found = optimizer.end(begun, outcome);
            optimizer.finish(found, 1)
        },
        backward: |optimizer, begun, outcome| {
            let found = optimizer.end(begun, outcome);
            optimizer.keep(found, 1)
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
            if optimizer.ranks.is_some() {
                return optimizer.save_together(path);
            }
            let _claim = optimizer.params.claim()?;
            optimizer.write(path, &optimizer.sums)
        },
        load: |optimizer, path| {
            optimizer.welcome()?;
            let found = optimizer.params.claim().and_then(|claim| Ok((claim, optimizer.read(path)?)));
            let (_claim, content) = optimizer.load_together(path, found)?;
            optimizer.take_up(content)
        },
    };
}

//! An optimizer whose row was chosen at run time: no more than the methods of [`Optimizer`] as a trait object.

use super::row::{MaybePosterior, Row};
use super::{Diagnostics, Optimizer};
use crate::parallel::Collective;
use crate::posterior::Posterior;
use crate::{Params, Result, Schedule};
use std::fmt::Debug;
use std::path::Path;
use tch::Tensor;

/// Every [`Optimizer`], whatever its row: what a training loop calls, as a trait object.
///
/// [`AnyRow`](crate::AnyRow) builds one from a configuration. Calls have the meaning of the methods of [`Optimizer`]
/// that they are named after.
///
/// ```
/// # use tch::{nn, nn::Module, Device, Kind, Tensor};
/// use tch_blr::{AnyRow, Train};
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let (x, y) = (Tensor::randn([8, 4], (Kind::Float, Device::Cpu)), Tensor::zeros([8], (Kind::Int64, Device::Cpu)));
/// # let vs = nn::VarStore::new(Device::Cpu);
/// # let net = nn::linear(vs.root(), 4, 3, Default::default());
/// let row: AnyRow = serde_json::from_str(r#"{"ivon": {"ess": 60000.0}}"#)?;
/// let mut opt: Box<dyn Train> = row.build(&vs, 0.1)?;
/// opt.step(&mut || Ok(net.forward(&x).cross_entropy_for_logits(&y)))?;
/// println!("{} after {} step: loss {}", opt.name(), opt.steps(), opt.diagnostics()?.loss);
/// # Ok(())
/// # }
/// ```
pub trait Train: Debug + Send {
    /// Name of the row, as in checkpoints.
    fn name(&self) -> &'static str;
    /// As [`Optimizer::step`].
    ///
    /// # Errors
    /// As [`Optimizer::step`].
    fn step(&mut self, closure: &mut dyn FnMut() -> Result<Tensor>) -> Result<f64>;
    /// As [`Optimizer::step_chunks`].
    ///
    /// # Errors
    /// As [`Optimizer::step_chunks`].
    fn step_chunks(&mut self, chunks: usize, closure: &mut dyn FnMut(usize) -> Result<Tensor>) -> Result<f64>;
    /// As [`Optimizer::accumulate`].
    ///
    /// # Errors
    /// As [`Optimizer::accumulate`].
    fn accumulate(&mut self, closure: &mut dyn FnMut() -> Result<Tensor>) -> Result<f64>;
    /// As [`Optimizer::update`].
    ///
    /// # Errors
    /// As [`Optimizer::update`].
    fn update(&mut self) -> Result<f64>;
    /// As [`Optimizer::steps`].
    fn steps(&self) -> u64;
    /// As [`Optimizer::params`].
    fn params(&self) -> &Params;
    /// As [`Optimizer::lr`].
    fn lr(&self) -> f64;
    /// As [`Optimizer::set_lr`].
    ///
    /// # Errors
    /// As [`Optimizer::set_lr`].
    fn set_lr(&mut self, lr: f64) -> Result<()>;
    /// As [`Optimizer::set_lr_group`].
    ///
    /// # Errors
    /// As [`Optimizer::set_lr_group`].
    fn set_lr_group(&mut self, group: usize, lr: f64) -> Result<()>;
    /// As [`Optimizer::set_weight_decay`].
    ///
    /// # Errors
    /// As [`Optimizer::set_weight_decay`].
    fn set_weight_decay(&mut self, delta: f64) -> Result<()>;
    /// As [`Optimizer::set_schedule`].
    ///
    /// # Errors
    /// As [`Optimizer::set_schedule`].
    fn set_schedule(&mut self, schedule: Schedule) -> Result<()>;
    /// As [`Optimizer::save`].
    ///
    /// # Errors
    /// As [`Optimizer::save`].
    fn save(&self, path: &Path) -> Result<()>;
    /// As [`Optimizer::load`].
    ///
    /// # Errors
    /// As [`Optimizer::load`].
    fn load(&mut self, path: &Path) -> Result<()>;
    /// As [`Optimizer::posterior`]; [`Posterior::save_to`] writes it to a file.
    ///
    /// # Errors
    /// As [`Optimizer::posterior`], and for rows that have none (SGD, SAM, STE).
    fn posterior(&self) -> Result<Box<dyn Posterior>>;
    /// As [`Optimizer::collective`].
    fn collective(&self) -> &dyn Collective;
    /// As [`Optimizer::diagnostics`].
    ///
    /// # Errors
    /// As [`Optimizer::diagnostics`].
    fn diagnostics(&self) -> Result<Diagnostics>;
}

impl<R: Row> Train for Optimizer<R> {
    fn name(&self) -> &'static str {
        R::NAME
    }
    fn step(&mut self, closure: &mut dyn FnMut() -> Result<Tensor>) -> Result<f64> {
        // The inherent methods by their path, so that no reader has to know that they win over the trait's of the same
        // name.
        Optimizer::step(self, closure)
    }
    fn step_chunks(&mut self, chunks: usize, closure: &mut dyn FnMut(usize) -> Result<Tensor>) -> Result<f64> {
        Optimizer::step_chunks(self, chunks, closure)
    }
    fn accumulate(&mut self, closure: &mut dyn FnMut() -> Result<Tensor>) -> Result<f64> {
        Optimizer::accumulate(self, closure)
    }
    fn update(&mut self) -> Result<f64> {
        Optimizer::update(self)
    }
    fn steps(&self) -> u64 {
        Optimizer::steps(self)
    }
    fn collective(&self) -> &dyn Collective {
        Optimizer::collective(self)
    }
    fn params(&self) -> &Params {
        Optimizer::params(self)
    }
    fn lr(&self) -> f64 {
        Optimizer::lr(self)
    }
    fn set_lr(&mut self, lr: f64) -> Result<()> {
        Optimizer::set_lr(self, lr)
    }
    fn set_lr_group(&mut self, group: usize, lr: f64) -> Result<()> {
        Optimizer::set_lr_group(self, group, lr)
    }
    fn set_weight_decay(&mut self, delta: f64) -> Result<()> {
        Optimizer::set_weight_decay(self, delta)
    }
    fn set_schedule(&mut self, schedule: Schedule) -> Result<()> {
        Optimizer::set_schedule(self, schedule)
    }
    fn save(&self, path: &Path) -> Result<()> {
        Optimizer::save(self, path)
    }
    fn load(&mut self, path: &Path) -> Result<()> {
        Optimizer::load(self, path)
    }
    fn posterior(&self) -> Result<Box<dyn Posterior>> {
        self.posterior_or_none()?.boxed()
    }
    fn diagnostics(&self) -> Result<Diagnostics> {
        Optimizer::diagnostics(self)
    }
}

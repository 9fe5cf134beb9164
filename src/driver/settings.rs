//! What can be read and changed between steps. A change is checked for all parameters before the first of them has it.
//!
//! What is chosen once and for all is in `builder.rs`.

use super::Optimizer;
use super::arithmetic::{Arithmetic, check_lr};
use super::divergence::Divergence;
use super::row::{Row, shared};
use crate::{Error, Params, Result, Schedule};
use tch::Tensor;

impl<R: Row> Optimizer<R> {
    /// Number of updates so far.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// The configuration that parameters without an override have.
    pub fn config(&self) -> &R {
        &self.config
    }

    /// The parameters, in the order of the noise and of published trajectories.
    pub fn params(&self) -> &Params {
        &self.params
    }

    /// The learning rate of the next step, schedule included, of parameters without an override.
    pub fn lr(&self) -> f64 {
        self.lr * self.schedule.factor(self.steps)
    }

    /// One state tensor by its name in [`Row::STATE`](crate::rule::Row::STATE), for example
    /// `state("fc.weight", "hess")`, of the parameter of this name or of the block that it is in: a handle to the
    /// optimizer's own memory. `None` if there is no such parameter or state, or if the row has no use for it (the
    /// momentum of SGD without momentum).
    pub fn state(&self, parameter: &str, name: &str) -> Option<Tensor> {
        let i = R::STATE.iter().position(|s| *s == name)?;
        let leaf = self.params.number(parameter)?;
        let unit = self.units.iter().find(|unit| unit.members.contains(&leaf))?;
        R::Arithmetic::state(unit, i)
    }

    /// Sets the learning rate of all parameters, in every group and with an override too; the schedule multiplies it.
    ///
    /// # Errors
    /// A learning rate out of range; nothing has changed then.
    pub fn set_lr(&mut self, lr: f64) -> Result<()> {
        check_lr(lr)?;
        // Also for variables that are created later.
        self.lr = lr;
        // Another rate is a remedy, and deserves a chance with the loss as it is now.
        self.divergence = self.divergence.map(Divergence::anew);
        self.units.iter_mut().for_each(|unit| unit.lr = lr);
        Ok(())
    }

    /// Sets the learning rate of the parameters of one group.
    ///
    /// # Errors
    /// A learning rate out of range, or a group without a parameter of its own; nothing has changed then.
    pub fn set_lr_group(&mut self, group: usize, lr: f64) -> Result<()> {
        check_lr(lr)?;
        self.check_group(group)?;
        for unit in &mut self.units {
            if self.params.leaves()[unit.members[0]].group == group {
                unit.lr = lr;
            }
        }
        Ok(())
    }

    /// Sets the weight decay of all parameters, in every group and with an override too. A [`Prior`](crate::Prior) that
    /// was given stays.
    ///
    /// # Errors
    /// A weight decay out of range; nothing has changed then.
    pub fn set_weight_decay(&mut self, delta: f64) -> Result<()> {
        self.configure(|c| c.with_weight_decay(delta))
    }

    /// Sets the weight decay of the parameters of one group.
    ///
    /// # Errors
    /// A weight decay out of range, or a group without a parameter; nothing has changed then.
    pub fn set_weight_decay_group(&mut self, group: usize, delta: f64) -> Result<()> {
        self.configure_group(group, |c| c.with_weight_decay(delta))
    }

    /// Replaces the schedule; its step count goes on.
    ///
    /// # Errors
    /// A schedule out of range; nothing has changed then.
    pub fn set_schedule(&mut self, schedule: Schedule) -> Result<()> {
        schedule.validate()?;
        self.schedule = schedule;
        self.changed();
        Ok(())
    }

    /// Changes any hyper-parameter of all parameters, for example `|c| c.momentum(0.9)`.
    ///
    /// # Errors
    /// A value out of range, or a change of how often or where the loss is evaluated; nothing has changed then.
    pub fn configure(&mut self, change: impl Fn(R) -> R) -> Result<()> {
        self.configure_where(|_| true, &change)?;
        self.config = change(self.config);
        self.changed();
        Ok(())
    }

    /// Changes any hyper-parameter of the parameters of one group. Variables that are created later get the settings
    /// that the group was built with.
    ///
    /// # Errors
    /// A group without a parameter, a row with one block of all weights, and as [`Optimizer::configure`].
    pub fn configure_group(&mut self, group: usize, change: impl Fn(R) -> R) -> Result<()> {
        self.check_group(group)?;
        self.configure_where(|g| g == group, &change)
    }

    /// Errors unless the group's parameters can have settings of their own.
    fn check_group(&self, group: usize) -> Result<()> {
        if self.units.iter().any(|unit| unit.members.len() > 1) {
            let problem = format!("{} has one block of all weights and so no groups", R::NAME);
            return Err(Error::Parameters(problem));
        }
        if !self.params.leaves().iter().any(|l| l.group == group) {
            let mut groups: Vec<usize> = self.params.leaves().iter().map(|l| l.group).collect();
            groups.sort_unstable();
            groups.dedup();
            return Err(Error::Parameters(format!("none is in group {group}; there are the groups {groups:?}")));
        }
        Ok(())
    }

    fn configure_where(&mut self, applies: impl Fn(usize) -> bool, change: &impl Fn(R) -> R) -> Result<()> {
        let base = shared(&self.config);
        let changed = |row: R| {
            let row = change(row);
            row.validate()?;
            let fixed = "how often and where the loss is evaluated is fixed when the optimizer is built";
            if shared(&row) == base { Ok(row) } else { Err(Error::Parameters(fixed.to_owned())) }
        };
        // The base as well: variables that are created later get it.
        changed(self.config)?;
        let rows = self.units.iter().map(|unit| {
            let group = self.params.leaves()[unit.members[0]].group;
            let row = if applies(group) { changed(unit.row)? } else { unit.row };
            R::Arithmetic::admits(&unit.prior, &row).map(|()| row)
        });
        let rows = rows.collect::<Result<Vec<_>>>()?;
        for (unit, row) in self.units.iter_mut().zip(rows) {
            R::Arithmetic::configure(unit, &self.params, row);
        }
        self.changed();
        Ok(())
    }
}
